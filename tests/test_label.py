"""Labels: the LLM's own responses, in the order of the prompts, whatever interrupts the writing."""

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import baton.handoff.label as module
from baton.data.formats import read_pairs
from baton.data.storage import JsonlAppender, completed_lines
from baton.engine import generate
from baton.errors import DataError, PromptError, StorageError
from baton.handoff.label import LabelReport, beam_search, label
from baton.models.loading import LanguageModel
from baton.models.text import embed_tokens
from baton.models.writer import PromptInputs
from baton.types import Output, Pair, Timings

FAMILIES = ["t5", "bart", "marian", "gpt2", "llama"]
PROMPTS = [f"{'word ' * (7 * i % 5)}{i}." for i in range(23)]


@pytest.fixture(scope="module")
def writer() -> LanguageModel:
    return tiny.language_model("t5")


class Engine:
    """Stands in for the engine: answers `<prompt>`, nothing to "3.", and remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.stop_after: int | None = None

    def __call__(
        self, writer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int, truncate: bool
    ) -> list[Output]:
        if self.stop_after is not None and len(self.batches) == self.stop_after:
            raise KeyboardInterrupt
        assert len(prompts) <= batch_size
        self.batches.append(list(prompts))
        texts = ["" if prompt.endswith("13.") else f"<{prompt}>" for prompt in prompts]
        return [
            Output(prompt=p, text=t, token_ids=[], finish_reason="eos") for p, t in zip(prompts, texts, strict=True)
        ]


@pytest.fixture
def engine(monkeypatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(module, "generate", made)
    return made


def make(path: Path, writer: Any, prompts: Sequence[str] = tuple(PROMPTS), **changes: Any) -> LabelReport:
    return label(writer, prompts, path, **{"max_new_tokens": 8, "batch_size": 4, "chunk": 10} | changes)


def expected(prompts: Sequence[str] = tuple(PROMPTS)) -> list[dict[str, str]]:
    return [{"prompt": p, "response": "" if p.endswith("13.") else f"<{p}>"} for p in prompts]


def test_rows_are_in_the_order_of_the_prompts(tmp_path: Path, writer: LanguageModel, engine: Engine) -> None:
    """And the file is training data as it stands: its one empty response is counted and skipped."""
    path = tmp_path / "new" / "a.jsonl"
    assert make(path, writer) == LabelReport(prompts=23, resumed=0, empty=1)
    assert completed_lines(path) == expected()
    pairs, skipped = read_pairs(path)
    assert (len(pairs), skipped) == (22, 1)
    assert pairs[0] == Pair(prompt="0.", response="<0.>")


def test_batches_hold_similar_lengths(tmp_path: Path, writer: LanguageModel, engine: Engine) -> None:
    make(tmp_path / "a.jsonl", writer, chunk=100)
    assert [len(batch) for batch in engine.batches] == [4, 4, 4, 4, 4, 3]
    lengths = [len(writer.prompt_tokenizer(p)["input_ids"]) for batch in engine.batches for p in batch]
    assert lengths == sorted(lengths)


def test_equal_prompts_are_answered_once_per_chunk(tmp_path: Path, writer: LanguageModel, engine: Engine) -> None:
    prompts = ["a", "b", "a", "a", "c", "b"]
    calls: list[tuple[int, int]] = []
    make(tmp_path / "a.jsonl", writer, prompts, batch_size=2, on_progress=lambda *call: calls.append(call))
    assert sorted(p for batch in engine.batches for p in batch) == ["a", "b", "c"]
    assert completed_lines(tmp_path / "a.jsonl") == expected(prompts)
    assert calls == [(0, 6), (5, 6), (6, 6)]


def test_progress_and_chunks(tmp_path: Path, writer: LanguageModel, engine: Engine) -> None:
    """Rows reach the file at the end of each chunk; progress counts prompts, batch by batch."""
    path = tmp_path / "a.jsonl"
    calls = []
    make(path, writer, on_progress=lambda done, total: calls.append((done, total, len(completed_lines(path)))))
    assert calls == [
        (0, 23, 0),
        *[(done, 23, 0) for done in (4, 8, 10)],
        *[(done, 23, 10) for done in (14, 18, 20)],
        (23, 23, 20),
    ]


def test_an_interrupted_run_continues(tmp_path: Path, writer: LanguageModel, engine: Engine) -> None:
    path = tmp_path / "a.jsonl"
    engine.stop_after = 5  # in the second chunk
    with pytest.raises(KeyboardInterrupt):
        make(path, writer)
    assert completed_lines(path) == expected()[:10]
    engine.batches, engine.stop_after = [], None
    calls: list[tuple[int, int]] = []
    report = make(path, writer, on_progress=lambda *call: calls.append(call))
    assert report == LabelReport(prompts=23, resumed=10, empty=1)
    assert calls[0] == (10, 23)
    assert completed_lines(path) == expected()
    assert sorted(p for batch in engine.batches for p in batch) == sorted(PROMPTS[10:])


def test_a_file_cut_anywhere_is_completed(tmp_path: Path, writer: LanguageModel, engine: Engine) -> None:
    path = tmp_path / "a.jsonl"
    make(path, writer)
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        report = make(path, writer)
        assert report == LabelReport(prompts=23, resumed=whole[:size].count(b"\n"), empty=1)
        assert path.read_bytes() == whole


def test_a_finished_file_is_left_alone(tmp_path: Path, writer: LanguageModel, engine: Engine) -> None:
    path = tmp_path / "a.jsonl"
    make(path, writer)
    engine.batches = []
    before = path.read_bytes()
    assert make(path, writer) == LabelReport(prompts=23, resumed=23, empty=1)
    assert engine.batches == []
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (expected(["0.", "other"]), r"a\.jsonl:2: holds another prompt than number 2 of the input"),
        (expected([*PROMPTS, "more"]), r"a\.jsonl:24: more rows than the 23 prompts"),
        ([{"prompt": "0."}], r"a\.jsonl:1: no 'response'"),
        ([{"prompt": "0.", "response": None}], r"a\.jsonl:1: 'response' must be text, is null"),
    ],
)
def test_someone_elses_file_is_left_alone(
    tmp_path: Path, writer: LanguageModel, engine: Engine, content: list[dict], message: str
) -> None:
    """Also its last line, whole or not."""
    path = tmp_path / "a.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in content) + '{"prom'
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        make(path, writer)
    assert path.read_text() == text
    assert engine.batches == []


def test_bad_prompts_are_found_before_any_work(tmp_path: Path, writer: LanguageModel, engine: Engine) -> None:
    """The index counts all prompts, not those of a chunk."""
    path = tmp_path / "a.jsonl"
    with pytest.raises(PromptError, match="prompt 22 is empty"):
        make(path, writer, [*PROMPTS[:22], " "])
    short = LanguageModel(tiny.gpt2(n_positions=16), tiny.tokenizer(append_eos=False), "tiny")
    with pytest.raises(PromptError, match=r"prompt 21 has .* tiny reads at most 16"):
        make(path, short, [*PROMPTS[:1] * 21, "word " * 30])
    assert engine.batches == [] and not path.exists()
    make(path, short, ["word " * 30], truncate=True)
    assert len(completed_lines(path)) == 1


def test_a_full_disk_keeps_finished_rows(tmp_path: Path, writer: LanguageModel, engine: Engine, monkeypatch) -> None:
    path = tmp_path / "a.jsonl"
    write = JsonlAppender.write

    def write_once(self: JsonlAppender, *rows: Any) -> None:
        if self._end:
            self._file = Full(self._file)  # type: ignore[assignment]
        write(self, *rows)

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        patch.setattr(JsonlAppender, "write", write_once)
        with pytest.raises(StorageError, match="the finished lines are kept"):
            make(path, writer)
    assert completed_lines(path) == expected()[:10]
    assert make(path, writer) == LabelReport(prompts=23, resumed=10, empty=1)
    assert completed_lines(path) == expected()


# --- what is written -------------------------------------------------------------------------------------------------


@dataclass
class Embedding:
    """A model as a hand-off looks: the prompt arrives as embeddings."""

    inner: LanguageModel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, ids: torch.Tensor, mask: torch.Tensor, timings: Timings) -> PromptInputs:
        return PromptInputs(embeds=embed_tokens(self.inner.lm, ids), mask=mask)


class Spelled:
    """A tokenizer that decodes to the ids themselves: many tokens of a tiny model are bytes that make no text."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(str(int(i)) for i in ids if i not in self.inner.all_special_ids)

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in rows]


def spelling(family: str, **changes: Any) -> LanguageModel:
    writer = tiny.language_model(family, seed=1, **changes)
    return LanguageModel(writer.model, Spelled(writer.tokenizer), writer.name)


def searched(writer: LanguageModel, prompt: str, num_beams: int, max_new_tokens: int) -> str:
    """transformers' own, one prompt without padding."""
    ids = torch.tensor([writer.prompt_tokenizer(prompt)["input_ids"]])
    options = {"num_beams": num_beams, "do_sample": False, "max_new_tokens": max_new_tokens}
    out = writer.lm.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    if not writer.lm.config.is_encoder_decoder:
        out = out[ids.shape[1] :]
    return writer.response_tokenizer.decode(out, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_engines(tmp_path: Path, family: str) -> None:
    writer = tiny.language_model(family)
    make(tmp_path / "a.jsonl", writer, tiny.PROMPTS, batch_size=3)
    texts = [o.text for o in generate(writer, tiny.PROMPTS, max_new_tokens=8)]
    assert [row["response"] for row in completed_lines(tmp_path / "a.jsonl")] == texts
    assert len(set(texts)) > 1


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_transformers(tmp_path: Path, family: str, embeds: bool) -> None:
    """In a ragged batch, each prompt gets what it gets alone; as ids or as embeddings."""
    writer = spelling(family)
    alone = [searched(writer, prompt, num_beams=3, max_new_tokens=8) for prompt in tiny.PROMPTS]
    asked: Any = Embedding(writer) if embeds else writer
    make(tmp_path / "a.jsonl", asked, tiny.PROMPTS, num_beams=3)
    assert [row["response"] for row in completed_lines(tmp_path / "a.jsonl")] == alone
    assert alone != [o.text for o in generate(writer, tiny.PROMPTS, max_new_tokens=8)]  # beams do make a difference


@pytest.mark.parametrize("family", FAMILIES)
def test_one_beam_is_greedy(family: str) -> None:
    writer = spelling(family)
    texts = [o.text for o in generate(writer, tiny.PROMPTS, max_new_tokens=8)]
    assert beam_search(writer, tiny.PROMPTS, num_beams=1, max_new_tokens=8) == texts


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_beams_end_with_the_positions(family: str) -> None:
    """As the engine's responses do, instead of failing."""
    changes: dict[str, Any] = {"n_positions": 20} if family == "gpt2" else {"max_position_embeddings": 20}
    writer = spelling(family, **changes)
    texts = beam_search(writer, ["The cat."], num_beams=2, max_new_tokens=50)
    assert texts == [searched(writer, "The cat.", 2, 20 if family == "bart" else 21 - _tokens(writer, "The cat."))]


def _tokens(writer: LanguageModel, prompt: str) -> int:
    return len(writer.prompt_tokenizer(prompt)["input_ids"])
