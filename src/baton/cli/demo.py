"""`baton demo`: the reference models at work, with numbers."""

import time
from pathlib import Path
from typing import Annotated

import typer

from baton.cli.command import command, fail
from baton.cli.console import err, loading, out
from baton.cli.evaluate import measuring, show
from baton.cli.options import Machine

REFERENCE = Path("models/en-de-handoff")
PAGES = Path("out/demo")


def register(app: typer.Typer) -> None:
    command(
        app,
        "demo",
        examples=[
            "baton demo",
            "baton demo --sentences 1000 --out out/long",
            "baton demo --model models/en-de-handoff-gpt",
        ],
    )(demo)


def demo(
    machine: Machine,
    out_folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where report.md goes.")] = PAGES,
    model: Annotated[
        Path, typer.Option(metavar="DIR", help="A hand-off with a held-out split, its LLM beside it.")
    ] = REFERENCE,
    sentences: Annotated[int, typer.Option(min=2, help="Held-out sentences to translate.")] = 200,
    show_sentences: Annotated[int, typer.Option(min=0, help="Translations to show side by side.")] = 3,
) -> None:
    """Translate held-out sentences with the reference LLM, SLM and hand-off, and compare quality and speed.

    Takes a minute or two on two CPU cores. The models come with the repository, in models/.
    """
    folder = find_model(model)
    start = time.monotonic()
    machine.prepare()
    with loading(str(folder)):
        from baton.bench.report import write_report
        from baton.handoff.evaluate import evaluate
    with measuring() as progress:
        report = evaluate(
            folder,
            limit=sentences,
            modes=("llm", "slm", "handoff"),
            dtype=machine.dtype,
            runtime=machine.runtime,
            device=machine.device,
            progress=progress,
        ).to_dict()
    from baton.cli.tables import side_by_side

    if show_sentences:
        out.print(side_by_side(report, show_sentences))
    show(report, f"English to German, {report['settings']['prompts']} held-out sentences")
    page = write_report(
        report,
        out_folder,
        title="A large model reads, a small one writes: English to German",
        command=f"baton demo --model {model.as_posix()} --sentences {sentences}",
    )
    err.print(f"wrote {page} ({time.monotonic() - start:.0f} s in all)")


def find_model(model: Path) -> Path:
    """The hand-off's folder: as given, or in the source tree that baton was installed from."""
    import baton

    root = Path(str(baton.__file__)).resolve().parents[2]
    for place in (model, root / model):
        if (place / "config.json").is_file():
            return place
    if model == REFERENCE:
        fail(
            f"{model.as_posix()} is not here: run this in a clone of the repository, which has the reference models in "
            "models/, or train them with `python recipes/en_de.py`, or name another hand-off with --model DIR"
        )
    fail(f"{model} holds no hand-off (it has no config.json): give --model the folder that `baton train handoff` wrote")
