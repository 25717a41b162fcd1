"""The feature cache: what is read back is what the LLM said, bf16-rounded, computed once whatever happens."""

import errno
import logging
import os
import pickle
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.errors import BatonError, PromptError, StorageError
from baton.handoff import features
from baton.handoff.features import COMPLETE, PROGRESS, STATES, FeatureCache, build, estimate_gib

WIDTH = 6
ROOMY = 1.0  # GiB


class Encoder:
    """H of a token depends on the token, its position and the prompt's length: any mix-up shows."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.padding = 0
        self.stop_after = stop_after  # batches

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.stop_after == 0:
            raise KeyboardInterrupt
        if self.stop_after is not None:
            self.stop_after -= 1
        assert not torch.is_grad_enabled()
        assert ids.dtype == mask.dtype == torch.int64
        assert not ids[mask == 0].any()
        self.seen += [tuple(row[row_mask.bool()].tolist()) for row, row_mask in zip(ids, mask, strict=True)]
        self.padding += int((mask == 0).sum())
        positions = torch.arange(ids.shape[1])[None].expand_as(ids)
        lengths = mask.sum(1, keepdim=True).expand_as(ids)
        H = torch.stack([ids, positions, lengths, -ids, ids * 0.1, positions / 3], dim=-1).float()
        return H.masked_fill(mask[..., None] == 0, float("nan"))  # padding must not get into the cache


def expected(prompt: Sequence[int]) -> Tensor:
    ids = torch.tensor([list(prompt)])
    with torch.no_grad():
        return Encoder()(ids, torch.ones_like(ids))[0].bfloat16()


def random_prompts(count: int = 100, longest: int = 9) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(1, 200) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def make(folder: Path, prompts: list[list[int]], encode: Any, **changes: Any) -> FeatureCache | None:
    options = {"width": WIDTH, "key": "llm", "cache_gb": ROOMY, "batch_size": 8} | changes
    return build(folder, prompts, encode, **options)


def check(cache: FeatureCache | None, prompts: list[list[int]]) -> None:
    assert cache is not None
    assert len(cache) == len(prompts)
    for states, prompt in zip(cache, prompts, strict=True):
        assert states.dtype == torch.bfloat16
        assert torch.equal(states, expected(prompt))


def test_states_are_the_encoders(tmp_path: Path) -> None:
    """Each example gets its own prompt's states, in the order given; each distinct prompt is computed once."""
    prompts = random_prompts()
    prompts += prompts[::-1]
    encode = Encoder()
    cache = make(tmp_path, prompts, encode)
    check(cache, prompts)
    assert sorted(encode.seen) == sorted(set(map(tuple, prompts)))
    tokens = sum(map(len, encode.seen))
    assert encode.padding < 0.1 * tokens  # short and long prompts do not share a batch
    assert cache.path.stat().st_size == tokens * WIDTH * 2
    assert estimate_gib(prompts, WIDTH) == tokens * WIDTH * 2 / 2**30


def test_states_lie_in_the_file(tmp_path: Path) -> None:
    """Reading copies nothing: two reads are the same memory, and equal prompts share it."""
    cache = make(tmp_path, [[1, 2, 3], [4], [1, 2, 3]], Encoder())
    assert cache[0].data_ptr() == cache[0].data_ptr() == cache[2].data_ptr() != cache[1].data_ptr()
    assert torch.equal(cache[-1], cache[2])
    with pytest.raises(IndexError):
        cache[3]


def test_a_second_call_computes_nothing(tmp_path: Path) -> None:
    prompts = random_prompts()
    make(tmp_path, prompts, Encoder())
    encode = Encoder()
    check(make(tmp_path, prompts, encode), prompts)
    check(make(tmp_path, prompts[::-1] + prompts, encode, cache_gb=0, batch_size=3), prompts[::-1] + prompts)
    assert encode.seen == []


@pytest.mark.parametrize("change", ["key", "prompts", "tokens"])
def test_another_model_or_other_prompts_get_their_own(tmp_path: Path, change: str) -> None:
    """Also where the same tokens are cut into prompts elsewhere."""
    first = make(tmp_path, [[1, 2], [3]], Encoder())
    prompts = {"key": [[1, 2], [3]], "prompts": [[1], [2, 3]], "tokens": [[1, 2], [4]]}[change]
    encode = Encoder()
    second = make(tmp_path, prompts, encode, key="other" if change == "key" else "llm")
    assert len(encode.seen) == 2
    check(second, prompts)
    check(first, [[1, 2], [3]])


def test_progress(tmp_path: Path) -> None:
    """Counts distinct prompts, from those an earlier run finished."""
    prompts = [[i] for i in range(1, 21)]
    calls: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, prompts + prompts, Encoder(stop_after=1), on_progress=lambda *call: calls.append(call))
    assert calls == [(0, 20), (8, 20)]
    calls.clear()
    make(tmp_path, prompts + prompts, Encoder(), on_progress=lambda *call: calls.append(call))
    assert calls == [(8, 20), (16, 20), (20, 20)]


def test_the_estimate_comes_before_the_work(tmp_path: Path, caplog) -> None:
    prompts = [[1] * 1000]
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        build(tmp_path, prompts, Encoder(stop_after=0), width=2**20, key="", cache_gb=2)
    assert "1.95 GiB for 1 prompts" in caplog.text


def test_pickled_for_workers(tmp_path: Path) -> None:
    """By path: a copy of the states would be as large as the file."""
    prompts = random_prompts(500)
    cache = make(tmp_path, prompts, Encoder())
    pickled = pickle.dumps(cache)
    assert len(pickled) < cache.path.stat().st_size
    check(pickle.loads(pickled), prompts)


# --- a run that was cut short ----------------------------------------------------------------------------------------


def interrupted(folder: Path, prompts: list[list[int]], batches: int) -> tuple[Path, Encoder]:
    """The folder of a cache whose making was stopped after some batches of 8, and the encoder used."""
    encode = Encoder(stop_after=batches)
    with pytest.raises(KeyboardInterrupt):
        make(folder, prompts, encode)
    return next(folder.glob("*/" + STATES)).parent, encode


def resumed(folder: Path, prompts: list[list[int]]) -> int:
    """Prompts that a second call computes; its cache is checked."""
    encode = Encoder()
    check(make(folder, prompts, encode), prompts)
    return len(encode.seen)


PROMPTS = [[i, 1, i] for i in range(1, 41)]  # all of three tokens: a batch of 8 is 8 * 3 * WIDTH * 2 bytes
BATCH = 8 * 3 * WIDTH * 2


def test_finished_batches_are_not_computed_again(tmp_path: Path) -> None:
    _, before = interrupted(tmp_path, PROMPTS, 3)
    encode = Encoder()
    check(make(tmp_path, PROMPTS, encode, batch_size=5), PROMPTS)
    assert (len(before.seen), len(encode.seen)) == (24, 16)
    assert not set(before.seen) & set(encode.seen)


@pytest.mark.parametrize(
    ("size", "todo"),
    [(3 * BATCH + 7, 16), (3 * BATCH, 16), (3 * BATCH - 1, 24), (2 * BATCH, 24), (BATCH // 2, 40), (0, 40)],
)
def test_states_cut_anywhere(tmp_path: Path, size: int, todo: int) -> None:
    """A kill in the middle of a write, or a power cut that lost more than that."""
    own, _ = interrupted(tmp_path, PROMPTS, 3)
    with (own / STATES).open("r+b") as file:
        file.truncate(size)
    assert resumed(tmp_path, PROMPTS) == todo


@pytest.mark.parametrize("kept", range(0, 40, 3))
def test_progress_cut_anywhere(tmp_path: Path, kept: int) -> None:
    own, _ = interrupted(tmp_path, PROMPTS, 3)
    whole = (own / PROGRESS).read_bytes()
    (own / PROGRESS).write_bytes(whole[:kept])
    assert resumed(tmp_path, PROMPTS) == 40 - 8 * whole[:kept].count(b"\n")


@pytest.mark.parametrize("nonsense", [b"\0\0\0\n", b"8\n", b"0 0\n", b"9999 5\n", b"32 5\n", b"x y\n", b"\xff \xfe\n"])
def test_nonsense_in_progress(tmp_path: Path, nonsense: bytes) -> None:
    own, _ = interrupted(tmp_path, PROMPTS, 3)
    with (own / PROGRESS).open("ab") as file:
        file.write(nonsense)
    assert resumed(tmp_path, PROMPTS) == 16


def test_progress_ahead_of_the_states(tmp_path: Path) -> None:
    """After a power cut the file may have its size but not its content."""
    own, _ = interrupted(tmp_path, PROMPTS, 3)
    with (own / STATES).open("r+b") as file:
        file.seek(2 * BATCH + 10)
        file.write(b"\xee\xee")
    assert resumed(tmp_path, PROMPTS) == 24


def test_a_finished_cache_that_was_cut(tmp_path: Path) -> None:
    cache = make(tmp_path, PROMPTS, Encoder())
    path = cache.path
    del cache  # a mapped file cannot be cut everywhere
    assert (path.parent / COMPLETE).exists() and not (path.parent / PROGRESS).exists()
    with path.open("r+b") as file:
        file.truncate(10)
    assert resumed(tmp_path, PROMPTS) == 40
    path.unlink()
    assert resumed(tmp_path, PROMPTS) == 40


def test_stopped_between_the_last_batch_and_the_mark(tmp_path: Path, monkeypatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(features, "atomic_write", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, PROMPTS, Encoder())
    assert resumed(tmp_path, PROMPTS) == 0


# --- room ------------------------------------------------------------------------------------------------------------


def test_over_the_limit(tmp_path: Path, caplog) -> None:
    """None and one warning; nothing is computed or written."""
    encode = Encoder()
    need = estimate_gib(PROMPTS, WIDTH)
    assert make(tmp_path, PROMPTS, encode, cache_gb=need * 0.99) is None
    assert encode.seen == []
    assert list(tmp_path.glob("*/*")) == []
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "recomputing H each step" in record.message and "--cache-gb" in record.message
    check(make(tmp_path, PROMPTS, encode, cache_gb=need), PROMPTS)


def test_the_limit_is_for_all_caches_of_the_folder(tmp_path: Path, caplog) -> None:
    need = estimate_gib(PROMPTS, WIDTH)
    make(tmp_path, PROMPTS, Encoder(), cache_gb=need)
    assert make(tmp_path, PROMPTS, Encoder(), cache_gb=need * 1.99, key="other") is None
    assert f"of other caches in {tmp_path}" in caplog.text
    check(make(tmp_path, PROMPTS, Encoder(), cache_gb=need * 2, key="other"), PROMPTS)


def test_too_little_disk(tmp_path: Path, monkeypatch, caplog) -> None:
    """What an earlier run has already written needs no more room, and some is left for checkpoints."""
    interrupted(tmp_path, PROMPTS, 4)
    for free, fits in ((BATCH - 1, False), (BATCH, True)):
        usage = SimpleNamespace(free=features.RESERVE + free)
        monkeypatch.setattr(features.shutil, "disk_usage", lambda _, usage=usage: usage)
        assert (make(tmp_path, PROMPTS, Encoder()) is not None) is fits
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "has room for 0.00: recomputing H each step" in caplog.text


def test_a_disk_that_fills_meanwhile(tmp_path: Path, monkeypatch) -> None:
    """A clear error; the next run continues after the last finished batch."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(features.os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space left.*free some space.*finished batches are kept"):
            make(tmp_path, PROMPTS, Encoder())
    assert resumed(tmp_path, PROMPTS) == 0


# --- what cannot be cached -------------------------------------------------------------------------------------------


def test_faults(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="prompt 1 has no tokens"):
        make(tmp_path, [[1], []], Encoder())
    with pytest.raises(BatonError, match=r"shape \(1, 1, 6\), expected \(1, 1, 7\)"):
        make(tmp_path, [[1]], Encoder(), width=7)
    with pytest.raises(BatonError, match="not finite"):
        make(tmp_path, [[1]], lambda ids, mask: torch.full((1, 1, WIDTH), float("inf"), dtype=torch.float16))


def test_no_prompts(tmp_path: Path) -> None:
    assert len(make(tmp_path, [], Encoder())) == 0


# --- several callers -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="no lock between processes there")
def test_two_at_the_same_time_compute_once(tmp_path: Path) -> None:
    """One computes, the other waits and reads. Threads here: the lock is the same as between processes."""
    encoders = [Encoder(), Encoder()]

    def work(encode: Encoder) -> None:
        check(make(tmp_path, PROMPTS, lambda *batch: (time.sleep(0.01), encode(*batch))[1]), PROMPTS)

    with ThreadPoolExecutor() as pool:
        list(pool.map(work, encoders))
    assert sorted(len(encode.seen) for encode in encoders) == [0, 40]
