"""Baton: think big, generate quick. A large model reads the prompt once, a small one writes the answer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baton.engine import AsyncEngine as AsyncEngine
    from baton.engine import Engine as Engine
    from baton.engine import custom_generate as custom_generate
    from baton.engine import generate as generate
    from baton.engine import stream as stream
    from baton.errors import BatonError as BatonError
    from baton.handoff.config import HandoffConfig as HandoffConfig
    from baton.handoff.config import HandoffOptions as HandoffOptions
    from baton.handoff.model import HandoffModel as HandoffModel
    from baton.models.loading import LanguageModel as LanguageModel
    from baton.models.loading import load as load
    from baton.train.options import TrainOptions as TrainOptions
    from baton.types import Output as Output
    from baton.types import Pair as Pair
    from baton.types import Sampling as Sampling

__version__ = "0.1.0"

# Loaded when first used: `import baton` and `baton --help` stay fast.
_WHERE = {
    "AsyncEngine": "baton.engine",
    "BatonError": "baton.errors",
    "Engine": "baton.engine",
    "HandoffConfig": "baton.handoff.config",
    "HandoffModel": "baton.handoff.model",
    "HandoffOptions": "baton.handoff.config",
    "LanguageModel": "baton.models.loading",
    "Output": "baton.types",
    "Pair": "baton.types",
    "Sampling": "baton.types",
    "TrainOptions": "baton.train.options",
    "custom_generate": "baton.engine",
    "generate": "baton.engine",
    "load": "baton.models.loading",
    "stream": "baton.engine",
}
__all__ = [
    "AsyncEngine",
    "BatonError",
    "Engine",
    "HandoffConfig",
    "HandoffModel",
    "HandoffOptions",
    "LanguageModel",
    "Output",
    "Pair",
    "Sampling",
    "TrainOptions",
    "custom_generate",
    "generate",
    "load",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'baton' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
