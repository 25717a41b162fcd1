"""What is measured: anything that writes responses to a group of prompts. Ours here, others in `bench.peers`."""

from collections.abc import Sequence
from typing import Protocol

from baton.engine import Engine, generate
from baton.errors import BatonError
from baton.models.writer import Writer
from baton.types import Output, Sampling

PLAIN = "plain"
FAMILIES = ("plain", "speculative", "hand-off", "peer")  # a hand-off writes other texts; all others write plain's


class Contender(Protocol):
    """One way to write.

    Attributes:
        name: as the report shows it.
        family: one of `FAMILIES`.
        batches: whether it writes several prompts at once.
    """

    name: str
    family: str
    batches: bool

    def write(self, prompts: Sequence[str], first_index: int) -> list[Output]:
        """Responses in the order of the prompts. The clock runs meanwhile: load and convert before.

        Args:
            first_index: number of the first prompt, for random numbers.
        """


class Ours:
    """Baton's engine, with or without a drafter. Its drafter lives as long as it does."""

    batches = True

    def __init__(
        self,
        writer: Writer,
        method: str = PLAIN,
        *,
        name: str | None = None,
        family: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        max_new_tokens: int = 256,
        max_rows: int = 1,
    ) -> None:
        self.engine = Engine(writer, method, max_rows=max_rows, patience=max_rows)
        self.name, self.sampling, self.max_new_tokens = name or method, sampling, max_new_tokens
        self.family = family or ("plain" if method == PLAIN else "speculative")

    def write(self, prompts: Sequence[str], first_index: int) -> list[Output]:
        return generate(
            self.engine,
            prompts,
            sampling=self.sampling,
            max_new_tokens=self.max_new_tokens,
            truncate=True,
            first_index=first_index,
        )


def failed(prompts: Sequence[str], error: BaseException) -> list[Output]:
    """What a contender that raised has written: nothing, and why."""
    why = f"{type(error).__name__}: {error}" if not isinstance(error, BatonError) else str(error)
    return [Output(prompt=prompt, text="", token_ids=[], finish_reason="error", error=why) for prompt in prompts]
