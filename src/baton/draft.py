"""Drafts: what a drafter proposes for one row, a tree of tokens that the target then checks in one pass.

A chain is a tree in which every node has one child, and nothing is the empty tree. The root of a tree is not part of
it: it is the row's newest token, which is certain already. Nodes stand after their parents.

Children of a node are either *fixed* (looked up, most probable, retrieved: no randomness) or *drawn* (sampled without
replacement, in order, from a distribution that is kept with them). Which acceptance rule is exact depends on that, so
a draft says how it was made (`baton.verify`).
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from baton.errors import DraftError

Few = tuple[Sequence[int], Sequence[float]]  # token ids and their probabilities
ROOT = -1  # the parent of a tree's first nodes


class Tree:
    """The shape of a draft, without tokens. Equal shapes may share one object, and with it masks made once.

    Args:
        parents: per node, the index of its parent, or `ROOT`; parents stand before their children.
    Raises: DraftError when they do not.
    """

    def __init__(self, parents: Iterable[int]) -> None:
        self.parents = tuple(parents)
        depths: list[int] = []
        children: list[list[int]] = [[] for _ in range(len(self.parents) + 1)]
        for node, parent in enumerate(self.parents):
            if not ROOT <= parent < node:
                raise DraftError(
                    f"node {node} has parent {parent}: parents stand before their children, {ROOT} is the root"
                )
            depths.append(1 if parent == ROOT else depths[parent] + 1)
            children[parent + 1].append(node)
        self.depths = tuple(depths)  # children of the root have 1
        self._children = tuple(map(tuple, children))

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def depth(self) -> int:
        """Nodes on the longest path."""
        return max(self.depths, default=0)

    @cached_property
    def is_chain(self) -> bool:
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def children(self, node: int) -> tuple[int, ...]:
        """Children of a node, or of `ROOT`, in the order of their ranks."""
        return self._children[node + 1]

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child down to this one."""
        found = []
        while node != ROOT:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    @cached_property
    def mask(self) -> Tensor:
        """Bool [n + 1, n + 1] on the CPU, the root first: True where a node may attend to another, on its own path."""
        size = len(self) + 1
        seen = [1]  # a bit for each node on the path, its own included: a tenth of the time that rows of tensors take
        for node, parent in enumerate(self.parents, 1):
            seen.append(seen[parent + 1] | 1 << node)
        wide = -(-size // 8)
        rows = np.frombuffer(b"".join(bits.to_bytes(wide, "little") for bits in seen), np.uint8).reshape(size, wide)
        return torch.from_numpy(np.unpackbits(rows, axis=1, count=size, bitorder="little").view(bool))

    @cached_property
    def steps(self) -> Tensor:
        """int64 [n + 1] on the CPU, the root first: positions after the root's."""
        return torch.tensor([0, *self.depths])


def stacked(trees: Sequence[Tree]) -> tuple[Tensor, Tensor]:
    """`steps` and `mask` of trees, one each row, as wide as the widest; what is beyond a tree sees itself alone.

    Returns: int64 [b, n + 1] and bool [b, n + 1, n + 1], on the CPU.
    """
    if len(trees) == 1:
        return trees[0].steps[None], trees[0].mask[None]
    width = 1 + max(map(len, trees))
    steps, mask = np.zeros((len(trees), width), np.int64), np.tile(np.eye(width, dtype=bool), (len(trees), 1, 1))
    for row, tree in enumerate(trees):
        steps[row, 1 : len(tree) + 1] = tree.depths
        mask[row, : len(tree) + 1, : len(tree) + 1] = tree.mask.numpy()
    return torch.from_numpy(steps), torch.from_numpy(mask)


@lru_cache(maxsize=256)
def chain(length: int) -> Tree:
    """The tree in which every node has one child."""
    return Tree(range(-1, length - 1))


EMPTY = chain(0)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Proposed tokens of one row.

    Args:
        tokens: token id per node, in the target's vocabulary.
        tree: how the nodes hang together.
        source: who proposes, for provenance; or one name per node.
        scores: per node, anything that orders nodes by how likely they are to be accepted; empty: unknown.
        drawn: for parents whose children were drawn: the distribution of the first draw, float32 [V], or (token ids,
            their probabilities), all others having none. The children stand in the order in which they were drawn,
            without replacement.
    """

    tokens: Sequence[int] = ()
    tree: Tree = EMPTY
    source: str | Sequence[str] = ""
    scores: Sequence[float] = ()
    drawn: Mapping[int, Tensor | Few] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.tree):
            raise DraftError(f"a draft of {len(self.tree)} nodes has {len(self.tokens)} tokens")
        for parent in self.drawn:
            siblings = [self.tokens[node] for node in self.tree.children(parent)]
            if len(set(siblings)) != len(siblings):
                raise DraftError(
                    f"tokens drawn without replacement are different; the children of {parent}: {siblings}"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int], source: str = "", drawn: Sequence[Tensor | Few] = ()) -> "Draft":
        """One token after the other; `drawn`: the distribution [V] that each was drawn from, or nothing."""
        return cls(
            tokens=tokens, tree=chain(len(tokens)), source=source, drawn={node - 1: q for node, q in enumerate(drawn)}
        )

    @classmethod
    def paths(cls, paths: Iterable[Sequence[int]], source: str = "", scores: Iterable[float] = ()) -> "Draft":
        """Continuations, each from the root; equal beginnings become one. A node's score is its best path's."""
        grown, given = Growing(), list(scores)
        for index, path in enumerate(paths):
            at = ROOT
            for token in path:
                at = grown.add(at, token, source, given[index] if given else 0.0)
        return grown.draft(source, scored=bool(given))

    def sources(self) -> Sequence[str]:
        """Who proposed each node."""
        return [self.source] * len(self) if isinstance(self.source, str) else self.source

    def q(self, node: int, like: Tensor) -> Tensor:
        """What the children of a node were drawn from, as float64 [V] of a new tensor like [V]."""
        drawn = self.drawn[node]
        if isinstance(drawn, Tensor):
            return drawn.to(like.device, torch.float64, copy=True)
        q = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
        q[torch.tensor(drawn[0], device=like.device)] = torch.tensor(drawn[1], dtype=q.dtype, device=like.device)
        return q

    def merge(self, other: "Draft") -> "Draft":
        """Both; a path that both hold is there once, with the better score and this one's source.

        Raises: DraftError when a node has drawn children: others beside them would change what their order means.
        """
        if self.drawn or other.drawn:
            raise DraftError(
                "drafts with drawn children cannot be merged: their acceptance rule counts on every sibling"
            )
        grown = Growing()
        for draft in (self, other):
            place = {ROOT: ROOT}
            scores = draft.scores or [0.0] * len(draft)
            nodes = zip(draft.tree.parents, draft.tokens, draft.sources(), scores, strict=True)
            for node, (parent, token, source, score) in enumerate(nodes):
                place[node] = grown.add(place[parent], token, source, score)
        return grown.draft(grown.sources, scored=bool(self.scores or other.scores))

    def prune(self, budget: int) -> "Draft":
        """The best-scored nodes, at most `budget`, each with its whole path.

        Raises: DraftError when a node has drawn children: which of them are left would then depend on their values.
        """
        if len(self) <= budget:
            return self
        if self.drawn:
            raise DraftError("a draft with drawn children cannot be pruned: what is left would no longer be drawn")
        return self._only(sorted(self.order()[:budget]))

    def order(self) -> list[int]:
        """Nodes, best scored first, each behind its parent; what is not scored, level by level."""
        if self.tree.is_chain:
            return list(range(len(self)))
        scores = self.scores or [-depth for depth in self.tree.depths]
        frontier = [(-scores[node], node) for node in self.tree.children(ROOT)]
        heapq.heapify(frontier)
        found: list[int] = []
        while frontier:
            _, node = heapq.heappop(frontier)
            found.append(node)
            for child in self.tree.children(node):
                heapq.heappush(frontier, (-scores[child], child))
        return found

    def within(self, depth: int) -> "Draft":
        """Nodes at most so deep: siblings leave together, so drawn ones may stay."""
        if self.tree.depth <= depth:
            return self
        return self._only([node for node, at in enumerate(self.tree.depths) if at <= depth])

    def _only(self, nodes: Sequence[int]) -> "Draft":
        place = {ROOT: ROOT} | {node: index for index, node in enumerate(nodes)}
        parents = [place[self.tree.parents[node]] for node in nodes]
        tree = chain(len(nodes)) if self.tree.is_chain else Tree(parents)
        has_children = set(parents)
        return Draft(
            tokens=[self.tokens[node] for node in nodes],
            tree=tree,
            source=self.source if isinstance(self.source, str) else [self.source[node] for node in nodes],
            scores=[self.scores[node] for node in nodes] if self.scores else (),
            drawn={place[p]: q for p, q in self.drawn.items() if p in place and place[p] in has_children},
        )


class Growing:
    """A tree that grows node by node; the same token after the same path is one node."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.sources: list[str] = []
        self.scores: list[float] = []
        self._known: dict[tuple[int, int], int] = {}  # (parent, token) -> node

    def add(self, parent: int, token: int, source: str, score: float) -> int:
        """The node of this token after `parent`: a new one, or the one there is, with the better score."""
        node = self._known.setdefault((parent, token), len(self.tokens))
        if node == len(self.tokens):
            self.tokens.append(token)
            self.parents.append(parent)
            self.sources.append(source)
            self.scores.append(score)
        else:
            self.scores[node] = max(self.scores[node], score)
        return node

    def draft(
        self, source: str | Sequence[str], *, scored: bool, drawn: Mapping[int, Tensor | Few] | None = None
    ) -> Draft:
        scores = self.scores if scored else ()
        return Draft(tokens=self.tokens, tree=Tree(self.parents), source=source, scores=scores, drawn=drawn or {})


NOTHING = Draft()


class PathTemplate:
    """A fixed tree of ranks, filled anew at each step: node = the child of rank r of its parent. arXiv 2401.10774.

    Args:
        paths: per wanted node the ranks on the way to it, such as (0, 2): the third best after the best. Beginnings
            of paths are nodes too, named or not. The most promising come first, where that is known.
    Raises: DraftError for a path given twice, or an empty one.
    """

    def __init__(self, paths: Iterable[Sequence[int]]) -> None:
        given = [tuple(path) for path in paths]
        if len(set(given)) != len(given) or () in given:
            raise DraftError("a template's paths must be different and not empty")
        nodes = sorted({path[:end] for path in given for end in range(1, len(path) + 1)}, key=lambda p: (len(p), p))
        place = {(): ROOT} | {path: node for node, path in enumerate(nodes)}
        self._paths = given
        self.ranks = tuple(path[-1] for path in nodes)
        self.tree = Tree(place[path[:-1]] for path in nodes)

    def __len__(self) -> int:
        return len(self.ranks)

    @classmethod
    @lru_cache(maxsize=32)
    def grown(cls, accuracy: Sequence[float], nodes: int, depth: int) -> "PathTemplate":
        """The `nodes` most promising paths of at most `depth`, where the candidate of rank r is right with accuracy[r].

        Args:
            accuracy: a tuple, falling.
        """
        paths: list[tuple[int, ...]] = []
        frontier: list[tuple[float, tuple[int, ...]]] = [(-chance, (rank,)) for rank, chance in enumerate(accuracy)]
        heapq.heapify(frontier)
        while frontier and len(paths) < nodes:
            value, path = heapq.heappop(frontier)
            paths.append(path)
            if len(path) < depth:
                for rank, chance in enumerate(accuracy):
                    heapq.heappush(frontier, (value * chance, (*path, rank)))
        return cls(paths)

    def first(self, count: int) -> "PathTemplate":
        """The template of its first paths alone."""
        return self if count >= len(self._paths) else self._first(max(count, 0))

    @lru_cache(maxsize=32)  # noqa: B019 (templates live as long as the program)
    def _first(self, count: int) -> "PathTemplate":
        return PathTemplate(self._paths[:count])

    def within(self, depth: int) -> "PathTemplate":
        """The same template without nodes deeper than that."""
        return self if depth >= self.tree.depth else self._cut(max(depth, 0))

    @lru_cache(maxsize=32)  # noqa: B019 (templates live as long as the program)
    def _cut(self, depth: int) -> "PathTemplate":
        paths: list[tuple[int, ...]] = []
        for rank, parent in zip(self.ranks, self.tree.parents, strict=True):
            paths.append((*(paths[parent] if parent != ROOT else ()), rank))
        return PathTemplate(path for path in paths if len(path) <= depth)

    def fill(self, root: int, ranked: Callable[[int], Sequence[int]], source: str = "") -> Draft:
        """Tokens for every node whose parent has a child of its rank.

        Args:
            root: the row's newest token.
            ranked: tokens that may follow a token, best first.
        """
        tokens: list[int] = []
        for rank, parent in zip(self.ranks, self.tree.parents, strict=True):
            before = root if parent == ROOT else tokens[parent]
            following = ranked(before) if before >= 0 else ()
            tokens.append(following[rank] if rank < len(following) else -1)
        draft = Draft(tokens=tokens, tree=self.tree, source=source)
        missing = [node for node, token in enumerate(tokens) if token < 0]
        return draft if not missing else draft._only([node for node, token in enumerate(tokens) if token >= 0])
