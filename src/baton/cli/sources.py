"""What commands are given and give: models, methods, prompts, results as JSON. Checked before anything slow starts."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from baton.cli.console import err
from baton.data.formats import read_prompts
from baton.data.storage import storage_errors
from baton.drafters import WITHOUT_MODEL, every, make
from baton.errors import BatonError, DataError, nearest

# What commands that read text for drafting are given.
Corpus = Annotated[
    list[Path],
    typer.Argument(metavar="DATA...", help="Text files, or .jsonl with prompt, response, text or messages."),
]
CorpusTokenizer = Annotated[
    str, typer.Option("--tokenizer", "--model", "-m", metavar="M", help="The model to draft for, or its tokenizer.")
]


def check_source(*sources: str | None) -> None:
    """A misspelt folder should not become a slow search on the Hub: Hub ids (`name`, `owner/name`) pass, and None.

    Raises: BatonError for what can only be a folder and is not there. `owner/name` counts as a folder where `owner`
        is one here that has models in it.
    """
    for source in sources:
        if source is None or Path(source).is_dir():
            continue
        path = Path(source)
        if path.is_file():
            raise BatonError(f"{source} is a file: give the folder that save_pretrained wrote")
        owner = path.parent
        siblings = [p.parent.name for p in owner.glob("*/config.json")] if owner.is_dir() else []
        folder = path.is_absolute() or source.startswith(".") or "\\" in source or source.count("/") > 1
        if folder or (siblings and len(path.parts) == 2):
            hint = nearest(path.name, siblings) if siblings else "give the folder or Hub id of a model"
            raise BatonError(f"there is no folder {source}: {hint}")


def check_methods(
    given: list[str],
    *,
    small: str | None = None,
    datastore: str | None = None,
    table: str | None = None,
    controlled: bool = False,
) -> list[str]:
    """Drafting methods, those that need no model by default; a wrong name is better known before a model is loaded.

    Args:
        given: `all` stands for every method that can run with what the next three name.
        controlled: each method under a controller, too.
    """
    methods = []
    for name in given or WITHOUT_MODEL:
        methods += every(small=small, datastore=datastore, table=table) if name == "all" else [name]
    if controlled:
        methods += [f"controller:base=[{name}]" for name in methods if not name.startswith("controller")]
    for name in methods:
        make(name)
    return methods


def first_prompts(path: Path, limit: int) -> list[str]:
    """The first prompts of a file. Raises: DataError when it holds none."""
    prompts = read_prompts(path)[:limit]
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def write_json(target: str | None, value: Any) -> bool:
    """A result as JSON into a file, or to stdout for `-`; whether stdout is taken by it."""
    if target is None:
        return False
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return True
    with storage_errors(Path(target)):
        Path(target).write_text(text, encoding="utf-8")
    err.print(f"wrote {target}", soft_wrap=True)
    return False
