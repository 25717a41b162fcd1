"""The same loop for programs that wait for many things at once: requests come, stream and are cancelled at any time."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from baton.engine.loop import Engine, Progress
from baton.engine.request import Request
from baton.errors import BatonError
from baton.types import Output


class AsyncEngine:
    """An `Engine` whose steps run in a thread while the event loop goes on.

    Requests that are awaited together are written together. Breaking out of a stream, or cancelling the task that
    awaits a response, frees its row.

    Args:
        engine: used by this object only from now on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._queues: dict[Request, asyncio.Queue[str | None]] = {}
        self._cancelled: list[Request] = []
        self._runner: asyncio.Task[None] | None = None

    async def generate(self, prompt: str, **options: Any) -> Output:
        """One response; options as in `baton.generate`. Raises: BatonError when the prompt or the model fails."""
        request = self._submit(prompt, follow=False, **options)
        async for _ in self._pieces(request):
            pass
        return request.output()

    async def stream(self, prompt: str, **options: Any) -> AsyncIterator[str]:
        """The text of one response, piece by piece; options as in `baton.stream`."""
        async for piece in self._pieces(self._submit(prompt, follow=True, **options)):
            yield piece

    def _submit(self, prompt: str, **options: Any) -> Request:
        (request,) = self.engine.requests([prompt], **options)
        self.engine.submit([request])
        self._queues[request] = asyncio.Queue()
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return request

    async def _pieces(self, request: Request) -> AsyncIterator[str]:
        queue = self._queues[request]
        try:
            while (piece := await queue.get()) is not None:
                yield piece
            if request.finish_reason == "error":
                raise BatonError(request.error)
        finally:
            if self._queues.pop(request, None) is not None and request.finish_reason is None:
                self._cancelled.append(request)  # the loop may be in the middle of a step

    async def _run(self) -> None:
        try:
            while not self.engine.idle:
                self._hand_out(await asyncio.to_thread(self.engine.step))
                while self._cancelled:
                    self.engine.cancel(self._cancelled.pop())
        except Exception as error:
            for request, queue in self._queues.items():  # who waits is told; new requests find free rows
                if request.finish_reason is None:
                    self.engine.cancel(request)
                    request.finish_reason, request.error = "error", str(error) or type(error).__name__
                queue.put_nowait(None)

    def _hand_out(self, progress: Progress) -> None:
        for token in progress.tokens:
            if token.text and token.request in self._queues:
                self._queues[token.request].put_nowait(token.text)
        for request in progress.ended:
            if request in self._queues:
                self._queues[request].put_nowait(None)
