"""DySpec: a small model's tree that grows where the next draw is most likely to count.

Source: arXiv 2410.11744, Algorithm 1 and section 4.4. Lossless: yes; sampled text has plain decoding's law, verified
by recursive rejection, and greedy text is the same. Training: none. One distribution is kept per node that has
children. Draft cost: passes of the small model until the tree is full, or with `threshold` one per level. Helps where
the small model's passes are cheap beside the target's, with many nodes.

A place for one more child is worth the probability, by the small model, that verification comes to it: it is decided
on before what is drawn there is known, as a drawn token must never be dropped for what it is. The best place comes
first, until there are `num_draft_tokens` nodes. With a `threshold` every place worth as much is used, level by level.

Differences: the heap is served in batches: when the best place's node has not been read, the most promising unread
nodes are read with it, and the tree is still Algorithm 1's. A greedy request's children are the small model's most
probable tokens, worth the probabilities of their paths, as these are known beforehand: the tree holds the best paths.
With a threshold, the places of a level are visited from the best node to the worst until `num_draft_tokens` nodes
stand (greedy: the best of those that are worth it); the paper has no such bound.
Draws are keyed by their place in the tree, so both variants draw the same there. Trees are verified by dense masks.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from baton.draft import ROOT
from baton.drafters.parts.tree_model import Likely, Row, TreeModel
from baton.drafters.parts.urn import Urn
from baton.engine.drafter import at_least
from baton.engine.request import Request
from baton.errors import UnknownOption
from baton.models.writer import Writer
from baton.runtime.profile import quick_profile
from baton.sampling import uniform

if TYPE_CHECKING:
    from baton.engine.loop import Engine

AHEAD = 8  # nodes read in one pass of the small model, while the tree is grown from the best place on
DEAR = 2.0  # times a plain pass: what the pass over a tree may cost where its size is chosen by cost


class Drawn(Row):
    """Grows by the value of places: `value` of a node is that of the first draw after it."""

    def __init__(self, request: Request, depth: int, size: int, threshold: float) -> None:
        super().__init__(request, depth)
        self.size, self.threshold = size, threshold
        self._urns: dict[int, Urn] = {}
        self._places = {ROOT: ""}  # the ranks on the way to a node
        self._heap = [(0.0, node) for node in self.frontier]  # (minus the value of its next draw, node)

    def read(self, q: Tensor) -> list[int]:
        """Grow as far as what follows the frontier, [n, V], allows; returns what must be read to go on."""
        for node, expected in zip(self.frontier, q, strict=True):
            self._urns[node] = Urn(expected, self.value[node])
        return self._level() if self.threshold else self._best_first()

    def _best_first(self) -> list[int]:
        while self._heap and len(self.builder.tokens) < self.size:
            node = self._heap[0][1]
            if node not in self._urns:
                count = min(AHEAD, self.size - len(self.builder.tokens))
                unread = [entry for entry in self._heap if entry[1] not in self._urns]
                return [other for _, other in heapq.nsmallest(count, unread)]
            heapq.heappop(self._heap)
            child = self._draw(node)
            if child is not None and self.open(child):
                heapq.heappush(self._heap, (-self.value[child], child))
            if self._urns[node].value > -math.inf:
                heapq.heappush(self._heap, (-self._urns[node].value, node))
        return []

    def _level(self) -> list[int]:
        least, new = math.log(self.threshold), []
        for node in sorted(self.frontier, key=lambda node: -self.value[node]):
            while self._urns[node].value >= least and len(self.builder.tokens) < self.size:
                child = self._draw(node)
                if child is not None and self.value[child] >= least and self.open(child):
                    new.append(child)
        return new if len(self.builder.tokens) < self.size else []

    def _draw(self, node: int) -> int | None:
        """One more child of a node."""
        urn, request = self._urns[node], self.request
        place, worth = f"{self._places[node]}/{urn.count}", urn.value
        purpose = f"draft/{len(request.steps)}{place}"
        found = urn.draw(uniform(request.sampling.seed, request.key, purpose, len(request.tokens)))
        if found is None:
            return None
        token, after = found
        child = self.add(node, token, urn.q, worth)
        self.value[child], self._places[child] = after, place
        return child


@dataclass(kw_only=True)
class DySpec(TreeModel):
    num_draft_tokens: int = 64  # nodes of the tree; 0: as many as make a pass of the target twice as dear
    threshold: float = 0.0  # use every place worth so much, level by level; 0: the best place first
    name = "dyspec"

    def __post_init__(self) -> None:
        at_least(self, num_draft_tokens=0)
        if not 0 <= self.threshold < 1:
            raise UnknownOption(
                f"{self.name}: threshold={self.threshold} is not possible: it is a probability below 1, or 0 (off)"
            )

    def attach(self, engine: "Engine") -> None:
        super().attach(engine)
        self._size = self.num_draft_tokens or affordable(engine.writer)

    @property
    def deepest(self) -> int:
        return self._size

    def plant(self, request: Request, depth: int) -> Row:
        size = request.nodes(self._size)
        if request.sampling.greedy:
            return Likely(request, depth, size, size if self.threshold else AHEAD, self.threshold)
        return Drawn(request, depth, size, self.threshold)

    def grow(self, rows: Sequence[Row], q: Tensor) -> None:
        q = q.cpu()
        for row in rows:
            assert isinstance(row, Drawn | Likely)
            own, q = q[: len(row.frontier)], q[len(row.frontier) :]
            row.frontier = row.read(own) if row.frontier else []


def affordable(writer: Writer) -> int:
    """Nodes of the largest tree whose pass costs at most `DEAR` times a plain one."""
    costs = quick_profile(writer)
    plain = costs.cost(1, 64)
    return max((rows - 1 for rows, seconds in costs.price(64).items() if seconds <= DEAR * plain), default=1) or 1
