"""What a hand-off costs at real sizes: LLM, SLM and the hand-off between them, of public shapes with random weights.

The LLM reads the prompt once, a projector maps what it read, the SLM reads the sum with its own embeddings and writes
(arXiv 2402.16844). Random weights cost what trained ones cost; quality is another matter, measured on trained models.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from baton.bench.forward import random_model
from baton.errors import UnsupportedModel
from baton.handoff.project import Projector
from baton.machine import bandwidth_gb_s, machine, revision, versions
from baton.models.adapter import EncoderDecoder, runtime_of, target_for
from baton.models.text import embed_tokens
from baton.models.writer import PromptInputs
from baton.types import RuntimeName

MODES = ("llm", "slm", "handoff")


@dataclass(frozen=True)
class HandoffCost:
    """Medians of one mode at one length of the response."""

    mode: str
    tokens: int  # of the response
    total_s: float  # prompt and response
    read_s: float  # everything before the first token
    ms_per_token: float  # after the first


@dataclass(kw_only=True)
class HandoffSpeed:
    """All costs, under which conditions."""

    costs: list[HandoffCost]
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


def bench_handoff(
    llm: str = "t5-large",
    slm: str = "t5-small",
    *,
    prompt_tokens: int = 128,
    lengths: Sequence[int] = (16, 64, 256),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    runtime: RuntimeName = "auto",
    repeats: int = 3,
    command: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> HandoffSpeed:
    """Time one prompt and its response of each length, by LLM, SLM and hand-off in turn.

    Args:
        llm, slm: shapes of encoder-decoder models, see `baton.bench.shapes`.
        lengths: tokens of the response; end tokens end nothing here.
    Raises: UnknownOption for a shape that does not exist; UnsupportedModel for one that is no encoder-decoder;
        MemoryShort before anything is allocated.
    """
    targets: dict[str, EncoderDecoder] = {}
    for mode, shape in (("llm", llm), ("slm", slm)):
        target = target_for(random_model(shape, dtype, device, runtime))
        if not isinstance(target, EncoderDecoder):
            raise UnsupportedModel(f"{shape} has no encoder: give shapes of encoder-decoder models")
        targets[mode] = target
    large, small = targets["llm"], targets["slm"]
    torch.manual_seed(0)
    widths = (large.model.config.d_model, small.model.config.d_model)
    projector = Projector(*widths, zero_init=False).to(device, dtype).eval()
    ids = torch.randint(3, small.model.config.vocab_size, (1, prompt_tokens), device=device)
    mask = torch.ones_like(ids)

    def plain(target: EncoderDecoder) -> tuple[EncoderDecoder, PromptInputs]:
        return target, PromptInputs(ids=ids, mask=mask)

    def handed() -> tuple[EncoderDecoder, PromptInputs]:
        states, _ = large.encode(PromptInputs(ids=ids, mask=mask))
        return small, PromptInputs(embeds=embed_tokens(small.model, ids) + projector(states), mask=mask)

    ways: dict[str, Callable[[], tuple[EncoderDecoder, PromptInputs]]] = {
        "llm": lambda: plain(large),
        "slm": lambda: plain(small),
        "handoff": handed,
    }
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    done, total = 0, (repeats + 1) * len(lengths)
    for length in lengths:
        for repeat in range(repeats + 1):
            for mode in MODES if repeat % 2 else MODES[::-1]:
                taken = _write(ways[mode], length)
                if repeat:  # the first warms up
                    seconds.setdefault((mode, length), []).append(taken)
            done += 1
            if progress is not None:
                progress(f"{length} tokens", done, total)
    costs = []
    for (mode, length), times in seconds.items():
        read, whole = statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)
        costs.append(HandoffCost(mode, length, whole, read, 1e3 * (whole - read) / max(1, length - 1)))
    return HandoffSpeed(
        costs=costs,
        settings={
            "llm": llm,
            "slm": slm,
            "prompt_tokens": prompt_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "runtime": runtime_of(large.model).name,
            "repeats": repeats,
            "git": revision(),
            "command": command,
        },
        machine=machine() | {"bandwidth_gb_s": bandwidth_gb_s(device)},
        versions=versions("torch", "transformers", "baton-decoding"),
    )


@torch.inference_mode()
def _write(way: Callable[[], tuple[EncoderDecoder, PromptInputs]], length: int) -> tuple[float, float]:
    """Seconds until the first token, and until the last."""
    started = time.perf_counter()
    target, inputs = way()
    logits, memory = target.prefill(inputs)
    token: Tensor = logits.argmax(-1, keepdim=True)
    read = time.perf_counter() - started
    for _ in range(length - 1):
        token = target.forward(token, memory)[:, -1].argmax(-1, keepdim=True)
    if token.is_cuda:
        torch.cuda.synchronize()
    return read, time.perf_counter() - started
