"""One view of every language model: prompt in, logits for the response out, whatever the architecture."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from baton.models.adapter import start_token

IGNORE = -100  # label of a position that has no target: padding


def embed_tokens(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Input embeddings [..., d] of token ids, scaled as the model's own forward scales them."""
    embeddings = model.get_input_embeddings()(ids)
    # Marian keeps the scale beside the table instead of inside it, and skips it when embeddings are passed in.
    base = getattr(model, "model", model)
    scale = getattr(getattr(base, "encoder", None), "embed_scale", None)
    return embeddings * scale if isinstance(scale, float) else embeddings


def shift_right(labels: Tensor, start_id: int, pad_id: int) -> Tensor:
    """Decoder input for teacher forcing: int64 [b, n], the start token and all labels but the last."""
    start = labels.new_full((len(labels), 1), start_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE, pad_id)], dim=1)


def join_rows(first: Tensor, first_mask: Tensor, second: Tensor) -> Tensor:
    """Append `second` to `first` row by row, closing the gap that right-padding leaves.

    Args:
        first: [b, m, d]; first_mask: [b, m], 1 on a prefix of each row; second: [b, n, d].
    Returns: [b, m + n, d]; row r is its own first part, then `second[r]`, then leftovers to be masked.
    """
    m, n = first.shape[1], second.shape[1]
    lengths = first_mask.sum(1, keepdim=True)
    slots = torch.arange(m + n, device=first.device)[None]
    # The positions past both parts repeat padding of `first`; no one may attend to them.
    source = torch.where(slots < lengths, slots, torch.where(slots < lengths + n, slots - lengths + m, slots - n))
    return torch.cat([first, second], 1).gather(1, source[..., None].expand(-1, -1, first.shape[-1]))


def pack(rows: Tensor, mask: Tensor, *, to_left: bool) -> tuple[Tensor, Tensor]:
    """Move the real entries of padded rows [b, m, ...] together at one end, in their order; mask: [b, m], 1 where real.

    Returns: rows and mask, moved alike.
    """
    order = torch.argsort(mask.long(), dim=1, descending=to_left, stable=True)
    index = order.reshape(*order.shape, *[1] * (rows.dim() - 2)).expand_as(rows)
    return rows.gather(1, index), mask.gather(1, order)


def response_logits(model: PreTrainedModel, prompt_embeds: Tensor, prompt_mask: Tensor, labels: Tensor) -> Tensor:
    """Teacher-forced logits, aligned with the labels: position i predicts label i.

    Args:
        model: encoder-decoder or decoder-only language model.
        prompt_embeds: [b, m, d], right-padded; prompt_mask: [b, m], 1 on a non-empty prefix of each row.
        labels: int64 [b, n] response tokens, `IGNORE` on padding.
    Returns: [b, n, V]; what stands at padding means nothing.
    """
    if model.config.is_encoder_decoder:
        pad = getattr(model.config, "pad_token_id", None) or 0
        return model(
            inputs_embeds=prompt_embeds,
            attention_mask=prompt_mask,
            decoder_input_ids=shift_right(labels, start_token(model), pad),
            use_cache=False,
        ).logits
    lengths = prompt_mask.sum(1, keepdim=True)
    # No wider than the longest row: the longest prompt and the longest response may be of different rows, and a model
    # with a position table has no place for both. (On a GPU this waits for the lengths.)
    width = int((lengths + (labels != IGNORE).sum(1, keepdim=True)).max())
    responses = embed_tokens(model, labels.clamp(min=0))
    sequence = join_rows(prompt_embeds, prompt_mask, responses)[:, :width]
    slots = torch.arange(width, device=labels.device)[None]
    mask = (slots < lengths + labels.shape[1]).to(prompt_mask.dtype)
    logits = model(inputs_embeds=sequence, attention_mask=mask, use_cache=False).logits
    at = (lengths - 1 + torch.arange(labels.shape[1], device=labels.device)[None]).clamp(max=width - 1)
    return logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))


class TextToText(nn.Module):
    """A language model on its own, with the same call as a hand-off: the baseline and the teacher are trained so."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any) -> ModelOutput:
        """int64 [b, m] prompt, its mask and int64 [b, n] labels to `logits` [b, n, V]."""
        embeds = embed_tokens(self.model, input_ids)
        return ModelOutput(logits=response_logits(self.model, embeds, attention_mask, labels))
