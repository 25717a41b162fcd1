"""Prompt lookup: draft by copying what followed the last similar n-gram.

Source: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding. Lossless: yes. Training: none. Draft cost: ~0.
Helps where the response repeats the prompt or itself (summaries, code edits, retrieval); little elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from baton.draft import NOTHING, Draft
from baton.engine.drafter import Drafter, at_least
from baton.engine.request import Request


@dataclass(frozen=True, kw_only=True)
class PromptLookup(Drafter):
    max_ngram: int = 3  # longest ending of the text that is searched for, tokens
    min_ngram: int = 1  # shortest
    num_draft_tokens: int = 10  # most tokens copied per decode step
    name = "prompt-lookup"
    _indices: "WeakKeyDictionary[Request, _Index]" = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        at_least(self, max_ngram=1, min_ngram=1, num_draft_tokens=1)
        at_least(self, max_ngram=self.min_ngram)

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        return [self._draft(request) for request in requests]

    def _draft(self, request: Request) -> Draft:
        index = self._indices.get(request)
        if index is None:
            index = self._indices[request] = _Index(self.min_ngram, self.max_ngram)
        index.extend(request.context if not index.text else [], request.tokens)
        count = min(self.num_draft_tokens, request.room)
        found = index.continuation(count)
        return Draft.chain(found, self.name) if found else NOTHING


class _Index:
    """Where each n-gram of one growing text was last followed by something. Text is added once, never searched."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self.text: list[int] = []
        self.response = 0  # tokens of the response taken in
        self.after: dict[tuple[int, ...], int] = {}  # n-gram -> place of what followed it last

    def extend(self, prompt: Sequence[int], response: Sequence[int]) -> None:
        for token in (*prompt, *response[self.response :]):
            for size in self.sizes:
                if len(self.text) >= size:
                    self.after[tuple(self.text[-size:])] = len(self.text)
            self.text.append(token)
        self.response = len(response)

    def continuation(self, count: int) -> list[int]:
        """What followed the longest known ending of the text, the last time it stood there."""
        for size in self.sizes:
            place = self.after.get(tuple(self.text[-size:]))
            if place is not None and len(self.text) >= size:
                return self.text[place : place + count]
        return []
