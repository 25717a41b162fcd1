"""Methods that draft from n-grams, and trees of ranks: what they count, search, draw and keep."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import handoffs
import numpy as np
import pytest
import tiny
from typer.testing import CliRunner

import baton.bench.calibrate as calibration
import baton.drafters.stand as stand
from baton.audit import audit
from baton.audit.exact import _law
from baton.cli import app
from baton.draft import ROOT, Draft, PathTemplate, Tree
from baton.drafters import make
from baton.drafters.parts import trigrams
from baton.drafters.parts.ngrams import Mean, NGrams, without_replacement
from baton.drafters.parts.puct import Search
from baton.drafters.parts.store import write_store
from baton.drafters.parts.templates import Calibration, RankCounts, load_tree, ranks_of, save_tree
from baton.drafters.parts.trigrams import UNKNOWN, Corpus, Overlay, Pair, Row, ranked
from baton.engine import Engine, generate
from baton.engine.drafter import Drafter
from baton.engine.request import Request
from baton.errors import DataError, UnknownOption, VocabMismatch
from baton.types import Output, Sampling

SAMPLED = Sampling(temperature=0.7, seed=3)
CYCLE = [7, 8, 9, 10, 11, 12]


def texts(outputs: Sequence[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def table(folder: Path, documents: Sequence[Sequence[int]], top: int = 12, **about: Any) -> str:
    arrays = trigrams.build(documents, tiny.VOCAB, top)
    write_store(folder, trigrams.KIND, tiny.tokenizer(), arrays, {"vocabulary": tiny.VOCAB} | about)
    return str(folder)


def run_in(folder: Path, *arguments: str) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


# --- tri-grams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waiting", [3, 2**22])
def test_tables_hold_the_most_probable_successors(
    waiting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against plain counting, however the counts were put together; pairs that never stood anywhere are unknown."""
    monkeypatch.setattr(trigrams, "WAITING", waiting)
    number = random.Random(0).randrange
    documents = [[number(9) for _ in range(number(60))] for _ in range(12)]
    corpus = Corpus(table(tmp_path, documents, top=3), tiny.tokenizer(), tiny.VOCAB)
    counts: dict[Pair, Counter[int]] = {}
    for document in documents:
        for triple in zip(document, document[1:], document[2:], strict=False):
            counts.setdefault(triple[:2], Counter())[triple[2]] += 1
    assert len(corpus) == len(counts)
    for pair in itertools.product(range(10), repeat=2):
        row, expected = corpus.row(pair), counts.get(pair, Counter())
        best = sorted(expected, key=lambda token: (-expected[token], token))[:3]
        assert list(row.tokens) == best
        assert row.weights == pytest.approx([expected[token] / expected.total() for token in best])
        assert list(row.sums) == pytest.approx(list(itertools.accumulate(row.weights)))
    assert corpus.row((299, 299)) is UNKNOWN


def test_a_row_picks_in_proportion_to_its_weights() -> None:
    row = ranked({4: 1.0, 5: 3.0, 6: 1.0})
    assert list(row.tokens) == [5, 4, 6]
    picked = Counter(row.pick((place + 0.5) / 1000) for place in range(1000))
    assert picked == {0: 600, 1: 200, 2: 200}
    assert row.pick(1 - 2**-53) == 2


def test_weights_grow_with_each_occurrence_in_the_window_and_stop(tmp_path: Path) -> None:
    """min(most, w0 + gain * m), on rows of the request's own; the corpus and other requests see nothing of it."""
    corpus = Corpus(table(tmp_path, [[1, 2, 3, 1, 2, 4]]), tiny.tokenizer(), tiny.VOCAB)
    first, second = Overlay(corpus.row), Overlay(corpus.row)
    for times, weight in ((3, 0.62), (1, 0.66), (100, 3.0)):
        for _ in range(times):
            first.add((1, 2), 4, 0.04, 3.0)
        assert first.weights[1, 2][4] == pytest.approx(weight)
    assert first.row((1, 2)).tokens == [4, 3] and first.row((1, 2)).weights == pytest.approx([3.0, 0.5])
    first.add((8, 8), 9, 0.04, 3.0)
    assert first.row((8, 8)) == ([9], [0.04], [0.04])
    assert second.row((1, 2)) == corpus.row((1, 2)) and list(second.row((1, 2)).tokens) == [3, 4]
    assert second.row((8, 8)) is UNKNOWN


def test_a_step_of_aded_adds_what_is_in_its_window() -> None:
    """A tri-gram gains at every step that still has it in the window: m occurrences, m gains."""
    writer = tiny.language_model("llama")
    drafter = make("aded:window=9,gain=0.25,max_weight=2")
    engine = Engine(writer, drafter)
    (request,) = engine.requests(["The cat."], max_new_tokens=40)
    request.context, request.tokens = [1, 2, 3, 1, 2, 3, 1, 2], [3]
    drafter._tables[request] = overlay = Overlay(lambda pair: UNKNOWN)  # type: ignore[attr-defined]
    drafter.propose([request])
    assert overlay.weights == {(1, 2): {3: 0.75}, (2, 3): {1: 0.5}, (3, 1): {2: 0.5}}
    drafter.propose([request])
    drafter.propose([request])
    assert overlay.weights == {(1, 2): {3: 2.0}, (2, 3): {1: 1.5}, (3, 1): {2: 1.5}}
    assert list(drafter.propose([request])[0].tokens) == [1, 2, 3, 1, 2]


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    writer = tiny.language_model("llama")
    good = table(tmp_path / "good", [CYCLE * 3])
    with pytest.raises(DataError, match="cannot be read"):
        generate(writer, "The cat.", drafter=f"aded:table={tmp_path / 'nothing'}")
    table(tmp_path / "large", [CYCLE * 3], vocabulary=9000)
    with pytest.raises(VocabMismatch, match="build a table with this model's"):
        generate(writer, "The cat.", drafter=f"aded:table={tmp_path / 'large'}")
    arrays = trigrams.build([CYCLE], tiny.VOCAB, 2)
    write_store(tmp_path / "store", "datastore", tiny.tokenizer(), arrays, {"vocabulary": 9})
    with pytest.raises(DataError, match="holds a datastore, and a table is needed"):
        generate(writer, "The cat.", drafter=f"aded:table={tmp_path / 'store'}")
    write_store(tmp_path / "foreign", "table", handoffs.other_tokenizer(), arrays, {"vocabulary": 9})
    with pytest.raises(VocabMismatch, match="built with another tokenizer"):
        generate(writer, "The cat.", drafter=f"aded:table={tmp_path / 'foreign'}")
    (tmp_path / "good" / "keys.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="build the table again"):
        generate(writer, "The cat.", drafter=f"aded:table={good}")


# --- the search ------------------------------------------------------------------------------------------------------


def dense(seed: int, tokens: int = 6) -> dict[Pair, Row]:
    number = random.Random(seed)
    pairs = itertools.product(range(tokens), repeat=2)
    return {pair: ranked({token: number.random() for token in range(tokens)}) for pair in pairs}


def searched(rows: dict[Pair, Row], root: Pair, *, depth: int = 4, iterations: int = 150, seed: int = 0) -> Search:
    search = Search(lambda pair: rows.get(pair, UNKNOWN), root, depth, random.Random(seed).random)
    search.run(iterations, 24, 32.0, 8.0)
    return search


@pytest.mark.parametrize("seed", range(4))
def test_searches_count_their_visits(seed: int) -> None:
    """The root has one per iteration, children together at most their parent's; drafts are tries within bounds."""
    search = searched(dense(seed), (0, 1))
    assert search.visits[0] == 150
    for node, children in enumerate(search.children):
        below = sum(search.visits[child] for child in children)
        assert below <= search.visits[node] <= below + 1 or not children
    assert sum(search.visits[child] for child in search.children[0]) == 150
    draft = search.draft(24, 30, "aded")
    assert 24 <= len(draft) <= 30 and draft.tree.depth <= 5
    for node in range(ROOT, len(draft)):
        siblings = [draft.tokens[child] for child in draft.tree.children(node)]
        assert len(set(siblings)) == len(siblings)
    again = searched(dense(seed), (0, 1)).draft(24, 30, "aded")
    assert again.tokens == draft.tokens and again.tree.parents == draft.tree.parents
    assert max(searched(dense(seed), (0, 1), depth=2).depths) == 2


def test_a_cycle_is_drafted_as_one_path_of_full_depth_in_few_iterations() -> None:
    rows = {(a, b): ranked({c: 1.0}) for a, b, c in zip(CYCLE, CYCLE[1:] + CYCLE, CYCLE[2:] + CYCLE, strict=False)}
    search = searched(rows, (7, 8))
    assert search.visits[0] < 10
    draft = search.draft(24, 64, "aded")
    assert list(draft.tokens) == [9, 10, 11, 12, 7] and draft.tree.is_chain
    assert len(searched(rows, (7, 9)).draft(24, 64, "aded")) == 0


def test_a_value_counts_the_weight_of_the_token_that_is_new() -> None:
    """Equal priors; behind one of them, tokens of more weight: it is visited more often."""
    wide = dict.fromkeys(range(20, 50), 0.02)
    rows = {(1, 2): ranked({3: 0.02, 4: 0.02} | wide), (2, 4): ranked({5: 3.0}), (4, 5): ranked({6: 3.0})}
    search = Search(lambda pair: rows.get(pair, UNKNOWN), (1, 2), 4, random.Random(0).random)
    search.run(400, 1, 1.0, 8.0)
    visits = dict(zip(search.pairs, search.visits, strict=True))
    assert visits[2, 4] > 3 * visits[2, 3]


@pytest.mark.parametrize("spec", ["num_draft_tokens=64", "num_draft_tokens=5,max_depth=2,iterations=20,num_paths=3"])
def test_aded_changes_no_token_whatever_its_table(spec: str, tmp_path: Path) -> None:
    """Noise, and the target's own texts, of which much is accepted."""
    writer = tiny.language_model("llama")
    plain = {sampling: generate(writer, tiny.PROMPTS, max_new_tokens=24, sampling=sampling)
             for sampling in (Sampling(), SAMPLED)}  # fmt: skip
    noise = np.random.default_rng(0).integers(0, tiny.VOCAB // 30, (40, 60)).tolist()
    own = [output.token_ids for output in plain[Sampling()]]
    accepted = {}
    for name, documents in (("noise", noise), ("own", own)):
        folder = table(tmp_path / name, documents)
        for sampling, expected in plain.items():
            drafter = f"aded:table={folder},{spec}"
            found = generate(writer, tiny.PROMPTS, max_new_tokens=24, sampling=sampling, drafter=drafter, batch_size=3)
            assert texts(found) == texts(expected)
            accepted[name, sampling] = np.mean([output.acceptance_length for output in found])
    assert accepted["own", Sampling()] > 2 and accepted["own", Sampling()] > accepted["noise", Sampling()]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aded:window=2", "window=2 is not possible"),
        ("aded:gain=-1", "gain=-1.0 is not possible"),
        ("aded:c2=0", "c2=0.0 is not possible"),
        ("stand:floor=1", "floor=1.0 is not possible"),
        ("stand:max_ngram=2,min_ngram=3", "max_ngram=2 is not possible"),
        ("stand:regrow=-1", "regrow=-1 is not possible"),
    ],
)
def test_impossible_options(spec: str, message: str) -> None:
    with pytest.raises(UnknownOption, match=message):
        make(spec)


# --- means -----------------------------------------------------------------------------------------------------------


def test_a_mean_is_the_mean_of_what_was_seen() -> None:
    """For every n-gram at the text's end, the longest first; what is not among the best is forgotten."""
    table = NGrams(1, 3, kept=4)
    seen = [{5: 0.5, 6: 0.5}, {5: 0.75, 7: 0.25}, {7: 0.5, 8: 0.25, 5: 0.25}]
    for count, probabilities in enumerate(seen, start=1):
        table.learn((1, 2, 3), list(probabilities), list(probabilities.values()))
        mean = {token: sum(p.get(token, 0) for p in seen[:count]) / count for token in range(5, 9)}
        for text in ((1, 2, 3), (9, 9, 2, 3), (3,)):
            found = table.find(text)
            assert found is not None and found.seen == count
            assert dict(zip(found.tokens, found.probabilities, strict=True)) == pytest.approx(
                {token: p for token, p in mean.items() if p}
            )
            assert list(found.probabilities) == sorted(found.probabilities, reverse=True)
    assert table.find((2,)) is None
    table.learn((4, 3), [9], [1.0])
    assert table.find((4, 3)) == Mean(1, [9], [1.0]) and table.find((4, 4, 3)) == Mean(1, [9], [1.0])
    assert table.find((1, 2, 3)).seen == 3 and table.find((3,)).seen == 4  # type: ignore[union-attr]
    tokens, q = table.find((1, 2, 3)).distribution  # type: ignore[union-attr]
    assert sum(q) == pytest.approx(1) and len(tokens) == 4


def test_a_floor_follows_what_is_new() -> None:
    table = NGrams(1, 1, kept=2, floor=0.5)
    for _ in range(9):
        table.learn((1,), [5], [1.0])
    table.learn((1,), [6], [1.0])
    assert table.find((1,)) == Mean(10, (5, 6), (0.5, 0.5))
    for _ in range(3):
        table.learn((1,), [7, 8], [0.5, 0.5])
    assert table.find((1,)).tokens == (7, 8)  # type: ignore[union-attr]


def test_draws_without_replacement_have_their_law() -> None:
    """First q, then q without the first; all different, at most as many as there are."""
    q, number = [0.5, 0.3, 0.2], random.Random(1)
    runs = 20000
    drawn = Counter(tuple(without_replacement([3, 4, 5], q, 2, number.random)) for _ in range(runs))
    chance = dict(zip([3, 4, 5], q, strict=True))
    for first, second in itertools.permutations([3, 4, 5], 2):
        expected = chance[first] * chance[second] / (1 - chance[first])
        assert drawn[first, second] / runs == pytest.approx(expected, abs=0.012)
    assert sorted(without_replacement([3, 4, 5], q, 9, number.random)) == [3, 4, 5]


# --- STAND -----------------------------------------------------------------------------------------------------------


LAW = "stand:shared=true,num_draft_tokens=6,max_depth=2,max_ngram=3"


class Watched(Drafter):
    """A drafter, and the drafts it made."""

    def __init__(self, drafter: Drafter) -> None:
        self.__dict__.update(drafter=drafter, name=drafter.name, drafts=[])

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        found = self.drafter.propose(requests)
        self.drafts += found
        return found

    def __getattribute__(self, name: str) -> Any:
        if name in ("attach", "join", "observe", "select", "draws"):
            return getattr(self.drafter, name)
        return super().__getattribute__(name)


def test_drawn_drafts_keep_the_joint_law() -> None:
    writer = tiny.language_model("llama")
    chi_square, p = _law(writer, LAW, tiny.PROMPTS[1], 1500)
    assert p > 1e-4, chi_square
    drafter = Watched(make(LAW))
    made = generate(
        writer, [tiny.PROMPTS[1]] * 40, drafter=drafter, sampling=Sampling(temperature=1, top_k=4), max_new_tokens=6
    )
    assert np.mean([output.acceptance_length for output in made]) > 1.2  # there was something to verify
    for draft in drafter.drafts:
        assert set(draft.drawn) == {parent for parent in range(ROOT, len(draft)) if draft.tree.children(parent)}
        for parent, (tokens, q) in draft.drawn.items():
            siblings = [draft.tokens[child] for child in draft.tree.children(parent)]
            assert set(siblings) <= set(tokens) and len(set(siblings)) == len(siblings)
            assert sum(q) == pytest.approx(1) and min(q) > 0


def test_chosen_children_called_drawn_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand, "without_replacement", lambda tokens, q, count, number: list(tokens[:count]))
    assert _law(tiny.language_model("llama"), LAW, tiny.PROMPTS[1], 1500)[1] < 1e-6


def test_the_audit_passes() -> None:
    """Drawn by its law and greedy text; chosen children token for token."""
    report = audit(
        tiny.language_model("t5"),
        [LAW, "stand:sample=false,shared=true,num_draft_tokens=12,rejected=true"],
        tiny.PROMPTS[:3],
        max_new_tokens=10,
        batch_sizes=(1, 3),
        law_runs=600,
    )
    assert report.exact and not any(method.differences for method in report.methods)
    assert [method.chi_square is None for method in report.methods] == [False, True]


def test_the_same_seed_draws_the_same_and_another_step_draws_anew() -> None:
    writer = tiny.language_model("llama")
    made = []
    for seed in (3, 3, 4):
        drafter = Watched(make("stand:num_draft_tokens=8"))
        sampling = Sampling(temperature=0.9, seed=seed)
        output = generate(writer, tiny.PROMPTS, drafter=drafter, sampling=sampling, max_new_tokens=20, batch_size=2)
        made.append((texts(output), [list(draft.tokens) for draft in drafter.drafts]))
    assert made[0] == made[1] != made[2]
    alone = generate(
        writer, tiny.PROMPTS, drafter="stand:num_draft_tokens=8", sampling=Sampling(temperature=0.9, seed=3),
        max_new_tokens=20, batch_size=1,
    )  # fmt: skip
    assert texts(alone) == made[0][0]


def test_greedy_children_are_the_best_ones() -> None:
    writer = tiny.language_model("llama")
    drafter = Watched(make("stand:num_draft_tokens=8,learn_prompt=true"))
    generate(writer, tiny.PROMPTS, drafter=drafter, max_new_tokens=20)
    assert any(len(draft) for draft in drafter.drafts)
    assert not any(draft.drawn for draft in drafter.drafts)


def test_a_trace_learns_from_those_before_it_only_where_asked() -> None:
    """The second greedy trace is accepted to the tree's depth; prompts that are not kept start anew."""
    writer = tiny.language_model("llama")
    chain = "stand:num_draft_tokens=4,max_depth=4"

    def steps(spec: str, prompts: Sequence[str]) -> list[int]:
        engine = Engine(writer, make(spec))
        return [len(generate(engine, prompt, max_new_tokens=26, first_index=index)[0].steps)
                for index, prompt in enumerate(prompts)]  # fmt: skip

    same = [tiny.PROMPTS[1]] * 3
    first, second, third = steps(f"{chain},shared=true", same)
    assert second == third == 5 < first  # 25 tokens, five at a time
    assert steps(chain, same) == [first] * 3
    other = [tiny.PROMPTS[1], tiny.PROMPTS[4], tiny.PROMPTS[1]]
    assert steps(f"{chain},shared=true,prompts=1", other)[2] == first
    assert steps(f"{chain},shared=true", other)[2] == 5


def test_numbers_that_were_used_draw_from_a_table_of_their_own() -> None:
    """A second request with the seed and key of an earlier one must not see what its numbers have written."""
    engine = Engine(tiny.language_model("llama"), make("stand:shared=true"))
    traces = engine.drafter._traces  # type: ignore[attr-defined]
    one, two = engine.requests(["The cat."] * 2, max_new_tokens=4)
    (again,) = engine.requests(["The cat."], max_new_tokens=4)
    assert traces[one] is traces[two] and traces[one] is not traces[again]
    assert traces[again] is traces[again]
    (other,) = engine.requests(["A dog."], max_new_tokens=4, first_index=9)
    assert traces[other] is not traces[one]


def test_a_tree_grows_anew_from_what_was_right() -> None:
    """On a text that repeats itself chains deepen; seeded text stays that of plain decoding."""
    counts = RankCounts((0.5, 0.25), weight=2)
    counts.add(Tree([-1, -1, 0]), [0, 2])
    counts.add(Tree([-1, -1]), [])
    assert counts.chances == (round((1 + 2) / (2 + 3), 3), round(0.5 / 4, 3))
    drafter = make("stand:sample=false,regrow=4,num_draft_tokens=12")
    writer = tiny.language_model("llama")
    engine = Engine(writer, drafter)
    plain = generate(writer, tiny.PROMPTS, max_new_tokens=30, sampling=SAMPLED)
    requests = engine.requests(tiny.PROMPTS, max_new_tokens=30, sampling=SAMPLED)
    engine.submit(requests)
    while not engine.idle:
        engine.step()
    assert [request.tokens for request in requests] == texts(plain)
    templates = [drafter._traces[request].template for request in requests]  # type: ignore[attr-defined]
    assert any(template is not drafter._template for template in templates)  # type: ignore[attr-defined]
    assert all(len(template) == 12 for template in templates)


# --- trees of ranks --------------------------------------------------------------------------------------------------


def closed(paths: Sequence[tuple[int, ...]]) -> bool:
    known = {(), *paths}
    return all(path[:-1] in known and (not path[-1] or (*path[:-1], path[-1] - 1) in known) for path in paths)


@pytest.mark.parametrize("seed", range(5))
def test_the_kept_tree_is_the_best_of_its_size(seed: int) -> None:
    """Against all trees that are closed under parents and better siblings; a falling count is not needed."""
    number = random.Random(seed)
    paths = ranks_of(Tree(number.randrange(-1, node) for node in range(9)))
    counts = {path: number.randrange(20) for path in paths}
    found = Calibration(9, counts, 10, 5.0)
    for size in range(10):
        kept = found.tree(size)
        assert len(kept) == size and closed(kept)
        best = max(sum(counts[path] for path in some) for some in itertools.combinations(paths, size) if closed(some))
        assert sum(counts[path] for path in kept) == best
        assert found.expected[size] == pytest.approx(1 + best / 10)
    assert found.fastest(lambda rows: 1.0) == 9 or found.expected[9] == found.expected[found.fastest(lambda rows: 1.0)]
    gain = [after - before for before, after in itertools.pairwise(found.expected)]
    assert found.fastest(lambda rows: float(rows**3)) == 0
    assert found.fastest(lambda rows: 1.0 + 100 * (rows > 4)) == max(range(1, 4), key=lambda n: sum(gain[:n]))


def test_ranks_are_places_among_siblings() -> None:
    template = PathTemplate.grown((0.6, 0.2, 0.1), 30, 6)
    ranks = ranks_of(template.tree)
    assert [path[-1] for path in ranks] == list(template.ranks)
    assert PathTemplate(ranks).tree.parents == template.tree.parents


def test_trees_are_saved_and_bad_ones_refused(tmp_path: Path) -> None:
    path, paths = tmp_path / "tree.json", [(0,), (1,), (0, 0)]
    save_tree(path, 10, paths, {"model": "x"})
    assert ranks_of(load_tree(path, "stand", 10).tree) == [(0,), (1,), (0, 0)]
    assert make(f"stand:tree={path}")._template.tree.depth == 2  # type: ignore[attr-defined]
    with pytest.raises(UnknownOption, match="a tree of 10 ranks, and token-recycling has 8 candidates"):
        make(f"token-recycling:tree={path}")
    with pytest.raises(DataError, match="cannot be read"):
        make(f"stand:tree={tmp_path / 'none'}")
    good = json.loads(path.read_text())
    for change, message in (
        ({"paths": [[0], [2]]}, "without their parent or better siblings"),
        ({"paths": [[0], [1, 0]]}, "without their parent"),
        ({"paths": [[0], [-1]]}, "without their parent"),
        ({"paths": []}, "or none"),
        ({"paths": 3}, "not a tree of Baton's"),
        ({"paths": [["a"]]}, "not a tree of Baton's"),
        ({"magic": "other"}, "'other' of version 1"),
        ({"version": 9}, "of version 9"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=message):
            make(f"stand:tree={path}")
    path.write_text("[]")
    with pytest.raises(DataError, match="not a tree of Baton's"):
        make(f"stand:tree={path}")


@pytest.mark.parametrize("spec", ["token-recycling", "stand:sample=false,learn_prompt=true"])
def test_calibrated_trees_accept_what_was_expected(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many nodes as asked for, at least as good on the same prompts as a grown tree, and the same text."""
    monkeypatch.setattr(calibration, "NODES", 60)
    monkeypatch.setattr(calibration, "DEPTH", 8)
    writer = tiny.language_model("llama")
    found = calibration.calibrate(writer, spec, tiny.PROMPTS, max_new_tokens=30)
    assert found.steps > 20 and found.length > 10 and len(found.counts) == 60
    kept = found.tree(10)
    assert len(kept) == 10 and closed(kept)
    path = tmp_path / "tree.json"
    save_tree(path, found.ranks, kept, {})
    name, joint = spec, "," if ":" in spec else ":"
    fitted = generate(writer, tiny.PROMPTS, max_new_tokens=30, drafter=f"{name}{joint}tree={path}")
    grown = generate(writer, tiny.PROMPTS, max_new_tokens=30, drafter=f"{name}{joint}num_draft_tokens=10")
    assert texts(fitted) == texts(grown) == texts(generate(writer, tiny.PROMPTS, max_new_tokens=30))
    assert max(step.num_drafted for output in fitted for step in output.steps) == 10
    assert sum(len(output.steps) for output in fitted) <= sum(len(output.steps) for output in grown)


def test_only_methods_with_trees_are_calibrated() -> None:
    with pytest.raises(UnknownOption, match="prompt-lookup fills no tree of ranks"):
        calibration.calibrate(tiny.language_model("llama"), "prompt-lookup:max_ngram=2", ["a"])


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny `target`, prompts and a text."""
    made = tmp_path_factory.mktemp("ngrams")
    tiny.llama(0).save_pretrained(made / "target")
    tiny.tokenizer(append_eos=False).save_pretrained(made / "target")
    (made / "prompts.txt").write_text("\n".join(tiny.PROMPTS) + "\n", encoding="utf-8")
    (made / "text.txt").write_text("\n".join(tiny.TEXTS) + "\n", encoding="utf-8")
    return made


def test_build_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From text and JSONL; drafting from it changes nothing. Bad input is named."""
    monkeypatch.setenv("COLUMNS", "300")
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "The cat", "response": "sat there."}\n\n{"messages": [{"content": "A dog ran."}]}\n')
    target, out = folder / "target", folder / "table"
    done = run_in(folder, "build-table", folder / "text.txt", rows, "--tokenizer", target, "--out", out, "--top", 2)
    assert done.exit_code == 0 and "draft with aded:table=" in done.stderr, done.stderr
    encoder = tiny.tokenizer(append_eos=False)
    texts = ["\n".join(tiny.TEXTS) + "\n", "The cat", "sat there.", "A dog ran."]
    expected = trigrams.build([encoder(text)["input_ids"] for text in texts], tiny.VOCAB, 2)
    for name, array in expected.items():
        assert np.array_equal(np.load(out / f"{name}.npy"), array)
    checked = run_in(
        folder, "audit", target, "-d", folder / "prompts.txt", "--method", f"aded:table={out}", "--max-new-tokens", 6,
        "--batch-size", 2,
    )  # fmt: skip
    assert checked.exit_code == 0 and "NOT" not in checked.stdout
    empty, broken = folder / "empty.txt", folder / "broken.jsonl"
    empty.write_text("")
    broken.write_text('{"title": "x"}\n')
    (folder / "bytes.txt").write_bytes(b"ok\n\xff\n")
    for data, message in (
        (empty, "nothing to count"),
        (broken, ":1: no text"),
        (folder / "bytes.txt", ":2: not UTF-8"),
    ):
        refused = run_in(folder, "build-table", data, "--tokenizer", target, "--out", folder / "other")
        assert refused.exit_code == 2 and message in refused.stderr and not (folder / "other").exists()
    for source, message in (("nowhere/at/all", "there is no folder"), (str(folder), "no tokenizer at")):
        refused = run_in(folder, "build-table", rows, "--tokenizer", source, "--out", folder / "other")
        assert refused.exit_code == 2 and message in refused.stderr


def test_calibrate_tree(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree of so many nodes, or of as many as are fastest here; it drafts."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("BATON_CACHE", str(folder / "cache"))
    monkeypatch.setattr(calibration, "NODES", 40)
    command = ["calibrate-tree", folder / "target"]
    given = ["--data", folder / "prompts.txt", "--max-new-tokens", 20, "--out", folder / "tree.json"]
    done = run_in(folder, *command, "stand", *given, "--nodes", 7, "--temperature", 0.5)
    assert done.exit_code == 0 and "7 nodes" in done.stderr and "stand:tree=" in done.stderr, done.stderr
    saved = json.loads((folder / "tree.json").read_text())
    assert len(saved["paths"]) == 7 and saved["ranks"] == 10 and saved["about"]["prompts"] == 5
    done = run_in(folder, *command, "token-recycling:shared=true", *given, "--nodes", "auto", "--threads", 1)
    assert done.exit_code == 0 and "token-recycling:tree=" in done.stderr, done.stderr
    assert 1 <= len(json.loads((folder / "tree.json").read_text())["paths"]) <= 40
    for arguments, message in ((["stand", "--nodes", "0"], "or auto"), (["aded"], "aded fills no tree of ranks")):
        refused = run_in(folder, *command, *arguments, *given)
        assert refused.exit_code == 2 and message in refused.stderr
