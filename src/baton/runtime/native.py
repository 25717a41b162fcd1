"""Native layers: each layer of a pass is one call of a C function, on the weights as the model holds them.

What a small model's step costs in stock code is the calling of some fifty operations per layer, and a large one's is
reading the weights, in bfloat16 at half the speed of memory. `kernels.c` calls once and reads once. Nothing is copied:
the model can still be saved, and trained by its stock layers.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from baton.cache import CrossCache, Memory, RowCache
from baton.data.storage import cache_folder
from baton.errors import BatonError, UnsupportedModel
from baton.models.adapter import T5, DecoderOnly, Runtime, Target, target_for
from baton.models.writer import PromptInputs
from baton.runtime.quantized import COPY, GROUP, Int4, Int8, copy_of

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT4 = 2, 3  # kinds of weights besides
ACTIVATIONS = {"SiLU": 0, "SiLUActivation": 0, "ReLU": 1, "NewGELUActivation": 2, "GELUTanh": 2, "GELUActivation": 3}
LANES = 16
_T = TypeVar("_T")
TOKENS_AT_ONCE = 512  # of a prompt pass; more would only take more memory


class _Linear(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias", "scales")),
        *((name, c_int64) for name in ("out", "inner", "kind")),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, _Linear) for name in ("q", "k", "v", "o", "cross_q", "cross_o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("norm", "cross_norm", "mlp_norm", "q_norm", "k_norm", "bias")),
        *((name, c_void_p) for name in ("keys", "values", "cross_keys", "cross_values")),
        *((name, c_int64) for name in ("heads", "kv_heads", "width", "capacity", "cross_slots")),
        *((name, c_int64) for name in ("bias_size", "bias_offset", "window")),
        ("epsilon", c_float),
        ("scale", c_float),
        ("dtype", c_int32),
        ("activation", c_int32),
    )


class _Pass(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("hidden", "starts", "lengths", "positions", "tree", "cos", "sin")),
        *((name, c_void_p) for name in ("cross_lengths", "scratch")),
        *((name, c_int64) for name in ("rows", "count", "d", "slots")),
        ("threads", c_int32),
    )


@cache
def kernels() -> Any:
    """The compiled functions; compiled once per machine and version of the source.

    Raises: OSError or subprocess.CalledProcessError where that is not possible.
    """
    source = files("baton.runtime").joinpath("kernels.c").read_text(encoding="utf-8")
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang)")
    command = [*compiler.split(), "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
    machine = platform.machine() + _cpu_flags()
    key = hashlib.sha256("\0".join([source, *command, machine]).encode()).hexdigest()[:16]
    folder = cache_folder()
    library = folder / f"kernels-{key}{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            (Path(work) / "kernels.c").write_text(source, encoding="utf-8")
            made = Path(work) / library.name
            subprocess.run(
                [*command, "kernels.c", "-o", made.name, "-lm"], cwd=work, check=True, capture_output=True, timeout=120
            )
            made.replace(library)  # whoever compiles at the same time puts the same there
    loaded = ctypes.CDLL(str(library))
    pointer, size = c_void_p, c_int64
    loaded.layer.argtypes = (pointer, pointer)
    loaded.scratch_bytes.argtypes, loaded.scratch_bytes.restype = (pointer, size, size, size, c_int32), c_int64
    loaded.norm.argtypes = (pointer, pointer, size, size, c_float, c_int32, pointer)
    loaded.map.argtypes = (pointer, pointer, size, c_int32, c_int32, pointer)
    return loaded


def _cpu_flags() -> str:
    """What the processor can do: a cache folder may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


class Parts:
    """Hands weights over to C, where they are what C takes them for, and remembers them.

    Raises, from all its methods: UnsupportedModel for anything but plain parameters of one dtype in the CPU's memory.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        if device.type != "cpu" or dtype not in DTYPES:
            name = str(dtype).removeprefix("torch.")
            raise UnsupportedModel(
                f"native layers are for the CPU, in float32 or bfloat16, and the model is on {device} in {name}"
            )
        self.held: list[Tensor] = []  # the same memory: C's addresses stay good, whatever happens to the model
        self.watched: list[tuple[Any, int]] = []  # some modules, and where their weights were

    def watch(self, module: Any) -> None:
        """See `valid`. A few of a model's modules will do: when it is moved or converted, all weights move."""
        self.watched.append((module, module.weight.data_ptr()))

    @property
    def valid(self) -> bool:
        """Whether the weights that are watched are still where they were."""
        return all(module.weight.data_ptr() == address for module, address in self.watched)

    def linear(self, layer: Any) -> _Linear:
        """A linear layer as it is, or its copy in fewer bits where there is one."""
        weight = self._plain(layer, layer.weight, nn.Linear)
        step = LANES if self.dtype == torch.float32 else 2 * LANES
        if weight.shape[1] % step:
            raise UnsupportedModel(f"weights {weight.shape[1]} wide are no multiple of {step}")
        bias = None if layer.bias is None else self._plain(layer, layer.bias, nn.Linear).data_ptr()
        match copy_of(layer):
            case Int8(levels, scales):
                self.held += [levels, scales]
                return _Linear(levels.data_ptr(), bias, scales.data_ptr(), *weight.shape, INT8)
            case Int4(packed):
                self.held.append(packed)
                return _Linear(packed.data_ptr(), bias, None, *weight.shape, INT4)
        return _Linear(weight.data_ptr(), bias, None, *weight.shape, DTYPES[self.dtype])

    def norm(self, norm: Any) -> int:
        self.watch(norm)  # small, and in every layer
        return self._plain(norm, norm.weight, type(norm)).data_ptr()

    def width(self, width: int) -> int:
        """Of a head."""
        if width % LANES:
            raise UnsupportedModel(f"heads {width} wide are no multiple of {LANES}")
        return width

    def activation(self, function: Any) -> int:
        name = type(function).__name__
        if name not in ACTIVATIONS:
            raise UnsupportedModel(f"native layers do not know the activation {name}")
        return ACTIVATIONS[name]

    def _plain(self, module: Any, weight: Any, kind: type) -> Tensor:
        if type(module) is not kind or type(weight) is not nn.Parameter:
            raise UnsupportedModel(f"it holds layers of another kind: {type(module).__name__}")
        if weight.dtype != self.dtype or weight.device.type != "cpu" or not weight.is_contiguous():
            raise UnsupportedModel(
                f"weights of {type(module).__name__} are not all in {self.dtype}, on the CPU, in one piece"
            )
        self.held.append(weight.detach())
        return weight


class Stack:
    """The layers of one model as C sees them, and passes through them; for one thread at a time.

    Args:
        layers: structures whose pointers lead to what `parts` holds.
        d: width of the residual stream.
    """

    def __init__(self, layers: list[_Layer], d: int, parts: Parts) -> None:
        self.layers, self.d = layers, d
        self.parts = parts
        self.bias: Tensor | None = None  # what the layers' pointers lead to
        self.scratch = torch.empty(0, dtype=torch.uint8)

    def set_bias(self, table: Tensor, offset: int) -> None:
        """What all layers add to scores: [heads, n], by distance from -offset on."""
        self.bias = table.float().contiguous()
        for layer in self.layers:
            layer.bias, layer.bias_size, layer.bias_offset = self.bias.data_ptr(), table.shape[1], offset

    def run(
        self,
        hidden: Tensor,
        starts: list[int],
        positions: Tensor | None,
        storage: Callable[[int], tuple[Tensor, Tensor]],
        *,
        lengths: list[int] | None = None,
        tree: Tensor | None = None,
        angles: tuple[Tensor, Tensor] | None = None,
        cross: CrossCache | None = None,
        layers: range | None = None,
        keep: Collection[int] = (),
    ) -> dict[int, Tensor]:
        """Send float32 [b, n, d] through layers, in place.

        Args:
            starts: slots in use, per row; the new tokens take the next n.
            positions: int64 [b or 1, n]; None: each row goes on where it ends.
            storage: of a layer, keys and values [rows, kv_heads, capacity, width] for b rows and more.
            lengths: of an encoder's rows; None: each token attends to what is before it.
            tree: bool [b or 1, n, n], who attends to whom among the new tokens; None: a chain.
            angles: cosine and sine, float32 [positions, width / 2].
            layers: which; None: all.
        Returns: copies of what the layers in `keep` gave, by number; 0 is what the first was given.
        """
        if not self.parts.valid:
            raise BatonError("the model was moved or converted after its engine was made: make a new engine")
        layers = range(len(self.layers)) if layers is None else layers
        found = {0: hidden.clone()} if 0 in keep and layers.start == 0 else {}
        if not layers:
            return found
        b, n, _ = hidden.shape
        if b != len(starts):
            raise ValueError(f"{b} rows of tokens for {len(starts)} rows of memory")
        threads = torch.get_num_threads()
        slots = max(lengths if lengths is not None else [start + n for start in starts])
        slots = max(slots, max(cross.lengths) if cross is not None else 0)
        needed = kernels().scratch_bytes(byref(self.layers[0]), b * n, self.d, slots, threads) + 64
        if len(self.scratch) < needed:
            self.scratch = torch.empty(needed, dtype=torch.uint8)
        # Held here, by name: C sees addresses only.
        places = [start + j for start in starts for j in range(n)] if positions is None else None
        where = positions.to(torch.int32).expand(b, n).contiguous() if positions is not None else None
        seen = None if tree is None else tree.to(torch.uint8).expand(b, n, n).contiguous()
        at, chain, ends, reading = _ints(starts), _ints(places), _ints(lengths), _ints(cross and cross.lengths)
        this = _Pass(
            hidden=hidden.data_ptr(),
            starts=_address(at),
            positions=_address(chain) if where is None else where.data_ptr(),
            lengths=_address(ends),
            tree=None if seen is None else seen.data_ptr(),
            cos=None if angles is None else angles[0].data_ptr(),
            sin=None if angles is None else angles[1].data_ptr(),
            cross_lengths=_address(reading),
            scratch=-(-self.scratch.data_ptr() // 64) * 64,
            rows=b,
            count=n,
            d=self.d,
            slots=slots,
            threads=threads,
        )
        run = kernels().layer
        for index in layers:
            layer = self.layers[index]
            keys, values = storage(index)
            layer.keys, layer.values, layer.capacity = keys.data_ptr(), values.data_ptr(), keys.shape[2]
            if cross is not None:
                read = cross.layers[index]
                layer.cross_keys, layer.cross_values = read.keys.data_ptr(), read.values.data_ptr()
                layer.cross_slots = read.keys.shape[2]
            run(byref(layer), byref(this))
            if index + 1 in keep:
                found[index + 1] = hidden.clone()
        return found


def _ints(numbers: Sequence[int] | None) -> Any:
    """For C; a tenth of the time that a tensor takes."""
    return None if numbers is None else (c_int32 * len(numbers))(*numbers)


def _address(numbers: Any) -> int | None:
    return None if numbers is None else ctypes.addressof(numbers)


def normed(hidden: Tensor, norm: Any) -> Tensor:
    """Float32 [..., d] after an RMS norm, in the dtype of its weight."""
    states, width = hidden.contiguous(), hidden.shape[-1]
    out = torch.empty_like(states, dtype=norm.weight.dtype)
    kernels().norm(
        states.data_ptr(),
        norm.weight.data_ptr(),
        states.numel() // width,
        width,
        norm.variance_epsilon,
        DTYPES[out.dtype],
        out.data_ptr(),
    )
    return out


def apply(linear: _Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., in] through a map whose weights are of a dtype, to float32 [..., out]."""
    if x.shape[-1] != linear.inner:
        raise ValueError(f"{x.shape[-1]} numbers for a map of {linear.inner}")
    x = x.to(dtype).contiguous()
    out = torch.empty((*x.shape[:-1], linear.out), dtype=torch.float32)
    rows = x.numel() // linear.inner
    kernels().map(byref(linear), x.data_ptr(), rows, DTYPES[dtype], torch.get_num_threads(), out.data_ptr())
    return out


def _writable(states: Tensor) -> Tensor:
    """A float32 copy, in one piece: layers work in place."""
    return states.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class Native(Target):
    """A target whose layers are native. Stock layers hold the weights, and are not called. Logits are float32."""

    stack: Stack
    output: _Linear  # the head
    like: Tensor  # of the heads, width and dtype of keys and values
    norm: Any  # the last one
    kept: dict[int, Tensor] | None = None  # what `capture` wants: layer -> its latest output
    wanted: Collection[int] = ()

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
        states = _writable(self.embed(ids) if hidden is None else hidden)
        self.through(states, memory, positions, tree, range(low, high))
        return states

    def run(self, ids: Tensor, memory: Memory, positions: Tensor | None, tree: Tensor | None) -> Tensor:
        states = self.embed(ids).float()
        self.through(states, memory, positions, tree, range(len(self.layers)))
        return normed(states, self.norm)

    def through(
        self, states: Tensor, memory: Memory, positions: Tensor | None, tree: Tensor | None, layers: range
    ) -> None:
        """Send float32 [b, n, d] through some layers, in place."""
        own, reach = memory.own, memory.own.width
        if positions is not None:
            reach = max(reach, int(positions.max()) + 1)
        found = self.stack.run(
            states,
            own.starts,
            positions,
            lambda index: own.storage(index, self.like),
            tree=tree,
            layers=layers,
            keep=self.wanted,
            **self.surroundings(memory, reach),
        )
        if self.kept is not None:
            self.kept.update(found)

    def surroundings(self, memory: Memory, reach: int) -> dict[str, Any]:
        """What the family's layers need besides, for positions below `reach`: angles, or what cross-attention reads."""
        raise NotImplementedError

    @contextmanager
    def capture(self, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
        if outside := [layer for layer in layers if not 0 <= layer <= len(self.layers)]:
            raise UnsupportedModel(f"layer {outside[0]} of a model with {len(self.layers)}")
        before = self.kept, self.wanted
        self.kept, self.wanted = {}, frozenset(layers)
        try:
            yield self.kept
        finally:
            self.kept, self.wanted = before

    def head(self, hidden: Tensor) -> Tensor:
        return self.unembed(normed(hidden.float(), self.norm))

    def unembed(self, hidden: Tensor) -> Tensor:
        """Float32, whatever the model's dtype: nothing is rounded after the last sum."""
        return apply(self.output, hidden, self.dtype)


class NativeRotary(Native, DecoderOnly):
    """Llama, Mistral, Qwen2, Qwen3."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.angles: tuple[Tensor, Tensor] | None = None  # of all positions so far
        first, parts = self.layers[0].self_attn, Parts(model.dtype, model.device)
        self.like = torch.empty((1, first.k_proj.out_features // first.head_dim, 1, first.head_dim), dtype=self.dtype)
        self.norm = self.decoder.norm
        parts.norm(self.norm)
        self.output = parts.linear(self.lm_head)
        layers = [self._layer(layer, parts) for layer in self.layers]
        self.stack = Stack(layers, model.config.hidden_size, parts)
        if 2 * self._angles(1)[0].shape[1] != first.head_dim:
            raise UnsupportedModel("native layers turn whole heads by their positions, and this model a part of each")

    def _layer(self, layer: Any, parts: Parts) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        config: Any = self.model.config
        slides = not self.layer_kinds or config.layer_types[attention.layer_idx] == "sliding_attention"
        made = _Layer(
            **{name: parts.linear(getattr(attention, f"{name}_proj")) for name in "qkvo"},
            **{name: parts.linear(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down")},
            norm=parts.norm(layer.input_layernorm),
            mlp_norm=parts.norm(layer.post_attention_layernorm),
            heads=attention.q_proj.out_features // attention.head_dim,
            kv_heads=attention.k_proj.out_features // attention.head_dim,
            width=parts.width(attention.head_dim),
            window=self.window if self.window is not None and slides else 0,
            epsilon=layer.input_layernorm.variance_epsilon,
            scale=attention.scaling,
            dtype=DTYPES[self.dtype],
            activation=parts.activation(mlp.act_fn),
        )
        if hasattr(attention, "q_norm"):
            made.q_norm, made.k_norm = parts.norm(attention.q_norm), parts.norm(attention.k_norm)
        return made

    @torch.inference_mode()
    def prefill(self, inputs: PromptInputs) -> tuple[Tensor, Memory]:
        rows, width = inputs.mask.shape
        memory = Memory(RowCache(len(self.layers), rows, capacity=width + 64))
        states = inputs.embeds if inputs.ids is None else self.embed(inputs.ids)
        assert states is not None
        lengths = inputs.mask.sum(1)
        last = torch.zeros((rows, self.stack.d))
        step = max(1, TOKENS_AT_ONCE // rows)
        seen: dict[int, list[Tensor]] = {layer: [] for layer in self.wanted}
        for start in range(0, width, step):
            part = _writable(states[:, start : start + step])
            memory.own.append(part.shape[1])
            self.through(part, memory, None, None, range(len(self.layers)))
            for layer, parts in seen.items():
                parts.append(self.kept[layer] if self.kept is not None else part)
            here = (lengths > start) & (lengths <= start + part.shape[1])
            last[here] = part[here, lengths[here] - 1 - start]
        if self.kept is not None:
            self.kept.update({layer: torch.cat(parts, 1) for layer, parts in seen.items()})
        memory.truncate(lengths.tolist())
        return self.unembed(normed(last, self.norm)), memory

    def surroundings(self, memory: Memory, reach: int) -> dict[str, Any]:
        if self.angles is None or len(self.angles[0]) < reach:
            self.angles = self._angles(max(1024, 2 * reach))
        return {"angles": self.angles}

    def _angles(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 [count, half of a head]; the halves are turned alike."""
        positions = torch.arange(count, device=self.device)[None]
        both = self.decoder.rotary_emb(torch.empty(0, dtype=torch.float32), positions)
        cos, sin = (angle[0, :, : angle.shape[-1] // 2].contiguous() for angle in both)
        return cos, sin


class NativeT5(Native, T5):
    """T5 and mT5."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        first, parts = self.layers[0].layer[0].SelfAttention, Parts(model.dtype, model.device)
        self.like = torch.empty((1, first.n_heads, 1, first.key_value_proj_dim), dtype=self.dtype)
        self.norm = self.decoder.final_layer_norm
        parts.norm(self.norm)
        self.output = parts.linear(self.lm_head)
        layers = [_t5_layer(block, parts) for block in self.layers]
        reading = [block.layer[1].EncDecAttention for block in self.layers]
        self.reading = [(parts.linear(attention.k), parts.linear(attention.v)) for attention in reading]
        self.stack = Stack(layers, model.config.d_model, parts)
        self.stack.set_bias(self.bias_by_distance.T, 0)
        self.reader = T5Reader(self.encoder)

    def encode(self, inputs: PromptInputs) -> tuple[Tensor, Tensor]:
        states = inputs.states
        if states is None:
            embeds = self.encoder.get_input_embeddings()(inputs.ids) if inputs.embeds is None else inputs.embeds
            states = self.reader(embeds, inputs.mask)
        return states, inputs.mask.bool()[:, None, None, :]

    def unembed(self, hidden: Tensor) -> Tensor:
        return Native.unembed(self, hidden if self.scale is None else hidden * self.scale)

    def surroundings(self, memory: Memory, reach: int) -> dict[str, Any]:
        if reach > len(self.bias_by_distance):
            self.bias_by_distance = self._biases(2 * reach)
            self.stack.set_bias(self.bias_by_distance.T, 0)
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


class T5Reader:
    """The encoder of a T5 or mT5.

    Args:
        encoder: the stock one, `T5Stack`, or a model that is an encoder alone.
    Raises: UnsupportedModel where C cannot take its weights.
    """

    def __init__(self, encoder: Any) -> None:
        stack = getattr(encoder, "encoder", encoder)
        self.norm, self.blocks, parts = stack.final_layer_norm, stack.block, Parts(encoder.dtype, encoder.device)
        parts.norm(self.norm)
        self.stack = Stack([_t5_layer(block, parts) for block in self.blocks], stack.config.d_model, parts)
        self.reach = 0  # positions that the bias is known for

    @torch.no_grad()
    def __call__(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [b, m, d], right-padded, and their mask [b, m] to the encoder's states [b, m, d]."""
        m = embeds.shape[1]
        if self.blocks and m > self.reach:
            self._set_bias(max(64, 2 * m))
        rows = max(1, TOKENS_AT_ONCE // m)
        parts = zip(embeds.split(rows), mask.split(rows), strict=True)
        return torch.cat([self._read(some, theirs) for some, theirs in parts])

    def _read(self, embeds: Tensor, mask: Tensor) -> Tensor:
        b, m, _ = embeds.shape
        states = _writable(embeds)
        if self.blocks:
            attention = self.blocks[0].layer[0].SelfAttention
            shape = (2, b, attention.n_heads, m, attention.key_value_proj_dim)
            keys, values = torch.zeros(shape, dtype=self.norm.weight.dtype)
            self.stack.run(
                states, [0] * b, torch.arange(m)[None], lambda index: (keys, values), lengths=mask.sum(1).tolist()
            )
        return normed(states, self.norm)

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


class Projection:
    """The two maps of a hand-off's projector.

    Raises: UnsupportedModel where C cannot take its weights.
    """

    def __init__(self, first: nn.Linear, last: nn.Linear) -> None:
        self.parts = parts = Parts(first.weight.dtype, first.weight.device)
        self.first, self.last = parts.linear(first), parts.linear(last)
        parts.watch(first)
        parts.watch(last)

    def __call__(self, states: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out], in the weights' dtype."""
        dtype = self.parts.dtype
        inner = apply(self.first, states, dtype).relu_()
        return apply(self.last, inner, dtype).to(dtype)


def _t5_layer(block: Any, parts: Parts) -> _Layer:
    first, last = block.layer[0], block.layer[-1]
    attention, mlp = first.SelfAttention, last.DenseReluDense
    gated = hasattr(mlp, "wi_0")
    made = _Layer(
        **{name: parts.linear(getattr(attention, name)) for name in "qkvo"},
        gate=parts.linear(mlp.wi_0 if gated else mlp.wi),
        down=parts.linear(mlp.wo),
        norm=parts.norm(first.layer_norm),
        mlp_norm=parts.norm(last.layer_norm),
        heads=attention.n_heads,
        kv_heads=attention.n_heads,
        width=parts.width(attention.key_value_proj_dim),
        epsilon=first.layer_norm.variance_epsilon,
        scale=1.0,
        dtype=DTYPES[parts.dtype],
        activation=parts.activation(mlp.act),
    )
    if gated:
        made.up = parts.linear(mlp.wi_1)
    if len(block.layer) == 3:
        cross = block.layer[1]
        made.cross_q, made.cross_o = parts.linear(cross.EncDecAttention.q), parts.linear(cross.EncDecAttention.o)
        made.cross_norm = parts.norm(cross.layer_norm)
    return made


TARGETS: dict[str, type[Native]] = {
    "llama": NativeRotary,
    "mistral": NativeRotary,
    "qwen2": NativeRotary,
    "qwen3": NativeRotary,
    "t5": NativeT5,
    "mt5": NativeT5,
}


def make_smaller(model: PreTrainedModel, name: Literal["int8", "int4"]) -> str:
    """Let a model run by native layers on copies of its matrices in fewer bits. Its texts change a little.

    `int4` is for what each token reads: an encoder reads once and would gain nothing, and the head stays in eight bits,
    since all of its error is the logits' own. Weights that are no multiple of a group wide stay as they are.

    Returns: why it cannot; empty when it can.
    """
    reason = make_native(model)
    if reason:
        return reason
    target = target_for(model)
    written = set(target.layers.modules())
    parts: list[Any] = [module for module in model.modules() if type(module) is nn.Linear]
    for part in parts:
        if name == "int8" or part is target.lm_head:
            setattr(part, COPY, Int8.of(part.weight))
        elif part in written and part.in_features % GROUP == 0:
            setattr(part, COPY, Int4.of(part.weight))
    model.baton_runtime = model.baton_runtime._replace(name=name)
    return reason


def make_native(model: PreTrainedModel) -> str:
    """Let a model run by native layers in our engine. Nothing in it changes; transformers' own calls stay stock.

    Returns: why it cannot; empty when it can.
    """
    family = model.config.model_type
    if family not in TARGETS:
        return f"there are no native layers for {family} (for {', '.join(TARGETS)})"
    parts: list[Any] = list(model.modules())
    for part in parts:
        vars(part).pop(COPY, None)  # of an earlier choice
    made, reason = _built(lambda: TARGETS[family](model))
    if made is not None:
        model.baton_runtime = Runtime("native", TARGETS[family], (model.device, model.dtype))
    return reason


def make_reader(model: PreTrainedModel) -> T5Reader | None:
    """The encoder of a model that reads for others, native; None where that cannot be."""
    if model.config.model_type not in ("t5", "mt5"):
        return None
    return _built(lambda: T5Reader(model))[0]


def make_projection(first: nn.Linear, last: nn.Linear) -> Projection | None:
    """A projector's maps, native; None where that cannot be."""
    return _built(lambda: Projection(first, last))[0]


def _built(build: Callable[[], _T]) -> tuple[_T | None, str]:
    """What C can run, or None and the reason."""
    try:
        kernels()
        return build(), ""
    except UnsupportedModel as error:
        return None, str(error)
    except AttributeError as error:  # a model that lost or changed parts: packed, wrapped, cut
        return None, f"it is not built as its family is: {error}"
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None)
        return None, f"the C kernels cannot be compiled: {detail.decode(errors='replace') if detail else error}"
