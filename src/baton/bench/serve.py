"""Requests that arrive while others are being written: what users wait for, at a given rate.

Arrivals are a Poisson process drawn once from a seed, the same for every method. The engine is stepped as a server
would step it: whoever has arrived is let in, then every row grows. Time to first token counts from the arrival,
waiting included.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from baton.bench.contenders import PLAIN
from baton.bench.runner import Progress
from baton.bench.suites import Suite
from baton.engine import Engine
from baton.engine.request import Request
from baton.errors import BatonError
from baton.machine import machine, revision, versions
from baton.models.writer import Writer
from baton.types import Sampling

PERCENTILES = (50, 90, 99)


@dataclass
class Visit:
    """One request from its arrival to its last token; seconds since the start."""

    prompt: int  # its index in the suite
    arrived_s: float
    first_s: float = 0.0  # when its first token was there
    ended_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    error: str = ""


@dataclass(kw_only=True)
class ServeSummary:
    """What the users of one method saw at one rate. Milliseconds by percentile."""

    contender: str
    rate: float  # requests per second that arrive
    requests: int
    failed: int
    different: int  # texts that are not plain decoding's
    seconds: float  # from the first arrival to the last token
    requests_per_second: float  # that were finished
    tokens_per_second: float
    ttft_ms: dict[str, float]  # arrival to first token
    tpot_ms: dict[str, float]  # per token after the first, of each request
    latency_ms: dict[str, float]  # arrival to last token


def bench_serve(
    writer: Writer,
    suite: Suite,
    *,
    methods: Sequence[str] = (),
    rates: Sequence[float] = (1.0,),
    requests: int = 100,
    max_rows: int = 16,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Serve the same arrivals with each method; plain decoding is always one of them.

    Args:
        rates: requests per second; requests: of each run, prompts taken in turn; seed: of the arrival times.
        max_rows: most requests written at once; others wait.
    Returns: `summaries`, with machine, versions and settings.
    Raises: BatonError for rates that are none.
    """
    if any(rate <= 0 for rate in rates) or requests < 1:
        raise BatonError(f"rates={list(rates)}, requests={requests}: both must be more than 0")
    summaries: list[ServeSummary] = []
    names = list(dict.fromkeys((PLAIN, *methods)))
    for rate in rates:
        arrivals = arrival_times(rate, requests, seed)
        plain: dict[int, list[int]] = {}
        for name in names:
            engine = Engine(writer, name, max_rows=max_rows)
            options = {"sampling": sampling, "max_new_tokens": max_new_tokens, "truncate": True}
            serve(engine, suite, [0.0] * min(max_rows, 4), options)  # warms up
            visits = serve(engine, suite, arrivals, options, what=f"{name}, {rate:g}/s", progress=progress)
            if name == PLAIN:
                plain = dict(enumerate(visit.token_ids for visit in visits))
            summaries.append(_summary(name, rate, visits, plain))
    return {
        "summaries": [asdict(summary) for summary in summaries],
        "machine": machine(),
        "versions": versions("torch", "transformers", "baton-decoding"),
        "git": revision(),
        "settings": {
            "model": str(getattr(writer.lm, "name_or_path", "")),
            "dtype": str(writer.lm.dtype).removeprefix("torch."),
            "suite": {suite.name: suite.about},
            "max_rows": max_rows,
            "max_new_tokens": max_new_tokens,
            "temperature": sampling.temperature,
            "seed": seed,
        },
    }


def arrival_times(rate: float, count: int, seed: int = 0) -> list[float]:
    """Seconds of a Poisson process with so many arrivals per second, the first at 0."""
    chance = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        times.append(times[-1] + chance.expovariate(rate))
    return times


def serve(
    engine: Engine,
    suite: Suite,
    arrivals: Sequence[float],
    options: dict[str, Any],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    what: str = "",
    progress: Progress | None = None,
) -> list[Visit]:
    """Let requests arrive at their times, and step the engine until all are answered.

    Args:
        options: of `Engine.requests`.
        progress: called with (what, done, total).
    """
    visits = [Visit(index % len(suite.tasks), at) for index, at in enumerate(arrivals)]
    written: dict[Request, Visit] = {}
    start, came, done = clock(), 0, 0
    while done < len(visits):
        now = clock() - start
        while came < len(visits) and visits[came].arrived_s <= now:
            prompt = suite.tasks[visits[came].prompt].prompt
            (request,) = engine.requests([prompt], first_index=came, **options)
            engine.submit([request])
            written[request] = visits[came]
            came += 1
        if engine.idle:
            sleep(max(0.0, visits[came].arrived_s - now))
            continue
        step = engine.step()
        now = clock() - start
        for token in step.tokens:
            visit = written[token.request]
            visit.first_s = visit.first_s or now
            visit.token_ids.append(token.id)
        for request in step.ended:
            written[request].ended_s = now
            written[request].error = request.error
            done += 1
            if progress is not None:
                progress(what, done, len(visits))
    return visits


def _summary(name: str, rate: float, visits: Sequence[Visit], plain: dict[int, list[int]]) -> ServeSummary:
    fine = [visit for visit in visits if not visit.error]
    seconds = max(visit.ended_s for visit in visits) - visits[0].arrived_s
    longer = [visit for visit in fine if len(visit.token_ids) > 1]
    return ServeSummary(
        contender=name,
        rate=rate,
        requests=len(visits),
        failed=len(visits) - len(fine),
        different=sum(visit.token_ids != plain[index] for index, visit in enumerate(visits)),
        seconds=seconds,
        requests_per_second=len(fine) / seconds,
        tokens_per_second=sum(len(visit.token_ids) for visit in fine) / seconds,
        ttft_ms=percentiles([visit.first_s - visit.arrived_s for visit in fine]),
        tpot_ms=percentiles([(visit.ended_s - visit.first_s) / (len(visit.token_ids) - 1) for visit in longer]),
        latency_ms=percentiles([visit.ended_s - visit.arrived_s for visit in fine]),
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds by percentile, `p50` and so on; empty where there is nothing."""
    if len(seconds) < 2:
        return {f"p{p}": 1000 * s for p in PERCENTILES for s in seconds}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}": 1000 * cuts[p - 1] for p in PERCENTILES}
