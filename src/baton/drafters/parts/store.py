"""Tables and indexes on disk: a folder with a header and arrays, which are mapped into memory, not read.

The header names what the folder holds, the version of its layout, the tokenizer whose ids are in it, and type and size
of every array: a file of something else, of another model or cut off is refused before anything is drafted from it.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from baton.data.storage import atomic_write, storage_errors
from baton.errors import DataError, VocabMismatch

HEADER, MAGIC, SCHEMA = "header.json", "baton", 1


class Store(NamedTuple):
    """What a folder holds."""

    about: dict[str, Any]  # settings of what was built
    arrays: dict[str, np.ndarray]


def write_store(
    folder: str | Path, kind: str, tokenizer: Any, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> None:
    """Write arrays beside those that are there; the header goes last, so a folder is as it was or as it shall be.

    Args:
        kind: what it is, such as "datastore"; arrays: by names that are good file names.
        about: plain settings. They replace those that are there.
    Raises: StorageError when the disk is full; DataError, VocabMismatch when the folder holds something else.
    """
    folder = Path(folder)
    known: dict[str, Any] = {}
    if (folder / HEADER).exists():
        known = _header(folder, kind, tokenizer)["arrays"]
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        with atomic_write(folder / f"{name}.npy", binary=True) as file:
            np.save(file, array, allow_pickle=False)
        known[name] = {"dtype": str(array.dtype), "shape": list(array.shape)}
    header = {"magic": MAGIC, "kind": kind, "schema": SCHEMA, "tokenizer": fingerprint(tokenizer)}
    with atomic_write(folder / HEADER) as file:
        file.write(json.dumps(header | {"about": dict(about), "arrays": known}, indent=1) + "\n")


def open_store(folder: str | Path, kind: str, tokenizer: Any) -> Store:
    """Arrays mapped into memory, read-only.

    Args:
        tokenizer: of the model to draft for; None: not known, and not checked.
    Raises: DataError for a folder that is missing, of another kind or version, or damaged; VocabMismatch for one that
        was built with another tokenizer.
    """
    folder = Path(folder)
    header = _header(folder, kind, tokenizer)
    arrays = {}
    for name, expected in header["arrays"].items():
        path = folder / f"{name}.npy"
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: damaged or missing ({error}): build the {kind} again") from error
        if [str(found.dtype), list(found.shape)] != [expected["dtype"], expected["shape"]]:
            raise DataError(f"{path}: not the file that the header tells of: build the {kind} again")
        arrays[name] = found
    return Store(header["about"], arrays)


def fingerprint(tokenizer: Any) -> str:
    """Of a tokenizer's tokens and their ids."""
    tokens = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    return hashlib.sha256(tokens.encode()).hexdigest()[:16]


def _header(folder: Path, kind: str, tokenizer: Any) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        magic, schema, found = header["magic"], header["schema"], header["kind"]
        header["tokenizer"], header["about"], header["arrays"]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): give the folder of a {kind}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a header of Baton's: give the folder of a {kind}") from error
    if magic != MAGIC or found != kind:
        raise DataError(f"{folder}: it holds a {found}, and a {kind} is needed")
    if schema != SCHEMA:
        raise DataError(f"{folder}: written in version {schema}, this Baton reads {SCHEMA}: build the {kind} again")
    if hasattr(tokenizer, "get_vocab") and header["tokenizer"] != fingerprint(tokenizer):
        raise VocabMismatch(
            f"{folder}: built with another tokenizer than the model's, so its ids mean other tokens: build a {kind} "
            "with this model's"
        )
    return dict(header)
