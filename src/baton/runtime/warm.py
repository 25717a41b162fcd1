"""Compile ahead: what a model's runtime would otherwise compile beside the first requests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from transformers import PreTrainedModel

from baton.data.storage import cache_folder
from baton.models.adapter import runtime_of, target_for
from baton.models.writer import PromptInputs


@dataclass(kw_only=True)
class Warmed:
    """What was compiled, or found on the disk."""

    runtime: str
    seconds: dict[str, float] = field(default_factory=dict)  # by what was compiled
    failed: dict[str, str] = field(default_factory=dict)  # the reasons, by what was not
    folder: str = ""  # where the code is kept; empty: this runtime compiles nothing
    cache_bytes: int = 0  # of that folder, code of other models included


def warm_up(
    model: PreTrainedModel,
    *,
    rows: Sequence[int] = (1, 8),
    batches: Sequence[int] = (1,),
    progress: Callable[[str, int, int], None] | None = None,
) -> Warmed:
    """Compile what a prepared model's decode passes need.

    Args:
        rows: new tokens of a pass; batches: requests in it. Both are padded up to powers of two.
        progress: called with (what, done, total).
    Raises: UnsupportedModel where the engine does not run the model.
    """
    target = target_for(model)
    found = Warmed(runtime=runtime_of(model).name)
    say = progress or (lambda what, done, total: None)
    if found.runtime == "compiled":
        from baton.runtime.compiled import Bucket, Compiled, compiled_folder

        assert isinstance(target, Compiled)
        buckets = sorted({Bucket.of(batch, count) for batch in batches for count in rows})
        ids = torch.zeros((1, 2), dtype=torch.long, device=target.device)
        _, memory = target.prefill(PromptInputs(ids=ids, mask=torch.ones_like(ids)))
        for done, bucket in enumerate(buckets):
            name = f"{bucket.rows} x {bucket.tokens} tokens"
            say("compiling", done, len(buckets))
            before = perf_counter()
            if reason := target.steps.compile(bucket, memory):
                found.failed[name] = reason
            else:
                found.seconds[name] = perf_counter() - before
        say("compiling", len(buckets), len(buckets))
        folder = compiled_folder()
    elif found.runtime in ("native", "int8", "int4"):
        from baton.runtime.native import kernels

        before = perf_counter()
        kernels()
        found.seconds["C functions"] = perf_counter() - before
        folder = cache_folder()
    else:
        return found
    found.folder = str(folder)
    found.cache_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return found
