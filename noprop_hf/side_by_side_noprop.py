"""The encoders of several blocks side by side, as one function with the encoders one by one.

Independent blocks read the same context and do not depend on one another. So everything between the linear layers of a
decoder layer (norms, rotary positions, the cache, attention, activation, residual sums) is computed for all blocks at
once. The linear layers themselves are called as the modules they are, one by one: adapters, hooks, quantization and
changed weights act on them as they do elsewhere, and no weight is copied or moved.

What is bypassed are the forward passes of the modules around them. They are those of `modeling_llama.py` and
[`ContextEncoder`], to which [`can_run_side_by_side`] holds them: with a hook, a patch or another class, blocks run one
by one. `tests/test_side_by_side.py` compares both ways.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from .cache_noprop import BlockCache, write


# The forward passes that `_decoder_layers` stands for.
LLAMA_FORWARDS: Mapping[type, Callable] = {
    cls: cls.forward for cls in (LlamaDecoderLayer, LlamaAttention, LlamaMLP, LlamaRMSNorm, SiLUActivation)
}
ATTENTION_FUNCTIONS = (sdpa_attention_forward, modeling_llama.eager_attention_forward)

# Maximum tokens times blocks at once. On a CPU, larger activations fall out of the processor's cache; on other devices
# the limit bounds memory.
ROWS_AT_ONCE = {"cpu": 2**9}
ROWS_AT_ONCE_ELSEWHERE = 2**15


def is_unchanged(module: nn.Module, forwards: Mapping[type, Callable]) -> bool:
    """Whether calling a module runs the forward pass of its class that `forwards` names, and nothing else."""
    state, forward = module.__dict__, forwards.get(type(module))
    return (
        forward is not None
        and type(module).forward is forward
        and "forward" not in state  # as accelerate and peft replace it
        and not state["_forward_hooks"]
        and not state["_forward_pre_hooks"]
        and state.get("_compiled_call_impl") is None
    )


def can_run_side_by_side(
    blocks: Sequence[nn.Module], forwards: Mapping[type, Callable], cache: Any, kwargs: Mapping[str, Any]
) -> bool:
    """Whether [`encode_side_by_side`] computes what calling the blocks one by one does.

    Args:
        blocks: the blocks; `forwards` must name their class and that of their encoders.
        forwards: the forward passes that may be bypassed, by class.
        cache: only a [`BlockCache`] can be filled by several blocks at once.
        kwargs: further arguments of the layers; any that is set may mean something to them.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return False
    if any(value is not None and value is not False for value in kwargs.values()):
        return False
    if cache is not None and type(cache) is not BlockCache:
        return False
    config = blocks[0].encoder.config
    if config.context_source != "embeddings" or config._attn_implementation not in ("sdpa", "eager"):
        return False
    if _attention_function(config) not in ATTENTION_FUNCTIONS:
        return False
    first = blocks[0].encoder
    return all(
        is_unchanged(block, forwards)
        and is_unchanged(block.encoder, forwards)
        and _norm_like(block.encoder.norm, first.norm, forwards)
        and len(block.encoder.layers) == len(first.layers)
        and all(_layer_like(*layers, forwards) for layers in zip(block.encoder.layers, first.layers, strict=True))
        for block in blocks
    )


def _layer_like(layer: nn.Module, first: nn.Module, forwards: Mapping[type, Callable]) -> bool:
    """Whether a layer differs from the one of the first block in its weights only."""
    if not (is_unchanged(layer, forwards) and is_unchanged(layer.mlp, forwards)):
        return False
    attention, other = layer.self_attn, first.self_attn
    return (
        is_unchanged(attention, forwards)
        and is_unchanged(layer.mlp.act_fn, forwards)
        and _norm_like(layer.input_layernorm, first.input_layernorm, forwards)
        and _norm_like(layer.post_attention_layernorm, first.post_attention_layernorm, forwards)
        and attention.config is other.config
        and (attention.head_dim, attention.scaling, attention.num_key_value_groups, attention.is_causal)
        == (other.head_dim, other.scaling, other.num_key_value_groups, other.is_causal)
        and not (attention.training and attention.attention_dropout)
    )


def _norm_like(norm: nn.Module, first: nn.Module, forwards: Mapping[type, Callable]) -> bool:
    return is_unchanged(norm, forwards) and norm.variance_epsilon == first.variance_epsilon


def _attention_function(config: Any) -> Callable:
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, modeling_llama.eager_attention_forward)


def encode_side_by_side(
    encoders: Sequence[nn.Module],
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    cache: BlockCache | None = None,
    last_only: bool = False,
) -> torch.Tensor:
    """Clean embeddings `(batch, sequence, hidden_size)` to the context states of all encoders, `(num_blocks, batch,
    sequence, hidden_size)`.

    Args:
        attention_mask, position_embeddings: as [`ContextEncoder`] makes them for its layers.
        last_only: only the states of the last position are needed: the last layer, a large part of a block, leaves out
            the others where it can.
    """
    rows = inputs_embeds.shape[0] * inputs_embeds.shape[1]
    step = max(1, ROWS_AT_ONCE.get(inputs_embeds.device.type, ROWS_AT_ONCE_ELSEWHERE) // rows)
    if last_only:
        last_only = all(_takes_tokens_one_by_one(encoder.layers[-1]) for encoder in encoders)
    groups = [encoders[first : first + step] for first in range(0, len(encoders), step)]
    states = [
        _encode(group, index * step, encoders, inputs_embeds, attention_mask, position_embeddings, cache, last_only)
        for index, group in enumerate(groups)
    ]
    return torch.cat(states) if len(states) > 1 else states[0]


def _takes_tokens_one_by_one(layer: nn.Module) -> bool:
    """Whether what a layer makes of a token after its attention does not depend on which others it is called with, for
    the modules and for any hook on them."""
    linear = {nn.Linear: nn.Linear.forward}
    return all(
        is_unchanged(module, linear)
        for module in (layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
    )


def _encode(
    encoders: Sequence[nn.Module],
    first_index: int,
    all_encoders: Sequence[nn.Module],
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    cache: BlockCache | None,
    last_only: bool,
) -> torch.Tensor:
    """The context states of a group of encoders, which begins at `first_index` of all; see [`ContextEncoder.forward`]
    and `LlamaDecoderLayer.forward` for what is computed."""
    config, count = encoders[0].config, len(encoders)
    batch, length, width = inputs_embeds.shape
    attention_function = _attention_function(config)
    scaled = inputs_embeds / width**0.5
    states = _stack([encoder.input_projection(scaled) for encoder in encoders])
    for index, layers in enumerate(zip(*(encoder.layers for encoder in encoders), strict=True)):
        attentions, mlps = [layer.self_attn for layer in layers], [layer.mlp for layer in layers]
        normed = _norm(states, [layer.input_layernorm for layer in layers])
        query, key, value = (
            _stack([projection(rows) for projection, rows in zip(projections, normed, strict=True)])
            .view(count, batch, length, -1, attentions[0].head_dim)
            .permute(1, 0, 3, 2, 4)
            .flatten(1, 2)  # the heads of all blocks
            for projections in zip(*((a.q_proj, a.k_proj, a.v_proj) for a in attentions), strict=True)
        )
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            cached = [cache.layers[encoder.layers[index].self_attn.layer_idx] for encoder in all_encoders]
            key, value = write(cached, key, value, first_index, count)
        if last_only and index == len(encoders[0].layers) - 1:
            states, query, length = states[:, :, -1:], query[:, :, -1:], 1
            attention_mask = None if attention_mask is None else attention_mask[:, :, -1:]
        mixed, _ = attention_function(
            attentions[0], query, key, value, attention_mask, dropout=0.0, scaling=attentions[0].scaling
        )
        mixed = mixed.reshape(batch, length, count, -1).permute(2, 0, 1, 3).contiguous()
        states = states + _stack([a.o_proj(rows) for a, rows in zip(attentions, mixed, strict=True)])
        normed = _norm(states, [layer.post_attention_layernorm for layer in layers])
        gate = _stack([mlp.gate_proj(rows) for mlp, rows in zip(mlps, normed, strict=True)])
        up = _stack([mlp.up_proj(rows) for mlp, rows in zip(mlps, normed, strict=True)])
        hidden = mlps[0].act_fn(gate).mul_(up)
        states = states + _stack([mlp.down_proj(rows) for mlp, rows in zip(mlps, hidden, strict=True)])
    return _norm(states, [encoder.norm for encoder in encoders])


def _stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def _norm(states: torch.Tensor, norms: Sequence[nn.Module]) -> torch.Tensor:
    """`LlamaRMSNorm.forward` of each block on its part of `(num_blocks, batch, sequence, hidden_size)`."""
    normed = F.rms_norm(states.float(), states.shape[-1:], eps=norms[0].variance_epsilon)
    return _stack([norm.weight for norm in norms])[:, None, None] * normed.to(states.dtype)
