"""The peers by name, loaded when asked for."""

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from baton.errors import BatonError, UnknownOption, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from baton.bench.contenders import Contender
    from baton.bench.forward import Engine
    from baton.models.writer import Writer

# name: module, what it is installed as
PEERS = {
    "transformers": ("baton.bench.peers.transformers", "transformers"),
    "llama.cpp": ("baton.bench.peers.llama_cpp", "baton-decoding[peers]"),
    "openvino": ("baton.bench.peers.openvino", "baton-decoding[peers]"),
    "ctranslate2": ("baton.bench.peers.ctranslate2", "baton-decoding[peers]"),
}


class Absent(BatonError):
    """A peer cannot take part: it is not installed, or it does not run this model. The message says which."""


def make_peers(name: str, writer: "Writer", *, max_new_tokens: int, assistant: str | None) -> "Sequence[Contender]":
    """All ways in which one peer writes with this model, greedy.

    Raises: UnknownOption for another name; Absent when it cannot take part.
    """
    made: Sequence[Contender] = _taken(name, lambda: _module(name).contenders(writer, max_new_tokens, assistant))
    return made


def make_passes(name: str, model: "PreTrainedModel", context: int, *, bits: int = 0) -> "Engine":
    """Single passes of one peer, for `baton bench forward`, on the model's weights.

    Args:
        context: most positions that will be asked for.
        bits: 8 or 4: the peer's own kind of weights in so many, where it has such; 0: the model's dtype.
    Raises: UnknownOption for another name; Absent when it cannot take part.
    """
    made: Engine = _taken(name, lambda: _module(name).Passes(model, context, bits=bits))
    return made


def _taken(name: str, make: Callable[[], Any]) -> Any:
    """What a peer makes of a model. Whatever goes wrong in it is the peer's own, and the others go on without it."""
    try:
        return make()
    except BatonError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise Absent(f"{name} is left out: it cannot take this model ({type(error).__name__}: {reason})") from error


def _module(name: str) -> ModuleType:
    if name not in PEERS:
        raise UnknownOption(f"no peer {name!r}: {nearest(name, PEERS)}")
    module, package = PEERS[name]
    try:
        return import_module(module)
    except ImportError as error:
        raise Absent(f"{name} is absent: {error.name or error} is not installed (pip install '{package}')") from error
