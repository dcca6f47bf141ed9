"""Parts that benchmarks share. Importing it needs torch and transformers only, since `gpu.py` runs without more."""

import ctypes
import gc
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation import BaseStreamer

from noprop_hf import DenoisingBlock, NoPropConfig, NoPropForCausalLM, NoPropForPreTraining, modeling_noprop
from noprop_hf.modeling_noprop import TokenTable, new_trunk, sampled_candidates
from noprop_hf.noise_noprop import standardize
from results import current_commit


SHAPES = {
    "demo": {
        "vocab_size": 4096,
        "hidden_size": 128,
        "num_blocks": 4,
        "num_layers_per_block": 2,
        "num_attention_heads": 4,
        "intermediate_size": 352,
    },
    "t4": {},  # the defaults of the configuration
}
LONG = 10  # seconds of a run after which no repeat is measured


# --- models and text --------------------------------------------------------------------------------------------------


class OneBlock(nn.Module):
    """The last block of a model, with its frozen table."""

    def __init__(self, config: NoPropConfig):
        super().__init__()
        self.block = DenoisingBlock(config, config.num_blocks - 1)
        self.table = TokenTable(config)
        self.table.weight.copy_(standardize(torch.randn_like(self.table.weight)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.block(tokens, tokens, self.table).loss


class PhaseOne(nn.Module):
    """The model of phase 1, with its trunk if it has one, and its loss."""

    def __init__(self, config: NoPropConfig):
        super().__init__()
        self.model, self.trunk = NoPropForPreTraining(config), new_trunk(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, labels=tokens, trunk=self.trunk).loss


class EndToEnd(nn.Module):
    """A stock model as deep as all blocks together, with a learned and tied table and its own loss."""

    def __init__(self, config: NoPropConfig):
        super().__init__()
        self.model = LlamaForCausalLM(stock_config(config))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, labels=tokens, use_cache=False).loss


class SampledEndToEnd(EndToEnd):
    """The same with the softmax of the blocks, over the tokens that the batch predicts."""

    def __init__(self, config: NoPropConfig):
        super().__init__(config)
        self.register_buffer("log_prior", torch.zeros(config.vocab_size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        candidates, targets, correction = sampled_candidates(tokens[:, 1:].flatten(), self.log_prior)
        # One look-up for input and output: two would add up two gradients of the size of the table.
        rows = self.model.model.embed_tokens(torch.cat([tokens.flatten(), candidates]))
        inputs, outputs = rows.split([tokens.numel(), len(candidates)])
        states = self.model.model(inputs_embeds=inputs.view(*tokens.shape, -1), use_cache=False).last_hidden_state
        logits = F.linear(states[:, :-1].flatten(0, 1), outputs).float() + correction
        return F.cross_entropy(logits, targets)


KINDS: dict[str, Callable[[NoPropConfig], nn.Module]] = {"block": OneBlock, "end_to_end": EndToEnd}


def stock_config(config: NoPropConfig, **options: Any) -> LlamaConfig:
    """Create a stock configuration of the same sizes, as deep as all blocks together.

    Args:
        options: further arguments of [`LlamaConfig`].
    """
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        tie_word_embeddings=True,
        **options,
    )


def stock_model(config: NoPropConfig, **options: Any) -> LlamaForCausalLM:
    """Create a stock model as deep as all blocks together, with as many parameters, by wider feed-forward layers.

    Args:
        options: further arguments of [`LlamaConfig`].
    """
    stock = stock_config(config, **options)
    with torch.device("meta"):
        missing = num_parameters(NoPropForCausalLM(config)) - num_parameters(LlamaForCausalLM(stock))
    stock.intermediate_size += round(missing / (3 * stock.num_hidden_layers * stock.hidden_size))
    return LlamaForCausalLM(stock)


def num_parameters(model: PreTrainedModel) -> int:
    """Count all parameters, including the frozen table; tied ones count once."""
    table = model.model.embed_tokens.weight
    return model.num_parameters() + (0 if isinstance(table, nn.Parameter) else table.numel())


def models(config: NoPropConfig, device: torch.device) -> dict[str, PreTrainedModel]:
    """Create our model, and a stock model as deep and with as many parameters."""
    torch.manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    length = config.max_position_embeddings
    stock = stock_model(config, max_position_embeddings=length, bos_token_id=None, eos_token_id=None)
    pair = {"ours": NoPropForCausalLM(config), "stock": stock}
    return {name: model.to(device, dtype).eval() for name, model in pair.items()}


def random_text(vocab_size: int, *shape: int) -> torch.Tensor:
    """Sample tokens by Zipf's law, since the number of distinct tokens in a batch sets the cost of its softmax."""
    frequencies = 1 / torch.arange(1, vocab_size + 1)
    return torch.multinomial(frequencies, math.prod(shape), replacement=True).view(shape)


# --- steps of training ------------------------------------------------------------------------------------------------


class Training:
    """A model of [`KINDS`] with its optimizer, trained in steps like those of `Trainer`.

    The optimizer is AdamW, under autocast unless `precision` is float32, with scaled losses in float16.

    Args:
        precision: the precision of autocast.
        max_grad_norm: norm to which gradients are clipped; None for no clipping.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: torch.dtype = torch.float32,
        learning_rate: float = 1e-3,
        max_grad_norm: float | None = None,
    ):
        device_type = next(model.parameters()).device.type
        self.model, self.max_grad_norm = model, max_grad_norm
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, learning_rate, fused=True)
        self.scaler = torch.amp.GradScaler(device_type, enabled=precision == torch.float16)
        self.autocast = torch.autocast(device_type, precision, enabled=precision != torch.float32)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the loss of a batch of tokens `(batch, sequence)`, in nats."""
        with self.autocast:
            return self.model(tokens)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Train on a batch of tokens `(batch, sequence)`, and return the loss, a tensor on the device."""
        loss = self.loss(tokens)
        self.scaler.scale(loss).backward()
        if self.max_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss.detach()


# --- time and memory of generation ------------------------------------------------------------------------------------


def one_by_one() -> AbstractContextManager:
    """Run blocks one after the other, as for models with a replaced module."""
    return patch.object(modeling_noprop, "find_layers", lambda *args: None)


class Clock(BaseStreamer):
    """Record the time of every generated token."""

    def __init__(self):
        self.marks: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.marks.append(time.perf_counter())

    def end(self) -> None:
        pass


def generate(model: PreTrainedModel, prompts: torch.Tensor, count: int, **options: Any) -> dict[str, float]:
    """Measure the seconds to the first token, and from there to the last.

    Args:
        options: further arguments of the model's `generate`.
    """
    clock = Clock()
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=count,
        min_new_tokens=count,
        pad_token_id=0,
        streamer=clock,
        **options,
    )
    prompt, first, *_, last = clock.marks  # the prompt is put first
    return {"first": first - prompt, "others": last - first}


def score(model: PreTrainedModel, texts: torch.Tensor, tokens_at_a_time: int = 4096) -> None:
    """Compute the nats of texts, in batches as in an evaluation."""
    for rows in texts.split(max(1, tokens_at_a_time // texts.shape[1])):
        model(rows, labels=rows, use_cache=False).loss.item()


def seconds(compute: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    compute()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    found: dict[str, PreTrainedModel], prompts: torch.Tensor, new_tokens: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Measure generation and scoring with each kind of model.

    Returns:
        By kind: the shortest times, in seconds, and the smallest memory peak of generation, without the weights.
    """
    device = found["ours"].device
    kinds = {"ours": "ours", "one_by_one": "ours", "stock": "stock"}
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(repeats + 1):
        for kind, name in kinds.items():
            model = found[name]
            with one_by_one() if kind == "one_by_one" else nullcontext():
                give_back_memory()
                peak = Peak(device.type)
                taken = generate(model, prompts, 1 + new_tokens) | {"peak_bytes": peak.bytes()}
                runs[kind].append(taken | {"scoring": seconds(partial(score, model, prompts), device)})
        if len(runs["stock"]) > 1 and sum(runs["stock"][0][job] for job in ("first", "others", "scoring")) > LONG:
            break
    return {kind: {job: min(run[job] for run in own[1:]) for job in own[0]} for kind, own in runs.items()}


# --- the machine and the files ----------------------------------------------------------------------------------------


class Peak:
    """Peak memory above that in use when the object is created.

    Measures the allocator on a GPU, and the resident memory of the process on Linux; elsewhere, the peak is 0.
    """

    def __init__(self, device: str):
        self.device, self.before = device, 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = process_bytes("VmRSS")

    def bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.before
        return process_bytes("VmHWM") - self.before if sys.platform == "linux" else 0


def process_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def give_back_memory() -> None:
    """Return freed memory to the operating system, since reusing it would hide a peak."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread(s)"


@cache
def commit() -> str | None:
    """Return the commit that the running benchmark is of, as [`current_commit`] at the first call."""
    return current_commit(Path(sys.argv[0]).resolve())


def write_results(path: Path, figures: Any) -> None:
    """Write figures, each with its `commit`, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")


def measured_once(path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read figures from a file or, if it does not exist, measure them on one thread and write it with the commit."""
    if path.is_file():
        return {"commit": None} | json.loads(path.read_text())
    from datasets import disable_progress_bars

    torch.set_num_threads(1)
    disable_progress_bars()
    figures = {"commit": commit(), **measure()}
    write_results(path, figures)
    print(f"{path}: {json.dumps(figures)}", flush=True)
    return figures
