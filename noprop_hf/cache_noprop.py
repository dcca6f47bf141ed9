"""A key-value cache with the interface of transformers, which blocks that run side by side can fill at once."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class SharedMemory:
    """Keys and values of several layers side by side, `(batch, heads of all layers, capacity, head_dim)` each.

    New tokens are written in place, while a stock layer copies all its tokens for every new one. Each place belongs to
    one layer.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, num_layers: int, heads_per_layer: int, length: int):
        """Reserve memory of the type and device of `keys` and `values` for `length` tokens and a quarter more."""
        capacity = length + length // 4 + 16
        self.keys, self.values = (
            states.new_empty(states.shape[0], num_layers * heads_per_layer, capacity, states.shape[-1])
            for states in (keys, values)
        )
        self.heads_per_layer = heads_per_layer

    def heads(self, first: int, count: int = 1) -> slice:
        """Select the heads of `count` layers."""
        return slice(first * self.heads_per_layer, (first + count) * self.heads_per_layer)

    def can_take(self, keys: torch.Tensor, values: torch.Tensor, end: int) -> bool:
        """Check whether these keys and values can be written in place, up to token `end`."""
        return (
            end <= self.keys.shape[2]
            and keys.shape[0] == self.keys.shape[0]
            and (keys.dtype, values.dtype, keys.device) == (self.keys.dtype, self.values.dtype, self.keys.device)
            and self.keys.is_inference() <= torch.is_inference_mode_enabled()
        )


class GrowingLayer(DynamicLayer):
    """A [`DynamicLayer`] whose keys and values can lie in memory with room to grow, shared with other layers.

    Its interface is that of the stock layer: `keys` and `values` hold the layer's own tokens, and may be replaced.
    """

    def __init__(self, *args, **kwargs):
        self.memory: SharedMemory | None = None
        self.place = 0  # of this layer in the memory
        self.length = 0  # tokens of this layer in the memory
        self.tensors: dict[str, torch.Tensor | None] = {}
        super().__init__(*args, **kwargs)

    def __copy__(self) -> "GrowingLayer":
        """Copy the layer. Afterwards neither the layer nor its copy writes into the shared memory."""
        self.tensors, self.memory = {"keys": self.keys, "values": self.values}, None
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, tensors=dict(self.tensors))
        return other

    @property
    def keys(self) -> torch.Tensor | None:
        return self.tensors["keys"] if self.memory is None else self._view(self.memory.keys)

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._replace("keys", keys)

    @property
    def values(self) -> torch.Tensor | None:
        return self.tensors["values"] if self.memory is None else self._view(self.memory.values)

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._replace("values", values)

    def _view(self, states: torch.Tensor) -> torch.Tensor:
        assert self.memory is not None
        return states[:, self.memory.heads(self.place), : self.length]

    def _replace(self, name: str, states: torch.Tensor | None) -> None:
        if self.memory is not None:
            self.tensors = {"keys": self.keys, "values": self.values}
            self.memory = None
        self.tensors[name] = states

    def get_seq_length(self, *args) -> int:
        return super().get_seq_length(*args) if self.memory is None else self.length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_plain = type(key_states) is type(value_states) is torch.Tensor  # not a quantized tensor, for example
        # Autograd needs the tensors that it saved, which a write in place would change.
        if not is_plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        return write([self], key_states, value_states)

    def move(self, memory: SharedMemory, place: int) -> None:
        """Copy keys and values of this layer to its place in another memory.

        Raises:
            ValueError: if the memory is for another batch size.
        """
        length = self.get_seq_length()
        if length > 0:
            assert self.keys is not None and self.values is not None
            if len(self.keys) != len(memory.keys):
                raise ValueError(
                    f"The cache holds {len(self.keys)} sequences, but the batch has {len(memory.keys)}: use "
                    "`cache.batch_repeat_interleave` or `cache.batch_select_indices` to make them equal."
                )
            heads = memory.heads(place)
            memory.keys[:, heads, :length], memory.values[:, heads, :length] = self.keys, self.values
        self.memory, self.place, self.length, self.tensors = memory, place, length, {}


def write(
    layers: Sequence[GrowingLayer],
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int = 0,
    count: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append keys and values to layers that lie side by side.

    Args:
        layers: all layers that share memory, with the same number of tokens each.
        keys, values (`(batch, count * heads, sequence, head_dim)`): the keys and values to append.
        first, count: the layers to append to: `count` layers from `first` on; all layers by default.

    Returns:
        All keys and values of these `count` layers, `(batch, count * heads, all tokens, head_dim)` each.
    """
    count = len(layers) if count is None else count
    written = layers[first : first + count]
    begin = written[0].get_seq_length()
    end = begin + keys.shape[-2]
    for layer in layers:
        if not layer.is_initialized:
            DynamicLayer.update(layer, keys[:, :0, :0], values[:, :0, :0])
    memory = written[0].memory
    if not (
        memory is not None
        and memory.can_take(keys, values, end)
        and all(
            layer.memory is memory and layer.place == place and layer.length == begin
            for place, layer in enumerate(written, written[0].place)
        )
    ):
        memory = SharedMemory(keys, values, len(layers), keys.shape[1] // count, end)
        for place, layer in enumerate(layers):
            layer.move(memory, place)
    heads = memory.heads(written[0].place, count)
    memory.keys[:, heads, begin:end], memory.values[:, heads, begin:end] = keys, values
    for layer in written:
        layer.length = end
    if begin == 0:
        return keys, values
    return memory.keys[:, heads, :end], memory.values[:, heads, :end]


class BlockCache(DynamicCache):
    """A [`DynamicCache`] of [`GrowingLayer`]s: those of the router, if there is one, then of block 0, block 1, ..."""

    layers: list[Any]

    def __init__(self, *args, **kwargs):
        """Create a cache from the arguments of [`DynamicCache`]."""
        super().__init__(*args, **kwargs)
        stock_layers = self.layers
        self.layers = [GrowingLayer() for _ in stock_layers]
        for layer, stock_layer in zip(self.layers, stock_layers, strict=True):
            if stock_layer.is_initialized:
                DynamicLayer.update(layer, stock_layer.keys, stock_layer.values)


__all__ = ["BlockCache"]
