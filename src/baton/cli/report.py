"""`baton report`: measurements as a page."""

from pathlib import Path
from typing import Annotated

import typer

from baton.cli.command import command
from baton.cli.console import err


def register(app: typer.Typer) -> None:
    command(
        app,
        "report",
        examples=["baton report out/*.jsonl", "baton report run.jsonl --out out/report --title 'My model'"],
    )(report)


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Records of runs (.jsonl, from --out).")],
    folder: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where to write.")] = Path("out/report"),
    title: Annotated[str, typer.Option(help="Of the page.")] = "Measurements",
) -> None:
    """Write report.html, which needs no other file, and report.md with its pictures.

    Both show hardware, dtype, temperature, batch and convention first, then speed-ups with intervals, acceptance by
    depth, where the time goes, quality against speed, tokens/s against batch, and the memory roofline.
    """
    from baton.bench.metrics import load_measurement
    from baton.bench.page import write_page

    page = write_page([load_measurement(path) for path in files], folder, title=title)
    err.print(f"wrote {page} and {page.with_suffix('.md')}", soft_wrap=True)
