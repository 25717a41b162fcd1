"""Keys and values of rows that grow, shrink, fork and leave independently of each other.

One tensor [keys and values, layers, rows, kv_heads, slots, head_dim], allocated ahead: rows by powers of two, slots in
buckets; what moves, moves in all layers at once. The rows in use are always the first ones, and the used slots of a row
the first `lengths[row]` ones, so slot = position, whatever the neighbours do. Rows join behind the last; a row that
leaves costs one copy, of the row that takes its place.

A forward is announced with `append`, then stock modeling code calls `update` once per layer and gets back the used
slots only; afterwards `keep` or `truncate` drops what was not accepted. Transformers sees an ordinary `Cache`.
Forwards run under `torch.inference_mode`: a cache that was filled there cannot be written to outside of it.
"""

import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from baton.inference import inference

BUCKET = 64  # slots are allocated in multiples of this


class RowCache(Cache):
    """Self-attention keys and values.

    Args:
        num_layers: layers that will call `update`.
        rows: rows to start with, all empty.
        capacity: slots to allocate at first; it grows when needed.
    """

    def __init__(self, num_layers: int, rows: int, capacity: int = BUCKET) -> None:
        super().__init__(layers=[_Layer(self) for _ in range(num_layers)])
        self.all: Tensor | None = None  # allocated by the first update: shapes are known then
        self.keys: list[Tensor | None] = [None] * num_layers  # views of it, [rows, kv_heads, slots, head_dim]
        self.values: list[Tensor | None] = [None] * num_layers
        self.capacity = _bucket(capacity)  # slots allocated per row
        self.lengths = [0] * rows  # slots used, per row
        self.starts = [0] * rows  # slots used before the latest append, per row
        self.count = 0  # slots of the latest append, per row
        self.width = 0  # slots that the forward under way attends over: the longest row
        self._first = 0  # first new slot, where it is the same in all rows
        self._index: tuple[Tensor, Tensor] | None = None  # int64 [rows, 1] and new slots, [rows, count], where not

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def even(self) -> bool:
        """All rows were equally long before the latest append: no slot in use needs a mask."""
        return self._index is None

    def starts_on(self, device: torch.device) -> Tensor:
        """`starts` as int64 [rows, 1]."""
        return torch.tensor(self.starts, device=device)[:, None]

    def append(self, count: int, device: torch.device | None = None) -> None:
        """Add `count` slots to every row; the next forward fills them."""
        starts = self.lengths
        first, longest = min(starts), max(starts)
        self.starts, self.count, self._first = starts, count, first
        self.lengths = [length + count for length in starts]
        self.width = longest + count
        if self.width > self.capacity:
            self._grow(self.width)
        self._index = None
        if first != longest:
            slots = torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)
            self._index = torch.arange(self.rows, device=device)[:, None], slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the slots announced by `append`; called by stock attention code.

        Args:
            key_states, value_states: [rows, kv_heads, count, head_dim].
        Returns: keys and values of all slots in use, views [rows, kv_heads, width, head_dim]. Shorter rows hold
            leftovers past their length: the mask must cover them.
        """
        keys, values = self.storage(layer_idx, key_states)
        if keys.shape[0] != self.rows:
            keys, values = keys.narrow(0, 0, self.rows), values.narrow(0, 0, self.rows)
        if self._index is None:
            keys.narrow(2, self._first, self.count).copy_(key_states)
            values.narrow(2, self._first, self.count).copy_(value_states)
        else:
            rows, slots = self._index  # scatter_ would take up to a hundred times as long in bfloat16
            keys[rows, :, slots] = key_states.transpose(1, 2)
            values[rows, :, slots] = value_states.transpose(1, 2)
        return keys.narrow(2, 0, self.width), values.narrow(2, 0, self.width)

    def storage(self, layer_idx: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [allocated rows, kv_heads, capacity, head_dim], for those who write them alone.

        Args:
            like: of the same heads, head_dim, dtype and device: [_, kv_heads, _, head_dim].
        Raises: ValueError when they are not those of the other layers.
        """
        if self.all is None:
            # Zeros, not empty: a masked slot has weight 0, and 0 times an uninitialised infinity is not a number.
            sizes = (2, len(self.keys), self.rows, like.shape[1], self.capacity, like.shape[3])
            self._hold(like.new_zeros(sizes))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        assert keys is not None and values is not None
        if keys.shape[1::2] != like.shape[1::2]:
            raise ValueError(f"layer {layer_idx} has keys of another shape than the first: {tuple(like.shape)}")
        return keys, values

    def reserve(self, rows: int, slots: int) -> None:
        """Have at least so many rows and slots allocated in every layer that was filled."""
        if slots > self.capacity:
            self._grow(slots)
        self._size(rows)

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget all slots of each row from `lengths[row]` on."""
        if len(lengths) != self.rows or any(not 0 <= n <= used for n, used in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot truncate rows of {self.lengths} slots to {list(lengths)}")
        self.lengths = list(lengths)

    @inference
    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep one path of the slots of the latest `append` in each row, moved together, and forget the others.

        Args:
            paths: per row, rising indices into the appended slots: [0, 2, 5] keeps the first, third and sixth.
        """
        if len(paths) != self.rows:
            raise ValueError(f"{len(paths)} paths for {self.rows} rows")
        moves: list[tuple[int, int, int]] = []  # row, from, to
        for row, (path, start) in enumerate(zip(paths, self.starts, strict=True)):
            before = -1
            for place, step in enumerate(path):
                if not before < step < self.count:
                    raise ValueError(f"a path must rise within 0..{self.count - 1}: {list(path)}")
                if step != place:
                    moves.append((row, start + step, start + place))
                before = step
        if moves:
            rows, source, target = torch.tensor(moves, device=self._all.device).unbind(1)
            self._all[:, :, rows, :, target] = self._all[:, :, rows, :, source]
        self.lengths = [start + len(path) for start, path in zip(self.starts, paths, strict=True)]

    @inference
    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order. A row named twice is copied, one not named leaves.

        Cheap where rows that stay keep their place and holes are filled with later rows: `fill_holes` gives that order.
        """
        index = list(rows)
        used = max((self.lengths[row] for row in index), default=0)
        in_place = len(index) <= self.rows and all(row == place or row >= len(index) for place, row in enumerate(index))
        if in_place:
            for place, row in enumerate(index):
                if place != row and self.all is not None:
                    self.all[:, :, place, :, :used].copy_(self.all[:, :, row, :, :used])
        elif self.all is not None:
            self._hold(self.all[:, :, index])
        self.lengths = [self.lengths[row] for row in index]
        self.starts = [self.starts[row] for row in index]

    @inference
    def clear(self, row: int) -> None:
        """Zero a row that holds something that is not a number: its slots will be another row's, behind its length."""
        self._all[:, :, row].zero_()

    def fork(self, row: int) -> None:
        """Append a copy of a row, which then lives its own life."""
        self.select([*range(self.rows), row])

    @inference
    def join(self, other: "RowCache") -> None:
        """Take the rows of another cache of the same model in, behind the last; the other must not be used any more."""
        rows, used = self.rows, max(other.lengths, default=0)
        grown = rows + other.rows
        self.capacity = max(self.capacity, _bucket(used))
        self._size(grown)
        self._all[:, :, rows:grown, :, :used].copy_(other._all[:, :, : other.rows, :, :used])
        self.lengths = self.lengths + other.lengths
        self.starts = self.starts + other.starts

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots before the forward under way; of the first row, where rows differ. Called by stock code."""
        return self.starts[0] if self.starts else 0

    @property
    def _all(self) -> Tensor:
        if self.all is None:
            raise ValueError("no forward has filled this cache yet")
        return self.all

    def _hold(self, tensor: Tensor) -> None:
        self.all = tensor
        self.keys, self.values = list(tensor[0].unbind()), list(tensor[1].unbind())

    def _grow(self, slots: int) -> None:
        self.capacity = _bucket(max(slots, self.capacity + self.capacity // 2))
        self._size(self.rows)

    def _size(self, rows: int) -> None:
        """Have room for so many rows, and for `capacity` slots."""
        old = self.all
        if old is None or (old.shape[2] >= rows and old.shape[4] >= self.capacity):
            return
        more = max(old.shape[2], 1 << (rows - 1).bit_length())
        new = old.new_zeros((*old.shape[:2], more, old.shape[3], max(old.shape[4], self.capacity), old.shape[5]))
        new[:, :, : old.shape[2], :, : old.shape[4]].copy_(old)
        self._hold(new)


def fill_holes(rows: int, leaving: Collection[int]) -> list[int]:
    """The order in which to `select` the rows that stay so that as few as possible move."""
    stay = rows - len(set(leaving))
    behind = (row for row in range(stay, rows) if row not in leaving)
    return [row if row not in leaving else next(behind) for row in range(stay)]


class _Layer(CacheLayerMixin):
    """One layer as transformers sees it when it builds masks."""

    is_sliding = False
    is_croppable = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self.cache = weakref.proxy(cache)  # a cycle would hold the memory until the garbage collector runs
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The cache allocates."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("call RowCache.update")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.cache.width), 0

    def get_seq_length(self) -> int:
        return int(self.cache.get_seq_length())

    def get_max_length(self) -> int:
        return -1


def _bucket(slots: int) -> int:
    return -(-slots // BUCKET) * BUCKET
