"""How a plain decode step grows with the rows written together and with what they hold: public shapes, random weights.

A step reads one new token in each of `batch` rows that hold `context` tokens already. The weights are read once for
all rows, keys and values once for each: the first is why batches pay, the second why they pay less at long contexts.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from baton.bench.forward import check_positions, random_model, weight_bytes
from baton.bench.report import INK
from baton.cache import Memory
from baton.cache.rows import BUCKET
from baton.data.storage import storage_errors
from baton.errors import MemoryShort
from baton.machine import BUSY_PASS, Quiet, bandwidth_gb_s, free_bytes, machine, revision, seconds_of, versions
from baton.models.adapter import Target, runtime_of, slot_bytes, target_for
from baton.models.writer import PromptInputs
from baton.types import RuntimeName

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (64, 512, 2048, 8192)
PROMPT = 64  # tokens that an encoder reads for each row
SPARE = 1.15  # times a point's keys and values: what a step computes on the way


@dataclass(frozen=True)
class Point:
    """One batch at one context: seconds of a step, median and range of the middle half."""

    batch: int  # rows
    context: int  # tokens that each row holds before the step
    seconds: float
    low: float
    high: float
    tokens_per_second: float  # of all rows together
    gb_s: float  # weights, keys and values that a step reads, over the median
    cache_bytes: int  # keys and values of all rows


@dataclass(kw_only=True)
class ScaleReport:
    """All points, under which conditions."""

    points: list[Point]
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    absent: list[str] = field(default_factory=list)  # points left out, and why
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


def bench_scale(
    shape: str,
    *,
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    runtime: RuntimeName = "auto",
    repeats: int = 9,
    command: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> ScaleReport:
    """Time plain decode steps of a random model of a public shape.

    Args:
        shape: one of `SHAPES`.
        batches: rows written together; contexts: tokens that each of them holds.
        repeats: steps of each point, 3 or more, after one that warms up.
        progress: called with (what, done, total).
    Returns: points in the order of contexts, then batches; those that do not fit into memory are named in `absent`.
    Raises: UnknownOption for a shape that does not exist; MemoryShort when its weights do not fit, and BatonError when
        it has no positions for a context, before any weight is allocated.
    """
    batches, contexts = sorted(set(batches)), sorted(set(contexts))
    check_positions(shape, max(contexts), 1)
    model = random_model(shape, dtype, device, runtime)
    target, each, weights = target_for(model), slot_bytes(model), weight_bytes(model)
    points: list[Point] = []
    absent: list[str] = []
    quiet, busy, done, repeats = Quiet(bound=BUSY_PASS), 0, 0, max(3, repeats)
    for context in contexts:
        for batch in batches:
            try:
                _check_memory(target, batch, context)
                taken, slowed = _steps(target, batch, context, repeats, quiet)
            except (MemoryShort, torch.OutOfMemoryError) as error:  # smaller points go on
                why = str(error).splitlines()[0]
                absent.append(f"batch {batch}, context {context:,} is left out: {why}")
            else:
                busy += slowed
                low, median, high = statistics.quantiles(taken, n=4)
                cache = batch * context * each
                gb_s = round((weights + cache) / median / 1e9, 1)
                points.append(Point(batch, context, median, low, high, batch / median, gb_s, cache))
            done += 1
            if progress is not None:
                progress("decode steps", done, len(contexts) * len(batches))
    return ScaleReport(
        points=points,
        settings={
            "shape": shape,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes": weights,
            "slot_bytes": each,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(target.device),
            "runtime": runtime_of(model).name,
            "repeats": repeats,
            "git": revision(),
            "command": command,
        },
        machine=machine() | {"bandwidth_gb_s": bandwidth_gb_s(device)},
        versions=versions("torch", "transformers", "baton-decoding"),
        absent=absent,
        remarks=[f"the machine was busy before {busy} steps"] if busy else [],
    )


def _check_memory(target: Target, batch: int, context: int) -> None:
    gc.collect()
    slots = context + BUCKET + (0 if target.reads_prompt else PROMPT)
    rows = 1 << (batch - 1).bit_length()  # as the cache allocates them
    needed, free = SPARE * rows * slots * slot_bytes(target.model), free_bytes(target.device)
    if needed > free:
        raise MemoryShort(f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def _steps(target: Target, batch: int, context: int, repeats: int, quiet: Quiet) -> tuple[list[float], int]:
    """Seconds of steps, after one that warms up, and before how many of them the machine was busy."""
    memory = filled(target, batch, context)
    ids = torch.zeros((batch, 1), dtype=torch.long, device=target.device)
    taken, busy = [], 0
    for _ in range(repeats + 1):
        busy += quiet.busy()
        taken.append(seconds_of(lambda: target.forward(ids, memory)))
        memory.truncate([context] * batch)
    return taken[1:], busy


@torch.inference_mode()
def filled(target: Target, batch: int, context: int) -> Memory:
    """Rows that hold so many tokens each, without reading them: keys and values are noise, the same in each row."""
    ids = torch.zeros((batch, 1 if target.reads_prompt else PROMPT), dtype=torch.long, device=target.device)
    _, memory = target.prefill(PromptInputs(ids=ids, mask=torch.ones_like(ids)))
    own = memory.own
    own.append(context + 1 - own.lengths[0])  # a slot more, so that no step grows the tensors
    memory.truncate([context] * batch)
    for tensor in (*own.keys, *own.values):
        if tensor is not None:
            tensor.copy_(torch.randn_like(tensor[:1]).expand_as(tensor))
    return memory


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw a report (`to_dict`): tokens/s against batch, one line per context; ms per step against context, per batch.

    The file's ending says in which format.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    points, settings = report["points"], report["settings"]
    batches, contexts = (sorted({point[name] for point in points}) for name in ("batch", "context"))
    figure = Figure(figsize=(10, 4.2), dpi=160, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, lines, across in ((left, "context", "batch"), (right, "batch", "context")):
        names = contexts if lines == "context" else batches
        for place, name in enumerate(names):
            own = [point for point in points if point[lines] == name]
            at = [point[across] for point in own]
            # A step's seconds and their range, or the tokens/s that follow from them.
            middle, low, high = (
                [point["batch"] / point[key] if axes is left else 1e3 * point[key] for point in own]
                for key in ("seconds", "low", "high")
            )
            shade = _shade(place, len(names))
            axes.plot(at, middle, marker="o", markersize=3, color=shade, label=f"{lines} {name:,}")
            axes.fill_between(at, low, high, color=shade, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        ticks = batches if across == "batch" else contexts
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_yscale("log")
        axes.grid(color="#e7e9ed", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0, labelsize=8)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
        if names:
            axes.legend(fontsize=7, frameon=False)
    left.set_xlabel("rows written together", color=INK)
    left.set_ylabel("tokens per second, all rows", color=INK)
    right.set_xlabel("tokens that each row holds", color=INK)
    right.set_ylabel("ms per decode step", color=INK)
    about = f"{settings['shape']}, {settings['dtype']}, runtime {settings['runtime']}, {settings['device']}"
    figure.suptitle(about, fontsize=10, color=INK, x=0.01, ha="left")
    with storage_errors(path):
        figure.savefig(path, metadata={"Software": None} if path.suffix == ".png" else None)


def _shade(place: int, count: int) -> Any:
    """From light to dark, as the numbers rise."""
    import matplotlib as mpl

    return mpl.colormaps["viridis_r"](0.15 + 0.8 * place / max(1, count - 1))
