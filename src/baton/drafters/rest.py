"""REST: draft what followed, in a corpus, the longest ending of the text that occurs there.

Source: arXiv 2311.08252. Lossless: yes. Training: none, but a corpus: `baton build-datastore`. Memory: the corpus stays
on disk, 14 to 16 bytes per token. Draft cost: searches on the CPU, no model.
The beginnings of all continuations are counted, and the most frequent make a tree. Helps where the corpus has what
the target writes (code, a house style, the target's own earlier responses); where it has not, nothing is drafted.

Differences from the paper's code: sampling is exact, as every node is offered one token of the target's own; tokens
are never cut to 16 bits, nor do continuations cross from one document into the next; of too many matches an even
selection counts, not the first in the alphabet; ties go to the shorter beginning; without a match there is no draft.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.draft import NOTHING, Draft, Tree
from baton.drafters.parts.suffixes import SORTED, Suffixes
from baton.engine.drafter import Drafter, at_least
from baton.engine.request import Request
from baton.errors import UnknownOption

if TYPE_CHECKING:
    from baton.engine.loop import Engine


@dataclass(kw_only=True)
class Rest(Drafter):
    datastore: str = ""  # folder that `baton build-datastore` wrote
    max_span: int = 16  # longest ending of the text that is searched for, tokens
    min_span: int = 2  # shortest
    max_matches: int = 5000  # places in the corpus that are looked at, per step
    num_draft_tokens: int = 64  # nodes of the tree
    max_depth: int = 10  # tokens read behind each match
    name = "rest"

    def __post_init__(self) -> None:
        at_least(self, max_span=1, min_span=1, max_matches=1, num_draft_tokens=1, max_depth=1)
        at_least(self, max_span=self.min_span)
        if self.max_span > SORTED:
            raise UnknownOption(f"{self.name}: max_span={self.max_span} is not possible: it must be {SORTED} or less")

    def attach(self, engine: "Engine") -> None:
        if not self.datastore:
            raise UnknownOption(
                f"{self.name} needs a datastore: {self.name}:datastore=FOLDER, which baton build-datastore writes"
            )
        self.suffixes = Suffixes.open(self.datastore, engine.writer.response_tokenizer)
        self.known = engine.target.lm_head.weight.shape[0]  # a tokenizer may have more

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        return [self.retrieve(request, request.nodes(self.num_draft_tokens)) for request in requests]

    def retrieve(self, request: Request, nodes: int) -> Draft:
        """Continuations of the request's text; scores are logarithms of how large a part of the matches goes on so."""
        ahead = min(self.max_depth, request.room)
        if ahead < 1:
            return NOTHING
        ending = request.tokens[-self.max_span :]
        if missing := self.max_span - len(ending):
            ending = request.context[-missing:] + ending
        found = self.suffixes.lookup(
            ending,
            longest=self.max_span,
            shortest=self.min_span,
            most=self.max_matches,
            ahead=ahead,
            nodes=nodes,
            known=self.known,
        )
        if not found.tokens:
            return NOTHING
        scores = [math.log(count / found.matches) for count in found.counts]
        return Draft(tokens=found.tokens, tree=Tree(found.parents), source=self.name, scores=scores)
