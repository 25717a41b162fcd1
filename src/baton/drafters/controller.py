"""Controller: any drafter, only where it pays, and only as much of it as pays.

Source: the length rule of DEL, arXiv 2504.05598, with measured seconds in place of layers. Lossless: as its drafter.
Training: none. Draft cost: some microseconds a step. Helps wherever texts may be unpredictable, or rows cost time.
At each step it knows how many tokens drafts of each size would have given lately, and what a pass of that size costs:
it takes the sizes with the most tokens per second, one for each row, or decodes plainly. What it may lose is bounded by
a purse of seconds, filled with a small share of the time and with what drafting has won; without money it only looks at
a draft now and then, and compares it with what is written anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakSet

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

FULL, EMPTY = 100, 2  # plain steps that the purse can hold, and that it starts with
GLANCE = 8  # nodes of a draft that is only looked at
PROBE = SIZES[2]  # nodes that are tried where nothing seems to pay
PRICES = (0.03, 0.07, 0.15, 0.3, 0.5)  # in a batch: tokens that a node must bring, for a row to take it
CURIOUS, CHECK = 12, 40  # so often a draft is one size larger than it seems wise, and steps are plain, to know both
FIRST, REST = 8, 7  # steps that are plain at first; and in a row, where drafting does not pay: asking takes time too


@dataclass(frozen=True)
class Plan:
    """What is done in one step."""

    requests: Sequence[Request] = ()
    sizes: Sequence[int] = ()  # nodes that each draft may have
    look: bool = False  # drafts are made, and not verified

    @property
    def plain(self) -> bool:
        return not any(self.sizes)


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
        self._plan = Plan()  # of the latest step
        self._looked: dict[Request, tuple[Draft, int]] = {}  # drafts that were looked at, and where
        self._plain: dict[int, float] = {}  # requests -> seconds of a plain step, lately
        self._slower: dict[tuple[int, int], float] = {}  # (requests, about so many nodes) -> times what was expected
        self._draft_s: dict[int, float] = {}  # nodes of the largest draft -> seconds that the drafter took, lately
        self._extras: dict[tuple[int, int, int], float] = {}
        self._met: WeakSet[Request] = WeakSet()  # requests that the drafter has drafted for

    @property
    def draws(self) -> bool:
        return self.drafter.draws

    def attach(self, engine: "Engine") -> None:
        self.drafter.attach(engine)
        self.layers = self.drafter.layers
        self.ragged = engine.target.ragged
        self.costs = quick_profile(engine.writer, rows=(1, 4, 16, 64), batches=sorted({1, engine.max_rows}))

    def join(self, joined: Joined) -> None:
        self.drafter.join(joined)

    def select(self, rows: Sequence[int]) -> None:
        self.drafter.select(rows)

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        if self._resting and len(requests) == len(self._plan.requests):
            self._resting -= 1
            return [NOTHING] * len(requests)
        self._account()
        self._compare(requests)
        self._steps += 1
        self._plan = plan = self._decide(requests)
        self._resting = REST if plan.plain and self._steps > FIRST else 0
        self.begun = None
        self.layers = frozenset() if plan.plain else self.drafter.layers  # of this pass, and of prompts read after it
        if plan.plain:
            return [NOTHING] * len(requests)
        for request, size in zip(requests, plan.sizes, strict=True):
            request.worthwhile = size
        drafts = self.drafter.propose(requests)
        if plan.look:
            self._looked = {r: (d, len(r.tokens)) for r, d in zip(requests, drafts, strict=True) if d.tokens}
            return [NOTHING] * len(requests)
        self.begun = self.drafter.begun
        # Where the target has begun with a draft already, it goes on with all of it.
        return drafts if self.begun is not None else [cut(d, n) for d, n in zip(drafts, plan.sizes, strict=True)]

    def observe(self, seen: Seen) -> None:
        plan = self._plan
        if plan.plain:
            return  # what a resting drafter misses costs speed only
        self.drafter.observe(seen)
        if plan.look:
            return
        known = zip(seen.requests, seen.drafts, seen.verdicts, plan.sizes, strict=True)
        for request, draft, verdict, size in known:
            if verdict is not None and draft.tokens:
                self.worth.learn(request, draft, verdict.accepted, whole=len(draft) < size)

    def _compare(self, requests: Sequence[Request]) -> None:
        """Drafts that were only looked at, with what was written instead."""
        for request, (draft, start) in list(self._looked.items()):
            if request not in requests or len(request.tokens) >= start + draft.tree.depth:
                after = iter(request.tokens[start:])
                verdict = follow(draft, lambda _, after=after: next(after, -1))  # type: ignore[misc]
                self.worth.learn(request, draft, verdict.accepted if verdict else (), whole=len(draft) < GLANCE)
                del self._looked[request]

    def _decide(self, requests: Sequence[Request]) -> Plan:
        rows = len(requests)
        plain, nothing = self._plain_s(rows), Plan(requests, [0] * rows)
        look = Plan(requests, [GLANCE] * rows, look=True)
        if not plain or self._steps <= FIRST or self._steps % CHECK == 0:
            return nothing
        if not self._draft_s:  # before anything is risked
            return look
        context = len(requests[0].context) + len(requests[0].tokens)
        if self.purse >= 0:
            worth = [self.worth.of(request) for request in requests]
            best, rate = nothing.sizes, rows / plain
            for places in self._choices(worth):
                sizes = [SIZES[place] if place >= 0 else 0 for place in places]
                gain = sum(own[place] for own, place in zip(worth, places, strict=True) if place >= 0)
                if (found := (rows + gain) / self._seconds(sizes, context)) > rate:
                    best, rate = sizes, found
            if any(best):
                return Plan(requests, [_larger(size) for size in best] if self._steps % CURIOUS == 0 else best)
            probe = [PROBE] * rows
            if self.purse > 4 * (self._seconds(probe, context) - plain):  # nothing seems to pay, but texts change
                return Plan(requests, probe)
        return look if not self._looked and self.glances > self._drafting_s(GLANCE) else nothing

    def _choices(self, worth: Sequence[Sequence[float]]) -> list[list[int]]:
        """Sizes that may be the best, as places in `SIZES` per row; -1: no draft."""
        if len(worth) == 1 or not self.ragged:  # padding would cost as much as drafts
            return [[place] * len(worth) for place in range(len(SIZES))]
        return [[_dearest(own, price) for own in worth] for price in PRICES]

    def _seconds(self, sizes: Sequence[int], context: int) -> float:
        """Of a step with drafts of such sizes."""
        expected = self._expected_s(sizes, context)
        # What was measured counts as much as what was to be expected: a size that was slow once is tried again.
        return expected * (1 + self._slower.get(self._about(sizes), 1.0)) / 2

    def _expected_s(self, sizes: Sequence[int], context: int) -> float:
        rows, nodes = len(sizes), self._nodes(sizes)
        return self._plain_s(rows) + self._extra_s(rows, nodes, context) + self._drafting_s(max(sizes))

    def _nodes(self, sizes: Sequence[int]) -> int:
        """That a pass must compute."""
        return sum(sizes) if self.ragged else max(sizes) * len(sizes)

    def _about(self, sizes: Sequence[int]) -> tuple[int, int]:
        return len(sizes), self._nodes(sizes).bit_length()

    def _extra_s(self, rows: int, nodes: int, context: int) -> float:
        """Seconds that a pass over drafts of so many nodes takes longer than one without."""
        key = rows, nodes, context // 256
        if key not in self._extras:
            with_drafts, without = (self.costs.cost(count, context, rows) for count in (1 + nodes / rows, 1))
            self._extras[key] = max(0.0, with_drafts - without)
        return self._extras[key]

    def _plain_s(self, rows: int) -> float:
        """Seconds of a plain step; 0 where none was seen."""
        if rows not in self._plain:
            if not self._plain:
                return 0.0
            near = min(self._plain, key=lambda each: abs(each - rows))
            return self._plain[near] * self.costs.cost(1, 0, rows) / self.costs.cost(1, 0, near)
        return self._plain[rows]

    def _drafting_s(self, size: int) -> float:
        """Seconds that the drafter takes, as far as is known."""
        if size not in self._draft_s and self._draft_s:
            return self._draft_s[max([s for s in self._draft_s if s < size], default=min(self._draft_s))]
        return self._draft_s.get(size, 0.0)

    def _account(self) -> None:
        """Take in what the latest step has taken and given."""
        plan = self._plan
        steps, rows = [request.steps[-1] for request in plan.requests if request.steps], len(plan.requests)
        if not steps:
            return
        seconds, size = steps[0].draft_s + steps[0].verify_s + steps[0].other_s, max(plan.sizes)
        asked = {request for request, own in zip(plan.requests, plan.sizes, strict=True) if own}
        first = not asked <= self._met  # the drafter may have read a prompt: paid for, but no sign of what follows
        self._met |= asked
        if size and not first:
            self._draft_s[size] = _lately(self._draft_s.get(size), steps[0].draft_s)
        if plan.look:
            self.glances -= steps[0].draft_s if first else self._draft_s[size]
        elif plan.plain:
            self._plain[rows] = _lately(self._plain.get(rows), seconds, low=True)
            if self._steps == FIRST:
                self.purse = EMPTY * self._plain[rows]
        elif plain := self._plain_s(rows):
            expected = self._expected_s(plan.sizes, len(plan.requests[0].context) + len(plan.requests[0].tokens))
            if not first:
                about = self._about(plan.sizes)
                self._slower[about] = _lately(self._slower.get(about, 1.0), seconds / expected)
                seconds = min(seconds, 2 * expected)
            won = sum(step.emitted for step in steps) / len(steps) * plain - seconds
            self.purse = min(self.purse + won, FULL * plain)
        passed = (1 if not plan.plain or self._steps <= FIRST else 1 + REST) * self.explore / 2 * seconds
        self.purse += passed
        self.glances += passed


def _larger(size: int) -> int:
    """The next size; none stays none."""
    return SIZES[min(SIZES.index(size) + 1, len(SIZES) - 1)] if size else 0


def _dearest(worth: Sequence[float], price: float) -> int:
    """The place of the size whose tokens exceed the price of its nodes most; -1: none does."""
    gains = [tokens - price * size for tokens, size in zip(worth, SIZES, strict=True)]
    best = max(gains)
    return gains.index(best) if best > 0 else -1


def _lately(known: float | None, new: float, *, low: bool = False) -> float:
    """A moving mean that one step that was held up by something else on the machine does not move far.

    Args:
        low: a low value instead, for plain steps: few of them are seen, and none is faster than it should be.
    """
    if known is None:
        return new
    return known + (0.15 if not low else 0.5 if new < known else 0.05) * (min(new, 2 * known) - known)
