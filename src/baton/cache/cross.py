"""Keys and values over the encoder's states: computed by the first decoder pass, then only read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class CrossCache(Cache):
    """Cross-attention keys and values, with the mask that every decoder pass needs.

    Args:
        num_layers: decoder layers.
        states: [rows, m, d], the encoder's output.
        mask: [rows, 1, 1, m] as the attention takes it: bool, or 0 and a large negative number.
        lengths: per row, how many of the m states are real.
    """

    def __init__(self, num_layers: int, states: Tensor, mask: Tensor, lengths: Sequence[int]) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])
        self.states = states
        self.mask = mask
        self.lengths = list(lengths)

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
        self.lengths = [self.lengths[row] for row in index]
        width = max(self.lengths, default=0)  # the longest prompt may have left
        self.states = self.states[:, :width][index]
        self.mask = self.mask[..., :width][index]
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[:, :, :width][index], layer.values[:, :, :width][index]

    def join(self, other: "CrossCache") -> None:
        """Take the rows of another cache of the same model in, behind the last."""
        width = max(self.states.shape[1], other.states.shape[1])
        self.states = _joined(self.states, other.states, 1, width, 0)
        no = False if self.mask.dtype == torch.bool else torch.finfo(self.mask.dtype).min
        self.mask = _joined(self.mask, other.mask, 3, width, no)
        self.lengths = self.lengths + other.lengths
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.keys = _joined(mine.keys, theirs.keys, 2, width, 0)
            mine.values = _joined(mine.values, theirs.values, 2, width, 0)


def _joined(first: Tensor, second: Tensor, dim: int, width: int, fill: float) -> Tensor:
    """Rows of both, padded to `width` along a dimension."""

    def padded(tensor: Tensor) -> Tensor:
        short = width - tensor.shape[dim]
        if not short:
            return tensor
        shape = [*tensor.shape[:dim], short, *tensor.shape[dim + 1 :]]
        return torch.cat([tensor, tensor.new_full(shape, fill)], dim)

    return torch.cat([padded(first), padded(second)])
