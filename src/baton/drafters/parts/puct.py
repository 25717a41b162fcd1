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
        self.first, self.last, self.fresh = [0], [0], [0]  # children from, to, and the first that was not visited
        self.open = 1  # nodes that may have children and were not looked into

    def run(self, iterations: int, enough: int, c1: float, c2: float) -> None:
        """Look `iterations` times, less where all is known and at most `enough` nodes were found."""
        visits, values, parents, weights = self.visits, self.values, self.parents, self.weights
        first, last, fresh = self.first, self.last, self.fresh
        for _ in range(iterations):
            if not self.open and len(visits) <= enough + 1:
                return
            node, value = 0, 1.0
            while first[node]:
                if fresh[node] < last[node]:
                    child = fresh[node]
                    fresh[node] += 1
                else:
                    explore = (c1 + log((visits[node] + c2 + 1) / c2)) * sqrt(visits[node])
                    best = -1.0
                    for each in range(first[node], last[node]):
                        times = visits[each]
                        score = values[each] / times + explore * weights[each] / (1 + times)
                        if score > best:
                            best, child = score, each
                node = child
                value += weights[node]
            if self.depths[node] < self.max_depth and first[node] == last[node] == 0 and self._expand(node):
                fresh[node] += 1
                node = first[node]
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

    def _expand(self, node: int) -> bool:
        """Give a node all of its children; whether it has any."""
        tokens, weights, _ = self.row(self.pairs[node])
        count, depth = len(tokens), self.depths[node] + 1
        self.open -= 1
        self.last[node] = -1  # looked into
        if not count:
            return False
        self.first[node] = self.fresh[node] = len(self.visits)
        self.last[node] = len(self.visits) + count
        second = self.pairs[node][1]
        self.pairs += [(second, token) for token in tokens]
        self.weights += weights
        self.parents += [node] * count
        self.depths += [depth] * count
        for counter in (self.visits, self.first, self.last, self.fresh):
            counter += [0] * count
        self.values += [0.0] * count
        self.open += count if depth < self.max_depth else 0
        return True

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
