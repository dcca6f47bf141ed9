#!/usr/bin/env python
"""Compare independent blocks with end-to-end training, with the same text, arithmetic, parameters and depth.

python benchmarks/quality.py --corpora shakespeare=shakespeare.txt wikitext2=wikitext2
python benchmarks/quality.py --setting plentiful_64 --corpora plentiful=DIR

A corpus is a name and a path: a text file, whose last tenth is held out, or a folder with a file per split, of which
--train_split and --validation_split are used. Settings (each argument can be changed on top):

- data_limited: 4 blocks of 2 layers, 128 dimensions, 3 million tokens end to end, three seeds; text is read several
  times. Under an hour per seed on two cores; `--small` takes some minutes.
- plentiful_64, plentiful_96: 2 blocks of 4 layers on clusters (in `noprop_shallow` and `noprop_before`, 4 of 2), 64 or
  96 dimensions, 20 tokens end to end per parameter without the table (8.8 and 19 million); no training reads a token
  twice. The best of three learning rates is chosen for every row with seed 0. The rows are named after the corpus and
  the width, such as `plentiful_64`.

Results in --output_dir are reused, so an interrupted run resumes, and single rows can be measured first:

python benchmarks/quality.py --setting plentiful_64 --corpora plentiful=DIR --models end_to_end_4 --learning_rates 6e-3
"""

import json
import math
import shutil
import time
from argparse import ArgumentParser
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from datasets import DatasetDict
from filelock import FileLock
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, mm_flop
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from common import measured_once, num_parameters, stock_model, write_results
from noprop_hf import DenoisingBlock, NoPropConfig, NoPropForCausalLM, NoPropForPreTraining
from noprop_hf.arguments import BlockArguments, ModelArguments, PretrainingArguments, one_line
from noprop_hf.clusters import ROUTER_SHARE, clusters_hash
from noprop_hf.data import CausalCollator, DataArguments, load_corpus, load_tokenizer, tokenize, train_tokenizer
from noprop_hf.evaluation import evaluate_model
from noprop_hf.model_directory import create_model_directory, load_router, load_table
from noprop_hf.modeling_noprop import Router, TokenTable
from noprop_hf.planning import saved_bytes
from noprop_hf.pretraining import pretrain_embeddings
from noprop_hf.recipes import RECIPES
from noprop_hf.shards_noprop import PRETRAINING_FOLDER, block_shard
from noprop_hf.training import train_blocks


DEPTHS = {f"end_to_end_{depth}": depth for depth in (1, 2, 4, 12)}  # layers, of models of another depth
MODELS = {
    "end_to_end": "end-to-end, learned table",
    **{name: f"end-to-end, {depth} layer{'s' * (depth > 1)}" for name, depth in DEPTHS.items()},
    "end_to_end_frozen": "end-to-end, our frozen table",
    "pretraining_all": "phase 1 of NoProp alone, the arithmetic of all",
    "single_block": "one block, a block's share",
    "single_block_long": "one block, the arithmetic of all",
    "noprop": "NoProp, independent blocks",
    "noprop_before": "NoProp, random start",
    "noprop_start": "NoProp, blocks start from phase 1",
    "noprop_random_splits": "NoProp, blocks on random splits",
    "noprop_shallow": "NoProp, twice as many blocks, half as deep",
    "noprop_half": "NoProp, half of the arithmetic",
    "seed": "NoProp as first described",
}
CHAINS = tuple(name for name in MODELS if name.startswith("noprop") or name == "seed")  # models with a bound
# Phase 1's share where blocks start as copies of it: twice the tokens win 0.12 nats there, and 0.035 in the blocks.
COPIES_SHARE = 0.65
COSTS = (  # the same with every seed
    *("tokens", "pretraining_tokens", "parameters", "training_flops", "flops_per_generated_token"),
    *("training_bytes", "bytes_sent"),
)


@dataclass(frozen=True)
class Blocks:
    """A row of NoProp that has a phase 1 of its own.

    Attributes:
        changes: fields of the configuration that differ from the defaults, in both phases.
        share: share of the arithmetic that phase 1 gets.
        random_splits: whether each block is trained on its own part of the texts, which are split at random.
        budget: share of the end-to-end model's arithmetic that the row gets.
    """

    changes: dict[str, Any]
    share: float
    random_splits: bool = False
    budget: float = 1.0


def choices(recipe: str, *names: str) -> dict[str, Any]:
    """Return values of a recipe of the package."""
    values = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    return {name: values[name] for name in names}


# A masked table, cosine levels, squared error, denoising alone.
SEED = choices("seed", "pretraining_objective", "noise_schedule", "loss_type", "sampled_softmax", "denoising_weight")
# Two blocks of four layers, which start from phase 1, on clusters.
PLENTIFUL = choices("plentiful", "num_blocks", "num_layers_per_block", "block_initialization", "block_data")
SHARED, SHALLOW = {"block_data": "shared"}, {"num_blocks": 4, "num_layers_per_block": 2}


def training_arguments(
    directory: Path, seed: int, steps: int, batch_size: int, learning_rate: float
) -> TrainingArguments:
    """Create the training arguments that all models of a comparison share."""
    return TrainingArguments(
        output_dir=str(directory),
        seed=seed,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=100,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


@dataclass
class QualityArguments:
    """Arguments of the comparison. Defaults are those of the published results."""

    corpora: list[str] = field(metadata={"help": "Corpora, NAME=FILE or NAME=FOLDER."})
    train_split: str = field(default="train", metadata={"help": "File of a folder to train on, without its ending."})
    validation_split: str = field(default="validation", metadata={"help": "File of a folder to measure on."})
    output_dir: str = field(default="runs/quality", metadata={"help": "Folder of models and their results."})
    results: str = field(
        default="benchmarks/results/quality.json", metadata={"help": "Results; a .md and a .png go beside them."}
    )
    models: list[str] = field(
        default_factory=lambda: [
            *("end_to_end", "end_to_end_frozen", "single_block", "single_block_long"),
            *("noprop", "seed"),
        ],
        metadata={"help": "Rows. Default: all of the setting."},
    )
    num_seeds: int = field(default=3, metadata={"help": "Seeds."})
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
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3], metadata={"help": "Peak learning rates, of which seed 0 chooses one per row."}
    )
    block_learning_rate: float | None = field(default=None, metadata={"help": "Peak learning rate of blocks alone."})
    frozen_scale: float = field(
        default=0.06, metadata={"help": "Root mean square of the frozen table end to end; a learned one ends there."}
    )
    num_workers: int = field(default=2, metadata={"help": "Models trained at a time, on one thread each."})
    small: bool = field(default=False, metadata={"help": "One seed and a tenth of the training."})

    kind: ClassVar[str] = "data-limited"
    reads_once: ClassVar[bool] = False  # whether a training may read no token twice
    own_phase1: ClassVar[dict[str, Blocks]] = {"seed": Blocks(SEED, 0.15)}

    def __post_init__(self):
        if self.small:
            self.num_seeds, self.tokens, self.small = 1, self.tokens / 10, False
        unnamed = [corpus for corpus in self.corpora if not all(corpus.partition("="))]
        if unnamed:
            raise ValueError(f"--corpora takes NAME=PATH, such as books=books.txt; not {', '.join(unnamed)}.")
        unknown = [name for name in self.models if name not in MODELS]
        if unknown:
            raise ValueError(f"--models takes {', '.join(MODELS)}; not {', '.join(unknown)}.")

    def paths(self) -> dict[str, Path]:
        """Return the path of every corpus, by name."""
        parts = (corpus.partition("=") for corpus in self.corpora)
        return {name: Path(path) for name, _, path in parts}

    def key(self, corpus: str) -> str:
        """Return the name of the results of a corpus."""
        return f"{corpus}_{self.hidden_size}" if self.reads_once else corpus

    def data(self, corpus: str) -> DataArguments:
        """Return the data arguments of a corpus.

        Raises:
            ValueError: if a split has not one file.
        """
        path = self.paths()[corpus]
        files = [str(path)]
        if path.is_dir():
            files = []
            for split in (self.train_split, self.validation_split):
                found = [str(file) for file in path.glob(f"{split}.*")]
                if len(found) != 1:
                    raise ValueError(
                        f"{path} must hold one file {split}.*, and holds {len(found)}: name its splits with "
                        "--train_split and --validation_split."
                    )
                files += found
        train, validation = [*files, None][:2]
        return DataArguments(
            train_file=train, validation_file=validation, max_length=self.max_length, validation_split_percentage=10
        )

    def sizes(self) -> dict[str, int]:
        names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_blocks", "num_layers_per_block")
        return {name: getattr(self, name) for name in names}

    def steps(self, tokens: float) -> int:
        return max(1, round(tokens / (self.batch_size * self.max_length)))

    def training(self, directory: Path, seed: int, tokens: float, learning_rate: float) -> TrainingArguments:
        """Create training arguments, which differ between models in the peak learning rate only."""
        return training_arguments(directory, seed, self.steps(tokens), self.batch_size, learning_rate)


@dataclass
class Plentiful64(QualityArguments):
    """Text that is plentiful, and 8 layers of 64 dimensions with 20 training tokens per parameter without the table."""

    models: list[str] = field(
        default_factory=lambda: ["end_to_end", *DEPTHS, "pretraining_all", *Plentiful64.own_phase1],
        metadata={"help": "Rows. Default: all of the setting."},
    )
    num_seeds: int = field(default=1, metadata={"help": "Seeds."})
    tokens: float = field(default=8.8e6, metadata={"help": "Training tokens of the end-to-end model."})
    hidden_size: int = field(default=64, metadata={"help": "Width of table and layers."})
    intermediate_size: int = field(default=142, metadata={"help": "Width of the feed-forward layers of a block."})
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-3, 6e-3, 1.2e-2],
        metadata={"help": "Peak learning rates, of which seed 0 chooses one per row."},
    )

    kind: ClassVar[str] = "plentiful"
    reads_once: ClassVar[bool] = True
    own_phase1: ClassVar[dict[str, Blocks]] = {
        "noprop_before": Blocks({"block_initialization": "random"}, 0.15),
        "noprop_start": Blocks(PLENTIFUL | SHARED, COPIES_SHARE),
        "noprop_random_splits": Blocks(PLENTIFUL | SHARED, COPIES_SHARE, random_splits=True),
        "noprop": Blocks(PLENTIFUL, COPIES_SHARE),
        "noprop_shallow": Blocks(PLENTIFUL | SHALLOW, COPIES_SHARE),
        "noprop_half": Blocks(PLENTIFUL, COPIES_SHARE, budget=0.5),
    }


@dataclass
class Plentiful96(Plentiful64):
    """The same with 96 dimensions."""

    tokens: float = field(default=1.9e7, metadata={"help": "Training tokens of the end-to-end model."})
    hidden_size: int = field(default=96, metadata={"help": "Width of table and layers."})
    intermediate_size: int = field(default=200, metadata={"help": "Width of the feed-forward layers of a block."})


SETTINGS = {"data_limited": QualityArguments, "plentiful_64": Plentiful64, "plentiful_96": Plentiful96}


class Bench:
    """Data, training and measurement of all models, for one corpus, one seed and the first learning rate.

    Args:
        changes: fields of the configuration that differ from the defaults.
        name: the subfolder of a bench with a separate phase 1.
    """

    def __init__(
        self, args: QualityArguments, corpus: str, seed: int, changes: dict[str, Any] | None = None, name: str = ""
    ):
        self.args, self.corpus, self.seed, self.changes = args, corpus, seed, changes or {}
        self.learning_rate = args.learning_rates[0]
        self.common = Path(args.output_dir, args.key(corpus))
        self.folder = self.common / str(seed) / f"{self.learning_rate:g}" / name
        self.phase1 = self.folder / "phase1"

    # --- text -----------------------------------------------------------------------------------------------------

    def load(self, data_args: DataArguments | None = None) -> tuple[PreTrainedTokenizerBase, DatasetDict]:
        tokenizer, data_args = load_tokenizer(str(self.common / "tokenizer")), data_args or self.args.data(self.corpus)
        return tokenizer, tokenize(load_corpus(data_args), tokenizer, data_args)

    def split(self, index: int) -> DataArguments:
        """Return the data arguments of a block that is trained on its own part of the texts."""
        names = (f"split_{index}_of_{self.args.num_blocks}", "validation")
        train, validation = (str(self.common / f"{name}.parquet") for name in names)
        return replace(self.args.data(self.corpus), train_file=train, validation_file=validation)

    def prepare(self) -> None:
        """Train the tokenizer of all models of a corpus, and split texts at random for the rows that need it."""
        self.common.mkdir(parents=True, exist_ok=True)
        with FileLock(self.common / "prepare.lock"):
            if (self.common / "tokenizer").is_dir():
                return
            corpus = load_corpus(self.args.data(self.corpus))
            for bench in (self.of_row(name) for name, row in self.args.own_phase1.items() if row.random_splits):
                count = bench.args.num_blocks
                for index in range(count):
                    part = corpus["train"].shuffle(seed=0).shard(count, index)
                    part.to_parquet(bench.split(index).train_file)
                corpus["validation"].to_parquet(bench.split(0).validation_file)
            tokenizer = train_tokenizer(corpus["train"]["text"], self.args.vocab_size, self.args.max_length)
            tokenizer.save_pretrained(self.common / "tokenizer")

    def count_tokens(self, data_args: DataArguments | None = None) -> int:
        """Count the training tokens of the corpus or of other data, in whole windows."""
        return len(self.load(data_args)[1]["train"]) * self.args.max_length

    @cached_property
    def num_tokens(self) -> int:
        return self.count_tokens()

    def check_text(self, name: str) -> None:
        """Check that the text suffices for a row of which no training may read a token twice.

        Raises:
            ValueError: if it does not.
        """
        row, whole = self.args.own_phase1.get(name), self.num_tokens
        needed = [(self.end_to_end_tokens(DEPTHS.get(name)), whole)] if name.startswith("end_to_end") else []
        if row is not None:
            bench = self.of_row(name)
            budgets, parts = bench.budgets(), range(bench.args.num_blocks if row.random_splits else 0)
            own = min((self.count_tokens(bench.split(index)) for index in parts), default=whole)
            needed = [(budgets["phase1"], whole), (budgets["block"], own)]
        for tokens, available in needed:
            read = self.args.steps(tokens) * self.args.batch_size * self.args.max_length
            if read > available:
                part = " in a random split" if available < whole else ""
                raise ValueError(
                    f"The corpus {self.corpus!r} is too short for {name!r}: it has {available:,} training tokens"
                    f"{part}, of which a training reads {read:,} once each. Give more text, lower --tokens, or choose "
                    "other --models."
                )

    def of_row(self, name: str) -> "Bench":
        """Create the bench of a row with a phase 1 of its own. Rows with an equal phase 1 share it."""
        row = self.args.own_phase1[name]
        parts = [row.budget] * (row.budget != 1) + [row.share, *chain.from_iterable(row.changes.items())]
        args = replace(self.args, **{size: row.changes[size] for size in self.args.sizes() if size in row.changes})
        arithmetic = self.total_flops / Bench(args, self.corpus, self.seed).total_flops  # of other sizes
        args = replace(args, pretraining_share=row.share, tokens=row.budget * arithmetic * self.args.tokens)
        return Bench(args, self.corpus, self.seed, row.changes, "_".join(map(str, parts)))

    # --- sizes and budgets ----------------------------------------------------------------------------------------

    def config(self, **changes: Any) -> NoPropConfig:
        return NoPropConfig(vocab_size=self.args.vocab_size, **self.args.sizes() | self.changes | changes)

    def baseline(self, num_layers: int | None = None) -> LlamaForCausalLM:
        """Create the end-to-end model: as deep as all blocks and with as many parameters, or `num_layers` such layers.

        Where a shallow model would have to read more text than there is, its feed-forward layers are widened instead,
        until it spends the same arithmetic on all of the text.
        """
        config = NoPropConfig(vocab_size=self.args.vocab_size, **self.args.sizes())
        model = stock_model(config, max_position_embeddings=self.args.max_length)
        if num_layers is None:
            return model
        model.config.num_hidden_layers = num_layers
        model.config.intermediate_size += self.widening(self.stock_flops(model.config), num_layers)
        return LlamaForCausalLM(model.config)

    def stock_flops(self, config: LlamaConfig) -> float:
        """Count the floating-point operations per training token of an end-to-end model."""
        with torch.device("meta"):
            model, tokens = LlamaForCausalLM(config), self.random_tokens()
        return count_flops(lambda: model(tokens, labels=tokens).loss, model) / tokens.numel()

    def end_to_end_tokens(self, num_layers: int | None) -> float:
        """Return the training tokens of an end-to-end model (see `baseline`)."""
        return self.total_flops / self.stock_flops(self.baseline(num_layers).config)

    def widening(self, flops: float, num_layers: int) -> int:
        """Return by how much feed-forward layers are widened, so that a training need not read a token twice.

        Args:
            flops: floating-point operations per training token without it.
        """
        if not self.args.reads_once:
            return 0
        batch = self.args.batch_size * self.args.max_length
        missing = self.total_flops / max(1, self.num_tokens - batch) - flops
        return max(0, math.ceil(missing / (18 * self.args.hidden_size * num_layers)))  # 6 per weight of three matrices

    def random_tokens(self) -> torch.Tensor:
        return torch.randint(self.args.vocab_size, (self.args.batch_size, self.args.max_length))

    @cached_property
    def total_flops(self) -> float:
        """Floating-point operations that every row may spend on training: those of the end-to-end model."""
        return self.stock_flops(self.baseline().config) * self.args.tokens

    @cached_property
    def flops(self) -> dict[str, float]:
        """Floating-point operations per training token: end to end, in phase 1 and its router, and in one block."""
        args, config, tokens = self.args, self.config(), self.random_tokens()
        block = DenoisingBlock(self.config(sampled_softmax=False), config.num_blocks - 1).train()
        table = TokenTable(config)
        phase1 = NoPropForPreTraining(self.config(pretraining_objective="clm")).train()
        predicted = PretrainingArguments().mlm_probability if self.config().pretraining_objective == "mlm" else 1.0
        # All tokens pass through the whole vocabulary here: forward and backward to the input and, where it is learned,
        # to the table. In a masked phase 1 only predicted tokens do, and blocks see the tokens of the batch alone.
        product = 2 * args.hidden_size * (args.max_length - 1) / args.max_length
        not_predicted = (1 - predicted) * 3 * product * args.vocab_size
        not_sampled = 2 * product * (args.vocab_size - self.candidates())
        router_flops = 0.0
        if config.block_data == "clusters":
            router, labels = Router(config).train(), torch.zeros(args.batch_size, dtype=torch.long)
            router_flops = count_flops(lambda: router(tokens, labels, table).loss, router) / tokens.numel()
        return {
            "end_to_end": self.total_flops / args.tokens,
            "phase1": count_flops(lambda: phase1(tokens, labels=tokens).loss, phase1) / tokens.numel()
            - not_predicted
            + ROUTER_SHARE * router_flops,
            "block": count_flops(lambda: block(tokens, tokens, table).loss, block) / tokens.numel() - not_sampled,
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
        flops, args, total = self.flops, self.args, self.total_flops
        share = total * (1 - args.pretraining_share) / args.num_blocks
        return {
            "end_to_end": args.tokens,
            "phase1": total * args.pretraining_share / flops["phase1"],
            "block": share / flops["block"],
        }

    # --- training -------------------------------------------------------------------------------------------------

    def pretrain(self, **pretraining: Any) -> dict[str, Any]:
        """Run phase 1."""
        args, tokens = self.args, self.budgets()["phase1"]
        known = {field_.name for field_ in fields(ModelArguments)}
        changes = {name: value for name, value in self.changes.items() if name in known}
        begin = time.perf_counter()
        pretrain_embeddings(
            ModelArguments(tokenizer_name=str(self.common / "tokenizer"), **args.sizes() | changes),
            args.data(self.corpus),
            PretrainingArguments(**pretraining),
            args.training(self.phase1, self.seed, tokens, self.learning_rate),
        )
        return {"tokens": tokens, "seconds": time.perf_counter() - begin}

    def pretrained(self) -> dict[str, Any]:
        """Run the phase 1 that several rows share, unless it exists; other processes wait for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "phase1.json.lock"):
            return measured_once(self.folder / "phase1.json", self.pretrain)

    def end_to_end(self, name: str) -> dict[str, Any]:
        """Train and measure an end-to-end model."""
        tokens = self.end_to_end_tokens(DEPTHS.get(name))
        set_seed(self.seed)
        model = LlamaForCausalLM(self.baseline(DEPTHS.get(name)).config)
        if name == "end_to_end_frozen":
            self.pretrained()
            table = load_table(self.phase1, NoPropConfig.from_pretrained(self.phase1))
            weight = model.get_input_embeddings().weight.requires_grad_(False)
            weight.copy_(table.weight * self.args.frozen_scale)  # rows of norm sqrt(d) would dominate all layers
        begin = time.perf_counter()
        trainer = self.trainer(model, name, tokens)
        trainer.train()
        seconds = time.perf_counter() - begin
        model.save_pretrained(self.folder / name)
        nats = trainer.evaluate()["eval_loss"]  # windows are equally long
        return {"tokens": tokens, "seconds": seconds, "nats_per_token": nats} | self.costs_of_one_model(model, tokens)

    def trainer(self, model: PreTrainedModel, name: str, tokens: float) -> Trainer:
        tokenizer, data = self.load()
        training_args = self.args.training(self.folder / name, self.seed, tokens, self.learning_rate)
        return Trainer(model, training_args, CausalCollator(tokenizer), data["train"], data["validation"])

    def pretraining_all(self, name: str) -> dict[str, Any]:
        """Train and measure the model of phase 1 with all the arithmetic, widened like a shallow end-to-end model."""
        args = replace(self.of_row("noprop").args, pretraining_share=1.0)
        bench = Bench(args, self.corpus, self.seed)
        wider = bench.widening(bench.flops["phase1"], args.num_layers_per_block)
        bench = Bench(args, self.corpus, self.seed, {"intermediate_size": args.intermediate_size + wider}, name)
        figures = bench.pretrained()
        model = NoPropForPreTraining.from_pretrained(bench.phase1)
        nats = bench.trainer(model, name, figures["tokens"]).evaluate()["eval_loss"]
        return figures | {"nats_per_token": nats} | self.costs_of_one_model(model, figures["tokens"])

    def blocks(self, name: str) -> dict[str, Any]:
        """Train and measure NoProp, or a single block."""
        alone = {"num_blocks": 1, "noise_levels": [0.0]}
        models: dict[str, tuple[dict[str, Any], str, int]] = {
            "noprop": ({}, "block", 1),
            "single_block": (alone, "block", 1),
            "single_block_long": (alone, "block", self.args.num_blocks),
        }
        changes, kind, times = models[name]
        self.pretrained()
        tokens = self.budgets()[kind] * times
        return self.train_blocks(name, changes, tokens) | self.measure(name) | self.costs_of_blocks(name, tokens, kind)

    def both_phases(self, name: str) -> dict[str, Any]:
        """Train and measure a row of NoProp with a phase 1 of its own."""
        bench = self.of_row(name)
        phase1, tokens = bench.pretrained(), bench.budgets()["block"]
        figures = bench.train_blocks(name, {}, tokens, self.args.own_phase1[name].random_splits)
        figures["seconds"] += phase1["seconds"]
        return figures | bench.measure(name) | bench.costs_of_blocks(name, tokens)

    def train_blocks(
        self, name: str, changes: dict[str, Any], tokens: float, random_splits: bool = False
    ) -> dict[str, Any]:
        """Train blocks on the table of phase 1.

        Args:
            changes: fields of the configuration that differ from phase 1.
            tokens: training tokens of a block.
            random_splits: see [`Blocks`].
        """
        args, directory = self.args, self.folder / name
        learning_rate, begin = args.block_learning_rate or self.learning_rate, time.perf_counter()
        self.create(directory, changes)
        if random_splits:
            for index in range(args.num_blocks):  # in directories of their own, since a directory has one training text
                alone = self.folder / f"{name}_{index}"
                self.create(alone, changes)
                training_args = args.training(alone, self.seed, tokens, learning_rate)
                train_blocks(self.split(index), BlockArguments(str(index), sample_prompts=[]), training_args)
                shutil.copy(alone / block_shard(index), directory)
        else:
            training_args = args.training(directory, self.seed, tokens, learning_rate)
            train_blocks(args.data(self.corpus), BlockArguments(sample_prompts=[]), training_args)
        return {"tokens": tokens, "seconds": time.perf_counter() - begin}

    def create(self, directory: Path, changes: dict[str, Any]) -> None:
        """Create a model directory without blocks around the table of phase 1."""
        tokenizer, _ = self.load()
        config = NoPropConfig.from_pretrained(self.phase1)
        for key, value in changes.items():
            setattr(config, key, value)
        table, router = load_table(self.phase1, config), load_router(self.phase1, config)
        origin = {} if router is None else {"clusters": clusters_hash(router.state_dict())}
        create_model_directory(directory, config, tokenizer, table, origin, router)
        if config.block_initialization == "pretraining":
            shutil.copytree(self.phase1 / PRETRAINING_FOLDER, directory / PRETRAINING_FOLDER, dirs_exist_ok=True)

    # --- measurement ----------------------------------------------------------------------------------------------

    def costs_of_one_model(self, model: PreTrainedModel, tokens: float) -> dict[str, float]:
        """Return what the training and the use of a model cost that is not split into blocks.

        Several workers, as many as blocks, would train it in step, and add up their gradients in a ring.
        """
        batch, steps = self.batch(), self.args.steps(tokens)
        trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        return {
            "parameters": model.num_parameters(),
            "training_flops": self.total_flops,
            "flops_per_generated_token": generation_flops(model, batch),
            "training_bytes": training_bytes(lambda: model(batch, labels=batch).loss, model.train()),
            "bytes_sent": 2 * (self.args.num_blocks - 1) * trained * steps,
        }

    def costs_of_blocks(self, name: str, tokens: float, kind: str = "block") -> dict[str, float]:
        """Return what the training and the use of blocks cost.

        Every worker fetches the files that its block needs, and publishes the file of its block.

        Args:
            tokens: training tokens of a block.
            kind: see `flops`.
        """
        directory, batch = self.folder / name, self.batch()
        model = NoPropForCausalLM.from_pretrained(directory)
        config, table = model.config, model.model.embed_tokens
        phase1, block = NoPropForPreTraining(self.config()).train(), model.model.blocks[-1].train()
        steps = {
            "phase 1": training_bytes(lambda: phase1(batch, labels=batch).loss, phase1),
            "block": training_bytes(lambda: block(batch, batch, table).loss, block, table),
        }
        count = config.num_blocks
        files = {path: path.stat().st_size for path in directory.rglob("*.safetensors")}
        published = sum(files.pop(directory / block_shard(index)) for index in range(count))
        spent = self.flops["phase1"] * self.budgets()["phase1"] + count * self.flops[kind] * tokens
        return {
            "pretraining_tokens": self.budgets()["phase1"],
            "parameters": model.num_parameters(),
            "training_flops": spent,
            "flops_per_generated_token": generation_flops(model, batch),
            "training_bytes": max(steps.values()),
            "bytes_sent": published + count * sum(files.values()),
        }

    def batch(self) -> torch.Tensor:
        return torch.tensor(self.load()[1]["train"][: self.args.batch_size]["input_ids"])

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


def count_flops(compute: Callable[[], torch.Tensor], *models: PreTrainedModel, backward: bool = True) -> float:
    """Count the floating-point operations of the matrix products in a forward pass and, optionally, a backward pass.

    Args:
        models: models that have eager attention while they are counted, since the counter knows its products.
    """
    implementations = [model.config._attn_implementation for model in models]
    for model in models:
        model.set_attn_implementation("eager")
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **options: mm_flop(a, b)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        result = compute()
        if backward:
            result.backward()
    for model, implementation in zip(models, implementations, strict=True):
        model.set_attn_implementation(implementation)
    return counter.get_total_flops()


def training_bytes(compute: Callable[[], torch.Tensor], *modules: nn.Module) -> int:
    """Count the bytes of a training step with AdamW: weights, gradients, two moments, and what autograd saves."""
    weights = chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
    return sum(w.nbytes * (4 if w.requires_grad else 1) for w in weights) + saved_bytes(compute, modules)


@torch.no_grad()
def generation_flops(model: PreTrainedModel, batch: torch.Tensor) -> float:
    """Count the floating-point operations per token of the predictive distribution, over windows of text."""
    model.eval()
    return count_flops(lambda: model(batch).logits, model, backward=False) / batch.numel()


def run_job(args: QualityArguments, corpus: str, seed: int, name: str) -> dict[str, Any]:
    """Train and measure one model on one thread, unless its results exist."""
    bench = Bench(args, corpus, seed)
    if name == "samples":
        measure = bench.sample_nats
    elif name in args.own_phase1:
        measure = partial(bench.both_phases, name)
    elif name == "pretraining_all":
        measure = partial(bench.pretraining_all, name)
    else:
        measure = partial(bench.end_to_end if name.startswith("end_to_end") else bench.blocks, name)
    return measured_once(bench.folder / f"{name}.json", measure)


Figures = dict[tuple[str, int, str, float], dict[str, Any]]  # by corpus, seed, row and learning rate


def tried(figures: Figures, corpus: str, name: str) -> dict[float, float]:
    """Return the nats per token of a row with seed 0, by learning rate."""
    return {rate: found["nats_per_token"] for (*row, rate), found in figures.items() if row == [corpus, 0, name]}


def measure_rows(args: QualityArguments, pool: Executor) -> Figures:
    """Measure all rows with seed 0 and every learning rate, and with further seeds and the best rate."""
    figures: Figures = {}
    for seeds in ([0], range(1, args.num_seeds)):
        jobs = {}
        for corpus, name, seed in product(args.paths(), args.models, seeds):
            rates = tried(figures, corpus, name)
            for rate in [min(rates, key=rates.__getitem__)] if rates else args.learning_rates:
                jobs[corpus, seed, name, rate] = pool.submit(
                    run_job, replace(args, learning_rates=[rate]), corpus, seed, name
                )
        figures |= {key: job.result() for key, job in jobs.items()}
    return figures


def report(args: QualityArguments, figures: Figures) -> dict[str, Any]:
    """Collect the results by corpus and model, in lists with one entry per seed."""
    results: dict[str, Any] = {}
    for corpus in args.paths():
        bench = Bench(args, corpus, 0)
        tokenizer, data = bench.load()
        rows = data["validation"]["input_ids"]
        bytes_per_token = sum(len(tokenizer.decode(row).encode()) for row in rows) / sum(map(len, rows))
        entries = results[args.key(corpus)] = {}
        for name in args.models:
            rates = tried(figures, corpus, name)
            best = min(rates, key=rates.__getitem__)
            runs = [figures[corpus, seed, name, best] for seed in range(args.num_seeds)]
            entry: dict[str, Any] = {key: [run[key] for run in runs] for key in runs[0] if key not in COSTS}
            entry["bits_per_byte"] = [nats / np.log(2) / bytes_per_token for nats in entry["nats_per_token"]]
            entry |= {key: runs[0][key] for key in COSTS if key in runs[0]}
            entries[name] = entry | {"learning_rate": best, "nats_by_learning_rate": rates}
        phase1 = [Bench(args, corpus, seed).folder / "phase1.json" for seed in range(args.num_seeds)]
        entries["setting"] = {
            "kind": args.kind,
            "flops_per_token": bench.flops,
            "budgets": bench.budgets(),
            "bytes_per_token": bytes_per_token,
            "parameters": {
                "noprop": num_parameters(NoPropForCausalLM(bench.config())),
                "end_to_end": num_parameters(bench.baseline()),
            },
            "phase1_seconds": [json.loads(path.read_text())["seconds"] for path in phase1 if path.is_file()],
        }
        samples = [figures.get((corpus, seed, "samples", args.learning_rates[0])) for seed in range(args.num_seeds)]
        if all(samples):
            entries["samples"] = samples
    return results


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


COLUMNS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "validation nats per token": lambda name, entry: mean_and_spread(entry["nats_per_token"]),
    "bits per byte": lambda name, entry: mean_and_spread(entry["bits_per_byte"]),
    "bound of the chain": lambda name, entry: mean_and_spread(entry["bound"]) if name in CHAINS else "",
    "gains by block": lambda name, entry: gains(entry) if name in CHAINS else "",
    "learning rate": lambda name, entry: f"{entry['learning_rate']:g}",
    "tokens, millions": lambda name, entry: f"{entry['tokens'] / 1e6:.2f}",
    "tokens of phase 1": lambda name, entry: f"{entry['pretraining_tokens'] / 1e6:.2f}",
    "parameters": lambda name, entry: f"{entry['parameters']:,}",
    "training, TFLOP": lambda name, entry: f"{entry['training_flops'] / 1e12:.2f}",
    "a generated token, MFLOP": lambda name, entry: f"{entry['flops_per_generated_token'] / 1e6:.2f}",
    "memory of the largest training, MB": lambda name, entry: f"{entry['training_bytes'] / 1e6:.1f}",
    "sent between workers, MB": lambda name, entry: f"{entry['bytes_sent'] / 1e6:,.1f}",
    "minutes": lambda name, entry: f"{np.mean(entry['seconds']) / 60:.1f}",
}


def gains(entry: dict[str, Any]) -> str:
    return ", ".join(f"{gain:+.4f}" for gain in np.mean(entry["block_nats"], axis=0)[1:])


def cell(column: str, name: str, entry: dict[str, Any]) -> str:
    try:
        return COLUMNS[column](name, entry)
    except KeyError:  # not measured when the entry was
        return ""


def tables(results: dict[str, Any]) -> str:
    """Format the results in Markdown: mean and standard deviation over seeds. Columns without a value are left out."""
    lines = []
    for corpus, entries in results.items():
        setting, names = entries["setting"], [name for name in MODELS if name in entries]
        parameters, counts = setting["parameters"], [len(entries[name]["nats_per_token"]) for name in names]
        seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
        columns = [column for column in COLUMNS if any(cell(column, name, entries[name]) for name in names)]
        lines += [
            f"**{corpus}** ({setting['kind']}), seeds: {seeds}; parameters: {parameters['end_to_end']:,} end to "
            f"end, {parameters['noprop']:,} NoProp",
            "",
            f"| model | {' | '.join(columns)} |",
            f"| --- |{' ---: |' * len(columns)}",
        ]
        for name in names:
            lines.append(f"| {MODELS[name]} | {' | '.join(cell(column, name, entries[name]) for column in columns)} |")
        lines.append("")
        if setting["phase1_seconds"]:
            lines += [
                f"Phase 1, which rows share: {setting['budgets']['phase1'] / 1e6:.2f} million tokens, "
                f"{np.mean(setting['phase1_seconds']) / 60:.1f} minutes.",
                "",
            ]
        for name in [name for name in names if name in CHAINS]:
            errors = ", ".join(f"{error:.4f}" for error in np.mean(entries[name]["block_errors"], axis=0)[1:])
            alone = ", ".join(f"{nats:.3f}" for nats in np.mean(entries[name]["context"], axis=0))
            lines += [
                f"{MODELS[name]}: standard errors of the gains over tokens {errors}; each block alone on pure noise: "
                f"{alone}.",
                "",
            ]
        for source in ("chain", "predictive", "first_block") if "samples" in entries else ():
            nats, errors = np.mean([run[source] for run in entries["samples"]], axis=0)
            lines += [f"Text sampled from {source}, under the end-to-end model: {nats:.3f} ± {errors:.3f} nats.", ""]
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot a mark per seed. The value of an outlier, which would hide other differences, is printed at the edge."""
    columns = min(3, len(results))
    lines = math.ceil(len(results) / columns)
    figure = Figure(figsize=(5.5 * columns, 4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for empty in panels[len(results) :]:
        empty.remove()
    for axes, (corpus, entries) in zip(panels, results.items(), strict=False):
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


def parse() -> QualityArguments:
    """Parse the arguments of the chosen setting."""
    settings = ArgumentParser(add_help=False, allow_abbrev=False)
    settings.add_argument("--setting", choices=SETTINGS, default="data_limited")
    chosen, rest = settings.parse_known_args()
    (args,) = HfArgumentParser(SETTINGS[chosen.setting], description=__doc__).parse_args_into_dataclasses(rest)
    return args


def main() -> None:
    try:
        args = parse()
        for corpus in args.paths():
            bench = Bench(args, corpus, 0)
            bench.prepare()
            for name in args.models if args.reads_once else ():
                bench.check_text(name)
    except ValueError as error:
        raise SystemExit(one_line(error)) from error
    with ProcessPoolExecutor(args.num_workers, mp_context=get_context("spawn")) as pool:
        figures = measure_rows(args, pool)
        if not args.reads_once and len(args.learning_rates) == 1 and {"end_to_end", "noprop"} <= set(args.models):
            runs = list(product(args.paths(), range(args.num_seeds)))
            jobs = {run: pool.submit(run_job, args, *run, "samples") for run in runs}
            figures |= {(*run, "samples", args.learning_rates[0]): job.result() for run, job in jobs.items()}
    path = Path(args.results)
    results = json.loads(path.read_text()) if path.is_file() else {}
    for corpus, entries in report(args, figures).items():  # keep the results of other corpora and models
        results[corpus] = results.get(corpus, {}) | entries
    write_results(path, results)
    path.with_suffix(".md").write_text(tables(results))
    plot(results, path.with_suffix(".png"))
    print(tables(results))


if __name__ == "__main__":
    main()
