"""Checkpoints of runs that may be killed at any moment.

A checkpoint is written aside and gets its name when it is complete. Its manifest records the hashes of its files and
the identity of the run that wrote them. A run that starts again therefore knows which checkpoints are intact, and
refuses those of other settings.
"""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import TorchDynamoPlugin, reduce
from datasets import IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from . import __version__
from .layout import checkpoint_folder
from .shards_noprop import without_progress_bar


logger = logging.get_logger(__name__)

MANIFEST_NAME = "manifest.json"
STAGING_FOLDER = "unfinished"
PREEMPTED = 128 + signal.SIGTERM  # the exit status of a process that SIGTERM ended

# What transformers calls arguments of activation checkpointing: until 5.22 by an older name.
CHECKPOINTING = "activation_checkpointing"
if not hasattr(TrainingArguments, CHECKPOINTING):
    CHECKPOINTING = "gradient_checkpointing"

# Training arguments that the trained weights depend on. All others only affect where, how often or how fast.
RESULT_ARGUMENTS = (
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
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
    "gradient_accumulation_steps",
    "average_tokens_across_devices",
    "max_grad_norm",
    "bf16",
    "fp16",
    "tf32",
    f"{CHECKPOINTING}_kwargs",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "load_best_model_at_end",
    "full_determinism",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "train_sampling_strategy",
    "ddp_bucket_cap_mb",
    "ddp_backend",
)
# With `load_best_model_at_end`, those that decide which weights are the best.
SELECTION_ARGUMENTS = (
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "per_device_eval_batch_size",
    "logging_nan_inf_filter",
)


class DurableTrainer(Trainer):
    """A [`Trainer`] that can be killed at any moment and resumes to the same result.

    Args:
        identity: the dependencies of the result besides the training arguments, such as fingerprints of model and data.
        frozen: modules that are not trained, such as the table, by the names of the model's arguments that take them.
        kwargs: arguments of [`Trainer`].
    """

    def __init__(
        self,
        *args,
        identity: Mapping[str, Any] | None = None,
        frozen: Mapping[str, nn.Module] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.identity = dict(identity or {})
        self.frozen = {name: module.to(self.args.device) for name, module in (frozen or {}).items()}
        self._staging: str | None = None
        self._finite = torch.ones((), dtype=torch.bool, device=self.args.device)
        self._preemption = PreemptionCallback()
        self.add_callback(self._preemption)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        return super().compute_loss(model, {**inputs, **self.frozen}, *args, **kwargs)

    @property
    def kept_step(self) -> int:
        """The step whose weights are kept at the end: the best one with `load_best_model_at_end`, or else the last."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        return best or self.state.global_step

    def train_durably(self) -> TrainOutput:
        """Train from the newest intact checkpoint, or from the start if there is none.

        Raises:
            FloatingPointError: if the loss is not finite.
            SystemExit: if SIGTERM arrived; the state is saved.
            ValueError: if the checkpoints belong to other settings, none is intact, or the data give no batch.
        """
        directory = Path(self.args.output_dir)
        checkpoint = newest_checkpoint(directory, self.run_identity())
        if self.args.should_save:
            shutil.rmtree(directory / STAGING_FOLDER, ignore_errors=True)  # of a run that was killed
        with self._preemption:
            output = self.train() if checkpoint is None else self._resume(checkpoint)
            self._check_loss()
            step = self.state.global_step
            if self._preemption.is_agreed(self.args):
                if not checkpoint_at(directory, step).is_dir():  # SIGTERM arrived after the last step
                    self._save_checkpoint(self.model, None)
                logger.warning(f"SIGTERM: saved at step {step}; run the same command again to resume from there.")
                raise SystemExit(PREEMPTED)
        if self._preemption.came:  # after that
            raise SystemExit(PREEMPTED)
        if step < self.state.max_steps:
            raise ValueError(
                f"The training data ended at step {step} of {self.state.max_steps}: give more text, a smaller "
                "--per_device_train_batch_size, or leave --dataloader_drop_last out."
            )
        if self.kept_step != step:
            self._load_from_checkpoint(self._intact_checkpoint(self.kept_step))
        self._check_weights()
        return output

    def _resume(self, checkpoint: str) -> TrainOutput:
        """Train on from a checkpoint; one of the last step only has its weights loaded."""
        logger.info(f"Resuming from {checkpoint}.")
        state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
        if self.args.load_best_model_at_end and state.best_global_step:
            self._intact_checkpoint(state.best_global_step)
        if state.global_step < state.max_steps:
            return self.train(resume_from_checkpoint=checkpoint)
        self.state = state
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self._load_from_checkpoint(checkpoint)
        return TrainOutput(state.global_step, 0.0, {"train_runtime": 0.0})

    def _intact_checkpoint(self, best_step: int) -> str:
        path = checkpoint_at(Path(self.args.output_dir), best_step)
        if read_manifest(path) is None:
            raise ValueError(
                f"The checkpoint {path} with the best weights is missing or damaged. Remove the folder {path.parent} "
                "to start from the beginning."
            )
        return str(path)

    def run_identity(self) -> dict[str, Any]:
        """Collect everything that the bits of the result depend on, as JSON values."""
        return run_identity(self.args, self.identity, isinstance(self.train_dataset, IterableDataset))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluate without drawing from the random numbers of training, so that no weight depends on evaluations."""
        with self._forked_rng():
            return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        """Load all rows, also with `dataloader_drop_last`, which is meant for training."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _forked_rng(self) -> AbstractContextManager[None]:
        device = self.args.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        if self.args.world_size == 1:
            loss = super().training_step(*args, **kwargs)
        else:
            # Each rank needs its own noise and dropout, but the global random numbers must stay in step because they
            # drive the order of the data. So fork them and seed by rank.
            seed = int(torch.randint(2**62, ())) + self.args.process_index
            with self._forked_rng():
                torch.manual_seed(seed)
                loss = super().training_step(*args, **kwargs)
        self._finite &= loss.isfinite()  # read only when something is logged or saved, as reading waits for the device
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

    def _check_weights(self) -> None:
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise FloatingPointError(
                f"The weights are not finite numbers any more, at step {self.state.global_step} at the latest, and are "
                "not saved. Lower --learning_rate, or train with --bf16 or without --fp16."
            )

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # Batches without padding have no mask.
        if "input_ids" in inputs and "attention_mask" not in inputs:
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True  # also between the saves of `save_steps`
        return is_best

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._check_loss()
        self._check_weights()
        directory = Path(self.args.output_dir)
        staging = directory / STAGING_FOLDER
        name = checkpoint_at(directory, self.state.global_step).name
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            self.state.best_model_checkpoint = None  # a path in the staging folder: `best_global_step` is enough
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                write_manifest(staging / name, self.run_identity())
        except Exception as error:
            raise_if_disk_is_full(directory, error)
            raise
        finally:
            self._staging = None
        if self.args.should_save:
            if (directory / name).exists():  # damaged, or saved before the evaluation at the end of an epoch
                os.replace(directory / name, staging / "replaced")
            os.replace(staging / name, directory / name)
            flush(directory)
            if self.args.save_total_limit:
                # Keep at least two: if the newest cannot be read, there is one to fall back to. Others are moved aside
                # first, since a run may be killed while it deletes.
                checkpoints = checkpoints_of(directory)
                excess = len(checkpoints) - max(2, self.args.save_total_limit)
                removable = [path for step, path in checkpoints[2:] if step != self.state.best_global_step]
                for path in removable[::-1][: max(0, excess)]:
                    os.replace(path, staging / path.name)
            shutil.rmtree(staging)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with without_progress_bar():
            super()._save(output_dir, state_dict)


def trainer_arguments(training_args: TrainingArguments, name: str, **fields: Any) -> TrainingArguments:
    """Derive the arguments of one [`DurableTrainer`] from those of the run.

    Its checkpoints hold a copy of them, so the token of the Hub is left out.

    Args:
        name: the subfolder of checkpoints.
        fields: values that replace those of the run.
    """
    folder = checkpoint_folder(Path(training_args.output_dir), name)
    fields |= {"output_dir": str(folder), "push_to_hub": False, "hub_token": None, "prediction_loss_only": True}
    return use_one_device(dataclasses.replace(training_args, **fields))


def use_one_device(args: TrainingArguments) -> TrainingArguments:
    """Set the arguments of a `Trainer` that uses one device in each process."""
    if args.n_gpu > 1:
        args._n_gpu = 1  # as `Trainer` does itself for models that must not be wrapped in `DataParallel`
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every step uses all parameters
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # torch warns at every evaluation where there is no device to pin it for
    return args


def run_identity(args: TrainingArguments, identity: Mapping[str, Any], streams: bool) -> dict[str, Any]:
    """Collect everything that the bits of a result depend on, as JSON values.

    Args:
        identity: the dependencies besides the training arguments.
        streams: whether the training data are a stream, which workers of a data loader read in another order.
    """
    names = RESULT_ARGUMENTS + (SELECTION_ARGUMENTS if args.load_best_model_at_end else ())
    if streams:
        names += ("dataloader_num_workers",)
    arguments = {name: getattr(args, name) for name in (*names, "world_size")}
    # Both can also be set by the launcher.
    arguments |= {"mixed_precision": args.mixed_precision, "dynamo_backend": TorchDynamoPlugin().backend}
    return json.loads(json.dumps(arguments | dict(identity), default=str))


def training_note(args: TrainingArguments, seed: int) -> str:
    """Describe a training for the metadata of a shard, so that it can be repeated.

    Has a line for each argument that is set and that the result depends on, and for each version.

    Args:
        seed: the seed of the run, from which those of blocks are derived.
    """
    notes = run_identity(args, {"seed": seed}, streams=False)
    del notes["num_train_epochs" if args.max_steps > 0 else "max_steps"]  # the other one has precedence
    notes = {name: value for name, value in notes.items() if value is not None and value is not False}
    notes |= {"torch": torch.__version__, "transformers": transformers.__version__, "noprop_hf": __version__}
    return "\n".join(f"{name}: {value}" for name, value in notes.items())


def warn_of_other_settings(kept: str, metadata: Mapping[str, str], args: TrainingArguments, seed: int) -> None:
    """Log the arguments that a finished result was trained with and that differ now, except for versions.

    Args:
        kept: the result that is kept, as the subject of a sentence.
        metadata: those of its shard, of which "training" is the result of [`training_note`], if there is one.
        args, seed: as for [`training_note`].
    """
    notes = (metadata.get("training", ""), training_note(args, seed))
    before, after = (dict(line.partition(": ")[::2] for line in note.splitlines()) for note in notes)
    names = [name for name in after if name in before and name not in ("torch", "transformers", "noprop_hf")]
    changed = [f"{name} is {after[name]} and was {before[name]}" for name in names if after[name] != before[name]]
    if changed:
        logger.warning(
            f"{kept} is kept, with its own settings: {', '.join(changed)}. Train in another --output_dir to use the "
            "present ones."
        )


class PreemptionCallback(TrainerCallback):
    """End training on SIGTERM, after the current step and with a checkpoint. The context handles the signal."""

    def __init__(self):
        self.came = False
        self._stopping = False
        self._handler: Any = None

    def __enter__(self) -> "PreemptionCallback":
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exception) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)

    def _note(self, number: int, frame: Any) -> None:
        self.came = True

    def is_agreed(self, args: TrainingArguments) -> bool:
        """Whether any process of the group received SIGTERM: it may reach only some, and all must stop together."""
        if args.world_size > 1:
            came = torch.tensor(float(self.came), device=args.device)
            self.came = bool(reduce(came, "sum"))
        return self.came

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._stopping = self.is_agreed(args)
        if self._stopping:
            control.should_training_stop = True
            if not _ends_epoch(state):  # at the end of an epoch, save after its evaluation
                control.should_save = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if self._stopping:
            control.should_save = _ends_epoch(state)
            if not control.should_save:  # an interrupted epoch is evaluated when it is over
                control.should_evaluate = control.should_log = False


def _ends_epoch(state: TrainerState) -> bool:
    return state.global_step >= state.max_steps or (state.epoch or 0) % 1 == 0


def write_manifest(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Flush the files of a checkpoint to disk, and record their hashes and the run they belong to."""
    files = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    hashes = {}
    for name, path in files.items():
        with open(path, "rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    record = {"identity": dict(identity), "threads": torch.get_num_threads(), "files": hashes}
    with open(checkpoint / MANIFEST_NAME, "w", encoding="utf-8") as file:
        json.dump({**record, "hash": _hash(record)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in {path.parent for path in files.values()} | {checkpoint}:
        flush(folder)


def flush(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # a folder may be unreadable, or on a file system that cannot flush folders
        if not path.is_dir() or error.errno not in (errno.EACCES, errno.EINVAL, errno.EROFS):
            raise


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """Read the manifest of a checkpoint; None if the manifest or a file is damaged."""
    try:
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
        if manifest.pop("hash") != _hash(manifest):
            return None
        for name, expected in manifest["files"].items():
            with open(checkpoint / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return None
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def checkpoint_at(directory: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return directory / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoints_of(directory: Path) -> list[tuple[int, Path]]:
    """List steps and folders of the checkpoints in a directory, newest first, including damaged ones."""
    checkpoints = []
    for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if step and path.is_dir():
            checkpoints.append((int(step[1]), path))
    return sorted(checkpoints, reverse=True)


def _change(name: str, was: Any, now: Any) -> str:
    """Describe a change of an identity, without hashes."""
    names = {
        "data": "the training data (--train_file, --dataset_name, and how they are cut)",
        "validation_data": "the validation data",
        "fingerprint": "the embedding table or the configuration",
        "clusters": "the clusters of text",
        "start": "the model of phase 1",
    }
    return f"{names[name]} changed" if name in names and was and now else f"{name} was {was!r} and is {now!r}"


def newest_checkpoint(directory: Path, identity: Mapping[str, Any]) -> str | None:
    """Return the newest intact checkpoint in a directory, or None if it has no checkpoint.

    Raises:
        ValueError: if the newest intact checkpoint belongs to a run of another identity, or all are damaged.
    """
    checkpoints = checkpoints_of(directory)
    for step, path in checkpoints:
        manifest = read_manifest(path)
        if manifest is None:
            logger.warning(f"{path} is damaged: using the checkpoint before it.")
            continue
        expected = manifest["identity"]
        names = sorted(set(expected) | set(identity))
        changed = [name for name in names if expected.get(name) != identity.get(name)]
        if changed:
            changes = ", ".join(_change(name, expected.get(name), identity.get(name)) for name in changed)
            raise ValueError(
                f"The run that stopped at step {step} in {directory} had other settings: {changes}. Run it with its "
                "own settings and data, or remove that folder to start again."
            )
        threads = torch.get_num_threads()
        if manifest.get("threads", threads) != threads:
            logger.warning(
                f"{path} was written with {manifest['threads']} threads, now there are {threads}: on a CPU, sums are "
                f"rounded in another order. OMP_NUM_THREADS={manifest['threads']} gives the bits of an undisturbed run."
            )
        return str(path)
    if checkpoints:
        raise ValueError(
            f"All checkpoints in {directory} are damaged, so the run cannot resume. Remove that folder to start again."
        )
    return None


def raise_if_disk_is_full(directory: Path, error: Exception) -> None:
    """Raise a clear error if `error` was caused by a full disk.

    Libraries report a full disk in different ways, so a file is written to find out.

    Raises:
        OSError: if the disk is full.
    """
    probe = directory / "probe"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(2**20))
            os.fsync(file.fileno())
    except OSError as answer:
        if answer.errno in (errno.ENOSPC, errno.EDQUOT):
            text = "The disk is full. Free space and run the same command again: it resumes from the last checkpoint"
            raise OSError(answer.errno, text, str(directory)) from error
    finally:
        probe.unlink(missing_ok=True)
