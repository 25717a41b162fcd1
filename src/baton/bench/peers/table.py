"""The peers by name, loaded when asked for."""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from baton.errors import BatonError, UnknownOption, nearest

if TYPE_CHECKING:
    from baton.bench.contenders import Contender
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
    if name not in PEERS:
        raise UnknownOption(f"no peer {name!r}: {nearest(name, PEERS)}")
    module, package = PEERS[name]
    try:
        made: Sequence[Contender] = import_module(module).contenders(writer, max_new_tokens, assistant)
    except ImportError as error:
        raise Absent(f"{name} is absent: {error.name or error} is not installed (pip install '{package}')") from error
    return made
