"""Targets: transformers models seen as `prefill` and `forward` over rows, one class per way of calling them.

No modeling code is copied. Stock layers run with a cache of ours, an explicit 4-D mask and explicit positions, so rows
of different lengths, and later trees of drafts, share one pass. A family is supported once its logits were compared.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from baton.cache import CrossCache, Memory, RowCache
from baton.errors import UnsupportedModel
from baton.inference import inference
from baton.models.writer import PromptInputs
from baton.types import RuntimeName


class Runtime(NamedTuple):
    """How a model runs; `baton_runtime` of one that was made faster."""

    name: RuntimeName
    target: "type[Target] | None" = None  # runs it; None: as its family is run
    kind: tuple[torch.device, torch.dtype] | None = None  # of the model then: it may have been moved since


class Target(ABC):
    """A model that gives logits for rows of tokens.

    Attributes:
        context: most slots a row can have, or None. Prompt and response of a decoder-only model, start token and
            response of an encoder-decoder.
        window: positions that sliding-window layers look back over, its own included, or None.
        reads_prompt: prompt tokens take slots of the rows (decoder-only).
        start: the token that responses start after (encoder-decoder), or None.
        layers: the decoder's blocks.
        ragged: a pass costs as many tokens as its rows have, not as its longest row has times the rows.
    """

    reads_prompt: bool
    ragged = False
    start: int | None = None
    decoder: Any
    layers: Any  # the decoder's blocks, first to last

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = model.device
        self.dtype = model.dtype
        config = model.config.get_text_config(decoder=True)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.layer_kinds, self.window = _window(config)
        self.lm_head = model.get_output_embeddings()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        rope = getattr(config, "rope_parameters", None) or {}
        kinds = {str(r.get("rope_type")) for r in (rope, *rope.values()) if isinstance(r, dict)}
        if changing := kinds & {"dynamic", "longrope"}:
            raise UnsupportedModel(
                f"rotary positions of type {', '.join(sorted(changing))} change with the longest row of a pass, so a "
                "row's text would depend on its neighbours and on drafts"
            )
        attention = model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise UnsupportedModel(
                f"attention {attention!r} takes no 4-D mask: load the model with attn_implementation='sdpa'"
            )
        self.boolean_masks = attention == "sdpa"

    @abstractmethod
    def prefill(self, inputs: PromptInputs) -> tuple[Tensor, Memory]:
        """Read prompts: one pass, one new row each.

        Returns: logits of the first response token, [b, V] in the model's dtype, and what was read.
        """

    @inference
    def forward(
        self,
        ids: Tensor,
        memory: Memory,
        *,
        positions: Tensor | None = None,
        tree: Tensor | None = None,
        begun: tuple[int, Tensor] | None = None,
        counts: list[int] | None = None,
    ) -> Tensor:
        """One cached pass over `q` new tokens in every row of `memory`, which takes them in.

        Args:
            ids: int64 [b, q].
            positions: int64 [b, q]; None: each row goes on where it ends.
            tree: bool [b, q, q], True where new token i may attend to new token j; None: a chain.
            begun: a number of layers, and what they gave of these tokens, [b, q, d], when they filled the same slots
                (`forward_layers`): only the layers above run.
            counts: tokens of each row; those behind are padding, and what is given for them means nothing. None: q of
                each. A target that is `ragged` spends no time on padding.
        Returns: logits [b, q, V] in the model's dtype, or float32. `memory.keep` then drops what was not accepted.
        """
        memory.own.append(ids.shape[1], self.device)
        if begun is not None:
            layer, hidden = begun
            return self.head(self.between(layer, len(self.layers), ids, memory, hidden, positions, tree))
        return self.unembed(self.run(ids, memory, positions, tree))

    @inference
    def forward_layers(
        self,
        low: int,
        high: int,
        ids: Tensor,
        memory: Memory,
        *,
        hidden: Tensor | None = None,
        positions: Tensor | None = None,
        tree: Tensor | None = None,
    ) -> Tensor:
        """The same pass through some layers only: those after the first `low`, up to the `high`-th.

        The slots that `memory` takes in are filled in these layers. To go on with the layers above, `truncate` the
        memory to where it was and call again for the same tokens, from `high`.

        Args:
            hidden: [b, q, d], what the first `low` layers gave; None for low = 0.
        Returns: [b, q, d], before the final norm; `head` makes logits of it.
        """
        if not 0 <= low < high <= len(self.layers) or (hidden is None) != (low == 0):
            raise ValueError(
                f"layers {low}..{high} of {len(self.layers)}, {'without' if hidden is None else 'with'} hidden"
            )
        memory.own.append(ids.shape[1], self.device)
        return self.between(low, high, ids, memory, hidden, positions, tree)

    def between(
        self,
        low: int,
        high: int,
        ids: Tensor,
        memory: Memory,
        hidden: Tensor | None,
        positions: Tensor | None,
        tree: Tensor | None,
    ) -> Tensor:
        """What `forward_layers` gives, of tokens whose slots have been announced."""
        shown: list[nn.Module] = [_Skipped() if not low <= i < high else layer for i, layer in enumerate(self.layers)]
        if low:
            shown[low - 1] = _Skipped(hidden)
        with self.showing(shown), self.capture({high}) as found:
            self.run(ids, memory, positions, tree)
        return found[high]

    @abstractmethod
    def run(self, ids: Tensor, memory: Memory, positions: Tensor | None, tree: Tensor | None) -> Tensor:
        """Final hidden states [b, q, d], after the final norm, of tokens whose slots have been announced."""

    @contextlib.contextmanager
    def showing(self, layers: list[nn.Module]) -> Iterator[None]:
        """Let the model see other layers than its own for a while."""
        stack = getattr(self.decoder, "decoder", self.decoder)
        name = next(name for name in ("h", "block", "layers") if hasattr(stack, name))
        setattr(stack, name, nn.ModuleList(layers))
        try:
            yield
        finally:
            setattr(stack, name, self.layers)

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [..., d] of response tokens; positions, and what a model does to both, are not in them."""
        found: Tensor = self.decoder.get_input_embeddings()(ids)
        scale = getattr(self.decoder, "embed_scale", None)  # Marian keeps it beside the table instead of inside it
        return found * scale if isinstance(scale, float) else found

    @inference
    def head(self, hidden: Tensor) -> Tensor:
        """What a layer gave, [..., d], to logits [..., V]: final norm, once, and output head."""
        return self.unembed(self.finish(hidden))

    def finish(self, hidden: Tensor) -> Tensor:
        """What a layer gave, [..., d], after the final norm; can be learned from."""
        stack = getattr(self.decoder, "decoder", self.decoder)
        for name in ("norm", "ln_f", "final_layer_norm", "layer_norm", "project_out"):
            part = getattr(stack, name, None)
            if part is not None:
                hidden = part(hidden)
        return hidden

    def room(self, prompt_tokens: int, wanted: int) -> int:
        """How many of the `wanted` response tokens the model has positions for; less than 1: the prompt is too long."""
        taken = prompt_tokens if self.reads_prompt else 1
        # The last token needs no position: nothing is read after it.
        return wanted if self.context is None else min(wanted, self.context - taken + 1)

    @contextlib.contextmanager
    def capture(self, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """Outputs of decoder layers, [b, q, d], of the latest pass made inside.

        Args:
            layers: 0 is what the first layer is given, n what the n-th one gives (before the final norm).
        Raises: UnsupportedModel for a layer that the model does not have.
        """
        found: dict[int, Tensor] = {}
        hooks = []

        def keep(layer: int, value: Any) -> None:
            found[layer] = value[0] if isinstance(value, tuple) else value

        for layer in layers:
            if not 0 <= layer <= len(self.layers):
                raise UnsupportedModel(f"layer {layer} of a model with {len(self.layers)}")
            if layer == 0:
                hook = lambda module, args: keep(0, args[0])  # noqa: E731
                hooks.append(self.layers[0].register_forward_pre_hook(hook))
            else:
                after = lambda module, args, output, layer=layer: keep(layer, output)  # noqa: E731
                hooks.append(self.layers[layer - 1].register_forward_hook(after))
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final hidden states [..., d], after the final norm, to logits [..., V]."""
        logits = self.lm_head(hidden)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def masks(self, own: RowCache, positions: Tensor, tree: Tensor | None) -> Any:
        """What the announced pass may attend to, as the model takes it: one mask, or one per kind of layer."""
        allowed = attendable(own, tree, self.device)
        if self.window is None:
            return self.mask(allowed)
        ahead = positions[:, :, None] - slot_positions(own, positions)[:, None, :]
        near = self.mask(allowed & (ahead < self.window)[:, None])
        return {"full_attention": self.mask(allowed), "sliding_attention": near} if self.layer_kinds else near

    def mask(self, allowed: Tensor) -> Tensor:
        """Bool mask, True = may attend, in the form that the model's attention takes."""
        return allowed if self.boolean_masks else self.additive(allowed)

    def additive(self, allowed: Tensor) -> Tensor:
        """0 where attention is allowed, the dtype's most negative number elsewhere."""
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(allowed, zero, torch.finfo(self.dtype).min)


class DecoderOnly(Target):
    """Families whose decoder takes `position_ids` and a 4-D mask: Llama-like, Gemma, GPT-2, GPT-NeoX, OPT."""

    reads_prompt = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.decoder = model.base_model
        stack = getattr(self.decoder, "decoder", self.decoder)  # OPT's stack is inside
        self.layers = stack.h if hasattr(stack, "h") else stack.layers

    @inference
    def prefill(self, inputs: PromptInputs) -> tuple[Tensor, Memory]:
        rows, width = inputs.mask.shape
        memory = Memory(RowCache(len(self.layers), rows, capacity=width + 64))
        memory.own.append(width)
        hidden = self.decoder(
            input_ids=inputs.ids,
            inputs_embeds=inputs.embeds,
            attention_mask=inputs.mask,
            position_ids=torch.arange(width, device=self.device).expand(rows, -1),
            past_key_values=memory.past,
            use_cache=True,
        ).last_hidden_state
        lengths = inputs.mask.sum(1)
        memory.truncate(lengths.tolist())
        last = hidden[torch.arange(rows, device=self.device), lengths - 1]
        return self.unembed(last), memory

    def run(self, ids: Tensor, memory: Memory, positions: Tensor | None, tree: Tensor | None) -> Tensor:
        own = memory.own
        if positions is None:
            positions = next_positions(own, self.device)
        if self.context is not None and own.width > self.context:  # padding beside a longer draft may lie past a table
            positions = positions.clamp(max=self.context - 1)
        alone = own.even and own.count == 1 and self.window is None
        hidden: Tensor = self.decoder(
            input_ids=ids,
            attention_mask=None if alone else self.masks(own, positions, tree),
            position_ids=positions,
            past_key_values=memory.past,
            use_cache=True,
        ).last_hidden_state
        return hidden


class EncoderDecoder(Target):
    """Families whose decoder is called whole: BART, mBART, Marian, Pegasus, T5Gemma."""

    reads_prompt = False
    start: int

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.encoder = model.get_encoder()
        self.decoder = model.get_decoder()
        self.start = start_token(model)
        self.layers = getattr(self.decoder, "block", None) or self.decoder.layers
        # Positions are an argument (T5Gemma), or a table that is indexed by the cache's length (BART and kin).
        self.position_table: nn.Embedding | None = getattr(self.decoder, "embed_positions", None)
        self.logits_bias: Tensor | None = getattr(model, "final_logits_bias", None)

    def encode(self, inputs: PromptInputs) -> tuple[Tensor, Tensor]:
        """Encoder states [b, m, d] and bool [b, 1, 1, m], True where they may be attended to."""
        states = inputs.states
        if states is None:
            states = self.encoder(
                input_ids=inputs.ids, inputs_embeds=inputs.embeds, attention_mask=inputs.mask
            ).last_hidden_state
        return states, inputs.mask.bool()[:, None, None, :]

    @inference
    def prefill(self, inputs: PromptInputs) -> tuple[Tensor, Memory]:
        states, allowed = self.encode(inputs)
        # A mask even where nothing is padded: stock code would make one at every step.
        cross = CrossCache(len(self.layers), states, self.mask(allowed), inputs.mask.sum(1).tolist())
        memory = Memory(RowCache(len(self.layers), len(states)), cross)
        start = torch.full((len(states), 1), self.start, device=self.device)
        return self.forward(start, memory)[:, -1], memory

    def run(self, ids: Tensor, memory: Memory, positions: Tensor | None, tree: Tensor | None) -> Tensor:
        own, cross = memory.own, memory.cross
        assert cross is not None
        arguments: dict[str, Any] = {}
        stock = positions is None and own.even  # the table is indexed by the cache's length
        positions = next_positions(own, self.device) if positions is None else positions
        placing = contextlib.nullcontext() if stock or self.position_table is None else self._placing(positions)
        if self.position_table is None:
            arguments["position_ids"] = positions
        with placing:
            hidden: Tensor = self.decoder(
                input_ids=ids,
                attention_mask=self.masks(own, positions, tree),
                encoder_hidden_states=cross.states,
                encoder_attention_mask=cross.mask,
                past_key_values=memory.past,
                use_cache=True,
                **arguments,
            ).last_hidden_state
        return hidden

    def unembed(self, hidden: Tensor) -> Tensor:
        logits = super().unembed(hidden)
        return logits if self.logits_bias is None else logits + self.logits_bias

    @contextlib.contextmanager
    def _placing(self, positions: Tensor) -> Iterator[None]:
        """For a while, the decoder's position table gives the embeddings of these positions, per row."""
        table: Any = self.position_table
        embeddings = self.placed(positions)
        table.forward = lambda *args, **kwargs: embeddings
        try:
            yield
        finally:
            del table.forward

    def placed(self, positions: Tensor) -> Tensor:
        """What the decoder's position table says of positions, whatever the cache holds."""
        table: Any = self.position_table
        offset = getattr(table, "offset", 0)  # BART's table starts with two unused rows
        # Padding may lie past the table, and so may what stock code would look up: one position per node of a tree.
        return F.embedding((positions + offset).clamp(max=len(table.weight) - 1), table.weight)


class T5(EncoderDecoder):
    """T5 and mT5: the decoder's blocks are called one by one, with a position bias computed from positions.

    Stock T5 derives the bias from cache slots, which would be wrong for ragged rows and for trees; and what the stack
    does around its blocks costs as much as a small block.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.context = None  # relative positions have no end
        self.boolean_masks = False  # the blocks add their masks to the bias
        scaled = getattr(model.config, "scale_decoder_outputs", False)  # mT5 never scales
        self.scale: float | None = model.config.d_model**-0.5 if scaled else None
        self.bias_by_distance = self._biases(512)  # [n, heads], distance 0 first
        self.bias_until_now = self._until_now()
        self.no_mask = torch.zeros((1, 1, 1, 1), dtype=self.dtype, device=self.device)

    def run(self, ids: Tensor, memory: Memory, positions: Tensor | None, tree: Tensor | None) -> Tensor:
        own, cross = memory.own, memory.cross
        assert cross is not None
        if own.width > len(self.bias_by_distance):
            self.bias_by_distance = self._biases(2 * own.width)
            self.bias_until_now = self._until_now()
        if own.even and own.count == 1 and positions is None:
            size = self.bias_until_now.shape[-1]
            bias = self.bias_until_now[..., size - own.width :].contiguous()
        else:
            bias = self._bias(own, positions, tree)
        # The mask is in the bias already. Given as a mask too, or attention over several tokens would add its own.
        mask = None if own.count == 1 else self.no_mask
        hidden = self.decoder.embed_tokens(ids)
        for block in self.decoder.block:
            given = block(hidden, mask, bias, cross.states, None, cross.mask, past_key_values=memory.past)
            hidden = given[0] if isinstance(given, tuple) else given
        normed: Tensor = self.decoder.final_layer_norm(hidden)
        return normed

    def unembed(self, hidden: Tensor) -> Tensor:
        return super().unembed(hidden if self.scale is None else hidden * self.scale)

    def _biases(self, size: int) -> Tensor:
        attention = self.layers[0].layer[0].SelfAttention
        buckets = attention._relative_position_bucket(
            -torch.arange(size, device=self.device),
            bidirectional=False,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        return attention.relative_attention_bias(buckets).detach()

    def _until_now(self) -> Tensor:
        """[1, heads, 1, n]: the bias of one new token over the slots before it and its own, as the last entries."""
        return self.bias_by_distance.flip(0).T[None, :, None].contiguous()

    def _bias(self, own: RowCache, positions: Tensor | None, tree: Tensor | None) -> Tensor:
        """[b, heads, q, width], mask included."""
        at = next_positions(own, self.device) if positions is None else positions
        distances = (at[:, :, None] - slot_positions(own, at)[:, None, :]).clamp(min=0)
        bias = self.bias_by_distance[distances].permute(0, 3, 1, 2)
        return torch.where(attendable(own, tree, self.device), bias, torch.finfo(self.dtype).min)


class _Skipped(nn.Module):
    """Stands where a layer is not run: hands on what it is given, or something else."""

    def __init__(self, instead: Tensor | None = None) -> None:
        super().__init__()
        self.instead = instead

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return hidden if self.instead is None else self.instead


def next_positions(own: RowCache, device: torch.device) -> Tensor:
    """int64 [b, q]: the new tokens of each row follow its last, one by one."""
    starts = own.starts_on(device)
    return starts if own.count == 1 else starts + torch.arange(own.count, device=device)


def slot_positions(own: RowCache, positions: Tensor) -> Tensor:
    """int64 [b, width]: older slots lie at their own number, those of new tokens where `positions` [b, q] says."""
    starts = own.starts_on(positions.device)
    slots = torch.arange(own.width, device=positions.device)[None]
    return torch.where(slots < starts, slots, positions.gather(1, (slots - starts).clamp(0, own.count - 1)))


def attendable(own: RowCache, tree: Tensor | None, device: torch.device) -> Tensor:
    """Bool [b, 1, q, width]: each new token attends to all older slots of its row, and to new ones as `tree` says."""
    starts = own.starts_on(device)
    ahead = torch.arange(own.width, device=device)[None] - starts  # [b, width], 0 at the first new slot
    if tree is None:
        tree = torch.ones((1, own.count, own.count), dtype=torch.bool, device=device).tril()
    new = (ahead >= 0) & (ahead < own.count)
    index = ahead.clamp(0, own.count - 1)[:, None].expand(-1, own.count, -1)
    among_new = tree.expand(own.rows, -1, -1).gather(2, index)
    return ((ahead < 0)[:, None] | (new[:, None] & among_new))[:, None]


def start_token(model: PreTrainedModel) -> int:
    """The token that an encoder-decoder's responses start after; it is never part of one.

    Raises:
        UnsupportedModel: the model names none.
    """
    for name in ("decoder_start_token_id", "bos_token_id"):
        for config in (model.generation_config, model.config):
            found = getattr(config, name, None)
            if found is not None:
                return int(found)
    raise UnsupportedModel(f"{type(model).__name__} names no decoder_start_token_id in its configuration")


def slot_bytes(model: PreTrainedModel) -> int:
    """Memory of one position of one row: keys and values of every layer that writes."""
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    layers = layers or config.num_hidden_layers
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "d_kv", None) or getattr(config, "head_dim", None)
    width = width or config.hidden_size // config.num_attention_heads
    return int(2 * layers * heads * width * model.dtype.itemsize)


# Families whose logits were compared with their own forward, ragged rows included (tests/test_engine.py).
FAMILIES: dict[str, type[Target]] = {
    "bart": EncoderDecoder,
    "gemma": DecoderOnly,
    "gemma2": DecoderOnly,
    "gemma3_text": DecoderOnly,
    "gpt2": DecoderOnly,
    "gpt_neox": DecoderOnly,
    "llama": DecoderOnly,
    "marian": EncoderDecoder,
    "mbart": EncoderDecoder,
    "mistral": DecoderOnly,
    "mt5": T5,
    "opt": DecoderOnly,
    "pegasus": EncoderDecoder,
    "phi3": DecoderOnly,
    "qwen2": DecoderOnly,
    "qwen3": DecoderOnly,
    "t5": T5,
    "t5gemma": EncoderDecoder,
}


def target_for(model: PreTrainedModel) -> Target:
    """The way to run a model.

    Raises:
        UnsupportedModel: its family is not among those that were compared, or it was loaded in a way that is not.
    """
    family = model.config.model_type
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"models of type {family!r} are not supported by Baton's engine yet (supported: {', '.join(FAMILIES)}); "
            "transformers' own generate may run them"
        )
    if (fast := runtime_of(model).target) is not None:
        with contextlib.suppress(UnsupportedModel):  # it got an adapter, or other weights, since it was made faster
            return fast(model)
    return FAMILIES[family](model)


def runtime_of(model: PreTrainedModel) -> Runtime:
    """How a model runs. One that nobody made faster is eager, and so is one that was moved or converted since."""
    found: Runtime | None = getattr(model, "baton_runtime", None)
    return found if found is not None and found.kind == (model.device, model.dtype) else Runtime("eager")


def _window(config: Any) -> tuple[bool, int | None]:
    """Whether layers are of kinds that take a mask each, and how far sliding-window layers look back, if there are."""
    kinds = set(getattr(config, "layer_types", None) or [])
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModel(f"layers of type {', '.join(sorted(unknown))} are not supported by Baton's engine yet")
    if kinds and "sliding_attention" not in kinds:
        return True, None
    return bool(kinds), getattr(config, "sliding_window", None)
