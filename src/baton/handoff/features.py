"""The feature cache: the LLM's hidden states H of each prompt, computed once and kept on disk.

H depends on the prompt only (the LLM is frozen and never sees the response), so one pass serves all epochs. States
lie in one bf16 file, mapped into memory: what the page cache holds costs no reading, and processes share it.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baton.data.storage import atomic_write, storage_errors
from baton.errors import BatonError, PromptError

log = logging.getLogger(__name__)

Encode = Callable[[Tensor, Tensor], Tensor]

BYTES = 2  # of a bf16 number
GIB = 2**30
RESERVE = GIB // 4  # bytes of disk left free: checkpoints need room as well
STATES, PROGRESS, COMPLETE = "states.bf16", "progress.txt", "complete.json"


class FeatureCache:
    """H of each example's prompt. Made by `build`; picklable, for the workers of a data loader.

    Args:
        path: file of bf16 rows [tokens, width], prompt after prompt.
        offsets: int64 [prompts + 1], first row of each stored prompt.
        slots: int64 [examples], the stored prompt of each example.
        width: numbers per token.
    """

    def __init__(self, path: Path, offsets: np.ndarray, slots: np.ndarray, width: int) -> None:
        self.path, self.offsets, self.slots, self.width = path, offsets, slots, width
        self._states = _mapped(path, int(offsets[-1]), width)

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, index: int) -> Tensor:
        """bfloat16 [m, width], m tokens. A view of the file itself: read only, writing to it is a crash."""
        slot = self.slots[index]
        return self._states[int(self.offsets[slot]) : int(self.offsets[slot + 1])]

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureCache, (self.path, self.offsets, self.slots, self.width)  # map again, do not copy


def estimate_gib(prompts_ids: Sequence[Sequence[int]], width: int) -> float:
    """Room that a cache of these prompts takes, GiB: bf16, each distinct prompt once."""
    return sum(map(len, set(map(tuple, prompts_ids)))) * width * BYTES / GIB


def build(
    folder: str | Path,
    prompts_ids: Sequence[list[int]],
    encode: Encode,
    width: int,
    key: str,
    cache_gb: float,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> FeatureCache | None:
    """The cache of these prompts: from disk if it is there, finished if a kill cut it short, computed otherwise.

    Where several processes call this at the same time, one computes and the others wait.

    Args:
        folder: holds caches, each in a folder of its own named after `key`, `width` and prompts.
        prompts_ids: token ids of each example's prompt; equal ones are computed and stored once.
        encode: (ids, mask), int64 [b, m] on the CPU, right-padded with 0, to H [b, m, width] of any dtype and device;
            called without gradients, on prompts of similar length.
        width: numbers per token: the LLM's width, times the layers for a mix.
        key: names all else that H depends on: the LLM's fingerprint, the layers read.
        cache_gb: most GiB that all caches in `folder` may take together.
        on_progress: called with (prompts done, prompts), distinct ones, at the start and after each batch.
    Returns: None, and one logged warning, when there is too little room: H is then to be recomputed at each step.
    Raises:
        PromptError: a prompt has no tokens.
        BatonError: H is not finite, or has another shape.
        StorageError: the disk became full meanwhile; finished batches are kept and the next call continues.
    """
    prompts, slots = _distinct(prompts_ids)
    offsets = np.concatenate([[0], np.cumsum([len(p) for p in prompts], dtype=np.int64)])
    root = Path(folder)
    own = root / _name(key, width, prompts)
    size = int(offsets[-1]) * width * BYTES
    with storage_errors(own, "finished batches are kept"):
        root.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(root):
            if not _is_complete(own, size):
                if problem := _too_little_room(root, own, size, cache_gb):
                    log.warning(
                        "the LLM's states would take %.2f GiB, %s: recomputing H each step", size / GIB, problem
                    )
                    return None
                log.info("caching the LLM's states: %.2f GiB for %d prompts in %s", size / GIB, len(prompts), own)
                own.mkdir(exist_ok=True)
                _fill(own, prompts, offsets, encode, width, batch_size, on_progress)
                about = {"key": key, "width": width, "prompts": len(prompts), "tokens": int(offsets[-1])}
                with atomic_write(own / COMPLETE) as file:
                    json.dump(about, file, indent=1)
                (own / PROGRESS).unlink()
    return FeatureCache(own / STATES, offsets, slots, width)


def _distinct(prompts_ids: Sequence[list[int]]) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Distinct prompts, short to long so that batches need little padding, and the place of each example's."""
    rows = [tuple(ids) for ids in prompts_ids]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise PromptError(f"prompt {empty[0]} has no tokens")
    prompts = sorted(set(rows), key=lambda row: (len(row), row))
    place = {row: i for i, row in enumerate(prompts)}
    return prompts, np.array([place[row] for row in rows], dtype=np.int64)


def _name(key: str, width: int, prompts: list[tuple[int, ...]]) -> str:
    digest = hashlib.sha256(f"{key}\n{width}\n".encode())
    for prompt in prompts:
        digest.update(np.array([len(prompt), *prompt], dtype="<i8").tobytes())
    return digest.hexdigest()[:20]


def _is_complete(own: Path, size: int) -> bool:
    if not (own / COMPLETE).exists():
        return False
    if (own / STATES).exists() and (own / STATES).stat().st_size == size:
        return True
    (own / COMPLETE).unlink()  # someone cut the file
    return False


def _too_little_room(root: Path, own: Path, size: int, cache_gb: float) -> str | None:
    """Why a cache of `size` bytes cannot be made, or None."""
    stored = {path: path.stat().st_size for path in root.glob(f"*/{STATES}")}
    begun = stored.pop(own / STATES, 0)
    others = sum(stored.values())
    if size + others > cache_gb * GIB:
        beside = f" beside {others / GIB:.2f} GiB of other caches in {root}" if others else ""
        return f"more than --cache-gb {cache_gb:g} allows{beside}"
    free = shutil.disk_usage(root).free - RESERVE
    if size - begun > free:
        return f"and {root} has room for {max(free, 0) / GIB:.2f}"
    return None


def _fill(
    own: Path,
    prompts: list[tuple[int, ...]],
    offsets: np.ndarray,
    encode: Encode,
    width: int,
    batch_size: int,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Compute what is missing. `PROGRESS` gets a line per finished batch: prompts done so far, CRC of its rows."""
    done, log_end = _verified(own, offsets, width)
    with (own / STATES).open("ab", buffering=0) as states, (own / PROGRESS).open("ab", buffering=0) as progress:
        states.truncate(int(offsets[done]) * width * BYTES)
        progress.truncate(log_end)
        if on_progress:
            on_progress(done, len(prompts))
        while done < len(prompts):
            batch = prompts[done : done + batch_size]
            data = _encoded(batch, encode, width)
            rest = memoryview(data)
            while rest:  # a write may be partial
                rest = rest[states.write(rest) :]
            done += len(batch)
            progress.write(f"{done} {zlib.crc32(data)}\n".encode())
            if on_progress:
                on_progress(done, len(prompts))
        os.fsync(states.fileno())


def _verified(own: Path, offsets: np.ndarray, width: int) -> tuple[int, int]:
    """Prompts whose rows are on disk as they were computed, and the bytes of the progress file that say so.

    Checked, not believed: after a power cut the two files need not be equally far.
    """
    done = log_end = 0
    if not (own / STATES).exists() or not (own / PROGRESS).exists():
        return 0, 0
    with (own / STATES).open("rb") as states, (own / PROGRESS).open("rb") as progress:
        for line in progress:
            fields = line.split()
            if not line.endswith(b"\n") or len(fields) != 2 or not all(f.isdigit() for f in fields):
                break
            count, crc = map(int, fields)
            if not done < count < len(offsets):
                break
            size = int(offsets[count] - offsets[done]) * width * BYTES
            data = states.read(size)
            if len(data) != size or zlib.crc32(data) != crc:
                break
            done, log_end = count, log_end + len(line)
    return done, log_end


@torch.no_grad()
def _encoded(batch: list[tuple[int, ...]], encode: Encode, width: int) -> bytes:
    """H of a batch, prompt after prompt without padding, as bf16 bytes."""
    longest = max(map(len, batch))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
    H = encode(ids, mask)
    if H.shape != (*ids.shape, width):
        raise BatonError(f"the LLM's states have shape {tuple(H.shape)}, expected {(*ids.shape, width)}")
    rows = H.to("cpu")[mask.bool()].to(torch.bfloat16)  # [tokens, width]
    if not rows.isfinite().all():
        raise BatonError("the LLM's states are not finite: load it in bfloat16 or float32")
    return rows.view(torch.int16).numpy().tobytes()


def _mapped(path: Path, rows: int, width: int) -> Tensor:
    """bfloat16 [rows, width], on disk."""
    if not rows:
        return torch.empty(0, width, dtype=torch.bfloat16)
    # Read only: a private writable map counts in full against the memory that the system may promise.
    states = np.memmap(path, dtype=np.int16, mode="r", shape=(rows, width))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        return torch.from_numpy(states).view(torch.bfloat16)


@contextlib.contextmanager
def _one_at_a_time(root: Path) -> Iterator[None]:
    """Wait for other processes in this block. The system ends the lock of a killed process."""
    try:
        import fcntl
    except ImportError:  # Windows: processes started together are not told apart there
        yield
        return
    with (root / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
