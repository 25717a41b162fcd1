"""Draft model: a small language model writes ahead, the target checks.

Source: arXiv 2211.17192, 2302.01318 (chains); 2305.09781 (trees). Lossless: yes. Training: none. Draft cost: one pass
of the small model per level. Helps where a small model of the same kind of text exists; any model that `load` takes
will do, a hand-off too. With another tokenizer the two talk through text (arXiv 2502.05202).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.best import best, top
from baton.draft import NOTHING, ROOT, Draft, Growing
from baton.drafters.parts.small_model import SmallModel
from baton.engine.drafter import at_least
from baton.engine.request import Request
from baton.errors import UnknownOption
from baton.sampling import draw, uniform


@dataclass(kw_only=True)
class DraftModel(SmallModel):
    num_draft_tokens: int = 5  # tokens proposed per decode step
    branches: int = 1  # 1: a chain of its best tokens; more: a tree, of which so many nodes go on at each level
    max_depth: int = 5  # longest path of a tree
    min_confidence: float = 0.0  # a chain ends before a token that the small model gives a smaller probability
    sample: bool = False  # draw chains from its distribution; such drafts are verified by recursive rejection
    realign: bool = True  # talk through text where the tokenizers differ; false refuses
    name = "draft-model"

    def __post_init__(self) -> None:
        at_least(self, num_draft_tokens=1, branches=1, max_depth=1)
        if self.branches > 1 and self.sample:
            raise UnknownOption(
                f"{self.name}: sample=true draws chains, branches={self.branches} makes trees: drop one"
            )

    @property
    def draws(self) -> bool:
        return self.sample

    def realigns(self, theirs: Any) -> bool:
        return self.realign and not self.sample and self.branches == 1 and hasattr(theirs, "get_vocab")

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        texts = [request.tokens if self.same else self._own_ids(request) for request in requests]
        most = self.num_draft_tokens if self.branches == 1 else self.max_depth
        depths = [self.depth(request, row, len(texts[row]), most) for row, request in enumerate(requests)]
        self.first = None
        if not any(depths):
            return [NOTHING] * len(requests)
        self.forget_wrong(texts)
        logits = self.feed(self.pending(texts, depths))
        drafts = self._trees(requests, depths, logits) if self.branches > 1 else self._chains(requests, depths, logits)
        if self.same:
            self.first = logits
            return drafts
        return [
            self._translate(request, text, draft) for request, text, draft in zip(requests, texts, drafts, strict=True)
        ]

    def _chains(self, requests: Sequence[Request], depths: list[int], logits: Tensor) -> list[Draft]:
        tokens: list[list[int]] = [[] for _ in requests]
        drawn: list[list[Tensor]] = [[] for _ in requests]
        open_rows = {row for row, depth in enumerate(depths) if depth}
        while open_rows:
            choice = best(logits)[1].tolist()
            sure = logits.float().softmax(-1).amax(-1).tolist() if self.min_confidence else None
            if self.sample:
                choice = self._draw(requests, tokens, drawn, logits)
            for row in sorted(open_rows):
                if (sure and sure[row] < self.min_confidence) or not self.known(choice[row]):
                    open_rows.discard(row)
                    continue
                tokens[row].append(choice[row])
                if len(tokens[row]) == depths[row]:
                    open_rows.discard(row)
            if open_rows:
                logits = self.feed([[choice[row]] if row in open_rows else [] for row in range(len(requests))])
        return [
            Draft.chain(found, self.name, [q for q, _ in zip(kept, found, strict=False)]) if found else NOTHING
            for found, kept in zip(tokens, drawn, strict=True)
        ]

    def _draw(
        self, requests: Sequence[Request], tokens: list[list[int]], drawn: list[list[Tensor]], logits: Tensor
    ) -> list[int]:
        """One token per row from the distribution that the target's own is compared with: same temperature, filters."""
        q = self.distributions(requests, tokens, logits)
        broken = ~q.isfinite().all(-1)  # logits that are not numbers end the chain
        q[broken] = 1 / q.shape[-1]
        for row, distribution in enumerate(q):
            drawn[row].append(distribution)
        # Each step of the request draws anew: a number used twice would tie this draft to what an earlier one led to.
        keys = (
            (r.sampling.seed, r.key, f"draft/{len(r.steps)}", len(r.tokens) + len(t))
            for r, t in zip(requests, tokens, strict=True)
        )
        return draw(q, [uniform(*key) for key in keys]).masked_fill(broken, -1).tolist()

    def _trees(self, requests: Sequence[Request], depths: list[int], logits: Tensor) -> list[Draft]:
        """Level by level the most probable nodes go on; what is kept are the most probable paths. arXiv 2406.16858."""
        builders = [Growing() for _ in requests]
        logits = logits[:, None]
        frontiers: list[list[int]] = [[ROOT] for _ in requests]
        for level in range(max(depths)):
            values, ids = (found.tolist() for found in top(logits.float().log_softmax(-1), self.branches))
            for row, builder in enumerate(builders):
                frontier = frontiers[row] if level < depths[row] else []
                new = [
                    # log probabilities of whole paths
                    builder.add(node, token, self.name, score + (builder.scores[node] if node != ROOT else 0.0))
                    for place, node in enumerate(frontier)
                    for token, score in zip(ids[row][place], values[row][place], strict=True)
                    if self.known(token)
                ]
                frontiers[row] = sorted(sorted(new, key=lambda n: -builder.scores[n])[: self.branches])
            if not any(frontiers):
                break
            if level + 1 < max(depths):
                logits = self.expand(builders, frontiers)
        return [
            builder.draft(self.name, scored=True).prune(request.nodes(self.num_draft_tokens))
            for request, builder in zip(requests, builders, strict=True)
        ]

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
