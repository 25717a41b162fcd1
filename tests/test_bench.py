"""The benchmark counts what was written, and compares before it ranks."""

import json
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from baton.bench.decode import Result, Written, _add, bench_decode
from baton.cli import app
from baton.engine import generate

METHOD = "token-recycling:num_draft_tokens=10"


def test_counts_are_those_of_the_outputs() -> None:
    """Tokens, steps and acceptance of each method, over all prompts, next to transformers' own."""
    writer = tiny.language_model("llama")
    prompts = [*tiny.PROMPTS, "a a a a a a"]
    report = bench_decode(writer, [METHOD], prompts, max_new_tokens=12, batch_sizes=(1, 2))
    results = {(r["method"], r["batch_size"]): r for r in report["results"]}
    assert set(results) == {
        *((name, size) for name in ("plain", METHOD) for size in (1, 2)),
        ("transformers greedy", 1),
        ("transformers prompt lookup", 1),
    }
    plain = generate(writer, prompts, max_new_tokens=12)
    drafted = generate(writer, prompts, max_new_tokens=12, drafter=METHOD)
    written = sum(len(output.token_ids) for output in plain)
    for result in results.values():
        assert sum(result["tokens"]) == written and result["different"] == 0
        assert len(result["seconds"]) == len(result["tokens"]) == (6 if result["batch_size"] == 1 else 3)
        assert min(result["seconds"]) > 0
    steps = [step for output in drafted for step in output.steps]
    found = results[METHOD, 1]
    assert found["acceptance_length"] == sum(s.emitted for s in steps) / len(steps)
    assert found["acceptance_rate"] == sum(s.accepted for s in steps) / sum(s.drafted for s in steps)
    assert results["plain", 1]["acceptance_length"] == 1 and results["plain", 1]["speedup"] == 1
    assert report["settings"]["prompts"] == 6 and report["machine"]["cores"] >= 1


def test_speed_is_derived_from_seconds_and_tokens() -> None:
    plain, other = Result("plain", 1), Result("other", 1)
    for seconds in (1.0, 2.0, 4.0):
        _add(plain, Written([[1, 2, 3, 4]], steps=3, emitted=3), seconds, [[1, 2, 3, 4]])
        _add(other, Written([[1, 2, 3, 5]], 1, 3, 6, 2, 0.5), seconds / 4, [[1, 2, 3, 4]])
    plain.finish(plain)
    other.finish(plain)
    assert (plain.tokens_per_second, other.tokens_per_second, other.speedup) == (12 / 7, 48 / 7, 4.0)
    assert (other.acceptance_length, other.acceptance_rate, other.draft_share) == (3.0, 2 / 6, 0.5)
    assert (plain.different, other.different) == (0, 3)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_command(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    writer = tiny.language_model(family)
    writer.lm.save_pretrained(tmp_path / "model")
    writer.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.PROMPTS), encoding="utf-8")
    arguments = ["bench", "decode", str(tmp_path / "model"), "--data", str(tmp_path / "prompts.txt")]
    options = ["--max-new-tokens", "6", "--batch-size", "1", "--method", "token-recycling:num_draft_tokens=8"]
    done = CliRunner().invoke(app, [*arguments, *options, "--json", str(tmp_path / "bench.json")])
    assert done.exit_code == 0, done.output
    assert all(word in done.stdout for word in ("plain", "token-recycling", "transformers greedy", "tokens/s"))
    assert "differ" not in done.stdout
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == 4
