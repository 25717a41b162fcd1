"""What generation needs from a model: a plain language model and a hand-off look alike from here."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from baton.types import Timings


@dataclass(frozen=True, kw_only=True)
class PromptInputs:
    """What prefill consumes: prompts as token ids or input embeddings of the writing model, or read already."""

    mask: Tensor  # int64 [b, m], 1 on a non-empty prefix of each row
    ids: Tensor | None = None  # int64 [b, m], or
    embeds: Tensor | None = None  # [b, m, d], in the dtype of the writing model, or
    states: Tensor | None = None  # [b, m, d], what the encoder of an encoder-decoder has made of them

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.ids, self.embeds, self.states)) != 1:
            raise ValueError("PromptInputs takes one of ids, embeds and states")


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
