"""The model directory: one safetensors file for the table, one per block, under the standard index.

Phase 1 writes everything but the blocks. A worker that trains block 3 then reads the table, writes the file of block 3
and touches no other file. Once all files exist, the directory is a model like any other, without a merge step.
"""

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from .arguments import one_line
from .checkpoints import flush, raise_if_disk_is_full
from .configuration_noprop import NoPropConfig
from .layout import CORPUS_FILE
from .modeling_noprop import DenoisingBlock, NoPropForCausalLM, Router, TokenTable, weight_shapes
from .shards_noprop import (
    AUTO_MAP,
    CHANGED_CONFIG,
    CONTENT_HASH,
    EMBEDDINGS_SHARD,
    TABLE_WEIGHT,
    Shard,
    block_shard,
    clusters_hash,
    content_hash,
    fingerprint,
    index_fault,
    plain_name,
    pretraining_folder,
    read_shard,
    shard_fault,
    shard_index,
    shard_of,
    trunk_hash,
)


TABLE_PREFIX = "model.embed_tokens."
ROUTER_PREFIX = "model.router."


def block_prefix(block_index: int) -> str:
    """Return the prefix of a block's weights in the state dict of [`NoPropForCausalLM`]."""
    return f"model.blocks.{block_index}."


def write_atomically(path: Path, write) -> None:
    """Call `write(temporary_path)`, then rename the file: under its final name it is always complete."""
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # also holds the temporary file of safetensors
    temporary = folder / path.name
    try:
        folder.mkdir(exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # that of any new file, while safetensors lets only the owner read
        write(temporary)
        temporary.chmod(mode)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except Exception as error:
        raise_if_disk_is_full(path.parent, error)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(path: Path) -> None:
    """Remove the temporary files of killed runs. The caller must hold the lock for writing the file."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata to a safetensors file, atomically, with a hash of the content.

    Raises:
        FloatingPointError: if a tensor is not finite. The file is not written.
    """
    tensors = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{path} is not written, since {name} is not finite.")
    contents = ((name, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, tensor in tensors.items())
    remove_unfinished(path)
    metadata = {"format": "pt", CONTENT_HASH: content_hash(contents), **metadata}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """Read the string metadata of a safetensors file.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(damaged(path)) from error


def read_tensors(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file whose names begin with a prefix, under the rest of their names."""
    prefix = plain_name(prefix)
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if plain_name(name).startswith(prefix)]  # noqa: SIM118
        return {plain_name(name).removeprefix(prefix): file.get_tensor(name) for name in names}


def stored_type(directory: Path) -> str | None:
    """Return the type of the weights in a model directory, by its name in safetensors."""
    with safe_open(directory / EMBEDDINGS_SHARD, framework="pt") as file:
        names = [name for name in file.keys() if plain_name(name) == TABLE_WEIGHT]  # noqa: SIM118
        return file.get_slice(names[0]).get_dtype() if names else None


def create_model_directory(
    directory: Path,
    config: NoPropConfig,
    tokenizer: PreTrainedTokenizerBase,
    table: TokenTable,
    metadata: Mapping[str, str] | None = None,
    router: Router | None = None,
) -> None:
    """Write a model without its blocks: code, configurations, tokenizer, index and, last, the shard of the table.

    If the shard of the table exists under its final name, the directory is therefore complete.

    Args:
        metadata: further metadata of the shard of the table.
        router: the router, which is written into the same shard.
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
    _save_tokenizer(directory, tokenizer)

    remove_unfinished(directory / SAFE_WEIGHTS_INDEX_NAME)
    _write_text(directory / SAFE_WEIGHTS_INDEX_NAME, json.dumps(shard_index(model.state_dict()), indent=2) + "\n")
    tensors = {TABLE_PREFIX + name: tensor for name, tensor in table.state_dict().items()}
    if router is not None:
        tensors |= {ROUTER_PREFIX + name: tensor for name, tensor in router.state_dict().items()}
    flush_files(directory)
    save_shard(directory / EMBEDDINGS_SHARD, tensors, {**table_provenance(config, table), **(metadata or {})})


def _save_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer whose configuration transformers 4 can read as well."""
    tokenizer.save_pretrained(directory)
    path = directory / TOKENIZER_CONFIG_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if fields.get("extra_special_tokens") == []:  # transformers 4 expects a mapping
        del fields["extra_special_tokens"]
    _write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


def flush_files(directory: Path) -> None:
    """Flush the files and folders of phase 1, and their names, to disk before the shard of the table is written."""
    folders = [folder for folder in (pretraining_folder(directory), directory) if folder.is_dir()]
    for path in (*(path for folder in folders for path in folder.iterdir() if path.is_file()), *folders):
        flush(path)
    for parent in directory.resolve().parents:  # some may be new
        flush(parent)


def damaged(shard: Path) -> str:
    """Return the message for a damaged weight file."""
    return f"{shard} is damaged. Remove it and run the same command again, which resumes from the last checkpoint."


def check_whole(shard: Path) -> Shard:
    """Read a weight file.

    Raises:
        ValueError: if the file is damaged.
    """
    content = read_shard(shard)
    if content is None:
        raise ValueError(damaged(shard))
    return content


def shapes_in(shard: str, config: NoPropConfig) -> dict[str, torch.Size]:
    """Return the shapes of the weights that belong to a shard, by their names in [`NoPropModel`]."""
    return {name: shape for name, shape in weight_shapes(config).items() if shard_of(name) == shard}


def read_config(name_or_path: str | Path, token: str | None = None) -> NoPropConfig:
    """Read the configuration of a model directory or a repository of the Hub.

    Raises:
        ValueError: if the configuration is missing, damaged, or that of another kind of model.
    """
    try:
        fields, _ = NoPropConfig.get_config_dict(name_or_path, token=token)
        kind = fields["model_type"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(
            f"There is no model {str(name_or_path)!r} with a readable {CONFIG_NAME}. Give a model directory, or a "
            "repository of the Hub (and a connection to it)."
        ) from error
    if kind != NoPropConfig.model_type:
        raise ValueError(
            f"{name_or_path} holds a model of type {kind!r}, not a NoProp model. Give a directory that "
            "`noprop train` made, or a repository of the Hub with such a model."
        )
    fields = {
        name: value for name, value in fields.items() if "attn_implementation" not in name
    }  # a choice of the user
    try:
        return NoPropConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{CONFIG_NAME} of {name_or_path} cannot be used: {one_line(error)}") from error


def missing_table(directory: Path) -> str:
    """Return the message for a model directory without a table."""
    return f"{directory} holds no {EMBEDDINGS_SHARD}. Pretrain the embeddings first: `noprop pretrain`."


def load_table(directory: Path, config: NoPropConfig) -> TokenTable:
    """Read the frozen table of a model directory.

    Raises:
        FileNotFoundError: if phase 1 has not been run.
        ValueError: if the table is damaged, differs in size from `config`, or was made for another configuration than
            that of the directory; or if the index of the directory does not fit its configuration.
    """
    path = directory / EMBEDDINGS_SHARD
    if not path.is_file():
        raise FileNotFoundError(missing_table(directory))
    shard = check_whole(path)
    fault = shard_fault(shard, shapes_in(EMBEDDINGS_SHARD, config), {})
    if fault:
        raise ValueError(f"{path} {fault}. Use another output directory, or the settings the table was made with.")
    assert shard.table is not None
    saved = read_config(directory)  # may differ from `config`
    expected = fingerprint(saved, shard.table)
    if (
        shard.metadata.get("fingerprint", expected) != expected
        or shard.metadata.get("trunk", shard.trunk) != shard.trunk
    ):
        raise ValueError(f"{directory} {CHANGED_CONFIG}.")
    fault = index_fault(directory, weight_shapes(saved))
    if fault:
        raise ValueError(f"{directory} {fault}.")
    table = TokenTable(config)
    table.load_state_dict(read_tensors(path, TABLE_PREFIX))
    return table


def load_router(directory: Path, config: NoPropConfig) -> Router | None:
    """Read the router of a model directory; None if all blocks are trained on the same text."""
    if config.block_data != "clusters":
        return None
    router = Router(copy.deepcopy(config))
    router.load_state_dict(read_tensors(directory / EMBEDDINGS_SHARD, ROUTER_PREFIX))
    return router.eval()


def save_block(directory: Path, block: DenoisingBlock, table: TokenTable, metadata: Mapping[str, str]) -> None:
    """Write the shard of one trained block."""
    prefix = block_prefix(block.block_index)
    tensors = {prefix + name: tensor for name, tensor in block.state_dict().items()}
    provenance = block_provenance(directory, block.config, table)
    index = {"block": str(block.block_index)}
    save_shard(directory / block_shard(block.block_index), tensors, {**index, **provenance, **metadata})


def load_block(directory: Path, config: NoPropConfig, block_index: int) -> DenoisingBlock:
    """Read one trained block of a model directory."""
    block = DenoisingBlock(config, block_index)
    block.load_state_dict(read_tensors(directory / block_shard(block_index), block_prefix(block_index)))
    return block


def table_provenance(config: NoPropConfig, table: TokenTable) -> dict[str, str]:
    """Return the fingerprint of the model and, with a trunk, the hash of its weights."""
    provenance = {"fingerprint": fingerprint(config, table.weight)}
    if table.trunk is not None:
        provenance["trunk"] = trunk_hash(table.trunk.state_dict())
    return provenance


def block_provenance(directory: Path, config: NoPropConfig, table: TokenTable) -> dict[str, str]:
    """Return the provenance of any block: the fingerprint of the model, and hashes of its clusters and its trunk."""
    provenance = table_provenance(config, table)
    if config.block_data == "clusters":
        provenance["clusters"] = clusters_hash(read_tensors(directory / EMBEDDINGS_SHARD, ROUTER_PREFIX))
    return provenance


def block_fault(
    directory: Path, config: NoPropConfig, table: TokenTable, block_index: int, shard: Shard | None
) -> str | None:
    """Find the reason why a shard is not that of a trained block of a model directory.

    Returns:
        Damage, other tensors, weights that are not finite, another provenance or missing training, as the predicate of
        a sentence about the shard; or None.
    """
    provenance = {"block": str(block_index), **block_provenance(directory, config, table)}
    data = read_metadata(directory / EMBEDDINGS_SHARD).get("data")
    if data is not None:
        provenance["data"] = data
    return shard_fault(shard, shapes_in(block_shard(block_index), config), provenance, stored_type(directory))


def block_is_trained(directory: Path, config: NoPropConfig, table: TokenTable, block_index: int) -> bool:
    """Check whether the shard of a block exists.

    Raises:
        ValueError: if the shard exists, but is damaged or does not belong there (see [`block_fault`]).
    """
    path = directory / block_shard(block_index)
    if not shard_exists(path):
        return False
    fault = block_fault(directory, config, table, block_index, check_whole(path))
    if fault is not None:
        raise ValueError(f"{path} {fault}. Remove it to train that block again, or use another output directory.")
    return True


def shard_exists(shard: Path) -> bool:
    """Check whether a weight file exists.

    Raises:
        ValueError: if a directory has the name of the file.
    """
    if shard.is_dir():
        raise ValueError(f"{shard} is a directory, but must be a file: remove the directory.")
    return shard.is_file()


def missing_blocks(directory: Path) -> list[str]:
    """Return the names of the block shards that a model directory lacks."""
    shards = map(block_shard, range(read_config(directory).num_blocks))
    return [shard for shard in shards if not (directory / shard).is_file()]


def check_data(directory: Path, data: str) -> None:
    """Check that the table and all existing blocks were trained on these data.

    Args:
        data: the fingerprint of the training data (see [`~noprop_hf.data.data_fingerprint`]).

    Raises:
        ValueError: if a shard was trained on other data.
    """
    for path in sorted(filter(shard_exists, directory.glob("*.safetensors"))):
        if _data_of(path) not in (None, data):
            raise ValueError(
                f"{path.name} in {directory} was trained on other data, or on the same data with another split or "
                f"length. Use the data arguments in {CORPUS_FILE} beside it, or another output directory."
            )


def _data_of(shard: Path) -> str | None:
    try:
        return read_metadata(shard).get("data")
    except ValueError:
        return None  # damaged, which is reported where the block is used
