"""Training: the embedding table first, then each block on its own.

    pretrain_embeddings   phase 1, a shallow masked and causal language model, with the stock `Trainer`
    train_blocks          phase 2, one `BlockTrainer` per block

Both write into one model directory (see `model_directory.py`) and go on where an interrupted run stopped.
"""

import copy
import dataclasses
import gc
import hashlib
import math
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import (
    AutoModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from .arguments import (
    CORPUS_FILE,
    BlockArguments,
    ModelArguments,
    PretrainingArguments,
    check_training_arguments,
    parse_blocks,
    read_config,
)
from .checkpoints import CHECKPOINTS_FOLDER, DurableTrainer, newest_checkpoint, run_identity
from .configuration_noprop import NoPropConfig
from .data import (
    CausalCollator,
    DataArguments,
    MaskedCollator,
    count_tokens,
    data_fingerprint,
    load_corpus,
    load_tokenizer,
    prompt_tokenizer,
    tokenize,
    train_tokenizer,
    training_fingerprint,
    vocabulary_size,
)
from .evaluation import encode_prompt, sample_texts
from .hub import LOCAL_SOURCE, is_local
from .meeting_place import MeetingPlace, noted_hash, published_fault
from .model_directory import (
    block_is_trained,
    block_mark,
    check_data,
    create_model_directory,
    is_there,
    load_block,
    load_table,
    read_metadata,
    save_block,
)
from .modeling_noprop import DenoisingBlock, NoPropForCausalLM, NoPropForMaskedLM, TokenTable
from .noise_noprop import information_levels, standardize
from .parallel import claim, first_says, holder_of, once
from .shards_noprop import (
    CONTENT_HASH,
    EMBEDDINGS_SHARD,
    MASKED_LM_FOLDER,
    block_shard,
    fingerprint,
    without_progress_bar,
)
from .tracking import TrackingCallback, track


logger = logging.get_logger(__name__)

TOKENIZER_ROWS = 1_000_000  # a tokenizer is trained on the first rows: a stream may have no end


def trainer_arguments(training_args: TrainingArguments, name: str, **fields: Any) -> TrainingArguments:
    """Derive the arguments of one `Trainer` from those of the run.

    Its checkpoints hold a copy of them, so the token of the Hub is left out.

    Args:
        name: the subfolder of checkpoints.
        fields: values that replace those of the run.
    """
    folder = Path(training_args.output_dir) / CHECKPOINTS_FOLDER / name
    fields |= {"output_dir": str(folder), "push_to_hub": False, "hub_token": None, "prediction_loss_only": True}
    return one_device(dataclasses.replace(training_args, **fields))


def one_device(args: TrainingArguments) -> TrainingArguments:
    """The arguments for a `Trainer` that uses one device in each process."""
    if args.n_gpu > 1:
        args._n_gpu = 1  # as `Trainer` does itself for models that must not be wrapped in `DataParallel`
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # every step uses all parameters
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # there is nothing to pin it for, and torch says so with every evaluation
    return args


# --- phase 1: the table -----------------------------------------------------------------------------------------------


def pretrain_embeddings(
    model_args: ModelArguments,
    data_args: DataArguments,
    pretraining_args: PretrainingArguments,
    training_args: TrainingArguments,
    block_args: BlockArguments | None = None,
) -> Path:
    """Make the frozen table and write the model directory around it.

    The table comes from a shallow language model (`pretraining_objective`), which blocks start from as well, or from
    `model_args.embeddings_from`. When the directory holds one already, that one is kept.

    Args:
        block_args: where blocks are to be trained next, what can be checked of that is checked first.

    Returns:
        The model directory, `training_args.output_dir`.

    Raises:
        ValueError: a tokenizer without a mask token, a corpus that cannot be used, a directory of another model, or
            training arguments that are not supported.
    """
    check_training_arguments(training_args, pretraining_args)
    directory = Path(training_args.output_dir)
    shard, made = directory / EMBEDDINGS_SHARD, []

    is_there(shard)  # or raises

    def make() -> None:
        made.append(shard)
        _make_table(model_args, data_args, pretraining_args, training_args, block_args)

    once(directory / CHECKPOINTS_FOLDER / "embeddings.lock", training_args, shard.is_file, make)
    if made:
        return directory
    config = load_config(directory, model_args)
    load_table(directory, config)
    logger.warning(f"{directory} holds an embedding table already: phase 1 is skipped.")
    return directory


def _make_table(
    model_args: ModelArguments,
    data_args: DataArguments,
    pretraining_args: PretrainingArguments,
    training_args: TrainingArguments,
    block_args: BlockArguments | None,
) -> None:
    directory = Path(training_args.output_dir)
    corpus = load_corpus(data_args)
    config, tokenizer, source = begin(model_args, data_args, corpus["train"])
    dataset = tokenize(corpus, tokenizer, data_args)
    data = training_fingerprint(dataset["train"], data_args)
    check_data(directory, data)
    if block_args is not None:
        check_blocks(block_args, tokenizer, dataset["train"], training_args)

    table = TokenTable(config)
    if source is not None:
        table.weight.copy_(standardize(source))
    else:
        model = _pretrain_masked_lm(config, tokenizer, dataset, data, pretraining_args, training_args)
        table.weight.copy_(model.token_table())
        if training_args.should_save:
            shutil.rmtree(directory / MASKED_LM_FOLDER, ignore_errors=True)  # of a run that was killed
            with without_progress_bar():
                model.save_pretrained(directory / MASKED_LM_FOLDER)
    table.log_prior.copy_(log_prior(dataset["train"], config.vocab_size))
    if config.noise_schedule == "information":
        config.noise_levels = information_levels(table.weight, table.log_prior, config.num_blocks)
    if not training_args.should_save:
        return
    directory.mkdir(parents=True, exist_ok=True)
    corpus_fields = {name: value for name, value in vars(data_args).items() if value is not None}
    levels = [round(level, 4) for level in config.noise_levels or []]
    (directory / CORPUS_FILE).write_text(yaml.safe_dump(corpus_fields, sort_keys=False), encoding="utf-8")
    origin = {"data": data} | sources(model_args)
    create_model_directory(directory, config, tokenizer, table, origin)
    logger.warning(f"The embedding table is in {directory}; noise levels {levels}.")


def begin(
    model_args: ModelArguments, data_args: DataArguments, rows: Dataset | IterableDataset
) -> tuple[NoPropConfig, PreTrainedTokenizerBase, torch.Tensor | None]:
    """What phase 1 begins with: configuration, tokenizer, and the embeddings of another model where those are taken.

    Args:
        rows: the training split, which a tokenizer is trained on when none is named.

    Raises:
        ValueError: a tokenizer without a mask token, or arguments that do not fit together.
    """
    source = None
    if model_args.embeddings_from is not None:
        source = _source_embeddings(model_args.embeddings_from)
        tokenizer = load_tokenizer(model_args.tokenizer_name or model_args.embeddings_from)
    elif model_args.tokenizer_name is not None:
        tokenizer = load_tokenizer(model_args.tokenizer_name)
    else:
        texts = (text or "" for text in rows.take(TOKENIZER_ROWS)[data_args.text_column_name])
        vocab_size = model_args.vocab_size or 4096
        tokenizer = train_tokenizer(texts, vocab_size, data_args.max_length)
        if len(tokenizer) < vocab_size:
            logger.warning(
                f"The tokenizer has {len(tokenizer)} entries, not {vocab_size}: the text is too small for more."
            )
    tokenizer = prompt_tokenizer(tokenizer, data_args)
    config = build_config(model_args, data_args, tokenizer, source)
    if source is None and config.pretraining_objective != "clm" and tokenizer.mask_token is None:
        raise ValueError(
            f"The tokenizer {model_args.tokenizer_name!r} has no mask token, which masked language modelling needs. "
            "Use a tokenizer that has one, --pretraining_objective clm, or the table of a model with --embeddings_from."
        )
    return config, tokenizer, source


def log_prior(rows: Dataset | IterableDataset, vocab_size: int) -> torch.Tensor:
    """Log-probabilities of the tokens in tokenized rows, each counted once more than it is there: `(vocab_size,)`."""
    counts = count_tokens(rows, vocab_size) + 1
    return (counts / counts.sum()).log()


def masked_collator(
    config: NoPropConfig, tokenizer: PreTrainedTokenizerBase, pretraining_args: PretrainingArguments, seed: int
) -> MaskedCollator:
    """The batches of phase 1."""
    return MaskedCollator(
        tokenizer,
        mlm=config.pretraining_objective != "clm",
        mlm_probability=pretraining_args.mlm_probability,
        run_seed=seed,
    )


def _pretrain_masked_lm(
    config: NoPropConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: dict[str, Dataset | IterableDataset],
    data: str,
    pretraining_args: PretrainingArguments,
    training_args: TrainingArguments,
) -> NoPropForMaskedLM:
    set_seed(training_args.seed)
    model = NoPropForMaskedLM(copy.deepcopy(config))  # `Trainer` switches off its cache
    args, identity = masked_lm_run(config, dataset, data, pretraining_args, training_args)
    trainer = DurableTrainer(
        model=model,
        identity=identity,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=masked_collator(config, tokenizer, pretraining_args, training_args.seed),
    )
    show_progress(trainer, "embeddings")
    with track(trainer, Path(training_args.output_dir), "embeddings"):
        trainer.train_durably()
    trainer.save_state()
    return model.cpu().eval()


def masked_lm_run(
    config: NoPropConfig,
    dataset: dict[str, Dataset | IterableDataset],
    data: str,
    pretraining_args: PretrainingArguments,
    training_args: TrainingArguments,
) -> tuple[TrainingArguments, dict[str, Any]]:
    """The training arguments of phase 1, and what its result depends on besides them."""
    args = trainer_arguments(training_args, MASKED_LM_FOLDER, **pretraining_args.training_fields())
    settings = {**config.to_diff_dict(), "mlm_probability": pretraining_args.mlm_probability}
    return args, {**settings, **data_identity(data, dataset, args)}


def data_identity(data: str, dataset: dict[str, Dataset | IterableDataset], args: TrainingArguments) -> dict[str, str]:
    """The data that a result depends on: the validation split as well where it decides which weights are kept."""
    identity = {"data": data}
    if args.load_best_model_at_end:
        identity["validation_data"] = data_fingerprint(dataset["validation"])
    return identity


def _source_embeddings(name_or_path: str) -> torch.Tensor:
    try:
        model = AutoModel.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot load the model {name_or_path!r} to take its embeddings. Give a local directory or a name on the "
            "Hub (and a connection to it)."
        ) from error
    return model.get_input_embeddings().weight.detach().float()


def build_config(
    model_args: ModelArguments,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    source: torch.Tensor | None = None,
) -> NoPropConfig:
    """The configuration for a tokenizer and, where the table comes from another model, for its `source` embeddings.

    Raises:
        ValueError: sizes that do not fit together.
    """
    fields = model_args.config_fields()
    num_tokens = vocabulary_size(tokenizer)
    vocab_size = num_tokens if source is None else source.shape[0]
    if model_args.vocab_size not in (None, vocab_size) and (model_args.tokenizer_name or source is not None):
        raise ValueError(
            f"`vocab_size` is {model_args.vocab_size}, but the tokenizer or table has {vocab_size} entries. "
            "Leave --vocab_size out."
        )
    if source is not None:
        if num_tokens > vocab_size:
            raise ValueError(
                f"The table of {model_args.embeddings_from!r} is too small for the tokenizer: {vocab_size} rows for "
                f"{num_tokens} tokens. Use the model's own tokenizer."
            )
        if fields.setdefault("hidden_size", source.shape[1]) != source.shape[1]:
            raise ValueError(
                f"The table of {model_args.embeddings_from!r} has {source.shape[1]} dimensions, but `hidden_size` is "
                f"{fields['hidden_size']}. Leave --hidden_size out, or set it to {source.shape[1]}."
            )
    fields |= {
        "vocab_size": vocab_size,
        "max_position_embeddings": data_args.max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
    }
    return NoPropConfig(**fields)


def sources(model_args: ModelArguments) -> dict[str, str]:
    """The names that tokenizer and table come from, where they were given; of a path of this machine, which would
    become public with the model, a hash."""
    names = {"tokenizer_name": model_args.tokenizer_name, "embeddings_from": model_args.embeddings_from}
    return {
        key: LOCAL_SOURCE + hashlib.sha256(name.encode()).hexdigest()[:16] if is_local(name) else name
        for key, name in names.items()
        if name is not None
    }


def load_config(directory: Path, model_args: ModelArguments) -> NoPropConfig:
    """The configuration of a model directory.

    `vocab_size` is what a tokenizer was to be trained to: on a small text, it has fewer entries.

    Raises:
        ValueError: it is not the one that `model_args` ask for.
    """
    config = read_config(directory)
    trained_tokenizer = model_args.tokenizer_name is None and model_args.embeddings_from is None
    shard = directory / EMBEDDINGS_SHARD
    made_from = read_metadata(shard) if shard.is_file() else {}
    for name, value in (model_args.config_fields() | sources(model_args)).items():
        there = getattr(config, name) if hasattr(config, name) else made_from.get(name)
        fits = trained_tokenizer and config.vocab_size <= value if name == "vocab_size" else False
        if there != value and not fits:
            there = "another local path" if str(there).startswith(LOCAL_SOURCE) else there
            raise ValueError(
                f"{directory} holds a model with {name}={there}, but {name}={getattr(model_args, name)} is asked for. "
                "Use another --output_dir, or the settings it was made with."
            )
    return config


# --- phase 2: the blocks ----------------------------------------------------------------------------------------------


class BlockTrainer(DurableTrainer):
    """Trains one [`DenoisingBlock`] on its local loss.

    The block, its optimizer and its scheduler are those of a plain `Trainer`; the shared frozen table is handed to the
    block with every batch and nothing else is on the device.

    Args:
        model ([`DenoisingBlock`]): the block.
        table ([`TokenTable`]): the frozen table.
        previous: with `context_source="previous_block"`, the trained blocks before it, which only run forward.
        kwargs: arguments of [`DurableTrainer`].
    """

    def __init__(self, model: DenoisingBlock, table: TokenTable, previous: Sequence[DenoisingBlock] = (), **kwargs):
        super().__init__(model=model, **kwargs)
        self.table = table.to(self.args.device)
        self.previous = [block.to(self.args.device).eval().requires_grad_(False) for block in previous]
        self._terms: dict[str, list[torch.Tensor]] = {}  # the loss by term, of every batch since the last log
        self._eval_terms: list[torch.Tensor] = []
        self._eval_generator: torch.Generator | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ):
        inputs = {**inputs, "table": self.table}
        if self.previous:
            inputs["previous_states"] = self._previous_states(inputs["input_ids"], inputs.get("attention_mask"))
        if not model.training:
            inputs["generator"] = self._eval_generator
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            for name in ("denoising_loss", "context_loss"):
                self._terms.setdefault(name, []).append(outputs[name].detach())
        else:
            count = (inputs["labels"][:, 1:] != -100).sum()
            nats = [outputs.context_nats, outputs.denoising_nats, outputs.bound_nats]
            self._eval_terms.append(torch.stack([*(term * count for term in nats), count]).detach())
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _previous_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        embeds, states = self.table(input_ids), None
        with self.accelerator.autocast():
            attention_inputs = self.previous[0].encoder.attention_inputs(embeds, attention_mask)
            for block in self.previous:
                states = block.encoder(embeds, states, **attention_inputs)
        return states

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


def block_seed(seed: int, block_index: int) -> int:
    """The seed of a block: of the run's seed and the block's index, and of nothing else."""
    return int(np.random.SeedSequence([seed, block_index]).generate_state(1)[0] >> 1)


def train_blocks(
    data_args: DataArguments,
    block_args: BlockArguments,
    training_args: TrainingArguments,
    model_args: ModelArguments | None = None,
    place: MeetingPlace | None = None,
) -> Path:
    """Train the selected blocks, one after the other, and write a shard for each.

    A block depends on the table, the data, the seed and its index alone. Blocks whose shard is there, or which another
    process trains, are skipped, and a block that was interrupted goes on from its last checkpoint.

    Args:
        place: a repository where the table is taken from, if it is not in the directory, and blocks are published.

    Returns:
        The model directory, `training_args.output_dir`.

    Raises:
        FileNotFoundError: phase 1 has not been run.
        ValueError: blocks out of range, a directory or shard of another model, or training arguments that are not
            supported.
    """
    check_training_arguments(training_args)
    directory = Path(training_args.output_dir)
    if place is not None:
        shard, lock_file = directory / EMBEDDINGS_SHARD, directory / CHECKPOINTS_FOLDER / "embeddings.lock"
        once(lock_file, training_args, shard.is_file, place.fetch_table)
        origin = place.check_table()
    elif not (directory / EMBEDDINGS_SHARD).is_file():
        load_table(directory, NoPropConfig())  # tells what to do
    config = load_config(directory, model_args or ModelArguments())
    table = load_table(directory, config)
    selected = parse_blocks(block_args.blocks, config.num_blocks)
    trained = {index for index in selected if block_is_trained(directory, config, table, index)}
    refused: list[int] = []  # whose published shards are no blocks of this model
    if place is not None:
        origin.metadata.setdefault("fingerprint", fingerprint(config, table.weight))  # a table of another saver
        published = first_says(training_args, place.blocks() if training_args.process_index == 0 else {})
        for index in sorted(trained):
            ours = read_metadata(directory / block_shard(index)).get(CONTENT_HASH)
            if noted_hash(published.get(block_shard(index))) != ours:
                place.publish_block(index)  # it was trained, and then something came between
        for index in sorted(set(selected) - trained):
            if block_shard(index) in published:
                fault = published_fault(index, published, config, origin)
                (trained.add if fault is None else refused.append)(index)
                if fault is not None:
                    logger.warning(f"Block {index} is passed over, as the published {block_shard(index)} {fault}.")
    for index in sorted(trained):
        logger.warning(f"Block {index} is trained already: skipped.")
    waiting = first_says(training_args, [index for index in selected if index not in {*trained, *refused}])
    if waiting:
        _train_waiting(waiting, config, table, data_args, block_args, training_args, place)
    if place is not None and refused:
        shards = ", ".join(map(block_shard, refused))
        raise ValueError(
            f"Not trained: {shards} in {place.repo_id} are no blocks of this model (why, the warnings above say). "
            "Remove them there, and run the same command again."
        )
    return directory


def _train_waiting(
    waiting: list[int],
    config: NoPropConfig,
    table: TokenTable,
    data_args: DataArguments,
    block_args: BlockArguments,
    training_args: TrainingArguments,
    place: MeetingPlace | None,
) -> None:
    directory = Path(training_args.output_dir)
    tokenizer = load_tokenizer(str(directory), config.vocab_size)
    dataset = tokenize(load_corpus(data_args), tokenizer, data_args)
    data = training_fingerprint(dataset["train"], data_args)
    check_data(directory, data)
    check_blocks(block_args, tokenizer, dataset["train"], training_args)
    lock_files = {index: directory / CHECKPOINTS_FOLDER / f"block-{index:02d}.lock" for index in waiting}
    for index in waiting:
        if holder_of(lock_files[index]) is None:
            block_checkpoint(directory, config, table, index, dataset, data, training_args)
    for index, lock_file in lock_files.items():
        with claim(lock_file, training_args, partial(_is_taken, directory, config, index, place, block_args)) as mine:
            if mine:
                try:
                    train_block(index, config, table, tokenizer, dataset, data, block_args, training_args, place)
                except Exception:
                    if place is not None and training_args.should_save:
                        place.release(index)
                    raise
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    first_says(training_args, "written")


def check_blocks(
    block_args: BlockArguments,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | IterableDataset,
    training_args: TrainingArguments,
) -> None:
    """Check what the training of any block needs of tokenizer and data.

    Args:
        rows: the tokenized training split.

    Raises:
        ValueError: a prompt without a token, or too few rows for a batch.
    """
    for prompt in block_args.sample_prompts:
        encode_prompt(prompt, tokenizer)
    batch = training_args.train_batch_size * training_args.world_size
    if training_args.dataloader_drop_last and isinstance(rows, Dataset) and len(rows) < batch:
        raise ValueError(
            f"The training split has {len(rows)} rows, too few for one batch of {batch}: give more text, a smaller "
            "--per_device_train_batch_size, or leave --dataloader_drop_last out."
        )


def _is_taken(
    directory: Path, config: NoPropConfig, block_index: int, place: MeetingPlace | None, block_args: BlockArguments
) -> bool:
    """Whether a block is trained by somebody else, now or before, or has to wait for the blocks that it reads."""
    if (directory / block_shard(block_index)).is_file():
        return True
    if place is None:
        return False
    if config.context_source == "previous_block":
        for earlier in range(block_index):
            if not (directory / block_shard(earlier)).is_file() and not place.fetch_block(earlier):
                logger.warning(
                    f"Block {block_index} reads block {earlier}, which is neither here nor in {place.repo_id}: left. "
                    "Run the same command again when that block is published."
                )
                return True
    why_not = place.claim(block_index, block_args.take_over)
    if why_not is not None:
        logger.warning(f"Block {block_index} {why_not}")
    return why_not is not None


def train_block(
    block_index: int,
    config: NoPropConfig,
    table: TokenTable,
    tokenizer: PreTrainedTokenizerBase,
    dataset: dict[str, Dataset | IterableDataset],
    data: str,
    block_args: BlockArguments,
    training_args: TrainingArguments,
    place: MeetingPlace | None = None,
) -> dict[str, float]:
    """Train one block and write its shard into `training_args.output_dir`.

    Args:
        data: the fingerprint of the training split.

    Returns:
        The metrics of the weights that are kept.
    """
    directory = Path(training_args.output_dir)
    args, identity = block_run(directory, config, table, block_index, dataset, data, training_args)
    previous = []
    if config.context_source == "previous_block" and block_index > 0:
        for index in range(block_index):
            previous.append(load_block(directory, config, index))
            block_is_trained(directory, config, table, index)  # raises where it does not belong there
    set_seed(args.seed)
    block = new_block(directory, config, table, block_index)
    trainer = BlockTrainer(
        block,
        table,
        previous,
        identity=identity,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=CausalCollator(tokenizer),
    )
    show_progress(trainer, f"block {block_index} ({block_index + 1} of {config.num_blocks})")
    if place is not None and args.should_save:
        trainer.add_callback(ReportCallback(place, block_index))
    with track(trainer, directory, f"block_{block_index:02d}", config.loss_type == "cross_entropy") as tracking:
        if args.eval_strategy != "no" and block_args.sample_prompts:
            trainer.add_callback(SampleCallback(table, previous, tokenizer, block_args, tracking))
        summary = trainer.train_durably().metrics
        history = [entry for entry in trainer.state.log_history if "eval_bound_nats" in entry]
        evaluated = [entry for entry in history if entry["step"] == trainer.kept_step]
        metrics = evaluated[-1] if evaluated else trainer.evaluate()
    trainer.save_state()
    if not all(math.isfinite(value) for name, value in metrics.items() if name.endswith("_nats")):
        raise FloatingPointError(
            f"The training of block {block_index} diverged: its bound is {metrics['eval_bound_nats']} nats. It is not "
            "written. Lower --learning_rate, and remove its folder of checkpoints to start anew."
        )
    kept = {name: f"{metrics[f'eval_{name}']:.6f}" for name in ("context_nats", "denoising_nats", "bound_nats")}
    cost = {"steps": str(trainer.state.global_step), "seconds": f"{summary['train_runtime']:.1f}"}
    if args.should_save:
        save_block(directory, block, table, {**cost, "seed": str(args.seed), "data": data, **kept})
        if place is not None:
            place.publish_block(block_index)
    return metrics


def block_run(
    directory: Path,
    config: NoPropConfig,
    table: TokenTable,
    block_index: int,
    dataset: dict[str, Dataset | IterableDataset],
    data: str,
    training_args: TrainingArguments,
) -> tuple[TrainingArguments, dict[str, Any]]:
    """The training arguments of a block, and what its result depends on besides them."""
    seed = block_seed(training_args.seed, block_index)
    args = trainer_arguments(training_args, f"block-{block_index:02d}", seed=seed)
    return args, {**block_mark(directory, config, table, block_index), **data_identity(data, dataset, args)}


def block_checkpoint(
    directory: Path,
    config: NoPropConfig,
    table: TokenTable,
    block_index: int,
    dataset: dict[str, Dataset | IterableDataset],
    data: str,
    training_args: TrainingArguments,
    **fields: Any,
) -> str | None:
    """The checkpoint that the training of a block would go on from, if that can be said and there is one.

    Args:
        fields: of the identity of the run, where they are to be others than those of this process.

    Raises:
        ValueError: as [`newest_checkpoint`].
    """
    reads_another = config.context_source == "previous_block" and block_index > 0
    if reads_another and not (directory / block_shard(block_index - 1)).is_file():
        return None  # that will be trained first
    args, identity = block_run(directory, config, table, block_index, dataset, data, training_args)
    streams = isinstance(dataset["train"], IterableDataset)
    return newest_checkpoint(Path(args.output_dir), run_identity(args, identity | fields, streams))


def new_block(directory: Path, config: NoPropConfig, table: TokenTable, block_index: int) -> DenoisingBlock:
    """A block before its training: random, or one that says what the model of phase 1 says.

    Raises:
        FileNotFoundError: it is to start from a model of phase 1 that is not there.
    """
    block = DenoisingBlock(copy.deepcopy(config), block_index)
    if config.block_initialization == "random":
        block.head.bias.data.copy_(table.log_prior)
        return block
    if not (directory / MASKED_LM_FOLDER).is_dir():
        raise FileNotFoundError(
            f"{directory / MASKED_LM_FOLDER} is not there, and blocks start from it. Copy it together with the "
            "embeddings, or make both with `noprop pretrain`."
        )
    start = NoPropForMaskedLM.from_pretrained(directory)
    block.encoder.load_state_dict(start.encoder.state_dict(), strict=False)  # `state_projection` starts at zero
    block.head.readout.load_state_dict(start.readout.state_dict())
    block.head.bias.data.copy_(start.bias)
    return block


class ReportCallback(TrainerCallback):
    """Tells the meeting place how far a block is, whenever that is saved."""

    def __init__(self, place: MeetingPlace, block_index: int):
        self.place = place
        self.block_index = block_index

    def on_save(self, args: TrainingArguments, state: TrainerState, control, **kwargs):
        self.place.report(self.block_index, state.global_step)


# --- what a person sees -----------------------------------------------------------------------------------------------


class NamedProgressCallback(ProgressCallback):
    """The progress bar of transformers with a name, and one short line per log."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state: TrainerState, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args, state: TrainerState, control, logs=None, **kwargs):
        shown = {k: v for k, v in (logs or {}).items() if k.endswith(("loss", "nats", "learning_rate"))}
        if shown and state.is_world_process_zero and self.training_bar is not None:
            figures = ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if isinstance(v, float))
            self.training_bar.write(f"[{self.name}] step {state.global_step}: {figures}", file=sys.stderr)


def show_progress(trainer: Trainer, name: str) -> None:
    """Put the name of what is trained beside the progress bar."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(NamedProgressCallback(name))


def model_of_blocks(blocks: Sequence[DenoisingBlock], table: TokenTable) -> NoPropForCausalLM:
    """The language model that some blocks are by themselves. It shares the blocks' and the table's memory.

    Their layers keep their place in the cache of the full model, so use it with `use_cache=False`.
    """
    config = copy.deepcopy(blocks[0].config)
    config.num_blocks, config.noise_levels = len(blocks), [0.0] * len(blocks)
    with torch.device("meta"):
        model = NoPropForCausalLM(config)
    model.model.embed_tokens = table
    model.model.blocks = nn.ModuleList(blocks)
    return model


class SampleCallback(TrainerCallback):
    """At every evaluation, logs text that the block writes, alone or on top of those it reads, and sends it to the
    trackers. It leaves the random numbers of training alone."""

    def __init__(
        self,
        table: TokenTable,
        previous: Sequence[DenoisingBlock],
        tokenizer: PreTrainedTokenizerBase,
        block_args: BlockArguments,
        tracking: TrackingCallback,
    ):
        self.table = table
        self.previous = previous
        self.tokenizer = tokenizer
        self.block_args = block_args
        self.tracking = tracking

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control, model: DenoisingBlock, **kwargs):
        if not state.is_world_process_zero:
            return
        was_training = model.training
        alone = model_of_blocks([*self.previous, model], self.table).eval()
        prompts, max_new_tokens = self.block_args.sample_prompts, self.block_args.sample_max_new_tokens
        samples = [
            f"{prompt!r} -> {text!r}"
            for prompt, text in sample_texts(
                alone, self.tokenizer, prompts, max_new_tokens, use_cache=False, seed=args.seed
            )
        ]
        for sample in samples:
            logger.warning(f"[block {model.block_index}] step {state.global_step}: {sample}")
        self.tracking.log({"samples": "\n\n".join(samples)}, state.global_step)  # paragraphs of Markdown
        model.train(was_training)
