"""Phase 1: create the frozen table and the model directory.

The table is that of a shallow language model, which the stock `Trainer` trains and which also initialises the blocks,
or it comes from another model (`--embeddings_from`). The language model can read the states of another model
(`--trunk_from`). An interrupted run resumes where it stopped.
"""

import copy
import hashlib
import shutil
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .arguments import BlockArguments, ModelArguments, PretrainingArguments, check_training_arguments
from .checkpoints import DurableTrainer, trainer_arguments, training_note, warn_of_other_settings
from .clusters import Clusters, check_clustered_data, find_clusters, select_cluster, train_router
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
from .modeling_noprop import NoPropForPreTraining, TokenTable, trunk_states
from .noise_noprop import information_levels, standardize
from .parallel import run_once
from .shards_noprop import EMBEDDINGS_SHARD, PRETRAINING_FOLDER, clusters_hash, trunk_hash, without_progress_bar
from .tracking import track


logger = logging.get_logger(__name__)

TOKENIZER_ROWS = 1_000_000  # maximum rows to train a tokenizer on, since a stream may be endless
TRUNK_ROWS = 16  # training rows that the start on a trunk is fitted to


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
        args = trainer_arguments(training_args, PRETRAINING_FOLDER, **pretraining_args.training_fields())
        warn_of_other_settings("The table", read_metadata(shard), args, training_args.seed)
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
    config, tokenizer, table = prepare_pretraining(model_args, data_args, corpus["train"])
    dataset = tokenize(corpus, tokenizer, data_args)
    data = check_dataset(directory, config, tokenizer, dataset, data_args, training_args, block_args)
    found = prepare_clusters(config, tokenizer, dataset, training_args, block_args)
    start, router = None, None
    origin = {"data": data} | sources(model_args)
    if model_args.embeddings_from is None:
        model, origin["training"] = pretrain_language_model(
            config, tokenizer, dataset, data, pretraining_args, training_args, table
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
    if found is not None:
        router = train_router(config, *found, start, table, tokenizer, dataset, data, pretraining_args, training_args)
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
) -> tuple[NoPropConfig, PreTrainedTokenizerBase, TokenTable]:
    """Create the configuration, the tokenizer and the initial table.

    Args:
        rows: the training split, on which a tokenizer is trained if `tokenizer_name` is not set.

    Returns:
        The configuration, the tokenizer, and the table: with `embeddings_from`, the input embeddings of that model;
        with `trunk_from`, the model as the trunk and its output embeddings; or else zeros.

    Raises:
        ValueError: if the tokenizer lacks a mask token that is needed, the trunk is not a causal model of a known kind,
            or arguments do not fit together.
    """
    source, trunk, name = None, None, model_args.embeddings_from or model_args.trunk_from
    if name is not None:
        if model_args.trunk_from is None:
            source = load_source(AutoModel, name).get_input_embeddings().weight.detach().float()
        else:
            trunk, source = load_trunk(name)
        tokenizer = load_tokenizer(model_args.tokenizer_name or name)
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
    config = build_config(model_args, data_args, tokenizer, source, trunk)
    if source is None and config.pretraining_objective != "clm" and tokenizer.mask_token is None:
        raise ValueError(
            f"The tokenizer {model_args.tokenizer_name!r} has no mask token, which masked language modelling needs. "
            "Use a tokenizer that has one, --pretraining_objective clm, or the table of a model with --embeddings_from."
        )
    table = TokenTable(config)
    if source is not None:
        table.weight.copy_(standardize(source))
    if trunk is not None:
        assert table.trunk is not None
        try:
            table.trunk.load_state_dict(trunk.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"The model {name!r} cannot be a trunk: its configuration alone does not describe its layers."
            ) from error
        check_trunk(table.trunk, name)
    return config, tokenizer, table


def check_dataset(
    directory: Path,
    config: NoPropConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Mapping[str, Dataset | IterableDataset],
    data_args: DataArguments,
    training_args: TrainingArguments,
    block_args: BlockArguments | None,
) -> str:
    """Check that a model can be trained with tokenized splits.

    Args:
        block_args: arguments of phase 2; None if it does not follow.

    Returns:
        The fingerprint of the training split.

    Raises:
        ValueError: as [`check_clustered_data`], [`check_data`] and [`check_block_data`].
    """
    check_clustered_data(config, dataset["train"])
    data = training_fingerprint(dataset["train"], data_args)
    check_data(directory, data)
    if block_args is not None:
        check_block_data(block_args, tokenizer, dataset["train"], training_args)
    return data


def prepare_clusters(
    config: NoPropConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Mapping[str, Dataset],
    training_args: TrainingArguments,
    block_args: BlockArguments | None,
) -> tuple[Clusters, dict[str, np.ndarray]] | None:
    """Find the clusters of a training split, and check that blocks can be trained on them.

    Args:
        block_args: arguments of phase 2; None if it does not follow.

    Returns:
        The result of [`find_clusters`]; None if all blocks are trained on all text.

    Raises:
        ValueError: as [`find_clusters`] and [`select_block_data`].
    """
    if config.block_data != "clusters":
        return None
    clusters, labels = find_clusters(config, dataset, training_args.seed)
    if block_args is not None:
        for block_index in range(config.num_blocks):
            select_block_data(dataset, labels, block_index, block_args, tokenizer, training_args)
    return clusters, labels


def check_block_data(
    block_args: BlockArguments,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | IterableDataset,
    training_args: TrainingArguments,
    source: str = "The training split",
) -> None:
    """Check that the blocks can be trained with a tokenizer and data.

    Args:
        rows: the tokenized training split, or a block's part of it.
        source: the name of these rows in an error.

    Raises:
        ValueError: if a prompt has no token, or there are too few rows for a batch.
    """
    for prompt in block_args.sample_prompts:
        encode_prompt(prompt, tokenizer)
    batch = training_args.train_batch_size * training_args.world_size
    if training_args.dataloader_drop_last and isinstance(rows, Dataset) and len(rows) < batch:
        raise ValueError(
            f"{source} has {len(rows)} rows, too few for one batch of {batch}: give more text, a smaller "
            "--per_device_train_batch_size, or leave --dataloader_drop_last out."
        )


def select_block_data(
    dataset: Mapping[str, Dataset],
    clusters: Mapping[str, np.ndarray],
    block_index: int,
    block_args: BlockArguments,
    tokenizer: PreTrainedTokenizerBase,
    training_args: TrainingArguments,
) -> dict[str, Dataset]:
    """Select the splits of a block's cluster, and check that the block can be trained with them.

    Args:
        clusters: the cluster of each window, by split.

    Raises:
        ValueError: as [`select_cluster`] and [`check_block_data`].
    """
    selected = select_cluster(dataset, clusters, block_index)
    source = f"The cluster of block {block_index}"
    check_block_data(block_args, tokenizer, selected["train"], training_args, source)
    return selected


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
    table: TokenTable | None = None,
) -> tuple[NoPropForPreTraining, str]:
    """Train the language model of phase 1.

    Args:
        data: the fingerprint of the training split.
        table: the initial table, needed with a trunk only.

    Returns:
        The model, and a description of its training (see [`~noprop_hf.checkpoints.training_note`]).
    """
    args, identity = pretraining_run(config, dataset, data, pretraining_args, training_args, table)
    set_seed(training_args.seed)
    trainer = pretraining_trainer(config, tokenizer, dataset, pretraining_args, args, identity, table)
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
    table: TokenTable | None = None,
) -> DurableTrainer:
    """Create the trainer of phase 1, with a model that is randomly initialised or, with a trunk, begins as the trunk.

    Args:
        args, identity: see [`pretraining_run`].
        table: the initial table, needed with a trunk only.
    """
    collator = PretrainingCollator(
        tokenizer,
        mlm=config.pretraining_objective != "clm",
        mlm_probability=pretraining_args.mlm_probability,
        run_seed=args.seed,
    )
    model = NoPropForPreTraining(copy.deepcopy(config))  # `Trainer` switches off its cache
    trunk = None if table is None else table.trunk
    if table is not None and trunk is not None:
        start_as_trunk(model, table, collator(list(islice(dataset["train"], TRUNK_ROWS))))
    return DurableTrainer(
        model,
        identity=identity,
        frozen={} if trunk is None else {"trunk": trunk},
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["validation"],
        data_collator=collator,
    )


@torch.no_grad()
def start_as_trunk(model: NoPropForPreTraining, table: TokenTable, batch: dict[str, torch.Tensor]) -> None:
    """Initialise the model of phase 1 with the distribution of the trunk, as far as the model can express it.

    The layers add nothing to the states of the trunk, which are compared with its output embeddings. Since the rows of
    the table have one norm, and final states are normalised once more, the scale of the logits is fitted to a batch.
    """
    for layer in model.encoder.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.embed_tokens.weight.copy_(table.weight)
    unit = torch.eye(model.config.hidden_size)
    nats = {}
    for scale in (2.0**power for power in range(-2, 9)):
        model.readout.weight.copy_(scale * unit)
        nats[scale] = float(model(**batch, trunk=table.trunk).loss)
    model.readout.weight.copy_(min(nats, key=nats.__getitem__) * unit)


def pretraining_run(
    config: NoPropConfig,
    dataset: dict[str, Dataset | IterableDataset],
    data: str,
    pretraining_args: PretrainingArguments,
    training_args: TrainingArguments,
    table: TokenTable | None = None,
) -> tuple[TrainingArguments, dict[str, Any]]:
    """Derive the training arguments of phase 1, and everything else that its result depends on.

    Args:
        table: the initial table, needed with a trunk only.
    """
    args = trainer_arguments(training_args, PRETRAINING_FOLDER, **pretraining_args.training_fields())
    settings = {**config.to_diff_dict(), "mlm_probability": pretraining_args.mlm_probability}
    if table is not None and table.trunk is not None:
        settings["trunk"] = trunk_hash(table.trunk.state_dict())
    return args, {**settings, **data_identity(data, dataset, args)}


def load_source(auto_class: Any, name_or_path: str) -> PreTrainedModel:
    """Load another model, whose embeddings or states are used.

    Raises:
        ValueError: if it cannot be loaded.
    """
    try:
        return auto_class.from_pretrained(name_or_path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        kind = " as a causal language model" if auto_class is AutoModelForCausalLM else ""
        raise ValueError(
            f"Cannot load the model {name_or_path!r}{kind}. Give a local directory or a name on the Hub (and a "
            "connection to it)."
        ) from error


def load_trunk(name_or_path: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """Load a causal language model.

    Returns:
        The model without its head, and its output embeddings `(vocab_size, hidden_size)`.

    Raises:
        ValueError: if it cannot be loaded, or is quantized.
    """
    model = load_source(AutoModelForCausalLM, name_or_path)
    trunk, head = model.base_model, model.get_output_embeddings()
    is_plain = trunk is not model and head is not None and trunk._supports_sdpa
    if not is_plain or not all(weight.is_floating_point() for weight in model.state_dict().values()):
        raise ValueError(
            f"The model {name_or_path!r} cannot be a trunk: it is quantized, has no plain head, or only an attention "
            "of its own. Give another model."
        )
    return trunk, head.weight.detach().float()


@torch.no_grad()
def check_trunk(trunk: PreTrainedModel, name_or_path: str | None) -> None:
    """Check that a trunk reads from left to right, and reads a text in two parts, with a cache, as in one.

    Raises:
        ValueError: if it does not.
    """
    tokens = torch.arange(16)[None] % trunk.config.vocab_size
    changed = torch.cat([tokens[:, :8], (tokens[:, 8:] + 8) % trunk.config.vocab_size], 1)
    positions, cache = torch.arange(16)[None], DynamicCache()
    try:
        whole = trunk_states(trunk, tokens, position_ids=positions)
        states = [
            trunk_states(trunk, changed, position_ids=positions)[:, :8],
            trunk_states(trunk, tokens[:, :8], position_ids=positions[:, :8], cache=cache),
            trunk_states(trunk, tokens[:, 8:], position_ids=positions[:, 8:], cache=cache),
        ]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"The model {name_or_path!r} cannot be a trunk, which takes positions and a cache of keys and values: "
            f"{error}."
        ) from error
    for expected, found in zip((whole[:, :8], whole[:, :8], whole[:, 8:]), states, strict=True):
        if not torch.allclose(found, expected, rtol=0, atol=1e-4 * float(whole.abs().max())):
            raise ValueError(
                f"The model {name_or_path!r} cannot be a trunk: its states depend on later tokens, or change when a "
                "text is read in two parts with a cache of keys and values. Give a causal language model."
            )


def build_config(
    model_args: ModelArguments,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    source: torch.Tensor | None = None,
    trunk: PreTrainedModel | None = None,
) -> NoPropConfig:
    """Build the configuration for a tokenizer and, if table or trunk come from another model, for that model.

    Args:
        source (`(vocab_size, hidden_size)`, *optional*): the embeddings of the other model.
        trunk: the trunk.

    Raises:
        ValueError: if sizes do not fit together.
    """
    fields = model_args.config_fields()
    num_tokens = vocabulary_size(tokenizer)
    vocab_size = num_tokens if source is None else source.shape[0]
    if model_args.vocab_size not in (None, vocab_size) and (model_args.tokenizer_name or source is not None):
        raise ValueError(
            f"`vocab_size` is {model_args.vocab_size}, but the tokenizer or table has {vocab_size} entries. "
            f"Leave --vocab_size out or, if a recipe sets it, add --vocab_size {vocab_size}."
        )
    if source is not None:
        name = model_args.embeddings_from or model_args.trunk_from
        if num_tokens > vocab_size:
            raise ValueError(
                f"The table of {name!r} is too small for the tokenizer: {vocab_size} rows for "
                f"{num_tokens} tokens. Use the model's own tokenizer."
            )
        if fields.setdefault("hidden_size", source.shape[1]) != source.shape[1]:
            raise ValueError(
                f"The table of {name!r} has {source.shape[1]} dimensions, but `hidden_size` is "
                f"{fields['hidden_size']}. Leave --hidden_size out, or set it to {source.shape[1]}."
            )
    if trunk is not None:
        ignored = "transformers_version _name_or_path architectures dtype torch_dtype auto_map return_dict".split()
        ignored += ["id2label", "label2id"]
        described = trunk.config.to_dict().items()
        fields["trunk_config"] = {name: value for name, value in described if name not in ignored}
        fields.setdefault("block_initialization", "pretraining")  # as the trunk
        shape = ("num_attention_heads", "num_key_value_heads", "head_dim")
        if "num_attention_heads" not in fields:  # heads as in the trunk, for caches that have one shape
            own = {name: getattr(trunk.config, name, None) for name in shape}
            fields |= {name: value for name, value in own.items() if isinstance(value, int)}
        longest = getattr(trunk.config, "max_position_embeddings", None) or data_args.max_length
        if data_args.max_length > longest:
            raise ValueError(
                f"The trunk {model_args.trunk_from!r} reads at most {longest} tokens: set --max_length to {longest} or "
                "less."
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
    names = {name: getattr(model_args, name) for name in ("tokenizer_name", "embeddings_from", "trunk_from")}
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
    trained_tokenizer = model_args.trains_tokenizer
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
