"""The documents name only files that exist, so that a reader who follows one arrives."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.models.adapter import FAMILIES
from baton.runtime.families import TARGETS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "baton"
FOLDERS = ("benchmarks", "docs", "examples", "models", "recipes", "src", "tests")
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
MADE_BY_COMMANDS = {".venv", "build", "dist", "out", "runs"}  # named in the documents, absent from a clone

FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(<?([^)\s>]+)")


def paths_in(text: str) -> Iterator[str]:
    """Words of inline code that look like a path: below a top-level name, a folder with its slash, or a Python file."""
    for code in CODE.findall(FENCE.sub("", text)):
        for word in code.split():
            path = word.split(":")[0]  # `file.py:12`, `file.py::name`
            top = path.split("/")[0]
            if "/" not in path or not re.fullmatch(r"[\w./*-]+", path) or not top:
                continue
            if top in MADE_BY_COMMANDS or top.isupper():  # DIR/config.json: the user's own
                continue
            if (ROOT / top).exists() or path.endswith(("/", ".py")):
                yield path


def links_in(text: str) -> Iterator[str]:
    """Targets of Markdown links to files, without their `#section`."""
    for target in LINK.findall(CODE.sub("", FENCE.sub("", text))):
        if not re.match(r"[a-z][a-z0-9+.-]*:|#", target):
            yield target.split("#")[0]


@pytest.mark.parametrize("name", ["README.md", "docs/architecture.md"])
def test_paths_exist(name: str) -> None:
    """A path is written from the root of the repository or from the package, and may hold `*`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    missing = [path for path in paths_in(text) if not any(any(base.glob(path)) for base in (ROOT, PACKAGE))]
    assert not missing, f"{name} names paths that do not exist: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in links_in(text) if not (page.parent / link).exists()]
    assert not missing, f"{page.relative_to(ROOT)} links to files that do not exist: {missing}"


def test_what_counts_as_a_path() -> None:
    """Hub ids, units, outputs and the user's own folders are left alone; commands are looked into."""
    text = "`python tests/a.py` `engine/` `b/c.py:12` `google/t5-small` `tokens/s` `out/a.py` `DIR/a.py` `x/y.jsonl`"
    assert list(paths_in(f"{text}\n```\n`tests/fenced.py`\n```\n")) == ["tests/a.py", "engine/", "b/c.py"]


def test_what_counts_as_a_link() -> None:
    text = "[a](docs/a.md#part) ![b](b.png) [c](https://example.org/x) [d](#here) `[e](e.md)`"
    assert list(links_in(text)) == ["docs/a.md", "b.png"]


def test_tables_are_those_of_the_committed_results() -> None:
    """`python benchmarks/tables.py` makes them."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page in tables.DOCUMENTS:
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{page.name}: run python benchmarks/tables.py"


def test_every_family_of_the_engine_is_documented() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = [row for row in text.splitlines() if row.startswith("| `") and "eager |" in row]
    named = {family: row for row in rows for family in re.findall(r"`(\w+)`", row)}
    assert named.keys() == FAMILIES.keys()
    assert {family for family, row in named.items() if "native" in row} == TARGETS.keys()
