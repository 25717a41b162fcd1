"""Draft model: a small language model writes ahead, the target checks.

Source: arXiv 2211.17192, 2302.01318 (chains); 2305.09781 (trees). Lossless: yes. Training: none. Draft cost: one pass
of the small model per level. Helps where a small model of the same kind of text exists; any model that `load` takes
will do, a hand-off too. With another tokenizer the two talk through text (arXiv 2502.05202).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from baton.cache import Memory
from baton.draft import NOTHING, ROOT, Draft, Growing, Tree
from baton.engine.drafter import Drafter, Joined, at_least
from baton.engine.request import Request
from baton.errors import UnknownOption, UnsupportedModel, VocabMismatch
from baton.models.adapter import target_for
from baton.models.loading import beside, load
from baton.models.prompts import pad_right, prompt_limit, same_tokenizer
from baton.models.writer import PromptInputs, Writer
from baton.sampling import draw, uniform
from baton.types import Timings

if TYPE_CHECKING:
    from baton.engine.loop import Engine


@dataclass(kw_only=True)
class DraftModel(Drafter):
    model: str = ""  # folder or Hub id of the small model
    num_draft_tokens: int = 5  # tokens proposed per decode step
    branches: int = 1  # 1: a chain of its best tokens; more: a tree, of which so many nodes go on at each level
    max_depth: int = 5  # longest path of a tree
    min_confidence: float = 0.0  # a chain ends before a token that the small model gives a smaller probability
    sample: bool = False  # draw chains from its distribution; such drafts are verified by recursive rejection
    int8: bool = False  # run it on int8 copies of its weights: half to read; what it drafts changes a little
    realign: bool = True  # talk through text where the tokenizers differ; false refuses
    name = "draft-model"

    def __post_init__(self) -> None:
        at_least(self, num_draft_tokens=1, branches=1, max_depth=1)
        if self.branches > 1 and self.sample:
            raise UnknownOption(
                f"{self.name}: sample=true draws chains, branches={self.branches} makes trees: drop one"
            )

    def attach(self, engine: "Engine") -> None:
        self.engine = engine
        self.writer = self.load(engine)
        self.target = target_for(self.writer.lm)
        self.memory: Memory | None = None
        self.fed: list[list[int]] = []  # per row, its own tokens after the prompt that its cache holds
        mine, theirs = self.writer.response_tokenizer, engine.writer.response_tokenizer
        named = hasattr(theirs, "get_vocab")
        if named:
            self.same = same_tokenizer(mine, theirs)
        else:  # the target came without a tokenizer: sizes must do
            self.same = self.target.lm_head.out_features == engine.target.lm_head.out_features
        if not self.same and (self.sample or self.branches > 1 or not self.realign or not named):
            raise VocabMismatch(
                f"{self.model} and its target have different tokens ({_difference(mine, theirs)}): use a small model "
                "of the same family, or realign=true with plain chains"
            )

    def load(self, engine: "Engine") -> Writer:
        if not self.model:
            raise UnknownOption(f"{self.name} needs a small model: {self.name}:model=FOLDER_OR_HUB_ID")
        return load(self.model, **beside(engine.target.model) | ({"runtime": "int8"} if self.int8 else {}))

    def join(self, joined: Joined) -> None:
        _, memory = self.target.prefill(self.read(joined))
        if self.memory is None:
            self.memory, self.fed = memory, []
        else:
            self.memory.join(memory)
        self.fed += [[] for _ in joined.requests]

    def read(self, joined: Joined) -> PromptInputs:
        """What the small model reads of the prompts: the newest part, where they are too long for it."""
        limit = prompt_limit(self.target.model.config)
        rows = [self._prompt(request)[-(limit // 2 if limit else 0) :] for request in joined.requests]
        ids, mask = pad_right(rows, device=self.target.device)
        return self.writer.encode(ids, mask, Timings())

    def _prompt(self, request: Request) -> list[int]:
        if self.same and request.context:
            return request.context
        if not request.prompt:
            raise UnsupportedModel(f"{self.name} needs to know the prompt, and here the target was given states only")
        return list(self.writer.prompt_tokenizer(request.prompt)["input_ids"])

    def select(self, rows: Sequence[int]) -> None:
        if rows:
            self._memory.select(rows)
        else:
            self.memory = None
        self.fed = [self.fed[row] for row in rows]

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        texts = [request.tokens if self.same else self._own_ids(request) for request in requests]
        depths = [self._depth(request, row, len(texts[row])) for row, request in enumerate(requests)]
        if not any(depths):
            return [NOTHING] * len(requests)
        self._forget_wrong(texts)
        drafts = self._trees(requests, texts, depths) if self.branches > 1 else self._chains(requests, texts, depths)
        if self.same:
            return drafts
        return [
            self._translate(request, text, draft) for request, text, draft in zip(requests, texts, drafts, strict=True)
        ]

    def _depth(self, request: Request, row: int, length: int) -> int:
        if not length:  # nothing but special tokens so far: there is no text to go on from
            return 0
        depth = min(request.room, self.num_draft_tokens if self.branches == 1 else self.max_depth)
        if self.target.context is not None:
            prompt = self._memory.lengths[row] - len(self.fed[row])
            depth = min(depth, self.target.context - prompt - length)
        return max(depth, 0)

    def _chains(self, requests: Sequence[Request], texts: list[list[int]], depths: list[int]) -> list[Draft]:
        tokens: list[list[int]] = [[] for _ in requests]
        drawn: list[list[Tensor]] = [[] for _ in requests]
        open_rows = {row for row, depth in enumerate(depths) if depth}
        logits = self._feed(self._pending(texts, depths))
        while open_rows:
            choice = logits.argmax(-1).tolist()
            sure = logits.float().softmax(-1).amax(-1).tolist() if self.min_confidence else None
            if self.sample:
                choice = self._draw(requests, tokens, drawn, logits)
            for row in sorted(open_rows):
                if (sure and sure[row] < self.min_confidence) or not self._known(choice[row]):
                    open_rows.discard(row)
                    continue
                tokens[row].append(choice[row])
                if len(tokens[row]) == depths[row]:
                    open_rows.discard(row)
            if open_rows:
                logits = self._feed([[choice[row]] if row in open_rows else [] for row in range(len(requests))])
        return [
            Draft.chain(found, self.name, [q for q, _ in zip(kept, found, strict=False)]) if found else NOTHING
            for found, kept in zip(tokens, drawn, strict=True)
        ]

    def _draw(
        self, requests: Sequence[Request], tokens: list[list[int]], drawn: list[list[Tensor]], logits: Tensor
    ) -> list[int]:
        """One token per row from the distribution that the target's own is compared with: same temperature, filters."""
        width = self.engine.target.lm_head.weight.shape[0]  # tables of one tokenizer may be padded differently
        scores = torch.full((len(logits), width), -torch.inf, device=logits.device)
        scores[:, : logits.shape[1]] = logits[:, :width]
        q, _ = self.engine.chooser.process(scores, requests, tokens)
        for row, distribution in enumerate(q):
            drawn[row].append(distribution)
        # Each step of the request draws anew: a number used twice would tie this draft to what an earlier one led to.
        keys = (
            (r.sampling.seed, r.key, f"draft/{len(r.steps)}", len(r.tokens) + len(t))
            for r, t in zip(requests, tokens, strict=True)
        )
        return draw(q, [uniform(*key) for key in keys]).tolist()

    def _trees(self, requests: Sequence[Request], texts: list[list[int]], depths: list[int]) -> list[Draft]:
        """Level by level the most probable nodes go on; what is kept are the most probable paths. arXiv 2406.16858."""
        builders = [Growing() for _ in requests]
        logits = self._feed(self._pending(texts, depths))[:, None]
        frontiers: list[list[int]] = [[ROOT] for _ in requests]
        before = list(self._memory.lengths)
        for level in range(max(depths)):
            best = logits.float().log_softmax(-1).topk(min(self.branches, logits.shape[-1]), dim=-1)
            values, ids = best.values.tolist(), best.indices.tolist()
            for row, builder in enumerate(builders):
                frontier = frontiers[row] if level < depths[row] else []
                new = [
                    # log probabilities of whole paths
                    builder.add(node, token, self.name, score + (builder.scores[node] if node != ROOT else 0.0))
                    for place, node in enumerate(frontier)
                    for token, score in zip(ids[row][place], values[row][place], strict=True)
                    if self._known(token)
                ]
                frontiers[row] = sorted(sorted(new, key=lambda n: -builder.scores[n])[: self.branches])
            if level + 1 < max(depths):
                logits = self._expand(builders, frontiers)
                self._memory.truncate(before)
        return [builder.draft(self.name, scored=True).prune(self.num_draft_tokens) for builder in builders]

    def _expand(self, builders: list[Growing], frontiers: list[list[int]]) -> Tensor:
        """Logits [rows, branches, V] after frontier nodes: all nodes on their paths are read, then forgotten again."""
        drafts = [_paths_to(builder, frontier) for builder, frontier in zip(builders, frontiers, strict=True)]
        width = max(1, max(len(nodes) for nodes, _ in drafts))
        ids = torch.zeros((len(drafts), width), dtype=torch.long)
        steps = torch.zeros((len(drafts), width), dtype=torch.long)
        mask = torch.eye(width, dtype=torch.bool).repeat(len(drafts), 1, 1)
        at = torch.zeros((len(drafts), self.branches), dtype=torch.long)
        for row, ((nodes, tree), builder) in enumerate(zip(drafts, builders, strict=True)):
            count = len(nodes)
            ids[row, :count] = torch.tensor([builder.tokens[node] for node in nodes], dtype=torch.long)
            steps[row, :count] = tree.steps[1:] - 1
            mask[row, :count, :count] = tree.mask[1:, 1:]
            for place, node in enumerate(frontiers[row]):
                at[row, place] = nodes.index(node)
        device = self.target.device
        positions = torch.tensor(self._memory.lengths)[:, None] + steps
        logits = self.target.forward(ids.to(device), self._memory, positions=positions.to(device), tree=mask.to(device))
        return logits.gather(1, at.to(device)[..., None].expand(-1, -1, logits.shape[-1]))

    def _pending(self, texts: list[list[int]], depths: list[int]) -> list[list[int]]:
        """What each row has not read yet; nothing for rows that do not draft: they may have no positions left."""
        return [text[len(fed) :] if d else [] for text, fed, d in zip(texts, self.fed, depths, strict=True)]

    def _feed(self, rows: list[list[int]]) -> Tensor:
        """Read new tokens, each row its own number of them; logits [rows, V] after each row's last."""
        memory, before = self._memory, list(self._memory.lengths)
        ids, _ = pad_right([row or [0] for row in rows], device=self.target.device)
        logits = self.target.forward(ids, memory)
        if any(len(row) != ids.shape[1] for row in rows):
            memory.truncate([length + len(row) for length, row in zip(before, rows, strict=True)])
        for fed, row in zip(self.fed, rows, strict=True):
            fed += row
        last = torch.tensor([max(len(row) - 1, 0) for row in rows], device=logits.device)
        return logits[torch.arange(len(rows), device=logits.device), last]

    def _forget_wrong(self, texts: list[list[int]]) -> None:
        """Cut each row of the cache back to what its text still begins with; the newest token is always read anew."""
        lengths = list(self._memory.lengths)
        for row, (text, fed) in enumerate(zip(texts, self.fed, strict=True)):
            right = max(0, min(len(fed), len(text) - 1))
            while fed[:right] != text[:right]:
                right -= 1
            lengths[row] -= len(fed) - right
            del fed[right:]
        self._memory.truncate(lengths)

    def _known(self, token: int) -> bool:
        return not self.same or token < self.engine.target.lm_head.weight.shape[0]

    def _own_ids(self, request: Request) -> list[int]:
        """The response in the small model's tokens; empty where it has no text yet."""
        text = self.engine.writer.response_tokenizer.decode(request.tokens, skip_special_tokens=True)
        return list(self.writer.response_tokenizer(text, add_special_tokens=False)["input_ids"])

    def _translate(self, request: Request, own: list[int], draft: Draft) -> Draft:
        """The draft in the target's tokens, by way of text."""
        mine, theirs = self.writer.response_tokenizer, self.engine.writer.response_tokenizer
        text = mine.decode([*own, *draft.tokens], skip_special_tokens=True)
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        if ids[: len(request.tokens)] != request.tokens:
            return NOTHING
        return Draft.chain(ids[len(request.tokens) :][: request.room], self.name)

    @property
    def _memory(self) -> Memory:
        assert self.memory is not None
        return self.memory


def _paths_to(tree: Growing, nodes: Sequence[int]) -> tuple[list[int], Tree]:
    """These nodes and all above them, and how they hang together."""
    wanted = set()
    for node in nodes:
        while node != ROOT and node not in wanted:
            wanted.add(node)
            node = tree.parents[node]
    kept = sorted(wanted)
    place = {ROOT: ROOT} | {node: index for index, node in enumerate(kept)}
    return kept, Tree(place[tree.parents[node]] for node in kept)


def _difference(mine: Any, theirs: Any) -> str:
    """A token on which two tokenizers disagree, for an error message."""
    if not hasattr(theirs, "get_vocab"):
        return "the target's are not known here"
    first, second = mine.get_vocab(), theirs.get_vocab()
    for token, number in sorted(second.items(), key=lambda item: item[1]):
        if first.get(token) != number:
            return f"{token!r} is {number} for the target and {first.get(token, 'unknown')} for the small model"
    return f"{len(first)} tokens against {len(second)}"
