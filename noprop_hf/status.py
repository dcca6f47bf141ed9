"""The status of every block of a model, in a directory or in a repository of the Hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import is_offline_mode

from .checkpoints import checkpoints_of
from .configuration_noprop import NoPropConfig
from .layout import block_name, checkpoint_folder, lock_file
from .meeting_place import MeetingPlace, published_fault
from .model_directory import block_fault, load_table, read_config, shapes_in
from .modeling_noprop import TokenTable
from .parallel import holder_of
from .shards_noprop import CONTENT_HASH, EMBEDDINGS_SHARD, block_shard, placement_fault, read_shard


@dataclass
class BlockStatus:
    """Status of one block.

    Attributes:
        state: `"missing"`, `"training"`, `"stopped"` (begun, but no worker trains it), `"done"`, `"damaged"`, or
            `"unusable"` (the file does not belong there, or was not trained).
        details: progress, worker and result.
    """

    state: str
    details: str = ""


def local_status(directory: Path) -> list[BlockStatus]:
    """Return the status of the blocks of a model directory.

    Raises:
        FileNotFoundError: if `directory` is not a model directory.
        ValueError: if table, index or configuration are damaged, or do not fit together.
    """
    if not (directory / EMBEDDINGS_SHARD).is_file():
        raise FileNotFoundError(
            f"{directory} holds no {EMBEDDINGS_SHARD}: phase 1 is not done, or this is not a model directory."
        )
    config = read_config(directory)
    table = load_table(directory, config)
    return [_local_block(directory, config, table, index) for index in range(config.num_blocks)]


def _local_block(directory: Path, config: NoPropConfig, table: TokenTable, block_index: int) -> BlockStatus:
    path = directory / block_shard(block_index)
    if path.is_file():
        shard = read_shard(path)
        if shard is None:
            return BlockStatus("damaged")
        fault = block_fault(directory, config, table, block_index, shard)
        return BlockStatus("done", _result(shard.metadata)) if fault is None else BlockStatus("unusable", fault)
    checkpoints = checkpoints_of(checkpoint_folder(directory, block_name(block_index)))
    step = f"step {checkpoints[0][0]}" if checkpoints else "step 0"
    holder = holder_of(lock_file(directory, block_name(block_index)))
    if holder is not None:
        return BlockStatus("training", f"saved at {step}, by {holder}")
    return BlockStatus("stopped", f"saved at {step}") if checkpoints else BlockStatus("missing")


def remote_status(repo_id: str, token: str | None = None) -> list[BlockStatus]:
    """Return the status of the blocks of a repository of the Hub.

    Raises:
        ConnectionError: if the Hub cannot be reached.
        ValueError: if the repository does not exist or holds no model.
    """
    if is_offline_mode():  # the cache may be outdated
        raise ConnectionError(
            f"There is no model {repo_id!r} on this machine, and the Hub cannot be reached, since HF_HUB_OFFLINE is "
            "set: unset it, or give a model directory."
        )
    config = read_config(repo_id, token)
    place = MeetingPlace(repo_id, None, token, patience=60)
    table, published, claims = place.table(), place.blocks(), place.claims()
    fault = placement_fault(table, shapes_in(EMBEDDINGS_SHARD, config), {})
    if fault is not None:
        raise ValueError(f"{EMBEDDINGS_SHARD} in {repo_id} {fault}.")
    blocks = []
    for index in range(config.num_blocks):
        if block_shard(index) in published:
            shard, fault = published[block_shard(index)], published_fault(index, published, config, table)
            if shard is None:
                blocks.append(BlockStatus("damaged"))
            else:
                blocks.append(BlockStatus("unusable", fault) if fault else BlockStatus("done", _result(shard.metadata)))
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
