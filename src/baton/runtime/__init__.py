"""How a forward is made fast on this machine, behind one switch."""

import logging
from typing import get_args

from transformers import PreTrainedModel

from baton.errors import UnknownOption, nearest
from baton.models.adapter import runtime_of
from baton.types import RuntimeName

log = logging.getLogger(__name__)
_said: set[str] = set()


def prepare(model: PreTrainedModel, runtime: RuntimeName = "auto") -> str:
    """Make a loaded model faster.

    Args:
        runtime: `eager` leaves it as transformers made it; `native` (compiled layers, see `runtime.native`) changes
            nothing in it; `int8` is native on copies of the weights in eight bits, half to read and not quite the same,
            for draft models; `int4` has the layers in four bits, still less alike; `packed` (see `runtime.packed`) lays
            its weights out anew, so that it can no longer be saved or trained; `compiled` (see `runtime.compiled`) has
            decode passes compiled by PyTorch, beside the requests, and changes nothing in it; `auto` is native where
            that runs the model, and eager elsewhere.
    Returns: the name of what runs it. Where that is not what was asked for, the reason is logged, once.
    Raises: UnknownOption for another name.
    """
    if runtime not in (names := get_args(RuntimeName)):
        raise UnknownOption(f"no runtime {runtime!r}: {nearest(runtime, names)}")
    from baton.runtime.families import make_native, make_smaller
    from baton.runtime.packed import pack

    if runtime == "eager":
        return runtime
    if runtime in ("int8", "int4"):
        reason = make_smaller(model, runtime)
    elif runtime == "compiled":
        from baton.runtime.compiled import make_compiled  # the compiler takes a while to import

        reason = make_compiled(model)
    else:
        reason = pack(model) if runtime == "packed" else make_native(model)
    if not reason:
        return runtime_of(model).name
    if runtime != "auto" and reason not in _said:
        _said.add(reason)
        log.warning("runtime %s is not used: %s", runtime, reason)
    return "eager"
