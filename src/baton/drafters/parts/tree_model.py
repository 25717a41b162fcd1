"""Trees that a small model grows node by node, their children drawn without replacement from what it expects.

What methods share that differ only in which node is given how many children.
"""

import heapq
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from baton.best import top
from baton.draft import NOTHING, ROOT, Draft, Growing
from baton.drafters.parts.small_model import SmallModel
from baton.engine.request import Request


class Row:
    """The tree of one row while it grows.

    Attributes:
        depth: most levels; a row without room for any grows nothing.
        frontier: nodes whose children the small model is asked for next.
        value: per node, in logarithms, what the method counts for its order; the root has 0.
    """

    def __init__(self, request: Request, depth: int) -> None:
        self.request, self.depth = request, depth
        self.greedy = request.sampling.greedy
        self.builder = Growing()
        self.frontier = [ROOT] if depth else []
        self.value = {ROOT: 0.0}
        self._depths = {ROOT: 0}
        self._drawn: dict[int, Tensor] = {}

    def add(self, parent: int, token: int, q: Tensor, score: float) -> int:
        """The next child of a node, a token drawn from q [V]; for a greedy request, one of the most probable."""
        node = self.builder.add(parent, token, "", score)
        self._depths[node] = self._depths[parent] + 1
        if not self.greedy:
            self._drawn[parent] = q
        return node

    def level(self, node: int) -> int:
        """How deep a node's children are, counted from 0."""
        return self._depths[node]

    def open(self, node: int) -> bool:
        """Whether there is room below a node."""
        return self._depths[node] < self.depth

    def score(self, node: int) -> float:
        return 0.0 if node == ROOT else self.builder.scores[node]

    def path(self, node: int) -> list[int]:
        """Tokens from the root's child down to this node."""
        tokens = []
        while node != ROOT:
            tokens.append(self.builder.tokens[node])
            node = self.builder.parents[node]
        return tokens[::-1]

    def draft(self, name: str) -> Draft:
        return self.builder.draft(name, scored=True, drawn=self._drawn) if self.builder.tokens else NOTHING


class Likely(Row):
    """A tree of the most probable paths, for greedy requests: nothing of it is left to chance.

    Args:
        size: most nodes; ahead: most nodes of a frontier; threshold: least probability of a path.
    """

    def __init__(self, request: Request, depth: int, size: int, ahead: int, threshold: float = 0.0) -> None:
        super().__init__(request, depth)
        self.size, self.ahead = size, ahead
        self._least = math.log(threshold) if threshold else -math.inf
        self._best: list[float] = []  # a heap of the best scores, at most `size` of them
        self._unread: list[tuple[float, int]] = []  # (minus its score, node), a heap

    def read(self, q: Tensor) -> list[int]:
        """Grow by what follows the frontier, [n, V]; returns the next one."""
        chances, tokens = top(q, self.size)
        for node, *row in zip(self.frontier, tokens.tolist(), chances.log().tolist(), strict=True):
            for token, value in zip(*row, strict=True):
                score = self.score(node) + value
                if not (score >= self._least and score > -math.inf):
                    break
                child = self.add(node, token, q, score)
                if self.open(child):
                    heapq.heappush(self._unread, (-score, child))
                heapq.heappush(self._best, score)
                if len(self._best) > self.size:
                    heapq.heappop(self._best)
                    self._least = max(self._least, self._best[0])
        count = min(self.ahead, len(self._unread))
        found = [heapq.heappop(self._unread) for _ in range(count)]
        return [node for negative, node in found if -negative >= self._least]

    def draft(self, name: str) -> Draft:
        return super().draft(name).prune(self.size)


@dataclass(kw_only=True)
class TreeModel(SmallModel):
    @property
    def draws(self) -> bool:
        return True

    @property
    @abstractmethod
    def deepest(self) -> int:
        """Most levels of a tree."""

    @abstractmethod
    def grow(self, rows: Sequence[Row], q: Tensor) -> None:
        """Give the nodes of the frontiers children, and set the next frontiers.

        Args:
            q: float32 [n, V], per node of all frontiers, row by row, what follows it: processed as the target's
                logits are; for greedy requests, the small model's own distribution.
        """

    def plant(self, request: Request, depth: int) -> Row:
        return Row(request, depth)

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        depths, first = self.start(requests, self.deepest)
        if first is None:
            return [NOTHING] * len(requests)
        rows = [self.plant(request, depth) for request, depth in zip(requests, depths, strict=True)]
        logits = first[:, None]
        while any(row.frontier for row in rows):
            self.grow(rows, self._expected(rows, logits))
            if any(row.frontier for row in rows):
                logits = self.expand([row.builder for row in rows], [row.frontier for row in rows])
        return [row.draft(self.name) for row in rows]

    def _expected(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        """What follows each node of the frontiers, [n, V] of [rows, nodes, V']."""
        nodes = [(at, place) for at, row in enumerate(rows) for place in range(len(row.frontier))]
        logits = logits[[at for at, _ in nodes], [place for _, place in nodes]]
        width = self.engine.target.lm_head.weight.shape[0]
        q = F.pad(logits.float().softmax(-1), (0, width - logits.shape[-1]))
        if drawn := [n for n, (at, _) in enumerate(nodes) if not rows[at].greedy]:
            owners = [rows[nodes[n][0]] for n in drawn]
            written = [row.path(row.frontier[nodes[n][1]]) for n, row in zip(drawn, owners, strict=True)]
            q[drawn] = self.distributions([row.request for row in owners], written, logits[drawn])
        return q
