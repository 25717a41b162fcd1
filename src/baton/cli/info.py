"""`baton info`: versions and machine, for bug reports and beside numbers."""

import importlib.metadata
import json
import sys
from typing import Annotated, Any

import typer
from rich.table import Table

import baton
from baton.cli.command import command
from baton.cli.console import out

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "safetensors", "numpy", "typer")


def register(app: typer.Typer) -> None:
    command(app, "info", examples=["baton info", "baton info --json"])(info)


def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Show versions and machine.

    Add this to a bug report.
    """
    facts = gather()
    if as_json:
        sys.stdout.write(json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
        return
    made = Table(show_header=False, box=None)
    for part in facts.values():
        for name, fact in part.items():
            made.add_row(f"[dim]{name}", str(fact))
    out.print(made)


def gather() -> dict[str, dict[str, Any]]:
    """`versions` and `machine`, as names and values."""
    from baton.handoff.evaluate import machine

    versions = {"baton": baton.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {"versions": versions, "machine": machine()}
