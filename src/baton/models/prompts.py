"""The one place where prompts become token ids: for training, transformers' `generate` and our engine alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from baton.errors import PromptError

NO_LIMIT = 10**9  # tokenizers record "unlimited" as a number near 1e30


def prompt_limit(config: Any, tokenizer: Any = None) -> int | None:
    """Most prompt tokens a model can read, or None: its position table and its tokenizer's recorded maximum decide.

    Args:
        config: a transformers configuration; tokenizer: the one that encodes this model's prompts, if it has its own.
    """
    known = [
        getattr(config, "max_position_embeddings", None),
        getattr(config, "n_positions", None),
        getattr(tokenizer, "model_max_length", None),
    ]
    limits = [int(limit) for limit in known if limit is not None and 0 < limit < NO_LIMIT]
    return min(limits, default=None)


def tokenize_prompts(
    tokenizer: Any, prompts: Sequence[str], limits: Mapping[str, int], *, truncate: bool = False
) -> list[list[int]]:
    """Token ids of each prompt, special tokens included, never padded.

    Args:
        limits: name of a model -> most prompt tokens it can read; all of them hold.
        truncate: cut longer prompts to the smallest limit, keeping an end token that the tokenizer adds,
            instead of raising.
    Raises:
        PromptError: a prompt is empty (0-based index in the message), or longer than a limit.
    """
    if not prompts:
        return []
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise PromptError(f"prompt {index} is empty: give it some text")
    # verbose=False: the tokenizer's own warning about length would repeat, less well, the error below.
    encoded: list[list[int]] = tokenizer(list(prompts), verbose=False)["input_ids"]
    smallest = min(limits.values(), default=None)
    for index, ids in enumerate(encoded):
        if not ids:
            raise PromptError(f"prompt {index} has no tokens: {prompts[index][:40]!r}")
        if smallest is None or len(ids) <= smallest:
            continue
        if not truncate:
            allowed = ", ".join(f"{name} reads at most {limit}" for name, limit in limits.items())
            raise PromptError(
                f"prompt {index} has {len(ids)} tokens, {allowed}: shorten it, or cut prompts with --truncate "
                "(truncate=True in Python)"
            )
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id}
        encoded[index] = ids[: smallest - 1] + ids[-1:] if ids[-1] in ends else ids[:smallest]
    return encoded


def pad_right(
    rows: Sequence[Sequence[int]], pad_id: int = 0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Token lists to `ids` and `mask`, int64 [b, m]; each row has at least one token."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def same_tokenizer(first: Any, second: Any) -> bool:
    """Whether two tokenizers give the same ids, special tokens included."""
    if first is second:
        return True
    probe = "Baton: Größe 123, naïve — 東京!"
    return first.get_vocab() == second.get_vocab() and first(probe)["input_ids"] == second(probe)["input_ids"]
