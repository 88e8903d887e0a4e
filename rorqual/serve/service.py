"""Serves a run to many clients, whatever the protocol: queue limits, prompts, pieces of text.

Handlers on the event loop call `take`, and read `pieces` of each handle; the model runs on the
worker's thread. Texts are tokenised in separate threads, and chat templates rendered in a separate
process.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from anyio import CapacityLimiter, to_thread

from rorqual import runtime
from rorqual.serve.body import Refusal
from rorqual.serve.engine import Engine
from rorqual.serve.generate import Run, TextStream, TooLong, chat_template, template_text
from rorqual.serve.grammar import Grammars, JsonMatcher
from rorqual.serve.metrics import Metrics
from rorqual.serve.sampling import GREEDY
from rorqual.serve.scheduler import Request, Watch
from rorqual.serve.schema import (
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Input,
    Message,
    Templated,
)
from rorqual.serve.text import special_ids
from rorqual.serve.tools import JSON, ToolCall, ToolStream, format_of, tool_schema
from rorqual.serve.worker import Handle, Token, Worker
from rorqual.tables import Table

LONGEST_ERROR = 1000  # characters of an error's message
MAX_WAITING = 256  # requests in the queue
DEFAULT_NEW_TOKENS = 256  # new tokens where a request does not say how many
TIMEOUT_SECONDS = 600.0  # the time limit of a request in the queue and the batch

T = TypeVar("T")
GenerationRequest = CompletionRequest | ChatRequest


class Failure(RuntimeError):
    """The model thread could not finish a request, or the server is stopping."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


# The reason with which a request ends without an answer: its message and status.
FAILURES: Mapping[str, tuple[str, int]] = {
    "error": ("the model failed on this request: see the server's log", 500),
    "stopping": ("the server is stopping", 503),
    "timeout": ("the request took longer than this server allows", 504),
}


class Piece(NamedTuple):
    """What can be shown of an answer since the last piece."""

    text: str = ""
    calls: Sequence[ToolCall] = ()
    tokens: Sequence[Token] = ()
    finish: str | None = None


def last_tokens(prompts: list[list[int]], count: int | None) -> list[list[int]]:
    """Returns the last `count` ids of each prompt; None for all of them."""
    return prompts if count is None else [ids[-count:] for ids in prompts]


class Service:
    """A run behind a protocol, as its routes use it.

    name: the model's name in requests and answers, its folder's by default; `aliases` are accepted
    too. max_waiting: requests in the queue beyond the `max_batch_size` that run; more are refused
    with status 429. `limits` are those of Engine, as max_batch_size and context.
    """

    def __init__(
        self,
        run: Run,
        *,
        name: str | None = None,
        aliases: Sequence[str] = (),
        max_waiting: int = MAX_WAITING,
        timeout: float = TIMEOUT_SECONDS,
        **limits: Any,
    ) -> None:
        if max_waiting < 0:
            raise ValueError(f"max_waiting: got {max_waiting}, expected at least 0")
        if not timeout > 0:
            raise ValueError(f"timeout: got {timeout}, expected seconds above 0")
        self.run = run
        self.name = name or (run.folder.resolve().name if run.folder else "rorqual")
        self.names = {self.name, *aliases, *([str(run.folder)] if run.folder else [])}
        self.max_waiting = max_waiting
        self.timeout = timeout
        self.created = int(time.time())
        tokenizer = run.tokenizer
        engine = Engine(
            run.model,
            **limits,
            end_id=tokenizer.end_id,
            vocab_size=min(tokenizer.vocab_size, run.config.vocab_size),
        )
        self.worker = Worker(engine)
        self.metrics = Metrics(engine.stats, self.tables)
        self.grammars = Grammars(tokenizer)
        self.template = template_text(run.folder) if run.folder is not None else ""
        self.special_ids = special_ids(tokenizer)
        # By their text; a document's begin and end are special to the model in any tokenizer.
        named = {tokenizer.begin_id, tokenizer.end_id, tokenizer.pad_id}
        self.special_tokens = {
            tokenizer.backend.id_to_token(token): token for token in self.special_ids | named
        }
        self.stopping = False
        self._arriving = 0  # prompts that are being tokenised
        self._ignored: set[str] = set()  # fields that were already logged
        # How many threads tokenise at once; a slow chat template delays only chats.
        self._texts = asyncio.Semaphore(2)
        self._chats = asyncio.Semaphore(1)
        self._threads = CapacityLimiter(math.inf)

    @property
    def context(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self.worker.engine.context

    def warm_up(self) -> None:
        """Runs the model and the chat template once, before the first request.

        Kernels are compiled and weights are read by then, once an installation in some 20 s of a
        core. It must not run beside the worker.
        """
        self.worker.engine.warm_up()
        if self.template and self.run.folder is not None and chat_template(self.run.folder):
            try:
                self.run.chat([{"role": "user", "content": "A"}])
            except ValueError as error:
                runtime.log(f"serve: a chat of one message is refused: {error}", style="yellow")

    def check(self, request: Input) -> None:
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

    async def take(self, request: GenerationRequest) -> list[Handle]:
        """Puts all prompts of a request into the queue, or none.

        Refusal where the queue has no space for all of them, or one is too long.
        """
        texts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
        param = "prompt" if isinstance(request, CompletionRequest) else "messages"
        with self._admitted(texts * request.copies, "n", param):
            matcher = await self._matcher(request)
            prompts = await self._prompts(request)
            self._refuse_if_stopping()
            return self._submit(request, prompts, matcher, param)

    async def take_texts(self, request: EmbeddingRequest) -> list[Handle]:
        """Puts all texts that are to be embedded into the queue, or none."""
        with self._admitted(len(request.input), "input", "input"):
            prompts = [await self._ids(text) for text in request.input]
            prompts = last_tokens(prompts, request.truncate_prompt_tokens)
            self._refuse_if_stopping()
            taken: list[Handle] = []
            try:
                for prompt in prompts:
                    if len(prompt) > self.context:
                        raise self._too_long(f"a text has {len(prompt)} tokens", "input")
                    watch = Watch(embedding=True)
                    handle = self.worker.submit(
                        prompt, max_new_tokens=0, sampling=GREEDY, watch=watch
                    )
                    taken.append(handle)
            except ValueError:
                self.free(taken)
                raise
            return taken

    @contextmanager
    def _admitted(self, wanted: int, counted: str, param: str) -> Iterator[None]:
        """Counts prompts that arrive. Refuses them where the queue has no space for all."""
        places = self.worker.engine.max_batch_size + self.max_waiting
        self._refuse_if_stopping()
        if wanted > places:
            message = f"got {wanted} prompts and copies of them, expected at most {places} at once"
            raise Refusal(f"{counted}: {message}", param=counted)
        if self.worker.unfinished + self._arriving + wanted > places:
            message = f"The queue of {self.max_waiting} requests is full, please try again later"
            raise Refusal(message, status=429, code="queue_full", headers={"retry-after": "2"})
        self._arriving += wanted
        try:
            yield
        except TooLong as error:
            got = f"your prompt has at least {error.tokens} tokens"
            raise self._too_long(got, param) from error
        except Refusal:
            raise
        except ValueError as error:
            # The process of the chat template ends with the server.
            self._refuse_if_stopping()
            raise Refusal(str(error), param=_param_of(str(error), param)) from error
        finally:
            self._arriving -= wanted

    def _refuse_if_stopping(self) -> None:
        """Raises a Refusal with status 503 once the server is stopping."""
        if self.stopping:
            raise Refusal("the server is stopping", status=503, headers={"retry-after": "10"})

    async def _matcher(self, request: GenerationRequest) -> JsonMatcher | None:
        """Compiles the grammar that a request wants: a format, or a call of a tool."""
        schema = None
        param = "response_format"
        if request.response_format is not None:
            schema = request.response_format.schema_of_answer
        if isinstance(request, ChatRequest) and request.forces_tool:
            schema = tool_schema(request.tool_dicts(), request.forced_tool)
            param = "tools"
        if schema is None:
            return None
        try:
            return await self.in_thread(self._texts, partial(self.grammars.compile, schema))
        except ValueError as error:
            message = f"{param}: {error}"
            raise Refusal(message, param=param, code="invalid_json_schema") from error

    async def _prompts(self, request: GenerationRequest) -> list[list[int]]:
        """Returns the ids to continue, each `copies` times."""
        special = bool(request.parse_special)
        if isinstance(request, ChatRequest):
            texts = [await self.chat_ids(request.messages, request)]
        else:
            texts = [await self._ids(prompt, special) for prompt in request.prompt]
            if request.add_special_tokens is False:
                texts = [_without_begin(*one) for one in zip(request.prompt, texts, strict=True)]
        texts = last_tokens(texts, request.truncate_prompt_tokens)
        return [ids for ids in texts for _ in range(request.copies)]

    async def chat_ids(self, messages: Sequence[Message], request: Templated) -> list[int]:
        """Returns the ids of messages by the chat template."""
        if not self.template:
            message = "this model has no chat template: ask for a completion instead"
            raise Refusal(message, param="messages")
        fill = partial(
            self.run.chat,
            [self._filled(message) for message in messages],
            context=self.context,
            options=request.template_options(),
            parse_special=bool(request.parse_special),
        )
        return await self.in_thread(self._chats, fill)

    def _filled(self, message: Message) -> dict[str, Any]:
        """Returns a message as the chat template expects it.

        Templates from before there were developers know them as the system.
        """
        filled = message.filled()
        if message.role == "developer" and "developer" not in self.template:
            filled["role"] = "system"
        return filled

    async def _ids(self, prompt: str | list[int], parse_special: bool = False) -> list[int]:
        """Returns the ids of a prompt; ids are taken as they are."""
        if isinstance(prompt, str):
            return await self.text_ids(prompt, parse_special)
        return list(prompt)

    async def text_ids(self, text: str, parse_special: bool = False) -> list[int]:
        """Returns the ids of a text that begins a document."""
        encode = partial(self.run.prompt, text, context=self.context, parse_special=parse_special)
        return await self.in_thread(self._texts, encode)

    async def in_thread(self, turn: asyncio.Semaphore, work: Callable[[], T]) -> T:
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
        self,
        request: GenerationRequest,
        prompts: list[list[int]],
        matcher: JsonMatcher | None,
        param: str,
    ) -> list[Handle]:
        """Submits the prompts to the worker; where one is refused, all are taken back.

        Refusal, about the field `param`, for a prompt that leaves too little of the context.
        """
        taken: list[Handle] = []
        size = self.run.tokenizer.vocab_size
        if not all(0 <= token < size for token in request.stop_token_ids or ()):
            name = "stop_token_ids"
            raise Refusal(f"{name}: expected ids, each from 0 to {size - 1}", param=name)
        sampling = request.parameters()
        watch = Watch(
            experts=bool(request.return_routed_experts), memory=bool(request.return_memory)
        )
        try:
            for index, prompt in enumerate(prompts):
                left = self.context - len(prompt)
                new_tokens = request.new_tokens
                wanted = min(DEFAULT_NEW_TOKENS, max(left, 1)) if new_tokens is None else new_tokens
                if wanted > left:
                    parts = f"{len(prompt)} in the prompt, {wanted} in the completion"
                    got = f"you requested {len(prompt) + wanted} tokens ({parts})"
                    raise self._too_long(got, param)
                taken.append(
                    self.worker.submit(
                        prompt,
                        max_new_tokens=wanted,
                        sampling=sampling,
                        index=index,
                        watch=watch,
                        matcher=matcher.copy() if matcher is not None else None,
                    )
                )
        except ValueError:
            self.free(taken)
            raise
        return taken

    def _too_long(self, got: str, param: str) -> Refusal:
        """Returns the refusal of a request with more tokens than the context, in OpenAI's words."""
        message = (
            f"This model's maximum context length is {self.context} tokens. However, {got}. "
            "Please reduce the length of the prompt or the completion."
        )
        return Refusal(message, code="context_length_exceeded", param=param)

    def tables(self) -> list[dict[str, Any]]:
        """Returns rows, bytes and hit rate of the tables that are not on the device."""
        tables = (cast(Table, table) for table in self.run.model.tables)
        return [counts for table in tables if (counts := table.metrics())]

    def unreadable(self) -> list[dict[str, Any]]:
        """Lists the tables on a disk that can no longer be read, and why."""
        unreadable = []
        for number, table in enumerate(self.run.model.tables):
            why = cast(Table, table).damage()
            if why is not None:
                unreadable.append({"table": number, "error": why[:LONGEST_ERROR]})
        return unreadable

    def free(self, taken: Sequence[Handle]) -> None:
        """Cancels requests that are no longer read."""
        for handle in taken:
            self.worker.free(handle)

    async def tokens(self, handle: Handle) -> AsyncGenerator[Token, None]:
        """Yields the tokens of a request and counts them.

        Failure where the model thread dropped the request, or where it takes too long.
        """
        last = handle.submitted
        self.metrics.prompt_tokens.inc(len(handle.request.prompt))
        finish = "cancelled"
        try:
            async for token in handle.tokens(self.timeout):
                if token.finish is not None and token.finish in FAILURES:
                    raise Failure(*FAILURES[token.finish])
                if token.id is not None:
                    handle.taken += 1
                    self.metrics.generated_tokens.inc()
                    first = last == handle.submitted
                    histogram = self.metrics.first_token if first else self.metrics.between_tokens
                    histogram.observe(max(token.seconds - last, 0.0))
                    last = token.seconds
                finish = token.finish or finish
                yield token
        except TimeoutError as error:
            finish = "timeout"
            raise Failure(*FAILURES["timeout"]) from error
        except Failure:
            finish = "error"
            raise
        finally:
            self.worker.free(handle)
            self.metrics.finished.labels(finish).inc()
            self.metrics.whole_request.observe(time.perf_counter() - handle.submitted)

    async def pieces(
        self, request: GenerationRequest, handle: Handle
    ) -> AsyncGenerator[Piece, None]:
        """Yields text as it is decoded, and last the finish reason."""
        tools = self._tools(request)
        stop = tuple(request.stop)
        least = request.min_tokens or 0
        hidden = () if request.shows_special or tools is not None else self.special_ids
        stream = TextStream(self.run.tokenizer, () if least else stop, hidden)
        # A token whose text is held back stands with the next piece, unless it is asked for.
        every = handle.request.sampling.logprobs is not None or request.return_routed_experts
        every = every or request.return_memory
        made = 0
        async with aclosing(self.tokens(handle)) as tokens:
            async for token in tokens:
                made += token.id is not None
                if least and made > least:
                    stream.stop = stop
                silent = token.id is None or _ends(handle.request, token)
                text = "" if silent or token.id is None else stream.push(token.id)
                finish = "stop" if stream.stopped else token.finish
                if finish is not None:
                    text += stream.flush()
                    finish = "stop" if stream.stopped else finish
                calls: Sequence[ToolCall] = ()
                if tools is not None:
                    text, calls = _split(tools, text, finish is not None, request)
                    finish = "tool_calls" if finish == "stop" and tools.calls else finish
                if text or calls or finish is not None or every:
                    yield Piece(text, calls, [token] if every else (), finish)
                if finish is not None:
                    return

    def _tools(self, request: GenerationRequest) -> ToolStream | None:
        """Returns what splits the text of an answer into content and calls; None without tools."""
        if not isinstance(request, ChatRequest) or not request.calls_tools:
            return None
        form = JSON if request.forces_tool else format_of(self.template)
        return ToolStream(form, request.tool_names, request.forced_tool)


def _split(
    tools: ToolStream, text: str, last: bool, request: GenerationRequest
) -> tuple[str, Sequence[ToolCall]]:
    """Splits text into content and calls; only the first call where one alone is wanted."""
    before = len(tools.calls)
    content, calls = tools.push(text)
    if last:
        rest, more = tools.flush()
        content = content + rest
        calls = [*calls, *more]
    if isinstance(request, ChatRequest) and request.parallel_tool_calls is False:
        calls = calls[: max(1 - before, 0)]
    return content, calls


def _without_begin(prompt: str | list[int], ids: list[int]) -> list[int]:
    """Returns the ids of a text without the one that begins a document; refuses an empty text."""
    if not isinstance(prompt, str):
        return ids
    if len(ids) < 2:
        name = "add_special_tokens"
        raise Refusal(f"{name}: got false beside an empty prompt, expected a text", param=name)
    return ids[1:]


def _ends(request: Request, token: Token) -> bool:
    """Returns whether the id ended its text, of which it is then no part."""
    return token.finish == "stop" and token.id in request.sampler.end_ids


def _param_of(message: str, otherwise: str) -> str:
    """Returns the field that an error names, as errors do at their beginning."""
    name, mark, _ = message.partition(":")
    return name if mark and name.isidentifier() else otherwise
