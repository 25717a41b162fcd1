"""BART, mBART, Marian and Pegasus by native layers."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from baton.models.adapter import EncoderDecoder
from baton.runtime.encoders import NativeEncoderDecoder, Reader
from baton.runtime.native import DTYPES, LastNorm, Layer, Parts, Stack, around, shape, writable


class NativeBart(NativeEncoderDecoder, EncoderDecoder):
    """Families with learned or sinusoidal positions; norms stand behind parts (BART, Marian) or before them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        decoder, parts = self.decoder, Parts(model.dtype, model.device)
        after = not hasattr(decoder, "layer_norm")
        self.norm = LastNorm(None if after else decoder.layer_norm, parts)
        self.output = parts.linear(self.lm_head)
        if self.logits_bias is not None:
            self.output.bias = parts.hold(self.logits_bias).data_ptr()
        layers = [_layer(layer, after, parts) for layer in self.layers]
        reading = [layer.encoder_attn for layer in self.layers]
        self.reading = [(parts.linear(attention.k_proj), parts.linear(attention.v_proj)) for attention in reading]
        self.stack = Stack(layers, model.config.d_model, parts)
        self.like = torch.empty((1, layers[0].heads, 1, layers[0].width), dtype=self.dtype)
        self.places = _places(decoder)
        self.first = _first(decoder, parts)
        self.enter_by_table(parts, places=self.places, first=self.first, width=_width(decoder))
        self.reader = BartReader(self.encoder)

    def embed_prompts(self, ids: Any) -> Tensor:
        return super().embed_prompts(ids).float() * _beside(self.encoder)


class BartReader(Reader):
    """The encoder of one of these families."""

    def __init__(self, encoder: Any) -> None:
        parts, after = Parts(encoder.dtype, encoder.device), not hasattr(encoder, "layer_norm")
        layers = [_layer(layer, after, parts) for layer in encoder.layers]
        super().__init__(layers, LastNorm(None if after else encoder.layer_norm, parts), encoder.config.d_model, parts)
        self.places, self.first = _places(encoder), _first(encoder, parts)

    def begin(self, embeds: Tensor) -> Tensor:
        states = writable(embeds)
        states += self.places[: embeds.shape[1]]
        return states if self.first is None else self.first.in_place(states)


def _layer(layer: Any, after: bool, parts: Parts) -> Layer:
    attention = layer.self_attn
    made = Layer(
        **{name: parts.linear(getattr(attention, f"{name}_proj")) for name in "qkv"},
        o=parts.linear(attention.out_proj),
        gate=parts.linear(layer.fc1),
        down=parts.linear(layer.fc2),
        **shape(attention.num_heads, attention.num_heads, parts.width(attention.head_dim)),
        **around(layer.self_attn_layer_norm, layer.final_layer_norm, attention.scaling, layer.activation_fn, parts),
        dtype=DTYPES[parts.dtype],
        after=after,
    )
    if hasattr(layer, "encoder_attn"):
        made.cross_q, made.cross_o = parts.linear(layer.encoder_attn.q_proj), parts.linear(layer.encoder_attn.out_proj)
        made.cross_norm = parts.norm(layer.encoder_attn_layer_norm)
    return made


def _places(stack: Any) -> Tensor:
    """A position's embedding, float32 [positions, d]; BART's table starts with two unused rows."""
    table = stack.embed_positions
    return writable(table.weight.detach()[getattr(table, "offset", 0) :])


def _first(stack: Any, parts: Parts) -> LastNorm | None:
    """The norm of embeddings and positions together, which half of these families have."""
    return LastNorm(stack.layernorm_embedding, parts) if hasattr(stack, "layernorm_embedding") else None


def _beside(stack: Any) -> float:
    """What embeddings are multiplied by where that is not in the table (Marian)."""
    scale = getattr(stack, "embed_scale", None)
    return float(scale) if isinstance(scale, float | int) else 1.0


def _width(stack: Any) -> float:
    """What embeddings are multiplied by."""
    inside = getattr(stack.get_input_embeddings(), "embed_scale", 1.0)
    return float(inside) * _beside(stack)
