"""Several processes, and who trains which block.

`accelerate launch` (torchrun underneath) starts the processes; nothing else does. Blocks know nothing of one another,
and by default neither do the processes: each takes the next block that nobody trains, and all they share is the model
directory. Where a block is trained by several (`--parallelism data`, or more processes than blocks), those form a
process group of their own, and that is ordinary data-parallel training by the `Trainer`.
"""

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainingArguments
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What torchrun and accelerate tell a process of the others.
GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def group_processes(parallelism: str, processes: int, num_blocks: int) -> tuple[int, int]:
    """How many blocks are trained at a time, and by how many processes each.

    Args:
        parallelism: `"blocks"` (each process trains blocks of its own), `"data"` (all processes train one block
            together), or `"auto"`: `"blocks"` when there are enough of them; else as many groups as blocks, of equal
            size.
        processes: how many were launched together.
        num_blocks: how many blocks there are to train.

    Raises:
        ValueError: there are fewer blocks than processes, and `"blocks"` is asked for.
    """
    if parallelism == "data":
        return 1, processes
    if parallelism == "blocks" and processes > num_blocks:
        raise ValueError(
            f"{processes} processes were launched for {num_blocks} blocks. Launch at most as many, or leave "
            "--parallelism out: then several processes train a block together."
        )
    groups = min(processes, num_blocks)
    return groups, processes // groups


def arrange_processes(parallelism: str, num_blocks: int) -> None:
    """Tell this process, through its environment, whom it works with. Before any `TrainingArguments` are made.

    A process that trains a block alone knows of no other; those that train one together are a process group. The
    arguments, and what is raised, are those of [`group_processes`].
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate looks for a backend of some device otherwise
    groups, size = group_processes(parallelism, world_size, num_blocks)
    if world_size == 1 or parallelism == "data":  # as it is
        return
    if groups == world_size:
        _leave_the_others()
    else:
        _join_a_group(groups, size)


def _leave_the_others() -> None:
    """Make of a process of a launch one that knows of no other, on a device of its own."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = devices.split(",") if devices else [str(device) for device in range(torch.cuda.device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local_rank % len(names)]
    for name in GROUP_VARIABLES:
        os.environ.pop(name, None)


def _join_a_group(num_groups: int, size: int) -> None:
    """Join one of `num_groups` process groups of `size` processes; what is left over has nothing to do."""
    rank = int(os.environ["RANK"])
    group, rank_in_group = divmod(rank, size)
    if group >= num_groups:
        logger.warning(f"Process {rank} is left over: {num_groups} blocks are trained by {size} processes each.")
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


def first_says(args: TrainingArguments, value: Any) -> Any:
    """The value that the first process of the group has."""
    if args.world_size == 1:
        return value
    told = [value]
    distributed.broadcast_object_list(told, src=0)
    return told[0]


@contextmanager
def claim(
    path: Path, args: TrainingArguments, is_done: Callable[[], bool] = lambda: False, tell: bool = True
) -> Iterator[bool]:
    """Claim a piece of work for this process or its group: nobody else has it while the context lasts.

    The claim is a lock of the operating system, so it ends with its process, however that ends.

    Args:
        path: the file of the lock.
        is_done: whether the work was done by somebody else before.
        tell: whether to log who else has it.

    Yields:
        Whether there is something to do.
    """
    with ExitStack() as stack:
        is_first = args.process_index == 0
        holder = stack.enter_context(lock(path)) if is_first else None
        if holder is not None and tell:
            logger.warning(f"{path.stem} is being worked on by {holder}: left to it.")
        yield first_says(args, is_first and holder is None and not is_done())


def once(path: Path, args: TrainingArguments, is_done: Callable[[], bool], work: Callable[[], None]) -> None:
    """Do what one process, or one group, must do before all can go on; the others wait for it.

    Args:
        path: the file of the lock.
        is_done: whether it is done.
        work: what to do.
    """
    tell = True
    while not first_says(args, is_done()):
        with claim(path, args, is_done, tell) as mine:
            if mine:
                work()
        if not mine:
            time.sleep(1)
            tell = False


@contextmanager
def lock(path: Path) -> Iterator[str | None]:
    """Hold the lock of a file, if nobody does.

    Yields:
        None where the lock is ours; else who holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            yield file.read() or "another process"
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield None  # closing the file gives the lock back


def holder_of(path: Path) -> str | None:
    """Who holds the lock of a file; None where nobody does."""
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read() or "another process"
    return None
