"""Plan a run without training: data, model size, steps, memory, time, disk, and progress so far.

Sizes are computed; activations and seconds per step are measured in a few real steps. All files go into a temporary
folder.
"""

import bisect
import copy
import dataclasses
import math
import shutil
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from .arguments import check_training_arguments, parse_blocks
from .checkpoints import CHECKPOINTING, DurableTrainer, newest_checkpoint, run_identity, use_one_device
from .clusters import router_fields
from .configuration_noprop import NoPropConfig
from .data import load_corpus, load_tokenizer, tokenize
from .meeting_place import NoMeetingPlace
from .model_directory import block_is_trained, load_router, load_table
from .modeling_noprop import DenoisingBlock, NoPropForCausalLM, NoPropForPreTraining, TokenTable
from .noise_noprop import standardize
from .parallel import group_processes
from .pretraining import (
    check_dataset,
    load_config,
    log_prior,
    prepare_clusters,
    prepare_pretraining,
    pretraining_run,
    pretraining_trainer,
)
from .recipes import Recipe
from .shards_noprop import EMBEDDINGS_SHARD
from .training import BlockRun, block_trainer


Section = tuple[tuple[str, ...], Sequence[tuple[str, ...]]]  # the title with the names of columns, and rows

TIMED_STEPS = 5
TIME_LIMIT = 10  # seconds of timed steps
SAMPLE_ROWS = 8  # whose activations are counted
USABLE = 0.9  # share of a device's memory; the allocator reserves some that it does not use
SMALL_FILES = 1_000_000  # bytes of code, configurations, results and card in a model directory
WIDEST_LINE = 500
CHECKPOINT_FILES = 100_000  # bytes of a checkpoint's states and logs, without weights, moments and tokenizer


# --- sizes ------------------------------------------------------------------------------------------------------------


@dataclass
class Sizes:
    """Bytes of float32 weights: of the table, the model of phase 1, the largest block, and the whole model.

    Attributes:
        parameters: the number of parameters of the whole model without the table.
    """

    table: int
    phase1: int
    block: int
    model: int
    parameters: int

    @classmethod
    def of(cls, config: NoPropConfig) -> "Sizes":
        """Compute the sizes for a configuration, without allocating weights."""
        config = copy.deepcopy(config)
        with torch.device("meta"):
            modules = (
                TokenTable(config),
                NoPropForPreTraining(config),
                DenoisingBlock(config, config.num_blocks - 1),
                NoPropForCausalLM(config),
            )
        frozen, *_, together = (sum(parameter.numel() for parameter in module.parameters()) for module in modules)
        table, phase1, block, model = (
            sum(tensor.nbytes for tensor in module.state_dict().values()) for module in modules
        )
        return cls(table, phase1, block, model, parameters=together - frozen)


def checkpoint_bytes(weights: int, kept: int = 2) -> int:
    """Return an upper bound on the bytes of a model's checkpoints.

    Each holds the weights and two moments of Adam; one more exists while it is written.
    """
    return (kept + 1) * 3 * weights


def checkpoints_kept(args: TrainingArguments, steps: int, epochs: float | None) -> int:
    """Return an upper bound on the number of checkpoints at the end of a training."""
    strategy, interval = args.save_strategy, args.save_steps
    if strategy == "best" or args.load_best_model_at_end:  # at most one for each evaluation
        strategy, interval = args.eval_strategy, args.eval_steps or 1
    every = interval if interval >= 1 else math.ceil(interval * steps)
    saves = {"no": 0, "epoch": math.ceil(epochs or 1)}.get(strategy, math.ceil(steps / every))
    at_least = 2 if args.metric_for_best_model is None else 3  # the best one is kept besides the last two
    return min(saves, max(at_least, args.save_total_limit)) if args.save_total_limit else saves


def count_steps(args: TrainingArguments, rows: int | None, processes: int) -> int:
    """Count the optimizer steps of a training, as `Trainer` does.

    Args:
        rows: number of training rows; None for a stream, which needs `max_steps`.
        processes: number of processes that train together.
    """
    if args.max_steps > 0:
        return args.max_steps
    whole = math.floor if args.dataloader_drop_last else math.ceil
    batches = whole(whole(rows / args.per_device_train_batch_size) / processes)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


# --- measurements -----------------------------------------------------------------------------------------------------


class Stopwatch(TrainerCallback):
    """End training after a few steps, and record the duration of each."""

    def __init__(self):
        self.marks: list[float] = []

    def on_train_begin(self, *args, **kwargs):
        self._mark()

    def on_step_end(self, args, state, control, **kwargs):
        self._mark()
        if len(self.marks) > TIMED_STEPS + 1 or self.marks[-1] - self.marks[0] > TIME_LIMIT:
            control.should_training_stop = True

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the median of the steps, without the first one, which warms up, unless there is no other."""
        steps = [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]
        return statistics.median(steps[1:] or steps)


def seconds_per_step(trainer: DurableTrainer) -> float:
    """Measure the seconds of a step in real steps; NaN if the device has too little memory for one."""
    stopwatch = Stopwatch()
    trainer.add_callback(stopwatch)
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        return math.nan
    return stopwatch.seconds()


def saved_bytes(compute: Callable[[], torch.Tensor], modules: Sequence[nn.Module]) -> int:
    """Count the bytes that a loss saves for the backward pass, without the weights of some modules."""
    weights = {t.untyped_storage().data_ptr() for module in modules for t in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    total = sum(size for pointer, size in saved.items() if pointer not in weights)
    del loss  # alive until here, so that no address is used twice
    return total


class PeakBytes(TorchDispatchMode):
    """Track the largest number of bytes of the tensors that exist at a time, besides weights and finished gradients.

    Unlike [`saved_bytes`], it covers the backward pass, with what activation checkpointing computes again there, and
    temporary tensors. A storage counts once. On a GPU, it is what the allocator hands out.

    Args:
        modules: their weights and gradients do not count.

    Attributes:
        peak: the largest number of bytes so far.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        super().__init__()
        self.live, self.peak = 0, 0
        self._sizes: dict[int, int] = {}  # by id of the storage; 0 if it does not count
        self._hooks = []
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._sizes[id(tensor.untyped_storage())] = 0
            for parameter in module.parameters():
                if parameter.requires_grad:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(self._exclude_gradient))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*exception)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = storage.nbytes()
            weakref.finalize(storage, self._remove, id(storage))
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def _exclude_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        self.live -= self._sizes.get(key, 0)
        self._sizes[key] = 0


def activations(trainer: DurableTrainer, rows: int) -> int:
    """Count the bytes that a step on the first training rows needs besides weights, gradients and optimizer.

    The precision is that of training.
    """
    model = trainer.model
    inputs = trainer._prepare_inputs(trainer.data_collator(list(islice(trainer.train_dataset, rows))))
    model.train()
    with PeakBytes([model, *trainer.frozen.values()]) as tracker:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
    model.zero_grad()
    return tracker.peak


@dataclass
class Memory:
    """Bytes on a device during training.

    Attributes:
        parts: by purpose.
        batch: rows of a batch.
        row: bytes for each of these rows.
    """

    parts: dict[str, int]
    batch: int
    row: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def largest_batch(self, usable: int) -> int:
        """Return the largest batch that fits into some bytes; 0 if none does."""
        return max(0, self.batch + (usable - self.total) // self.row)


def memory(trainer: DurableTrainer) -> Memory:
    """Estimate the bytes on a device during training.

    Activations are counted for a few rows, and scaled to the batch size. The states of the optimizer are those that it
    has, or AdamW's two moments before the first step.
    """
    batch = trainer.args.per_device_train_batch_size
    many = min(SAMPLE_ROWS, sum(1 for _ in islice(trainer.train_dataset, SAMPLE_ROWS)))
    few = many // 2
    saved = activations(trainer, many)
    row = math.ceil((saved - (activations(trainer, few) if few else 0)) / (many - few))
    parameters = sum(parameter.nbytes for parameter in trainer.model.parameters())
    states = {} if trainer.optimizer is None else trainer.optimizer.state
    moments = sum(t.nbytes for state in states.values() for t in state.values() if isinstance(t, torch.Tensor))
    parts = {
        "parameters": parameters,
        "gradients": parameters,
        "states of the optimizer": moments or 2 * parameters,
        "frozen table": sum(
            tensor.nbytes
            for module in trainer.frozen.values()  # the table, the trunk
            for tensor in (*module.parameters(), *module.buffers())
        ),
        "activations": max(0, saved + row * (batch - many)),
    }
    return Memory(parts, batch, row)


def usable_bytes(device: torch.device) -> int:
    """Return the bytes that a training can take: a share of what is free on a GPU, or available on the machine."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(USABLE * free)


def largest_width(config: NoPropConfig, held: dict[str, Memory], usable: int) -> int:
    """Estimate the largest `hidden_size` that fits, with feed-forward layers and heads as much wider; 0 if none does.

    Weights are counted, and activations scaled with the width.

    Args:
        held: estimates at the width of `config`, by the names "phase 1" and "one block".
        usable: bytes that a training can take.
    """
    models = {"phase 1": NoPropForPreTraining, "one block": DenoisingBlock}

    def weights(width: int, name: str) -> int:
        scale, wider = width / config.hidden_size, copy.deepcopy(config)
        for field in ("hidden_size", "intermediate_size", "correction_size", "head_dim"):
            setattr(wider, field, round(scale * getattr(config, field)))
        with torch.device("meta"):
            return sum(tensor.numel() for tensor in models[name](wider).parameters())

    def needed(width: int) -> int:
        scale, totals = width / config.hidden_size, []
        for name, each in held.items():
            in_width = each.parts["frozen table"] + each.parts["activations"]
            growth = weights(width, name) / weights(config.hidden_size, name)
            totals.append(round(scale * in_width + growth * (each.total - in_width)))
        return max(totals)

    step = 2 * config.num_attention_heads  # rotary positions need heads of an even size
    widths = range(step, 64 * config.hidden_size, step)
    index = bisect.bisect_right(widths, usable, key=needed)
    return widths[index - 1] if index else 0


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass
class SplitSize:
    """Rows of text, windows (or padded samples) and tokens of a split; None if it is a stream."""

    rows: int | None = None
    windows: int | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, texts: Dataset | IterableDataset, windows: Dataset | IterableDataset) -> "SplitSize":
        """Count the rows of a split, before and after tokenization, and its tokens."""
        if isinstance(texts, IterableDataset):
            return cls()
        lengths = pc.list_value_length(windows.with_format("arrow")[:]["input_ids"])
        return cls(len(texts), len(windows), pc.sum(lengths).as_py())


@dataclass
class TrainingCost:
    """The cost of training phase 1, or one block.

    Attributes:
        steps: optimizer steps.
        tokens: tokens that all processes of the group read in these steps, without padding.
        epochs: passes over the training split; None if it is a stream.
        memory: estimate for a device.
        seconds: seconds per step.
        checkpoints: upper bound on bytes on disk.
    """

    steps: int
    tokens: int
    epochs: float | None
    memory: Memory
    seconds: float
    checkpoints: int


class Rehearsal:
    """Train for a few steps in a temporary folder, to measure the cost of a training.

    Args:
        dataset: the tokenized splits.
        split: the size of the training split.
        processes: number of processes that train together.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: NoPropConfig,
        tokenizer: PreTrainedTokenizerBase,
        dataset: dict[str, Dataset | IterableDataset],
        split: SplitSize,
        processes: int,
    ):
        self.recipe, self.config, self.tokenizer = recipe, config, tokenizer
        self.dataset, self.split, self.processes = dataset, split, processes
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            self.tokenizer_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

    def phase1(self, table: TokenTable) -> TrainingCost:
        """Measure phase 1, from its start."""
        pretraining = self.recipe.pretraining
        with self._arguments(**pretraining.training_fields()) as args:
            trainer = pretraining_trainer(self.config, self.tokenizer, self.dataset, pretraining, args, table=table)
            return self._measure(trainer, self.split)

    def block(self, table: TokenTable, index: int) -> TrainingCost:
        """Measure a block, from a random start."""
        block = DenoisingBlock(copy.deepcopy(self.config), index)
        with self._arguments() as args:
            trainer = block_trainer(block, table, self.tokenizer, self.dataset, args)
            return self._measure(trainer, self.block_split)

    @property
    def block_split(self) -> SplitSize:
        """The size of the text of one block; clusters are about equal."""
        if self.config.block_data == "shared" or self.split.windows is None:
            return self.split
        share = self.config.num_blocks
        return SplitSize(self.split.rows, self.split.windows // share, (self.split.tokens or 0) // share)

    def block_steps(self, args: TrainingArguments) -> int:
        """Count the optimizer steps of a block."""
        return count_steps(args, self.block_split.windows, self.processes)

    def router_steps(self) -> int:
        """Count the optimizer steps of the router, if there is one."""
        if self.config.block_data == "shared":
            return 0
        with self._arguments(**router_fields(self.recipe.pretraining, self.recipe.training)) as args:
            return count_steps(args, self.split.windows, self.processes)

    @contextmanager
    def _arguments(self, **fields: Any) -> Iterator[TrainingArguments]:
        """Derive the arguments of a training whose files are temporary."""
        quiet = {"push_to_hub": False, "report_to": "none", "disable_tqdm": True, "load_best_model_at_end": False}
        with tempfile.TemporaryDirectory() as folder:
            args = use_one_device(dataclasses.replace(self.recipe.training, output_dir=folder, **quiet, **fields))
            args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
            yield args

    def _measure(self, trainer: DurableTrainer, split: SplitSize) -> TrainingCost:
        args = trainer.args
        steps = count_steps(args, split.windows, self.processes)
        windows = steps * args.train_batch_size * args.gradient_accumulation_steps * self.processes
        length = self.recipe.data.max_length if not split.windows else (split.tokens or 0) / split.windows
        epochs = None if split.windows is None else windows / split.windows
        weights = sum(tensor.nbytes for tensor in trainer.model.state_dict().values()) + self.tokenizer_bytes / 3
        kept = checkpoints_kept(self.recipe.training, steps, epochs)
        seconds = seconds_per_step(trainer)
        return TrainingCost(
            steps=steps,
            tokens=round(windows * length),
            epochs=epochs,
            memory=memory(trainer),  # after a step, when the optimizer has its states
            seconds=seconds,
            checkpoints=math.ceil(checkpoint_bytes(weights + CHECKPOINT_FILES / 3, kept)) if kept else 0,
        )


@dataclass
class Plan:
    """Forecast of a `noprop train` run. `str(plan)` is the printed report.

    Attributes:
        recipe: the arguments of the run.
        config: the configuration; its information schedule is a first guess until phase 1 is done.
        splits: the size of the corpus, by split.
        sizes: bytes of weights.
        phase1: None if its table exists, or is taken from another model.
        block: one block; None if all are trained.
        has_table: whether the table is in the directory.
        remaining: the remaining steps of each block; 0 if it is trained.
        phase1_remaining: the remaining steps of phase 1.
        router_steps: steps of the router after phase 1; 0 without clusters.
        groups: number of blocks trained at a time, and of processes for each.
        model_bytes: upper bound on the size of the model directory without checkpoints.
        device: the device on which steps were timed.
        usable_bytes: memory of the device that a training can take.
    """

    recipe: Recipe
    config: NoPropConfig
    splits: dict[str, SplitSize]
    sizes: Sizes
    phase1: TrainingCost | None
    block: TrainingCost | None
    has_table: bool
    remaining: dict[int, int]
    phase1_remaining: int
    router_steps: int
    groups: tuple[int, int]
    model_bytes: int
    device: torch.device
    usable_bytes: int

    @property
    def checkpoint_bytes(self) -> int:
        """Upper bound on the bytes of all checkpoints; those of finished blocks stay."""
        phase1 = 0 if self.phase1 is None else self.phase1.checkpoints * (1 if self.router_steps == 0 else 2)
        return phase1 + (0 if self.block is None else self.block.checkpoints * len(self.remaining))

    @property
    def phase1_seconds(self) -> float:
        return 0.0 if self.phase1 is None else self.phase1.seconds * self.phase1_remaining

    @property
    def router_seconds(self) -> float:
        # A step of the router costs no more than one of a block, which has as many layers and a softmax.
        return 0.0 if self.block is None else self.block.seconds * self.router_steps

    @property
    def blocks_seconds(self) -> float:
        """Seconds until the last block is trained: each group takes the next block when it is free."""
        loads = [0] * self.groups[0]
        for steps in self.remaining.values():
            loads[loads.index(min(loads))] += steps
        return 0.0 if self.block is None else self.block.seconds * max(loads)

    def __str__(self) -> str:
        work = [self._training(), self._memory(), self._fit(), self._time()] if self._columns() else []
        sections = [self._data(), self._model(), self._done(), *work, self._disk(), self._sharing()]
        return "\n\n".join(section_text(*section) for section in sections)

    def _columns(self) -> dict[str, TrainingCost]:
        costs = {"phase 1": self.phase1, "one block": self.block}
        return {name: cost for name, cost in costs.items() if cost is not None}

    def _data(self) -> Section:
        unit = "windows" if self.recipe.data.packing else "samples"
        sizes = {
            name: "a stream of unknown length: the run ends at max_steps"
            if split.rows is None
            else f"{split.rows:,} rows, {split.windows:,} {unit}, {split.tokens:,} tokens"
            for name, split in self.splits.items()
        }
        return ("data",), list(sizes.items())

    def _model(self) -> Section:
        config, sizes = self.config, self.sizes
        levels = ", ".join(f"{level:.4g}" for level in config.noise_levels or [])
        is_guess = config.noise_schedule == "information" and not self.has_table
        parts = f"{config.num_blocks} blocks" + (" and a router" if config.num_router_layers else "")
        table, trunk = config.vocab_size * config.hidden_size, []
        if config.trunk_config is not None:
            parameters = sizes.table // 4 - table - config.vocab_size  # without the statistics of tokens
            trunk = [("trunk", f"{parameters:,} parameters in {config.num_trunk_layers} layers, frozen")]
        return ("model",), [
            ("vocabulary", f"{config.vocab_size:,} tokens"),
            ("table", f"{table:,} parameters, frozen"),
            *trunk,
            ("one block", f"{sizes.block // 4:,} parameters"),
            ("all", f"{sizes.parameters:,} parameters in {parts}, and the table"),
            ("noise", f"{config.noise_schedule}, levels {levels}" + " (a guess: phase 1 sets them)" * is_guess),
        ]

    def _done(self) -> Section:
        rows = []
        if self.has_table:
            rows.append(("phase 1", "done, skipped"))
        elif self.phase1 is not None and self.phase1_remaining < self.phase1.steps:
            rows.append(("phase 1", f"resumes from step {self.phase1.steps - self.phase1_remaining:,}"))
        done = [str(index) for index, steps in self.remaining.items() if steps == 0]
        if done:
            rows.append((f"block{'s' * (len(done) > 1)} {', '.join(done)}", "done, skipped"))
        for index, steps in self.remaining.items():
            if self.block is not None and 0 < steps < self.block.steps:
                rows.append((f"block {index}", f"resumes from step {self.block.steps - steps:,}"))
        return (f"done already in {self.recipe.training.output_dir}",), rows or [("nothing", "")]

    def _training(self) -> Section:
        costs = self._columns().values()
        return ("training", *self._columns()), [
            ("steps", *(f"{cost.steps:,}" for cost in costs)),
            ("tokens read", *(f"{cost.tokens:,}" for cost in costs)),
            ("epochs", *("unknown" if cost.epochs is None else f"{cost.epochs:.2f}" for cost in costs)),
        ]

    def _memory(self) -> Section:
        held = [cost.memory for cost in self._columns().values()]
        rows = [(part, *(f"{each.parts[part] / 1e6:,.1f}" for each in held)) for part in held[0].parts]
        rows.append(("together", *(f"{each.total / 1e6:,.1f}" for each in held)))
        return ("memory per device, MB (estimated)", *self._columns()), rows

    def _fit(self) -> Section:
        held = {name: cost.memory for name, cost in self._columns().items()}
        largest = max(held, key=lambda name: held[name].total)
        needed, fits = held[largest].total, held[largest].total <= self.usable_bytes
        where = "this machine's available memory"
        if self.device.type == "cuda":
            where = f"the free memory of {torch.cuda.get_device_name(self.device)}"
        usage = f"{needed / 1e9:,.3g} GB of {self.usable_bytes / 1e9:,.3g} GB ({USABLE:.0%} of {where})"
        rows = [("fits" if fits else "DOES NOT FIT", f"{usage}, for {largest}")]
        flags = {"phase 1": "--pretraining_per_device_train_batch_size", "one block": "--per_device_train_batch_size"}
        for name, each in held.items():
            batch = each.largest_batch(self.usable_bytes)
            rows.append((f"largest batch, {name}", f"{flags[name]} {batch}" if batch else "none at this hidden_size"))
        if self.config.trunk_config is None:  # which decides the width
            width = largest_width(self.config, held, self.usable_bytes)
            choice = f"--hidden_size {width} at these batches" if width else "none at these batches"
            rows.append(("largest width", choice))
        if not fits:
            rows.append(("lower", "the batch (and raise --gradient_accumulation_steps), --hidden_size or the layers"))
            rows.append(("or save memory", f"by --{CHECKPOINTING}, --optim adafactor"))
        return ("fit per device",), [*rows, ("num_blocks", "any: a device trains one block at a time")]

    def _time(self) -> Section:
        groups, size = self.groups
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "this machine's CPU"
        rows = []
        if self.phase1 is not None:
            rows.append(("phase 1", f"{self.phase1_seconds / 60:,.1f}", f"{1000 * self.phase1.seconds:,.1f} ms a step"))
        if self.router_steps > 0:
            rows.append(("router", f"{self.router_seconds / 60:,.1f}", f"{self.router_steps:,} steps"))
        if self.block is not None:
            minutes = self.block.seconds * self.block.steps / 60
            rows.append(("one block", f"{minutes:,.1f}", f"{1000 * self.block.seconds:,.1f} ms a step"))
            waiting = sum(steps > 0 for steps in self.remaining.values())
            each = f", {size} processes each" if size > 1 else ""
            rows.append((f"{waiting} blocks, {groups} at a time{each}", f"{self.blocks_seconds / 60:,.1f}", ""))
        seconds = self.phase1_seconds + self.router_seconds + self.blocks_seconds
        rows.append(("together", f"{seconds / 60:,.1f}", ""))
        return (f"time, minutes (steps on {device}; evaluations and saving not counted)",), rows

    def _disk(self) -> Section:
        folder = Path(self.recipe.training.output_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        return ("disk, MB at most",), [
            ("model directory", f"{self.model_bytes / 1e6:,.1f}"),
            ("checkpoints", f"{self.checkpoint_bytes / 1e6:,.1f}"),
            ("free now", f"{shutil.disk_usage(folder).free / 1e6:,.1f}"),
        ]

    def _sharing(self) -> Section:
        args = self.recipe.training
        if not args.push_to_hub:
            return ("sharing",), [("nothing is pushed", "")]
        visibility = {None: "public unless the account's default is private", True: "private", False: "public"}
        return ("sharing",), [
            ("pushed at the end", f"the model and its card to {args.hub_model_id}"),
            ("a new repository is", visibility[args.hub_private_repo]),
        ]


def plan(recipe: Recipe) -> Plan:
    """Plan a run of `noprop train`.

    The data are read, and phase 1 and a block are trained for a few steps in a temporary folder. Nothing is written to
    `output_dir` or pushed.

    Raises:
        ValueError: if the run itself would raise it before it trains.
    """
    check_training_arguments(recipe.training, recipe.pretraining)
    usable = usable_bytes(recipe.training.device)
    directory, args = Path(recipe.training.output_dir), recipe.training
    has_table = (directory / EMBEDDINGS_SHARD).is_file()
    corpus = load_corpus(recipe.data)
    if has_table:
        config = load_config(directory, recipe.model)
        tokenizer = load_tokenizer(args.output_dir, config.vocab_size)
        table = load_table(directory, config)
    else:
        config, tokenizer, table = prepare_pretraining(recipe.model, recipe.data, corpus["train"])
        if not table.weight.any():  # it does not come from another model
            table.weight.copy_(standardize(torch.randn_like(table.weight)))
    dataset = tokenize(corpus, tokenizer, recipe.data)
    data = check_dataset(directory, config, tokenizer, dataset, recipe.data, args, recipe.blocks)
    router = None
    if has_table:
        router = load_router(directory, config)
    else:
        prepare_clusters(config, tokenizer, dataset, args, recipe.blocks)  # raises if a cluster is too small
    splits = {name: SplitSize.of(corpus[name], dataset[name]) for name in dataset}
    if not has_table:
        table.log_prior.copy_(log_prior(dataset["train"], config.vocab_size))
    selected = parse_blocks(recipe.blocks.blocks, config.num_blocks)
    groups = group_processes(recipe.blocks.parallelism, recipe.run.processes, len(selected))

    rehearsal = Rehearsal(recipe, config, tokenizer, dataset, splits["train"], groups[1])
    together = {"world_size": groups[1]}
    phase1, phase1_remaining = None, 0
    if not has_table and recipe.model.embeddings_from is None:
        phase1_args, identity = pretraining_run(config, dataset, data, recipe.pretraining, args, table)
        identity = run_identity(phase1_args, identity | together, recipe.data.streaming)
        checkpoint = newest_checkpoint(Path(phase1_args.output_dir), identity)
        phase1 = rehearsal.phase1(table)
        phase1_remaining = phase1.steps - _step_of(checkpoint)

    run = BlockRun(
        directory, config, table, router, tokenizer, dataset, data, args, recipe.blocks, NoMeetingPlace(directory)
    )
    remaining = {}
    for index in selected:
        if has_table and block_is_trained(directory, config, table, index):
            remaining[index] = 0
        else:
            checkpoint = run.checkpoint(index, **together) if has_table else None
            remaining[index] = rehearsal.block_steps(args) - _step_of(checkpoint)
    waiting = [index for index in selected if remaining[index] > 0]
    for index in waiting:
        run.block_dataset(index)  # raises if the cluster is too small
    block = rehearsal.block(table, waiting[-1]) if waiting else None

    sizes = Sizes.of(config)
    model_bytes = sizes.model + rehearsal.tokenizer_bytes + SMALL_FILES
    if recipe.model.embeddings_from is None:
        model_bytes += sizes.phase1
    return Plan(
        recipe=recipe,
        config=config,
        splits=splits,
        sizes=sizes,
        phase1=phase1,
        phase1_remaining=phase1_remaining,
        router_steps=0 if has_table else rehearsal.router_steps(),
        block=block,
        remaining=remaining,
        has_table=has_table,
        groups=groups,
        model_bytes=model_bytes,
        device=args.device,
        usable_bytes=usable,
    )


def _step_of(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


def section_text(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Format a section: its title, the names of its columns if there are several, and indented rows."""
    table = Table(box=None, pad_edge=False, show_header=len(titles) > 1, header_style="")
    for number, cells in enumerate(zip(*rows, strict=True)):
        is_number = all(cell.translate(str.maketrans("", "", ",.")).isdigit() for cell in cells)
        table.add_column(titles[number] if number < len(titles) else "", justify="right" if is_number else "left")
    for first, *others in rows:
        table.add_row(Text(f"  {first}"), *map(Text, others))
    console = Console(file=StringIO(), width=WIDEST_LINE)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join(lines if len(titles) > 1 else [titles[0], *lines])
