"""Runs an engine on a thread of its own, and hands its tokens to asyncio.

handle = worker.submit(prompt, ...)        on the event loop
async for token in handle: ...             ids, log-probabilities, and last a finish reason
worker.free(handle)                        the request leaves the batch, whatever it does
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from rorqual import runtime
from rorqual.serve.engine import Engine
from rorqual.serve.sampling import TokenLogprobs
from rorqual.serve.scheduler import Observed, Request


class Token(NamedTuple):
    """An id of a request.

    It is None where a step gave none: the request failed, or its prompt was only read. `finish` is
    None until the last one.
    """

    id: int | None
    finish: str | None
    logprobs: TokenLogprobs | None = None
    observed: Observed | None = None  # of the id before it: first of the whole prompt
    seconds: float = 0.0  # when it was made, by time.perf_counter


class Handle:
    """One request that runs; `tokens` yields its ids."""

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.submitted = time.perf_counter()
        self._loop = loop
        self._queue: asyncio.Queue[Token] = asyncio.Queue()
        self._sent = 0  # ids that have been handed on
        self.taken = 0  # ids that the client has got: after a stop string there may be more

    def fresh(self, finish: str | None) -> list[Token]:
        """Returns a token for each id since the last call; the last of them has the finish.

        Where the request failed, or got no id, a token without one has it.
        """
        request = self.request
        now = time.perf_counter()
        ids = request.ids[self._sent :]
        tokens = [self._token(number, token, now) for number, token in enumerate(ids, self._sent)]
        self._sent += len(ids)
        if finish is not None and (not tokens or finish in ("error", "stopping")):
            tokens.append(self._token(self._sent, None, now))
        if finish is not None:
            tokens[-1] = tokens[-1]._replace(finish=finish)
        return tokens

    def _token(self, number: int, token: int | None, seconds: float) -> Token:
        """Returns the token of an id, or of the step that gave none after so many ids."""
        logprobs = self.request.logprobs
        observed = self.request.observed
        return Token(
            token,
            None,
            logprobs[number] if token is not None and number < len(logprobs) else None,
            observed[number] if number < len(observed) else None,
            seconds,
        )

    def put(self, token: Token) -> None:
        """Adds a token; it may be called from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, token)

    async def tokens(self, seconds: float) -> AsyncIterator[Token]:
        """Yields the tokens as they come. TimeoutError if there is no end within `seconds`."""
        deadline = self._loop.time() + seconds
        while True:
            # Only the wait is limited: what is done with a token is not this generator's.
            async with asyncio.timeout_at(deadline):
                token = await self._queue.get()
            yield token
            if token.finish is not None:
                return


class Worker(threading.Thread):
    """The one thread that runs the model. `submit` and `free` may be called from any other."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="rorqual model", daemon=True)
        self.engine = engine
        self._wake = threading.Condition()
        self._handles: dict[Request, Handle] = {}
        self._stopping = False

    def submit(self, prompt: Sequence[int], **options: Any) -> Handle:
        """Submits a prompt with the options of Engine.submit.

        It must be called on the event loop that reads the handle.
        """
        loop = asyncio.get_running_loop()
        with self._wake:
            request = self.engine.submit(prompt, **options)
            handle = self._handles[request] = Handle(request, loop)
            self._wake.notify()
        return handle

    def free(self, handle: Handle) -> None:
        """Cancels a request whose handle is no longer read."""
        with self._wake:
            self._handles.pop(handle.request, None)
        self.engine.cancel(handle.request)

    @property
    def unfinished(self) -> int:
        """The number of requests, running or queued, that a client waits for."""
        return len(self._handles)

    def end(self, *, waiting_only: bool = False) -> None:
        """Ends all requests, or those without any id yet, because the server is stopping."""
        with self._wake:
            requests = [request for request in self._handles if not (waiting_only and request.ids)]
        for request in requests:
            # The client is notified first: otherwise a step that ends in between would report
            # "cancelled".
            self._tell(request, "stopping")
            self.engine.cancel(request)

    def stop(self) -> None:
        """Stops the thread after its current step. A long step may still run when this returns."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self.join(timeout=1)

    def run(self) -> None:
        """Runs steps while there are requests, and sleeps while there are none, until `stop`."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or not self.engine.idle)
                if self._stopping:
                    return
            try:
                for request in self.engine.step():
                    if request.error is not None:
                        got = f"a request of {len(request.prompt)} tokens ends"
                        runtime.log(f"serve: {got}: {request.error!r}", style="red")
                    self._tell(request)
            # A request must not stop the thread that serves the others.
            except Exception as error:
                runtime.log(
                    f"serve: a step failed, its requests are dropped: {error!r}", style="red"
                )
                for request in self.engine.drop():
                    self._tell(request)

    def _tell(self, request: Request, finish: str | None = None) -> None:
        """Hands on what a request got since the last time, and why it ended, if it did."""
        with self._wake:
            handle = self._handles.get(request)
            if handle is None:
                return
            tokens = handle.fresh(finish or request.finish)
            if tokens and tokens[-1].finish is not None:
                del self._handles[request]
        for token in tokens:
            handle.put(token)
