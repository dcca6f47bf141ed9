"""The model directory: one safetensors file for the table, one per block, under the standard index.

Phase 1 writes everything but the blocks. Whoever trains block 3 then reads the table, writes the file of block 3 and
touches nothing else, and once all files are there the directory is a model like any other: no merge step.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .arguments import CORPUS_FILE
from .checkpoints import raise_if_disk_is_full
from .configuration_noprop import NoPropConfig
from .modeling_noprop import DenoisingBlock, NoPropForCausalLM, TokenTable
from .shards_noprop import (
    AUTO_MAP,
    CONTENT_HASH,
    EMBEDDINGS_SHARD,
    block_shard,
    content_hash,
    is_damaged,
    shard_index,
)


TABLE_PREFIX = "model.embed_tokens."


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
    ignored = {"use_cache", "max_position_embeddings"} | {f"{name}_token_id" for name in ("pad", "bos", "eos", "mask")}
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
    _save_tokenizer(directory, tokenizer)

    _write_text(directory / SAFE_WEIGHTS_INDEX_NAME, json.dumps(shard_index(model.state_dict()), indent=2) + "\n")
    tensors = {TABLE_PREFIX + name: tensor for name, tensor in table.state_dict().items()}
    mark = {"fingerprint": fingerprint(config, table.weight)}
    save_shard(directory / EMBEDDINGS_SHARD, tensors, {**mark, **(metadata or {})})


def _save_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer under the name that transformers 4 knows its class by, too."""
    tokenizer.save_pretrained(directory)
    path = directory / TOKENIZER_CONFIG_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if fields.get("extra_special_tokens") == []:  # transformers 4 expects a mapping
        del fields["extra_special_tokens"]
    _write_text(path, json.dumps(fields, indent=2, ensure_ascii=False) + "\n")


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
