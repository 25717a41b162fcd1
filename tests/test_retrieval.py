"""Retrieval: what is found is what is there, two trees make one, and the text stays the target's."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import baton.drafters.parts.suffixes as suffixes
from baton.cli import app
from baton.draft import Draft
from baton.drafters import make
from baton.drafters.draft_model import DraftModel
from baton.drafters.parts.suffixes import Segment, Suffixes, add_documents
from baton.drafters.rasd import Rasd, judged
from baton.engine import Engine, generate
from baton.engine.drafter import Drafter, Seen
from baton.engine.request import Request
from baton.errors import BatonError, DataError, DraftError, UnknownOption, VocabMismatch
from baton.types import Sampling

Words = dict[tuple[int, ...], int]  # beginnings of continuations, and how often they stand there


def corpus(segments: Sequence[Sequence[Sequence[int]]], vocab: int) -> Suffixes:
    return Suffixes([Segment.build(documents, vocab) for documents in segments], vocab)


def matches(documents: Sequence[Sequence[int]], span: Sequence[int]) -> list[Sequence[int]]:
    """What stands behind each occurrence."""
    size = len(span)
    return [
        tokens[at + size :]
        for tokens in documents
        for at in range(len(tokens) - size + 1)
        if list(tokens[at : at + size]) == list(span)
    ]


def expected(documents: Sequence[Sequence[int]], context: Sequence[int], longest: int, shortest: int) -> Any:
    for size in range(min(longest, len(context)), shortest - 1, -1):
        if found := matches(documents, context[-size:]):
            return size, found
    return 0, []


def words(trie: Any) -> Words:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(trie.tokens, trie.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return dict(zip(paths, trie.counts, strict=True))


def paths(draft: Draft) -> list[tuple[int, ...]]:
    return [tuple(draft.tokens[n] for n in draft.tree.path(node)) for node in range(len(draft))]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_lookup_is_brute_force(data: st.DataObject) -> None:
    """Span, matches and counts of every beginning, for any number of segments, any vocabulary and all span lengths."""
    vocab = data.draw(st.sampled_from([1, 2, 3, 255, 256, 70000]))
    token = st.sampled_from(sorted({0, vocab // 2, vocab - 1}))
    document = st.lists(token, min_size=1, max_size=60)
    segments = data.draw(st.lists(st.lists(document, min_size=1, max_size=4), min_size=1, max_size=3))
    every = [tokens for documents in segments for tokens in documents]
    shortest = data.draw(st.integers(1, 4))
    longest = data.draw(st.integers(shortest, 32))
    source = data.draw(st.sampled_from(every))
    context = source[: data.draw(st.integers(0, len(source)))] if data.draw(st.booleans()) else data.draw(document)
    ahead = data.draw(st.integers(1, 12))
    found = corpus(segments, vocab).lookup(
        context, longest=longest, shortest=shortest, ahead=ahead, nodes=10**6, most=10**6
    )
    span, following = expected(every, context, longest, shortest)
    assert (found.span, found.matches) == (span, len(following))
    counted = Counter(tuple(rest[:end]) for rest in following for end in range(1, min(ahead, len(rest)) + 1))
    assert words(found) == counted
    nodes = data.draw(st.integers(1, 20))
    few = corpus(segments, vocab).lookup(context, longest=longest, shortest=shortest, ahead=ahead, nodes=nodes)
    assert few.counts == sorted(counted.values(), reverse=True)[:nodes]
    assert few.tokens == found.tokens[:nodes] and few.parents == found.parents[:nodes]  # more only adds nodes


def test_continuations_end_with_their_document() -> None:
    """Neither a match nor what follows it crosses a border, and an ending that nothing follows has no draft."""
    found = corpus([[[5, 6, 7], [8, 5, 6], [9, 5]], [[6, 7]]], 10)
    assert words(found.lookup([5, 6])) == {(7,): 1}
    assert found.lookup([5, 6]).matches == 2
    assert found.lookup([7, 8]).span == found.lookup([7, 8]).matches == 0
    assert words(found.lookup([0, 6, 7])) == {} and found.lookup([0, 6, 7]).span == 2
    assert words(found.lookup([4, 5], shortest=1)) == {(6,): 2, (6, 7): 1}
    assert found.lookup([], shortest=1).span == found.lookup([5], shortest=2).span == 0


def test_too_many_matches_are_thinned_out_evenly() -> None:
    """Every tenth in sorted order: not those with the smallest tokens only."""
    documents = [[1, token] for token in range(2, 102)]
    found = corpus([documents[:50], documents[50:]], 200).lookup([1], shortest=1, most=10)
    assert sorted(found.tokens) == list(range(2, 102, 10)) and found.matches == 10
    assert words(corpus([[[1, 2]] * 30 + [[1, 3]] * 10], 9).lookup([1], shortest=1, most=20)) == {(2,): 15, (3,): 5}


def test_tokens_that_do_not_fit() -> None:
    """Symbols are as small as the vocabulary lets them be, and never wrap; tokens nobody has read end a lookup."""
    for vocab, dtype in ((255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "uint32"), (262144, "uint32")):
        segment = Segment.build([[0, vocab - 1, 0, vocab - 1, 1]], vocab)
        assert segment.text.dtype == dtype
        assert words(Suffixes([segment], vocab).lookup([0, vocab - 1], longest=2)) == {(0,): 1, (1,): 1} | {
            (0, vocab - 1): 1,
            (0, vocab - 1, 1): 1,
        }
        for token in (-1, vocab):
            with pytest.raises(DataError, match="tokenizer"):
                Segment.build([[0, token]], vocab)
    found = corpus([[[1, 2, 3, 4]]], 5)
    assert words(found.lookup([1, 2, 700, 1, 2])) == {(3,): 1, (3, 4): 1}
    assert found.lookup([1, 2, 700]).span == 0
    assert words(found.lookup([1, 2], known=4)) == {(3,): 1}  # the model has no row for token 4


trees = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=8)


@given(trees, trees, st.integers(0, 20), st.data())
@settings(max_examples=80, deadline=None)
def test_fusion(first: list[list[int]], second: list[list[int]], budget: int, data: st.DataObject) -> None:
    """Every path of both, no token twice among siblings, twice the same is once; cutting keeps whole paths."""
    left = Draft.paths(first, "model", [data.draw(st.floats(-5, 0)) for _ in first])
    right = Draft.paths(second, "corpus", [data.draw(st.floats(-5, 0)) for _ in second])
    fused = left.merge(right)
    assert set(paths(fused)) == {*paths(left), *paths(right)} == set(paths(right.merge(left)))
    assert len(set(paths(fused))) == len(fused) <= len(left) + len(right)
    assert set(paths(fused.merge(right))) == set(paths(fused))
    sources = dict(zip(paths(fused), fused.sources(), strict=True))
    assert all(source == ("model" if path in paths(left) else "corpus") for path, source in sources.items())
    kept = set(paths(fused.prune(budget)))
    assert all(path[:-1] in kept or len(path) == 1 for path in kept)
    assert kept <= set(paths(fused.prune(budget + 1)))


def test_the_drafter_judges_what_was_retrieved() -> None:
    """q(first token) times the part of its matches that goes on so; what q excludes goes, with all below it."""
    draft = Draft.paths(
        [[1], [1, 2], [1, 2, 3], [4], [4, 4], [9]], scores=[math.log(c / 20) for c in (8, 4, 2, 6, 6, 6)]
    )
    logits = torch.tensor([0.1, 0.2, 0.0, 0.0, 0.7]).log()
    logits[2] = -torch.inf
    found = judged(draft, logits - 3)
    scores = {path: math.exp(score) for path, score in zip(paths(found), found.scores, strict=True)}
    q = (logits - 3).softmax(-1).tolist()
    wanted = {(1,): q[1], (1, 2): q[1] / 2, (1, 2, 3): q[1] / 4, (4,): q[4], (4, 4): q[4]}
    assert scores == pytest.approx(wanted)
    assert paths(judged(Draft.paths([[2], [2, 4], [4]], scores=[-1.0, -1.0, -2.0]), logits)) == [(4,)]


class Fixed(Drafter):
    """Proposes the same paths at every step, with logits of its own if it has any."""

    name = "fixed"

    def __init__(self, given: Sequence[Sequence[int]], first: Any = None) -> None:
        self.given, self.first, self.seen = given, first, []  # type: ignore[var-annotated]

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        return [Draft.paths(self.given, self.name, [-0.1] * len(self.given)).within(max(r.room, 0)) for r in requests]

    def observe(self, seen: Seen) -> None:
        self.seen.append(seen)


def fused(base: Drafter, store: str, **options: Any) -> Rasd:
    made = Rasd(datastore=store, base="plain", **options)
    made.drafter = base
    return made


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.language_model("llama")


@pytest.fixture(scope="module")
def own(llama: Any) -> str:
    """A datastore of what the target writes itself."""
    outputs = generate(llama, tiny.PROMPTS, max_new_tokens=24)
    return corpora.datastore(llama.tokenizer(o.prompt)["input_ids"] + o.token_ids for o in outputs)


def test_own_responses_are_retrieved_whole(llama: Any, own: str) -> None:
    """What the target has written before it writes in a third of the steps; drafts end where the room does."""
    plain = generate(llama, tiny.PROMPTS, max_new_tokens=24)
    for drafter in (make(f"rest:datastore={own}"), make(f"rasd:datastore={own},base=prompt-lookup")):
        outputs = generate(llama, tiny.PROMPTS, max_new_tokens=24, drafter=drafter, batch_size=3)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
        assert min(o.acceptance_length for o in outputs) > 6
    assert {s for o in outputs for s in o.sources} >= {"target", "rasd"}


def test_sampled_texts_are_plain_sampling(llama: Any, own: str) -> None:
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=4)
    plain = generate(llama, tiny.PROMPTS, max_new_tokens=20, sampling=sampling)
    for spec in (f"rest:datastore={own},min_span=1", f"rasd:datastore={own},min_span=1,base=token-recycling"):
        outputs = generate(llama, tiny.PROMPTS, max_new_tokens=20, sampling=sampling, drafter=spec, batch_size=2)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
        assert any(step.accepted for o in outputs for step in o.steps)


def test_one_source_alone(llama: Any, own: str, tmp_path: Path) -> None:
    """Without a drafter RASD is REST; with an empty datastore it is its drafter."""

    def steps(drafter: Any) -> list[Any]:
        outputs = generate(llama, tiny.PROMPTS, max_new_tokens=16, drafter=drafter, batch_size=3)
        return [[(s.num_drafted, s.accepted, s.emitted) for s in o.steps] for o in outputs]

    for budget in (3, 64):
        options = f"datastore={own},min_span=1,num_draft_tokens={budget}"
        assert steps(f"rasd:{options},base=plain") == steps(f"rest:{options}")
    about = {"vocab": tiny.VOCAB, "segments": 0, "documents": 0, "tokens": 0}
    suffixes.write_store(tmp_path, suffixes.KIND, llama.tokenizer, {}, about)
    assert steps(f"rest:datastore={tmp_path}") == steps(None)
    for base in ("prompt-lookup", "token-recycling:num_draft_tokens=20"):
        assert steps(f"rasd:datastore={tmp_path},base=[{base}]") == steps(base)


def test_the_fused_draft(llama: Any) -> None:
    """The drafter's nodes and the corpus's: budgets hold, sources are told, and the drafter sees what was verified."""
    prompt = llama.tokenizer(tiny.PROMPTS[1])["input_ids"]
    (start,) = generate(llama, tiny.PROMPTS[1], max_new_tokens=1)
    store = corpora.datastore([[*prompt, *start.token_ids, *rest] for rest in ([20, 21, 22], [20, 23], [30, 31, 32])])

    def first_draft(base: Drafter, **options: Any) -> dict[tuple[int, ...], str]:
        engine = Engine(llama, fused(base, store, **options))
        engine.submit(engine.requests([tiny.PROMPTS[1]], max_new_tokens=12))
        for _ in range(2):
            engine.step()
        draft = base.seen[0].drafts[0]  # type: ignore[attr-defined]
        return dict(zip(paths(draft), draft.sources(), strict=True))

    model = {(20,): "fixed", (20, 21): "fixed", (40,): "fixed"}
    twenty = {(20, 21, 22): "rasd", (20, 23): "rasd"}
    thirty = {(30,): "rasd", (30, 31): "rasd", (30, 31, 32): "rasd"}
    given = [[20, 21], [40]]
    assert first_draft(Fixed(given)) == model | twenty | thirty
    assert first_draft(Fixed(given), num_draft_tokens=3) == model
    assert first_draft(Fixed(given), num_retrieved=1) == model  # the corpus's best is known already
    logits = torch.zeros(1, tiny.VOCAB)
    logits[0, 30] = 9.0
    assert first_draft(Fixed(given, logits), num_retrieved=3) == model | thirty
    logits[0, 30] = -torch.inf
    assert first_draft(Fixed(given, logits)) == model | twenty
    assert first_draft(Fixed([]), num_retrieved=1) == dict.fromkeys({(20,), (20, 21), *twenty, *thirty}, "rasd")


def test_small_models_tell_what_they_think_of_the_next_token(llama: Any) -> None:
    """`first` are their logits after the newest token, for chains and trees alike."""

    class Itself(DraftModel):
        def load(self, engine: Any) -> Any:
            return llama

    for drafter in (Itself(num_draft_tokens=3), Itself(branches=2, max_depth=3)):
        engine = Engine(llama, drafter)
        engine.submit(engine.requests(tiny.PROMPTS[:2], max_new_tokens=40))
        for step in range(4):
            before = [list(row.tokens) for row in engine.rows]
            engine.step()
            if step:
                assert drafter.first is not None
                ids = drafter.first.argmax(-1).tolist()
                assert ids == [row.tokens[len(old)] for row, old in zip(engine.rows, before, strict=True)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rest", "rest:datastore=FOLDER"),
        ("rest:datastore=x,max_span=40", "it must be 32 or less"),
        ("rest:datastore=x,min_span=20", "max_span=16 is not possible"),
        ("rest:datastore=x,max_matches=0", "max_matches=0 is not possible"),
        ("rasd:datastore=x", "rasd needs a drafter"),
        ("rasd:base=plain", "rasd:datastore=FOLDER"),
        ("rasd:base=[draft-model:model=x,sample=true]", "drafts that are drawn"),
        ("rasd:base=[prompt-lookop]", "did you mean 'prompt-lookup'"),
        ("rasd:base=prompt-lookup,num_retrieved=0", "num_retrieved=0 is not possible"),
    ],
)
def test_impossible_options_are_refused(llama: Any, spec: str, message: str) -> None:
    with pytest.raises(UnknownOption, match=message):
        generate(llama, "The cat.", drafter=spec)


def test_a_base_that_drafts_inside_the_target_is_refused(llama: Any) -> None:
    base: Any = Fixed([])
    base.begun = object()
    with pytest.raises(DraftError, match="take another base"):
        generate(llama, "The cat.", drafter=fused(base, corpora.noise()))


def test_stores_that_cannot_be_used_are_refused(llama: Any, tmp_path: Path) -> None:
    """Missing, of something else, with another vocabulary, cut off, or with a header that lies."""

    def refused(kind: type[BatonError], message: str, folder: Path = tmp_path) -> None:
        with pytest.raises(kind, match=message):
            generate(llama, "The cat.", drafter=f"rest:datastore={folder}")

    refused(DataError, "give the folder of a datastore", tmp_path / "none")
    suffixes.write_store(tmp_path / "table", "table", llama.tokenizer, {}, {})
    refused(DataError, "holds a table", tmp_path / "table")
    other = tiny.train_bpe(tiny.TEXTS, 290, append_eos=False)
    add_documents(tmp_path / "other", [[5, 6]], other)
    refused(VocabMismatch, "another tokenizer", tmp_path / "other")
    add_documents(tmp_path, [[5, 6, 7]], llama.tokenizer)
    header = json.loads((tmp_path / "header.json").read_text())
    (tmp_path / "header.json").write_text(json.dumps(header | {"about": {"segments": 2, "vocab": 300}}))
    refused(DataError, "lacks 'text-1'")
    (tmp_path / "header.json").write_text(json.dumps(header))
    data = (tmp_path / "order-0.npy").read_bytes()
    (tmp_path / "order-0.npy").write_bytes(data[:-3])
    refused(DataError, "order-0.npy: damaged")
    with pytest.raises(DataError, match="every document is empty"):
        add_documents(tmp_path / "empty", [[], []], llama.tokenizer)
    assert not (tmp_path / "empty").exists()


def test_the_command(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files become documents, a row's prompt and text one; --append adds; Ctrl-C and bad input change nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    llama.tokenizer.save_pretrained("model")
    Path("a.txt").write_text("The cat sat on the mat.\nThe dog ran.\n", encoding="utf-8")
    rows = [{"prompt": "Die Katze", "text": " schläft im Haus."}, {"text": "Wir lesen."}]
    Path("b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["build-datastore", *arguments, "--tokenizer", "model", "--out", "store"])

    def follows(text: str) -> str:
        found = Suffixes.open("store", llama.tokenizer).lookup(ids(text), ahead=40)
        assert all(parent == index - 1 for index, parent in enumerate(found.parents))
        return str(llama.tokenizer.decode(found.tokens))

    def ids(text: str) -> list[int]:
        return list(llama.tokenizer(text, add_special_tokens=False)["input_ids"])

    done = run("a.txt", "b.jsonl")
    assert done.exit_code == 0, done.stderr
    assert (
        f"{len(ids(Path('a.txt').read_text())) + sum(len(ids(t)) for row in rows for t in row.values())} tokens"
        in done.stderr
    )
    assert "of 3 texts" in done.stderr
    assert follows("Die Katze") == "schläft im Haus."
    assert follows("mat.\nThe dog") == "ran.\n"
    assert follows("Wir lesen.") == ""
    before = {path: path.read_bytes() for path in Path("store").iterdir()}

    def unchanged(*arguments: str, code: int, message: str) -> None:
        refused = run(*arguments)
        assert refused.exit_code == code and message in refused.stderr, refused.stderr
        assert {path: path.read_bytes() for path in Path("store").iterdir()} == before

    unchanged("a.txt", code=2, message="--append adds")
    Path("d.txt").write_bytes(b"caf\xe9")
    Path("e.jsonl").write_text('{"prompt": 3}\n', encoding="utf-8")
    unchanged("d.txt", "--append", code=2, message="d.txt:1: not UTF-8")
    unchanged("e.jsonl", "--append", code=2, message="'prompt' must be text")
    unchanged("none.txt", "--append", code=2, message="none.txt: No such file")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Segment, "build", interrupted)
        unchanged("a.txt", "--append", code=130, message="")
    with monkeypatch.context() as patch:
        patch.setattr(suffixes, "SEGMENT", 4)
        assert run("b.jsonl", "--append").exit_code == 0
    assert len(Suffixes.open("store", llama.tokenizer).segments) == 3
    assert follows("Die Katze") == "schläft im Haus."
    assert Suffixes.open("store", llama.tokenizer).lookup(ids("Die Katze")).matches == 2
    (tmp_path / "other").mkdir()
    tiny.train_bpe(tiny.TEXTS, 290, append_eos=False).save_pretrained("other")
    refused = CliRunner().invoke(
        app, ["build-datastore", "a.txt", "--tokenizer", "other", "--out", "store", "--append"]
    )
    assert refused.exit_code == 2 and "another tokenizer" in refused.stderr
    assert np.load("store/text-0.npy").dtype == np.uint16
