"""Reading: only the part of the LLM that reads is loaded, and it gives what the whole model has there."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from handoffs import MODELS, Case, folder, handoff, untrained
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

from baton.errors import ModelMismatch, NotAHandoff, UnknownOption
from baton.handoff.model import HandoffModel
from baton.handoff.read import LayerMix, PromptEncoder, fingerprint, resolve_layer
from baton.models.loading import kind_of

IDS = torch.tensor([[5, 6, 7, 8, 9, 1], [40, 41, 1, 0, 0, 0]])
MASK = (IDS != 0).long()
KINDS = {
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "llama": "decoder-only",
    "gpt2": "decoder-only",
    "bert": "encoder-only",
}


def whole(name: str) -> Any:
    """The whole model, as its users load it."""
    auto = {"encoder-decoder": AutoModelForSeq2SeqLM, "decoder-only": AutoModelForCausalLM}
    return auto.get(KINDS[name], AutoModelForMaskedLM).from_pretrained(folder(name)).eval()


def hidden_states(name: str) -> tuple[Tensor, ...]:
    """After the embeddings and after each layer, the last after the final norm."""
    model = whole(name)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states


def unit(states: Tensor) -> Tensor:
    return states / states.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()


def close(a: Tensor, b: Tensor) -> bool:
    real = MASK[..., None]
    return torch.allclose(a * real, b * real, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_kind(name: str) -> None:
    assert kind_of(whole(name).config) == KINDS[name]


@pytest.mark.parametrize("name", KINDS)
def test_last_layer_is_the_models_own_output(name: str) -> None:
    """After the final norm, on ragged prompts, equal to the whole model's hidden state."""
    encoder = PromptEncoder.from_pretrained(folder(name))
    assert close(encoder(IDS, MASK), hidden_states(name)[-1])
    assert encoder.width == tiny.WIDTH


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("layer", "index"), [("1", 1), ("2", 2), ("0.5", 2), ("0.75", 3), ("-2", 3)])
def test_a_middle_layer_is_that_of_the_whole_model(name: str, layer: str, index: int) -> None:
    """Divided by its root mean square: no norm of the model is meant for it."""
    encoder = PromptEncoder.from_pretrained(folder(name), layer=layer)
    states = encoder(IDS, MASK)
    assert close(states, unit(hidden_states(name)[index]))
    assert states.pow(2).mean(-1)[MASK.bool()].sub(1).abs().max() < 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_mix_reads_all_layers(name: str) -> None:
    """Side by side, each at unit size; equal weights at the start, then learned ones times a gain."""
    encoder = PromptEncoder.from_pretrained(folder(name), layer="mix")
    states = encoder(IDS, MASK)
    layers = [unit(h) for h in hidden_states(name)[1:]]
    assert encoder.layers_read == len(layers) == 4
    assert close(states, torch.cat(layers, -1))
    mix = LayerMix(4)
    assert close(mix(states), sum(layers) / 4)  # type: ignore[arg-type]
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([0.0, -1e9, -1e9, torch.log(torch.tensor(3.0))]))
        mix.gain.fill_(2.0)
    assert close(mix(states), 0.5 * layers[0] + 1.5 * layers[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_last_and_full_depth_are_the_same(dtype: torch.dtype) -> None:
    last, full = (PromptEncoder.from_pretrained(folder("llama"), layer=layer, dtype=dtype) for layer in ("last", "4"))
    assert last.model.dtype == dtype
    assert torch.equal(last(IDS, MASK), full(IDS, MASK))


def count(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_only_what_reads_is_loaded(name: str) -> None:
    """No decoder, no output head, no pooler: the parameters are those of the reading part and no more."""
    model = whole(name)
    encoder = PromptEncoder.from_pretrained(folder(name)).model
    part = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    pooler = getattr(part, "pooler", None)
    assert count(encoder) == count(part) - (count(pooler) if pooler is not None else 0)
    assert count(encoder) < count(model) or name in ("gpt2", "bert")  # GPT-2's head is its embedding table
    names = [name for name, _ in encoder.named_parameters()]
    assert not [n for n in names if "decoder" in n or "lm_head" in n or "pooler" in n or "cls." in n]
    assert not any(weight.requires_grad for weight in encoder.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_upper_layers_are_not_loaded(name: str) -> None:
    encoder = PromptEncoder.from_pretrained(folder(name), layer="2")
    layers = encoder.model.layers if name == "llama" else encoder.model.h
    assert len(layers) == 2
    per_layer = sum(p.numel() for p in layers[0].parameters())
    assert count(PromptEncoder.from_pretrained(folder(name)).model) - count(encoder.model) == 2 * per_layer


@pytest.mark.parametrize("name", KINDS)
def test_fingerprint_is_that_of_the_weights(name: str) -> None:
    """Equal in float32 and in bf16 and at each load; another after the smallest change of one weight in bf16."""
    first = PromptEncoder.from_pretrained(folder(name), dtype="float32")
    assert first.fingerprint() == PromptEncoder.from_pretrained(folder(name), dtype="bfloat16").fingerprint()
    assert first.fingerprint() == PromptEncoder.from_pretrained(folder(name)).fingerprint()
    weight = first.model.get_input_embeddings().weight
    before = first.fingerprint()
    with torch.no_grad():
        weight[7, 3] *= 1.01
    assert first.fingerprint() != before


def test_fingerprint_sees_names_and_shapes() -> None:
    assert fingerprint(torch.nn.Linear(2, 3, bias=False)) != fingerprint(torch.nn.Linear(3, 2, bias=False))


@pytest.mark.parametrize(
    ("layer", "depth", "expected"),
    [("last", 7, 7), ("mix", 7, None), ("1", 7, 1), ("-1", 7, 7), ("-7", 7, 1), ("0.5", 8, 4), ("1.0", 8, 8)],
)
def test_resolve_layer(layer: str, depth: int, expected: int | None) -> None:
    assert resolve_layer(layer, depth) == expected


@pytest.mark.parametrize("layer", ["0", "8", "-8", "0.01", "middle", ""])
def test_impossible_layers(layer: str) -> None:
    with pytest.raises(UnknownOption, match="layer"):
        resolve_layer(layer, 7)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_encoders_are_read_at_their_last_layer(name: str) -> None:
    with pytest.raises(UnknownOption, match="read at its last layer"):
        PromptEncoder.from_pretrained(folder(name), layer="1")


def test_missing_llm(tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch, match=r"no config.json"):
        PromptEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder("llama") / "config.json").read_text())
    with pytest.raises(ModelMismatch, match="cannot load the LLM"):
        PromptEncoder.from_pretrained(tmp_path)


def test_an_llm_with_missing_weights_is_refused(tmp_path: Path) -> None:
    """transformers would draw them at random, others at each load."""
    model = tiny.llama(num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    config = model.config
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelMismatch, match=r"lacks weights of LlamaModel: .*layers\.2"):
        PromptEncoder.from_pretrained(tmp_path)
    assert len(PromptEncoder.from_pretrained(tmp_path, layer="2").model.layers) == 2


# --- With a hand-off around it -----------------------------------------------------------------------------------


def test_another_llm_is_refused_by_name(tmp_path: Path) -> None:
    """Same shapes, other weights: the error names the one it was trained with, and nothing of the other is used."""
    handoff(Case("t5", "t5-slm")).save_pretrained(tmp_path / "handoff")
    tiny.t5(99).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelMismatch, match=rf"trained with the LLM '.*{folder('t5').name}'.*sha256.*other"):
        HandoffModel.from_pretrained(tmp_path / "handoff", llm=tmp_path / "other")
    with pytest.raises(ModelMismatch, match="trained with the LLM"):
        HandoffModel.from_pretrained(tmp_path / "handoff", llm=folder("bart"))
    HandoffModel.from_pretrained(tmp_path / "handoff", llm=folder("t5"))


def test_a_missing_llm_is_named(tmp_path: Path) -> None:
    model = handoff(Case("t5", "t5-slm"))
    model.config.llm["id"] = str(tmp_path / "gone")
    model.save_pretrained(tmp_path / "handoff")
    with pytest.raises(ModelMismatch, match=r"expected '.*gone' \(sha256 of the weights used [0-9a-f]{12}"):
        HandoffModel.from_pretrained(tmp_path / "handoff")
    loaded = HandoffModel.from_pretrained(tmp_path / "handoff", encoder=False)  # with cached states it can still write
    assert loaded.config.llm["sha256"] == model.config.llm["sha256"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_check_does_not_depend_on_the_dtype_asked_for(dtype: str, tmp_path: Path) -> None:
    handoff(Case("llama", "llama-slm", "2")).save_pretrained(tmp_path)
    loaded = HandoffModel.from_pretrained(tmp_path, dtype=dtype)
    assert {weight.dtype for weight in loaded.parameters()} == {getattr(torch, dtype)}
    assert loaded.encoder.model.dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    "case", [Case(n, "t5-slm") for n in KINDS] + [Case(n, "t5-slm", "2") for n in ("llama", "gpt2")], ids=str
)
def test_the_stored_llm_reads_the_same(case: Case, tmp_path: Path) -> None:
    """include_llm: the folder alone is enough, also where only lower layers are stored; the pointer still counts."""
    model = untrained(case, include_llm=True)
    model.config.llm["id"] = "gone/gone"
    model.save_pretrained(tmp_path / "a")
    loaded = HandoffModel.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded.read(IDS, MASK), model.read(IDS, MASK))
    assert loaded.config.llm == model.config.llm
    assert loaded.encoder.fingerprint() == model.encoder.fingerprint()
    loaded.save_pretrained(tmp_path / "b")  # and once more from there
    again = HandoffModel.from_pretrained(tmp_path / "b")
    assert torch.equal(again.read(IDS, MASK), model.read(IDS, MASK))
    given = HandoffModel.from_pretrained(tmp_path / "a", llm=folder(case.llm))
    assert torch.equal(given.read(IDS, MASK), model.read(IDS, MASK))


def test_what_is_no_handoff(tmp_path: Path) -> None:
    with pytest.raises(NotAHandoff, match="holds a model, but no hand-off"):
        HandoffModel.from_pretrained(folder("t5"))
    with pytest.raises(NotAHandoff, match=r"no config.json"):
        HandoffModel.from_pretrained(tmp_path)


def test_no_two_models_of_these_tests_are_taken_for_each_other() -> None:
    assert len({fingerprint(make(seed, **changes)) for make, seed, changes, _ in MODELS.values()}) == len(MODELS)
