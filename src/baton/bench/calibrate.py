"""Calibration: write with a large tree of ranks, and count which of its nodes are accepted."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from baton.draft import ROOT, Draft, PathTemplate
from baton.drafters.parts.templates import DEPTH, NODES, START, Calibration, Ranks, ranks_of, save_tree
from baton.drafters.table import make, method, options
from baton.engine import Engine, generate
from baton.engine.drafter import Drafter, Joined, Seen
from baton.engine.request import Request
from baton.errors import BatonError, UnknownOption
from baton.models.writer import Writer
from baton.types import Sampling


def calibrate(
    writer: Writer,
    spec: str,
    prompts: Sequence[str],
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    max_new_tokens: int = 128,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Write responses to prompts with a large tree, and count what is accepted of it.

    Args:
        spec: a method that fills trees of ranks, as in `baton.generate(drafter=...)`.
        progress: called with (prompts done, of how many).
    Raises: UnknownOption for a method without such trees.
    """
    name = spec.partition(":")[0].strip()
    ranks = getattr(method(name), "ranks", 0)
    if not ranks or "tree" not in options(method(name)):
        raise UnknownOption(f"{name} fills no tree of ranks: calibrate token-recycling or stand")
    start = PathTemplate.grown(START[:ranks], NODES, DEPTH)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tree.json"
        save_tree(path, ranks, ranks_of(start.tree), {})
        counting = _Counting(make(f"{spec}{',' if ':' in spec else ':'}tree=[{path}]"))
    engine = Engine(writer, counting)
    for index, prompt in enumerate(prompts):
        generate(engine, prompt, sampling=sampling, max_new_tokens=max_new_tokens, truncate=True, first_index=index)
        if progress is not None:
            progress(index + 1, len(prompts))
    if not counting.steps:
        raise BatonError("the responses ended before anything was drafted: give other prompts, or more max_new_tokens")
    accepted = {path: counting.accepted[path] for path in ranks_of(start.tree)}
    return Calibration(ranks, accepted, counting.steps, counting.tokens / counting.steps)


class _Counting(Drafter):
    """Another drafter, and what was accepted of its drafts."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.name, self.layers = drafter, drafter.name, drafter.layers
        self.accepted: Counter[Ranks] = Counter()
        self.steps = self.tokens = 0

    @property
    def draws(self) -> bool:
        return self.drafter.draws

    def attach(self, engine: Engine) -> None:
        self.drafter.attach(engine)

    def join(self, joined: Joined) -> None:
        self.drafter.join(joined)

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        return self.drafter.propose(requests)

    def observe(self, seen: Seen) -> None:
        for request, draft, verdict in zip(seen.requests, seen.drafts, seen.verdicts, strict=True):
            if verdict is not None:
                self.steps += 1
                self.tokens += len(request.read) + len(request.tokens)
                ranks: Ranks = ()
                for node, parent in zip(verdict.accepted, (ROOT, *verdict.accepted), strict=False):
                    ranks = (*ranks, draft.tree.children(parent).index(node))
                    self.accepted[ranks] += 1
        self.drafter.observe(seen)

    def select(self, rows: Sequence[int]) -> None:
        self.drafter.select(rows)
