#!/usr/bin/env python
"""Compare the time of training all blocks in turn with end-to-end training of a stock model as deep as all blocks.

python benchmarks/training_speed.py                  # the T4 recipe's shape
python benchmarks/training_speed.py --shape demo     # the demo's
python benchmarks/training_speed.py --torch_compile  # the encoders of both compiled
python benchmarks/training_speed.py --small          # a few steps of the demo's shape

Both sides have the same softmax: once the sampled one, over the tokens that a batch predicts, and once the one over the
whole vocabulary. One block is timed, and its time multiplied by the number of blocks. Steps are those of `Trainer`:
AdamW, on a GPU under float16 autocast. Both models run in turns; the median step of each counts. The time of a step is
split into phases: drawing the batch, the encoder (forward and backward), the head with the loss (forward and backward),
the optimizer.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset
from transformers import HfArgumentParser

from common import SHAPES, EndToEnd, OneBlock, SampledEndToEnd, commit, device_name, random_text, write_results
from noprop_hf import NoPropConfig


SOFTMAXES = {"sampled": SampledEndToEnd, "whole": EndToEnd}
PHASES = ("data", "encoder", "head", "optimizer")


@dataclass
class SpeedArguments:
    shape: str = field(default="t4", metadata={"help": "Recipe whose sizes are used.", "choices": [*SHAPES]})
    batch_size: int = field(default=16, metadata={"help": "Windows in a batch."})
    max_length: int = field(default=128, metadata={"help": "Tokens in a window."})
    steps: int = field(default=8, metadata={"help": "Timed steps of each model."})
    torch_compile: bool = field(
        default=False, metadata={"help": "Compile the encoders of both; results get a name of their own."}
    )
    profile: bool = field(default=False, metadata={"help": "Also print a profile of one step of each."})
    results: str = field(
        default="benchmarks/results/training_speed.json", metadata={"help": "Results; a .png goes beside them."}
    )
    small: bool = field(default=False, metadata={"help": "The demo's shape, two steps."})

    def __post_init__(self):
        if self.small:
            self.shape, self.batch_size, self.max_length, self.steps = "demo", 4, 32, 2
        if self.torch_compile:
            path = Path(self.results)
            self.results = str(path.with_stem(path.stem + "_compiled"))


class Stopwatch:
    """Run steps of a model, and measure the seconds of each phase."""

    def __init__(self, model: nn.Module, encoder: nn.Module, args: SpeedArguments, vocab_size: int):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        half = self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.autocast = torch.autocast(self.device.type, torch.float16, enabled=half)
        rows = random_text(vocab_size, args.batch_size * (args.steps + 2), args.max_length)
        self.batches = iter(DataLoader(TensorDataset(rows), args.batch_size, shuffle=True))
        self.marks: list[float] = []
        if args.torch_compile:
            encoder.forward = torch.compile(encoder.forward)
        encoder.register_forward_pre_hook(lambda *_: self.mark())
        encoder.register_forward_hook(self._encoded)

    def mark(self, *_: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def _encoded(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.mark()
        states = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        states.register_hook(self.mark)  # when the gradient reaches the encoder

    def step(self) -> dict[str, float]:
        self.marks = []
        self.mark()
        (tokens,) = next(self.batches)
        tokens = tokens.to(self.device)
        self.mark()
        with self.autocast:
            loss = self.model(tokens)
        self.mark()
        self.scaler.scale(loss).backward()
        self.mark()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.mark()
        begin, drawn, entered, encoded, lost, returned, done, end = self.marks
        return {
            "data": drawn - begin,
            "encoder": encoded - entered + done - returned,
            "head": entered - drawn + returned - encoded,
            "optimizer": end - done,
        }


def measure(args: SpeedArguments, softmax: str) -> dict[str, Any]:
    config = NoPropConfig(**SHAPES[args.shape], sampled_softmax=softmax == "sampled")
    watches = {}
    for kind, make in (("block", OneBlock), ("end_to_end", SOFTMAXES[softmax])):
        torch.manual_seed(0)
        model = make(config)
        encoder = model.block.encoder if kind == "block" else model.model.model
        watches[kind] = Stopwatch(model, encoder, args, config.vocab_size)
    steps: dict[str, list[dict[str, float]]] = {kind: [] for kind in watches}
    for step in range(args.steps + 1):  # the first warms up
        for kind, watch in watches.items():
            phases = watch.step()
            if step > 0:
                steps[kind].append(phases)
    if args.profile:
        for kind, watch in watches.items():
            with profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] * torch.cuda.is_available())]
            ) as p:
                watch.step()
            print(f"{kind}, {softmax}\n{p.key_averages().table(sort_by='self_cpu_time_total', row_limit=12)}")
    tokens, times = args.batch_size * args.max_length, config.num_blocks
    microseconds = {
        kind: {phase: 1e6 * float(np.median([step[phase] for step in found])) / tokens for phase in PHASES}
        for kind, found in steps.items()
    }
    microseconds["block"] = {phase: times * value for phase, value in microseconds["block"].items()}
    totals = {kind: sum(phases.values()) for kind, phases in microseconds.items()}
    return {
        "commit": commit(),
        "device": device_name(watches["block"].device),
        "shape": args.shape,
        "softmax": softmax,
        "num_blocks": times,
        "ratio_time_per_token": totals["block"] / totals["end_to_end"],
        "microseconds_per_token": microseconds,
    }


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(6, 1.5 + 0.8 * len(runs)), layout="constrained")
    axes = figure.add_subplot()
    names: list[str] = []
    for run in reversed(runs):
        whole = sum(run["microseconds_per_token"]["end_to_end"].values())
        for kind, label in (("end_to_end", "end to end"), ("block", "all blocks")):
            left = 0.0
            for color, phase in enumerate(PHASES):
                width = run["microseconds_per_token"][kind][phase] / whole
                axes.barh(len(names), width, left=left, color=f"C{color}", label=phase if not names else None)
                left += width
            names.append(f"{run['shape']}, {run['softmax']} softmax: {label}")
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="gray", linewidth=1)
    axes.set(xlabel="time per token, over end to end", title=runs[0]["device"])
    figure.legend(loc="outside lower center", ncols=len(PHASES))
    figure.savefig(path, dpi=120)


def show(runs: list[dict[str, Any]]) -> None:
    first = runs[0]
    print(f"{first['device']}, shape of {first['shape']}, {first['num_blocks']} blocks; microseconds per token")
    print("| softmax | | " + " | ".join(PHASES) + " | all | ratio |\n| --- | --- |" + " ---: |" * (len(PHASES) + 2))
    for run in runs:
        for kind, name in (("end_to_end", "end to end"), ("block", "all blocks in turn")):
            phases = run["microseconds_per_token"][kind]
            cells = [f"{value:,.1f}" for value in (*(phases[phase] for phase in PHASES), sum(phases.values()))]
            cells.append(f"{run['ratio_time_per_token']:.3f}" if kind == "block" else "")
            print(f"| {run['softmax']} | {name} | {' | '.join(cells)} |")


def main() -> None:
    (args,) = HfArgumentParser(SpeedArguments, description=__doc__).parse_args_into_dataclasses()
    runs = [measure(args, softmax) for softmax in SOFTMAXES]
    show(runs)
    path = Path(args.results)
    kept = json.loads(path.read_text()) if path.is_file() else []
    others = [one for one in kept if (one["device"], one["shape"]) != (runs[0]["device"], args.shape)]
    kept = [*others, *runs]
    write_results(path, kept)
    plot(kept, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
