"""The best tokens of rows of logits. On the CPU PyTorch takes longer to find them than a small model to give them."""

import numpy as np
import torch
from torch import Tensor


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each row, [...], and its token, int64 [...]; what is not a number is higher than any."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        found = logits.max(-1)
        return found.values, found.indices
    rows = logits.numpy().reshape(-1, logits.shape[-1])
    tokens = rows.argmax(1)
    values = rows[np.arange(len(tokens)), tokens]
    return torch.from_numpy(values).view(logits.shape[:-1]), torch.from_numpy(tokens).view(logits.shape[:-1])


def top(logits: Tensor, many: int) -> tuple[Tensor, Tensor]:
    """The highest logits of each row, best first, [..., many], and their tokens, int64; fewer where there are fewer."""
    many = min(many, logits.shape[-1])
    if logits.device.type != "cpu" or logits.dtype != torch.float32 or not _loaded():
        found = logits.topk(many)
        return found.values, found.indices
    from baton.runtime.native import kernels

    logits, sizes = logits.contiguous(), (*logits.shape[:-1], many)
    values, tokens = torch.empty(sizes), torch.empty(sizes, dtype=torch.int64)
    width = logits.shape[-1]
    kernels().top(logits.data_ptr(), logits.numel() // width, width, many, values.data_ptr(), tokens.data_ptr())
    return values, tokens


def _loaded() -> bool:
    """Whether a model runs by native layers: without one, nobody waits for a compiler in the middle of a text."""
    from baton.runtime.native import kernels

    return kernels.cache_info().currsize > 0
