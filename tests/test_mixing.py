"""Drafters of drafters: `mix` puts several into one tree, `controller` decides how much of one is worth verifying."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch

import baton.engine.loop
from baton.draft import NOTHING, Draft, Tree
from baton.drafters import make
from baton.drafters.controller import Controller
from baton.drafters.mix import Mix
from baton.drafters.parts.worth import SIZES, Worth, cut
from baton.engine import Engine, generate
from baton.engine.drafter import Drafter, Seen
from baton.engine.request import Request
from baton.errors import UnknownOption
from baton.runtime.profile import CostProfile
from baton.types import Output

LENGTH = 100


class Script(Drafter):
    """Drafts a chain that a function makes of (the right tokens to come, how many are written)."""

    def __init__(self, name: str, answers: dict[str, list[int]], make: Callable[[list[int], int], list[int]]) -> None:
        self.name, self.answers, self.make = name, answers, make
        self.asked = 0
        self.seen: list[Seen] = []

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        self.asked += 1
        return [self.draft(request) for request in requests]

    def draft(self, request: Request) -> Draft:
        written = len(request.tokens)
        tokens = self.make(self.answers[request.prompt][written:], written)[: max(request.room, 0)]
        return Draft.chain(tokens, self.name) if tokens else NOTHING

    def observe(self, seen: Seen) -> None:
        self.seen.append(seen)


def right(count: int) -> Callable[[list[int], int], list[int]]:
    return lambda after, _: after[:count]


def wrong(count: int) -> Callable[[list[int], int], list[int]]:
    return lambda after, _: [(token + 1) % tiny.VOCAB for token in after[:count]]


@pytest.fixture(scope="module")
def writer() -> Any:
    return tiny.language_model("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def answers(writer: Any) -> dict[str, list[int]]:
    made = generate(writer, tiny.PROMPTS, max_new_tokens=LENGTH)
    return {output.prompt: output.token_ids for output in made}


# --- mix -------------------------------------------------------------------------------------------------------------


def mixed(*drafters: Drafter, **options: Any) -> Mix:
    made = Mix(**options)
    made.drafters = list(drafters)
    return made


def test_the_better_drafter_gets_the_room(writer: Any, answers: dict[str, list[int]]) -> None:
    """Two drafters, one of them always wrong: after a few steps the tree holds the other one's chain whole."""
    good, bad = Script("good", answers, right(5)), Script("bad", answers, wrong(5))
    outputs = generate(writer, tiny.PROMPTS, drafter=mixed(bad, good, num_draft_tokens=5), max_new_tokens=LENGTH)
    assert [output.token_ids for output in outputs] == list(answers.values())
    long = max(outputs, key=lambda output: len(output.token_ids))
    late = long.steps[6:-2]
    assert late and all(step.accepted == 5 and step.drafted == {"good": 5} for step in late)


def test_a_tree_holds_what_both_propose_once_and_knows_who(writer: Any, answers: dict[str, list[int]]) -> None:
    first, second = Script("first", answers, right(2)), Script("second", answers, right(4))
    lie = Script("lie", answers, wrong(1))
    mix = mixed(first, second, lie, num_draft_tokens=20)
    outputs = generate(writer, tiny.PROMPTS[:2], drafter=mix, max_new_tokens=LENGTH)
    for seen in first.seen[:-1]:
        for request, draft in zip(seen.requests, seen.drafts, strict=True):
            truth = answers[request.prompt][len(request.tokens) :][:4]
            if len(truth) == 4 and request.room >= 4:
                paths = {tuple(draft.tokens[n] for n in draft.tree.path(node)) for node in range(len(draft))}
                lies = {((truth[0] + 1) % tiny.VOCAB,)}
                assert paths == {tuple(truth[:end]) for end in range(1, 5)} | lies
                named = dict(zip(draft.tokens, draft.sources(), strict=True))
                assert named[truth[3]] in ("second", named[truth[3]]) and draft.sources().count("first") == 2
    drafted = sum(step.drafted.get("lie", 0) for output in outputs for step in output.steps)
    accepted = sum(source == "lie" for output in outputs for source in output.sources)
    assert drafted > 0 and accepted == 0


def test_what_cannot_be_mixed_is_refused() -> None:
    with pytest.raises(UnknownOption, match="draws its drafts"):
        make("mix:of=prompt-lookup+[draft-model:model=x,sample=true]")
    with pytest.raises(UnknownOption, match="brackets"):
        make("mix:of=[prompt-lookup")
    with pytest.raises(UnknownOption, match="no drafting method"):
        make("mix:of=prompt-lookup+promt")
    assert [d.name for d in make("mix:of=prompt-lookup+[token-recycling:num_draft_tokens=7]").drafters] == [  # type: ignore[attr-defined]
        "prompt-lookup",
        "token-recycling",
    ]


# --- controller ------------------------------------------------------------------------------------------------------


class Clock:
    """Time that only passes of the target, and drafting, let pass: a pass over n tokens takes 1 + 0.1 (n - 1) s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(baton.engine.loop, "perf_counter", lambda: self.now)

    def watch(self, engine: Engine, drafting: float) -> None:
        forward, drafter = engine.target.forward, engine.drafter.drafter  # type: ignore[attr-defined]
        propose = drafter.propose

        def timed_forward(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.now += 1 + 0.1 * (ids.shape[1] - 1)
            return forward(ids, *args, **kwargs)

        def timed_propose(requests: Sequence[Request]) -> list[Draft]:
            self.now += drafting
            return propose(requests)

        engine.target.forward = timed_forward  # type: ignore[method-assign]
        drafter.propose = timed_propose


COSTS = CostProfile((1,), (0,), (1, 2), (((1.0, 1.1),),), {})


def governed(
    writer: Any, drafter: Drafter, monkeypatch: pytest.MonkeyPatch, drafting: float, prompts: list[str], length: int
) -> tuple[list[Output], float]:
    """What was written one after the other, and seconds per plain second of it."""
    controller = Controller()
    controller.drafter = drafter
    engine = Engine(writer, controller, max_rows=1)
    controller.costs = COSTS
    clock = Clock(monkeypatch)
    clock.watch(engine, drafting)
    outputs = [generate(engine, prompt, max_new_tokens=length)[0] for prompt in prompts]
    steps = sum(len(output.token_ids) - 1 for output in outputs)
    return outputs, sum(output.timings.decode_s for output in outputs) / steps


@pytest.fixture(scope="module")
def long_answers(writer: Any) -> dict[str, list[int]]:
    made = generate(writer, tiny.PROMPTS[:3], max_new_tokens=400)
    assert sum(len(output.token_ids) for output in made) > 900
    return {output.prompt: output.token_ids for output in made}


@pytest.mark.parametrize("drafting", [0.0, 0.05, 0.5, 3.0])
def test_what_nothing_can_predict_costs_two_percent_at_most(
    drafting: float, writer: Any, long_answers: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script("hopeless", long_answers, wrong(8))
    outputs, share = governed(writer, script, monkeypatch, drafting, list(long_answers), 400)
    assert [output.token_ids for output in outputs] == list(long_answers.values())
    assert 1.0 < share < 1.02 and script.asked > 0


@pytest.mark.parametrize("drafting", [0.0, 0.5])
def test_what_is_always_right_is_used_fully(
    drafting: float, writer: Any, long_answers: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight right tokens for 1.8 s: nine times as many tokens, less the drafting, less finding out."""
    script = Script("perfect", long_answers, right(8))
    outputs, share = governed(writer, script, monkeypatch, drafting, list(long_answers), 400)
    assert [output.token_ids for output in outputs] == list(long_answers.values())
    assert share < 1.25 * (1.8 + drafting) / 9


def test_it_resumes_when_the_text_turns_predictable(
    writer: Any, long_answers: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = max(long_answers, key=lambda prompt: len(long_answers[prompt]))
    turn = 150

    def late(after: list[int], written: int) -> list[int]:
        return right(8)(after, written) if written >= turn else wrong(8)(after, written)

    outputs, _ = governed(writer, Script("late", long_answers, late), monkeypatch, 0.02, [prompt], 400)
    sources = outputs[0].sources
    assert sources[:turn].count("late") == 0
    assert sources[turn + 60 :].count("late") > 0.7 * len(sources[turn + 60 :])


def test_sizes_are_judged_by_what_they_would_have_given() -> None:
    """A tree whose second-best path is right: small sizes get nothing, those that hold the path get all of it."""
    draft = Draft(tokens=[1, 2, 3, 4], tree=Tree([-1, -1, 1, 2]), scores=[-0.1, -0.5, -0.6, -0.7])
    worth = Worth(memory=0.5)
    before = list(worth.prior)
    request: Any = type("Request", (), {})()
    worth.learn(request, draft, (1, 2, 3), whole=True)
    found = [min(max(size - 1, 0), 3) for size in SIZES]
    assert worth.of(request) == [pytest.approx((b + f) / 2) for b, f in zip(before, found, strict=True)]
    # Cut to two nodes, and both refused: of larger drafts nothing is known.
    after = list(worth.of(request))
    worth.learn(request, cut(draft, 2), (), whole=False)
    assert worth.of(request) == [pytest.approx(v / 2) for v in after[:2]] + after[2:]


def test_drawn_children_are_never_cut() -> None:
    """How many were drawn may depend on what was drawn: kept by number, they would not be drawn any more."""
    q = torch.full((9,), 1 / 9)
    draft = Draft(tokens=[1, 2, 3, 4], tree=Tree([-1, -1, 0, 1]), drawn={-1: q, 0: q, 1: q})
    assert all(cut(draft, size) is draft for size in (1, 2, 3, 4, 9))
    worth = Worth(memory=0.5)
    before, request = list(worth.prior), type("Request", (), {})()
    worth.learn(request, draft, (0, 2), whole=True)  # type: ignore[arg-type]
    found = [2 * (size >= 4) for size in SIZES]
    assert worth.of(request) == [pytest.approx((b + f) / 2) for b, f in zip(before, found, strict=True)]  # type: ignore[arg-type]


def test_impossible_shares_are_refused() -> None:
    with pytest.raises(UnknownOption, match="between 0 and 1"):
        make("controller:explore=1.5")


def test_a_controller_over_a_mixture_in_a_batch_that_rows_leave(writer: Any) -> None:
    """What a resting mixture had proposed for other rows is not asked for again."""
    prompts = [*tiny.PROMPTS, "a a a a a a", *tiny.PROMPTS]
    plain = generate(writer, prompts, max_new_tokens=40)
    found = generate(writer, prompts, max_new_tokens=40, drafter="controller:base=mix,explore=0.9", batch_size=4)
    assert [output.token_ids for output in found] == [output.token_ids for output in plain]
    assert not any(output.error for output in found)
