"""All that a target remembers of the rows it is writing."""

from collections.abc import Sequence

from transformers import Cache, EncoderDecoderCache

from baton.cache.cross import CrossCache
from baton.cache.rows import RowCache


class Memory:
    """Self-attention keys and values, and for encoder-decoders those over the encoder's states.

    `keep` and `truncate` concern response tokens only; `select`, `join` and `fork` concern whole rows.
    """

    def __init__(self, own: RowCache, cross: CrossCache | None = None) -> None:
        self.own = own
        self.cross = cross
        # What stock modeling code is given as `past_key_values`.
        self.past: Cache = own if cross is None else EncoderDecoderCache(own, cross)

    @property
    def lengths(self) -> list[int]:
        """Slots used, per row."""
        return self.own.lengths

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        self.own.keep(paths)

    def truncate(self, lengths: Sequence[int]) -> None:
        self.own.truncate(lengths)

    def clear(self, row: int) -> None:
        self.own.clear(row)

    def select(self, rows: Sequence[int]) -> None:
        self.own.select(rows)
        if self.cross is not None:
            self.cross.select(rows)

    def join(self, other: "Memory") -> None:
        """Take the rows of another memory of the same model in, behind the last; the other is used up."""
        self.own.join(other.own)
        if self.cross is not None and other.cross is not None:
            self.cross.join(other.cross)

    def fork(self, row: int) -> None:
        self.select([*range(self.own.rows), row])
