"""What the engine asks of a drafter. A method implements `propose`; the rest is for those that remember."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from baton.cache import Memory
from baton.draft import NOTHING, Draft
from baton.engine.request import Request
from baton.errors import UnknownOption
from baton.models.writer import PromptInputs
from baton.verify import Verdict

if TYPE_CHECKING:
    from baton.engine.loop import Engine


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Requests whose prompts the target has just read."""

    requests: Sequence[Request]  # each with its first token
    inputs: PromptInputs  # what was read: ids or embeddings, [b, m]
    memory: Memory  # the target's, of these rows only; for an encoder-decoder it holds the encoder's states
    hidden: dict[int, Tensor]  # layer -> [b, m, d] of the layers that the drafter wants


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One pass of the target over drafts, and what was kept of them."""

    requests: Sequence[Request]  # before the new tokens are appended
    drafts: Sequence[Draft]  # as verified: another method may have added nodes to what was proposed
    verdicts: Sequence[Verdict | None]  # None: the row has failed
    logits: Tensor  # [b, n + 1, V], of the root and each node, padded, in the model's dtype; -inf for banned tokens
    hidden: dict[int, Tensor]  # layer -> [b, n + 1, d] of the layers that the drafter wants


class Begun(NamedTuple):
    """What the target's first layers gave, of each row's newest token and its draft, whose slots they have filled."""

    layers: int
    hidden: Tensor  # [b, n + 1, d], padded as the drafts are


class Drafter:
    """Proposes tokens for rows. The base class proposes nothing: plain decoding.

    Rows have an order, the engine's. A drafter with rows of its own (a model with a cache) follows `join` and `select`;
    one that remembers by request may use the requests themselves as keys. Whatever it proposes, the text is the
    target's; a drafter decides about speed only.

    Attributes:
        name: as users say it, and as provenance shows it.
        layers: target layers whose outputs it wants to see; 0 is the embeddings. A drafter that governs another may let
            it go without.
        begun: the layers that it has already sent its latest drafts through, if any; the target's pass goes on there.
        first: of drafters that are models, their logits [b, V] after each row's newest token, of the latest `propose`;
            of a row that got no draft they mean nothing. None: not known.
    """

    name = "plain"
    layers: frozenset[int] = frozenset()
    begun: "Begun | None" = None
    first: Tensor | None = None

    @property
    def draws(self) -> bool:
        """When sampling, it draws its drafts, and they are verified by recursive rejection.

        The text is distributed as that of plain decoding then, and is not the same token for token.
        """
        return False

    def attach(self, engine: "Engine") -> None:
        """Called once, before anything else: the engine that it drafts for.

        Raises: BatonError when the two do not fit.
        """

    def join(self, joined: Joined) -> None:
        """New rows, behind the others."""

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        """A draft per row, what may follow `request.tokens[-1]`, at most `request.room` deep; possibly empty."""
        return [NOTHING] * len(requests)

    def observe(self, seen: Seen) -> None:
        """What the target said."""

    def select(self, rows: Sequence[int]) -> None:
        """Only these rows go on, in this order."""


def at_least(options: Any, **limits: int) -> None:
    """Raises: UnknownOption when an option is below its limit."""
    for name, limit in limits.items():
        if (value := getattr(options, name)) < limit:
            raise UnknownOption(f"{options.name}: {name}={value} is not possible: it must be {limit} or more")
