"""What a drafter remembers: for each request alone, or together for all requests of one prompt."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from baton.engine.request import Request

State = TypeVar("State")


class ByRequest(Generic[State]):
    """A state per request, which goes with it.

    Args:
        new: makes a state.
        prompts: requests of equal prompts have one state, which is kept for the last so many prompts; 0: none is
            shared. A request whose random numbers have already been used beside a state gets one of its own: drafts
            drawn from what these numbers have written would no longer be independent of them.
    """

    def __init__(self, new: Callable[[], State], prompts: int = 0) -> None:
        self.new, self.prompts = new, prompts
        self._own: WeakKeyDictionary[Request, State] = WeakKeyDictionary()
        self._shared: OrderedDict[tuple[object, ...], tuple[State, set[tuple[int, int]]]] = OrderedDict()

    def __getitem__(self, request: Request) -> State:
        if (found := self._own.get(request)) is None:
            found = self._own[request] = self._find(request)
        return found

    def _find(self, request: Request) -> State:
        prompt = (request.prompt, *request.context)
        if not self.prompts or prompt == ("",):
            return self.new()
        state, used = self._shared.setdefault(prompt, (self.new(), set()))
        self._shared.move_to_end(prompt)
        if len(self._shared) > self.prompts:
            self._shared.popitem(last=False)
        numbers = (request.sampling.seed, request.key)
        if numbers in used:
            return self.new()
        used.add(numbers)
        return state
