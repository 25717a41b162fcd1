"""transformers' own generation: greedy search, prompt lookup, and assisted generation, which refuse batches."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from baton.bench.peers.table import Absent
from baton.machine import seconds_of
from baton.models.loading import load
from baton.models.prompts import pad_right, tokenize_prompts
from baton.models.writer import Writer
from baton.types import FinishReason, Output


def contenders(writer: Writer, max_new_tokens: int, assistant: str | None) -> list["TransformersPeer"]:
    from baton.handoff.model import HandoffModel

    if isinstance(writer, HandoffModel):
        raise Absent("transformers is left out: it has no counterpart of a hand-off")
    kinds: dict[str, dict[str, Any]] = {"greedy": {}, "prompt lookup": {"prompt_lookup_num_tokens": 10}}
    if assistant is not None:
        small = load(assistant, dtype=writer.lm.dtype, device=writer.lm.device)
        kinds["assisted"] = {"assistant_model": small.lm}
    return [TransformersPeer(writer, kind, options, max_new_tokens) for kind, options in kinds.items()]


class TransformersPeer:
    """One of `model.generate`'s ways, greedy. All settings stored with the model are set aside."""

    family = "peer"

    def __init__(self, writer: Writer, kind: str, options: dict[str, Any], max_new_tokens: int) -> None:
        self.writer, self.options, self.max_new_tokens = writer, options, max_new_tokens
        self.name, self.batches = f"transformers {kind}", kind == "greedy" and writer.lm.config.is_encoder_decoder
        ends = writer.lm.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    @torch.inference_mode()
    def write(self, prompts: Sequence[str], first_index: int) -> list[Output]:
        writer = self.writer
        rows = tokenize_prompts(writer.prompt_tokenizer, prompts, writer.prompt_limits, truncate=True)
        ids, mask = pad_right(rows, device=writer.lm.device)
        made = writer.lm.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            min_length=0,
            **self.options,
        )
        start = 1 if writer.lm.config.is_encoder_decoder else ids.shape[1]
        return [self._output(prompt, row[start:]) for prompt, row in zip(prompts, made.tolist(), strict=True)]

    def _output(self, prompt: str, ids: list[int]) -> Output:
        """Without the padding that follows the end of a shorter row."""
        end = next((at + 1 for at, token in enumerate(ids) if token in self.ends), None)
        reason: FinishReason = "length" if end is None else "eos"
        text = self.writer.response_tokenizer.decode(ids[:end], skip_special_tokens=True)
        return Output(prompt=prompt, text=text, token_ids=ids[:end], finish_reason=reason)


class Passes:
    """Single passes, for `baton bench forward`: the model's own call with transformers' own cache."""

    name, lacks = "transformers", ""

    def __init__(self, model: PreTrainedModel, context: int, *, bits: int = 0) -> None:
        self.model: Any = model

    @torch.inference_mode()
    def begin(self, ids: list[int]) -> float:
        prompt = torch.tensor([ids], device=self.model.device)

        def read() -> None:
            if self.model.config.is_encoder_decoder:
                made = self.model(input_ids=prompt, decoder_input_ids=prompt, use_cache=True)
                self.given = {"encoder_outputs": (made.encoder_last_hidden_state,)}
            else:
                made = self.model(input_ids=prompt, use_cache=True, logits_to_keep=1)
                self.given = {}
            self.past = made.past_key_values

        return seconds_of(read)

    @torch.inference_mode()
    def look(self, ids: list[int]) -> float:
        new = torch.tensor([ids], device=self.model.device)
        name = "decoder_input_ids" if self.model.config.is_encoder_decoder else "input_ids"
        taken = seconds_of(lambda: self.model(**{name: new}, past_key_values=self.past, use_cache=True, **self.given))
        self.past.crop(-len(ids))
        return taken
