"""Drafts from the target's own first layers: they write into its cache, and its pass goes on where they stopped.

What methods share that leave the target early: they say after which layer, how deep, and when to stop.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from baton.best import best
from baton.draft import NOTHING, Draft
from baton.engine.drafter import Begun, Drafter
from baton.engine.request import Request
from baton.errors import UnsupportedModel
from baton.sampling import draw, uniform

if TYPE_CHECKING:
    from baton.engine.loop import Engine


@dataclass(kw_only=True)
class EarlyExit(Drafter):
    sample: bool = False  # draw from the exit's distribution; such drafts are verified by recursive rejection

    @property
    def draws(self) -> bool:
        return self.sample

    def attach(self, engine: "Engine") -> None:
        self.engine = engine
        self.depth = len(engine.target.layers)  # of the target, in layers
        self.begun = None
        if self.depth < 2:
            raise UnsupportedModel(f"{self.name} leaves a model before its last layer, and this one has a single one")

    def chains(
        self,
        requests: Sequence[Request],
        exit_layer: int,
        depths: Sequence[int],
        thresholds: Sequence[float],
        keep: Collection[int] = (),
    ) -> tuple[list[Draft], dict[int, Tensor]]:
        """Chains from the target's first layers, and what these gave of root and draft.

        A chain ends at its depth, and behind a token that ends a response or that the exit gives a probability below
        the row's threshold. That token stays: it has been drawn, and what becomes of it must not depend on its value.

        Args:
            exit_layer: the target's layers that are run.
            depths, thresholds: per row.
            keep: layers up to the exit's.
        Returns: a draft per row; layer -> [b, n + 1, d], of the layers to keep.
        """
        self.begun = None
        open_rows = {row for row, depth in enumerate(depths) if depth > 0}
        if not open_rows:
            return [NOTHING] * len(requests), {}
        target, memory = self.engine.target, self.engine.memory
        assert memory is not None
        before = list(memory.lengths)
        tokens: list[list[int]] = [[] for _ in requests]
        drawn: list[list[Tensor]] = [[] for _ in requests]
        newest = [request.tokens[-1] for request in requests]
        states: list[Tensor] = []
        kept: dict[int, list[Tensor]] = {layer: [] for layer in keep}
        try:
            while True:
                ids = torch.tensor([[token] for token in newest], device=target.device)
                with target.capture(kept) as found:
                    states.append(target.forward_layers(0, exit_layer, ids, memory))
                for layer, parts in kept.items():
                    parts.append(found[layer])
                if not open_rows:  # the last tokens have been read too: the target's pass needs what comes of them
                    break
                logits = target.head(states[-1])[:, 0].float()
                newest, broken = self._choose(requests, tokens, drawn, logits)
                open_rows -= broken
                sure = [1.0] * len(newest)
                if any(thresholds):
                    sure = logits.softmax(-1)[range(len(newest)), newest].tolist()
                for row in list(open_rows):
                    tokens[row].append(newest[row])
                    ended = newest[row] in self.engine.rules.ends
                    if ended or len(tokens[row]) == depths[row] or sure[row] < thresholds[row]:
                        open_rows.remove(row)
        finally:
            memory.truncate(before)
        width = 1 + max(map(len, tokens))  # where an exit gave no number in any row, one more has been read
        self.begun = Begun(exit_layer, torch.cat(states, 1)[:, :width])
        drafts = [
            Draft.chain(found, self.name, [q for q, _ in zip(kept_q, found, strict=False)]) if found else NOTHING
            for found, kept_q in zip(tokens, drawn, strict=True)
        ]
        return drafts, {layer: torch.cat(parts, 1)[:, :width] for layer, parts in kept.items()}

    def _choose(
        self, requests: Sequence[Request], tokens: list[list[int]], drawn: list[list[Tensor]], logits: Tensor
    ) -> tuple[list[int], set[int]]:
        """One token per row, the most probable one or one that is drawn as the target draws; rows that have none."""
        if not self.sample or all(request.sampling.greedy for request in requests):
            return best(logits)[1].tolist(), set()
        q, failed = self.engine.chooser.process(logits.clone(), requests, tokens)
        broken = {row for row, bad in enumerate(failed) if bad}
        for row, distribution in enumerate(q):
            drawn[row].append(distribution)
        # Each step of the request draws anew: a number used twice would tie this draft to what an earlier one led to.
        numbers = [
            uniform(r.sampling.seed, r.key, f"draft/{len(r.steps)}", len(r.tokens) + len(t))
            for r, t in zip(requests, tokens, strict=True)
        ]
        return [0 if row in broken else token for row, token in enumerate(draw(q, numbers).tolist())], broken
