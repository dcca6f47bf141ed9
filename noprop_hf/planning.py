"""What a run will be, before it: its data, model, steps, memory, time and disk, and what is done of it already.

Sizes are computed, activations and seconds per step measured in a few real steps. All that is written goes into a
temporary folder.
"""

import copy
import dataclasses
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from .arguments import Recipe, check_training_arguments, parse_blocks
from .checkpoints import DurableTrainer, newest_checkpoint, run_identity
from .configuration_noprop import NoPropConfig
from .data import CausalCollator, load_corpus, load_tokenizer, tokenize, training_fingerprint
from .model_directory import block_is_trained, check_data, load_table
from .modeling_noprop import DenoisingBlock, NoPropForCausalLM, NoPropForMaskedLM, TokenTable
from .noise_noprop import standardize
from .parallel import group_processes
from .shards_noprop import EMBEDDINGS_SHARD
from .training import (
    BlockTrainer,
    begin,
    block_checkpoint,
    check_blocks,
    load_config,
    log_prior,
    masked_collator,
    masked_lm_run,
    one_device,
)


TIMED_STEPS = 5
TIME_LIMIT = 10  # seconds of timed steps
SAMPLE_ROWS = 8  # whose activations are counted
SMALL_FILES = 1_000_000  # bytes of code, configurations, results and card in a model directory
CHECKPOINT_FILES = 100_000  # bytes of a checkpoint's states and logs, without weights, moments and tokenizer


# --- sizes ------------------------------------------------------------------------------------------------------------


@dataclass
class Sizes:
    """Bytes of weights, in float32: of the table, of the model of phase 1, of the largest block, and of the model."""

    table: int
    phase1: int
    block: int
    model: int

    @classmethod
    def of(cls, config: NoPropConfig) -> "Sizes":
        """The sizes for a configuration, without memory for the weights."""
        config = copy.deepcopy(config)
        with torch.device("meta"):
            modules = (
                TokenTable(config),
                NoPropForMaskedLM(config),
                DenoisingBlock(config, config.num_blocks - 1),
                NoPropForCausalLM(config),
            )
        return cls(*(sum(tensor.nbytes for tensor in module.state_dict().values()) for module in modules))


def checkpoint_bytes(weights: int, kept: int = 2) -> int:
    """Bytes of the checkpoints of a model at most: weights and two moments of Adam in each, and one more of them while
    it is written."""
    return (kept + 1) * 3 * weights


def checkpoints_kept(args: TrainingArguments, steps: int, epochs: float | None) -> int:
    """Upper bound on the number of checkpoints at the end of a training."""
    strategy, interval = args.save_strategy, args.save_steps
    if strategy == "best" or args.load_best_model_at_end:  # at most one for each evaluation
        strategy, interval = args.eval_strategy, args.eval_steps or 1
    every = interval if interval >= 1 else math.ceil(interval * steps)
    saves = {"no": 0, "epoch": math.ceil(epochs or 1)}.get(strategy, math.ceil(steps / every))
    at_least = 2 if args.metric_for_best_model is None else 3  # the best one is kept besides the last two
    return min(saves, max(at_least, args.save_total_limit)) if args.save_total_limit else saves


def count_steps(args: TrainingArguments, rows: int | None, processes: int) -> int:
    """Optimizer steps of a training, as `Trainer` counts them.

    Args:
        rows: training rows; not known of a stream, which needs `max_steps`.
        processes: how many train together.
    """
    if args.max_steps > 0:
        return args.max_steps
    whole = math.floor if args.dataloader_drop_last else math.ceil
    batches = whole(whole(rows / args.per_device_train_batch_size) / processes)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


# --- measurements -----------------------------------------------------------------------------------------------------


class Stopwatch(TrainerCallback):
    """Ends training after a few steps, and knows how long they took."""

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
        """Median of the steps; the first one, which warms up, counts where it is alone."""
        steps = [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]
        return statistics.median(steps[1:] or steps)


def seconds_per_step(trainer: DurableTrainer) -> float:
    """Measured in real steps; not a number where the device has too little memory for one."""
    stopwatch = Stopwatch()
    trainer.add_callback(stopwatch)
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        return math.nan
    return stopwatch.seconds()


def saved_bytes(compute: Callable[[], torch.Tensor], modules: Sequence[nn.Module]) -> int:
    """What the computation of a loss saves for the backward pass, the weights of some modules left out."""
    own = {t.untyped_storage().data_ptr() for module in modules for t in (*module.parameters(), *module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    total = sum(size for pointer, size in saved.items() if pointer not in own)
    del loss  # alive until here, so that no address is used twice
    return total


def activations(trainer: DurableTrainer, rows: int, frozen: Sequence[nn.Module] = ()) -> int:
    """Bytes that a step over the first training rows saves for the backward pass, in the precision of the training."""
    inputs = trainer._prepare_inputs(trainer.data_collator(list(islice(trainer.train_dataset, rows))))
    trainer.model.train()
    with trainer.accelerator.autocast():
        return saved_bytes(lambda: trainer.compute_loss(trainer.model, inputs), [trainer.model, *frozen])


def memory(trainer: DurableTrainer, config: NoPropConfig, frozen: Sequence[nn.Module] = ()) -> dict[str, int]:
    """Bytes on a device while it trains, by what they hold. Activations are counted for a few rows and scaled, in the
    precision of the training.

    Args:
        frozen: what else is on the device.
    """
    batch = trainer.args.per_device_train_batch_size
    many = min(batch, SAMPLE_ROWS)
    few = (many + 1) // 2
    saved = activations(trainer, many, frozen)
    if few < many:
        per_row = (saved - activations(trainer, few, frozen)) / (many - few)
        saved += math.ceil(per_row * (batch - many))
    parameters = sum(parameter.nbytes for parameter in trainer.model.parameters())
    positions = batch * config.max_position_embeddings
    sampled = config.sampled_softmax and isinstance(trainer, BlockTrainer)
    vocabulary = min(config.vocab_size, positions) if sampled else config.vocab_size
    logits = min(2**23, positions * vocabulary)  # see `vocabulary_nats`
    return {
        "parameters": parameters,
        "gradients": parameters,
        "AdamW's moments": 2 * parameters,
        "frozen table": sum(tensor.nbytes for module in frozen for tensor in (*module.parameters(), *module.buffers())),
        "activations": saved,
        "logits, in pieces": 3 * 4 * logits,
    }


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Rows of text, windows (or padded samples) and tokens of a split; None where it is a stream."""

    rows: int | None = None
    windows: int | None = None
    tokens: int | None = None


@dataclass
class Training:
    """One training: that of phase 1, or of one block.

    Attributes:
        steps: optimizer steps.
        tokens: tokens read in them by all processes that train together, paddings left out.
        epochs: how often that is the training split; None of a stream.
        memory: bytes on a device, by what they hold.
        seconds: time of a step.
        checkpoints: bytes on disk at most.
    """

    steps: int
    tokens: int
    epochs: float | None
    memory: dict[str, int]
    seconds: float
    checkpoints: int


class Trial:
    """Trainings of a run that are ended after a few steps, and leave nothing behind.

    Args:
        rows: the tokenized training split.
        split: its size.
        processes: how many train together.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: NoPropConfig,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset | IterableDataset,
        split: Split,
        processes: int,
    ):
        self.recipe, self.config, self.tokenizer = recipe, config, tokenizer
        self.rows, self.split, self.processes = rows, split, processes
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            self.tokenizer_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

    def phase1(self) -> Training:
        """Phase 1, from its random start."""
        config, recipe = self.config, self.recipe
        with self._arguments(**recipe.pretraining.training_fields()) as args:
            trainer = DurableTrainer(
                model=NoPropForMaskedLM(copy.deepcopy(config)),
                args=args,
                train_dataset=self.rows,
                data_collator=masked_collator(config, self.tokenizer, recipe.pretraining, args.seed),
            )
            return self._measure(trainer)

    def block(self, table: TokenTable, index: int) -> Training:
        """A block, from a random start and, if it reads the blocks before it, beside random ones."""
        previous = []
        if self.config.context_source == "previous_block":
            previous = [DenoisingBlock(self.config, earlier) for earlier in range(index)]
        with self._arguments() as args:
            trainer = BlockTrainer(
                DenoisingBlock(copy.deepcopy(self.config), index),
                table,
                previous,
                args=args,
                train_dataset=self.rows,
                data_collator=CausalCollator(self.tokenizer),
            )
            return self._measure(trainer, [trainer.table, *trainer.previous])

    def steps(self, args: TrainingArguments) -> int:
        """Optimizer steps of a whole training."""
        return count_steps(args, self.split.windows, self.processes)

    @contextmanager
    def _arguments(self, **fields: Any) -> Iterator[TrainingArguments]:
        """The run's arguments, but for what it would leave behind."""
        quiet = {"push_to_hub": False, "report_to": "none", "disable_tqdm": True, "load_best_model_at_end": False}
        with tempfile.TemporaryDirectory() as folder:
            args = one_device(dataclasses.replace(self.recipe.training, output_dir=folder, **quiet, **fields))
            args.eval_strategy = args.save_strategy = args.logging_strategy = "no"
            yield args

    def _measure(self, trainer: DurableTrainer, frozen: Sequence[nn.Module] = ()) -> Training:
        args, split = trainer.args, self.split
        steps = self.steps(args)
        windows = steps * args.train_batch_size * args.gradient_accumulation_steps * self.processes
        length = self.recipe.data.max_length if not split.windows else (split.tokens or 0) / split.windows
        epochs = None if split.windows is None else windows / split.windows
        weights = sum(tensor.nbytes for tensor in trainer.model.state_dict().values()) + self.tokenizer_bytes / 3
        kept = checkpoints_kept(self.recipe.training, steps, epochs)
        return Training(
            steps=steps,
            tokens=round(windows * length),
            epochs=epochs,
            memory=memory(trainer, self.config, frozen),
            seconds=seconds_per_step(trainer),
            checkpoints=math.ceil(checkpoint_bytes(weights + CHECKPOINT_FILES / 3, kept)) if kept else 0,
        )


@dataclass
class Plan:
    """What a run of `noprop train` will be. `str` of it is a text for a person.

    Attributes:
        recipe: its arguments.
        config: the configuration; its information schedule is a first guess until phase 1 is done.
        splits: the corpus, by split.
        sizes: bytes of weights.
        phase1: None when its table is there, or taken from another model.
        block: one block; None when all are trained.
        has_table: whether the table is in the directory.
        remaining: steps that are left, by block; 0 where it is trained.
        phase1_remaining: those of phase 1.
        groups: how many blocks are trained at a time, and by how many processes each.
        model_bytes: the model directory at most, without checkpoints.
        device: where steps were timed.
    """

    recipe: Recipe
    config: NoPropConfig
    splits: dict[str, Split]
    sizes: Sizes
    phase1: Training | None
    block: Training | None
    has_table: bool
    remaining: dict[int, int]
    phase1_remaining: int
    groups: tuple[int, int]
    model_bytes: int
    device: torch.device

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of all checkpoints at most: those of finished blocks stay."""
        phase1 = 0 if self.phase1 is None else self.phase1.checkpoints
        return phase1 + (0 if self.block is None else self.block.checkpoints * len(self.remaining))

    @property
    def phase1_seconds(self) -> float:
        return 0.0 if self.phase1 is None else self.phase1.seconds * self.phase1_remaining

    @property
    def blocks_seconds(self) -> float:
        """Time until the last block is trained: each group takes the next one when it is free."""
        loads = [0] * self.groups[0]
        for steps in self.remaining.values():
            loads[loads.index(min(loads))] += steps
        return 0.0 if self.block is None else self.block.seconds * max(loads)

    def __str__(self) -> str:
        work = [self._training(), self._memory(), self._time()] if self._columns() else []
        sections = [self._data(), self._model(), self._done(), *work, self._disk(), self._sharing()]
        return "\n\n".join(_aligned(*section) for section in sections)

    def _data(self):
        rows = []
        for name, split in self.splits.items():
            if split.rows is None:
                rows.append((name, "a stream of unknown length: max_steps decides"))
            else:
                what = "windows" if self.recipe.data.packing else "samples"
                rows.append((name, f"{split.rows:,} rows, {split.windows:,} {what}, {split.tokens:,} tokens"))
        return ("data",), rows

    def _model(self):
        config, sizes = self.config, self.sizes
        levels = ", ".join(f"{level:.4g}" for level in config.noise_levels or [])
        guess = config.noise_schedule == "information" and not self.has_table
        return ("model",), [
            ("vocabulary", f"{config.vocab_size:,} tokens"),
            ("table", f"{config.vocab_size * config.hidden_size:,} parameters, frozen"),
            ("one block", f"{sizes.block // 4:,} parameters"),
            ("all", f"{(sizes.model - sizes.table) // 4:,} parameters in {config.num_blocks} blocks, and the table"),
            ("noise", f"{config.noise_schedule}, levels {levels}" + " (a guess: phase 1 sets them)" * guess),
        ]

    def _done(self):
        rows = []
        if self.has_table:
            rows.append(("phase 1", "done, skipped"))
        elif self.phase1 is not None and self.phase1_remaining < self.phase1.steps:
            rows.append(("phase 1", f"goes on from step {self.phase1.steps - self.phase1_remaining:,}"))
        done = [str(index) for index, steps in self.remaining.items() if steps == 0]
        if done:
            rows.append((f"block{'s' * (len(done) > 1)} {', '.join(done)}", "done, skipped"))
        for index, steps in self.remaining.items():
            if self.block is not None and 0 < steps < self.block.steps:
                rows.append((f"block {index}", f"goes on from step {self.block.steps - steps:,}"))
        return (f"done already in {self.recipe.training.output_dir}",), rows or [("nothing", "")]

    def _columns(self) -> dict[str, Training]:
        return {name: one for name, one in (("phase 1", self.phase1), ("one block", self.block)) if one is not None}

    def _training(self):
        columns = self._columns().values()
        return ("training", *self._columns()), [
            ("steps", *(f"{one.steps:,}" for one in columns)),
            ("tokens read", *(f"{one.tokens:,}" for one in columns)),
            ("epochs", *("unknown" if one.epochs is None else f"{one.epochs:.2f}" for one in columns)),
        ]

    def _memory(self):
        columns = self._columns().values()
        parts = list(next(iter(columns)).memory)
        rows = [(name, *(f"{one.memory[name] / 1e6:,.1f}" for one in columns)) for name in parts]
        totals = [sum(one.memory.values()) for one in columns]
        rows.append(("together", *(f"{total / 1e6:,.1f}" for total in totals)))
        if self.device.type == "cuda":
            there = torch.cuda.get_device_properties(self.device).total_memory
            rows.append(("the device has", *(f"{there / 1e6:,.1f}" for _ in totals)))
            rows.append(("does it fit?", *("yes" if total < there else "NO" for total in totals)))
        return ("memory per device, MB (estimated)", *self._columns()), rows

    def _time(self):
        groups, size = self.groups
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "this machine's CPU"
        each = f", {size} processes each" if size > 1 else ""
        rows = []
        if self.phase1 is not None:
            rows.append(("phase 1", f"{self.phase1_seconds / 60:,.1f}", f"{1000 * self.phase1.seconds:,.1f} ms a step"))
        if self.block is not None:
            waiting = sum(steps > 0 for steps in self.remaining.values())
            rows.append(
                (
                    "one block",
                    f"{self.block.seconds * self.block.steps / 60:,.1f}",
                    f"{1000 * self.block.seconds:,.1f} ms a step",
                )
            )
            rows.append((f"{waiting} blocks, {groups} at a time{each}", f"{self.blocks_seconds / 60:,.1f}", ""))
        rows.append(("together", f"{(self.phase1_seconds + self.blocks_seconds) / 60:,.1f}", ""))
        return (f"time, minutes (steps on {name}; evaluations and saving not counted)",), rows

    def _disk(self):
        folder = Path(self.recipe.training.output_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        return ("disk, MB at most",), [
            ("model directory", f"{self.model_bytes / 1e6:,.1f}"),
            ("checkpoints", f"{self.checkpoint_bytes / 1e6:,.1f}"),
            ("free now", f"{shutil.disk_usage(folder).free / 1e6:,.1f}"),
        ]

    def _sharing(self):
        args = self.recipe.training
        if not args.push_to_hub:
            return ("sharing",), [("nothing is pushed", "")]
        kinds = {None: "public unless the account's default is private", True: "private", False: "public"}
        return ("sharing",), [
            ("pushed at the end", f"the model and its card to {args.hub_model_id}"),
            ("if it is new", kinds[args.hub_private_repo]),
        ]


def plan(recipe: Recipe) -> Plan:
    """Say what `noprop train` would do with a recipe: it reads the data, and trains a few steps of phase 1 and of a
    block in a temporary folder. Nothing is written to `output_dir`, and nothing is pushed.

    Raises:
        ValueError: what the run itself would raise before it trains.
    """
    check_training_arguments(recipe.training, recipe.pretraining)
    directory, args = Path(recipe.training.output_dir), recipe.training
    has_table = (directory / EMBEDDINGS_SHARD).is_file()
    corpus = load_corpus(recipe.data)
    if has_table:
        config = load_config(directory, recipe.model)
        tokenizer = load_tokenizer(args.output_dir, config.vocab_size)
        table = load_table(directory, config)
    else:
        config, tokenizer, source = begin(recipe.model, recipe.data, corpus["train"])
        table = TokenTable(config)  # random, unless it comes from another model
        table.weight.copy_(standardize(torch.randn_like(table.weight) if source is None else source))
    dataset = tokenize(corpus, tokenizer, recipe.data)
    data = training_fingerprint(dataset["train"], recipe.data)
    check_data(directory, data)
    check_blocks(recipe.blocks, tokenizer, dataset["train"], args)
    splits = {name: _measure_split(corpus[name], dataset[name]) for name in dataset}
    if not has_table:
        table.log_prior.copy_(log_prior(dataset["train"], config.vocab_size))
    selected = parse_blocks(recipe.blocks.blocks, config.num_blocks)
    at_once = 1 if config.context_source == "previous_block" else len(selected)
    groups = group_processes(recipe.blocks.parallelism, recipe.run.processes, at_once)

    trial = Trial(recipe, config, tokenizer, dataset["train"], splits["train"], groups[1])
    together = {"world_size": groups[1]}
    phase1, phase1_remaining = None, 0
    if not has_table and recipe.model.embeddings_from is None:
        phase1_args, identity = masked_lm_run(config, dataset, data, recipe.pretraining, args)
        identity = run_identity(phase1_args, identity | together, recipe.data.streaming)
        checkpoint = newest_checkpoint(Path(phase1_args.output_dir), identity)
        phase1 = trial.phase1()
        phase1_remaining = phase1.steps - _step_of(checkpoint)
    block, remaining = None, {}
    for index in selected:
        if has_table and block_is_trained(directory, config, table, index):
            remaining[index] = 0
            continue
        checkpoint = None
        if has_table:
            checkpoint = block_checkpoint(directory, config, table, index, dataset, data, args, **together)
        remaining[index] = trial.steps(args) - _step_of(checkpoint)
    waiting = [index for index in selected if remaining[index] > 0]
    if waiting:
        block = trial.block(table, waiting[len(waiting) // 2])  # in order, each costs a bit more than the one before

    sizes = Sizes.of(config)
    model_bytes = sizes.model + trial.tokenizer_bytes + SMALL_FILES
    if recipe.model.embeddings_from is None:
        model_bytes += sizes.phase1
    return Plan(
        recipe=recipe,
        config=config,
        splits=splits,
        sizes=sizes,
        phase1=phase1,
        phase1_remaining=phase1_remaining,
        block=block,
        remaining=remaining,
        has_table=has_table,
        groups=groups,
        model_bytes=model_bytes,
        device=args.device,
    )


def _measure_split(texts: Dataset | IterableDataset, windows: Dataset | IterableDataset) -> Split:
    if isinstance(texts, IterableDataset):
        return Split()
    lengths = pc.list_value_length(windows.with_format("arrow")[:]["input_ids"])
    return Split(len(texts), len(windows), pc.sum(lengths).as_py())


def _step_of(checkpoint: str | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])


def _aligned(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A section: a title, the names of columns, and indented rows; of several columns, figures stand on the right."""
    columns = max(len(row) for row in [titles, *rows])
    lines = [titles + ("",) * (columns - len(titles)), *((f"  {row[0]}", *row[1:]) for row in rows)]
    head = max(len(line[0]) for line in (lines if len(titles) > 1 else lines[1:]))
    widths = [max(len(line[column]) for line in lines) for column in range(1, columns)]
    figures = len(titles) > 1 or all(row[1].translate(str.maketrans("", "", ",.")).isdigit() for row in rows)
    text = []
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths, strict=True)]
        text.append("  ".join([first.ljust(head), *(cells if figures else others)]).rstrip())
    return "\n".join(text)
