"""STAND: draft a tree by drawing from what the target thought after the same n-gram before.

Source: arXiv 2506.04708. Lossless: yes. Training: none. Memory: some hundred bytes per n-gram of the text, four of them
per token. Draft cost: a look-up and a small draw per node, in plain Python. Helps where sampled texts repeat
themselves or, with `shared=true`, each other: many answers to one prompt.

Children are drawn without replacement (Gumbel-top-k) from the mean distribution, made to sum to one, and verified by
recursive rejection; greedy requests, and all with `sample=false`, take the most probable ones instead. Unlike the
paper: noise is fresh at every step, since noise used again would tie drafts to what it has revealed, and the text's law
with them; the default tree is grown from typical chances of each rank, `baton calibrate-tree` makes the paper's; tables
belong to one request unless they are `shared`; distributions are those that tokens are drawn from, after all filters
(for greedy requests, before). n-grams of 4 to 1 tokens, longest first, are this implementation's reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from baton.best import top
from baton.draft import NOTHING, ROOT, Draft, Few, PathTemplate, Tree
from baton.drafters.parts.ngrams import Context, NGrams, without_replacement
from baton.drafters.parts.sharing import ByRequest
from baton.drafters.parts.templates import RankCounts, load_tree
from baton.engine.drafter import Drafter, Joined, Seen, at_least
from baton.engine.request import Request
from baton.errors import UnknownOption
from baton.sampling import uniform

if TYPE_CHECKING:
    from baton.engine.loop import Engine

RANKS = (0.75, 0.15, 0.08, 0.05, 0.035, 0.025, 0.02, 0.015, 0.012, 0.01)  # how often, roughly, each is right


@dataclass
class Traces:
    """What is known for one request, or for several of one prompt."""

    table: NGrams
    template: PathTemplate
    counts: RankCounts = field(default_factory=lambda: RankCounts(RANKS))
    steps: int = 0


@dataclass(kw_only=True)
class Stand(Drafter):
    num_draft_tokens: int = 80  # nodes of the tree
    max_depth: int = 13  # longest path of the tree
    tree: str = ""  # file that `baton calibrate-tree` wrote: its tree, instead of one grown to these numbers
    sample: bool = True  # draw children, verified by recursive rejection; false: the best, and plain decoding's text
    max_ngram: int = 4  # longest ending of the text that is looked up, tokens
    min_ngram: int = 1  # shortest
    floor: float = 0.0  # least weight of what is new in a mean; 1/16 follows texts that drift
    rejected: bool = False  # learn also from nodes that were not accepted
    learn_prompt: bool = False  # begin with the prompt's n-grams, as if the target had been sure of each next token
    regrow: int = 0  # steps after which the tree is grown anew, from how often each rank was accepted; 0: never
    shared: bool = False  # requests of the same prompt learn from each other
    prompts: int = 16  # prompts whose tables are kept, where they are shared
    name = "stand"
    ranks = len(RANKS)

    def __post_init__(self) -> None:
        at_least(self, num_draft_tokens=1, max_depth=1, min_ngram=1, regrow=0, prompts=1)
        at_least(self, max_ngram=self.min_ngram)
        if not 0 <= self.floor < 1:
            raise UnknownOption(f"{self.name}: floor={self.floor} is not possible: it must be 0 or more, and below 1")
        self._template = load_tree(self.tree, self.name, self.ranks) if self.tree else self._grown(RANKS)
        self._traces = ByRequest(self._new, self.prompts if self.shared else 0)

    @property
    def draws(self) -> bool:
        return self.sample

    def attach(self, engine: "Engine") -> None:
        self._engine = engine

    def join(self, joined: Joined) -> None:
        for request in joined.requests if self.learn_prompt else ():
            text, table = request.context, self._traces[request].table
            for end in range(1, 0 if table.means else len(text)):
                table.learn(tuple(text[max(0, end - self.max_ngram) : end]), [text[end]], [1.0])

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        return [self._draft(request, self._traces[request]) for request in requests]

    def _draft(self, request: Request, traces: Traces) -> Draft:
        template = traces.template.first(request.nodes(len(traces.template))).within(request.room)
        random = None
        if self.sample and not request.sampling.greedy:
            seed = uniform(request.sampling.seed, request.key, f"draft/{len(request.steps)}", len(request.tokens))
            random = Random(int(2**52 * seed)).random
        texts: dict[int, Context] = {ROOT: self._ending(request)}  # by place in the template, of what is there
        places = {ROOT: ROOT}
        tokens: list[int] = []
        parents: list[int] = []
        drawn: dict[int, Few] = {}
        for parent in range(ROOT, len(template)):
            children = template.tree.children(parent)
            mean = traces.table.find(texts[parent]) if children and parent in texts else None
            if mean is None:
                continue
            chosen = mean.tokens
            if random is not None:
                drawn[places[parent]] = q = mean.distribution
                chosen = without_replacement(*q, len(children), random)
            for child, token in zip(children, chosen, strict=False):
                texts[child] = (*texts[parent][-self.max_ngram + 1 :], token) if self.max_ngram > 1 else (token,)
                places[child] = len(tokens)
                tokens.append(token)
                parents.append(places[parent])
        tree = template.tree if len(tokens) == len(template) else Tree(parents)  # a tree keeps its mask
        return Draft(tokens=tokens, tree=tree, source=self.name, drawn=drawn) if tokens else NOTHING

    def observe(self, seen: Seen) -> None:
        sampled: list[tuple[int, int]] = []  # (row, node)
        greedy: list[tuple[int, int]] = []
        for row, (request, draft, verdict) in enumerate(zip(seen.requests, seen.drafts, seen.verdicts, strict=True)):
            if verdict is None:
                continue
            nodes = range(ROOT, len(draft)) if self.rejected else (ROOT, *verdict.accepted)
            (greedy if request.sampling.greedy else sampled).extend((row, node) for node in nodes)
            traces = self._traces[request]
            traces.counts.add(draft.tree, verdict.accepted)
            traces.steps += 1
            if self.regrow and traces.steps % self.regrow == 0:
                traces.template = self._grown(traces.counts.chances)
        for alike in filter(None, (sampled, greedy)):
            self._learn(seen, alike)

    def _learn(self, seen: Seen, nodes: Sequence[tuple[int, int]]) -> None:
        requests = [seen.requests[row] for row, _ in nodes]
        paths = [[seen.drafts[row].tokens[n] for n in seen.drafts[row].tree.path(node)] for row, node in nodes]
        scores = seen.logits[[row for row, _ in nodes], [node + 1 for _, node in nodes]].float()
        greedy = requests[0].sampling.greedy
        p = scores.softmax(-1) if greedy else self._engine.chooser.process(scores, requests, paths)[0]
        values, tokens = (found.tolist() for found in top(p, self.ranks))
        for request, path, ids, chances in zip(requests, paths, tokens, values, strict=True):
            if count := sum(chance > 0 for chance in chances):  # none where the logits were no numbers
                text = (*self._ending(request), *path)[-self.max_ngram :]
                self._traces[request].table.learn(text, ids[:count], chances[:count])

    def _new(self) -> Traces:
        return Traces(NGrams(self.min_ngram, self.max_ngram, self.ranks, self.floor), self._template)

    def _grown(self, chances: tuple[float, ...]) -> PathTemplate:
        return PathTemplate.grown(chances, self.num_draft_tokens, self.max_depth)

    def _ending(self, request: Request) -> Context:
        part = slice(-self.max_ngram, None)
        return tuple([*request.context[part], *request.tokens[part]][part])
