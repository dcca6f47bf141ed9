"""Phase 2: train each block independently, with one [`BlockTrainer`] per block, and write its shard.

An interrupted run resumes where it stopped.
"""

import copy
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from .arguments import BlockArguments, ModelArguments, check_training_arguments, parse_blocks
from .checkpoints import (
    DurableTrainer,
    newest_checkpoint,
    run_identity,
    trainer_arguments,
    training_note,
    warn_of_other_settings,
)
from .clusters import assign_clusters
from .configuration_noprop import NoPropConfig
from .data import (
    CausalCollator,
    DataArguments,
    data_identity,
    load_corpus,
    load_tokenizer,
    tokenize,
)
from .evaluation import sample_texts
from .layout import block_name, lock_file
from .meeting_place import BlockPublished, MeetingPlace, NoMeetingPlace, noted_hash, published_fault
from .model_directory import (
    block_is_trained,
    block_provenance,
    check_whole,
    load_router,
    load_table,
    read_metadata,
    save_block,
)
from .modeling_noprop import DenoisingBlock, NoPropForCausalLM, NoPropForPreTraining, Router, TokenTable
from .parallel import broadcast_from_first, hold_lock, holder_of, run_once
from .pretraining import check_dataset, load_config, select_block_data
from .shards_noprop import CONTENT_HASH, EMBEDDINGS_SHARD, block_shard, pretraining_folder
from .tracking import TrackingCallback, track


logger = logging.get_logger(__name__)


# --- one block --------------------------------------------------------------------------------------------------------


class BlockTrainer(DurableTrainer):
    """Train one [`DenoisingBlock`] on its local loss.

    The block, its optimizer and its scheduler are those of a plain `Trainer`; the block receives the shared frozen
    table with every batch, and nothing else is on the device.

    Args:
        model ([`DenoisingBlock`]): the block.
        table ([`TokenTable`]): the frozen table.
        kwargs: arguments of [`DurableTrainer`].
    """

    def __init__(self, model: DenoisingBlock, table: TokenTable, **kwargs):
        super().__init__(model=model, frozen={"table": table}, **kwargs)
        self._terms: dict[str, list[torch.Tensor]] = {}  # the loss by term, of every batch since the last log
        self._eval_terms: list[torch.Tensor] = []
        self._eval_generator: torch.Generator | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        if not model.training:
            inputs = {**inputs, "generator": self._eval_generator}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            for name in ("denoising_loss", "context_loss"):
                self._terms.setdefault(name, []).append(outputs[name].detach())
        else:
            count = (inputs["labels"][:, 1:] != -100).sum()
            nats = [outputs.context_nats, outputs.denoising_nats, outputs.bound_nats]
            self._eval_terms.append(torch.stack([*(term * count for term in nats), count]).detach())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._terms:
            means = {name: torch.stack(values).nanmean().item() for name, values in self._terms.items()}
            logs |= {name: mean for name, mean in means.items() if not math.isnan(mean)}
            self._terms = {}
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Evaluate with the same noise every time, and add the nats of the block and of its own bound."""
        self._eval_terms = []
        self._eval_generator = torch.Generator().manual_seed(self.args.seed)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._eval_terms:
            totals = self.accelerator.reduce(torch.stack(self._eval_terms).sum(0), reduction="sum")
            values = (totals[:-1] / totals[-1]).tolist()
            for name, value in zip(("context_nats", "denoising_nats", "bound_nats"), values, strict=True):
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output


def block_trainer(
    block: DenoisingBlock,
    table: TokenTable,
    tokenizer: PreTrainedTokenizerBase,
    dataset: dict[str, Dataset | IterableDataset],
    args: TrainingArguments,
    identity: dict[str, Any] | None = None,
) -> BlockTrainer:
    """Create the trainer of a block.

    Args:
        args, identity: see [`BlockRun.arguments`].
    """
    return BlockTrainer(
        block,
        table,
        identity=identity,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=CausalCollator(tokenizer),
    )


def block_seed(seed: int, block_index: int) -> int:
    """Derive the seed of a block from the seed of the run and the index of the block."""
    return int(np.random.SeedSequence([seed, block_index]).generate_state(1)[0] >> 1)


def block_arguments(args: TrainingArguments, block_index: int) -> TrainingArguments:
    """Derive the training arguments of a block from those of the run."""
    return trainer_arguments(args, block_name(block_index), seed=block_seed(args.seed, block_index))


def new_block(directory: Path, config: NoPropConfig, table: TokenTable, block_index: int) -> DenoisingBlock:
    """Create an untrained block: random, or initialised from the model of phase 1 (`config.block_initialization`).

    With `config.block_data="clusters"` the bias is frozen: all blocks have the same, whatever their weights.

    Raises:
        FileNotFoundError: if the model of phase 1 is needed and missing.
    """
    block = DenoisingBlock(copy.deepcopy(config), block_index)
    block.head.bias.requires_grad_(config.block_data == "shared")
    if config.block_initialization == "random":
        block.head.bias.data.copy_(table.log_prior)
        return block
    if not pretraining_folder(directory).is_dir():
        raise FileNotFoundError(
            f"{pretraining_folder(directory)} is missing, and blocks are initialised from it. Copy it together with "
            "the table, or create both with `noprop pretrain`."
        )
    start = NoPropForPreTraining.from_pretrained(directory)
    block.encoder.load_state_dict(start.encoder.state_dict())
    block.head.readout.load_state_dict(start.readout.state_dict())
    block.head.bias.data.copy_(start.bias)
    return block


@dataclass
class BlockRun:
    """Everything that the trainings of several blocks of a model share.

    Attributes:
        directory: the model directory.
        dataset: the tokenized splits.
        data: the fingerprint of the training split.
        training_args: the arguments of the run, from which those of a block are derived.
        place: where blocks are claimed and published.
    """

    directory: Path
    config: NoPropConfig
    table: TokenTable
    router: Router | None
    tokenizer: PreTrainedTokenizerBase
    dataset: dict[str, Dataset | IterableDataset]
    data: str
    training_args: TrainingArguments
    block_args: BlockArguments
    place: MeetingPlace | NoMeetingPlace

    def arguments(self, block_index: int) -> tuple[TrainingArguments, dict[str, Any]]:
        """Derive the training arguments of a block, and everything else that its result depends on."""
        args = block_arguments(self.training_args, block_index)
        identity = block_provenance(self.directory, self.config, self.table)
        return args, {**identity, **self.start_identity, **data_identity(self.data, self.dataset, args)}

    @cached_property
    def start_identity(self) -> dict[str, str]:
        """Identify the model of phase 1, if blocks are initialised from it."""
        start = pretraining_folder(self.directory) / SAFE_WEIGHTS_NAME
        if self.config.block_initialization != "pretraining" or not start.is_file():
            return {}
        return {"start": check_whole(start).content_hash}

    def block_dataset(self, block_index: int) -> dict[str, Dataset | IterableDataset]:
        """Return the splits that a block is trained and evaluated on: all text, or that of its cluster."""
        if self.router is None:
            return self.dataset
        return select_block_data(
            self.dataset, self.clusters, block_index, self.block_args, self.tokenizer, self.training_args
        )

    @cached_property
    def clusters(self) -> dict[str, np.ndarray]:
        """The cluster of each window, by split."""
        assert self.router is not None
        return {name: assign_clusters(rows, self.router) for name, rows in self.dataset.items()}

    def checkpoint(self, block_index: int, **fields: Any) -> str | None:
        """Find the checkpoint that the training of a block would resume from, if any.

        Args:
            fields: values that replace those of this process in the identity of the run.

        Raises:
            ValueError: as [`newest_checkpoint`].
        """
        args, identity = self.arguments(block_index)
        streams = isinstance(self.dataset["train"], IterableDataset)
        return newest_checkpoint(Path(args.output_dir), run_identity(args, identity | fields, streams))


def train_block(run: BlockRun, block_index: int) -> dict[str, float]:
    """Train one block, write its shard into the model directory and publish it.

    Returns:
        The metrics of the weights that are kept.

    Raises:
        FloatingPointError: if the training diverged. Nothing is written.
    """
    args, identity = run.arguments(block_index)
    set_seed(args.seed)
    block = new_block(run.directory, run.config, run.table, block_index)
    trainer = block_trainer(block, run.table, run.tokenizer, run.block_dataset(block_index), args, identity)
    if args.should_save:
        trainer.add_callback(ReportCallback(run.place, block_index))
    title = f"block {block_index} ({block_index + 1} of {run.config.num_blocks})"
    in_nats = run.config.loss_type == "cross_entropy"
    with track(trainer, run.directory, f"block_{block_index:02d}", title, in_nats) as tracking:
        if args.eval_strategy != "no" and run.block_args.sample_prompts:
            trainer.add_callback(SampleCallback(run, tracking))
        summary = trainer.train_durably().metrics
        metrics = final_metrics(trainer)
    trainer.save_state()
    if not all(math.isfinite(value) for name, value in metrics.items() if name.endswith("_nats")):
        raise FloatingPointError(
            f"The training of block {block_index} diverged: its bound is {metrics['eval_bound_nats']} nats. The block "
            "is not written. Lower --learning_rate, and remove its folder of checkpoints to restart it."
        )
    if args.should_save:
        figures = {name: f"{metrics[f'eval_{name}']:.6f}" for name in ("context_nats", "denoising_nats", "bound_nats")}
        cost = {"steps": str(trainer.state.global_step), "seconds": f"{summary['train_runtime']:.1f}"}
        cost["training"] = training_note(args, run.training_args.seed)
        save_block(run.directory, block, run.table, {**cost, "seed": str(args.seed), "data": run.data, **figures})
        run.place.publish_block(block_index)
    return metrics


def final_metrics(trainer: BlockTrainer) -> dict[str, float]:
    """Return the metrics of the weights that are kept: those of an evaluation at that step, or else of a new one."""
    history = [entry for entry in trainer.state.log_history if "eval_bound_nats" in entry]
    evaluated = [entry for entry in history if entry["step"] == trainer.kept_step]
    return evaluated[-1] if evaluated else trainer.evaluate()


# --- all blocks -------------------------------------------------------------------------------------------------------


def train_blocks(
    data_args: DataArguments,
    block_args: BlockArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments | None = None,
    place: MeetingPlace | None = None,
) -> Path:
    """Train the selected blocks, one after the other, and write a shard for each.

    A block depends on the table, the data, the seed and its index alone. Blocks that are trained, or that another
    process trains, are skipped, and an interrupted block resumes from its last checkpoint.

    Args:
        place: a repository that the table is fetched from, if the directory lacks it, and that blocks are published in.

    Returns:
        The model directory, `training_args.output_dir`.

    Raises:
        FileNotFoundError: if phase 1 has not been run.
        ValueError: if a block index is out of range, the directory or a shard belongs to another model, or a training
            argument is not supported.
    """
    check_training_arguments(training_args)
    directory = Path(training_args.output_dir)
    meeting: MeetingPlace | NoMeetingPlace = place or NoMeetingPlace(directory)
    has_table = (directory / EMBEDDINGS_SHARD).is_file
    run_once(lock_file(directory, "embeddings"), training_args, has_table, meeting.fetch_table)
    origin = meeting.check_table()
    config = load_config(directory, model_args or ModelArguments())
    table = load_table(directory, config)
    for note, value in block_provenance(directory, config, table).items():
        origin.metadata.setdefault(note, value)  # missing from other savers' files
    selected = parse_blocks(block_args.blocks, config.num_blocks)
    trained = {index for index in selected if block_is_trained(directory, config, table, index)}

    published = broadcast_from_first(training_args, meeting.blocks() if training_args.process_index == 0 else {})
    for index in sorted(trained):
        content_hash = read_metadata(directory / block_shard(index)).get(CONTENT_HASH)
        if noted_hash(published.get(block_shard(index))) != content_hash:
            meeting.publish_block(index)  # an interrupted run trained it and did not publish it
    others = [index for index in selected if index not in trained and block_shard(index) in published]
    faults = {index: published_fault(index, published, config, origin) for index in others}
    for index in selected:
        fault = faults.get(index)
        if fault is not None:
            logger.warning(f"Block {index} is skipped, as the published {block_shard(index)} {fault}.")
        elif index in trained or index in faults:
            logger.info(f"Block {index} is trained already: skipped.")
        if index in trained:
            args = block_arguments(training_args, index)
            metadata = read_metadata(directory / block_shard(index))
            warn_of_other_settings(f"Block {index}", metadata, args, training_args.seed)
    waiting = [index for index in selected if index not in trained and index not in faults]
    waiting = broadcast_from_first(training_args, waiting)
    if waiting:
        tokenizer = load_tokenizer(str(directory), config.vocab_size)
        dataset = tokenize(load_corpus(data_args), tokenizer, data_args)
        data = check_dataset(directory, config, tokenizer, dataset, data_args, training_args, block_args)
        router = load_router(directory, config)
        run = BlockRun(directory, config, table, router, tokenizer, dataset, data, training_args, block_args, meeting)
        _train_waiting(run, waiting)
    foreign = [block_shard(index) for index, fault in faults.items() if fault is not None]
    if foreign:
        raise ValueError(
            f"Not trained: {', '.join(foreign)} in {meeting.repo_id} are not blocks of this model (see the "
            "warnings above). Delete them there, and run the same command again."
        )
    return directory


def _train_waiting(run: BlockRun, waiting: Sequence[int]) -> None:
    """Train the blocks that no other process trains."""
    locks = {index: lock_file(run.directory, block_name(index)) for index in waiting}
    for index, path in locks.items():
        if holder_of(path) is None:
            run.checkpoint(index)  # raises before any work if the checkpoint is of another run,
            run.block_dataset(index)  # or if the cluster is too small
    left = list(waiting)
    while left := _open_blocks(run, left):
        index = left.pop(0)
        with hold_lock(locks[index], run.training_args, partial(_is_taken, run, index)) as is_ours:
            if is_ours:
                _train_or_release(run, index)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
    broadcast_from_first(run.training_args, None)  # wait until the first process has written


def _open_blocks(run: BlockRun, indices: Sequence[int]) -> list[int]:
    """Return the blocks that are left to try, in order, the same in all processes of a group."""
    args, is_first = run.training_args, run.training_args.process_index == 0
    options = (run.block_args.take_over, run.block_args.back_up)
    return broadcast_from_first(args, is_first and indices and run.place.open_blocks(indices, *options))


def _train_or_release(run: BlockRun, block_index: int) -> None:
    """Train a block, unless another worker publishes it first; if that fails, release its claim."""
    try:
        train_block(run, block_index)
    except BlockPublished as published:
        logger.info(f"{published} The backup of this worker is not needed any more.")
    except Exception:
        if run.training_args.should_save:
            run.place.release(block_index)
        raise


def _is_taken(run: BlockRun, block_index: int) -> bool:
    """Check whether another process has trained a block or trains it."""
    if (run.directory / block_shard(block_index)).is_file():
        return True
    reason = run.place.claim_block(block_index, run.block_args.take_over, run.block_args.back_up)
    if reason is not None:
        logger.warning(f"Block {block_index} {reason}")
    return reason is not None


# --- callbacks --------------------------------------------------------------------------------------------------------


class ReportCallback(TrainerCallback):
    """Report to the meeting place how far a block is, whenever a checkpoint is saved.

    A backup that is not needed any more is ended, unless several processes train it, which would wait for this one.
    """

    def __init__(self, place: MeetingPlace | NoMeetingPlace, block_index: int):
        self.place = place
        self.block_index = block_index

    def on_save(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        try:
            self.place.report(self.block_index, state.global_step)
        except BlockPublished:
            if args.world_size == 1:
                raise


def model_of_block(block: DenoisingBlock, table: TokenTable) -> NoPropForCausalLM:
    """Build the language model of one block, which shares the memory of its parts.

    The layers keep their indices in the cache of the full model, so use it with `use_cache=False`.
    """
    config = copy.deepcopy(block.config)
    config.num_blocks, config.noise_levels, config.block_data = 1, [0.0], "shared"
    with torch.device("meta"):
        model = NoPropForCausalLM(config)
    model.model.embed_tokens = table
    model.model.blocks = nn.ModuleList([block])
    return model


class SampleCallback(TrainerCallback):
    """Log text that the block writes on its own, at every evaluation.

    It does not draw from the random numbers of training.

    Args:
        run: the run that the block belongs to.
        tracking: where the samples are logged as well.
    """

    def __init__(self, run: BlockRun, tracking: TrackingCallback):
        self.run = run
        self.tracking = tracking

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control, model: DenoisingBlock, **kwargs):
        if not state.is_world_process_zero:
            return
        was_training = model.training
        alone = model_of_block(model, self.run.table).eval()
        texts = sample_texts(
            alone,
            self.run.tokenizer,
            self.run.block_args.sample_prompts,
            self.run.block_args.sample_max_new_tokens,
            use_cache=False,
            seed=args.seed,
        )
        samples = [f"{prompt!r} -> {text!r}" for prompt, text in texts]
        for sample in samples:
            logger.info(f"[block {model.block_index}] step {state.global_step}: {sample}")
        self.tracking.log({"eval_samples": "\n\n".join(samples)}, state.global_step)  # paragraphs of Markdown
        model.train(was_training)
