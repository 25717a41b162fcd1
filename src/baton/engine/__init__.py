"""Prefill, cached decode steps, streaming and batches of prompts of different lengths."""

from baton.engine.api import generate, stream
from baton.engine.asynchronous import AsyncEngine
from baton.engine.interop import custom_generate
from baton.engine.loop import Engine

__all__ = ["AsyncEngine", "Engine", "custom_generate", "generate", "stream"]
