"""What a measurement leaves behind: a JSONL file of raw counts, from which every metric is derived.

The first line is the `Run`: what was measured, on which machine, how. Then there is a `Record` per line: one request
written once by one contender. The last lines are `Quality`: how good the texts of a contender are. Each line names the
schema's version; a reader refuses one that it does not know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from baton.data.storage import completed_lines
from baton.errors import DataError
from baton.types import Output, Step, Timings

SCHEMA = 1
COLUMNS = [f.name for f in fields(Step) if f.name != "drafted"]  # steps are stored by column: half the size


@dataclass(frozen=True, kw_only=True)
class Run:
    """The conditions of a measurement; two files with equal settings may be compared."""

    model: str  # folder or Hub id of the target
    dtype: str  # of its weights
    runtime: str  # how its forward is run
    step_bytes: int  # of the weights that one decode step reads: decoder layers and head
    contenders: dict[str, str]  # name -> family: plain, speculative, hand-off, peer
    suites: dict[str, dict[str, str]]  # name -> version, source, licence, digest of the prompts
    sampling: dict[str, Any]
    max_new_tokens: int
    batch_sizes: list[int]
    repeats: int
    machine: dict[str, Any]  # cpu, cores, threads, load, bandwidth, ...
    versions: dict[str, str]
    git: str | None  # commit of the code that measured, with -dirty where it was changed
    absent: list[str]  # other engines that were asked for and could not take part, and why
    command: str  # what to run to get this again
    started: str  # UTC, ISO 8601

    SETTINGS: ClassVar = (
        "model",
        "dtype",
        "runtime",
        "contenders",
        "suites",
        "sampling",
        "max_new_tokens",
        "batch_sizes",
        "repeats",
    )

    @property
    def settings(self) -> dict[str, Any]:
        """What must be equal for a run to be continued."""
        return {name: getattr(self, name) for name in self.SETTINGS}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One request, written once. Seconds of a group are those of all its requests together."""

    contender: str  # how it was written: a method of ours, a hand-off, a peer
    suite: str
    category: str  # of the prompt in its suite; empty where there are none
    prompt: int  # its index in the suite
    batch_size: int
    group: int  # requests written together have one
    repeat: int
    group_s: float  # wall clock from the first token read to the last one written, of the whole group
    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str
    error: str = ""
    seed: int = 0
    probe_s: float = 0.0  # a fixed piece of work just before the group: slower than usual means a busy machine
    timings: Timings = field(default_factory=Timings)  # of the parts; zeros where a contender does not tell
    sources: list[str] = field(default_factory=list)  # per token who wrote it; empty where a contender does not tell
    steps: list[Step] = field(default_factory=list)  # empty where a contender does not tell

    @property
    def failed(self) -> bool:
        return self.finish_reason == "error"

    @classmethod
    def of(cls, output: Output, **where: Any) -> "Record":
        """From an output of our engine; `where` are the other fields."""
        return cls(
            token_ids=output.token_ids,
            text=output.text,
            finish_reason=output.finish_reason,
            error=output.error,
            timings=output.timings,
            sources=output.sources,
            steps=output.steps,
            **where,
        )


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How good what a contender wrote is."""

    contender: str
    scores: dict[str, float]  # metric -> value


Line = Run | Record | Quality
KINDS: dict[Any, type[Line]] = {"run": Run, "record": Record, "quality": Quality}


def to_json(item: Line) -> dict[str, Any]:
    """A line of the file."""
    if not isinstance(item, Record):
        return {"schema": SCHEMA, "kind": type(item).__name__.lower(), **asdict(item)}
    made = {"schema": SCHEMA, "kind": "record", **{f.name: getattr(item, f.name) for f in fields(item)}}
    made["timings"] = _rounded(asdict(item.timings))
    made["steps"] = {name: [_rounded(getattr(step, name)) for step in item.steps] for name in COLUMNS}
    names = sorted({name for step in item.steps for name in step.drafted})
    made["steps"]["drafted"] = {name: [step.drafted.get(name, 0) for step in item.steps] for name in names}
    made["sources"] = _packed(item.sources)
    return made


def from_json(row: Mapping[str, Any], where: str = "record") -> Line:
    """The inverse.

    Raises: DataError for another schema, or a line of another kind.
    """
    if row.get("schema") != SCHEMA:
        raise DataError(f"{where}: schema {row.get('schema')!r}, and this version of Baton reads {SCHEMA}")
    if row.get("kind") not in KINDS:
        raise DataError(f"{where}: kind {row.get('kind')!r} is none of {', '.join(KINDS)}")
    kind = KINDS[row["kind"]]
    values = {f.name: row[f.name] for f in fields(kind) if f.name in row}
    if kind is Record:
        columns = values["steps"]
        drafted = columns["drafted"]
        counts = [columns[name] for name in COLUMNS]
        values["steps"] = [
            Step(
                **dict(zip(COLUMNS, row, strict=True)),
                drafted={name: column[at] for name, column in drafted.items() if column[at]},
            )
            for at, row in enumerate(zip(*counts, strict=True))
        ]
        values["timings"] = Timings(**values["timings"])
        values["sources"] = [name for name, count in values["sources"] for _ in range(count)]
    try:
        return kind(**values)
    except TypeError as error:
        raise DataError(f"{where}: {error}") from None


def read_run(path: str | Path) -> tuple[Run, list[Record], dict[str, dict[str, float]]]:
    """A measurement's file: run, records, and quality by contender; a last line that was cut off is left out.

    Raises: DataError when it is not one.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    items = [from_json(row, f"{path}:{number}") for number, row in enumerate(completed_lines(path), start=1)]
    if not items or not isinstance(items[0], Run) or any(isinstance(item, Run) for item in items[1:]):
        raise DataError(f"{path}:1: no measurement: the first line must be a run, and no other may be")
    quality = {item.contender: item.scores for item in items if isinstance(item, Quality)}
    return items[0], [item for item in items if isinstance(item, Record)], quality


def _rounded(value: Any) -> Any:
    """Seconds to 0.1 microseconds: clocks give no more, and files stay small."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return round(value, 7) if isinstance(value, float) else value


def _packed(names: Sequence[str]) -> list[tuple[str, int]]:
    """Equal names in a row as (name, how many)."""
    packed: list[tuple[str, int]] = []
    for name in names:
        if packed and packed[-1][0] == name:
            packed[-1] = (name, packed[-1][1] + 1)
        else:
            packed.append((name, 1))
    return packed
