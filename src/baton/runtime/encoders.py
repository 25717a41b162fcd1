"""What encoder-decoder families by native layers share: prompts read once, and their states read at every step."""

from typing import Any

import torch
from torch import Tensor

from baton.cache import Memory
from baton.models.writer import PromptInputs
from baton.runtime.native import TOKENS_AT_ONCE, LastNorm, Layer, Native, Parts, Rows, Stack, apply, writable


class NativeEncoderDecoder(Native):
    """An encoder-decoder.

    Attributes:
        reader: the native encoder.
        reading: per layer, the maps that make keys and values of the encoder's states.
    """

    encoder: Any  # the stock one
    reader: "Reader"
    reading: list[tuple[Any, Any]]

    def encode(self, inputs: PromptInputs) -> tuple[Tensor, Tensor]:
        states = inputs.states
        if states is None:
            embeds = self.embed_prompts(inputs.ids) if inputs.embeds is None else inputs.embeds
            states = self.reader(embeds, inputs.mask)
        return states, inputs.mask.bool()[:, None, None, :]

    def embed_prompts(self, ids: Any) -> Tensor:
        """What the encoder is given of int64 ids [b, m]."""
        embeds: Tensor = self.encoder.get_input_embeddings()(ids)
        return embeds

    def surroundings(self, memory: Memory, reach: int) -> dict[str, Any]:
        cross = memory.cross
        assert cross is not None
        if not cross.layers[0].is_initialized:
            b, m, _ = cross.states.shape
            for index, maps in enumerate(self.reading):
                k, v = (
                    apply(part, cross.states, self.dtype).to(self.dtype).view(b, m, self.like.shape[1], -1)
                    for part in maps
                )
                cross.update(k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous(), index)
        return {"cross": cross}


class Reader:
    """An encoder.

    Args:
        layers: as C sees them, of what `parts` holds; norm: behind the last.
    """

    def __init__(self, layers: list[Layer], norm: LastNorm, d: int, parts: Parts) -> None:
        self.stack, self.norm = Stack(layers, d, parts), norm

    @torch.no_grad()
    def __call__(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [b, m, d], right-padded, and their mask [b, m] to states [b, m, d], 0 for padding."""
        rows = max(1, TOKENS_AT_ONCE // embeds.shape[1])
        parts = zip(embeds.split(rows), mask.split(rows), strict=True)
        return torch.cat([self._read(some, theirs) for some, theirs in parts])

    def begin(self, embeds: Tensor) -> Tensor:
        """What the first layer is given, float32 [b, m, d]."""
        return writable(embeds)

    def _read(self, embeds: Tensor, mask: Tensor) -> Tensor:
        b, m, _ = embeds.shape
        real = mask.bool()
        tokens = self.begin(embeds)[real]
        if layers := self.stack.layers:
            lengths, like = mask.sum(1).tolist(), layers[0]
            storage = torch.zeros((2, 1, b, like.kv_heads, m, like.width), dtype=self.norm.dtype)
            self.stack.run(tokens, Rows([0] * b, storage, lengths=lengths, counts=lengths))
        states = torch.zeros(embeds.shape, dtype=self.norm.dtype)
        states[real] = self.norm(tokens)
        return states
