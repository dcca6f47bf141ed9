"""The model directory: one safetensors file for the table, one per block, under the standard index.

Phase 1 writes everything but the blocks. Whoever trains block 3 then reads the table, writes the file of block 3 and
touches nothing else, and once all files are there the directory is a model like any other: no merge step.
"""

import dataclasses
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
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .configuration_noprop import NoPropConfig
from .modeling_noprop import (
    AUTO_MAP,
    EMBEDDINGS_SHARD,
    DenoisingBlock,
    NoPropForCausalLM,
    TokenTable,
    block_shard,
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
    finally:
        temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_shard(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata to a safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"format": "pt", **metadata}))


def read_metadata(path: Path) -> dict[str, str]:
    """The string metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def fingerprint(config: NoPropConfig, table: torch.Tensor) -> str:
    """A hash of what a block depends on besides data and seed: architecture, objective and frozen table."""
    own_fields = _own_fields(config)
    digest = hashlib.sha256(json.dumps(own_fields, sort_keys=True).encode())
    digest.update(table.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _own_fields(config: NoPropConfig) -> dict:
    """The fields that [`NoPropConfig`] itself declares, without token ids and switches that no weight depends on."""
    ignored = {"pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "max_position_embeddings"}
    names = [name for name in NoPropConfig.__annotations__ if name not in ignored]
    declared = {field.name for field in dataclasses.fields(config)}
    return {name: getattr(config, name) for name in names if name in declared}


def create_model_directory(
    directory: Path, config: NoPropConfig, tokenizer: PreTrainedTokenizerBase, table: TokenTable
) -> None:
    """Write all of a model but its blocks: code, configurations, tokenizer, index and, last, the embedding shard.

    The embedding shard under its final name therefore says that the directory is complete.
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
    save_shard(directory / EMBEDDINGS_SHARD, tensors, {"fingerprint": fingerprint(config, table.weight)})


def load_table(directory: Path, config: NoPropConfig) -> TokenTable:
    """Read the frozen table of a model directory.

    Raises:
        FileNotFoundError: phase 1 has not been run.
        ValueError: the table is not of the size that the configuration says.
    """
    path = directory / EMBEDDINGS_SHARD
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {EMBEDDINGS_SHARD}. Pretrain the embeddings first: scripts/pretrain_embeddings.py."
        )
    table = TokenTable(config)
    with safe_open(path, framework="pt") as file:
        tensors = {name.removeprefix(TABLE_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
    mark = {"fingerprint": fingerprint(block.config, table.weight)}
    save_shard(directory / block_shard(block.block_index), tensors, {**mark, **metadata})


def block_is_trained(directory: Path, config: NoPropConfig, table: TokenTable, block_index: int) -> bool:
    """Whether a block's shard is there.

    Raises:
        ValueError: it is, but was trained with another table or configuration.
    """
    path = directory / block_shard(block_index)
    if not path.is_file():
        return False
    if read_metadata(path).get("fingerprint") != fingerprint(config, table.weight):
        raise ValueError(
            f"{path} was trained with another table or configuration than {directory} now holds. Remove it to train "
            f"block {block_index} again, or use another output directory."
        )
    return True
