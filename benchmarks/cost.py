#!/usr/bin/env python
"""Compare what it costs to reach the final loss of end-to-end training: arithmetic, time, memory and traffic.

python benchmarks/quality.py --setting plentiful_64 --corpora plentiful=DIR --models end_to_end noprop noprop_half
python benchmarks/cost.py           # two minutes on two idle cores
python benchmarks/cost.py --small   # a few steps of each kind, too short for a reliable figure

Losses come from the results of `quality.py`. NoProp (two blocks as deep as half of the end-to-end model, on clusters)
has a row there with all of that model's arithmetic and can have one with half of it; the arithmetic with which it
reaches the loss of the end-to-end model is interpolated between them, in its logarithm. The time of a step of each kind
of training is measured here, by one process and by two at once with a thread each, and multiplied by the number of
steps. Two processes train the end-to-end model in step (`DistributedDataParallel`, half a batch each). With NoProp one
of them runs phase 1, then each trains half of the blocks alone. Times do not include start-up, evaluation and the
reading of data.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from transformers import HfArgumentParser

from common import EndToEnd, OneBlock, PhaseOne, Training, commit, device_name, random_text, write_results
from noprop_hf import NoPropConfig
from noprop_hf.clusters import ROUTER_SHARE
from noprop_hf.modeling_noprop import Router, TokenTable
from noprop_hf.planning import Sizes
from quality import SETTINGS, QualityArguments


@dataclass
class CostArguments:
    setting: str = field(default="plentiful_64", metadata={"help": "Setting of quality.py.", "choices": [*SETTINGS]})
    row: str = field(default="plentiful_64", metadata={"help": "Corpus of quality.json, with its width if plentiful."})
    quality: str = field(default="benchmarks/results/quality.json", metadata={"help": "Results of quality.py."})
    steps: int = field(default=100, metadata={"help": "Timed steps of every kind of training."})
    results: str = field(default="benchmarks/results/cost.json", metadata={"help": "File of the results."})
    small: bool = field(default=False, metadata={"help": "3 steps."})

    def __post_init__(self):
        if self.small:
            self.steps = 3


# --- time of a step ---------------------------------------------------------------------------------------------------


class OneRouter(nn.Module):
    """The router, with the frozen table."""

    def __init__(self, config: NoPropConfig):
        super().__init__()
        self.router, self.table = Router(config), TokenTable(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.router(tokens, tokens[:, 0] % self.router.config.num_blocks, self.table).loss


NOPROP, LESS = "noprop", "noprop_half"  # rows of quality.py
TWO_IN_STEP, TWO_BLOCKS = "end_to_end, two in step", "block, two at once"
TRAININGS: dict[str, Callable[[NoPropConfig], nn.Module]] = {
    "end_to_end": EndToEnd,
    "phase1": PhaseOne,
    "router": OneRouter,
    "block": OneBlock,
}


def config_of(sizes: QualityArguments, kind: str) -> NoPropConfig:
    """Return the configuration for a kind of training. The end-to-end model has the sizes of the setting."""
    changes = {} if kind == "end_to_end" else sizes.own_phase1[NOPROP].changes
    return NoPropConfig(vocab_size=sizes.vocab_size, **sizes.sizes() | changes)


def seconds_per_step(args: CostArguments, sizes: QualityArguments, kind: str, in_step: int = 1) -> float:
    """Measure the median time of a step of training.

    Args:
        in_step: number of processes that train the model in step, each on its part of the batch.
    """
    torch.manual_seed(0)
    model = TRAININGS[kind](config_of(sizes, kind)).train()
    training = Training(DistributedDataParallel(model) if in_step > 1 else model, max_grad_norm=1.0)
    batches = random_text(sizes.vocab_size, args.steps + 2, sizes.batch_size // in_step, sizes.max_length)
    marks: list[float] = []
    for tokens in batches:
        training.step(tokens)
        marks.append(time.perf_counter())
    seconds = [after - before for before, after in zip(marks[1:], marks[2:], strict=False)]  # the first step warms up
    return statistics.median(seconds)


def measure_steps(rank: int, args: CostArguments, sizes: QualityArguments, folder: str) -> None:
    """Measure every kind of training alone, then two trainings at once. Runs in two processes."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seconds = {}
    for kind in TRAININGS:
        if rank == 0:
            seconds[kind] = seconds_per_step(args, sizes, kind)
        distributed.barrier()
    seconds[TWO_IN_STEP] = seconds_per_step(args, sizes, "end_to_end", in_step=2)
    distributed.barrier()
    seconds[TWO_BLOCKS] = seconds_per_step(args, sizes, "block")
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(seconds))
    distributed.destroy_process_group()


# --- arithmetic -------------------------------------------------------------------------------------------------------


def arithmetic_to_reach(loss: float, points: list[tuple[float, float]]) -> float | None:
    """Interpolate the arithmetic with which a loss is reached, in the logarithm of the arithmetic.

    Args:
        points: arithmetic and loss, from least to most arithmetic.

    Returns:
        The arithmetic; that of the first point if its loss is as low already, and None if no point reaches the loss.
    """
    if points[0][1] <= loss:
        return points[0][0]
    for (less, higher), (more, lower) in zip(points, points[1:], strict=False):
        if lower <= loss:
            return less * (more / less) ** ((higher - loss) / (higher - lower))
    return None


def compare(args: CostArguments) -> list[dict[str, Any]]:
    """Return a row for each method and number of workers.

    Raises:
        SystemExit: if a row of `quality.py` is missing.
    """
    entries = json.loads(Path(args.quality).read_text()).get(args.row, {})
    missing = [name for name in ("end_to_end", NOPROP) if name not in entries]
    if missing:
        raise SystemExit(f"{args.quality} has no row {', '.join(missing)} of {args.row}: measure it with quality.py.")
    sizes = SETTINGS[args.setting](corpora=["unused=unused"])
    stock, noprop = entries["end_to_end"], entries[NOPROP]
    loss, total = statistics.mean(stock["nats_per_token"]), stock["training_flops"]
    rows_of_noprop = [entries[name] for name in (LESS, NOPROP) if name in entries]
    points = [(row["training_flops"] / total, statistics.mean(row["nats_per_token"])) for row in rows_of_noprop]
    share = arithmetic_to_reach(loss, sorted(points))

    config = config_of(sizes, "block")
    count = config.num_blocks
    with torch.device("meta"):
        router = sum(tensor.nbytes for tensor in Router(config).state_dict().values())
        whole = sum(p.nbytes for p in EndToEnd(config_of(sizes, "end_to_end")).parameters())  # the tied table once
    files = Sizes.of(config)
    shared, block = files.table + router + files.phase1, files.block
    steps = {"end_to_end": sizes.steps(stock["tokens"])}
    steps |= {"phase1": sizes.steps(noprop["pretraining_tokens"]), "block": sizes.steps(noprop["tokens"])}
    steps["router"] = math.ceil(ROUTER_SHARE * steps["phase1"])

    def row(method: str, workers: int, duration: float, sent: int) -> dict[str, Any]:
        mine = share if method == "noprop" else 1.0
        costs = {"arithmetic": mine, "seconds": None if mine is None else mine * duration, "bytes_sent": sent}
        training = (noprop if method == "noprop" else stock)["training_bytes"]
        return {"method": method, "workers": workers, "nats_per_token": loss, **costs, "training_bytes": training}

    with tempfile.TemporaryDirectory() as folder:
        # Nothing has been computed here, so forks are as fresh as other processes, and need not import the packages.
        start_processes(measure_steps, (args, sizes, folder), nprocs=2, start_method="fork")
        seconds = json.loads(Path(folder, "seconds.json").read_text())
    first = sum(seconds[kind] * steps[kind] for kind in ("phase1", "router"))
    gradients = 2 * whole * steps["end_to_end"]  # a ring sends all but an n-th of them twice, for each of n workers
    rows = [
        row("end_to_end", 1, seconds["end_to_end"] * steps["end_to_end"], 0),
        row("end_to_end", 2, seconds[TWO_IN_STEP] * steps["end_to_end"], gradients),
        row("noprop", 1, first + count * seconds["block"] * steps["block"], 0),
        row("noprop", 2, first + count / 2 * seconds[TWO_BLOCKS] * steps["block"], shared + count * block // 2),
    ]
    if count > 2:
        rows.append(row("noprop", count, first + seconds["block"] * steps["block"], (count - 1) * (shared + block)))
    setting = {
        "commit": commit(),
        "device": device_name(torch.device("cpu")),
        "steps": steps,
        "milliseconds_per_step": {kind: 1000 * value for kind, value in seconds.items()},
    }
    return [one | setting for one in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows in Markdown."""
    names = {"end_to_end": "end to end", "noprop": "NoProp"}
    lines = [
        f"To reach {rows[0]['nats_per_token']:.3f} nats per token:",
        "",
        "| | workers | training arithmetic | minutes | memory of a worker, MB | sent, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        reached = row["arithmetic"] is not None
        cells = [f"{row['arithmetic']:.2f}", f"{row['seconds'] / 60:.1f}"] if reached else ["not reached", ""]
        cells += [f"{row['training_bytes'] / 1e6:.0f}", f"{row['bytes_sent'] / 1e6:,.0f}"]
        lines.append(f"| {names[row['method']]} | {row['workers']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    (args,) = HfArgumentParser(CostArguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    rows = compare(args)
    print(table(rows))
    write_results(Path(args.results), rows)


if __name__ == "__main__":
    main()
