"""What drafts of different sizes are worth: counted for all sizes from every draft whose fate is known."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from baton.draft import Draft
from baton.engine.request import Request

SIZES = (1, 2, 3, 5, 8, 12, 20, 32, 64)  # nodes
HOPE = 1.5  # tokens that a draft is expected to give before one was seen
SLOW = 0.2  # how much slower the opinion of all requests changes than that of one


class Worth:
    """Tokens that a draft gives when it is cut to each of `SIZES`, per request, as a moving mean.

    Args:
        memory: weight of earlier drafts against the newest.
    """

    def __init__(self, memory: float) -> None:
        self.memory = memory
        self.prior = [min(size, HOPE) for size in SIZES]  # of a request that nothing is known of
        self._own: WeakKeyDictionary[Request, list[float]] = WeakKeyDictionary()

    def of(self, request: Request) -> list[float]:
        return self._own.get(request, self.prior)

    def learn(self, request: Request, draft: Draft, accepted: Sequence[int], *, whole: bool) -> None:
        """Take in which nodes of a draft were accepted.

        Args:
            whole: nothing had been cut off the draft; otherwise nothing is known of larger sizes, unless all of this
                one was accepted: then they would have given more, how much more is guessed.
        """
        places = _places(draft)
        kept = [places[node] for node in accepted]
        own = self._own.setdefault(request, list(self.prior))
        for index, size in enumerate(SIZES):
            found: float = sum(place < size for place in kept)
            if size > len(draft) and not whole:
                if len(kept) < draft.tree.depth:
                    break
                found = max(found + 0.5 * (size - len(draft)) ** 0.5, own[index])
            own[index] += (1 - self.memory) * (found - own[index])
            self.prior[index] += SLOW * (1 - self.memory) * (found - self.prior[index])


def cut(draft: Draft, size: int) -> Draft:
    """The draft without what is beyond the size, its best nodes kept.

    One with drawn children stays whole: how many there are may depend on what was drawn, and a part that is kept
    for that would no longer be drawn.
    """
    return draft if draft.drawn else draft.prune(size)


def _places(draft: Draft) -> list[int]:
    """Per node, how many stand before it when drafts are cut."""
    places = [len(draft) - 1] * len(draft)
    if not draft.drawn:
        for place, node in enumerate(draft.order()):
            places[node] = place
    return places
