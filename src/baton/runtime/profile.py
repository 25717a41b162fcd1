"""What a pass of one model costs on this machine: measured once, kept, and asked by what decides how much to draft."""

import hashlib
import json
import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from baton.data.storage import atomic_write, cache_folder
from baton.machine import BUSY_PASS, Quiet, machine, seconds_of
from baton.models.adapter import Target, runtime_of, target_for
from baton.models.writer import PromptInputs, Writer

ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (64, 512, 2048)
BATCHES = (1, 8)
PATIENCE = 5  # times that a pass is measured again on a busy machine

# What `quick_profile` has found in this process, by model and by what was asked for.
_QUICK: WeakKeyDictionary[PreTrainedModel, dict[Any, "CostProfile"]] = WeakKeyDictionary()


@dataclass(frozen=True)
class CostProfile:
    """Seconds of a pass over `rows` new tokens of each of `batch` sequences that hold `context` tokens.

    Args:
        batches, contexts, rows: what was measured, rising.
        seconds: medians, [batch][context][rows]; those that did not fit into the model are missing at the ends.
        about: model, dtype, runtime, threads, processor.
        busy: passes during which the machine was busy in spite of all patience.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    rows: tuple[int, ...]
    seconds: tuple[tuple[tuple[float, ...], ...], ...]
    about: dict[str, Any]
    busy: int = 0

    def cost(self, rows: float, context: int = 0, batch: int = 1) -> float:
        """Seconds, between what was measured in a straight line, beyond it in proportion.

        Args:
            rows: of each sequence; a mean, where they differ.
        """
        at = [_line(self.contexts, [_line(self.rows, list(r), rows) for r in by], context) for by in self.seconds]
        return _line(self.batches, at, batch)

    def price(self, context: int = 0, batch: int = 1) -> dict[int, float]:
        """Rows that were measured -> seconds."""
        return {rows: self.cost(rows, context, batch) for rows in self.rows}

    def save(self) -> Path:
        """Into the user's cache, where `load_profile` finds it."""
        path = _place(self.about)
        with atomic_write(path) as file:
            file.write(json.dumps(asdict(self), indent=1) + "\n")
        return path


def measure_profile(
    writer: Writer,
    *,
    rows: Sequence[int] = ROWS,
    contexts: Sequence[int] = CONTEXTS,
    batches: Sequence[int] = BATCHES,
    repeats: int = 7,
    progress: Callable[[str, int, int], None] | None = None,
) -> CostProfile:
    """Time passes of the model that writes; what does not fit into its positions is left out.

    Each pass is made `repeats` times, after one that warms up, and the median is kept. Where the machine is busy (a
    fixed piece of work takes several times as long as usual) a pass is measured again.
    """
    target = target_for(writer.lm)
    rows, contexts, batches = (tuple(sorted(set(sizes))) for sizes in (rows, contexts, batches))
    if target.context is not None:
        contexts = tuple(c for c in contexts if c + min(rows) <= target.context) or (1,)
        rows = tuple(r for r in rows if min(contexts) + r <= target.context)
        contexts = tuple(c for c in contexts if c + max(rows) <= target.context) or contexts[:1]
    seconds, busy, done, quiet = [], 0, 0, Quiet(bound=BUSY_PASS)
    for batch in batches:
        by_context = []
        for context in contexts:
            passes = _passes(target, batch, context)
            found = []
            for count in rows:
                for left in range(PATIENCE, 0, -1):
                    slowed = quiet.busy()
                    median = statistics.median(passes(count, repeats))
                    slowed |= quiet.busy()
                    if not slowed:
                        break
                    busy += left == 1
                found.append(median)
                done += 1
                if progress is not None:
                    progress("passes", done, len(batches) * len(contexts) * len(rows))
            by_context.append(tuple(found))
        seconds.append(tuple(by_context))
    return CostProfile(batches, contexts, rows, tuple(seconds), _about(writer), busy)


def load_profile(writer: Writer) -> CostProfile | None:
    """What was measured for this model, dtype, runtime, number of threads and machine; None: nothing yet."""
    path = _place(_about(writer))
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        nested = tuple(tuple(tuple(by) for by in batch) for batch in raw["seconds"])
        batches, contexts, rows = (tuple(raw[name]) for name in ("batches", "contexts", "rows"))
        return CostProfile(batches, contexts, rows, nested, raw["about"], raw["busy"])
    except (ValueError, KeyError, TypeError):  # of another version, or cut off: measured anew
        return None


def quick_profile(writer: Writer, *, rows: Sequence[int] = ROWS, batches: Sequence[int] = (1,)) -> CostProfile:
    """What is stored for this model and machine; else a short measurement, made once per model in this process."""
    known = _QUICK.setdefault(writer.lm, {})
    key = runtime_of(writer.lm).name, tuple(rows), tuple(batches)
    if key not in known:
        known[key] = load_profile(writer) or measure_profile(
            writer, rows=rows, contexts=(64,), batches=batches, repeats=3
        )
    return known[key]


def _passes(target: Target, batch: int, context: int) -> Callable[[int, int], list[float]]:
    """A way to time passes over so many rows, so many times, after a context of arbitrary tokens."""
    size = target.lm_head.out_features
    ids = torch.randint(min(3, size - 1), size, (batch, context), generator=torch.Generator().manual_seed(0))
    ids = ids.to(target.device)
    _, memory = target.prefill(PromptInputs(ids=ids, mask=torch.ones_like(ids)))
    if not target.reads_prompt:  # the start token is in it already
        for part in ids[:, 1:].split(64, 1):
            target.forward(part, memory)
    before = list(memory.lengths)

    def run(count: int, repeats: int) -> list[float]:
        new = torch.zeros((batch, count), dtype=torch.long, device=target.device)
        taken = []
        for _ in range(repeats + 1):
            taken.append(seconds_of(lambda: target.forward(new, memory)))
            memory.truncate(before)
        return taken[1:]

    return run


def _line(at: Sequence[int], values: Sequence[float], x: float) -> float:
    """Through the points; level before the first, and through the last two beyond the last."""
    if len(at) == 1 or x <= at[0]:
        return values[0]
    right = min(bisect_right(at, x), len(at) - 1)
    left = right - 1
    share = (x - at[left]) / (at[right] - at[left])
    return max(values[left] + share * (values[right] - values[left]), min(values))


def _about(writer: Writer) -> dict[str, Any]:
    config = json.dumps(writer.lm.config.to_diff_dict(), sort_keys=True, default=str)
    where = machine()
    return {
        "model": str(getattr(writer.lm, "name_or_path", "")),
        "shape": hashlib.sha256(config.encode()).hexdigest()[:16],
        "dtype": str(writer.lm.dtype).removeprefix("torch."),
        "device": str(writer.lm.device),
        "runtime": runtime_of(writer.lm).name,
        **{name: where[name] for name in ("cpu", "cores", "threads", "gpu")},
    }


def _place(about: dict[str, Any]) -> Path:
    key = json.dumps({k: v for k, v in about.items() if k != "model"}, sort_keys=True)
    return cache_folder() / "profiles" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
