"""Saving and loading: the same bits come back, from wherever the folders stand, and a failure changes nothing."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from handoffs import CASES, OTHER, PROMPTS, Case, folder, handoff, label_batch, prompt_batch, untrained
from safetensors.torch import load_file
from torch import Tensor

import baton.handoff.model as module
from baton.engine import generate
from baton.errors import BatonError, ModelMismatch, StorageError
from baton.handoff.model import HandoffModel
from baton.models.loading import load
from baton.models.writer import Writer


def logits_of(model: HandoffModel) -> Tensor:
    with torch.no_grad():
        return model(*prompt_batch(model), label_batch(model)).logits


def same_weights(first: HandoffModel, second: HandoffModel) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("case", "training"),
    [(case, "full") for case in CASES]
    + [(case, training) for case in (CASES[0], CASES[2], CASES[7]) for training in ("lora", "frozen")],
    ids=str,
)
def test_round_trip_is_bit_equal(case: Case, training: str, tmp_path: Path) -> None:
    """Every weight and every logit, the options, both tokenizers; nothing of the LLM is stored."""
    model = handoff(case, slm_training=training, lora_rank=2, fusion="concatenate" if case is CASES[2] else "add")
    if training == "full":
        with torch.no_grad():
            for weight in model.slm.parameters():
                weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = HandoffModel.from_pretrained(tmp_path)
    assert same_weights(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not loaded.training
    assert loaded.config.handoff == model.config.handoff
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    for mine, theirs in (
        (loaded.prompt_tokenizer, model.prompt_tokenizer),
        (loaded.response_tokenizer, model.response_tokenizer),
    ):
        assert mine(PROMPTS)["input_ids"] == theirs(PROMPTS)["input_ids"]
    stored = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.safetensors")}
    assert stored == {"handoff.safetensors"} | ({"slm/model.safetensors"} if training == "full" else set())
    names = load_file(tmp_path / "handoff.safetensors")
    assert any("lora_" in name for name in names) == (training == "lora")
    assert not any(name.startswith("slm.") and "lora_" not in name for name in names)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_tied_weights_stay_tied(case: Case, tmp_path: Path) -> None:
    """The SLM's table and its head are one tensor, stored once."""
    model = handoff(case)
    model.save_pretrained(tmp_path)
    slm = HandoffModel.from_pretrained(tmp_path).slm
    assert slm.get_output_embeddings().weight is slm.get_input_embeddings().weight
    shape = list(slm.get_input_embeddings().weight.shape)
    assert [list(w.shape) for w in load_file(tmp_path / "slm" / "model.safetensors").values()].count(shape) == 1


def test_bf16_is_stored_and_loaded_as_bf16(tmp_path: Path) -> None:
    model = handoff(CASES[0]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = HandoffModel.from_pretrained(tmp_path)
    assert loaded.dtype == loaded.slm.dtype == loaded.encoder.model.dtype == torch.bfloat16
    assert same_weights(loaded, model)
    wide = HandoffModel.from_pretrained(tmp_path, dtype="float32")
    assert wide.dtype == wide.slm.dtype == wide.encoder.model.dtype == torch.float32
    assert torch.equal(wide.projector.first.weight, model.projector.first.weight.float())


def test_load_knows_a_handoff(tmp_path: Path) -> None:
    model = handoff(CASES[0])
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert isinstance(loaded, HandoffModel)
    assert isinstance(loaded, Writer)
    assert [o.token_ids for o in generate(tmp_path, PROMPTS[:2], max_new_tokens=5)] == [
        o.token_ids for o in generate(model, PROMPTS[:2], max_new_tokens=5)
    ]


@pytest.mark.parametrize("training", ["full", "lora"])
def test_pointers_survive_a_move_of_the_whole_tree(
    training: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLM, SLM and hand-off side by side, given by relative paths, moved together, loaded from somewhere else."""
    tree = tmp_path / "models"
    for name in ("t5", "t5-slm"):
        shutil.copytree(folder(name), tree / name)
    monkeypatch.chdir(tree)
    torch.manual_seed(0)
    options = module.HandoffOptions(slm_training=training)  # type: ignore[arg-type]
    model = HandoffModel.build(llm="t5", slm="t5-slm", options=options, dtype="float32").eval()
    model.config.held_out = "../test.jsonl"
    (tree / "deep").mkdir()
    (tree / "deep/test.jsonl").touch()
    model.save_pretrained("deep/handoff")
    config = json.loads((tree / "deep/handoff/config.json").read_text())
    assert config["llm"]["id"] == "../../t5"
    assert config["slm_alone"] == "../../t5-slm"
    monkeypatch.chdir(tmp_path)
    tree.rename(tmp_path / "elsewhere")
    loaded = HandoffModel.from_pretrained("elsewhere/deep/handoff")
    assert same_weights(loaded, model)
    assert torch.equal(logits_of(loaded), logits_of(model))
    # Saved again in another place, it still points to the same folders.
    loaded.save_pretrained(tmp_path / "copy")
    copied = json.loads((tmp_path / "copy/config.json").read_text())
    assert copied["llm"]["id"] == "../elsewhere/t5"
    assert copied["held_out"] == "../elsewhere/deep/test.jsonl"
    assert same_weights(HandoffModel.from_pretrained(tmp_path / "copy"), model)


@pytest.mark.parametrize("training", ["full", "lora"])
def test_what_is_made_in_float16_knows_its_llm_again(training: str, tmp_path: Path) -> None:
    """Weights stored in float32 do not round to the same bfloat16 by way of float16."""
    options = module.HandoffOptions(slm_training=training)  # type: ignore[arg-type]
    model = HandoffModel.build(llm=folder("t5"), slm=folder("t5-slm"), options=options, dtype="float16")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    assert model.encoder.model.dtype == torch.float16
    model.save_pretrained(tmp_path / "handoff")
    assert same_weights(HandoffModel.from_pretrained(tmp_path / "handoff"), model)


def test_an_adapter_refuses_another_slm(tmp_path: Path) -> None:
    shutil.copytree(folder("t5-slm"), tmp_path / "slm")
    model = HandoffModel.build(
        llm=folder("t5"), slm=tmp_path / "slm", options=module.HandoffOptions(slm_training="lora")
    )
    model.save_pretrained(tmp_path / "handoff")
    tiny.t5(77, d_model=24, num_layers=2).save_pretrained(tmp_path / "slm")
    with pytest.raises(ModelMismatch, match="not the SLM this adapter was trained on"):
        HandoffModel.from_pretrained(tmp_path / "handoff")


def test_missing_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    tiny.t5(1).save_pretrained(tmp_path)
    with pytest.raises(ModelMismatch, match="tokenizer"):
        HandoffModel.build(llm=tmp_path, slm=folder("t5-slm"), options=module.HandoffOptions())


def test_the_card_and_foreign_files_stay(tmp_path: Path) -> None:
    """Saving replaces what it writes; a card is replaced only by another card."""
    model = handoff(CASES[0])
    model.save_pretrained(tmp_path, card="# first")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log").write_text("kept")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# first"
    assert (tmp_path / "run" / "log").read_text() == "kept"
    model.save_pretrained(tmp_path, card="# second")
    assert (tmp_path / "README.md").read_text() == "# second"


def test_a_full_disk_while_saving_leaves_the_old_handoff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = handoff(CASES[0])
    first.save_pretrained(tmp_path / "handoff")
    second = handoff(CASES[0])
    with torch.no_grad():
        second.projector.last.weight.zero_()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        second.save_pretrained(tmp_path / "handoff")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["handoff"]
    assert same_weights(HandoffModel.from_pretrained(tmp_path / "handoff"), first)


# --- The encoder's life, and signals -----------------------------------------------------------------------------


def test_release_encoder() -> None:
    """What was read before can be answered; reading is refused with a reason; moving the model still works."""
    model = handoff(CASES[0])
    ids, mask = prompt_batch(model)
    states, expected = model.read(ids, mask), logits_of(model)
    model.release_encoder()
    with pytest.raises(BatonError, match="released"):
        model.read(ids, mask)
    with pytest.raises(BatonError, match="released"):
        generate(model, PROMPTS)
    with torch.no_grad():
        again = model(ids, mask, label_batch(model), prompt_states=states).logits
    assert torch.equal(again, expected)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16


def test_moving_the_model_moves_the_llm_but_does_not_own_it() -> None:
    model = handoff(CASES[0])
    llm = model.encoder.model
    model.to(torch.bfloat16)
    assert llm.dtype == torch.bfloat16
    assert llm not in set(model.modules())
    model.train()
    model.requires_grad_(True)
    assert not llm.training
    assert not any(weight.requires_grad for weight in llm.parameters())


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_with_signal_restores(case: Case) -> None:
    """Inside, Z is what is asked for; afterwards, also after an error, all is as before."""
    model = handoff(case)
    expected = logits_of(model)
    before = model.constant.detach().clone()
    ids, mask = prompt_batch(model)
    value = torch.full_like(before, 0.3)
    with torch.no_grad():
        embeds = model.prompt_embeddings(ids)
        with model.with_signal("zero"):
            assert torch.equal(model.inject(ids, mask, None)[0], embeds)
        with model.with_signal("constant", value):
            assert torch.equal(model.inject(ids, mask, None)[0], embeds + value * mask[..., None])
        with model.with_signal("shuffled"):
            z = model.project(model.read(ids, mask)) * mask[..., None]
            other = embeds + z.roll(1, 0) * mask[..., None]
            assert torch.equal(model.inject(ids, mask, model.read(ids, mask))[0], other)
            # Alone in its batch, as the last one of a validation can be, a prompt has no other.
            assert torch.equal(model.inject(ids[:1], mask[:1], model.read(ids[:1], mask[:1]))[0], embeds[:1])
        with pytest.raises(ZeroDivisionError), model.with_signal("constant", value):
            _ = 1 / 0
    assert model.signal == "llm"
    assert torch.equal(model.constant, before)
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("signal", ["zero", "constant"])
def test_baselines_without_a_signal_do_not_read(signal: str) -> None:
    """They train no projector, and the LLM is not called."""
    model = untrained(CASES[0], signal=signal)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not any(name.startswith("projector") for name in trained)
    assert ("constant" in trained) == (signal == "constant")
    llm, _ = model.encoder, model.release_encoder()
    assert llm.kind == "encoder-decoder"
    assert torch.equal(logits_of(model), logits_of(untrained(CASES[0])))


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_prompt_tuning_puts_learned_vectors_in_front(case: Case, tmp_path: Path) -> None:
    """[P ; E] whatever the prompt; the vectors start as embeddings of tokens, are stored, and cost prompt room."""
    model = untrained(case, signal="prompt", prompt_length=3, slm_training="frozen")
    assert [n for n, w in model.named_parameters() if w.requires_grad] == ["soft_prompt.weight"]
    assert model.soft_prompt is not None
    table = model.slm.get_input_embeddings().weight
    assert all((row == table).all(1).any() for row in model.soft_prompt.weight)
    ids, mask = prompt_batch(model)
    embeds, wide = model.inject(ids, mask, None)
    assert torch.equal(embeds[:, 3:], model.prompt_embeddings(ids))
    assert all(torch.equal(row[:3], model.soft_prompt.weight) for row in embeds)
    assert torch.equal(wide, torch.cat([mask.new_ones(len(mask), 3), mask], 1))
    plain = untrained(case)
    limits = {k: n - 3 for k, n in plain.prompt_limits.items() if k == "the SLM"}
    assert model.prompt_limits == limits
    assert plain.response_room(5) - model.response_room(5) == (0 if plain.slm.config.is_encoder_decoder else 3)
    expected = logits_of(model)
    assert not torch.equal(expected, logits_of(plain))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(HandoffModel.from_pretrained(tmp_path / "saved")), expected)


@pytest.mark.parametrize("case", OTHER[:2], ids=str)
def test_replacement_with_two_tokenizers_needs_no_map(case: Case) -> None:
    """E is not used there: the map is neither trained nor computed, and cached states are enough."""
    model = handoff(case, fusion="replace")
    states, expected = model.read(*prompt_batch(model)), logits_of(model)
    model.release_encoder()
    with torch.no_grad():
        assert torch.equal(model(*prompt_batch(model), label_batch(model), prompt_states=states).logits, expected)
