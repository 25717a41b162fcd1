"""`baton audit`: does drafting change a single token?"""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from baton.cli.command import INTERRUPTED, command
from baton.cli.console import err, out
from baton.cli.evaluate import measuring
from baton.cli.generate import load_writer
from baton.cli.options import Machine
from baton.cli.sources import check_methods, check_source, first_prompts, write_json
from baton.data.storage import atomic_write
from baton.drafters import WITHOUT_MODEL
from baton.machine import machine as facts
from baton.machine import revision

REFUTED = 1


def register(app: typer.Typer) -> None:
    command(
        app,
        "audit",
        examples=[
            "baton audit models/en-de-llm --data prompts.txt --limit 100",
            "baton audit models/en-de-llm --method handoff:model=models/en-de-handoff --data prompts.txt",
            "baton audit gpt2-xl --method draft-model:model=gpt2,sample=true --data prompts.jsonl --json audit.json",
        ],
    )(audit)


def audit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    machine: Machine,
    data: Annotated[Path, typer.Option("--data", "-d", help="Prompts: .jsonl with a 'prompt' in each row, or .txt.")],
    method: Annotated[
        list[str], typer.Option(help=f"NAME or NAME:key=value,..., repeatable; by default {', '.join(WITHOUT_MODEL)}.")
    ] = [],  # noqa: B006 - typer copies it
    limit: Annotated[int, typer.Option(min=1, help="Use only the first so many prompts.")] = 100,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 128,
    batch_size: Annotated[list[int], typer.Option(min=1, help="Prompts written together, repeatable.")] = [1, 7, 32],  # noqa: B006
    temperature: Annotated[list[float], typer.Option(min=0.01, help="Of sampled texts, repeatable.")] = [0.8],  # noqa: B006
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write all findings to a file; - is stdout.")
    ] = None,
    llm: Annotated[str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is.")] = None,
) -> None:
    """Prove or refute that drafting changes speed only.

    Greedy and seeded texts of each method are compared with plain decoding, token by token, alone and in batches. A
    difference where the two best tokens are closer than rounding is a near-tie and shown with its gap; any other is a
    bug. Methods that draw are tested by the law of what they emit. Exit code 1 when something is refuted. Ctrl-C
    shows what was found so far.
    """
    methods = check_methods(method)
    check_source(model, llm)
    prompts = first_prompts(data, limit)
    machine.prepare()
    writer = load_writer(model, llm, machine)
    from baton.audit import audit as run

    found = []
    about = {"model": model, "command": shlex.join(["baton", *sys.argv[1:]]), "git": revision(), "machine": facts()}

    def keep(report: Any) -> None:
        found.append(report)
        if as_json not in (None, "-"):
            with atomic_write(str(as_json)) as file:
                file.write(json.dumps(report.to_dict() | about, ensure_ascii=False, indent=1) + "\n")

    try:
        with measuring() as progress:
            report = run(
                writer,
                methods,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_sizes=batch_size,
                temperatures=temperature,
                progress=progress,
                on_method=keep,
            )
    except KeyboardInterrupt:
        if not found:
            raise
        report = found[-1]
        err.print(f"[yellow]stopped: {len(report.methods)} of {len(methods)} methods were compared")
    if not write_json(as_json, report.to_dict() | about):
        table = Table(title=f"{model}: {len(prompts)} prompts, {report.settings['dtype']}")
        for heading in ("method", "texts", "tokens", "tokens per step", "near-ties", "bugs", "chi-square (p)", ""):
            table.add_column(heading, justify="left" if heading in ("method", "") else "right")
        for each in report.methods:
            table.add_row(
                escape(each.name),
                f"{each.compared:,}",
                f"{each.tokens:,}",
                f"{each.acceptance_length:.2f}",
                str(len(each.differences) - len(each.bugs)),
                str(len(each.bugs) + len(each.failed)),
                "" if each.chi_square is None else f"{each.chi_square:.1f} ({each.chi_square_p:.3f})",
                "[green]exact" if each.exact else "[red]NOT EXACT",
            )
        out.print(table)
        for each in report.methods:
            name = escape(each.name)
            for difference in each.differences[:10]:
                kind = "near-tie" if difference.near_tie else "bug"
                out.print(
                    f"{name}: prompt {difference.prompt}, token {difference.position}: {difference.found} for "
                    f"{difference.plain}, gap {difference.gap:.2g}: {kind}",
                    highlight=False,
                )
            for failure in each.failed[:10]:
                out.print(f"{name}: {escape(failure)}", highlight=False)
    if not report.exact:
        raise typer.Exit(REFUTED)
    if len(report.methods) < len(methods):
        raise typer.Exit(INTERRUPTED)
