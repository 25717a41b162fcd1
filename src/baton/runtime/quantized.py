"""Copies of weights in eight and four bits, as native layers read them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

GROUP = 32  # inputs of a row that share a scale
TOGETHER = 4  # rows that are stored, and multiplied, together
BLOCK = 4 * GROUP  # inputs of a row that are stored together: four to each number of 16 bits
COPY = "baton_copy"  # attribute of a linear layer that has one
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 1.05, 1.1)  # of the scale at which a group's farthest weight is exact


class Int8(NamedTuple):
    """A weight in eight bits: row by row, weight * scale is nearest to what it was."""

    weight: Tensor  # int8 [out, in]
    scales: Tensor  # float32 [out]

    @classmethod
    def of(cls, weight: Tensor) -> "Int8":
        wide = weight.detach().float()
        scales = wide.abs().amax(1).clamp(min=1e-12) / 127
        return cls((wide / scales[:, None]).round().to(torch.int8), scales)

    def dense(self) -> Tensor:
        """What it stands for, float32 [out, in]."""
        return self.weight.float() * self.scales[:, None]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes


class Int4(NamedTuple):
    """A weight in four and a half bits: (level - 8) * scale, with 16 levels and one scale per `GROUP` inputs of a row.

    Args:
        packed: int16 [ceil(out / 4), ceil(in / 128), 144]. Four rows come together. Of each 128 inputs, row by row: 32
            numbers, number i with the levels of inputs i, 32 + i, 64 + i and 96 + i from its low bits up, so that a
            vector of them gives neighbouring inputs at every shift; then the rows' scales in bfloat16, four each.
    """

    packed: Tensor
    rows: int
    width: int

    @classmethod
    def of(cls, weight: Tensor) -> "Int4":
        """Levels from -8 to 7, so the weight that is farthest from 0 lies on -8 and gives the scale its sign. Of some
        scales near that one, the one is taken that leaves the least squared error: clipping one weight a little
        often pays for the 31 others.
        """
        rows, width = weight.shape
        wide = F.pad(weight.detach().float(), (0, -width % BLOCK, 0, -rows % TOGETHER))
        groups = wide.view(len(wide), -1, GROUP)
        farthest = groups.gather(2, groups.abs().argmax(2, keepdim=True)) / -8
        best, least = torch.zeros_like(farthest), torch.full_like(farthest, torch.inf)
        for factor in FACTORS:
            scales = (farthest * factor).bfloat16().float()
            error = (_levels(groups, scales) * scales - groups).square_().sum(2, keepdim=True)
            best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
        shape = (len(wide) // TOGETHER, TOGETHER, -1, 4, GROUP)  # [.., rows, blocks, groups, inputs]
        levels = (_levels(groups, best).int() + 8).view(shape)
        numbers = sum(levels[:, :, :, place] << 4 * place for place in range(4))
        assert isinstance(numbers, Tensor)
        scales16 = best.bfloat16().view(torch.int16).view(shape[:4])
        parts = (part.transpose(1, 2).flatten(2) for part in (numbers.to(torch.int16), scales16))
        return cls(torch.cat(list(parts), 2).contiguous(), rows, width)

    def dense(self) -> Tensor:
        """What it stands for, float32 [out, in]."""
        over, blocks, _ = self.packed.shape
        numbers, scales = self.packed.split((TOGETHER * GROUP, TOGETHER * 4), 2)
        numbers = numbers.int().view(over, blocks, TOGETHER, 1, GROUP)
        levels = (numbers >> torch.arange(0, 16, 4)[:, None]) & 15
        wide = (levels - 8) * scales.contiguous().view(torch.bfloat16).float().view(over, blocks, TOGETHER, 4, 1)
        return wide.transpose(1, 2).reshape(over * TOGETHER, -1)[: self.rows, : self.width]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


def matrix_of(layer: Any) -> Tensor:
    """The weight of a linear layer, or of GPT-2's, which keeps it the other way: [out, in]."""
    weight: Tensor = layer.weight
    return weight.T if type(layer) is Conv1D else weight


def copy_of(layer: Any) -> Int8 | Int4 | None:
    """What a runtime reads instead of a linear layer's weight."""
    found: Int8 | Int4 | None = getattr(layer, COPY, None)
    return found


def _levels(groups: Tensor, scales: Tensor) -> Tensor:
    """The nearest of -8 to 7, float32; of groups that are all 0, any: their scale is 0."""
    return (groups / torch.where(scales == 0, 1.0, scales)).round_().clamp_(-8, 7)
