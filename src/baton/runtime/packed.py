"""Packed weights: every linear layer's weights laid out once as oneDNN's kernels read them, in place."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from baton.errors import BatonError
from baton.models.adapter import Runtime

# A packed product of float32 costs about 10 microseconds more to call; from this size on it is faster all the same.
WORTH_PACKING = 2**20


class PackedLinear(nn.Module):
    """x W^T + b, [..., in] to [..., out], for inference on the CPU.

    Stock `linear` in bfloat16 lays the weights out anew at every call; here that happens once.

    Args:
        layer: a linear layer; GPT-2's own kind, which keeps its weight transposed, is one too.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        weight = layer.weight.detach()
        weight = weight.T if isinstance(layer, Conv1D) else weight
        self.out_features, self.in_features = weight.shape
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = None if layer.bias is None else layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return made

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedLinear":
        raise BatonError("packed weights can neither be moved nor converted: load the model with runtime='eager'")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise BatonError("packed weights cannot be saved: load the model with runtime='eager'")


def pack(model: PreTrainedModel) -> str:
    """Give a model packed weights, for inference only: it can no longer be trained, moved or saved.

    Each layer's own weights are let go as soon as they are packed.

    Returns: why it was left as it is; empty when it was not.
    """
    reason = _why_not(model)
    if not reason:
        with torch.inference_mode():
            _replace(model)
        model.baton_runtime = Runtime("packed", None, (model.device, model.dtype))
    return reason


def _replace(module: nn.Module) -> None:
    children: list[tuple[str, Any]] = list(module.named_children())
    for name, child in children:
        if type(child) in (nn.Linear, Conv1D):
            if child.weight.dtype == torch.bfloat16 or child.weight.numel() >= WORTH_PACKING:
                setattr(module, name, PackedLinear(child))
        else:
            _replace(child)


def _why_not(model: PreTrainedModel) -> str:
    dtype, device = model.dtype, model.device
    if device.type != "cpu":
        return f"packed weights are for the CPU, and the model is on {device}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"weights are packed in float32 or bfloat16, and the model is in {str(dtype).removeprefix('torch.')}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return "this build of PyTorch comes without oneDNN"
    onednn: Any = torch.ops.mkldnn
    if dtype == torch.bfloat16 and not onednn._is_mkldnn_bf16_supported():
        return "this processor has no instructions for bfloat16"
    for module in model.modules():
        source = type(module).__module__.partition(".")[0]
        if source in ("peft", "bitsandbytes", "torchao"):
            return f"it holds layers of {source}"
    return ""
