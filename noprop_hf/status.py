"""What there is of a model: block by block, in a directory or in a repository of the Hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .arguments import read_config
from .checkpoints import CHECKPOINTS_FOLDER, checkpoints_of
from .meeting_place import MeetingPlace
from .model_directory import read_metadata
from .parallel import holder_of
from .shards_noprop import CONTENT_HASH, EMBEDDINGS_SHARD, block_shard, is_damaged


@dataclass
class BlockStatus:
    """
    Attributes:
        state: `"missing"`, `"training"`, `"stopped"` (begun, and nobody is at it), `"done"` or `"damaged"`.
        details: how far, by whom, and with what result.
    """

    state: str
    details: str = ""


def local_status(directory: Path) -> list[BlockStatus]:
    """The blocks of a model directory.

    Raises:
        FileNotFoundError: it is none.
    """
    if not (directory / EMBEDDINGS_SHARD).is_file():
        raise FileNotFoundError(f"{directory} holds no {EMBEDDINGS_SHARD}: phase 1 is not done, or this is no model.")
    return [_local_block(directory, index) for index in range(read_config(directory).num_blocks)]


def _local_block(directory: Path, block_index: int) -> BlockStatus:
    shard = directory / block_shard(block_index)
    if shard.is_file():
        return BlockStatus("damaged") if is_damaged(shard) else BlockStatus("done", _result(read_metadata(shard)))
    checkpoints = directory / CHECKPOINTS_FOLDER
    saved = checkpoints_of(checkpoints / f"block-{block_index:02d}")
    step = f"step {saved[0][0]}" if saved else "step 0"
    holder = holder_of(checkpoints / f"block-{block_index:02d}.lock")
    if holder is not None:
        return BlockStatus("training", f"saved at {step}, by {holder}")
    return BlockStatus("stopped", f"saved at {step}") if saved else BlockStatus("missing")


def remote_status(repo_id: str, token: str | None = None) -> list[BlockStatus]:
    """The blocks of a repository of the Hub.

    Raises:
        ValueError: there is no such repository, or it holds no model.
    """
    num_blocks = read_config(repo_id, token).num_blocks
    place = MeetingPlace(repo_id, None, token, patience=60)
    published, claims = place.blocks(), place.claims()
    blocks = []
    for index in range(num_blocks):
        if block_shard(index) in published:
            metadata = published[block_shard(index)]
            blocks.append(BlockStatus("damaged") if metadata is None else BlockStatus("done", _result(metadata)))
        elif index in claims:
            blocks.append(BlockStatus("stopped" if claims[index].is_stale else "training", str(claims[index])))
        else:
            blocks.append(BlockStatus("missing"))
    return blocks


def _result(metadata: Mapping[str, str]) -> str:
    names = {"context_nats": "nats on pure noise", "bound_nats": "bound"}
    figures = [f"{words} {_rounded(metadata[name])}" for name, words in names.items() if name in metadata]
    return ", ".join([*figures, f"sha256 {metadata.get(CONTENT_HASH, 'unknown')[:12]}"])


def _rounded(figure: str) -> str:
    try:
        return f"{float(figure):.3f}"
    except ValueError:
        return "unknown"
