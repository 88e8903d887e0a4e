"""Serves a model over HTTP, with answers as JSON or server-sent events.

    POST /v1/completions         continues texts
    POST /v1/chat/completions    answers messages, where the tokenizer has a chat template
    POST /v1/embeddings          the mean of the final hidden states of texts
    POST /tokenize, /detokenize  texts to ids and back
    GET  /v1/models, /tokenizer_info, /health, /metrics
    GET  /                       a page to chat with the model
    GET  /docs, /openapi.json    what requests and answers hold

One thread runs the model; handlers only queue requests and read ids. The server listens on
127.0.0.1 by default, and accepts JSON only, so that a page in a browser on this machine cannot use
it without the user's consent. Errors have OpenAI's shape.
"""

import asyncio
import base64
import difflib
import hmac
import json
import re
import signal
import socket
import struct
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from anyio import to_thread
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from rorqual import runtime
from rorqual.serve.answer import Answer, problem
from rorqual.serve.body import LONGEST_VALUE, Refusal, body
from rorqual.serve.generate import Run
from rorqual.serve.schema import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    EmbeddingRequest,
    Embeddings,
    ModelCard,
    ModelList,
    ProblemAnswer,
    TokenizeRequest,
    Tokens,
    short,
)
from rorqual.serve.service import Failure, Piece, Service
from rorqual.serve.worker import Handle

LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
LARGEST = 8 * 2**20  # bytes of a request's body
KEEP_ALIVE_SECONDS = 20  # for the next request; aiohttp's client keeps a connection for 15 s
HEAD_SECONDS = 10.0  # the time limit for the head of a request, from the connection on
BODY_SECONDS = 30.0  # the time limit for its body after that
GRACE_SECONDS = 3.0  # the time that running requests have to end when the server stops
OPEN_PATHS = ("/", "/health")  # what needs no key: the page, and whether the server is alive
PAGE = Path(__file__).with_name("chat.html")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_REQUEST_ID = re.compile(r"[\w.:-]{1,64}")

T = TypeVar("T")


class JsonRequest(Http):
    """A request whose body was read and parsed already."""

    def __init__(self, http: Http, value: Any) -> None:
        super().__init__(http.scope, http.receive)
        self._value = value

    async def body(self) -> bytes:
        """Returns bytes that are not empty, so that FastAPI goes on to call `json`."""
        return b"read"

    async def json(self) -> Any:
        """Returns the value that was parsed already."""
        return self._value


class LimitedRoute(APIRoute):
    """Reads the body of a request with limits, before pydantic validates it."""

    def get_route_handler(self) -> Callable[[Http], Coroutine[Any, Any, Response]]:
        """Returns FastAPI's handler behind `body`, for routes that have a body."""
        handler = super().get_route_handler()

        async def handle(http: Http) -> Response:
            if self.body_field is not None:
                value = await body(http, LARGEST, BODY_SECONDS, replace_halves=True)
                http = JsonRequest(http, value)
            return await handler(http)

        return handle


class Guard:
    """Checks the key of a request, gives it an id, counts it, and logs it when it is answered."""

    def __init__(self, app: Any, service: Service, api_key: str | None) -> None:
        self.app = app
        self.service = service
        self.key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # As a GET; the protocol below leaves the body out.
            scope = {**scope, "method": "GET"}
        http = Http(scope, receive)
        named = http.headers.get("x-request-id", "")
        name = named if _REQUEST_ID.fullmatch(named) else f"req-{uuid.uuid4().hex[:16]}"
        status = 499
        started = time.perf_counter()

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            if self._allowed(http):
                await self.app(scope, receive, noted)
            else:
                message = "got no API key or a wrong one, expected `Authorization: Bearer KEY`"
                headers = {"www-authenticate": "Bearer"}
                refusal = _error(401, message, code="invalid_api_key", headers=headers)
                await refusal(scope, receive, noted)
        except BaseException:
            status = 500 if status == 499 else status
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.requests.labels(route, str(status)).inc()
            if scope["path"] not in ("/health", "/metrics"):
                seconds = time.perf_counter() - started
                runtime.log(
                    f"{name} {http.method} {http.url.path[:100]!r} {status} in {seconds:.3f} s"
                )

    def _allowed(self, http: Http) -> bool:
        """Returns whether a request has the key, or needs none. The scheme may be in any case."""
        if self.key is None or http.url.path in OPEN_PATHS or http.method == "OPTIONS":
            return True
        scheme, _, key = http.headers.get("authorization", "").partition(" ")
        # Headers are read as latin-1, which any byte is. The comparison takes as long whatever the
        # key is.
        same = hmac.compare_digest(key.strip().encode("latin-1"), self.key)
        return same and scheme.lower() == "bearer"


class Hosts:
    """Refuses requests for the names of other hosts."""

    def __init__(self, app: Any, hosts: Sequence[str]) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        passed = False

        async def app(scope: Any, receive: Any, _: Any) -> None:
            nonlocal passed
            passed = True
            await self.app(scope, receive, send)

        async def discard(_: Any) -> None:
            """Drops the answer of the middleware, which is a plain text."""

        await TrustedHostMiddleware(app, allowed_hosts=self.hosts)(scope, receive, discard)
        if not passed:
            message = "host: got another name than this server answers to, expected 127.0.0.1"
            await _error(400, message)(scope, receive, send)


def application(
    service: Service,
    *,
    hosts: Sequence[str] = LOCAL,
    api_key: str | None = None,
    cors: Sequence[str] = (),
) -> FastAPI:
    """Returns the ASGI application.

    `hosts` are the host names that it accepts ("*": any). With `api_key` all routes but the page
    and /health ask for it. `cors` are the origins whose pages may use the server.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        service.worker.start()
        yield
        service.run.close()
        service.worker.stop()

    app = FastAPI(
        title="rorqual",
        version="1",
        description=f"Serves {service.name}. Requests and answers are OpenAI's, with more fields.",
        lifespan=lifespan,
        exception_handlers=ERROR_HANDLERS,
        redoc_url=None,
        responses={
            status: {"model": ProblemAnswer, "description": what}
            for status, what in (
                (400, "What is wrong with the request"),
                (429, "The queue is full"),
                (503, "The server is stopping"),
            )
        },
    )
    router = APIRouter(route_class=LimitedRoute)
    _add_texts(router, service)
    _add_tokens(router, service)
    _add_state(router, service)
    app.include_router(router)
    app.openapi = _without_422(app.openapi)  # type: ignore[method-assign]
    # The last one is the first that a request passes.
    app.add_middleware(Guard, service=service, api_key=api_key)
    if cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Hosts, hosts=list(hosts))
    return app


def _without_422(openapi: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Describes a request that is not valid as status 400, which is what it is answered with."""

    def described() -> dict[str, Any]:
        page = openapi()
        for path in page["paths"].values():
            for operation in path.values():
                operation.get("responses", {}).pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            page.get("components", {}).get("schemas", {}).pop(name, None)
        return page

    return described


# Without a schema: some readers of the page hold it against the whole stream, others against each
# event.
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def _add_texts(router: APIRouter, service: Service) -> None:
    """Adds the routes that run the model."""

    @router.post("/v1/completions", response_model=Completion, responses=_STREAM)
    async def completions(request: CompletionRequest, http: Http) -> Response:
        """Continues texts or ids."""
        return await _answer(service, http, request)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAM)
    async def chat(request: ChatRequest, http: Http) -> Response:
        """Answers messages by the chat template of the tokenizer."""
        return await _answer(service, http, request)

    @router.post("/v1/embeddings", response_model=Embeddings)
    async def embeddings(request: EmbeddingRequest, http: Http) -> Response:
        """Returns the mean of the final hidden states of each text."""
        service.check(request)
        size = service.run.config.dim
        if request.dimensions not in (None, size):
            message = f"dimensions: got {request.dimensions}, expected {size} or none"
            raise Refusal(message, param="dimensions")
        return JSONResponse(await while_there(http, _embed(service, request)))


def _add_tokens(router: APIRouter, service: Service) -> None:
    """Adds the routes of the tokenizer."""
    tokenizer = service.run.tokenizer

    @router.post("/tokenize", response_model=Tokens)
    async def tokenize(request: TokenizeRequest) -> Response:
        """Returns the ids of a text, or of messages by the chat template.

        A text that is a special token and nothing else has that token's id, so that clients can ask
        for it. Within a longer text, and in prompts and messages, it is text, unless parse_special
        is true.
        """
        service.check(request)
        if request.messages:
            ids = await service.chat_ids(request.messages, request)
        else:
            text = request.prompt or ""
            special = service.special_tokens.get(text)
            if special is None:
                ids = await service.text_ids(text, bool(request.parse_special))
            else:
                ids = [tokenizer.begin_id, special]
            if request.add_special_tokens is False:
                ids = ids[1:]
        answer = {"count": len(ids), "max_model_len": service.context, "tokens": ids}
        if request.return_token_strs:
            answer["token_strs"] = [tokenizer.token(token) for token in ids]
        return JSONResponse(answer)

    @router.post("/detokenize", response_model=Detokenized)
    async def detokenize(request: DetokenizeRequest) -> Response:
        """Returns the text of ids."""
        service.check(request)
        size = tokenizer.vocab_size
        if not all(0 <= token < size for token in request.tokens):
            raise Refusal(f"tokens: expected ids, each from 0 to {size - 1}", param="tokens")
        return JSONResponse({"prompt": tokenizer.decode(request.tokens)})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Returns the special tokens, the chat template and the size of the tokenizer."""
        names = {
            "bos_token": tokenizer.begin_id,
            "eos_token": tokenizer.end_id,
            "pad_token": tokenizer.pad_id,
        }
        tokens = {name: tokenizer.backend.id_to_token(token) for name, token in names.items()}
        return tokens | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": service.context,
            "chat_template": service.template or None,
        }


def _add_state(router: APIRouter, service: Service) -> None:
    """Adds the routes about the server, and the page."""
    card = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "rorqual",
        "max_model_len": service.context,
    }

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """Lists the models, of which there is one."""
        return JSONResponse({"object": "list", "data": [card]})

    @router.get("/v1/models/{name:path}", response_model=ModelCard)
    async def model(name: str) -> Response:
        """Describes a model."""
        if not name:
            return JSONResponse({"object": "list", "data": [card]})
        if name in service.names:
            return JSONResponse(card)
        message = f"The model {name[:LONGEST_VALUE]!r} does not exist"
        return _error(404, message, code="model_not_found", param="model")

    @router.get("/health")
    async def health() -> Response:
        """Tells whether the server can answer, and its load."""
        stats = service.worker.engine.stats()
        busy: dict[str, Any] = {
            "running": stats.running,
            "waiting": stats.waiting,
            "max_batch_size": service.worker.engine.max_batch_size,
        }
        if counted := service.tables():
            busy["tables"] = counted
        # On a thread, since a disk that hangs must not block the other requests.
        unreadable = await to_thread.run_sync(service.unreadable, abandon_on_cancel=True)
        if unreadable:
            busy["unreadable"] = unreadable
        alive = service.worker.is_alive()
        status = "down" if not alive else "tables cannot be read" if unreadable else "ok"
        code = 200 if status == "ok" else 503
        return JSONResponse({"status": status, **busy}, status_code=code)

    @router.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Returns the counters in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    page = PAGE.read_text(encoding="utf-8")
    about = {"model": service.name, "chat": bool(service.template), "context": service.context}
    # A `<` could end the script.
    page = page.replace("__ABOUT__", json.dumps(about).replace("<", "\\u003c"))

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def root() -> Response:
        headers = {"content-security-policy": POLICY, "cache-control": "no-store"}
        return HTMLResponse(page, headers=headers)


async def _answer(
    service: Service, http: Http, request: CompletionRequest | ChatRequest
) -> Response:
    """Answers a completion or a chat: with a stream if it asks for one, or else with JSON."""
    service.check(request)
    if request.stream:
        handles = await while_there(http, service.take(request))
        return Events(service, request, handles)
    return JSONResponse(await while_there(http, _complete(service, request)))


async def while_there(http: Http, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, which is cancelled if the client disconnects.

    ClientDisconnect is then raised.
    """

    async def hung_up() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(hung_up())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gather(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Returns all results; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _complete(service: Service, request: CompletionRequest | ChatRequest) -> dict[str, Any]:
    """Returns the whole answer. Its requests have left the batch at return or cancellation."""
    handles = await service.take(request)

    async def whole(handle: Handle) -> list[Piece]:
        async with aclosing(service.pieces(request, handle)) as pieces:
            return [piece async for piece in pieces]

    try:
        pieces = await _gather([whole(handle) for handle in handles])
    finally:
        service.free(handles)
    return Answer(request, service.name, handles, service.run.tokenizer).whole(pieces)


async def _embed(service: Service, request: EmbeddingRequest) -> dict[str, Any]:
    """Returns the embeddings of all texts."""
    handles = await service.take_texts(request)

    async def read(handle: Handle) -> list[float]:
        async with aclosing(service.tokens(handle)) as tokens:
            async for _ in tokens:
                pass
        if handle.request.embedding is None:
            raise Failure("the model failed on this text: see the server's log", 500)
        return handle.request.embedding

    try:
        vectors = await _gather([read(handle) for handle in handles])
    finally:
        service.free(handles)
    count = sum(len(handle.request.prompt) for handle in handles)
    packed = request.encoding_format == "base64"
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _pack(one) if packed else one}
            for index, one in enumerate(vectors)
        ],
        "model": service.name,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _pack(vector: list[float]) -> str:
    """Returns a vector as base64 of little-endian float32, as OpenAI sends embeddings."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


class Events(StreamingResponse):
    """An answer that is streamed. Its requests leave the batch when it ends or fails to begin."""

    def __init__(
        self, service: Service, request: CompletionRequest | ChatRequest, handles: list[Handle]
    ) -> None:
        self._service = service
        self._handles = handles
        answer = Answer(request, service.name, handles, service.run.tokenizer)
        super().__init__(
            _events(service, request, handles, answer),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.free(self._handles)


async def _events(
    service: Service,
    request: CompletionRequest | ChatRequest,
    handles: list[Handle],
    answer: Answer,
) -> AsyncIterator[str]:
    """Yields the pieces of every choice as they arrive, interleaved.

    Usage follows if it was requested, then [DONE].
    """
    merged: asyncio.Queue = asyncio.Queue()

    async def pump(index: int, handle: Handle) -> None:
        """Puts the chunks of one choice into the queue, then None; an error becomes a chunk."""
        try:
            async with aclosing(service.pieces(request, handle)) as pieces:
                async for piece in pieces:
                    merged.put_nowait(answer.piece(index, piece))
        except Failure as error:
            merged.put_nowait(problem(error.status, str(error)))
        except Exception as error:
            runtime.log(f"serve: an answer could not be written: {error!r}", style="red")
            merged.put_nowait(problem(500, "the server failed on this request: see its log"))
        finally:
            merged.put_nowait(None)

    pumps = [asyncio.create_task(pump(index, handle)) for index, handle in enumerate(handles)]
    try:
        for chunk in answer.opening():
            yield _event(chunk)
        left = len(pumps)
        while left:
            chunk = await merged.get()
            if chunk is None:
                left -= 1
            else:
                yield _event(chunk)
        if request.usage_at_end:
            yield _event(answer.closing())
        yield "data: [DONE]\n\n"
    finally:
        for task in pumps:
            task.cancel()
        service.free(handles)


def _event(value: dict) -> str:
    """Returns a server-sent event whose data is the value as JSON."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _error(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Returns a response with this status and an error in the shape of OpenAI."""
    content = problem(status, message, code=code, param=param)
    return JSONResponse(content, status_code=status, headers=dict(headers or {}))


async def _no_route(http: Http, error: HTTPException) -> Response:
    """Answers a request for an unknown path or method, with the path that was probably meant."""
    asked = f"{http.method} {http.url.path[:LONGEST_VALUE]}"
    hint = ""
    if error.status_code == 404:
        paths = list(http.app.openapi()["paths"])
        path = http.url.path[:LONGEST_VALUE]
        without = [one for one in paths if one == f"/v1{path}"]
        similar = without or difflib.get_close_matches(path, paths, 1, 0.75)
        hint = f", did you mean {similar[0]}?" if similar else ", see /docs for what there is"
    return _error(error.status_code, f"{asked}: {error.detail}{hint}", headers=error.headers)


async def _refused(_: Http, error: Refusal) -> Response:
    """Answers a Refusal with its own status, code, field and headers."""
    code = error.code or ("invalid_value" if error.param else None)
    return _error(error.status, str(error), code=code, param=error.param, headers=error.headers)


async def _failed(_: Http, error: Failure) -> Response:
    """Answers a Failure, with the status that it has: 500, 503 or 504."""
    return _error(error.status, str(error))


async def _wrong(_: Http, error: ValueError) -> Response:
    """Answers any other ValueError of a handler as a mistake of the request, 400."""
    return _error(400, str(error))


async def _too_deep(_: Http, error: RecursionError) -> Response:
    """Answers a body that is nested too deeply to be parsed or checked, 400."""
    return _error(400, "body: got lists or objects too deep in one another, expected a request")


async def _hung_up(_: Http, error: ClientDisconnect) -> Response:
    """Answers a client that has disconnected, so that the log has a status for it."""
    return Response(status_code=499)  # the client does not read it


async def _broken(http: Http, error: Exception) -> Response:
    """Answers an unexpected error without its text, which may show what clients must not see."""
    return _error(500, "the server failed on this request: see its log")


async def _invalid(_: Http, error: RequestValidationError) -> Response:
    """Answers a request that pydantic refuses, with the first field that is wrong."""
    wrong = min(error.errors(), key=lambda one: one["type"] == "missing")
    context = wrong.get("ctx") or {}
    if wrong["type"] == "refused":
        param = context["param"] or None
        code = context["code"] or ("invalid_value" if param else None)
        return _error(400, context["message"], param=param, code=code)
    # The parts of a location after a union name what was tried, not what was asked.
    where = [one for one in wrong["loc"][1:] if not re.search(r"[\[\(]", str(one))]
    where = [one for one in where if not (isinstance(one, str) and one[:1].isupper())]
    param = _path(where) + context.get("inside", "")
    if wrong["type"] == "missing":
        message = f"{param}: expected a value, got none"
        return _error(400, message, param=param, code="missing_required_parameter")
    message = re.sub(r"^(Input should be|List should have) ", "expected ", wrong["msg"])
    got = f"got {short(wrong['input'])}, "
    if wrong["type"] in ("content", "part"):
        got = ""
    code = "invalid_type" if wrong["type"].endswith(("_type", "_parsing")) else "invalid_value"
    message = f"{param or 'body'}: {got}{message}"
    return _error(400, message, param=param or None, code=code if param else None)


# What answers each kind of error.
ERROR_HANDLERS: dict[int | type[Exception], Callable[..., Coroutine[Any, Any, Response]]] = {
    HTTPException: _no_route,
    RequestValidationError: _invalid,
    Refusal: _refused,
    Failure: _failed,
    ValueError: _wrong,
    RecursionError: _too_deep,
    ClientDisconnect: _hung_up,
    Exception: _broken,
}


def _path(where: Sequence[Any]) -> str:
    """Formats a location as a path, as messages[0].content."""
    parts = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in where)
    return parts.removeprefix(".")[:LONGEST_VALUE]


class TimedProtocol(H11Protocol):
    """Closes a connection where no head of a request has arrived for HEAD_SECONDS.

    After an answer it is KEEP_ALIVE_SECONDS.
    """

    def connection_made(self, transport: Any) -> None:
        """Starts the timer of a new connection."""
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._close_if_idle, None)

    def _close_if_idle(self, before: Any) -> None:
        """Closes the connection where it was idle since the last check.

        `before`: the last request at the last check; another value if one was being answered.
        """
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is before:
            self.transport.close()
        else:
            seconds = HEAD_SECONDS if self.cycle is None else KEEP_ALIVE_SECONDS
            self.loop.call_later(seconds, self._close_if_idle, self.cycle if idle else self)


class Server(uvicorn.Server):
    """Logs its address once it serves, and stops within seconds whatever runs."""

    def __init__(self, service: Service, config: uvicorn.Config, address: str) -> None:
        super().__init__(config)
        self.service = service
        self.address = address
        self.interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Notes an interruption by Ctrl-C, and stops the server on any signal."""
        self.interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Logs the address, the limits and the pages once the server accepts connections."""
        await super().startup(sockets)
        engine = self.service.worker.engine
        requests = f"{engine.max_batch_size} requests at once"
        limits = f"{requests}, {engine.context} tokens each; Ctrl-C ends it"
        runtime.log(f"serving {self.service.run!r}")
        runtime.log(f"{self.address}/v1/completions ({limits})")
        runtime.log(f"{self.address}/ is a page to chat with it, {self.address}/docs its manual")

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
    api_key: str | None = None,
    cors: Sequence[str] = (),
    run_name: str | None = None,
    **limits: Any,
) -> None:
    """Serves requests until interrupted.

    Without `api_key` there is no login: on a host other than this machine's own, anyone may send
    requests. `run_name` is what the user called the run, a folder or a hub id; requests may use it,
    too. `limits` are those of Service and Engine. The model runs once before the port opens.
    """
    hub_id = run_name is not None and not Path(run_name).expanduser().exists()
    service = Service(
        run,
        name=run_name if hub_id else None,
        aliases=[] if run_name is None else [run_name],
        **limits,
    )
    hosts = LOCAL if host in LOCAL else ("*",)
    app = application(service, hosts=hosts, api_key=api_key, cors=cors)
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        log_level="warning",
        # Longer than the 5 s for which httpx, and with it OpenAI's client, uses a connection again.
        # In a soak with both at 5 s 11 of 4,929 requests got no answer; whether this was why is not
        # established.
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        # A request that the worker has ended is answered at once; this cancels the rest, such as
        # one whose client does not read.
        timeout_graceful_shutdown=int(GRACE_SECONDS) + 2,
    )
    service.warm_up()
    with listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}"
        server = Server(service, config, address)
        server.run(sockets=[listening])
    # asyncio swallows the Ctrl-C that uvicorn passes on where its last task is over by then.
    if server.interrupted:
        raise KeyboardInterrupt
