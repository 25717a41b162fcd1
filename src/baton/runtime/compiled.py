"""Compiled passes: one graph of PyTorch's compiler for all that a decode step does, for every family and device.

What stock layers cost beside their arithmetic is the calling of some hundred small operations per layer. Here the
family's own `run` is traced once per bucket (rows, new tokens), masks, cache and head included, with slots as a size
that may change. Passes are padded up to their bucket; one that is not compiled yet is compiled beside the requests,
which go on with stock layers meanwhile. Compiled code is kept on disk.
"""

import contextlib
import copy
import logging
import os
import queue
import shutil
import threading
import types
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from baton.cache import CrossCache, Memory
from baton.data.storage import cache_folder
from baton.models.adapter import FAMILIES, T5, EncoderDecoder, Runtime, Target

log = logging.getLogger(__name__)
MOST_ROWS, MOST_TOKENS = 64, 64  # of a bucket; larger passes are bound by arithmetic
MOST_BUCKETS = 16  # of a model: each is compiled code, and on the CPU in bfloat16 a copy of the weights
SLOTS, READ = 128, 96  # of the example that is traced: unlike each other, or they would be taken for one size
READ_STEP = 32  # what is read is padded to multiples of this
REACH = 8192  # slots that T5's position bias is known for
ATTEMPTS = 5
_said: set[str] = set()


class Bucket(NamedTuple):
    """What passes are padded up to."""

    rows: int
    tokens: int

    @classmethod
    def of(cls, rows: int, tokens: int) -> "Bucket":
        """The smallest that holds a pass: powers of two."""
        return cls(1 << (rows - 1).bit_length(), 1 << (tokens - 1).bit_length())


class Inputs(NamedTuple):
    """What a compiled pass is given, all of it in one bucket's sizes: [R, Q] tokens, S slots, M states that are read.

    `starts` int64 [R]: slots in use before the pass; `positions` int64 [R, Q]; `tree` bool [R, Q, Q]. `keys` and
    `values`: per layer [R, kv_heads, S, head_dim], the cache's own memory, written to. `read`: None, or states
    [R, M, d], mask [R, 1, 1, M], and keys and values per layer [R, heads, M, head_dim].
    """

    ids: Tensor
    starts: Tensor
    positions: Tensor
    tree: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    read: tuple[Tensor, Tensor, list[Tensor], list[Tensor]] | None


def step(target: Target, given: Inputs) -> Tensor:
    """Logits [R, Q, V]. What is traced: the family's own pass over slots in tensors of fixed shape."""
    own: Any = Slots(given.keys, given.values, given.starts, given.ids.shape[1])
    cross = None
    if given.read is not None:
        states, mask, keys, values = given.read
        cross = CrossCache(len(keys), states, mask, [])
        for index in range(len(keys)):
            cross.update(keys[index], values[index], index)
    return target.unembed(target.run(given.ids, Memory(own, cross), given.positions, given.tree))


class Slots(Cache):
    """Answers what a family's `run` asks of a `RowCache`, where rows and lengths are data, not numbers of Python."""

    even = False

    def __init__(self, keys: list[Tensor], values: list[Tensor], starts: Tensor, count: int) -> None:
        super().__init__(layers=[])
        self.keys, self.values, self.first, self.count = keys, values, starts[:, None], count
        self.rows, self.width = keys[0].shape[0], keys[0].shape[2]
        self.at = self.first + torch.arange(count, device=starts.device)
        self.row = torch.arange(self.rows, device=starts.device)[:, None]

    def starts_on(self, device: torch.device) -> Tensor:
        return self.first

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[self.row, :, self.at] = key_states.transpose(1, 2)
        values[self.row, :, self.at] = value_states.transpose(1, 2)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # stock code would count positions from it, and is given positions


class Placed(nn.Module):
    """Stands where a decoder looks positions up, and gives what was looked up already."""

    found: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor | None:
        return self.found


class Placing(EncoderDecoder):
    """A family whose position table is another module for good: a graph cannot exchange a module's `forward`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        if self.position_table is not None:
            self.decoder.embed_positions = Placed()

    @contextlib.contextmanager
    def _placing(self, positions: Tensor) -> Iterator[None]:
        self.decoder.embed_positions.found = self.placed(positions)
        yield
        self.decoder.embed_positions.found = None


@cache
def traced(base: type[Target]) -> type[Target]:
    """The way to run a family's twin, which nobody but the compiler calls."""
    return type(f"Traced{base.__name__}", (Placing, base), {}) if issubclass(base, EncoderDecoder) else base


class Steps:
    """The compiled passes of one model, and the thread that makes more of them.

    Args:
        model: is read here once; what is traced is a twin that shares its weights, so that hooks and exchanged layers
            of the model stay out of it.
        base: runs the model's family.
    Raises: what copying the modules of an unusual model raises.
    """

    def __init__(self, model: PreTrainedModel, base: type[Target]) -> None:
        weights = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
        self.target = traced(base)(copy.deepcopy(model, dict(weights)).eval())
        self.context, self.target.context = self.target.context, None  # positions are cut here, not in the graph
        self.reach: int | None = None  # most slots, or None
        if isinstance(self.target, T5):
            self.reach = REACH
            self.target.bias_by_distance = self.target._biases(REACH)
        self.watched = [
            (module._parameters, name, weight, weight._version)
            for module in model.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        ]
        self.places = [(weight, weight.data_ptr()) for _, _, weight, _ in (self.watched[0], self.watched[-1])]
        self.device = model.device
        self.ready: dict[Bucket, Callable[[Target, Inputs], Tensor]] = {}
        self.asked: set[Bucket] = set()  # ready, under way, or waiting
        self.broken = ""  # why nothing more is compiled
        self.waiting: queue.SimpleQueue[Bucket] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.shapes: _Shapes | None = None  # of keys, values and what is read: known when a prompt was
        self.padded: tuple[Any, Any] | None = None  # what is read, as it was and padded

    @property
    def valid(self) -> bool:
        """Whether the model's weights are the ones that were compiled: they may be part of the code."""
        for held, name, weight, version in self.watched:  # before each pass, so it is written to be quick
            if held.get(name) is not weight or weight._version != version:
                return False
        return all(weight.data_ptr() == address for weight, address in self.places)  # moved: all of them or none

    def run(self, ids: Tensor, memory: Memory, positions: Tensor | None, tree: Tensor | None) -> Tensor | None:
        """Logits [b, q, V] of new tokens, and `memory` takes them in; or None, and nothing has happened.

        A bucket that is missing is then being compiled.
        """
        own, cross = memory.own, memory.cross
        if own.keys[0] is None or (cross is not None and not cross.layers[0].is_initialized):
            return None
        b, q = ids.shape
        bucket = Bucket.of(b, q)
        run = self.ready.get(bucket)
        if run is None:
            self.want(bucket, memory)
            run = self.ready.get(bucket)
        if run is None:
            return None
        if not self.valid:
            _say("compiled passes are not used any more: the model's weights changed after its engine was made")
            return None
        before = own.lengths
        own.reserve(bucket.rows, max(before) + bucket.tokens)
        if self.reach is not None and own.capacity > self.reach:
            return None
        given = self.inputs(bucket, ids, memory, positions, tree)
        own.append(q, self.device)
        try:
            # A pass that does not suit its graph after all must not wait for another one.
            with torch.compiler.set_stance("fail_on_recompile"):
                logits = run(self.target, given)[:b, :q]
        except Exception as error:
            own.truncate(before)
            self.ready.pop(bucket, None)  # and it stays among those asked for
            _say(f"compiled passes of {b} x {q} tokens are not used: {_line(error)}")
            return None
        return logits.clone() if self.device.type == "cuda" else logits  # a CUDA graph writes there again

    def inputs(
        self, bucket: Bucket, ids: Tensor, memory: Memory, positions: Tensor | None, tree: Tensor | None
    ) -> Inputs:
        """A pass in its bucket's sizes. Padding attends to itself and is written behind each row, or into free rows."""
        own, device, (rows, count) = memory.own, self.device, bucket
        b, q = ids.shape
        starts = torch.tensor(own.lengths + [0] * (rows - b), device=device)
        at = starts[:, None] + _steps(count, device)
        attends = _chain(count, device)
        if positions is not None:
            at[:b, :q] = positions
        if self.context is not None:
            at.clamp_(max=self.context - 1)
        if tree is None:
            attends = attends.expand(rows, -1, -1)
        else:
            attends = torch.eye(count, dtype=torch.bool, device=device).repeat(rows, 1, 1)
            attends[:b, :q, :q] = tree
        # Copied in any case: a graph takes tensors of inference mode, as its example was, for another kind than others.
        whole = torch.zeros((rows, count), dtype=torch.long, device=device)
        whole[:b, :q] = ids
        return Inputs(
            ids=whole,
            starts=starts,
            positions=at,
            tree=attends.contiguous(),
            keys=[keys.narrow(0, 0, rows) for keys in own.keys if keys is not None],
            values=[values.narrow(0, 0, rows) for values in own.values if values is not None],
            read=None if memory.cross is None else self.reading(memory.cross, rows),
        )

    def reading(self, cross: CrossCache, rows: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """What is read, padded to `rows` rows and a multiple of `READ_STEP` states; made once as long as it stays."""
        first = cross.layers[0].keys
        if self.padded is not None and self.padded[0][0] is first and self.padded[0][1] == rows:
            found: tuple[Tensor, Tensor, list[Tensor], list[Tensor]] = self.padded[1]
            return found
        b, m = cross.states.shape[:2]
        width = -(-m // READ_STEP) * READ_STEP

        def padded(tensor: Tensor, dim: int) -> Tensor:
            shape = list(tensor.shape)
            shape[0], shape[dim] = rows, width
            whole = tensor.new_zeros(shape)
            whole[:b].narrow(dim, 0, m).copy_(tensor)
            return whole

        no = False if cross.mask.dtype == torch.bool else torch.finfo(cross.mask.dtype).min
        mask = cross.mask.new_full((rows, 1, 1, width), no)
        mask[:b, ..., :m] = cross.mask
        mask[b:] = True if mask.dtype == torch.bool else 0  # rows that see nothing at all would not be numbers
        keys = [padded(layer.keys, 2) for layer in cross.layers]
        values = [padded(layer.values, 2) for layer in cross.layers]
        made = padded(cross.states, 1), mask, keys, values
        self.padded = (first, rows), made
        return made

    def want(self, bucket: Bucket, memory: Memory) -> None:
        """Have a bucket compiled beside what goes on; or now, where `BATON_COMPILE=wait`: for measurements."""
        if bucket in self.asked or self.broken or len(self.asked) >= MOST_BUCKETS:
            return
        if bucket.rows > MOST_ROWS or bucket.tokens > MOST_TOKENS:
            return
        self.shapes = self.shapes or _Shapes.of(memory)
        self.asked.add(bucket)
        if os.environ.get("BATON_COMPILE") == "wait":
            self.compile(bucket)
            return
        self.waiting.put(bucket)
        if self.thread is None or not self.thread.is_alive():
            # A daemon: a program that is done need not wait for code that nobody will run.
            self.thread = threading.Thread(target=self._work, name="baton-compile", daemon=True)
            self.thread.start()

    def _work(self) -> None:
        while True:
            try:
                bucket = self.waiting.get(timeout=1)
            except queue.Empty:
                return
            self.compile(bucket)

    def compile(self, bucket: Bucket, memory: Memory | None = None) -> str:
        """Compile a bucket, now, or load it from the disk.

        Args:
            memory: of any prompt that was read; needed where no pass was asked for yet.
        Returns: why that cannot be; empty when it can.
        """
        self.asked.add(bucket)
        if self.shapes is None:
            assert memory is not None
            self.shapes = _Shapes.of(memory)
        with self.lock:
            if bucket in self.ready or self.broken:
                return self.broken
            # Dynamo keeps what it compiled with the code object and looks through all of it: each bucket has its own.
            own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__)
            run = torch.compile(own, fullgraph=True, dynamic=False, **_options(self.device, self.target.dtype))
            try:
                with torch.inference_mode():
                    for _ in range(ATTEMPTS):
                        try:
                            run(self.target, self.shapes.example(bucket, self.target, self.device))
                            break
                        except RuntimeError as error:  # of another thread's pass: a stance is everybody's
                            if "fail_on_recompile" not in str(error):
                                raise
                    else:
                        self.asked.discard(bucket)
                        return "passes went on all the while"
            except Exception as error:  # whatever a compiler may raise: stock layers go on
                self.broken = f"PyTorch's compiler cannot compile this model: {_line(error)}"
                _say(f"runtime compiled is not used: {self.broken}")
                return self.broken
            self.ready[bucket] = run
            return ""


class _Shapes(NamedTuple):
    """What a bucket's tensors look like besides rows, tokens and slots."""

    keys: list[tuple[int, int]]  # heads, width, per layer
    values: list[tuple[int, int]]
    read: tuple[int, list[tuple[int, int]], torch.dtype] | None  # width of states, heads and width, dtype of the mask

    @classmethod
    def of(cls, memory: Memory) -> "_Shapes":
        keys, values = (
            [(tensor.shape[1], tensor.shape[3]) for tensor in tensors if tensor is not None]
            for tensors in (memory.own.keys, memory.own.values)
        )
        cross = memory.cross
        if cross is None:
            return cls(keys, values, None)
        read = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cross.layers]
        return cls(keys, values, (cross.states.shape[2], read, cross.mask.dtype))

    def example(self, bucket: Bucket, target: Target, device: torch.device) -> Inputs:
        """A pass to trace; slots, and states that are read, are sizes that may change."""
        rows, count = bucket

        def zeros(width: int, shapes: list[tuple[int, int]]) -> list[Tensor]:
            made = [
                torch.zeros((rows, heads, width, size), dtype=target.dtype, device=device) for heads, size in shapes
            ]
            for tensor in made:
                torch._dynamo.mark_dynamic(tensor, 2)
                if device.type == "cuda":  # written to in place, and the same from pass to pass
                    torch._dynamo.mark_static_address(tensor, guard=False)
            return made

        read = None
        if self.read is not None:
            wide, shapes, kind = self.read
            states = torch.zeros((rows, READ, wide), dtype=target.dtype, device=device)
            mask = torch.zeros((rows, 1, 1, READ), dtype=torch.bool, device=device)
            mask = mask.logical_not() if kind == torch.bool else mask.to(kind)
            torch._dynamo.mark_dynamic(states, 1)
            torch._dynamo.mark_dynamic(mask, 3)
            read = states, mask, zeros(READ, shapes), zeros(READ, shapes)
        return Inputs(
            ids=torch.zeros((rows, count), dtype=torch.long, device=device),
            starts=torch.zeros(rows, dtype=torch.long, device=device),
            positions=_steps(count, device).repeat(rows, 1),
            tree=_chain(count, device).expand(rows, -1, -1).contiguous(),
            keys=zeros(SLOTS, self.keys),
            values=zeros(SLOTS, self.values),
            read=read,
        )


class Compiled(Target):
    """A family's target whose decode passes are compiled. Prompts are read by stock layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.steps = steps_of(model)
        self.captures = 0  # under way: stock layers run, whose hooks they are

    @torch.inference_mode()
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
        if begun is None and not self.captures:
            logits = self.steps.run(ids, memory, positions, tree)
            if logits is not None:
                return logits
        return super().forward(ids, memory, positions=positions, tree=tree, begun=begun)

    @contextlib.contextmanager
    def capture(self, layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
        with super().capture(layers) as found:
            self.captures += bool(layers)
            try:
                yield found
            finally:
                self.captures -= bool(layers)


@cache
def compiled(base: type[Target]) -> type[Target]:
    """The way to run a family compiled."""
    return type(f"Compiled{base.__name__}", (Compiled, base), {})


_steps_of: WeakKeyDictionary[PreTrainedModel, Steps] = WeakKeyDictionary()


def steps_of(model: PreTrainedModel) -> Steps:
    """The compiled passes of a model: all its engines share them, as long as its weights stay."""
    found = _steps_of.get(model)
    if found is None or not found.valid:
        found = _steps_of[model] = Steps(model, FAMILIES[model.config.model_type])
    return found


def make_compiled(model: PreTrainedModel) -> str:
    """Let a model run by compiled passes in our engine. Nothing in it changes; transformers' own calls stay stock.

    Returns: why it cannot; empty when it can.
    """
    family = model.config.model_type
    if family not in FAMILIES:
        return f"models of type {family!r} are not supported by Baton's engine"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled_folder())
    if reason := _why_not(model.device):
        return reason
    base = compiled(FAMILIES[family])
    try:
        base(model)
    except Exception as error:  # copying modules of unknown kinds may raise anything
        return f"it cannot be compiled: {_line(error)}"
    model.baton_runtime = Runtime("compiled", base, (model.device, model.dtype))
    return ""


def compiled_folder() -> Path:
    """Where compiled code is kept: where TORCHINDUCTOR_CACHE_DIR says, or a folder in our cache."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # The compiler writes its own choice into the variable: a folder that a restart may empty.
    return Path(chosen) if chosen and chosen != default_cache_dir() else cache_folder() / "inductor"


def _why_not(device: torch.device) -> str:
    if device.type not in ("cpu", "cuda"):
        return f"passes are compiled for the CPU and for CUDA, and the model is on {device}"
    if not torch._dynamo.is_dynamo_supported():
        return "PyTorch's compiler does not support this version of Python"
    if device.type == "cuda" and not torch.utils._triton.has_triton():
        return "Triton is not installed: pip install triton"
    compiler = os.environ.get("CXX", "").split() or ["g++"]
    if not any(shutil.which(name) for name in (compiler[0], "clang++", "c++")):
        return "there is no C++ compiler (g++ or clang++): install one, or name it in CXX"
    return ""


def _options(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Of the compiler: CUDA graphs where there is CUDA; on the CPU weights laid out once where that counts."""
    if device.type == "cuda":
        return {"mode": "reduce-overhead"}
    return {"options": {"freezing": dtype == torch.bfloat16}}


@cache
def _steps(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


@cache
def _chain(count: int, device: torch.device) -> Tensor:
    """Bool [1, n, n]: each attends to itself and to those before it."""
    return torch.ones((1, count, count), dtype=torch.bool, device=device).tril()


def _say(what: str) -> None:
    if what not in _said:
        _said.add(what)
        log.warning("%s", what)


def _line(error: Exception) -> str:
    """What is wrong, without the compiler's advice: its first line names a backend only."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
