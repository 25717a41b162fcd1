"""Logits to processed distribution to token: the only place that knows temperature and its kin.

Filters mean what transformers' logits processors mean, in the same order (repetition penalty, logit bias,
temperature, top-k, top-p, min-p), in float32 whatever the model's dtype.

Randomness is keyed, not streamed: the draw for a token depends on (seed, request, purpose, position) and on nothing
else, so a text does not depend on its batch, on the batch size, or on how many tokens a step yields.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from baton.types import Sampling


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of seen tokens divided by `penalty` where positive, multiplied where negative (arXiv:1909.05858).

    Args:
        logits: float32 [n, V]; seen: bool [n, V], True for tokens already in the context.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def bias(logits: Tensor, biases: Iterable[tuple[int, float]]) -> Tensor:
    """Float32 logits [n, V] with a number added to those of some tokens."""
    tokens, values = zip(*biases, strict=True)
    where = torch.tensor(tokens, device=logits.device)
    return logits.index_add(
        -1, where, torch.tensor(values, dtype=logits.dtype, device=logits.device).expand(len(logits), -1)
    )


def distribution(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The distribution that a token is drawn from, after all filters.

    Args:
        logits: [n, V], any floating dtype; -inf for tokens that must not appear.
        seen: bool [n, V], needed where there is a repetition penalty.
    Returns: float32 [n, V], rows sum to 1; one-hot rows when greedy.
    """
    scores = logits.float()
    if sampling.repetition_penalty != 1:
        assert seen is not None
        scores = penalize(scores, seen, sampling.repetition_penalty)
    if sampling.logit_bias:
        scores = bias(scores, sampling.logit_bias)
    if sampling.greedy:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        worst = scores.topk(sampling.top_k).values[..., -1:]
        scores = scores.masked_fill(scores < worst, -torch.inf)  # ties with the k-th stay
    if sampling.top_p < 1:
        ascending, order = scores.sort()
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        tail[..., -1] = False  # the best token always stays
        scores = scores.masked_fill(tail.scatter(-1, order, tail), -torch.inf)
    probs = scores.softmax(-1)
    if sampling.min_p > 0:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def uniform(seed: int, request: int, purpose: str, position: int) -> float:
    """A number in [0, 1), the same on every machine for the same key. 52 bits.

    Args:
        request: index of the request in its call; purpose: what the number is for, so that two uses never share one;
        position: index of the token in the response.
    """
    digest = hashlib.blake2b(f"{seed}/{request}/{purpose}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 12) * 2.0**-52


def draw(probs: Tensor, uniforms: Iterable[float]) -> Tensor:
    """One token per row: the first whose cumulative probability exceeds the row's uniform number.

    Args:
        probs: float32 [n, V]; uniforms: n numbers in [0, 1).
    Returns: int64 [n]. Tokens of probability 0 are never drawn.
    """
    # In float32, the tail of a large vocabulary would round away.
    cumulative = probs.double().cumsum(-1)
    targets = torch.tensor(list(uniforms), dtype=cumulative.dtype, device=probs.device)[:, None]
    return torch.searchsorted(cumulative, targets * cumulative[:, -1:], right=True)[:, 0]
