"""Which method suits a model, its prompts and this machine: a race against the clock.

First the price of a pass is measured: what it costs to verify so many tokens instead of one. Methods whose drafts can
not pay even if every token were accepted do not start. The others write the user's own prompts, group by group, in
turn; after each group those leave that are slower than the leader with all but 5 % of the bootstrap.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from baton.bench.contenders import PLAIN, Ours
from baton.bench.metrics import Interval, groups, interval, speedup
from baton.bench.record import Record
from baton.bench.runner import measure_group, write
from baton.bench.suites import Suite
from baton.drafters import make
from baton.errors import BatonError
from baton.machine import Quiet
from baton.models.prompts import tokenize_prompts
from baton.models.writer import Writer
from baton.runtime.profile import measure_profile
from baton.types import Sampling

# What races by default: short and long drafts of each method that needs nothing but the target.
CANDIDATES = (
    "prompt-lookup:num_draft_tokens=4",
    "prompt-lookup:num_draft_tokens=10",
    "token-recycling:num_draft_tokens=8",
    "token-recycling:num_draft_tokens=24",
    "token-recycling:num_draft_tokens=80",
)
WITH_SMALL_MODEL = ("num_draft_tokens=2", "num_draft_tokens=4", "num_draft_tokens=8")
AT_LEAST = 4  # groups that every runner writes before anyone leaves


@dataclass(frozen=True)
class Standing:
    """One method in the race."""

    method: str
    speedup: float
    speedup_interval: Interval
    groups: int
    left: str = ""  # why it left; empty for those that reached the end


@dataclass(kw_only=True)
class Tuning:
    """The result of a race."""

    winner: str
    standings: list[Standing]  # best first
    price: dict[int, float] = field(default_factory=dict)  # tokens of a pass -> seconds
    records: list[Record] = field(default_factory=list)

    def to_toml(self, model: str, batch_size: int) -> str:
        """What `baton generate` reads."""
        best = self.standings[0]
        low, high = best.speedup_interval
        return (
            f"# Written by `baton tune`: {best.speedup:.2f}x plain decoding [{low:.2f}, {high:.2f}], "
            f"{best.groups} groups at batch {batch_size}.\n"
            f"[generate]\nmodel = {_quoted(model)}\ndrafter = {_quoted(self.winner)}\n"
        )


def tune(
    writer: Writer,
    suite: Suite,
    *,
    candidates: Sequence[str] = CANDIDATES,
    assistant: str | None = None,
    seconds: float = 300,
    batch_size: int = 1,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    progress: Callable[[float, str], None] | None = None,
) -> Tuning:
    """Race methods on prompts; plain decoding always takes part, and wins where nothing is faster.

    Args:
        assistant: folder or Hub id of a small model that also races, as a draft model.
        seconds: when the race ends, unless only one is left before; each group that has begun is finished.
        progress: called with (seconds gone, the leader).
    Raises: BatonError when every method fails.
    """
    started = time.perf_counter()
    specs = [*candidates, *(f"draft-model:model={assistant},{rest}" for rest in WITH_SMALL_MODEL if assistant)]
    ids = tokenize_prompts(writer.prompt_tokenizer, [suite.tasks[0].prompt], writer.prompt_limits, truncate=True)[0]
    price = measure_profile(writer, contexts=[len(ids)], batches=[batch_size]).price(len(ids), batch_size)
    standings: list[Standing] = []
    racing: list[Ours] = []
    options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": max_new_tokens, "max_rows": batch_size}
    for spec in (PLAIN, *specs):
        most = best_possible(spec, price)
        if most < 1:
            standings.append(Standing(spec, most, (most, most), 0, "cannot pay: verifying its draft costs too much"))
        else:
            racing.append(Ours(writer, spec, **options))
    records: list[Record] = []
    quiet, turn = Quiet(), 0
    count = max(1, len(suite.tasks) // batch_size)
    prompts = [suite.tasks[index].prompt for index in range(min(batch_size, len(suite.tasks)))]
    for contender in racing:
        write(contender, prompts, 0)  # warms up
    while len(racing) > 1 and (turn < AT_LEAST or time.perf_counter() - started < seconds):
        number, repeat = turn % count, turn // count
        indices = list(range(number * batch_size, min((number + 1) * batch_size, len(suite.tasks))))
        unit = (suite.name, batch_size, repeat, number)
        records += measure_group(writer, racing, suite, indices, unit, quiet, sampling.seed)
        turn += 1
        if turn < AT_LEAST:
            continue
        now = sorted((_standing(records, c.name) for c in racing), key=lambda s: -s.speedup)
        for standing in now:
            slower = standing.speedup_interval[1] < now[0].speedup_interval[0]
            if standing.method != PLAIN and (slower or not standing.groups):  # plain decoding is what others are over
                why = "slower than the leader" if standing.groups else _error(records, standing.method)
                standings.append(replace(standing, left=why))
                racing = [c for c in racing if c.name != standing.method]
        if len(racing) == 2 and now[0].method != PLAIN and now[0].speedup_interval[0] > 1:
            break  # one is left, and it is faster than plain decoding for certain
        if progress is not None:
            progress(time.perf_counter() - started, now[0].method)
    final = sorted((_standing(records, c.name) for c in racing), key=lambda s: -s.speedup) if records else []
    if final and not final[0].groups:
        raise BatonError(f"every method failed: {_error(records, final[0].method)}")
    final = final or [Standing(PLAIN, 1.0, (1.0, 1.0), 0)]
    # A method must be faster than plain decoding for certain: drafting costs memory and adds noise.
    if final[0].method != PLAIN and final[0].speedup_interval[0] <= 1:
        final.sort(key=lambda s: s.method != PLAIN)
    ranked = final + sorted(standings, key=lambda s: -s.speedup_interval[0] if s.groups else 0)
    return Tuning(winner=ranked[0].method, standings=ranked, price=price, records=records)


def best_possible(spec: str, price: dict[int, float]) -> float:
    """The speed-up of a method if the deepest path of its draft were accepted at every step, and drafting were free."""
    drafter = make(spec)
    nodes = getattr(drafter, "num_draft_tokens", 0)
    depth = min(nodes, getattr(drafter, "max_depth", nodes)) if getattr(drafter, "branches", 2) > 1 else nodes
    known = [count for count in price if count >= nodes + 1] or [max(price)]
    return (depth + 1) * price[1] / price[min(known)]


def _standing(records: Sequence[Record], name: str) -> Standing:
    plain = {group.key: group for group in groups(r for r in records if r.contender == PLAIN)}
    pairs = [(plain[g.key], g) for g in groups(r for r in records if r.contender == name) if g.key in plain]
    if not pairs:
        return Standing(name, 0.0, (0.0, 0.0), 0)
    return Standing(name, speedup(pairs), interval(pairs, speedup), len(pairs))


def _error(records: Sequence[Record], name: str) -> str:
    return next((r.error for r in records if r.contender == name and r.failed), "it wrote nothing")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
