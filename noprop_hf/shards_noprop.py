"""The weight files of a model: one for the embeddings, one per block, under the standard index of transformers."""

import json
import re
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME


AUTO_MAP = {  # what `trust_remote_code` loads from a directory with these files
    "AutoConfig": "configuration_noprop.NoPropConfig",
    "AutoModel": "modeling_noprop.NoPropModel",
    "AutoModelForCausalLM": "modeling_noprop.NoPropForCausalLM",
    "AutoModelForMaskedLM": "modeling_noprop.NoPropForMaskedLM",
}
EMBEDDINGS_SHARD = "embeddings.safetensors"
MASKED_LM_FOLDER = "masked_lm"  # in a model directory: the model of phase 1, which its table comes from


def block_shard(block_index: int) -> str:
    """File name of a block's weights."""
    return f"block-{block_index:02d}.safetensors"


def shard_of(weight_name: str) -> str:
    """The file that a weight of [`NoPropForCausalLM`] or [`NoPropModel`] belongs to."""
    block = re.match(r"(?:model\.)?blocks\.(\d+)\.", weight_name)
    return block_shard(int(block[1])) if block else EMBEDDINGS_SHARD


def shard_index(state_dict: dict[str, torch.Tensor]) -> dict:
    """The content of the index file for the weights of a model; tensors on the meta device will do."""
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state_dict.values())},
        "weight_map": {name: shard_of(name) for name in state_dict},
    }


def is_damaged(shard: Path) -> bool:
    """Whether a safetensors file is not as long as its own header says, or has none."""
    try:
        with open(shard, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return shard.stat().st_size != 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    except (ValueError, KeyError, AttributeError, MemoryError):
        return True


def missing_shards(directory: str | Path, subfolder: str = "") -> list[str]:
    """The weight files that a local model directory's index names and that are not there."""
    folder = Path(str(directory), subfolder)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(shard for shard in shards if not (folder / shard).is_file())
