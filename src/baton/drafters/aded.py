"""ADED: draft by a tree search over a table of tri-grams that follows what the target writes.

Source: arXiv 2407.12021. Lossless: yes. Training: none; the table is counted in a corpus (`baton build-table`), or in
the prompt alone. Memory: the corpus on disk, and per request the rows that it has changed. Draft cost: a search in
plain Python, of the order of a millisecond with a large table, less where little is known. Helps where the text is in
the corpus's style, or repeats itself; a target that is itself fast leaves little to gain.

The two newest tokens are the root, and PUCT goes down by `value + exploration * weight * sqrt(visits) / (1 + own
visits)`; what was visited most is the draft. Unlike the published code: a node's value counts the weight of the token
that is new at each step, not of one that is in the pair already; successors are sorted, so that equal tables give equal
drafts, and the best, not an arbitrary one, is looked at first; the search ends early where nothing is left to find;
drafts end `max_depth + 1` deep; where there are too many nodes the least visited are left out, not the longest paths;
a pair that is not known has no draft, not one of an arbitrary token. Rows that are changed belong to one request, so
what they take ends with it. Sampled text is verified by sample-and-match, which the published code only approaches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from baton.draft import NOTHING, Draft
from baton.drafters.parts.puct import Search
from baton.drafters.parts.trigrams import UNKNOWN, Corpus, Overlay, Pair, Row
from baton.engine.drafter import Drafter, Joined, at_least
from baton.engine.request import Request
from baton.errors import UnknownOption
from baton.sampling import uniform

if TYPE_CHECKING:
    from baton.engine.loop import Engine


@dataclass(kw_only=True)
class Aded(Drafter):
    table: str = ""  # folder that `baton build-table` made; without one, the prompt's own tri-grams are the start
    num_draft_tokens: int = 64  # most nodes of the tree
    num_paths: int = 24  # nodes taken from the search; each is followed by its best successor
    max_depth: int = 4  # tokens that the search looks ahead
    iterations: int = 150  # of the search, per step
    window: int = 16  # newest tokens whose tri-grams gain weight at each step
    gain: float = 0.04  # weight that a tri-gram gains
    max_weight: float = 3.0  # and has at most
    c1: float = 32.0  # exploration; more gives wider trees
    c2: float = 8.0  # visits, roughly, after which exploration grows
    name = "aded"
    _tables: "WeakKeyDictionary[Request, Overlay]" = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )
    _corpus: "Callable[[Pair], Row] | None" = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least(self, num_draft_tokens=1, num_paths=1, max_depth=1, iterations=1, window=3)
        for name, value in (("gain", self.gain), ("c1", self.c1)):
            if not value >= 0:
                raise UnknownOption(f"{self.name}: {name}={value} is not possible: it must be 0 or more")
        for name, value in (("max_weight", self.max_weight), ("c2", self.c2)):
            if not value > 0:
                raise UnknownOption(f"{self.name}: {name}={value} is not possible: it must be more than 0")

    def attach(self, engine: "Engine") -> None:
        if self.table:
            vocabulary = engine.target.lm_head.weight.shape[0]
            self._corpus = Corpus(self.table, engine.writer.response_tokenizer, vocabulary).row

    def join(self, joined: Joined) -> None:
        for request in joined.requests:
            self._tables[request] = overlay = Overlay(self._corpus or (lambda pair: UNKNOWN))
            if self._corpus is None:
                overlay.start(request.context)

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        return [self._draft(request, self._tables[request]) for request in requests]

    def _draft(self, request: Request, table: Overlay) -> Draft:
        newest = [*request.context[-self.window :], *request.tokens[-self.window :]][-self.window :]
        for first, second, third in zip(newest, newest[1:], newest[2:], strict=False):
            table.add((first, second), third, self.gain, self.max_weight)
        if len(newest) < 2 or request.room < 1:
            return NOTHING
        seed = uniform(request.sampling.seed, request.key, f"draft/{len(request.steps)}", len(request.tokens))
        search = Search(table.row, (newest[-2], newest[-1]), self.max_depth, Random(int(2**52 * seed)).random)
        search.run(self.iterations, self.num_paths, self.c1, self.c2)
        nodes = request.nodes(self.num_draft_tokens)
        return search.draft(self.num_paths, nodes, self.name).within(request.room)
