"""Drafting with the target's first layers: the pass that goes on, LayerSkip, DEL, and training for both."""

import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from handoffs import MANY, OPTIONS
from torch import Tensor

from baton.audit.exact import _law
from baton.cache import Memory
from baton.draft import Draft
from baton.drafters import make
from baton.drafters.dynamic_exit import DynamicExit, best_exit, rates, thresholds
from baton.engine import Engine, generate
from baton.engine.drafter import Drafter
from baton.errors import BatonError, UnknownOption, UnsupportedModel
from baton.models.adapter import Target, target_for
from baton.models.loading import LanguageModel
from baton.models.prompts import pad_right
from baton.models.text import TextToText
from baton.models.writer import PromptInputs
from baton.runtime import native, prepare
from baton.train.dataset import PairDataset
from baton.train.layerskip import EarlyExits, LayerSkipOptions, StepCounter, dropout_rates, exit_weights
from baton.train.trainer import make_trainer, run
from baton.types import Sampling
from baton.verify import Verdict

PROMPTS = [*tiny.PROMPTS[:3], "a a a a a a"]
SAMPLED = Sampling(temperature=1.3, top_k=40, top_p=0.95, repetition_penalty=1.1, seed=7)
CAUSAL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 4}
T5 = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 96, "num_layers": 4, "num_decoder_layers": 4}
DEPTH = {"t5": {"num_layers": 4, "num_decoder_layers": 4}, "gpt2": {"n_layer": 4}, "llama": {"num_hidden_layers": 4}}
for family in ("bart", "marian"):
    DEPTH[family] = {"decoder_layers": 4, "encoder_layers": 4}
MODELS: dict[str, Callable[[], Any]] = {
    family: lambda family=family: tiny.FAMILIES[family](**DEPTH[family])  # type: ignore[misc]
    for family in tiny.FAMILIES
} | {"llama, native": lambda: tiny.llama(**CAUSAL), "t5, native": lambda: tiny.t5(**T5)}


def model_of(name: str) -> Any:
    model = MODELS[name]()
    if "native" in name:
        try:
            native.kernels()
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"the C kernels cannot be compiled here: {error}")
        assert prepare(model, "native") == "native"
    return model


def writer_of(name: str) -> LanguageModel:
    model = model_of(name)
    return LanguageModel(model, tiny.tokenizer(append_eos=model.config.is_encoder_decoder), f"tiny {name}")


def with_idle_layers(first: int) -> LanguageModel:
    """A Llama of 4 layers, of which those from the `first` on add nothing."""
    model = tiny.llama(num_hidden_layers=4)
    with torch.no_grad():
        for layer in model.model.layers[first:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return LanguageModel(model, tiny.tokenizer(append_eos=False), "tiny")


def prefilled(target: Target) -> Memory:
    ids, mask = pad_right([[5, 6, 7, 8, 9, 10], [30, 31], [40, 41, 42, 43]])
    return target.prefill(PromptInputs(ids=ids, mask=mask))[1]


def close(found: Tensor, expected: Tensor) -> None:
    size = max(1.0, float(expected.detach().abs().max()))  # T5's states are large, and so is what rounding does to them
    torch.testing.assert_close(found.float(), expected.float(), atol=1e-4 * size, rtol=2e-4)


def slots(memory: Memory) -> list[Tensor]:
    """What is in use, row by row, of every layer."""
    tensors = [tensor for tensor in (*memory.own.keys, *memory.own.values) if tensor is not None]
    return [tensor[row, :, :length] for tensor in tensors for row, length in enumerate(memory.lengths)]


# --- The seam ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("exit_layer", [1, 3])
def test_a_pass_that_was_begun_is_the_whole_pass(name: str, exit_layer: int) -> None:
    """Logits, outputs of the layers above, and the memory after rows of which each keeps another number of tokens."""
    with torch.inference_mode():
        target = target_for(model_of(name))
        ids = torch.tensor([[20, 21, 22, 23], [30, 31, 0, 0], [40, 0, 0, 0]])  # drafts of 3, 1 and 0 tokens, padded
        layers = set(range(exit_layer + 1, 5))
        plain, memory = prefilled(target), prefilled(target)
        with target.capture(layers) as expected_hidden:
            expected = target.forward(ids, plain)
        before = list(memory.lengths)
        hidden = torch.cat(
            [target.forward_layers(0, exit_layer, ids[:, i : i + 1], memory) for i in range(ids.shape[1])], 1
        )
        assert memory.lengths == [length + 4 for length in before]
        memory.truncate(before)
        with target.capture(layers) as found_hidden:
            found = target.forward(ids, memory, begun=(exit_layer, hidden))
        for row, count in enumerate((4, 2, 1)):
            close(found[row, :count], expected[row, :count])
            for layer in layers:
                close(found_hidden[layer][row, :count], expected_hidden[layer][row, :count])
        for each in (plain, memory):
            each.keep([[0, 1, 2], [0, 1], [0]])
        assert memory.lengths == plain.lengths == [length + n for length, n in zip(before, (3, 2, 1), strict=True)]
        for mine, theirs in zip(slots(memory), slots(plain), strict=True):
            close(mine, theirs)
        after = torch.tensor([[50], [51], [52]])
        close(target.forward(after, memory), target.forward(after, plain))


class Restless(DynamicExit):
    """Leaves after another layer at each step, whatever it has learned."""

    def plan(self, tables: np.ndarray) -> tuple[int, int]:
        self.turns = getattr(self, "turns", 0) + 1
        return self.turns % len(self.candidates), 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["layerskip", "del"])
def test_verification_is_a_plain_pass_and_lengths_are_even(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step, in a ragged batch: logits over the drafts, and the slots in use afterwards."""
    drafter = make("layerskip:num_draft_tokens=3") if method == "layerskip" else Restless(num_draft_tokens=3)
    engine = Engine(writer_of(name), drafter, max_rows=4)
    target = engine.target
    plain = target_for(model_of(name))
    forward = target.forward
    begun = 0

    def compared(ids: Tensor, memory: Memory, **arguments: Any) -> Tensor:
        nonlocal begun
        logits = forward(ids, memory, **arguments)
        if arguments.get("begun") is not None:
            begun += 1
            for row, request in enumerate(engine.rows):
                expected = whole(plain, request.prompt_ids, [*request.tokens, *ids[row, 1:].tolist()])
                count = 1 + len(drafts[row])
                close(logits[row, :count], expected[len(request.tokens) - 1 :][:count])
        return logits

    drafts: list[Draft] = []
    checked = engine._checked
    monkeypatch.setattr(engine, "_checked", lambda made: (drafts.clear(), drafts.extend(made), checked(made))[2])
    monkeypatch.setattr(target, "forward", compared)
    engine.submit(engine.requests(PROMPTS, max_new_tokens=9))
    while not engine.idle:
        engine.step()
        if engine.memory is not None:
            start = [len(r.prompt_ids) if target.reads_prompt else 1 for r in engine.rows]
            expected = [length + len(r.tokens) - 1 for length, r in zip(start, engine.rows, strict=True)]
            assert engine.memory.lengths == expected
    assert begun > 2


def whole(target: Target, prompt: list[int], response: list[int]) -> Tensor:
    """Logits [n, V] after each response token, in one plain pass."""
    ids, mask = pad_right([prompt])
    _, memory = target.prefill(PromptInputs(ids=ids, mask=mask))
    return target.forward(torch.tensor([response]), memory)[0]


def test_layers_run_per_step() -> None:
    """g drafted tokens cost g * E layer passes beside the L of the check: the last one is read as part of it."""
    writer, calls = writer_of("llama"), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    for layer in writer.model.model.layers:
        layer.register_forward_hook(count)
    for exit_layer in (1, 2, 3):
        for g in (1, 2, 5):
            engine = Engine(writer, make(f"layerskip:exit_layer={exit_layer},num_draft_tokens={g}"))
            engine.submit(engine.requests(PROMPTS[:1], max_new_tokens=14))
            engine.step()  # the prompt
            while not engine.idle:
                calls, (request,) = 0, engine.rows
                engine.step()
                assert calls == request.steps[-1].num_drafted * exit_layer + 4
                assert request.steps[-1].num_drafted <= g


# --- Text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5", "llama, native", "t5, native"])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_text_is_plain_for_every_exit_and_length(name: str, sampling: Sampling) -> None:
    writer = writer_of(name)

    def ids(spec: str | Drafter | None) -> list[list[int]]:
        made = generate(writer, PROMPTS, max_new_tokens=11, sampling=sampling, drafter=spec, batch_size=3)
        return [output.token_ids for output in made]

    plain = ids(None)
    for exit_layer in (1, 2, 3):
        for g in (1, 4):
            assert ids(f"layerskip:exit_layer={exit_layer},num_draft_tokens={g}") == plain
    for drafter in ("layerskip:min_confidence=0.2", "del:every=2,count_head=true", Restless(), Restless(decay=0.5)):
        assert ids(drafter) == plain


def test_rows_at_the_end_of_a_position_table() -> None:
    """A row without room for a draft lies beside one whose draft goes on, level by level."""
    writer = tiny.language_model("gpt2", n_positions=40)
    prompts = [tiny.PROMPTS[1], tiny.PROMPTS[0]]
    plain = [o.token_ids for o in generate(writer, prompts, max_new_tokens=100, batch_size=1)]
    for drafter in (make("layerskip"), Restless()):
        made = generate(writer, prompts, max_new_tokens=100, drafter=drafter, batch_size=2)
        assert [output.token_ids for output in made] == plain


@pytest.mark.parametrize("spec", ["layerskip:sample=true,num_draft_tokens=2", "del:sample=true,num_draft_tokens=2"])
def test_drawn_drafts_keep_the_law(spec: str) -> None:
    _, probability = _law(tiny.language_model("llama"), spec, PROMPTS[0], 1200)
    assert probability > 1e-4


def test_greedy_and_drawing_requests_share_a_batch() -> None:
    """Greedy rows keep their text; the others may be other texts of the same law."""
    writer = tiny.language_model("llama")
    plain = [o.token_ids for o in generate(writer, PROMPTS, max_new_tokens=12)]
    engine = Engine(writer, make("layerskip:sample=true"))
    greedy, drawing = (engine.requests(PROMPTS, max_new_tokens=12, sampling=s) for s in (Sampling(), SAMPLED))
    for pair in zip(greedy, drawing, strict=True):
        engine.submit(pair)
    while not engine.idle:
        engine.step()
    assert [request.tokens for request in greedy] == plain
    assert all(len(request.tokens) == 12 or request.finish_reason == "eos" for request in drawing)


DRAWN = ("layerskip:exit_layer=2,sample=true", "del:sample=true")


@pytest.mark.parametrize(
    ("spec", "temperature"), [*((s, t) for s in DRAWN for t in (0.0, 1.0)), ("layerskip:exit_layer=3", 0.0)]
)
def test_layers_that_add_nothing_are_never_missed(spec: str, temperature: float) -> None:
    """What leaves before them is what the target says: every draft is accepted whole, drawn ones too."""
    sampling = Sampling(seed=3, temperature=temperature)
    for output in generate(with_idle_layers(2), PROMPTS, max_new_tokens=40, drafter=spec, sampling=sampling):
        assert all(step.accepted == step.num_drafted for step in output.steps[:-1])
        assert sum(step.accepted for step in output.steps) > len(output.steps)


def test_an_exit_that_is_not_a_number_ends_the_draft_only() -> None:
    writer = tiny.language_model("llama")
    engine = Engine(writer, make("layerskip:sample=true"))
    head, calls = engine.target.head, 0

    def poisoned(hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.full_like(head(hidden), torch.nan) if hidden.shape[1] == 1 and calls % 2 else head(hidden)

    engine.target.head = poisoned  # type: ignore[method-assign]
    made = generate(engine, PROMPTS, max_new_tokens=12, sampling=SAMPLED)
    assert all(len(output.token_ids) == 12 or output.finish_reason == "eos" for output in made)


# --- Options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layerskip:exit_layer=3", "exit_layer=3 .* 3 layers can be left after layer 1 to 2"),
        ("layerskip:exit_layer=-1", "exit_layer=-1"),
        ("layerskip:num_draft_tokens=0", "num_draft_tokens=0"),
        ("del:every=3", "every=3 .* 3 layers"),
        ("del:decay=1.5", "decay=1.5"),
    ],
)
def test_options_that_fit_no_layer_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UnknownOption, match=message):
        Engine(tiny.language_model("llama"), spec)


def test_a_single_layer_cannot_be_left_early() -> None:
    for spec in ("layerskip", "del"):
        with pytest.raises(UnsupportedModel, match="a single one"):
            Engine(tiny.language_model("llama", num_hidden_layers=1), spec)


def test_the_model_may_name_its_exit() -> None:
    writer = writer_of("llama")
    assert Engine(writer, layerskip := make("layerskip")).drafter is layerskip and layerskip.exit == 1  # type: ignore[attr-defined]
    writer.model.generation_config.assistant_early_exit = 3
    Engine(writer, layerskip := make("layerskip"))
    assert layerskip.exit == 3  # type: ignore[attr-defined]
    Engine(writer, layerskip := make("layerskip:exit_layer=2"))
    assert layerskip.exit == 2  # type: ignore[attr-defined]


# --- DEL -----------------------------------------------------------------------------------------------------------


def test_exit_and_length_are_those_of_most_tokens_per_layer() -> None:
    """Against every pair, one by one; for one row and for several, with and without the head's costs."""
    chance = np.random.default_rng(0)
    for rows in (1, 3):
        for head in (0.0, 2.5):
            for _ in range(60):
                alpha = chance.random((rows, 7)) ** 0.3
                costs = np.arange(1, 8) + head
                found = best_exit(alpha, costs, 8 + head, 9)
                value = {}
                for place in range(7):
                    for g in range(10):
                        expected = sum((1 - a ** (g + 1)) / (1 - a) for a in alpha[:, place])
                        value[place, g] = expected / (g * costs[place] + 8 + head)
                assert value[found] == pytest.approx(max(value.values()), rel=1e-12)


def test_sure_layers_are_left_first_and_drafts_are_longest() -> None:
    costs = np.arange(1.0, 8)
    assert best_exit(np.ones((1, 7)), costs, 8, 18) == (0, 18)
    assert best_exit(np.ones((1, 7)) * [0.2, 0.2, 1, 1, 1, 1, 1], costs, 8, 18) == (2, 18)
    assert best_exit(np.zeros((2, 7)), costs, 8, 18)[1] == 0  # where no draft pays, none is made


class _Answers:
    """A target whose states are its logits."""

    reads_prompt = True

    @staticmethod
    def head(states: Tensor) -> Tensor:
        return states


def test_counts_converge_and_fade() -> None:
    """Rates of random hits are found again; one round by hand."""
    drafter: Any = DynamicExit(decay=0.999)
    drafter.candidates, drafter.engine, drafter.lower = [1, 2, 3], SimpleNamespace(target=_Answers()), {}
    request: Any = type("Row", (), {})()
    truth, chance = torch.tensor([0, 0]), np.random.default_rng(1)
    expected = np.array([0.2, 0.5, 0.9])
    for _ in range(3000):
        hits = chance.random((3, 2)) < expected[:, None]
        hidden = {
            layer: torch.tensor([[[1.0, 0.0] if hit else [0.0, 1.0] for hit in hits[layer - 1]]]) for layer in (1, 2, 3)
        }
        drafter._count([request], hidden, [range(2)], truth)
    table = drafter._table(request)
    assert rates(table) == pytest.approx(expected, abs=0.05)
    sure = math.e / (1 + math.e)
    assert thresholds(table) == pytest.approx(np.full(3, sure), rel=1e-6)
    other: Any = type("Row", (), {})()
    drafter.decay = 0.5
    for states, places in (([[4.0, 0.0], [0.0, 2.0], [9.0, 0.0]], range(2)), ([[1.0, 0.0]] * 3, range(1))):
        drafter._count([other], dict.fromkeys((1, 2, 3), torch.tensor([states])), [places], truth[: len(places)])
    sure = [1 / (1 + math.exp(-x)) for x in (4, 2, 1)]
    for column in drafter._table(other).T:
        assert column == pytest.approx([1.5, 0.5, 0.5 * sure[0] + sure[2], 0.5 * sure[1]], rel=1e-5)


def test_a_layer_that_was_never_right_or_never_wrong_has_a_threshold() -> None:
    table = np.array([[0.0, 2, 0], [0, 0, 4], [0, 1.2, 0], [0, 0, 1.2]])
    assert thresholds(table) == pytest.approx([0.5, 0.3, 0.65])
    assert rates(table).tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "llama, native", "t5, native"])
def test_every_layer_is_asked_about_the_accepted_path(name: str) -> None:
    """States from drafting and from the check are those of one plain pass, and the truth is what was decided."""
    engine = Engine(writer_of(name), drafter := Restless(num_draft_tokens=3), max_rows=3)
    asked = 0
    plain = target_for(model_of(name))
    count = drafter._count

    def compared(requests: Any, hidden: Any, places: Any, truth: Tensor) -> None:
        nonlocal asked
        count(requests, hidden, places, truth)
        end = 0
        for row, (request, columns) in enumerate(zip(requests, places, strict=True)):
            start, end = end, end + len(columns)
            if request not in engine.rows:  # the prompt
                continue
            asked += 1
            with plain.capture(range(1, 5)) as found:
                written = [*request.tokens, *truth[start:end].tolist()[:-1]]
                whole(plain, request.prompt_ids, written)
            for layer in range(1, 4):
                close(hidden[layer][row, columns.start : columns.stop], found[layer][0, len(request.tokens) - 1 :])

    drafter._count = compared  # type: ignore[method-assign]
    engine.submit(engine.requests(PROMPTS[:3], max_new_tokens=8))
    while not engine.idle:
        engine.step()
    assert asked > 6


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_prompt_counts_first(name: str) -> None:
    """Its last positions, or an encoder-decoder's start token; then one token is drafted."""
    engine = Engine(writer_of(name), drafter := make("del"), max_rows=3)
    requests = engine.requests(["the cat " * 20, PROMPTS[0]], max_new_tokens=20)
    engine.submit(requests)
    engine.step()
    for request in requests:
        counted = drafter._table(request)[:2].sum(0)  # type: ignore[attr-defined]
        assert counted.tolist() == [min(32, len(request.prompt_ids)) if name == "llama" else 1] * 3
    engine.step()
    assert all(request.steps[0].num_drafted <= 1 for request in requests)


def test_nothing_is_learned_from_other_requests() -> None:
    writer = writer_of("llama")
    alone = generate(writer, PROMPTS[:1], max_new_tokens=20, drafter=make("del"))[0]
    engine = Engine(writer, make("del"), max_rows=1)
    after = generate(engine, [*PROMPTS[1:], PROMPTS[0]], max_new_tokens=20)[-1]
    assert [step.num_drafted for step in after.steps] == [step.num_drafted for step in alone.steps]


def test_a_failed_row_is_not_counted() -> None:
    drafter: Any = DynamicExit()
    drafter.candidates, drafter.engine, drafter.lower = [1], SimpleNamespace(target=_Answers()), {}
    drafter.depth = 2
    rows: list[Any] = [type("Row", (), {})() for _ in range(2)]
    states = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    seen = SimpleNamespace(requests=rows, hidden={1: states, 2: states}, logits=states, verdicts=[None, Verdict((), 0)])
    drafter.observe(seen)
    assert drafter._table(rows[0]).sum() == 0 and drafter._table(rows[1])[0, 0] == 1


def test_a_drafter_without_begun_drafts_is_not_touched() -> None:
    assert Drafter().begun is None
    engine = Engine(tiny.language_model("llama"), drafter := make("layerskip"))
    request = engine.requests(PROMPTS[:1], max_new_tokens=1)[0]
    request.tokens.append(5)
    assert len(drafter.propose([request])[0]) == 0 and drafter.begun is None  # no room: a plain step


# --- Training ------------------------------------------------------------------------------------------------------


def test_layers_are_dropped_as_the_formula_says() -> None:
    options = LayerSkipOptions(p_max=0.2)
    rates = dropout_rates(options, 5, 3, 10)
    assert rates == pytest.approx([(2 ** (layer / 4) - 1) * 0.2 for layer in range(5)])
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2)
    scratch = LayerSkipOptions(p_max=0.2, from_scratch=True)
    assert dropout_rates(scratch, 5, 0, 10) == [0] * 5
    assert dropout_rates(scratch, 5, 9, 10)[-1] == pytest.approx(0.2)


def test_exits_are_weighed_as_the_formula_says() -> None:
    """Weights sum to 1; each exit counts once per rotation; the gradual curriculum adds one after the other."""
    turning = LayerSkipOptions(e_scale=0.5, rotation=3)
    for step in range(9):
        weights = exit_weights(turning, 7, step, 100)
        assert sum(weights) == pytest.approx(1)
        assert [layer for layer in range(1, 6) if weights[layer]] == [k for k in range(1, 6) if k % 3 == step % 3]
    whole = [0, 0.5, 1.5, 3, 5, 7.5, 6 + 0.5 * 15]
    everything = exit_weights(LayerSkipOptions(e_scale=0.5, rotation=1), 7, 0, 100)
    assert everything == pytest.approx([weight / sum(whole) for weight in whole])
    gradual = LayerSkipOptions(e_scale=1.0, curriculum="gradual")
    counts = [sum(weight > 0 for weight in exit_weights(gradual, 7, step, 140)) for step in (0, 9, 10, 35, 70, 139)]
    assert counts == [1, 1, 2, 4, 6, 6]  # the first layer's weight is 0 by the formula
    assert exit_weights(LayerSkipOptions(e_scale=0), 7, 4, 100) == [0] * 6 + [1]


@pytest.mark.parametrize("wrong", [{"p_max": 1.0}, {"e_scale": -1.0}, {"rotation": 0}, {"curriculum": "rotatoinal"}])
def test_impossible_training_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UnknownOption):
        LayerSkipOptions(**wrong)


def batch() -> dict[str, Tensor]:
    prompt, mask = pad_right([[5, 6, 7], [8], [9, 10]])
    labels, _ = pad_right([[11, 12], [13, 14, 15, 16], [17, 18, 19]], -100)
    return {"input_ids": prompt, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exits_see_what_a_shorter_model_says(family: str) -> None:
    """Logits after layer k are those of the model cut there, aligned with the labels; evaluation is the plain model."""
    model = EarlyExits(tiny.FAMILIES[family](**DEPTH[family]), LayerSkipOptions(p_max=0, rotation=1), 10)
    plain = TextToText(tiny.FAMILIES[family](**DEPTH[family])).eval()
    real = batch()["labels"] != -100
    model.eval()
    assert "exits" not in model(**batch())
    close(model(**batch()).logits[real], plain(**batch()).logits[real])
    model.train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    exits = model(**batch()).exits
    assert [round(weight, 6) for weight, _ in exits] == [
        round(weight, 6) for weight in (lambda w: [w[3], w[1], w[2]])(exit_weights(model.options, 4, 0, 10))
    ]
    size = {"llama": "num_hidden_layers", "gpt2": "n_layer"}[family]
    for (_, logits), kept in zip(exits, (4, 2, 3), strict=True):
        shorter = tiny.FAMILIES[family](**{size: kept})
        shorter.load_state_dict(model.model.state_dict(), strict=False)
        close(logits[real], TextToText(shorter).eval()(**batch()).logits[real])


def test_without_exits_and_dropout_the_loss_is_the_plain_one(tmp_path: Path) -> None:
    data = PairDataset(MANY, tiny.tokenizer(append_eos=False), tiny.tokenizer(append_eos=False))

    def loss(model: TextToText, name: str) -> tuple[float, Tensor]:
        trainer = make_trainer(model, data, data, out=tmp_path / name, options=OPTIONS, prompt_pad_id=0, cpu=True)
        model.train()
        found = trainer.compute_loss(model, batch())
        found.backward()
        return float(found.detach()), model.model.model.layers[0].mlp.up_proj.weight.grad

    plain, gradient = loss(TextToText(tiny.llama()), "plain")
    same, others = loss(EarlyExits(tiny.llama(), LayerSkipOptions(p_max=0, e_scale=0), 10), "same")
    assert same == pytest.approx(plain, rel=1e-6)
    close(others, gradient)
    more, _ = loss(EarlyExits(tiny.llama(), LayerSkipOptions(p_max=0, e_scale=1.0, rotation=1), 10), "more")
    assert abs(more - plain) > 1e-3


def test_examples_go_around_layers_as_often_as_they_should() -> None:
    model = EarlyExits(tiny.llama(), LayerSkipOptions(p_max=0.4, e_scale=0), 10).train()
    seen: list[list[Tensor]] = [[], [], []]
    for index, layer in enumerate(model.target.layers):
        layer.register_forward_hook(
            lambda m, args, out, index=index: seen[index].append((out == args[0]).all(-1)[:, 0])
        )
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(150):
            model(**batch())
    dropped = [float(torch.cat(found).float().mean()) for found in seen]
    assert dropped[0] == 0
    assert dropped[1:] == pytest.approx(dropout_rates(model.options, 3, 0, 10)[1:], abs=0.07)


def test_a_run_follows_its_curriculum_and_improves_exits(tmp_path: Path) -> None:
    options = LayerSkipOptions(p_max=0.1, e_scale=1.0, rotation=2)
    model = EarlyExits(tiny.llama(), options, OPTIONS.max_steps)
    data = PairDataset(MANY, tiny.tokenizer(append_eos=False), tiny.tokenizer(append_eos=False))

    def exit_loss() -> float:
        model.train()
        model.step = 1  # the exit after layer 2 counts
        with torch.no_grad():
            logits = model(**batch()).exits[1][1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch()["labels"].flatten()))

    before = exit_loss()
    trainer = make_trainer(model, data, data, out=tmp_path, options=OPTIONS, prompt_pad_id=0, cpu=True)
    trainer.add_callback(StepCounter(model))
    assert run(trainer)
    assert model.step == trainer.state.max_steps - 1
    assert exit_loss() < before


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(BatonError, match="decoder-only"):
        EarlyExits(tiny.t5(), LayerSkipOptions(), 10)
    with pytest.raises(BatonError, match="runtime='eager'"):
        EarlyExits(model_of("llama, native"), LayerSkipOptions(), 10)


def test_a_step_that_failed_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while drafting or checking leaves the memory as it was."""
    writer = writer_of("llama")
    plain = [output.token_ids for output in generate(writer, PROMPTS, max_new_tokens=9)]
    for broken in ("head", "forward"):
        engine = Engine(writer, make("layerskip"), max_rows=4)
        engine.submit(requests := engine.requests(PROMPTS, max_new_tokens=9))
        engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine.target, broken, lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.step()
        while not engine.idle:
            engine.step()
        assert [request.tokens for request in requests] == plain
