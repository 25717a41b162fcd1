"""What the target says about a batch of drafts: its logits, processed at every visited node, and an acceptance rule.

The same processing whatever the drafter: bans and forced tokens of the checkpoint, penalties, bias, temperature and
filters are those of the path that leads to the node, so a token means the same inside a draft and in plain decoding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from baton import verify
from baton.best import best
from baton.draft import ROOT, Draft
from baton.engine.request import Request
from baton.engine.rules import Rules
from baton.errors import UnknownOption, nearest
from baton.sampling import distribution, draw, uniform
from baton.types import Rule, Sampling
from baton.verify import Verdict


@dataclass(frozen=True, kw_only=True)
class Typical:
    """Thresholds of the lossy rule (arXiv 2401.10774)."""

    epsilon: float = 0.3
    delta: float = 0.09


class Chooser:
    """Decides what is kept of drafts, and the token after it.

    Args:
        rules: what the checkpoint demands of single tokens.
        rule: `auto` takes recursive rejection where children were drawn and sample-and-match elsewhere.
    Raises: UnknownOption for a rule that does not exist.
    """

    def __init__(self, rules: Rules, rule: Rule = "auto", typical: Typical = Typical()) -> None:
        if rule not in (known := get_args(Rule)):
            raise UnknownOption(f"no acceptance rule {rule!r}: {nearest(rule, known)}")
        self.rules, self.rule, self.typical = rules, rule, typical
        self._banned = torch.tensor(rules.banned) if rules.banned else None

    def __call__(self, requests: Sequence[Request], drafts: Sequence[Draft], logits: Tensor) -> list[Verdict | None]:
        """A verdict per row; None where the logits were not numbers.

        Args:
            logits: [b, n + 1, V], of the root and the nodes of each draft, padded. May be changed.
        """
        if self._banned is not None:
            logits[..., self._banned.to(logits.device)] = -torch.inf
        if self.rule != "typical" and all(_context_free(request.sampling) for request in requests):
            return self._greedy(requests, drafts, logits)
        return self._walk(requests, drafts, logits)

    def _greedy(self, requests: Sequence[Request], drafts: Sequence[Draft], logits: Tensor) -> list[Verdict | None]:
        """All at once: the most probable token of every node needs no knowledge of the path."""
        if self.rules.banned_first:
            for row, request in enumerate(requests):
                if self._is_first(len(request.tokens)):
                    logits[row, 0, list(self.rules.banned_first)] = -torch.inf
        values, own = (found.tolist() for found in best(logits))
        verdicts: list[Verdict | None] = []
        for request, draft, tokens, scores in zip(requests, drafts, own, values, strict=True):

            def token_after(node: int) -> int | None:
                if not math.isfinite(scores[node + 1]):  # noqa: B023 (called before the next turn)
                    return None
                depth = 0 if node == ROOT else draft.tree.depths[node]  # noqa: B023
                forced = self.rules.forced(len(request.tokens) + depth, request.limit)  # noqa: B023
                return tokens[node + 1] if forced is None else forced  # noqa: B023

            verdicts.append(verify.follow(draft, token_after, self.rules.ends))
        return verdicts

    def _walk(self, requests: Sequence[Request], drafts: Sequence[Draft], logits: Tensor) -> list[Verdict | None]:
        """Level by level, all rows together: only visited nodes are processed."""
        at = [ROOT] * len(requests)
        paths: list[list[int]] = [[] for _ in requests]  # accepted nodes
        verdicts: list[Verdict | None] = [None] * len(requests)
        live = list(range(len(requests)))
        while live:
            scores = logits[live, [at[row] + 1 for row in live]].float()
            written = [[drafts[row].tokens[node] for node in paths[row]] for row in live]
            p, broken = self.process(scores, [requests[row] for row in live], written)
            numbers = [self._number(requests[row], len(paths[row]), "token") for row in live]
            own = draw(p, numbers).tolist()
            moved = []
            for place, row in enumerate(live):
                if broken[place]:
                    if paths[row]:  # what came before is sound; its last token becomes the root that is looked at again
                        *sound, last = paths[row]
                        verdicts[row] = Verdict(tuple(sound), drafts[row].tokens[last])
                    continue
                child, token = self._decide(requests[row], drafts[row], at[row], len(paths[row]), p[place], own[place])
                if child is None or token in self.rules.ends:
                    verdicts[row] = Verdict(tuple(paths[row]), token)
                else:
                    paths[row].append(child)
                    at[row] = child
                    moved.append(row)
            live = moved
        return verdicts

    def _decide(
        self, request: Request, draft: Draft, node: int, depth: int, p: Tensor, own: int
    ) -> tuple[int | None, int]:
        """The child that is accepted, or None, and the token; `own` was drawn from p."""
        forced = self.rules.forced(len(request.tokens) + depth, request.limit)
        if forced is not None:
            return verify.match(draft, node, forced), forced
        if self.rule == "typical":
            child = verify.typical(draft, node, p, self.typical.epsilon, self.typical.delta)
            return child, own if child is None else draft.tokens[child]
        drawn = node in draft.drawn and not request.sampling.greedy
        asked = self.rule == "recursive-rejection" or (self.rule == "auto" and drawn)
        if asked and draft.tree.children(node):
            return verify.recursive_rejection(
                draft, node, p, lambda purpose, rank: self._number(request, depth, purpose, rank)
            )
        return verify.match(draft, node, own), own

    def _number(self, request: Request, depth: int, purpose: str, rank: int = 0) -> float:
        position = len(request.tokens) + depth
        return uniform(request.sampling.seed, request.key, f"{purpose}/{rank}" if rank else purpose, position)

    def process(
        self, scores: Tensor, requests: Sequence[Request], written: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[bool]]:
        """The distributions [n, V] that nodes draw from, and which rows have none. For draft and target alike.

        Args:
            scores: float32 [n, V], may be changed; written: tokens on the way to each node, after the response so far.
        """
        for row, (request, path) in enumerate(zip(requests, written, strict=True)):
            if self.rules.banned_first and self._is_first(len(request.tokens) + len(path)):
                scores[row, list(self.rules.banned_first)] = -torch.inf
            banned = [words[-1] for words in request.sampling.bad_words if self._would_end(words, request, path)]
            if banned:
                scores[row, banned] = -torch.inf
        broken = (~scores.amax(-1).isfinite()).tolist()
        groups: dict[Sampling, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(request.sampling, []).append(row)
        p = torch.empty_like(scores)
        for sampling, rows in groups.items():
            seen = None
            if sampling.repetition_penalty != 1:
                seen = torch.zeros((len(rows), scores.shape[-1]), dtype=torch.bool, device=scores.device)
                for place, row in enumerate(rows):
                    request = requests[row]
                    seen[place, [*request.read, *request.tokens, *written[row]]] = True
            p[rows] = distribution(scores[rows], sampling, seen)
        return p, broken

    def _would_end(self, words: Sequence[int], request: Request, path: Sequence[int]) -> bool:
        before = len(words) - 1
        return before == 0 or [*request.read, *request.tokens, *path][-before:] == list(words[:-1])

    def _is_first(self, position: int) -> bool:
        """Whether this is the first position where the token is not forced."""
        return position == (self.rules.first is not None)


def _context_free(sampling: Sampling) -> bool:
    return sampling.greedy and sampling.repetition_penalty == 1 and not sampling.bad_words and not sampling.logit_bias
