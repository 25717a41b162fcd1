"""Two measurements of the same work: what became slower, faster, or another text."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from baton.bench.metrics import Interval, Measurement, acceptance_length, groups, interval, tokens_per_second
from baton.bench.record import Record
from baton.errors import BatonError


@dataclass(frozen=True, kw_only=True)
class Change:
    """One contender at one batch size, before and after."""

    contender: str
    batch_size: int
    before: float  # tokens per second
    after: float
    ratio: float  # after over before; below 1 is slower
    ratio_interval: Interval  # 95 %, bootstrap over groups
    acceptance_before: float | None
    acceptance_after: float | None
    different: int  # requests whose tokens are others than before
    verdict: str  # slower, faster, same, failed


def compare(before: Measurement, after: Measurement, *, threshold: float = 0.05) -> list[Change]:
    """Compare what both runs measured.

    Args:
        threshold: share of the speed that counts: a contender is slower (faster) where the whole interval of the
            ratio lies beyond it.
    Raises: BatonError when they did other work, or share no contender.
    """
    old, new = before.run, after.run
    for name in ("suites", "max_new_tokens", "sampling"):
        if getattr(old, name) != getattr(new, name):
            raise BatonError(f"the two runs cannot be compared: they differ in {name}")
    made = []
    for key in dict.fromkeys((r.contender, r.batch_size) for r in before.records):
        mine = [r for r in before.records if (r.contender, r.batch_size) == key]
        theirs = [r for r in after.records if (r.contender, r.batch_size) == key]
        if theirs:
            made.append(_change(*key, mine, theirs, threshold))
    if not made:
        raise BatonError("the two runs have no contender at the same batch size in common")
    return made


def _change(name: str, size: int, old: Sequence[Record], new: Sequence[Record], threshold: float) -> Change:
    texts = {(r.suite, r.prompt, r.repeat): r.token_ids for r in old}
    slow, fast = groups(old), groups(new)
    failed = any(record.failed for record in new) or not fast
    if not slow or failed:
        ratio, spread = 0.0, (0.0, 0.0)
    else:
        ratio = tokens_per_second(fast) / tokens_per_second(slow)
        chance = random.Random(1)  # the two runs are independent: each is resampled by itself
        spread = interval(
            fast, lambda some: tokens_per_second(some) / tokens_per_second(chance.choices(slow, k=len(slow)))
        )
    verdict = "same"
    if failed:
        verdict = "failed"
    elif spread[1] < 1 - threshold:
        verdict = "slower"
    elif spread[0] > 1 + threshold:
        verdict = "faster"
    return Change(
        contender=name,
        batch_size=size,
        before=tokens_per_second(slow) if slow else 0.0,
        after=tokens_per_second(fast) if fast else 0.0,
        ratio=ratio,
        ratio_interval=spread,
        acceptance_before=acceptance_length(old),
        acceptance_after=acceptance_length(new),
        different=sum(r.token_ids != texts.get((r.suite, r.prompt, r.repeat), r.token_ids) for r in new),
        verdict=verdict,
    )
