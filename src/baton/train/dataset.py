"""Tokenized pairs and the batches made of them."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from baton.errors import DataError
from baton.models.prompts import pad_right, tokenize_prompts
from baton.models.text import IGNORE
from baton.types import Pair


class PairDataset(Dataset):
    """Prompt and response ids of each pair.

    Args:
        pairs: examples with non-empty responses.
        prompt_tokenizer: reads the prompt (the LLM's, where tokenizers differ).
        response_tokenizer: writes the response (the SLM's); its end token is appended.
        limits, truncate: see `tokenize_prompts`: prompts longer than a model allows are refused or cut.
        room: from prompt tokens to the most response tokens that the model has positions for after them; longer
            responses are refused or cut like prompts. None: any length.
        states: optional per-prompt hidden states, indexable by example, each [m, d] (see `handoff.features`).
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        prompt_tokenizer: Any,
        response_tokenizer: Any,
        *,
        limits: Mapping[str, int] = MappingProxyType({}),
        truncate: bool = False,
        room: Callable[[int], int] | None = None,
        states: Any = None,
    ) -> None:
        self.prompts = tokenize_prompts(prompt_tokenizer, [p.prompt for p in pairs], limits, truncate=truncate)
        responses = response_tokenizer([p.response for p in pairs])["input_ids"] if pairs else []
        end = response_tokenizer.eos_token_id
        self.responses = [ids if ids and ids[-1] == end else [*ids, end] for ids in responses]
        self.states = states
        for index, (prompt, response) in enumerate(zip(self.prompts, self.responses, strict=True)):
            most = len(response) if room is None else room(len(prompt))
            if most < 1 or (most < len(response) and not truncate):
                raise DataError(
                    f"pair {index}: after a prompt of {len(prompt)} tokens the model has room for {max(most, 0)}, the "
                    f"response has {len(response)}: shorten it, or cut with --truncate (truncate=True in Python)"
                )
            self.responses[index] = response[:most]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {"prompt": self.prompts[index], "response": self.responses[index]}
        if self.states is not None:
            item["states"] = self.states[index]
        return item

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Sort keys for bucketing: response tokens, then prompt tokens."""
        return [(len(r), len(p)) for p, r in zip(self.prompts, self.responses, strict=True)]


class BlockDataset(PairDataset):
    """Plain text for a decoder-only model, cut into blocks: the first token is the prompt, the others the response.

    Args:
        texts: documents; joined, with `separator` after each.
        length: tokens of a block; what is left over at the end is dropped.
        separator: token id between documents.
    """

    def __init__(self, texts: Sequence[str], tokenizer: Any, *, length: int, separator: int) -> None:
        joined: list[int] = []
        for ids in tokenizer(list(texts))["input_ids"]:
            joined += [*ids, separator]
        blocks = [joined[start : start + length] for start in range(0, len(joined) - length + 1, length)]
        self.prompts = [block[:1] for block in blocks]
        self.responses = [block[1:] for block in blocks]
        self.states = None


class Collator:
    """Right-padded batches: `input_ids`, `attention_mask`, `labels`, and `prompt_states` where cached."""

    def __init__(self, prompt_pad_id: int) -> None:
        self.prompt_pad_id = prompt_pad_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids, mask = pad_right([item["prompt"] for item in items], self.prompt_pad_id)
        labels, _ = pad_right([item["response"] for item in items], IGNORE)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if "states" in items[0]:
            batch["prompt_states"] = torch.nn.utils.rnn.pad_sequence(
                [item["states"] for item in items], batch_first=True
            )
        return batch
