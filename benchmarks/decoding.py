#!/usr/bin/env python
"""Compare generation and scoring with a stock transformers model of the same parameters and depth, side by side.

python benchmarks/decoding.py                   # all batch sizes and prompt lengths: some minutes
python benchmarks/decoding.py --small           # one setting of each kind
python benchmarks/decoding.py --model runs/demo # quality against cost of a trained model: early exit and trajectories

Weights are random, since only time is measured. The models run in turns in every setting: once to warm up, then several
times (once if a run takes more than ten seconds), of which the fastest counts. Ratios are those of our model over the
stock model.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from torch.nn import functional as F
from transformers import HfArgumentParser, PreTrainedModel

from common import SHAPES, commit, device_name, measure, models, num_parameters, seconds, write_results
from noprop_hf import NoPropConfig, NoPropForCausalLM
from noprop_hf.data import CausalCollator, DataArguments, load_corpus, load_tokenizer, tokenize
from noprop_hf.layout import CORPUS_FILE


@dataclass
class DecodingArguments:
    shape: str = field(
        default="t4",
        metadata={"help": "Recipe whose sizes are used: demo (2M parameters) or t4 (84M).", "choices": [*SHAPES]},
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Texts at a time."})
    prompt_lengths: list[int] = field(default_factory=lambda: [32, 256, 1024], metadata={"help": "Tokens of a prompt."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens generated after the first."})
    repeats: int = field(default=3, metadata={"help": "Runs of each kind, in turns; the fastest counts."})
    model: str | None = field(default=None, metadata={"help": "A trained model whose quality and cost are compared."})
    results: str = field(
        default="benchmarks/results/decoding.json", metadata={"help": "Results; a .png goes beside them."}
    )
    small: bool = field(default=False, metadata={"help": "The demo's shape, one setting, one run."})

    def __post_init__(self):
        if self.small:
            self.shape, self.batch_sizes, self.prompt_lengths = "demo", [1], [32]
            self.new_tokens, self.repeats = 16, 2


@torch.no_grad()
def generation(found: dict[str, PreTrainedModel], args: DecodingArguments) -> list[dict[str, Any]]:
    device, rows = found["ours"].device, []
    vocab_size = found["ours"].config.vocab_size
    for batch_size in args.batch_sizes:
        for prompt_length in args.prompt_lengths:
            prompts = torch.randint(vocab_size, (batch_size, prompt_length), device=device)
            found_times = measure(found, prompts, args.new_tokens, args.repeats)
            row: dict[str, Any] = {"batch_size": batch_size, "prompt_length": prompt_length}
            for kind, times in found_times.items():
                row[kind] = {
                    "seconds_to_first_token": times["first"],
                    "tokens_per_second": batch_size * args.new_tokens / times["others"],
                    "scored_tokens_per_second": prompts.numel() / times["scoring"],
                    "peak_bytes": times["peak_bytes"],
                }
            ours, alone, stock = (row[kind] for kind in ("ours", "one_by_one", "stock"))
            row |= {
                "ratio_tokens_per_second": ours["tokens_per_second"] / stock["tokens_per_second"],
                "ratio_seconds_to_first_token": ours["seconds_to_first_token"] / stock["seconds_to_first_token"],
                "ratio_scored_tokens_per_second": ours["scored_tokens_per_second"] / stock["scored_tokens_per_second"],
                "ratio_to_one_by_one": ours["tokens_per_second"] / alone["tokens_per_second"],
            }
            rows.append(row)
            print(table_row(row), flush=True)
    return rows


HEADER = [
    "| batch | prompt | first token, ms | stock | tokens/s | stock | ratio | one by one | scored tokens/s, ratio |"
    " peak, MB | stock |",
    "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
]


def table_row(row: dict[str, Any]) -> str:
    ours, stock = row["ours"], row["stock"]
    return (
        f"| {row['batch_size']} | {row['prompt_length']} | {1000 * ours['seconds_to_first_token']:.0f} | "
        f"{1000 * stock['seconds_to_first_token']:.0f} | {ours['tokens_per_second']:.1f} | "
        f"{stock['tokens_per_second']:.1f} | {row['ratio_tokens_per_second']:.2f} | "
        f"{row['ratio_to_one_by_one']:.2f} | {row['ratio_scored_tokens_per_second']:.2f} | "
        f"{ours['peak_bytes'] / 2**20:.0f} | {stock['peak_bytes'] / 2**20:.0f} |"
    )


# --- quality against cost ---------------------------------------------------------------------------------------------


@torch.no_grad()
def quality_and_cost(directory: Path, device: torch.device) -> list[dict[str, Any]]:
    """Measure nats per token on held-out text, and the time per token, with fewer blocks or more trajectories."""
    model = NoPropForCausalLM.from_pretrained(directory).eval().to(device)
    tokenizer = load_tokenizer(str(directory))
    data_args = DataArguments(**yaml.safe_load((directory / CORPUS_FILE).read_text(encoding="utf-8")))
    data = tokenize(load_corpus(data_args), tokenizer, data_args)
    batch = CausalCollator(tokenizer)(list(data["validation"].shuffle(seed=0).select(range(64))))
    input_ids, labels = batch["input_ids"].to(device), batch["labels"].to(device)
    num_blocks = model.config.num_blocks
    ways: dict[str, dict[str, Any]] = {}
    for count in range(1, num_blocks):
        ways[f"first {count} blocks"] = {"num_inference_blocks": count}
    ways["all blocks"] = {}
    for count in (1, 2, 4, 8, 16):
        ways[f"{count} trajectories"] = {"decoding_mode": "denoising", "num_trajectories": count}
    rows = []
    for name, options in ways.items():
        losses = []
        for ids, targets in zip(input_ids.split(8), labels.split(8), strict=True):
            if "num_trajectories" in options:
                options = options | {"generator": torch.Generator().manual_seed(0)}
            logits = model(ids, use_cache=False, **options).logits[:, :-1]
            losses.append(F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten()))
        options.pop("generator", None)
        count = 32
        prompt = input_ids[:1, :16]

        def write(options=options, prompt=prompt, count=count) -> None:
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, eos_token_id=None,
                           pad_token_id=tokenizer.pad_token_id, **options)  # fmt: skip

        write()
        milliseconds = 1000 * min(seconds(write, device) for _ in range(3)) / count
        nats = torch.stack(losses).mean().item()
        rows.append({"way": name, "nats_per_token": nats, "milliseconds_per_token": milliseconds})
        print(f"| {name} | {nats:.3f} | {milliseconds:.2f} |", flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot tokens per second relative to the stock model, in one panel per device and shape."""
    runs = sorted({(row["device"], row["shape"]) for row in rows})
    figure = Figure(figsize=(5.5 * len(runs), 4), layout="constrained")
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        own = [row for row in rows if (row["device"], row["shape"]) == run]
        for batch_size in sorted({row["batch_size"] for row in own}):
            some = [row for row in own if row["batch_size"] == batch_size]
            ratios = [row["ratio_tokens_per_second"] for row in some]
            axes.plot([row["prompt_length"] for row in some], ratios, "o-", label=f"batch {batch_size}")
        axes.axhline(1, color="gray", linewidth=1)
        axes.set(xscale="log", xlabel="tokens of the prompt", ylabel="tokens per second, over the stock model's")
        axes.set_title(", ".join(run))
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, dpi=120)


def plot_quality(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    titles = {"block": "predictive: the first blocks alone", "traject": "chain: averaged trajectories"}
    for axes, (kind, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        some = [row for row in rows if kind in row["way"]]
        xs, ys = ([row[name] for row in some] for name in ("milliseconds_per_token", "nats_per_token"))
        axes.plot(xs, ys, "o-")
        for row, x, y in zip(some, xs, ys, strict=True):
            axes.annotate(row["way"].split()[-2], (x, y), xytext=(4, 4), textcoords="offset points")
        axes.set(xlabel="milliseconds per token, batch 1", ylabel="validation nats per token", title=title)
        axes.margins(0.1)  # for the labels
    figure.savefig(path, dpi=120)


def main() -> None:
    (args,) = HfArgumentParser(DecodingArguments, description=__doc__).parse_args_into_dataclasses()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(args.results)
    if args.model is not None:
        print("| | nats per token | ms per token |\n| --- | ---: | ---: |")
        rows = quality_and_cost(Path(args.model), device)
        path = path.with_stem(path.stem + "_quality")
        write_results(path, {"commit": commit(), "device": device_name(device), "rows": rows})
        plot_quality(rows, path.with_suffix(".png"))
        return
    found = models(NoPropConfig(max_position_embeddings=2048, **SHAPES[args.shape]), device)
    parameters = ", ".join(f"{name} {num_parameters(model):,}" for name, model in found.items())
    print(f"{device_name(device)}, shape of {args.shape}; parameters: {parameters}")
    print("\n".join(HEADER))
    run = {"commit": commit(), "device": device_name(device), "shape": args.shape}
    rows = [run | row for row in generation(found, args)]
    kept = json.loads(path.read_text()) if path.is_file() else []
    rows = [row for row in kept if (row["device"], row["shape"]) != (run["device"], run["shape"])] + rows
    write_results(path, rows)
    plot(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
