"""The weight files of a model: one for the embeddings, one per block, under the standard index of transformers."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging


AUTO_MAP = {  # what `trust_remote_code` loads from a directory with these files
    "AutoConfig": "configuration_noprop.NoPropConfig",
    "AutoModel": "modeling_noprop.NoPropModel",
    "AutoModelForCausalLM": "modeling_noprop.NoPropForCausalLM",
    "AutoModelForMaskedLM": "modeling_noprop.NoPropForMaskedLM",
}
CONTENT_HASH = "content_sha256"  # in the metadata of a shard, where training wrote it
EMBEDDINGS_SHARD = "embeddings.safetensors"
MASKED_LM_FOLDER = "masked_lm"  # in a model directory: the model of phase 1, which its table comes from


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """While a single file is written, which transformers shows a bar for."""
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_progress:
            logging.enable_progress_bar()


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


def content_hash(tensors: Iterable[tuple[str, bytes]]) -> str:
    """A hash of names and bytes of tensors, in the order of the names."""
    digest = hashlib.sha256()
    for name, data in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(data)
    return digest.hexdigest()


def is_damaged(shard: Path) -> bool:
    """Whether a safetensors file is not as long as its header says, or its content not that of the hash kept there.

    Read without the safetensors package, since a model needs torch and transformers alone.
    """
    try:
        with open(shard, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            kept_hash = header.pop("__metadata__", {}).get(CONTENT_HASH)
            end = max(entry["data_offsets"][1] for entry in header.values())
            if shard.stat().st_size != 8 + length + end:
                return True
            if kept_hash is None:
                return False
            data = file.read()
        spans = {name: entry["data_offsets"] for name, entry in header.items()}
        return content_hash((name, data[begin:end]) for name, (begin, end) in spans.items()) != kept_hash
    except (ValueError, KeyError, AttributeError, TypeError, MemoryError):
        return True


def damaged_shards(folder: Path) -> list[str]:
    """The weight files in a folder that are damaged."""
    return [path.name for path in sorted(folder.glob("*.safetensors")) if is_damaged(path)]


def missing_shards(directory: str | Path, subfolder: str = "") -> list[str]:
    """The weight files that a local model directory's index names and that are not there."""
    folder = Path(str(directory), subfolder)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return []
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(shard for shard in shards if not (folder / shard).is_file())
