"""`generate` and `stream`: prompts in, responses out."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from baton.engine.loop import Batch
from baton.engine.request import Request
from baton.engine.rules import Rules
from baton.engine.text import TextStream
from baton.errors import BatonError
from baton.models.adapter import Target, target_for
from baton.models.loading import load
from baton.models.prompts import tokenize_prompts
from baton.models.writer import Writer
from baton.types import Output, Sampling

OnFinish = Callable[[Output, int], None]
OnToken = Callable[[int, str, int], None]


def generate(
    model: Writer | str | Path,
    prompts: str | Sequence[str],
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    batch_size: int = 32,
    truncate: bool = False,
    first_index: int = 0,
    on_finish: OnFinish | None = None,
    on_token: OnToken | None = None,
) -> list[Output]:
    """Write a response to every prompt.

    Greedy responses are token for token those of transformers' `generate`. A response does not depend on the other
    prompts of its batch, nor on the batch size, as far as the model's arithmetic allows: exactly in float32, up to
    near-ties in bf16. Sampling settings stored with the model are not read: `sampling` says it all.

    Args:
        model: a model that `load` gave, or a folder or Hub id to load.
        prompts: one or any number; prompts of like length share a batch, outputs come in the order given.
        max_new_tokens: most tokens of a response, its end token included. It is also cut where a model with a fixed
            number of positions has no more; either way the `finish_reason` is "length".
        stop: strings that end a response; its text is cut before the first of them.
        batch_size: most prompts read and written together.
        truncate: cut prompts that are too long instead of raising.
        first_index: number of the first prompt, for a long list written in several calls: the random numbers of a
            request depend on the seed, its number and the position only.
        on_finish: called with (output, index of the prompt) as each response ends, longest prompts first.
        on_token: called with (token id, text it settles, index of the prompt) for every token.
    Raises:
        PromptError: a prompt is empty or too long; nothing has been generated then.
        UnsupportedModel: the engine does not run this model.
    """
    if batch_size < 1:
        raise BatonError(f"batch_size={batch_size}: it must be 1 or more")
    run = _Run(model, sampling, max_new_tokens, stop)
    texts = [prompts] if isinstance(prompts, str) else prompts
    requests = run.requests(texts, truncate=truncate, follow=on_token is not None, first=first_index)
    outputs: dict[int, Output] = {}
    longest_first = sorted(requests, key=lambda request: -len(request.prompt_ids))
    for start in range(0, len(requests), batch_size):
        batch = run.batch(longest_first[start : start + batch_size])
        for tokens in batch.run():
            for token in tokens:
                if on_token is not None:
                    on_token(token.id, token.text, token.request.index)
                if token.request.finish_reason is not None:
                    output = outputs[token.request.index] = token.request.output(batch.timings)
                    if on_finish is not None:
                        on_finish(output, token.request.index)
    return [outputs[index] for index in range(len(requests))]


def stream(
    model: Writer | str | Path,
    prompt: str,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    truncate: bool = False,
) -> Iterator[str]:
    """Write a response to one prompt and give its text piece by piece; joined, the pieces are `generate`'s text.

    A piece holds whole characters. What may be the beginning of a stop string is held back until it is known not to
    be. Arguments and errors as in `generate`; errors about the prompt are raised here, not at the first piece.
    """
    run = _Run(model, sampling, max_new_tokens, stop)
    requests = run.requests([prompt], truncate=truncate, follow=True, first=0)
    return (token.text for tokens in run.batch(requests).run() for token in tokens if token.text)


class _Run:
    """What all batches of one call share."""

    def __init__(
        self, model: Writer | str | Path, sampling: Sampling, max_new_tokens: int, stop: str | Sequence[str]
    ) -> None:
        if max_new_tokens < 1:
            raise BatonError(f"max_new_tokens={max_new_tokens}: it must be 1 or more")
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self.stop):
            raise BatonError("a stop string is empty: it would end every response before it starts")
        self.writer: Writer = load(model) if isinstance(model, (str, Path)) else model
        if self.writer.lm.training:
            raise BatonError("the model is in training mode, where dropout spoils what it writes: call its eval()")
        self.target: Target = target_for(self.writer.lm)
        self.rules = Rules.of(self.writer)
        self.sampling = sampling
        self.max_new_tokens = max_new_tokens

    def requests(self, prompts: Sequence[str], *, truncate: bool, follow: bool, first: int) -> list[Request]:
        writer = self.writer
        encoded = tokenize_prompts(writer.prompt_tokenizer, prompts, writer.prompt_limits, truncate=truncate)
        requests = []
        for index, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            request = Request(
                index=index,
                key=first + index,
                prompt=prompt,
                prompt_ids=ids,
                limit=self.max_new_tokens,
                stream=TextStream(writer.response_tokenizer, self.stop),
                follow=follow or bool(self.stop),
            )
            request.fit(self.target, len(ids))
            requests.append(request)
        return requests

    def batch(self, requests: Sequence[Request]) -> Batch:
        return Batch(self.writer, self.target, requests, rules=self.rules, sampling=self.sampling)
