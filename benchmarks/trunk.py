#!/usr/bin/env python
"""Compare blocks on a frozen trunk with the fine-tuning of that model, on text that is new to it.

python benchmarks/trunk.py --trunk MODEL --train_file text.txt

Every row has the training arithmetic of fine-tuning all weights of the model for some epochs, on one thread:

- the model as it is;
- all its weights fine-tuned end to end, with the best of some learning rates;
- blocks on the model as a frozen trunk (`--trunk_from`), with the best of some learning rates;
- blocks without a trunk, with the same tokenizer.

The last tenth of the text is held out. Results in --output_dir are reused, so an interrupted run resumes. The file of
--results keeps the rows of other --epochs.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments, set_seed

from common import measured_once, write_results
from noprop_hf import DenoisingBlock, NoPropForCausalLM, NoPropForPreTraining
from noprop_hf.arguments import BlockArguments, ModelArguments, PretrainingArguments
from noprop_hf.data import CausalCollator, DataArguments, load_corpus, load_tokenizer, tokenize
from noprop_hf.evaluation import evaluate_model
from noprop_hf.pretraining import prepare_pretraining, pretrain_embeddings
from noprop_hf.training import train_blocks
from quality import COPIES_SHARE, count_flops, training_arguments, training_bytes


ROWS = {
    "trunk": "the model as it is",
    "fine_tuned": "fine-tuned end to end",
    "on_trunk": "blocks on the model as a trunk",
    "without_trunk": "blocks without a trunk",
}


@dataclass
class GrowthArguments:
    """Arguments of the comparison."""

    trunk: str = field(metadata={"help": "A causal model of transformers."})
    train_file: str = field(metadata={"help": "Text to train on."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "The tokenizer, if not that of the model."})
    output_dir: str = field(default="runs/trunk", metadata={"help": "Folder of models and their results."})
    results: str = field(default="benchmarks/results/trunk.json", metadata={"help": "File of the results."})
    epochs: float = field(default=4.0, metadata={"help": "Epochs of the fine-tuning."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "Peak learning rates."}
    )
    num_blocks: int = field(default=4, metadata={"help": "Blocks."})
    num_layers_per_block: int = field(default=2, metadata={"help": "Layers of a block."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads of a layer."})
    intermediate_size: int = field(default=142, metadata={"help": "Width of the feed-forward layers of a block."})
    max_length: int = field(default=64, metadata={"help": "Tokens in a window."})
    batch_size: int = field(default=32, metadata={"help": "Windows in a batch."})
    seed: int = field(default=0, metadata={"help": "Seed."})


class Growth:
    """Data, training and measurement of all rows, for one learning rate."""

    def __init__(self, args: GrowthArguments, learning_rate: float):
        self.args, self.learning_rate = args, learning_rate
        self.data = DataArguments(
            train_file=args.train_file, max_length=args.max_length, validation_split_percentage=10
        )
        self.tokenizer = load_tokenizer(args.tokenizer_name or args.trunk)
        self.dataset = tokenize(load_corpus(self.data), self.tokenizer, self.data)
        self.batch = torch.tensor(self.dataset["train"][: args.batch_size]["input_ids"])

    def training(self, directory: Path, flops: float, per_token: float) -> TrainingArguments:
        """Create training arguments for a number of floating-point operations, in all and for each token."""
        steps = max(1, round(flops / (per_token * self.batch.numel())))
        return training_arguments(directory, self.args.seed, steps, self.args.batch_size, self.learning_rate)

    def per_token(self, loss: Callable[[], torch.Tensor]) -> float:
        return count_flops(loss) / self.batch.numel()

    def stock(self) -> Any:
        """Load the stock model, with an attention whose products can be counted."""
        return AutoModelForCausalLM.from_pretrained(self.args.trunk, attn_implementation="eager").train()

    @cached_property
    def fine_tuning_flops(self) -> float:
        """Floating-point operations of a fine-tuning, per token."""
        model = self.stock()
        return self.per_token(lambda: model(self.batch, labels=self.batch).loss)

    def total_flops(self) -> float:
        return self.fine_tuning_flops * self.args.epochs * len(self.dataset["train"]) * self.args.max_length

    def fine_tuned(self, directory: Path, trains: bool) -> dict[str, Any]:
        """Fine-tune all weights, or none, and measure."""
        set_seed(self.args.seed)
        model, flops = self.stock(), self.total_flops()
        args = self.training(directory, flops, self.fine_tuning_flops)
        trainer = Trainer(
            model, args, CausalCollator(self.tokenizer), self.dataset["train"], self.dataset["validation"]
        )
        if trains:
            trainer.train()
        nats = trainer.evaluate()["eval_loss"]  # windows are equally long
        memory = training_bytes(lambda: model(self.batch, labels=self.batch).loss, model.train())
        return {"nats_per_token": nats, "training_flops": flops * trains, "training_bytes": memory * trains}

    def blocks(self, directory: Path, on_trunk: bool) -> dict[str, Any]:
        """Train blocks with the same arithmetic, with or without a trunk, and measure."""
        names = ("num_blocks", "num_layers_per_block", "num_attention_heads", "intermediate_size")
        source: dict[str, Any] = {"trunk_from": self.args.trunk}
        if not on_trunk:
            source = {"hidden_size": self.stock().config.hidden_size, "block_initialization": "pretraining"}
        model_args = ModelArguments(
            tokenizer_name=self.args.tokenizer_name or self.args.trunk,
            **{name: getattr(self.args, name) for name in names} | source,
        )
        config, _, table = prepare_pretraining(model_args, self.data, load_corpus(self.data)["train"])
        config._attn_implementation = "eager"
        if table.trunk is not None:
            table.trunk.set_attn_implementation("eager")
        phase1, block = NoPropForPreTraining(config).train(), DenoisingBlock(config, config.num_blocks - 1).train()

        def phase1_loss() -> torch.Tensor:
            return phase1(self.batch, labels=self.batch, trunk=table.trunk).loss

        def block_loss() -> torch.Tensor:
            return block(self.batch, self.batch, table).loss

        total, share = self.total_flops(), COPIES_SHARE
        first = self.training(directory, total * share, self.per_token(phase1_loss))
        second = self.training(directory, total * (1 - share) / config.num_blocks, self.per_token(block_loss))
        frozen = [] if table.trunk is None else [table.trunk]
        memory = max(training_bytes(phase1_loss, phase1, *frozen), training_bytes(block_loss, block, table))
        pretrain_embeddings(model_args, self.data, PretrainingArguments(), first)
        train_blocks(self.data, BlockArguments(sample_prompts=[]), second)
        model = NoPropForCausalLM.from_pretrained(directory).eval()
        nats = evaluate_model(model, self.dataset["validation"], self.tokenizer)
        return {
            "nats_per_token": nats.predictive,
            "bound": nats.bound,
            "context": nats.context,
            "training_flops": total,
            "training_bytes": memory,
        }

    def measure(self, name: str) -> dict[str, Any]:
        """Measure a row, unless its results exist."""
        directory = Path(self.args.output_dir, f"{self.learning_rate:g}", name)
        row = partial(self.fine_tuned, directory, trains=name != "trunk")
        if name in ("on_trunk", "without_trunk"):
            row = partial(self.blocks, directory, on_trunk=name == "on_trunk")
        return measured_once(directory.with_suffix(".json"), row)


def table(rows: list[dict[str, Any]]) -> str:
    """Format the results in Markdown."""
    lines = ["| model | validation nats per token | learning rate | memory of the largest training, MB |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for row in rows:
        trained = row["method"] != "trunk"
        cells = (f"{row['learning_rate']:g}", f"{row['training_bytes'] / 1e6:.1f}") if trained else ("", "")
        lines.append(f"| {ROWS[row['method']]} | {row['nats_per_token']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    (args,) = HfArgumentParser(GrowthArguments, description=__doc__).parse_args_into_dataclasses()
    rows = []
    for name in ROWS:
        rates = args.learning_rates if name != "trunk" else args.learning_rates[:1]
        tried = {rate: Growth(args, rate).measure(name) for rate in rates}
        best = min(rates, key=lambda rate: tried[rate]["nats_per_token"])
        by_rate = {f"{rate:g}": figures["nats_per_token"] for rate, figures in tried.items()}
        row = {"method": name, "epochs": args.epochs, **tried[best]}
        rows.append(row | {"learning_rate": best, "nats_by_learning_rate": by_rate})
    path = Path(args.results)
    kept = json.loads(path.read_text()) if path.is_file() else []
    write_results(path, [row for row in kept if row["epochs"] != args.epochs] + rows)
    print(table(rows))


if __name__ == "__main__":
    main()
