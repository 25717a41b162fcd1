"""Exactness, measured: every method's text against plain decoding, token by token, and its law where it draws.

Two passes that mean the same need not give the same bits: sums run in another order. A difference counts as a
*near-tie* only where plain decoding, at that very position, was closer to the token found than rounding can part, and
is shown with that gap. Anything else is a bug.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from baton.drafters import make
from baton.engine import generate
from baton.engine.rules import Rules
from baton.errors import BatonError
from baton.models.adapter import Target, target_for
from baton.models.prompts import pad_right, tokenize_prompts
from baton.models.writer import Writer
from baton.sampling import distribution, uniform
from baton.types import Output, Sampling, Timings

# Gap between the two best logits below which arithmetic may decide; in bf16 a logit has 8 bits.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}
SEEDED = Sampling(temperature=0.8, top_p=0.95, seed=11)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Difference:
    """The first position at which a text is another."""

    prompt: int  # index
    position: int  # response token
    plain: int
    found: int
    # Greedy: from the best logit down to the lesser of the two tokens', relative where it is above 1. Sampled: from the
    # number that was drawn with to the nearest one that draws the token found, in probability. 1: the lengths differ.
    gap: float
    near_tie: bool


@dataclass
class Method:
    """What was found for one method."""

    name: str
    compared: int = 0  # texts
    tokens: int = 0
    acceptance_length: float = 1.0
    differences: list[Difference] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # requests that ended in an error
    chi_square: float | None = None  # of the joint law of two tokens, for methods that draw
    chi_square_p: float | None = None  # probability of one as large under the right law

    @property
    def bugs(self) -> list[Difference]:
        return [difference for difference in self.differences if not difference.near_tie]

    @property
    def exact(self) -> bool:
        return not self.bugs and not self.failed and (self.chi_square_p is None or self.chi_square_p > 1e-4)


@dataclass
class AuditReport:
    """All methods, under which conditions."""

    methods: list[Method]
    settings: dict[str, Any]

    @property
    def exact(self) -> bool:
        return all(method.exact for method in self.methods)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"exact": self.exact}


def audit(
    writer: Writer,
    methods: Sequence[str],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_sizes: Sequence[int] = (1, 7, 32),
    temperatures: Sequence[float] = (SEEDED.temperature,),
    law_runs: int = 4000,
    progress: Progress | None = None,
    on_method: Callable[[AuditReport], None] | None = None,
) -> AuditReport:
    """Compare methods with plain decoding: greedy and seeded sampling, alone and in ragged batches.

    Args:
        methods: as in `baton.generate(drafter=...)`. One that draws is verified by recursive rejection: its greedy text
            is compared, and the joint law of two sampled tokens is tested.
        temperatures: at which texts are sampled, with a top-p of 0.95 and a seed.
        law_runs: pairs of tokens drawn for that test.
        progress: called with (what, done, total).
        on_method: called with the report so far when a method has been compared.
    """
    ways = [("greedy", Sampling()), *((f"seeded {t:g}", replace(SEEDED, temperature=t)) for t in temperatures)]
    done, total = 0, len(ways) * (1 + len(methods) * len(batch_sizes))

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("runs", done, total)

    plain = {}
    for name, sampling in ways:
        plain[name] = _write(writer, None, prompts, sampling, max_new_tokens, 1)
        tick()
    target = target_for(writer.lm)
    report = AuditReport(
        [],
        {
            "prompts": len(prompts),
            "max_new_tokens": max_new_tokens,
            "batch_sizes": list(batch_sizes),
            "dtype": str(writer.lm.dtype).removeprefix("torch."),
            "near_tie_below": NEAR[writer.lm.dtype],
            "seeded": asdict(SEEDED) | {"temperature": list(temperatures)},
        },
    )
    for spec in methods:
        method = Method(spec)
        draws = make(spec).draws
        steps = emitted = 0
        for name, sampling in ways:
            outputs = plain[name]
            for size in batch_sizes:
                if draws and not sampling.greedy:
                    tick()
                    continue
                found = _write(writer, spec, prompts, sampling, max_new_tokens, size)
                for index, (mine, theirs) in enumerate(zip(found, outputs, strict=True)):
                    method.compared += 1
                    method.tokens += len(mine.token_ids)
                    steps += len(mine.steps)
                    emitted += sum(step.emitted for step in mine.steps)
                    if mine.error:
                        method.failed.append(f"prompt {index}: {mine.error}")
                    elif mine.token_ids != theirs.token_ids:
                        method.differences.append(_difference(writer, target, index, mine, theirs, sampling))
                tick()
        method.acceptance_length = emitted / steps if steps else 1.0
        if draws and law_runs:
            method.chi_square, method.chi_square_p = _law(writer, spec, prompts[0], law_runs)
        report.methods.append(method)
        if on_method is not None:
            on_method(report)
    return report


def _write(
    writer: Writer, spec: str | None, prompts: Sequence[str], sampling: Sampling, max_new_tokens: int, batch_size: int
) -> list[Output]:
    return generate(
        writer,
        prompts,
        drafter=spec,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        truncate=True,
    )


def _difference(
    writer: Writer, target: Target, index: int, found: Output, plain: Output, sampling: Sampling
) -> Difference:
    """Where two texts part, and how sure plain decoding was there."""
    pairs = zip(found.token_ids, plain.token_ids, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found.token_ids), len(plain.token_ids)))

    def token(output: Output) -> int:
        return output.token_ids[position] if position < len(output.token_ids) else -1

    wrong, right = token(found), token(plain)
    gap = 1.0
    if min(wrong, right) >= 0:
        logits = logits_at(writer, target, plain.prompt, plain.token_ids[:position])
        if sampling.greedy:
            best = float(logits.max())
            gap = (best - min(float(logits[wrong]), float(logits[right]))) / max(1.0, abs(best))
        else:  # how far the number that was drawn with lies from the stretch of the token that was found
            p = distribution(logits[None], sampling)[0].double()
            edge = float(p.cumsum(0)[wrong] / p.sum())
            u = uniform(sampling.seed, index, "token", position)
            gap = max(0.0, edge - float(p[wrong]) - u, u - edge)
    return Difference(index, position, right, wrong, gap, gap < NEAR[writer.lm.dtype])


@torch.inference_mode()
def logits_at(writer: Writer, target: Target, prompt: str, response: Sequence[int]) -> torch.Tensor:
    """float32 [V]: what plain decoding sees after prompt and response, computed afresh in two passes."""
    rows = tokenize_prompts(writer.prompt_tokenizer, [prompt], writer.prompt_limits, truncate=True)
    logits, memory = target.prefill(writer.encode(*pad_right(rows, device=target.device), Timings()))
    if response:
        logits = target.forward(torch.tensor([list(response)], device=target.device), memory)[:, -1]
    rules, scores = Rules.of(writer), logits[0].float()
    banned = {*rules.banned, *(rules.banned_first if len(response) == (rules.first is not None) else ())}
    scores[list(banned)] = -torch.inf
    return scores


def _law(writer: Writer, spec: str, prompt: str, runs: int) -> tuple[float, float]:
    """Chi-square of the joint law of two tokens drawn with drafts, each among the four most probable."""
    sampling = Sampling(temperature=1.0, top_k=4, seed=5)
    made = generate(
        writer, [prompt] * runs, drafter=spec, sampling=sampling, max_new_tokens=4, batch_size=256, truncate=True
    )
    if failed := [output.error for output in made if output.error]:
        raise BatonError(f"{spec}: {failed[0]}")
    pairs = Counter(tuple((*output.token_ids[1:3], -1, -1)[:2]) for output in made)
    starts = Counter(output.token_ids[0] for output in made)
    target = target_for(writer.lm)
    expected: dict[tuple[int, int], float] = {}
    ends = Rules.of(writer).ends
    for first, count in starts.items():
        after = [()] if first in ends else _likely(writer, target, prompt, [first], sampling)
        for entry in after:
            if not entry:
                expected[-1, -1] = expected.get((-1, -1), 0.0) + count
                continue
            second, chance = entry
            thirds = [(-1, 1.0)] if second in ends else _likely(writer, target, prompt, [first, second], sampling)
            for third, given in thirds:
                expected[second, third] = expected.get((second, third), 0.0) + count * chance * given
    if any(pair not in expected for pair in pairs):  # what cannot be drawn was emitted
        return float("inf"), 0.0
    big = {pair: value for pair, value in expected.items() if value >= 5}
    rest = sum(expected.values()) - sum(big.values())
    total = sum((pairs[pair] - value) ** 2 / value for pair, value in big.items())
    if rest >= 5:
        total += (len(made) - sum(pairs[pair] for pair in big) - rest) ** 2 / rest
    degrees = max(1, len(big) - (rest < 5))
    return total, float(torch.special.gammaincc(torch.tensor(degrees / 2.0), torch.tensor(total / 2.0)))


def _likely(
    writer: Writer, target: Target, prompt: str, response: list[int], sampling: Sampling
) -> list[tuple[int, float]]:
    p = distribution(logits_at(writer, target, prompt, response)[None], sampling)[0]
    return [(int(token), float(p[token])) for token in p.nonzero()[:, 0]]
