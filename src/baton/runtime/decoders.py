"""Decoder-only families by native layers: where each keeps what a layer is made of."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from baton.cache import Memory, RowCache
from baton.errors import UnsupportedModel
from baton.inference import inference
from baton.models.adapter import DecoderOnly, next_positions
from baton.models.writer import PromptInputs
from baton.runtime.native import (
    DTYPES,
    TOKENS_AT_ONCE,
    LastNorm,
    Layer,
    Native,
    Parts,
    Stack,
    around,
    shape,
    writable,
)


class NativeDecoder(Native, DecoderOnly):
    """A decoder whose layers a family's `layer` describes.

    Attributes:
        last: name of the norm before the head.
        places: a learned embedding for each position, float32 [positions, d], or None.
        turned: numbers of each head that are turned by position (rotary embeddings).
    """

    last = "norm"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        parts = Parts(model.dtype, model.device)
        self.angles: tuple[Tensor, Tensor] | None = None  # of all positions so far
        # Layers of two kinds may turn at two speeds (Gemma 3).
        config, kinds = model.config, getattr(getattr(self.decoder, "rotary_emb", None), "layer_types", [])
        self.speeds: list[str] = list(kinds)
        self.turned = 2 * self._angles(1)[0].shape[-1] if hasattr(self.decoder, "rotary_emb") else 0
        self.norm = LastNorm(getattr(getattr(self.decoder, "decoder", self.decoder), self.last), parts)
        self.output = parts.linear(self.lm_head)
        layers = []
        for index, layer in enumerate(self.layers):
            made = self.layer(layer, parts)
            kind = config.layer_types[index] if self.layer_kinds else "sliding_attention"
            made.window = self.window if self.window is not None and kind == "sliding_attention" else 0
            made.angles = self.speeds.index(kind) if self.speeds else 0
            made.dtype, made.turned = DTYPES[self.dtype], self.turned
            layers.append(made)
        self.stack = Stack(layers, config.hidden_size, parts)
        self.places = self.table_of_places()
        self.enter_by_table(parts, places=self.places)
        first = layers[0]
        self.like = torch.empty((1, first.kv_heads, 1, first.width), dtype=self.dtype)

    def table_of_places(self) -> Tensor | None:
        """See `places`."""
        return None

    @abstractmethod
    def layer(self, layer: Any, parts: Parts) -> Layer:
        """One layer of the model, as C takes it, but for what all families have in common."""

    @inference
    def prefill(self, inputs: PromptInputs) -> tuple[Tensor, Memory]:
        rows, width = inputs.mask.shape
        memory = Memory(RowCache(len(self.layers), rows, capacity=width + 64))
        states = inputs.embeds if inputs.ids is None else self.embed(inputs.ids)
        assert states is not None
        lengths = inputs.mask.sum(1)
        uneven = bool((lengths != width).any()) and not self.wanted  # what is captured is wanted with its padding
        last = torch.zeros((rows, self.stack.d))
        step = max(1, TOKENS_AT_ONCE // rows)
        seen: dict[int, list[Tensor]] = {layer: [] for layer in self.wanted}
        for start in range(0, width, step):
            part = writable(states[:, start : start + step])
            memory.own.append(part.shape[1])
            part = self.at_positions(part, memory, None)
            real = inputs.mask[:, start : start + step].bool()
            tokens = part[real] if uneven else part
            counts = real.sum(1).tolist() if uneven else None
            self.through(tokens, memory, None, None, range(len(self.layers)), counts)
            if uneven:
                part[real] = tokens
            for layer, parts in seen.items():
                parts.append(self.kept[layer] if self.kept is not None else part)
            here = (lengths > start) & (lengths <= start + part.shape[1])
            last[here] = part[here, lengths[here] - 1 - start]
        if self.kept is not None:
            self.kept.update({layer: torch.cat(parts, 1) for layer, parts in seen.items()})
        memory.truncate(lengths.tolist())
        return self.unembed(self.norm(last)), memory

    def at_positions(self, states: Tensor, memory: Memory, positions: Tensor | None) -> Tensor:
        if self.places is None:
            return states
        positions = next_positions(memory.own, self.device) if positions is None else positions
        # Padding beside a longer draft may lie past the table.
        return states.add_(F.embedding(positions.clamp(max=len(self.places) - 1), self.places))

    def surroundings(self, memory: Memory, reach: int) -> dict[str, Any]:
        if self.turned and (self.angles is None or self.angles[0].shape[1] < reach):
            self.angles = self._angles(max(1024, 2 * reach))
        return {"angles": self.angles}

    def _angles(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 [speeds, count, half of what is turned]; the halves are turned alike."""
        positions, like = torch.arange(count, device=self.device)[None], torch.empty(0, dtype=torch.float32)
        found = [self.decoder.rotary_emb(like, positions, *kind) for kind in zip(self.speeds)] or [
            self.decoder.rotary_emb(like, positions)
        ]
        cos, sin = (
            torch.cat(angles)[..., : angles[0].shape[-1] // 2].contiguous() for angles in zip(*found, strict=True)
        )
        return cos, sin


class NativeLlama(NativeDecoder):
    """Llama, Mistral, Qwen2, Qwen3; Gemma 1 to 3, whose norms count from one, and who norm what parts give too."""

    def layer(self, layer: Any, parts: Parts) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        last = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
        width = parts.width(attention.head_dim)
        made = Layer(
            **{name: parts.linear(getattr(attention, f"{name}_proj")) for name in "qkvo"},
            **{name: parts.linear(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")},
            **shape(attention.q_proj.out_features // width, attention.k_proj.out_features // width, width),
            **around(layer.input_layernorm, last, attention.scaling, mlp.act_fn, parts),
        )
        if hasattr(attention, "q_norm"):
            made.q_norm, made.k_norm = parts.norm(attention.q_norm), parts.norm(attention.k_norm)
        if last is not layer.post_attention_layernorm:
            made.post_norm = parts.norm(layer.post_attention_layernorm)
            made.post_mlp_norm = parts.norm(layer.post_feedforward_layernorm)
        made.cap = getattr(attention, "attn_logit_softcapping", None) or 0.0
        if getattr(attention, "is_causal", True) is not True:
            raise UnsupportedModel("native layers look back only")
        return made


class NativePhi3(NativeDecoder):
    """Phi-3 and Phi-4-mini: one matrix for queries, keys and values, one for gate and up."""

    def layer(self, layer: Any, parts: Parts) -> Layer:
        attention, mlp, config = layer.self_attn, layer.mlp, self.model.config
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
        q, k, inner = heads * width, (heads + kv_heads) * width, config.intermediate_size
        return Layer(
            q=parts.linear(attention.qkv_proj, range(q)),
            k=parts.linear(attention.qkv_proj, range(q, k)),
            v=parts.linear(attention.qkv_proj, range(k, k + kv_heads * width)),
            o=parts.linear(attention.o_proj),
            gate=parts.linear(mlp.gate_up_proj, range(inner)),
            up=parts.linear(mlp.gate_up_proj, range(inner, 2 * inner)),
            down=parts.linear(mlp.down_proj),
            **shape(heads, kv_heads, parts.width(width)),
            **around(
                layer.input_layernorm, layer.post_attention_layernorm, attention.scaling, mlp.activation_fn, parts
            ),
        )


class NativeGPTNeoX(NativeDecoder):
    """GPT-NeoX, Pythia: queries, keys and values come head by head; feed-forward parts may stand beside attention."""

    last = "final_layer_norm"

    def layer(self, layer: Any, parts: Parts) -> Layer:
        attention, mlp = layer.attention, layer.mlp
        width, heads = parts.width(attention.head_size), self.model.config.num_attention_heads
        return Layer(
            q=parts.linear(attention.query_key_value),
            o=parts.linear(attention.dense),
            gate=parts.linear(mlp.dense_h_to_4h),
            down=parts.linear(mlp.dense_4h_to_h),
            **shape(heads, heads, width) | {"head_step": 3 * width, "first_key": width, "first_value": 2 * width},
            parallel=layer.use_parallel_residual,
            **around(layer.input_layernorm, layer.post_attention_layernorm, attention.scaling, mlp.act, parts),
        )


class NativeGPT2(NativeDecoder):
    """GPT-2. Its matrices are laid out anew as other families lay theirs: the same numbers, in the same parameters."""

    last = "ln_f"

    def table_of_places(self) -> Tensor:
        return writable(self.decoder.wpe.weight.detach())

    def layer(self, layer: Any, parts: Parts) -> Layer:
        attention, mlp, d = layer.attn, layer.mlp, self.model.config.hidden_size
        heads, width = attention.num_heads, parts.width(attention.head_dim)
        return Layer(
            **{name: parts.linear(attention.c_attn, range(i * d, (i + 1) * d)) for i, name in enumerate("qkv")},
            o=parts.linear(attention.c_proj),
            gate=parts.linear(mlp.c_fc),
            down=parts.linear(mlp.c_proj),
            **shape(heads, heads, width),
            **around(layer.ln_1, layer.ln_2, attention.scaling, mlp.act, parts),
        )


class NativeOPT(NativeDecoder):
    """OPT, but for the one size that norms after its parts."""

    last = "final_layer_norm"

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config
        if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
            raise UnsupportedModel("native layers norm before each part, on embeddings as wide as layers")
        super().__init__(model)

    def table_of_places(self) -> Tensor:
        table = self.decoder.decoder.embed_positions
        return writable(table.weight.detach()[table.offset :])

    def layer(self, layer: Any, parts: Parts) -> Layer:
        attention = layer.self_attn
        return Layer(
            **{name: parts.linear(getattr(attention, f"{name}_proj")) for name in "qkv"},
            o=parts.linear(attention.out_proj),
            gate=parts.linear(layer.fc1),
            down=parts.linear(layer.fc2),
            **shape(attention.num_heads, attention.num_heads, parts.width(attention.head_dim)),
            **around(layer.self_attn_layer_norm, layer.final_layer_norm, attention.scaling, layer.activation_fn, parts),
        )
