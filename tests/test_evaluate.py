"""Evaluation: every number is what its name says, and the modes differ in Z alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import tiny
import torch
from handoffs import CASES, PAIRS, PROMPTS, Case, calls, folder, handoff, prompt_batch, prompt_rows
from torch import Tensor

from baton.engine import generate
from baton.errors import DataError, ModelMismatch, NotAHandoff, UnknownOption
from baton.handoff.evaluate import MODES, EvalReport, _Clock, _mean_z, _predict, _variants, evaluate
from baton.handoff.model import HandoffModel
from baton.models.loading import load
from baton.quality import text_quality
from baton.types import Pair, Timings

NEW = 6  # most tokens of a response
QUICK: dict[str, Any] = {"max_new_tokens": NEW, "speed_prompts": 4, "repeats": 2, "batch_size": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hand-off with a held-out split beside it."""
    root = tmp_path_factory.mktemp("evaluate")
    model = handoff(CASES[0])
    model.config.held_out = "../test.jsonl"
    model.save_pretrained(root / "handoff")
    rows = [{"prompt": p.prompt, "response": p.response} for p in PAIRS]
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "handoff"


@pytest.fixture(scope="module")
def report(saved: Path) -> EvalReport:
    return evaluate(saved, **QUICK, examples=5)


def texts(source: Any, prompts: list[str] = PROMPTS) -> list[str]:
    return [o.text for o in generate(source, prompts, max_new_tokens=NEW)]


# --- What a report holds -----------------------------------------------------------------------------------------


def test_every_number_has_every_mode(report: EvalReport) -> None:
    """As programs read it: objects over the modes, and it survives JSON."""
    found = json.loads(json.dumps(report.to_dict()))
    assert MODES == ("llm", "slm", "handoff", "zero", "constant", "shuffled")
    for name in ("bleu", "chrf", "ms_per_token", "tokens_per_second", "total_ms", "peak_memory_mb", "decode_memory_mb"):
        assert tuple(found[name]) == MODES, name
        assert all(isinstance(value, float) for value in found[name].values()), name
    told = {"model": "handoff", "prompts": 5, "dtype": "float32", "max_new_tokens": NEW, "left_out": {}}
    assert found["settings"] | told == found["settings"]
    assert {"torch", "transformers", "sacrebleu", "baton-decoding"} == set(found["versions"])
    assert {"cpu", "cores", "threads", "gpu", "memory_gb", "load"} <= set(found["machine"])
    assert set(found["predicted_total"]) == set(found["measured_total"]) == {"llm", "slm", "handoff"}


def test_texts_are_those_of_generate_and_scores_those_of_the_texts(report: EvalReport, saved: Path) -> None:
    expected = {
        "llm": texts(load(folder("t5"))),
        "slm": texts(load(folder("t5-slm"))),
        "handoff": texts(HandoffModel.from_pretrained(saved)),
    }
    for i, example in enumerate(report.examples):
        assert example["prompt"] == PROMPTS[i]
        assert example["reference"] == PAIRS[i].response
        assert list(example) == ["prompt", "reference", *MODES]
        for mode, written in expected.items():
            assert example[mode] == written[i]
    for mode in MODES:
        written = [example[mode] for example in report.examples]
        references = [[p.response for p in PAIRS]]
        assert report.bleu[mode] == pytest.approx(sacrebleu.corpus_bleu(written, references).score)
        assert report.chrf[mode] == pytest.approx(sacrebleu.corpus_chrf(written, references).score)


def test_derived_numbers_follow_from_the_others(report: EvalReport) -> None:
    assert report.speedup_decode == report.ms_per_token["llm"] / report.ms_per_token["handoff"]
    assert report.speedup_total == report.total_ms["llm"] / report.total_ms["handoff"]
    for mode in MODES:
        low, high = report.ms_per_token_range[mode]
        assert 0 < low <= report.ms_per_token[mode] <= high
        assert report.total_ms[mode] > report.ms_per_token[mode]
        assert report.peak_memory_mb[mode] >= report.decode_memory_mb[mode] > 0
        # Tokens per second and per prompt: 4 prompts of 6 tokens at most.
        assert report.tokens_per_second[mode] <= 1e3 * NEW / (0.5 * report.total_ms[mode])
    slm = sum(p.numel() for p in load(folder("t5-slm")).lm.parameters())
    assert report.parameters["handoff"] == report.parameters["slm"] == slm
    assert report.decode_memory_mb["handoff"] == report.decode_memory_mb["slm"]
    gap = report.bleu["llm"] - report.bleu["slm"]
    if gap:
        assert report.gap_closed == (report.bleu["handoff"] - report.bleu["slm"]) / gap


def test_gap_closed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the LLM's lead over the SLM alone that the hand-off has."""
    scores = iter([30.0, 20.0, 28.0])
    monkeypatch.setattr("baton.handoff.evaluate.text_quality", lambda *_: {"bleu": next(scores), "chrf": 0.0})
    found = evaluate(saved, PAIRS[:2], modes=("llm", "slm", "handoff"), **QUICK)
    assert found.bleu == {"llm": 30.0, "slm": 20.0, "handoff": 28.0}
    assert found.gap_closed == pytest.approx(0.8)


def test_text_quality_counts_every_accepted_answer() -> None:
    """Rows with fewer references than others are scored against their own only; ROUGE-L takes the best."""
    pairs = [
        Pair(
            prompt="a", response="die Katze schläft heute im Haus", references=("die Katze schläft heute im Haus", "x")
        ),
        Pair(prompt="b", response="der Hund liest ein gutes Buch"),
    ]
    perfect = text_quality([p.response for p in pairs], pairs, rouge=True)
    assert perfect == pytest.approx({"bleu": 100.0, "chrf": 100.0, "rouge_l": 100.0})
    second = text_quality(["x", pairs[1].response], pairs, rouge=True)
    assert second["rouge_l"] == 100.0
    assert text_quality(["x", "y"], pairs)["bleu"] < 10


# --- The modes ---------------------------------------------------------------------------------------------------


def fused(writer: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return writer.encode(ids, mask, Timings()).embeds


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[7]], ids=str)
def test_modes_replace_z_and_nothing_else(case: Case) -> None:
    """0; its mean over all prompt tokens; that of another prompt, cut or filled up with zeros: always on the own E."""
    model = handoff(case)
    constant = model.constant.detach().clone()
    prompts = [*PROMPTS, PROMPTS[0]]  # a repeated prompt is no other prompt
    ids, mask = prompt_batch(model, prompts)
    writers = _variants(model, prompts, ["handoff", "zero", "constant", "shuffled"], False)
    with torch.no_grad():
        embeds, z = model.prompt_embeddings(ids), model.project(model.read(ids, mask)) * mask[..., None]
    mean = z.sum((0, 1)) / mask.sum()
    assert torch.allclose(_mean_z(model, prompt_rows(model, prompts), batch_size=2), mean, atol=1e-5)
    found = {name: fused(writer, ids, mask) for name, writer in writers.items()}
    real = mask[..., None].bool()

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a * real, b * real, atol=1e-5)

    assert same(found["handoff"], embeds + z)
    assert same(found["zero"], embeds)
    assert same(found["constant"], embeds + mean)
    donors = [4, 0, 1, 2, 3, 4]  # the prompt before, and the last one for the first: never oneself
    assert same(found["shuffled"], embeds + z[donors])
    assert not same(found["shuffled"], embeds + z)
    # The donor does not depend on the batch, so quality at any batch size and speed at batch 1 are of the same texts.
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = fused(writers["shuffled"], ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert torch.allclose(alone[0], found["shuffled"][row, :length], atol=1e-4)
    assert model.signal == "llm"
    assert torch.equal(model.constant, constant)


def test_shuffled_reads_the_donors_prompt_and_writes_another_text(report: EvalReport, saved: Path) -> None:
    model = HandoffModel.from_pretrained(saved)
    writer = _variants(model, PROMPTS, ["shuffled"], False)["shuffled"]
    with calls(model.encoder.model) as llm:
        generate(writer, PROMPTS[1:2], max_new_tokens=1)
    assert [x.tolist() for x in llm] == [prompt_rows(model, PROMPTS[:1])]
    assert [e["shuffled"] for e in report.examples] != [e["handoff"] for e in report.examples]


def test_shuffled_needs_two_prompts(saved: Path) -> None:
    with pytest.raises(DataError, match="two different ones"):
        evaluate(saved, [PAIRS[0], PAIRS[0]], modes=("shuffled",), **QUICK)


# --- The cost model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder-only"])
def test_predictions_are_made_of_the_parts(kind: str) -> None:
    """Exactly: parts from the first, third.. prompt, totals of the second, fourth.., in ms, median of the passes."""

    def clock(encode: float, project: float, prefill: float, step: float, steps: list[int]) -> _Clock:
        made = _Clock()
        for n in steps:
            times = Timings(encode_s=encode, project_s=project, prefill_s=prefill, decode_s=n * step, steps=n)
            made.times.append(times)
        return made

    first = 0.1 + 0.02 if kind == "encoder-decoder" else 0.17  # s to the LLM's first token
    steps = [3, 10, 5, 20]
    good = {
        "llm": clock(0, 0, first, 0.02, steps),
        "slm": clock(0, 0, 0.03, 0.001, steps),
        "handoff": clock(0.1, 0.004, 0.03, 0.001, steps),
    }
    odd = {mode: clock(9, 9, 9, 9, steps) for mode in good}
    report = EvalReport()
    _predict(report, [good, odd, good], [[0.1] * 4, [9.0] * 4, [0.1] * 4], kind)
    expected = {
        "llm": 1e3 * (first + 15 * 0.02),
        "slm": 1e3 * (0.03 + 15 * 0.001),
        "handoff": 1e3 * (0.1 + 0.004 + 0.03 + 15 * 0.001),
    }
    assert report.measured_total == pytest.approx(expected)
    assert report.predicted_total == pytest.approx(expected)


# --- Where things come from --------------------------------------------------------------------------------------


def test_given_pairs_limit_and_modes(saved: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = evaluate(saved, PAIRS[::-1], limit=2, modes=("handoff",), progress=lambda *x: seen.append(x), **QUICK)
    assert [e["prompt"] for e in found.examples] == [PROMPTS[4], PROMPTS[3]]
    assert list(found.bleu) == ["handoff"]
    assert found.speedup_decode is None
    assert found.predicted_total == {}
    assert [x for x in seen if x[0] == "handoff: writing"] == [("handoff: writing", i, 2) for i in (1, 2)]
    assert seen[-1] == ("speed: one by one", 4, 4)


@pytest.mark.parametrize("case", [CASES[5], CASES[9], CASES[1]], ids=str)
def test_every_kind_of_llm(case: Case, tmp_path: Path) -> None:
    """A decoder-only LLM writes too; an encoder does not, and the report says so."""
    handoff(case).save_pretrained(tmp_path)
    found = evaluate(tmp_path, PAIRS[:3], **QUICK | {"repeats": 1})
    modes = [mode for mode in MODES if mode != "llm" or case.llm != "bert"]
    assert list(found.bleu) == list(found.ms_per_token) == modes
    assert found.settings["left_out"] == ({"llm": "an encoder does not write"} if case.llm == "bert" else {})


def test_without_an_slm_trained_alone(saved: Path) -> None:
    model = HandoffModel.from_pretrained(saved)
    model.config.slm_alone = None
    model.save_pretrained(saved.with_name("lonely"))
    found = evaluate(saved.with_name("lonely"), PAIRS[:2], modes=("slm", "handoff"), **QUICK)
    assert list(found.bleu) == ["handoff"]
    assert "slm" in found.settings["left_out"]
    given = evaluate(saved.with_name("lonely"), PAIRS[:2], modes=("slm",), slm=folder("t5-slm"), **QUICK)
    assert list(given.bleu) == ["slm"]


def test_all_models_run_in_the_handoffs_dtype(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that speeds compare: here the models it was made of are stored in float32, and it in bf16."""
    model = HandoffModel.from_pretrained(saved, dtype="bfloat16")
    model.save_pretrained(saved.with_name("half"))
    seen: list[Any] = []

    def spy(source: Any, **options: Any) -> Any:
        seen.append(options["dtype"])
        return load(source, **options)

    monkeypatch.setattr("baton.handoff.evaluate.load", spy)
    found = evaluate(saved.with_name("half"), PAIRS[:2], modes=("llm", "slm", "handoff"), **QUICK)
    assert seen == [torch.bfloat16] * 2
    assert found.settings["dtype"] == "bfloat16"


def fails(saved: Path, tmp_path: Path) -> dict[str, tuple[type[Exception], str, Callable[[], Any]]]:
    copy = tmp_path / "deeper" / "copy"
    shutil.copytree(saved, copy)
    no_split = tmp_path / "no-split"
    shutil.copytree(saved, no_split)
    config = json.loads((no_split / "config.json").read_text())
    (no_split / "config.json").write_text(json.dumps(config | {"held_out": None}))
    tiny.t5(50).save_pretrained(tmp_path / "other")
    return {
        "mode": (UnknownOption, "did you mean 'shuffled'", lambda: evaluate(saved, PAIRS, modes=("shufled",))),
        "llm": (ModelMismatch, "expected .*t5", lambda: evaluate(copy, PAIRS)),  # its pointer leads nowhere now
        "other": (ModelMismatch, "trained with the LLM", lambda: evaluate(saved, PAIRS, llm=tmp_path / "other")),
        "handoff": (NotAHandoff, "no hand-off", lambda: evaluate(folder("t5"), PAIRS)),
        "split": (DataError, "names no held-out split", lambda: evaluate(no_split, llm=folder("t5"))),
        "pairs": (DataError, "at least one", lambda: evaluate(saved, [])),
    }


@pytest.mark.parametrize("what", ["mode", "llm", "other", "handoff", "split", "pairs"])
def test_faults(what: str, saved: Path, tmp_path: Path) -> None:
    error, words, attempt = fails(saved, tmp_path)[what]
    with pytest.raises(error, match=words):
        attempt()


def test_responses_of_one_token_have_no_speed_per_token(saved: Path) -> None:
    """There was no decode step: no division by zero, and no number that was not measured."""
    found = evaluate(saved, PAIRS[:2], modes=("llm", "slm", "handoff"), **QUICK | {"max_new_tokens": 1})
    assert set(found.ms_per_token.values()) == {0.0}
    assert found.speedup_decode is None
    assert found.speedup_total is not None
