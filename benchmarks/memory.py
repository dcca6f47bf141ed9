#!/usr/bin/env python
"""Measure the memory of training one block, relative to end-to-end training of a stock model as deep as all blocks.

python benchmarks/memory.py           # the T4 recipe's shape, 2 to 12 blocks: some minutes on a CPU
python benchmarks/memory.py --small   # the same for a small shape, 2 blocks

On a GPU, the benchmark measures the peak of the allocator over two steps of AdamW under float16 autocast. On a CPU, in
float32, it reports two figures: a count (parameters, gradients, optimizer state, and tensors that autograd saves for
the backward pass, each storage once), and the growth of resident memory of a fresh process. Batch, sequence and
precision are the same for both models, and each has its own loss. "Assembled" is the peak memory of a process that
loads and runs a whole model, relative to the bytes of its weights.
"""

import threading
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from transformers import HfArgumentParser

from common import KINDS, Peak, Training, commit, device_name, process_bytes, random_text, write_results
from noprop_hf import NoPropConfig, NoPropForCausalLM
from noprop_hf.planning import saved_bytes


SLACK = 1.25  # the target is SLACK / N plus the table's share


@dataclass
class MemoryArguments:
    num_blocks: list[int] = field(default_factory=lambda: [2, 4, 8, 12], metadata={"help": "Blocks."})
    batch_size: int = field(default=16, metadata={"help": "Windows in a batch."})
    max_length: int = field(default=128, metadata={"help": "Tokens in a window."})
    vocab_size: int = field(default=30522, metadata={"help": "Entries of the vocabulary."})
    hidden_size: int = field(default=384, metadata={"help": "Width."})
    num_layers_per_block: int = field(default=3, metadata={"help": "Layers of a block."})
    intermediate_size: int = field(default=1344, metadata={"help": "Width of the feed-forward layers."})
    results: str = field(
        default="benchmarks/results/memory.json", metadata={"help": "Results; a .png goes beside them."}
    )
    small: bool = field(default=False, metadata={"help": "Two blocks of a small shape."})

    def __post_init__(self):
        if self.small:
            self.num_blocks, self.batch_size, self.max_length = [2], 4, 32
            self.vocab_size, self.hidden_size, self.intermediate_size = 2048, 128, 352

    def config(self, num_blocks: int) -> NoPropConfig:
        names = ("vocab_size", "hidden_size", "num_layers_per_block", "intermediate_size")
        return NoPropConfig(num_blocks=num_blocks, **{name: getattr(self, name) for name in names})


def prepare(kind: str, args: MemoryArguments, num_blocks: int, device: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = KINDS[kind](args.config(num_blocks)).to(device).train()
    return model, random_text(args.vocab_size, args.batch_size, args.max_length).to(device)


def train(model: nn.Module, tokens: torch.Tensor, steps: int = 2) -> torch.optim.Optimizer:
    """Train for some steps on one batch, on a GPU in float16, and return the optimizer."""
    training = Training(model, torch.float16 if tokens.device.type == "cuda" else torch.float32)
    for _ in range(steps):
        training.step(tokens)
    return training.optimizer


def counted(kind: str, args: MemoryArguments, num_blocks: int) -> dict[str, int]:
    """Count the bytes on a CPU, by purpose."""
    model, tokens = prepare(kind, args, num_blocks, "cpu")
    activations = saved_bytes(lambda: model(tokens), [model])
    optimizer = train(model, tokens, 1)
    states = [value for state in optimizer.state.values() for value in state.values()]
    parameters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": sum(tensor.nbytes for tensor in states),
        "table": sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad),
        "activations": activations,
    }


def resident(kind: str, args: MemoryArguments, num_blocks: int) -> int:
    """Measure the growth of resident memory in training. Needs a fresh process, on Linux."""
    peak = Peak("cpu")
    train(*prepare(kind, args, num_blocks, "cpu"))
    return peak.bytes()


def assembled(directory: str) -> float:
    """Measure the peak memory of loading and running a whole model, relative to the bytes of its weights.

    Needs a fresh process, on Linux. Memory mapped from files is not counted, as the system can release it.
    """
    before = process_bytes("RssAnon")
    peaks, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(process_bytes("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = NoPropForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.long))
    done.set()
    watcher.join()
    return (max(peaks) - before) / sum(tensor.nbytes for tensor in model.state_dict().values())


def allocated(kind: str, args: MemoryArguments, num_blocks: int) -> int:
    """Measure the peak of the allocator of a GPU in training."""
    torch.cuda.empty_cache()
    peak = Peak("cuda")
    train(*prepare(kind, args, num_blocks, "cuda"))
    return peak.bytes()


def measure(args: MemoryArguments, num_blocks: int) -> dict[str, Any]:
    config, device = args.config(num_blocks), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = 4 * config.vocab_size * config.hidden_size
    row: dict[str, Any] = {"commit": commit(), "device": device_name(device), "num_blocks": num_blocks}
    if device.type == "cuda":
        row["bytes"] = {kind: allocated(kind, args, num_blocks) for kind in KINDS}
    else:
        row["counted"] = {kind: counted(kind, args, num_blocks) for kind in KINDS}
        row["bytes"] = {kind: sum(parts.values()) for kind, parts in row["counted"].items()}
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            row["resident"] = {kind: pool.apply(resident, (kind, args, num_blocks)) for kind in KINDS}
        with TemporaryDirectory() as folder, get_context("spawn").Pool(1) as pool:
            NoPropForCausalLM(config).save_pretrained(folder)
            row["ratio_assembled"] = pool.apply(assembled, (folder,))
        row["ratio_resident"] = row["resident"]["block"] / row["resident"]["end_to_end"]
    whole = row["bytes"]["end_to_end"]
    row |= {"ratio": row["bytes"]["block"] / whole, "table_share": table / whole}
    row["bar"] = SLACK / num_blocks + row["table_share"]
    return row


def largest_batches(args: MemoryArguments, budget: float = 0.9 * 16e9) -> str:
    """Estimate the largest batches of a block on a GPU with 16 GB, from its fixed memory and the memory per token."""
    model, _ = prepare("block", args, 4, "cpu")
    few, many = (random_text(args.vocab_size, batch_size, args.max_length) for batch_size in (2, 4))
    with torch.autocast("cpu", torch.bfloat16):  # as large as float16, which a CPU lacks products for
        saved = saved_bytes(lambda: model(many), [model]) - saved_bytes(lambda: model(few), [model])
    per_token = saved / (many.numel() - few.numel())
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    fixed = 16 * parameters + model.table.weight.nbytes + 3 * 2**25  # and chunks of logits, of 32 MB each
    lines = [
        f"A block of {parameters:,} parameters: {fixed / 1e6:,.0f} MB, and {per_token / 1e3:.0f} kB per token in half "
        f"precision. On 16 GB, a tenth kept free:",
        "",
        "| tokens in a window | largest batch | tokens in it |",
        "| ---: | ---: | ---: |",
    ]
    for length in (128, 256, 512, 1024):
        batch = int((budget - fixed) / (per_token * length))
        lines.append(f"| {length} | {batch:,} | {batch * length:,} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    blocks = [row["num_blocks"] for row in rows]
    axes.plot(blocks, [row["ratio"] for row in rows], "o-", label="measured")
    if "ratio_resident" in rows[0]:
        axes.plot(blocks, [row["ratio_resident"] for row in rows], "s:", label="resident memory of a process")
    axes.plot(blocks, [1 / count for count in blocks], color="gray", label="1/N")
    axes.plot(blocks, [row["bar"] for row in rows], "--", color="gray", label="1.25/N and the table's share")
    axes.set(xlabel="blocks", ylabel="memory of a block, over end to end", xticks=blocks, title=rows[0]["device"])
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    (args,) = HfArgumentParser(MemoryArguments, description=__doc__).parse_args_into_dataclasses()
    print("| blocks | a block, MB | end to end, MB | ratio | 1/N | table's share | bar | resident | assembled |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for num_blocks in args.num_blocks:
        row = measure(args, num_blocks)
        rows.append(row)
        block, whole = (row["bytes"][kind] / 1e6 for kind in KINDS)
        host = [f"{row[name]:.3f}" if name in row else "" for name in ("ratio_resident", "ratio_assembled")]
        print(
            f"| {num_blocks} | {block:,.0f} | {whole:,.0f} | {row['ratio']:.3f} | {1 / num_blocks:.3f} | "
            f"{row['table_share']:.3f} | {row['bar']:.3f} | {' | '.join(host)} |",
            flush=True,
        )
    print("\n" + largest_batches(args))
    path = Path(args.results)
    write_results(path, rows)
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
