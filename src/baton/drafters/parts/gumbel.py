"""Draws without replacement, many at once: the largest of randomly perturbed probabilities, in order.

Source: arXiv 1903.06059 (Gumbel-top-k, stochastic beam search). log q + Gumbel(0) is log(q / E) with E ~ Exp(1), so
noise is kept as E: it costs one logarithm less per token, and noise of 1 gives the most probable tokens instead.
"""

import math

import numpy as np
import torch
from torch import Tensor

from baton.engine.request import Request
from baton.sampling import uniform


def noise(request: Request, level: int, rows: int, size: int) -> Tensor:
    """float64 [rows, size] of Exp(1) on the CPU, the request's own at this step and level of its draft."""
    place = len(request.tokens) + level
    number = uniform(request.sampling.seed, request.key, f"draft/{len(request.steps)}", place)
    drawn = np.random.default_rng(int(number * 2**52)).standard_exponential((rows, size))
    return torch.from_numpy(drawn).clamp_(min=1e-300)  # zero would make a token of probability 0 not a number


def gumbel_top_k(q: Tensor, count: int, noise: Tensor) -> list[list[tuple[int, float]]]:
    """Per row, tokens in the order of their draws, each with its log q + Gumbel(0).

    Args:
        q: float32 [n, V]; count: draws, fewer where q has fewer tokens.
        noise: float64 [n, V] of Exp(1); rows of 1 give the most probable tokens with their log q.
    """
    best = (q.double() / noise.to(q.device)).topk(min(count, q.shape[-1]))
    values, tokens = best.values.log().tolist(), best.indices.tolist()
    return [
        [(token, value) for token, value in zip(*row, strict=True) if value > -math.inf]  # nor what is not a number
        for row in zip(tokens, values, strict=True)
    ]


def conditioned(perturbed: float, best: float, bound: float) -> float:
    """A Gumbel variable, given that the largest of its siblings, `best`, has the value `bound`.

    It keeps the order. In logarithms: -log(exp(-bound) - exp(-best) + exp(-perturbed)) would lose small differences.
    """
    gap = -math.expm1(perturbed - best)
    if gap <= 0:  # it is the largest
        return bound
    rest = bound - perturbed + math.log(gap)
    return bound - max(rest, 0.0) - math.log1p(math.exp(-abs(rest)))
