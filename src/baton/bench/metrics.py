"""Metrics, each derived from raw records, each with one meaning.

Ours, those of vLLM: acceptance length is tokens per decode step with the target's own, so plain decoding has 1; the
acceptance rate is accepted over drafted. Tokens per second are all tokens over all seconds, tokens counted as ids.
Others mean other things by the same words; `conventions` says what they would print for the same records.
"""

import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from baton.bench.record import SCHEMA, Record, Run, read_run
from baton.machine import BUSY
from baton.types import TARGET

RESAMPLES = 1000
PERCENT = 0.95  # of bootstrap resamples that an interval holds

Interval = tuple[float, float]


@dataclass(frozen=True)
class Group:
    """Requests that one contender wrote together."""

    key: tuple[str, int, int, int]  # suite, batch size, repeat, group: what was written by every contender
    seconds: float
    tokens: int


@dataclass(kw_only=True)
class Summary:
    """What a contender did at one batch size. None: it does not tell, or there is nothing to divide by."""

    contender: str
    family: str
    batch_size: int
    requests: int
    failed: int
    different: int | None  # requests whose tokens are not plain decoding's; None for those that need not be
    tokens: int
    seconds: float
    tokens_per_second: float
    tokens_per_second_interval: Interval  # 95 %, bootstrap over groups
    speedup: float | None  # plain decoding's seconds per token over this one's, on the same groups
    speedup_interval: Interval | None
    ttft_ms: float | None  # median over requests: read, and first token
    tpot_ms: float | None  # mean milliseconds per output token after the first
    acceptance_length: float | None
    acceptance_rate: float | None
    acceptance_by_position: list[float] = field(default_factory=list)  # share of drafts accepted to this depth and more
    share: dict[str, float] = field(default_factory=dict)  # of the decode seconds: draft, verify, other
    accepted_by_source: dict[str, float] = field(default_factory=dict)  # share of the tokens that each wrote
    conventions: dict[str, float] = field(default_factory=dict)  # the same records in the words of others
    busy: float = 0.0  # share of the groups that a busy machine may have slowed

    @property
    def remarks(self) -> list[str]:
        """What a reader must know before the speed means anything."""
        said = []
        if self.failed:
            said.append(f"{self.failed} of {self.requests} failed")
        if self.different:
            said.append(f"{self.different} of {self.requests} texts differ")
        if self.family == "hand-off":
            said.append("writes its own texts")
        if self.busy > 0.1:
            said.append(f"machine busy in {self.busy:.0%}")
        return said


def groups(records: Iterable[Record]) -> list[Group]:
    """Of one contender; groups with a failed request are left out."""

    def key(record: Record) -> tuple[str, int, int, int]:
        return record.suite, record.batch_size, record.repeat, record.group

    found = []
    for name, members in groupby(sorted(records, key=key), key):
        rows = list(members)
        if not any(row.failed for row in rows):
            found.append(Group(name, rows[0].group_s, sum(len(row.token_ids) for row in rows)))
    return found


def tokens_per_second(of: Sequence[Group]) -> float:
    return sum(group.tokens for group in of) / sum(group.seconds for group in of)


def speedup(pairs: Sequence[tuple[Group, Group]]) -> float:
    """How many times less a token takes than with the first of each pair. Both wrote the same prompts."""
    plain, own = [a for a, _ in pairs], [b for _, b in pairs]
    return tokens_per_second(own) / tokens_per_second(plain)


def interval(items: Sequence[Any], measure: Callable[[Sequence[Any]], float], seed: int = 0) -> Interval:
    """The middle 95 % of a measure over resamples of its items, with replacement (bootstrap percentiles)."""
    chance = random.Random(seed)
    values = sorted(measure(chance.choices(items, k=len(items))) for _ in range(RESAMPLES))
    out = round((1 - PERCENT) / 2 * (RESAMPLES - 1))
    return values[out], values[-1 - out]


def acceptance_length(records: Iterable[Record]) -> float | None:
    """Mean tokens per decode step, the target's own included. The first token is prefill's and in no step."""
    steps = [step for record in records for step in record.steps]
    return sum(step.emitted for step in steps) / len(steps) if steps else None


def acceptance_rate(records: Iterable[Record]) -> float | None:
    """Accepted over drafted tokens."""
    steps = [step for record in records for step in record.steps]
    drafted = sum(step.num_drafted for step in steps)
    return sum(step.accepted for step in steps) / drafted if drafted else None


def acceptance_by_position(records: Iterable[Record]) -> list[float]:
    """For depths 1, 2, ...: the share of steps with a draft that accepted so many tokens or more."""
    accepted = [step.accepted for record in records for step in record.steps if step.num_drafted]
    return [
        sum(count >= depth for count in accepted) / len(accepted) for depth in range(1, max(accepted, default=0) + 1)
    ]


def conventions(records: Sequence[Record]) -> dict[str, float]:
    """What others print for the same records, by the name of the convention; empty without drafts.

    - `vllm_acceptance_length`: 1 + accepted / drafts. Only steps that had a draft count.
    - `vllm_acceptance_rate`: accepted / drafted tokens.
    - `spec_bench_accepted_tokens`: mean over all steps of accepted + 1, the end of the response not cut.
    - `spec_bench_tokens_per_second`: mean over requests of each one's tokens per second (batch 1).
    - `without_bonus`: mean over steps of accepted tokens alone (EAGLE's tables, and older papers).
    - `accepted_over_evaluated`: accepted / candidates that were compared; what was behind a refusal does not count.
    """
    steps = [step for record in records for step in record.steps]
    drafts = [step for step in steps if step.num_drafted]
    if not drafts:
        return {}
    accepted = sum(step.accepted for step in steps)
    made = {
        "vllm_acceptance_length": 1 + accepted / len(drafts),
        "vllm_acceptance_rate": accepted / sum(step.num_drafted for step in drafts),
        "spec_bench_accepted_tokens": statistics.fmean(step.accepted + 1 for step in steps),
        "without_bonus": accepted / len(steps),
        "accepted_over_evaluated": accepted / sum(step.evaluated for step in drafts),
    }
    alone = [record for record in records if record.batch_size == 1 and not record.failed]
    if alone:
        made["spec_bench_tokens_per_second"] = statistics.fmean(len(r.token_ids) / r.group_s for r in alone)
    return made


@dataclass(kw_only=True)
class Measurement:
    """A finished run."""

    run: Run
    records: list[Record]
    quality: dict[str, dict[str, float]] = field(default_factory=dict)  # contender -> metric -> value

    @cached_property
    def summaries(self) -> list[Summary]:
        return summarize(self.records, self.run.contenders)

    def to_dict(self) -> dict[str, Any]:
        """What is committed as a result: everything but the records."""
        return {
            "schema": SCHEMA,
            "run": asdict(self.run),
            "summaries": [asdict(summary) | {"remarks": summary.remarks} for summary in self.summaries],
            "quality": self.quality,
        }


def load_measurement(path: str | Path) -> Measurement:
    """From its file of records. Raises: DataError when it is none."""
    run, records, quality = read_run(path)
    return Measurement(run=run, records=records, quality=quality)


def summarize(
    records: Sequence[Record], families: Mapping[str, str], *, plain: str = "plain", usual_probe_s: float | None = None
) -> list[Summary]:
    """One row per contender and batch size, in the order in which they first appear.

    Args:
        families: contender -> family. Hand-offs write other texts; all others are compared with plain decoding.
        plain: the contender that speed-ups are over.
        usual_probe_s: of a quiet machine; None takes the smaller half's median of the records' own.
    """
    probes = sorted({record.probe_s for record in records if record.probe_s})
    usual = usual_probe_s or (statistics.median(probes[: len(probes) // 2 + 1]) if probes else 0.0)
    made = []
    for size in dict.fromkeys(record.batch_size for record in records):
        at = [record for record in records if record.batch_size == size]
        texts = {(r.suite, r.prompt): r.token_ids for r in at if r.contender == plain}
        reference = {group.key: group for group in groups(r for r in at if r.contender == plain)}
        for name in dict.fromkeys(record.contender for record in at):
            own = [record for record in at if record.contender == name]
            made.append(_summary(name, families.get(name, ""), size, own, texts, reference, usual))
    return made


def _summary(
    name: str,
    family: str,
    size: int,
    own: Sequence[Record],
    texts: Mapping[tuple[str, int], list[int]],
    reference: Mapping[tuple[str, int, int, int], Group],
    usual: float,
) -> Summary:
    fine = [record for record in own if not record.failed]
    done = groups(own)
    pairs = [(reference[group.key], group) for group in done if group.key in reference]
    told = [record for record in fine if record.timings.total_s]
    decoded = sum(step.emitted for record in fine for step in record.steps)
    seconds = {
        part: sum(getattr(step, f"{part}_s") for record in fine for step in record.steps)
        for part in ("draft", "verify", "other")
    }
    total = sum(seconds.values())
    wrote = [source for record in fine for source in record.sources]
    same_text = family != "hand-off" and bool(texts)
    return Summary(
        contender=name,
        family=family,
        batch_size=size,
        requests=len(own),
        failed=len(own) - len(fine),
        different=sum(r.token_ids != texts.get((r.suite, r.prompt)) for r in fine) if same_text else None,
        tokens=sum(group.tokens for group in done),
        seconds=sum(group.seconds for group in done),
        tokens_per_second=tokens_per_second(done) if done else 0.0,
        tokens_per_second_interval=interval(done, tokens_per_second) if done else (0.0, 0.0),
        speedup=speedup(pairs) if pairs else None,
        speedup_interval=interval(pairs, speedup) if pairs else None,
        ttft_ms=1000 * statistics.median(r.timings.total_s - r.timings.decode_s for r in told) if told else None,
        tpot_ms=1000 * sum(r.timings.decode_s for r in told) / decoded if told and decoded else None,
        acceptance_length=acceptance_length(fine),
        acceptance_rate=acceptance_rate(fine),
        acceptance_by_position=acceptance_by_position(fine),
        share={part: value / total for part, value in seconds.items()} if total else {},
        accepted_by_source={s: wrote.count(s) / len(wrote) for s in dict.fromkeys(wrote) if s != TARGET},
        conventions=conventions(fine),
        busy=sum(r.probe_s > BUSY * usual for r in own) / len(own) if usual else 0.0,
    )
