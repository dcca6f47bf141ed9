"""Encode the context with several blocks side by side, with the same result as block by block.

Independent blocks read the same context and do not depend on one another. So everything between the linear layers of a
decoder layer (norms, rotary positions, the cache, attention, residual sums) but the activation is computed for all
blocks at once. The linear layers themselves are called as modules, one by one (or, if a layer is nothing but its
weight, computed from the present weight): adapters, quantization and changed weights act on them as elsewhere, and no
weight is copied or moved. Hooks on linear layers may depend on the order of the calls: with such hooks, blocks run one
by one.

The forward passes of the modules around the linear layers are bypassed. [`find_layers`] checks that they are those of
`modeling_llama.py` and [`ContextEncoder`]: with a hook, a patch or another class, blocks run one by one.
`tests/test_side_by_side.py` compares both ways.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from .cache_noprop import BlockCache, GrowingLayer, write


def stock(*functions: Callable) -> list[Callable]:
    """Select the functions whose code is that of torch or transformers.

    Patches and kernels may have replaced them before this module is imported, since the code of a model directory is
    imported late.
    """
    roots = tuple(str(Path(library.__file__).parent) for library in (torch, transformers))
    codes = [getattr(function, "__code__", None) for function in functions]
    return [
        function
        for function, code in zip(functions, codes, strict=True)
        if code is not None and code.co_filename.startswith(roots)
    ]


# The forward passes that `_encode` replaces.
LLAMA_FORWARDS: Mapping[type, Callable] = {
    cls: cls.forward
    for cls in (LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, SiLUActivation)
    if stock(cls.forward)
}
MODULE_CALLS = stock(nn.Module.__call__, LlamaDecoderLayer.__call__)
# Hooks on every module; torch has a function for this check since 2.7 only.
GLOBAL_HOOKS = tuple(f"_global_{way}_{kind}" for way in ("forward", "backward") for kind in ("hooks", "pre_hooks"))
PLAIN_LINEAR: Mapping[type, Callable] = {cls: cls.forward for cls in (nn.Linear,) if stock(cls.forward)}
ATTENTION_FUNCTIONS = stock(sdpa_attention_forward, modeling_llama.eager_attention_forward)

# Maximum tokens times blocks at once. On a CPU, larger activations fall out of the processor's cache; on other devices
# the limit bounds memory.
ROWS_AT_ONCE = {"cpu": 2**9}
ROWS_AT_ONCE_ELSEWHERE = 2**15

# Rows and weights for which a product is spread over the threads of a CPU (see `product`).
FEW_ROWS = 2**6
LARGE_WEIGHT = 2**17


def is_unchanged(module: nn.Module, forwards: Mapping[type, Callable]) -> bool:
    """Check whether calling a module runs the forward pass that `forwards` lists for its class, and nothing else."""
    state, forward = module.__dict__, forwards.get(type(module))
    return (
        forward is not None
        and type(module).forward is forward
        and type(module).__call__ in MODULE_CALLS
        and not any(getattr(torch_module, name) for name in GLOBAL_HOOKS)
        and "forward" not in state  # accelerate and peft replace it on the instance
        and not state["_forward_hooks"]
        and not state["_forward_pre_hooks"]
        and not state["_backward_hooks"]
        and not state["_backward_pre_hooks"]
        and state.get("_compiled_call_impl") is None
    )


def has_hooks(module: nn.Module) -> bool:
    """Check whether a module or one of its submodules has forward hooks."""
    parts = (module,) if type(module) is nn.Linear else module.modules()
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


class LayerModules(NamedTuple):
    """The modules of a decoder layer, so that each is looked up once."""

    attention: LlamaAttention
    projections: tuple[nn.Module, nn.Module, nn.Module]
    output: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module
    activation: nn.Module
    input_norm: LlamaRMSNorm
    output_norm: LlamaRMSNorm


def find_layers(
    blocks: Sequence[nn.Module], forwards: Mapping[type, Callable], cache: Any, kwargs: Mapping[str, Any]
) -> list[tuple[LayerModules, ...]] | None:
    """Collect the layers of blocks for [`encode_side_by_side`], if its result is that of the blocks one by one.

    Args:
        blocks: the blocks; `forwards` must list their class and that of their encoders.
        forwards: the forward passes that may be bypassed, by class.
        cache: the key-value cache; several blocks at once can fill only a [`BlockCache`].
        kwargs: further arguments of the layers. Any argument that is set could affect the layers and rules out the
            bypass, except for `output_hidden_states` and the like when false.

    Returns:
        For every layer of a block, the modules of that layer in each block; None if blocks must run one by one.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if any(value is not None for name, value in kwargs.items() if value is not False or not name.startswith("output_")):
        return None
    if cache is not None and not (
        type(cache) is BlockCache and all(type(layer) is GrowingLayer for layer in cache.layers)
    ):
        return None
    config = blocks[0].encoder.config
    if config._attn_implementation not in ("sdpa", "eager"):
        return None
    if _attention_function(config) not in ATTENTION_FUNCTIONS:
        return None
    layers_by_block, kinds = [], []
    for block in blocks:
        encoder = block.encoder
        if not (is_unchanged(block, forwards) and is_unchanged(encoder, forwards)):
            return None
        if not is_unchanged(encoder.norm, forwards) or has_hooks(encoder.input_projection):
            return None
        layers = [layer for layer in (_find_modules(layer, forwards, config) for layer in encoder.layers) if layer]
        if len(layers) < len(encoder.layers):
            return None
        if cache is not None and any(layer.attention.layer_idx >= len(cache.layers) for layer in layers):
            return None
        layers_by_block.append(layers)
        kinds.append((encoder.norm.variance_epsilon, *(_kind(layer) for layer in layers)))
    return list(zip(*layers_by_block, strict=True)) if kinds.count(kinds[0]) == len(kinds) else None


def _find_modules(layer: nn.Module, forwards: Mapping[type, Callable], config: Any) -> LayerModules | None:
    """Collect the modules of a layer; None if a module between its linear layers was changed."""
    if not is_unchanged(layer, forwards):
        return None
    attention, mlp, input_norm, output_norm = (
        layer.self_attn,
        layer.mlp,
        layer.input_layernorm,
        layer.post_attention_layernorm,
    )
    between = (attention, mlp, input_norm, output_norm)
    if not all(is_unchanged(module, forwards) for module in between) or attention.training:
        return None
    if attention.config is not config:
        return None
    activation = mlp.act_fn
    if not is_unchanged(activation, forwards):
        return None
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    others = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if any(map(has_hooks, (*projections, *others))):
        return None
    return LayerModules(
        attention,
        projections,
        *others,
        activation,
        input_norm,
        output_norm,
    )


def _width(linear: nn.Module) -> int:
    """Return the number of features of a linear layer, which pruning may reduce; a unique number if it is unknown."""
    weight = linear._parameters.get("weight") if type(linear) is nn.Linear else None
    return getattr(linear, "out_features", id(linear)) if weight is None else len(weight)


def _kind(layer: LayerModules) -> tuple:
    """Return the properties that layers of several blocks must share to be computed at once."""
    attention = layer.attention
    return (
        *(_width(linear) for linear in layer.projections),
        attention.head_dim,
        attention.scaling,
        attention.num_key_value_groups,
        attention.is_causal,
        layer.input_norm.variance_epsilon,
        layer.output_norm.variance_epsilon,
    )


def _attention_function(config: Any) -> Callable:
    return ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation, modeling_llama.eager_attention_forward)


def encode_side_by_side(
    encoders: Sequence[nn.Module],
    layers: Sequence[tuple[LayerModules, ...]],
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    cache: BlockCache | None = None,
    last_only: bool = False,
) -> torch.Tensor:
    """Map clean embeddings `(batch, sequence, hidden_size)` to the context states of all encoders.

    Args:
        layers: the result of [`find_layers`] for the blocks of these encoders.
        attention_mask, position_embeddings: the results of [`ContextEncoder.attention_inputs`].
        last_only: return at least the states of the last position. The last layer, a large part of a block, skips the
            other positions if it can.

    Returns:
        Context states `(num_blocks, batch, sequence, hidden_size)`.
    """
    rows = inputs_embeds.shape[0] * inputs_embeds.shape[1]
    step = max(1, ROWS_AT_ONCE.get(inputs_embeds.device.type, ROWS_AT_ONCE_ELSEWHERE) // rows)
    if last_only:
        last_only = len(layers) > 0 and all(_takes_tokens_one_by_one(layer) for layer in layers[-1])
    states = [
        _encode(
            encoders,
            layers,
            slice(first, first + step),
            inputs_embeds,
            attention_mask,
            position_embeddings,
            cache,
            last_only,
        )
        for first in range(0, len(encoders), step)
    ]
    return torch.cat(states) if len(states) > 1 else states[0]


def _takes_tokens_one_by_one(layer: LayerModules) -> bool:
    """Check whether a layer's result for a token after attention is independent of the other tokens of the call."""
    return all(is_plain_linear(module) for module in (layer.output, layer.gate, layer.up, layer.down))


def _encode(
    encoders: Sequence[nn.Module],
    layers: Sequence[tuple[LayerModules, ...]],
    group: slice,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    cache: BlockCache | None,
    last_only: bool,
) -> torch.Tensor:
    """Compute the context states of a group of encoders.

    The reference is [`ContextEncoder.forward`] with `LlamaDecoderLayer.forward`.
    """
    batch, length, width = inputs_embeds.shape
    attention_function = _attention_function(encoders[0].config)
    is_spread = batch * length <= FEW_ROWS and width * encoders[0].config.intermediate_size >= LARGE_WEIGHT
    call = _call_plain if is_spread else _call
    # Scaled again for each block, since a module may change its input in place.
    states = _stack([call(encoder.input_projection, inputs_embeds / width**0.5) for encoder in encoders[group]])
    count = len(states)
    if attention_mask is not None and attention_mask.shape[1] > 1:  # one mask per head
        attention_mask = attention_mask.repeat(1, count, 1, 1)
    for all_layers in layers:
        group_layers = all_layers[group]
        first = group_layers[0].attention
        normed = _norm(states, [layer.input_norm for layer in group_layers])
        query, key, value = (
            _concatenate([call(linear, rows) for linear, rows in zip(linears, normed, strict=True)])  # of all blocks
            .view(batch, length, -1, first.head_dim)
            .transpose(1, 2)
            for linears in zip(*(layer.projections for layer in group_layers), strict=True)
        )
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            cached = [cache.layers[layer.attention.layer_idx] for layer in all_layers]
            key, value = write(cached, key, value, group.start, count)
        if last_only and all_layers is layers[-1]:
            states, query, length = states[:, :, -1:], query[:, :, -1:], 1
            attention_mask = None if attention_mask is None else attention_mask[:, :, -1:]
        mixed, _ = attention_function(first, query, key, value, attention_mask, dropout=0.0, scaling=first.scaling)
        del query, key, value  # frees memory for the feed-forward layer
        mixed = mixed.reshape(batch, length, count, -1).permute(2, 0, 1, 3).contiguous()
        states = states + _stack([call(layer.output, rows) for layer, rows in zip(group_layers, mixed, strict=True)])
        normed = _norm(states, [layer.output_norm for layer in group_layers])
        states = states + _stack(
            [_feed_forward(layer, rows, call) for layer, rows in zip(group_layers, normed, strict=True)]
        )
    return _norm(states, [encoder.norm for encoder in encoders[group]])


def _feed_forward(layer: LayerModules, rows: torch.Tensor, call: Callable) -> torch.Tensor:
    """Compute `LlamaMLP.forward`, without a further tensor for the product."""
    gate, up = layer.activation(call(layer.gate, rows)), call(layer.up, rows)
    return call(layer.down, gate.mul_(up) if gate.dtype == up.dtype else gate * up)


def is_plain_linear(module: nn.Module) -> bool:
    """Check whether a module is an unchanged linear layer, so that its weight may be used directly."""
    return is_unchanged(module, PLAIN_LINEAR) and type(module.weight) is nn.Parameter


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `F.linear` with several threads of a CPU, where torch uses one thread if `rows` are few.

    The rows of a large weight are split between the threads. Measured with two threads: 1.3 to 1.8 times as fast for 1
    to 32 rows and weights of 384 x 384 and more.
    """
    num_rows = rows.numel() // rows.shape[-1]
    is_spread = rows.device.type == "cpu" and num_rows <= FEW_ROWS and weight.numel() >= LARGE_WEIGHT
    if not is_spread or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(rows, weight, bias)
    parts = math.gcd(weight.shape[0], torch.get_num_threads())
    if parts == 1 or rows.dtype != weight.dtype or torch.is_autocast_enabled("cpu") or not weight.is_contiguous():
        return F.linear(rows, weight, bias)
    shares = weight.view(parts, -1, weight.shape[1]).transpose(1, 2)
    outputs = torch.bmm(rows.reshape(num_rows, rows.shape[-1]).expand(parts, -1, -1), shares)
    outputs = outputs.transpose(0, 1).reshape(*rows.shape[:-1], weight.shape[0])
    return outputs if bias is None else outputs + bias


def _call_plain(linear: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Call a linear layer, or compute the same by [`product`] if the layer is nothing but its weight."""
    if is_plain_linear(linear) and linear.bias is None:
        return product(rows, linear.weight)
    return linear(rows)


def _call(linear: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return linear(rows)


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _concatenate(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors, -1) if len(tensors) > 1 else tensors[0]


def _norm(states: torch.Tensor, norms: Sequence[nn.Module]) -> torch.Tensor:
    """Compute `LlamaRMSNorm.forward` of each block on its part of `(num_blocks, batch, sequence, hidden_size)`."""
    normed = F.rms_norm(states.float(), states.shape[-1:], eps=norms[0].variance_epsilon)
    return _stack([norm.weight for norm in norms])[:, None, None] * normed.to(states.dtype)
