"""What generation needs from a model: a plain language model and a hand-off look alike from here."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from baton.types import Timings


@dataclass(frozen=True, kw_only=True)
class PromptInputs:
    """What prefill consumes: prompts as token ids or as input embeddings of the writing model, right-padded."""

    mask: Tensor  # int64 [b, m], 1 on a non-empty prefix of each row
    ids: Tensor | None = None  # int64 [b, m], or
    embeds: Tensor | None = None  # [b, m, d], in the dtype of the writing model

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.embeds is None):
            raise ValueError("PromptInputs takes either ids or embeds")


@runtime_checkable
class Writer(Protocol):
    """Anything that `baton.generate` can run."""

    @property
    def prompt_tokenizer(self) -> Any:
        """Encodes prompts: the LLM's, where a hand-off has two."""

    @property
    def response_tokenizer(self) -> Any:
        """Decodes responses."""

    @property
    def lm(self) -> PreTrainedModel:
        """The model that writes, in evaluation mode: the SLM of a hand-off."""

    @property
    def prompt_limits(self) -> dict[str, int]:
        """Name of each model that reads the prompt -> most prompt tokens it can read. Empty: no limit."""

    def encode(self, ids: Tensor, mask: Tensor, timings: Timings) -> PromptInputs:
        """Prompt ids to what prefill consumes. A hand-off's LLM runs here, once, and its seconds go into `timings`.

        Args:
            ids, mask: int64 [b, m], right-padded.
        """
