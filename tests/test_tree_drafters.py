"""Trees drawn from a small model keep the target's law, grow where they should, and PEARL never waits for nothing."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from baton.audit.exact import _law
from baton.draft import ROOT, Draft
from baton.drafters.dyspec import Drawn, DySpec, affordable
from baton.drafters.parts.gumbel import conditioned, gumbel_top_k, noise
from baton.drafters.parts.tree_model import Likely
from baton.drafters.parts.urn import Urn
from baton.drafters.pearl import Pearl
from baton.drafters.rsd import ConstantBranching, StochasticBeams
from baton.engine import Engine, generate
from baton.engine.request import Request
from baton.engine.text import TextStream
from baton.errors import UnknownOption
from baton.types import Output, Sampling

SAMPLED = Sampling(temperature=1.2, top_k=6, seed=3)
TREES: dict[str, Callable[[], Any]] = {
    "rsd-c": lambda: ConstantBranching(branching="3-2"),
    "rsd-s": lambda: StochasticBeams(beams=3, max_depth=2),
    "dyspec": lambda: DySpec(num_draft_tokens=5),
    "dyspec, threshold": lambda: DySpec(num_draft_tokens=20, threshold=0.1),
}


def using(writer: Any, drafter: Any) -> Any:
    drafter.load = lambda engine: writer
    return drafter


def noisy(share: float = 0.1) -> Any:
    """The tiny target with noise on its weights: what the two expect overlaps."""
    writer = tiny.language_model("llama")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in writer.model.parameters():
            weight.add_(share * weight.std() * torch.randn(weight.shape, generator=generator))
    return writer


def proposing(drafter: Any) -> list[Draft]:
    """What it proposes is kept in the list."""
    made: list[Draft] = []
    propose = drafter.propose

    def listening(requests: Sequence[Request]) -> list[Draft]:
        drafts: list[Draft] = propose(requests)
        made.extend(drafts)
        return drafts

    drafter.propose = listening
    return made


def request(key: int = 0, sampling: Sampling = SAMPLED, tokens: Sequence[int] = (5,)) -> Request:
    made = Request(
        index=0, key=key, prompt="", prompt_ids=[], context=[], sampling=sampling, limit=99,
        stream=TextStream(tiny.tokenizer(), ()), follow=False,
    )  # fmt: skip
    made.tokens.extend(tokens)
    return made


@pytest.mark.parametrize("name", TREES)
def test_the_joint_law_is_the_targets(name: str) -> None:
    """Chi-square of two tokens, where the small model is another, and where the children's number varies."""
    writer = tiny.language_model("llama")
    spec: Any = using(noisy(), TREES[name]())
    chi_square, p = _law(writer, spec, tiny.PROMPTS[0], 1500)
    assert p > 1e-4, chi_square


@pytest.mark.parametrize("name", TREES)
def test_children_are_different_possible_and_said_to_be_drawn(name: str) -> None:
    """Siblings are distinct tokens of the processed distribution; every parent's distribution is kept."""
    writer = tiny.language_model("llama")
    drafter = using(noisy(), TREES[name]())
    made = proposing(drafter)
    generate(writer, tiny.PROMPTS, max_new_tokens=8, sampling=SAMPLED, drafter=drafter, batch_size=3)
    assert any(len(draft.drawn) > 1 for draft in made)
    for draft in made:
        parents = {*draft.tree.parents}
        assert set(draft.drawn) == parents
        for parent in parents:
            q = draft.drawn[parent]
            assert isinstance(q, Tensor) and int((q > 0).sum()) == 6 and abs(float(q.sum()) - 1) < 1e-5
            siblings = [draft.tokens[node] for node in draft.tree.children(parent)]
            assert len(set(siblings)) == len(siblings) and bool((q[siblings] > 0).all())


@pytest.mark.parametrize("name", TREES)
def test_first_children_are_accepted_where_both_models_expect_the_same(name: str) -> None:
    writer = tiny.language_model("llama")
    drafter = using(writer, TREES[name]())
    made = proposing(drafter)
    (output,) = generate(writer, tiny.PROMPTS[0], max_new_tokens=20, sampling=SAMPLED, drafter=drafter)
    for step, draft in zip(output.steps[:-1], made, strict=False):
        depth, node = 0, ROOT
        while children := draft.tree.children(node):
            depth, node = depth + 1, children[0]
        assert step.accepted == depth


def test_no_two_drafts_share_their_noise() -> None:
    """Another request, seed, step or level: other numbers; the same again: the same."""
    first = noise(request(), 0, 1, 9)
    assert torch.equal(first, noise(request(), 0, 1, 9))
    later = request()
    later.steps.append(Any)  # type: ignore[arg-type]
    for other in (noise(request(1), 0, 1, 9), noise(request(), 1, 1, 9), noise(later, 0, 1, 9)):
        assert not torch.equal(first, other)


def test_gumbel_top_k_and_urns_draw_as_one_by_one() -> None:
    """Frequencies of ordered pairs drawn without replacement are q(a) q(b) / (1 - q(a))."""
    q = torch.tensor([0.5, 0.0, 0.2, 0.2, 0.1])
    generator = torch.Generator().manual_seed(0)
    runs = 20000
    exponential = -torch.rand(runs, 5, generator=generator, dtype=torch.float64).log()
    pairs = [tuple(t for t, _ in row) for row in gumbel_top_k(q.expand(runs, 5), 2, exponential)]
    numbers = torch.rand(runs // 4, 2, generator=generator, dtype=torch.float64).tolist()
    urns = []
    for first, second in numbers:
        urn = Urn(q, 0.0)
        urns.append((urn.draw(first)[0], urn.draw(second)[0]))  # type: ignore[index]
    for drawn in (pairs, urns):
        counts, total = Counter(drawn), 0.0
        for a in (0, 2, 3, 4):
            for b in {0, 2, 3, 4} - {a}:
                expected = len(drawn) * float(q[a] * q[b] / (1 - q[a]))
                total += (counts.pop((a, b)) - expected) ** 2 / expected
        assert not counts and total < 40, total  # 11 degrees of freedom: probability 0.00004
    assert [t for t, _ in gumbel_top_k(q[None], 9, torch.ones(1, 5, dtype=torch.float64))[0]][0::3] == [0, 4]


def test_an_urn_values_the_next_draw() -> None:
    """Values are known before the draw: what it is worth that none of those before is right."""
    urn = Urn(torch.tensor([0.5, 0.25, 0.25]), math.log(0.8))
    token, after = urn.draw(0.1) or (-1, 0.0)
    assert token == 0 and math.isclose(math.exp(after), 0.8 * 0.5) and math.isclose(math.exp(urn.value), 0.8 * 0.5)
    token, after = urn.draw(0.99) or (-1, 0.0)
    assert token == 2 and math.isclose(math.exp(after), 0.4 * 0.5) and math.isclose(math.exp(urn.value), 0.2)
    token, after = urn.draw(0.0) or (-1, 0.0)
    assert token == 1 and math.isclose(math.exp(after), 0.2) and urn.value == -math.inf
    assert Urn(torch.full((3,), torch.nan), 0.0).draw(0.5) is None


def test_conditioned_gumbels() -> None:
    """The best child takes its parent's value, the others keep their order below; as the formula says."""
    values = [2.0, 1.5, -3.0, -40.0]
    found = [conditioned(value, 2.0, -0.7) for value in values]
    assert found[0] == -0.7 and found == sorted(found, reverse=True)
    for value, each in zip(values[1:], found[1:], strict=True):
        plain = -math.log(math.exp(0.7) - math.exp(-2.0) + math.exp(-value))
        assert math.isclose(each, plain, rel_tol=1e-9)


def test_one_beam_is_one_sample() -> None:
    """And several beams keep the best child's value on the way down."""
    writer = tiny.language_model("llama")
    for beams in (1, 4):
        drafter = using(noisy(), StochasticBeams(beams=beams, max_depth=4))
        made = proposing(drafter)
        generate(writer, tiny.PROMPTS[:2], max_new_tokens=9, sampling=SAMPLED, drafter=drafter)
        assert made[0].tree.depth == 4
        for draft in made:
            assert all(draft.tree.depths.count(level + 1) <= beams for level in range(4))
            assert beams > 1 or draft.tree.is_chain
            for parent in set(draft.tree.parents):
                scores = [draft.scores[node] for node in draft.tree.children(parent)]
                assert scores[0] == (draft.scores[parent] if parent != ROOT else 0.0)
                assert scores == sorted(scores, reverse=True)


def grown(made: Drawn | Likely, q: Callable[[list[int]], Tensor]) -> Draft:
    """A tree grown on distributions that depend on the path."""
    while made.frontier:
        made.frontier = made.read(torch.stack([q(made.path(node)) for node in made.frontier]))
    return made.draft("dyspec")


def by_path(path: list[int], sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(hash(tuple(path)) % 2**31)
    return (sharpness * torch.randn(12, generator=generator)).softmax(-1)


def slots(draft: Draft) -> dict[tuple[int, ...], int]:
    """Ranks on the way to each node -> its token."""
    ranks: dict[int, tuple[int, ...]] = {ROOT: ()}
    for node, parent in enumerate(draft.tree.parents):
        ranks[node] = (*ranks[parent], draft.tree.children(parent).index(node))
    return {ranks[node]: token for node, token in enumerate(draft.tokens)}


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling()], ids=["drawn", "greedy"])
def test_the_best_place_comes_first_and_a_threshold_finds_the_same_places(sampling: Sampling) -> None:
    """Values fall; all places worth as much as the last one are those of the threshold."""
    for key in range(20):
        kind = Likely if sampling.greedy else Drawn
        more = (8,) if sampling.greedy else ()
        best = grown(kind(request(key, sampling), 9, 14, *more, 0.0), by_path)  # type: ignore[arg-type]
        assert len(best) == 14
        if not sampling.greedy:  # nodes stand in the order in which they were decided on
            assert all(a >= b for a, b in zip(best.scores, best.scores[1:], strict=False))
        least = math.exp(min(best.scores)) * (1 - 1e-9)
        more = (99,) if sampling.greedy else ()
        level = grown(kind(request(key, sampling), 9, 99, *more, least), by_path)  # type: ignore[arg-type]
        assert slots(level) == slots(best)
        for node, parent in enumerate(best.tree.parents):
            assert parent == ROOT or best.scores[node] <= best.scores[parent]


def test_greedy_trees_hold_the_most_probable_paths() -> None:
    """Of all paths, counted one by one."""
    found = grown(Likely(request(0, Sampling()), 3, 10, 2), by_path)
    everything: dict[tuple[int, ...], float] = {(): 0.0}
    for depth in range(3):
        for path in [path for path in everything if len(path) == depth]:
            for token, value in enumerate(by_path(list(path)).log().tolist()):
                everything[*path, token] = everything[path] + value
    del everything[()]
    wanted = sorted(everything, key=lambda path: -everything[path])[:10]
    assert {tuple(found.tokens[n] for n in found.tree.path(node)) for node in range(10)} == set(wanted)


@pytest.mark.parametrize("sampling", [SAMPLED, Sampling()], ids=["drawn", "greedy"])
def test_a_sure_drafter_gives_a_chain_and_an_unsure_one_a_wide_tree(sampling: Sampling) -> None:
    def make() -> Drawn | Likely:
        if sampling.greedy:
            return Likely(request(0, sampling), 20, 8, 8)
        return Drawn(request(0, sampling), 20, 8, 0.0)

    assert grown(make(), lambda path: by_path(path, 60.0)).tree.depth >= 7
    flat = grown(make(), lambda path: torch.full((12,), 1 / 12))
    assert flat.tree.depth == 1 and len(flat) == 8


def test_a_tree_as_large_as_twice_a_plain_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    class Costs:
        def cost(self, rows: int, context: int) -> float:
            return 1.0

        def price(self, context: int) -> dict[int, float]:
            return {1: 1.0, 8: 1.4, 16: 1.9, 32: 2.6}

    monkeypatch.setattr("baton.drafters.dyspec.quick_profile", lambda writer: Costs())
    assert affordable(tiny.language_model("llama")) == 15
    drafter = using(noisy(), DySpec(num_draft_tokens=0))
    made = proposing(drafter)
    generate(tiny.language_model("llama"), tiny.PROMPTS[0], max_new_tokens=20, drafter=drafter)
    assert len(made[0]) == 15


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantBranching(branching="3-0-1"), "branching='3-0-1' is not possible: .* such as 3-2-1-1"),
        (lambda: ConstantBranching(branching=""), "each 1 or more"),
        (lambda: StochasticBeams(beams=0), "beams=0 is not possible"),
        (lambda: DySpec(num_draft_tokens=-1), "num_draft_tokens=-1 is not possible"),
        (lambda: DySpec(threshold=1.0), "threshold=1.0 is not possible"),
        (lambda: Pearl(num_draft_tokens=1), "num_draft_tokens=1 is not possible: give 2 or more"),
    ],
)
def test_impossible_options(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnknownOption, match=message):
        make()


def test_levels_have_as_many_children_as_asked() -> None:
    writer = tiny.language_model("llama")
    for sampling in (Sampling(), SAMPLED):
        drafter = using(noisy(), ConstantBranching(branching="3-2-1"))
        made = proposing(drafter)
        generate(writer, tiny.PROMPTS[0], max_new_tokens=9, sampling=sampling, drafter=drafter)
        assert Counter(made[0].tree.depths) == {1: 3, 2: 6, 3: 6}
        assert bool(made[0].drawn) is not sampling.greedy


def emitted(output: Output) -> list[int]:
    return [step.emitted for step in output.steps]


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_pearl_drafts_the_same_with_a_worker_and_in_turn(sampling: Sampling) -> None:
    """The same drafts and the same texts, those of plain decoding, in ragged batches."""
    writer, runs = tiny.language_model("llama"), []
    for workers in (True, False):
        drafter = using(noisy(0.05), Pearl(num_draft_tokens=3, workers=workers))
        made = proposing(drafter)
        outputs = generate(writer, tiny.PROMPTS, max_new_tokens=15, sampling=sampling, drafter=drafter, batch_size=3)
        runs.append(([(draft.tokens, draft.source) for draft in made], [o.token_ids for o in outputs]))
    assert runs[0] == runs[1] and any(tokens for tokens, _ in runs[0][0])
    plain = generate(writer, tiny.PROMPTS, max_new_tokens=15, sampling=sampling)
    assert runs[0][1] == [output.token_ids for output in plain]


@pytest.mark.parametrize("gamma", [2, 4])
def test_pearl_with_a_perfect_small_model(gamma: int) -> None:
    """Every pass after the first emits gamma tokens, up to the end."""
    writer = tiny.language_model("llama")
    drafter = using(tiny.language_model("llama"), Pearl(num_draft_tokens=gamma))
    for output in generate(writer, tiny.PROMPTS[:3], max_new_tokens=24, drafter=drafter):
        found = emitted(output)
        assert found[0] == 1 and found[1:-1] == [gamma] * (len(found) - 2) and found[-1] <= gamma


def test_pearl_with_a_hopeless_small_model() -> None:
    """One token per pass, no draft is ever proposed, and its cache does not outgrow the text by more than gamma."""
    writer = tiny.language_model("llama")
    for plain in generate(writer, tiny.PROMPTS[:3], max_new_tokens=12):
        answer = plain.token_ids
        drafter = using(tiny.language_model("llama"), Pearl(num_draft_tokens=4))
        made, feed, longest = proposing(drafter), drafter.feed, []

        def mistaken(rows: list[list[int]]) -> Tensor:
            logits: Tensor = feed(rows)  # noqa: B023 (called before the next turn)
            (fed,) = drafter.fed  # noqa: B023
            longest.append(len(fed))  # noqa: B023
            if len(fed) < len(answer):  # noqa: B023
                logits[0, answer[len(fed)]] = -torch.inf  # noqa: B023 (what the target says next, it does not)
            return logits

        drafter.feed = mistaken
        (output,) = generate(writer, plain.prompt, max_new_tokens=12, drafter=drafter)
        assert output.token_ids == answer and emitted(output) == [1] * (len(answer) - 1)
        assert not any(map(len, made)) and longest[:5] == [
            1,
            2,
            3,
            4,
            2,
        ]  # the newest token, three of its own, cut back


def test_a_worker_that_dies_leaves_plain_decoding(caplog: pytest.LogCaptureFixture) -> None:
    """Said once, no text changes, rows join and leave; when all have ended, drafting starts afresh."""
    writer = tiny.language_model("llama")
    drafter = using(tiny.language_model("llama"), Pearl(num_draft_tokens=3))
    feed, calls = type(drafter).feed, 0

    def dying(rows: list[list[int]]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise RuntimeError("out of memory")
        logits: Tensor = feed(drafter, rows)
        return logits

    drafter.feed = dying
    engine = Engine(writer, drafter, max_rows=2)
    plain = [o.token_ids for o in generate(writer, tiny.PROMPTS, max_new_tokens=15)]
    threads = torch.get_num_threads()
    with caplog.at_level(logging.WARNING):
        outputs = generate(engine, tiny.PROMPTS, max_new_tokens=15)
    assert [output.token_ids for output in outputs] == plain
    assert [record.name for record in caplog.records] == ["baton.drafters.pearl"]
    assert "goes on without drafts" in caplog.text and "out of memory" in caplog.text
    first, last = outputs[-1], outputs[2]  # the longest and the shortest prompt: written first and last
    assert emitted(first) == [1, 3, 3] + [1] * 7 and emitted(last) == [1, 3, 3, 3, 3, 1]
    assert torch.get_num_threads() == threads


def test_a_step_that_fails_leaves_no_worker_behind() -> None:
    """The target fails in the middle of a step, which is tried again; rows join and are cancelled in between."""
    writer = tiny.language_model("llama")
    plain = {o.prompt: o.token_ids for o in generate(writer, tiny.PROMPTS, max_new_tokens=15)}
    engine = Engine(writer, using(noisy(0.02), Pearl(num_draft_tokens=3)), max_rows=4)
    forward, calls = engine.target.forward, 0

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise RuntimeError("busy")
        return forward(*args, **kwargs)

    engine.target.forward = failing  # type: ignore[method-assign]
    requests = engine.requests(tiny.PROMPTS, max_new_tokens=15)
    for one in requests:
        engine.submit([one])
    while not engine.idle:
        try:
            engine.step()
        except RuntimeError:
            if len(requests[0].tokens) > 3:
                engine.cancel(requests[0])
    assert [r.tokens for r in requests[1:]] == [plain[r.prompt] for r in requests[1:]]


def test_the_draft_length_of_pearl_follows_the_times() -> None:
    drafter = using(noisy(), Pearl())
    Engine(tiny.language_model("llama"), drafter)
    assert drafter._length() == 4
    for target_s, token_s, length in ((0.07, 0.01, 7), (0.01, 0.01, 2), (1.0, 0.01, 16)):
        drafter._target_s, drafter._token_s = target_s, token_s
        assert drafter._length() == length
