"""Inference mode, entered once: at a small model's speed each entering counts."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def inference(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`torch.inference_mode()`, but free for a caller that is in it."""

    @wraps(function)
    def inside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode():
            return function(*args, **kwargs)

    return inside
