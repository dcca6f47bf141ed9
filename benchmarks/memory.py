#!/usr/bin/env python
"""Measure the memory of training a block, relative to other ways to train a stock model as deep as all blocks.

python benchmarks/memory.py           # the T4 recipe's shape, 2 to 12 blocks: some minutes on a CPU
python benchmarks/memory.py --small   # the same for a small shape, 2 blocks
python benchmarks/memory.py --largest # the largest model of a family that each method trains on a GPU with 16 GB

All methods (see `METHODS`) train on the same windows. The count, of a step in float32 that accumulates gradients, has
five parts: trained and frozen parameters, gradients, the states of the optimizer, the frozen table, and the largest sum
of the other tensors at any time of forward and backward pass (`PeakBytes`). It runs on tensors without data, so that
a model of any size can be counted; temporary tensors of the optimizer's own step are left out. Resident memory is the
growth of a fresh process over two real steps; 8-bit AdamW needs bitsandbytes there. "Assembled" is the peak memory of a
process that loads and runs a whole model, relative to the bytes of its weights.
"""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import HfArgumentParser, PreTrainedModel
from transformers.models.llama import modeling_llama

from common import (
    EndToEnd,
    OneBlock,
    Peak,
    PhaseOne,
    commit,
    device_name,
    process_bytes,
    random_text,
    stock_config,
    write_results,
)
from noprop_hf import NoPropConfig, NoPropForCausalLM
from noprop_hf.planning import USABLE, PeakBytes


BUDGET = USABLE * 16e9  # bytes of a T4, a tenth kept free
# Layers, width and heads of GPT-3 (Brown et al. 2020, arXiv 2005.14165, table 2.1) and, between its last two models, of
# OPT (Zhang et al. 2022, arXiv 2205.01068, table 1).
FAMILY = {
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "760M": (24, 1536, 16),
    "1.3B": (24, 2048, 32),
    "2.7B": (32, 2560, 32),
    "6.7B": (32, 4096, 32),
    "13B": (40, 5120, 40),
    "30B": (48, 7168, 56),
    "66B": (64, 9216, 72),
}
FAMILY_VOCABULARY = 50_304
LENGTHS = (128, 1024)  # tokens of a window
SLACK = 1.25  # the bar of a block is SLACK / N plus the shares of table and trunk


# --- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to train a model, with any optimizer.

    Attributes:
        trains: what a device trains at a time: `"all"` weights, a `"group"` of as many layers as a block has or the
            table, the others being frozen (block-coordinate descent as in BAdam, Luo et al. 2024, arXiv 2404.02827,
            with the table as one more group), `"layers"` for the same with a frozen table, a `"shard"` of all, which N
            devices hold together (FSDP), or a `"block"`.
        checkpointing: recompute the activations of a layer in the backward pass.
        in_pieces: for a stock model, compute the loss without holding all logits.
        has_trunk: for a block, read the states of a frozen stock model that is as deep as a block.
    """

    trains: str
    checkpointing: bool = True
    in_pieces: bool = True
    has_trunk: bool = False


PLAIN, CHECKPOINTED, BY_GROUP = Way("all", False, False), Way("all"), Way("group")
BLOCK, CHECKPOINTED_BLOCK, BLOCK_ON_TRUNK = Way("block", False), Way("block"), Way("block", False, has_trunk=True)
METHODS = {
    "end_to_end": (PLAIN, "adamw"),
    "checkpointing": (CHECKPOINTED, "adamw"),
    "checkpointing_adafactor": (CHECKPOINTED, "adafactor"),
    "checkpointing_8bit": (CHECKPOINTED, "8bit"),
    "block_coordinate": (BY_GROUP, "adamw"),
    "block_coordinate_adafactor": (BY_GROUP, "adafactor"),
    "block_coordinate_8bit": (BY_GROUP, "8bit"),
    "fsdp": (Way("shard"), "adamw"),
    "noprop": (BLOCK, "adamw"),
    "noprop_checkpointing": (CHECKPOINTED_BLOCK, "adamw"),
    "noprop_checkpointing_adafactor": (CHECKPOINTED_BLOCK, "adafactor"),
    "noprop_checkpointing_8bit": (CHECKPOINTED_BLOCK, "8bit"),
    "noprop_trunk": (BLOCK_ON_TRUNK, "adamw"),
}
# By what is trained, the groups that need the most memory: the table, the first layers with the longest way back, the
# last with the loss.
GROUPS = {"group": (0, 1, -1), "layers": (1, -1)}
OPTIMIZERS = ("adamw", "adafactor", "8bit")
Parts = dict[str, int]  # bytes by purpose


class LossInPieces(EndToEnd):
    """The stock model with a loss that computes the logits of some positions at a time, again in the backward pass."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = self.model.lm_head.weight
        states = self.model.model(tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        rows = max(1, 2**20 // len(weight))
        with torch.autocast(tokens.device.type, enabled=False):
            options = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=rows)
            return F.linear_cross_entropy(states.to(weight.dtype), weight, tokens[:, 1:].flatten(), options=options)


def groups(model: EndToEnd, size: int) -> Iterator[list[nn.Module]]:
    """Divide a stock model into groups: the table and the last norm, then each `size` layers."""
    inner = model.model.model
    yield [inner.embed_tokens, inner.norm]
    for start in range(0, len(inner.layers), size):
        yield list(inner.layers[start : start + size])


def enable_checkpointing(model: PreTrainedModel) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # 5.22
    enable({"use_reentrant": False})


def halve_frozen(model: nn.Module) -> None:
    """Keep frozen weights in half precision; tied ones stay tied."""
    halves: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if not weight.requires_grad:
                halves.setdefault(weight, nn.Parameter(weight.bfloat16(), requires_grad=False))
                setattr(module, name, halves[weight])


def build(way: Way, config: NoPropConfig, group: int = 0, half: bool = False, phase1: bool = False) -> nn.Module:
    """Create what a method trains on one device.

    Args:
        group: for block-coordinate descent, the index of the trained group.
        half: keep frozen weights of a stock model in half precision.
        phase1: the model of phase 1 instead of a block.
    """
    if way.has_trunk:
        trunk = stock_config(config)
        trunk.num_hidden_layers = config.num_layers_per_block
        config = NoPropConfig(**config.to_diff_dict() | {"trunk_config": trunk.to_dict()})
    if way.trains == "block":
        module: nn.Module = PhaseOne(config) if phase1 else OneBlock(config)
        trained = module.model if phase1 else module.block
    else:
        module = LossInPieces(config) if way.in_pieces else EndToEnd(config)
        trained = module.model
    if way.checkpointing:
        enable_checkpointing(trained)
    if way.trains in GROUPS:
        module.requires_grad_(False)
        for part in list(groups(module, config.num_layers_per_block))[group]:
            part.requires_grad_(True)
        if half:
            halve_frozen(module)
    return module.train()


def new_optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=1e-3)
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=1e-3, foreach=False)
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def state_bytes(name: str, parameters: list[nn.Parameter]) -> int:
    """Compute the bytes of an optimizer's states: moments, or sums of rows and columns, without counts of steps."""
    if name == "adamw":
        return sum(2 * 4 * parameter.numel() for parameter in parameters)
    if name == "adafactor":
        return sum(4 * (sum(p.shape) if p.ndim == 2 else p.numel()) for p in parameters)
    # bitsandbytes: moments of 8 bits with a float32 scale for 256 of them; float32 for small tensors
    return sum(
        2 * (p.numel() + 4 * math.ceil(p.numel() / 256) if p.numel() >= 4096 else 4 * p.numel()) for p in parameters
    )


# --- the count --------------------------------------------------------------------------------------------------------


class DataDependentShapes(TorchDispatchMode):
    """Record the shapes of results that depend on data, or use recorded ones for tensors without data."""

    def __init__(self, recorded: list[torch.Tensor | tuple[torch.Tensor, ...]] | None = None):
        super().__init__()
        self.is_recording, self.results = recorded is None, list(recorded or [])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in (torch.ops.aten.nonzero.default, torch.ops.aten._unique2.default):
            return func(*args, **(kwargs or {}))
        if not self.is_recording:
            return tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype), self.results.pop(0))
        result = func(*args, **(kwargs or {}))
        self.results.append(tree_map_only(torch.Tensor, lambda t: t.to("meta"), result))
        return result


def count(
    way: Way, config: NoPropConfig, tokens: torch.Tensor, half: bool = False, phase1: bool = False
) -> dict[str, Parts]:
    """Count the bytes of training on a device with each optimizer, without allocating weights.

    Args:
        tokens (`(batch, sequence)`): the batch of the device.
        half: run under autocast in half precision.
        phase1: count phase 1 instead of a block.
    """
    recorded = []
    if way.trains == "block":
        sizes = {"hidden_size": 16, "head_dim": 4, "intermediate_size": 16, "correction_size": 16}
        thin = NoPropConfig(**config.to_diff_dict() | sizes | {"num_attention_heads": 4, "num_key_value_heads": 4})
        with DataDependentShapes() as shapes:
            build(replace(way, checkpointing=False), thin, phase1=phase1)(tokens)
        recorded = shapes.results
    shape = tokens.shape
    counts = [count_group(way, config, shape, group, half, phase1, recorded) for group in GROUPS.get(way.trains, (0,))]
    return {name: max((each[name] for each in counts), key=lambda parts: sum(parts.values())) for name in OPTIMIZERS}


def count_group(
    way: Way, config: NoPropConfig, shape: torch.Size, group: int, half: bool, phase1: bool, recorded: list[Any]
) -> dict[str, Parts]:
    """Count the bytes while one group is trained; see [`count`]."""
    # Without data, transformers would not see that no position is masked, and would hold a mask.
    with FakeTensorMode(), patch.object(modeling_llama, "create_causal_mask", return_value=None):
        module = build(way, config, group, half, phase1)
        tokens = torch.zeros(shape, dtype=torch.long)
        # Half precision is bfloat16, as large as float16, which a CPU has fewer functions for. With checkpointing, a
        # cache of half-precision weights would serve no purpose.
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=not way.checkpointing)
        with PeakBytes([module]) as tracker, DataDependentShapes(recorded):
            with autocast:
                loss = module(tokens)
            loss.backward()
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        frozen = sum(parameter.nbytes for parameter in module.parameters() if not parameter.requires_grad)
        parameters, is_block = sum(parameter.nbytes for parameter in trained), way.trains == "block"
        return {
            name: {
                "parameters": parameters + (0 if is_block else frozen),
                "gradients": parameters,
                "optimizer": state_bytes(name, trained),
                "table": frozen if is_block else 0,
                "activations": tracker.peak,
            }
            for name in OPTIMIZERS
        }


def shard(parts: Parts, config: NoPropConfig, devices: int, half: bool = False) -> Parts:
    """Compute the bytes of FSDP on each of some devices, from those of one device with the same windows.

    A device holds its share of parameters, gradients and states, its activations, and one layer or the table as a
    whole, whichever is larger, with its gradient.
    """
    width = config.hidden_size
    layer = 4 * width**2 + 3 * width * config.intermediate_size + 2 * width
    gathered = 2 * (2 if half else 4) * max(layer, config.vocab_size * width)
    shares = {name: math.ceil(size / devices) for name, size in parts.items() if name != "activations"}
    return shares | {"activations": parts["activations"] + gathered}


def count_all(config: NoPropConfig, tokens: torch.Tensor) -> dict[str, Parts]:
    """Count the bytes of every method; FSDP has a device for each block, and they share the batch."""
    counts = {way: count(way, config, tokens) for way in {way for way, _ in METHODS.values()} if way.trains != "shard"}
    own = tokens[: math.ceil(len(tokens) / config.num_blocks)]
    shards = shard(count(CHECKPOINTED, config, own)["adamw"], config, config.num_blocks)
    return {name: counts[way][optim] if way in counts else shards for name, (way, optim) in METHODS.items()}


# --- measurements -----------------------------------------------------------------------------------------------------


@dataclass
class MemoryArguments:
    num_blocks: list[int] = field(default_factory=lambda: [2, 4, 8, 12], metadata={"help": "Blocks."})
    batch_size: int = field(default=16, metadata={"help": "Windows in a batch."})
    max_length: int = field(default=128, metadata={"help": "Tokens in a window."})
    vocab_size: int = field(default=30522, metadata={"help": "Entries of the vocabulary."})
    hidden_size: int = field(default=384, metadata={"help": "Width."})
    num_layers_per_block: int = field(default=3, metadata={"help": "Layers of a block."})
    intermediate_size: int = field(default=1344, metadata={"help": "Width of the feed-forward layers."})
    resident: list[int] = field(
        default_factory=lambda: [4], metadata={"help": "Numbers of blocks for which resident memory is measured."}
    )
    largest: bool = field(default=False, metadata={"help": "Find the largest model on 16 GB instead."})
    family_layers: int = field(default=2, metadata={"help": "With --largest: layers of a block; 1, 2 or 4."})
    results: str | None = field(
        default=None,
        metadata={"help": "Results (benchmarks/results/memory.json, or largest_model.json); a .png goes beside them."},
    )
    small: bool = field(default=False, metadata={"help": "Two blocks of a small shape; the smallest of the family."})

    def __post_init__(self):
        if self.small:
            self.num_blocks, self.resident, self.batch_size, self.max_length = [2], [2], 4, 32
            self.vocab_size, self.hidden_size, self.intermediate_size = 2048, 128, 352
            self.num_layers_per_block = 1
        if self.results is None:
            self.results = f"benchmarks/results/{'largest_model' if self.largest else 'memory'}.json"

    def config(self, num_blocks: int) -> NoPropConfig:
        names = ("vocab_size", "hidden_size", "num_layers_per_block", "intermediate_size")
        return NoPropConfig(num_blocks=num_blocks, **{name: getattr(self, name) for name in names})

    def tokens(self) -> torch.Tensor:
        torch.manual_seed(0)
        return random_text(self.vocab_size, self.batch_size, self.max_length)


def train(name: str, config: NoPropConfig, tokens: torch.Tensor, device: str) -> None:
    """Train by a method for two steps on one batch, on a GPU in float16."""
    way, optim = METHODS[name]
    module = build(way, config, group=1).to(device)  # the first layers, if it has groups
    optimizer = new_optimizer(optim, [parameter for parameter in module.parameters() if parameter.requires_grad])
    is_gpu = device == "cuda"
    scaler = torch.amp.GradScaler(device, enabled=is_gpu)
    for _ in range(2):
        with torch.autocast(device, torch.float16, enabled=is_gpu, cache_enabled=not way.checkpointing):
            loss = module(tokens.to(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def fresh_process() -> Pool:
    """Start a process that has computed nothing, from a server that has imported the packages."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["noprop_hf.planning", "matplotlib.figure", modeling_llama.__name__])
    return context.Pool(1)


def peak(name: str, config: NoPropConfig, tokens: torch.Tensor) -> int:
    """Measure the growth of memory in training: of a fresh process on Linux, or of a GPU's allocator."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = Peak(device)
    train(name, config, tokens, device)
    return measured.bytes()


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


def options(name: str) -> tuple[bool, str]:
    """Return whether a method has checkpointing, and its optimizer."""
    way, optim = METHODS[name]
    return way.checkpointing, optim


def measure(args: MemoryArguments, num_blocks: int) -> list[dict[str, Any]]:
    """Measure every method.

    Returns:
        A row for each method. `ratio` is over plain end-to-end training. For ours, `over_same` is over the best other
        method on one device with the same optimizer and checkpointing, `over_best` over the best of all of them,
        `over_layers` over the best if those that train groups leave the table frozen, as a block does, and
        `phase1_over_best` is phase 1, which trains the table, over the best.
    """
    config, tokens = args.config(num_blocks), args.tokens()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = count_all(config, tokens)
    totals = {name: sum(parts.values()) for name, parts in counts.items()}
    layers = min(sum(parts.values()) for parts in count(Way("layers"), config, tokens).values())
    table_share = 4 * config.vocab_size * config.hidden_size / totals["end_to_end"]
    ways = {way for way, _ in METHODS.values() if way.trains == "block"}
    phase1 = {way: count(way, config, tokens, phase1=True) for way in ways}
    rows = []
    for name, (way, optim) in METHODS.items():
        row: dict[str, Any] = {
            "commit": commit(),
            "method": name,
            "num_blocks": num_blocks,
            "bytes": totals[name],
            **counts[name],
        }
        row |= {"ratio": totals[name] / totals["end_to_end"], "resident": None, "device": device_name(device)}
        runs = num_blocks in args.resident and way.trains != "shard"
        if runs and (optim != "8bit" or find_spec("bitsandbytes")):
            with fresh_process() as pool:
                row["resident"] = pool.apply(peak, (name, config, tokens))
        if way.trains == "block":
            others = {other: each for other, each in METHODS.items() if each[0].trains in ("all", "group")}
            same = [
                o for o, (w, optimizer) in others.items() if (w.checkpointing, optimizer) == (way.checkpointing, optim)
            ]
            row["over_same"] = totals[name] / min(totals[other] for other in same)
            row["over_best"] = totals[name] / min(totals[other] for other in others)
            row["over_layers"] = totals[name] / min(layers, *(totals[other] for other in others))
            row["over_fsdp"] = totals[name] / totals["fsdp"]
            row["phase1_bytes"] = sum(phase1[way][optim].values())
            row["phase1_over_best"] = row["phase1_bytes"] / min(totals[other] for other in others)
        rows.append(row)
    by_name = {row["method"]: row for row in rows}
    noprop, on_trunk = by_name["noprop"], by_name["noprop_trunk"]
    noprop |= {"table_share": table_share, "bar": SLACK / num_blocks + table_share}
    trunk_share = (on_trunk["table"] - noprop["table"]) / totals["end_to_end"]
    on_trunk |= {"trunk_share": trunk_share, "bar": noprop["bar"] + trunk_share}
    if noprop["resident"] is not None:
        noprop["ratio_resident"] = noprop["resident"] / by_name["end_to_end"]["resident"]
    if device.type == "cpu":
        with TemporaryDirectory() as folder, fresh_process() as pool:
            NoPropForCausalLM(config).save_pretrained(folder)
            noprop["ratio_assembled"] = pool.apply(assembled, (folder,))
    return rows


def memory_text(rows: list[dict[str, Any]]) -> str:
    """Format rows of one number of blocks as a table."""
    ratios = ("over_same", "over_best", "over_layers", "over_fsdp", "phase1_over_best")
    lines = [
        f"**{rows[0]['num_blocks']} blocks**",
        "",
        "| method | counted, MB | resident, MB | ratio | same options | best | best, layers | FSDP | phase 1 |",
        "| --- |" + " ---: |" * 8,
    ]
    for row in rows:
        resident = "" if row["resident"] is None else f"{row['resident'] / 1e6:,.0f}"
        over = [f"{row[name]:.2f}" if name in row else "" for name in ratios]
        cells = [f"`{row['method']}`", f"{row['bytes'] / 1e6:,.0f}", resident, f"{row['ratio']:.3f}", *over]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- the largest model on 16 GB ---------------------------------------------------------------------------------------


def family_config(name: str, layers_per_block: int, num_blocks: int | None = None) -> NoPropConfig:
    """Create the configuration of a model of the family, with gated feed-forward layers of as many parameters.

    Args:
        num_blocks: another depth, in blocks.
    """
    layers, width, heads = FAMILY[name]
    return NoPropConfig(
        vocab_size=FAMILY_VOCABULARY,
        hidden_size=width,
        intermediate_size=64 * round(8 * width / 3 / 64),
        num_attention_heads=heads,
        num_blocks=num_blocks or layers // layers_per_block,
        num_layers_per_block=layers_per_block,
    )


def count_deep(way: Way, name: str, layers_per_block: int, length: int, group: int = 0) -> dict[str, Parts]:
    """Count the bytes of training a stock model of the family on one window.

    The count of two depths is continued linearly. Weights grow so; activations may grow faster from some depth on, when
    the loss instead of a layer needs the most, so that this is a lower bound.
    """
    few, more = (
        count_group(way, family_config(name, layers_per_block, n), torch.Size((1, length)), group, True, False, [])
        for n in (2, 3)
    )
    further = family_config(name, layers_per_block).num_blocks - 2
    return {
        optim: {part: size + further * (more[optim][part] - size) for part, size in parts.items()}
        for optim, parts in few.items()
    }


def family_bytes(way: Way, name: str, layers_per_block: int, length: int, devices: int) -> list[dict[str, int]]:
    """Count the bytes of training a model of the family with each optimizer, on one window for each device.

    Returns:
        For each phase of a training: one, or for NoProp a block and phase 1.
    """
    config = family_config(name, layers_per_block)
    if way.trains == "block":
        tokens = random_text(config.vocab_size, 1, length)
        counts = [count(way, config, tokens, half=True, phase1=phase1) for phase1 in (False, True)]
        return [{optim: sum(each[optim].values()) for optim in OPTIMIZERS} for each in counts]
    if way.trains == "shard":
        whole = count_deep(CHECKPOINTED, name, layers_per_block, length)
        counts = [{optim: shard(parts, config, devices, half=True) for optim, parts in whole.items()}]
    else:
        counts = [count_deep(way, name, layers_per_block, length, group) for group in GROUPS.get(way.trains, (0,))]
    return [{optim: max(sum(each[optim].values()) for each in counts) for optim in OPTIMIZERS}]


def largest_models(
    length: int, family: list[str], layers_per_block: int = 2, devices: int = 4
) -> Iterator[dict[str, Any]]:
    """Find the largest model of the family that each method without a trunk trains within `BUDGET`.

    Yields:
        A row for each method, see [`largest`]. For NoProp, phase 1 has to fit as well; the fields that begin with
        `block_` are those of a block alone, for a table that comes from elsewhere.
    """
    for way in dict.fromkeys(way for way, _ in METHODS.values() if not way.has_trunk):
        methods = {method: optim for method, (its_way, optim) in METHODS.items() if its_way == way}
        needs: dict[str, list[dict[str, int]]] = {}
        for name in family:
            needs[name] = family_bytes(way, name, layers_per_block, length, devices)
            if all(needs[name][0][optim] > BUDGET for optim in methods.values()):
                break
        for method, optim in methods.items():
            row = {"commit": commit(), "method": method, "tokens": length, "num_layers_per_block": layers_per_block}
            row |= largest({name: max(phase[optim] for phase in phases) for name, phases in needs.items()})
            if way.trains == "block":
                alone = largest({name: phases[0][optim] for name, phases in needs.items()})
                row |= {f"block_{field}": value for field, value in alone.items()}
            yield row


def largest(needs: dict[str, int]) -> dict[str, Any]:
    """Describe the largest model that fits into `BUDGET`.

    Args:
        needs: bytes of training by model, from small to large.

    Returns:
        Its `parameters` as a stock model (NoProp has more, in the heads of its blocks), or 0 if none fits, its name and
        `bytes`, and `next_bytes` of the first one that does not fit.
    """
    row: dict[str, Any] = {"parameters": 0, "model": None, "bytes": None, "next_bytes": None}
    for name, need in needs.items():
        if need > BUDGET:
            return row | {"next_bytes": need}
        config, (layers, width, _) = family_config(name, 1), FAMILY[name]
        layer = 4 * width**2 + 3 * width * config.intermediate_size + 2 * width
        row |= {"parameters": config.vocab_size * width + layers * layer + width, "model": name, "bytes": need}
    return row


def largest_text(rows: list[dict[str, Any]]) -> str:
    """Format the largest models as a table with a column for each length of windows."""
    lengths = sorted({row["tokens"] for row in rows})
    lines = [
        "| method | " + " | ".join(f"{length:,} tokens | a block alone" for length in lengths) + " |",
        "| --- |" + " ---: |" * 2 * len(lengths),
    ]

    def cell(row: dict[str, Any], prefix: str = "") -> str:
        model = row.get(f"{prefix}model")
        return f"{model} ({row[f'{prefix}bytes'] / 1e9:.1f} GB)" if model else ""

    for method in dict.fromkeys(row["method"] for row in rows):
        own = {row["tokens"]: row for row in rows if row["method"] == method}
        cells = [each for length in lengths for each in (cell(own[length]), cell(own[length], "block_"))]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- plots and files --------------------------------------------------------------------------------------------------


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    blocks = sorted({row["num_blocks"] for row in rows})
    for name, (way, optim) in METHODS.items():
        if optim != "adafactor" or way.trains == "shard":
            sizes = [row["bytes"] / 1e9 for row in rows if row["method"] == name]
            axes.plot(blocks, sizes, "o-" if way.trains == "block" else "s:", label=name)
    axes.set(xlabel="blocks, of as many layers each", ylabel="memory of training, GB", xticks=blocks, yscale="log")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def plot_largest(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(row["method"] for row in rows))
    for number, length in enumerate(lengths):
        own = {row["method"]: row["parameters"] / 1e9 for row in rows if row["tokens"] == length}
        places = [place + number / (len(lengths) + 1) for place in range(len(names))]
        axes.barh(places, [own[name] for name in names], height=1 / (len(lengths) + 1), label=f"{length:,} tokens")
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="billions of parameters on 16 GB")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    (args,) = HfArgumentParser(MemoryArguments, description=__doc__).parse_args_into_dataclasses()
    rows: list[dict[str, Any]] = []
    if args.largest:
        family = [*FAMILY][:1] if args.small else [*FAMILY]
        for length in LENGTHS:
            rows += largest_models(length, family, args.family_layers)
        print(largest_text(rows), flush=True)
    else:
        for num_blocks in args.num_blocks:
            found = measure(args, num_blocks)
            print(memory_text(found) + "\n", flush=True)
            rows += found
    path = Path(args.results)
    write_results(path, rows)
    (plot_largest if args.largest else plot)(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
