"""What a hand-off is worth: quality and speed of LLM, SLM alone and hand-off, and of the hand-off with other Z.

Speed is taken at batch 1, all modes interleaved prompt by prompt in one run, and reported as the median of repeats.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from baton.data.formats import read_pairs
from baton.engine import generate
from baton.errors import DataError, UnknownOption, nearest
from baton.handoff.model import HandoffModel, local_folder
from baton.machine import machine, versions
from baton.models.adapter import runtime_of, slot_bytes
from baton.models.loading import load
from baton.models.prompts import pad_right, tokenize_prompts
from baton.models.writer import PromptInputs, Writer
from baton.quality import text_quality
from baton.types import Pair, RuntimeName, Timings

MODES = ("llm", "slm", "handoff", "zero", "constant", "shuffled")
Progress = Callable[[str, int, int], None]


@dataclass(kw_only=True)
class EvalReport:
    """Numbers of one evaluation. Objects are keyed by mode; times are milliseconds, memory is MB (10^6 bytes).

    `ms_per_token`: one cached decode step. `total_ms`: a whole request, reading included, mean over prompts.
    `predicted_total`: the cost model of the method applied to the second half of the prompts with the parts measured
    on the first; `measured_total`: what that half took. `gap_closed`: share of the BLEU between SLM alone and LLM
    that the hand-off recovers. `peak_memory_mb`: weights and cache while reading; `decode_memory_mb`: while writing.
    """

    bleu: dict[str, float] = field(default_factory=dict)
    chrf: dict[str, float] = field(default_factory=dict)
    ms_per_token: dict[str, float] = field(default_factory=dict)
    ms_per_token_range: dict[str, list[float]] = field(default_factory=dict)
    tokens_per_second: dict[str, float] = field(default_factory=dict)
    total_ms: dict[str, float] = field(default_factory=dict)
    speedup_decode: float | None = None
    speedup_total: float | None = None
    predicted_total: dict[str, float] = field(default_factory=dict)
    measured_total: dict[str, float] = field(default_factory=dict)
    gap_closed: float | None = None
    peak_memory_mb: dict[str, float] = field(default_factory=dict)
    decode_memory_mb: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    folder: Path | str,
    pairs: Sequence[Pair] | None = None,
    *,
    llm: str | Path | None = None,
    slm: str | Path | None = None,
    limit: int | None = None,
    modes: Sequence[str] = MODES,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    runtime: RuntimeName = "auto",
    batch_size: int = 32,
    max_new_tokens: int = 128,
    speed_prompts: int = 64,
    repeats: int = 3,
    examples: int = 8,
    truncate: bool = False,
    progress: Progress | None = None,
) -> EvalReport:
    """Compare LLM, SLM alone and hand-off on the same prompts, greedy.

    Args:
        folder: hand-off folder or Hub id.
        pairs: test examples; None uses the held-out split named in the hand-off's config.
        llm, slm: where the models are, when not where the hand-off says.
        limit: use only the first so many pairs.
        modes: any of `MODES`. `zero`, `constant` (mean Z) and `shuffled` (Z of another prompt) replace Z.
        dtype: of all models; "auto" is the one the hand-off is stored in.
        runtime: of all models, see `baton.runtime.prepare`.
        speed_prompts, repeats: prompts timed one by one, and how often.
        progress: called with (what, done, total).
    Returns: numbers for all modes but those that `settings["left_out"]` gives a reason for.
    Raises: DataError without test data; ModelMismatch for a missing or another LLM.
    """
    for mode in modes:
        if mode not in MODES:
            raise UnknownOption(f"mode {mode!r} is not known: {nearest(mode, MODES)}")
    model = HandoffModel.from_pretrained(folder, llm=llm, dtype=dtype, device=device, runtime=runtime)
    home = local_folder(folder)
    if pairs is None:
        if not model.config.held_out:
            raise DataError(f"{folder} names no held-out split: pass test pairs (--data test.jsonl)")
        pairs = read_pairs(home / model.config.held_out)[0]
    pairs = list(pairs)[:limit]
    if not pairs:
        raise DataError("no test pairs: give at least one")
    writers: dict[str, Writer] = {}
    left_out: dict[str, str] = {}
    if "llm" in modes and model.config.llm["kind"] == "encoder-only":
        left_out["llm"] = "an encoder does not write"
    elif "llm" in modes:
        writers["llm"] = load(model.config.llm["id"], dtype=model.dtype, device=device, runtime=runtime)
    alone = slm or model.config.slm_alone
    if "slm" in modes and not alone:
        left_out["slm"] = "the hand-off names no SLM trained alone: pass one (--slm)"
    elif "slm" in modes:
        writers["slm"] = load(str(alone), dtype=model.dtype, device=device, runtime=runtime)
    writers |= _variants(model, [p.prompt for p in pairs], [m for m in modes if m not in ("llm", "slm")], truncate)
    report = EvalReport(
        machine=machine(),
        versions=versions("torch", "transformers", "sacrebleu", "baton-decoding"),
        settings={
            "model": Path(folder).name,
            "prompts": len(pairs),
            "dtype": str(model.dtype).removeprefix("torch."),
            "runtime": runtime_of(model.slm).name,
            "decoding": "greedy",
            "batch_size_quality": batch_size,
            "batch_size_speed": 1,
            "speed_prompts": min(speed_prompts, len(pairs)),
            "repeats": repeats,
            "max_new_tokens": max_new_tokens,
            "left_out": left_out,
        },
    )
    texts = {}
    for mode, writer in writers.items():
        texts[mode] = _write(mode, writer, pairs, batch_size, max_new_tokens, truncate, progress)
        scores = text_quality(texts[mode], pairs)
        report.bleu[mode], report.chrf[mode] = scores["bleu"], scores["chrf"]
        report.parameters[mode] = _count(writer)
    report.examples = [
        {"prompt": p.prompt, "reference": p.response} | {mode: texts[mode][i] for mode in texts}
        for i, p in enumerate(pairs[:examples])
    ]
    if {"llm", "slm", "handoff"} <= set(report.bleu) and report.bleu["llm"] != report.bleu["slm"]:
        report.gap_closed = (report.bleu["handoff"] - report.bleu["slm"]) / (report.bleu["llm"] - report.bleu["slm"])
    prompts = [p.prompt for p in pairs[:speed_prompts]]
    _measure_speed(report, writers, model, prompts, repeats, max_new_tokens, truncate, progress)
    return report


class _Shuffled:
    """The hand-off with each prompt's Z taken from another prompt, the same one whatever the batch."""

    def __init__(self, model: HandoffModel, donors: dict[tuple[int, ...], list[int]]) -> None:
        self.model, self.donors = model, donors

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode(self, ids: Tensor, mask: Tensor, timings: Timings) -> PromptInputs:
        start = time.perf_counter()
        rows = [tuple(row[: int(n)].tolist()) for row, n in zip(ids, mask.sum(1), strict=True)]
        other, other_mask = pad_right([self.donors[row] for row in rows], device=ids.device)
        states = self.model.read(other, other_mask)
        timings.encode_s += time.perf_counter() - start
        start = time.perf_counter()
        z = self.model.project(states) * other_mask[..., None]  # 0 where the other prompt has ended
        z = nn.functional.pad(z, (0, 0, 0, max(0, ids.shape[1] - z.shape[1])))[:, : ids.shape[1]]
        embeds, mask = self.model.fuse(ids, mask, z)
        timings.project_s += time.perf_counter() - start
        return PromptInputs(embeds=embeds, mask=mask)


class _Signalled:
    """The hand-off with Z = 0 or with one constant Z."""

    def __init__(self, model: HandoffModel, signal: Any, constant: Tensor | None = None) -> None:
        self.model, self.signal_name, self.constant_value = model, signal, constant

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode(self, ids: Tensor, mask: Tensor, timings: Timings) -> PromptInputs:
        with self.model.with_signal(self.signal_name, self.constant_value):
            return self.model.encode(ids, mask, timings)


def _variants(model: HandoffModel, prompts: list[str], modes: Iterable[str], truncate: bool) -> dict[str, Writer]:
    """The hand-off itself and its baselines as writers."""
    rows = tokenize_prompts(model.prompt_tokenizer, prompts, model.prompt_limits, truncate=truncate)
    made: dict[str, Any] = {}
    for mode in modes:
        if mode == "handoff":
            made[mode] = model
        elif mode == "zero":
            made[mode] = _Signalled(model, "zero")
        elif mode == "constant":
            made[mode] = _Signalled(model, "constant", _mean_z(model, rows))
        elif mode == "shuffled":
            unique = list(dict.fromkeys(map(tuple, rows)))
            if len(unique) < 2:
                raise DataError("mode 'shuffled' takes Z from another prompt: give two different ones, or leave it out")
            made[mode] = _Shuffled(model, {row: list(unique[i - 1]) for i, row in enumerate(unique)})
    return made


@torch.inference_mode()
def _mean_z(model: HandoffModel, rows: list[list[int]], batch_size: int = 64) -> Tensor:
    total, count = torch.zeros_like(model.constant, dtype=torch.float32), 0
    for start in range(0, len(rows), batch_size):
        ids, mask = pad_right(rows[start : start + batch_size], device=model.device)
        z = model.project(model.read(ids, mask)).float() * mask[..., None]
        total += z.sum((0, 1))
        count += int(mask.sum())
    return total / count


def _write(
    mode: str, writer: Writer, pairs: Sequence[Pair], batch_size: int, limit: int, truncate: bool, progress: Any
) -> list[str]:
    done = 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(f"{mode}: writing", done, len(pairs))

    outputs = generate(
        writer,
        [p.prompt for p in pairs],
        max_new_tokens=limit,
        batch_size=batch_size,
        truncate=truncate,
        on_finish=count,
    )
    return [o.text for o in outputs]


@dataclass
class _Clock:
    """Sums over one pass of one mode."""

    times: list[Timings] = field(default_factory=list)
    tokens: int = 0

    @property
    def steps(self) -> int:
        return sum(t.steps for t in self.times)

    @property
    def step_s(self) -> float:
        return sum(t.decode_s for t in self.times) / max(1, self.steps)

    @property
    def total_s(self) -> float:
        return sum(t.total_s for t in self.times)


def _measure_speed(
    report: EvalReport,
    writers: dict[str, Writer],
    model: HandoffModel,
    prompts: list[str],
    repeats: int,
    max_new_tokens: int,
    truncate: bool,
    progress: Progress | None,
) -> None:
    passes: list[dict[str, _Clock]] = []
    encoder_s: list[list[float]] = []  # per pass, per prompt: the LLM's reading alone
    for repeat in range(repeats + 1):  # the first pass warms up
        clocks = {mode: _Clock() for mode in writers}
        alone: list[float] = []
        for index, prompt in enumerate(prompts if repeat else prompts[:4]):
            for mode, writer in writers.items():
                output = generate(writer, [prompt], max_new_tokens=max_new_tokens, batch_size=1, truncate=truncate)[0]
                clocks[mode].times.append(output.timings)
                clocks[mode].tokens += len(output.token_ids)
            alone.append(_time_encoder(model, prompt, truncate))
            if progress is not None and repeat:
                progress("speed: one by one", (repeat - 1) * len(prompts) + index + 1, repeats * len(prompts))
        if repeat:
            passes.append(clocks)
            encoder_s.append(alone)
    for mode, writer in writers.items():
        steps = [1e3 * p[mode].step_s for p in passes]
        report.ms_per_token[mode] = statistics.median(steps)
        report.ms_per_token_range[mode] = [min(steps), max(steps)]
        report.tokens_per_second[mode] = statistics.median(p[mode].tokens / p[mode].total_s for p in passes)
        report.total_ms[mode] = 1e3 * statistics.median(p[mode].total_s for p in passes) / len(prompts)
        tokens = max(len(t) for t in (writer.prompt_tokenizer([q])["input_ids"][0] for q in prompts))
        cache = (tokens + max_new_tokens) * slot_bytes(writer.lm)
        report.decode_memory_mb[mode] = (_bytes(writer.lm) + cache) / 1e6
        reading = _bytes(model.encoder.model) + _bytes(model) if mode not in ("llm", "slm") else _bytes(writer.lm)
        report.peak_memory_mb[mode] = (reading + cache) / 1e6
    if {"llm", "handoff"} <= set(writers) and report.ms_per_token["handoff"]:
        report.speedup_decode = report.ms_per_token["llm"] / report.ms_per_token["handoff"]
    if {"llm", "handoff"} <= set(writers):
        report.speedup_total = report.total_ms["llm"] / report.total_ms["handoff"]
    if {"llm", "slm", "handoff"} <= set(writers) and len(prompts) >= 2:
        _predict(report, passes, encoder_s, model.config.llm["kind"])


def _time_encoder(model: HandoffModel, prompt: str, truncate: bool) -> float:
    rows = tokenize_prompts(model.prompt_tokenizer, [prompt], model.prompt_limits, truncate=truncate)
    ids, mask = pad_right(rows, device=model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        model.read(ids, mask)
    if ids.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _predict(report: EvalReport, passes: list[dict[str, _Clock]], encoder_s: list[list[float]], kind: str) -> None:
    """T_llm = t_enc + n L, T_slm = t_pre + n s, T_ours = t_enc + t_proj + t_pre + n s, in ms per prompt.

    Even prompts give the parts (t_enc from the encoder run alone, t_pre and s from the SLM run alone, L from the
    LLM), odd prompts the totals; n counts decode steps. An encoder-decoder LLM's first token costs one more step after
    its encoder; a decoder-only one's comes with its prompt pass, which stands for t_enc in T_llm.
    """
    predicted: dict[str, list[float]] = {"llm": [], "slm": [], "handoff": []}
    measured: dict[str, list[float]] = {"llm": [], "slm": [], "handoff": []}
    for clocks, alone in zip(passes, encoder_s, strict=True):
        mean = statistics.fmean
        known = {mode: _Clock(clocks[mode].times[::2]) for mode in predicted}
        t_enc = mean(alone[::2])
        t_pre = mean(t.prefill_s for t in known["slm"].times)
        t_proj = mean(t.project_s for t in known["handoff"].times)
        n = {mode: mean(t.steps for t in clocks[mode].times[1::2]) for mode in predicted}
        s, step = known["slm"].step_s, known["llm"].step_s
        t_llm = t_enc + step if kind == "encoder-decoder" else mean(t.prefill_s for t in known["llm"].times)
        for mode, total in (
            ("llm", t_llm + n["llm"] * step),
            ("slm", t_pre + n["slm"] * s),
            ("handoff", t_enc + t_proj + t_pre + n["handoff"] * s),
        ):
            predicted[mode].append(1e3 * total)
            measured[mode].append(1e3 * mean(t.total_s for t in clocks[mode].times[1::2]))
    report.predicted_total = {mode: statistics.median(v) for mode, v in predicted.items()}
    report.measured_total = {mode: statistics.median(v) for mode, v in measured.items()}


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _count(writer: Any) -> int:
    return sum(p.numel() for p in writer.lm.parameters())
