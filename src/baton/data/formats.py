"""Readers of prompts and pairs: JSONL, chat messages, TSV, plain text, the Tatoeba zip.

Every fault of a file is a `DataError` that starts with `file:line` (counted from 1).
"""

import codecs
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from baton.data.tatoeba import read_tatoeba
from baton.errors import DataError, nearest
from baton.types import Pair

FIELDS = ("prompt", "response", "references", "messages")  # what we read of a JSONL row; other fields may be there
ROLES = ("system", "developer", "user", "assistant", "tool")
JSONL = (".jsonl", ".ndjson", ".json")

Located = tuple[str, str]  # `file:line`, and the text of that line


def read_pairs(path: str | Path, *, tokenizer: Any = None) -> tuple[list[Pair], int]:
    """All pairs of a file in its order, duplicates included, and how many were skipped for an empty response.

    The format is told by the ending, or by the first line where the ending says nothing:

    - `.jsonl`, one object per line: `prompt` and `response`, optionally `references` (more accepted answers; the
      response is added to them); or `messages`, objects with `role` and `content`, whose last assistant message is
      the response and all before it the prompt. Other fields are left alone; blank lines too.
    - `.tsv`: prompt, tab, response. No quoting; a first row of just these two names is a header.
    - `.zip`: the Tatoeba zip (see `data.tatoeba`).

    Args:
        tokenizer: renders messages with its chat template; without one, or without a template, see `render`.
    Raises:
        DataError: the file cannot be read, is empty, is not UTF-8, or a row is malformed or has an empty prompt;
            or no pair is left.
    """
    path = Path(path)
    pairs, skipped = [], 0
    for where, pair in _pairs(path, tokenizer):
        if not pair.prompt.strip():
            raise DataError(f"{where}: the prompt is empty")
        if pair.response.strip():
            pairs.append(pair)
        else:
            skipped += 1
    if not pairs:
        raise DataError(
            f"{path}:1: no pair to use: " + (f"all {skipped} responses are empty" if skipped else "no rows")
        )
    return pairs, skipped


def read_prompts(path: str | Path, *, tokenizer: Any = None) -> list[str]:
    """All prompts of a file in its order, duplicates included.

    `.jsonl` rows have a `prompt`, or `messages` of which those before the answer, if there is one, are the prompt. A
    `.tsv` or a Tatoeba zip gives its first column. Anything else is plain text, one prompt per line.

    Args:
        tokenizer: renders messages, as in `read_pairs`.
    Raises:
        DataError: as for `read_pairs`. A blank line of plain text is an empty prompt, unless only such lines follow.
    """
    path = Path(path)
    if path.suffix.lower() in (".tsv", ".zip"):
        return [pair.prompt for pair in read_pairs(path)[0]]
    is_json, lines = _open(path, json_if_braced=path.suffix.lower() != ".txt")
    prompts: list[str] = []
    blank = ""  # where the first of the blank lines just before this one is
    for where, line in lines:
        if not line.strip():
            blank = blank or where
            continue
        if blank and not is_json:
            raise DataError(f"{blank}: the prompt is empty")
        blank = ""
        prompts.append(_prompt_of(json_row(line, where), where, tokenizer) if is_json else line)
        if not prompts[-1].strip():
            raise DataError(f"{where}: the prompt is empty")
    return prompts


def render(messages: Sequence[Mapping[str, str]], tokenizer: Any = None) -> str:
    """Messages as one prompt that asks for the assistant's next.

    With the tokenizer's chat template if it has one. Plainly otherwise: a single message is its content, several are
    one `Role: content` line each and a last `Assistant:`.
    """
    if getattr(tokenizer, "chat_template", None):
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        # Templates spell out the start token; one that the tokenizer adds as well would be there twice.
        adds_start = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token and adds_start else text
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join([*(f"{m['role'].capitalize()}: {m['content']}" for m in messages), "Assistant:"])


def decode_line(raw: bytes, where: str) -> str:
    """A line of a file without its line break.

    Raises: DataError when it is not UTF-8.
    """
    try:
        return raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start}): save the file as UTF-8"
        ) from error


def json_row(line: str, where: str) -> dict[str, Any]:
    """The object in a line of JSONL.

    Raises: DataError when it is malformed, or no object, or holds text that cannot be encoded.
    """
    try:
        row = json.loads(line)
        line.encode("utf-8") if "\\u" not in line else json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half of a surrogate pair, which is not text") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}, column {error.colno}): one object per line") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise DataError(f"{where}: not usable JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f'{where}: expected an object such as {{"prompt": ...}}, found {_kind(row)}')
    return row


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be there and be text.

    Raises: DataError, which names a misspelt field.
    """
    if name not in row:
        raise DataError(f"{where}: no {name!r}{_hint(row, [name])}")
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} must be text, is {_kind(value)}")
    return value


def _pairs(path: Path, tokenizer: Any) -> Iterator[tuple[str, Pair]]:
    """`file:line` and the pair there; fields may be empty."""
    if path.suffix.lower() == ".zip":
        for number, pair in enumerate(read_tatoeba(path), start=1):
            yield f"{path}:{number}", pair
        return
    is_json, lines = _open(path, json_if_braced=path.suffix.lower() != ".tsv")
    first = True
    for where, line in lines:
        if not line.strip(" \r\n" if not is_json else None):  # a lone tab is a TSV row with nothing in it
            continue
        if is_json:
            yield where, _pair_of(json_row(line, where), where, tokenizer)
        elif not (first and line.lower() == "prompt\tresponse"):
            columns = line.split("\t")
            if len(columns) != 2:
                raise DataError(f"{where}: expected prompt, tab, response: found {len(columns)} columns, not 2")
            yield where, Pair(prompt=columns[0], response=columns[1])
        first = False


def _open(path: Path, *, json_if_braced: bool) -> tuple[bool, Iterator[Located]]:
    """Whether a file is JSONL, and its lines.

    Args:
        json_if_braced: without a JSONL ending, look whether the first line starts an object.
    """
    lines = _lines(path)
    skipped = []
    for where, line in lines:
        skipped.append((where, line))
        if line.strip():
            break
    else:
        raise DataError(f"{path}:1: the file is empty")
    is_json = path.suffix.lower() in JSONL or (json_if_braced and line.lstrip().startswith("{"))
    return is_json, chain(skipped, lines)


def _lines(path: Path) -> Iterator[Located]:
    # Read as bytes: text mode would decode far ahead and could not tell which line holds a bad byte.
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path}:{number}"
                yield where, decode_line(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, where)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _pair_of(row: Mapping[str, Any], where: str, tokenizer: Any) -> Pair:
    if "messages" in row and "response" not in row:
        messages = _messages(row["messages"], where)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not answers:
            raise DataError(f"{where}: no assistant message, so no response")
        prompt = _rendered(messages[: answers[-1]], where, tokenizer)
        response = messages[answers[-1]]["content"]
    else:
        if "prompt" not in row and "response" not in row:
            hint = _hint(row, ["prompt", "response", "messages"])
            raise DataError(f"{where}: neither 'prompt' and 'response' nor 'messages'{hint}")
        prompt, response = (text_field(row, name, where) for name in ("prompt", "response"))
    return Pair(prompt=prompt, response=response, references=_references(row, response, where))


def _prompt_of(row: Mapping[str, Any], where: str, tokenizer: Any) -> str:
    if "messages" not in row or "prompt" in row:
        return text_field(row, "prompt", where)
    messages = _messages(row["messages"], where)
    answered = messages and messages[-1]["role"] == "assistant"
    return _rendered(messages[:-1] if answered else messages, where, tokenizer)


def _references(row: Mapping[str, Any], response: str, where: str) -> tuple[str, ...]:
    if "references" not in row:
        # An optional field that is misspelt would otherwise be ignored without a word.
        if close := _close(row, ["references"], cutoff=0.9):
            raise DataError(f"{where}: unknown field {close[0]!r}: {nearest(close[0], FIELDS)}")
        return ()
    references = row["references"]
    if not isinstance(references, list):
        raise DataError(f"{where}: 'references' must be a list of texts, is {_kind(references)}")
    for index, reference in enumerate(references):
        if not isinstance(reference, str) or not reference.strip():
            found = "empty" if isinstance(reference, str) else _kind(reference)
            raise DataError(f"{where}: 'references[{index}]' must be text, is {found}")
    return tuple(dict.fromkeys([response, *references])) if references else ()


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise DataError(f"{where}: 'messages' must be a list, is {_kind(value)}")
    for index, message in enumerate(value):
        here = f"{where}: messages[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{here} must be an object with 'role' and 'content', is {_kind(message)}")
        role, _ = (text_field(message, name, here) for name in ("role", "content"))
        if role not in ROLES:
            raise DataError(f"{here}: role {role!r} is not known: {nearest(role, ROLES)}")
    return value


def _rendered(messages: Sequence[Mapping[str, str]], where: str, tokenizer: Any) -> str:
    if not any(m["content"].strip() for m in messages):
        raise DataError(f"{where}: the prompt is empty: no text before the response")
    from jinja2 import TemplateError  # only chat templates need it

    try:
        return render(messages, tokenizer)
    except TemplateError as error:  # such as "roles must alternate"
        raise DataError(f"{where}: the tokenizer's chat template refuses these messages ({error})") from error


def _close(row: Mapping[str, Any], names: Iterable[str], cutoff: float = 0.6) -> tuple[str, str] | None:
    """A field of the row that looks like one of the names, and that name."""
    unknown = [key for key in row if key not in FIELDS]
    for name in names:
        if close := difflib.get_close_matches(name, unknown, n=1, cutoff=cutoff):
            return close[0], name
    return None


def _hint(row: Mapping[str, Any], names: Iterable[str]) -> str:
    if close := _close(row, names):
        return f", but {close[0]!r}: did you mean {close[1]!r}?"
    return f"; found {', '.join(map(repr, row)) or 'no fields'}"


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return kinds[type(value)]
