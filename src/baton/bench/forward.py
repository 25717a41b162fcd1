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

from baton.bench.peers.table import Absent
from baton.bench.shapes import PASS_PEERS, SHAPES
from baton.errors import BatonError, MemoryShort, UnknownOption, nearest
from baton.machine import bandwidth_gb_s, free_bytes, machine, probe_s, revision, seconds_of, versions
from baton.models.adapter import runtime_of, target_for
from baton.models.writer import PromptInputs
from baton.runtime import prepare
from baton.types import RuntimeName

OURS = "baton"
SETTLE_S = 0.005  # threads of one engine spin for a while after its work is done, and would slow the next


class Engine(Protocol):
    """Something that holds a sequence and can look at what might follow."""

    name: str

    def begin(self, ids: list[int]) -> None:
        """Forget everything and read a prompt. (An encoder-decoder reads it with its encoder, and its decoder too.)"""

    def look(self, ids: list[int]) -> None:
        """One pass over these tokens, logits for each, and back to where it was."""


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
    gb_s: float  # bytes of the weights that a pass reads, over the median


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
    peers: Sequence[str] = PASS_PEERS,
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
        peers: of `PASS_PEERS`; one that cannot take part is reported as absent.
        runtime: ours; with `int8`, llama.cpp has its weights in eight bits too.
        repeats: of each pass, 3 or more; engines take turns within each.
        progress: called with (what, done, total).
    Raises: UnknownOption for a shape or peer that does not exist; MemoryShort, with an estimate, before any weight is
        allocated.
    """
    config = shape_config(shape)
    for peer in peers:
        if peer not in PASS_PEERS:
            raise UnknownOption(f"no peer {peer!r} for single passes: {nearest(peer, PASS_PEERS)}")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and max(contexts) + max(rows) > limit:
        raise BatonError(f"{max(contexts)} + {max(rows)} positions are more than {shape} has ({limit})")
    model = random_model(shape, dtype, device, "eager", copies=2 if "llama.cpp" in peers else 1)
    engines, absent = _engines(model, peers, runtime, max(contexts) + max(rows) + 1)
    ours = engines[0]
    assert isinstance(ours, Baton)
    halved = dtype.itemsize if runtime_of(ours.model).name == "int8" else 1
    read = dict.fromkeys((engine.name for engine in engines), weight_bytes(model)) | {
        OURS: weight_bytes(model) // halved
    }
    costs: list[Cost] = []
    usual, busy, done, repeats = probe_s(), 0, 0, max(3, repeats)
    total = len(contexts) * (1 + len(rows))
    for context in contexts:
        prompt = torch.randint(3, config.vocab_size, (context,)).tolist()
        whats = [("prompt", 0), *(("pass", count) for count in rows)]
        for what, count in whats:
            ids = torch.randint(3, config.vocab_size, (count,)).tolist()
            seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
            for repeat in range(max(3, repeats // 5) if what == "prompt" else repeats):
                busy += probe_s() > 3 * usual
                for engine in engines if repeat % 2 else engines[::-1]:
                    time.sleep(SETTLE_S)
                    if what == "prompt":
                        seconds[engine.name].append(seconds_of(lambda: engine.begin(prompt)))  # noqa: B023 (called at once)
                    else:
                        engine.look(ids)  # as in decoding, where a pass follows a pass
                        seconds[engine.name].append(seconds_of(lambda: engine.look(ids)))  # noqa: B023
            for name, values in seconds.items():
                low, median, high = statistics.quantiles(values, n=4)
                costs.append(Cost(name, what, context, count, median, low, high, round(read[name] / median / 1e9, 1)))
            done += 1
            if progress is not None:
                progress(f"context {context}", done, total)
    return ForwardReport(
        costs=costs,
        settings={
            "shape": shape,
            "parameters": sum(p.numel() for p in model.parameters()),
            "weight_bytes": weight_bytes(model),
            "dtype": str(dtype).removeprefix("torch."),
            "runtime": runtime_of(ours.model).name,
            "repeats": repeats,
            "git": revision(),
            "command": command,
        },
        machine=machine() | {"bandwidth_gb_s": bandwidth_gb_s()},
        versions=versions("torch", "transformers", "baton-decoding"),
        absent=absent,
        remarks=[f"the machine was busy before {busy} passes"] if busy else [],
    )


class Baton:
    """Our engine's target, stock or faster."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model, self.target = name, model, target_for(model)

    def begin(self, ids: list[int]) -> None:
        prompt = torch.tensor([ids], device=self.target.device)
        _, self.memory = self.target.prefill(PromptInputs(ids=prompt, mask=torch.ones_like(prompt)))
        if not self.target.reads_prompt:
            self.target.forward(prompt, self.memory)

    def look(self, ids: list[int]) -> None:
        before = list(self.memory.lengths)
        self.target.forward(torch.tensor([ids], device=self.target.device), self.memory)
        self.memory.truncate(before)


class Transformers:
    """The model's own call with transformers' own cache."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @torch.inference_mode()
    def begin(self, ids: list[int]) -> None:
        prompt = torch.tensor([ids], device=self.model.device)
        if self.model.config.is_encoder_decoder:
            made = self.model(input_ids=prompt, decoder_input_ids=prompt, use_cache=True)
            self.given = {"encoder_outputs": (made.encoder_last_hidden_state,)}
        else:
            made = self.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
            self.given = {}
        self.past = made.past_key_values

    @torch.inference_mode()
    def look(self, ids: list[int]) -> None:
        new = torch.tensor([ids], device=self.model.device)
        name = "decoder_input_ids" if self.model.config.is_encoder_decoder else "input_ids"
        self.model(**{name: new}, past_key_values=self.past, use_cache=True, **self.given)
        self.past.crop(-len(ids))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode pass reads: the decoder's layers and the head."""
    target = target_for(model)
    weights = {id(w): w.nbytes for part in (target.layers, target.lm_head) for w in part.parameters()}
    return sum(weights.values())


def _engines(
    model: PreTrainedModel, peers: Sequence[str], runtime: RuntimeName, context: int
) -> tuple[list[Engine], list[str]]:
    engines: list[Engine] = []
    absent: list[str] = []
    if "transformers" in peers:
        engines.append(Transformers(model))
    if "llama.cpp" in peers:
        try:
            from baton.bench.peers.llama_cpp import FAMILIES, Passes
        except ImportError as error:
            absent.append(f"llama.cpp is absent: {error.name} is not installed (pip install 'baton-decoding[peers]')")
        else:
            try:
                if model.config.model_type not in FAMILIES:
                    raise Absent(f"llama.cpp is left out: here it runs {', '.join(FAMILIES)}")
                engines.append(Passes(model, context, q8=runtime == "int8"))
            except (BatonError, ValueError, OSError, RuntimeError) as error:  # the others go on
                absent.append(str(error))
    ours = copy.deepcopy(model) if runtime == "packed" else model  # the others leave its own call as it was
    prepare(ours, runtime)
    return [Baton(OURS, ours), *engines], absent


def shape_config(shape: str) -> Any:
    """The configuration of a public shape. Raises: UnknownOption with the nearest name."""
    if shape not in SHAPES:
        raise UnknownOption(f"no shape {shape!r}: {nearest(shape, SHAPES)}")
    kind, settings = SHAPES[shape]
    return AutoConfig.for_model(kind, **settings)


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
