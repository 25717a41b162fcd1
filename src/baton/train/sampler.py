"""Length-bucketed order: neighbours in a batch have about the same length, so little is spent on padding."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler


class LengthBucketSampler(Sampler[int]):
    """Example indices such that each run of `batch_size` has similar lengths, in an order new each epoch.

    Only whole batches: what does not fill one is left out, other examples each epoch.

    The order depends on the *global* batch size only, so two processes with half the batch each see, step by step,
    the same examples as one process with the whole batch.

    Args:
        lengths: sort key per example; tuples work (response length, then prompt length).
        batch_size: examples per optimizer step over all processes.
        seed: with the epoch, the only source of order.
        megabatch: batches sorted together; larger means less padding and less mixing.
    """

    def __init__(self, lengths: Sequence, batch_size: int, *, seed: int = 0, megabatch: int = 40) -> None:
        self.lengths, self.batch_size, self.seed, self.megabatch = lengths, batch_size, seed, megabatch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) - len(self.lengths) % self.batch_size

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}:{self.epoch}")
        indices = list(range(len(self.lengths)))
        rng.shuffle(indices)
        indices = indices[: len(self)]
        batches = []
        for start in range(0, len(indices), self.batch_size * self.megabatch):
            chunk = sorted(indices[start : start + self.batch_size * self.megabatch], key=self.lengths.__getitem__)
            batches += [chunk[i : i + self.batch_size] for i in range(0, len(chunk), self.batch_size)]
        rng.shuffle(batches)
        return iter([i for batch in batches for i in batch])
