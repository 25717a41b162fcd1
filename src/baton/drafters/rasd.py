"""RASD: one draft from what a drafter proposes and what a corpus holds, the second judged by the first.

Source: arXiv 2503.03434; the search is REST's, arXiv 2311.08252. Lossless: yes. Training: the drafter's. Draft cost:
the drafter's, and REST's. Helps where a drafter is far from its training data and a corpus is near: documents, a code
base, in-house text.

1. The drafter drafts; what it thinks of the next token is at hand then, without another pass.
2. Beginnings retrieved from the corpus are scored: the drafter's probability of the first token, times the part of
   the matches that goes on so. The best are kept; a branch whose first token the drafter excludes is not.
3. Both trees become one, equal beginnings once, and the best-scored nodes are verified.

The paper leaves the scores below the first token and the budgets open: those here are our reading. Where the drafter
gives no distribution (look-ups), counts alone decide; where it drafts nothing, this is REST, with the whole budget.
Nodes of a drafter that gives no scores come first. A node that both found counts as the drafter's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from baton.draft import ROOT, Draft
from baton.drafters.rest import Rest
from baton.drafters.table import make
from baton.engine.drafter import Joined, Seen, at_least
from baton.engine.request import Request
from baton.errors import DraftError, UnknownOption

if TYPE_CHECKING:
    from baton.engine.loop import Engine

CANDIDATES = 64  # nodes that are retrieved, as REST does, before the drafter judges them


@dataclass(kw_only=True)
class Rasd(Rest):
    base: str = ""  # the drafter, as text, in brackets where it has options itself: [draft-model:model=DIR,branches=4]
    num_draft_tokens: int = 64  # nodes of the fused tree
    num_retrieved: int = 24  # nodes kept of what was retrieved
    name = "rasd"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, num_retrieved=1)
        self.drafter = make(self.base or "plain")
        if self.drafter.draws:
            raise UnknownOption(
                f"{self.name} cannot add to drafts that are drawn, whose verification counts on every sibling: "
                f"take {self.drafter.name} with options that do not draw"
            )

    def attach(self, engine: "Engine") -> None:
        if not self.base:
            raise UnknownOption(
                f"{self.name} needs a drafter: {self.name}:base=[draft-model:model=DIR,branches=4],datastore=FOLDER; "
                "without one, use rest"
            )
        super().attach(engine)
        self.drafter.attach(engine)
        self.layers = self.drafter.layers

    def join(self, joined: Joined) -> None:
        self.drafter.join(joined)

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        drafts = self.drafter.propose(requests)
        if self.drafter.begun is not None:
            raise DraftError(
                f"{self.name} cannot add to the drafts of {self.drafter.name}, which the target has begun to read: "
                "take another base"
            )
        self.first = self.drafter.first
        return [
            self._fuse(request, row, draft) for row, (request, draft) in enumerate(zip(requests, drafts, strict=True))
        ]

    def observe(self, seen: Seen) -> None:
        self.drafter.observe(seen)

    def select(self, rows: Sequence[int]) -> None:
        self.drafter.select(rows)

    def _fuse(self, request: Request, row: int, draft: Draft) -> Draft:
        if not draft:
            return self.retrieve(request, request.nodes(self.num_draft_tokens))
        retrieved = self.retrieve(request, max(CANDIDATES, self.num_retrieved))
        if self.first is not None:
            retrieved = judged(retrieved, self.first[row])
        return draft.merge(retrieved.prune(self.num_retrieved)).prune(request.nodes(self.num_draft_tokens))


def judged(retrieved: Draft, logits: Tensor) -> Draft:
    """The tree with the drafter's probability of each first token instead of its share of the matches.

    Args:
        logits: [V] after the root; first tokens that have none, or minus infinity, go with what follows them.
    """
    tokens = [retrieved.tokens[node] for node in retrieved.tree.children(ROOT)]
    known = [token for token in tokens if token < len(logits)]
    opinion = dict(zip(known, logits.float().log_softmax(-1)[known].tolist(), strict=True))
    changes: list[float] = []
    for token, parent, score in zip(retrieved.tokens, retrieved.tree.parents, retrieved.scores, strict=True):
        changes.append(opinion.get(token, -math.inf) - score if parent == ROOT else changes[parent])
    scores = [score + change for score, change in zip(retrieved.scores, changes, strict=True)]
    return replace(retrieved, scores=scores).prune(sum(map(math.isfinite, scores)))
