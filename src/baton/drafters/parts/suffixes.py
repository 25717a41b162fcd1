"""Suffix arrays over tokens: what followed, in a corpus, the longest ending of a text that occurs there.

A corpus is a folder (`parts.store`) of segments, each with three arrays of one length: the text, a symbol per token
(its id + 1, in the smallest dtype that holds the vocabulary) and 0 after each document, so that no match and no
continuation crosses a border; the places in it, ordered by the 32 symbols that begin there, then by place; and the
first of these symbols, as many as 64 bits hold, in that order. Adding text adds a segment; lookups ask all.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from baton.drafters.parts.store import HEADER, open_store, write_store
from baton.errors import DataError

KIND = "datastore"
SORTED = 32  # symbols by which suffixes are ordered: the longest span that can be searched for
SEGMENT = 2**24  # symbols after which a segment is full; sorting one takes 40 bytes for each


class Trie(NamedTuple):
    """Continuations, most frequent first; nodes stand after their parents."""

    tokens: list[int]
    parents: list[int]  # -1: the first token of a continuation
    counts: list[int]  # matches that go on like this
    matches: int  # that were looked at
    span: int  # tokens of the ending that was found; 0: none


NONE = Trie([], [], [], 0, 0)


class Segment(NamedTuple):
    text: np.ndarray  # [n], symbols
    order: np.ndarray  # uint32 [n], places in `text`
    keys: np.ndarray  # uint64 [n], the first symbols at these places
    bits: int  # of a symbol in a key

    @classmethod
    def build(cls, documents: Iterable[Sequence[int]], vocab: int) -> "Segment":
        """Raises: DataError for a token that is not below `vocab`."""
        parts = []
        for document in documents:
            tokens = np.asarray(document, dtype=np.int64)
            if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
                raise DataError(f"token {tokens.max()} in a vocabulary of {vocab}: tokenize with the model's tokenizer")
            parts += [tokens + 1, np.zeros(1, dtype=np.int64)]
        text = np.concatenate(parts).astype(np.min_scalar_type(vocab))
        bits = vocab.bit_length()
        known = 64 // bits
        keys: np.ndarray = np.zeros(len(text), dtype=np.uint64)
        for ahead in range(min(known, len(text))):
            keys[: len(text) - ahead] |= text[ahead:].astype(np.uint64) << (64 - bits * (ahead + 1))
        order: np.ndarray = np.argsort(keys, kind="stable")
        packed = keys[order]
        while known < SORTED:  # prefix doubling: two neighbouring ranks order twice as many symbols
            ranked = keys[order]
            rank: np.ndarray = np.empty_like(keys)
            rank[order] = np.cumsum(np.concatenate(([True], ranked[1:] != ranked[:-1])))
            keys = rank << 32
            keys[:-known] |= rank[known:]
            order = np.argsort(keys, kind="stable")
            known *= 2
        return cls(text, order.astype(np.uint32), packed, bits)

    def find(self, span: list[int]) -> tuple[int, int]:
        """The part of `order` where the text begins with these symbols, at most `SORTED`."""
        width = 64 // self.bits
        key, free = 0, 64 - self.bits * min(width, len(span))
        for symbol in span[:width]:
            key = key << self.bits | symbol
        first = int(self.keys.searchsorted(np.uint64(key << free)))
        last = int(self.keys.searchsorted(np.uint64(key << free | (1 << free) - 1), side="right"))
        if first == last or len(span) <= width:
            return first, last
        order: Any = self.order

        def rest(place: Any) -> list[int]:
            return self.text[int(place) + width : int(place) + len(span)].tolist()

        first = bisect_left(order, span[width:], first, last, key=rest)
        return first, bisect_right(order, span[width:], first, last, key=rest)


class Suffixes(NamedTuple):
    """Segments of one vocabulary."""

    segments: list[Segment]
    vocab: int

    @classmethod
    def open(cls, folder: str | Path, tokenizer: Any) -> "Suffixes":
        """What `add_documents` wrote, mapped into memory. Raises: as `open_store`."""
        about, arrays = open_store(folder, KIND, tokenizer)
        try:
            vocab = int(about["vocab"])
            names = [tuple(f"{name}-{i}" for name in ("text", "order", "keys")) for i in range(int(about["segments"]))]
            found = [[arrays[name].view(np.ndarray) for name in each] for each in names]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder}: its header lacks {error}: build the {KIND} again") from error
        if any(len(set(map(len, each))) != 1 for each in found):
            raise DataError(f"{folder}: arrays of different lengths: build the {KIND} again")
        return cls([Segment(text, order, keys, vocab.bit_length()) for text, order, keys in found], vocab)

    def lookup(
        self,
        context: Sequence[int],
        *,
        longest: int = 16,
        shortest: int = 2,
        most: int = 5000,
        ahead: int = 10,
        nodes: int = 64,
        known: int | None = None,
    ) -> Trie:
        """What follows the longest ending of `context` that occurs.

        Args:
            longest, shortest: tokens of the ending.
            most: matches that are looked at, evenly spaced where there are more.
            ahead: tokens read after each; nodes: most frequent beginnings of them that are given.
            known: tokens from here on end a continuation; None: as many as the vocabulary has.
        """
        query = [token + 1 for token in context[-longest:]]
        for place in reversed(range(len(query))):
            if query[place] > self.vocab:  # a row of the model's table that its tokenizer never gives
                del query[: place + 1]
                break
        span, found = self._longest(query, shortest)
        if not found:
            return NONE
        rows = _continuations(found, span, most, ahead)
        return _trie(rows, nodes, min(self.vocab, known or self.vocab), span)

    def _longest(self, query: list[int], shortest: int) -> tuple[int, list[tuple[Segment, int, int]]]:
        """An ending occurs only where every shorter one does, so its length can be searched for by halving."""
        low, high = shortest - 1, len(query)
        found: list[tuple[Segment, int, int]] = []
        while low < high:
            middle = (low + high + 1) // 2
            ranges = [(segment, *segment.find(query[-middle:])) for segment in self.segments]
            if hits := [each for each in ranges if each[1] < each[2]]:
                low, found = middle, hits
            else:
                high = middle - 1
        return low, found


def _continuations(found: list[tuple[Segment, int, int]], span: int, most: int, ahead: int) -> np.ndarray:
    """Symbols [matches, ahead] behind the matches, in lexicographic order."""
    total = sum(last - first for _, first, last in found)
    picks = np.arange(min(total, most)) * total // min(total, most)
    rows, before = [], 0
    for segment, first, last in found:
        low, high = picks.searchsorted((before, before + last - first))
        places = segment.order[picks[low:high] - before + first].astype(np.int64) + span
        ends = np.minimum(places[:, None] + np.arange(ahead), len(segment.text) - 1)  # the last symbol is a 0
        rows.append(segment.text[ends])
        before += last - first
    if len(rows) == 1 and span + ahead <= SORTED:
        return rows[0]
    together = np.concatenate(rows)
    return together[np.lexsort(together.T[::-1])]


def _trie(rows: np.ndarray, nodes: int, known: int, span: int) -> Trie:
    """The most frequent beginnings of sorted rows: equal beginnings stand together, so lengths of runs are counts."""
    matches, symbols = len(rows), np.ascontiguousarray(rows.T)  # depth by depth, also below
    alive = np.logical_and.accumulate((symbols > 0) & (symbols <= known))
    new = np.ones(symbols.shape, dtype=bool)
    new[:, 1:] = np.logical_or.accumulate(symbols[:, 1:] != symbols[:, :-1])
    starts = np.flatnonzero(new)
    counts = np.diff(starts, append=new.size)
    chosen = np.flatnonzero(alive.ravel()[starts])
    if len(chosen) > nodes:
        as_frequent = np.bincount(counts[chosen])[::-1].cumsum()  # runs by count, the highest first
        chosen = chosen[counts[chosen] >= len(as_frequent) - 1 - as_frequent.searchsorted(nodes)]
    # Of equal counts the shallower first, so a node never comes before its parent.
    chosen = chosen[np.argsort(-counts[chosen], kind="stable")[:nodes]]
    at = starts[chosen]
    run = new.ravel().cumsum() - 1
    above = np.where(at >= matches, run[at - matches], -1)
    place = {node: index for index, node in enumerate(chosen.tolist())}
    tokens = symbols.ravel()[at].astype(np.int64) - 1
    parents = [place.get(node, -1) for node in above.tolist()]
    return Trie(tokens.tolist(), parents, counts[chosen].tolist(), matches, span)


def add_documents(folder: str | Path, documents: Iterable[Sequence[int]], tokenizer: Any) -> dict[str, int]:
    """Add tokens to a corpus, new or from an earlier call; whatever happens, it is as it was or has all of them.

    Args:
        tokenizer: the one that gave the tokens.
    Returns: what the corpus holds then: vocab, segments, documents and tokens.
    Raises: DataError where there is no token to add, or as `open_store`; StorageError when the disk is full.
    """
    about = {"vocab": max(tokenizer.get_vocab().values()) + 1, "segments": 0, "documents": 0, "tokens": 0}
    if (Path(folder) / HEADER).exists():
        about = dict(open_store(folder, KIND, tokenizer).about)
    arrays = {}
    for batch in _batches(documents):
        segment = Segment.build(batch, about["vocab"])
        for name in ("text", "order", "keys"):
            arrays[f"{name}-{about['segments']}"] = getattr(segment, name)
        about["segments"] += 1
        about["documents"] += len(batch)
        about["tokens"] += sum(map(len, batch))
    if not arrays:
        raise DataError(f"{folder}: no text to add: every document is empty")
    write_store(folder, KIND, tokenizer, arrays, about)
    return about


def _batches(documents: Iterable[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Documents that are not empty, as many as fill a segment."""
    batch: list[Sequence[int]] = []
    size = 0
    for document in filter(len, documents):
        batch.append(document)
        size += len(document) + 1
        if size >= SEGMENT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
