"""The report: its numbers, its Markdown, its picture."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from baton.bench.report import PAGE, PICTURE, _spread, markdown, plot, summary, table, write_report

REPORT: dict[str, Any] = {
    "bleu": {"llm": 40.0, "slm": 20.0, "handoff": 39.0, "shuffled": 2.0},
    "chrf": {"llm": 60.0, "slm": 45.0, "handoff": 59.5, "shuffled": 20.0},
    "ms_per_token": {"llm": 6.0, "slm": 1.0, "handoff": 1.2, "shuffled": 1.2},
    "tokens_per_second": {"llm": 150.0, "slm": 1000.0, "handoff": 800.0, "shuffled": 810.0},
    "total_ms": {"llm": 80.0, "slm": 15.0, "handoff": 20.0, "shuffled": 20.0},
    "predicted_total": {"llm": 88.0},
    "measured_total": {"llm": 80.0},
    "gap_closed": 0.95,
    "peak_memory_mb": {"llm": 1234.5, "slm": 10.0, "handoff": 20.0},
    "machine": {"cpu": "a CPU", "gpu": None},
    "settings": {"speed_prompts": 64, "share": 0.123456},
    "examples": [{"prompt": "A | b", "reference": "R", "llm": "L", "slm": "S", "handoff": "two\nlines"}],
}


def test_lines_are_in_order_with_speed_ups_over_the_llm() -> None:
    lines = table(REPORT)
    assert [line.mode for line in lines] == ["llm", "slm", "handoff", "shuffled"]
    assert [line.speedup_decode for line in lines] == [1.0, 6.0, 5.0, 5.0]
    assert [line.speedup_total for line in lines] == [1.0, 80 / 15, 4.0, 4.0]
    assert lines[0].cells() == ["40.0", "60.0", "6.00", "150", "1.0x", "1.0x", "1,234"]
    assert lines[3].cells()[-1] == "-"  # its memory was not measured


def test_summary_says_quality_speed_and_gap() -> None:
    assert summary(REPORT) == (
        "The hand-off reaches 39.0 BLEU, 98% of the LLM's 40.0, and writes a token 5.0 times faster (a whole request "
        "4.0 times, reading included). The SLM alone has 20.0: 95% of the gap is closed."
    )


def test_summary_is_empty_without_an_llm_to_compare_with() -> None:
    assert summary({"bleu": {"handoff": 30.0}}) == ""
    assert summary({"bleu": {"llm": 0.0, "handoff": 0.0}}) == ""


def test_markdown_holds_every_number_and_escapes_cells() -> None:
    text = markdown(REPORT, title="Title", command="baton eval", picture="p.png")
    assert text.startswith("# Title\n\nThe hand-off reaches")
    assert "| hand-off | 39.0 | 59.5 | 1.20 | 800 | 5.0x | 4.0x | 20 |" in text
    assert "| LLM | 88.0 | 80.0 | +10% |" in text
    assert "**A \\| b**" in text
    assert "| hand-off | two lines |" in text
    assert "- speed prompts: 64\n- share: 0.1235" in text
    assert "- cpu: a CPU\n- speed" in text  # what is None is left out
    assert "](p.png)" in text and "```\nbaton eval\n```" in text


def test_page_and_picture_are_written_and_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        assert write_report(REPORT, folder, title="Größe") == folder / PAGE
    assert "# Größe" in (folder / PAGE).read_text(encoding="utf-8")
    png = (folder / PICTURE).read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(png[16:20]), int.from_bytes(png[20:24])) == (1152, 720)


@pytest.mark.parametrize("report", [{}, {"bleu": {"llm": 1.0}}, {"bleu": {}, "tokens_per_second": {"llm": 2.0}}])
def test_no_picture_without_both_quality_and_speed(report: dict[str, Any], tmp_path: Path) -> None:
    assert not plot(report, tmp_path / PICTURE)
    assert not (tmp_path / PICTURE).exists()
    assert "![" not in write_report(report, tmp_path, title="T").read_text(encoding="utf-8")


def test_one_model_alone_can_be_drawn(tmp_path: Path) -> None:
    assert plot({"bleu": {"other": 3.0}, "tokens_per_second": {"other": 9.0}}, tmp_path / PICTURE)


def test_labels_that_touch_are_pushed_apart_evenly() -> None:
    assert _spread([(0, 0), (0, 4), (500, 0)], [10, 10, 10]) == pytest.approx([-3, 3, 0])


def test_spread_labels_keep_their_order_and_distance() -> None:
    places, heights = [(0.0, y) for y in (0.0, 1.0, 2.0, 40.0)], [12.0, 26.0, 12.0, 26.0]
    at = [y + shift for (_, y), shift in zip(places, _spread(places, heights), strict=True)]
    assert all(b - a >= 18.9 for a, b in itertools.pairwise(at))
