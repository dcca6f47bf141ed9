"""Experiment trackers: phase 1 and every block log to a separate run, such as `block_03`.

Blocks may train in turn, or at the same time in several processes. Values have the same names in every run, those of
the callbacks of `Trainer` (`train/loss_nats`, `eval/bound_nats`), so that a tracker plots all blocks in one chart.
`Trainer` handles the trackers of `--report_to` that are not in `TRACKERS`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, rewrite_logs

from .layout import LOGS_FOLDER, RESULTS_FILE


TRACKERS = ("tensorboard", "trackio", "wandb")


def start_trackers(
    args: TrainingArguments, directory: Path, name: str, config: dict[str, Any] | None = None, step: int = 0
) -> list[GeneralTracker]:
    """Start a run in every tracker that `args.report_to` names.

    Args:
        directory: the model directory. Its name, unless `args.run_name` is set, is that of the group of runs.
        name: the name of the run in its group.
        config: settings to show with the run.
        step: the step from which the run resumes; later values of an interrupted run are discarded.
    """
    group = args.run_name or directory.resolve().name
    common = {"name": f"{group}-{name}", "group": group, "config": config}
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": name, "logging_dir": directory / LOGS_FOLDER, "purge_step": step + 1},
        "trackio": {
            "run_name": args.project,
            "space_id": args.trackio_space_id,
            "bucket_id": getattr(args, "trackio_bucket_id", None),  # not in transformers 5.2
            "private": args.hub_private_repo,
            "resume": "allow" if step else "never",
            **common,
        },
        # Its steps cannot go back, so a resumed training is a new run of the same name.
        "wandb": {"run_name": os.getenv("WANDB_PROJECT", args.project), "reinit": "create_new", **common},
    }
    trackers = [LOGGER_TYPE_TO_CLASS[kind](**options[kind]) for kind in TRACKERS if kind in args.report_to]
    for tracker in trackers:
        tracker.start()
    return trackers


class TrackingCallback(TrainerCallback):
    """Send the logs of a `Trainer` to trackers. The context ends their runs.

    Args:
        directory: the model directory.
        name: the name of the run.
        in_nats: whether losses are in nats per token, and are named so.
    """

    def __init__(self, directory: Path, name: str, in_nats: bool = True):
        self.directory = directory
        self.name = name
        self.in_nats = in_nats
        self.trackers: list[GeneralTracker] = []

    def __enter__(self) -> "TrackingCallback":
        return self

    def __exit__(self, *exception) -> None:
        for tracker in self.trackers:
            tracker.finish()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control, model=None, **kwargs):
        if state.is_world_process_zero:
            config = model.config.to_dict() | args.to_dict()
            private = ("output_dir", "logging_dir")  # local paths
            config = {key: value for key, value in config.items() if not key.startswith("_") and key not in private}
            self.trackers = start_trackers(args, self.directory, self.name, config, state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control, logs=None, **kwargs):
        unit = "_nats" if self.in_nats else ""
        self.log({key + unit if key.endswith("loss") else key: value for key, value in logs.items()}, state.global_step)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Send numbers and texts to the trackers.

        Args:
            values: values by their names in the logs of `Trainer`; `eval_bound_nats` is shown as `eval/bound_nats`,
                `loss` as `train/loss`.
        """
        for tracker in self.trackers:
            tracker.log(rewrite_logs(values), step)


class NamedProgressCallback(ProgressCallback):
    """Show the stock progress bar with a title, and one short line per log."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args, state: TrainerState, control, logs=None, **kwargs):
        shown = {k: v for k, v in (logs or {}).items() if k.endswith(("loss", "nats", "learning_rate"))}
        if shown and state.is_world_process_zero and self.training_bar is not None:
            figures = ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if isinstance(v, float))
            self.training_bar.write(f"[{self.title}] step {state.global_step}: {figures}", file=sys.stderr)


def track(trainer: Trainer, directory: Path, name: str, title: str, in_nats: bool = True) -> TrackingCallback:
    """Add a [`TrackingCallback`] to a trainer, instead of the stock callbacks of the same trackers.

    Args:
        title: the title of the progress bar.
    """
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(NamedProgressCallback(title))
    for kind in TRACKERS:
        trainer.remove_callback(INTEGRATION_TO_CALLBACK[kind])
    callback = TrackingCallback(directory, name, in_nats)
    trainer.add_callback(callback)
    return callback


def track_results(args: TrainingArguments, directory: Path) -> None:
    """Send the results of an evaluated model to the trackers, in a run for each split.

    Raises:
        FileNotFoundError: if the model is not evaluated.
    """
    results = json.loads((directory / RESULTS_FILE).read_text(encoding="utf-8"))
    for split, nats in results["details"].items():
        values = {"bound/nats": nats["bound"], "predictive/nats": nats["predictive"]}
        values |= {f"bound/block_{block:02d}": part for block, part in enumerate(nats["block_nats"])}
        for tracker in start_trackers(args, directory, split):
            tracker.log(values)
            tracker.finish()
