"""The benchmark counts what was written, says the same words as others do, and compares before it ranks."""

import gzip
import importlib.util
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import handoffs
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from baton.bench import metrics, runner
from baton.bench.compare import compare
from baton.bench.decode import bench_decode
from baton.bench.forward import bench_forward, weight_bytes
from baton.bench.handoff import bench_handoff
from baton.bench.metrics import Measurement
from baton.bench.record import SCHEMA, Record, Run, from_json, read_run, to_json
from baton.bench.serve import arrival_times, bench_serve, percentiles, serve
from baton.bench.shapes import SHAPES
from baton.bench.suites import Suite, Task, built_in, read_suite, write_suite
from baton.cli import app
from baton.engine import Engine, generate
from baton.errors import BatonError, DataError, MemoryShort, UnknownOption
from baton.models.loading import load
from baton.quality import edit_similarity, exact_match, perplexity
from baton.runtime import prepare
from baton.types import Output, Sampling, Step, Timings

ROOT = Path(__file__).resolve().parents[1]
METHOD = "token-recycling:num_draft_tokens=10"
PROMPTS = [*tiny.PROMPTS, "a a a a a a"]
SUITE = Suite(name="six", version="1", source="here", licence="CC0", tasks=tuple(Task(prompt=p) for p in PROMPTS))


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run on busy machines: there is nothing to wait for."""
    monkeypatch.setattr("baton.machine.PATIENCE", 1)


def step(drafted: int, evaluated: int, accepted: int, **more: Any) -> Step:
    return Step(
        rows=drafted + 1,
        drafted={"a": drafted} if drafted else {},
        evaluated=evaluated,
        accepted=accepted,
        emitted=accepted + 1,
        **more,
    )


def record(**more: Any) -> Record:
    return Record(
        **{
            "contender": "own",
            "suite": "s",
            "category": "",
            "prompt": 0,
            "batch_size": 1,
            "group": 0,
            "repeat": 0,
            "group_s": 2.0,
            "prompt_ids": [1],
            "token_ids": [5, 6, 7, 8],
            "text": "text",
            "finish_reason": "length",
        }
        | more
    )


# --- what others mean ------------------------------------------------------------------------------------------------


def test_a_hand_made_record_in_the_words_of_others() -> None:
    """Four drafts of four, one step without a draft; two requests, so that means over steps and requests differ.

    vLLM: 5 accepted of 12 drafted in 3 drafts. Spec-Bench: steps give 4, 1, 1, 3 tokens; requests 8 / 2 s, 3 / 1 s.
    """
    first = record(steps=[step(4, 4, 3), step(4, 1, 0), step(0, 0, 0)], token_ids=[1] * 8)
    second = record(prompt=1, group=1, group_s=1.0, token_ids=[1] * 3, steps=[step(4, 3, 2)])
    both = [first, second]
    assert metrics.acceptance_length(both) == 9 / 4
    assert metrics.acceptance_rate(both) == 5 / 12
    assert metrics.acceptance_by_position(both) == [2 / 3, 2 / 3, 1 / 3]
    assert metrics.conventions(both) == pytest.approx(
        {
            "vllm_acceptance_length": 1 + 5 / 3,
            "vllm_acceptance_rate": 5 / 12,
            "spec_bench_accepted_tokens": (4 + 1 + 1 + 3) / 4,
            "spec_bench_tokens_per_second": (8 / 2 + 3 / 1) / 2,
            "without_bonus": 5 / 4,
            "accepted_over_evaluated": 5 / 8,
        }
    )
    (summary,) = metrics.summarize(both, {"own": "speculative"})
    assert summary.tokens_per_second == 11 / 3 and summary.speedup is None and summary.different is None
    assert metrics.conventions([record(steps=[step(0, 0, 0)])]) == {}


def test_speed_is_all_tokens_over_all_seconds_and_plain_is_the_reference() -> None:
    plain = [record(contender="plain", group=g, prompt=g, group_s=4.0 + g) for g in range(3)]
    own = [record(group=g, prompt=g, group_s=(4.0 + g) / 2) for g in range(3)]
    own[2] = replace(own[2], token_ids=[5, 6, 7, 9])
    lost = replace(own[1], finish_reason="error", error="it broke")
    families = {"plain": "plain", "own": "speculative"}
    first, second = metrics.summarize([*plain, *own], families)
    assert (first.tokens_per_second, first.speedup, first.different) == (12 / 15, 1.0, 0)
    assert (second.tokens_per_second, second.different, second.failed) == (12 / 7.5, 1, 0)
    assert second.speedup == pytest.approx(2.0) and second.speedup_interval == pytest.approx((2.0, 2.0))
    _, second = metrics.summarize([*plain, own[0], lost, own[2]], families)
    assert (second.failed, second.requests, second.tokens, second.speedup) == (1, 3, 8, pytest.approx(2.0))


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """200 samples of 20 exponential numbers with mean 1: about 95 % of the intervals hold it."""
    chance, held = random.Random(3), 0
    for trial in range(200):
        sample = [chance.expovariate(1.0) for _ in range(20)]
        low, high = metrics.interval(sample, lambda items: sum(items) / len(items), seed=trial)
        held += low <= 1.0 <= high
    assert 0.85 <= held / 200 <= 0.98


def test_a_slow_probe_marks_a_busy_machine() -> None:
    rows = [record(group=g, probe_s=0.010 if g == 2 else 0.001) for g in range(4)]
    assert metrics.summarize(rows, {})[0].busy == 0.25


# --- records ---------------------------------------------------------------------------------------------------------


def some_run(**more: Any) -> Run:
    return Run(
        **{
            "model": "m",
            "dtype": "float32",
            "runtime": "eager",
            "step_bytes": 1000,
            "absent": [],
            "contenders": {"plain": "plain", "own": "speculative"},
            "suites": {"s": {"version": "1"}},
            "sampling": {"temperature": 0.0},
            "max_new_tokens": 4,
            "batch_sizes": [1],
            "repeats": 1,
            "machine": {"cpu": "x"},
            "versions": {},
            "git": None,
            "command": "",
            "started": "2026-01-01T00:00:00+00:00",
        }
        | more
    )


def test_lines_give_the_same_objects_back() -> None:
    given = record(
        steps=[step(4, 4, 3, draft_s=0.5, verify_s=0.25, other_s=0.125), replace(step(3, 1, 0), drafted={"b": 3})],
        sources=["target", "a", "a", "b"],
        timings=Timings(prefill_s=0.5, decode_s=1.75, steps=2),
    )
    for item in (given, some_run()):
        assert from_json(json.loads(json.dumps(to_json(item)))) == item


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"schema": SCHEMA + 1, "kind": "run"}, f"reads {SCHEMA}"),
        ({"schema": SCHEMA, "kind": "walk"}, "none of run, record"),
        ({"schema": SCHEMA, "kind": "run", "model": "m"}, "missing"),
    ],
)
def test_other_lines_are_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        read_run(path)
    assert f"{path}:1" in str(error.value)


# --- the runner ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> Measurement:
    return bench_decode(
        tiny.language_model("llama"),
        [SUITE],
        methods=[METHOD],
        peers=["transformers"],
        max_new_tokens=40,
        batch_sizes=(1, 2),
    )


def test_counts_are_those_of_the_outputs(measured: Measurement) -> None:
    """Tokens, steps and acceptance of each contender, over all prompts, next to transformers' own."""
    found = {(s.contender, s.batch_size): s for s in measured.summaries}
    assert set(found) == {
        *((name, size) for name in ("plain", METHOD) for size in (1, 2)),
        ("transformers greedy", 1),
        ("transformers prompt lookup", 1),
    }
    writer = tiny.language_model("llama")
    plain = generate(writer, PROMPTS, max_new_tokens=40)
    for summary in found.values():
        assert (summary.requests, summary.failed, summary.different) == (6, 0, 0)
        assert summary.tokens == sum(len(output.token_ids) for output in plain)
    steps = [s for output in generate(writer, PROMPTS, max_new_tokens=40, drafter=METHOD) for s in output.steps]
    own = found[METHOD, 1]
    assert own.acceptance_length == sum(s.emitted for s in steps) / len(steps)
    assert own.acceptance_rate == sum(s.accepted for s in steps) / sum(s.num_drafted for s in steps)
    assert sum(own.share.values()) == pytest.approx(1) and 0 < own.accepted_by_source["token-recycling"] < 1
    assert found["plain", 1].acceptance_length == 1 and found["plain", 1].speedup == 1
    assert measured.run.machine["bandwidth_gb_s"] > 0.1 and measured.run.suites["six"]["licence"] == "CC0"
    for each in measured.records:
        assert each.prompt_ids == writer.prompt_tokenizer(PROMPTS[each.prompt])["input_ids"]
        assert each.text == plain[each.prompt].text
        # What the engine says it took, the clock around it has seen too.
        assert each.timings.total_s <= each.group_s


def test_the_same_seeds_give_the_same_texts_in_every_batch() -> None:
    """Sampled text depends on the prompt's number: plain and drafted, alone and in batches, it is the same."""
    sampling = Sampling(temperature=1.0, seed=3)
    options: dict[str, Any] = {"methods": [METHOD], "sampling": sampling, "max_new_tokens": 8, "batch_sizes": (1, 3)}
    done = bench_decode(tiny.language_model("gpt2"), [SUITE], **options)
    assert {s.different for s in done.summaries} == {0}
    texts = {r.prompt: r.token_ids for r in done.records if (r.contender, r.batch_size) == ("plain", 1)}
    assert all(texts[r.prompt] == r.token_ids for r in done.records)
    with pytest.raises(UnknownOption, match="greedy only"):
        bench_decode(tiny.language_model("gpt2"), [SUITE], peers=["transformers"], sampling=sampling)


class Slow:
    """Writes nothing of worth, in a known time; breaks at one prompt."""

    family, batches = "peer", True

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def write(self, prompts: Sequence[str], first_index: int) -> list[Output]:
        self.log.append(f"{self.name} {first_index}")
        time.sleep(self.seconds)
        if first_index == 4:
            raise RuntimeError("out of luck")
        return [Output(prompt=p, text="", token_ids=[1] * 10, finish_reason="length") for p in prompts]


def test_contenders_take_turns_and_one_that_breaks_stops_no_other() -> None:
    log: list[str] = []
    contenders = [Slow("plain", 0.02, log), Slow("own", 0.01, log)]
    run = some_run(batch_sizes=[2], max_new_tokens=10)
    _, records = runner.measure(tiny.language_model("t5"), lambda size: contenders, [SUITE], run)
    assert log[:2] == ["plain 0", "own 0"]  # warms up
    assert log[2:] == ["plain 0", "own 0", "own 2", "plain 2", "plain 4", "own 4"]
    failed = {(r.contender, r.prompt) for r in records if r.failed}
    assert failed == {(name, prompt) for name in ("plain", "own") for prompt in (4, 5)}
    assert all(r.error == "RuntimeError: out of luck" for r in records if r.failed)
    assert all(r.group_s >= (0.02 if r.contender == "plain" else 0.01) for r in records)
    own = metrics.summarize(records, run.contenders)[1]
    assert (own.tokens, own.failed, own.requests) == (40, 2, 6) and own.speedup is not None


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    """Groups on disk are not written again; other settings are refused, and --overwrite starts anew."""
    path = tmp_path / "run.jsonl"
    writer, log = tiny.language_model("t5"), []
    contenders = [Slow("plain", 0.0, log), Slow("own", 0.0, log)]

    def stop(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    def measure(**more: Any) -> list[Record]:
        run = some_run(contenders={"plain": "plain", "own": "peer"}, **more.pop("run", {}))
        return runner.measure(writer, lambda size: contenders, [SUITE], run, out=path, **more)[1]

    with pytest.raises(KeyboardInterrupt):
        measure(progress=stop)
    with path.open("ab") as file:
        file.write(b'{"schema": 1, "kind": "rec')  # the line that a kill cut off
    kept = read_run(path)[1]
    assert {r.prompt for r in kept} == {0, 1}
    log.clear()
    records = measure()
    assert records[:4] == kept and {entry.split()[1] for entry in log[2:]} == {"2", "3", "4", "5"}
    assert read_run(path)[1] == records
    log.clear()
    assert measure() == records and not log  # nothing is left to do
    with pytest.raises(BatonError, match=r"max_new_tokens.*--overwrite"):
        measure(run={"max_new_tokens": 5})
    assert len(measure(run={"max_new_tokens": 5}, overwrite=True)) == 12 and len(log) == 14


def test_ctranslate2_writes_the_same_tokens() -> None:
    pytest.importorskip("ctranslate2", reason="needs the extra `peers`")
    writer = tiny.language_model("t5")
    done = bench_decode(writer, [SUITE], peers=["ctranslate2"], max_new_tokens=12, batch_sizes=(1, 3))
    found = {(s.contender, s.batch_size): s for s in done.summaries}
    for size in (1, 3):
        assert (found["ctranslate2 float32", size].different, found["ctranslate2 float32", size].failed) == (0, 0)
    told = bench_decode(tiny.language_model("gpt2"), [SUITE.first(1)], peers=["ctranslate2"], batch_sizes=(1,))
    assert told.run.absent == [
        "ctranslate2 is left out: here it runs t5, bart, mbart, marian, pegasus, and this is gpt2"
    ]
    assert {s.contender for s in told.summaries} == {"plain"}


def test_a_peer_that_fails_on_a_model_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise AttributeError("'BartConfig' object has no attribute 'normalize_before'\nand more")

    monkeypatch.setattr("baton.bench.peers.transformers.contenders", broken)
    done = bench_decode(tiny.language_model("gpt2"), [SUITE.first(1)], peers=["transformers"], batch_sizes=(1,))
    assert done.run.absent == [
        "transformers is left out: it cannot take this model (AttributeError: 'BartConfig' object has no attribute "
        "'normalize_before')"
    ]


def test_an_absent_peer_is_reported_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    monkeypatch.delitem(sys.modules, "baton.bench.peers.ctranslate2", raising=False)
    done = bench_decode(tiny.language_model("t5"), [SUITE.first(1)], peers=["ctranslate2"], batch_sizes=(1,))
    assert done.run.absent == [
        "ctranslate2 is absent: ctranslate2 is not installed (pip install 'baton-decoding[peers]')"
    ]


def test_handoffs_are_judged_by_their_quality(tmp_path: Path) -> None:
    """A hand-off writes other texts: they are not counted as differences, but scored, alone and with a drafter."""
    model = handoffs.handoff()
    model.save_pretrained(tmp_path)
    writer = load(model.config.llm["id"])
    tasks = tuple(Task(prompt=p, references=(f"{p} yes", p)) for p in tiny.PROMPTS[:3])
    suite = replace(SUITE, tasks=tasks)
    spec = str(tmp_path)
    done = bench_decode(
        writer, [suite], handoffs=[spec, f"{spec}+{METHOD}"], max_new_tokens=8, batch_sizes=(1,), peers=["transformers"]
    )
    rows = {s.contender: s for s in done.summaries}
    assert rows[spec].different is None and rows[spec].family == "hand-off"
    texts = {
        name: [r.text for r in done.records if r.contender == name] for name in (spec, f"{spec}+{METHOD}", "plain")
    }
    assert texts[spec] == texts[f"{spec}+{METHOD}"] != texts["plain"]  # drafting changes no token of a hand-off either
    assert done.quality[spec] == done.quality[f"{spec}+{METHOD}"]
    assert {"bleu", "chrf", "rouge_l", "exact_match", "edit_similarity", "perplexity"} == set(done.quality["plain"])


# --- quality ---------------------------------------------------------------------------------------------------------


def test_quality_of_single_texts() -> None:
    assert exact_match(" a  b\n", ["c", "a b"]) and not exact_match("a c", ["a b"])
    assert exact_match("so 3 and 4 make 1,012.", ["3 + 4 <<...>> #### 1012"])
    assert not exact_match("1012 or 7", ["#### 1012"]) and not exact_match("none", ["#### 3"])
    assert edit_similarity("abcd", ["xyz", "abcx"]) == 2 * 3 / 8


def test_perplexity_is_that_of_the_models_own_loss() -> None:
    """Against transformers' loss, prompt by prompt, in a ragged batch."""
    writer = tiny.language_model("llama")
    responses = [[5, 9, 20], [7], [], [30, 31, 32, 33, 34]]
    losses, count = 0.0, 0
    for prompt, ids in zip(tiny.PROMPTS, responses, strict=False):
        if ids:
            read = writer.prompt_tokenizer(prompt)["input_ids"]
            labels = torch.tensor([[-100] * len(read) + ids])
            losses += float(writer.lm(torch.tensor([read + ids]), labels=labels).loss.detach()) * len(ids)
            count += len(ids)
    found = perplexity(writer, tiny.PROMPTS[:4], responses)
    assert found == pytest.approx(math.exp(losses / count), rel=1e-4)


# --- suites ----------------------------------------------------------------------------------------------------------


def test_files_of_others_are_told_by_their_fields(tmp_path: Path) -> None:
    rows = {
        "question.jsonl": {"question_id": 1, "category": "math", "turns": ["How many?", "Why?"]},
        "gsm.jsonl": {"question": "How many?", "answer": "<<1+1=2>> #### 2"},
        "pairs.jsonl": {"prompt": "How many?", "response": "two"},
        "prompts.jsonl": {"prompt": "How many?"},
    }
    for name, row in rows.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps({"task_id": "0", "prompt": "How many?", "canonical_solution": "    return 2\n"}) + "\n")
    (tmp_path / "plain.txt").write_text("How many?\n", encoding="utf-8")
    for name, category, references in (
        ("question.jsonl", "math", ()),
        ("gsm.jsonl", "", ("<<1+1=2>> #### 2",)),
        ("HumanEval.jsonl.gz", "", ("    return 2\n",)),
        ("pairs.jsonl", "", ("two",)),
        ("prompts.jsonl", "", ()),
        ("plain.txt", "", ()),
    ):
        suite = read_suite(tmp_path / name)
        assert suite.tasks == (Task(prompt="How many?", category=category, references=references),), name
        write_suite(suite, tmp_path / "again.jsonl")
    with pytest.raises(UnknownOption, match="neither a file nor a built-in suite"):
        read_suite("codes")
    (tmp_path / "question.jsonl").write_text('{"turns": ["a"], "category": "x"}\n{"turns": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"question.jsonl:2: not like the rows before"):
        read_suite(tmp_path / "question.jsonl")


def test_few_prompts_are_of_every_category() -> None:
    tasks = tuple(Task(prompt=f"{c}{i}", category=c) for c in "abc" for i in range(4))
    suite = replace(SUITE, tasks=tasks)
    assert [task.prompt for task in suite.first(5).tasks] == ["a0", "a1", "b0", "b1", "c0"]
    assert suite.first(None) is suite and suite.first(5).about["digest"] != suite.about["digest"]


@pytest.mark.parametrize("name", built_in())
def test_built_in_suites_say_where_they_are_from(name: str) -> None:
    suite = read_suite(name)
    assert suite.name == name and suite.version and suite.source and suite.licence and len(suite.tasks) >= 50


# --- comparing runs --------------------------------------------------------------------------------------------------


def runs(factor: float, **more: Any) -> Measurement:
    seconds = [1.0 + 0.01 * (g % 5) for g in range(40)]
    rows = [record(group=g, prompt=g, group_s=s * factor, **more) for g, s in enumerate(seconds)]
    return Measurement(run=some_run(), records=rows)


@pytest.mark.parametrize(
    ("factor", "more", "verdict", "different"),
    [
        (1.2, {}, "slower", 0),
        (1.02, {}, "same", 0),
        (0.8, {}, "faster", 0),
        (1.0, {"token_ids": [5, 6, 7, 9]}, "same", 40),
        (1.0, {"finish_reason": "error"}, "failed", 0),
    ],
)
def test_a_change_counts_beyond_the_threshold(
    factor: float, more: dict[str, Any], verdict: str, different: int
) -> None:
    (change,) = compare(runs(1.0), runs(factor, **more))
    assert (change.verdict, change.different) == (verdict, different)
    if verdict != "failed":
        assert change.ratio == pytest.approx(1 / factor)
        assert change.ratio_interval[0] <= change.ratio <= change.ratio_interval[1]


def test_other_work_is_not_compared() -> None:
    given = runs(1.0)
    with pytest.raises(BatonError, match="differ in suites"):
        compare(given, Measurement(run=some_run(suites={}), records=given.records))
    others = [replace(row, contender="x") for row in given.records]
    with pytest.raises(BatonError, match="in common"):
        compare(given, Measurement(run=some_run(), records=others))


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_commands(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    writer = tiny.language_model(family)
    writer.lm.save_pretrained(tmp_path / "model")
    writer.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.PROMPTS), encoding="utf-8")
    arguments = ["bench", "decode", str(tmp_path / "model"), "--data", str(tmp_path / "prompts.txt")]
    options = ["--max-new-tokens", "6", "--batch-size", "1", "--method", "token-recycling:num_draft_tokens=8"]
    files = ["--out", str(tmp_path / "run.jsonl")]
    done = CliRunner().invoke(app, [*arguments, *options, *files])
    assert done.exit_code == 0, done.output
    assert all(word in done.stdout for word in ("plain", "token-recycling", "transformers greedy", "tokens/s"))
    assert "differ" not in done.stdout
    again = CliRunner().invoke(app, [*arguments, *options, *files, "--json", str(tmp_path / "bench.json")])
    assert again.exit_code == 0, again.output
    summary = json.loads((tmp_path / "bench.json").read_text())
    assert len(summary["summaries"]) == 4 and summary["schema"] == SCHEMA and "records" not in summary
    path = str(tmp_path / "run.jsonl")
    same = CliRunner().invoke(app, ["bench", "compare", path, path, "--json"])
    assert same.exit_code == 0 and {c["verdict"] for c in json.loads(same.stdout)} == {"same"}
    run, records, _ = read_run(path)
    slow = tmp_path / "slow.jsonl"
    slower = [replace(r, group_s=r.group_s * (2 if r.contender == "plain" else 1)) for r in records]
    slow.write_text("".join(json.dumps(to_json(item)) + "\n" for item in (run, *slower)), encoding="utf-8")
    worse = CliRunner().invoke(app, ["bench", "compare", path, str(slow)])
    assert worse.exit_code == 1 and "slower" in worse.stdout


# --- serving ---------------------------------------------------------------------------------------------------------


def test_arrivals_are_a_poisson_process() -> None:
    times = arrival_times(4.0, 4000, seed=1)
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0 and times == arrival_times(4.0, 4000, seed=1) != arrival_times(4.0, 4000, seed=2)
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)  # of an exponential law it is the mean


def test_waiting_counts_from_the_arrival() -> None:
    """One row, a clock of our own: each step takes a second, so the second request waits for the whole first one."""
    now = 0.0
    engine = Engine(tiny.language_model("t5"), max_rows=1)
    step = engine.step

    def slow() -> Any:
        nonlocal now
        now += 1.0
        return step()

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    engine.step = slow  # type: ignore[method-assign]
    options = {"max_new_tokens": 4}
    visits = serve(engine, SUITE, [0.0, 0.5, 20.0], options, clock=lambda: now, sleep=sleep)
    plain = generate(tiny.language_model("t5"), PROMPTS[:3], max_new_tokens=4)
    assert [visit.token_ids for visit in visits] == [output.token_ids for output in plain]
    lengths = [len(visit.token_ids) for visit in visits]
    assert (visits[0].first_s, visits[0].ended_s) == (1.0, lengths[0])
    assert (visits[1].first_s, visits[1].ended_s) == (lengths[0] + 1.0, lengths[0] + lengths[1])
    assert visits[2].first_s == 21.0


def test_serving_changes_no_text_and_counts_everyone() -> None:
    report = bench_serve(
        tiny.language_model("llama"),
        SUITE,
        methods=[METHOD],
        rates=(50.0, 500.0),
        requests=9,
        max_rows=3,
        max_new_tokens=8,
        sampling=Sampling(temperature=1.0, seed=2),
    )
    assert [(s["contender"], s["rate"]) for s in report["summaries"]] == [
        ("plain", 50.0),
        (METHOD, 50.0),
        ("plain", 500.0),
        (METHOD, 500.0),
    ]
    for each in report["summaries"]:
        assert (each["requests"], each["failed"], each["different"]) == (9, 0, 0)
        assert 0 < each["ttft_ms"]["p50"] <= each["ttft_ms"]["p99"] <= each["latency_ms"]["p99"]
    with pytest.raises(BatonError, match="more than 0"):
        bench_serve(tiny.language_model("llama"), SUITE, rates=(0.0,))


def test_percentiles() -> None:
    assert percentiles([x / 1000 for x in range(101)]) == pytest.approx({"p50": 50.0, "p90": 90.0, "p99": 99.0})
    assert percentiles([0.002]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0} and percentiles([]) == {}


def test_the_commands_for_quality_and_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    writer = tiny.language_model("t5")
    writer.lm.save_pretrained(tmp_path / "model")
    writer.tokenizer.save_pretrained(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": p, "response": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("The cat.\n", encoding="utf-8")
    model, limit = str(tmp_path / "model"), ["--max-new-tokens", "6"]
    judged = CliRunner().invoke(
        app, ["bench", "quality", model, "-d", str(pairs), *limit, "--batch-size", "4", "--json", "-"]
    )
    assert judged.exit_code == 0, judged.output
    scores = json.loads(judged.stdout)["quality"]["plain"]
    outputs = generate(writer, PROMPTS, max_new_tokens=6)
    matches = [edit_similarity(output.text, [prompt]) for output, prompt in zip(outputs, PROMPTS, strict=True)]
    assert scores["edit_similarity"] == pytest.approx(
        100 * statistics.fmean(matches)
    )  # of all six, not of a whole batch
    refused = CliRunner().invoke(app, ["bench", "quality", model, "-d", str(tmp_path / "prompts.txt")])
    assert refused.exit_code == 2 and "no references" in refused.stderr
    served = CliRunner().invoke(
        app, ["bench", "serve", model, "-d", str(pairs), *limit, "--rate", "100", "--requests", "5"]
    )
    assert served.exit_code == 0 and "TTFT" in served.stdout and "differ" not in served.stdout, served.output


@pytest.mark.parametrize("peer", ["transformers", "llama.cpp"])
def test_speed_agrees_with_an_independent_stopwatch(peer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Another clock, around the other engine's own call and our engine's steps, counting tokens by itself."""
    if peer == "llama.cpp":
        pytest.importorskip("llama_cpp", reason="needs the extra `peers`")
    program = [sys.executable, str(Path(__file__).with_name("stopwatch.py")), peer]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2
    with capsys.disabled():
        for name, (recorded, watch) in found.items():
            print(f"\n{name}: {recorded:.1f} tokens/s in the record, {watch:.1f} by stopwatch", end="")
            assert recorded == pytest.approx(watch, rel=0.03)


def test_passes_are_timed_engine_by_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine, context and number of rows once, in seconds that are positive; what is absent is said."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(SHAPES, "tiny", ("llama", small | {"vocab_size": 300, "max_position_embeddings": 64}))
    t5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    monkeypatch.setitem(SHAPES, "tiny-t5", ("t5", t5))
    done: list[tuple[str, int, int]] = []
    for shape in ("tiny", "tiny-t5"):
        report = bench_forward(
            shape, rows=(1, 3), contexts=(4, 9), peers=["transformers"], repeats=3, progress=lambda *a: done.append(a)
        )
        found = [(cost.engine, cost.context, cost.rows) for cost in report.costs]
        assert len(found) == len(set(found)) == 2 * 2 * 3
        assert all(0 < cost.low <= cost.seconds <= cost.high for cost in report.costs)
        assert done[-1] == ("context 9", 6, 6)
        assert json.loads(json.dumps(report.to_dict()))["settings"]["shape"] == shape
    # The decoder's layers and the head: 2 x (4 x 64 x 64 + 3 x 64 x 96 + 2 norms) + 300 x 64, in two bytes each.
    kind, settings = SHAPES["tiny"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.bfloat16)
    assert weight_bytes(model) == 2 * (2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 300 * 64)
    if prepare(model, "int4") == "int4":  # inputs are filled up to 128; the head in eight bits, a scale to each of 300
        layer = (4 * 64 + 2 * 96 + 64) * 128 * 4.5 / 8 + 2 * 2 * 64
        assert weight_bytes(model) == 2 * layer + 300 * (64 + 4)


def test_passes_that_cannot_be_timed_are_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownOption, match="llama-110m"):
        bench_forward("llama-111m")
    with pytest.raises(UnknownOption, match="transformers"):
        bench_forward("llama-110m", peers=["transformer"])
    with pytest.raises(BatonError, match=r"16384.*--context 16352 or less"):
        bench_forward("llama-110m", contexts=[16384])
    monkeypatch.setattr("baton.bench.forward.free_bytes", lambda _: 10**8)
    with pytest.raises(MemoryShort, match=r"134 M parameters: 0\.5 GB"):
        bench_forward("llama-110m")


def test_a_hand_off_is_timed_at_the_sizes_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading costs a hand-off more than its SLM alone: the LLM reads too, and it is much larger here."""
    for name, width, layers in (("large", 256, 12), ("small", 32, 1)):
        sizes = {"d_model": width, "d_kv": 16, "d_ff": width, "num_layers": layers, "num_heads": 2, "vocab_size": 300}
        monkeypatch.setitem(SHAPES, name, ("t5", sizes | {"decoder_start_token_id": 0}))
    report = bench_handoff("large", "small", prompt_tokens=40, lengths=(2, 6), repeats=3)
    cost = {(c.mode, c.tokens): c for c in report.costs}
    assert len(cost) == len(report.costs) == 6
    for length in (2, 6):
        assert cost["handoff", length].read_s > cost["slm", length].read_s
        assert all(0 < cost[mode, length].read_s < cost[mode, length].total_s for mode in ("llm", "slm", "handoff"))
    with pytest.raises(BatonError, match="no encoder"):
        bench_handoff("llama-110m", "small")


@pytest.mark.parametrize(("name", "module"), [("llama.cpp", "llama_cpp"), ("openvino", "openvino_genai")])
def test_other_engines_write_what_plain_decoding_writes(name: str, module: str, tmp_path: Path) -> None:
    """The same weights, drafts of theirs included; a trained model, whose best token is clear.

    In a process of its own: some of their libraries do not get along with those of training.
    """
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{name} is not installed: it needs the extra `peers`")
    lines = ["def read(path):\n    with open(path) as f:\n", "class Queue(object):\n    def __init__(self"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines), encoding="utf-8")
    model = Path(__file__).parents[1] / "models" / "pycode-target"
    words = f"bench decode {model} --data {prompts} --dtype float32 --max-new-tokens 24 --batch-size 1 --peer {name}"
    done = subprocess.run(
        [sys.executable, "-m", "baton.cli", *words.split(), "--method", "prompt-lookup", "--json", "-"],
        capture_output=True,
        check=True,
        text=True,
    )
    summaries = json.loads(done.stdout)["summaries"]
    peers, tokens = [s for s in summaries if s["family"] == "peer"], summaries[0]["tokens"]
    assert len(peers) == 2 and tokens > 24
    for summary in peers:
        assert summary["contender"].startswith(name)
        assert (summary["requests"], summary["failed"], summary["different"], summary["tokens"]) == (2, 0, 0, tokens)
