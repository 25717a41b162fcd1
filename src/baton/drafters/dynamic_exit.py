"""DEL: the target drafts with its own first layers; how many, and how far, is learned while it writes.

Source: arXiv 2504.05598. Lossless: yes. Training: the target's, as for `layerskip`. Memory: 4 numbers per layer and
request, and all layers' states of a prompt while it is read. Draft cost: that of `layerskip`, and the output head over
all layers of what was accepted (`every` thins both). Helps where `layerskip` does. After each step every layer is
asked, by norm and head, what it would have said; how often that was the last one's token tells what a draft of each
length would yield per layer run.

Unlike the paper and its code: agreement is counted on the accepted path, which in greedy decoding is the same; a layer
that was never right or never wrong has a threshold too; where no draft pays, none is made; exit_layer and length are
chosen after the prompt already, the first draft is of one token all the same. The rows of a batch share the exit: that
of most tokens, of all rows together, per layer run; each row stops by its own threshold. When sampling, the most
probable tokens are proposed and the text is that of plain decoding; sample=true draws them and tests p/q.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from baton.best import best
from baton.draft import Draft
from baton.drafters.parts.early_exit import EarlyExit
from baton.engine.drafter import Joined, Seen, at_least
from baton.engine.request import Request
from baton.errors import UnknownOption

if TYPE_CHECKING:
    from baton.engine.loop import Engine

CONTEXT = 32  # last positions of the prompt that are counted
ROWS_AT_ONCE = 512  # that layers are asked about: logits take memory


@dataclass(kw_only=True)
class DynamicExit(EarlyExit):
    num_draft_tokens: int = 18  # most tokens proposed per decode step
    decay: float = 0.95  # what a count still weighs one step later
    every: int = 1  # only every so many layers can be the exit: asking all costs time where the vocabulary is large
    count_head: bool = False  # an exit's costs also hold the output head, by its size beside a layer's
    name = "del"
    # float64 [4, candidates]: hits, misses, and the sums of their probabilities
    _tables: "WeakKeyDictionary[Request, np.ndarray]" = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        at_least(self, num_draft_tokens=1, every=1)
        if not 0 <= self.decay <= 1:
            raise UnknownOption(f"{self.name}: decay={self.decay} is not possible: it must be between 0 and 1")

    def attach(self, engine: "Engine") -> None:
        super().attach(engine)
        self.candidates = list(range(self.every, self.depth, self.every))
        if not self.candidates:
            raise UnknownOption(f"{self.name}: every={self.every} is not possible: there are {self.depth} layers")
        self.layers = frozenset([*self.candidates, self.depth])
        layer = sum(weight.numel() for weight in engine.target.layers[0].parameters())
        self.head_cost = engine.target.lm_head.weight.numel() / layer if self.count_head else 0.0
        self.lower: dict[int, Tensor] = {}  # what the exit's layers gave of the latest drafts

    def join(self, joined: Joined) -> None:
        if not joined.hidden:  # a controller that rests asks for none: these requests begin with nothing known
            return
        # An encoder-decoder's layers have read its start token.
        lengths = joined.inputs.mask.sum(1).tolist() if self.engine.target.reads_prompt else [1] * len(joined.requests)
        places = [range(max(0, length - CONTEXT), length) for length in lengths]
        truth = self.engine.target.head(_picked(joined.hidden[self.depth], places)).argmax(-1)
        self._count(joined.requests, joined.hidden, places, truth)

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        tables = np.stack([self._table(request) for request in requests])
        place, length = self.plan(tables)
        # The planned length decides whether to draft; how far, the thresholds.
        longest = self.num_draft_tokens if length else 0
        depths = [min(longest if request.steps else 1, longest, request.room) for request in requests]
        stops, below = thresholds(tables)[:, place].tolist(), self.candidates[: place + 1]
        drafts, self.lower = self.chains(requests, self.candidates[place], depths, stops, below)
        return drafts

    def plan(self, tables: np.ndarray) -> tuple[int, int]:
        """Which candidate drafts, and how far that would pay, for rows with these tables [rows, 4, candidates]."""
        costs = np.array(self.candidates) + self.head_cost
        return best_exit(rates(tables), costs, self.depth + self.head_cost, self.num_draft_tokens)

    def observe(self, seen: Seen) -> None:
        places = [range(0 if verdict is None else len(verdict.accepted) + 1) for verdict in seen.verdicts]
        lower, self.lower = self.lower, {}  # used once: the next draft may be another method's
        self._count(seen.requests, {**seen.hidden, **lower}, places, _picked(seen.logits, places).argmax(-1))

    def _table(self, request: Request) -> np.ndarray:
        return self._tables.setdefault(request, np.zeros((4, len(self.candidates))))

    def _count(
        self, requests: Sequence[Request], hidden: Mapping[int, Tensor], places: Sequence[range], truth: Tensor
    ) -> None:
        """Ask each layer for its token at some places per row, and count how often it is the last layer's, `truth`."""
        if not len(truth):
            return
        hits, chances = [], []
        states = torch.stack([_picked(hidden[layer], places) for layer in self.candidates])  # [layers, n, d]
        for some in states.split(max(1, ROWS_AT_ONCE // len(truth))):
            logits = self.engine.target.head(some).float()
            values, tokens = best(logits)
            hits.append(tokens == truth)
            chances.append((values - logits.logsumexp(-1)).exp())
        hit, sure = torch.cat(hits).cpu().numpy(), torch.cat(chances).double().cpu().numpy()
        end = 0
        for request, columns in zip(requests, places, strict=True):
            start, end = end, end + len(columns)
            h, c = hit[:, start:end], sure[:, start:end]
            new = np.stack([h.sum(1), (~h).sum(1), (h * c).sum(1), (~h * c).sum(1)])
            self._tables[request] = self.decay * self._table(request) + new


def rates(tables: np.ndarray) -> np.ndarray:
    """How often layers agree with the last one, [..., layers]; 0 where nothing is known."""
    hits, misses, *_ = np.moveaxis(tables, -2, 0)
    return _share(hits, hits + misses, 0.0)


def thresholds(tables: np.ndarray) -> np.ndarray:
    """Probabilities halfway between those of tokens that were right and wrong, [..., layers]."""
    hits, misses, sure_hits, sure_misses = np.moveaxis(tables, -2, 0)
    return (_share(sure_hits, hits, 1.0) + _share(sure_misses, misses, 0.0)) / 2


def best_exit(alpha: np.ndarray, costs: np.ndarray, whole: float, longest: int) -> tuple[int, int]:
    """The layer and the draft's length that give most tokens, of all rows together, per layer run.

    Args:
        alpha: [rows, layers], how often a layer is right.
        costs: [layers], of drafting one token; whole: of a pass without drafts.
        longest: draft, tokens.
    Returns: the layer's place in `costs`, and a length of 0 to `longest`.
    """
    lengths = np.arange(longest + 1)
    tokens = (alpha[..., None] ** lengths).cumsum(-1).sum(0)  # 1 + alpha + alpha ** 2 + ...
    place, length = np.unravel_index((tokens / (costs[:, None] * lengths + whole)).argmax(), tokens.shape)
    return int(place), int(length)


def _share(part: np.ndarray, whole: np.ndarray, unknown: float) -> np.ndarray:
    return np.divide(part, whole, out=np.full_like(part, unknown), where=whole > 0)


def _picked(states: Tensor, places: Sequence[range]) -> Tensor:
    """[b, n, ...] at some places per row, one after the other: [all places, ...]."""
    return torch.cat([rows[columns.start : columns.stop] for rows, columns in zip(states, places, strict=True)])
