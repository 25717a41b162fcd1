"""What is written in a measurement: prompts with their source and licence, and references where there are any.

Built-in suites are files in `bench/data`, one JSON object per line, the first one about the suite. Files of others
are told by their fields: Spec-Bench (`turns`), GSM8K (`question`, `answer`), HumanEval (`canonical_solution`); any
other JSONL, TSV or text is read as `baton generate` reads it.
"""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baton.data.formats import json_row, read_pairs, read_prompts, render
from baton.errors import DataError, UnknownOption, nearest

FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One prompt of a suite."""

    prompt: str
    category: str = ""
    references: tuple[str, ...] = ()  # accepted answers; empty where quality is not judged


Reader = Callable[[Mapping[str, Any], Any], Task]  # (row, tokenizer)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Prompts that belong together."""

    name: str
    version: str
    source: str
    licence: str
    tasks: tuple[Task, ...]

    @property
    def about(self) -> dict[str, str]:
        """What a result keeps of it; the digest tells whether two runs used the same prompts."""
        digest = hashlib.sha256(repr(self.tasks).encode()).hexdigest()[:16]
        return {
            "version": self.version,
            "source": self.source,
            "licence": self.licence,
            "prompts": str(len(self.tasks)),
            "digest": digest,
        }

    def first(self, limit: int | None) -> "Suite":
        """The first prompts, taken in turn from each category, so that few prompts still are of every kind."""
        if limit is None or limit >= len(self.tasks):
            return self
        by_category: dict[str, list[int]] = {}
        for index, task in enumerate(self.tasks):
            by_category.setdefault(task.category, []).append(index)
        turns = sorted((place, index) for indices in by_category.values() for place, index in enumerate(indices))
        chosen = sorted(index for _, index in turns[:limit])
        return replace(self, tasks=tuple(self.tasks[index] for index in chosen))


def built_in() -> list[str]:
    """Names of the suites that come with Baton."""
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def read_suite(name: str | Path, *, tokenizer: Any = None) -> Suite:
    """A built-in suite by name, or a file.

    Args:
        tokenizer: renders conversations with its chat template.
    Raises: UnknownOption for what is neither; DataError for a file that cannot be used.
    """
    path = Path(name)
    if str(name) in built_in():
        path = FOLDER / f"{name}.jsonl"
        about, *rows = _rows(path)
        return Suite(**about, tasks=tuple(_task(row, f"{path}:{n}") for n, row in enumerate(rows, start=2)))
    if not path.is_file():
        raise UnknownOption(f"{name} is neither a file nor a built-in suite: {nearest(str(name), built_in())}")
    kind, tasks = _read(path, tokenizer)
    if not tasks:
        raise DataError(f"{path}:1: no prompts")
    return Suite(
        name=path.name.split(".")[0], version="", source=f"{kind}: {path.name}", licence="", tasks=tuple(tasks)
    )


def _read(path: Path, tokenizer: Any) -> tuple[str, list[Task]]:
    """What kind of file it is, and its tasks."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        rows = list(_rows(path))
        for kind, (fields, read) in READERS.items():
            if rows and all(field in rows[0] for field in fields):
                return kind, [_checked(read, row, f"{path}:{n}", tokenizer) for n, row in enumerate(rows, start=1)]
    try:
        pairs, _ = read_pairs(path, tokenizer=tokenizer)
        return "pairs", [Task(prompt=pair.prompt, references=pair.accepted) for pair in pairs]
    except DataError:  # no responses: then no quality
        return "prompts", [Task(prompt=prompt) for prompt in read_prompts(path, tokenizer=tokenizer)]


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield json_row(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _checked(read: Reader, row: Mapping[str, Any], where: str, tokenizer: Any) -> Task:
    try:
        task = read(row, tokenizer)
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(f"{where}: not like the rows before it ({type(error).__name__}: {error})") from error
    if not task.prompt.strip():
        raise DataError(f"{where}: the prompt is empty")
    return task


def _task(row: Mapping[str, Any], where: str) -> Task:
    return _checked(
        lambda row, _: Task(
            prompt=row["prompt"], category=row.get("category", ""), references=tuple(row.get("references", ()))
        ),
        row,
        where,
        None,
    )


def _user(text: str, tokenizer: Any) -> str:
    return render([{"role": "user", "content": text}], tokenizer)


def _spec_bench(row: Mapping[str, Any], tokenizer: Any) -> Task:
    """The first turn; later ones depend on what was answered to it."""
    return Task(prompt=_user(row["turns"][0], tokenizer), category=str(row["category"]))


def _gsm8k(row: Mapping[str, Any], tokenizer: Any) -> Task:
    return Task(prompt=_user(row["question"], tokenizer), references=(row["answer"],))


def _human_eval(row: Mapping[str, Any], tokenizer: Any) -> Task:
    return Task(prompt=row["prompt"], references=(row["canonical_solution"],))


# kind: the fields that tell it, and its reader. SPEED-Bench's rows have Spec-Bench's fields.
READERS: dict[str, tuple[Sequence[str], Reader]] = {
    "Spec-Bench": (("turns", "category"), _spec_bench),
    "GSM8K": (("question", "answer"), _gsm8k),
    "HumanEval": (("prompt", "canonical_solution"), _human_eval),
}


def write_suite(suite: Suite, path: Path) -> None:
    """As a built-in one."""
    about = {"name": suite.name, "version": suite.version, "source": suite.source, "licence": suite.licence}
    rows: list[dict[str, Any]] = [about]
    for task in suite.tasks:
        row: dict[str, Any] = {"prompt": task.prompt}
        if task.category:
            row["category"] = task.category
        if task.references:
            row["references"] = list(task.references)
        rows.append(row)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
