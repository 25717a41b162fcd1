"""Generation: our greedy tokens are those of transformers' `generate`; a response depends on nothing but its key."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from baton.engine import Engine, generate, stream
from baton.engine.rules import Rules
from baton.engine.text import TextStream
from baton.errors import BatonError, PromptError
from baton.models.adapter import Target, target_for
from baton.models.loading import LanguageModel
from baton.models.prompts import pad_right
from baton.models.text import embed_tokens
from baton.models.writer import PromptInputs
from baton.types import Output, Sampling, Timings

FAMILIES = list(tiny.FAMILIES)
SAMPLED = Sampling(temperature=1.0, seed=3)


def reference(writer: LanguageModel, prompt: str, max_new_tokens: int, **options: Any) -> list[int]:
    """Response tokens of transformers' own greedy search."""
    ids = writer.tokenizer(prompt, return_tensors="pt")
    made = writer.lm.generate(
        input_ids=ids.input_ids,
        attention_mask=ids.attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **options,
    )[0].tolist()
    return made[1:] if writer.lm.config.is_encoder_decoder else made[ids.input_ids.shape[1] :]


@cache
def shared(family: str, seed: int = 0) -> LanguageModel:
    """A model that no test changes."""
    return tiny.language_model(family, seed)


@cache
def greedy(family: str, seed: int, prompt: str) -> tuple[int, ...]:
    return tuple(reference(shared(family, seed), prompt, 20))


def tokens(outputs: Sequence[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@dataclass(frozen=True)
class ByEmbeddings(LanguageModel):
    """Hands prompts over as input embeddings, as a hand-off does."""

    def encode(self, ids: Tensor, mask: Tensor, timings: Timings) -> PromptInputs:
        timings.encode_s += 1.0
        return PromptInputs(embeds=embed_tokens(self.model, ids), mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_greedy_tokens_are_those_of_transformers(family: str, batch_size: int) -> None:
    """Prompts of five lengths, some responses ending early, alone and in ragged batches."""
    for seed in (0, 1):
        writer = shared(family, seed)
        outputs = generate(writer, tiny.PROMPTS, max_new_tokens=20, batch_size=batch_size)
        assert [output.prompt for output in outputs] == tiny.PROMPTS
        for output in outputs:
            expected = list(greedy(family, seed, output.prompt))
            assert output.token_ids == expected
            assert output.text == writer.tokenizer.decode(expected, skip_special_tokens=True)
            assert output.finish_reason == ("eos" if expected[-1] == tiny.EOS else "length")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_as_embeddings_give_the_same(family: str) -> None:
    writer = shared(family)
    other = ByEmbeddings(writer.model, writer.tokenizer)
    expected = generate(writer, tiny.PROMPTS, max_new_tokens=12)
    actual = generate(other, tiny.PROMPTS, max_new_tokens=12)
    assert tokens(actual) == tokens(expected)
    assert actual[0].timings.encode_s == 1.0 and expected[0].timings.encode_s == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_text_depends_on_its_key_only(family: str) -> None:
    """Not on the batch, nor on how many rows were written beside it."""
    writer = shared(family)
    alone = tokens(generate(writer, tiny.PROMPTS, sampling=SAMPLED, max_new_tokens=12, batch_size=1))
    together = tokens(generate(writer, tiny.PROMPTS, sampling=SAMPLED, max_new_tokens=12, batch_size=5))
    assert alone == together
    assert tokens(generate(writer, tiny.PROMPTS[:1], sampling=SAMPLED, max_new_tokens=12)) == alone[:1]
    other_seed = Sampling(temperature=1.0, seed=4)
    assert tokens(generate(writer, tiny.PROMPTS, sampling=other_seed, max_new_tokens=12)) != alone
    twice = tokens(generate(writer, tiny.PROMPTS[:1] * 2, sampling=SAMPLED, max_new_tokens=12))
    assert twice[0] == alone[0] != twice[1]


def test_every_sampling_option_reaches_the_tokens() -> None:
    writer = shared("llama")

    def made(**options: Any) -> list[list[int]]:
        sampling = Sampling(**{"temperature": 2.0, "seed": 1, **options})
        return tokens(generate(writer, tiny.PROMPTS[:2], sampling=sampling, max_new_tokens=16))

    best = tokens(generate(writer, tiny.PROMPTS[:2], max_new_tokens=16))
    assert made() != best
    # Each of these leaves one candidate.
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999999}, {"temperature": 1e-4}, {"temperature": 0}):
        assert made(**options) == best, options
    assert made(repetition_penalty=1e9) != made()


@pytest.mark.parametrize("family", FAMILIES)
def test_repetition_penalty_is_that_of_transformers(family: str) -> None:
    """Over prompt and response of a decoder-only model, over the response of an encoder-decoder."""
    writer = shared(family)
    sampling = Sampling(repetition_penalty=1.7)
    outputs = generate(writer, tiny.PROMPTS, sampling=sampling, max_new_tokens=16)
    plain = generate(writer, tiny.PROMPTS, max_new_tokens=16)
    assert tokens(outputs) != tokens(plain)
    for output in outputs[:3]:
        assert output.token_ids == reference(writer, output.prompt, 16, repetition_penalty=1.7)


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_new_tokens_is_exact(limit: int) -> None:
    writer = shared("gpt2")
    for output in generate(writer, tiny.PROMPTS, max_new_tokens=limit):
        assert len(output.token_ids) == limit and output.finish_reason == "length"
    steps: dict[int, int] = {}
    generate(writer, tiny.PROMPTS, max_new_tokens=limit, on_finish=lambda out, i: steps.update({i: out.timings.steps}))
    assert steps == dict.fromkeys(range(5), limit - 1)  # the first token comes from the prompt pass


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_end_tokens_of_model_settings_and_tokenizer_all_end(family: str) -> None:
    """The end token is part of the tokens and not of the text."""
    writer = tiny.language_model(family)
    free = generate(writer, tiny.PROMPTS[1:2], max_new_tokens=20)[0].token_ids
    first = {token: free.index(token) for token in reversed(free)}
    early, late = sorted(first.values())[2:4]
    writer.lm.generation_config.eos_token_id = [free[late], 299]
    (output,) = generate(writer, tiny.PROMPTS[1:2], max_new_tokens=20)
    assert output.token_ids == free[: late + 1] and output.finish_reason == "eos"
    assert output.text == writer.tokenizer.decode(free[:late], skip_special_tokens=True)
    writer.lm.config.eos_token_id = free[early]
    (output,) = generate(writer, tiny.PROMPTS[1:2], max_new_tokens=20)
    assert output.token_ids == free[: early + 1]
    assert Rules.of(writer).ends == {free[late], 299, free[early], tiny.EOS}


def test_rows_leave_the_batch_when_they_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work shrinks, and the rows that stay go on as if alone."""
    writer = shared("t5")
    widths: list[int] = []
    target: Any = type(target_for(writer.lm))
    forward = target.forward

    def counting(self: Target, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        widths.append(len(ids))
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(target, "forward", counting)
    outputs = generate(writer, tiny.PROMPTS, max_new_tokens=20)
    lengths = [len(output.token_ids) for output in outputs]
    assert min(lengths) < 20  # or the test shows nothing
    assert widths == [sum(length > step for length in lengths) for step in range(max(lengths))]
    for output in outputs:
        assert output.token_ids == list(greedy("t5", 0, output.prompt))


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_forced_tokens_and_start_token_are_respected(family: str) -> None:
    writer = tiny.language_model(family)
    settings = writer.lm.generation_config
    settings.forced_bos_token_id, settings.forced_eos_token_id, settings.decoder_start_token_id = 44, tiny.EOS, 6
    for limit in (1, 2, 9):
        for output in generate(writer, tiny.PROMPTS, max_new_tokens=limit):
            assert output.token_ids == reference(writer, output.prompt, limit)
            assert output.token_ids[-1] == tiny.EOS and output.finish_reason == "eos"
            assert limit == 1 or output.token_ids[0] == 44


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_banned_tokens_are_those_of_transformers(family: str) -> None:
    """Marian's checkpoints ban their padding token in this way."""
    writer = tiny.language_model(family)
    free = tokens(generate(writer, tiny.PROMPTS, max_new_tokens=10))
    settings = writer.lm.generation_config
    settings.bad_words_ids = [[free[0][2]], [free[1][3]]]
    settings.suppress_tokens = [free[2][1]]
    settings.begin_suppress_tokens = [free[3][0]]
    outputs = generate(writer, tiny.PROMPTS, max_new_tokens=10)
    assert tokens(outputs) != free
    for output in outputs:
        assert output.token_ids == reference(writer, output.prompt, 10)


def test_settings_that_are_not_applied_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    writer = tiny.language_model("bart")
    writer.lm.generation_config.no_repeat_ngram_size = 3
    writer.lm.generation_config.bad_words_ids = [[5, 6]]
    with caplog.at_level(logging.WARNING):
        generate(writer, ["The cat."], max_new_tokens=1)
    assert "no_repeat_ngram_size=3" in caplog.text and "bad_words_ids=(5, 6)" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_streamed_pieces_join_to_the_text(family: str, sampling: Sampling) -> None:
    """Random bytes included: whatever they make of characters, the pieces make the same."""
    writer = shared(family)
    for stop in ((), ("e", "\ufffd\ufffdr")):
        options: dict[str, Any] = {"sampling": sampling, "max_new_tokens": 24, "stop": stop}
        pieces = list(stream(writer, tiny.PROMPTS[0], **options))
        assert all(pieces)
        assert "".join(pieces) == generate(writer, tiny.PROMPTS[:1], **options)[0].text


def writing(text: str, family: str = "llama") -> tuple[LanguageModel, list[int]]:
    """A model that answers "The cat." with this text whatever its weights, and the tokens of the text."""
    writer = tiny.language_model(family)
    ids = tiny.tokenizer(append_eos=False)(text)["input_ids"]
    model: Any = writer.lm

    def script(module: Any, args: Any, logits: Tensor) -> Tensor:
        at = next(steps)
        wanted = ids[at] if at < len(ids) else tiny.EOS
        return torch.nn.functional.one_hot(torch.full(logits.shape[:-1], wanted), logits.shape[-1]).to(logits.dtype)

    steps = iter(range(10_000))
    model.get_output_embeddings().register_forward_hook(script)
    return writer, ids


TEXT = "The small cat writes: Über 日本 the house. And the dog"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), TEXT),
        (("house",), "The small cat writes: Über 日本 the "),
        (("the hou",), "The small cat writes: Über 日本 "),  # from the middle of one token to the middle of another
        (("dog", "the", "Über"), "The small cat writes: "),  # the first in the text, not in the list
        (("日本 the", "本"), "The small cat writes: Über 日"),
        (("small cat writes! ", "And the dog."), TEXT),  # nearly, but no
        (("The",), ""),
        ("cat", "The small "),  # a string is one stop string
    ],
)
def test_stop_strings_cut_the_text(stop: tuple[str, ...] | str, expected: str) -> None:
    writer, ids = writing(TEXT)
    (output,) = generate(writer, ["The cat."], stop=stop, max_new_tokens=100)
    assert output.text == expected
    assert output.finish_reason == ("eos" if expected == TEXT else "stop")
    decoded = writer.tokenizer.decode(output.token_ids, skip_special_tokens=True)
    assert decoded.startswith(expected)
    if output.finish_reason == "stop":  # and not a token more than it takes to see the stop string
        # (a character made of bytes is known one token later, when the run of bytes has ended)
        end = -2 if "本" in stop else -1
        before = writer.tokenizer.decode(output.token_ids[:end], skip_special_tokens=True)
        wanted = (stop,) if isinstance(stop, str) else stop
        assert any(s in decoded for s in wanted) and not any(s in before for s in wanted)
    writer, _ = writing(TEXT)
    assert "".join(stream(writer, "The cat.", stop=stop, max_new_tokens=100)) == expected
    assert len(ids) > 20


def test_a_stream_gives_whole_characters_as_soon_as_they_are_known() -> None:
    writer, ids = writing("The 日 cat")
    pieces = list(stream(writer, "The cat.", max_new_tokens=100))
    assert "".join(pieces) == "The 日 cat" and len(pieces) > 4
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(pieces)  # the bytes of a character come together


def test_what_may_become_a_stop_string_is_held_back() -> None:
    tokenizer = tiny.tokenizer(append_eos=False)
    text = TextStream(tokenizer, ("cat and dog",))
    given = [text.push(token) for token in tokenizer("the cat and cat and do")["input_ids"]]
    so_far = "".join(given)
    assert so_far == "the cat and "  # the second "cat and do" may go on to be the stop string
    assert so_far + text.finish() == text.text == "the cat and cat and do"
    assert not text.stopped


def test_callbacks_tell_what_happens_as_it_happens() -> None:
    writer = tiny.language_model("t5")
    log: list[tuple[str, int]] = []
    texts = dict.fromkeys(range(5), "")
    ids: dict[int, list[int]] = {index: [] for index in range(5)}
    finished: dict[int, Output] = {}

    def on_token(token: int, text: str, index: int) -> None:
        assert index not in finished
        texts[index] += text
        ids[index].append(token)
        log.append(("token", index))

    def on_finish(output: Output, index: int) -> None:
        finished[index] = output
        log.append(("finish", index))

    outputs = generate(writer, tiny.PROMPTS, max_new_tokens=20, batch_size=2, on_token=on_token, on_finish=on_finish)
    assert finished == dict(enumerate(outputs))
    assert list(texts.values()) == [output.text for output in outputs]
    assert list(ids.values()) == tokens(outputs)
    assert tokens(outputs) == tokens(generate(writer, tiny.PROMPTS, max_new_tokens=20))
    longest = max(range(5), key=lambda index: len(writer.tokenizer(tiny.PROMPTS[index])["input_ids"]))
    assert log[0] == ("token", longest)


def test_an_interrupt_leaves_everything_usable() -> None:
    """What finished before was handed over, and the next call is as if nothing had been."""
    writer = tiny.language_model("llama")
    expected = generate(writer, tiny.PROMPTS, max_new_tokens=8)
    seen: list[int] = []

    def interrupt(output: Output, index: int) -> None:
        seen.append(index)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(writer, tiny.PROMPTS, max_new_tokens=8, batch_size=1, on_finish=interrupt)
    assert len(seen) == 3
    assert tokens(generate(writer, tiny.PROMPTS, max_new_tokens=8)) == tokens(expected)


def test_a_stream_may_be_left_and_does_not_change_the_callers_mode() -> None:
    writer = tiny.language_model("t5")
    pieces = stream(writer, tiny.PROMPTS[1], max_new_tokens=20)
    next(pieces)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    pieces.close()  # type: ignore[attr-defined]


def test_responses_stop_where_positions_end() -> None:
    """A decoder-only model with 12 positions: prompt and response share them, and the last token needs none."""
    writer = tiny.language_model("gpt2", n_positions=12)
    length = len(writer.tokenizer("The cat.")["input_ids"])
    (output,) = generate(writer, ["The cat."], max_new_tokens=100)
    assert len(output.token_ids) == 12 - length + 1 and output.finish_reason == "length"
    longer = tiny.language_model("gpt2", n_positions=12)
    assert output.token_ids[:3] == reference(longer, "The cat.", 3)
    writer = tiny.language_model("bart", max_position_embeddings=12)
    (output,) = generate(writer, ["The cat."], max_new_tokens=100)
    assert len(output.token_ids) == 12


def test_max_length_bounds_prompt_and_response() -> None:
    """The engine's own limit does what a model's does: prompts are refused or cut by it, responses end at it."""
    writer = tiny.language_model("llama")
    length = len(writer.tokenizer("The cat.")["input_ids"])
    engine = Engine(writer, max_length=length + 4)
    (output,) = generate(engine, ["The cat."], max_new_tokens=100)
    (longer,) = generate(writer, ["The cat."], max_new_tokens=100)
    assert output.token_ids == longer.token_ids[:5] and output.finish_reason == "length"
    with pytest.raises(PromptError, match=rf"this engine \(max_length={length + 4}\) reads at most {length + 3}"):
        generate(engine, ["the dog " * 30])
    (cut,) = generate(engine, ["the dog " * 30], truncate=True)
    assert len(cut.token_ids) == 2  # one position is left for the first token; nothing is read after the last
    (short,) = generate(Engine(tiny.language_model("t5"), max_length=6), ["The cat and the dog."], max_new_tokens=100)
    assert len(short.token_ids) <= 6
    with pytest.raises(BatonError, match="max_length=1: it must be 2 or more"):
        Engine(writer, max_length=1)


def test_prompt_errors_come_before_any_work() -> None:
    writer = tiny.language_model("gpt2", n_positions=12)
    for prompts, message in (
        (["The cat.", " "], "prompt 1 is empty"),
        (["the dog " * 30], "tiny gpt2 reads at most 12"),
    ):
        finished: list[int] = []
        with pytest.raises(PromptError, match=message):
            generate(writer, prompts, on_finish=lambda output, index, seen=finished: seen.append(index))  # type: ignore[misc]
        assert not finished
        with pytest.raises(PromptError):
            stream(writer, prompts[-1])
    (output,) = generate(writer, ["the dog " * 30], truncate=True)
    assert len(output.token_ids) == 1  # the prompt takes all positions: one token follows from it


def test_room_counts_what_is_read_not_what_was_tokenized() -> None:
    """A hand-off may turn a prompt into more vectors than it has tokens."""

    class Doubled(ByEmbeddings):
        def encode(self, ids: Tensor, mask: Tensor, timings: Timings) -> PromptInputs:
            inputs = super().encode(ids, mask, timings)
            return PromptInputs(embeds=inputs.embeds.repeat(1, 2, 1), mask=mask.repeat(1, 2))  # type: ignore[union-attr]

    plain = tiny.language_model("gpt2", n_positions=16)
    writer = Doubled(plain.model, plain.tokenizer)
    length = len(writer.tokenizer("The cat.")["input_ids"])
    assert len(generate(writer, ["The cat."])[0].token_ids) == 16 - 2 * length + 1
    with pytest.raises(PromptError, match=r"prompt 0 takes .* of the 16 positions"):
        generate(writer, ["The cat and the dog."])


def test_a_model_in_training_mode_is_refused() -> None:
    writer = tiny.language_model("t5")
    writer.lm.train()
    with pytest.raises(BatonError, match="training mode"):
        generate(writer, ["The cat."])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"stop": ("a", "")}, "a stop string is empty"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BatonError, match=message):
        generate(tiny.language_model("t5"), ["The cat."], **options)


def test_no_prompts_no_outputs() -> None:
    assert generate(tiny.language_model("t5"), []) == []


def test_a_folder_is_as_good_as_a_model(tmp_path: Any) -> None:
    writer = tiny.language_model("t5")
    writer.lm.save_pretrained(tmp_path)
    writer.tokenizer.save_pretrained(tmp_path)
    assert tokens(generate(tmp_path, tiny.PROMPTS, max_new_tokens=6)) == tokens(
        generate(writer, tiny.PROMPTS, max_new_tokens=6)
    )
    assert (
        "".join(stream(str(tmp_path), "The cat.", max_new_tokens=6))
        == generate(writer, ["The cat."], max_new_tokens=6)[0].text
    )


def test_timings_add_up() -> None:
    """A request counts the steps it took part in; reading is shared by those read together."""
    outputs = generate(tiny.language_model("t5"), tiny.PROMPTS, max_new_tokens=6)
    for output in outputs:
        timings = output.timings
        assert timings.steps == len(output.token_ids) - 1 == len(output.steps)
        assert timings.prefill_s == outputs[0].timings.prefill_s > 0
        parts = [s.draft_s + s.verify_s + s.other_s for s in output.steps]
        assert timings.decode_s == pytest.approx(sum(parts)) and min(parts) > 0
        assert timings.total_s == timings.prefill_s + timings.decode_s


def test_bf16_runs() -> None:
    """Half precision changes near-ties only; that it runs, and what type it runs in, is checked here."""
    writer = tiny.language_model("t5")
    writer.lm.to(torch.bfloat16)
    target = target_for(writer.lm)
    ids, mask = pad_right([[5, 6, 7], [8]])
    logits, memory = target.prefill(PromptInputs(ids=ids, mask=mask))
    assert logits.dtype == torch.bfloat16 and memory.own.keys[0].dtype == torch.bfloat16  # type: ignore[union-attr]
    with torch.no_grad():
        expected = writer.lm(input_ids=ids[:1], decoder_input_ids=torch.tensor([[0]])).logits[0, -1]
    assert torch.equal(logits[0], expected)
