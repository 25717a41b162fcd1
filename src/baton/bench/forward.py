"""What one pass costs: models of public shapes with random weights, ours and other engines, in turn in one run.

A pass reads `rows` new tokens of one sequence that holds `context` already, and gives logits for all of them: one row
is plain decoding, more are the verification of a draft. Nothing is generated, so weights may be random; acceptance is
not measured here.
"""

import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from baton.bench.peers.table import PEERS, make_passes
from baton.bench.shapes import SHAPES
from baton.errors import BatonError, MemoryShort, UnknownOption, nearest
from baton.machine import BUSY_PASS, Quiet, bandwidth_gb_s, free_bytes, machine, revision, seconds_of, versions
from baton.models.adapter import runtime_of, target_for
from baton.models.writer import PromptInputs
from baton.runtime import prepare
from baton.runtime.quantized import copy_of
from baton.types import RuntimeName

OURS = "baton"
COPIES = {"llama.cpp": 1, "ctranslate2": 2, "openvino": 3}  # of the weights, while a peer takes them over
SETTLE_S = 0.005  # threads of one engine spin for a while after its work is done, and would slow the next


class Engine(Protocol):
    """Something that holds a sequence and can look at what might follow."""

    name: str
    lacks: str  # which of the two it cannot be timed at and why, or nothing

    def begin(self, ids: list[int]) -> float | None:
        """Forget everything and read a prompt. (An encoder-decoder reads it with its encoder, and its decoder too.)

        Returns: seconds; None where they are not those of other engines' work.
        """

    def look(self, ids: list[int]) -> float | None:
        """One pass over these tokens, logits for each; then, no longer timed, back to where it was.

        Returns: seconds; None where it has no such pass.
        """


@dataclass(frozen=True)
class Cost:
    """Seconds of one kind of pass by one engine: median, and the range of the middle half."""

    engine: str
    what: str  # "pass", or "prompt" for reading the context itself
    context: int
    rows: int
    seconds: float
    low: float
    high: float
    gb_s: float | None  # bytes of the weights that a pass of ours reads, over the median; others store what they like


@dataclass(kw_only=True)
class ForwardReport:
    """All costs, under which conditions."""

    costs: list[Cost]
    settings: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    absent: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


def bench_forward(
    shape: str,
    *,
    rows: Sequence[int] = (1, 2, 4, 8, 16, 32),
    contexts: Sequence[int] = (64, 512, 2048),
    peers: Sequence[str] = ("transformers", "llama.cpp"),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    runtime: RuntimeName = "auto",
    repeats: int = 15,
    command: str = "",
    progress: Callable[[str, int, int], None] | None = None,
) -> ForwardReport:
    """Time passes of a random model of a public shape.

    Args:
        shape: one of `SHAPES`.
        rows: tokens of a pass; contexts: tokens before it.
        peers: of `PEERS`; one that cannot take part is reported as absent, and so is what one cannot be timed at.
        runtime: ours; with `int8` or `int4`, llama.cpp has its weights in so many bits too.
        repeats: of each pass, 3 or more; engines take turns within each.
        progress: called with (what, done, total).
    Raises: UnknownOption for a shape or peer that does not exist; MemoryShort, with an estimate, before any weight is
        allocated.
    """
    config = shape_config(shape)
    for peer in peers:
        if peer not in PEERS:
            raise UnknownOption(f"no peer {peer!r}: {nearest(peer, PEERS)}")
    check_positions(shape, max(contexts), max(rows))
    copies = 1 + sum(COPIES.get(peer, 0) for peer in peers)
    model = random_model(shape, dtype, device, "eager", copies=copies)
    engines, absent = _engines(model, peers, runtime, max(contexts) + max(rows) + 1)
    ours = engines[0]
    assert isinstance(ours, Baton)
    read = weight_bytes(ours.model)
    costs: list[Cost] = []
    quiet, busy, done, repeats = Quiet(bound=BUSY_PASS), 0, 0, max(3, repeats)
    total = len(contexts) * (1 + len(rows))
    for context in contexts:
        prompt = torch.randint(3, config.vocab_size, (context,)).tolist()
        whats = [("prompt", 0), *(("pass", count) for count in rows)]
        for what, count in whats:
            ids = torch.randint(3, config.vocab_size, (count,)).tolist()
            seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
            for repeat in range(max(3, repeats // 5) if what == "prompt" else repeats):
                busy += quiet.busy()
                for engine in engines if repeat % 2 else engines[::-1]:
                    time.sleep(SETTLE_S)
                    if what == "prompt":
                        taken = engine.begin(prompt)
                    else:
                        engine.look(ids)  # as in decoding, where a pass follows a pass
                        taken = engine.look(ids)
                    if taken is not None:
                        seconds[engine.name].append(taken)
            for name, values in seconds.items():
                if not values:
                    continue
                low, median, high = statistics.quantiles(values, n=4)
                gb_s = round(read / median / 1e9, 1) if name == OURS else None
                costs.append(Cost(name, what, context, count, median, low, high, gb_s))
            done += 1
            if progress is not None:
                progress(f"context {context}", done, total)
    return ForwardReport(
        costs=costs,
        settings={
            "shape": shape,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes": read,
            "dtype": str(dtype).removeprefix("torch."),
            "runtime": runtime_of(ours.model).name,
            "repeats": repeats,
            "git": revision(),
            "command": command,
        },
        machine=machine() | {"bandwidth_gb_s": bandwidth_gb_s(device)},
        versions=versions("torch", "transformers", "baton-decoding"),
        absent=absent,
        remarks=[f"the machine was busy before {busy} passes"] if busy else [],
    )


class Baton:
    """Our engine's target, stock or faster."""

    lacks = ""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model, self.target = name, model, target_for(model)

    def begin(self, ids: list[int]) -> float:
        return seconds_of(lambda: self._begin(ids))

    def _begin(self, ids: list[int]) -> None:
        prompt = torch.tensor([ids], device=self.target.device)
        _, self.memory = self.target.prefill(PromptInputs(ids=prompt, mask=torch.ones_like(prompt)))
        if not self.target.reads_prompt:
            self.target.forward(prompt, self.memory)

    def look(self, ids: list[int]) -> float:
        before = list(self.memory.lengths)
        taken = seconds_of(lambda: self.target.forward(torch.tensor([ids], device=self.target.device), self.memory))
        self.memory.truncate(before)
        return taken


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode pass reads: the decoder's layers and the head, or smaller copies of them."""
    target = target_for(model)
    read: dict[int, int] = {}
    for part in (*target.layers.modules(), *target.lm_head.modules()):
        read |= {id(weight): weight.nbytes for weight in part.parameters(recurse=False)}
        if (smaller := copy_of(part)) is not None:
            read[id(part.weight)] = smaller.nbytes
    return sum(read.values())


def _engines(
    model: PreTrainedModel, peers: Sequence[str], runtime: RuntimeName, context: int
) -> tuple[list[Engine], list[str]]:
    engines: list[Engine] = []
    absent: list[str] = []
    for name in peers:
        try:
            engines.append(make_passes(name, model, context, bits={"int8": 8, "int4": 4}.get(runtime, 0)))
        except (BatonError, ValueError, OSError, RuntimeError) as error:  # the others go on
            absent.append(str(error))
    ours = copy.deepcopy(model) if runtime == "packed" else model  # the others leave its own call as it was
    prepare(ours, runtime)
    engines = [Baton(OURS, ours), *engines]
    return engines, absent + [engine.lacks for engine in engines if engine.lacks]


def shape_config(shape: str) -> Any:
    """The configuration of a public shape. Raises: UnknownOption with the nearest name."""
    if shape not in SHAPES:
        raise UnknownOption(f"no shape {shape!r}: {nearest(shape, SHAPES)}")
    kind, settings = SHAPES[shape]
    return AutoConfig.for_model(kind, **settings)


def check_positions(shape: str, context: int, new: int) -> None:
    """Raises: BatonError where a shape's table of positions ends before so many new ones after a context."""
    limit = getattr(shape_config(shape), "max_position_embeddings", None)
    if limit is not None and context + new > limit:
        raise BatonError(
            f"{context} + {new} positions are more than {shape} has ({limit}): give --context {limit - new} or less"
        )


def random_model(
    shape: str, dtype: torch.dtype, device: torch.device | str, runtime: RuntimeName, *, copies: int = 1
) -> PreTrainedModel:
    """A model of a public shape with random weights, seeded.

    Args:
        copies: of the weights that memory must have room for.
    Raises: UnknownOption; MemoryShort, with an estimate, before any weight is allocated.
    """
    config = shape_config(shape)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    gc.collect()
    needed, free = count * dtype.itemsize * copies, free_bytes(torch.device(device))
    if needed > free:
        raise MemoryShort(
            f"{shape} has {count / 1e6:,.0f} M parameters: {needed / 1e9:.1f} GB in "
            f"{str(dtype).removeprefix('torch.')}, {copies} times, and {free / 1e9:.1f} GB are free"
        )
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config, dtype=dtype).to(device).eval()
    prepare(model, runtime)
    return model
