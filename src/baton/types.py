"""Plain data that travels between the parts. Imports nothing of ours but errors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from baton.errors import BatonError

Rule = Literal["auto", "sample-and-match", "recursive-rejection", "typical"]  # how drafts are verified
TARGET = "target"  # the source of tokens that no drafter had guessed
RuntimeName = Literal["auto", "eager", "native", "int8", "int4", "packed", "compiled"]  # see baton.runtime
FinishReason = Literal["eos", "stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from logits. The defaults are greedy decoding.

    Applied in this order: repetition penalty, logit bias, bad words, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0  # 0 is greedy; 1 samples from the model's own distribution
    top_k: int = 0  # keep the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set whose probability reaches this; 1 keeps all
    min_p: float = 0.0  # keep tokens at least this fraction as probable as the best one; 0 keeps all
    repetition_penalty: float = 1.0  # > 1 makes tokens already in the context less likely (arXiv 1909.05858)
    # (token id, what is added to its logit)
    logit_bias: tuple[tuple[int, float], ...] = field(default=(), metadata={"cli": False})
    # sequences of token ids that must not appear
    bad_words: tuple[tuple[int, ...], ...] = field(default=(), metadata={"cli": False})
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
    """Wall-clock seconds that a request took part in, together with the other rows of its batch."""

    encode_s: float = 0.0  # the LLM reads the prompts
    project_s: float = 0.0  # projector and fusion
    prefill_s: float = 0.0  # prompt pass of the model that writes
    decode_s: float = 0.0  # all cached decode steps
    steps: int = 0  # cached decode steps

    @property
    def total_s(self) -> float:
        return self.encode_s + self.project_s + self.prefill_s + self.decode_s


@dataclass(frozen=True, kw_only=True)
class Step:
    """Raw counts of one decode step of one request; every metric is derived from these.

    The seconds are those of the whole step, together with the other rows of its batch.
    """

    rows: int  # positions of this request in the target's pass: its newest token, the draft, padding beside longer ones
    drafted: Mapping[str, int]  # tokens proposed, by who proposed them
    evaluated: int  # of these, candidates that were compared with the target's choice: children of nodes it came by
    accepted: int  # of these, on the path that the target agreed with
    emitted: int  # tokens that came out of it: the accepted ones and one of the target's own, cut at the end
    draft_s: float = 0.0  # the drafter proposes, and takes in what the target said
    verify_s: float = 0.0  # the target's pass, the acceptance rule, the cache cut back to what is kept
    other_s: float = 0.0  # tokens to text, bookkeeping

    @property
    def num_drafted(self) -> int:
        return sum(self.drafted.values())


@dataclass(kw_only=True)
class Output:
    """One finished request."""

    prompt: str
    text: str
    token_ids: list[int]  # response tokens, end token included when it was produced
    finish_reason: FinishReason
    error: str = ""  # what went wrong, when the finish_reason is "error"
    sources: list[str] = field(default_factory=list)  # per token: who wrote it, "target" or a drafter
    steps: list[Step] = field(default_factory=list)  # decode steps; the first token is prefill's and in none
    timings: Timings = field(default_factory=Timings)

    @property
    def acceptance_length(self) -> float:
        """Mean tokens emitted per decode step, the target's own included; plain decoding has 1."""
        return sum(step.emitted for step in self.steps) / len(self.steps) if self.steps else 1.0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One training or test example."""

    prompt: str
    response: str
    references: tuple[str, ...] = ()  # every accepted answer, `response` included; empty means (response,)

    @property
    def accepted(self) -> tuple[str, ...]:
        return self.references or (self.response,)
