"""The laws every drafter keeps, on every family: drafting may change speed, never text."""

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import corpora
import handoffs
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import MaxLengthCriteria, TopKLogitsWarper

import baton
from baton.draft import NOTHING, Draft, Tree, chain
from baton.drafters import METHODS, make
from baton.drafters.draft_model import DraftModel
from baton.drafters.dynamic_exit import DynamicExit
from baton.drafters.dyspec import DySpec
from baton.drafters.pearl import Pearl
from baton.drafters.rsd import ConstantBranching, StochasticBeams
from baton.engine import Engine, generate, stream
from baton.engine.drafter import Drafter
from baton.engine.request import Request
from baton.engine.rules import Rules
from baton.errors import BatonError, DraftError, MemoryShort, ModelMismatch, UnknownOption, VocabMismatch
from baton.handoff.read import PromptEncoder
from baton.models.loading import load
from baton.models.writer import Writer
from baton.types import Output, Sampling

PROMPTS = [*tiny.PROMPTS, "a a a a a a", "The cat sat on the mat. The cat sat on"]
SAMPLED = Sampling(temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=7)
BIASED = Sampling(logit_bias=((20, 1.5), (31, -3.0)), bad_words=((44,), (9, 12)), repetition_penalty=1.2)


class Adversary(Drafter):
    """Random trees of random tokens, nothing now and then."""

    name = "adversary"

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        return [self.draft().within(max(request.room, 0)) for request in requests]

    def draft(self) -> Draft:
        count = self.number(9)
        tree = Tree(self.number(node + 1) - 1 for node in range(count))
        return Draft(tokens=[self.number(tiny.VOCAB) for _ in range(count)], tree=tree, source=self.name)

    def number(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))


class Oracle(Drafter):
    """Knows the responses, and hides the truth in a tree of lies, last among its siblings."""

    name = "oracle"

    def __init__(self, answers: dict[str, list[int]], depth: int, lies: int = 0) -> None:
        self.answers, self.depth, self.lies = answers, depth, lies

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        return [self.draft(request) for request in requests]

    def draft(self, request: Request) -> Draft:
        truth = self.answers[request.prompt][len(request.tokens) :][: min(self.depth, request.room)]
        tokens: list[int] = []
        parents: list[int] = []
        at = -1
        for token in truth:
            for lie in range(1, self.lies + 1):
                tokens.append((token + lie) % tiny.VOCAB)
                parents.append(at)
            tokens.append(token)
            parents.append(at)
            at = len(tokens) - 1
        return Draft(tokens=tokens, tree=Tree(parents), source=self.name)


class Restless(DynamicExit):
    """Drafts at each step, from another layer each time: on random models no draft of its own would seem to pay."""

    def plan(self, tables: Any) -> tuple[int, int]:
        self.turns = getattr(self, "turns", 0) + 1
        return self.turns % len(self.candidates), 1


def drafting_with(writer: Writer, drafter: Any) -> Any:
    """A method whose small model is this one."""
    drafter.load = lambda engine: writer
    return drafter


def drafters(writer: Writer, other: Writer) -> dict[str, Drafter]:
    """One of each method, with options that make it draft much."""

    class Local(DraftModel):
        def load(self, engine: Any) -> Writer:
            return other

    class Itself(DraftModel):
        def load(self, engine: Any) -> Writer:
            return writer

    rasd = make(f"rasd:datastore={corpora.noise()},min_span=1,num_draft_tokens=9,base=plain")
    rasd.drafter = Local(num_draft_tokens=5, branches=2)  # type: ignore[attr-defined]

    return {
        "prompt-lookup": make("prompt-lookup:num_draft_tokens=4"),
        "token-recycling": make("token-recycling:num_draft_tokens=20"),
        "token-recycling, shared": make("token-recycling:num_draft_tokens=12,shared=true,max_depth=3"),
        "draft-model": Local(num_draft_tokens=3),
        "draft-model, confident": Local(num_draft_tokens=4, min_confidence=0.1),
        "draft-model, tree": Local(num_draft_tokens=9, branches=3, max_depth=3),
        "draft-model, itself": Itself(num_draft_tokens=4),
        "draft-model, itself, tree": Itself(num_draft_tokens=6, branches=2, max_depth=4),
        "aded": make("aded:num_draft_tokens=20,iterations=40"),
        "stand": make("stand:num_draft_tokens=20,max_depth=5,learn_prompt=true,shared=true"),
        "stand, chosen": make("stand:sample=false,num_draft_tokens=16,rejected=true,regrow=3"),
        "layerskip": make("layerskip:exit_layer=1,num_draft_tokens=4"),
        "del": make("del"),
        "del, restless": Restless(num_draft_tokens=4),
        "rest": make(f"rest:datastore={corpora.noise()},min_span=1,num_draft_tokens=12"),
        "rasd": rasd,
        "rasd, token-recycling": make(f"rasd:datastore={corpora.noise()},min_span=1,base=token-recycling"),
        "rsd-c": drafting_with(other, ConstantBranching(branching="3-2-1")),
        "rsd-s": drafting_with(other, StochasticBeams(beams=4)),
        "dyspec": drafting_with(other, DySpec(num_draft_tokens=12)),
        "dyspec, threshold": drafting_with(writer, DySpec(num_draft_tokens=12, threshold=0.02)),
        "pearl": drafting_with(other, Pearl(num_draft_tokens=3)),
        "pearl, itself": drafting_with(writer, Pearl(num_draft_tokens=4)),
        "mix": make("mix:num_draft_tokens=9"),
        "controller": make("controller:base=[token-recycling:num_draft_tokens=12]"),
        "adversary": Adversary(),
    }


NAMES = list(drafters(None, None))  # type: ignore[arg-type]
FAMILIES = list(tiny.FAMILIES)


def texts(outputs: Sequence[Output]) -> list[Any]:
    return [(o.text, o.token_ids, o.finish_reason) for o in outputs]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_text_is_the_targets_own(name: str, family: str) -> None:
    """Greedy, biased and sampled, alone and in ragged batches that rows join and leave: same ids, same end."""
    writer, other = tiny.language_model(family), tiny.language_model(family, seed=5)
    for sampling in (Sampling(), SAMPLED, BIASED):
        plain = texts(generate(writer, PROMPTS, max_new_tokens=19, sampling=sampling))
        for batch_size in (1, 3, 16):
            drafter = drafters(writer, other)[name]
            found = generate(
                writer, PROMPTS, max_new_tokens=19, sampling=sampling, drafter=drafter, batch_size=batch_size
            )
            if sampling.greedy or not drafter.draws:  # what is drawn has plain decoding's law, not its tokens
                assert texts(found) == plain, (sampling, batch_size)
            for output in found:
                accounted(output)


class Stingy(Drafter):
    """Lets another drafter have few nodes, each row another number, none now and then."""

    name = "stingy"

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.made = drafter, 0
        self.join = drafter.join  # type: ignore[method-assign]
        self.observe, self.select = drafter.observe, drafter.select  # type: ignore[method-assign]

    def attach(self, engine: Engine) -> None:
        self.drafter.attach(engine)
        self.layers = self.drafter.layers

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        for row, request in enumerate(requests):
            request.worthwhile = (len(request.steps) + row) % 4
        drafts = self.drafter.propose(requests)
        self.begun = self.drafter.begun
        for request, draft in zip(requests, drafts, strict=True):
            assert draft.tree.depth <= request.worthwhile
            shaped = self.drafter.name in ("rsd-c", "rsd-s")  # trees of one shape: only their depth is bounded
            assert shaped or len(draft) <= request.worthwhile
        self.made += sum(map(len, drafts))
        return drafts


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("adversary", "controller")])
def test_a_drafter_makes_no_more_than_is_worthwhile(name: str) -> None:
    writer, other = tiny.language_model("llama"), tiny.language_model("llama", seed=5)
    plain = texts(generate(writer, PROMPTS, max_new_tokens=19))
    for batch_size in (1, 3):
        stingy = Stingy(drafters(writer, other)[name])
        assert texts(generate(writer, PROMPTS, max_new_tokens=19, drafter=stingy, batch_size=batch_size)) == plain
        assert stingy.made or name in ("aded", "del", "pearl")  # seldom sure of anything on random text


def accounted(output: Output) -> None:
    """Counts, provenance and tokens agree."""
    assert len(output.sources) == len(output.token_ids)
    assert sum(step.emitted for step in output.steps) == len(output.token_ids) - 1
    drafted = sum(source != "target" for source in output.sources)
    assert drafted <= sum(step.accepted for step in output.steps) <= drafted + 8  # the last may be cut
    assert all(
        0 <= step.accepted <= step.evaluated <= step.num_drafted and 1 <= step.emitted <= step.accepted + 1
        for step in output.steps
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lies", [0, 2])
def test_a_perfect_draft_is_accepted_whole(family: str, lies: int) -> None:
    """Depth k gives k + 1 tokens per step, to the last but one step, wherever the truth stands among its siblings."""
    writer = tiny.language_model(family)
    plain = generate(writer, PROMPTS, max_new_tokens=22)
    answers = {o.prompt: o.token_ids for o in plain}
    outputs = generate(writer, PROMPTS, max_new_tokens=22, drafter=Oracle(answers, 4, lies), batch_size=3)
    assert texts(outputs) == texts(plain)
    for output in outputs:
        assert all(step.emitted == 5 for step in output.steps[:-1])
        assert all(step.num_drafted == 4 * (lies + 1) for step in output.steps[:-2])


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_that_drafts_for_itself_is_always_right(family: str) -> None:
    """Its chains are accepted whole; its trees hold at least its best next token."""
    writer = tiny.language_model(family)
    made = {
        name: generate(writer, PROMPTS, max_new_tokens=21, drafter=drafters(writer, writer)[name], batch_size=3)
        for name in ("draft-model, itself", "draft-model, itself, tree")
    }
    for output in made["draft-model, itself"]:
        assert [step.emitted for step in output.steps[:-1]] == [5] * (len(output.steps) - 1)
    for output in made["draft-model, itself, tree"]:
        assert all(step.emitted >= 2 for step in output.steps[:-1])


def test_a_small_model_reads_prompts_when_a_draft_is_wanted() -> None:
    """Rows that never want one cost no pass; those that do, late, draft as if it had read them at once."""

    class Sleepy(DraftModel):
        asleep = 0

        def propose(self, requests: Sequence[Request]) -> list[Draft]:
            self.asleep -= 1
            return super().propose(requests) if self.asleep < 0 else [Draft.chain([], self.name)] * len(requests)

    writer = tiny.language_model("llama")
    plain = texts(generate(writer, PROMPTS, max_new_tokens=16))
    for asleep in (0, 4, 10**6):
        drafter = drafting_with(writer, Sleepy(num_draft_tokens=4))
        engine, read = Engine(writer, drafter, max_rows=3), 0
        prefill = drafter.target.prefill

        def counted(inputs: Any, prefill: Any = prefill) -> Any:
            nonlocal read
            read += len(inputs.mask)
            return prefill(inputs)

        drafter.target.prefill, drafter.asleep = counted, asleep
        outputs = generate(engine, PROMPTS, max_new_tokens=16)
        assert texts(outputs) == plain
        awake = [step for output in outputs for step in output.steps[:-1] if step.drafted]
        assert all(step.emitted == 5 for step in awake)
        assert read == (len(PROMPTS) if asleep < 10**6 else 0) and bool(awake) == bool(read)


@pytest.mark.parametrize("depth", [1, 3, 7])
def test_ends_inside_a_draft(depth: int) -> None:
    """End tokens, stop strings across the border of two drafts, and the limit cut where plain decoding ends."""
    writer = tiny.language_model("llama")
    plain = generate(writer, PROMPTS, max_new_tokens=30)
    answers = {o.prompt: o.token_ids + [5] * 40 for o in plain}
    for limit in range(1, 9):
        expected = texts(generate(writer, PROMPTS, max_new_tokens=limit))
        assert texts(generate(writer, PROMPTS, max_new_tokens=limit, drafter=Oracle(answers, depth))) == expected
    whole = plain[1].text
    for start in range(0, len(whole) - 4, 3):
        stop = whole[start : start + 4]
        expected = texts(generate(writer, PROMPTS, max_new_tokens=30, stop=stop))
        assert expected[1][2] == "stop"
        assert (
            texts(generate(writer, PROMPTS, max_new_tokens=30, stop=stop, drafter=Oracle(answers, depth))) == expected
        )
    end = plain[1].token_ids[6]
    writer.lm.generation_config.eos_token_id = [tiny.EOS, end]
    expected = texts(generate(writer, PROMPTS, max_new_tokens=30))
    assert expected[1][2] == "eos"
    assert texts(generate(writer, PROMPTS, max_new_tokens=30, drafter=Oracle(answers, depth))) == expected


def test_streaming_with_a_drafter_gives_the_text_in_pieces() -> None:
    writer = tiny.language_model("gpt2")
    whole = generate(writer, PROMPTS[-1], max_new_tokens=20)[0].text
    assert "".join(stream(writer, PROMPTS[-1], max_new_tokens=20, drafter="prompt-lookup")) == whole


def test_rows_join_leave_and_are_cancelled_at_any_step() -> None:
    """Requests that come while others are written, and one that is cancelled, change nothing for the rest."""
    writer, other = tiny.language_model("llama"), tiny.language_model("llama", seed=3)
    plain = {o.prompt: o.token_ids for o in generate(writer, PROMPTS, max_new_tokens=14)}
    for name in ("draft-model", "draft-model, tree", "token-recycling", "adversary"):
        engine = Engine(writer, drafters(writer, other)[name], max_rows=3)
        requests = engine.requests(PROMPTS, max_new_tokens=14)
        victim = requests[1]
        for request in requests:
            engine.submit([request])
            engine.step()
            if len(victim.tokens) > 3:
                engine.cancel(victim)
        while not engine.idle:
            engine.step()
        assert victim.finish_reason == "cancelled" and len(victim.tokens) < 14
        for request in requests:
            assert request.tokens == plain[request.prompt][: len(request.tokens)]
            assert request is victim or request.tokens == plain[request.prompt]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_not_a_number_fails_one_request_only(family: str) -> None:
    writer = tiny.language_model(family)
    plain = generate(writer, PROMPTS, max_new_tokens=9)
    engine = Engine(writer, Adversary(), max_rows=16)
    forward, calls = engine.target.forward, 0

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = forward(*args, **kwargs)
        if calls == 3 + (family == "t5"):  # an encoder-decoder's prompt pass ends in one of these
            logits[2, 0] = torch.nan
        return logits

    engine.target.forward = poisoned  # type: ignore[method-assign]
    requests = engine.requests(PROMPTS, max_new_tokens=9)
    engine.submit(requests)
    ended = []
    while not engine.idle:
        ended += engine.step().ended
    assert len(ended) == len(requests)
    failed = [r for r in requests if r.finish_reason == "error"]
    assert len(failed) == 1 and "decode step 3" in failed[0].error and "not a number" in failed[0].error
    for request, output in zip(requests, plain, strict=True):
        assert request in failed or request.tokens == output.token_ids


def test_an_engine_goes_on_after_an_error_or_a_stream_that_was_given_up() -> None:
    writer = tiny.language_model("llama")
    plain = texts(generate(writer, PROMPTS, max_new_tokens=9))
    engine = Engine(writer, "prompt-lookup", max_rows=3)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(engine, PROMPTS, max_new_tokens=9, on_token=stop)
    assert texts(generate(engine, PROMPTS, max_new_tokens=9)) == plain
    pieces = stream(engine, PROMPTS[0], max_new_tokens=60)
    next(pieces)
    with pytest.raises(BatonError, match="is writing other requests"):
        generate(engine, PROMPTS)
    pieces.close()  # type: ignore[attr-defined]
    assert texts(generate(engine, PROMPTS, max_new_tokens=9)) == plain
    with pytest.raises(BatonError, match="has its own drafter"):
        generate(engine, PROMPTS, drafter="prompt-lookup")


def test_rows_that_do_not_fit_are_refused_before_they_are_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what would fit; the model's own positions bound what is asked for."""
    writer = tiny.language_model("llama")
    each = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads, width, float32
    monkeypatch.setattr("baton.engine.loop.SMALL", 0)
    monkeypatch.setattr("baton.engine.loop.free_bytes", lambda device: 300 * each)
    longest = max(len(ids) for ids in writer.tokenizer(PROMPTS)["input_ids"]) + 60
    generate(writer, PROMPTS[:1], max_new_tokens=60)
    fitting = rf"{300 // longest} rows of that length .* 7 rows of {300 // 7} positions"
    with pytest.raises(MemoryShort, match=rf"7 rows of {longest} positions .*: {fitting}"):
        generate(writer, PROMPTS, max_new_tokens=60)


@pytest.mark.parametrize("family", ["gpt2", "bart", "marian"])
def test_rows_at_the_end_of_a_position_table(family: str) -> None:
    """Padding beside longer drafts, and large trees, reach past the table; rows and texts do not notice."""
    size = {"n_positions": 48} if family == "gpt2" else {"max_position_embeddings": 48}
    writer = tiny.language_model(family, **size)
    small = tiny.language_model("gpt2", seed=5, n_positions=24)
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[2]]
    plain = generate(writer, prompts, max_new_tokens=100, batch_size=1)
    assert {output.finish_reason for output in plain} == {"length"}
    answers = {o.prompt: o.token_ids for o in plain}

    class Small(DraftModel):
        def load(self, engine: Any) -> Writer:
            return small

    for batch_size in (1, 3):
        for drafter in (Oracle(answers, 12, 5), Oracle(answers, 12), Small(num_draft_tokens=8), Adversary(3)):
            found = generate(writer, prompts, max_new_tokens=100, drafter=drafter, batch_size=batch_size)
            assert texts(found) == texts(plain), (type(drafter), batch_size)


def test_what_stands_behind_the_end_is_not_looked_at() -> None:
    """Not a number behind an accepted end token changes nothing; behind an accepted token, that token stays."""
    writer = tiny.language_model("llama")
    plain = generate(writer, PROMPTS[1], max_new_tokens=30)[0]
    answers = {plain.prompt: [*plain.token_ids, *[5] * 9]}
    end = plain.token_ids[4]
    position = plain.token_ids.index(end)
    for stops in (True, False):
        engine = Engine(writer, Oracle(answers, 12))
        if stops:
            engine.rules = engine.chooser.rules = Rules(ends=frozenset({end}))
        forward = engine.target.forward

        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = forward(*args, **kwargs)  # noqa: B023
            logits[:, position:] = torch.nan
            return logits

        engine.target.forward = poisoned  # type: ignore[method-assign]
        (output,) = generate(engine, PROMPTS[1], max_new_tokens=30)
        assert output.token_ids[: position + 1] == plain.token_ids[: position + 1]
        assert output.finish_reason == ("eos" if stops else "length")


def test_drafts_deeper_than_the_room_left_are_refused() -> None:
    class Deep(Drafter):
        name = "deep"

        def propose(self, requests: Sequence[Request]) -> list[Draft]:
            return [Draft.chain([5] * 9) for _ in requests]

    with pytest.raises(DraftError, match="deep proposed 9 tokens in a row where 3 are left"):
        generate(tiny.language_model("t5"), "The cat.", max_new_tokens=5, drafter=Deep())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prompt-lookop", "did you mean 'prompt-lookup'"),
        ("prompt-lookup:max_ngrams=3", "did you mean 'max_ngram'"),
        ("prompt-lookup:num_draft_tokens=0", "num_draft_tokens=0 is not possible"),
        ("token-recycling:num_draft_tokens=-1", "num_draft_tokens=-1 is not possible"),
        ("token-recycling:shared=maybe", "'maybe' is not a bool"),
        ("prompt-lookup:num_draft_tokens=many", "'many' is not a int"),
        ("draft-model", "draft-model:model=FOLDER_OR_HUB_ID"),
        ("draft-model:model=x,branches=2,sample=true", "drop one"),
        ("prompt-lookup:min_ngram=5", "max_ngram=3 is not possible"),
    ],
)
def test_impossible_methods_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UnknownOption, match=message):
        generate(tiny.language_model("t5"), "The cat.", drafter=spec)


def test_every_method_of_the_table_loads() -> None:
    for name in METHODS:
        assert make(name).name == name


def test_state_does_not_leak_between_requests() -> None:
    """What an earlier request taught is used only where asked for."""
    writer = tiny.language_model("llama")
    steps = {}
    for spec in ("token-recycling", "token-recycling:shared=true"):
        drafter = make(spec)
        engine = Engine(writer, drafter)
        runs = []
        for _ in range(2):
            engine.submit(engine.requests([PROMPTS[1]], max_new_tokens=24))
            request = engine.waiting[0]
            while not engine.idle:
                engine.step()
            runs.append([(s.num_drafted, s.accepted) for s in request.steps])
        steps[spec] = runs
    assert steps["token-recycling"][0] == steps["token-recycling"][1]
    first, second = steps["token-recycling:shared=true"]
    assert len(second) < len(first)


def test_another_tokenizer_drafts_through_text() -> None:
    writer = tiny.language_model("llama")
    stranger = tiny.language_model("gpt2", vocab_size=handoffs.OTHER_VOCAB)
    stranger = dataclasses.replace(stranger, tokenizer=handoffs.other_tokenizer())

    class Stranger(DraftModel):
        def load(self, engine: Any) -> Writer:
            return stranger

    encoder_decoder = tiny.language_model("t5", seed=6)
    encoder_decoder = dataclasses.replace(encoder_decoder, tokenizer=handoffs.other_tokenizer(append_eos=True))
    plain = texts(generate(writer, PROMPTS, max_new_tokens=15))
    assert texts(generate(writer, PROMPTS, max_new_tokens=15, drafter=Stranger(), batch_size=3)) == plain
    # The first tokens have no text: there is nothing to go on from.
    silent = Sampling(logit_bias=((tiny.EOS + 1, 50.0), (tiny.PAD, 49.0)), repetition_penalty=1.5)
    plain = texts(generate(writer, PROMPTS, max_new_tokens=15, sampling=silent))
    strangers = [stranger, encoder_decoder]
    for stranger in strangers:  # noqa: B007 (read by `load`)
        found = generate(writer, PROMPTS, max_new_tokens=15, sampling=silent, drafter=Stranger(), batch_size=3)
        assert texts(found) == plain
    for refused in (Stranger(realign=False), Stranger(sample=True), Stranger(branches=2)):
        with pytest.raises(VocabMismatch, match="for the target and"):
            generate(writer, "The cat.", drafter=refused)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_trees(data: st.DataObject) -> None:
    """Masks are paths, depths count them, and pruning, merging and cutting keep whole paths."""
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(data.draw(st.integers(0, 12)))]
    tree = Tree(parents)
    for node in range(len(tree)):
        path = tree.path(node)
        assert tree.depths[node] == len(path)
        assert tree.mask[node + 1].nonzero()[:, 0].tolist() == [0, *(n + 1 for n in path)]
    tokens = data.draw(st.lists(st.integers(0, 5), min_size=len(tree), max_size=len(tree)))
    scores = data.draw(st.lists(st.floats(-5, 0), min_size=len(tree), max_size=len(tree)))
    draft = Draft(tokens=tokens, tree=tree, source="a", scores=scores)
    budget, depth = data.draw(st.integers(0, 13)), data.draw(st.integers(0, 13))
    assert len(draft.prune(budget)) == min(budget, len(draft))
    for cut in (draft.prune(budget), draft.within(depth), draft.merge(draft)):
        assert words(cut) <= words(draft)
    assert words(draft.merge(Draft.chain([7, 8], "b"))) == words(draft) | {(7,), (7, 8)}
    assert words(draft.merge(draft)) == words(draft)
    assert max((len(w) for w in words(draft.within(depth))), default=0) <= depth


def words(draft: Draft) -> set[tuple[int, ...]]:
    return {tuple(draft.tokens[n] for n in draft.tree.path(node)) for node in range(len(draft))}


def test_impossible_trees_are_refused() -> None:
    q = torch.full((9,), 1 / 9)
    with pytest.raises(DraftError, match="node 1 has parent 1"):
        Tree([-1, 1])
    with pytest.raises(DraftError, match="2 nodes has 1 tokens"):
        Draft(tokens=[1], tree=chain(2))
    with pytest.raises(DraftError, match="are different"):
        Draft(tokens=[3, 3], tree=Tree([-1, -1]), drawn={-1: q})
    drawn = Draft(tokens=[3, 4], tree=Tree([-1, -1]), drawn={-1: q})
    with pytest.raises(DraftError, match="cannot be pruned"):
        drawn.prune(1)
    with pytest.raises(DraftError, match="cannot be merged"):
        drawn.merge(NOTHING)


def test_no_rule_of_that_name() -> None:
    with pytest.raises(BatonError, match="did you mean 'typical'"):
        generate(tiny.language_model("t5"), "The cat.", rule="typicall")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", [None, "token-recycling:num_draft_tokens=12", "prompt-lookup"])
def test_inside_transformers_generate(family: str, spec: str | None) -> None:
    """`custom_generate` gives the sequences of plain `generate`: padded batches, penalties, another end token."""
    writer = tiny.language_model(family)
    tokenizer, model = writer.tokenizer, writer.model
    tokenizer.padding_side = "right" if model.config.is_encoder_decoder else "left"
    inputs = dict(tokenizer(PROMPTS[:4], return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    some = model.generate(**inputs, max_new_tokens=15, do_sample=False)[0, -5].item()
    for options in ({}, {"repetition_penalty": 1.4}, {"eos_token_id": [some]}):
        wanted = model.generate(**inputs, max_new_tokens=15, do_sample=False, **options)
        found = model.generate(
            **inputs, max_new_tokens=15, do_sample=False, custom_generate=baton.custom_generate(spec), **options
        )
        assert torch.equal(found, wanted), options
    torch.manual_seed(3)
    drawn = model.generate(**inputs, max_new_tokens=9, do_sample=True, custom_generate=baton.custom_generate(spec))
    torch.manual_seed(3)
    plain = model.generate(**inputs, max_new_tokens=9, do_sample=True, custom_generate=baton.custom_generate())
    assert torch.equal(drawn, plain)


def test_a_streamer_and_padding_of_custom_generate() -> None:
    """The streamer gets the prompt, then every token; rows that end early are padded as transformers pads them."""

    class Listener:
        def __init__(self) -> None:
            self.got: list[int] = []
            self.ended = False

        def put(self, ids: torch.Tensor) -> None:
            self.got += ids.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    writer = tiny.language_model("gpt2")
    model: Any = writer.model
    model.generation_config.pad_token_id = model.config.pad_token_id = None
    ids = torch.tensor([[5, 6, 7], [9, 8, 12]])
    listener = Listener()
    streamed = baton.custom_generate("prompt-lookup", streamer=listener)
    alone = model.generate(ids[:1], max_new_tokens=6, do_sample=False, custom_generate=streamed)
    assert listener.got == alone[0].tolist() and listener.ended
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)
    end = [int(wanted[0, 6])]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, custom_generate=baton.custom_generate()), expected)


def test_a_draft_model_inside_transformers_generate(tmp_path: Path) -> None:
    writer, other = tiny.language_model("llama"), tiny.language_model("llama", seed=5)
    other.model.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 20]])
    model: Any = writer.model
    found = model.generate(
        ids, max_new_tokens=9, do_sample=False, custom_generate=baton.custom_generate(f"draft-model:model={tmp_path}")
    )
    assert torch.equal(found, model.generate(ids, max_new_tokens=9, do_sample=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGram"),
        ({"num_beams": 2}, "beams"),
        ({"output_scores": True}, "scores"),
        ({"logits_processor": [TopKLogitsWarper(3)]}, "TopK"),
        ({"stopping_criteria": [MaxLengthCriteria(5)]}, "MaxLength"),
    ],
)
def test_what_custom_generate_cannot_apply_is_refused(options: dict[str, Any], message: str) -> None:
    writer = tiny.language_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(BatonError, match=message):
        writer.model.generate(ids, max_new_tokens=4, custom_generate=baton.custom_generate(), **options)


def test_asynchronous_requests_share_the_loop() -> None:
    """Together, streamed, and one that is given up: the same texts as one after the other."""
    writer = tiny.language_model("llama")
    plain = {o.prompt: o.text for o in generate(writer, PROMPTS, max_new_tokens=12)}

    async def main() -> None:
        engine = baton.AsyncEngine(Engine(writer, "prompt-lookup", max_rows=2))

        async def read(prompt: str) -> str:
            return "".join([piece async for piece in engine.stream(prompt, max_new_tokens=12)])

        async def give_up() -> None:
            async for _ in engine.stream(PROMPTS[1], max_new_tokens=40):
                return

        texts = await asyncio.gather(*(read(prompt) for prompt in PROMPTS), give_up())
        assert texts[:-1] == [plain[prompt] for prompt in PROMPTS]
        outputs = await asyncio.gather(*(engine.generate(prompt, max_new_tokens=12) for prompt in PROMPTS))
        assert [output.text for output in outputs] == [plain[prompt] for prompt in PROMPTS]
        with pytest.raises(BatonError, match="empty"):
            await engine.generate("")
        assert engine.engine.idle

    asyncio.run(main())


@pytest.mark.parametrize("case", [handoffs.CASES[0], handoffs.CASES[2]], ids=str)
def test_a_handoff_is_drafted_for_and_drafts_for_its_llm(
    case: handoffs.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lossless both ways. As a drafter it starts from the states that its LLM has just made: nothing is read twice."""
    model = handoffs.handoff(case)
    model.save_pretrained(tmp_path)
    plain = texts(generate(model, handoffs.PROMPTS, max_new_tokens=14))
    for spec in ("prompt-lookup", "token-recycling:num_draft_tokens=12"):
        assert texts(generate(model, handoffs.PROMPTS, max_new_tokens=14, drafter=spec, batch_size=3)) == plain

    def no(*_: Any) -> None:
        raise AssertionError("the LLM read a second time")

    monkeypatch.setattr(PromptEncoder, "__call__", no)
    llm = load(handoffs.folder(case.llm), dtype=torch.float32)
    expected = texts(generate(llm, handoffs.PROMPTS, max_new_tokens=14))
    spec = f"handoff:model={tmp_path}"
    assert texts(generate(llm, handoffs.PROMPTS, max_new_tokens=14, drafter=spec, batch_size=3)) == expected
    with pytest.raises(ModelMismatch, match="was trained with the LLM"):
        generate(tiny.language_model("t5", seed=77), "The cat.", drafter=spec)
