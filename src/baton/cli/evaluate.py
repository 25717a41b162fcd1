"""`baton eval`: what a hand-off is worth, against its LLM, its SLM alone, and itself without the LLM's reading."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from baton.bench.report import LEGEND, NAMES, summary
from baton.cli.command import command, fail
from baton.cli.console import err, loading, out, progress_bar
from baton.cli.options import Machine, one_of
from baton.cli.sources import check_source

eval_app = typer.Typer(help="Measure quality and speed.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    command(
        eval_app,
        "handoff",
        examples=[
            "baton eval handoff models/en-de-handoff",
            "baton eval handoff my-handoff --data test.jsonl --json out.json",
            "baton eval handoff my-handoff --mode llm --mode handoff --limit 200 --json - | jq .bleu",
        ],
    )(handoff)
    app.add_typer(eval_app, name="eval")


def handoff(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a hand-off.")],
    machine: Machine,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Test pairs, .jsonl or .tsv; by default the held-out split DIR names."),
    ] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all numbers to a file; - is stdout.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FOLDER", help="Write report.md with a picture there.")
    ] = None,
    mode: Annotated[
        list[str],
        typer.Option(help=f"What to compare, repeatable: {', '.join(NAMES)}; by default all.", callback=one_of(NAMES)),
    ] = [],  # noqa: B006 - typer copies it
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first so many pairs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at the same time for quality.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    speed_prompts: Annotated[int, typer.Option(min=2, help="Prompts timed one by one.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed; the median counts.")] = 3,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut prompts that are too long for the models.")] = False,
    llm: Annotated[
        str | None, typer.Option(metavar="L", help="Where the LLM is, if not where it was in training.")
    ] = None,
    slm: Annotated[
        str | None, typer.Option(metavar="S", help="The SLM alone to compare with, if not the one DIR names.")
    ] = None,
) -> None:
    """Compare LLM, SLM alone and hand-off, and the hand-off with Z = 0, constant Z and another prompt's Z.

    Quality is BLEU and chrF of greedy answers. Speed is taken one prompt at a time, all models interleaved.
    """
    target = Path(as_json) if as_json not in (None, "-") else None
    for place in (target, report):
        if place is not None:  # better now than after the measurement
            place.parent.mkdir(parents=True, exist_ok=True)
    if target is not None and target.is_dir():
        fail(f"--json {target} is a folder: name a file in it")
    check_source(folder, llm, slm)
    machine.prepare()
    with loading(folder):
        from baton.data.formats import read_pairs
        from baton.handoff.evaluate import evaluate

        pairs = read_pairs(data)[0] if data else None
    with measuring() as progress:
        found = evaluate(
            folder,
            pairs,
            llm=llm,
            slm=slm,
            limit=limit,
            modes=tuple(mode or NAMES),
            dtype=machine.dtype,
            runtime=machine.runtime,
            device=machine.device,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            speed_prompts=speed_prompts,
            repeats=repeats,
            truncate=truncate,
            progress=progress,
        ).to_dict()
    text = json.dumps(found, ensure_ascii=False, indent=1) + "\n"
    if as_json == "-":
        sys.stdout.write(text)
    else:
        show(found, f"{folder}, {found.get('settings', {}).get('prompts', '')} prompts")
    if target is not None:
        target.write_text(text, encoding="utf-8")
        err.print(f"wrote {target}", soft_wrap=True)
    if report is not None:
        from baton.bench.report import write_report

        again = " ".join(["baton eval handoff", folder, *(["--data", str(data)] if data else [])])
        page = write_report(found, report, title=f"{Path(folder).name}: evaluation", command=again)
        err.print(f"wrote {page}", soft_wrap=True)


def show(report: dict[str, Any], title: str) -> None:
    """The table, its legend and the result in words, on stdout."""
    from baton.cli.tables import numbers

    out.print(numbers(report, title))
    out.print(f"[dim]{LEGEND}")
    if summary(report):
        out.print(summary(report))


@contextlib.contextmanager
def measuring() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars for a function that reports (what, done, total): one line per `what`."""
    with progress_bar() as bar:
        waiting = bar.add_task("loading", total=None)
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            bar.update(waiting, visible=False)
            if what not in tasks:
                tasks[what] = bar.add_task(_title(what), total=total)
            bar.update(tasks[what], completed=done)

        yield progress


def _title(what: str) -> str:
    """`llm: writing` as people read it."""
    mode, colon, rest = what.partition(":")
    return f"{NAMES[mode]}:{rest}" if colon and mode in NAMES else what
