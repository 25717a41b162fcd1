"""Datastores in the tiny tokenizer's tokens."""

import tempfile
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import tiny

from baton.drafters.parts.suffixes import add_documents


def datastore(documents: Iterable[Sequence[int]]) -> str:
    folder = tempfile.mkdtemp(prefix="baton-tests-")
    add_documents(folder, documents, tiny.tokenizer())
    return folder


@cache
def noise() -> str:
    """Every token is found, and next to nothing that follows is right."""
    return datastore(np.random.default_rng(0).integers(0, tiny.VOCAB, (6, 900)).tolist())
