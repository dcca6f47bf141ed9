"""Arguments of the commands: recipes (YAML) and command lines, read by `HfArgumentParser`."""

import copy
import dataclasses
import difflib
import errno
import functools
import inspect
import json
import math
import os
import sys
import traceback
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
import yaml
from accelerate.utils import TorchDynamoPlugin
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels
from transformers.utils import CONFIG_NAME, cached_file, strtobool

from .checkpoints import CHECKPOINTING
from .configuration_noprop import NoPropConfig
from .data import SMALLEST_VOCABULARY, DataArguments
from .parallel import GROUP_VARIABLES, arrange_processes
from .shards_noprop import block_shard


CORPUS_FILE = "corpus.yaml"  # in a model directory: the data arguments it was trained with
NO_MATPLOTLIB = "pictures are drawn with matplotlib, which is not installed: pip install matplotlib"
PACKAGE = Path(__file__).parent
RECIPES = PACKAGE / "recipes"
# Errors of the operating system that its user can mend: space, permissions, a file for a directory and vice versa.
MENDABLE = {
    getattr(errno, name) for name in "ENOSPC EDQUOT EACCES EPERM EROFS EISDIR ENOTDIR EEXIST ENAMETOOLONG".split()
}
DATA_SOURCES = ("dataset_name", "dataset_config_name", "train_file", "validation_file", "test_file")
LARGEST_RECIPE = 2**16  # bytes: reading YAML is slow, and a repository may hold any


@dataclass
class ModelArguments:
    """The model to build. Sizes that are not given are those of [`NoPropConfig`]."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "A tokenizer of the Hub or a local directory. Default: train a byte-level BPE one."},
    )
    vocab_size: int | None = field(
        default=None,
        metadata={"help": "Most entries of the tokenizer to train (4,096 when not given)."},
    )
    embeddings_from: str | None = field(
        default=None,
        metadata={
            "help": "Take the input embeddings and the tokenizer of this transformers model instead of pretraining."
        },
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the table and of every layer."})
    num_blocks: int | None = field(default=None, metadata={"help": "Number of denoising blocks."})
    num_layers_per_block: int | None = field(default=None, metadata={"help": "Transformer layers in a block."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Attention heads of a layer."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the feed-forward layers."})
    attention_dropout: float | None = field(default=None, metadata={"help": "Dropout of the attention weights."})
    noise_schedule: str | None = field(
        default=None, metadata={"help": "'information', 'cosine' or 'linear': how noise levels are shared out."}
    )
    loss_type: str | None = field(default=None, metadata={"help": "'cross_entropy' or 'mse'."})
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
        metadata={"help": "What the model of phase 1 learns: 'mlm' (masked tokens), 'clm' (next tokens) or 'mixed'."},
    )
    block_initialization: str | None = field(
        default=None, metadata={"help": "Start of every block: 'pretraining' (the model of phase 1) or 'random'."}
    )
    context_source: str | None = field(
        default=None,
        metadata={"help": "What a block reads: 'embeddings' (independent blocks) or 'previous_block' (in order)."},
    )

    def config_fields(self) -> dict[str, Any]:
        """What was given of the fields of [`NoPropConfig`]."""
        names = [name for name in NoPropConfig.__annotations__ if hasattr(self, name)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class PretrainingArguments:
    """Phase 1. What is not given is taken from the training arguments of phase 2."""

    mlm_probability: float = field(
        default=0.15, metadata={"help": "Share of the tokens that are masked ('mlm' and 'mixed')."}
    )
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
        """What was given of the fields of [`TrainingArguments`]."""
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
            "help": "With several processes: 'blocks' (each trains blocks of its own), 'data' (all train a block "
            "together) or 'auto' ('blocks', or groups of processes when there are fewer blocks).",
            "choices": ["auto", "blocks", "data"],
        },
    )
    take_over: bool = field(
        default=False, metadata={"help": "Train blocks that another worker says on the Hub it trains, if it is gone."}
    )
    sample_prompts: list[str] = field(
        default_factory=lambda: ["The "], metadata={"help": "Prompts that sample text is drawn from."}
    )
    sample_max_new_tokens: int = field(default=40, metadata={"help": "Length of the samples, in tokens."})

    def __post_init__(self):
        if not 0 < self.sample_max_new_tokens <= 2**20:
            raise ValueError(
                f"`sample_max_new_tokens` must be between 1 and {2**20}, got {self.sample_max_new_tokens}."
            )


@dataclass
class ShareArguments:
    """What the model card says of the model with `--push_to_hub`, beside what was measured."""

    license: str | None = field(default=None, metadata={"help": "Licence of the model, by its identifier on the Hub."})
    language: str | None = field(default=None, metadata={"help": "Language of the text, by its ISO 639-1 code."})


@dataclass
class RunArguments:
    """The run as a whole.

    Attributes:
        processes: how many were launched together.
    """

    dry_run: bool = field(
        default=False,
        metadata={"help": "Print data, model, steps, memory, time and disk of the run, and train nothing."},
    )
    processes: int = field(default=1, init=False)


def parse_blocks(blocks: str, num_blocks: int) -> list[int]:
    """Read a selection of blocks such as `"0,2-3"` or `"all"`.

    Raises:
        ValueError: it cannot be read, or names a block that is not there.
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


class Recipe(NamedTuple):
    """All arguments of a training run."""

    model: ModelArguments
    data: DataArguments
    pretraining: PretrainingArguments
    blocks: BlockArguments
    share: ShareArguments
    training: TrainingArguments
    run: RunArguments


def parse_recipe(description: str, arguments: list[str] | None = None, parallelism: str | None = None) -> Recipe:
    """Read `[RECIPE.yaml] [--name value ...]`, by default from the command line of the process.

    Of several processes that were launched together, each is told here whom it works with, since `TrainingArguments`
    connect the processes they find (see [`~noprop_hf.parallel.arrange_processes`]).

    Args:
        parallelism: has precedence over that of the command line.
    """

    processes = int(os.environ.get("WORLD_SIZE", 1))

    def arrange(values: Namespace) -> None:
        refuse_unsupported(values)  # also what `TrainingArguments` would fail on in words of their own
        check_values(values)
        if parallelism is not None:
            values.parallelism = parallelism
        if values.dry_run:  # the first process speaks for all
            if int(os.environ.get("RANK", 0)) > 0:
                raise SystemExit(0)
            for name in GROUP_VARIABLES:
                os.environ.pop(name, None)
        config = _known_config(values)
        selected = parse_blocks(values.blocks, values.num_blocks or config.num_blocks)
        arrange_processes(values.parallelism, 1 if _in_order(values, config) else len(selected))
        if values.ddp_backend is not None and int(os.environ.get("WORLD_SIZE", 1)) == 1:
            raise ValueError(
                "--ddp_backend is for processes that train together: launch several with --parallelism data, or leave "
                "it out."
            )

    recipe = Recipe(*parse_arguments(tuple(Recipe.__annotations__.values()), description, arguments, arrange, check))
    recipe.run.processes = processes
    recipe.blocks.parallelism = parallelism or recipe.blocks.parallelism
    return recipe


def check_values(values: Namespace) -> None:
    """Refuse what `TrainingArguments` would fail on, a vocabulary too small for a tokenizer, and an `output_dir` that
    cannot be written.

    Raises:
        ValueError: with what to do about it.
    """
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if not math.isfinite(getattr(values, name) or 0):
            raise ValueError(f"--{name} must be positive and finite, got {getattr(values, name)}.")
    trains_tokenizer = values.tokenizer_name is None and values.embeddings_from is None
    if trains_tokenizer and (values.vocab_size or SMALLEST_VOCABULARY) < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocab_size must be at least {SMALLEST_VOCABULARY} (all bytes and the special tokens) to train a "
            f"tokenizer: got {values.vocab_size}."
        )
    if values.output_dir == "":
        raise ValueError("--output_dir must not be empty: name a directory for the model.")
    if values.output_dir is not None:
        folder = Path(values.output_dir).expanduser().absolute()
        while not folder.exists() and not folder.is_symlink():
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError(f"--output_dir {values.output_dir} cannot be made: {folder} is not a directory.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"--output_dir {values.output_dir} cannot be written: no permission in {folder}.")


def _lies_in(value: float, low: float, high: float, excluded: bool) -> bool:
    return math.isfinite(value) and (low < value <= high or (value == low and not excluded))


def _words_of(low: float, high: float, excluded: bool) -> str:
    words = f"more than {low:g}" if excluded else f"at least {low:g}"
    return words + (" and finite" if high == math.inf else f" and at most {high:.10g}")


def check(values: Namespace, given: set[str], recipe: Recipe) -> None:
    """Reject combinations of arguments that are valid alone but not together.

    Checks that the dataclasses, the configuration or transformers make before training are not repeated here.

    Args:
        values: all arguments.
        given: the names of those that the recipe or the command line give.
        recipe: the dataclasses made of them.

    Raises:
        ValueError: if there are any, with what to do about it.
    """
    check_training_arguments(recipe.training, recipe.pretraining)
    config = _known_config(values)
    from_model = values.embeddings_from is not None
    if values.push_to_hub and not values.hub_model_id:
        raise ValueError("Say where --push_to_hub goes: --hub_model_id user/name.")
    if values.take_over and not values.push_to_hub:
        raise ValueError(
            "--take_over is for blocks that workers claim on the Hub: add --push_to_hub true --hub_model_id user/name, "
            "or leave it out. On one machine, the claim of a process that is gone does not last."
        )
    if values.streaming and values.max_steps <= 0:
        raise ValueError("A stream has no known length to count epochs by: say how long to train with --max_steps.")
    if values.streaming and not from_model and (values.pretraining_max_steps or values.max_steps) <= 0:
        raise ValueError("A stream has no known length to count epochs by: give a positive --pretraining_max_steps.")
    if "eval_steps" in given and "eval_strategy" not in given:
        raise ValueError("Nothing is evaluated at --eval_steps by default: add --eval_strategy steps, or leave it out.")
    if "validation_split_percentage" in given and values.validation_file is not None:
        raise ValueError(
            "Validation data are either held out (--validation_split_percentage) or a file (--validation_file): leave "
            "one of them out."
        )
    if values.sampled_softmax and values.loss_type == "mse":
        raise ValueError(
            "--loss_type mse has no softmax: leave --sampled_softmax out, or take --loss_type cross_entropy."
        )
    if from_model and values.block_initialization == "pretraining":
        raise ValueError(
            "With --embeddings_from there is no phase 1 for blocks to start from: leave --block_initialization out."
        )
    data = DataArguments(**{field.name: getattr(values, field.name) for field in dataclasses.fields(DataArguments)})
    if "" in values.sample_prompts and not data.has_boundaries:
        raise ValueError(
            "Texts are joined without a token between them, so none can begin an empty prompt: leave it out of "
            "--sample_prompts, or add --append_eos true."
        )
    objective = values.pretraining_objective or config.pretraining_objective
    if "mlm_probability" in given and objective == "clm" and not from_model:
        raise ValueError(
            "Nothing is masked in causal language modelling: leave --mlm_probability out, or take "
            "--pretraining_objective mlm or mixed."
        )
    if _in_order(values, config) and not values.push_to_hub:  # from the Hub, the blocks before can be fetched
        selected = parse_blocks(values.blocks, values.num_blocks or config.num_blocks)
        for index in range(selected[-1]):
            if index not in selected and not Path(values.output_dir or "", block_shard(index)).is_file():
                raise ValueError(
                    f"Block {index + 1} reads block {index}, which is neither trained nor among --blocks "
                    f"{values.blocks}: add it."
                )


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
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


def refuse_unsupported(values: Namespace | TrainingArguments) -> None:
    """Reject training arguments that would break, be ignored, or harm a result.

    Args:
        values: training arguments, or their values on the command line.

    Raises:
        ValueError: if one of `UNSUPPORTED_ARGUMENTS` differs from its default, or the launcher asks for such a thing.
    """
    # What parsers and `TrainingArguments` make of some defaults.
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
                f"The configuration of accelerate asks for {name}, which is not supported: make another "
                "with `accelerate config`."
            )


def check_training_arguments(
    training_args: TrainingArguments, pretraining_args: PretrainingArguments | None = None
) -> None:
    """Reject training arguments that a phase would break on or ignore, before any work.

    Args:
        pretraining_args: those that phase 1 replaces.

    Raises:
        ValueError: with what to do about it.
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
        pretraining: names of the fields that are those of phase 1.
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
    """Try out values on the library that will get them.

    Raises:
        ValueError: it does not take them, with its reason between `complaint` and `advice`.
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
    with _accepted("The optimizer cannot be made", advice):
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([nn.Parameter(torch.zeros(1))], **options)
        given = [pair.split("=")[0].strip() for pair in (args.optim_args or "").split(",") if pair]
        without = copy.copy(args)
        without.optim_args = None
        _, plain = Trainer.get_optimizer_cls_and_kwargs(without)
    # Both phases give the weight decay by group of parameters, which has precedence.
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
            f"With --lr_scheduler_type {schedule} weights would depend on when they are evaluated: take a schedule of "
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
    with _accepted("The schedule cannot be made", advice):
        get_scheduler(schedule, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs)


def _check_evaluation(args: TrainingArguments) -> None:
    """Check what is logged, evaluated and saved, and when."""
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


def _known_config(values: Namespace) -> NoPropConfig:
    """The configuration in `output_dir`, or else what is known of it before the data are read.

    Raises:
        ValueError: values that there are not, or sizes that do not fit together.
    """
    if Path(values.output_dir or "", CONFIG_NAME).is_file():
        return read_config(values.output_dir)
    model = ModelArguments(**{field.name: getattr(values, field.name) for field in dataclasses.fields(ModelArguments)})
    fields = model.config_fields()
    if values.embeddings_from is not None:  # the width is that model's: any that fits will do
        fields.setdefault("hidden_size", 2 * fields.get("num_attention_heads", NoPropConfig.num_attention_heads))
    return NoPropConfig(**fields)


def read_config(name_or_path: str | Path, token: str | None = None) -> NoPropConfig:
    """The configuration in a model directory, or a repository of the Hub.

    Raises:
        ValueError: there is none, it cannot be read, or it is that of another kind of model.
    """
    try:
        fields, _ = NoPropConfig.get_config_dict(name_or_path, token=token)
        kind = fields.get("model_type")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"There is no model {str(name_or_path)!r} with a {CONFIG_NAME} that can be read. Give a model directory, "
            "or a repository of the Hub (and a connection to it)."
        ) from error
    if kind != NoPropConfig.model_type:
        raise ValueError(
            f"{name_or_path} holds a model of type {kind!r}, not a NoProp model. Give a directory that "
            "`noprop train` made, or a repository of the Hub with such a model."
        )
    fields = {name: value for name, value in fields.items() if "attn_implementation" not in name}  # of who loads it
    try:
        return NoPropConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{CONFIG_NAME} of {name_or_path} is damaged: {one_line(error)}") from error


def _in_order(values: Namespace, config: NoPropConfig) -> bool:
    return (values.context_source or config.context_source) == "previous_block"


def command_line(description: str, types: Sequence[type] = (), usage: str | None = None) -> HfArgumentParser:
    """A parser whose help and errors name the command as it was called.

    Args:
        description: for `--help`; `%(prog)s` stands for the command.
        types: dataclasses whose fields are arguments.
        usage: the first line of the help; that of `argparse` when not given.
    """
    called = f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else sys.argv[0]
    return HfArgumentParser(
        types, prog=called, usage=usage, description=description, formatter_class=RawDescriptionHelpFormatter
    )


def parse_arguments(
    types: Sequence[type],
    description: str,
    arguments: list[str] | None = None,
    prepare: Callable[[Namespace], None] | None = None,
    check: Callable[[Namespace, set[str], Any], None] | None = None,
    model: bool = False,
) -> tuple:
    """Read a recipe and a command line into dataclasses; the command line has the last word.

    Args:
        types: the dataclasses to fill.
        description: what the command does, for `--help`, as [`command_line`] takes it.
        arguments: `[RECIPE.yaml] [--name value ...]`; those of the process when not given.
        prepare: sees the values before any dataclass is made of them.
        check: called last, with the values, the names of those that are given, and the dataclasses.
        model: instead of a recipe, the first word is a model, whose own `corpus.yaml` is read where it has one.

    Returns:
        One instance per dataclass, in order; with `model`, its name comes first.
    """
    first_word = "MODEL" if model else "[RECIPE.yaml]"
    parser = command_line(description, types, f"%(prog)s {first_word} [--name value ...]")
    _group(parser, types)
    if model:
        parser.add_argument("model", help="A model directory, or a repository of the Hub.")
    else:
        help = "A recipe: a YAML file of the arguments below, or the name of one, such as demo."
        parser.add_argument("recipe", nargs="?", default=None, help=help)
    arguments = sys.argv[1:] if arguments is None else arguments
    first = arguments[0] if arguments and not arguments[0].startswith("-") else None
    try:
        find = find_corpus_file if model else find_recipe
        recipe = None if first is None else find(first)
        defaults = {} if recipe is None else _read_recipe(Path(recipe), parser, types)
        blank = Namespace(**dict.fromkeys(_names(parser)))
        values, _ = parser.parse_known_args(arguments, blank)
        named = {name: value for name, value in vars(values).items() if value is not None}
        if {"train_file", "dataset_name"} & named.keys():  # other data, of which the recipe names no part
            defaults = {name: value for name, value in defaults.items() if name not in DATA_SOURCES}
        parser.set_defaults(**defaults)
        values, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise ValueError(_no_argument(unknown[0].partition("=")[0], _names(parser), "--"))
        if first is None and (values.model if model else values.recipe) is not None:
            raise ValueError(f"Give the {first_word.strip('[]')} before all options.")
        if prepare is not None:
            prepare(values)
        try:
            *parsed, rest = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.doc!r} is not JSON: {error}.") from error
        except (
            TypeError,
            ArithmeticError,
            ImportError,
            NotImplementedError,
        ) as error:  # of transformers, over values of its arguments
            raise ValueError(one_line(error)) from error
        if check is not None:
            check(values, named.keys() | defaults.keys(), Recipe(*parsed))
    except (OSError, ValueError) as error:
        parser.error(one_line(error))
    return (rest.model, *parsed) if model else tuple(parsed)


def find_recipe(word: str) -> Path:
    """The recipe of a command line: a file, or else one of this package, by a name such as `demo`."""
    shipped = {name: path for path in RECIPES.glob("*.yaml") for name in (Path(path.stem), Path("recipes", path.name))}
    path = Path(word)
    return path if path.is_file() else shipped.get(path, path)


def find_corpus_file(model: str) -> str | None:
    """Where a model says what it was trained on, if it does.

    Raises:
        ValueError: there is no such model.
    """
    read_config(model)
    return cached_file(model, CORPUS_FILE, _raise_exceptions_for_missing_entries=False)


class _RecipeLoader(yaml.SafeLoader):
    """YAML in which a name has one value, and an alias stands for a single one: those of lists can grow endlessly."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a name must be a word", key.start_mark)
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(None, None, "an alias must stand for a single value", mark)
        return node


def _read_recipe(path: Path, parser: HfArgumentParser, types: Sequence[type]) -> dict[str, Any]:
    """The values of a recipe, as `argparse` takes defaults: words, which it converts like those of a command line.

    Raises:
        ValueError: the file cannot be read, or an argument is unknown, given twice or of the wrong kind.
    """
    if not path.is_file():
        names = ", ".join(sorted(shipped.stem for shipped in RECIPES.glob("*.yaml")))
        fault = f"There is no recipe {str(path)!r}." + " It is a directory." * path.is_dir()
        raise ValueError(f"{fault} Give a YAML file, or the name of one: {names}.")
    if path.stat().st_size > LARGEST_RECIPE:
        raise ValueError(f"{path} is not a recipe: it has more than {LARGEST_RECIPE:,} bytes.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), _RecipeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem}. A recipe is a YAML file of `name: value` lines.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a recipe, a YAML file of `name: value` lines: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: it must be a YAML file of `name: value` lines.")
    actions = {action.dest: action for action in parser._actions}
    hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
    words: dict[str, str | list[str]] = {}
    for name, value in values.items():
        if name not in _names(parser):
            raise ValueError(f"{path}: {_no_argument(str(name), _names(parser))}")
        if isinstance(value, list):
            if "list" not in str(hints[name]) or any(isinstance(item, list | dict | None) for item in value):
                raise ValueError(f"{path}: {name} must not be this list: give " + _expected(hints[name]))
            words[name] = [str(item) for item in value]
        elif isinstance(value, dict):
            if "dict" not in str(hints[name]):
                raise ValueError(f"{path}: {name} must not be a mapping: give " + _expected(hints[name]))
            words[name] = json.dumps(value, default=str)
        elif value is not None:
            words[name] = [str(value)] if actions[name].nargs == "+" else str(value)
    return words


def _expected(hint: Any) -> str:
    return "a list of words." if "list" in str(hint) else "a single value."


def _names(parser: HfArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if action.option_strings and action.dest != "help"]


def _no_argument(name: str, known: list[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(name.removeprefix(prefix), known, n=1)
    return f"there is no argument {name!r}." + (f" Did you mean {prefix + near[0]!r}?" if near else "")


def _group(parser: HfArgumentParser, types: Sequence[type]) -> None:
    """Show the arguments of each dataclass under the first line of what it says of itself."""
    actions = parser._optionals._group_actions
    for dtype in sorted(types, key=lambda dtype: dtype is not RunArguments):  # that one is short, and comes first
        title = inspect.cleandoc(dtype.__doc__ or "").splitlines()[0].removesuffix(".")
        if title.startswith(f"{dtype.__name__}("):  # it says nothing, and Python lists its fields
            title = dtype.__name__
        names = {field.name for field in dataclasses.fields(dtype)}
        parser.add_argument_group(title)._group_actions += [action for action in actions if action.dest in names]
        actions[:] = [action for action in actions if action.dest not in names]


# --- errors -----------------------------------------------------------------------------------------------------------


def entry_point(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate the `main` of a command: what its user can correct ends it with one sentence and status 1, an
    interruption (Ctrl-C) with status 130. Every other error keeps its traceback."""

    @functools.wraps(main)
    def run() -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal may have no sign for a word of a text
        try:
            main()
        except KeyboardInterrupt:
            raise SystemExit(128 + 2) from None  # as of a process that SIGINT ended
        except Exception as error:
            if not is_users(error):
                raise
            raise SystemExit(one_line(error)) from error

    return run


def is_users(error: Exception) -> bool:
    """Whether the user of a command can correct an error.

    These are the errors that a `raise` statement of this package reports, other than of faults in itself; what
    `datasets` says of unreadable data; and lack of memory, of disk space or of permissions. What Python, torch or
    another library raise of themselves, even of the same types, is taken for a fault of the program.
    """
    if isinstance(error, DatasetsError | MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return True
    if os.strerror(errno.ENOSPC) in str(error) or (isinstance(error, OSError) and error.errno in MENDABLE):
        return True
    if error.__traceback__ is None:  # of another thread
        return False
    raised = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(raised.filename).is_relative_to(PACKAGE) and (raised.line or "").startswith("raise ")
    return is_ours and isinstance(error, ValueError | OSError | ArithmeticError | ImportError)


def one_line(error: Exception) -> str:
    """The message of an error in one line; its middle is left out where that would be a long one."""
    text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 1200 else f"{text[:800]} [...] {text[-300:]}"


def number(kind: Callable[[str], Any], low: float, high: float = math.inf, excluded: bool = False) -> Callable:
    """A type for `argparse`: a number of at least, or with `excluded` more than, `low`, and at most `high`."""

    def read(word: str) -> float:
        value = kind(word)
        if not _lies_in(value, low, high, excluded):
            raise ArgumentTypeError(f"must be {_words_of(low, high, excluded)}: got {word}")
        return value

    read.__name__ = getattr(kind, "__name__", "number")  # "invalid int value"
    return read


def picture(word: str) -> Path:
    """A type for `argparse`: a file that matplotlib can write.

    Raises:
        ArgumentTypeError: matplotlib is not installed, the folder does not exist, or the ending is unknown.
    """
    path = Path(word)
    try:
        from matplotlib.backend_bases import FigureCanvasBase  # of the extra `plot`
    except ModuleNotFoundError as error:
        raise ArgumentTypeError(NO_MATPLOTLIB) from error
    endings = FigureCanvasBase.get_supported_filetypes()
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ArgumentTypeError(f"{word} cannot be written: it is a directory, or is to be in one that does not exist")
    if path.suffix.lstrip(".").lower() not in endings:
        raise ArgumentTypeError(f"{word} must end in one of {', '.join(endings)}")
    return path
