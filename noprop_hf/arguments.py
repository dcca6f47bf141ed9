"""Dataclasses that recipes and command lines fill, and checks of the training arguments."""

import copy
import dataclasses
import errno
import math
import os
import traceback
from argparse import Namespace
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from datasets.exceptions import DatasetsError
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels
from transformers.utils import strtobool

from .checkpoints import CHECKPOINTING
from .configuration_noprop import NoPropConfig


CPYTHON_DOCS = "cpython-docs"
PACKAGE = Path(__file__).parent
SMALLEST_VOCABULARY = 256 + 3  # of a trained tokenizer: all bytes and the special tokens
# Errors of the operating system that the user can correct: disk space, permissions, a file where a directory is needed.
MENDABLE = {
    getattr(errno, name) for name in "ENOSPC EDQUOT EACCES EPERM EROFS EISDIR ENOTDIR EEXIST ENAMETOOLONG".split()
}


@dataclass
class ModelArguments:
    """The model to build. Defaults are those of [`NoPropConfig`]."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "A tokenizer of the Hub or a local directory. Default: train a byte-level BPE one."},
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Maximum size of the vocabulary of the tokenizer to train. Default: 4,096."},
    )
    embeddings_from: str | None = field(
        default=None,
        metadata={
            "help": "Take the input embeddings and the tokenizer of this transformers model instead of pretraining."
        },
    )
    trunk_from: str | None = field(
        default=None,
        metadata={
            "help": "Let phase 1 and all blocks read the last hidden states of this causal model of transformers, "
            "which is frozen and copied into the model, with its tokenizer. Blocks then start from phase 1."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the table and of every layer."})
    num_blocks: int | None = field(default=None, metadata={"help": "Number of denoising blocks."})
    num_layers_per_block: int | None = field(default=None, metadata={"help": "Transformer layers in a block."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads of a layer."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the feed-forward layers."})
    attention_dropout: float | None = field(default=None, metadata={"help": "Dropout of the attention weights."})
    noise_schedule: str | None = field(
        default=None, metadata={"help": "How noise levels are chosen: 'information' or 'cosine'."}
    )
    loss_type: str | None = field(default=None, metadata={"help": "Denoising loss: 'cross_entropy' or 'mse'."})
    sampled_softmax: bool | None = field(
        default=None,
        metadata={"help": "Train blocks with a softmax over the tokens of a batch instead of the vocabulary."},
    )
    denoising_weight: float | None = field(
        default=None, metadata={"help": "Weight of the denoising loss against the next-token loss on pure noise."}
    )
    num_pretraining_layers: int | None = field(default=None, metadata={"help": "Layers of the model of phase 1."})
    pretraining_objective: str | None = field(
        default=None,
        metadata={"help": "Objective of phase 1: 'mlm' (masked tokens) or 'clm' (next tokens)."},
    )
    block_initialization: str | None = field(
        default=None,
        metadata={"help": "Initial weights of blocks: 'pretraining' (from phase 1) or 'random'."},
    )
    block_data: str | None = field(
        default=None,
        metadata={
            "help": "Text of a block: 'shared' (all of it), or 'clusters' (one of num_blocks clusters of similar text; "
            "a router weighs the blocks)."
        },
    )

    def __post_init__(self):
        if self.embeddings_from is not None and self.trunk_from is not None:
            raise ValueError("A trunk comes with its embeddings: leave --embeddings_from out.")
        if self.trains_tokenizer and (self.vocab_size or SMALLEST_VOCABULARY) < SMALLEST_VOCABULARY:
            raise ValueError(
                f"--vocab_size must be at least {SMALLEST_VOCABULARY} (all bytes and the special tokens) to train a "
                f"tokenizer: got {self.vocab_size}."
            )

    @property
    def trains_tokenizer(self) -> bool:
        """Whether a tokenizer is trained on the corpus, since no other model has one."""
        return self.tokenizer_name is None and self.embeddings_from is None and self.trunk_from is None

    def config_fields(self) -> dict[str, Any]:
        """Return the fields of [`NoPropConfig`] that are set."""
        names = [name for name in NoPropConfig.__annotations__ if hasattr(self, name)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class DataArguments:
    """The training and evaluation data."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A dataset of the Hub or a local dataset directory, or 'cpython-docs': the documentation of the "
            "running Python, which needs no download."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Local training data instead of a dataset: text, JSON lines (.json, .jsonl), CSV or parquet; "
            "all but parquet also compressed with gzip (.jsonl.gz)."
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "Local validation data, instead of the dataset's split if it has one."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Local test data, like `validation_file`."})
    text_column_name: str = field(default="text", metadata={"help": "The column that holds the text."})
    validation_split_percentage: float = field(
        default=5.0,
        metadata={"help": "Without a validation split, hold out this last part of the training split."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Stream the dataset, without a copy on disk. Needs `max_steps`."}
    )
    max_length: int = field(default=128, metadata={"help": "Tokens in a window, or maximum tokens in a sample."})
    packing: bool = field(
        default=True,
        metadata={"help": "Cut the concatenated text into contiguous windows; if false, a row is one padded sample."},
    )
    append_eos: bool | None = field(
        default=None,
        metadata={
            "help": "With packing, end every row with the end-of-text token. Default: true, except for text files, "
            "whose rows are lines. Set it to false for datasets of lines, such as wikitext."
        },
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenization."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first training rows."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first rows of the validation and the test split."}
    )

    def __post_init__(self):
        if self.train_file is not None:
            if self.dataset_name is not None or self.dataset_config_name is not None:
                raise ValueError("Give either a `train_file` or a dataset by name, not both: leave one of them out.")
        elif self.dataset_name is None:
            raise ValueError("Give a `dataset_name` (try 'cpython-docs') or a `train_file`.")
        elif self.dataset_name == CPYTHON_DOCS and self.dataset_config_name is not None:
            raise ValueError(
                f"{CPYTHON_DOCS!r} has no configuration {self.dataset_config_name!r}: leave --dataset_config_name out."
            )
        if not 1 < self.max_length <= 2**20:
            raise ValueError(f"`max_length` must be at least 2 and at most {2**20}, got {self.max_length}.")
        for name, most in (
            ("preprocessing_num_workers", 1024),
            ("max_train_samples", None),
            ("max_eval_samples", None),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value <= (most or value):
                limit = f" and at most {most}" if most else ""
                raise ValueError(f"`{name}` must be at least 1{limit}, got {value}. Leave --{name} out for no limit.")

    def files(self) -> dict[str, str]:
        """Return the local files, by split."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: file for split, file in files.items() if file is not None}

    def has_lines(self, split: str) -> bool:
        """Whether the rows of a split are the lines of a text file."""
        files = self.files()
        file = files.get(split, files.get("train"))  # other splits are held out from a training file
        return file is not None and file_format(file) == "text"

    def ends_texts(self, split: str) -> bool:
        """Whether packing ends the rows of a split with the end-of-text token; only if those of training have it."""
        if self.append_eos is not None:
            return self.append_eos
        return not self.has_lines("train") and not self.has_lines(split)

    @property
    def has_boundaries(self) -> bool:
        """Whether the tokens that begin and end a text occur in training."""
        return not self.packing or self.ends_texts("train")


@dataclass
class PretrainingArguments:
    """Phase 1. Defaults are the training arguments of phase 2."""

    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that are masked ('mlm')."})
    pretraining_max_steps: int | None = field(default=None, metadata={"help": "Optimizer steps of phase 1."})
    pretraining_num_train_epochs: float | None = field(default=None, metadata={"help": "Epochs of phase 1."})
    pretraining_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of phase 1."})
    pretraining_per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Batch size of phase 1."}
    )

    def __post_init__(self):
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"`mlm_probability` must be between 0 and 1, got {self.mlm_probability}.")

    def training_fields(self) -> dict[str, Any]:
        """Return the fields of [`TrainingArguments`] that are set for phase 1, without their prefix."""
        prefix = "pretraining_"
        given = {name.removeprefix(prefix): value for name, value in vars(self).items() if name.startswith(prefix)}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class BlockArguments:
    """Phase 2."""

    blocks: str = field(default="all", metadata={"help": "Blocks to train: 'all', or a list such as '0,2-3'."})
    parallelism: str = field(
        default="auto",
        metadata={
            "help": "With several processes: 'blocks' (each process trains other blocks), 'data' (all processes train "
            "each block together) or 'auto' ('blocks', or groups of processes if there are fewer blocks).",
            "choices": ["auto", "blocks", "data"],
        },
    )
    take_over: bool = field(
        default=False, metadata={"help": "Train blocks that are claimed on the Hub by another worker that is gone."}
    )
    back_up: bool = field(
        default=False,
        metadata={
            "help": "When no other block is left, train blocks that are claimed on the Hub by other workers as well, "
            "which may be slower: the first worker to publish a block decides."
        },
    )
    sample_prompts: list[str] = field(default_factory=lambda: ["The"], metadata={"help": "Prompts for the samples."})
    sample_max_new_tokens: int = field(default=40, metadata={"help": "Length of the samples, in tokens."})

    def __post_init__(self):
        if not 0 < self.sample_max_new_tokens <= 2**20:
            raise ValueError(
                f"`sample_max_new_tokens` must be between 1 and {2**20}, got {self.sample_max_new_tokens}."
            )


@dataclass
class ShareArguments:
    """Fields of the model card that `--push_to_hub` uploads."""

    license: str | None = field(default=None, metadata={"help": "Licence of the model, by its identifier on the Hub."})
    language: str | None = field(default=None, metadata={"help": "Language of the text, by its ISO 639-1 code."})


@dataclass
class RunArguments:
    """The run as a whole.

    Attributes:
        processes: number of processes that were launched together.
    """

    dry_run: bool = field(
        default=False,
        metadata={"help": "Plan the run without training: data, model, steps, memory, time and disk."},
    )
    processes: int = field(default=1, init=False)


def parse_blocks(blocks: str, num_blocks: int) -> list[int]:
    """Read a selection of blocks such as `"0,2-3"` or `"all"`.

    Raises:
        ValueError: if the selection is malformed, or contains a block that the model does not have.
    """
    if blocks == "all":
        return list(range(num_blocks))
    selected: set[int] = set()
    for part in blocks.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"Cannot read --blocks {blocks!r}: write 'all', or a list such as '0,2-3'.")
        begin, end = int(first), int(last if dash else first)
        if begin > end:
            raise ValueError(f"Cannot read --blocks {blocks!r}: {part.strip()} ends before it begins.")
        if end >= num_blocks:
            raise ValueError(
                f"There is no block {max(begin, num_blocks)}: the model has {num_blocks} blocks, 0 to "
                f"{num_blocks - 1}. Change --blocks {blocks}."
            )
        selected.update(range(begin, end + 1))
    return sorted(selected)


def file_format(file: str) -> str:
    """Return the builder of `datasets` for a file, by its ending; text formats may be compressed (`.jsonl.gz`)."""
    name = file.lower().removesuffix(".gz")
    suffix = Path(name).suffix.lstrip(".")
    builders = {"txt": "text", "text": "text", "jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
    if suffix not in builders or (suffix == "parquet" and is_compressed(file)):
        raise ValueError(
            f"Cannot infer the format of {file!r}: use one of the endings {', '.join(builders)}, or, except for "
            "parquet, one of them with .gz."
        )
    return builders[suffix]


def is_compressed(file: str) -> bool:
    return file.lower().endswith(".gz")


# --- training arguments ----------------------------------------------------------------------------------------------

# Training arguments that are not supported in both phases, and why. Only their defaults are accepted.
UNSUPPORTED_ARGUMENTS = {
    "optim_target_modules": "is for optimizers that are not supported",
    "label_smoothing_factor": "has no counterpart in the losses of the two phases",
    "bf16_full_eval": "would cast the weights that are being trained",
    "fp16_full_eval": "would cast the weights that are being trained",
    "use_liger_kernel": "has no kernels for these models",
    "liger_kernel_config": "has no kernels for these models",
    "use_cache": "has no effect in training",
    "neftune_noise_alpha": "needs input embeddings that are trained, and those of the blocks are frozen",
    "auto_find_batch_size": "would make the result depend on the free memory",
    "trackio_static_space_id": "is not supported",
    "eval_do_concat_batches": "has no effect, as evaluation keeps losses and no predictions",
    "eval_use_gather_object": "has no effect, as evaluation keeps losses and no predictions",
    "eval_accumulation_steps": "has no effect, as evaluation keeps losses and no predictions",
    "include_for_metrics": "has no effect, as evaluation keeps losses and no predictions",
    "batch_eval_metrics": "has no effect, as evaluation keeps losses and no predictions",
    "save_only_model": "would write checkpoints that a run cannot resume from",
    "save_on_each_node": "is not supported, as processes that train together share one output directory",
    "enable_jit_checkpoint": "is not needed, as SIGTERM always saves a checkpoint",
    "hub_strategy": "has no effect, as results are pushed when they are complete",
    "hub_always_push": "has no effect, as results are pushed when they are complete",
    "hub_revision": "is not supported, as results are pushed to the main branch",
    "ignore_data_skip": "would resume with other data than an uninterrupted run reads",
    "restore_callback_states_from_checkpoint": "has no effect, as no callback has a state to restore",
    "accelerator_config": "is not supported",
    "parallelism_config": "is not supported: a block fits on one device, and --parallelism distributes the blocks",
    "ddp_static_graph": "breaks when gradients are accumulated",
    "fsdp": "is not supported: a block fits on one device, and --parallelism distributes the blocks",
    "fsdp_config": "is not supported: a block fits on one device, and --parallelism distributes the blocks",
    "deepspeed": "is not supported: a block fits on one device, and --parallelism distributes the blocks",
    "dataloader_in_order": "would make the result depend on the speed of the workers",
    "remove_unused_columns": "has no effect, as rows hold nothing but tokens",
    "label_names": "has no effect, as the labels of both phases are known",
    "length_column_name": "is for sampling by length, which is not supported",
    "debug": "is not supported",
    "do_train": "has no effect, as the command decides what is done",
    "do_predict": "has no effect, as the command decides what is done",
    "resume_from_checkpoint": "is not needed, as a run resumes from the newest checkpoint in its --output_dir",
}
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_8bit", "adamw_bnb_8bit"),  # of bitsandbytes
)


def refuse_unsupported(values: Namespace | TrainingArguments) -> None:
    """Reject training arguments that would break, be ignored, or harm a result.

    Args:
        values: training arguments, or their values on the command line.

    Raises:
        ValueError: if one of `UNSUPPORTED_ARGUMENTS` differs from its default, or the launcher enables another engine.
    """
    # Values into which parsers and `TrainingArguments` convert some defaults.
    equivalent: dict[str, tuple] = {
        "debug": (None, []),
        "accelerator_config": (AcceleratorConfig(),),
        "resume_from_checkpoint": (False,),
        # Until transformers 5.5:
        "fsdp": ([],),
        "fsdp_config": ({"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False},),
    }
    for field_ in dataclasses.fields(TrainingArguments):
        if field_.name in UNSUPPORTED_ARGUMENTS:
            default = field_.default_factory() if callable(field_.default_factory) else field_.default
            if getattr(values, field_.name) not in (default, *equivalent.get(field_.name, ())):
                raise ValueError(f"--{field_.name} {UNSUPPORTED_ARGUMENTS[field_.name]}: leave it out.")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if strtobool(os.environ.get(f"ACCELERATE_USE_{name}", "false")):
            raise ValueError(
                f"The configuration of accelerate enables {name}, which is not supported: create another "
                "one with `accelerate config`."
            )


def check_training_arguments(
    training_args: TrainingArguments, pretraining_args: PretrainingArguments | None = None
) -> None:
    """Reject training arguments that a phase would break on or ignore, before any work.

    Args:
        pretraining_args: the arguments that phase 1 replaces.

    Raises:
        ValueError: if an argument is invalid or unsupported; the message names the flag to change.
    """
    refuse_unsupported(training_args)
    _check_evaluation(training_args)
    _check_training(training_args)
    fields = {} if pretraining_args is None else pretraining_args.training_fields()
    if fields:
        phase_1 = copy.copy(training_args)
        vars(phase_1).update(fields)
        _check_training(phase_1, fields)


def _check_training(args: TrainingArguments, pretraining: Collection[str] = ()) -> None:
    """Check values, and that optimizer, schedule and data loader can be built from them.

    Args:
        pretraining: names of the fields that phase 1 replaces.
    """

    def flag(name: str) -> str:
        return f"--pretraining_{name}" if name in pretraining else f"--{name}"

    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} must be at least 1, got {getattr(args, name)}.")
    for name in ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"):
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"{flag(name)} must be a number of at least 0, got {getattr(args, name)}.")
    if args.max_steps == 0 or args.max_steps < -1 or not 0 < args.num_train_epochs < math.inf:
        raise ValueError(
            f"{flag('max_steps')} must be positive, or -1 to train for {flag('num_train_epochs')}, a positive number: "
            f"got {args.max_steps} and {args.num_train_epochs}."
        )
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(args, name) or 0) < 2**32:
            raise ValueError(f"--{name} must be between 0 and 2^32 - 1, got {getattr(args, name)}.")
    _check_optimizer(args, flag("learning_rate"))
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("--fp16 has no effect on a CPU: train with --bf16, or with --fp16 false.")
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"--train_sampling_strategy {args.train_sampling_strategy} cannot be resumed in the middle of an epoch: "
            "take random or sequential."
        )
    if args.dataloader_num_workers > 1024:
        raise ValueError(f"--dataloader_num_workers must be at most 1024, got {args.dataloader_num_workers}.")
    with _accepted("The --dataloader_ arguments do not fit together"):
        DataLoader(
            [],
            batch_size=args.per_device_train_batch_size,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=getattr(args, "dataloader_multiprocessing_context", None),  # not before 5.17
            prefetch_factor=args.dataloader_prefetch_factor,
        )
    if args.dataloader_prefetch_factor is not None and args.dataloader_prefetch_factor < 1:
        raise ValueError("--dataloader_prefetch_factor must be at least 1.")
    _check_activation_checkpointing(args)
    if args.torch_compile:
        backend, mode = args.torch_compile_backend, args.torch_compile_mode
        with _accepted(f"Cannot compile with --torch_compile_backend {backend} and --torch_compile_mode {mode}"):
            TorchDynamoPlugin(backend=backend, mode=mode)
            torch.compile(nn.Identity(), backend=backend, mode=mode)


@contextmanager
def _accepted(complaint: str, advice: str = "") -> Iterator[None]:
    """Try out values on the library that will use them.

    Raises:
        ValueError: if the library rejects them; its reason stands between `complaint` and `advice`.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{complaint}: {str(error).rstrip('.')}. {advice}".rstrip()) from error


def _check_activation_checkpointing(args: TrainingArguments) -> None:
    options = dict(getattr(args, f"{CHECKPOINTING}_kwargs") or {})
    if options and not getattr(args, CHECKPOINTING):
        raise ValueError(f"--{CHECKPOINTING}_kwargs need --{CHECKPOINTING} true: add it.")
    every_n_layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
    with _accepted(f"--{CHECKPOINTING}_kwargs cannot be used", "Change or leave them out."):
        if every_n_layers < 1:
            raise ValueError("every_n_layers must be at least 1")
        if offload and args.device.type == "cpu":
            raise ValueError("there is no device to offload from")
        checkpoint(nn.Identity(), torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **options})


def _check_optimizer(args: TrainingArguments, learning_rate_flag: str) -> None:
    if args.optim not in OPTIMIZERS:
        raise ValueError(f"--optim {args.optim.value} is not supported: take one of {', '.join(OPTIMIZERS)}.")
    advice = f"Change --optim, --optim_args, --adam_beta1, --adam_beta2 or {learning_rate_flag}."
    with _accepted("The optimizer cannot be created", advice):
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([nn.Parameter(torch.zeros(1))], **options)
        given = [pair.split("=")[0].strip() for pair in (args.optim_args or "").split(",") if pair]
        without = copy.copy(args)
        without.optim_args = None
        _, plain = Trainer.get_optimizer_cls_and_kwargs(without)
    # Both phases set the weight decay by group of parameters, which has precedence.
    ignored = [name for name in given if options.get(name) == plain.get(name) or name == "weight_decay"]
    if ignored:
        raise ValueError(f"--optim {args.optim.value} ignores {', '.join(ignored)} of --optim_args: leave that out.")
    defaults = {field_.name: field_.default for field_ in dataclasses.fields(TrainingArguments)}
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if "betas" not in options and getattr(args, name) != defaults[name]:
            raise ValueError(f"--optim {args.optim.value} ignores --{name}: leave it out.")
    schedule = args.lr_scheduler_type.value
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(
            f"With --lr_scheduler_type {schedule}, weights would depend on when they are evaluated: use a schedule of "
            "the steps, such as linear or cosine."
        )
    if schedule == "constant" and args.warmup_steps > 0:
        raise ValueError(
            "--lr_scheduler_type constant ignores --warmup_steps: take constant_with_warmup, or leave it out."
        )
    if schedule.startswith("constant") and args.lr_scheduler_kwargs:
        raise ValueError(f"--lr_scheduler_type {schedule} ignores --lr_scheduler_kwargs: leave them out.")
    steps = args.max_steps if args.max_steps > 0 else 1000
    advice = f"Change --lr_scheduler_type, --lr_scheduler_kwargs, --warmup_steps or {learning_rate_flag}."
    with _accepted("The schedule cannot be created", advice):
        get_scheduler(schedule, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs)


def _check_evaluation(args: TrainingArguments) -> None:
    """Check when the run logs, evaluates and saves."""
    for name in ("logging", "eval", "save"):
        steps = getattr(args, f"{name}_steps")
        if getattr(args, f"{name}_strategy") == "steps" and not 0 < steps < math.inf:
            raise ValueError(f"--{name}_steps must be positive with --{name}_strategy steps, got {steps}.")
    if not math.isfinite(args.eval_delay):
        raise ValueError(f"--eval_delay must be finite, got {args.eval_delay}.")
    if args.ddp_timeout < 1:
        raise ValueError(f"--ddp_timeout must be at least 1, got {args.ddp_timeout}.")
    if args.save_total_limit is not None and args.save_total_limit < 1:
        raise ValueError("--save_total_limit must be at least 1; leave it out to keep all checkpoints.")
    evaluates = args.eval_strategy != "no"
    if args.do_eval and not evaluates:
        raise ValueError("--do_eval has no effect without --eval_strategy steps or epoch: add that, or leave it out.")
    if args.eval_on_start and not evaluates:
        raise ValueError("--eval_on_start needs --eval_strategy steps or epoch: add that, or leave it out.")
    if args.metric_for_best_model not in (None, "loss", "eval_loss") or args.greater_is_better:
        raise ValueError(
            "The best weights of both phases are those with the lowest loss on the validation split: leave "
            "--metric_for_best_model and --greater_is_better out."
        )
    selects = [f"--{name}" for name in ("load_best_model_at_end",) if getattr(args, name)]
    if args.save_strategy == "best":
        selects.append("--save_strategy best")
        if args.metric_for_best_model is None:
            raise ValueError("--save_strategy best needs --metric_for_best_model loss.")
    if selects and not evaluates:
        raise ValueError(f"{selects[0]} needs evaluations: add --eval_strategy steps or epoch.")
    if selects and args.eval_strategy == "steps" and 0 < args.max_steps < args.eval_delay:
        raise ValueError(f"{selects[0]} needs evaluations: lower --eval_delay, which is beyond --max_steps.")
    if str(args.include_num_input_tokens_seen) not in ("all", "non_padding", "no"):
        raise ValueError("--include_num_input_tokens_seen must be all, non_padding or no.")
    for name in ("log_level", "log_level_replica"):
        if getattr(args, name) not in trainer_log_levels:
            raise ValueError(f"--{name} must be one of {', '.join(trainer_log_levels)}, got {getattr(args, name)!r}.")
    missing = sorted(set(args.report_to or []) - set(get_available_reporting_integrations()))
    if missing:
        raise ValueError(f"--report_to {missing[0]} is not a tracker that is installed: install it, or leave it out.")


# --- errors ----------------------------------------------------------------------------------------------------------


def is_users(error: Exception) -> bool:
    """Whether the user of a command can correct an error.

    These are errors raised by a `raise` statement of this package, other than for its own faults; errors of `datasets`
    about unreadable data; and lack of memory, disk space or permissions. Errors that Python, torch or another library
    raise, even of the same types, count as faults of the program.
    """
    if isinstance(error, DatasetsError | MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return True
    if os.strerror(errno.ENOSPC) in str(error) or (isinstance(error, OSError) and error.errno in MENDABLE):
        return True
    if error.__traceback__ is None:  # raised in another thread
        return False
    raised = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(raised.filename).is_relative_to(PACKAGE) and (raised.line or "").startswith("raise ")
    return is_ours and isinstance(error, ValueError | OSError | ArithmeticError | ImportError)


def one_line(error: Exception) -> str:
    """Return the message of an error in one line, shortened in the middle if it is long."""
    text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 1200 else f"{text[:800]} [...] {text[-300:]}"
