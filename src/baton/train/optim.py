"""Optimizers for models kept in bf16: float32 master weights, and Muon on matrices with AdamW on the rest.

Source of Muon: Jordan 2024 (kellerjordan.github.io/posts/muon), as implemented in `torch.optim.Muon`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class MasterOptimizer(torch.optim.Optimizer):
    """Step float32 copies of the parameters with other optimizers, then round back to the parameters' own dtype.

    A bf16 weight of size 1 cannot hold a change below 0.004; the copies can. Float32 parameters are stepped directly.
    Learning rates live in `param_groups` (one per inner group, so schedulers work) and are handed down at each step.

    Args:
        groups: dicts with `params`, `lr`, `make` (inner optimizer from a list of tensors and a rate).
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        groups = [dict(g, params=list(g["params"])) for g in groups]
        groups = [g for g in groups if g["params"]]
        makers = [g.pop("make") for g in groups]
        super().__init__(groups, defaults={"lr": 0.0})
        self.masters = [
            [p if p.dtype == torch.float32 else p.detach().float() for p in g["params"]] for g in self.param_groups
        ]
        self.inner = [
            make(masters, g["lr"]) for make, masters, g in zip(makers, self.masters, self.param_groups, strict=True)
        ]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "closures would need one forward per inner optimizer"
        for group, masters, inner in zip(self.param_groups, self.masters, self.inner, strict=True):
            for inner_group in inner.param_groups:
                inner_group["lr"] = group["lr"]
            copies = [(p, m) for p, m in zip(group["params"], masters, strict=True) if m is not p]
            for p, m in copies:
                m.grad = None if p.grad is None else p.grad.float()
            inner.step()
            for p, m in copies:
                p.copy_(m)
                m.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "rates": [{k: v for k, v in g.items() if k != "params"} for g in self.param_groups],
            "masters": [[m.detach() for m in masters] for masters in self.masters],
            "inner": [inner.state_dict() for inner in self.inner],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for group, rates in zip(self.param_groups, state["rates"], strict=True):
            group.update(rates)
        for masters, saved in zip(self.masters, state["masters"], strict=True):
            for m, s in zip(masters, saved, strict=True):
                m.copy_(s)
        for inner, saved in zip(self.inner, state["inner"], strict=True):
            inner.load_state_dict(saved)


def adamw(model: nn.Module, *, lr: float, fresh_scale: float = 1.0, weight_decay: float = 0.0) -> MasterOptimizer:
    """AdamW on every trainable parameter, in float32 whatever the model's dtype; `fresh_scale` as in `grouped`."""
    params = [p for p in model.parameters() if p.requires_grad]
    return grouped(model, [(params, lr, _make_adamw(weight_decay))], fresh_scale)


def muon(
    model: nn.Module, *, lr: float, embedding_lr: float, fresh_scale: float = 1.0, weight_decay: float = 0.0
) -> MasterOptimizer:
    """Muon on the weights of hidden linear maps, AdamW on all else: embeddings and output heads at `embedding_lr`."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    heads = [m.get_output_embeddings() for m in model.modules() if isinstance(m, PreTrainedModel)]
    wide = {id(p) for m in [*tables, *heads] if m is not None for p in m.parameters() if p.ndim == 2}
    maps = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))} - wide
    trainable = [p for p in model.parameters() if p.requires_grad]

    def make_muon(masters: list[torch.Tensor], rate: float) -> torch.optim.Optimizer:
        # match_rms_adamw: one learning rate means the same step size for both optimizers (arXiv 2502.16982).
        return torch.optim.Muon(masters, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    groups = [
        ([p for p in trainable if id(p) in maps], lr, make_muon),
        ([p for p in trainable if id(p) in wide], embedding_lr, _make_adamw(0.0)),
        ([p for p in trainable if id(p) not in maps | wide], lr, _make_adamw(0.0)),
    ]
    return grouped(model, groups, fresh_scale)


def grouped(model: nn.Module, groups: Iterable[tuple[list[nn.Parameter], float, Any]], scale: float) -> MasterOptimizer:
    """Each group twice: trained parts at its rate, parts that start untrained (`fresh_modules`) at `scale` times it.

    Args:
        groups: parameters, rate, and what makes the inner optimizer from a list of tensors and a rate.
    """
    modules: list[nn.Module] = getattr(model, "fresh_modules", list)()
    fresh = {id(p) for m in modules for p in m.parameters()}
    both = [
        {"params": [p for p in params if (id(p) in fresh) == new], "lr": rate * (scale if new else 1.0), "make": make}
        for params, rate, make in groups
        for new in (False, True)
    ]
    return MasterOptimizer(both)


def _make_adamw(weight_decay: float) -> Any:
    return lambda masters, lr: torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
