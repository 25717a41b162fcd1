"""The decoding loop: requests join and leave at any step, and every row may accept another number of tokens.

One loop for every drafter, for files, batches, streams and servers. It knows a drafter only as `Drafter`.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from baton.cache import Memory, fill_holes
from baton.draft import NOTHING, ROOT, Draft, stacked
from baton.engine.choose import Chooser
from baton.engine.drafter import Drafter, Joined, Seen
from baton.engine.request import Request
from baton.engine.rules import Rules
from baton.engine.text import TextStream
from baton.errors import BatonError, DraftError, MemoryShort
from baton.machine import free_bytes
from baton.models.adapter import Target, slot_bytes, target_for
from baton.models.loading import load
from baton.models.prompts import pad_right, same_tokenizer, tokenize_prompts
from baton.models.writer import Writer
from baton.types import TARGET, Rule, Sampling, Step, Timings
from baton.verify import Verdict

SMALL = 2**26  # bytes of keys and values that any machine has


@dataclass(frozen=True)
class Token:
    """One response token, as it leaves the loop."""

    request: Request
    id: int
    text: str  # what it settles: possibly nothing, possibly characters of earlier tokens too
    source: str  # who wrote it: the target, or the drafter whose guess it agreed with


@dataclass(frozen=True)
class Progress:
    """What one step gave."""

    tokens: list[Token]
    ended: list[Request]  # requests that have ended, also those that failed


class Engine:
    """Requests, written together by one model.

    Args:
        model: a model that `load` gave, or a folder or Hub id to load.
        drafter: proposes tokens: an object, or text such as "prompt-lookup:max_ngram=4"; None is plain decoding.
            It serves one engine.
        rule: how drafts are verified. `auto` is lossless: recursive rejection for children that were drawn,
            sample-and-match for all others. `typical` is not.
        max_rows: most requests written at once; others wait.
        max_length: most positions of a row, prompt and response (of an encoder-decoder, the response alone); None is
            as many as the model has. Bounds the memory that a request can ask for.
        patience: rows that must be free before waiting requests are read, unless none is being written: reading
            several prompts in one pass is cheaper, reading at once answers earlier.
        rules: what is demanded of single tokens; None reads it from the checkpoint.
    Raises:
        UnsupportedModel: the engine does not run this model.
    """

    def __init__(
        self,
        model: Writer | str | Path,
        drafter: Drafter | str | None = None,
        *,
        rule: Rule = "auto",
        max_rows: int = 32,
        max_length: int | None = None,
        patience: int = 1,
        rules: Rules | None = None,
    ) -> None:
        if max_rows < 1:
            raise BatonError(f"max_rows={max_rows}: it must be 1 or more")
        if max_length is not None and max_length < 2:
            raise BatonError(f"max_length={max_length}: it must be 2 or more, for a prompt and a response")
        self.writer: Writer = load(model) if isinstance(model, (str, Path)) else model
        if self.writer.lm.training:
            raise BatonError("the model is in training mode, where dropout spoils what it writes: call its eval()")
        self.target: Target = target_for(self.writer.lm)
        self.prompt_limits = dict(self.writer.prompt_limits)
        if max_length is not None:
            self.target.context = min(max_length, self.target.context or max_length)
            if self.target.reads_prompt:
                self.prompt_limits[f"this engine (max_length={max_length})"] = max_length - 1
        self.rules = rules or Rules.of(self.writer)
        self.chooser = Chooser(self.rules, rule)
        if isinstance(drafter, str):
            from baton.drafters import make  # methods know the engine; it knows them by this one name only

            drafter = make(drafter)
        self.drafter = drafter or Drafter()
        self._slot_bytes = slot_bytes(self.target.model)
        self.max_rows, self.patience = max_rows, min(patience, max_rows)
        self.waiting: deque[Request] = deque()
        self.rows: list[Request] = []  # being written, in the order of the memory's rows
        self.memory: Memory | None = None
        self.drafter.attach(self)
        self._shared = same_tokenizer(self.writer.prompt_tokenizer, self.writer.response_tokenizer)

    def requests(
        self,
        prompts: Sequence[str],
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        truncate: bool = False,
        follow: bool = True,
        first_index: int = 0,
    ) -> list[Request]:
        """Prompts made ready for `submit`; arguments as in `generate`.

        Raises: PromptError when a prompt is empty or too long.
        """
        if max_new_tokens < 1:
            raise BatonError(f"max_new_tokens={max_new_tokens}: it must be 1 or more")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise BatonError("a stop string is empty: it would end every response before it starts")
        writer = self.writer
        encoded = tokenize_prompts(writer.prompt_tokenizer, prompts, self.prompt_limits, truncate=truncate)
        made = []
        for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            request = Request(
                index=index,
                key=first_index + index,
                prompt=prompt,
                prompt_ids=ids,
                context=ids if self._shared else [],
                sampling=sampling,
                limit=max_new_tokens,
                stream=TextStream(writer.response_tokenizer, stops),
                follow=follow or bool(stops),
            )
            request.fit(self.target, len(ids))
            made.append(request)
        return made

    def submit(self, requests: Iterable[Request]) -> None:
        """Let requests in as rows become free, in this order.

        Raises: MemoryShort when the rows they need would not fit; none is let in then.
        """
        new = list(requests)
        self._check_memory([*self.rows, *self.waiting, *new])
        self.waiting.extend(new)

    def cancel(self, request: Request) -> None:
        """End a request early; its row is free for the next one. Nothing happens when it has ended."""
        if request.finish_reason is None:
            request.end("cancelled")
            if request in self.waiting:
                self.waiting.remove(request)
            self._leave()

    @property
    def idle(self) -> bool:
        """Nothing is left to do."""
        return not self.rows and not self.waiting

    @torch.inference_mode()
    def step(self) -> Progress:
        """Read prompts that wait, where there is room, or let every row grow."""
        free = self.max_rows - len(self.rows)
        if self.waiting and (not self.rows or free >= self.patience):
            tokens = self._join([self.waiting.popleft() for _ in range(min(free, len(self.waiting)))])
        elif self.rows:
            tokens = self._grow()
        else:
            return Progress([], [])
        return Progress(tokens, self._leave())

    def _grow(self) -> list[Token]:
        """One decode step: what is proposed, as far as the target agrees, and one token of its own."""
        clock = _Clock(self.target.device)
        drafts = self._checked(self.drafter.propose(self.rows))
        draft_s = clock.lap()
        before = list(self._memory.lengths)
        try:
            with self.target.capture(self.drafter.layers) as hidden:
                ids, positions, tree = self._inputs(drafts)
                begun = self.drafter.begun
                logits = self.target.forward(
                    ids, self._memory, positions=positions, tree=tree, begun=begun, counts=[1 + len(d) for d in drafts]
                )
            verdicts = self.chooser(self.rows, drafts, logits)
        except BaseException:  # a step that may be tried again must not find half of this one
            self._memory.truncate([min(pair) for pair in zip(before, self._memory.lengths, strict=True)])
            raise
        self._memory.keep([[0, *(node + 1 for node in v.accepted)] if v else [0] for v in verdicts])
        _clear_failed(self._memory, verdicts)
        verify_s = clock.lap()
        self.drafter.observe(Seen(requests=self.rows, drafts=drafts, verdicts=verdicts, logits=logits, hidden=hidden))
        draft_s += clock.lap()
        new = [self._append(*row) for row in zip(self.rows, drafts, verdicts, strict=True)]
        other_s = clock.lap()
        for request, draft, verdict, tokens in zip(self.rows, drafts, verdicts, new, strict=True):
            accepted = verdict.accepted if verdict else ()
            request.steps.append(
                Step(
                    rows=ids.shape[1],
                    drafted=Counter(draft.sources()),
                    evaluated=sum(len(draft.tree.children(node)) for node in (ROOT, *accepted)),
                    accepted=min(len(accepted), len(tokens)),
                    emitted=len(tokens),
                    draft_s=draft_s,
                    verify_s=verify_s,
                    other_s=other_s,
                )
            )
            request.timings.decode_s += draft_s + verify_s + other_s
            request.timings.steps += 1
        return [token for tokens in new for token in tokens]

    def _join(self, requests: list[Request]) -> list[Token]:
        """Read prompts, one pass, a new row each, and give each its first token."""
        timings = Timings()
        ids, mask = pad_right([request.prompt_ids for request in requests], device=self.target.device)
        inputs = self.writer.encode(ids, mask, timings)
        for request, length in zip(requests, inputs.mask.sum(1).tolist(), strict=True):
            request.fit(self.target, length)  # a hand-off may read more vectors than there are prompt tokens
            request.read = [self.target.start] if self.target.start is not None else []
            if self.target.reads_prompt and inputs.ids is not None:
                request.read = request.prompt_ids
        clock = _Clock(self.target.device)
        with self.target.capture(self.drafter.layers) as hidden:
            logits, memory = self.target.prefill(inputs)
        nothing = [NOTHING] * len(requests)
        verdicts = self.chooser(requests, nothing, logits[:, None])
        _clear_failed(memory, verdicts)
        timings.prefill_s = clock.lap()
        tokens: list[Token] = []
        for request, verdict in zip(requests, verdicts, strict=True):
            request.timings = replace(timings)
            tokens += self._append(request, NOTHING, verdict)
        self.drafter.join(Joined(requests=requests, inputs=inputs, memory=memory, hidden=hidden))
        if self.memory is None:
            self.memory = memory
        else:
            self.memory.join(memory)
        self.rows = self.rows + requests
        return tokens

    def _append(self, request: Request, draft: Draft, verdict: Verdict | None) -> list[Token]:
        """Take in what a verdict says, up to the response's end."""
        if verdict is None:
            where = f"decode step {len(request.steps) + 1}" if request.tokens else "the prompt"
            request.end("error", f"the model gave no usable logits (not a number, or all tokens forbidden) at {where}")
            return []
        sources = draft.sources()
        found = [(draft.tokens[node], sources[node]) for node in verdict.accepted] + [(verdict.token, TARGET)]
        tokens: list[Token] = []
        for token, source in found:
            text = request.append(token, source, self.rules)
            tokens.append(Token(request, token, text, source))
            if request.finish_reason is not None:
                break
        return tokens

    def _leave(self) -> list[Request]:
        """Free the rows of requests that have ended."""
        leaving = {row: r for row, r in enumerate(self.rows) if r.finish_reason is not None}
        if leaving:
            stay = fill_holes(len(self.rows), leaving)
            self.rows = [self.rows[row] for row in stay]
            self.drafter.select(stay)
            if stay:
                self._memory.select(stay)
            else:
                self.memory = None
        return list(leaving.values())

    def _check_memory(self, requests: Sequence[Request]) -> None:
        rows = min(self.max_rows, len(requests))
        each = self._slot_bytes
        slots = max((r.limit + (len(r.prompt_ids) if self.target.reads_prompt else 1) for r in requests), default=0)
        if rows * slots * each <= SMALL:  # asking the system takes as long as a small model's step
            return
        free = free_bytes(self.target.device)
        memory = self.memory  # another thread may be in the middle of a step
        if memory is not None:
            free += each * sum(memory.lengths)
        if rows * slots * each > free:
            raise MemoryShort(
                f"{rows} rows of {slots} positions need {rows * slots * each / 1e9:.1f} GB for keys and values, and "
                f"{free / 1e9:.1f} GB are free: {free // (each * slots)} rows of that length fit (max_rows, "
                f"--batch-size), or {rows} rows of {free // (each * rows)} positions (max_length, max_new_tokens)"
            )

    def _checked(self, drafts: list[Draft]) -> list[Draft]:
        for request, draft in zip(self.rows, drafts, strict=True):
            if draft.tree.depth > max(request.room, 0):
                raise DraftError(
                    f"{self.drafter.name} proposed {draft.tree.depth} tokens in a row where {request.room} are left: "
                    "cut drafts with draft.within(request.room)"
                )
        return drafts

    def _inputs(self, drafts: Sequence[Draft]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What is sent to the target: each row's newest token and its draft, padded; where they are trees, how."""
        width = 1 + max(map(len, drafts))
        ids = torch.tensor(
            [
                [request.tokens[-1], *draft.tokens, *[0] * (width - 1 - len(draft))]
                for request, draft in zip(self.rows, drafts, strict=True)
            ],
            device=self.target.device,
        )
        if all(draft.tree.is_chain for draft in drafts):
            return ids, None, None
        steps, tree = stacked([draft.tree for draft in drafts])
        positions = torch.tensor(self._memory.lengths)[:, None] + steps
        return ids, positions.to(self.target.device), tree.to(self.target.device)

    @property
    def _memory(self) -> Memory:
        assert self.memory is not None
        return self.memory


class _Clock:
    """Seconds of one part after another."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.at = device, perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        if self.device.type == "cuda":  # so that seconds are counted where they are spent
            torch.cuda.synchronize(self.device)
        before, self.at = self.at, perf_counter()
        return self.at - before


def _clear_failed(memory: Memory, verdicts: Sequence[Verdict | None]) -> None:
    for row, verdict in enumerate(verdicts):
        if verdict is None:
            memory.clear(row)
