#!/usr/bin/env python
"""Compare variations of independent blocks with a reference, one change at a time.

python benchmarks/ablation.py --data_dir DIR                     # everything; DIR holds shakespeare.txt
python benchmarks/ablation.py --data_dir DIR --groups table      # one group

Corpus: tiny Shakespeare; one seed; sizes as in quality.py. Phase 1 and all blocks together have the arithmetic of
--tokens tokens end to end. Existing results are reused.
"""

import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional as F
from transformers import HfArgumentParser

from common import measured_once, write_results
from noprop_hf import DenoisingBlock, NoPropConfig, NoPropForCausalLM
from noprop_hf.generation_noprop import Beliefs
from noprop_hf.model_directory import create_model_directory, load_block, load_table
from noprop_hf.modeling_noprop import TokenTable, vocabulary_nats
from noprop_hf.noise_noprop import information_levels, prior_levels, sample_evidence, standardize
from noprop_hf.training import new_block
from quality import Bench, QualityArguments


@dataclass
class Variation:
    """Differences from the reference.

    The reference has the default settings, except for the softmax over the whole vocabulary and levels up to all of the
    information, which were the defaults when most rows were measured.

    Attributes:
        config: fields of the configuration, for both phases.
        blocks: fields of the configuration for phase 2 only, with the phase 1 of the reference.
        pretraining: fields of `PretrainingArguments`.
        args: fields of `QualityArguments`.
        information_share: share of the information about a token in the evidence at the end of the chain.
        whiten: whether the table is whitened before it is scaled.
        level_scale: factor of all levels.
        level_range: whether a block trains at random levels between its own and that of the next block.
        from_first_block: whether later blocks start as copies of the trained block 0.
    """

    config: dict[str, Any] = field(default_factory=dict)
    blocks: dict[str, Any] = field(default_factory=dict)
    pretraining: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    information_share: float = 1.0
    whiten: bool = False
    level_scale: float = 1.0
    level_range: bool = False
    from_first_block: bool = False

    def phase1(self) -> dict[str, Any]:
        """Return the settings that phase 1 depends on."""
        names = ("pretraining_share", "hidden_size", "intermediate_size", "num_blocks", "num_layers_per_block")
        args = {name: value for name, value in self.args.items() if name in names}
        return {"config": self.config, "pretraining": self.pretraining, "args": args}


GROUPS: dict[str, dict[str, Variation]] = {
    "table": {
        "phase 1 masked": Variation(config={"pretraining_objective": "mlm"}),
        "phase 1 masked, four times its share": Variation(
            config={"pretraining_objective": "mlm"}, args={"pretraining_share": 0.6}
        ),
        "phase 1 twice its share": Variation(args={"pretraining_share": 0.3}),
        "phase 1 four times its share": Variation(args={"pretraining_share": 0.6}),
        "whitened table": Variation(whiten=True),
    },
    "initialisation": {
        "start from phase 1": Variation(blocks={"block_initialization": "pretraining"}),
        "start from phase 1, twice its share": Variation(
            blocks={"block_initialization": "pretraining"}, args={"pretraining_share": 0.3}
        ),
        "start from phase 1, four times its share": Variation(
            blocks={"block_initialization": "pretraining"}, args={"pretraining_share": 0.6}
        ),
        "start from the first block": Variation(from_first_block=True),
        "learning rate 2e-3": Variation(args={"block_learning_rate": 2e-3}),
        "learning rate 5e-4": Variation(args={"block_learning_rate": 5e-4}),
    },
    "objective": {
        "denoising only": Variation(blocks={"denoising_weight": 1.0}),
        "denoising weight 0.25": Variation(blocks={"denoising_weight": 0.25}),
        "no denoising": Variation(blocks={"denoising_weight": 0.0}),
        "squared error": Variation(blocks={"loss_type": "mse"}),
        "levels up to the next block's": Variation(level_range=True),
        "sampled softmax": Variation(config={"sampled_softmax": True}),
        "sampled softmax, levels up to a third of the information": Variation(
            config={"sampled_softmax": True}, information_share=1 / 3
        ),
    },
    "schedule": {
        "cosine levels": Variation(blocks={"noise_schedule": "cosine"}),
        "levels a quarter as high": Variation(level_scale=0.25),
        "levels twice as high": Variation(level_scale=2.0),
        "levels up to a third of the information": Variation(information_share=1 / 3),
        "2 blocks of 4 layers": Variation(args={"num_blocks": 2, "num_layers_per_block": 4}),
        "8 blocks of 1 layer": Variation(args={"num_blocks": 8, "num_layers_per_block": 1}),
    },
    "dimensions": {
        "64 dimensions": Variation(args={"hidden_size": 64, "intermediate_size": 176}),
        "256 dimensions": Variation(args={"hidden_size": 256, "intermediate_size": 704}),
    },
    "head": {
        "correction of width 16": Variation(blocks={"correction_size": 16}),
        "correction of width 512": Variation(blocks={"correction_size": 512}),
    },
}


@dataclass
class AblationArguments:
    data_dir: str = field(metadata={"help": "Folder of shakespeare.txt."})
    output_dir: str = field(default="runs/ablation", metadata={"help": "Folder of models and their results."})
    results: str = field(default="benchmarks/results/ablation.json", metadata={"help": "Results; a .md beside it."})
    groups: list[str] = field(default_factory=lambda: list(GROUPS), metadata={"help": f"Of {', '.join(GROUPS)}."})
    tokens: float = field(default=6e5, metadata={"help": "End-to-end tokens whose arithmetic a variation gets."})
    num_workers: int = field(default=2, metadata={"help": "Variations trained at a time, on one thread each."})


def bench_of(args: AblationArguments, variation: Variation) -> Bench:
    """Create the bench of a variation. Variations of phase 2 only share the folder and phase 1 of the reference."""
    folder = Path(args.output_dir, slug(json.dumps(variation.phase1())))
    corpus = f"shakespeare={args.data_dir}/shakespeare.txt"
    settings = QualityArguments([corpus], output_dir=str(folder), tokens=args.tokens)
    changes = {"sampled_softmax": False} | variation.config
    return Bench(replace(settings, **variation.args), "shakespeare", 0, changes)


def slug(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text)


def pretrain(args: AblationArguments, variation: Variation) -> None:
    torch.set_num_threads(1)
    bench = bench_of(args, variation)
    bench.prepare()
    bench.pretrain(**variation.pretraining)


def measure(args: AblationArguments, name: str, variation: Variation) -> dict[str, Any]:
    """Train and measure a variation, unless its results exist."""
    bench = bench_of(args, variation)
    return measured_once(bench.folder / f"{slug(name)}.json", partial(train, bench, slug(name), variation))


def train(bench: Bench, name: str, variation: Variation) -> dict[str, Any]:
    changes, config = dict(variation.blocks), NoPropConfig.from_pretrained(bench.phase1)
    if variation.whiten:
        bench.phase1 = whitened(bench, bench.folder / "whitened")
    table = load_table(bench.phase1, config)
    if "noise_schedule" in changes:
        sizes = (config.num_blocks, config.vocab_size, config.hidden_size)
        changes["noise_levels"] = prior_levels(changes["noise_schedule"], *sizes)
    else:
        levels = information_levels(table.weight, table.log_prior, config.num_blocks, variation.information_share)
        changes["noise_levels"] = [level * variation.level_scale for level in levels]
    tokens = bench.budgets()["block"]
    draw = partial(evidence_in_range, changes["noise_levels"]) if variation.level_range else sample_evidence
    start = copy_of_first_block if variation.from_first_block else new_block
    with (
        patch("noprop_hf.modeling_noprop.sample_evidence", draw),
        patch("noprop_hf.training.new_block", start),
    ):
        figures = bench.train_blocks(name, changes, tokens)
    return figures | bench.measure(name) | predictive_variants(bench, name)


def copy_of_first_block(directory: Path, config: NoPropConfig, table: TokenTable, block_index: int) -> DenoisingBlock:
    block = new_block(directory, config, table, block_index)
    if block_index > 0:
        block.load_state_dict(load_block(directory, config, 0).state_dict())
    return block


def evidence_in_range(
    levels: list[float], embeds: torch.Tensor, level: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Sample evidence at uniform levels between that of a block and the next (for the last block, twice its own)."""
    highest = min((higher for higher in levels if higher > level), default=2 * level)
    drawn = level + (highest - level) * torch.rand(embeds.shape[:-1], generator=generator)
    return sample_evidence(embeds, drawn[..., None], generator)


def whitened(bench: Bench, directory: Path) -> Path:
    """Copy phase 1, with a table that has equal variance in every direction before its rows are scaled."""
    config = NoPropConfig.from_pretrained(bench.phase1)
    tokenizer, _ = bench.load()
    table = load_table(bench.phase1, config)
    centred = table.weight - table.weight.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
    table.weight.copy_(standardize(centred @ directions / variances.sqrt()))
    config.block_initialization = "random"
    create_model_directory(directory, config, tokenizer, table)
    return directory


@torch.no_grad()
def predictive_variants(bench: Bench, name: str) -> dict[str, float]:
    """Measure other predictive distributions, in nats on the second half of validation (weights: on the first)."""
    model = NoPropForCausalLM.from_pretrained(bench.folder / name).eval()
    _, data = bench.load()
    rows = torch.tensor(data["validation"]["input_ids"])
    table = model.model.embed_tokens.weight
    halves = []
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        answers: Any = []
        chains: Any = []
        some_states = []
        for batch in half.split(64):
            states = [states[:, :-1].flatten(0, 1) for states in model.model(batch).context_states]
            answers.append(torch.stack([block.head(h)[0] for block, h in zip(model.model.blocks, states, strict=True)]))
            if len(chains) < 2:  # trajectories cost a chain each: a sample of the tokens will do
                chains.append(model.denoise(states, 8, torch.Generator().manual_seed(0)))
                some_states.append(states)
        answers = torch.cat(answers, dim=1)
        targets = half[:, 1:].flatten()
        biases = torch.stack([block.head.bias for block in model.model.blocks])[:, None]
        logits = answers @ table.T + biases
        halves.append((logits, targets, torch.cat(chains)))
    (first, first_targets, _), (logits, targets, chains) = halves
    with torch.enable_grad():
        weights = torch.full((len(logits), 1, 1), 1 / len(logits), requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=20)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy((weights * first).sum(0), first_targets)
            loss.backward()
            return loss

        optimizer.step(closure)
    log_probs = logits.log_softmax(-1)
    some = targets[: len(chains)]
    return {
        "first block": F.cross_entropy(logits[0], targets).item(),
        "geometric mean": F.cross_entropy(logits.mean(0), targets).item(),
        "mixture": F.nll_loss(log_probs.logsumexp(0) - math.log(len(logits)), targets).item(),
        "fitted weights": F.cross_entropy((weights.detach() * logits).sum(0), targets).item(),
        "geometric mean, some tokens": F.cross_entropy(logits.mean(0)[: len(some)], some).item(),
        "8 trajectories averaged, some tokens": F.nll_loss(chains, some).item(),
        "8 candidates re-scored with the bound, some tokens": rescored_nats(
            model, [torch.cat(parts) for parts in zip(*some_states, strict=True)], logits.mean(0)[: len(some)], some
        ),
    }


def rescored_nats(
    model: NoPropForCausalLM, states: list[torch.Tensor], logits: torch.Tensor, targets: torch.Tensor
) -> float:
    """Compute nats per token if the 8 likeliest tokens share their probability by their bounds (of 4 draws)."""
    table, generator = model.model.embed_tokens.weight, torch.Generator().manual_seed(0)
    mass, candidates = logits.log_softmax(-1).topk(8)
    bounds = torch.zeros_like(mass)
    for _ in range(4):
        beliefs, level, previous = Beliefs(), 0.0, None
        evidence = torch.zeros(*mass.shape, table.shape[1])
        for block, context in zip(model.model.blocks, states, strict=True):
            step, level = block.level - level, block.level
            noise = torch.randn(len(mass), 1, table.shape[1], generator=generator)  # one path for all candidates
            evidence = evidence + step * table[candidates] + math.sqrt(step) * noise
            belief, bias, _ = beliefs.refine(block.head, context[:, None], evidence)
            bounds += vocabulary_nats(belief + evidence, table, bias, candidates)[1] / 4
            if previous is not None:
                bounds -= vocabulary_nats(previous[0] + evidence, table, previous[1], candidates)[1] / 4
            previous = (belief, bias)
    shared = mass.logsumexp(-1, keepdim=True) + (-bounds).log_softmax(-1)
    log_probs = logits.log_softmax(-1).scatter(-1, candidates, shared)
    return F.nll_loss(log_probs, targets).item()


def row(name: str, figures: dict[str, Any]) -> str:
    gains = ", ".join(f"{gain:+.3f}" for gain in figures["block_nats"][1:])
    numbers = (figures["nats_per_token"], figures["bound"], figures["context"][0])
    mixture = figures["mixture"] - figures["geometric mean"]
    return f"| {name} | " + " | ".join(f"{number:.3f}" for number in numbers) + f" | {mixture:+.3f} | {gains} |"


def main() -> None:
    (args,) = HfArgumentParser(AblationArguments, description=__doc__).parse_args_into_dataclasses()
    every = {"reference": {"reference": Variation()}} | GROUPS
    groups = {name: every[name] for name in ["reference", *args.groups]}
    variations = {name: variation for group in groups.values() for name, variation in group.items()}
    with ProcessPoolExecutor(args.num_workers, mp_context=get_context("spawn")) as pool:
        phase1 = {json.dumps(variation.phase1()): variation for variation in variations.values()}
        for job in [pool.submit(pretrain, args, variation) for variation in phase1.values()]:
            job.result()
        jobs = {name: pool.submit(measure, args, name, variation) for name, variation in variations.items()}
        figures = {name: job.result() for name, job in jobs.items()}
    path = Path(args.results)
    kept = json.loads(path.read_text()) if path.is_file() else {}
    kept |= {name: {"variation": asdict(variations[name])} | figures[name] for name in variations}
    write_results(path, kept)
    lines = []
    for group, names in every.items():
        lines += [
            f"**{group}**",
            "",
            "| | predictive | bound | first block | if a mixture | change of the bound by later blocks |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
            *(row(name, kept[name]) for name in names if name in kept),
            "",
        ]
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
