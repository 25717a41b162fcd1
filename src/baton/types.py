"""Plain data that travels between the parts. Imports nothing of ours but errors."""

from dataclasses import dataclass, field
from typing import Literal

from baton.errors import BatonError

FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from logits. The defaults are greedy decoding.

    Filters are applied in this order: repetition penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0  # 0 is greedy; 1 samples from the model's own distribution
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set whose probability reaches this; 1 keeps all
    min_p: float = 0.0  # keep tokens at least this fraction as probable as the best one; 0 keeps all
    repetition_penalty: float = 1.0  # > 1 makes tokens already in the context less likely (arXiv 1909.05858)
    seed: int = 0  # the same seed, prompt and options give the same text

    def __post_init__(self) -> None:
        for name, ok, want in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0 (1 is off)"),
        ):
            if not ok:
                raise BatonError(f"{name}={getattr(self, name)} is not possible: it must be {want}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(kw_only=True)
class Timings:
    """Wall-clock seconds of one batch, shared by all its rows."""

    encode_s: float = 0.0  # the LLM reads the prompts
    project_s: float = 0.0  # projector and fusion
    prefill_s: float = 0.0  # prompt pass of the model that writes
    decode_s: float = 0.0  # all cached decode steps
    steps: int = 0  # cached decode steps

    @property
    def total_s(self) -> float:
        return self.encode_s + self.project_s + self.prefill_s + self.decode_s


@dataclass(kw_only=True)
class Output:
    """One finished request."""

    prompt: str
    text: str
    token_ids: list[int]  # response tokens, end token included when it was produced
    finish_reason: FinishReason
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One training or test example."""

    prompt: str
    response: str
    references: tuple[str, ...] = ()  # every accepted answer, `response` included; empty means (response,)

    @property
    def accepted(self) -> tuple[str, ...]:
        return self.references or (self.response,)
