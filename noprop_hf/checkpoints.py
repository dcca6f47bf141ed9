"""Checkpoints of runs that may be killed at any moment.

A checkpoint is written aside and gets its name when it is whole. In it lies a seal: what its files were, and what the
run was that wrote them. A run that starts again therefore knows which states it can trust, and refuses those that
belong to other settings.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from .shards_noprop import without_progress_bar


logger = logging.get_logger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"  # in a model directory: what is not finished, and who is at it
SEAL_NAME = "seal.json"
STAGING_FOLDER = "unfinished"
PREEMPTED = 128 + signal.SIGTERM  # the exit status of a process that SIGTERM ended

# What the bits of a result depend on. The rest says where, how often and how fast.
RESULT_ARGUMENTS = (
    "seed",
    "data_seed",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "fp16",
    "bf16",
)


class DurableTrainer(Trainer):
    """A [`Trainer`] that goes on where it was, whatever ended it.

    Args:
        identity: what a result depends on beside the training arguments, such as fingerprints of model and data.
        kwargs: arguments of [`Trainer`].
    """

    def __init__(self, *args, identity: Mapping[str, Any] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.identity = dict(identity or {})
        self._staging: str | None = None
        self._finite = torch.ones((), dtype=torch.bool, device=self.args.device)
        self._preemption = PreemptionCallback()
        self.add_callback(self._preemption)

    def train_durably(self) -> TrainOutput:
        """Train, from the newest good checkpoint on.

        Raises:
            FloatingPointError: the loss is no number any more.
            SystemExit: SIGTERM came before the end; the state is saved.
            ValueError: what checkpoints there are belong to other settings, or none of them is whole.
        """
        directory = Path(self.args.output_dir)
        checkpoint = newest_checkpoint(directory, self.run_identity())
        if checkpoint is not None:
            logger.warning(f"Goes on from {checkpoint}.")
        output = self.train(resume_from_checkpoint=checkpoint)
        self._check_loss()
        if self._preemption.came and self.state.global_step < self.state.max_steps:
            logger.warning(f"SIGTERM: saved at step {self.state.global_step}; the same command goes on from there.")
            raise SystemExit(PREEMPTED)
        return output

    def run_identity(self) -> dict[str, Any]:
        """What the bits of the result depend on, as values of JSON."""
        arguments = {name: getattr(self.args, name) for name in RESULT_ARGUMENTS}
        return json.loads(json.dumps(self.identity | arguments, default=str))

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        if self.args.world_size == 1:
            loss = super().training_step(*args, **kwargs)
        else:  # noise and dropout of its own for every process, from random numbers that stay common: data follow those
            seed = int(torch.randint(2**62, ())) + self.args.process_index
            device = self.args.device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                loss = super().training_step(*args, **kwargs)
        self._finite &= loss.isfinite()  # looked at when something is logged or saved: every look waits for the device
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._check_loss()
        super().log(logs, start_time)

    def _check_loss(self) -> None:
        if not self._finite:
            raise FloatingPointError(
                f"The loss is not a number any more, at step {self.state.global_step} at the latest. Nothing of that "
                "was saved. Lower --learning_rate, or train with --bf16 or without --fp16."
            )

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._check_loss()
        directory = Path(self.args.output_dir)
        staging = directory / STAGING_FOLDER
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self._wait_for_all()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            self._wait_for_all()
            if self.args.should_save:
                seal(staging / name, self.run_identity())
        except Exception as error:
            raise_if_disk_is_full(directory, error)
            raise
        finally:
            self._staging = None
        if self.args.should_save:
            if (directory / name).exists():  # one that could not be read
                os.replace(directory / name, staging / "replaced")
            os.replace(staging / name, directory / name)
            if self.args.save_total_limit:
                # Never fewer than two: if the newest cannot be read, there is one to fall back to. What goes is moved
                # aside first, since a run may be killed while it deletes.
                for _, path in checkpoints_of(directory)[max(2, self.args.save_total_limit) :]:
                    os.replace(path, staging / path.name)
            shutil.rmtree(staging)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with without_progress_bar():
            super()._save(output_dir, state_dict)

    def _wait_for_all(self) -> None:
        if self.args.world_size > 1:
            distributed.barrier()


class PreemptionCallback(TrainerCallback):
    """On SIGTERM, ends training after the step it is in, with a checkpoint."""

    def __init__(self):
        self.came = False
        self._handler: Any = None

    def on_train_begin(self, args: TrainingArguments, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.came = True

    def on_step_end(self, args: TrainingArguments, state, control, **kwargs):
        if args.world_size > 1:  # all stop at the same step, whoever was told
            came = torch.tensor(float(self.came), device=args.device)
            distributed.all_reduce(came)
            self.came = bool(came)
        if self.came:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state, control, **kwargs):
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)


def seal(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Bring the files of a checkpoint to the disk, and note down what they are and what run they belong to."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    hashes = {}
    for name, path in files.items():
        with open(path, "rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    with open(checkpoint / SEAL_NAME, "w", encoding="utf-8") as file:
        json.dump({"identity": dict(identity), "files": hashes}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_seal(checkpoint: Path) -> dict[str, Any] | None:
    """The seal of a checkpoint whose files are all what they were; none of one that is damaged."""
    try:
        kept = json.loads((checkpoint / SEAL_NAME).read_text(encoding="utf-8"))
        for name, expected in kept["files"].items():
            with open(checkpoint / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return None
        return kept
    except (OSError, ValueError, KeyError, TypeError):
        return None


def checkpoints_of(directory: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints in a directory, newest first, whole or not."""
    found = []
    for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if step and path.is_dir():
            found.append((int(step[1]), path))
    return sorted(found, reverse=True)


def newest_checkpoint(directory: Path, identity: Mapping[str, Any]) -> str | None:
    """The newest good checkpoint in a directory, or none where there is no checkpoint.

    Raises:
        ValueError: checkpoints belong to a run of another identity, or none is whole.
    """
    checkpoints = checkpoints_of(directory)
    for step, path in checkpoints:
        kept = read_seal(path)
        if kept is None:
            logger.warning(f"{path} is damaged: the state before it is taken instead.")
            continue
        names = sorted(set(kept["identity"]) | set(identity))
        changed = [name for name in names if kept["identity"].get(name) != identity.get(name)]
        if changed:
            listed = ", ".join(f"{n} was {kept['identity'].get(n)!r} and is {identity.get(n)!r}" for n in changed)
            raise ValueError(
                f"The run that stopped at step {step} in {directory} was another one: {listed}. Run it with its own "
                "settings, or remove that folder to start anew."
            )
        return str(path)
    if checkpoints:
        raise ValueError(
            f"None of the checkpoints in {directory} is whole, so nothing is left to go on from. Remove that folder to "
            "start anew."
        )
    return None


def raise_if_disk_is_full(directory: Path, error: Exception) -> None:
    """Say so where `error` came of a full disk. Libraries report that in words of their own, so the disk is asked.

    Raises:
        OSError: the disk is full.
    """
    probe = directory / "probe"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(2**20))
            os.fsync(file.fileno())
    except OSError as answer:
        if answer.errno in (errno.ENOSPC, errno.EDQUOT):
            text = "The disk is full. Make room and run the same command again: it goes on from the last checkpoint"
            raise OSError(answer.errno, text, str(directory)) from error
    finally:
        probe.unlink(missing_ok=True)
