"""Recursive speculative decoding: a small model's trees, whose siblings are drawn without replacement.

Source: arXiv 2402.14160. Lossless: yes; sampled text has plain decoding's law, verified by recursive rejection, and
greedy text is the same. Training: none. Draft cost: one pass of the small model per level; one distribution is kept
per node that has children. Helps where the small model's second guesses are often right, at higher temperatures most.

`rsd-c` gives each node of a level the same number of children, by Gumbel-top-k. `rsd-s` draws whole paths without
replacement, by stochastic beam search: unlikely branches end early, and siblings stand in the order of their draws.

Differences: a greedy request's distribution has one token only, so its children are the small model's most probable
ones, and `rsd-s` is then a beam search. The noise is keyed by request, step and level. `rsd-s` has as many nodes by
default as `rsd-c`: 21.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.drafters.parts.gumbel import conditioned, gumbel_top_k, noise
from baton.drafters.parts.tree_model import Row, TreeModel
from baton.engine.drafter import at_least
from baton.errors import UnknownOption


def drawn(rows: Sequence[Row], q: Tensor, count: int) -> Iterator[tuple[list[tuple[int, float]], Tensor]]:
    """Per node of all frontiers, `count` draws, and what they were drawn from; all nodes are of one level."""
    each = torch.ones(q.shape, dtype=torch.float64)
    start = 0
    for row in rows:
        end = start + len(row.frontier)
        if end > start and not row.greedy:
            each[start:end] = noise(row.request, row.level(row.frontier[0]), end - start, q.shape[-1])
        start = end
    return zip(gumbel_top_k(q, count, each), q, strict=True)


@dataclass(kw_only=True)
class ConstantBranching(TreeModel):
    branching: str = "3-2-1-1"  # children of every node, level by level
    name = "rsd-c"

    def __post_init__(self) -> None:
        parts = self.branching.split("-")
        if not all(part.isdecimal() and int(part) for part in parts):
            raise UnknownOption(
                f"{self.name}: branching={self.branching!r} is not possible: give the children of a node per level, "
                "each 1 or more, such as 3-2-1-1"
            )
        self._counts = [int(part) for part in parts]

    @property
    def deepest(self) -> int:
        return len(self._counts)

    def grow(self, rows: Sequence[Row], q: Tensor) -> None:
        level = max(row.level(row.frontier[0]) for row in rows if row.frontier)
        found = drawn(rows, q, self._counts[level])
        for row in rows:
            new = []
            for node in row.frontier:
                order, expected = next(found)
                new += [row.add(node, token, expected, row.score(node) + value) for token, value in order]
            row.frontier = [node for node in new if row.open(node)]


@dataclass(kw_only=True)
class StochasticBeams(TreeModel):
    beams: int = 7  # nodes of a level
    max_depth: int = 3  # levels
    name = "rsd-s"

    def __post_init__(self) -> None:
        at_least(self, beams=1, max_depth=1)

    @property
    def deepest(self) -> int:
        return self.max_depth

    def grow(self, rows: Sequence[Row], q: Tensor) -> None:
        found = drawn(rows, q, self.beams)
        for row in rows:
            paths = []  # (perturbed log probability of the path, its parent, its last token, drawn from)
            for node in row.frontier:
                order, expected = next(found)
                own = [(token, row.value[node] + value) for token, value in order]
                for token, value in own:
                    score = value if row.greedy else conditioned(value, own[0][1], row.score(node))
                    paths.append((score, node, token, expected))
            row.frontier = []
            # Sorted stably: equal ones stay in the order of their draws.
            for score, node, token, expected in sorted(paths, key=lambda path: -path[0])[: self.beams]:
                child = row.add(node, token, expected, score)
                row.value[child] = row.value[node] + math.log(float(expected[token]))
                if row.open(child):
                    row.frontier.append(child)
