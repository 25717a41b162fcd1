"""Tables of the documentation, made from the committed results: `python benchmarks/tables.py` writes them anew.

A document names a table by a comment, `<!-- table: pycode-decode -->`, and ends it by `<!-- end of table -->`; what is
between the two comes from `benchmarks/results/pycode-decode.json`. `<!-- table: methods -->` is the list of all
methods, read from the first lines of their files and from the results named in `MEASURED`.
"""

import inspect
import json
import re
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

from baton.bench.report import markdown_table
from baton.drafters import METHODS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(r"(<!-- table: ([\w.-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def table(result: dict[str, Any]) -> str:
    """The table of one result, with the conditions below it."""
    kinds = {"summaries": _decoding, "points": _scale, "tokens_per_step": _traces, "exact": _audit, "sizes": _curve}
    kind = next((kinds[key] for key in kinds if key in result), None)
    if kind is None:
        kind = _passes if "shape" in result["settings"] else _handoff
    made = kind(result)
    return f"{made}\n\n{_conditions(result)}\n"


def _decoding(result: dict[str, Any]) -> str:
    sizes = list(dict.fromkeys(s["batch_size"] for s in result["summaries"]))
    found = {(s["contender"], s["batch_size"]): s for s in result["summaries"]}
    names = list(dict.fromkeys(s["contender"] for s in result["summaries"]))
    # A method measured under a controller too has one row for both.
    governed = {name: other for name in names if (other := f"controller:base=[{name}]") in names}
    rows = []
    for name in names:
        if name in governed.values():
            continue
        own = [found.get((name, size)) for size in sizes]
        first = next(s for s in own if s)
        length = first["acceptance_length"]
        share = (first["share"] or {}).get("draft")
        cells = [name, f"{length:.2f}" if length else "", "" if share is None else f"{100 * share:.0f} %"]
        for size, summary in zip(sizes, own, strict=True):
            cells += ["", ""] if summary is None else [f"{summary['tokens_per_second']:,.0f}", _speedup(summary)]
            if governed:
                under = found.get((governed.get(name, ""), size))
                cells.append(f"{under['speedup']:.2f}x" if under else "")
        rows.append([*cells, f"{first['different']} of {first['requests']}" if first["different"] is not None else ""])
    more = ["under the controller"] if governed else []
    heads = [head for size in sizes for head in (f"tokens/s, batch {size}", "over plain [95 %]", *more)]
    return markdown_table(["", "tokens per step", "drafting", *heads, "texts that differ"], rows)


def _speedup(summary: dict[str, Any]) -> str:
    if summary["speedup"] is None:
        return ""
    low, high = summary["speedup_interval"]
    return f"{summary['speedup']:.2f}x" + ("" if low == high else f" [{low:.2f}, {high:.2f}]")


def _passes(result: dict[str, Any]) -> str:
    engines = list(dict.fromkeys(cost["engine"] for cost in result["costs"]))
    found = {(cost["context"], cost["rows"], cost["engine"]): cost for cost in result["costs"]}
    rows = []
    for context, count in dict.fromkeys((cost["context"], cost["rows"]) for cost in result["costs"]):
        cells = [f"{context:,}", str(count) if count else "reading it"]
        ours = found[context, count, engines[0]]["seconds"]
        for engine in engines:
            cost = found.get((context, count, engine))  # not every engine has every pass
            over = f" ({cost['seconds'] / ours:.2f}x)" if cost and engine != engines[0] else ""
            cells.append(f"{1e3 * cost['seconds']:.2f}{over}" if cost else "")
        rows.append(cells)
    return markdown_table(["context", "rows", *(f"{engine}, ms" for engine in engines)], rows)


def _scale(result: dict[str, Any]) -> str:
    """Tokens/s, a row per batch, a column per context; in brackets ms per step."""
    found = {(point["batch"], point["context"]): point for point in result["points"]}
    batches, contexts = (sorted({key[place] for key in found}) for place in (0, 1))
    rows = []
    for batch in batches:
        own = [found.get((batch, context)) for context in contexts]
        cells = [f"{p['tokens_per_second']:,.0f} ({1e3 * p['seconds']:.1f})" if p else "" for p in own]
        rows.append([str(batch), *cells])
    return markdown_table(["batch", *(f"context {context:,}" for context in contexts)], rows)


def _traces(result: dict[str, Any]) -> str:
    rows = []
    for method, lengths in result["tokens_per_step"].items():
        mean = sum(lengths[1:]) / len(lengths[1:])
        rows.append([f"`{method}`", f"{lengths[0]:.2f}", f"{mean:.2f}", f"{lengths[-1]:.2f}"])
    return markdown_table(["tokens per step", "first answer", "mean of the others", "last answer"], rows)


def _curve(result: dict[str, Any]) -> str:
    """Quality of an SLM of each size, alone and with the hand-off, and how much of the way to the LLM that is."""
    rows = []
    for point in result["sizes"]:
        llm, slm, handoff = (point["bleu"][name] for name in ("llm", "slm", "handoff"))
        times = [f"{point['ms_per_token'][name]:.2f}" for name in ("slm", "handoff", "llm")]
        closed = f"{100 * (handoff - slm) / (llm - slm):.0f} %"
        count = f"{point['parameters']['slm'] / 1e6:.2f} M"
        rows.append([str(point["width"]), count, f"{slm:.1f}", f"{handoff:.1f}", f"{llm:.1f}", closed, *times])
    heads = ["width", "parameters", "BLEU alone", "with hand-off", "LLM", "of the gap closed"]
    return markdown_table([*heads, "ms per token, alone", "with hand-off", "LLM"], rows)


def _audit(result: dict[str, Any]) -> str:
    rows = []
    for method in result["methods"]:
        near = sum(difference["near_tie"] for difference in method["differences"])
        bugs = len(method["differences"]) - near + len(method["failed"])
        law = "" if method["chi_square"] is None else f"{method['chi_square']:.1f} ({method['chi_square_p']:.2f})"
        counts = (method["compared"], method["tokens"])
        rows.append([f"`{method['name']}`", *(f"{n:,}" for n in counts), str(near), str(bugs), law])
    return markdown_table(
        ["method", "texts", "tokens", "near-ties", "other differences", "law of two tokens (p)"], rows
    )


def _handoff(result: dict[str, Any]) -> str:
    names = {"llm": "LLM", "slm": "SLM alone", "handoff": "hand-off"}
    whole = {cost["tokens"]: cost["total_s"] for cost in result["costs"] if cost["mode"] == "llm"}
    rows = [
        [
            f"{cost['tokens']} tokens, {names[cost['mode']]}",
            f"{1e3 * cost['read_s']:.0f}",
            f"{cost['ms_per_token']:.2f}",
            f"{1e3 * cost['total_s']:,.0f}",
            f"{whole[cost['tokens']] / cost['total_s']:.1f}x",
        ]
        for cost in sorted(result["costs"], key=lambda cost: cost["tokens"])
    ]
    return markdown_table(["", "reading, ms", "ms per token", "total, ms", "over the LLM"], rows)


def _conditions(result: dict[str, Any]) -> str:
    settings = result.get("run", result.get("settings"))
    if "sizes" in result:
        steps = result["sizes"][0]["steps"]
        return (
            f"{steps} steps each, {result['prompts']} test sentences; {result['machine']['cpu']}, "
            f"{result['machine']['threads']} threads, commit {result['git']}.\n`{result['command']}`"
        )
    if "exact" in result:
        sizes = ", ".join(map(str, settings["batch_sizes"]))
        warm = ", ".join(map(str, settings["seeded"]["temperature"]))
        return (
            f"{result['model']}, {settings['dtype']}: {settings['prompts']} prompts, {settings['max_new_tokens']} new "
            f"tokens; greedy, and sampled with a seed (temperature {warm}, top-p 0.95); batches of {sizes}; commit "
            f"{result['git']}.\n`{result['command']}`"
        )
    about, versions = result.get("machine", settings.get("machine")), result.get("versions", settings.get("versions"))
    what = settings.get("shape") or settings.get("model")
    if what is None and "llm" in settings:
        what = f"{settings['llm']} to {settings['slm']}, prompt of {settings['prompt_tokens']} tokens, batch 1"
    if "tokens_per_step" in result:
        answers = len(next(iter(result["tokens_per_step"].values())))
        return (
            f"{answers} answers to each of {settings['prompts']} prompts of `{settings['suite']}`, one after another; "
            f"temperature {settings['temperature']}, top-p 0.95, {settings['tokens']} tokens; {about['cpu']}, commit "
            f"{result['git']}.\n`{result['command']}`"
        )
    if "suites" in settings:
        prompts = ", ".join(f"{suite['prompts']} of `{name}`" for name, suite in settings["suites"].items())
        warm = settings["sampling"]["temperature"]
        how = f"temperature {warm:g}" if warm else "greedy"
        what += f"; prompts: {prompts}; {how}, {settings['max_new_tokens']} new tokens"
    return (
        f"{what}; {settings['dtype']}, runtime {settings['runtime']}, {about['cpu']}, {about['threads']} threads, "
        f"memory read at {about['bandwidth_gb_s']} GB/s, PyTorch {versions['torch']}, transformers "
        f"{versions['transformers']}, commit {settings['git']}.\n`{settings['command']}`"
    )


MEASURED = {"code": "methods-code", "edit": "methods-edit", "math": "methods-math"}  # workload -> result
PROMISE = re.compile(r"(Source|Lossless|Training|Memory|Draft cost|Helps)[: ]")


def methods() -> str:
    """Every method: what its file promises, and how it did on the three workloads at batch 1."""
    results = {
        workload: json.loads(path.read_text(encoding="utf-8"))["summaries"]
        for workload, name in MEASURED.items()
        if (path := RESULTS / f"{name}.json").exists()
    }
    rows = []
    for name in METHODS:
        if name == "plain":
            continue
        what, said = promises(name)
        cells = [f"`{name}`", what, *(said.get(key, "") for key in ("Source", "Lossless", "Training"))]
        cells += ["; ".join(filter(None, (said.get("Memory"), said.get("Draft cost")))), said.get("Helps", "")]
        for summaries in results.values():
            own = [s for s in summaries if s["batch_size"] == 1 and re.split("[:]", s["contender"])[0] == name]
            best = max(own, key=lambda s: s["speedup"] or 0, default=None)
            cells.append(f"{best['acceptance_length']:.2f}; {best['speedup']:.2f}x" if best else "")
        rows.append(cells)
    heads = ["name", "what it does", "source", "lossless", "training", "memory, draft cost", "helps"]
    return markdown_table([*heads, *(f"{workload}: tokens per step; speed-up" for workload in results)], rows)


def promises(name: str) -> tuple[str, dict[str, str]]:
    """What a method does, and what the top of its file says of source, exactness, training, cost and use."""
    module = METHODS[name].partition(":")[0]
    first, _, rest = (inspect.getdoc(import_module(module)) or "").partition("\n")
    paragraph = " ".join(rest.strip().split("\n\n")[0].split())
    found = list(PROMISE.finditer(paragraph))
    said = {
        at[1]: paragraph[at.end() : after.start() if after else None].strip().rstrip(".")
        for at, after in zip_longest(found, found[1:])
    }
    if "Helps" in said:
        said["Helps"] = said["Helps"].split(". ")[0]
    return first.partition(": ")[2].rstrip("."), {key: text.split(". ")[0] for key, text in said.items()}


def filled(document: str) -> str:
    """A document with all its tables as the results have them."""

    def fill(place: re.Match[str]) -> str:
        if place[2] == "methods":
            return f"{place[1]}{methods()}\n{place[4]}"
        result = json.loads((RESULTS / f"{place[2]}.json").read_text(encoding="utf-8"))
        return f"{place[1]}{table(result)}{place[4]}"

    return PLACE.sub(fill, document)


def main() -> None:
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
