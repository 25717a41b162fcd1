"""The decoding loop: prefill, then steps until every row has finished. One loop for files, batches and streams."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from baton.cache import Memory
from baton.engine.request import Request
from baton.engine.rules import Rules
from baton.models.adapter import Target
from baton.models.prompts import pad_right
from baton.models.writer import PromptInputs, Writer
from baton.sampling import choose
from baton.types import Sampling, Timings


@dataclass(frozen=True)
class Token:
    """One response token, as it leaves the loop."""

    request: Request
    id: int
    text: str  # what it settles: possibly nothing, possibly characters of earlier tokens too


class Batch:
    """Rows that are written together. A row that has finished leaves at once, so the work shrinks."""

    def __init__(
        self, writer: Writer, target: Target, requests: Sequence[Request], *, rules: Rules, sampling: Sampling
    ) -> None:
        self.writer, self.target = writer, target
        self.rules, self.sampling = rules, sampling
        self.requests = list(requests)
        self.timings = Timings()
        self.memory: Memory
        self.chosen: Tensor  # int64 [rows], each row's newest token, which the target has not read yet
        self.seen: Tensor | None = None  # bool [rows, V], tokens that the repetition penalty concerns

    def run(self) -> Iterator[list[Token]]:
        """Write all responses; yields what each pass over the target gave."""
        self.prefill()
        while True:
            yield self.accept()
            self.leave()
            if not self.requests:
                return
            self.step()

    @torch.inference_mode()
    def prefill(self) -> None:
        """Read the prompts and choose each row's first token."""
        ids, mask = pad_right([request.prompt_ids for request in self.requests], device=self.target.device)
        inputs = self.writer.encode(ids, mask, self.timings)
        for request, length in zip(self.requests, inputs.mask.sum(1).tolist(), strict=True):
            request.fit(self.target, length)  # a hand-off may read more vectors than there are prompt tokens
        started = perf_counter()
        logits, self.memory = self.target.prefill(inputs)
        if self.sampling.repetition_penalty != 1:
            self.seen = self._context(inputs, logits.shape[-1])
        self.chosen = self._choose(logits)
        self._wait()
        self.timings.prefill_s += perf_counter() - started

    @torch.inference_mode()
    def step(self) -> None:
        """One cached pass: the target reads each row's newest token and gives the next."""
        started = perf_counter()
        logits = self.target.forward(self.chosen[:, None], self.memory)
        self.chosen = self._choose(logits[:, -1])
        self._wait()
        self.timings.decode_s += perf_counter() - started
        self.timings.steps += 1

    def accept(self) -> list[Token]:
        """Hand each row its newest token."""
        pairs = zip(self.requests, self.chosen.tolist(), strict=True)
        return [Token(request, token, request.append(token, self.rules)) for request, token in pairs]

    @torch.inference_mode()
    def leave(self) -> None:
        """Drop the rows that have finished."""
        stay = [row for row, request in enumerate(self.requests) if request.finish_reason is None]
        if len(stay) == len(self.requests):
            return
        self.requests = [self.requests[row] for row in stay]
        if self.requests:
            self.memory.select(stay)
            self.chosen = self.chosen[stay]
            self.seen = None if self.seen is None else self.seen[stay]

    def _choose(self, logits: Tensor) -> Tensor:
        """int64 [rows] from [rows, V]. May change the logits given."""
        rules = self.rules
        if rules.banned:
            logits[:, list(rules.banned)] = -torch.inf
        if rules.banned_first:
            for row, request in enumerate(self.requests):
                if len(request.tokens) == (rules.first is not None):
                    logits[row, list(rules.banned_first)] = -torch.inf
        keys = ((request.key, len(request.tokens)) for request in self.requests)
        chosen = choose(logits, self.sampling, keys, self.seen)
        if rules.first is not None or rules.last is not None:
            for row, request in enumerate(self.requests):
                forced = rules.forced(len(request.tokens), request.limit)
                if forced is not None:
                    chosen[row] = forced
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        return chosen

    def _context(self, inputs: PromptInputs, vocabulary: int) -> Tensor:
        """Bool [rows, V]: tokens that stand before the response, as far as the writing model knows them as tokens."""
        seen = torch.zeros((len(inputs.mask), vocabulary), dtype=torch.bool, device=self.target.device)
        if not self.target.reads_prompt:
            seen[:, self.target.start] = True  # as transformers has it: the decoder's own tokens, start included
        elif inputs.ids is not None:
            for row, (ids, mask) in enumerate(zip(inputs.ids, inputs.mask.bool(), strict=True)):
                seen[row, ids[mask]] = True
        return seen

    def _wait(self) -> None:
        if self.target.device.type == "cuda":  # so that seconds are counted where they are spent
            torch.cuda.synchronize(self.target.device)
