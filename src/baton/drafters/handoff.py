"""Hand-off as drafter: the SLM of a hand-off writes ahead for its own LLM, from the states the LLM has just read.

Source: arXiv 2402.16844 for the hand-off, 2211.17192 for the check. Lossless: yes. Training: the hand-off's.
Draft cost: one pass of the SLM per token. Helps where a hand-off exists and every token must be the LLM's own.
The prompt is encoded once: LLM and SLM share its states.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from baton.drafters.draft_model import DraftModel
from baton.engine.drafter import Joined
from baton.errors import ModelMismatch, UnknownOption, UnsupportedModel
from baton.handoff.model import HandoffModel
from baton.handoff.read import check_weights, encoder_fingerprints
from baton.models.loading import beside, kind_of
from baton.models.prompts import pad_right
from baton.models.writer import PromptInputs, Writer

if TYPE_CHECKING:
    from baton.engine.loop import Engine


@dataclass(kw_only=True)
class HandoffDrafter(DraftModel):
    name = "handoff"

    def load(self, engine: "Engine") -> Writer:
        if not self.model:
            raise UnknownOption("handoff needs a hand-off: handoff:model=FOLDER_OR_HUB_ID")
        lm = engine.writer.lm
        if not hasattr(engine.writer.prompt_tokenizer, "get_vocab"):
            raise UnsupportedModel("a hand-off drafts where the prompt is known: use baton.generate")
        self.handoff = HandoffModel.from_pretrained(self.model, encoder=False, **beside(engine.target.model))
        expected = self.handoff.config.llm
        if kind_of(lm.config) != "encoder-decoder" or expected["kind"] != "encoder-decoder":
            raise ModelMismatch("a hand-off drafts for an encoder-decoder LLM, whose encoder's states it shares")
        check_weights(expected, encoder_fingerprints(lm), str(lm.name_or_path))
        # Where the tokenizers differ, the prompt's tokens are embedded by the LLM's own table.
        self.handoff._encoder = cast(Any, _Table(lm.get_encoder().get_input_embeddings()))
        return self.handoff

    def read(self, joined: Joined) -> PromptInputs:
        assert joined.memory.cross is not None
        ids, mask = pad_right([request.prompt_ids for request in joined.requests], device=self.target.device)
        states = joined.memory.cross.states
        if most := self.handoff.prompt_limits.get("the SLM"):  # a longer prompt is drafted for from its beginning
            ids, mask, states = ids[:, :most], mask[:, :most], states[:, :most]
        with torch.inference_mode():
            embeds, mask = self.handoff.inject(ids, mask, states)
        return PromptInputs(embeds=embeds, mask=mask)


class _Table:
    """What is left to ask of a reader when the LLM is the target: embeddings of tokens."""

    def __init__(self, table: nn.Module) -> None:
        self.table = table

    def embed(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self.table(ids)
        return found
