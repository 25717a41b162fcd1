"""Mix: several drafters in one tree, which knows of every node who proposed it.

Source: the fusion of RASD, arXiv 2503.03434, for any number of drafters. Lossless: yes. Training: none. Draft cost:
the sum of theirs. Helps where a text is copied here, repeated there and new elsewhere.
What was proposed by each, for each depth and rank (or the drafter's own confidence, where it has one), is compared with
what was written, so scores of different drafters become probabilities of one kind; the most probable nodes are kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from baton.draft import NOTHING, ROOT, Draft
from baton.drafters.table import bare, make, split
from baton.engine.drafter import Drafter, Joined, Seen, at_least
from baton.engine.request import Request
from baton.errors import UnknownOption

if TYPE_CHECKING:
    from baton.engine.loop import Engine

DEEPEST, WORST = 6, 7  # beyond which depths, and ranks, are counted together
PRIOR, WEIGHT = 0.35, 2.0  # what is expected of a first candidate before any was seen, and how many that counts for

Odds = dict[tuple[int, int, int], tuple[float, float]]  # (drafter, depth, rank or confidence) -> times right, times


@dataclass(kw_only=True)
class Mix(Drafter):
    of: str = "prompt-lookup+token-recycling"  # methods joined by +, in brackets where they have options
    num_draft_tokens: int = 24  # nodes of the tree
    name = "mix"

    def __post_init__(self) -> None:
        at_least(self, num_draft_tokens=1)
        self.drafters = [make(bare(spec)) for spec in split(bare(self.of), "+")]
        if drawing := [drafter.name for drafter in self.drafters if drafter.draws]:
            raise UnknownOption(f"mix: {drawing[0]} draws its drafts, which leaves no room for others beside them")
        self._odds: WeakKeyDictionary[Request, Odds] = WeakKeyDictionary()
        self._proposed: list[list[Draft]] = []  # by drafter, the latest

    def attach(self, engine: "Engine") -> None:
        for drafter in self.drafters:
            drafter.attach(engine)
        self.layers = frozenset().union(*(drafter.layers for drafter in self.drafters))

    def join(self, joined: Joined) -> None:
        for drafter in self.drafters:
            drafter.join(joined)

    def select(self, rows: Sequence[int]) -> None:
        for drafter in self.drafters:
            drafter.select(rows)
        self._proposed = []  # of other rows

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        self._proposed = []
        for drafter in self.drafters:
            self._proposed.append(drafter.propose(requests))
            if drafter.begun is not None:
                raise UnknownOption(f"mix: {drafter.name} drafts inside the target, and cannot share a tree")
        merged = []
        for row, request in enumerate(requests):
            odds = self._odds.setdefault(request, {})
            drafts = [
                _scored(drafts[row], number, odds) for number, drafts in enumerate(self._proposed) if drafts[row].tokens
            ]
            merged.append(
                reduce(Draft.merge, drafts).prune(request.nodes(self.num_draft_tokens)) if drafts else NOTHING
            )
        return merged

    def observe(self, seen: Seen) -> None:
        for row, (request, draft, verdict) in enumerate(zip(seen.requests, seen.drafts, seen.verdicts, strict=True)):
            if verdict is None:
                continue
            written = [*(draft.tokens[node] for node in verdict.accepted), verdict.token]
            for number, drafts in enumerate(self._proposed):
                _count(drafts[row], number, written, self._odds[request])
        for drafter in self.drafters:
            drafter.observe(seen)


def _kind(draft: Draft, number: int, node: int, rank: int) -> tuple[int, int, int]:
    """What a node is compared with: those of the same drafter and depth, and like rank or confidence."""
    if draft.scores:
        parent = draft.tree.parents[node]
        surprise = (draft.scores[parent] if parent != ROOT else 0.0) - draft.scores[node]
        rank = int(min(WORST, max(0.0, 2 * surprise)))
    return number, min(DEEPEST, draft.tree.depths[node]), min(WORST, rank)


def _scored(draft: Draft, number: int, odds: Odds) -> Draft:
    """The draft with log probabilities that its paths are accepted."""
    scores = [0.0] * len(draft)
    for parent in range(ROOT, len(draft)):
        for rank, node in enumerate(draft.tree.children(parent)):
            kind = _kind(draft, number, node, rank)
            right, times = odds.get(kind, (0.0, 0.0))
            chance = (right + WEIGHT * PRIOR / (1 + kind[2])) / (times + WEIGHT)
            scores[node] = math.log(chance) + (scores[parent] if parent != ROOT else 0.0)
    return replace(draft, scores=scores)


def _count(draft: Draft, number: int, written: Sequence[int], odds: Odds) -> None:
    """Compare a draft with what was written, as far as it knew what to compare."""
    at = ROOT
    for token in written:
        found = None
        for rank, node in enumerate(draft.tree.children(at)):
            right, times = odds.get(kind := _kind(draft, number, node, rank), (0.0, 0.0))
            hit = draft.tokens[node] == token
            odds[kind] = (right + hit, times + 1)
            found = node if hit else found
        if found is None:
            break
        at = found
