"""A tree search over a table of what may follow a pair of tokens: PUCT, as ADED (arXiv 2407.12021) uses it."""

from collections.abc import Callable
from math import log, sqrt

from baton.draft import NOTHING, ROOT, Draft, Growing
from baton.drafters.parts.trigrams import Pair, Row


class Search:
    """A tree of what may follow a pair, by visits. Node 0 is the pair itself; lists have one entry per node.

    Args:
        row: what may follow a pair, weights above 0; random: numbers in [0, 1), for the way below the tree.
    """

    def __init__(self, row: Callable[[Pair], Row], root: Pair, max_depth: int, random: Callable[[], float]) -> None:
        self.row, self.max_depth, self.random = row, max_depth, random
        self.pairs, self.parents, self.depths, self.weights = [root], [ROOT], [0], [0.0]
        self.visits, self.values = [0], [0.0]
        self.rows: list[Row | None] = [None]  # None: not looked into
        self.children: list[list[int]] = [[]]  # as many as were visited, best first
        self.open = 1  # places where the tree may still grow

    def run(self, iterations: int, enough: int, c1: float, c2: float) -> None:
        """Look `iterations` times, less where all is known and at most `enough` nodes were found."""
        visits, values, parents, weights = self.visits, self.values, self.parents, self.weights
        for _ in range(iterations):
            if not self.open and len(visits) <= enough + 1:
                return
            node, value = 0, 1.0
            while (row := self.rows[node]) is not None and row.tokens:
                children = self.children[node]
                if len(children) < len(row.tokens):  # a child without visits comes before all others
                    node = self._grow(node, row)
                else:
                    explore = (c1 + log((visits[node] + c2 + 1) / c2)) * sqrt(visits[node])
                    best = -1.0
                    for child in children:
                        times = visits[child]
                        score = values[child] / times + explore * weights[child] / (1 + times)
                        if score > best:
                            best, node = score, child
                value += weights[node]
            if row is None and self.depths[node] < self.max_depth:
                row = self.rows[node] = self.row(self.pairs[node])
                self.open += len(row.tokens) - 1
                if row.tokens:
                    node = self._grow(node, row)
                    value += weights[node]
            value += self._roll_out(node)
            while node != ROOT:
                visits[node] += 1
                values[node] += value
                node = parents[node]

    def draft(self, most_visited: int, budget: int, source: str) -> Draft:
        """The nodes that were visited most, and the best successor of each."""
        order = sorted(range(1, len(self.visits)), key=lambda node: -self.visits[node])[: min(most_visited, budget)]
        tree, place = Growing(), {0: ROOT}
        for node in order:  # no node was visited more than its parent, and parents were found first
            place[node] = tree.add(place[self.parents[node]], self.pairs[node][1], source, float(self.visits[node]))
        for node in order:
            tokens, weights, sums = self.row(self.pairs[node])
            if tokens and len(tree.tokens) < budget:
                tree.add(place[node], tokens[0], source, self.visits[node] * weights[0] / sums[-1])
        return tree.draft(source, scored=True) if tree.tokens else NOTHING

    def _grow(self, parent: int, row: Row) -> int:
        """The best successor that is not a node yet."""
        children = self.children[parent]
        rank, node, depth = len(children), len(self.pairs), self.depths[parent] + 1
        children.append(node)
        self.pairs.append((self.pairs[parent][1], row.tokens[rank]))
        self.weights.append(row.weights[rank])
        self.parents.append(parent)
        self.depths.append(depth)
        self.visits.append(0)
        self.values.append(0.0)
        self.rows.append(None)
        self.children.append([])
        if depth == self.max_depth:
            self.open -= 1
        return node

    def _roll_out(self, node: int) -> float:
        """The weight of a way down from a node, each token drawn in proportion to its own."""
        pair, value = self.pairs[node], 0.0
        for _ in range(self.depths[node], self.max_depth):
            row = self.row(pair)
            if not row.tokens:
                break
            place = row.pick(self.random())
            value += row.weights[place]
            pair = (pair[1], row.tokens[place])
        return value
