"""What the target thought after each n-gram: running means of its distributions, for the last few tokens of a text."""

from collections.abc import Callable, Sequence
from math import log
from typing import NamedTuple

Context = tuple[int, ...]


class Mean(NamedTuple):
    """Of the distributions seen after one n-gram, as far as they are kept: tokens, best first, and probabilities > 0.

    Probabilities are not made to sum to one: what was not kept is not known.
    """

    seen: int  # distributions
    tokens: Sequence[int]
    probabilities: Sequence[float]

    @property
    def distribution(self) -> tuple[Sequence[int], Sequence[float]]:
        """The tokens, and probabilities that sum to one."""
        total = sum(self.probabilities)
        return self.tokens, [p / total for p in self.probabilities]


def without_replacement(
    tokens: Sequence[int], q: Sequence[float], count: int, random: Callable[[], float]
) -> list[int]:
    """At most `count` different tokens, in the order in which they are drawn.

    Args:
        q: probabilities above 0; random: numbers in [0, 1).
    """
    # Gumbel-top-k, as the race it is: a token arrives after Exp(1) / q.
    arrivals = sorted((-log(1 - random()) / chance, token) for chance, token in zip(q, tokens, strict=True))
    return [token for _, token in arrivals[:count]]


class NGrams:
    """Means by n-gram, the longest known ending of a text first.

    Args:
        shortest, longest: n-grams, in tokens.
        kept: tokens of a mean. floor: least weight of a new distribution; 0 weighs all alike.
    """

    def __init__(self, shortest: int, longest: int, kept: int, floor: float = 0.0) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self.kept, self.floor = kept, floor
        self.means: dict[Context, Mean] = {}

    def find(self, text: Context) -> Mean | None:
        """What is known after the longest known ending of a text."""
        for size in self.sizes:
            if len(text) >= size and (found := self.means.get(text[-size:])) is not None:
                return found
        return None

    def learn(self, text: Context, tokens: Sequence[int], probabilities: Sequence[float]) -> None:
        """Take in a distribution seen after a text: its best tokens, best first, with probabilities above 0."""
        new = Mean(1, tokens, probabilities)
        for size in self.sizes:
            if len(text) >= size:
                key = text[-size:]
                old = self.means.get(key)
                self.means[key] = new if old is None else self._merged(old, new)

    def _merged(self, old: Mean, new: Mean) -> Mean:
        share = max(1 / (old.seen + 1), self.floor)
        sums = {token: (1 - share) * p for token, p in zip(old.tokens, old.probabilities, strict=True)}
        for token, p in zip(new.tokens, new.probabilities, strict=True):
            sums[token] = sums.get(token, 0.0) + share * p
        best = sorted(sums.items(), key=lambda item: (-item[1], item[0]))[: self.kept]
        tokens, probabilities = zip(*best, strict=True)
        return Mean(old.seen + 1, tokens, probabilities)
