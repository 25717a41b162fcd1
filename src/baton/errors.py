"""Every error Baton raises on purpose. Each says what was seen and what to do next; only the command line exits."""

import difflib
from collections.abc import Iterable


class BatonError(Exception):
    """Base of all errors raised on purpose."""


class DataError(BatonError):
    """A data file or row cannot be used. The message starts with `file:line`."""


class UnknownOption(BatonError):
    """A name is not one of the known ones. The message lists them and the nearest."""


class NotAHandoff(BatonError):
    """A folder or Hub id does not hold a hand-off."""


class ModelMismatch(BatonError):
    """The LLM given is not the one the hand-off was trained with, or two models do not fit together."""


class UnsupportedModel(BatonError):
    """The model's family lacks something the operation needs."""


class PromptError(BatonError):
    """A prompt is empty or longer than a model allows."""


class DraftError(BatonError):
    """A draft cannot be verified as asked: wrong shape, wrong kind of children, or deeper than the row has room for."""


class VocabMismatch(BatonError):
    """A drafter's tokens are not the target's."""


class MemoryShort(BatonError):
    """What was asked for does not fit into memory. The message says what would."""


class StorageError(BatonError):
    """The disk is full or not writable. Whatever had been completed before is still there."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence naming the closest known name, or listing all when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
