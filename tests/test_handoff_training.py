"""Training a hand-off: it learns what it should, from the LLM and not otherwise, and survives kills and company."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from handoffs import (
    CASES,
    MANY,
    OPTIONS,
    Case,
    calls,
    folder,
    label_batch,
    prompt_batch,
    untrained,
)
from torch import Tensor
from transformers import T5ForConditionalGeneration

from baton.errors import BatonError, DataError, PromptError, UnknownOption
from baton.handoff.config import HandoffOptions
from baton.handoff.model import HandoffModel
from baton.handoff.project import Projector
from baton.handoff.read import PromptEncoder
from baton.handoff.training import RUN, fit_projector, train_handoff
from baton.models.text import TextToText
from baton.train.dataset import PairDataset
from baton.train.options import TrainOptions
from baton.train.trainer import adamw, response_loss
from baton.types import Pair

STEADY: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3}  # Muon makes rounding a hundred times larger


def train_in(out: Path, *, case: Case = CASES[0], **changes: Any) -> bool:
    given: dict[str, Any] = {
        "llm": folder(case.llm),
        "slm": folder(case.slm),
        "pairs": MANY,
        "validation": MANY[:5],
        "options": HandoffOptions(layer=case.layer),
        "train": OPTIONS,
    }
    return train_handoff(out=out, **given | changes)


def curve(out: Path) -> dict[int, dict[str, float]]:
    """Step -> the numbers logged there that do not depend on the clock, from the last checkpoint."""
    last = max((out / RUN).glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    found: dict[int, dict[str, float]] = {}
    for entry in json.loads(last.read_text())["log_history"]:
        kept = {k: v for k, v in entry.items() if k in ("loss", "grad_norm", "learning_rate", "eval_loss")}
        found.setdefault(entry["step"], {}).update(kept)
    return found


def same_weights(first: Path, second: Path) -> bool:
    a, b = (HandoffModel.from_pretrained(path).state_dict() for path in (first, second))
    return all(torch.equal(a[name], b[name]) for name in a)


# --- Learning ----------------------------------------------------------------------------------------------------


def fit(model: Any, batch: dict[str, Tensor], steps: int, lr: float = 1e-2) -> float:
    """Train on one batch, its rows in another order at each step; returns the loss at the end, without dropout."""
    optimizer = adamw(model, lr=lr)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        order = torch.randperm(len(batch["labels"]), generator=generator)
        shuffled = {name: tensor[order] for name, tensor in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 10, 2 * (steps - step) / steps)
        optimizer.zero_grad()
        response_loss(model(**shuffled).logits, shuffled["labels"], 0.0, None).backward()
        optimizer.step()
    model.eval()
    return loss_of(model, batch)


def loss_of(model: Any, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(response_loss(model(**batch).logits, batch["labels"], 0.0, None))


def fresh(case: Case, **options: Any) -> HandoffModel:
    """An untrained hand-off whose SLM is initialised as its family trains best, and has no dropout."""
    model = untrained(case, **options)
    torch.manual_seed(1)
    model.slm = type(model.slm)(model.slm.config)
    for part in model.slm.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return model


@pytest.mark.parametrize(("case", "fusion"), [(CASES[0], "add"), (CASES[0], "replace"), (CASES[2], "replace")], ids=str)
def test_19_two_dozen_pairs_are_learnt_by_heart(case: Case, fusion: str) -> None:
    """Near-zero loss: nothing between prompt and response loses what tells 24 random prompts apart."""
    model = fresh(case, fusion=fusion)
    generator = torch.Generator().manual_seed(0)
    prompts, responses = (torch.randint(20, 250, (24, n), generator=generator) for n in (3, 2))
    labels = torch.cat([responses, torch.full((24, 1), tiny.EOS)], 1)
    batch = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "labels": labels}
    batch["prompt_states"] = model.read(prompts, batch["attention_mask"])
    assert loss_of(model, batch) > 5
    assert fit(model, batch, 120) < 0.1


def riddle() -> tuple[dict[str, Tensor], Any]:
    """A task whose answer the SLM cannot see: to it, all prompts look the same.

    The prompts are one token long, 8 of them; the SLM has the same frozen embedding for all; the response is one of 4
    tokens. Only the LLM tells the prompts apart, and an SLM without it can do no better than log 4 on that token.
    """
    prompts = torch.arange(20, 28)[:, None]
    labels = torch.stack([60 + torch.arange(8) % 4, torch.full((8,), tiny.EOS)], 1)
    batch = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "labels": labels}

    def blind(model: Any) -> Any:
        slm = model.slm if isinstance(model, HandoffModel) else model.model
        table = slm.get_input_embeddings().weight
        with torch.no_grad():
            table[20:28] = table[20]
        table.requires_grad_(False)
        return model

    return batch, blind


GUESS = 1.386 / 2  # log 4 on one of two tokens


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_20_and_21_the_gain_is_what_the_llm_has_read(case: Case) -> None:
    """True Z solves the riddle. Alone, with Z = 0, constant or of another prompt the SLM guesses, trained so or not."""
    batch, blind = riddle()
    model = blind(fresh(case))
    solved = fit(model, batch, 80)
    baselines = {"alone": fit(blind(TextToText(fresh(case).slm)), batch, 80)}  # the same as trained with Z = 0
    if case == CASES[7]:
        for signal in ("constant", "shuffled"):
            baselines[signal] = fit(blind(fresh(case, signal=signal)), batch, 80)
    for signal in ("zero", "constant", "shuffled"):
        with model.with_signal(signal):  # type: ignore[arg-type]
            baselines[f"{signal}, trained with the true Z"] = loss_of(model, batch)
    for name, loss in baselines.items():
        assert loss > 0.95 * GUESS, name
        assert solved < 0.5 * loss, name


def test_21_conditioning_does_not_hurt() -> None:
    """On data that the SLM can learn alone, the same steps with the hand-off end no higher, on examples not seen."""
    losses = {}
    for name in ("alone", "handoff"):
        torch.manual_seed(0)
        model: Any = fresh(CASES[0])
        seen, held = ({}, {})  # type: ignore[var-annotated]
        for batch, pairs in ((seen, MANY[5:13]), (held, MANY[:5])):
            ids, mask = prompt_batch(model, [p.prompt for p in pairs])
            batch |= {"input_ids": ids, "attention_mask": mask}
            batch["labels"] = label_batch(model, [p.response for p in pairs])
        model = model if name == "handoff" else TextToText(model.slm)
        fit(model, seen, 25)
        losses[name] = loss_of(model, held)
    assert losses["alone"] < 3.5  # from 5.7: both have learnt something
    assert losses["handoff"] <= losses["alone"] + 0.05


# --- What a run leaves ---------------------------------------------------------------------------------------------


def test_training_saves_a_handoff_that_is_what_was_trained(tmp_path: Path) -> None:
    """Loss, card, pointers and the held-out split; of the LLM only a pointer; the same command gives the same bits."""
    out = tmp_path / "handoff"
    train = replace(OPTIONS, eval_every=4, save_every=4, max_quality_examples=2)
    assert train_in(out, held_out="../test.jsonl", command="the command", train=train)
    losses = curve(out)
    assert losses[8]["eval_loss"] < losses[4]["eval_loss"]
    model = HandoffModel.from_pretrained(out)
    trained = torch.load(out / RUN / "checkpoint-8" / "pytorch_model.bin")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["held_out"] == "../test.jsonl"
    assert model.config.handoff == HandoffOptions()
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "the command" in card
    assert "20 training and 5 validation pairs" in card
    assert f"loss {losses[8]['eval_loss']:.4g}" in card
    assert model.config.llm["sha256"][:16] in card
    assert re.search(r"bleu \S+, chrf \S+, rouge_l \S+, steps 8", card)
    assert train_in(tmp_path / "again", train=train)
    assert same_weights(tmp_path / "again", out)
    assert curve(tmp_path / "again") == losses


@pytest.mark.parametrize("training", ["lora", "frozen"])
def test_10_the_slm_on_disk_is_the_one_that_was_given(training: str, tmp_path: Path) -> None:
    """After a whole run: the base's weights bit-identical in memory and on disk, the adapter's and projector's not."""
    before = (folder("t5-slm") / "model.safetensors").read_bytes()
    assert train_in(tmp_path / "run", options=HandoffOptions(slm_training=training, lora_rank=2))  # type: ignore[arg-type]
    assert (folder("t5-slm") / "model.safetensors").read_bytes() == before
    model = HandoffModel.from_pretrained(tmp_path / "run")
    base = T5ForConditionalGeneration.from_pretrained(folder("t5-slm")).state_dict()
    own = {n.replace(".base_layer", ""): w for n, w in model.slm.state_dict().items() if "lora_" not in n}
    assert own.keys() == base.keys()
    assert all(torch.equal(own[name], base[name]) for name in base)
    assert model.projector.last.weight.any()
    assert not (tmp_path / "run" / "slm" / "model.safetensors").exists()
    adapter = [weight for name, weight in model.named_parameters() if "lora_B" in name]
    assert bool(adapter) == (training == "lora")
    assert all(weight.any() for weight in adapter)


@pytest.mark.parametrize("case", [Case("t5", "t5-calm"), Case("gpt2", "t5-calm", "mix")], ids=str)
def test_cached_states_train_as_fresh_ones(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the cache, which keeps states in bf16, the LLM reads each prompt once, before training, and never again."""
    count: list[int] = []
    inner = PromptEncoder.__call__

    def counted(self: PromptEncoder, ids: Tensor, mask: Tensor) -> Tensor:
        count.append(len(ids))
        return inner(self, ids, mask).bfloat16().float()

    monkeypatch.setattr(PromptEncoder, "__call__", counted)
    done: list[tuple[int, int]] = []
    train = replace(OPTIONS, **STEADY)
    assert train_in(tmp_path / "cached", case=case, train=train, on_cache=lambda *numbers: done.append(numbers))
    assert sum(count) == 20  # the validation prompts are among the others
    assert done[-1] == (20, 20)
    count.clear()
    assert train_in(tmp_path / "fresh", case=case, train=train, cache_gb=0.0)
    assert sum(count) == 8 * 4 + 4 * 5
    expected = curve(tmp_path / "fresh")
    for step, numbers in curve(tmp_path / "cached").items():
        for name in ("loss", "eval_loss"):
            assert numbers[name] == pytest.approx(expected[step][name], abs=2e-4), step


def test_the_shuffled_baseline_trains(tmp_path: Path) -> None:
    """Also where the last batch of a validation, or of its written answers, holds one prompt."""
    train = replace(OPTIONS, max_steps=2, max_quality_examples=1)
    assert train_in(tmp_path, options=HandoffOptions(signal="shuffled"), train=train)
    assert HandoffModel.from_pretrained(tmp_path).signal == "shuffled"


@pytest.mark.parametrize("signal", ["zero", "constant", "prompt"])
def test_baselines_need_no_llm_in_training(signal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: Any) -> None:
        raise AssertionError("the LLM was called")

    monkeypatch.setattr(PromptEncoder, "__call__", no)
    assert train_in(tmp_path, options=HandoffOptions(signal=signal))  # type: ignore[arg-type]
    model = HandoffModel.from_pretrained(tmp_path)
    assert model.signal == signal
    assert bool(model.constant.any()) == (signal == "constant")


def test_another_command_does_not_continue_a_run(tmp_path: Path) -> None:
    """Other options, another SLM or other data are named; the same models under another name are the same models."""
    short = replace(OPTIONS, max_steps=2)
    assert train_in(tmp_path / "run", train=short)
    for changes, name in (
        ({"train": replace(short, learning_rate=1.0)}, r"train\.learning_rate"),
        ({"options": HandoffOptions(fusion="replace")}, r"handoff\.fusion"),
        ({"slm": folder("bart-slm")}, r"slm\.sha256"),
        ({"pairs": MANY[1:]}, r"data\.pairs"),
        ({"validation": MANY[1:5]}, r"data\.validation"),
        ({"case": CASES[8]}, r"llm\.sha256"),
    ):
        with pytest.raises(BatonError, match=rf"other settings \(.*{name}"):
            train_in(tmp_path / "run", **{"train": short} | changes)
    shutil.copytree(folder("t5"), tmp_path / "llm")
    assert train_in(tmp_path / "run", train=short, llm=tmp_path / "llm")


def test_bad_data_is_told_before_anything_starts(tmp_path: Path) -> None:
    long = "the cat sat on the mat " * 40
    tight = CASES[4]
    with pytest.raises(PromptError, match="prompt 20 has"):
        train_in(tmp_path, case=tight, pairs=[*MANY, Pair(prompt=long, response="x")])
    with pytest.raises(DataError, match="pair 20: after a prompt"):
        train_in(tmp_path, case=tight, pairs=[*MANY, Pair(prompt="x", response=long)])
    with pytest.raises(DataError, match="no examples"):
        train_in(tmp_path, validation=[])
    with pytest.raises(DataError, match="do not fill a batch"):
        train_in(tmp_path / "small", pairs=MANY[:3])
    with pytest.raises(UnknownOption, match="layer"):
        train_in(tmp_path, options=HandoffOptions(layer="3"))
    pairs = [*MANY, Pair(prompt=long, response="x"), Pair(prompt="x", response=long)]
    assert train_in(tmp_path / "cut", case=tight, pairs=pairs, truncate=True, train=replace(OPTIONS, max_steps=2))


# --- Kills, Ctrl-C, two processes ----------------------------------------------------------------------------------

SCRIPT = """
import json, os, signal, sys
import torch
from transformers import Trainer
from baton.handoff.config import HandoffOptions
from baton.handoff.training import train_handoff
from baton.train.options import TrainOptions
from baton.train.trainer import SaveOnInterrupt
from baton.types import Pair

torch.set_num_threads(1)
given = json.loads(sys.argv[1])
step, how = given.pop("stop"), given.pop("how")

def stop(now):
    if how.startswith("interrupt") and now == step and os.environ.get("RANK", "1") == "1":
        os.kill(os.getpid(), signal.SIGINT)

save = Trainer._save_optimizer_and_scheduler  # after the weights, before the rest of a checkpoint
def killed_while_saving(self, folder):
    if how == "kill while saving" and self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, folder)
Trainer._save_optimizer_and_scheduler = killed_while_saving

end = SaveOnInterrupt.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    stop(state.global_step)
    return end(self, args, state, control, **kwargs)
SaveOnInterrupt.on_step_end = on_step_end

given["pairs"] = [Pair(prompt=p, response=r) for p, r in given["pairs"]]
given["validation"] = [Pair(prompt=p, response=r) for p, r in given["validation"]]
given["options"], given["train"] = HandoffOptions(**given["options"]), TrainOptions(**given["train"])
finished = train_handoff(**given)
if how == "interrupt and continue":
    assert not finished
    step = 0
    finished = train_handoff(**given)
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.exit(0 if finished else 3)
"""


def train_outside(
    out: Path,
    *,
    processes: int = 1,
    stop: int = 0,
    how: str = "",
    slm: str = "t5-slm",
    train: TrainOptions = OPTIONS,
) -> "subprocess.CompletedProcess[str]":
    """The same training in processes of its own."""
    given = {
        "llm": str(folder("t5")),
        "slm": str(folder(slm)),
        "pairs": [(p.prompt, p.response) for p in MANY],
        "validation": [(p.prompt, p.response) for p in MANY[:5]],
        "out": str(out),
        "options": asdict(HandoffOptions()),
        "train": asdict(train),
        "stop": stop,
        "how": how,
    }
    script = out.with_suffix(".py")
    script.write_text(SCRIPT)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*launch, str(script), json.dumps(given)], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "handoff"
    assert train_in(out)
    return out


def test_a_killed_run_continues_exactly(undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 while step 6 is being saved: on from step 4, in the middle of an epoch; same curve, same bits."""
    out = tmp_path / "handoff"
    result = train_outside(out, stop=6, how="kill while saving")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (out / "config.json").exists()
    assert (out / RUN / "checkpoint-6" / "pytorch_model.bin").exists()
    assert not (out / RUN / "checkpoint-6" / "complete").exists()
    assert (out / RUN / "checkpoint-4" / "complete").exists()
    assert train_in(out)
    assert curve(out) == curve(undisturbed)
    assert same_weights(out, undisturbed)


def test_ctrl_c_ends_with_a_checkpoint_and_a_second_run_finishes(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "handoff"
    result = train_outside(out, stop=3, how="interrupt")
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert (out / RUN / "checkpoint-3" / "complete").exists()
    assert not (out / "config.json").exists()
    assert train_in(out)
    found, expected = curve(out), curve(undisturbed)
    assert found[4].pop("loss") != expected[4].pop("loss")  # of step 4 alone, instead of 3 and 4
    assert found == expected
    assert same_weights(out, undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo under torch.distributed.run is for Linux and macOS")
def test_two_processes_give_the_losses_of_one(tmp_path: Path) -> None:
    """Half the batch each, gradients summed over tokens: the same curve, validation included, and one saved model.

    Interrupted on the way, in the second process only: both stop at the same step, and continue when run again.
    """
    train = replace(OPTIONS, eval_every=4, max_quality_examples=2, **STEADY)
    assert train_in(tmp_path / "one", case=Case("t5", "t5-calm"), train=train)
    two = tmp_path / "two"
    result = train_outside(two, processes=2, slm="t5-calm", train=train, stop=2, how="interrupt and continue")
    assert result.returncode == 0, result.stderr[-3000:]
    expected, found = curve(tmp_path / "one"), curve(two)
    assert sorted(found) == [2, 4, 6, 8]
    for step, numbers in expected.items():
        assert found[step]["learning_rate"] == numbers["learning_rate"]
        for name in set(numbers) - {"learning_rate"}:
            assert found[step][name] == pytest.approx(numbers[name], abs=1e-4), step
    one, other = HandoffModel.from_pretrained(tmp_path / "one"), HandoffModel.from_pretrained(two)
    for name, weight in one.state_dict().items():
        assert torch.allclose(other.state_dict()[name], weight, atol=1e-3), name


def test_the_llm_is_not_called_for_what_is_cached(tmp_path: Path) -> None:
    """A second run over the same prompts, with other training options, reads its states from the disk of the first."""
    assert train_in(tmp_path / "a", train=replace(OPTIONS, max_steps=2))
    shutil.copytree(tmp_path / "a" / RUN / "states", tmp_path / "b" / RUN / "states")
    model = HandoffModel.from_pretrained(tmp_path / "a")
    with calls(model.encoder.model) as llm:
        assert train_in(tmp_path / "b", train=replace(OPTIONS, max_steps=2, learning_rate=1e-4))
    assert not llm


@pytest.mark.parametrize("bias", [True, False])
def test_an_identity_projector_hands_over_the_states_themselves(bias: bool) -> None:
    torch.manual_seed(0)
    states = torch.randn(3, 5, 8)
    projector = Projector(8, 8, inner_width=20, bias=bias, identity_init=True)
    assert torch.equal(projector(states), states)
    projector(states).sum().backward()
    assert projector.last.weight.grad[:, 16:].abs().min() > 0  # the units that are not needed yet can learn
    for widths in ({"d_in": 8, "d_out": 6}, {"d_in": 8, "d_out": 8}):
        with pytest.raises(UnknownOption, match="identity_init needs"):
            Projector(**widths, identity_init=True)


def test_a_fitted_projector_gives_the_slms_embeddings_back(tmp_path: Path) -> None:
    """Before training: Z is near E where it was not, the SLM is untouched, and cached states give the same."""
    model = untrained(CASES[0], inner_width=64)
    slm = {name: weight.clone() for name, weight in model.slm.state_dict().items()}
    data = PairDataset(MANY, model.prompt_tokenizer, model.response_tokenizer)
    assert fit_projector(model, data, 1) > 0.9
    assert fit_projector(model, data, 400, batch_size=8) < 0.3
    assert all(torch.equal(slm[name], weight) for name, weight in model.slm.state_dict().items())
    assert not any(weight.requires_grad for weight in model.encoder.model.parameters())
    assert train_in(tmp_path, options=HandoffOptions(fit_steps=5), train=replace(OPTIONS, max_steps=2))
