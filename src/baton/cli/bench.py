"""`baton bench`: which way to decode is fastest, measured."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from baton.bench.peers.table import PEERS
from baton.bench.shapes import SHAPES
from baton.cli.command import command, fail
from baton.cli.console import err, out
from baton.cli.evaluate import measuring
from baton.cli.generate import load_writer
from baton.cli.options import Machine, one_of
from baton.cli.sources import check_methods, check_source, write_json
from baton.drafters import WITHOUT_MODEL
from baton.errors import DataError
from baton.types import Sampling

bench_app = typer.Typer(help="Measure speed: every method on the same prompts, in one run.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    command(
        bench_app,
        "decode",
        examples=[
            "baton bench decode models/pycode-target --data code --method all --assistant models/pycode-draft",
            "baton bench decode models/pycode-target --data code --limit 50",
            "baton bench decode models/en-de-llm --data translate --handoff models/en-de-handoff --out run.jsonl",
            "baton bench decode gpt2-xl --data prompts.txt --method draft-model:model=gpt2 --assistant gpt2",
        ],
    )(decode)
    command(
        bench_app,
        "forward",
        examples=[
            "baton bench forward --shape llama-110m",
            "baton bench forward --shape llama-1b --rows 1 --rows 8 --context 2048 --peer transformers --json out.json",
        ],
    )(forward)
    command(
        bench_app,
        "scale",
        examples=[
            "baton bench scale --shape llama-110m --plot scale.png",
            "baton bench scale --shape llama-1b --batch 1 --batch 16 --context 512 --device cuda --json out.json",
        ],
    )(scale)
    command(
        bench_app,
        "handoff",
        examples=[
            "baton bench handoff",
            "baton bench handoff --llm t5-base --slm t5-small --tokens 128 --json out.json",
        ],
    )(handoff_speed)
    command(
        bench_app,
        "quality",
        examples=["baton bench quality models/en-de-llm --data translate --handoff models/en-de-handoff"],
    )(quality)
    command(
        bench_app,
        "serve",
        examples=["baton bench serve models/pycode-target --data code --rate 2 --rate 8 --method prompt-lookup"],
    )(serve)
    command(
        bench_app,
        "compare",
        examples=[
            "baton bench compare before.jsonl after.jsonl",
            "baton bench compare a.jsonl b.jsonl --threshold 0.1",
        ],
    )(compare)
    app.add_typer(bench_app, name="bench")


def decode(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    sampling: Sampling,
    machine: Machine,
    data: Annotated[
        list[str],
        typer.Option(
            "--data", "--suite", "-d", help="Suite (code, edit, math, translate) or file of prompts, repeatable."
        ),
    ],
    method: Annotated[
        list[str],
        typer.Option(help=f"NAME or NAME:key=value,..., or all; repeatable; by default {', '.join(WITHOUT_MODEL)}."),
    ] = [],  # noqa: B006 - typer copies it
    handoff: Annotated[
        list[str],
        typer.Option(metavar="DIR", help="Hand-off from MODEL, or DIR+METHOD; repeatable."),
    ] = [],  # noqa: B006
    peer: Annotated[
        list[str],
        typer.Option(help=f"Other engine: {', '.join(PEERS)}; repeatable.", callback=one_of([*PEERS, "none"])),
    ] = ["transformers"],  # noqa: B006
    assistant: Annotated[
        str | None, typer.Option(metavar="S", help="Small model that other engines, and `all`, draft with.")
    ] = None,
    datastore: Annotated[
        str | None, typer.Option(metavar="DIR", help="For `all`: what `baton build-datastore` wrote.")
    ] = None,
    ngrams: Annotated[
        str | None, typer.Option(metavar="DIR", help="For `all`: what `baton build-table` wrote.")
    ] = None,
    controlled: Annotated[bool, typer.Option("--controlled", help="Each method under a controller, too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Use only so many prompts of each suite.")] = 100,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 256,
    batch_size: Annotated[list[int], typer.Option(min=1, help="Prompts written together, repeatable.")] = [1, 8],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Passes over all prompts.")] = 1,
    records: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Keep raw counts (.jsonl); a run that was cut off goes on."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start --out anew.")] = False,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the summary to a file; - is stdout.")
    ] = None,
    llm: Annotated[str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is.")] = None,
) -> None:
    """Measure ways to decode against plain decoding, in one run.

    Every group of prompts is written by each in turn. Tokens per second are all tokens over all seconds; speed-up is
    plain decoding's time per token over the method's; brackets hold 95 % of bootstrap resamples of the groups.
    """
    methods = check_methods(method, small=assistant, datastore=datastore, table=ngrams, controlled=controlled)
    check_source(model, llm, *(spec.partition("+")[0] for spec in handoff))
    from baton.bench.suites import read_suite

    suites = [read_suite(name).first(limit) for name in data]  # a wrong name is better known before a model is loaded
    machine.prepare()
    writer = load_writer(model, llm, machine)
    suites = [read_suite(name, tokenizer=writer.prompt_tokenizer).first(limit) for name in data]
    from baton.bench.decode import bench_decode

    with measuring() as progress:
        measured = bench_decode(
            writer,
            suites,
            methods=methods,
            handoffs=handoff,
            peers=[name for name in peer if name != "none"],
            assistant=assistant,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            batch_sizes=batch_size,
            repeats=repeats,
            out=records,
            overwrite=overwrite,
            command=shlex.join(["baton", *sys.argv[1:]]),
            progress=progress,
        )
    for line in measured.run.absent:
        err.print(f"[yellow]{line}", soft_wrap=True)
    report = measured.to_dict()
    if not write_json(as_json, report):
        out.print(table(report))
        show_quality(report)


def forward(
    machine: Machine,
    shape: Annotated[
        str, typer.Option(help=f"Public shape, with random weights: {', '.join(SHAPES)}.", callback=one_of(SHAPES))
    ] = "llama-110m",
    rows: Annotated[list[int], typer.Option(min=1, help="Tokens of a pass, repeatable.")] = [1, 2, 4, 8, 16, 32],  # noqa: B006
    context: Annotated[list[int], typer.Option(min=1, help="Tokens before it, repeatable.")] = [64, 512, 2048],  # noqa: B006
    peer: Annotated[
        list[str],
        typer.Option(help=f"Other engine: {', '.join(PEERS)}, or none; repeatable.", callback=one_of([*PEERS, "none"])),
    ] = ["transformers", "llama.cpp"],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=3, help="Times that each pass is made.")] = 15,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the costs to a file; - is stdout.")
    ] = None,
) -> None:
    """Time single passes: what it costs to read so many tokens at once, after a context.

    Engines take turns on the same random weights. One row is plain decoding; more are what verifying a draft costs.
    """
    machine.prepare()
    from baton.bench.forward import bench_forward

    with measuring() as progress:
        report = bench_forward(
            shape,
            rows=rows,
            contexts=context,
            peers=[name for name in peer if name != "none"],
            **_unstored(machine),
            repeats=repeats,
            command=shlex.join(["baton", *sys.argv[1:]]),
            progress=progress,
        )
    for line in [*report.absent, *report.remarks]:
        err.print(f"[yellow]{line}", soft_wrap=True)
    if not write_json(as_json, report.to_dict()):
        out.print(cost_table(report.to_dict()))


def scale(
    machine: Machine,
    shape: Annotated[
        str, typer.Option(help=f"Public shape, with random weights: {', '.join(SHAPES)}.", callback=one_of(SHAPES))
    ] = "llama-110m",
    batch: Annotated[list[int], typer.Option(min=1, help="Rows written together, repeatable.")] = [  # noqa: B006
        *(1, 2, 4, 8, 16, 32, 64)
    ],
    context: Annotated[list[int], typer.Option(min=1, help="Tokens that each row holds, repeatable.")] = [  # noqa: B006
        *(64, 512, 2048, 8192)
    ],
    repeats: Annotated[int, typer.Option(min=3, help="Steps of each batch and context.")] = 9,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the costs (.png, .svg or .pdf).")
    ] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the costs to a file; - is stdout.")
    ] = None,
) -> None:
    """Time plain decode steps: tokens per second against rows written together and tokens that they hold.

    Keys and values are noise. What does not fit into memory is left out, with its size.
    """
    if plot is not None:  # better now than after the measurement
        if plot.suffix not in (".png", ".svg", ".pdf"):
            fail(f"--plot {plot}: end the name in .png, .svg or .pdf")
        plot.parent.mkdir(parents=True, exist_ok=True)
    machine.prepare()
    from baton.bench.scale import bench_scale
    from baton.bench.scale import plot as draw

    with measuring() as progress:
        report = bench_scale(
            shape,
            batches=batch,
            contexts=context,
            **_unstored(machine),
            repeats=repeats,
            command=shlex.join(["baton", *sys.argv[1:]]),
            progress=progress,
        ).to_dict()
    for line in [*report["absent"], *report["remarks"]]:
        err.print(f"[yellow]{line}", soft_wrap=True)
    if plot is not None and report["points"]:
        draw(report, plot)
        err.print(f"wrote {plot}", soft_wrap=True)
    if not write_json(as_json, report):
        out.print(scale_table(report))


def handoff_speed(
    machine: Machine,
    llm: Annotated[str, typer.Option(help="Shape of the LLM.", callback=one_of(SHAPES))] = "t5-large",
    slm: Annotated[str, typer.Option(help="Shape of the SLM.", callback=one_of(SHAPES))] = "t5-small",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[list[int], typer.Option(min=1, help="Tokens of the response, repeatable.")] = [16, 64, 256],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed; the median counts.")] = 3,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the costs to a file; - is stdout.")
    ] = None,
) -> None:
    """Time LLM, SLM and hand-off at real sizes, on random weights of public shapes.

    What a hand-off saves depends on the sizes and on the length of the response, which this shows; how good its texts
    are is measured on trained models, with `baton eval handoff`.
    """
    machine.prepare()
    from baton.bench.handoff import bench_handoff

    with measuring() as progress:
        report = bench_handoff(
            llm,
            slm,
            prompt_tokens=prompt_tokens,
            lengths=tokens,
            **_unstored(machine),
            repeats=repeats,
            command=shlex.join(["baton", *sys.argv[1:]]),
            progress=progress,
        )
    if write_json(as_json, report.to_dict()):
        return
    title = f"{llm} -> {slm}, prompt of {prompt_tokens} tokens, {report.settings['dtype']}, batch 1"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("tokens", "", "reading, ms", "ms per token", "total, ms", "over the LLM"):
        made.add_column(heading, justify="right" if heading else "left")
    whole = {cost.tokens: cost.total_s for cost in report.costs if cost.mode == "llm"}
    for cost in sorted(report.costs, key=lambda cost: cost.tokens):
        made.add_row(
            str(cost.tokens),
            {"llm": "LLM", "slm": "SLM alone", "handoff": "hand-off"}[cost.mode],
            f"{1e3 * cost.read_s:.1f}",
            f"{cost.ms_per_token:.2f}",
            f"{1e3 * cost.total_s:,.0f}",
            f"{whole[cost.tokens] / cost.total_s:.1f}x",
        )
    out.print(made)


def _unstored(machine: Machine) -> dict[str, Any]:
    """How models run whose weights are drawn, not read: where nothing was stored, `auto` is bfloat16."""
    from baton.models.loading import resolve_device, resolve_dtype

    dtype = resolve_dtype("bfloat16" if machine.dtype == "auto" else machine.dtype)
    return {"dtype": dtype, "device": resolve_device(machine.device), "runtime": machine.runtime}


def cost_table(report: dict[str, Any]) -> Table:
    """One row per pass, one column per engine, its milliseconds over ours beside it."""
    settings, machine = report["settings"], report["machine"]
    made = Table(
        title=f"{settings['shape']}, {settings['dtype']}, runtime {settings['runtime']}, {machine['threads']} threads, "
        f"memory read at {machine['bandwidth_gb_s']} GB/s",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    engines = list(dict.fromkeys(cost["engine"] for cost in report["costs"]))
    for heading in ("context", "rows", *(f"{engine}, ms" for engine in engines), "GB/s"):
        made.add_column(heading, justify="right")
    cells = {(cost["context"], cost["rows"], cost["engine"]): cost for cost in report["costs"]}
    for context, count in dict.fromkeys((cost["context"], cost["rows"]) for cost in report["costs"]):
        ours = cells[context, count, engines[0]]
        shown = [f"{1e3 * ours['seconds']:.2f}"]
        for engine in engines[1:]:
            theirs = cells.get((context, count, engine))  # not every engine has every pass
            over = theirs["seconds"] / ours["seconds"] if theirs else 0
            shown.append(f"{1e3 * theirs['seconds']:.2f} [dim]{over:.2f}x" if theirs else "")
        made.add_row(str(context), str(count) if count else "prompt", *shown, f"{ours['gb_s']}" if count else "")
    return made


def scale_table(report: dict[str, Any]) -> Table:
    """One row per context and batch, its tokens/s over those of the smallest batch."""
    settings, machine, points = report["settings"], report["machine"], report["points"]
    made = Table(
        title=f"{settings['shape']}, {settings['dtype']}, runtime {settings['runtime']}, {machine['threads']} threads, "
        f"memory read at {machine['bandwidth_gb_s']} GB/s; weights {settings['weight_bytes'] / 1e6:,.0f} MB, "
        f"a token in a row {settings['slot_bytes'] / 1e3:,.1f} kB",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("context", "MB per row", "batch", "ms per step", "", "tokens/s", "", "GB/s"):
        made.add_column(heading, justify="right")
    first: dict[int, dict[str, Any]] = {}
    for point in points:
        new = point["context"] not in first
        smallest = first.setdefault(point["context"], point)
        over = point["tokens_per_second"] / smallest["tokens_per_second"]
        made.add_row(
            f"{point['context']:,}" if new else "",
            f"{point['cache_bytes'] / point['batch'] / 1e6:,.1f}" if new else "",
            str(point["batch"]),
            f"{1e3 * point['seconds']:.2f}",
            f"[dim]\\[{1e3 * point['low']:.2f}, {1e3 * point['high']:.2f}]",
            f"{point['tokens_per_second']:,.0f}",
            "" if new else f"[dim]{over:.2f}x",
            f"{point['gb_s']}",
        )
    return made


def table(report: dict[str, Any]) -> Table:
    """One row per contender and batch size."""
    run = report["run"]
    how = "greedy" if not run["sampling"]["temperature"] else f"temperature {run['sampling']['temperature']}"
    about = f"{run['model']}: {', '.join(run['suites'])}; {run['dtype']}, {how}, {run['machine']['threads']} threads"
    made = Table(title=about, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("batch", "", "tokens/s", "", "speed-up", "", "tokens per step", "accepted", "drafting", ""):
        made.add_column(heading, justify="right" if heading or not made.columns else "left")
    made.columns[1].justify, made.columns[1].overflow = "left", "fold"
    for each in report["summaries"]:
        low, high = each["tokens_per_second_interval"]
        length, rate, share = each["acceptance_length"], each["acceptance_rate"], each["share"]
        made.add_row(
            str(each["batch_size"]),
            escape(each["contender"]),
            f"{each['tokens_per_second']:,.0f}",
            f"[dim]\\[{low:,.0f}, {high:,.0f}]",
            "" if each["speedup"] is None else f"{each['speedup']:.2f}x",
            "" if each["speedup"] is None else "[dim]\\[{:.2f}, {:.2f}]".format(*each["speedup_interval"]),
            "" if length is None else f"{length:.2f}",
            "" if rate is None else f"{rate:.0%}",
            f"{share['draft']:.0%}" if share and rate is not None else "",
            f"[yellow]{', '.join(each['remarks'])}",
        )
    return made


def show_quality(report: dict[str, Any]) -> None:
    """Quality per contender, where it was judged."""
    if not report["quality"]:
        return
    names = list(dict.fromkeys(name for scores in report["quality"].values() for name in scores))
    made = Table(title="Quality", title_justify="left", box=box.SIMPLE_HEAD)
    made.add_column("")
    for name in names:
        made.add_column(name.replace("_", " "), justify="right")
    for contender, scores in report["quality"].items():
        made.add_row(escape(contender), *(f"{scores[name]:.1f}" if name in scores else "" for name in names))
    out.print(made)


def quality(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    sampling: Sampling,
    machine: Machine,
    data: Annotated[
        list[str],
        typer.Option("--data", "--suite", "-d", help="Suite or file with references (prompt, response), repeatable."),
    ],
    handoff: Annotated[list[str], typer.Option(metavar="DIR", help="Hand-off from MODEL, repeatable.")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many prompts of each suite.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts written together.")] = 32,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the scores to a file; - is stdout.")
    ] = None,
    llm: Annotated[str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is.")] = None,
) -> None:
    """How good the texts are: BLEU, chrF, ROUGE-L, exact match, edit similarity, perplexity under MODEL.

    Drafting methods need no such comparison: they write the same texts.
    """
    check_source(model, llm, *(spec.partition("+")[0] for spec in handoff))
    from baton.bench.suites import read_suite

    for name in data:
        if not any(task.references for task in read_suite(name).tasks):
            raise DataError(f"{name} has no references to judge by: give rows of prompt and response")
    machine.prepare()
    writer = load_writer(model, llm, machine)
    from baton.bench.decode import bench_decode

    with measuring() as progress:
        report = bench_decode(
            writer,
            [read_suite(name, tokenizer=writer.prompt_tokenizer).first(limit) for name in data],
            handoffs=handoff,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            batch_sizes=[batch_size],
            fill=False,
            progress=progress,
        ).to_dict()
    if not write_json(as_json, {"run": report["run"], "quality": report["quality"]}):
        show_quality(report)


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    sampling: Sampling,
    machine: Machine,
    data: Annotated[
        str, typer.Option("--data", "--suite", "-d", help="Suite (code, edit, math, translate) or file of prompts.")
    ],
    method: Annotated[
        list[str], typer.Option(help=f"NAME or NAME:key=value,..., repeatable; by default {', '.join(WITHOUT_MODEL)}.")
    ] = [],  # noqa: B006
    rate: Annotated[list[float], typer.Option(help="Requests per second that arrive, repeatable.")] = [1.0],  # noqa: B006
    requests: Annotated[int, typer.Option(min=1, help="Requests of each run.")] = 100,
    max_rows: Annotated[int, typer.Option(min=1, help="Most requests written at once; others wait.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 128,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all numbers to a file; - is stdout.")
    ] = None,
    llm: Annotated[str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is.")] = None,
) -> None:
    """What users wait for when requests arrive at random: time to first token, per token, and in all.

    Arrivals are a Poisson process, the same for every method.
    """
    methods = check_methods(method)
    check_source(model, llm)
    from baton.bench.suites import read_suite

    read_suite(data)
    machine.prepare()
    writer = load_writer(model, llm, machine)
    from baton.bench.serve import bench_serve

    with measuring() as progress:
        report = bench_serve(
            writer,
            read_suite(data, tokenizer=writer.prompt_tokenizer),
            methods=methods,
            rates=rate,
            requests=requests,
            max_rows=max_rows,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            progress=progress,
        )
    if write_json(as_json, report):
        return
    made = Table(box=box.SIMPLE_HEAD)
    headings = ["rate", "", "tokens/s", "requests/s", "TTFT ms p50", "p90", "p99", "TPOT ms p50", "p90", "total ms p50"]
    for heading in (*headings, ""):
        made.add_column(heading, justify="left" if heading == "" else "right")
    for each in report["summaries"]:
        first, token, total = (
            [f"{value:,.1f}" for value in each[name].values()] or ["-"] * 3
            for name in ("ttft_ms", "tpot_ms", "latency_ms")
        )
        said = f"[red]{each['failed']} failed" if each["failed"] else ""
        said += f"[red]{each['different']} texts differ" if each["different"] else ""
        numbers = [
            f"{each['tokens_per_second']:,.0f}",
            f"{each['requests_per_second']:.2f}",
            *first,
            *token[:2],
            total[0],
        ]
        made.add_row(f"{each['rate']:g}/s", escape(each["contender"]), *numbers, said)
    out.print(made)


def compare(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="Records of a run (.jsonl, from --out).")],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Records of another run of the same work.")],
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Share of the speed that counts as a change.")] = 0.05,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two runs of the same work; the exit code is 1 where something became slower, failed or wrote other texts.

    A change counts where the whole 95 % interval of the ratio lies beyond the threshold.
    """
    from dataclasses import asdict

    from baton.bench.compare import compare as compare_runs
    from baton.bench.metrics import load_measurement

    runs = load_measurement(before), load_measurement(after)
    changes = compare_runs(*runs, threshold=threshold)
    if as_json:
        sys.stdout.write(json.dumps([asdict(change) for change in changes], indent=1) + "\n")
    else:
        made = Table(box=box.SIMPLE_HEAD)
        for heading in ("batch", "", "before", "after", "ratio", "", "tokens per step", ""):
            made.add_column(heading, justify="left" if heading == "" else "right")
        for each in changes:
            lengths = [x for x in (each.acceptance_before, each.acceptance_after) if x is not None]
            made.add_row(
                str(each.batch_size),
                escape(each.contender),
                f"{each.before:,.0f}",
                f"{each.after:,.0f}",
                f"{each.ratio:.2f}",
                "[dim]\\[{:.2f}, {:.2f}]".format(*each.ratio_interval),
                " to ".join(f"{x:.2f}" for x in lengths),
                {"same": "[dim]same", "faster": "[green]faster"}.get(each.verdict, f"[red]{each.verdict}")
                + (f"[red], {each.different} texts differ" if each.different else ""),
            )
        out.print(made)
        machines = [each.run.machine.get("cpu") for each in runs]
        if machines[0] != machines[1]:
            err.print(f"[yellow]measured on different machines: {machines[0]}, {machines[1]}", soft_wrap=True)
    if any(change.verdict in ("slower", "failed") or change.different for change in changes):
        raise typer.Exit(1)
