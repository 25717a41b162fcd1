"""What may go wrong with a model and a method, found before it does: one line and one remedy per finding."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from baton.drafters import make
from baton.drafters.draft_model import DraftModel
from baton.engine import Engine
from baton.engine.rules import Rules
from baton.errors import BatonError
from baton.handoff.model import HandoffModel
from baton.models.adapter import Target, runtime_of, target_for
from baton.models.loading import load
from baton.models.writer import Writer
from baton.train.trainer import bf16_is_fast
from baton.types import RuntimeName

Level = Literal["ok", "note", "warning", "error"]

# Tokens per step that published measurements saw, from text that hardly repeats to text that mostly does.
EXPECTED = {
    "prompt-lookup": (1.0, 3.0),
    "token-recycling": (1.8, 3.0),
    "draft-model": (1.8, 4.5),
    "handoff": (1.5, 4.0),
}
INSTRUCT = ("chat", "instruct", "-it")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    remedy: str = ""


def examine(
    model: str | Path,
    method: str | None = None,
    *,
    llm: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    runtime: RuntimeName = "auto",
) -> list[Finding]:
    """Look at a model, and at a method that is to draft for it. Never raises what it can report.

    Args:
        model: folder or Hub id; method: as in `baton.generate(drafter=...)`; llm: where a hand-off finds its LLM.
    """
    try:
        if llm is None:
            writer = load(model, dtype=dtype, device=device, runtime=runtime)
        else:
            writer = HandoffModel.from_pretrained(model, llm=llm, dtype=dtype, device=device, runtime=runtime)
    except (BatonError, OSError, ValueError) as error:
        return [Finding("error", f"the model cannot be loaded: {error}", "see the message")]
    try:
        target = target_for(writer.lm)
    except BatonError as error:
        return [Finding("error", str(error), "use a supported family, or transformers' own generate")]
    findings = [
        *_kind(writer, target),
        *_dtype(writer),
        *_runtime(writer, runtime),
        *_tokenizer(writer, target),
        *_rules(writer),
    ]
    if method is not None:
        findings += _method(writer, target, method)
    return findings


def _kind(writer: Writer, target: Target) -> Iterator[Finding]:
    family = writer.lm.config.model_type
    shape = "decoder-only" if target.reads_prompt else "encoder-decoder"
    size = sum(p.numel() for p in writer.lm.parameters()) / 1e6
    yield Finding("ok", f"{family}, {shape}, {size:,.1f} M parameters, {len(target.layers)} decoder layers")
    if isinstance(writer, HandoffModel):
        yield Finding("ok", "a hand-off: its LLM is there, and is the one it was trained with")
    if target.context is not None:
        yield Finding("ok", f"{target.context} positions per row")
    if target.window is not None:
        yield Finding("note", f"sliding windows of {target.window} positions: exact, but without saving memory")


def _dtype(writer: Writer) -> Iterator[Finding]:
    dtype, device = writer.lm.dtype, writer.lm.device.type
    name = str(dtype).removeprefix("torch.")
    if device == "cpu" and dtype == torch.float16:
        yield Finding("warning", "float16 is slow and imprecise on CPUs", "--dtype bfloat16, or float32")
    elif dtype == torch.bfloat16 and not bf16_is_fast(device):
        yield Finding("warning", f"this {device} has no bfloat16 instructions: it is emulated", "--dtype float32")
    elif device == "cpu" and dtype == torch.float32 and bf16_is_fast(device):
        yield Finding("note", "float32 is exact; this CPU has bfloat16 instructions", "--dtype bfloat16 for speed")
    else:
        yield Finding("ok", f"{name} on {device}")
    if dtype != torch.float32:
        yield Finding("note", f"in {name} near-ties between tokens may fall either way", "baton audit counts them")


def _runtime(writer: Writer, asked: RuntimeName) -> Iterator[Finding]:
    name = runtime_of(writer.lm).name
    if asked not in ("auto", name):
        yield Finding("warning", f"runtime {asked} cannot run this model here: it runs {name}", "docs/performance.md")
    elif name == "compiled":
        yield Finding(
            "ok", "runtime compiled: passes are eager until theirs is compiled", "baton warmup compiles ahead"
        )
    else:
        yield Finding("ok", f"runtime {name}")


def _tokenizer(writer: Writer, target: Target) -> Iterator[Finding]:
    tokenizer = writer.response_tokenizer
    rows, known = target.lm_head.out_features, len(tokenizer)
    if known > rows:
        yield Finding(
            "error",
            f"the tokenizer has {known} tokens, the model {rows}: tokens {rows} to {known - 1} cannot be written",
            "use the tokenizer the model was trained with, or model.resize_token_embeddings",
        )
    else:
        yield Finding("ok", f"tokenizer of {known} tokens" + (f", {rows} rows in the head" if rows != known else ""))
    ends = Rules.of(writer).ends
    if not ends:
        yield Finding("warning", "no end token is known: every text runs to its limit", "set eos_token_id, or --stop")
    template = getattr(writer.prompt_tokenizer, "chat_template", None)
    name = str(getattr(writer.lm, "name_or_path", "")).lower()
    if not template and any(word in name for word in INSTRUCT):
        yield Finding(
            "warning",
            "the name says chat or instruct, and the tokenizer has no chat template",
            "add chat_template to its tokenizer_config.json, or write the markers into the prompt",
        )
    elif template:
        yield Finding("ok", "a chat template: rows of messages are rendered with it, plain prompts are not")


def _rules(writer: Writer) -> Iterator[Finding]:
    config = writer.lm.generation_config
    if getattr(config, "do_sample", False):
        yield Finding(
            "note",
            f"generation_config.json asks for sampling (temperature {config.temperature}); Baton is greedy unless told",
            "--temperature, --top-p",
        )
    if (getattr(config, "num_beams", 1) or 1) > 1:
        yield Finding("note", f"generation_config.json asks for {config.num_beams} beams", "model.generate has beams")


def _method(writer: Writer, target: Target, method: str) -> Iterator[Finding]:
    try:
        drafter = make(method)
        Engine(writer, drafter)
    except (BatonError, OSError) as error:
        yield Finding("error", str(error), "choose another method, or other options: docs/methods.md")
        return
    yield Finding("ok", f"{drafter.name} fits this model")
    if isinstance(drafter, DraftModel):
        yield from _small_model(target, drafter)
    if drafter.name in EXPECTED:
        low, high = EXPECTED[drafter.name]
        yield Finding(
            "ok",
            f"{drafter.name} usually gives {low} to {high} tokens per step",
            "far below: other text than it suits, or a small model of another kind; baton bench decode measures it",
        )


def _small_model(target: Target, drafter: DraftModel) -> Iterator[Finding]:
    mine, theirs = (sum(p.numel() for p in lm.parameters()) for lm in (drafter.writer.lm, target.model))
    layers = len(drafter.target.layers), len(target.layers)
    if layers[0] * 3 > layers[1]:
        yield Finding(
            "warning",
            f"the small model has {layers[0]} layers, the target {layers[1]}: a draft costs nearly what it saves",
            "use one with a quarter of the layers or fewer",
        )
    else:
        yield Finding("ok", f"the small model has {mine / theirs:.0%} of the target's parameters")
    if not drafter.same:
        yield Finding(
            "note",
            "the two have different tokenizers: they talk through text, chains only",
            "a small model of the same family accepts more",
        )
