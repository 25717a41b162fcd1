"""Draws without replacement, one by one, from what may follow a node of a tree."""

import math

import numpy as np
from torch import Tensor

LEFT = 1e-12  # probability below which rounding decides what can still be drawn


class Urn:
    """Tokens of q, float32 [V] on the CPU.

    Args:
        value: what a draw is worth, in logarithms; later, that of the next one, which counts only when none of those
            before it is accepted. It is known before the draw.
    """

    def __init__(self, q: Tensor, value: float) -> None:
        self.q, self.value, self.count = q, value, 0
        self._weights = q.numpy()
        self._sums = self._weights.cumsum(dtype=np.float64)
        self._left = float(self._sums[-1])
        self._gone: list[int] = []  # ascending

    def draw(self, number: float) -> tuple[int, float] | None:
        """A token, for a number in [0, 1), and what is worth the first one after it; None: there is none left."""
        at = number * self._left
        for token in self._gone:  # as if their weights were no longer part of the sums
            weight = float(self._weights[token])
            if at < self._sums[token] - weight:
                break
            at += weight
        token = int(self._sums.searchsorted(at, side="right"))
        if token >= len(self._sums) or token in self._gone:  # rounding, at the very end
            self.value = -math.inf
            return None
        weight = float(self._weights[token])
        share, after = weight / self._left, self.value
        self._left -= weight
        self._gone = sorted([*self._gone, token])
        self.count += 1
        self.value += math.log1p(-share) if share < 1 and self._left > LEFT else -math.inf
        return token, after + math.log(share)
