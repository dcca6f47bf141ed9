"""Phase 1: create the frozen table and the model directory.

The table is that of a shallow language model, which the stock `Trainer` trains and which also initialises the blocks,
or it comes from another model (`--embeddings_from`). An interrupted run resumes where it stopped.
"""

import copy
import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, IterableDataset
from transformers import AutoModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.utils import logging

from .arguments import BlockArguments, ModelArguments, PretrainingArguments, check_training_arguments
from .checkpoints import DurableTrainer, trainer_arguments, training_note
from .clusters import check_clustered_data, train_router
from .configuration_noprop import NoPropConfig
from .data import (
    DataArguments,
    PretrainingCollator,
    count_tokens,
    data_identity,
    load_corpus,
    load_tokenizer,
    prompt_tokenizer,
    tokenize,
    train_tokenizer,
    training_fingerprint,
    vocabulary_size,
)
from .evaluation import encode_prompt
from .hub import LOCAL_SOURCE, is_local
from .layout import CORPUS_FILE, lock_file
from .model_directory import check_data, create_model_directory, load_table, read_config, read_metadata, shard_exists
from .modeling_noprop import NoPropForPreTraining, TokenTable
from .noise_noprop import information_levels, standardize
from .parallel import run_once
from .shards_noprop import EMBEDDINGS_SHARD, PRETRAINING_FOLDER, clusters_hash, without_progress_bar
from .tracking import track


logger = logging.get_logger(__name__)

TOKENIZER_ROWS = 1_000_000  # maximum rows to train a tokenizer on, since a stream may be endless


def pretrain_embeddings(
    model_args: ModelArguments,
    data_args: DataArguments,
    pretraining_args: PretrainingArguments,
    training_args: TrainingArguments,
    block_args: BlockArguments | None = None,
) -> Path:
    """Create the frozen table and write the model directory.

    An existing table in the directory is kept.

    Args:
        block_args: arguments of phase 2, if it follows, which are checked before the training.

    Returns:
        The model directory, `training_args.output_dir`.

    Raises:
        ValueError: if the tokenizer lacks a mask token that is needed, the corpus cannot be used, the directory belongs
            to another model, or a training argument is not supported.
    """
    check_training_arguments(training_args, pretraining_args)
    directory = Path(training_args.output_dir)
    shard, created = directory / EMBEDDINGS_SHARD, []
    shard_exists(shard)  # raises if a directory has its name

    def make() -> None:
        created.append(shard)
        _make_table(model_args, data_args, pretraining_args, training_args, block_args)

    run_once(lock_file(directory, "embeddings"), training_args, shard.is_file, make)
    if not created:
        load_table(directory, load_config(directory, model_args))
        logger.info(f"{directory} already holds an embedding table: phase 1 is skipped.")
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
    config, tokenizer, source = prepare_pretraining(model_args, data_args, corpus["train"])
    dataset = tokenize(corpus, tokenizer, data_args)
    data = training_fingerprint(dataset["train"], data_args)
    check_data(directory, data)
    check_clustered_data(config, dataset["train"])
    if block_args is not None:
        check_block_data(block_args, tokenizer, dataset["train"], training_args)

    table, start, router = TokenTable(config), None, None
    origin = {"data": data} | sources(model_args)
    if source is not None:
        table.weight.copy_(standardize(source))
    else:
        model, origin["training"] = pretrain_language_model(
            config, tokenizer, dataset, data, pretraining_args, training_args
        )
        table.weight.copy_(model.token_table().detach())
        start = model.encoder
        if training_args.should_save:
            shutil.rmtree(directory / PRETRAINING_FOLDER, ignore_errors=True)  # left by a run that was killed
            with without_progress_bar():
                model.save_pretrained(directory / PRETRAINING_FOLDER)
    table.log_prior.copy_(log_prior(dataset["train"], config.vocab_size))
    if config.noise_schedule == "information":
        config.noise_levels = information_levels(table.weight, table.log_prior, config.num_blocks)
    if config.block_data == "clusters":
        router = train_router(config, start, table, tokenizer, dataset, data, pretraining_args, training_args)
        origin["clusters"] = clusters_hash(router.state_dict())
    if not training_args.should_save:
        return
    directory.mkdir(parents=True, exist_ok=True)
    corpus_fields = {name: value for name, value in vars(data_args).items() if value is not None}
    levels = [round(level, 4) for level in config.noise_levels or []]
    (directory / CORPUS_FILE).write_text(yaml.safe_dump(corpus_fields, sort_keys=False), encoding="utf-8")
    create_model_directory(directory, config, tokenizer, table, origin, router)
    logger.info(f"The embedding table is in {directory}; noise levels {levels}.")


def prepare_pretraining(
    model_args: ModelArguments, data_args: DataArguments, rows: Dataset | IterableDataset
) -> tuple[NoPropConfig, PreTrainedTokenizerBase, torch.Tensor | None]:
    """Create the configuration and the tokenizer, and load the embeddings of `--embeddings_from`.

    Args:
        rows: the training split, on which a tokenizer is trained if `tokenizer_name` is not set.

    Returns:
        The configuration, the tokenizer, and the embeddings `(vocab_size, hidden_size)` or None.

    Raises:
        ValueError: if the tokenizer lacks a mask token that is needed, or arguments do not fit together.
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


def check_block_data(
    block_args: BlockArguments,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | IterableDataset,
    training_args: TrainingArguments,
) -> None:
    """Check that the blocks can be trained with a tokenizer and data.

    Args:
        rows: the tokenized training split.

    Raises:
        ValueError: if a prompt has no token, or the split has too few rows for a batch.
    """
    for prompt in block_args.sample_prompts:
        encode_prompt(prompt, tokenizer)
    batch = training_args.train_batch_size * training_args.world_size
    if training_args.dataloader_drop_last and isinstance(rows, Dataset) and len(rows) < batch:
        raise ValueError(
            f"The training split has {len(rows)} rows, too few for one batch of {batch}: give more text, a smaller "
            "--per_device_train_batch_size, or leave --dataloader_drop_last out."
        )


def log_prior(rows: Dataset | IterableDataset, vocab_size: int) -> torch.Tensor:
    """Compute unigram log-probabilities with add-one smoothing, `(vocab_size,)`, from tokenized rows."""
    counts = count_tokens(rows, vocab_size) + 1
    return (counts / counts.sum()).log()


def pretrain_language_model(
    config: NoPropConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: dict[str, Dataset | IterableDataset],
    data: str,
    pretraining_args: PretrainingArguments,
    training_args: TrainingArguments,
) -> tuple[NoPropForPreTraining, str]:
    """Train the language model of phase 1.

    Args:
        data: the fingerprint of the training split.

    Returns:
        The model, and a description of its training (see [`~noprop_hf.checkpoints.training_note`]).
    """
    args, identity = pretraining_run(config, dataset, data, pretraining_args, training_args)
    set_seed(training_args.seed)
    trainer = pretraining_trainer(config, tokenizer, dataset, pretraining_args, args, identity)
    with track(trainer, Path(training_args.output_dir), "embeddings", "embeddings"):
        trainer.train_durably()
    trainer.save_state()
    return trainer.model.cpu().eval(), training_note(args, training_args.seed)


def pretraining_trainer(
    config: NoPropConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: dict[str, Dataset | IterableDataset],
    pretraining_args: PretrainingArguments,
    args: TrainingArguments,
    identity: dict[str, Any] | None = None,
) -> DurableTrainer:
    """Create the trainer of phase 1, with a randomly initialised model.

    Args:
        args, identity: see [`pretraining_run`].
    """
    return DurableTrainer(
        model=NoPropForPreTraining(copy.deepcopy(config)),  # `Trainer` switches off its cache
        identity=identity,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=PretrainingCollator(
            tokenizer,
            mlm=config.pretraining_objective != "clm",
            mlm_probability=pretraining_args.mlm_probability,
            run_seed=args.seed,
        ),
    )


def pretraining_run(
    config: NoPropConfig,
    dataset: dict[str, Dataset | IterableDataset],
    data: str,
    pretraining_args: PretrainingArguments,
    training_args: TrainingArguments,
) -> tuple[TrainingArguments, dict[str, Any]]:
    """Derive the training arguments of phase 1, and everything else that its result depends on."""
    args = trainer_arguments(training_args, PRETRAINING_FOLDER, **pretraining_args.training_fields())
    settings = {**config.to_diff_dict(), "mlm_probability": pretraining_args.mlm_probability}
    return args, {**settings, **data_identity(data, dataset, args)}


def _source_embeddings(name_or_path: str) -> torch.Tensor:
    try:
        model = AutoModel.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot load the model {name_or_path!r} for its embeddings. Give a local directory or a name on the "
            "Hub (and a connection to it)."
        ) from error
    return model.get_input_embeddings().weight.detach().float()


def build_config(
    model_args: ModelArguments,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    source: torch.Tensor | None = None,
) -> NoPropConfig:
    """Build the configuration for a tokenizer and, if the table comes from another model, for its embeddings.

    Args:
        source (`(vocab_size, hidden_size)`, *optional*): the embeddings of the other model.

    Raises:
        ValueError: if sizes do not fit together.
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
    """Collect the sources of tokenizer and table.

    Local paths are replaced by a hash, since they would become public with the model.
    """
    names = {"tokenizer_name": model_args.tokenizer_name, "embeddings_from": model_args.embeddings_from}
    return {
        key: LOCAL_SOURCE + hashlib.sha256(name.encode()).hexdigest()[:16] if is_local(name) else name
        for key, name in names.items()
        if name is not None
    }


def load_config(directory: Path, model_args: ModelArguments) -> NoPropConfig:
    """Read the configuration of a model directory.

    A tokenizer that was trained on a small text may have fewer entries than the `vocab_size` of `model_args`.

    Raises:
        ValueError: if the configuration differs from `model_args`.
    """
    config = read_config(directory)
    trained_tokenizer = model_args.tokenizer_name is None and model_args.embeddings_from is None
    shard = directory / EMBEDDINGS_SHARD
    origin = read_metadata(shard) if shard.is_file() else {}
    for name, value in (model_args.config_fields() | sources(model_args)).items():
        existing = getattr(config, name) if hasattr(config, name) else origin.get(name)
        fits = trained_tokenizer and config.vocab_size <= value if name == "vocab_size" else False
        if existing != value and not fits:
            existing = "another local path" if str(existing).startswith(LOCAL_SOURCE) else existing
            raise ValueError(
                f"{directory} holds a model with {name}={existing}, but {name}={getattr(model_args, name)} was "
                "requested. Use another --output_dir, or the settings of that model."
            )
    return config
