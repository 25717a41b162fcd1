"""What must hold for every hand-off, whatever its models: the numbered invariants of the method, on random weights.

Learning and cost (19 to 23) are in `test_handoff_training.py` and `test_handoff_cost.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from handoffs import (
    CASES,
    OTHER,
    PAIRS,
    PROMPTS,
    RESPONSES,
    SAME,
    Case,
    calls,
    folder,
    handoff,
    label_batch,
    other_tokenizer,
    prompt_batch,
    prompt_rows,
    untrained,
)
from torch import Tensor, nn

from baton.engine import generate
from baton.errors import PromptError
from baton.handoff.model import HandoffModel
from baton.models.loading import load
from baton.models.text import IGNORE, TextToText, response_logits, shift_right
from baton.train.dataset import PairDataset
from baton.train.trainer import adamw, response_loss
from baton.types import Pair, Sampling, Timings

ENCODER_DECODER, DECODER_ONLY_OTHER = CASES[0], CASES[2]
# Every pair of models with the paper's fusion, and every fusion with one SLM of each kind.
COMBINATIONS = [(case, "add") for case in CASES] + [
    (case, fusion) for case in (ENCODER_DECODER, DECODER_ONLY_OTHER) for fusion in ("replace", "concatenate")
]
everywhere = pytest.mark.parametrize(("case", "fusion"), COMBINATIONS, ids=lambda value: str(value))
# One hand-off for each way that padding, caching and positions differ.
few = pytest.mark.parametrize(
    ("case", "fusion"),
    [(CASES[0], "add"), (CASES[4], "add"), (CASES[2], "concatenate"), (CASES[5], "add"), (CASES[7], "replace")],
    ids=lambda value: str(value),
)


def logits_of(model: HandoffModel, **changes: Any) -> Tensor:
    """Teacher-forced logits of the responses, zero where there is no response."""
    ids, mask = prompt_batch(model)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": label_batch(model)} | changes
    with torch.no_grad():
        logits = model(**batch).logits
    return logits * (batch["labels"] != IGNORE)[..., None]


def fused(model: HandoffModel, prompts: list[str] = PROMPTS) -> tuple[Tensor, Tensor]:
    """F and its mask, as generation makes them."""
    with torch.no_grad():
        inputs = model.encode(*prompt_batch(model, prompts), Timings())
    assert inputs.embeds is not None
    return inputs.embeds, inputs.mask


def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def greedy(model: HandoffModel, prompts: list[str] = PROMPTS, tokens: int = 8) -> list[list[int]]:
    return [output.token_ids for output in generate(model, prompts, max_new_tokens=tokens)]


# --- Shapes and wiring -------------------------------------------------------------------------------------------


@everywhere
def test_01_states_projection_and_fusion_agree_in_length(case: Case, fusion: str) -> None:
    """H is [b, m, d_l], Z is [b, m, d_s]; F is E + Z, Z, or Z followed by E without a gap, and 0 nowhere it matters."""
    model = handoff(case, fusion=fusion)
    ids, mask = prompt_batch(model)
    with torch.no_grad():
        states = model.read(ids, mask)
        z, embeds = model.project(states), model.prompt_embeddings(ids)
    width = model.slm.get_input_embeddings().weight.shape[1]
    layers = 4 if case.layer == "mix" else 1
    assert states.shape == (*ids.shape, layers * tiny.WIDTH)
    assert z.shape == embeds.shape == (*ids.shape, width)
    f, f_mask = fused(model)
    for row, length in enumerate(mask.sum(1).tolist()):
        own_z, own_e = z[row, :length], embeds[row, :length]
        expected = {"add": own_e + own_z, "replace": own_z, "concatenate": torch.cat([own_z, own_e])}[fusion]
        assert f_mask[row].sum() == len(expected)
        assert f_mask[row, : len(expected)].all()
        assert close(f[row, : len(expected)], expected, 1e-6)


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_02_projector_works_position_by_position(case: Case) -> None:
    """Permuting the positions of H permutes Z; changing H at one position changes Z there and nowhere else."""
    model = handoff(case)
    states = torch.randn(2, 7, model.config.llm["width"] * model.config.llm["layers_read"])
    order = torch.randperm(7)
    with torch.no_grad():
        z = model.project(states)
        assert close(model.project(states[:, order]), z[:, order], 1e-6)
        changed = states.clone()
        changed[:, 3] += 1
        difference = (model.project(changed) - z).abs().amax(-1)
    assert (difference[:, 3] > 0.01).all()
    assert difference[:, [0, 1, 2, 4, 5, 6]].max() < 1e-6


@pytest.mark.parametrize("case", SAME, ids=str)
@pytest.mark.parametrize("how", ["step 0", "Z = 0"])
def test_03_zero_z_is_the_plain_slm_bit_for_bit(case: Case, how: str) -> None:
    """So does an untrained hand-off start: nothing that the SLM could do is lost."""
    model = untrained(case) if how == "step 0" else handoff(case, signal="zero")
    ids, mask = prompt_batch(model)
    labels = label_batch(model)
    with torch.no_grad():
        alone = TextToText(model.slm)(ids, mask, labels).logits
    valid = (labels != IGNORE)[..., None]
    assert torch.equal(logits_of(model), alone * valid)
    assert close(alone * valid, own_forward(model.slm, ids, mask, labels) * valid)


def own_forward(slm: Any, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """The SLM called as transformers' users call it, one prompt at a time, on token ids."""
    rows = torch.zeros(*labels.shape, slm.config.vocab_size)
    with torch.no_grad():
        for row in range(len(ids)):
            prompt, response = ids[row][mask[row].bool()][None], labels[row][labels[row] != IGNORE][None]
            if slm.config.is_encoder_decoder:
                start = shift_right(response, slm.config.decoder_start_token_id, tiny.PAD)
                logits = slm(input_ids=prompt, decoder_input_ids=start).logits
            else:
                logits = slm(input_ids=torch.cat([prompt, response], 1)).logits[:, prompt.shape[1] - 1 : -1]
            rows[row, : response.shape[1]] = logits[0]
    return rows


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=str)
def test_04_replacement_ignores_the_slms_prompt_embeddings(case: Case) -> None:
    """New embeddings for tokens that stand in the prompts only: addition notices, replacement does not."""
    for fusion, notices in (("add", True), ("concatenate", True), ("replace", False)):
        model = handoff(case, fusion=fusion)
        labels = label_batch(model)
        only_in_prompts = sorted(set(prompt_batch(model)[0].flatten().tolist()) - set(labels.flatten().tolist()) - {0})
        before = logits_of(model)
        with torch.no_grad():
            model.slm.get_input_embeddings().weight[only_in_prompts] += 1.0
        other = [i for i in range(before.shape[-1]) if i not in only_in_prompts]  # a tied head has changed with it
        same = close(logits_of(model)[..., other], before[..., other], 1e-6)
        assert same != notices, fusion


@pytest.mark.parametrize("case", OTHER, ids=str)
def test_04_with_two_tokenizers_the_slms_table_is_for_responses_only(case: Case) -> None:
    """The prompt's embeddings come from the LLM's table and a map; replacement uses neither."""
    for fusion, notices in (("add", True), ("replace", False)):
        model = handoff(case, fusion=fusion)
        f, _ = fused(model)
        with torch.no_grad():
            model.slm.get_input_embeddings().weight += 1.0
        assert torch.equal(fused(model)[0], f)
        assert model.prompt_map is not None
        with torch.no_grad():
            model.prompt_map.weight += 1.0
        assert torch.equal(fused(model)[0], f) != notices


@few
def test_05_response_positions_get_no_llm_term(case: Case, fusion: str) -> None:
    """Once F is there the LLM and the projector can go: logits stay the same, and so does what is being written."""
    model = handoff(case, fusion=fusion)
    expected, tokens = logits_of(model), greedy(model)
    labels = label_batch(model)
    f, mask = fused(model)

    def drop(*_: Any) -> None:
        model.release_encoder()
        for weight in model.projector.parameters():
            weight.data.fill_(float("nan"))

    assert [o.token_ids for o in generate(model, PROMPTS, max_new_tokens=8, on_token=drop)] == tokens
    with torch.no_grad():
        logits = response_logits(model.slm, f, mask, labels)
    assert torch.equal(logits * (labels != IGNORE)[..., None], expected)


# --- Once only ---------------------------------------------------------------------------------------------------


def first_layers(slm: Any) -> tuple[nn.Module | None, nn.Module]:
    """First layer of the SLM's encoder, if it has one, and first layer of what writes."""
    names = {"t5": "block", "gpt2": "h"}
    name = names.get(slm.config.model_type, "layers")
    if slm.config.is_encoder_decoder:
        return getattr(slm.get_encoder(), name)[0], getattr(slm.get_decoder(), name)[0]
    return None, getattr(slm.base_model, name)[0]


@everywhere
@pytest.mark.parametrize("writer", ["baton", "transformers"])
def test_06_the_llm_reads_once_whatever_is_written(case: Case, fusion: str, writer: str) -> None:
    """For n tokens: LLM and projector once, the SLM's prompt pass once, its step n times (the first in prefill)."""
    model = handoff(case, fusion=fusion)
    encoder_layer, decoder_layer = first_layers(model.slm)
    prompts = PROMPTS[:2]
    ids, mask = prompt_batch(model, prompts)
    prompt_length = int(mask.sum(1).max()) * (2 if fusion == "concatenate" else 1)
    for n in (1, 4):
        with (
            calls(model.encoder.model) as llm,
            calls(model.projector) as projector,
            calls(encoder_layer if encoder_layer is not None else model) as slm_encoder,
            calls(decoder_layer) as steps,
        ):
            if writer == "baton":
                written = max(map(len, greedy(model, prompts, n)))
            else:
                start = 1 if model.slm.config.is_encoder_decoder else 0
                written = model.generate(ids, mask, max_new_tokens=n, do_sample=False).shape[1] - start
        assert written == n
        assert len(llm) == len(projector) == 1
        assert sorted(llm[0].tolist()) == sorted(ids.tolist())
        assert len(slm_encoder) == (encoder_layer is not None)
        prefill = 1 if encoder_layer is not None else prompt_length
        assert [step.shape[1] for step in steps] == [prefill] + [1] * (n - 1)


@everywhere
def test_07_the_llm_never_sees_the_response(case: Case, fusion: str) -> None:
    """In training too: other responses, the same calls of the LLM with the same result."""
    model = handoff(case, fusion=fusion).train()
    ids, mask = prompt_batch(model)
    seen, states = [], []
    for labels in (label_batch(model), label_batch(model, RESPONSES[::-1])):
        with calls(model.encoder.model) as inputs, calls(model.projector) as read:
            model(ids, mask, labels)
        seen.append(inputs)
        states.append(read[0])
        assert [x.tolist() for x in inputs] == [ids.tolist()]
    assert torch.equal(states[0], states[1])


# --- Frozen ------------------------------------------------------------------------------------------------------


def learn(model: HandoffModel, steps: int) -> Any:
    """A few optimizer steps on the five pairs, in training mode; returns the optimizer."""
    model.train()
    optimizer = adamw(model, lr=1e-2)
    ids, mask = prompt_batch(model)
    labels = label_batch(model)
    for _ in range(steps):
        optimizer.zero_grad()
        response_loss(model(ids, mask, labels).logits, labels, 0.1, None).backward()
        optimizer.step()
    return optimizer


@everywhere
def test_08_training_leaves_the_llm_bit_identical(case: Case, fusion: str) -> None:
    """No gradient, no optimizer state, no dropout: two readings are equal, and after training still the same."""
    model = handoff(case, fusion=fusion)
    llm = model.encoder.model
    before = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    ids, mask = prompt_batch(model)
    states = model.read(ids, mask)
    optimizer = learn(model, 2)
    assert model.training
    assert not any(part.training for part in llm.modules())
    assert torch.equal(model.read(ids, mask), states)
    assert torch.equal(model.read(ids, mask), model.read(ids, mask))
    assert all(torch.equal(tensor, before[name]) for name, tensor in llm.state_dict().items())
    weights = {id(weight) for weight in llm.parameters()}
    assert all(weight.grad is None and not weight.requires_grad for weight in llm.parameters())
    assert not weights & {id(weight) for weight in model.parameters()}
    assert not weights & {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert not any(name.startswith(("encoder.", "_encoder")) for name in model.state_dict())


def grads(model: HandoffModel) -> dict[str, Tensor]:
    ids, mask = prompt_batch(model)
    model(ids, mask, label_batch(model), return_loss=True).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@everywhere
def test_09_gradients_reach_everything_that_is_trained(case: Case, fusion: str) -> None:
    """Finite and not zero for the projector, the mix, the map and the SLM, on the first batch."""
    model = handoff(case, fusion=fusion)
    found = grads(model)
    expected = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert set(found) == expected
    assert {"projector.first.weight", "projector.last.weight"} < expected
    assert ("prompt_map.weight" in expected) == (case in OTHER and fusion != "replace")
    assert ("mix.weights" in expected) == (case.layer == "mix")
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        # A bias before a softmax over keys, or of a query that meets no such bias, cannot matter: BART and GPT-2.
        if not name.endswith(("k_proj.bias", "c_attn.bias")):
            assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[7]], ids=str)
def test_09_at_step_0_only_the_projectors_last_map_learns(case: Case) -> None:
    """It is zero, so nothing passes through it to the first map or to the mix."""
    found = grads(untrained(case))
    for name, gradient in found.items():
        if name.startswith(("projector.first", "mix.")):
            assert not gradient.any(), name
        if name.startswith("projector.last"):
            assert gradient.any(), name


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4], CASES[5]], ids=str)
@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_10_frozen_and_adapted_slms_keep_their_weights(case: Case, training: str) -> None:
    """Only the projector, the map and, with LoRA, the adapter change; the SLM's own weights stay bit-identical."""
    model = untrained(case, slm_training=training, lora_rank=2)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    learn(model, 3)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert {"projector.first.weight", "projector.last.weight", "projector.last.bias"} < changed
    assert ("prompt_map.weight" in changed) == (case in OTHER)
    in_slm = {name for name in changed if name.startswith("slm.")}
    assert all("lora_" in name for name in in_slm)
    assert bool(in_slm) == (training == "lora")


# --- Padding and batching ----------------------------------------------------------------------------------------


@everywhere
def test_11_and_12_a_row_does_not_depend_on_its_batch(case: Case, fusion: str) -> None:
    """Padding, what stands in it, and longer neighbours leave a prompt's logits as they are alone."""
    model = handoff(case, fusion=fusion)
    ids, mask = prompt_batch(model)
    labels = label_batch(model)
    together = logits_of(model)
    garbage = torch.where(mask.bool(), ids, torch.full_like(ids, 77))
    assert close(logits_of(model, input_ids=garbage), together)
    wider = nn.functional.pad(ids, (0, 5), value=5), nn.functional.pad(mask, (0, 5))
    assert close(logits_of(model, input_ids=wider[0], attention_mask=wider[1]), together)
    for row, length in enumerate(mask.sum(1).tolist()):
        n = int((labels[row] != IGNORE).sum())
        alone = logits_of(
            model,
            input_ids=ids[row : row + 1, :length],
            attention_mask=mask[row : row + 1, :length],
            labels=labels[row : row + 1, :n],
        )
        assert close(alone[0], together[row, :n], 2e-4), row  # other shapes, other rounding


@few
def test_11_padding_on_either_side(case: Case, fusion: str) -> None:
    """`generate` of transformers pads a decoder-only model's prompts on the left, an encoder's on the right."""
    model = handoff(case, fusion=fusion)
    ids, mask = prompt_batch(model)
    lengths = mask.sum(1).tolist()
    left, left_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for row, length in enumerate(lengths):
        left[row, -length:], left_mask[row, -length:] = ids[row, :length], 1
    written = model.generate(ids, mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(left, left_mask, max_new_tokens=6, do_sample=False), written)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, :length], max_new_tokens=6, do_sample=False)[0]
        assert written[row, : len(alone)].tolist() == alone.tolist()


@everywhere
def test_12_states_computed_before_equal_states_computed_now(case: Case, fusion: str) -> None:
    """The feature cache rests on this; with the cached states the LLM is not called."""
    model = handoff(case, fusion=fusion)
    ids, mask = prompt_batch(model)
    states = model.read(ids, mask)
    expected = logits_of(model)
    with calls(model.encoder.model) as llm:
        assert torch.equal(logits_of(model, prompt_states=states), expected)
    assert not llm
    # Kept without their padding, as on disk: what stands there cannot matter.
    assert close(logits_of(model, prompt_states=states * mask[..., None]), expected)


# --- Generation --------------------------------------------------------------------------------------------------


@everywhere
def test_13_cached_generation_equals_uncached(case: Case, fusion: str) -> None:
    """Greedy tokens are those of a forward over everything at each step; `generate` of transformers writes the same."""
    model = handoff(case, fusion=fusion)
    tokens = greedy(model)
    ids, mask = prompt_batch(model)
    for row, expected in enumerate(tokens):
        sequence = torch.tensor([expected])
        with torch.no_grad():
            logits = model(ids[row : row + 1], mask[row : row + 1], sequence).logits[0]
        assert logits.argmax(-1).tolist() == expected, row
    written = model.generate(ids, mask, max_new_tokens=8, do_sample=False)
    start = 1 if model.slm.config.is_encoder_decoder else 0
    assert [row[start:][: len(own)].tolist() for row, own in zip(written, tokens, strict=True)] == tokens


@few
def test_13_log_probability_of_a_text_is_the_sum_of_its_steps(case: Case, fusion: str) -> None:
    model = handoff(case, fusion=fusion)
    ids, mask = prompt_batch(model, PROMPTS[:1])
    made = model.generate(
        ids, mask, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens = made.sequences[:, -len(made.logits) :]
    steps = sum(float(step.log_softmax(-1)[0, token]) for step, token in zip(made.logits, tokens[0], strict=True))
    with torch.no_grad():
        forced = model(ids, mask, tokens).logits.log_softmax(-1).gather(-1, tokens[..., None]).sum()
    assert float(forced) == pytest.approx(steps, abs=1e-4)


@everywhere
def test_14_training_and_generation_read_the_same_f(case: Case, fusion: str) -> None:
    model = handoff(case, fusion=fusion)
    seen: list[tuple[Tensor, Tensor]] = []
    inner = model.inject

    def spy(*args: Any) -> tuple[Tensor, Tensor]:
        seen.append(inner(*args))
        return seen[-1]

    model.inject = spy  # type: ignore[method-assign]
    logits_of(model)
    in_training = seen.pop()
    f, mask = fused(model)
    assert torch.equal(f, in_training[0])
    assert torch.equal(mask, in_training[1])


@few
def test_15_beams_share_one_reading(case: Case, fusion: str) -> None:
    """The LLM reads each prompt once, not once per beam; one beam is greedy; more beams find no worse text."""
    model = handoff(case, fusion=fusion)
    ids, mask = prompt_batch(model, PROMPTS[:2])
    keep = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    one = model.generate(ids, mask, num_beams=1, **keep)
    assert [r[-6:].tolist() for r in one.sequences] == greedy(model, PROMPTS[:2], 6)
    with calls(model.encoder.model) as llm, calls(model.projector) as projector:
        beams = model.generate(ids, mask, num_beams=4, length_penalty=0.0, output_scores=True, **keep)
    assert [x.shape[0] for x in llm] == [2]
    assert [x.shape[0] for x in projector] == [2]
    found = torch.stack(one.logits, 1).log_softmax(-1).gather(-1, one.sequences[:, -6:, None]).sum((1, 2))
    assert (beams.sequences_scores >= found - 1e-4).all()


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[5], CASES[7]], ids=str)
def test_16_a_decoder_only_slm_stays_causal(case: Case) -> None:
    """A response token changes no logits up to its own; the LLM's view of later prompt tokens does pass through Z."""
    model = handoff(case)
    labels = label_batch(model)
    before = logits_of(model)
    changed = labels.clone()
    changed[:, 2] = (labels[:, 2] + 1) % 280
    after = logits_of(model, labels=changed)
    assert torch.equal(after[:, :3], before[:, :3])
    assert not close(after[:, 3], before[:, 3])
    # The last token of the first prompt is another: does its first position know?
    ids, mask = prompt_batch(model, PROMPTS[:1])
    other = ids.clone()
    other[0, -1] = 42
    with torch.no_grad():
        z, z_other = (model.project(model.read(i, mask))[0, 0] for i in (ids, other))
    sees_ahead = model.encoder.kind != "decoder-only"
    assert close(z, z_other, 1e-6) != sees_ahead


# --- Tokenizers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[9]], ids=str)
def test_17_prompts_are_the_llms_tokens_and_responses_the_slms(case: Case) -> None:
    """Counted, decoded and scored so, for a text on which the two tokenizers agree nowhere; nothing is cut."""
    model = handoff(case)
    text = "Abracadabra! Ünïcödé 日本"
    llm_ids, slm_ids = prompt_rows(model, [text])[0], model.response_tokenizer(text)["input_ids"]
    assert model.prompt_tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert model.response_tokenizer.get_vocab() == other_tokenizer().get_vocab()
    assert len(llm_ids) != len(slm_ids)
    assert fused(model, [text])[1].sum() == len(llm_ids)
    output = generate(model, [text], max_new_tokens=12)[0]
    assert output.text == other_tokenizer().decode(output.token_ids, skip_special_tokens=True)
    dataset = PairDataset(PAIRS, model.prompt_tokenizer, model.response_tokenizer)
    end = other_tokenizer().eos_token_id
    assert dataset.prompts == prompt_rows(model)
    expected = [other_tokenizer()(pair.response)["input_ids"] + [end] for pair in PAIRS]
    assert dataset.responses == expected
    # The loss is over these ids: a response made certain by its logits costs nothing.
    labels = label_batch(model)
    certain = nn.functional.one_hot(labels.clamp(min=0), model.slm.config.vocab_size).float() * 100
    assert response_loss(certain, labels, 0.0, None) < 1e-6


@pytest.mark.parametrize(("fusion", "slm_limit"), [("add", 128), ("concatenate", 64)])
def test_18_too_long_prompts_are_refused_or_cut_once_for_both_paths(fusion: str, slm_limit: int) -> None:
    """Training and generation name both limits, and cut to the same tokens when asked to."""
    model = handoff(CASES[4], fusion=fusion)
    prompt = "The cat sat on the mat and the dog ran to the house. " * 6
    pairs = [PAIRS[0], Pair(prompt=prompt, response="x")]

    def dataset(truncate: bool) -> PairDataset:
        tokenizers = model.prompt_tokenizer, model.response_tokenizer
        return PairDataset(pairs, *tokenizers, limits=model.prompt_limits, truncate=truncate)

    message = rf"prompt 1 .*LLM reads at most 128.*SLM reads at most {slm_limit}"
    with pytest.raises(PromptError, match=message):
        dataset(False)
    with calls(model.encoder.model) as llm:
        with pytest.raises(PromptError, match=message):
            generate(model, [PROMPTS[0], prompt])
        assert not llm
        generate(model, [prompt], truncate=True, max_new_tokens=1)
    cut = [*prompt_rows(model, [prompt])[0][: slm_limit - 1], tiny.EOS]
    assert llm[0].tolist() == [cut]
    assert dataset(True).prompts[1] == cut


# --- Speculative extension ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_24_speculative_output_is_the_llms_own(case: Case, tmp_path: Path) -> None:
    """Greedy it is transformers' own, sampled it is plain sampling's; the LLM reads once, for both models."""
    handoff(case).save_pretrained(tmp_path)
    llm: Any = load(folder(case.llm), dtype="float32")
    spec = f"handoff:model={tmp_path}"
    for sampling in (Sampling(), Sampling(temperature=1.2, seed=4)):
        plain = generate(llm, PROMPTS, max_new_tokens=12, sampling=sampling)
        with calls(llm.lm.get_encoder()) as reads:
            found = generate(llm, PROMPTS, max_new_tokens=12, sampling=sampling, drafter=spec, batch_size=len(PROMPTS))
        assert [output.token_ids for output in found] == [output.token_ids for output in plain]
        assert len(reads) == 1
    for prompt, output in zip(PROMPTS, generate(llm, PROMPTS, max_new_tokens=12, drafter=spec), strict=True):
        ids = llm.tokenizer(prompt, return_tensors="pt").input_ids
        expected = llm.lm.generate(ids, max_new_tokens=12, do_sample=False)[0, 1:].tolist()
        assert output.token_ids == expected
