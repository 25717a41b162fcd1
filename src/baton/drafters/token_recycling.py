"""Token Recycling: draft a tree from what the target last thought might follow each token.

Source: arXiv 2408.08696. Lossless: yes. Training: none. Memory: 8 tokens per vocabulary entry at most.
The target's best candidates at every node, accepted or not, are kept per token; a fixed tree of ranks is filled from
them. Helps a little everywhere; trained drafters accept more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from weakref import WeakKeyDictionary

from baton.best import top
from baton.draft import Draft, PathTemplate
from baton.drafters.parts.templates import load_tree
from baton.engine.drafter import Drafter, Joined, Seen, at_least
from baton.engine.request import Request

# How often, roughly, the candidate of each rank is right; the official tree has 8/21/25/15/8/3 nodes per level.
RANKS = (0.52, 0.16, 0.09, 0.06, 0.04, 0.03, 0.025, 0.02)

Table = dict[int, list[int]]  # token -> what may follow it, best first


@dataclass(frozen=True, kw_only=True)
class TokenRecycling(Drafter):
    num_draft_tokens: int = 80  # nodes of the tree; fewer suit machines on which every row of a pass costs time
    max_depth: int = 6  # longest path of the tree
    tree: str = ""  # file that `baton calibrate-tree` wrote: its tree, instead of one grown to these numbers
    shared: bool = False  # keep what was learned from earlier requests, and from others that are being written
    name = "token-recycling"
    ranks = len(RANKS)
    _tables: "WeakKeyDictionary[Request, Table]" = field(
        default_factory=WeakKeyDictionary, init=False, repr=False, compare=False
    )
    _common: Table = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        at_least(self, num_draft_tokens=1, max_depth=1)
        _ = self._template  # a file that cannot be used is better known at once

    def join(self, joined: Joined) -> None:
        for request in joined.requests:
            table = self._table(request)
            for token, following in zip(request.context, [*request.context[1:], *request.tokens[:1]], strict=False):
                if following not in (known := table.get(token, [])):
                    table[token] = [following, *known][: len(RANKS)]

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        drafts = []
        for request in requests:
            following = partial(_following, self._table(request))
            template = self._template.first(request.nodes(len(self._template))).within(request.room)
            drafts.append(template.fill(request.tokens[-1], following, self.name))
        return drafts

    def observe(self, seen: Seen) -> None:
        best = top(seen.logits, len(RANKS))[1].tolist()
        for request, draft, verdict, rows in zip(seen.requests, seen.drafts, seen.verdicts, best, strict=True):
            if verdict is None:
                continue
            table = self._table(request)
            nodes = [request.tokens[-1], *draft.tokens]
            for token, following in zip(nodes, rows, strict=False):
                table[token] = following
            for node in (-1, *verdict.accepted):  # a token may stand at several nodes: what was accepted counts
                table[nodes[node + 1]] = rows[node + 1]

    @cached_property
    def _template(self) -> PathTemplate:
        if self.tree:
            return load_tree(self.tree, self.name, self.ranks)
        return PathTemplate.grown(RANKS, self.num_draft_tokens, self.max_depth)

    def _table(self, request: Request) -> Table:
        return self._common if self.shared else self._tables.setdefault(request, {})


def _following(table: Table, token: int) -> Sequence[int]:
    return table.get(token, ())
