"""`generate` and `stream`: prompts in, responses out."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from baton.engine.drafter import Drafter
from baton.engine.loop import Engine
from baton.engine.request import Request
from baton.errors import BatonError
from baton.models.writer import Writer
from baton.types import Output, Rule, Sampling

OnFinish = Callable[[Output, int], None]
OnToken = Callable[[int, str, int], None]


def generate(
    model: Engine | Writer | str | Path,
    prompts: str | Sequence[str],
    *,
    drafter: Drafter | str | None = None,
    rule: Rule = "auto",
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
        model: a model that `load` gave, or a folder or Hub id to load; or an `Engine`, which keeps its drafter from
            call to call, and has its own number of rows.
        drafter: proposes tokens, which changes speed and never text: an object, or text such as
            "prompt-lookup:max_ngram=4". None is plain decoding.
        rule: how drafts are verified, see `Engine`.
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
    engine = _engine(model, drafter, rule, max_rows=batch_size, patience=max(1, batch_size // 8))
    texts = [prompts] if isinstance(prompts, str) else prompts
    requests = engine.requests(
        texts,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        truncate=truncate,
        follow=on_token is not None,
        first_index=first_index,
    )
    outputs: dict[int, Output] = {}
    engine.submit(sorted(requests, key=lambda request: -len(request.prompt_ids)))
    try:
        while not engine.idle:
            progress = engine.step()
            for token in progress.tokens:
                if on_token is not None:
                    on_token(token.id, token.text, token.request.index)
            for request in progress.ended:
                output = outputs[request.index] = request.output()
                if on_finish is not None:
                    on_finish(output, request.index)
    finally:
        for request in requests:  # after an error, an Engine that goes on must not go on with these
            engine.cancel(request)
    return [outputs[index] for index in range(len(requests))]


def stream(
    model: Engine | Writer | str | Path,
    prompt: str,
    *,
    drafter: Drafter | str | None = None,
    rule: Rule = "auto",
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    truncate: bool = False,
    first_index: int = 0,
) -> Iterator[str]:
    """Write a response to one prompt and give its text piece by piece; joined, the pieces are `generate`'s text.

    A piece holds whole characters. What may be the beginning of a stop string is held back until it is known not to
    be. Arguments and errors as in `generate`; errors about the prompt are raised here, not at the first piece.
    """
    engine = _engine(model, drafter, rule, max_rows=1, patience=1)
    requests = engine.requests(
        [prompt],
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
        truncate=truncate,
        first_index=first_index,
    )
    return _pieces(engine, requests[0])


def _engine(
    model: Engine | Writer | str | Path, drafter: Drafter | str | None, rule: Rule, *, max_rows: int, patience: int
) -> Engine:
    if not isinstance(model, Engine):
        return Engine(model, drafter, rule=rule, max_rows=max_rows, patience=patience)
    if drafter is not None or rule != "auto":
        raise BatonError("an Engine has its own drafter and rule: give them where it is made")
    _check_idle(model)
    return model


def _check_idle(engine: Engine) -> None:
    if not engine.idle:
        raise BatonError("this Engine is writing other requests: submit to it, or wait until it is idle")


def _pieces(engine: Engine, request: Request) -> Iterator[str]:
    _check_idle(engine)
    engine.submit([request])
    try:
        while request.finish_reason is None:
            yield from (token.text for token in engine.step().tokens if token.text and token.request is request)
    finally:
        engine.cancel(request)
    if request.finish_reason == "error":
        raise BatonError(request.error)
