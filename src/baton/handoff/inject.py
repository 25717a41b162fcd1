"""Inject: put Z into the model that writes. Here, into its prompt embeddings; other places are siblings of these."""

from collections.abc import Callable

import torch
from torch import Tensor

from baton.models.text import join_rows

# (E [b, m, d], Z [b, m, d], mask [b, m]) -> (F [b, m', d], mask [b, m'])
Inject = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def add(embeds: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """F = E + Z: the SLM keeps its own meaning of each token, enriched. The paper's recommendation."""
    return embeds + z, mask


def replace(embeds: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """F = Z: the SLM's prompt embeddings are not used."""
    return z, mask


def concatenate(embeds: Tensor, z: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """F = [Z ; E] along the prompt, row by row without gaps: twice the prompt length."""
    doubled = torch.arange(2 * mask.shape[1], device=mask.device)[None] < 2 * mask.sum(1, keepdim=True)
    return join_rows(z, mask, embeds), doubled.to(mask.dtype)


def prefix(embeds: Tensor, learned: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """F = [P ; E] with k learned vectors [k, d], the same for every prompt: prompt tuning (arXiv 2104.08691)."""
    front = learned.expand(len(embeds), -1, -1)
    return torch.cat([front, embeds], 1), torch.cat([mask.new_ones(front.shape[:2]), mask], 1)


INJECT: dict[str, Inject] = {"add": add, "replace": replace, "concatenate": concatenate}
