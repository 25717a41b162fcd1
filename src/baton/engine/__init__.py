"""Prefill, cached decode steps, streaming and batches of prompts of different lengths."""

from baton.engine.api import generate, stream

__all__ = ["generate", "stream"]
