"""Names of models on the command line: a misspelt folder should not become a slow search on the Hub."""

from pathlib import Path

from baton.errors import BatonError, nearest


def check_source(*sources: str | None) -> None:
    """Raise BatonError for what can only be a folder and is not there. Hub ids (`name`, `owner/name`) pass, and None.

    `owner/name` counts as a folder where `owner` is one here that has models in it.
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
