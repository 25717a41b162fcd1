"""Which families have native layers, and what is made of a model by them."""

import subprocess
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from baton.errors import UnsupportedModel
from baton.models.adapter import Runtime, target_for
from baton.runtime.bart import NativeBart
from baton.runtime.decoders import NativeGPT2, NativeGPTNeoX, NativeLlama, NativeOPT, NativePhi3
from baton.runtime.native import Native, Parts, apply, kernels
from baton.runtime.quantized import COPY, GROUP, Int4, Int8, matrix_of
from baton.runtime.t5 import NativeT5, T5Reader

_T = TypeVar("_T")

TARGETS: dict[str, type[Native]] = {
    "bart": NativeBart,
    "gemma": NativeLlama,
    "gemma2": NativeLlama,
    "gemma3_text": NativeLlama,
    "gpt2": NativeGPT2,
    "gpt_neox": NativeGPTNeoX,
    "llama": NativeLlama,
    "marian": NativeBart,
    "mbart": NativeBart,
    "mistral": NativeLlama,
    "mt5": NativeT5,
    "opt": NativeOPT,
    "pegasus": NativeBart,
    "phi3": NativePhi3,
    "qwen2": NativeLlama,
    "qwen3": NativeLlama,
    "t5": NativeT5,
}


class Projection:
    """The two maps of a hand-off's projector.

    Raises: UnsupportedModel where C cannot take its weights.
    """

    def __init__(self, first: nn.Linear, last: nn.Linear) -> None:
        self.parts = parts = Parts(first.weight.dtype, first.weight.device)
        self.first, self.last = parts.linear(first), parts.linear(last)
        parts.watch(first)
        parts.watch(last)

    def __call__(self, states: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out], in the weights' dtype."""
        dtype = self.parts.dtype
        inner = apply(self.first, states, dtype).relu_()
        return apply(self.last, inner, dtype).to(dtype)


def make_smaller(model: PreTrainedModel, name: Literal["int8", "int4"]) -> str:
    """Let a model run by native layers on copies of its matrices in fewer bits. Its texts change a little.

    `int4` is for what each token reads: an encoder reads once and would gain nothing, and the head stays in eight bits,
    since all of its error is the logits' own. Weights that are no multiple of a group wide stay as they are.

    Returns: why it cannot; empty when it can.
    """
    reason = make_native(model)
    if reason:
        return reason
    target = target_for(model)
    written = set(target.layers.modules())
    parts: list[Any] = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    for part in parts:
        weight = matrix_of(part)
        if name == "int8" or part is target.lm_head:
            setattr(part, COPY, Int8.of(weight))
        elif part in written and weight.shape[1] % GROUP == 0:
            setattr(part, COPY, Int4.of(weight))
    model.baton_runtime = model.baton_runtime._replace(name=name)
    return reason


def make_native(model: PreTrainedModel) -> str:
    """Let a model run by native layers in our engine. Nothing in it changes; transformers' own calls stay stock.

    Returns: why it cannot; empty when it can.
    """
    family = model.config.model_type
    if family not in TARGETS:
        return f"there are no native layers for {family} (for {', '.join(TARGETS)})"
    parts: list[Any] = list(model.modules())
    for part in parts:
        vars(part).pop(COPY, None)  # of an earlier choice
    made, reason = _built(lambda: TARGETS[family](model))
    if made is not None:
        model.baton_runtime = Runtime("native", TARGETS[family], (model.device, model.dtype))
    return reason


def make_reader(model: PreTrainedModel) -> T5Reader | None:
    """The encoder of a model that reads for others, native; None where that cannot be."""
    if model.config.model_type not in ("t5", "mt5"):
        return None
    return _built(lambda: T5Reader(model))[0]


def make_projection(first: nn.Linear, last: nn.Linear) -> Projection | None:
    """A projector's maps, native; None where that cannot be."""
    return _built(lambda: Projection(first, last))[0]


def _built(build: Callable[[], _T]) -> tuple[_T | None, str]:
    """What C can run, or None and the reason."""
    try:
        kernels()
        return build(), ""
    except UnsupportedModel as error:
        return None, str(error)
    except AttributeError as error:  # a model that lost or changed parts: packed, wrapped, cut
        return None, f"it is not built as its family is: {error}"
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None)
        return None, f"the C kernels cannot be compiled: {detail.decode(errors='replace') if detail else error}"
