"""HTTP in -> requests to the engine, and their answers as JSON or server-sent events, out.

    POST /v1/completions         continues texts
    POST /v1/chat/completions    answers messages, where the tokenizer has a chat template
    GET  /v1/models, /health     what is served, and how busy it is

One thread runs the model; handlers only queue requests and read ids. It listens on 127.0.0.1 unless told otherwise,
and takes JSON only, so that a page in a browser on this machine cannot use it unasked.
"""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rorqual import runtime
from rorqual.serve.engine import Engine, Request
from rorqual.serve.generate import Run, TextStream
from rorqual.serve.protocol import Ask, body, parse
from rorqual.storage import DeviceTable

LOCAL = ("127.0.0.1", "localhost", "::1")
LARGEST = 8 * 2**20  # bytes of a request's body


class Failure(RuntimeError):
    """The model thread could not finish a request."""


class Worker(threading.Thread):
    """The one thread that runs the model. `submit` may be called from any; tokens come back through asyncio queues."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="rorqual model", daemon=True)
        self.engine = engine
        self._wake = threading.Condition()
        self._ends: dict[Request, tuple[asyncio.AbstractEventLoop, asyncio.Queue]] = {}
        self._stopping = False

    def submit(self, prompt: Sequence[int], **options: Any) -> tuple[Request, asyncio.Queue]:
        """Call it on the event loop that will read the queue: (id, finish) a token; finish is None until the last."""
        queue: asyncio.Queue = asyncio.Queue()
        with self._wake:
            request = self.engine.submit(prompt, **options)
            self._ends[request] = (asyncio.get_running_loop(), queue)
            self._wake.notify()
        return request, queue

    def forget(self, request: Request) -> None:
        """Nobody reads the queue any more."""
        with self._wake:
            self._ends.pop(request, None)
        self.engine.cancel(request)

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self.join(timeout=30)

    def run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopping or not self.engine.idle)
                if self._stopping:
                    return
            try:
                for request in self.engine.step():
                    failed = request.finish == "error"  # and then it got no id
                    self._tell(request, (None if failed else request.ids[-1], request.finish))
            except Exception as error:  # a request must not take the others' thread with it
                runtime.log(f"serve: a step failed, its requests are dropped: {error!r}", style="red")
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
    """A run behind HTTP: what the routes call."""

    def __init__(self, run: Run, *, name: str | None = None, rows: int = 8, context: int = 4096) -> None:
        self.run = run
        self.name = name or (run.folder.name if run.folder else "rorqual")
        tokenizer = run.tokenizer
        engine = Engine(
            run.model,
            rows=rows,
            context=context,
            end_id=tokenizer.end_id,
            pad_id=tokenizer.pad_id,
            vocabulary=min(tokenizer.vocabulary, run.config.vocabulary),
        )
        self.worker = Worker(engine)

    def prompts(self, ask: Ask) -> list[list[int]]:
        """The ids to continue, each `copies` times."""
        if ask.messages:
            texts = [self.run.chat([dict(message) for message in ask.messages])]
        else:
            texts = [self.run.prompt(p) if isinstance(p, str) else list(p) for p in ask.prompts]
        return [ids for ids in texts for _ in range(ask.copies)]

    def submit(self, ask: Ask, prompts: list[list[int]]) -> list[tuple[Request, asyncio.Queue]]:
        """All or none: ValueError where one of them is too long."""
        taken: list[tuple[Request, asyncio.Queue]] = []
        try:
            for row, prompt in enumerate(prompts):
                room = self.worker.engine.context - len(prompt)
                wanted = min(256, max(room, 1)) if ask.max_new_tokens is None else ask.max_new_tokens
                taken.append(self.worker.submit(prompt, max_new_tokens=wanted, sampling=ask.sampling, row=row))
        except ValueError:
            self.forget(taken)
            raise
        return taken

    def forget(self, taken: list[tuple[Request, asyncio.Queue]]) -> None:
        for request, _ in taken:
            self.worker.forget(request)

    async def pieces(self, ask: Ask, request: Request, queue: asyncio.Queue) -> AsyncIterator[tuple[str, str | None]]:
        """Text as it comes, then the reason why it ended. Failure where the model thread dropped the request."""
        stream, end_id = TextStream(self.run.tokenizer, ask.stop), self.run.tokenizer.end_id
        try:
            while True:
                token, finish = await queue.get()
                if finish == "error":
                    raise Failure("the model failed on this request: see the server's log")
                piece = "" if token == end_id else stream.push(token)
                if stream.stopped:
                    finish = "stop"
                if finish is not None:
                    yield piece + stream.flush(), "stop" if stream.stopped else finish
                    return
                if piece:
                    yield piece, None
        finally:
            self.worker.forget(request)


def application(service: Service, *, hosts: Sequence[str] = LOCAL) -> Starlette:
    """The ASGI application; `hosts` are the names by which it may be called ("*": any)."""

    @asynccontextmanager
    async def lifespan(_: Starlette):
        service.worker.start()
        yield
        service.worker.stop()

    async def completions(http: Http) -> Response:
        return await _answer(service, http, chat=False)

    async def chat(http: Http) -> Response:
        return await _answer(service, http, chat=True)

    async def models(_: Http) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "rorqual"}]}
        )

    async def health(_: Http) -> Response:
        engine, alive = service.worker.engine, service.worker.is_alive()
        busy: dict[str, Any] = {"running": len(engine.running), "waiting": engine.waiting, "rows": engine.rows}
        if counted := [counts for table in service.run.model.tables if (counts := cast(DeviceTable, table).metrics())]:
            busy["tables"] = counted  # rows, bytes and hit rate of those that are not on the device
        return JSONResponse({"status": "ok" if alive else "down", **busy}, status_code=200 if alive else 503)

    return Starlette(
        routes=[
            Route("/v1/completions", completions, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        lifespan=lifespan,
    )


async def _answer(service: Service, http: Http, *, chat: bool) -> Response:
    try:
        ask = parse(await body(http, LARGEST), chat=chat)
        prompts = await run_in_threadpool(service.prompts, ask)  # it may load a template and tokenise megabytes
        taken = service.submit(ask, prompts)
    except ValueError as error:
        return _error(400, str(error))
    except RecursionError:  # json reads by recursion, and so do the messages about what it read
        return _error(400, "body: got lists or objects too deep in one another, expected a request")
    words = Words(service.name, chat, sum(map(len, prompts)))
    if ask.stream:
        return StreamingResponse(_events(service, ask, taken, words), media_type="text/event-stream")
    try:
        results = await asyncio.gather(*(_whole(service, ask, *one) for one in taken))
    except Failure as error:
        return _error(500, str(error))
    finally:
        service.forget(taken)
    choices = [words.choice(row, text, finish) for row, (text, finish) in enumerate(results)]
    return JSONResponse(words.whole(choices) | {"usage": words.usage([request for request, _ in taken])})


async def _whole(service: Service, ask: Ask, request: Request, queue: asyncio.Queue) -> tuple[str, str | None]:
    parts = [part async for part in service.pieces(ask, request, queue)]
    return "".join(piece for piece, _ in parts), parts[-1][1]


async def _events(service: Service, ask: Ask, taken: list, words: "Words") -> AsyncIterator[str]:
    """Pieces of every choice as they come, interleaved; then usage where asked, then [DONE]."""
    merged: asyncio.Queue = asyncio.Queue()

    async def pump(row: int, request: Request, queue: asyncio.Queue) -> None:
        try:
            async for piece, finish in service.pieces(ask, request, queue):
                merged.put_nowait(words.chunk([words.choice(row, piece, finish, part=True)]))
        except Failure as error:
            merged.put_nowait({"error": {"message": str(error), "type": "server_error"}})
        merged.put_nowait(None)

    pumps = [asyncio.create_task(pump(row, *one)) for row, one in enumerate(taken)]
    try:
        if words.chat:
            yield _event(words.chunk([words.opening(row) for row in range(len(taken))]))
        left = len(pumps)
        while left:
            chunk = await merged.get()
            if chunk is None:
                left -= 1
            else:
                yield _event(chunk)
        if ask.usage:
            yield _event(words.chunk([]) | {"usage": words.usage([request for request, _ in taken])})
        yield "data: [DONE]\n\n"
    finally:
        for task in pumps:
            task.cancel()
        service.forget(taken)


def _event(value: dict) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class Words:
    """One answer in OpenAI's words: a completion or a chat, whole or in chunks."""

    def __init__(self, model: str, chat: bool, prompt_tokens: int) -> None:
        self.chat, self.prompt_tokens = chat, prompt_tokens
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "created": int(time.time())}
        self._head["model"] = model

    def whole(self, choices: list[dict]) -> dict:
        return self._head | {"object": "chat.completion" if self.chat else "text_completion", "choices": choices}

    def chunk(self, choices: list[dict]) -> dict:
        return self._head | {"object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices}

    def opening(self, row: int) -> dict:
        return {"index": row, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def choice(self, row: int, text: str, finish: str | None, *, part: bool = False) -> dict:
        if not self.chat:
            return {"index": row, "text": text, "logprobs": None, "finish_reason": finish}
        said = {"delta": {"content": text}} if part else {"message": {"role": "assistant", "content": text}}
        return {"index": row, **said, "finish_reason": finish}

    def usage(self, requests: list[Request]) -> dict:
        made = sum(len(request.ids) for request in requests)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }


def _error(status: int, message: str) -> JSONResponse:
    kind = "invalid_request_error" if status == 400 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": None}}, status_code=status)


def serve(run: Run, *, host: str = "127.0.0.1", port: int = 8000, rows: int = 8, context: int = 4096) -> None:
    """Answer until interrupted. There is no login: on a host other than this machine's own, anyone may ask."""
    app = application(Service(run, rows=rows, context=context), hosts=LOCAL if host in LOCAL else ("*",))
    runtime.log(f"serving {run!r}")
    runtime.log(f"http://{host}:{port}/v1/completions ({rows} requests at once, {context} tokens each; Ctrl-C ends it)")
    uvicorn.run(app, host=host, port=port, log_level="warning")
