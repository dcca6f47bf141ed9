"""Processes of one launch, and the blocks that they train.

`accelerate launch` (torchrun underneath) starts the processes. By default they share the model directory only: each
takes the next block that no other process trains. If several processes train a block together (`--parallelism data`,
or more processes than blocks), they form a process group, and the `Trainer` runs ordinary data-parallel training.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from torch import distributed
from transformers import TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Variables in which torchrun and accelerate describe the process group.
GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def group_processes(parallelism: str, processes: int, num_blocks: int) -> tuple[int, int]:
    """Divide processes among blocks.

    Args:
        parallelism: `"blocks"` (each process trains blocks of its own), `"data"` (all processes train one block
            together), or `"auto"`: `"blocks"` when there are enough of them; else as many groups as blocks, of equal
            size.
        processes: number of processes that were launched together.
        num_blocks: number of blocks to train.

    Returns:
        The number of blocks trained at a time, and the number of processes for each.

    Raises:
        ValueError: if there are fewer blocks than processes, and `parallelism` is `"blocks"`.
    """
    if parallelism == "data":
        return 1, processes
    if parallelism == "blocks" and processes > num_blocks:
        raise ValueError(
            f"{processes} processes were launched for {num_blocks} blocks. Launch at most as many, or leave "
            "--parallelism out, so that several processes train a block together."
        )
    groups = min(processes, num_blocks)
    return groups, processes // groups


def arrange_processes(parallelism: str, num_blocks: int) -> None:
    """Assign this process to its group, through its environment.

    This must precede `TrainingArguments`, which initialise `torch.distributed` from the environment. A process that
    trains a block alone leaves the launch group. Arguments and errors are those of [`group_processes`].
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise accelerate chooses a backend of another device
    groups, size = group_processes(parallelism, world_size, num_blocks)
    if world_size == 1 or parallelism == "data":  # the launch group is the right one
        return
    if groups == world_size:
        _detach()
    else:
        _join_a_group(groups, size)


def _detach() -> None:
    """Detach this process from its launch group and pin it to one device."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = devices.split(",") if devices else [str(device) for device in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank % len(names)]
    for name in GROUP_VARIABLES:
        os.environ.pop(name, None)


def _join_a_group(num_groups: int, size: int) -> None:
    """Join one of `num_groups` process groups of `size` processes, or exit if this process is in excess."""
    rank = int(os.environ["RANK"])
    group, rank_in_group = divmod(rank, size)
    if group >= num_groups:
        logger.warning(f"Process {rank} exits: {num_groups} blocks are trained by {size} processes each.")
        raise SystemExit(0)
    # torchrun keeps the store in which processes meet; under other launchers, process 0 does.
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0 and not has_store,
        wait_for_workers=False,
        timeout=timedelta(minutes=10),
    )
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=distributed.PrefixStore(f"group-{group}", store),
        rank=rank_in_group,
        world_size=size,
    )
    os.environ |= {"RANK": str(rank_in_group), "WORLD_SIZE": str(size)}


def broadcast_from_first(args: TrainingArguments, value: Any) -> Any:
    """Return the value of the first process of the group, in each of its processes."""
    return broadcast_object_list([value])[0] if args.world_size > 1 else value


@contextmanager
def hold_lock(
    path: Path, args: TrainingArguments, is_done: Callable[[], bool] = lambda: False, warn: bool = True
) -> Iterator[bool]:
    """Hold the lock of a piece of work for this process or its group, while the context lasts.

    Args:
        path: the lock file.
        is_done: whether another process has done the work.
        warn: whether to log which other process holds the lock.

    Yields:
        Whether the lock is held and the work is to be done.
    """
    with ExitStack() as stack:
        is_first = args.process_index == 0
        holder = stack.enter_context(lock(path)) if is_first else None
        if holder is not None and warn:
            logger.warning(f"{path.stem} is skipped: {holder} works on it.")
        yield broadcast_from_first(args, is_first and holder is None and not is_done())


def run_once(path: Path, args: TrainingArguments, is_done: Callable[[], bool], work: Callable[[], None]) -> None:
    """Run work in one process or group, while the others wait for its end.

    Args:
        path: the lock file.
        is_done: whether the work is done.
        work: the work.
    """
    warn = True
    while not broadcast_from_first(args, is_done()):
        with hold_lock(path, args, is_done, warn) as is_ours:
            if is_ours:
                work()
        if not is_ours:
            time.sleep(1)
            warn = False


@contextmanager
def lock(path: Path) -> Iterator[str | None]:
    """Try to hold the lock of a file, which the operating system releases when the process ends.

    Yields:
        None if the lock is held, else the process that holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file_lock = FileLock(path)
    try:
        file_lock.acquire(blocking=False)
    except Timeout:
        yield _holder(path)
        return
    try:
        _holder_file(path).write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield None
    finally:
        file_lock.release()


def holder_of(path: Path) -> str | None:
    """Return the process that holds the lock of a file, or None."""
    if not path.is_file():
        return None
    try:
        with FileLock(path, blocking=False):
            return None
    except Timeout:
        return _holder(path)
    except PermissionError:  # a file of another user, in a directory without write permission
        return None


def _holder(path: Path) -> str:
    file = _holder_file(path)
    return (file.read_text(encoding="utf-8") if file.is_file() else "") or "another process"


def _holder_file(path: Path) -> Path:
    return path.with_suffix(".holder")  # since some versions of filelock truncate the lock file itself
