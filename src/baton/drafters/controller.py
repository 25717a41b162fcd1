"""Controller: any drafter, only where it pays, and only as much of it as pays.

Source: the length rule of DEL, arXiv 2504.05598, with measured seconds in place of layers. Lossless: as its drafter.
Training: none. Draft cost: some microseconds a step. Helps wherever texts may be unpredictable, or rows cost time.
At each step it knows how many tokens drafts of each size would have given lately, and what a pass of that size costs:
it takes the size with the most tokens per second, or decodes plainly. What it may lose is bounded by a purse of
seconds, filled with a small share of the time and with what drafting has won; without money it only looks at a draft
now and then, and compares it with what is written anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.draft import NOTHING, Draft
from baton.drafters.parts.worth import SIZES, Worth, cut
from baton.drafters.table import bare, make
from baton.engine.drafter import Drafter, Joined, Seen
from baton.engine.request import Request
from baton.errors import UnknownOption
from baton.runtime.profile import quick_profile
from baton.verify import follow

if TYPE_CHECKING:
    from baton.engine.loop import Engine

FULL, EMPTY = 100, 3  # plain steps that the purse can hold, and that it starts with
LOOK = -1  # in place of a size: a draft that is not verified
PROBE = 2  # place of the size that is tried where nothing seems to pay
CURIOUS, CHECK = 12, 40  # so often a draft is one size larger than it seems wise, and steps are plain, to know both
FIRST, REST = 8, 7  # steps that are plain at first; and in a row, where drafting does not pay: asking takes time too


@dataclass(kw_only=True)
class Controller(Drafter):
    base: str = "prompt-lookup"  # the method it governs, in brackets where it has options
    explore: float = 0.015  # share of the time that may be lost in finding out whether drafting pays
    memory: float = 0.85  # weight of earlier drafts against the newest one
    name = "controller"

    def __post_init__(self) -> None:
        if not (0 < self.explore < 1 and 0 < self.memory < 1):
            raise UnknownOption(f"{self.name}: explore and memory are shares between 0 and 1")
        self.drafter = make(bare(self.base))
        self.worth = Worth(self.memory)
        self.purse = 0.0  # seconds that may be lost by verifying drafts
        self.glances = 0.0  # ... and by making drafts that are only looked at
        self._steps = 0  # at which something was decided
        self._resting = 0  # steps that are plain without another thought
        self._under_way: tuple[list[Request], int] = ([], 0)  # requests of the latest step, and its drafts' size
        self._looked: dict[Request, tuple[Draft, int]] = {}  # drafts that were looked at, and where
        self._step_s: dict[tuple[int, int], float] = {}  # (requests, size) -> seconds of a step, lately
        self._draft_s: dict[int, float] = {}  # size -> seconds that the drafter took of them
        self._extras: dict[tuple[int, int], list[float]] = {}

    @property
    def draws(self) -> bool:
        return self.drafter.draws

    def attach(self, engine: "Engine") -> None:
        self.drafter.attach(engine)
        self.layers = self.drafter.layers
        self.costs = quick_profile(engine.writer, rows=(1, 4, 16, 64), batches=sorted({1, engine.max_rows}))

    def join(self, joined: Joined) -> None:
        self.drafter.join(joined)

    def select(self, rows: Sequence[int]) -> None:
        self.drafter.select(rows)

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        if self._resting and len(requests) == len(self._under_way[0]):
            self._resting -= 1
            self.layers = frozenset()  # nobody looks at them in this step
            return [NOTHING] * len(requests)
        self._account()
        self._compare(requests)
        self._steps += 1
        size = self._size(requests)
        self._resting = REST if size == 0 and self._steps > FIRST else 0
        self._under_way = (list(requests), size)
        self.begun = None
        if not size:
            self.layers = frozenset()
            return [NOTHING] * len(requests)
        drafts = self.drafter.propose(requests)
        if size == LOOK:
            self._looked = {r: (d, len(r.tokens)) for r, d in zip(requests, drafts, strict=True) if d.tokens}
            return [NOTHING] * len(requests)
        self.begun = self.drafter.begun
        # Where the target has begun with a draft already, it goes on with all of it.
        return drafts if self.begun is not None else [cut(draft, size) for draft in drafts]

    def observe(self, seen: Seen) -> None:
        self.layers = self.drafter.layers
        size = self._under_way[1]
        if size in (0, LOOK):
            return  # what a resting drafter misses costs speed only
        self.drafter.observe(seen)
        for request, draft, verdict in zip(seen.requests, seen.drafts, seen.verdicts, strict=True):
            if verdict is not None and draft.tokens:
                self.worth.learn(request, draft, verdict.accepted, whole=len(draft) < size)

    def _compare(self, requests: Sequence[Request]) -> None:
        """Drafts that were only looked at, with what was written instead."""
        for request, (draft, start) in list(self._looked.items()):
            if request not in requests or len(request.tokens) >= start + draft.tree.depth:
                after = iter(request.tokens[start:])
                verdict = follow(draft, lambda _, after=after: next(after, -1))  # type: ignore[misc]
                self.worth.learn(request, draft, verdict.accepted if verdict else (), whole=True)
                del self._looked[request]

    def _size(self, requests: Sequence[Request]) -> int:
        """Nodes per row that are worth verifying now; 0: none; or `LOOK`."""
        rows = len(requests)
        plain = self._plain_s(rows)
        if not plain or self._steps <= FIRST or self._steps % CHECK == 0:
            return 0
        extras = self._extra_s(rows, len(requests[0].context) + len(requests[0].tokens))
        seconds = [plain + extra + self._drafting_s(size) for size, extra in zip(SIZES, extras, strict=True)]
        # What was measured counts as much as what was to be expected: a size that was slow once is tried again.
        seconds = [(s + self._step_s.get((rows, size), s)) / 2 for size, s in zip(SIZES, seconds, strict=True)]
        if self.purse >= 0:
            worth = [self.worth.of(request) for request in requests]
            rates = [(rows + sum(each)) / taken for *each, taken in zip(*worth, seconds, strict=True)]
            best = max(range(len(SIZES)), key=rates.__getitem__)
            if rates[best] > rows / plain:
                return SIZES[min(best + (self._steps % CURIOUS == 0), len(SIZES) - 1)]
            if self.purse > 4 * (seconds[PROBE] - plain):  # nothing seems to pay, but texts change
                return SIZES[PROBE]
        return LOOK if not self._looked and self.glances > self._drafting_s(LOOK) else 0

    def _extra_s(self, rows: int, context: int) -> list[float]:
        """Seconds that a pass over drafts of each size takes longer than one without."""
        key = rows, context // 256
        if key not in self._extras:
            one = self.costs.cost(1, context, rows)
            self._extras[key] = [max(0.0, self.costs.cost(size + 1, context, rows) - one) for size in SIZES]
        return self._extras[key]

    def _plain_s(self, rows: int) -> float:
        """Seconds of a plain step; 0 where none was seen."""
        if (rows, 0) not in self._step_s:
            known = [each for each, size in self._step_s if size == 0]
            if not known:
                return 0.0
            near = min(known, key=lambda each: abs(each - rows))
            return self._step_s[near, 0] * self.costs.cost(1, 0, rows) / self.costs.cost(1, 0, near)
        return self._step_s[rows, 0]

    def _drafting_s(self, size: int) -> float:
        """Seconds that the drafter takes, as far as is known."""
        if size not in self._draft_s and self._draft_s:
            return self._draft_s[max([s for s in self._draft_s if s < size], default=min(self._draft_s))]
        return self._draft_s.get(size, 0.0)

    def _account(self) -> None:
        """Take in what the latest step has taken and given."""
        requests, size = self._under_way
        steps, rows = [request.steps[-1] for request in requests if request.steps], len(requests)
        if not steps:
            return
        seconds = steps[0].draft_s + steps[0].verify_s + steps[0].other_s
        if size:
            self._draft_s[size] = _lately(self._draft_s.get(size), steps[0].draft_s)
        if size == LOOK:
            self.glances -= self._draft_s[size]
        else:
            known = self._step_s.get((rows, size), seconds)
            self._step_s[rows, size] = _lately(known, seconds, low=not size)
            plain = self._plain_s(rows)
            if size and plain:
                won = sum(step.emitted for step in steps) / len(steps) * plain - min(seconds, 2 * known)
                self.purse = min(self.purse + won, FULL * plain)
            elif self._steps == FIRST:
                self.purse = EMPTY * plain
        passed = (1 if size or self._steps <= FIRST else 1 + REST) * self.explore / 2 * seconds
        self.purse += passed
        self.glances += passed


def _lately(known: float | None, new: float, *, low: bool = False) -> float:
    """A moving mean that one step that was held up by something else on the machine does not move far.

    Args:
        low: a low value instead, for plain steps: few of them are seen, and none is faster than it should be.
    """
    if known is None:
        return new
    return known + (0.15 if not low else 0.5 if new < known else 0.05) * (min(new, 2 * known) - known)
