"""Drafting inside transformers' own `generate`: `model.generate(**inputs, custom_generate=custom_generate(...))`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baton.engine.drafter import Drafter
from baton.engine.loop import Engine
from baton.engine.request import Request
from baton.engine.rules import Rules
from baton.engine.text import TextStream
from baton.errors import UnsupportedModel
from baton.models.text import pack
from baton.models.writer import PromptInputs
from baton.types import Rule, Sampling, Timings

# What `generate` builds from settings that `Sampling` or `Rules` have too: kind -> (its value, the setting it must
# equal). Anything else, or the same kind with another value, would change the text unseen.
APPLIED: dict[type, tuple[str, str] | None] = {
    EosTokenCriteria: None,
    ForcedBOSTokenLogitsProcessor: None,
    ForcedEOSTokenLogitsProcessor: None,
    MaxLengthCriteria: ("max_length", "max_length"),
    MinPLogitsWarper: ("min_p", "min_p"),
    RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    SuppressTokensAtBeginLogitsProcessor: None,
    SuppressTokensLogitsProcessor: None,
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
}


def custom_generate(
    drafter: Drafter | str | None = None, *, rule: Rule = "auto", streamer: Any = None
) -> Callable[..., Any]:
    """A decoding method for `generate` of any causal or encoder-decoder model that the engine runs.

    `model.generate(**inputs, custom_generate=baton.custom_generate("token-recycling"))` gives the tokens of plain
    `generate`, faster. Batches, left padding, `max_new_tokens`, end tokens and the sampling settings temperature,
    top-k, top-p, min-p and repetition penalty are honoured; with `do_sample` the seed is drawn from PyTorch's global
    generator. Other logits processors and stopping criteria are refused.

    Args:
        drafter, rule: as in `baton.generate`.
        streamer: one of transformers', for one prompt. To be given here: `generate` passes none to other methods.
    """

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        _refuse_others(logits_processor, stopping_criteria, generation_config, model_kwargs)
        rows = len(input_ids)
        if streamer is not None and rows > 1:
            raise UnsupportedModel("a streamer takes one prompt at a time")
        writer = _Bare(model, input_ids, model_kwargs)
        rules = Rules.of(writer, generation_config)
        engine = Engine(writer, drafter, rule=rule, max_rows=rows, patience=rows, rules=rules)
        limit = generation_config.max_length - input_ids.shape[1]
        sampling = _sampling(generation_config)
        requests = [
            Request(
                index=row,
                key=row,
                prompt="",
                prompt_ids=ids,
                context=[] if model.config.is_encoder_decoder else ids,
                sampling=sampling,
                limit=limit,
                stream=TextStream(writer.response_tokenizer),
                follow=False,
            )
            for row, ids in enumerate(writer.prompts)
        ]
        start = engine.target.start
        if start is not None and bool((input_ids[:, 0] != start).any()):
            raise UnsupportedModel(f"decoder_start_token_id is {start} in the model's configuration and another here")
        if streamer is not None:
            streamer.put(input_ids.cpu())
        engine.submit(requests)
        while not engine.idle:
            for token in engine.step().tokens:
                if streamer is not None:
                    streamer.put(torch.tensor([token.id]))
        if streamer is not None:
            streamer.end()
        for request in requests:
            if request.finish_reason == "error":
                raise UnsupportedModel(request.error)
        longest = max(len(request.tokens) for request in requests)
        known = generation_config._pad_token_tensor  # where none is set, the end token
        pad = 0 if known is None else int(known)
        new = torch.full((rows, longest), pad, dtype=input_ids.dtype, device=input_ids.device)
        for row, request in enumerate(requests):
            new[row, : len(request.tokens)] = torch.tensor(request.tokens, device=new.device)
        sequences = torch.cat([input_ids, new], 1)
        if not generation_config.return_dict_in_generate:
            return sequences
        kind = GenerateEncoderDecoderOutput if model.config.is_encoder_decoder else GenerateDecoderOnlyOutput
        return kind(sequences=sequences)

    return decode


class _Bare:
    """A model without tokenizer, whose prompts transformers has prepared already."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        self.lm = model
        self.prompt_tokenizer = self.response_tokenizer = _NoText()
        self.prompt_limits: dict[str, int] = {}
        self.states: Tensor | None = None
        if model.config.is_encoder_decoder:
            if input_ids.shape[1] != 1:
                raise UnsupportedModel("a response that has begun already (decoder_input_ids) is not supported")
            states = kwargs["encoder_outputs"].last_hidden_state
            mask = kwargs.get("attention_mask")
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask.long()
            self.states, self.mask = pack(states, mask, to_left=True)
            self.prompts = [[0] * int(count) for count in self.mask.sum(1)]  # known as states only
        else:
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask
            self.prompts = [row[kept.bool()].tolist() for row, kept in zip(input_ids, mask, strict=True)]

    def encode(self, ids: Tensor, mask: Tensor, timings: Timings) -> PromptInputs:
        if self.states is None:
            return PromptInputs(ids=ids, mask=mask)
        return PromptInputs(states=self.states, mask=self.mask)


class _NoText:
    """Stands for a tokenizer where text is the caller's business."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return ""


def _sampling(config: Any) -> Sampling:
    penalty = config.repetition_penalty or 1.0
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        temperature=config.temperature if config.temperature is not None else 1.0,
        top_k=config.top_k or 0,
        top_p=config.top_p if config.top_p is not None else 1.0,
        min_p=config.min_p or 0.0,
        repetition_penalty=penalty,
        seed=int(torch.randint(2**31, ())),
    )


def _refuse_others(processors: Any, criteria: Any, config: Any, kwargs: dict[str, Any]) -> None:
    given = [*(processors or []), *(criteria or [])]
    unknown = [type(each).__name__ for each in given if not _is_applied(each, config)]
    unknown += [name for name in ("past_key_values", "token_type_ids") if _filled(kwargs.get(name))]
    unknown += [
        name
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        if getattr(config, name, None)
    ]
    unknown += ["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else []
    if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        unknown.append("beams, or several sequences per prompt")
    if unknown:
        raise UnsupportedModel(
            f"custom_generate does not apply {', '.join(unknown)}: drop them, or call generate without custom_generate"
        )


def _is_applied(given: Any, config: Any) -> bool:
    """Whether a processor or criterion does no more than a setting says that the engine applies itself."""
    if type(given) is NoBadWordsLogitsProcessor:  # `Rules` bans single tokens
        return all(len(words) == 1 for words in config.bad_words_ids or [])
    ignored = getattr(given, "prompt_ignore_length", None)  # a tensor is `generate`'s own: padding, which never counts
    if type(given) not in APPLIED or (isinstance(ignored, int) and ignored > 0):
        return False
    names = APPLIED[type(given)]
    return names is None or getattr(given, names[0]) == getattr(config, names[1])


def _filled(value: Any) -> bool:
    """Whether an argument says something: a cache with entries, types that are not all the same."""
    if isinstance(value, Tensor):
        return bool(value.any())
    return value is not None and getattr(value, "get_seq_length", lambda: 1)() > 0
