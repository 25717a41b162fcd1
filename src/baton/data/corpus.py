"""Text to count or to index: files of any size, read piece by piece.

A `.jsonl` row gives its `prompt`, `response`, `text` and the `content` of its `messages`, each as a text of its own.
Any other file is plain text.
"""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from baton.data.formats import JSONL, decode_line, json_row, text_field
from baton.errors import DataError, ModelMismatch

PIECE = 2**16  # characters of plain text that are tokenized together; the pieces end with a line
FIELDS = ("prompt", "response", "text")


def read_texts(paths: Iterable[Path]) -> Iterator[tuple[str, int]]:
    """Every text, and how many bytes of the files it took; after the last text of a row, an empty one with the row's.

    Raises: DataError for a file that cannot be read, or is not UTF-8, or for a row without text.
    """
    for path in paths:
        lines: list[str] = []
        size = 0
        try:
            with path.open("rb") as file:
                for number, raw in enumerate(file, start=1):
                    where = f"{path}:{number}"
                    line = decode_line(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, where)
                    if path.suffix.lower() in JSONL:
                        texts = _of_row(line, where) if line.strip() else []
                        yield from ((text, 0) for text in texts)
                        yield "", len(raw)
                        continue
                    lines.append(line)
                    size += len(raw)
                    if size >= PIECE:
                        yield "\n".join([*lines, ""]), size
                        lines, size = [], 0
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from error
        if lines:
            yield "\n".join([*lines, ""]), size


def read_ids(paths: Iterable[Path], tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    """What `read_texts` gives, in tokens, without special ones."""
    for text, size in read_texts(paths):
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else [], size


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model, from a folder or by Hub id. Raises: ModelMismatch."""
    from transformers import AutoTokenizer

    from baton.models.loading import at_revision

    try:
        name, revision = at_revision(source)
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelMismatch(f"no tokenizer at {source!r}: {str(error).strip().splitlines()[0]}") from error


def _of_row(line: str, where: str) -> list[str]:
    row = json_row(line, where)
    texts = [text_field(row, name, where) for name in FIELDS if name in row]
    if isinstance(messages := row.get("messages"), list):
        texts += [text_field(message, "content", where) for message in messages if isinstance(message, dict)]
    if not texts:
        raise DataError(f"{where}: no text: give rows {', '.join(map(repr, FIELDS))} or 'messages'")
    return texts
