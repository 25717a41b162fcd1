"""The race finds the fastest, the doctor what is in the way, and `generate` reads what was found."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner, Result

import baton
from baton.audit.doctor import examine
from baton.bench import runner
from baton.bench import tune as tuning
from baton.bench.suites import Suite, Task
from baton.bench.tune import best_possible, tune
from baton.cli import app
from baton.runtime import prepare
from baton.runtime.profile import CostProfile, load_profile, measure_profile
from baton.types import Output

SUITE = Suite(name="s", version="1", source="", licence="", tasks=tuple(Task(prompt=p) for p in tiny.PROMPTS))


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.machine.PATIENCE", 1)
    for name in ("COLUMNS", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, "200")
    monkeypatch.setenv("NO_COLOR", "1")


def clocked(speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Contenders that take a known time per token, on a clock of their own; returns who wrote, in order."""
    log: list[str] = []
    now = 0.0

    class Clocked:
        family, batches = "speculative", True

        def __init__(self, writer: Any, method: str, **options: Any) -> None:
            self.name = method

        def write(self, prompts: Sequence[str], first_index: int) -> list[Output]:
            nonlocal now
            log.append(self.name)
            if self.name == "broken":
                raise RuntimeError("it broke")
            # Some prompts are slower than others, for everyone, and no two runs are the same.
            now += (1 + 0.1 * (len(log) % 7)) / speeds[self.name]
            return [Output(prompt=p, text="", token_ids=[1] * 10, finish_reason="length") for p in prompts]

    monkeypatch.setattr(tuning, "Ours", Clocked)
    monkeypatch.setattr(tuning, "best_possible", lambda spec, price: 9.0 if spec != "dear" else 0.5)
    monkeypatch.setattr(tuning, "measure_profile", lambda *_, **__: CostProfile((1,), (1,), (1,), (((0.001,),),), {}))
    for module in (runner, tuning):
        monkeypatch.setattr(module.time, "perf_counter", lambda: now)
    return log


@pytest.mark.parametrize(
    ("speeds", "winner"),
    [
        ({"plain": 1.0, "a": 1.5, "b": 2.5, "c": 0.6}, "b"),
        ({"plain": 1.0, "a": 0.9, "b": 0.7}, "plain"),
        ({"plain": 1.0, "a": 3.0, "b": 1.2, "c": 1.1}, "a"),
    ],
)
def test_the_race_is_won_by_the_fastest_and_losers_leave(
    speeds: dict[str, float], winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = clocked(speeds, monkeypatch)
    found = tune(tiny.language_model("llama"), SUITE, candidates=[s for s in speeds if s != "plain"], seconds=200)
    assert found.winner == winner == max(speeds, key=lambda name: speeds[name])
    counts = {name: log.count(name) for name in speeds}
    slowest = min((s for s in speeds if s != "plain"), key=lambda name: speeds[name])
    assert tuning.AT_LEAST < counts[slowest] == min(counts.values()) <= tuning.AT_LEAST + 4
    assert next(s for s in found.standings if s.method == slowest).left == "slower than the leader"
    for standing in found.standings:
        assert standing.speedup == pytest.approx(speeds[standing.method], rel=0.35)


def test_what_cannot_pay_does_not_start_and_what_breaks_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    log = clocked({"plain": 1.0, "broken": 1.0, "a": 2.0}, monkeypatch)
    found = tune(tiny.language_model("llama"), SUITE, candidates=["dear", "a", "broken"], seconds=100)
    assert "dear" not in log and found.winner == "a"
    left = {standing.method: standing.left for standing in found.standings}
    assert "costs too much" in left["dear"] and left["broken"] == "RuntimeError: it broke"
    assert tune(tiny.language_model("llama"), SUITE, candidates=["broken"], seconds=100).winner == "plain"


def test_the_most_that_a_method_can_give() -> None:
    price = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.5, 16: 3.0, 32: 9.0}
    assert best_possible("plain", price) == 1.0
    assert best_possible("prompt-lookup:num_draft_tokens=7", price) == pytest.approx(8 / 1.5)
    assert best_possible("token-recycling:num_draft_tokens=31,max_depth=6", price) == pytest.approx(7 / 9)
    assert best_possible("draft-model:model=x,num_draft_tokens=3", price) == pytest.approx(4 / 1.2)
    assert best_possible("draft-model:model=x,num_draft_tokens=15,branches=3,max_depth=4", price) == pytest.approx(
        5 / 3
    )


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_profile_is_measured_without_a_trace_and_found_again(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    writer = tiny.language_model(family)
    before = baton.generate(writer, tiny.PROMPTS[0], max_new_tokens=5)[0].token_ids
    assert load_profile(writer) is None
    profile = measure_profile(writer, contexts=[4, 30, 500], batches=[1, 3], rows=[1, 8, 64], repeats=2)
    assert profile.contexts == ((4, 30) if family == "llama" else (4, 30, 500))  # the tiny Llama has 128 positions
    assert all(seconds > 0 for batch in profile.seconds for context in batch for seconds in context)
    assert baton.generate(writer, tiny.PROMPTS[0], max_new_tokens=5)[0].token_ids == before
    profile.save()
    assert load_profile(writer) == profile
    assert load_profile(tiny.language_model(family, seed=1)) == profile  # of the same shape
    next(tmp_path.rglob("*.json")).write_text("{")
    assert load_profile(writer) is None


def test_costs_between_and_beyond_what_was_measured() -> None:
    seconds = (((1.0, 2.0, 6.0), (2.0, 3.0, 7.0)), ((3.0, 4.0, 8.0), (4.0, 5.0, 9.0)))
    profile = CostProfile((1, 3), (10, 20), (1, 2, 4), seconds, {})
    assert profile.cost(1) == 1.0 and profile.cost(3) == 4.0 and profile.cost(8) == 14.0
    assert profile.cost(2, context=15) == 2.5 and profile.cost(2, context=30) == 4.0
    assert profile.cost(1, batch=2) == 2.0 and profile.cost(4, context=20, batch=3) == 9.0
    assert profile.price(20, 3) == {1: 4.0, 2: 5.0, 4: 9.0}


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    for name in ("llama", "t5", "small"):
        writer = tiny.language_model("llama" if name == "small" else name)
        writer.lm.save_pretrained(made / name)
        writer.tokenizer.save_pretrained(made / name)
    (made / "prompts.txt").write_text("\n".join(tiny.PROMPTS), encoding="utf-8")
    return made


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_tune_writes_what_generate_reads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--prompts", folder / "prompts.txt", "--minutes", "0.02", "--max-new-tokens", "6", "--json"]
    done = run("tune", folder / "llama", "--assistant", folder / "small", *options)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {s["method"] for s in found["standings"]} >= {"plain", *tuning.CANDIDATES} and len(found["standings"]) == 9
    text = (tmp_path / "baton.toml").read_text()
    assert f'drafter = "{found["winner"]}"' in text and str(folder / "llama") in text
    method = "token-recycling:num_draft_tokens=7"
    (tmp_path / "baton.toml").write_text(text.replace(f'"{found["winner"]}"', f'"{method}"'))
    ask = ["generate", folder / "llama", "-p", "The cat.", "--max-new-tokens", "6"]
    tuned, plain = run(*ask), run(*ask, "--drafter", "plain")
    assert f"drafting with {method}" in tuned.stderr and "drafting with" not in plain.stderr
    assert tuned.stdout == plain.stdout
    assert "drafting with" not in run("generate", folder / "small", "-p", "a", "--max-new-tokens", "2").stderr
    (tmp_path / "baton.toml").write_text("no toml")
    broken = run(*ask)
    assert broken.exit_code == 2 and "baton.toml" in broken.stderr and "baton tune" in broken.stderr


def levels(*arguments: Any) -> dict[str, list[str]]:
    made: dict[str, list[str]] = {}
    for finding in examine(*arguments):
        assert finding.remedy or finding.level in ("ok", "note"), finding
        made.setdefault(finding.level, []).append(finding.what)
    return made


def test_the_doctor_sees_what_fits_and_what_does_not(folder: Path, tmp_path: Path) -> None:
    healthy = levels(folder / "llama", "prompt-lookup")
    assert set(healthy) <= {"ok", "note"} and any("prompt-lookup fits" in what for what in healthy["ok"])
    assert "cannot be loaded" in levels(tmp_path / "none")["error"][0]
    assert "did you mean" in levels(folder / "llama", "prompt-lokup")["error"][0]
    assert "needs a small model" in levels(folder / "llama", "draft-model")["error"][0]
    large = levels(folder / "llama", f"draft-model:model={folder / 'small'}")
    assert any("costs nearly what it saves" in what for what in large["warning"])
    writer = tiny.language_model("llama")
    tokenizer = writer.tokenizer
    writer.lm.save_pretrained(tmp_path / "tiny-chat")
    more = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>")
    more.add_tokens([f"<extra {i}>" for i in range(3)])
    more.save_pretrained(tmp_path / "tiny-chat")
    ill = levels(tmp_path / "tiny-chat")
    assert any("303 tokens, the model 300" in what for what in ill["error"])
    assert any("no chat template" in what for what in ill["warning"])
    half = examine(folder / "llama", dtype="float16", device="cpu")
    assert any("float16 is slow" in finding.what for finding in half)


def test_what_fewer_bits_cost_is_shown_beside_the_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostProfile, "save", lambda _: tmp_path / "profile.json")
    writer = tiny.language_model("llama", hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
    writer.lm.save_pretrained(tmp_path)
    writer.tokenizer.save_pretrained(tmp_path)
    (tmp_path / "texts.txt").write_text("The cat sat on the mat.\nA dog runs in the garden.\n")
    few = ("--rows", 1, "--context", 4, "--batch-size", 1, "--repeats", 1, "--data", tmp_path / "texts.txt")
    assert "give --runtime int8 or int4" in run("profile", tmp_path, *few).stderr.replace("\n", " ")
    if prepare(writer.lm, "int4") != "int4":
        pytest.skip("the C kernels cannot be compiled here")
    found = json.loads(run("profile", tmp_path, *few, "--runtime", "int4", "--json").stdout)["perplexity"]
    assert found.keys() == {"int4", "native"} and 0 < abs(found["int4"] / found["native"] - 1) < 0.5
    assert "perplexity" in run("profile", tmp_path, *few, "--runtime", "int8").stdout


def test_the_doctors_exit_code_says_whether_something_is_in_the_way(folder: Path) -> None:
    assert run("doctor", folder / "t5", "prompt-lookup").exit_code == 0
    broken = run("doctor", folder / "t5", "draft-model", "--json")
    assert broken.exit_code == 1 and any(f["level"] == "error" for f in json.loads(broken.stdout))
