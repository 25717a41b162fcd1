"""T5 and mT5 by native layers."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from baton.cache import Memory
from baton.models.adapter import T5
from baton.runtime.encoders import NativeEncoderDecoder, Reader
from baton.runtime.native import DTYPES, LastNorm, Layer, Native, Parts, Stack, around, shape


class NativeT5(NativeEncoderDecoder, T5):
    """T5 and mT5."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        first, parts = self.layers[0].layer[0].SelfAttention, Parts(model.dtype, model.device)
        self.like = torch.empty((1, first.n_heads, 1, first.key_value_proj_dim), dtype=self.dtype)
        self.norm = LastNorm(self.decoder.final_layer_norm, parts)
        self.output = parts.linear(self.lm_head)
        layers = [_layer(block, parts) for block in self.layers]
        reading = [block.layer[1].EncDecAttention for block in self.layers]
        self.reading = [(parts.linear(attention.k), parts.linear(attention.v)) for attention in reading]
        self.stack = Stack(layers, model.config.d_model, parts)
        self.stack.set_bias(self.bias_by_distance.T, 0)
        self.enter_by_table(parts, scale=self.scale)
        self.reader = T5Reader(self.encoder)

    def unembed(self, hidden: Tensor) -> Tensor:
        return Native.unembed(self, hidden if self.scale is None else hidden * self.scale)

    def surroundings(self, memory: Memory, reach: int) -> dict[str, Any]:
        if reach > len(self.bias_by_distance):
            self.bias_by_distance = self._biases(2 * reach)
            self.stack.set_bias(self.bias_by_distance.T, 0)
        return super().surroundings(memory, reach)


class T5Reader(Reader):
    """The encoder of a T5 or mT5.

    Args:
        encoder: the stock one, `T5Stack`, or a model that is an encoder alone.
    Raises: UnsupportedModel where C cannot take its weights.
    """

    def __init__(self, encoder: Any) -> None:
        stack, parts = getattr(encoder, "encoder", encoder), Parts(encoder.dtype, encoder.device)
        self.blocks = stack.block
        layers = [_layer(block, parts) for block in self.blocks]
        super().__init__(layers, LastNorm(stack.final_layer_norm, parts), stack.config.d_model, parts)
        self.reach = 0  # positions that the bias is known for

    def begin(self, embeds: Tensor) -> Tensor:
        if self.blocks and embeds.shape[1] > self.reach:
            self._set_bias(max(64, 2 * embeds.shape[1]))
        return super().begin(embeds)

    def _set_bias(self, reach: int) -> None:
        attention = self.blocks[0].layer[0].SelfAttention
        ahead = torch.arange(reach - 1, -reach, -1)  # where the key is, seen from the query; the table goes back
        buckets = attention._relative_position_bucket(
            ahead,
            bidirectional=True,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        self.stack.set_bias(attention.relative_attention_bias(buckets).detach().T, reach - 1)
        self.reach = reach


def _layer(block: Any, parts: Parts) -> Layer:
    first, last = block.layer[0], block.layer[-1]
    attention, mlp = first.SelfAttention, last.DenseReluDense
    gated = hasattr(mlp, "wi_0")
    made = Layer(
        **{name: parts.linear(getattr(attention, name)) for name in "qkvo"},
        gate=parts.linear(mlp.wi_0 if gated else mlp.wi),
        down=parts.linear(mlp.wo),
        **shape(attention.n_heads, attention.n_heads, parts.width(attention.key_value_proj_dim)),
        **around(first.layer_norm, last.layer_norm, 1.0, mlp.act, parts),
        dtype=DTYPES[parts.dtype],
    )
    if gated:
        made.up = parts.linear(mlp.wi_1)
    if len(block.layer) == 3:
        cross = block.layer[1]
        made.cross_q, made.cross_o = parts.linear(cross.EncDecAttention.q), parts.linear(cross.EncDecAttention.o)
        made.cross_norm = parts.norm(cross.layer_norm)
    return made
