"""The model directory: one safetensors file for the table, one per block, under the standard index.

Phase 1 writes everything but the blocks. Whoever trains block 3 then reads the table, writes the file of block 3 and
touches nothing else, and once all files are there the directory is a model like any other: no merge step.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from .arguments import CORPUS_FILE
from .checkpoints import raise_if_disk_is_full
from .configuration_noprop import NoPropConfig
from .evaluation import MODEL_ROW, RESULTS_FILE
from .modeling_noprop import DenoisingBlock, NoPropForCausalLM, TokenTable
from .shards_noprop import (
    AUTO_MAP,
    CONTENT_HASH,
    EMBEDDINGS_SHARD,
    MASKED_LM_FOLDER,
    block_shard,
    content_hash,
    damaged_shards,
    is_damaged,
    missing_shards,
    shard_index,
)


TABLE_PREFIX = "model.embed_tokens."
CARD_NAME = "README.md"
PLOT_NAME = "bound.png"


def block_prefix(block_index: int) -> str:
    """Where a block's weights stand in the state dict of [`NoPropForCausalLM`]."""
    return f"model.blocks.{block_index}."


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)`, then give the file its name: it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # of any new file here; safetensors would keep others from reading it
        write(temporary)
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:
        raise_if_disk_is_full(path.parent, error)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata to a safetensors file, atomically, with a hash of the content."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    contents = ((name, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, tensor in tensors.items())
    metadata = {"format": "pt", CONTENT_HASH: content_hash(contents), **metadata}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_tensors(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, their names without `prefix`."""
    with safe_open(path, framework="pt") as file:
        return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def fingerprint(config: NoPropConfig, table: torch.Tensor) -> str:
    """A hash of what a block depends on besides data and seed: architecture, objective and frozen table."""
    # All that the configuration declares, but token ids and switches that no weight depends on.
    ignored = {"pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "max_position_embeddings"}
    fields = {name: getattr(config, name) for name in NoPropConfig.__annotations__ if name not in ignored}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    digest.update(table.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def create_model_directory(
    directory: Path,
    config: NoPropConfig,
    tokenizer: PreTrainedTokenizerBase,
    table: TokenTable,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write all of a model but its blocks: code, configurations, tokenizer, index and, last, the embedding shard.

    The embedding shard under its final name therefore says that the directory is complete. `metadata` is kept in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = NoPropForCausalLM(config)
    custom_object_save(model, directory)  # the code
    config.auto_map = dict(AUTO_MAP)
    config.architectures = [NoPropForCausalLM.__name__]
    config.dtype = "float32"
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)

    _write_text(directory / SAFE_WEIGHTS_INDEX_NAME, json.dumps(shard_index(model.state_dict()), indent=2) + "\n")
    tensors = {TABLE_PREFIX + name: tensor for name, tensor in table.state_dict().items()}
    mark = {"fingerprint": fingerprint(config, table.weight)}
    save_shard(directory / EMBEDDINGS_SHARD, tensors, {**mark, **(metadata or {})})


def check_whole(shard: Path) -> None:
    """Make sure that a weight file is what was written.

    Raises:
        ValueError: it is not.
    """
    if is_damaged(shard):
        raise ValueError(
            f"{shard} is damaged. Remove it and run the same command again: what it holds is made anew, from the last "
            "checkpoint on."
        )


def load_table(directory: Path, config: NoPropConfig) -> TokenTable:
    """Read the frozen table of a model directory.

    Raises:
        FileNotFoundError: phase 1 has not been run.
        ValueError: the table is damaged, or not of the size that the configuration says.
    """
    path = directory / EMBEDDINGS_SHARD
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {EMBEDDINGS_SHARD}. Pretrain the embeddings first: scripts/pretrain_embeddings.py."
        )
    check_whole(path)
    table, tensors = TokenTable(config), read_tensors(path, TABLE_PREFIX)
    if tensors["weight"].shape != table.weight.shape:
        raise ValueError(
            f"The table in {path} is of size {tuple(tensors['weight'].shape)}, but the configuration asks for "
            f"{tuple(table.weight.shape)} (vocab_size, hidden_size). Use another output directory, or the settings "
            "the table was made with."
        )
    table.load_state_dict(tensors)
    return table


def save_block(directory: Path, block: DenoisingBlock, table: TokenTable, metadata: Mapping[str, str]) -> None:
    """Write the shard of one trained block."""
    prefix = block_prefix(block.block_index)
    tensors = {prefix + name: tensor for name, tensor in block.state_dict().items()}
    mark = block_mark(directory, block.config, table, block.block_index)
    save_shard(directory / block_shard(block.block_index), tensors, {**mark, **metadata})


def load_block(directory: Path, config: NoPropConfig, block_index: int) -> DenoisingBlock:
    """Read one trained block of a model directory."""
    block = DenoisingBlock(config, block_index)
    block.load_state_dict(read_tensors(trained_shard(directory, block_index), block_prefix(block_index)))
    return block


def trained_shard(directory: Path, block_index: int) -> Path:
    """The shard of a block that another block reads.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged.
    """
    path = directory / block_shard(block_index)
    if not path.is_file():
        raise FileNotFoundError(
            f"Block {block_index + 1} reads block {block_index}, which is not in {directory}: with "
            "`context_source='previous_block'`, train the blocks in order."
        )
    check_whole(path)
    return path


def block_mark(directory: Path, config: NoPropConfig, table: TokenTable, block_index: int) -> dict[str, str]:
    """What a block is trained on, as metadata of its shard: the fingerprint, and the block that it reads if it does.

    Raises:
        FileNotFoundError: it reads the block before it, which is not there.
    """
    mark = {"fingerprint": fingerprint(config, table.weight)}
    if config.context_source == "previous_block" and block_index > 0:
        mark["previous_block"] = read_metadata(trained_shard(directory, block_index - 1))[CONTENT_HASH]
    return mark


def block_is_trained(directory: Path, config: NoPropConfig, table: TokenTable, block_index: int) -> bool:
    """Whether a block's shard is there.

    Raises:
        ValueError: it is, but damaged, or trained with another table or configuration, or on another block before it.
    """
    path = directory / block_shard(block_index)
    if not path.is_file():
        return False
    check_whole(path)
    check_mark(str(path), read_metadata(path), block_mark(directory, config, table, block_index))
    return True


def check_mark(shard: str, metadata: Mapping[str, str], mark: Mapping[str, str]) -> None:
    """Make sure that a shard was trained on what it should have been.

    Args:
        shard: what to call it in a message.
        metadata: its metadata.
        mark: what [`block_mark`] says of the block.

    Raises:
        ValueError: it was not.
    """
    if any(metadata.get(name) != value for name, value in mark.items()):
        raise ValueError(
            f"{shard} was trained with another table or configuration than the model now has, or on another block "
            "before it. Remove it to train that block again, or use another output directory."
        )


def check_data(directory: Path, data: str) -> None:
    """Make sure that the training data are those of the table and of the blocks that are there.

    Args:
        data: the fingerprint of the training data (see [`~noprop_hf.data.data_fingerprint`]).

    Raises:
        ValueError: they are not.
    """
    for path in (directory / EMBEDDINGS_SHARD, *sorted(directory.glob("block-*.safetensors"))):
        if read_metadata(path).get("data", data) != data:
            raise ValueError(
                f"{path.name} in {directory} was trained on other data, or on the same data cut in another way. Give "
                f"the data arguments that {CORPUS_FILE} beside it holds, or use another output directory."
            )


# --- sharing ----------------------------------------------------------------------------------------------------------

SHARED_FILES = ("*.safetensors", "*.json", "*.py", "*.jinja", "*.txt", "*.model", CORPUS_FILE, CARD_NAME, PLOT_NAME)


def files_to_push(directory: Path) -> dict[str, Path]:
    """The files of a model directory that make up the model, by their path in the repository; no checkpoints.

    Raises:
        FileNotFoundError: the directory holds no model, or one whose blocks are not all there and whole.
    """
    if not (directory / EMBEDDINGS_SHARD).is_file():
        raise FileNotFoundError(f"{directory} holds no model: there is no {EMBEDDINGS_SHARD}.")
    missing = missing_shards(directory)
    if missing:
        raise FileNotFoundError(f"{directory} is not fully trained: {', '.join(missing)} missing.")
    damaged = damaged_shards(directory)
    if damaged:
        raise FileNotFoundError(
            f"Weights in {directory} are corrupted: {', '.join(damaged)}. Train these blocks again."
        )
    return _shared_files(directory)


def files_of_phase_1(directory: Path) -> dict[str, Path]:
    """The same without blocks, for a model whose blocks are trained elsewhere."""
    return {name: path for name, path in _shared_files(directory).items() if not name.startswith("block-")}


def _shared_files(directory: Path) -> dict[str, Path]:
    files = {}
    for folder in (directory, directory / MASKED_LM_FOLDER):
        for pattern in SHARED_FILES:
            for path in sorted(folder.glob(pattern)):
                files[path.relative_to(directory).as_posix()] = path
    return files


def push_model(
    directory: Path,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    update: bool = False,
    commit_message: str = "Upload NoProp model",
) -> str:
    """Create a repository of the Hub and upload a model directory, all in one commit.

    When it fails on the way, nothing is visible on `main`, and a second call sends only what has not arrived.

    Args:
        repo_id: `user/name`.
        private: whether to create the repository as private.
        token: access token; that of `hf auth login` when not given.
        update: whether to commit to a repository that holds a model already.

    Returns:
        The address of the commit.

    Raises:
        FileExistsError: the repository holds a model, and `update` is not given.
        PermissionError: there is no token, or it does not allow to write there.
    """
    files = files_to_push(directory)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        head = api.repo_info(repo_id)
        if not update and any(sibling.rfilename == CONFIG_NAME for sibling in head.siblings or []):
            raise FileExistsError(
                f"{repo_id} holds a model already. Use --update to commit this one over it, or choose another name."
            )
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        # Of the commit we have seen, so that a push that happened meanwhile is told and not overwritten.
        commit = api.create_commit(repo_id, operations, commit_message=commit_message, parent_commit=head.sha)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"The Hub does not let you write to {repo_id}. Log in with `hf auth login`, or pass a token that may "
                "write there with --token."
            ) from error
        raise
    return commit.commit_url


def model_card(
    directory: Path,
    repo_id: str,
    template: Path,
    license: str | None = None,
    language: str | None = None,
) -> ModelCard:
    """The card of a model directory, from a template and from what training and evaluation left there.

    Args:
        repo_id: where the model will be found.
        template: `model_card.md` of the project.
        license: licence of the model, by its identifier on the Hub.
        language: language of the text, by its ISO 639-1 code.
    """
    config = NoPropConfig.from_pretrained(directory)
    corpus = yaml.safe_load((directory / CORPUS_FILE).read_text(encoding="utf-8"))
    results = json.loads((directory / RESULTS_FILE).read_text(encoding="utf-8"))
    shards = [read_metadata(directory / block_shard(block)) for block in range(config.num_blocks)]
    dataset = corpus.get("dataset_name") or "local files"
    base_model = read_metadata(directory / EMBEDDINGS_SHARD).get("embeddings_from")
    nats = results["nats_per_token"]
    splits = list(nats[MODEL_ROW])
    evaluations = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for split in splits
        for metric, name, value in (
            ("nats_per_token", "Nats per token", nats[MODEL_ROW][split]),
            ("perplexity", "Perplexity", math.exp(nats[MODEL_ROW][split])),
        )
    ]
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        language=language,
        datasets=[dataset] if "/" in dataset and not Path(dataset).exists() else None,
        base_model=base_model if base_model and not Path(base_model).exists() else None,
        tags=["noprop", "denoising", "block-wise-training"],
        model_name=name,
        eval_results=evaluations,
    )
    return ModelCard.from_template(
        data,
        template_path=str(template),
        model_name=name,
        model_id=repo_id,
        config=config,
        dataset=dataset,
        base_model=base_model,
        table=results["table"],
        block_nats=results["details"][splits[-1]]["block_nats"],
        samples=results["samples"],
        shards=shards,
        has_plot=(directory / PLOT_NAME).is_file(),
    )


def write_card(directory: Path, repo_id: str, template: Path, license: str | None, language: str | None) -> None:
    """Write the card of an evaluated model directory, with its picture where matplotlib is installed."""
    if find_spec("matplotlib") is not None:
        plot_bound(directory)
    model_card(directory, repo_id, template, license, language).save(directory / CARD_NAME)


def plot_bound(directory: Path) -> None:
    """Draw the bound by block as a picture beside the model's card."""
    from matplotlib.figure import Figure  # of the extra `plot`, and used here alone

    results = json.loads((directory / RESULTS_FILE).read_text(encoding="utf-8"))
    split = list(results["details"])[-1]
    details = results["details"][split]
    totals = np.cumsum(details["block_nats"])
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    blocks = range(len(totals))
    axes.errorbar(
        blocks, totals, yerr=details["block_errors"], marker="o", capsize=4, label="bound of the chain so far"
    )
    axes.plot(blocks, details["context"], marker="s", linestyle=":", label="each block alone, on pure noise")
    axes.axhline(details["predictive"], color="gray", linewidth=1, label="predictive distribution of all blocks")
    axes.set(xlabel="block", ylabel="nats per token", xticks=list(blocks), title=f"Bound by block ({split})")
    axes.legend()
    figure.savefig(directory / PLOT_NAME, dpi=120)
