"""Optimizers over bf16 weights: they are the float32 ones, seen through rounding, and a saved state continues them."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from baton.train.optim import MasterOptimizer, adamw, muon

Make = Callable[[nn.Module], MasterOptimizer]
KINDS: dict[str, Make] = {
    "adamw": lambda model: adamw(model, lr=0.01, weight_decay=0.1),
    "muon": lambda model: muon(model, lr=0.01, embedding_lr=0.02, weight_decay=0.1),
}


class Small(nn.Module):
    """An embedding, two matrices, a bias and a norm; the head is tied if asked for."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(self.embedding(ids)).relu()))


def gradients(model: nn.Module, step: int) -> None:
    """The same pseudo-random gradients for the same step, whatever the weights, in the parameters' dtype."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)


def train(model: nn.Module, optimizer: MasterOptimizer, steps: range, scheduler: Any = None) -> None:
    for step in steps:
        gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_adamw_is_torchs() -> None:
    """On float32 parameters, bit for bit."""
    model, plain = Small(), Small()
    train(model, adamw(model, lr=0.01, weight_decay=0.1), range(5))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.1)
    train(plain, optimizer, range(5))  # type: ignore[arg-type]
    assert equal(weights(model), weights(plain))


def test_muon_is_torchs_on_matrices_and_adamw_elsewhere() -> None:
    model, plain = Small(), Small()
    model.head.requires_grad_(False)
    plain.head.requires_grad_(False)
    train(model, KINDS["muon"](model), range(5))
    common = {"betas": (0.9, 0.98), "weight_decay": 0.0}
    parts = [
        torch.optim.Muon([plain.hidden.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([plain.embedding.weight], lr=0.02, **common),
        torch.optim.AdamW([plain.hidden.bias, *plain.norm.parameters()], lr=0.01, **common),
    ]
    for step in range(5):
        gradients(plain, step)
        for part in parts:
            part.step()
    assert equal(weights(model), weights(plain))


def test_muon_leaves_a_tied_head_to_adamw() -> None:
    model = Small(tied=True)
    groups = muon(model, lr=0.01, embedding_lr=0.02).param_groups
    assert [[tuple(p.shape) for p in g["params"]] for g in groups] == [[(8, 8)], [(11, 8)], [(8,), (8,), (8,)]]
    assert [g["lr"] for g in groups] == [0.01, 0.02, 0.01]


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights_are_rounded_float32_ones(kind: str) -> None:
    """The same gradients move float32 copies exactly as they move a float32 model."""
    model, exact = Small().bfloat16(), Small().bfloat16().float()
    train(model, KINDS[kind](model), range(20))
    train(exact, KINDS[kind](exact), range(20))
    assert equal(weights(model), weights(exact.bfloat16()))


def test_small_steps_add_up() -> None:
    """1 - 0.001 rounds to 1 in bf16: without copies the weight would never move."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    optimizer = adamw(model, lr=0.001)
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert model.weight.item() == pytest.approx(0.9, abs=0.004)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_continues(kind: str, dtype: torch.dtype, tmp_path) -> None:
    """Stop after three of seven steps, save, load into new objects: the same weights and rates as undisturbed."""

    def start() -> tuple[nn.Module, MasterOptimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = Small().to(dtype)
        optimizer = KINDS[kind](model)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: math.cos(s / 5))

    undisturbed, whole, scheduler = start()
    train(undisturbed, whole, range(7), scheduler)

    model, optimizer, scheduler = start()
    train(model, optimizer, range(3), scheduler)
    torch.save([part.state_dict() for part in (model, optimizer, scheduler)], tmp_path / "state")
    train(model, optimizer, range(3, 5), scheduler)  # what is lost in a kill

    model, optimizer, scheduler = start()
    for part, state in zip((model, optimizer, scheduler), torch.load(tmp_path / "state"), strict=True):
        part.load_state_dict(state)
    train(model, optimizer, range(3, 7), scheduler)
    assert equal(weights(model), weights(undisturbed))
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in whole.param_groups]
    for ours, theirs in zip(optimizer.masters, whole.masters, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_rates_reach_the_inner_optimizers(kind: str) -> None:
    """A scheduler that sets the rate to zero stops all change, weight decay included."""
    model = Small().bfloat16()
    optimizer = KINDS[kind](model)
    train(model, optimizer, range(2))
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(2, 4))
    assert equal(weights(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_unused_parameters_stay(kind: str, dtype: torch.dtype) -> None:
    """Frozen ones are not in the optimizer at all; one without a gradient in a step is left alone in that step."""
    model = Small().to(dtype)
    model.embedding.requires_grad_(False)
    optimizer = KINDS[kind](model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if name != "embedding.weight"}
    before = weights(model)
    gradients(model, 0)
    model.hidden.weight.grad = None
    optimizer.step()
    after = weights(model)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"hidden.bias", "norm.weight", "norm.bias", "head.weight"}


def test_copies_keep_no_gradients() -> None:
    """Between steps the float32 gradients would be as large as the copies."""
    model = Small().bfloat16()
    optimizer = KINDS["muon"](model)
    train(model, optimizer, range(1))
    assert all(m.grad is None and m.dtype == torch.float32 for masters in optimizer.masters for m in masters)
    assert all(p.grad is None for p in model.parameters())


def test_float32_parameters_have_no_copy() -> None:
    model = Small()
    model.hidden.bfloat16()
    optimizer = adamw(model, lr=0.01)
    params = optimizer.param_groups[0]["params"]
    assert [m is p for m, p in zip(optimizer.masters[0], params, strict=True)] == [True, False, False, True, True, True]


def test_both_learn() -> None:
    """A mapping of eleven tokens, learnt by heart."""
    ids = torch.arange(11)
    for make in (lambda m: adamw(m, lr=0.03), lambda m: muon(m, lr=0.03, embedding_lr=0.03)):
        model = copy.deepcopy(Small())
        optimizer = make(model)
        for _ in range(150):
            loss = nn.functional.cross_entropy(model(ids), (ids * 3 + 1) % 11)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 0.05
