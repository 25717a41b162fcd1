"""The report of measurements: what it says first, that its numbers are the records', and that a browser shows it."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_bench import record, some_run, step
from typer.testing import CliRunner

from baton.bench.metrics import Measurement
from baton.bench.page import roofline, write_page
from baton.bench.record import Quality, to_json
from baton.cli import app

RUN = some_run(
    contenders={"plain": "plain", "own": "speculative", "models/hand<off>": "hand-off"},
    machine={"cpu": "A processor", "threads": 2, "bandwidth_gb_s": 40.0},
    suites={"code": {"prompts": "8", "source": "a library", "licence": "PSF-2.0"}},
    batch_sizes=[1, 8],
    step_bytes=2_000_000_000,
    absent=["llama.cpp is absent: not installed"],
    command="baton bench decode m",
)
QUALITY = {"plain": {"bleu": 20.0}, "models/hand<off>": {"bleu": 18.5}}


def measurement() -> Measurement:
    records = []
    for name, factor in (("plain", 1.0), ("own", 0.5), ("models/hand<off>", 0.25)):
        for size in (1, 8):
            for prompt in range(8):
                seconds = (1 + prompt / 10) * factor * (1 if size == 1 else 3)
                steps = (
                    [step(0, 0, 0, verify_s=0.1)] * 3 if name == "plain" else [step(4, 3, 2, draft_s=0.1, verify_s=0.2)]
                )
                where: dict[str, Any] = {"contender": name, "batch_size": size, "prompt": prompt, "suite": "code"}
                text = f"{name} says <b> {prompt}"
                group = prompt // size
                records.append(record(**where, group=group, group_s=seconds, steps=steps, text=text))
    return Measurement(run=RUN, records=records, quality=QUALITY)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page([measurement(), measurement()], tmp_path_factory.mktemp("page"), title="Two <runs>")


def test_conditions_come_before_numbers(page: Path) -> None:
    for text in (page.read_text(), page.with_suffix(".md").read_text()):
        first = text[: text.index("TPOT")]
        for fact in ("A processor, 2 threads", "float32", "greedy (temperature 0)", "1, 8", "40.0 GB/s", "PSF-2.0"):
            assert fact in first, fact
        assert "Tokens are counted as ids" in first and "llama.cpp is absent" in first


def test_numbers_are_those_of_the_records(page: Path) -> None:
    summaries = {(s.contender, s.batch_size): s for s in measurement().summaries}
    own = summaries["own", 1]
    assert own.speedup == pytest.approx(2.0)
    row = next(line for line in page.with_suffix(".md").read_text().splitlines() if line.startswith("| own | 1 "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == f"{own.tokens_per_second:,.0f}" and cells[4:8] == ["2.00x", "2.00-2.00", "3.00", "50%"]
    assert "writes its own texts" in page.read_text()
    assert roofline(measurement(), summaries["plain", 1]) == pytest.approx(20.0)  # 2 GB in 0.1 s
    # At batch 8 rows share their passes: three passes of 0.1 s, not 24.
    assert roofline(measurement(), summaries["plain", 8]) == pytest.approx(20.0)
    assert roofline(measurement(), summaries["models/hand<off>", 1]) is None  # another model's weights


def test_the_page_stands_alone_and_markup_is_text(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!#)', text.replace('xlink:href="#', "")), "it points at another file"
    assert "<script" not in text and "hand<off>" not in text and "hand&lt;off&gt;" in text and "says <b>" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 0
    pictures = re.findall(r"\]\((.+\.svg)\)", page.with_suffix(".md").read_text())
    assert len(pictures) == len(set(pictures)) == text.count("<svg") == 12
    assert all((page.parent / name).read_text().startswith("<svg") for name in pictures)


def test_equal_records_give_equal_files(page: Path, tmp_path: Path) -> None:
    again = write_page([measurement(), measurement()], tmp_path, title="Two <runs>")
    assert again.read_bytes() == page.read_bytes()


def test_little_to_show_is_shown(tmp_path: Path) -> None:
    """One contender, nothing drafted, no quality, every request failed: no picture, and no error."""
    rows = [replace(r, finish_reason="error", steps=[]) for r in measurement().records if r.contender == "plain"]
    page = write_page([Measurement(run=RUN, records=rows)], tmp_path)
    assert "8 of 8 failed" in page.read_text()


def test_the_command(tmp_path: Path) -> None:
    lines = [RUN, *measurement().records, *(Quality(contender=c, scores=s) for c, s in QUALITY.items())]
    file = tmp_path / "run.jsonl"
    file.write_text("".join(json.dumps(to_json(line)) + "\n" for line in lines), encoding="utf-8")
    done = CliRunner().invoke(
        app, ["report", str(file), str(file), "--out", str(tmp_path / "page"), "--title", "Two <runs>"]
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page" / "report.html").exists() and "18.5" in (tmp_path / "page" / "report.md").read_text()
    missing = CliRunner().invoke(app, ["report", str(tmp_path / "no.jsonl")])
    assert missing.exit_code != 0


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<script>
const boxes = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
const texts = [...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect());
document.title = JSON.stringify({
  pictures: boxes.filter(b => b.width > 200 && b.height > 40).length,
  words: texts.filter(b => b.width > 0).length,
  first: document.querySelector("table").getBoundingClientRect().top,
  overflow: document.documentElement.scrollWidth - innerWidth,
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: chromium)")
def test_a_browser_shows_it(page: Path, tmp_path: Path) -> None:
    """Every picture has a size and words in it, the conditions are on the first screen, nothing runs out of it."""
    looked = tmp_path / "look.html"
    looked.write_text(page.read_text().replace("</body>", LOOK), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1200,900"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", looked.as_uri()]
    done = subprocess.run([str(BROWSER), *flags], capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    seen = json.loads(title[1])
    assert seen["pictures"] == 12 and seen["words"] > 50 and 0 < seen["first"] < 300 and seen["overflow"] <= 0
