"""Prefill, cached decode steps, streaming and batches of prompts of different lengths."""

from baton.engine.api import generate, stream
from baton.engine.loop import Engine

__all__ = ["Engine", "generate", "stream"]
