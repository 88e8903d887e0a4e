"""Serves a model over HTTP, with answers as JSON or server-sent events.

    POST /v1/completions         continues texts
    POST /v1/chat/completions    answers messages, where the tokenizer has a chat template
    GET  /v1/models, /health     the models that are served, and the load

One thread runs the model; handlers only queue requests and read ids. Texts are tokenised in
separate threads, and chat templates rendered in a separate process. The server listens on
127.0.0.1 by default, and accepts JSON only, so that a page in a browser on this machine cannot use
it without the user's consent. Errors have OpenAI's shape.
"""

import asyncio
import json
import math
import signal
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import uvicorn
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from rorqual import runtime
from rorqual.serve.engine import Engine, Request
from rorqual.serve.generate import Run, TextStream, TooLong
from rorqual.serve.protocol import CompletionRequest, Refusal, body, parse
from rorqual.tables import Table

LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
LARGEST = 8 * 2**20  # bytes of a request's body
LONGEST = 1000  # characters of an error's message
HEAD_SECONDS = 10.0  # the time limit for the head of a request, from the connection on
BODY_SECONDS = 30.0  # the time limit for its body after that
GRACE_SECONDS = 3.0  # the time that running requests have to end when the server stops
MAX_WAITING = 256  # requests in the queue

T = TypeVar("T")


class Failure(RuntimeError):
    """The model thread could not finish a request, or the server is stopping."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


# The reason with which the worker ends a request without an answer: its message and status.
FAILURES: Mapping[str, tuple[str, int]] = {
    "error": ("the model failed on this request: see the server's log", 500),
    "stopping": ("the server is stopping", 503),
}


class Worker(threading.Thread):
    """The one thread that runs the model.

    `submit` may be called from any thread; tokens are returned through asyncio queues.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="rorqual model", daemon=True)
        self.engine = engine
        self._wake = threading.Condition()
        self._ends: dict[Request, tuple[asyncio.AbstractEventLoop, asyncio.Queue]] = {}
        self._stopping = False

    def submit(self, prompt: Sequence[int], **options: Any) -> tuple[Request, asyncio.Queue]:
        """Submits a prompt; call it on the event loop that will read the queue.

        The queue gets (id, finish) for each token; finish is None until the last.
        """
        queue: asyncio.Queue = asyncio.Queue()
        with self._wake:
            request = self.engine.submit(prompt, **options)
            self._ends[request] = (asyncio.get_running_loop(), queue)
            self._wake.notify()
        return request, queue

    def free(self, request: Request) -> None:
        """Cancels a request whose queue is no longer read."""
        with self._wake:
            self._ends.pop(request, None)
        self.engine.cancel(request)

    @property
    def unfinished(self) -> int:
        """The number of requests, running or queued, that a client waits for."""
        return len(self._ends)

    def end(self, *, waiting_only: bool = False) -> None:
        """Ends all requests, or those without any id yet, because the server is stopping."""
        with self._wake:
            requests = [request for request in self._ends if not (waiting_only and request.ids)]
        for request in requests:
            # The client is notified first: otherwise a step that ends in between would report
            # "cancelled".
            self._tell(request, (None, "stopping"))
            self.engine.cancel(request)

    def stop(self) -> None:
        """Stops the thread after its current step. A long step may still run when this returns."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self.join(timeout=1)

    def run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or not self.engine.idle)
                if self._stopping:
                    return
            try:
                for request in self.engine.step():
                    # A request that failed got no id; one that was cancelled meanwhile may have
                    # none at all.
                    failed = request.finish == "error" or not request.ids
                    self._tell(request, (None if failed else request.ids[-1], request.finish))
            # A request must not stop the thread that serves the others.
            except Exception as error:
                runtime.log(
                    f"serve: a step failed, its requests are dropped: {error!r}", style="red"
                )
                for request in self.engine.drop():
                    self._tell(request, (None, "error"))

    def _tell(self, request: Request, news: tuple[int | None, str | None]) -> None:
        with self._wake:
            end = self._ends.get(request)
            if end is not None and news[1] is not None:
                del self._ends[request]
        if end is not None:
            loop, queue = end
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, news)


class Service:
    """A run behind HTTP, as the routes use it.

    name: the model's name in requests and answers, its folder's by default; `aliases` are accepted
    too. max_waiting: requests in the queue beyond the `max_batch_size` that run; more are refused
    with status 429.
    """

    def __init__(
        self,
        run: Run,
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        max_batch_size: int = 8,
        context: int = 4096,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        if max_waiting < 0:
            raise ValueError(f"max_waiting: got {max_waiting}, expected at least 0")
        self.run = run
        self.name = name or (run.folder.resolve().name if run.folder else "rorqual")
        self.names = {self.name, *aliases, *([str(run.folder)] if run.folder else [])}
        self.max_waiting = max_waiting
        tokenizer = run.tokenizer
        engine = Engine(
            run.model,
            max_batch_size=max_batch_size,
            context=context,
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
            vocab_size=min(tokenizer.vocab_size, run.config.vocab_size),
        )
        self.worker = Worker(engine)
        self.stopping = False
        self._arriving = 0  # prompts that are being tokenised
        self._ignored: set[str] = set()  # fields that were already logged
        # How many threads tokenise at once; a slow chat template delays only chats.
        self._texts = asyncio.Semaphore(2)
        self._chats = asyncio.Semaphore(1)
        self._threads = CapacityLimiter(math.inf)

    def check(self, request: CompletionRequest) -> None:
        """Refuses a request for another model, and logs each field that is ignored once."""
        if request.model and request.model.rstrip("/") not in {
            name.rstrip("/") for name in self.names
        }:
            message = (
                f"The model {request.model[:200]!r} does not exist: this server has {self.name!r}"
            )
            raise Refusal(message, status=404, code="model_not_found", param="model")
        if fresh := [name for name in request.ignored if name not in self._ignored]:
            self._ignored.update(fresh)
            runtime.log(
                f"serve: requests have {', '.join(fresh)}, which changes nothing here (noted once)"
            )

    async def take(self, request: CompletionRequest) -> list[tuple[Request, asyncio.Queue]]:
        """Puts all prompts of a request into the queue, or none.

        Refusal where the queue has no space for all of them, or one is too long.
        """
        engine, wanted = self.worker.engine, max(len(request.prompts), 1) * request.copies
        places = engine.max_batch_size + self.max_waiting
        self._refuse_if_stopping()
        if wanted > places:
            raise Refusal(
                f"n: got {wanted} prompts and copies of them, expected at most {places} at once"
            )
        if self.worker.unfinished + self._arriving + wanted > places:
            message = f"The queue of {self.max_waiting} requests is full, please try again later"
            raise Refusal(message, status=429, code="queue_full", headers={"retry-after": "2"})
        self._arriving += wanted
        try:
            prompts = await self._prompts(request)
            self._refuse_if_stopping()
            return self._submit(request, prompts)
        except TooLong as error:
            got = f"your prompt has at least {error.tokens} tokens"
            raise self._too_long(got, request) from error
        except ValueError:
            # The process of the chat template ends with the server.
            self._refuse_if_stopping()
            raise
        finally:
            self._arriving -= wanted

    def _refuse_if_stopping(self) -> None:
        if self.stopping:
            raise Refusal("the server is stopping", status=503, headers={"retry-after": "10"})

    async def _prompts(self, request: CompletionRequest) -> list[list[int]]:
        """Returns the ids to continue, each `copies` times."""
        context = self.worker.engine.context
        if request.messages:
            messages = [dict(message) for message in request.messages]
            texts = [
                await self._aside(self._chats, partial(self.run.chat, messages, context=context))
            ]
        else:
            texts = [
                await self._aside(self._texts, partial(self.run.prompt, prompt, context=context))
                if isinstance(prompt, str)
                else list(prompt)
                for prompt in request.prompts
            ]
        return [ids for ids in texts for _ in range(request.copies)]

    async def _aside(self, turn: asyncio.Semaphore, work: Callable[[], T]) -> T:
        """Runs `work` on a thread and returns its result.

        A client that disconnects gives up its place in the queue for `turn`; a running thread keeps
        its turn until it is done, whether its result is awaited or not.
        """
        await turn.acquire()
        call = to_thread.run_sync(work, limiter=self._threads, abandon_on_cancel=True)
        task = asyncio.ensure_future(call)

        def done(ended: asyncio.Future) -> None:
            turn.release()
            if not ended.cancelled():
                # The exception is retrieved, so that asyncio does not log it as never retrieved.
                ended.exception()

        task.add_done_callback(done)
        return await asyncio.shield(task)

    def _submit(
        self, request: CompletionRequest, prompts: list[list[int]]
    ) -> list[tuple[Request, asyncio.Queue]]:
        taken: list[tuple[Request, asyncio.Queue]] = []
        context = self.worker.engine.context
        try:
            for row, prompt in enumerate(prompts):
                left = context - len(prompt)
                wanted = (
                    min(256, max(left, 1))
                    if request.max_new_tokens is None
                    else request.max_new_tokens
                )
                if wanted > left:
                    parts = f"{len(prompt)} in the prompt, {wanted} in the completion"
                    raise self._too_long(
                        f"you requested {len(prompt) + wanted} tokens ({parts})", request
                    )
                taken.append(
                    self.worker.submit(
                        prompt, max_new_tokens=wanted, sampling=request.sampling, row=row
                    )
                )
        except ValueError:
            self.free(taken)
            raise
        return taken

    def _too_long(self, got: str, request: CompletionRequest) -> Refusal:
        message = (
            f"This model's maximum context length is {self.worker.engine.context} tokens. "
            f"However, {got}. "
            "Please reduce the length of the prompt or the completion."
        )
        param = "messages" if request.messages else "prompt"
        return Refusal(message, code="context_length_exceeded", param=param)

    def unreadable(self) -> list[dict[str, Any]]:
        """Lists the tables on a disk that can no longer be read, and why."""
        unreadable = []
        for number, table in enumerate(self.run.model.tables):
            why = cast(Table, table).damage()
            if why is not None:
                unreadable.append({"table": number, "error": why[:LONGEST]})
        return unreadable

    def free(self, taken: list[tuple[Request, asyncio.Queue]]) -> None:
        for request, _ in taken:
            self.worker.free(request)

    async def pieces(
        self, completion_request: CompletionRequest, request: Request, queue: asyncio.Queue
    ) -> AsyncIterator[tuple[str, str | None]]:
        """Yields text as it is decoded, and last the finish reason.

        Failure where the model thread dropped the request.
        """
        stream, end_id = (
            TextStream(self.run.tokenizer, completion_request.stop),
            self.run.tokenizer.end_id,
        )
        try:
            while True:
                token, finish = await queue.get()
                if finish in FAILURES:
                    raise Failure(*FAILURES[finish])
                piece = "" if token in (None, end_id) else stream.push(token)
                if stream.stopped:
                    finish = "stop"
                if finish is not None:
                    yield piece + stream.flush(), "stop" if stream.stopped else finish
                    return
                if piece:
                    yield piece, None
        finally:
            self.worker.free(request)


def application(service: Service, *, hosts: Sequence[str] = LOCAL) -> Starlette:
    """Returns the ASGI application; `hosts` are the host names that it accepts ("*": any)."""

    @asynccontextmanager
    async def lifespan(_: Starlette):
        service.worker.start()
        yield
        service.run.close()
        service.worker.stop()

    async def completions(http: Http) -> Response:
        return await _answer(service, http, chat=False)

    async def chat(http: Http) -> Response:
        return await _answer(service, http, chat=True)

    async def models(_: Http) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(http: Http) -> Response:
        if http.path_params["name"] in service.names:
            return JSONResponse(card)
        name = http.path_params["name"][:200]
        return _error(
            404, f"The model {name!r} does not exist", code="model_not_found", param="model"
        )

    async def health(_: Http) -> Response:
        engine, alive = service.worker.engine, service.worker.is_alive()
        busy: dict[str, Any] = {
            "running": len(engine.running),
            "waiting": engine.waiting,
            "max_batch_size": engine.max_batch_size,
        }
        if counted := [
            counts for table in service.run.model.tables if (counts := cast(Table, table).metrics())
        ]:
            # Rows, bytes and hit rate of the tables that are not on the device.
            busy["tables"] = counted
        # On a thread, since a disk that hangs must not block the other requests.
        unreadable = await to_thread.run_sync(service.unreadable, abandon_on_cancel=True)
        if unreadable:
            busy["unreadable"] = unreadable
        status = "down" if not alive else "tables cannot be read" if unreadable else "ok"
        return JSONResponse({"status": status, **busy}, status_code=200 if status == "ok" else 503)

    card = {
        "id": service.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "rorqual",
    }
    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={HTTPException: _no_route, Exception: _broken},
        lifespan=lifespan,
    )


async def _no_route(http: Http, error: Exception) -> Response:
    """Answers a request for an unknown path or method."""
    assert isinstance(error, HTTPException)
    asked = f"{http.method} {http.url.path[:200]}"
    return _error(error.status_code, f"{asked}: {error.detail}", headers=error.headers)


async def _broken(http: Http, error: Exception) -> Response:
    return _error(500, "the server failed on this request: see its log")


async def _answer(service: Service, http: Http, *, chat: bool) -> Response:
    try:
        request = parse(await body(http, LARGEST, BODY_SECONDS), chat=chat)
        service.check(request)
        if request.stream:
            return Events(service, request, await _while_there(http, service.take(request)), chat)
        return JSONResponse(await _while_there(http, _complete(service, request, chat)))
    except ClientDisconnect:
        return Response(status_code=499)  # the client does not read it
    except Refusal as error:
        return _error(
            error.status, str(error), code=error.code, param=error.param, headers=error.headers
        )
    except ValueError as error:
        return _error(400, str(error))
    except Failure as error:
        return _error(error.status, str(error))
    # The json module parses recursively, as do the messages about its result.
    except RecursionError:
        return _error(400, "body: got lists or objects too deep in one another, expected a request")


async def _while_there(http: Http, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, which is cancelled if the client disconnects.

    ClientDisconnect is then raised.
    """

    async def hung_up() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _complete(service: Service, request: CompletionRequest, chat: bool) -> dict:
    """Returns the whole answer. Its requests have left the batch at return or cancellation."""
    taken = await service.take(request)
    reply = Answer(service.name, chat, _prompt_tokens(taken))
    answers = [asyncio.ensure_future(_whole(service, request, *one)) for one in taken]
    try:
        results = await asyncio.gather(*answers)
    finally:
        for answer in answers:
            answer.cancel()
        service.free(taken)
    choices = [reply.choice(row, text, finish) for row, (text, finish) in enumerate(results)]
    return reply.whole(choices) | {"usage": reply.usage([request for request, _ in taken])}


def _prompt_tokens(taken: list[tuple[Request, asyncio.Queue]]) -> int:
    return sum(len(request.prompt) for request, _ in taken)


class Events(StreamingResponse):
    """An answer that is streamed. Its requests leave the batch when it ends or fails to begin."""

    def __init__(
        self, service: Service, request: CompletionRequest, taken: list, chat: bool
    ) -> None:
        self._service, self._taken = service, taken
        answer = Answer(service.name, chat, _prompt_tokens(taken))
        super().__init__(_events(service, request, taken, answer), media_type="text/event-stream")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.free(self._taken)


async def _whole(
    service: Service, completion_request: CompletionRequest, request: Request, queue: asyncio.Queue
) -> tuple[str, str | None]:
    parts = [piece async for piece in service.pieces(completion_request, request, queue)]
    return "".join(piece for piece, _ in parts), parts[-1][1]


async def _events(
    service: Service, completion_request: CompletionRequest, taken: list, answer: "Answer"
) -> AsyncIterator[str]:
    """Yields the pieces of every choice as they arrive, interleaved.

    Usage follows if it was requested, then [DONE].
    """
    merged: asyncio.Queue = asyncio.Queue()

    async def pump(row: int, request: Request, queue: asyncio.Queue) -> None:
        try:
            async for piece, finish in service.pieces(completion_request, request, queue):
                merged.put_nowait(answer.chunk([answer.choice(row, piece, finish, piece=True)]))
        except Failure as error:
            merged.put_nowait(_problem(error.status, str(error)))
        except Exception as error:
            runtime.log(f"serve: an answer could not be written: {error!r}", style="red")
            merged.put_nowait(_problem(500, "the server failed on this request: see its log"))
        finally:
            merged.put_nowait(None)

    pumps = [asyncio.create_task(pump(row, *one)) for row, one in enumerate(taken)]
    try:
        if answer.chat:
            yield _event(answer.chunk([answer.opening(row) for row in range(len(taken))]))
        left = len(pumps)
        while left:
            chunk = await merged.get()
            if chunk is None:
                left -= 1
            else:
                yield _event(chunk)
        if completion_request.usage:
            yield _event(
                answer.chunk([]) | {"usage": answer.usage([request for request, _ in taken])}
            )
        yield "data: [DONE]\n\n"
    finally:
        for task in pumps:
            task.cancel()
        service.free(taken)


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class Answer:
    """Formats one answer as OpenAI does: a completion or a chat, whole or in chunks."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int) -> None:
        self.chat, self.prompt_tokens = chat, prompt_tokens
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
        }
        self._head["model"] = model

    def whole(self, choices: list[dict]) -> dict:
        return self._head | {
            "object": "chat.completion" if self.chat else "text_completion",
            "choices": choices,
        }

    def chunk(self, choices: list[dict]) -> dict:
        return self._head | {
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "choices": choices,
        }

    def opening(self, row: int) -> dict:
        return {"index": row, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def choice(self, row: int, text: str, finish: str | None, *, piece: bool = False) -> dict:
        if not self.chat:
            return {"index": row, "text": text, "logprobs": None, "finish_reason": finish}
        content = (
            {"delta": {"content": text}}
            if piece
            else {"message": {"role": "assistant", "content": text}}
        )
        return {"index": row, **content, "finish_reason": finish}

    def usage(self, requests: list[Request]) -> dict:
        made = sum(len(request.ids) for request in requests)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }


def _problem(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict:
    """Returns an error as OpenAI formats it.

    The message is truncated, and characters that UTF-8 cannot encode are replaced.
    """
    if len(message) > LONGEST:
        message = message[:LONGEST] + "..."
    kind = (
        "server_error"
        if status >= 500
        else "rate_limit_error"
        if status == 429
        else "invalid_request_error"
    )
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _error(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    problem = _problem(status, message, code=code, param=param)
    return JSONResponse(problem, status_code=status, headers=dict(headers or {}))


class TimedProtocol(H11Protocol):
    """Closes a connection where no head of a request has arrived for HEAD_SECONDS."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._look, None)

    def _look(self, before: Any) -> None:
        """Closes the connection where it was idle since the last check.

        `before`: the last request at the last check; another value if one was being answered.
        """
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is before:
            self.transport.close()
        else:
            self.loop.call_later(HEAD_SECONDS, self._look, self.cycle if idle else self)


class Server(uvicorn.Server):
    """Logs its address once it serves, and stops within seconds whatever runs."""

    def __init__(self, service: Service, config: uvicorn.Config, address: str) -> None:
        super().__init__(config)
        self.service, self.address = service, address
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        engine = self.service.worker.engine
        requests = f"{engine.max_batch_size} requests at once"
        limits = f"{requests}, {engine.context} tokens each; Ctrl-C ends it"
        runtime.log(f"serving {self.service.run!r}")
        runtime.log(f"{self.address}/v1/completions ({limits})")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends queued requests now and running ones after GRACE_SECONDS; then cancels the rest."""
        self.service.stopping = True
        self.service.run.close()
        self.service.worker.end(waiting_only=True)
        for connection in list(self.server_state.connections):
            # A request that has not fully arrived will not be answered.
            cycle = getattr(connection, "cycle", None)
            if cycle is not None and cycle.more_body and not cycle.response_complete:
                connection.transport.close()
        later = asyncio.get_running_loop().call_later(GRACE_SECONDS, self.service.worker.end)
        await super().shutdown(sockets)
        later.cancel()


def listen(host: str, port: int) -> socket.socket:
    """Opens a socket that listens on a host and port.

    ValueError for a port that is in use, or a host that is not this machine's.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # localhost has two addresses; most clients and our own messages mean IPv4.
        family = min(each[0] for each in addresses if each[0] in (socket.AF_INET, socket.AF_INET6))
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        got = f"got {host} port {port} ({error.strerror or error})"
        raise ValueError(
            f"serve: {got}, expected a free port of this machine: --port 0 takes any"
        ) from error


def serve(
    run: Run,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_batch_size: int = 8,
    context: int = 4096,
    max_waiting: int = MAX_WAITING,
    run_name: str | None = None,
) -> None:
    """Serves requests until interrupted.

    There is no login: on a host other than this machine's own, anyone may send requests.
    `run_name` is what the user called the run, a folder or a hub id; requests may use it, too.
    """
    hub_id = run_name is not None and not Path(run_name).expanduser().exists()
    service = Service(
        run,
        name=run_name if hub_id else None,
        aliases=[] if run_name is None else [run_name],
        max_batch_size=max_batch_size,
        context=context,
        max_waiting=max_waiting,
    )
    app = application(service, hosts=LOCAL if host in LOCAL else ("*",))
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        log_level="warning",
        # A request that the worker has ended is answered at once; this cancels the rest, such as
        # one whose client does not read.
        timeout_graceful_shutdown=int(GRACE_SECONDS) + 2,
    )
    with listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        server = Server(service, config, address)
        server.run(sockets=[listening])
    # asyncio swallows the Ctrl-C that uvicorn passes on where its last task is over by then.
    if server.interrupted:
        raise KeyboardInterrupt
