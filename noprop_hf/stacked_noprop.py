"""The blocks side by side: layer l of all of them computed as one.

Independent blocks read the same context and do not depend on one another. So a layer's products are batched over the
blocks, and its attention is one call over the heads of all of them. The cache then holds `num_layers_per_block` layers
with the heads of all blocks, in the order of the blocks.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward


# Of a layer: what is read together is one product.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
    ("input_layernorm",),
    ("post_attention_layernorm",),
)


# Tokens times blocks that one product takes. More, and on a CPU what a layer makes for all blocks drops out of the
# processor's cache, so that going on by block is faster; elsewhere it is a matter of memory.
ROWS_AT_ONCE = {"cpu": 2**9}
ROWS_AT_ONCE_ELSEWHERE = 2**15


class GrowingLayer(DynamicLayer):
    """Keys and values with room to grow, so that a new token is written and not all before it copied, as they are in
    the stock layer. Where the stock layer has put other tensors in their place (beam search does), it begins anew."""

    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.rooms = {"keys": key_states.new_empty(0), "values": value_states.new_empty(0)}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin = self.get_seq_length()
        self.keys = self._append("keys", self.keys, key_states, begin)
        self.values = self._append("values", self.values, value_states, begin)
        return self.keys, self.values

    def fill(self, key_states: torch.Tensor, value_states: torch.Tensor, heads: slice, num_heads: int) -> None:
        """Put some of the heads into a layer that is empty but for other heads of the same tokens."""
        new = {"keys": key_states, "values": value_states}
        end = key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.rooms = {name: _room(states, num_heads) for name, states in new.items()}
            self.keys, self.values = (self.rooms[name][:, :, :end] for name in new)
        for name, states in new.items():
            self.rooms[name][:, heads, :end] = states

    def _append(self, name: str, kept: torch.Tensor, new: torch.Tensor, begin: int) -> torch.Tensor:
        room, end = self.rooms[name], begin + new.shape[-2]
        is_view = begin > 0 and kept.data_ptr() == room.data_ptr() and kept.shape[:2] == room.shape[:2]
        if not is_view or end > room.shape[-2]:
            room = self.rooms[name] = _room(new, new.shape[1], end)
            if begin > 0:
                room[:, :, :begin] = kept
        room[:, :, begin:end] = new
        return room[:, :, :end]


def _room(states: torch.Tensor, num_heads: int, length: int | None = None) -> torch.Tensor:
    """Memory for keys or values of so many tokens, and for some more."""
    length = states.shape[-2] if length is None else length
    return states.new_empty(states.shape[0], num_heads, length + length // 4 + 16, states.shape[-1])


class CachePart:
    """The heads of some blocks in a new cache, for a group of blocks that is computed by itself."""

    def __init__(self, cache: Cache, heads: slice, num_heads: int):
        self.cache, self.heads, self.num_heads = cache, heads, num_heads

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.cache.layers[layer_idx].fill(key_states, value_states, self.heads, self.num_heads)
        return key_states, value_states


class StackedBlocks:
    """The weights of some blocks, stacked. The blocks' own parameters become views of them, so nothing is held twice.

    Args:
        blocks: independent [`DenoisingBlock`]s of one configuration, for which [`can_be_stacked`] holds.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        encoders = [block.encoder for block in blocks]
        self.config = encoders[0].config
        self.first_layers = list(encoders[0].layers)  # whose attention modules say what the attention functions ask
        self.input_projection = _stack([[encoder.input_projection] for encoder in encoders])
        self.layers = [
            [_stack([[layer.get_submodule(name) for name in group] for layer in layers]) for group in GROUPS]
            for layers in zip(*(encoder.layers for encoder in encoders), strict=True)
        ]
        self.norm = _stack([[encoder.norm] for encoder in encoders])
        self.readout = _stack([[block.head.readout] for block in blocks])
        self.correction = [_stack([[block.head.correction[index]] for block in blocks]) for index in (0, 2)]
        self.correction_bias = _stack([[block.head.correction[0]] for block in blocks], "bias")
        self.bias = _stack([[block.head] for block in blocks], "bias")
        self.activation = ACT2FN[self.config.hidden_act]
        self._pointers = [parameter.data_ptr() for parameter in _first_parameters(blocks)]

    def belong_to(self, blocks: Sequence[nn.Module]) -> bool:
        """Whether the blocks still have these weights: moving or loading them may have given them others."""
        return self._pointers == [parameter.data_ptr() for parameter in _first_parameters(blocks)]

    def encode(
        self,
        inputs_embeds: torch.Tensor,
        num_blocks: int,
        cache: Cache | None = None,
        **inputs,
    ) -> torch.Tensor:
        """Clean embeddings `(batch, sequence, hidden_size)` to the context states of the first `num_blocks` blocks,
        `(num_blocks, batch, sequence, hidden_size)`.

        Args:
            inputs: `attention_mask` and `position_embeddings` of the layers; and `last_only`, if only the states of the
                last position are asked for: the last layer, a large part of a block, then leaves out the others.
        """
        rows = inputs_embeds.shape[0] * inputs_embeds.shape[1]
        in_groups = cache is None
        if cache is not None and type(cache) is DynamicCache and cache.get_seq_length() == 0 and not cache.offloading:
            cache.layers = [GrowingLayer() for _ in self.layers]
            in_groups = True
        limit = ROWS_AT_ONCE.get(inputs_embeds.device.type, ROWS_AT_ONCE_ELSEWHERE)
        step = max(1, limit // rows) if in_groups else num_blocks
        groups = [slice(first, min(first + step, num_blocks)) for first in range(0, num_blocks, step)]
        if len(groups) == 1:
            return self._encode(inputs_embeds, groups[0], cache, **inputs)
        states, heads = [], self.config.num_key_value_heads
        for group in groups:
            own = slice(group.start * heads, group.stop * heads)
            part = None if cache is None else CachePart(cache, own, num_blocks * heads)
            states.append(self._encode(inputs_embeds, group, part, **inputs))
        return torch.cat(states)

    def _encode(
        self,
        inputs_embeds: torch.Tensor,
        group: slice,
        cache: Cache | CachePart | None,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        last_only: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """The context states of a group of blocks, all products batched over them."""
        batch, length, width = inputs_embeds.shape
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        count = group.stop - group.start
        rows = (inputs_embeds / width**0.5).flatten(0, 1).expand(count, -1, -1)
        states = _products(rows, self.input_projection[group])
        for index, (first, weights) in enumerate(zip(self.first_layers, self.layers, strict=True)):
            into_attention, out_of_attention, into_mlp, out_of_mlp, norm1, norm2 = (w[group] for w in weights)
            module = first.self_attn
            heads, key_heads = self.config.num_attention_heads, self.config.num_key_value_heads
            projected = _products(self._norm(states, norm1), into_attention)
            projected = projected.view(count, batch, length, heads + 2 * key_heads, module.head_dim)
            query, key, value = (
                part.flatten(1, 2)  # the heads of all blocks
                for part in projected.permute(1, 0, 3, 2, 4).split([heads, key_heads, key_heads], dim=2)
            )
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            if cache is not None:
                key, value = cache.update(key, value, index)
            if last_only and index == len(self.layers) - 1:
                states, query, length = states.view(count, batch, length, width)[:, :, -1], query[:, :, -1:], 1
                attention_mask = None if attention_mask is None else attention_mask[:, :, -1:]
            mixed, _ = attention(
                module, query, key, value, attention_mask, dropout=0.0, scaling=module.scaling, **kwargs
            )
            mixed = mixed.reshape(batch * length, count, -1).transpose(0, 1)
            states = torch.baddbmm(states, mixed, out_of_attention.transpose(1, 2))
            gate, up = _products(self._norm(states, norm2), into_mlp).chunk(2, dim=-1)
            states = torch.baddbmm(states, first.mlp.act_fn(gate).mul_(up), out_of_mlp.transpose(1, 2))
        return self._norm(states, self.norm[group]).view(count, batch, length, width)

    def mean_answer(self, context: torch.Tensor) -> torch.Tensor:
        """What the blocks say on pure noise, on their mean: context states `(num_blocks, batch, sequence, hidden_size)`
        to `(batch, sequence, hidden_size)`."""
        width, states = context.shape[-1], context.flatten(1, 2)
        into, out, readout = (weights[: len(context)] for weights in (*self.correction, self.readout))
        hidden = _products(states, into[..., :width]) + self.correction_bias[: len(context), None]
        answers = _products(states, readout) + _products(self.activation(hidden), out)
        return (answers.mean(0) / width**0.5).view(context.shape[1:])

    def _norm(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(states.float(), states.shape[-1:], eps=self.config.rms_norm_eps)
        return normed.to(states.dtype) * weight[:, None]


def can_be_stacked(blocks: Sequence[nn.Module]) -> bool:
    """Whether the blocks are independent, their layers plain and their weights at hand (no adapters, no quantization,
    nothing offloaded)."""
    config = blocks[0].config
    if config.context_source != "embeddings" or config.attention_bias or config.mlp_bias:
        return False
    plain = (nn.Linear, LlamaRMSNorm, *{type(block.head) for block in blocks})
    for block in blocks:
        for module in block.modules():
            own = list(module.parameters(recurse=False))
            if own and not (isinstance(module, plain) and all(type(parameter) is nn.Parameter for parameter in own)):
                return False
    devices = {parameter.device for block in blocks for parameter in block.parameters()}
    return len(devices) == 1 and devices.pop().type != "meta"


def _products(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`(num_blocks, tokens, in)` times `(num_blocks, out, in)`."""
    return torch.bmm(states, weights.transpose(1, 2))


def _stack(modules: Sequence[Sequence[nn.Module]], name: str = "weight") -> torch.Tensor:
    """Parameters of a group of modules of each block, `(num_blocks, rows of the group, ...)`; they become its views."""
    parameters = [[getattr(module, name) for module in group] for group in modules]
    stacked = torch.stack([torch.cat([parameter.detach() for parameter in group]) for group in parameters])
    for rows, group in zip(stacked, parameters, strict=True):
        for part, parameter in zip(rows.split([len(parameter) for parameter in group]), group, strict=True):
            parameter.data = part
    return stacked


def _first_parameters(blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [block.encoder.input_projection.weight for block in blocks]
