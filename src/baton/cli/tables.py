"""An evaluation on the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from baton.bench.report import NAMES, table

NARROW = ["\nBLEU", "\nchrF", "ms per\ntoken", "tokens\nper s", "speed-up\ndecode", "speed-up\ntotal", "peak\nMB"]
STYLES = {"llm": "bold blue", "slm": "yellow", "handoff": "bold green"}


def numbers(report: Mapping[str, Any], title: str = "") -> Table:
    """Quality and speed, one row per model."""
    made = Table(title=title or None, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    made.add_column(no_wrap=True)
    for heading in NARROW:
        made.add_column(heading, justify="right", no_wrap=True)
    for line in table(report):
        made.add_row(escape(line.name), *line.cells(), style=STYLES.get(line.mode, "dim"))
    return made


def side_by_side(report: Mapping[str, Any], count: int) -> Table:
    """The first translations of each model under their prompt and reference."""
    made = Table(box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for example in (report.get("examples") or [])[:count]:
        for key, text in example.items():
            style = STYLES.get(key, "bold" if key == "prompt" else "")
            made.add_row(NAMES.get(key, key), escape(str(text)), style=style)
        made.add_section()
    return made
