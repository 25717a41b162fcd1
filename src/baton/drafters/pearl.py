"""PEARL: the small model writes on while the target still reads what it wrote before.

Source: arXiv 2408.11850. Lossless: yes, token for token. Training: none. Draft cost: the longer of both models' times
counts. Helps where each has processor cores of its own and the small model is often right; on one GPU they take turns.

While the target reads, the small model writes on, as if all of the draft were right. If it is, and the target's own
token is the first of the new ones, the others are the next draft. Else they are dropped, and the next pass has no
draft: its own token tests the first of those written meanwhile. A pass emits up to `num_draft_tokens` tokens.

Differences: the published code runs two processes, one device each; here one thread works beside the engine's, and
PyTorch's threads are shared out, a quarter to the small model. Drafts are its most probable tokens, also when
sampling: verified by sample-and-match, they need no random numbers and no distributions, and leave seeded text as it
is. Where less than the whole draft is verified, what still agrees of the rest stays the next draft. By default the
draft length follows the measured ratio of times that the paper finds best; the published code is told a number.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from baton.best import best
from baton.draft import NOTHING, Draft
from baton.drafters.parts.small_model import SmallModel
from baton.engine.drafter import Joined, Seen
from baton.engine.request import Request
from baton.errors import UnknownOption

if TYPE_CHECKING:
    from baton.engine.loop import Engine

logger = logging.getLogger(__name__)

FIRST, LEAST, MOST = 4, 2, 16  # draft lengths: until times are known, and the limits of what follows from them


@dataclass(kw_only=True)
class Pearl(SmallModel):
    num_draft_tokens: int = 0  # tokens written per step, 2 or more; 0: as many as take the time of the target's pass
    workers: bool = True  # write in a thread of its own; false: the same, one after the other
    name = "pearl"

    def __post_init__(self) -> None:
        if (length := self.num_draft_tokens) < 0 or length == 1:
            raise UnknownOption(f"{self.name}: num_draft_tokens={length} is not possible: give 2 or more, or 0 (auto)")

    def attach(self, engine: "Engine") -> None:
        super().attach(engine)
        self._drafts: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()  # what is proposed next
        apart = self.workers and self.writer.lm is not engine.writer.lm  # one model cannot run in two threads
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.name) if apart else None
        self._written: Callable[[], list[list[int]]] | None = None  # waits for the tokens behind the drafts
        self._failed = False
        self._since = self._target_s = self._token_s = 0.0  # of a pass, of a token of the small model; smoothed

    def join(self, joined: Joined) -> None:
        self._finish()
        if not self._failed:
            super().join(joined)

    def select(self, rows: Sequence[int]) -> None:
        self._finish()
        self._failed = self._failed and bool(rows)  # when those that the small model has lost have ended, all is afresh
        if not self._failed:
            super().select(rows)

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        self._finish()  # of a step that failed
        if self._failed:
            return [NOTHING] * len(requests)
        drafts = [self._drafts.get(request, [])[: max(request.room, 0)] for request in requests]
        self._drafts.update(zip(requests, drafts, strict=True))  # what is written now goes on from there
        texts = [request.tokens + draft for request, draft in zip(requests, drafts, strict=True)]
        depths = [
            min(self.depth(request, row, len(text), self._length()), request.limit - 1 - len(text))
            for row, (request, text) in enumerate(zip(requests, texts, strict=True))
        ]
        depths = [depth if depth >= LEAST else 0 for depth in depths]  # one token alone would never be proposed
        if any(depths):
            self._start(texts, depths)
        self._since = perf_counter()
        return [Draft.chain(draft, self.name) if draft else NOTHING for draft in drafts]

    def observe(self, seen: Seen) -> None:
        if self._written is not None:
            self._target_s = _smooth(self._target_s, perf_counter() - self._since)
        written = self._finish() or [[] for _ in seen.requests]
        for request, draft, verdict, new in zip(seen.requests, seen.drafts, seen.verdicts, written, strict=True):
            expected = [*self._drafts.get(request, []), *new]
            said = [*(draft.tokens[node] for node in verdict.accepted), verdict.token] if verdict else []
            self._drafts[request] = expected[len(said) :] if expected[: len(said)] == said else []

    def _length(self) -> int:
        if self.num_draft_tokens or not self._token_s:
            return self.num_draft_tokens or FIRST
        return min(max(round(self._target_s / self._token_s), LEAST), MOST)

    def _start(self, texts: list[list[int]], depths: list[int]) -> None:
        """Have the tokens after each row's text written, in the worker or when they are asked for."""
        self._threads = torch.get_num_threads()
        if self._thread is None:
            self._written = partial(self._write, texts, depths, self._threads)
            return
        share = max(1, self._threads // 4)
        self._written = self._thread.submit(self._write, texts, depths, share).result
        torch.set_num_threads(max(1, self._threads - share))

    def _finish(self) -> list[list[int]] | None:
        """What the worker has written, which is at rest then; None: nothing."""
        if self._written is None:
            return None
        written = None
        try:
            written = self._written()
        except Exception as error:
            logger.warning("%s: the small model failed; decoding goes on without drafts: %r", self.name, error)
            self._failed, self.memory = True, None
            self._drafts.clear()
        self._written = None  # not before it is at rest: an interrupt while waiting leaves it to the next call
        torch.set_num_threads(self._threads)
        return written

    @torch.inference_mode()
    def _write(self, texts: list[list[int]], depths: list[int], threads: int) -> list[list[int]]:
        torch.set_num_threads(threads)
        self.forget_wrong(texts)
        written: list[list[int]] = [[] for _ in texts]
        rows, count, since = self.pending(texts, depths), -1, 0.0
        while any(rows):
            chosen = best(self.feed(rows))[1].tolist()
            since, count = since or perf_counter(), count + 1  # the first pass may read more, and is not counted
            for row, token in enumerate(chosen):
                if len(written[row]) < depths[row] and self.known(token):
                    written[row].append(token)
                else:
                    depths[row] = len(written[row])
            rows = [new[-1:] if len(new) < depth else [] for new, depth in zip(written, depths, strict=True)]
        if count > 0:
            self._token_s = _smooth(self._token_s, (perf_counter() - since) / count)
        return written


def _smooth(before: float, now: float) -> float:
    return 0.8 * before + 0.2 * now if before else now
