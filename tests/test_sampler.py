"""The order of training examples: each once, similar lengths together, the same for any number of processes."""

import random
from collections import Counter

import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader

from baton.train.sampler import LengthBucketSampler


def lengths(count: int, seed: int = 0) -> list[tuple[int, int]]:
    rng = random.Random(seed)
    return [(rng.randint(1, 60), rng.randint(1, 60)) for _ in range(count)]


def batches(sampler: LengthBucketSampler) -> list[list[int]]:
    return list(BatchSampler(sampler, sampler.batch_size, drop_last=False))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 333, 1024])
def test_whole_batches_of_different_examples(count: int) -> None:
    """No example twice in an epoch; as many as fill whole batches, others left out each epoch."""
    sampler = LengthBucketSampler(lengths(count), 8, megabatch=4)
    whole = count - count % 8
    assert len(sampler) == len(list(sampler)) == len(set(sampler)) == whole
    assert set(sampler) <= set(range(count))
    seen = set()
    for epoch in range(40):
        sampler.set_epoch(epoch)
        seen |= set(sampler)
    assert len(seen) == (count if whole else 0)


def test_padding_is_small() -> None:
    """A batch spans a small part of the lengths."""
    known = lengths(4099)
    whole = batches(LengthBucketSampler(known, 8))
    assert [len(batch) for batch in whole] == [8] * 512
    for batch in whole:
        assert max(known[i][0] for i in batch) - min(known[i][0] for i in batch) <= 10
    slots = sum(len(batch) * max(known[i][0] for i in batch) for batch in whole)
    used = sum(known[i][0] for batch in whole for i in batch)
    assert slots < 1.05 * used  # in random order: 1.75


def test_ties_go_by_the_second_length() -> None:
    known = [(5, i % 4) for i in range(64)]
    for batch in batches(LengthBucketSampler(known, 16)):
        assert len({known[i][1] for i in batch}) == 1


def test_long_and_short_batches_are_mixed() -> None:
    """Sorted inside, shuffled outside: the mean length of the first half of an epoch is that of the second."""
    known = lengths(4096)
    order = list(LengthBucketSampler(known, 8))
    first, second = (sum(known[i][0] for i in half) / 2048 for half in (order[:2048], order[2048:]))
    assert abs(first - second) < 3
    means = [sum(known[i][0] for i in order[k : k + 8]) / 8 for k in range(0, 4096, 8)]
    assert means != sorted(means)


def test_a_new_order_each_epoch_and_the_same_for_a_seed() -> None:
    known = lengths(500)
    sampler = LengthBucketSampler(known, 8, seed=1)
    first = list(sampler)
    assert list(sampler) == first == list(LengthBucketSampler(known, 8, seed=1))
    assert list(LengthBucketSampler(known, 8, seed=2)) != first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    chunks = [{frozenset(order[k : k + 8]) for k in range(0, 496, 8)} for order in (first, second)]
    assert not chunks[0] & chunks[1]  # not the same batches in another order either
    again = LengthBucketSampler(known, 8, seed=1)
    again.set_epoch(1)
    assert list(again) == second


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (2, 2), (4, 1), (1, 4)])
def test_processes_share_each_step(processes: int, accumulate: int) -> None:
    """Step by step, all processes together see the examples that one process with the whole batch sees."""
    sampler = LengthBucketSampler(lengths(203), 16)
    micro = 16 // processes // accumulate
    shares = []
    for index in range(processes):
        loader = DataLoader(range(203), batch_size=micro, sampler=sampler, drop_last=True)
        shard = prepare_data_loader(loader, num_processes=processes, process_index=index, put_on_device=False)
        shares.append([batch.tolist() for batch in shard])
    alone = [batch for batch in batches(sampler) if len(batch) == 16]
    assert len(alone) == 12
    for step, batch in enumerate(alone):
        together = [i for share in shares for part in share[step * accumulate : (step + 1) * accumulate] for i in part]
        assert Counter(together) == Counter(batch)
