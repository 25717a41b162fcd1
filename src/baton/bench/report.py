"""An evaluation as a page: Markdown with its table, a picture of quality against speed, and translations side by side.

Reads the dictionary that `handoff.evaluate` makes (`EvalReport.to_dict()`), so an old JSON file can be drawn again.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PICTURE = "quality-speed.png"
PAGE = "report.md"

NAMES = {
    "llm": "LLM",
    "slm": "SLM alone",
    "handoff": "hand-off",
    "zero": "Z = 0",
    "constant": "constant Z",
    "shuffled": "another prompt's Z",
}
COLORS = {"llm": "#35507a", "slm": "#b4632d", "handoff": "#1f8a5b"}
GREY, INK = "#8a8f98", "#22262e"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One model's numbers; None where they were not measured."""

    mode: str  # key in the report: llm, slm, handoff, ...
    bleu: float | None
    chrf: float | None
    ms_per_token: float | None  # milliseconds per output token after the first
    tokens_per_second: float | None  # reading the prompt included
    speedup_decode: float | None  # the LLM's ms per output token over this one's
    speedup_total: float | None  # the same of whole requests
    peak_memory_mb: float | None

    @property
    def name(self) -> str:
        return NAMES.get(self.mode, self.mode)

    def cells(self) -> list[str]:
        """The numbers as text, in the order of `HEADINGS`."""
        return [
            _number(self.bleu, "{:.1f}"),
            _number(self.chrf, "{:.1f}"),
            _number(self.ms_per_token, "{:.2f}"),
            _number(self.tokens_per_second, "{:,.0f}"),
            _number(self.speedup_decode, "{:.1f}x"),
            _number(self.speedup_total, "{:.1f}x"),
            _number(self.peak_memory_mb, "{:,.0f}"),
        ]


HEADINGS = ["BLEU", "chrF", "ms per output token", "tokens/s", "speed-up, decode", "speed-up, total", "peak MB"]
LEGEND = (
    "Speed-up is over the LLM. Decode: time per output token after the first. Total, and tokens/s: whole requests, "
    "the LLM's reading included, one prompt at a time. Peak MB: weights and cache while the prompt is read."
)


def table(report: Mapping[str, Any]) -> list[Line]:
    """One line per model in the report, the LLM first."""

    def value(key: str, mode: str) -> float | None:
        numbers = report.get(key) or {}
        return numbers.get(mode) if isinstance(numbers, Mapping) else None

    lines = []

    def speedup(key: str, mode: str) -> float | None:
        llm, own = value(key, "llm"), value(key, mode)
        return llm / own if llm and own else None

    measured = [*(report.get("bleu") or {}), *(report.get("ms_per_token") or {})]
    for mode in sorted(dict.fromkeys(measured), key=[*NAMES, *measured].index):
        lines.append(
            Line(
                mode=mode,
                bleu=value("bleu", mode),
                chrf=value("chrf", mode),
                ms_per_token=value("ms_per_token", mode),
                tokens_per_second=value("tokens_per_second", mode),
                speedup_decode=speedup("ms_per_token", mode),
                speedup_total=speedup("total_ms", mode),
                peak_memory_mb=value("peak_memory_mb", mode),
            )
        )
    return lines


def write_report(report: Mapping[str, Any], folder: str | Path, *, title: str, command: str = "") -> Path:
    """Write `report.md` and its picture.

    Args:
        report: as `EvalReport.to_dict()`.
        folder: made when missing; an earlier report there is replaced.
        command: what to run to get these numbers again.
    Returns: the path of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plot(report, folder / PICTURE)
    page = folder / PAGE
    page.write_text(markdown(report, title=title, command=command, picture=PICTURE if drawn else ""), encoding="utf-8")
    return page


def markdown(report: Mapping[str, Any], *, title: str, command: str = "", picture: str = "") -> str:
    """The page's text."""
    lines = table(report)
    parts = [f"# {title}", summary(report)]
    if picture:
        parts.append(f"![Quality against speed: BLEU over tokens per second, one point per model]({picture})")
    parts += [results_table(report), LEGEND]
    controls = [line.name for line in lines if line.mode in ("zero", "constant", "shuffled")]
    if controls:
        parts.append(
            f"{', '.join(controls)}: the hand-off without what the LLM read of this prompt. "
            "What it loses there is what the LLM's reading is worth."
        )
    parts.append(_cost_model(report))
    examples = report.get("examples") or []
    if examples:
        parts.append("## Side by side")
        parts += [_example(example) for example in examples]
    parts.append("## How it was measured")
    if command:
        parts.append(f"```\n{command}\n```")
    parts.append(_facts(report))
    return "\n\n".join(part for part in parts if part) + "\n"


def results_table(report: Mapping[str, Any], modes: Collection[str] = tuple(NAMES)) -> str:
    """Markdown: a row per model in the report that is among `modes`."""
    rows = [[line.name, *line.cells()] for line in table(report) if line.mode in modes]
    return markdown_table(["", *HEADINGS], rows)


def conditions(report: Mapping[str, Any]) -> str:
    """One sentence: what was measured, on what."""
    settings, machine, versions = report["settings"], report["machine"], report["versions"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    return (
        f"{settings['prompts']:,} held-out prompts, greedy, {settings['dtype']}, runtime "
        f"{settings.get('runtime', 'eager')}; quality at batch "
        f"{settings['batch_size_quality']}, speed at batch 1 on {settings['speed_prompts']} prompts (median of "
        f"{settings['repeats']} interleaved passes), {device}, PyTorch {versions['torch']}, transformers "
        f"{versions['transformers']}. {LEGEND}"
    )


def summary(report: Mapping[str, Any]) -> str:
    """The result in a sentence or two; empty when there is no hand-off to speak of."""
    lines = {line.mode: line for line in table(report)}
    llm, slm, handoff = (lines.get(mode) for mode in ("llm", "slm", "handoff"))
    if not (llm and handoff and llm.bleu and handoff.bleu is not None):
        return ""
    text = f"The hand-off reaches {handoff.bleu:.1f} BLEU, {handoff.bleu / llm.bleu:.0%} of the LLM's {llm.bleu:.1f}"
    if handoff.speedup_decode:
        text += f", and writes a token {handoff.speedup_decode:.1f} times faster"
    if handoff.speedup_total:
        text += f" (a whole request {handoff.speedup_total:.1f} times, reading included)"
    text += "."
    closed = report.get("gap_closed")
    if slm and slm.bleu is not None:
        text += f" The SLM alone has {slm.bleu:.1f}"
        text += f": {closed:.0%} of the gap is closed." if closed is not None else "."
    return text


def plot(report: Mapping[str, Any], path: str | Path) -> bool:
    """Draw quality against speed as a PNG. Returns False, and draws nothing, where no model has both."""
    lines = table(report)
    points = {m.mode: (m.tokens_per_second, m.bleu) for m in lines if m.bleu is not None and m.tokens_per_second}
    if not points:
        return False
    from matplotlib.figure import Figure  # no pyplot: no display, no global state
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(7.2, 4.5), dpi=160, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    )
    axes = figure.add_subplot()
    speeds, scores = [x for x, _ in points.values()], [y for _, y in points.values()]
    axes.set_xscale("log")
    # The labels stand to the right of their points: leave them a third of the width.
    left, right = min(speeds) / 1.5, max(speeds)
    axes.set_xlim(left, right * (right / left) ** (0.35 / 0.65))
    room = max(max(scores) - min(scores), 4.0)
    axes.set_ylim(max(0.0, min(scores) - 0.2 * room), max(scores) + 0.2 * room)
    if "llm" in points:
        axes.axhline(points["llm"][1], color=COLORS["llm"], linewidth=1, linestyle=(0, (4, 4)), alpha=0.5, zorder=1)
    if "slm" in points and "handoff" in points:  # what the LLM's reading adds
        arrow = {"arrowstyle": "-|>", "linewidth": 1.6, "shrinkA": 9, "shrinkB": 9, "alpha": 0.75}
        arrow["color"] = COLORS["handoff"]
        axes.annotate("", xy=points["handoff"], xytext=points["slm"], arrowprops=arrow, zorder=2)
    for mode, (x, y) in points.items():
        size = 110 if mode in COLORS else 45
        axes.scatter([x], [y], s=size, color=COLORS.get(mode, GREY), edgecolor="white", linewidth=1.2, zorder=3)
    ticks = _ticks(*axes.get_xlim())
    axes.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("output tokens per second, one prompt at a time (higher is faster)", color=INK)
    axes.set_ylabel("BLEU (higher is better)", color=INK)
    axes.set_title("Quality against speed", loc="left", fontsize=13, fontweight="bold", color=INK, pad=12)
    axes.grid(True, color="#e7e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    for edge in ("left", "bottom"):
        axes.spines[edge].set_color("#c4c8cf")
    figure.draw_without_rendering()  # now the layout is settled, and labels can be placed in points
    scale = 72 / figure.dpi
    pixels = [axes.transData.transform(spot) for spot in points.values()]
    places = [(float(x) * scale, float(y) * scale) for x, y in pixels]
    shifts = _spread(places, [26.0 if mode in COLORS else 12.0 for mode in points])
    for (mode, (x, y)), shift in zip(points.items(), shifts, strict=True):
        main, name = mode in COLORS, NAMES.get(mode, mode)
        axes.annotate(
            f"{name}\n{y:.1f} BLEU, {x:,.0f} tokens/s" if main else f"{name}, {y:.1f}",
            (x, y),
            xytext=(11, shift),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=10 if main else 8,
            color=COLORS.get(mode, "#666b75"),
            linespacing=1.25,
            bbox={"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
            zorder=2.5,
        )
    figure.savefig(path, format="png", metadata={"Software": "baton"})
    return True


def _spread(places: Sequence[tuple[float, float]], heights: Sequence[float], width: float = 150.0) -> list[float]:
    """How far to move each label up so that none covers another. All in points.

    Args:
        places: x, y of each point; its label starts there, centred on y.
        heights: of the labels; labels whose points are `width` or more apart in x cannot touch.
    """
    order = sorted(range(len(places)), key=lambda i: places[i][1])
    at = {i: places[i][1] for i in order}
    for _ in range(100):  # push touching neighbours apart, half each, until nothing moves
        moved = False
        for n, low in enumerate(order):
            for high in order[n + 1 :]:
                overlap = (heights[low] + heights[high]) / 2 - (at[high] - at[low])
                if overlap > 0.01 and abs(places[low][0] - places[high][0]) < width:
                    at[low], at[high], moved = at[low] - overlap / 2, at[high] + overlap / 2, True
        if not moved:
            break
    return [at[i] - places[i][1] for i in range(len(places))]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) in a range."""
    steps = [m * 10.0**e for e in range(-3, 9) for m in (1, 2, 5)]
    return [s for s in steps if low <= s <= high]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "| " + " | ".join(headings) + " |"
    rule = "|---" + "|--:" * (len(headings) - 1) + "|"
    return "\n".join([head, rule, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _cost_model(report: Mapping[str, Any]) -> str:
    predicted, measured = report.get("predicted_total") or {}, report.get("measured_total") or {}
    rows = [
        [
            NAMES.get(mode, mode),
            f"{predicted[mode]:.1f}",
            f"{measured[mode]:.1f}",
            f"{predicted[mode] / measured[mode] - 1:+.0%}",
        ]
        for mode in predicted
        if measured.get(mode)
    ]
    if not rows:
        return ""
    about = "Milliseconds per request, predicted from the parts (reading, projecting, prompt pass, steps) and measured."
    return f"## Cost model\n\n{about}\n\n" + markdown_table(["", "predicted", "measured", "off by"], rows)


def _example(example: Mapping[str, Any]) -> str:
    rows = [[NAMES.get(key, key), str(example[key])] for key in example if key != "prompt"]
    prompt = _cell(str(example.get("prompt", "")))
    return f"**{prompt}**\n\n" + markdown_table(["", "text"], rows).replace("|--:|", "|---|")


def _facts(report: Mapping[str, Any]) -> str:
    rows = []
    for key in ("machine", "versions", "settings"):
        facts = report.get(key)
        if isinstance(facts, Mapping):
            rows += [f"- {name.replace('_', ' ')}: {_plain(fact)}" for name, fact in facts.items() if fact is not None]
        elif facts:
            rows.append(f"- {key}: {facts}")
    return "\n".join(rows)


def _plain(fact: Any) -> str:
    if isinstance(fact, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in fact.items())
    if isinstance(fact, (list, tuple)):
        return ", ".join(map(_plain, fact))
    return f"{fact:.4g}" if isinstance(fact, float) else str(fact)
