"""Measurements as a page that a sceptical reader can check: Markdown, and one HTML file that needs nothing else.

The conditions come first, then one table, then pictures. Reads records only, so an old file can be drawn again.
"""

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.bench.metrics import Measurement, Summary
from baton.bench.record import Record
from baton.bench.report import markdown_table

HTML, MARKDOWN = "report.html", "report.md"
CONVENTION = (
    "Tokens are counted as ids, the end token included, the same way for all. Tokens/s: all tokens over all seconds, "
    "prompts included. Speed-up: plain decoding's seconds per token over the method's, on the same prompts in the same "
    "run. 95 %: of bootstrap resamples of the groups. Tokens per step: mean tokens per pass of the target, its own "
    "included, so plain decoding has 1. Accepted: share of the drafted tokens."
)
OTHERS = {
    "vllm_acceptance_length": "vLLM, mean acceptance length",
    "vllm_acceptance_rate": "vLLM, draft acceptance rate",
    "spec_bench_accepted_tokens": "Spec-Bench, mean accepted tokens",
    "spec_bench_tokens_per_second": "Spec-Bench, tokens per second",
    "without_bonus": "accepted per step, without the target's own",
    "accepted_over_evaluated": "accepted / evaluated",
}
FAMILY_COLORS = {"plain": "#35507a", "speculative": "#1f8a5b", "hand-off": "#b4632d", "peer": "#8a8f98"}
PART_COLORS = {"draft": "#b4632d", "verify": "#35507a", "other": "#c4c8cf"}
INK = "#22262e"

Plot = Callable[[Any], None]  # draws into matplotlib axes


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str
    code: bool = False


@dataclass(frozen=True)
class Rows:
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    name: str  # of its file beside the Markdown
    about: str  # what it shows, in words
    svg: str


Block = Heading | Text | Rows | Picture


def write_page(measurements: Sequence[Measurement], folder: str | Path, *, title: str = "Measurements") -> Path:
    """Write `report.md` with its pictures, and `report.html` with everything inside.

    Args:
        folder: made when missing; an earlier report there is replaced.
    Returns: the path of the HTML page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    blocks: list[Block] = [Heading(title, 1)]
    for number, measurement in enumerate(measurements, start=1):
        blocks += _section(measurement, f"{number}-" if len(measurements) > 1 else "")
    for block in blocks:
        if isinstance(block, Picture):
            (folder / f"{block.name}.svg").write_text(block.svg, encoding="utf-8")
    (folder / MARKDOWN).write_text(as_markdown(blocks), encoding="utf-8")
    (folder / HTML).write_text(as_html(blocks, title), encoding="utf-8")
    return folder / HTML


def conditions(measurement: Measurement) -> list[tuple[str, str]]:
    """What a reader must know before the first number."""
    run = measurement.run
    machine, sampling = run.machine, run.sampling
    device = machine.get("gpu") or f"{machine.get('cpu')}, {machine.get('threads')} threads"
    temperature = sampling.get("temperature", 0)
    how = (
        "greedy (temperature 0)" if not temperature else f"temperature {temperature}, top-p {sampling.get('top_p', 1)}"
    )
    suites = "; ".join(
        f"{name} ({about.get('prompts', '?')} prompts, {about.get('source', '')}"
        f"{', ' + about['licence'] if about.get('licence') else ''})"
        for name, about in run.suites.items()
    )
    facts = [
        ("model", run.model),
        ("hardware", device),
        ("memory bandwidth", f"{machine['bandwidth_gb_s']} GB/s, measured" if "bandwidth_gb_s" in machine else ""),
        ("dtype, runtime", f"{run.dtype}, {run.runtime}"),
        ("decoding", f"{how}, at most {run.max_new_tokens} new tokens"),
        ("batch sizes", ", ".join(map(str, run.batch_sizes))),
        ("prompts", suites),
        ("passes", f"{run.repeats} over all prompts"),
        ("versions", ", ".join(f"{name} {number}" for name, number in run.versions.items())),
        ("code", run.git or ""),
        ("measured", run.started),
        ("load before", str(machine.get("load", ""))),
        ("absent", "; ".join(run.absent)),
    ]
    return [(name, value) for name, value in facts if value]


def _section(measurement: Measurement, prefix: str) -> list[Block]:
    run, summaries = measurement.run, measurement.summaries
    blocks: list[Block] = [Heading(f"{Path(run.model).name or run.model}: {', '.join(run.suites)}")]
    blocks += [Rows(["", ""], conditions(measurement)), Text(CONVENTION)]
    blocks.append(Rows(*_table(summaries)))
    if measurement.quality:
        names = list(dict.fromkeys(name for scores in measurement.quality.values() for name in scores))
        rows = [
            [contender, *(f"{scores[name]:.1f}" if name in scores else "-" for name in names)]
            for contender, scores in measurement.quality.items()
        ]
        blocks += [Heading("Quality", 3), Rows(["", *(name.replace("_", " ") for name in names)], rows)]
    blocks += [
        Picture(f"{prefix}{name}", about, _svg(draw, size)) for name, about, draw, size in _pictures(measurement)
    ]
    others = [s for s in summaries if s.conventions]
    if others:
        known = [name for name in OTHERS if any(name in s.conventions for s in others)]
        rows = [[_label(s), *(_number(s.conventions.get(name)) for name in known)] for s in others]
        blocks += [Heading("The same records in the words of others", 3), Rows(["", *(OTHERS[n] for n in known)], rows)]
    blocks += _side_by_side(measurement)
    if run.command:
        blocks += [Heading("To measure this again", 3), Text(run.command, code=True)]
    return blocks


def _table(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    headings = [
        "",
        "batch",
        "tokens/s",
        "95 %",
        "speed-up",
        "95 %",
        "tokens per step",
        "accepted",
        "TTFT ms",
        "TPOT ms",
        "",
    ]
    rows = []
    for s in summaries:
        rows.append(
            [
                s.contender,
                str(s.batch_size),
                f"{s.tokens_per_second:,.0f}",
                "{:,.0f}-{:,.0f}".format(*s.tokens_per_second_interval),
                "-" if s.speedup is None else f"{s.speedup:.2f}x",
                "-" if s.speedup_interval is None else "{:.2f}-{:.2f}".format(*s.speedup_interval),
                _number(s.acceptance_length),
                "-" if s.acceptance_rate is None else f"{s.acceptance_rate:.0%}",
                _number(s.ttft_ms),
                _number(s.tpot_ms),
                "; ".join(s.remarks),
            ]
        )
    return headings, rows


def _pictures(measurement: Measurement) -> list[tuple[str, str, Plot, tuple[float, float]]]:
    """Name, what it shows, how it is drawn, and its size in inches; only those that have something to show."""
    summaries, run = measurement.summaries, measurement.run
    found: list[tuple[str, str, Plot, tuple[float, float]]] = []
    fast = [s for s in summaries if s.speedup is not None and s.speedup_interval is not None]
    if len(fast) > 1:
        found.append(("speedup", "Speed-up over plain decoding, with 95 % intervals", _speedups(fast), _tall(fast)))
    curves = [s for s in summaries if len(s.acceptance_by_position) > 1]
    if curves:
        found.append(("acceptance", "Share of drafts accepted to each depth", _acceptance(curves), (7.2, 3.6)))
    split = [s for s in summaries if s.share and s.acceptance_rate is not None]
    if split:
        found.append(("time", "Where the decode seconds go", _split(split), _tall(split)))
    metric = next((m for m in ("bleu", "edit_similarity") if any(m in q for q in measurement.quality.values())), None)
    if metric:
        smallest = min(s.batch_size for s in summaries)
        points = [
            s for s in summaries if s.batch_size == smallest and metric in measurement.quality.get(s.contender, {})
        ]
        about = f"{metric.replace('_', ' ')} against tokens per second, batch {smallest}"
        found.append(("quality", about, _scatter(points, measurement.quality, metric), (7.2, 4.2)))
    if len(run.batch_sizes) > 1:
        found.append(("batch", "Tokens per second against batch size", _batches(summaries), (7.2, 3.8)))
    achieved = [(s, rate) for s in summaries if (rate := roofline(measurement, s)) is not None]
    if achieved and "bandwidth_gb_s" in run.machine:
        about = "Weights read per second of the target's passes, against the measured memory bandwidth"
        found.append(("roofline", about, _roofline(achieved, run.machine["bandwidth_gb_s"]), _tall(achieved)))
    return found


def roofline(measurement: Measurement, summary: Summary) -> float | None:
    """GB/s of weights that the target's passes read: bytes of a step over its mean seconds. None where not told."""
    longest: dict[tuple[str, int, int], Record] = {}  # rows of a batch share their passes: one row was in all of them
    for record in measurement.records:
        if (record.contender, record.batch_size) == (summary.contender, summary.batch_size) and not record.failed:
            key = (record.suite, record.repeat, record.group)
            if key not in longest or len(record.steps) > len(longest[key].steps):
                longest[key] = record
    seconds = sum(step.verify_s for record in longest.values() for step in record.steps)
    steps = sum(len(record.steps) for record in longest.values())
    if not seconds or summary.family == "hand-off":  # another model's weights
        return None
    return measurement.run.step_bytes * steps / seconds / 1e9


def _side_by_side(measurement: Measurement, count: int = 3) -> list[Block]:
    """What each wrote, where they may differ."""
    records = [r for r in measurement.records if r.repeat == 0 and r.batch_size == measurement.run.batch_sizes[0]]
    lossy = {name for name, family in measurement.run.contenders.items() if family in ("plain", "hand-off")}
    if len(lossy) < 2:
        return []
    blocks: list[Block] = [Heading("Side by side", 3)]
    for key in list(dict.fromkeys((r.suite, r.prompt) for r in records))[:count]:
        rows = [[r.contender, r.text] for r in records if (r.suite, r.prompt) == key and r.contender in lossy]
        blocks.append(Rows([f"{key[0]}, prompt {key[1]}", ""], rows))
    return blocks


# --- drawing ---------------------------------------------------------------------------------------------------------


def _tall(bars: Sequence[Any]) -> tuple[float, float]:
    return 7.2, 1.0 + 0.32 * len(bars)


def _label(summary: Summary) -> str:
    return f"{summary.contender}, batch {summary.batch_size}"


def _color(summary: Summary) -> str:
    return FAMILY_COLORS.get(summary.family, FAMILY_COLORS["peer"])


def _bars(axes: Any, summaries: Sequence[Summary], values: Sequence[float], **more: Any) -> None:
    places = range(len(summaries) - 1, -1, -1)  # the first on top
    axes.barh(places, values, height=0.62, **more)
    axes.set_yticks(places, [_label(s) for s in summaries], fontsize=8)
    axes.grid(axis="x", color="#e7e9ed", linewidth=0.8)


def _speedups(summaries: Sequence[Summary]) -> Plot:
    def draw(axes: Any) -> None:
        values = [s.speedup or 0.0 for s in summaries]
        ends = [s.speedup_interval or (v, v) for s, v in zip(summaries, values, strict=True)]
        below = [max(0.0, v - low) for v, (low, _) in zip(values, ends, strict=True)]
        above = [max(0.0, high - v) for v, (_, high) in zip(values, ends, strict=True)]
        spread = [below, above]
        _bars(axes, summaries, values, color=[_color(s) for s in summaries], xerr=spread, ecolor=INK, capsize=2)
        axes.axvline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 4)))
        axes.set_xlabel("times faster than plain decoding", color=INK)

    return draw


def _acceptance(summaries: Sequence[Summary]) -> Plot:
    def draw(axes: Any) -> None:
        for summary in summaries:
            depths = range(1, len(summary.acceptance_by_position) + 1)
            axes.plot(depths, summary.acceptance_by_position, marker="o", markersize=3, label=_label(summary))
        axes.set_xticks(range(1, 1 + max(len(s.acceptance_by_position) for s in summaries)))
        axes.set_xlabel("depth in the draft", color=INK)
        axes.set_ylabel("accepted to this depth", color=INK)
        axes.set_ylim(0, 1)
        axes.legend(fontsize=7, frameon=False)
        axes.grid(color="#e7e9ed", linewidth=0.8)

    return draw


def _split(summaries: Sequence[Summary]) -> Plot:
    def draw(axes: Any) -> None:
        left = [0.0] * len(summaries)
        for part, color in PART_COLORS.items():
            values = [s.share.get(part, 0.0) for s in summaries]
            _bars(axes, summaries, values, left=left, color=color, label=part)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the decode seconds", color=INK)
        axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)

    return draw


def _scatter(summaries: Sequence[Summary], quality: dict[str, dict[str, float]], metric: str) -> Plot:
    def draw(axes: Any) -> None:
        for summary in summaries:
            x, y = summary.tokens_per_second, quality[summary.contender][metric]
            axes.scatter([x], [y], s=60, color=_color(summary), edgecolor="white", zorder=3)
            axes.annotate(summary.contender, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=7, color=INK)
        axes.set_xscale("log")
        axes.set_xlabel("tokens per second", color=INK)
        axes.set_ylabel(metric.replace("_", " "), color=INK)
        axes.margins(0.2)
        axes.grid(color="#e7e9ed", linewidth=0.8)

    return draw


def _batches(summaries: Sequence[Summary]) -> Plot:
    def draw(axes: Any) -> None:
        for name in dict.fromkeys(s.contender for s in summaries):
            own = sorted((s.batch_size, s.tokens_per_second) for s in summaries if s.contender == name)
            if len(own) > 1:
                axes.plot(*zip(*own, strict=True), marker="o", markersize=3, label=name)
        sizes = sorted({s.batch_size for s in summaries})
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests written together", color=INK)
        axes.set_ylabel("tokens per second", color=INK)
        axes.legend(fontsize=7, frameon=False)
        axes.grid(color="#e7e9ed", linewidth=0.8)

    return draw


def _roofline(achieved: Sequence[tuple[Summary, float]], limit: float) -> Plot:
    def draw(axes: Any) -> None:
        summaries = [summary for summary, _ in achieved]
        _bars(axes, summaries, [rate for _, rate in achieved], color=[_color(s) for s in summaries])
        axes.axvline(limit, color=INK, linewidth=1, linestyle=(0, (4, 4)))
        axes.set_xlabel(f"GB/s of weights read (dashed: {limit:g} GB/s, what the memory gives)", color=INK)

    return draw


def _svg(draw: Plot, size: tuple[float, float]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    # Text stays text, and equal records give equal files.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "baton", "font.family": "sans-serif"}):
        figure = Figure(figsize=size, facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, length=0, labelsize=8)
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# --- rendering -------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #22262e; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #d9dce1; } h3 { margin-top: 1.6rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e7e9ed; text-align: right; vertical-align: top; }
td, th { white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; white-space: normal; }
thead th { border-bottom: 2px solid #c4c8cf; }
figure { margin: 1.2rem 0; } figcaption { color: #5b616b; font-size: .9rem; } svg { max-width: 100%; height: auto; }
pre { background: #f4f5f7; padding: .6rem .8rem; overflow-x: auto; } p { max-width: 48rem; }
"""


def as_markdown(blocks: Sequence[Block]) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            parts.append(f"```\n{block.text}\n```" if block.code else block.text)
        elif isinstance(block, Rows):
            parts.append(markdown_table(block.headings, block.rows))
        else:
            parts.append(f"![{block.about}]({block.name}.svg)\n\n{block.about}.")
    return "\n\n".join(parts) + "\n"


def as_html(blocks: Sequence[Block], title: str) -> str:
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"<h{block.level}>{html.escape(block.text)}</h{block.level}>")
        elif isinstance(block, Text):
            tag = "pre" if block.code else "p"
            parts.append(f"<{tag}>{html.escape(block.text)}</{tag}>")
        elif isinstance(block, Rows):
            parts.append(_html_table(block))
        else:
            label = html.escape(block.about, quote=True)
            svg = _unique(block.svg, block.name).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
            parts.append(f"<figure>{svg}<figcaption>{html.escape(block.about)}.</figcaption></figure>")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html_table(table: Rows) -> str:
    def cell(tag: str, text: str) -> str:
        kind = "" if re.fullmatch(r"[\d.,%x\-]*", text) else ' class="text"'
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    head = "".join(cell("th", text) for text in table.headings)
    rows = "".join(f"<tr>{''.join(cell('td', text) for text in row)}</tr>" for row in table.rows)
    top = f"<thead><tr>{head}</tr></thead>" if any(table.headings) else ""
    return f'<div class="wide"><table>{top}<tbody>{rows}</tbody></table></div>'


def _unique(svg: str, name: str) -> str:
    """Ids are the page's, not the picture's: several pictures use the same ones."""
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
