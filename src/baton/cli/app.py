"""The command line: `baton COMMAND`. Each command is one file beside this one."""

import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from baton import __version__
from baton.cli import (
    audit,
    bench,
    build_datastore,
    build_table,
    calibrate,
    demo,
    evaluate,
    generate,
    info,
    label,
    report,
    tune,
    warmup,
)

CONTEXT = {"help_option_names": ["-h", "--help"]}


TRAIN_HELP = "Train a hand-off from a large model to a small one."
ORDER = [
    "generate",
    "train",
    "eval",
    "label",
    "bench",
    "report",
    "profile",
    "warmup",
    "build-table",
    "calibrate-tree",
    "tune",
    "doctor",
    "audit",
    "build-datastore",
    "demo",
    "info",
]


class LazyGroup(TyperGroup):
    """Registers the commands of `baton train` when they are used: their options stand beside the models."""

    def list_commands(self, ctx):  # type: ignore[no-untyped-def]
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def resolve_command(self, ctx, args):  # type: ignore[no-untyped-def]
        if args and args[0] == "train":
            from baton.cli import train

            self.add_command(typer.main.get_command(train.app), "train")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="baton",
    cls=LazyGroup,
    context_settings=CONTEXT,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="[bold]Examples[/]\n"
    "  [cyan]$[/] baton demo\n"
    '  [cyan]$[/] baton generate models/en-de-handoff --prompt "Where is the next station?"\n'
    "  [cyan]$[/] baton train handoff --llm L --slm S --data pairs.jsonl --out my-handoff\n"
    "  [cyan]$[/] baton eval handoff my-handoff --data test.jsonl --json out.json",
)


def _show_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"baton {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Think big, generate quick: a large model reads the prompt once, a small one writes the answer."""


generate.register(app)
app.command("train", help=TRAIN_HELP)(lambda: None)  # see LazyGroup
evaluate.register(app)
label.register(app)
bench.register(app)
report.register(app)
tune.register(app)
warmup.register(app)
build_table.register(app)
calibrate.register(app)
audit.register(app)
build_datastore.register(app)
demo.register(app)
info.register(app)


def main() -> None:
    """Entry point of the installed command."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Pipes on Windows would use the machine's code page.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8")
    app()
