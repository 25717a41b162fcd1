"""Decoding methods side by side: the same prompts, in one run, interleaved.

Every group of prompts is written by each method in turn, in an order that changes, so that a machine that slows down
slows them all. Tokens are counted as ids, the same way for all. Texts are compared with plain decoding before any
speed is reported: a method that wrote something else is marked, not ranked.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from baton.engine import Engine, generate
from baton.machine import machine, versions
from baton.models.loading import load
from baton.models.prompts import tokenize_prompts
from baton.models.writer import Writer

Progress = Callable[[str, int, int], None]
Write = Callable[[list[str]], "Written"]


@dataclass(frozen=True)
class Written:
    """What a method made of a group of prompts."""

    token_ids: list[list[int]]
    steps: int = 0  # decode steps of all rows; 0 where a peer does not tell
    emitted: int = 0  # tokens of these steps
    drafted: int = 0
    accepted: int = 0
    draft_share: float = 0.0  # of the decode seconds


@dataclass
class Result:
    """One method at one batch size. All else is derived from `seconds` and `tokens`, one entry per group and repeat."""

    method: str
    batch_size: int
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_share: float = 0.0
    different: int = 0  # prompts whose tokens are not plain decoding's
    tokens_per_second: float = 0.0  # all tokens over all seconds
    tokens_per_second_range: list[float] = field(default_factory=list)  # quartiles over groups and repeats
    acceptance_length: float | None = None  # tokens per decode step, the target's own included
    acceptance_rate: float | None = None  # accepted / drafted
    speedup: float = 1.0  # median over groups of plain decoding's seconds over this one's

    def finish(self, plain: "Result") -> None:
        rates = [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]
        self.tokens_per_second = sum(self.tokens) / sum(self.seconds)
        quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else [rates[0]] * 3
        self.tokens_per_second_range = [quartiles[0], quartiles[2]]
        self.speedup = statistics.median(a / b for a, b in zip(plain.seconds, self.seconds, strict=True))
        self.acceptance_length = self.emitted / self.steps if self.steps else None
        self.acceptance_rate = self.accepted / self.drafted if self.drafted else None


def bench_decode(
    writer: Writer,
    methods: Sequence[str],
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 1,
    peers: bool = True,
    assistant: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure methods against plain decoding, greedy.

    Args:
        methods: as in `baton.generate(drafter=...)`; plain decoding is always measured.
        repeats: passes over all prompts, after a first one over a few that warms up.
        peers: also transformers' own greedy search, prompt lookup and, with an assistant, assisted generation, at
            batch 1 (it refuses batches for the latter two). For plain language models, not for hand-offs.
        assistant: folder or Hub id of the small model for transformers' assisted generation.
        progress: called with (what, done, total).
    Returns: a dictionary of `results`, machine, versions and settings.
    """
    results: list[Result] = []
    for size in batch_sizes:
        writes = {
            spec or "plain": _ours(Engine(writer, spec, max_rows=size, patience=size), max_new_tokens)
            for spec in (None, *methods)
        }
        if peers and size == 1:
            writes |= _transformers(writer, max_new_tokens, assistant)
        groups = [list(prompts[start : start + size]) for start in range(0, len(prompts), size)]
        groups = [group for group in groups if len(group) == size] or groups  # the last may be a smaller batch
        made = {name: Result(name, size) for name in writes}
        for write in writes.values():
            write(groups[0])
        total, done = repeats * len(groups), 0
        for repeat in range(repeats):
            for number, group in enumerate(groups):
                found: dict[str, tuple[Written, float]] = {}
                for name in _rotated(list(writes), number):
                    started = time.perf_counter()
                    written = writes[name](group)
                    found[name] = written, time.perf_counter() - started
                for name, (written, seconds) in found.items():
                    _add(made[name], written, seconds, found["plain"][0].token_ids, compare=repeat == 0)
                done += 1
                if progress is not None:
                    progress(f"batch {size}", done, total)
        for result in made.values():
            result.finish(made["plain"])
        results += made.values()
    return {
        "results": [asdict(result) for result in results],
        "machine": machine(),
        "versions": versions("torch", "transformers", "baton-decoding"),
        "settings": {
            "model": getattr(writer.lm, "name_or_path", ""),
            "dtype": str(writer.lm.dtype).removeprefix("torch."),
            "prompts": len(prompts),
            "max_new_tokens": max_new_tokens,
            "decoding": "greedy",
            "repeats": repeats,
            "assistant": assistant,
        },
    }


def _add(result: Result, written: Written, seconds: float, plain: list[list[int]], *, compare: bool = True) -> None:
    result.seconds.append(seconds)
    result.tokens.append(sum(map(len, written.token_ids)))
    result.steps += written.steps
    result.emitted += written.emitted
    result.drafted += written.drafted
    result.accepted += written.accepted
    result.draft_share += (written.draft_share - result.draft_share) / len(result.seconds)
    result.different += compare and sum(a != b for a, b in zip(written.token_ids, plain, strict=True))


def _rotated(names: list[str], by: int) -> list[str]:
    return names[by % len(names) :] + names[: by % len(names)] if names else []


def _ours(engine: Engine, max_new_tokens: int) -> Write:
    def write(group: list[str]) -> Written:
        outputs = generate(engine, group, max_new_tokens=max_new_tokens, truncate=True)
        steps = [step for output in outputs for step in output.steps]
        decode = sum(output.timings.decode_s for output in outputs)
        return Written(
            [output.token_ids for output in outputs],
            len(steps),
            sum(step.emitted for step in steps),
            sum(step.drafted for step in steps),
            sum(step.accepted for step in steps),
            sum(output.timings.draft_s for output in outputs) / decode if decode else 0.0,
        )

    return write


def _transformers(writer: Writer, max_new_tokens: int, assistant: str | None) -> dict[str, Write]:
    """transformers' own ways, one prompt at a time."""
    model = writer.lm
    kinds: dict[str, dict[str, Any]] = {"transformers greedy": {}}
    kinds["transformers prompt lookup"] = {"prompt_lookup_num_tokens": 10}
    if assistant is not None:
        kinds["transformers assisted"] = {"assistant_model": load(assistant, dtype=model.dtype, device=model.device).lm}

    def make(options: dict[str, Any]) -> Write:
        @torch.inference_mode()
        def write(group: list[str]) -> Written:
            (ids,) = tokenize_prompts(writer.prompt_tokenizer, group, writer.prompt_limits, truncate=True)
            prompt = torch.tensor([ids], device=model.device)
            made = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                no_repeat_ngram_size=0,
                min_length=0,
                **options,
            )[0].tolist()
            return Written([made[1:] if model.config.is_encoder_decoder else made[len(ids) :]])

        return write

    return {name: make(options) for name, options in kinds.items()}
