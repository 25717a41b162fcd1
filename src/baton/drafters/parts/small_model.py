"""A second, small model beside the target: its rows follow the target's, and its cache holds what it has read.

What methods share that draft with a small model: they say which tokens to read and what to make of its logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from baton.cache import Memory
from baton.draft import ROOT, Growing, Tree, stacked
from baton.engine.drafter import Drafter, Joined
from baton.engine.request import Request
from baton.errors import UnknownOption, UnsupportedModel, VocabMismatch
from baton.models.adapter import target_for
from baton.models.loading import beside, load
from baton.models.prompts import pad_right, prompt_limit, same_tokenizer
from baton.models.writer import PromptInputs, Writer
from baton.types import Timings

if TYPE_CHECKING:
    from baton.engine.loop import Engine


@dataclass(kw_only=True)
class SmallModel(Drafter):
    model: str = ""  # folder or Hub id of the small model
    int8: bool = False  # run it on int8 copies of its weights: half to read; what it drafts changes a little

    def attach(self, engine: "Engine") -> None:
        self.engine = engine
        self.writer = self.load(engine)
        self.target = target_for(self.writer.lm)
        self.memory: Memory | None = None
        self._unread: list[PromptInputs] = []  # prompts of the last rows: read when a draft is wanted, if ever
        self.fed: list[list[int]] = []  # per row, its own tokens after the prompt that its cache holds
        mine, theirs = self.writer.response_tokenizer, engine.writer.response_tokenizer
        if hasattr(theirs, "get_vocab"):
            self.same = same_tokenizer(mine, theirs)
        else:  # the target came without a tokenizer: sizes must do
            self.same = self.target.lm_head.out_features == engine.target.lm_head.out_features
        if not self.same and not self.realigns(theirs):
            raise VocabMismatch(
                f"{self.model} and its target have different tokens ({_difference(mine, theirs)}): use a small model "
                "of the same family, or draft-model with realign=true, which talks through text"
            )

    def realigns(self, theirs: Any) -> bool:
        """Whether the method can draft for a target with another tokenizer."""
        return False

    def load(self, engine: "Engine") -> Writer:
        if not self.model:
            raise UnknownOption(f"{self.name} needs a small model: {self.name}:model=FOLDER_OR_HUB_ID")
        return load(self.model, **beside(engine.target.model) | ({"runtime": "int8"} if self.int8 else {}))

    def join(self, joined: Joined) -> None:
        self._unread.append(self.read(joined))
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
            self.memory, self._unread = None, []
        self.fed = [self.fed[row] for row in rows]

    def start(self, requests: Sequence[Request], most: int) -> tuple[list[int], Tensor | None]:
        """Read what is new of each row, in a vocabulary that both share.

        Args:
            most: how deep a draft may be.
        Returns: how deep it may be, per row; and logits [b, V] after each row's newest token, None where all are 0.
        """
        texts = [request.tokens for request in requests]
        depths = [self.depth(request, row, len(texts[row]), most) for row, request in enumerate(requests)]
        self.first = None
        if not any(depths):
            return depths, None
        self.forget_wrong(texts)
        self.first = self.feed(self.pending(texts, depths))
        return depths, self.first

    def depth(self, request: Request, row: int, length: int, most: int) -> int:
        """How deep a draft of a row may be, whose text is so long in the small model's tokens."""
        if not length:  # nothing but special tokens so far: there is no text to go on from
            return 0
        depth = min(request.room, most)
        if self.target.context is not None:
            prompt = self._memory.lengths[row] - len(self.fed[row])
            depth = min(depth, self.target.context - prompt - length)
        return max(depth, 0)

    def distributions(self, requests: Sequence[Request], written: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
        """What the small model draws from, float32 [n, V] of the target's vocabulary: same temperature, same filters.

        Args:
            requests, written: per row of `logits` [n, V'], whose it is, and the tokens of its path.
        """
        width = self.engine.target.lm_head.weight.shape[0]  # tables of one tokenizer may be padded differently
        scores = torch.full((len(logits), width), -torch.inf, device=logits.device)
        scores[:, : logits.shape[1]] = logits[:, :width]
        return self.engine.chooser.process(scores, requests, written)[0]

    def expand(self, builders: list[Growing], frontiers: list[list[int]]) -> Tensor:
        """Logits [rows, n, V] after each row's frontier, at most n nodes: all on their paths are read, then forgotten.

        Args:
            builders: a tree per row, of what follows the tokens that were fed.
        """
        before = list(self._memory.lengths)
        drafts = [_paths_to(builder, frontier) for builder, frontier in zip(builders, frontiers, strict=True)]
        steps, mask = (part[:, 1:] for part in stacked([tree for _, tree in drafts]))
        device = self.target.device
        read = zip(builders, drafts, strict=True)
        ids, _ = pad_right([[builder.tokens[node] for node in nodes] for builder, (nodes, _) in read], device=device)
        places = [[nodes.index(n) for n in few] for (nodes, _), few in zip(drafts, frontiers, strict=True)]
        at, _ = pad_right(places, device=device)
        positions = torch.tensor(self._memory.lengths)[:, None] + steps - 1
        tree = mask[..., 1:].to(device)
        counts = [len(nodes) for nodes, _ in drafts]
        logits = self.target.forward(ids, self._memory, positions=positions.to(device), tree=tree, counts=counts)
        self._memory.truncate(before)
        return logits[torch.arange(len(logits), device=device)[:, None], at]

    def pending(self, texts: list[list[int]], depths: list[int]) -> list[list[int]]:
        """What each row has not read yet; nothing for rows that do not draft: they may have no positions left."""
        return [text[len(fed) :] if d else [] for text, fed, d in zip(texts, self.fed, depths, strict=True)]

    def feed(self, rows: list[list[int]]) -> Tensor:
        """Read new tokens, each row its own number of them; logits [rows, V] after each row's last."""
        memory, before = self._memory, list(self._memory.lengths)
        ids, _ = pad_right([row or [0] for row in rows], device=self.target.device)
        logits = self.target.forward(ids, memory, counts=[len(row) for row in rows])
        if any(len(row) != ids.shape[1] for row in rows):
            memory.truncate([length + len(row) for length, row in zip(before, rows, strict=True)])
        for fed, row in zip(self.fed, rows, strict=True):
            fed += row
        last = torch.tensor([max(len(row) - 1, 0) for row in rows], device=logits.device)
        return logits[torch.arange(len(rows), device=logits.device), last]

    def forget_wrong(self, texts: list[list[int]]) -> None:
        """Cut each row of the cache back to what its text still begins with; the newest token is always read anew."""
        lengths = list(self._memory.lengths)
        for row, (text, fed) in enumerate(zip(texts, self.fed, strict=True)):
            right = max(0, min(len(fed), len(text) - 1))
            while fed[:right] != text[:right]:
                right -= 1
            lengths[row] -= len(fed) - right
            del fed[right:]
        self._memory.truncate(lengths)

    def known(self, token: int) -> bool:
        return token >= 0 and (not self.same or token < self.engine.target.lm_head.weight.shape[0])

    @property
    def _memory(self) -> Memory:
        """What its rows hold, their prompts read."""
        while self._unread:
            _, memory = self.target.prefill(self._unread[0])
            del self._unread[0]  # a pass that failed is made again
            if self.memory is None:
                self.memory = memory
            else:
                self.memory.join(memory)
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
