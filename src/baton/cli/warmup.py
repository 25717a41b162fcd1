"""`baton warmup`: what a runtime compiles is compiled before anyone waits for it."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from baton.cli.command import command
from baton.cli.console import out
from baton.cli.evaluate import measuring
from baton.cli.generate import load_writer
from baton.cli.options import Machine
from baton.cli.sources import check_source


def register(app: typer.Typer) -> None:
    command(
        app,
        "warmup",
        examples=[
            "baton warmup gpt2 --runtime compiled",
            "baton warmup gpt2 --runtime compiled --rows 1 --rows 8 --batch-size 1 --batch-size 4",
            "baton warmup models/pycode-target --json",
        ],
    )(warmup)


def warmup(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of a hand-off or language model.")],
    machine: Machine,
    rows: Annotated[list[int], typer.Option(min=1, help="New tokens of a request's pass, repeatable.")] = [1, 8],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(min=1, help="Requests in a pass, repeatable.")] = [1],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    llm: Annotated[str | None, typer.Option(metavar="L", help="Where a hand-off's LLM is.")] = None,
) -> None:
    """Compile what MODEL's runtime needs, so that no request is served by slower layers meanwhile.

    With --runtime compiled: a graph for each number of new tokens and requests, padded up to powers of two; one graph
    serves all contexts. With native layers: their C functions. The code is kept on disk and found by later starts.
    """
    check_source(model, llm)
    machine.prepare()
    writer = load_writer(model, llm, machine)
    from baton.runtime.warm import warm_up

    with measuring() as progress:
        found = warm_up(writer.lm, rows=rows, batches=batch_size, progress=progress)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=1) + "\n")
        return
    for bucket, seconds in found.seconds.items():
        out.print(f"{bucket}: {seconds:.1f} s")
    for bucket, reason in found.failed.items():
        out.print(f"[yellow]{bucket}: {reason}")
    size = f"{found.cache_bytes / 2**20:.1f} MB in {found.folder}" if found.folder else "nothing to compile"
    out.print(f"[bold]runtime {found.runtime}[/], {size}", soft_wrap=True)
