"""The training loop on a plain language model: its loss, its batches, its checkpoints, and how it ends."""

import errno
import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from handoffs import MANY, OPTIONS, PAIRS
from torch import Tensor, nn
from transformers import TrainerCallback

from baton.errors import DataError, StorageError, UnknownOption
from baton.models.text import IGNORE, TextToText
from baton.train.dataset import BlockDataset, Collator, PairDataset
from baton.train.trainer import COMPLETE, TextTrainer, last_checkpoint, make_optimizer, make_trainer, response_loss, run
from baton.types import Pair


def dataset(pairs: list[Pair] = MANY, **changes: Any) -> PairDataset:
    return PairDataset(pairs, tiny.tokenizer(), tiny.tokenizer(), **changes)


def trainer_in(
    folder: Path, train: list[Pair] = MANY, validation: list[Pair] = MANY[:5], dropout: float = 0.1, **changes: Any
) -> TextTrainer:
    model = TextToText(tiny.t5(3, num_layers=2, dropout_rate=dropout))
    options = replace(OPTIONS, **changes)
    return make_trainer(model, dataset(train), dataset(validation), out=folder, options=options, prompt_pad_id=0)


def curve(trainer: TextTrainer) -> dict[int, dict[str, float]]:
    """Step -> the numbers logged there that do not depend on the clock."""
    found: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        kept = {k: v for k, v in entry.items() if k in ("loss", "grad_norm", "learning_rate", "eval_loss")}
        found.setdefault(entry["step"], {}).update(kept)
    return {step: numbers for step, numbers in found.items() if numbers}


def weights(trainer: TextTrainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TextTrainer:
    """A whole run, to compare others with."""
    trainer = trainer_in(tmp_path_factory.mktemp("undisturbed"))
    assert run(trainer)
    return trainer


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


class At(TrainerCallback):
    """Do something at the end of one step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


# --- Loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [None, 11])
def test_response_loss_is_the_formula(smoothing: float, tokens: int | None) -> None:
    """Mean over response tokens of (1 - e) * -log p(label) + e * mean over the vocabulary of -log p."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[1, 2, 3, IGNORE], [6, IGNORE, IGNORE, IGNORE]])
    total = 0.0
    for row in range(2):
        for i, label in enumerate(labels[row].tolist()):
            if label != IGNORE:
                exponents = [math.exp(x) for x in logits[row, i].tolist()]
                costs = [-math.log(x / sum(exponents)) for x in exponents]
                total += (1 - smoothing) * costs[label] + smoothing * sum(costs) / 7
    assert float(response_loss(logits, labels, smoothing, tokens)) == pytest.approx(total / (tokens or 4), rel=1e-6)


def test_response_loss_of_bf16_logits_is_taken_in_float32() -> None:
    logits = torch.randn(1, 300, 50).to(torch.bfloat16)
    labels = torch.randint(50, (1, 300))
    assert torch.equal(response_loss(logits, labels, 0.1, None), response_loss(logits.float(), labels, 0.1, None))


# --- Data --------------------------------------------------------------------------------------------------------


def test_dataset_and_batches() -> None:
    """Ids as the tokenizers give them, one end token, right-padded; states cut to measure."""
    states = [torch.full((n, 2), float(n)) for n in (3, 1)]
    data = dataset([Pair(prompt="the cat", response="die Katze"), Pair(prompt="ran", response="lief")], states=states)
    ids = tiny.tokenizer()(["the cat", "ran", "die Katze", "lief"])["input_ids"]
    assert data.prompts == ids[:2]
    assert data.responses == ids[2:]
    assert data.lengths == [(len(ids[2]), len(ids[0])), (len(ids[3]), len(ids[1]))]
    plain = PairDataset(PAIRS[:1], tiny.tokenizer(), tiny.tokenizer(append_eos=False))
    assert plain.responses[0][-2:] == [plain.responses[0][-2], tiny.EOS]
    assert plain.responses[0].count(tiny.EOS) == 1
    batch = Collator(9)([data[0], data[1]])
    width, n = max(map(len, ids[:2])), max(map(len, ids[2:]))
    assert batch["input_ids"].tolist() == [row + [9] * (width - len(row)) for row in ids[:2]]
    assert batch["attention_mask"].tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in ids[:2]]
    assert batch["labels"].tolist() == [row + [IGNORE] * (n - len(row)) for row in ids[2:]]
    assert batch["prompt_states"].tolist() == [[[3.0, 3.0]] * 3, [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]]


def test_responses_need_room() -> None:
    """A response beyond the model's positions is refused with the numbers, or cut; no room at all is never cut."""
    pair = Pair(prompt="the cat", response="die Katze schreibt")
    prompt, response = dataset([pair]).prompts[0], dataset([pair]).responses[0]
    assert dataset([pair], room=lambda m: m + 100).responses == [response]
    with pytest.raises(
        DataError, match=rf"pair 0: after a prompt of {len(prompt)} .*room for 4, .* has {len(response)}"
    ):
        dataset([pair], room=lambda m: 4)
    assert dataset([pair], room=lambda m: 4, truncate=True).responses == [response[:4]]
    with pytest.raises(DataError, match="room for 0"):
        dataset([pair], room=lambda m: -3, truncate=True)


# --- Steps -------------------------------------------------------------------------------------------------------


def test_micro_batches_make_the_same_steps(tmp_path: Path) -> None:
    """Losses, gradients and validation as with the whole batch at once: the loss counts tokens, not batches."""
    curves = []
    for micro in (0, 2, 1):
        changes = {"micro_batch_size": micro, "max_steps": 3, "eval_every": 1, "save_every": 1}
        trainer = trainer_in(tmp_path / str(micro), dropout=0.0, **changes)
        assert run(trainer)
        curves.append(curve(trainer))
    assert set(curves[0][1]) == {"loss", "grad_norm", "learning_rate", "eval_loss"}
    for other in curves[1:]:
        assert other[1] == pytest.approx(curves[0][1], rel=1e-5)
        for step in (2, 3):  # rounding grows: Muon makes all directions of a gradient equally long
            for name in ("loss", "eval_loss"):
                assert other[step][name] == pytest.approx(curves[0][step][name], rel=1e-3)


def test_validation_is_the_mean_over_all_tokens(tmp_path: Path) -> None:
    """Every example counts, also those that fill no batch, and each token as much as any other; nothing is smoothed."""
    trainer = trainer_in(tmp_path, validation=MANY[:7], label_smoothing=0.3, batch_size=5)
    found = trainer.evaluate()["eval_loss"]
    data = dataset(MANY[:7])
    nll = tokens = 0.0
    for index in range(7):
        batch = Collator(0)([data[index]])
        with torch.no_grad():
            p = trainer.model(**batch).logits[0].log_softmax(-1)
        nll -= float(p[torch.arange(len(p)), batch["labels"][0]].sum())
        tokens += len(p)
    assert found == pytest.approx(nll / tokens, rel=1e-5)


def test_each_epoch_has_whole_batches(tmp_path: Path) -> None:
    """18 examples make 4 steps of 4; the two left out are not a batch of their own."""
    trainer = trainer_in(tmp_path, train=MANY[:18], max_steps=-1, epochs=2, micro_batch_size=2)
    sizes: list[int] = []
    inner = trainer.training_step

    def spy(model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        sizes.append(len(inputs["input_ids"]))
        return inner(model, inputs, *args)

    trainer.training_step = spy  # type: ignore[method-assign]
    assert run(trainer)
    assert trainer.state.global_step == 8
    assert sizes == [2] * 16


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"batch_size": 21}, DataError, "20 training examples do not fill a batch of 21"),
        ({"micro_batch_size": 3}, UnknownOption, "micro_batch_size=3"),
        ({"patience": 2, "save_every": 3}, UnknownOption, "save_every=3 is not a multiple of eval_every=2"),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        trainer_in(tmp_path, **changes)


def test_unknown_optimizer() -> None:
    with pytest.raises(UnknownOption, match="did you mean 'adamw'"):
        make_optimizer(nn.Linear(2, 2), replace(OPTIONS, optimizer="adam"))  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
def test_every_optimizer_learns_and_resumes(optimizer: str, tmp_path: Path) -> None:
    """The loss falls; a run stopped in the middle and continued ends with the same bits."""
    before = trainer_in(tmp_path / "new").evaluate()["eval_loss"]
    whole = trainer_in(tmp_path / "whole", optimizer=optimizer, learning_rate=2e-2)
    assert run(whole)
    assert curve(whole)[8]["eval_loss"] < before - 0.02
    stopped = trainer_in(tmp_path / "parts", optimizer=optimizer, learning_rate=2e-2)
    stopped.add_callback(At(3, ctrl_c))
    assert not run(stopped)
    rest = trainer_in(tmp_path / "parts", optimizer=optimizer, learning_rate=2e-2)
    assert run(rest)
    assert equal(weights(rest), weights(whole))


# --- The end: complete, early, interrupted, out of disk ----------------------------------------------------------


def test_the_best_step_is_kept(tmp_path: Path) -> None:
    """The weights at the end are those of the lowest validation loss, not the last ones."""
    trainer = trainer_in(tmp_path, patience=10)
    losses = iter([3.0, 1.0, 2.0, 4.0])
    trainer.compute_metrics = lambda sums: {"loss": next(losses)}
    assert run(trainer)
    assert {step: numbers["eval_loss"] for step, numbers in curve(trainer).items()} == {2: 3, 4: 1, 6: 2, 8: 4}
    best, last = (torch.load(tmp_path / f"checkpoint-{step}" / "pytorch_model.bin") for step in (4, 8))
    assert equal(weights(trainer), best)
    assert not equal(weights(trainer), last)


def test_early_stopping_counts_on_after_an_interruption(tmp_path: Path) -> None:
    """Nothing learnt: the first validation is the best, and `patience` later ones end the run, resumed or not."""
    still = {"patience": 2, "learning_rate": 0.0, "eval_every": 1, "save_every": 1, "max_steps": 9}
    whole = trainer_in(tmp_path / "whole", **still)
    assert run(whole)
    assert whole.state.global_step == 3
    stopped = trainer_in(tmp_path / "parts", **still)
    stopped.add_callback(At(2, ctrl_c))
    assert not run(stopped)
    rest = trainer_in(tmp_path / "parts", **still)
    assert run(rest)
    assert rest.state.global_step == 3


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    """Run again, say because saving the model failed: the same weights, the same log, no step more."""
    first = trainer_in(tmp_path, patience=2, eval_every=1, save_every=1, learning_rate=0.0)
    assert run(first)
    before = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    again = trainer_in(tmp_path, patience=2, eval_every=1, save_every=1, learning_rate=0.0)
    with torch.no_grad():
        next(again.model.parameters()).zero_()
    assert run(again)
    assert equal(weights(again), weights(first))
    assert again.state.global_step == first.state.global_step == 3
    assert curve(again) == curve(first)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == before


def test_other_options_continue_a_finished_run(tmp_path: Path) -> None:
    assert run(trainer_in(tmp_path, max_steps=4))
    longer = trainer_in(tmp_path, max_steps=6)
    assert run(longer)
    assert longer.state.global_step == 6


def test_ctrl_c_saves_and_continues_with_the_same_curve(undisturbed: TextTrainer, tmp_path: Path) -> None:
    """The step is finished and saved, signals are given back, and the rest is as if nothing had happened."""
    handler = signal.getsignal(signal.SIGINT)
    stopped = trainer_in(tmp_path / "parts")
    stopped.add_callback(At(5, ctrl_c))
    assert not run(stopped)
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_checkpoint(tmp_path / "parts") == tmp_path / "parts" / "checkpoint-5"
    rest = trainer_in(tmp_path / "parts")
    assert run(rest)
    # The mean that is logged at step 6 covers step 6 alone where training went on from 5.
    expected, found = curve(undisturbed), curve(rest)
    assert found[6].pop("loss") != expected[6].pop("loss")
    assert found == expected
    assert equal(weights(rest), weights(undisturbed))


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.add_callback(At(3, lambda: [ctrl_c(), ctrl_c()]))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(trainer)
    assert signal.getsignal(signal.SIGINT) is handler
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_ctrl_c_in_the_last_step_is_the_end(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.add_callback(At(8, ctrl_c))
    assert run(trainer)


def test_incomplete_checkpoints_are_ignored(undisturbed: TextTrainer, tmp_path: Path) -> None:
    """A folder without its last file was cut off: training goes on from the one before, and clears it away."""
    stopped = trainer_in(tmp_path / "parts")
    stopped.add_callback(At(4, ctrl_c))
    assert not run(stopped)
    (tmp_path / "parts" / "checkpoint-4" / COMPLETE).unlink()
    (tmp_path / "parts" / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    (tmp_path / "parts" / "checkpoint-7").mkdir()
    assert last_checkpoint(tmp_path / "parts") == tmp_path / "parts" / "checkpoint-2"
    assert (tmp_path / "parts" / "checkpoint-4").exists()  # looking does not change anything: another may be saving
    rest = trainer_in(tmp_path / "parts")
    assert run(rest)
    assert not (tmp_path / "parts" / "checkpoint-7").exists()
    assert curve(rest) == curve(undisturbed)


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json"])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    file: str, undisturbed: TextTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file does not fit. With room again the same command ends as if nothing had happened."""
    trainer = trainer_in(tmp_path / "full")
    real_save = torch.save

    def save(thing: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(path) and str(path).endswith(file):
            if not Path("/dev/full").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            Path(path).write_bytes(b"half")
            path = "/dev/full"  # what torch says to a full disk, which for small files is nothing
        real_save(thing, path, *args, **kwargs)

    def state(path: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        if file.endswith("json"):
            trainer.add_callback(At(4, lambda: patch.setattr(trainer.state, "save_to_json", state)))
        with pytest.raises(StorageError, match=r"cannot write .*checkpoint-4.*No space left.*checkpoint-2"):
            run(trainer)
    assert sorted(path.name for path in (tmp_path / "full").glob("checkpoint-*")) == ["checkpoint-2"]
    again = trainer_in(tmp_path / "full")
    assert run(again)
    assert curve(again) == curve(undisturbed)
    assert equal(weights(again), weights(undisturbed))


def test_the_two_newest_checkpoints_and_a_tensorboard_log_are_kept(tmp_path: Path) -> None:
    assert run(trainer_in(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert [path.stat().st_size > 0 for path in (tmp_path / "runs").rglob("events.out.tfevents.*")] == [True]
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8


def test_text_in_blocks() -> None:
    """Documents joined by a separator and cut: each block's first token is the prompt, nothing is lost but the rest."""
    tokenizer = tiny.tokenizer(append_eos=False)
    data = BlockDataset(["The cat.", "Die Katze"], tokenizer, length=4, separator=tiny.EOS)
    joined = [*tokenizer("The cat.")["input_ids"], tiny.EOS, *tokenizer("Die Katze")["input_ids"], tiny.EOS]
    blocks = [[*prompt, *response] for prompt, response in zip(data.prompts, data.responses, strict=True)]
    assert [len(prompt) for prompt in data.prompts] == [1] * len(data) and {len(b) for b in blocks} == {4}
    assert [token for block in blocks for token in block] == joined[: len(joined) // 4 * 4]
    assert data[0] == {"prompt": joined[:1], "response": joined[1:4]}


def test_a_causal_model_learns_from_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = BlockDataset(tiny.TEXTS * 8, tiny.tokenizer(append_eos=False), length=8, separator=tiny.EOS)
    options = replace(OPTIONS, max_steps=40, learning_rate=2e-2, eval_every=40, save_every=40)
    trainer = make_trainer(TextToText(tiny.llama(3)), data, data, out=tmp_path, options=options, prompt_pad_id=0)
    before = trainer.evaluate()["eval_loss"]
    assert run(trainer)
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
