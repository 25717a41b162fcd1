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
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from importlib.resources import files
from itertools import accumulate, pairwise
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from baton.cache import CrossCache, Memory
from baton.data.storage import cache_folder
from baton.errors import BatonError, UnsupportedModel
from baton.inference import inference
from baton.models.adapter import Target
from baton.runtime.quantized import TOGETHER, Int4, Int8, copy_of, matrix_of

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT4 = 2, 3  # kinds of weights besides
RMS, RMS_PLUS_ONE, MEAN, NONE = 0, 1, 2, 3  # kinds of norms
ACTIVATIONS = {
    "SiLU": 0,
    "SiLUActivation": 0,
    "ReLU": 1,
    "NewGELUActivation": 2,
    "GELUTanh": 2,
    "PytorchGELUTanh": 2,
    "GELUActivation": 3,
}
TABLES = ("Embedding", "BartScaledWordEmbedding", "MBartScaledWordEmbedding")  # the others are given their width
LANES = 16
TOKENS_AT_ONCE = 512  # of a prompt pass; more would only take more memory


class _Norm(Structure):
    _fields_ = tuple((name, c_void_p) for name in ("weight", "bias"))


class _Linear(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias", "scales")),
        *((name, c_int64) for name in ("out", "inner", "kind")),
    )


class Layer(Structure):
    """One layer as C sees it; what its parts mean is said in `kernels.c`."""

    _fields_ = (
        *((name, _Linear) for name in ("q", "k", "v", "o", "cross_q", "cross_o", "gate", "up", "down")),
        *((name, _Norm) for name in ("norm", "cross_norm", "mlp_norm", "post_norm", "post_mlp_norm")),
        *((name, _Norm) for name in ("q_norm", "k_norm")),
        *((name, c_void_p) for name in ("bias", "cross_keys", "cross_values")),
        *((name, c_int64) for name in ("heads", "kv_heads", "width", "cross_slots")),
        *((name, c_int64) for name in ("bias_size", "bias_offset", "window")),
        *((name, c_int64) for name in ("head_step", "first_key", "first_value", "turned", "angles")),
        *((name, c_float) for name in ("epsilon", "scale", "cap")),
        *((name, c_int32) for name in ("dtype", "activation", "norms", "parallel", "after")),
    )


class _Pass(Structure):
    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("hidden", "keys", "values", "starts", "begins", "lengths", "positions", "tree")
        ),
        *((name, c_void_p) for name in ("cos", "sin", "cross_lengths", "scratch", "states")),
        *((name, c_int64) for name in ("rows", "count", "d", "slots", "reach", "capacity", "layer_bytes")),
        ("threads", c_int32),
    )


class Ends(Structure):
    """What comes before the layers and after them; see `kernels.c`."""

    _fields_ = (
        *((name, c_void_p) for name in ("table", "places")),
        *((name, _Norm) for name in ("first", "norm")),
        ("head", _Linear),
        *((name, c_int64) for name in ("vocabulary", "places_count")),
        *((name, c_float) for name in ("first_epsilon", "epsilon", "width", "scale")),
        *((name, c_int32) for name in ("norms", "dtype")),
    )

    def check(self, wrong: int) -> None:
        """Raises: IndexError for an id that the model does not have."""
        if wrong >= 0:
            raise IndexError(f"the model has {self.vocabulary} tokens, and none with the id {wrong}")


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
    loaded.run.argtypes, loaded.run.restype = (pointer, size, size, pointer), None
    loaded.whole.argtypes, loaded.whole.restype = (pointer, pointer, size, pointer, pointer, pointer), size
    loaded.enter.argtypes, loaded.enter.restype = (pointer, pointer, pointer), size
    loaded.scratch_bytes.argtypes, loaded.scratch_bytes.restype = (pointer, size, size, size, c_int32), c_int64
    loaded.norm.argtypes = (pointer, pointer, size, size, c_float, c_int32, c_int32, pointer)
    loaded.top.argtypes = (pointer, size, size, size, pointer, pointer)
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
        """See `valid`. Few of a model's modules must do, as it is asked at every pass: when a model is moved, converted
        or loaded anew, all its weights move."""
        self.watched.append((module, module.weight.data_ptr()))

    @property
    def valid(self) -> bool:
        """Whether the weights that are watched are still where they were."""
        return all(module.weight.data_ptr() == address for module, address in self.watched)

    def linear(self, layer: Any, rows: range | None = None) -> _Linear:
        """A linear layer as it is, or its copy in fewer bits where there is one.

        Args:
            rows: of its outputs, from a multiple of four on; None: all.
        """
        if type(layer) is Conv1D and not layer.weight.T.is_contiguous():
            layer.weight.data = layer.weight.data.T.contiguous().T  # the same numbers, laid out as others lay theirs
        weight = self._plain(layer, layer.weight, nn.Linear, Conv1D)
        out, inner = matrix_of(layer).shape
        step = LANES if self.dtype == torch.float32 else 2 * LANES
        if inner % step:
            raise UnsupportedModel(f"weights {inner} wide are no multiple of {step}")
        rows = range(out) if rows is None else rows
        copy, bias, scales = copy_of(layer), layer.bias, None
        match copy:
            case Int8(levels, each):
                self.held += [levels, each]
                data, scales, kind = levels[rows.start :].data_ptr(), each[rows.start :].data_ptr(), INT8
            case Int4(packed):
                self.held.append(packed)
                data, kind = packed[rows.start // TOGETHER :].data_ptr(), INT4
            case _:
                data, kind = weight.data_ptr() + rows.start * inner * weight.itemsize, DTYPES[self.dtype]
        if bias is not None:
            bias = self._plain(layer, bias, nn.Linear, Conv1D)[rows.start :].data_ptr()
        return _Linear(data, bias, scales, len(rows), inner, kind)

    def embedding(self, table: nn.Embedding) -> Tensor:
        self.watch(table)
        return self._plain(table, table.weight, type(table))

    def hold(self, tensor: Tensor) -> Tensor:
        """A tensor that is no parameter, as C takes it."""
        self.held.append(tensor.detach().to(self.dtype).contiguous())
        return self.held[-1]

    def norm(self, norm: Any) -> _Norm:
        if not self.watched:
            self.watch(norm)
        weight, bias = self._plain(norm, norm.weight, type(norm)), getattr(norm, "bias", None)
        return _Norm(weight.data_ptr(), None if bias is None else self._plain(norm, bias, type(norm)).data_ptr())

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

    def _plain(self, module: Any, weight: Any, *kinds: type) -> Tensor:
        if type(module) not in kinds or type(weight) is not nn.Parameter:
            raise UnsupportedModel(f"it holds layers of another kind: {type(module).__name__}")
        laid = weight.T if type(module) is Conv1D and weight.ndim == 2 else weight
        if weight.dtype != self.dtype or weight.device.type != "cpu" or not laid.is_contiguous():
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

    def __init__(self, layers: list[Layer], d: int, parts: Parts) -> None:
        self.layers, self.d = (Layer * len(layers))(*layers), d
        self.parts = parts
        self.bias: Tensor | None = None  # what the layers' pointers lead to
        self.read: Tensor | None = None  # ... and the first of the keys that they read of an encoder
        self.scratch = torch.empty(0, dtype=torch.uint8)
        self.fits = (0, 0, 0)  # tokens, slots and threads that the scratch is large enough for
        self.needed = 0  # bytes of it that layers work in, for so many
        self.this = _Pass(d=d)  # made once: to set its fields takes a third of the time

    def set_bias(self, table: Tensor, offset: int) -> None:
        """What all layers add to scores: [heads, n], by distance from -offset on."""
        self.bias = table.float().contiguous()
        for layer in self.layers:
            layer.bias, layer.bias_size, layer.bias_offset = self.bias.data_ptr(), table.shape[1], offset

    def run(
        self,
        hidden: Tensor,
        rows: "Rows",
        *,
        layers: range | None = None,
        keep: Collection[int] = (),
    ) -> dict[int, Tensor]:
        """Send float32 [b, n, d] through layers, in place; where rows have counts of their own, [tokens, d].

        Args:
            layers: which; None: all.
        Returns: copies of what the layers in `keep` gave, by number; 0 is what the first was given.
        """
        layers = range(len(self.layers)) if layers is None else layers
        found = {0: hidden.clone()} if 0 in keep and layers.start == 0 else {}
        if not layers:
            return found
        n = hidden.shape[1] if rows.counts is None else max(rows.counts)
        _held = self._tell(hidden, rows, len(rows.starts), n)
        stops = sorted(layer for layer in keep if layers.start < layer <= layers.stop)
        for start, stop in pairwise([layers.start, *stops, layers.stop]):
            kernels().run(self.layers, start, stop, byref(self.this))
            if stop in stops:
                found[stop] = hidden.clone()
        return found

    def whole(self, ends: "Ends", ids: Tensor, rows: "Rows") -> Tensor:
        """Token ids [b, n] to logits, float32 [b, n, V]: 0 beyond a row's count.

        Raises: IndexError for an id that the model does not have.
        """
        b, n = ids.shape
        ids, logits = ids.long().contiguous(), torch.empty((b, n, ends.head.out))
        _held = self._tell(None, rows, b, n)
        addresses = byref(self.this), ids.data_ptr(), logits.data_ptr()
        ends.check(kernels().whole(byref(ends), self.layers, len(self.layers), *addresses))
        return logits

    def enter(self, ends: "Ends", ids: Tensor, rows: "Rows") -> Tensor:
        """Token ids [b, n] to what the first layer is given, float32 [b, n, d]. Raises: as `whole`."""
        b, n = ids.shape
        ids, hidden = ids.long().contiguous(), torch.empty((b, n, self.d))
        _held = self._tell(hidden, rows, b, n)
        ends.check(kernels().enter(byref(ends), byref(self.this), ids.data_ptr()))
        return hidden

    def _tell(self, hidden: Tensor | None, rows: "Rows", b: int, n: int) -> Any:
        """Tell C of a pass. Called for each, and so written for speed.

        Args:
            hidden: None: C has its own.
        Returns: what must stay while C reads it: it sees addresses only.
        """
        if not self.parts.valid:
            raise BatonError("the model was moved or converted after its engine was made: make a new engine")
        starts, lengths, cross, all, this = rows.starts, rows.lengths, rows.cross, rows.storage, self.this
        counts = [n] * b if rows.counts is None else rows.counts
        begins = [0, *accumulate(counts)]
        tokens = begins[-1]
        short = hidden is not None and hidden.numel() < tokens * self.d
        if b != len(starts) or b != len(counts) or max(counts) > n or short:
            raise ValueError(f"{b} rows of {n} tokens, counted {counts}, for {len(starts)} rows of memory")
        threads = torch.get_num_threads()
        slots = max(map(add, starts, counts)) if lengths is None else max(lengths)
        if cross is not None:
            slots = max(slots, max(cross.lengths))
            if self.read is not cross.layers[0].keys:
                self._point(cross)
        if not _within((tokens, slots, threads), self.fits):
            self.fits = tuple(map(max, (tokens, slots, threads), self.fits))  # type: ignore[assignment]
            most, reach, teams = self.fits
            self.needed = kernels().scratch_bytes(byref(self.layers[0]), most, self.d, reach + LANES, teams)
            self.scratch = torch.empty(self.needed + 2 * 4 * most * self.d + 128, dtype=torch.uint8)
        this.scratch = scratch = -(-self.scratch.data_ptr() // 64) * 64
        this.states = after = scratch + -(-self.needed // 64) * 64
        this.hidden = after + 4 * tokens * self.d if hidden is None else hidden.data_ptr()
        positions, reading = rows.positions, () if cross is None else cross.lengths
        places: Any = [start + j for start in starts for j in range(n)] if positions is None else ()
        numbers = array("i", [*starts, *begins, *(lengths or ()), *reading, *places])
        this.starts = at = numbers.buffer_info()[0]
        this.begins = at = at + 4 * b
        this.lengths = None if lengths is None else at + 4 * (b + 1)
        at += 4 * (b + 1 + len(lengths or ()))
        this.cross_lengths = None if cross is None else at
        if positions is None:
            this.positions = at + 4 * len(reading)
        else:
            places = positions.to(torch.int32).expand(b, n).contiguous()
            this.positions = places.data_ptr()
        seen = None if rows.tree is None else rows.tree.to(torch.uint8).expand(b, n, n).contiguous()
        this.tree = None if seen is None else seen.data_ptr()
        cos, sin = rows.angles or (None, None)
        this.cos, this.sin = (None, None) if cos is None or sin is None else (cos.data_ptr(), sin.data_ptr())
        this.reach = 0 if cos is None else cos.shape[1]
        (apart, between, *_), size, shape = all.stride(), all.itemsize, all.shape
        this.keys = keys = all.data_ptr()
        this.values = keys + apart * size
        this.capacity, this.layer_bytes = shape[4], between * size if shape[1] > 1 else 0
        this.rows, this.count, this.slots, this.threads = b, n, slots, threads
        return numbers, places, seen

    def _point(self, cross: CrossCache) -> None:
        for layer, read in zip(self.layers, cross.layers, strict=True):
            layer.cross_keys, layer.cross_values = read.keys.data_ptr(), read.values.data_ptr()
            layer.cross_slots = read.keys.shape[2]
        self.read = cross.layers[0].keys  # rows that leave or join leave other tensors, in all layers


class Rows(NamedTuple):
    """What a pass knows of its rows."""

    starts: list[int]  # slots in use, per row; the new tokens take the next n
    storage: Tensor  # [2, layers, rows and more, kv_heads, capacity, width]; of one layer: each overwrites it
    positions: Tensor | None = None  # int64 [b or 1, n]; None: each row goes on where it ends
    tree: Tensor | None = None  # bool [b or 1, n, n], who attends to whom among the new tokens; None: a chain
    lengths: list[int] | None = None  # of an encoder's rows; None: each token attends to what is before it
    angles: tuple[Tensor, Tensor] | None = None  # cosine and sine, float32 [tables, positions, half of what turns]
    cross: CrossCache | None = None
    counts: list[int] | None = None  # tokens of each row; None: n of each


def _within(numbers: Sequence[int], limits: Sequence[int]) -> bool:
    return numbers[0] <= limits[0] and numbers[1] <= limits[1] and numbers[2] <= limits[2]


def shape(heads: int, kv_heads: int, width: int) -> dict[str, int]:
    """Of an attention whose queries, keys and values come in this order, head by head."""
    places = {"head_step": width, "first_key": heads * width, "first_value": (heads + kv_heads) * width}
    return {"heads": heads, "kv_heads": kv_heads, "width": width, **places}


def norm_kind(norm: Any) -> int:
    """Which of C's norms a module is."""
    if isinstance(norm, nn.LayerNorm):
        return MEAN
    return RMS_PLUS_ONE if type(norm).__name__ in ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm") else RMS


def epsilon_of(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def around(first: Any, last: Any, scale: float, activation: Any, parts: Parts) -> dict[str, Any]:
    """Of a layer: the norms before its two parts, the scale of scores, and the activation."""
    return {
        "norm": parts.norm(first),
        "mlp_norm": parts.norm(last),
        "norms": norm_kind(first),
        "epsilon": epsilon_of(first),
        "scale": scale,
        "activation": parts.activation(activation),
    }


class LastNorm:
    """The norm before a head; None: what is there is only rounded.

    Raises: UnsupportedModel where C cannot take its weights.
    """

    def __init__(self, norm: Any, parts: Parts) -> None:
        self.dtype = parts.dtype
        self.made, self.kind, self.epsilon = _Norm(), NONE, 0.0
        if norm is not None:
            self.made, self.kind, self.epsilon = parts.norm(norm), norm_kind(norm), epsilon_of(norm)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Float32 [..., d] to the same, normed, in the weights' dtype."""
        states, width = hidden.contiguous(), hidden.shape[-1]
        out = torch.empty_like(states, dtype=self.dtype)
        where, rows = (states.data_ptr(), out.data_ptr()), states.numel() // width
        kernels().norm(byref(self.made), where[0], rows, width, self.epsilon, self.kind, DTYPES[self.dtype], where[1])
        return out

    def in_place(self, states: Tensor) -> Tensor:
        """Float32 [..., d] in one piece, normed where it is."""
        where, width = states.data_ptr(), states.shape[-1]
        rows = states.numel() // width
        kernels().norm(byref(self.made), where, rows, width, self.epsilon, self.kind, DTYPES[self.dtype], None)
        return states


def apply(linear: _Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., in] through a map whose weights are of a dtype, to float32 [..., out]."""
    if x.shape[-1] != linear.inner:
        raise ValueError(f"{x.shape[-1]} numbers for a map of {linear.inner}")
    x = x.to(dtype).contiguous()
    out = torch.empty((*x.shape[:-1], linear.out), dtype=torch.float32)
    rows = x.numel() // linear.inner
    kernels().map(byref(linear), x.data_ptr(), rows, DTYPES[dtype], torch.get_num_threads(), out.data_ptr())
    return out


def writable(states: Tensor) -> Tensor:
    """A float32 copy, in one piece: layers work in place."""
    return states.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class Native(Target):
    """A target whose layers are native. Stock layers hold the weights, and are not called. Logits are float32."""

    ragged = True
    stack: Stack
    output: _Linear  # the head
    like: Tensor  # of the heads, width and dtype of keys and values
    norm: LastNorm
    kept: dict[int, Tensor] | None = None  # what `capture` wants: layer -> its latest output
    wanted: Collection[int] = ()
    ends: Ends | None = None  # None: embeddings are made, and heads called, apart

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
        states = self.entering(ids, memory, positions) if hidden is None else writable(hidden)
        self.through(states, memory, positions, tree, range(low, high))
        return states

    def run(self, ids: Tensor, memory: Memory, positions: Tensor | None, tree: Tensor | None) -> Tensor:
        states = self.entering(ids, memory, positions)
        self.through(states, memory, positions, tree, range(len(self.layers)))
        return self.norm(states)

    def entering(self, ids: Tensor, memory: Memory, positions: Tensor | None) -> Tensor:
        """What the first layer is given of announced tokens, float32 [b, n, d], for it to change."""
        if self.ends is not None:
            return self.stack.enter(self.ends, ids, self._rows(memory, positions, None, None))
        return self.at_positions(writable(self.embed(ids)), memory, positions)

    def at_positions(self, states: Tensor, memory: Memory, positions: Tensor | None) -> Tensor:
        """Embeddings of announced tokens with what a family adds to them by position."""
        return states

    def through(
        self,
        states: Tensor,
        memory: Memory,
        positions: Tensor | None,
        tree: Tensor | None,
        layers: range,
        counts: list[int] | None = None,
    ) -> None:
        """Send float32 [b, n, d], or [tokens, d] where rows have counts, through some layers, in place."""
        found = self.stack.run(states, self._rows(memory, positions, tree, counts), layers=layers, keep=self.wanted)
        if self.kept is not None:
            self.kept.update(found)

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
        if begun is not None or self.wanted:
            return super().forward(ids, memory, positions=positions, tree=tree, begun=begun)
        memory.own.append(ids.shape[1])
        if self.ends is not None:
            return self._capped(self.stack.whole(self.ends, ids, self._rows(memory, positions, tree, counts)))
        if counts is None:
            return self.unembed(self.run(ids, memory, positions, tree))
        real = torch.arange(ids.shape[1]) < torch.tensor(counts)[:, None]
        tokens = self.entering(ids, memory, positions)[real]
        self.through(tokens, memory, positions, tree, range(len(self.layers)), counts)
        logits = torch.zeros((*ids.shape, self.output.out))
        logits[real] = self.unembed(self.norm(tokens))
        return logits

    def _rows(self, memory: Memory, positions: Tensor | None, tree: Tensor | None, counts: list[int] | None) -> Rows:
        own, reach = memory.own, memory.own.width
        if positions is not None:
            reach = max(reach, int(positions.max()) + 1)
        if own.all is None:
            own.storage(0, self.like)
        assert own.all is not None
        return Rows(own.starts, own.all, positions, tree, counts=counts, **self.surroundings(memory, reach))

    def enter_by_table(
        self,
        parts: Parts,
        *,
        places: Tensor | None = None,
        first: LastNorm | None = None,
        width: float = 1.0,
        scale: float | None = None,
    ) -> None:
        """Let passes go from ids to logits in one call, where embeddings are a table and what is said here.

        Args:
            places: float32 [positions, d], added by position.
            first: the norm of both.
            width: what embeddings are multiplied by.
            scale: of what the head is given.
        """
        table = self.decoder.get_input_embeddings()
        if type(table).__name__ not in TABLES or table.max_norm is not None:
            return
        weight = parts.embedding(table)
        self.ends = Ends(
            table=weight.data_ptr(),
            places=None if places is None else places.data_ptr(),
            first=_Norm() if first is None else first.made,
            norm=self.norm.made,
            head=self.output,
            vocabulary=len(weight),
            places_count=0 if places is None else len(places),
            first_epsilon=0.0 if first is None else first.epsilon,
            epsilon=self.norm.epsilon,
            width=width,
            scale=1.0 if scale is None else scale,
            norms=self.norm.kind,
            dtype=DTYPES[self.dtype],
        )

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
        return self.unembed(self.norm(hidden.float()))

    def unembed(self, hidden: Tensor) -> Tensor:
        """Float32, whatever the model's dtype: nothing is rounded after the last sum."""
        return self._capped(apply(self.output, hidden, self.dtype))

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap
