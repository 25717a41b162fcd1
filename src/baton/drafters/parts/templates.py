"""Trees of ranks that fit a target: count which nodes of a large tree are accepted, and keep the best ones.

Source: arXiv 2506.04708, which keeps the 80 best of 625 nodes. Here what is kept is closed under parents and under
better siblings (rank 2 only beside ranks 0 and 1), so a node's rank is its place among its siblings, and of all such
trees of a size it is the one with the most accepted tokens: exactly, by dynamic programming.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from baton.data.storage import atomic_write
from baton.draft import ROOT, PathTemplate, Tree
from baton.errors import DataError, UnknownOption

MAGIC, VERSION = "baton tree", 1
# Of the tree that counting starts with: how often, roughly, each rank is right. 625 nodes are 20 deep then.
START, NODES, DEPTH = (0.8, 0.2, 0.1, 0.06, 0.04, 0.03, 0.025, 0.02, 0.015, 0.01), 625, 20

Ranks = tuple[int, ...]  # the way to a node, such as (0, 2): the third best after the best


def save_tree(path: Path, ranks: int, paths: Sequence[Ranks], about: Mapping[str, Any]) -> None:
    """Write a tree.

    Args:
        ranks: how many candidates the method has for a place; about: where the tree is from, for people.
    """
    header = {"magic": MAGIC, "version": VERSION, "ranks": ranks, "about": dict(about)}
    with atomic_write(path) as file:
        file.write(json.dumps(header | {"paths": sorted(paths, key=lambda p: (len(p), p))}) + "\n")


def load_tree(path: str | Path, method: str, ranks: int) -> PathTemplate:
    """Read a tree. Raises: DataError for a file that holds none; UnknownOption for one of another number of ranks."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        magic, version, made_for = raw["magic"], raw["version"], raw["ranks"]
        paths = {tuple(map(int, ranks)) for ranks in raw["paths"]}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): give what baton calibrate-tree wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a tree of Baton's: give what baton calibrate-tree wrote") from error
    if magic != MAGIC or version != VERSION:
        raise DataError(f"{path}: {magic!r} of version {version}, and {MAGIC!r} of version {VERSION} is needed")
    if made_for != ranks:
        raise UnknownOption(
            f"{path}: a tree of {made_for} ranks, and {method} has {ranks} candidates for each place: make one with "
            f"baton calibrate-tree MODEL {method}"
        )
    if not paths or any(not path or not 0 <= path[-1] < ranks or not set(_before(path)) <= paths for path in paths):
        raise DataError(f"{path}: nodes without their parent or better siblings, or none: calibrate the tree again")
    return PathTemplate(sorted(paths, key=lambda path: (len(path), path)))


def _before(path: Ranks) -> list[Ranks]:
    """What must be in a tree that has this node: its parent, and the sibling before it."""
    parent = [path[:-1]] if len(path) > 1 else []
    return [*parent, (*path[:-1], path[-1] - 1)] if path[-1] else parent


def ranks_of(tree: Tree) -> list[Ranks]:
    """The way to each node, where a node's rank is its place among its siblings."""
    found: list[Ranks] = []
    places = {node: rank for parent in range(ROOT, len(tree)) for rank, node in enumerate(tree.children(parent))}
    for node, parent in enumerate(tree.parents):
        found.append((*(found[parent] if parent != ROOT else ()), places[node]))
    return found


class RankCounts:
    """How often the candidate of each rank was right; before anything was seen, as often as expected.

    Args:
        chances: expected, falling; weight: how many drafts this counts for.
    """

    def __init__(self, chances: Sequence[float], weight: int = 10) -> None:
        self.tried = [float(weight)] * len(chances)
        self.right = [weight * chance for chance in chances]

    def add(self, tree: Tree, accepted: Sequence[int]) -> None:
        """Count the children of the root and of each accepted node."""
        for node, after in zip((ROOT, *accepted), (*accepted, None), strict=True):
            for rank, child in enumerate(tree.children(node)):
                self.tried[rank] += 1
                self.right[rank] += child == after

    @property
    def chances(self) -> tuple[float, ...]:
        """As `PathTemplate.grown` takes them: falling, and rounded, since it remembers trees by them."""
        found = (round(right / tried, 3) for right, tried in zip(self.right, self.tried, strict=True))
        return tuple(accumulate(found, min))


@dataclass(frozen=True)
class Calibration:
    """What was accepted of a large tree.

    Args:
        ranks: candidates that the method has for a place.
        counts: way to a node -> times that it was accepted; every node of the large tree is there.
        steps: drafts that were verified.
        length: mean tokens before a draft.
    """

    ranks: int
    counts: Mapping[Ranks, int]
    steps: int
    length: float

    @cached_property
    def _best(self) -> list[np.ndarray]:
        """Per node, by size: most accepted tokens per step of trees of it, nodes below it, and siblings after it."""
        best: list[np.ndarray] = [np.zeros(1)] * (len(self._nodes) + 1)  # the last: of what is not there
        for node in reversed(range(len(self._nodes))):
            below, beside = (best[place] for place in self._next[node])
            sums = np.full(len(below) + len(beside) - 1, -np.inf)
            shorter, longer = sorted((below, beside), key=len)
            for size, value in enumerate(shorter):
                part = slice(size, size + len(longer))
                sums[part] = np.maximum(sums[part], value + longer)
            best[node] = np.concatenate([np.zeros(1), self._value(node) + sums])
        return best

    @cached_property
    def _nodes(self) -> list[Ranks]:
        return sorted(self.counts, key=lambda path: (len(path), path))

    @cached_property
    def _next(self) -> list[tuple[int, int]]:
        """Per node, what may be in a tree because it is: its first child and its next sibling; -1: there is none."""
        place = {path: node for node, path in enumerate(self._nodes)}
        return [(place.get((*path, 0), -1), place.get((*path[:-1], path[-1] + 1), -1)) for path in self._nodes]

    def _value(self, node: int) -> float:
        """How often a node is accepted; among those that never were, what is likely counts a trifle."""
        path = self._nodes[node]
        return self.counts[path] / max(1, self.steps) + 1e-9 * float(np.prod([START[rank] for rank in path]))

    @property
    def expected(self) -> list[float]:
        """Tokens per step with the best tree of 0, 1, 2, ... nodes, the target's own token included."""
        return (1 + self._best[0]).tolist()

    def tree(self, nodes: int) -> list[Ranks]:
        """The best tree of so many nodes, or of all there are."""
        kept, waiting = [], [(0, min(nodes, len(self._nodes)))]
        while waiting:
            node, size = waiting.pop()
            if not size:
                continue
            kept.append(self._nodes[node])
            below, beside = self._next[node]
            least = max(0, size - len(self._best[beside]))  # nodes below, so that the others find place beside
            first = self._best[below][least:size]
            chosen = least + int(np.argmax(first + self._best[beside][size - least - len(first) : size - least][::-1]))
            waiting += [(below, chosen), (beside, size - 1 - chosen)]
        return kept

    def fastest(self, seconds: Callable[[int], float]) -> int:
        """The number of nodes with the most tokens per second, where a pass over n rows takes `seconds(n)`.

        0: a pass over more than one row costs more than it gives, and plain decoding is faster.
        """
        return int(np.argmax([tokens / seconds(1 + nodes) for nodes, tokens in enumerate(self.expected)]))
