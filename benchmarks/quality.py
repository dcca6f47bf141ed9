#!/usr/bin/env python
"""Compare independent blocks with end-to-end training, with the same text, arithmetic, parameters and depth.

python benchmarks/quality.py --data_dir DIR           # two corpora, three seeds and one: under two hours on two cores
python benchmarks/quality.py --data_dir DIR --small   # one corpus, one seed, a tenth of the training: some minutes

DIR holds `shakespeare.txt` (tiny Shakespeare; its last tenth is held out), `wikitext2/test.txt` and
`wikitext2/validation.txt` (WikiText-2; trained on the first, measured on the second). Results in --output_dir are
reused, so an interrupted run resumes.
"""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import DatasetDict
from matplotlib.figure import Figure
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    HfArgumentParser,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from common import measured_once, num_parameters, stock_model
from noprop_hf import DenoisingBlock, NoPropConfig, NoPropForCausalLM, NoPropForPreTraining
from noprop_hf.arguments import BlockArguments, ModelArguments, PretrainingArguments
from noprop_hf.data import CausalCollator, DataArguments, load_corpus, load_tokenizer, tokenize, train_tokenizer
from noprop_hf.evaluation import evaluate_model
from noprop_hf.model_directory import create_model_directory, load_table
from noprop_hf.modeling_noprop import TokenTable
from noprop_hf.pretraining import pretrain_embeddings
from noprop_hf.recipes import RECIPES
from noprop_hf.shards_noprop import PRETRAINING_FOLDER
from noprop_hf.training import train_blocks


MODELS = {
    "end_to_end": "end-to-end, learned table",
    "end_to_end_frozen": "end-to-end, our frozen table",
    "single_block": "one block, a block's share",
    "single_block_long": "one block, the arithmetic of all",
    "noprop": "NoProp, independent blocks",
    "noprop_hierarchical": "NoProp, hierarchical context",
    "seed": "NoProp as first described",
}
CHAINS = ("noprop", "noprop_hierarchical", "seed")  # models with a bound
# What recipes/seed.yaml chooses: a masked table, cosine levels, squared error, denoising alone.
SEED_CHOICES = ("pretraining_objective", "noise_schedule", "loss_type", "sampled_softmax", "denoising_weight")


@dataclass
class QualityArguments:
    """Arguments of the comparison. Defaults are those of the published results."""

    data_dir: str = field(metadata={"help": "Folder of the corpora."})
    output_dir: str = field(default="runs/quality", metadata={"help": "Folder of models and their results."})
    results: str = field(
        default="benchmarks/results/quality.json", metadata={"help": "Results; a .md and a .png go beside them."}
    )
    corpora: list[str] = field(default_factory=lambda: ["shakespeare", "wikitext2"], metadata={"help": "Corpora."})
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": f"Of {', '.join(MODELS)}."})
    num_seeds: int = field(default=3, metadata={"help": "Seeds on Shakespeare; WikiText-2 has one."})
    tokens: float = field(default=3e6, metadata={"help": "Training tokens of the end-to-end model."})
    pretraining_share: float = field(default=0.15, metadata={"help": "Share of the arithmetic that phase 1 gets."})
    vocab_size: int = field(default=2048, metadata={"help": "Entries of the tokenizer."})
    max_length: int = field(default=64, metadata={"help": "Tokens in a window."})
    hidden_size: int = field(default=128, metadata={"help": "Width of table and layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads of a layer."})
    intermediate_size: int = field(default=352, metadata={"help": "Width of the feed-forward layers of a block."})
    num_blocks: int = field(default=4, metadata={"help": "Blocks."})
    num_layers_per_block: int = field(default=2, metadata={"help": "Layers of a block."})
    batch_size: int = field(default=32, metadata={"help": "Windows in a batch, of every model."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate end to end."})
    frozen_scale: float = field(
        default=0.06, metadata={"help": "Root mean square of the frozen table end to end; a learned one ends there."}
    )
    pretraining_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of phase 1."})
    block_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of blocks."})
    num_workers: int = field(default=2, metadata={"help": "Models trained at a time, on one thread each."})
    small: bool = field(default=False, metadata={"help": "Shakespeare, one seed and a tenth of the training."})

    def __post_init__(self):
        if self.small:
            self.corpora, self.num_seeds, self.tokens = ["shakespeare"], 1, self.tokens / 10

    def seeds(self, corpus: str) -> range:
        return range(self.num_seeds if corpus == "shakespeare" else 1)

    def data(self, corpus: str) -> DataArguments:
        folder = Path(self.data_dir)
        names = {
            "shakespeare": {"train_file": "shakespeare.txt"},
            "wikitext2": {"train_file": "wikitext2/test.txt", "validation_file": "wikitext2/validation.txt"},
        }[corpus]
        files: dict[str, Any] = {name: str(folder / file) for name, file in names.items()}
        return DataArguments(max_length=self.max_length, validation_split_percentage=10, **files)

    def sizes(self) -> dict[str, int]:
        names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_blocks", "num_layers_per_block")
        return {name: getattr(self, name) for name in names}

    def training(self, directory: Path, seed: int, tokens: float, learning_rate: float) -> TrainingArguments:
        """Create training arguments, which differ between models in the peak learning rate only."""
        return TrainingArguments(
            output_dir=str(directory),
            seed=seed,
            max_steps=max(1, round(tokens / (self.batch_size * self.max_length))),
            per_device_train_batch_size=self.batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_steps=100,
            save_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            report_to="none",
            disable_tqdm=True,
        )


class Bench:
    """Data, training and measurement of all models, for one corpus and one seed.

    Args:
        changes: fields of the configuration that differ from the defaults.
        name: the subfolder of a bench with a separate phase 1.
    """

    def __init__(
        self, args: QualityArguments, corpus: str, seed: int, changes: dict[str, Any] | None = None, name: str = ""
    ):
        self.args, self.corpus, self.seed, self.changes = args, corpus, seed, changes or {}
        self.folder = Path(args.output_dir, corpus, str(seed), name)
        self.phase1 = self.folder / "phase1"

    def tokenizer_folder(self) -> Path:
        return Path(self.args.output_dir, self.corpus, "tokenizer")

    def load(self) -> tuple[PreTrainedTokenizerBase, DatasetDict]:
        tokenizer = load_tokenizer(str(self.tokenizer_folder()))
        data_args = self.args.data(self.corpus)
        return tokenizer, tokenize(load_corpus(data_args), tokenizer, data_args)

    def prepare(self) -> None:
        """Train the tokenizer that all models of a corpus share."""
        if not self.tokenizer_folder().is_dir():
            rows = load_corpus(self.args.data(self.corpus))["train"]["text"]
            train_tokenizer(rows, self.args.vocab_size, self.args.max_length).save_pretrained(self.tokenizer_folder())

    # --- sizes and budgets ----------------------------------------------------------------------------------------

    def config(self, **changes: Any) -> NoPropConfig:
        return NoPropConfig(vocab_size=self.args.vocab_size, **self.args.sizes() | self.changes | changes)

    def baseline(self) -> LlamaForCausalLM:
        return stock_model(self.config(), max_position_embeddings=self.args.max_length)

    @cached_property
    def flops(self) -> dict[str, float]:
        """Floating-point operations per training token: end to end, in phase 1, and in one block."""
        args, config = self.args, self.config()
        tokens = torch.randint(args.vocab_size, (args.batch_size, args.max_length))
        block, table = DenoisingBlock(config, config.num_blocks - 1).train(), TokenTable(config)
        hierarchical = DenoisingBlock(self.config(context_source="previous_block"), config.num_blocks - 1).train()
        phase1 = NoPropForPreTraining(self.config(pretraining_objective="clm")).train()
        predicted = PretrainingArguments().mlm_probability if self.config().pretraining_objective == "mlm" else 1.0
        baseline = self.baseline()
        for model in (block, hierarchical, phase1, baseline):
            model.set_attn_implementation("eager")  # its products are known to the counter
        # A token through the vocabulary is counted apart, since the fused loss is not known to the counter: forward
        # and backward to the input and, where it is learned, to the table. Blocks see the tokens of the batch alone.
        product = 2 * args.hidden_size * (args.max_length - 1) / args.max_length
        whole, sampled = 3 * product * args.vocab_size, 2 * product * self.candidates()
        if config.loss_type == "mse":
            sampled = 0.0  # the counter knows its products
        embeds = table(tokens)
        inputs = block.encoder.attention_inputs(embeds)
        encode = partial(hierarchical.encoder, embeds, embeds, **inputs)
        read = count_flops(lambda: encode().sum(), backward=False) / tokens.numel()
        step = partial(hierarchical, tokens, tokens, table, previous_states=embeds)
        return {
            "end_to_end": count_flops(lambda: baseline(tokens, labels=tokens).loss) / tokens.numel(),
            "phase1": count_flops(lambda: phase1(tokens, labels=tokens).loss) / tokens.numel() + predicted * whole,
            "block": count_flops(lambda: block(tokens, tokens, table).loss) / tokens.numel() + sampled,
            # plus the forward passes of earlier blocks, (num_blocks - 1) / 2 on average
            "hierarchical_block": count_flops(lambda: step().loss) / tokens.numel()
            + sampled
            + read * (args.num_blocks - 1) / 2,
        }

    def candidates(self) -> float:
        """Return the average number of tokens in the softmax of a training batch."""
        if not self.config().sampled_softmax:
            return self.args.vocab_size
        _, data = self.load()
        rows = data["train"].shuffle(seed=0).with_format("torch")[: 32 * self.args.batch_size]["input_ids"]
        batches = rows[:, 1:].split(self.args.batch_size)
        return float(np.mean([len(batch.unique()) for batch in batches]))

    def budgets(self) -> dict[str, float]:
        """Return training tokens with which phase 1 and all blocks together cost as much as end-to-end training."""
        flops, args = self.flops, self.args
        total = flops["end_to_end"] * args.tokens
        share = total * (1 - args.pretraining_share) / args.num_blocks
        return {
            "end_to_end": args.tokens,
            "phase1": total * args.pretraining_share / flops["phase1"],
            "block": share / flops["block"],
            "hierarchical_block": share / flops["hierarchical_block"],
        }

    # --- training -------------------------------------------------------------------------------------------------

    def pretrain(self, **pretraining: Any) -> dict[str, Any]:
        """Run phase 1, which all models but the first share."""
        args, tokens = self.args, self.budgets()["phase1"]
        known = {field_.name for field_ in fields(ModelArguments)}
        changes = {name: value for name, value in self.changes.items() if name in known}
        begin = time.perf_counter()
        pretrain_embeddings(
            ModelArguments(tokenizer_name=str(self.tokenizer_folder()), **args.sizes() | changes),
            args.data(self.corpus),
            PretrainingArguments(**pretraining),
            args.training(self.phase1, self.seed, tokens, args.pretraining_learning_rate),
        )
        return {"tokens": tokens, "seconds": time.perf_counter() - begin}

    def end_to_end(self, name: str) -> dict[str, Any]:
        tokenizer, data = self.load()
        args = self.args
        set_seed(self.seed)
        model = self.baseline()
        if name == "end_to_end_frozen":
            table = load_table(self.phase1, NoPropConfig.from_pretrained(self.phase1))
            weight = model.get_input_embeddings().weight.requires_grad_(False)
            weight.copy_(table.weight * args.frozen_scale)  # rows of norm sqrt(d) would dominate all layers
        training_args = args.training(self.folder / name, self.seed, args.tokens, args.learning_rate)
        begin = time.perf_counter()
        trainer = Trainer(model, training_args, CausalCollator(tokenizer), data["train"])
        trainer.train()
        seconds = time.perf_counter() - begin
        model.save_pretrained(self.folder / name)
        nats = trainer.evaluate(data["validation"])["eval_loss"]  # windows are equally long
        return {"tokens": args.tokens, "seconds": seconds, "nats_per_token": nats}

    def blocks(self, name: str) -> dict[str, Any]:
        """Train and measure NoProp, or a single block."""
        budgets = self.budgets()
        models: dict[str, tuple[dict[str, Any], float]] = {
            "noprop": ({}, budgets["block"]),
            "noprop_hierarchical": ({"context_source": "previous_block"}, budgets["hierarchical_block"]),
            "single_block": ({"num_blocks": 1, "noise_levels": [0.0]}, budgets["block"]),
            "single_block_long": ({"num_blocks": 1, "noise_levels": [0.0]}, budgets["block"] * self.args.num_blocks),
        }
        return self.train_blocks(name, *models[name]) | self.measure(name)

    def both_phases(self) -> dict[str, Any]:
        """Train and measure NoProp with a separate phase 1."""
        phase1 = self.pretrain()
        figures = self.blocks("noprop")
        return figures | {"seconds": figures["seconds"] + phase1["seconds"]}

    def train_blocks(self, name: str, changes: dict[str, Any], tokens: float) -> dict[str, Any]:
        """Train blocks on the table of phase 1, with `changes` of the configuration."""
        args, directory = self.args, self.folder / name
        tokenizer, _ = self.load()
        config = NoPropConfig.from_pretrained(self.phase1)
        for key, value in changes.items():
            setattr(config, key, value)
        create_model_directory(directory, config, tokenizer, load_table(self.phase1, config))
        if config.block_initialization == "pretraining":
            shutil.copytree(self.phase1 / PRETRAINING_FOLDER, directory / PRETRAINING_FOLDER, dirs_exist_ok=True)
        begin = time.perf_counter()
        training_args = args.training(directory, self.seed, tokens, args.block_learning_rate)
        train_blocks(args.data(self.corpus), BlockArguments(sample_prompts=[]), training_args)
        return {"tokens": tokens, "seconds": time.perf_counter() - begin}

    def measure(self, name: str) -> dict[str, Any]:
        """Measure trained blocks."""
        tokenizer, data = self.load()
        model = NoPropForCausalLM.from_pretrained(self.folder / name).eval()
        nats = evaluate_model(model, data["validation"], tokenizer)
        return {
            "nats_per_token": nats.predictive,
            "bound": nats.bound,
            "block_nats": nats.block_nats,
            "block_errors": nats.block_errors,
            "context": nats.context,
        }

    def sample_nats(self) -> dict[str, list[float]]:
        """Score samples of the chain, of the predictive mode and of the first block with the end-to-end model.

        Returns:
            By source: nats per token, and their standard error.
        """
        tokenizer, data = self.load()
        judge = LlamaForCausalLM.from_pretrained(self.folder / "end_to_end").eval()
        model = NoPropForCausalLM.from_pretrained(self.folder / "noprop").eval()
        rows = torch.tensor(data["validation"][:256]["input_ids"])
        start = self.args.max_length // 4
        options = {"do_sample": True, "top_k": 0, "max_new_tokens": self.args.max_length - start, "eos_token_id": None}
        options["pad_token_id"] = tokenizer.pad_token_id
        prompts, mask = rows[:, :start], torch.ones_like(rows[:, :start])
        nats = {}
        modes: dict[str, dict[str, Any]] = {
            "chain": {"decoding_mode": "denoising"},
            "predictive": {},
            "first_block": {"num_inference_blocks": 1},
        }
        for name, mode in modes.items():
            texts = model.generate(prompts, attention_mask=mask, seed=self.seed, **options, **mode)
            with torch.no_grad():
                logits = judge(texts).logits[:, start - 1 : -1]
            losses = F.cross_entropy(logits.transpose(1, 2), texts[:, start:], reduction="none")
            nats[name] = [losses.mean().item(), losses.mean(1).std().item() / len(texts) ** 0.5]
        return nats


def count_flops(compute: Callable[[], torch.Tensor], backward: bool = True) -> float:
    """Count the floating-point operations of the matrix products in a forward pass and, optionally, a backward pass."""
    with FlopCounterMode(display=False) as counter:
        result = compute()
        if backward:
            result.backward()
    return counter.get_total_flops()


def run_job(args: QualityArguments, corpus: str, seed: int, name: str) -> dict[str, Any]:
    """Train and measure one model on one thread, unless its results exist."""
    bench = Bench(args, corpus, seed)
    measures: dict[str, Callable[[], dict[str, Any]]] = {"phase1": bench.pretrain, "samples": bench.sample_nats}
    for model in MODELS:
        measures[model] = partial(bench.end_to_end if model.startswith("end_to_end") else bench.blocks, model)
    recipe = yaml.safe_load((RECIPES / "seed.yaml").read_text())
    measures["seed"] = Bench(args, corpus, seed, {name: recipe[name] for name in SEED_CHOICES}, "seed").both_phases
    return measured_once(bench.folder / f"{name}.json", measures[name])


def report(args: QualityArguments, figures: dict[tuple[str, int, str], dict[str, Any]]) -> dict[str, Any]:
    """Collect the results by corpus and model, in lists with one entry per seed."""
    results: dict[str, Any] = {}
    for corpus in args.corpora:
        bench = Bench(args, corpus, 0)
        tokenizer, data = bench.load()
        rows = data["validation"]["input_ids"]
        bytes_per_token = sum(len(tokenizer.decode(row).encode()) for row in rows) / sum(map(len, rows))
        flops, budgets = bench.flops, bench.budgets()
        results[corpus] = {}
        for name in args.models:
            runs = [figures[corpus, seed, name] for seed in args.seeds(corpus)]
            entry: dict[str, Any] = {key: [run[key] for run in runs] for key in runs[0] if key != "tokens"}
            entry["bits_per_byte"] = [nats / np.log(2) / bytes_per_token for nats in entry["nats_per_token"]]
            entry["tokens"] = runs[0]["tokens"]
            results[corpus][name] = entry
        results[corpus]["setting"] = {
            "flops_per_token": flops,
            "budgets": budgets,
            "bytes_per_token": bytes_per_token,
            "parameters": {
                "noprop": num_parameters(NoPropForCausalLM(bench.config())),
                "end_to_end": num_parameters(bench.baseline()),
            },
            "phase1_seconds": [figures[corpus, seed, "phase1"]["seconds"] for seed in args.seeds(corpus)],
        }
        if (corpus, 0, "samples") in figures:
            results[corpus]["samples"] = [figures[corpus, seed, "samples"] for seed in args.seeds(corpus)]
    return results


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def tables(results: dict[str, Any]) -> str:
    """Format the results in Markdown: mean and standard deviation over seeds."""
    lines = []
    for corpus, entries in results.items():
        setting, names = entries["setting"], [name for name in MODELS if name in entries]
        parameters, num_seeds = setting["parameters"], len(entries[names[0]]["nats_per_token"])
        lines += [
            f"**{corpus}**, seeds: {num_seeds}; parameters: {parameters['end_to_end']:,} end to end, "
            f"{parameters['noprop']:,} NoProp",
            "",
            "| model | validation nats per token | bits per byte | bound of the chain | tokens, millions | minutes |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name in names:
            entry = entries[name]
            bound = mean_and_spread(entry["bound"]) if name in CHAINS else ""
            lines.append(
                f"| {MODELS[name]} | {mean_and_spread(entry['nats_per_token'])} | "
                f"{mean_and_spread(entry['bits_per_byte'])} | {bound} | {entry['tokens'] / 1e6:.2f} | "
                f"{np.mean(entry['seconds']) / 60:.1f} |"
            )
        lines += [
            f"| phase 1 | | | | {setting['budgets']['phase1'] / 1e6:.2f} | "
            f"{np.mean(setting['phase1_seconds']) / 60:.1f} |",
            "",
        ]
        for name in [name for name in names if name in CHAINS]:
            nats, errors = (np.mean(entries[name][key], axis=0) for key in ("block_nats", "block_errors"))
            gains = ", ".join(f"{gain:+.4f} ± {error:.4f}" for gain, error in zip(nats[1:], errors[1:], strict=True))
            alone = ", ".join(f"{nats:.3f}" for nats in np.mean(entries[name]["context"], axis=0))
            lines += [
                f"{MODELS[name]}: change of the bound by blocks 1 and later: {gains} (standard error over tokens); "
                f"each block alone on pure noise: {alone}.",
                "",
            ]
        for source in ("chain", "predictive", "first_block") if "samples" in entries else ():
            nats, errors = np.mean([run[source] for run in entries["samples"]], axis=0)
            lines += [f"Text sampled from {source}, under the end-to-end model: {nats:.3f} ± {errors:.3f} nats.", ""]
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot a mark per seed. The value of an outlier, which would hide other differences, is printed at the edge."""
    figure = Figure(figsize=(5.5 * len(results), 4), layout="constrained")
    for axes, (corpus, entries) in zip(np.atleast_1d(figure.subplots(1, len(results))), results.items(), strict=True):
        names = [name for name in reversed(MODELS) if name in entries]
        means = [np.mean(entries[name]["nats_per_token"]) for name in names]
        lower, upper = np.quantile(means, [0.25, 0.75])
        for row, (name, mean) in enumerate(zip(names, means, strict=True)):
            if mean > upper + 1.5 * (upper - lower):  # as in a box plot
                axes.text(
                    0.98, row, f"{mean:.3f} \u2192", transform=axes.get_yaxis_transform(), ha="right", va="center"
                )
                continue
            values = entries[name]["nats_per_token"]
            axes.plot(values, [row] * len(values), "o", color="C0", label="predictive")
            if name in CHAINS:
                values = entries[name]["bound"]
                axes.plot(values, [row - 0.2] * len(values), "x", color="C1", label="bound of the chain")
        axes.set_yticks(range(len(names)), [MODELS[name] for name in names])
        axes.set(xlabel="validation nats per token", title=f"{corpus}: one mark per seed")
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", alpha=0.3)
    labels = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main() -> None:
    (args,) = HfArgumentParser(QualityArguments, description=__doc__).parse_args_into_dataclasses()
    runs = [(corpus, seed) for corpus in args.corpora for seed in args.seeds(corpus)]
    for corpus in args.corpora:
        Bench(args, corpus, 0).prepare()
    names = [name for name in MODELS if name in args.models]
    stages = [["phase1"], names, ["samples"] if {"end_to_end", "noprop"} <= set(names) else []]
    figures: dict[tuple[str, int, str], dict[str, Any]] = {}
    with ProcessPoolExecutor(args.num_workers, mp_context=get_context("spawn")) as pool:
        for stage in stages:
            jobs = {(*run, name): pool.submit(run_job, args, *run, name) for run in runs for name in stage}
            figures |= {key: job.result() for key, job in jobs.items()}
    path = Path(args.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text()) if path.is_file() else {}
    for corpus, entries in report(args, figures).items():  # keep the results of other corpora and models
        results[corpus] = results.get(corpus, {}) | entries
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(tables(results))
    plot(results, path.with_suffix(".png"))
    print(tables(results))


if __name__ == "__main__":
    main()
