"""`baton bench`: which method is fastest, measured."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from baton.cli.command import command
from baton.cli.console import out
from baton.cli.evaluate import measuring
from baton.cli.generate import load_writer
from baton.cli.options import Machine
from baton.cli.sources import check_methods, check_source, first_prompts, write_json
from baton.drafters import WITHOUT_MODEL

bench_app = typer.Typer(help="Measure speed: methods interleaved on the same prompts.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    command(
        bench_app,
        "decode",
        examples=[
            "baton bench decode models/en-de-llm --data prompts.txt --limit 50",
            "baton bench decode models/en-de-llm --method handoff:model=models/en-de-handoff --data prompts.txt",
            "baton bench decode gpt2-xl --method draft-model:model=gpt2 --assistant gpt2 --data prompts.txt",
        ],
    )(decode)
    app.add_typer(bench_app, name="bench")


def decode(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    machine: Machine,
    data: Annotated[Path, typer.Option("--data", "-d", help="Prompts: .jsonl with a 'prompt' in each row, or .txt.")],
    method: Annotated[
        list[str], typer.Option(help=f"NAME or NAME:key=value,..., repeatable; by default {', '.join(WITHOUT_MODEL)}.")
    ] = [],  # noqa: B006 - typer copies it
    limit: Annotated[int, typer.Option(min=1, help="Use only the first so many prompts.")] = 100,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 256,
    batch_size: Annotated[list[int], typer.Option(min=1, help="Prompts written together, repeatable.")] = [1, 8],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Passes over all prompts.")] = 1,
    peers: Annotated[bool, typer.Option(help="Also transformers' own methods, at batch 1.")] = True,
    assistant: Annotated[
        str | None, typer.Option(metavar="S", help="Small model for transformers' assisted generation.")
    ] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all numbers to a file; - is stdout.")
    ] = None,
    llm: Annotated[str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is.")] = None,
) -> None:
    """Measure drafting methods against plain decoding, greedy, in one run.

    Every group of prompts is written by each method in turn. Tokens per second are all tokens over all seconds, with
    the quartiles of groups; speed-up is the median over groups of plain decoding's time over the method's.
    """
    methods = check_methods(method)
    check_source(model, llm)
    prompts = first_prompts(data, limit)
    machine.prepare()
    writer = load_writer(model, llm, machine)
    from baton.bench.decode import bench_decode
    from baton.handoff.model import HandoffModel

    with measuring() as progress:
        report = bench_decode(
            writer,
            methods,
            prompts,
            max_new_tokens=max_new_tokens,
            batch_sizes=batch_size,
            repeats=repeats,
            peers=peers and not isinstance(writer, HandoffModel),
            assistant=assistant,
            progress=progress,
        )
    if not write_json(as_json, report):
        out.print(table(report, f"{model}: {len(prompts)} prompts, {report['settings']['dtype']}, greedy"))


def table(report: dict[str, Any], title: str) -> Table:
    """One row per method and batch size."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in (
        "batch",
        "method",
        "tokens/s",
        "quartiles",
        "speed-up",
        "tokens per step",
        "accepted",
        "drafting",
        "",
    ):
        made.add_column(heading, justify="left" if heading in ("method", "") else "right")
    for each in report["results"]:
        low, high = each["tokens_per_second_range"]
        length, rate = each["acceptance_length"], each["acceptance_rate"]
        made.add_row(
            str(each["batch_size"]),
            each["method"],
            f"{each['tokens_per_second']:,.0f}",
            f"{low:,.0f} - {high:,.0f}",
            f"{each['speedup']:.2f}x",
            "" if length is None else f"{length:.2f}",
            "" if rate is None else f"{rate:.0%}",
            "" if length is None else f"{each['draft_share']:.0%}",
            f"[red]{each['different']} texts differ" if each["different"] else "",
        )
    return made
