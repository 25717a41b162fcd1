"""Keys and values over the encoder's states: computed by the first decoder pass, then only read."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class CrossCache(Cache):
    """Cross-attention keys and values, with the mask that every decoder pass needs.

    Args:
        num_layers: decoder layers.
        states: [rows, m, d], the encoder's output; mask: [rows, 1, 1, m] as the attention takes it, or None.
    """

    def __init__(self, num_layers: int, states: Tensor, mask: Tensor | None) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])
        self.states = states
        self.mask = mask

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by stock attention code, once per layer."""
        layer = self.layers[layer_idx]
        layer.keys, layer.values, layer.is_initialized = key_states, value_states, True
        return key_states, value_states

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named twice."""
        index = list(rows)
        self.states = self.states[index]
        if self.mask is not None:
            self.mask = self.mask[index]
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[index], layer.values[index]
