"""Tri-grams: which tokens follow each pair of tokens, counted in a corpus, kept on disk, changed for one request."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from baton.drafters.parts.store import open_store
from baton.errors import DataError, VocabMismatch

KIND = "table"  # as the store's header says
WAITING = 2**22  # tri-grams that are counted together: what building needs in memory

Pair = tuple[int, int]


class Row(NamedTuple):
    """What may follow a pair, best first."""

    tokens: Sequence[int]
    weights: Sequence[float]
    sums: Sequence[float]  # of the weights up to each

    def pick(self, number: float) -> int:
        """The place of a token drawn in proportion to the weights, with a number in [0, 1)."""
        return min(bisect_right(self.sums, number * self.sums[-1]), len(self.tokens) - 1)


UNKNOWN = Row((), (), ())


def ranked(weights: Mapping[int, float]) -> Row:
    """A row; equal weights stand in the order of their tokens, so that the same table is searched the same way."""
    tokens = sorted(weights, key=lambda token: (-weights[token], token))
    found = [weights[token] for token in tokens]
    return Row(tokens, found, list(accumulate(found)))


class Corpus:
    """A table that `baton build-table` made, mapped into memory.

    Raises: DataError, VocabMismatch for a folder that cannot be used.
    """

    def __init__(self, folder: str | Path, tokenizer: Any, vocabulary: int) -> None:
        about, mapped = open_store(folder, KIND, tokenizer)
        arrays = {name: np.asarray(array) for name, array in mapped.items()}  # the same memory, read with less ado
        self.keys, self.offsets = arrays["keys"], arrays["offsets"]
        self.successors, self.probabilities = arrays["successors"], arrays["probabilities"]
        if about["vocabulary"] > vocabulary:
            raise VocabMismatch(
                f"{folder}: it has tokens up to {about['vocabulary'] - 1} and the model up to {vocabulary - 1}: "
                f"build a {KIND} with this model's tokenizer"
            )
        self.row = lru_cache(maxsize=2**14)(self._row)  # what is common comes often

    def __len__(self) -> int:
        return len(self.keys)

    def _row(self, pair: Pair) -> Row:
        key = pair[0] << 32 | pair[1]
        place = int(self.keys.searchsorted(key))
        if place == len(self.keys) or self.keys[place] != key:
            return UNKNOWN
        part = slice(int(self.offsets[place]), int(self.offsets[place + 1]))
        weights = self.probabilities[part].tolist()
        return Row(self.successors[part].tolist(), weights, list(accumulate(weights)))


class Overlay:
    """One request's changes over rows that are not its own."""

    def __init__(self, below: Callable[[Pair], Row]) -> None:
        self.below = below
        self.weights: dict[Pair, dict[int, float]] = {}
        self._rows: dict[Pair, Row] = {}  # of changed pairs, as far as they were asked for since

    def row(self, pair: Pair) -> Row:
        found = self._rows.get(pair)
        if found is None:
            if (weights := self.weights.get(pair)) is None:
                return self.below(pair)
            found = self._rows[pair] = ranked(weights)
        return found

    def start(self, tokens: Sequence[int]) -> None:
        """Take the probabilities of these tokens' own tri-grams."""
        for pair, successors in counted(tokens).items():
            total = successors.total()
            self.weights[pair] = {token: count / total for token, count in successors.items()}

    def add(self, pair: Pair, token: int, amount: float, most: float) -> None:
        weights = self.weights.get(pair)
        if weights is None:
            below = self.below(pair)
            weights = self.weights[pair] = dict(zip(below.tokens, below.weights, strict=True))
        weights[token] = min(most, weights.get(token, 0.0) + amount)
        self._rows.pop(pair, None)


def counted(tokens: Sequence[int]) -> dict[Pair, Counter[int]]:
    """How often each token follows each pair."""
    found: dict[Pair, Counter[int]] = {}
    for first, second, third in zip(tokens, tokens[1:], tokens[2:], strict=False):
        found.setdefault((first, second), Counter())[third] += 1
    return found


def build(texts: Iterable[Sequence[int]], vocabulary: int, top: int) -> dict[str, np.ndarray]:
    """The arrays of a table.

    Args:
        texts: token ids, all below `vocabulary`; tri-grams do not cross from one to the next.
        top: successors kept per pair.
    Returns: `keys` int64 [n], first token << 32 | second, rising; `offsets` int64 [n + 1] into `successors` int32 and
        `probabilities` float32, the latter falling inside a pair.
    Raises: DataError when no text has three tokens.
    """
    assert vocabulary**3 < 2**63  # three tokens in one number
    codes = counts = np.empty(0, np.int64)
    waiting: list[np.ndarray] = []
    size = 0
    for text in texts:
        ids = np.asarray(text, np.int64)
        waiting.append((ids[:-2] * vocabulary + ids[1:-1]) * vocabulary + ids[2:])
        size += len(ids)
        if size > WAITING:
            codes, counts = _merged(codes, counts, waiting)
            waiting, size = [], 0
    codes, counts = _merged(codes, counts, waiting)
    if not len(codes):
        raise DataError("no text of three tokens or more: there is nothing to count")
    pairs, starts, which = np.unique(codes // vocabulary, return_index=True, return_inverse=True)
    chance = (counts / np.add.reduceat(counts, starts)[which]).astype(np.float32)
    order = np.lexsort((codes, -chance, which))
    order = order[(np.arange(len(codes)) - starts[which]) < top]  # sorting has left every pair in its place
    return {
        "keys": pairs // vocabulary << 32 | pairs % vocabulary,
        "offsets": np.searchsorted(which[order], np.arange(len(pairs) + 1)),
        "successors": (codes[order] % vocabulary).astype(np.int32),
        "probabilities": chance[order],
    }


def _merged(codes: np.ndarray, counts: np.ndarray, waiting: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    new, times = np.unique(np.concatenate([*waiting, codes[:0]]), return_counts=True)
    every, which = np.unique(np.concatenate([codes, new]), return_inverse=True)
    return every, np.bincount(which, np.concatenate([counts, times]), len(every)).astype(np.int64)
