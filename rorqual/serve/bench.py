"""Measures a server that speaks OpenAI's protocol, as `vllm bench serve` does.

    ttft     first piece of text - sending               time to first token
    itl      gaps between the pieces of a request        inter-token latency
    tpot     (last piece - first piece) / (tokens - 1)   time per output token, of a request
    e2el     last piece - sending                        end-to-end latency
    goodput  whole requests within every limit, a second

Requests are sent at the times of a Poisson process (`rate` a second), or at once (infinity), and
at most `concurrency` run together. The keys of `summarise` are those of vLLM's result files, so
that what reads one reads the other; times there are in milliseconds. A piece is what the server
sends at once: mostly a token, and more where a character is not whole before. Only requests that
ended whole count for throughput and latency; all others are counted by what happened to them.
"""

import asyncio
import json
import math
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from rorqual import hints

METRICS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 90, 99)
START_SECONDS = 600.0  # the time limit for a server to load its model
# Together less than a second, after which Ctrl-C has printed what was measured. The server has no
# other clients, and nothing to save.
STOP_SECONDS = 0.5
END_SECONDS = 0.3  # the time that a measurement has to end after Ctrl-C
WAIT_SECONDS = 0.2  # between two looks for Ctrl-C, which does not end a wait on every system
CONNECT_SECONDS = 10.0
LONGEST_MESSAGE = 200  # characters of an error that are shown
WORDS = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "thing",
    "life",
    "child",
    "world",
    "school",
    "hand",
)
UNFINISHED = "unfinished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The requests of a measurement.

    `prompts` are what each body says beside its options: {"prompt": ids or text} or
    {"messages": [...]}. `options` are further fields of every body.
    """

    prompts: Sequence[Mapping[str, Any]]
    output_tokens: int
    rate: float = math.inf
    concurrency: int | None = None
    seed: int = 0
    timeout: float = 600.0
    options: Mapping[str, Any] = field(default_factory=dict)
    texts: bool = False  # whether the outcomes have the texts of the answers


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of a request; times are seconds of one clock.

    `failure` is None for a whole answer, else its status or what happened.
    """

    due: float
    sent: float = 0.0
    pieces: list[float] = field(default_factory=list)
    failure: str | None = UNFINISHED
    message: str = ""
    prompt_tokens: int = 0
    output_tokens: int | None = None  # None: the server did not count them
    texts: list[str] | None = None  # of a completion, a piece each; None: not wanted

    @property
    def tokens(self) -> int:
        """The output tokens by the server's count, or the number of pieces if it did not count."""
        return len(self.pieces) if self.output_tokens is None else self.output_tokens

    def times(self) -> dict[str, list[float]]:
        """Returns the request's times in seconds by METRICS; tpot is empty for a single token."""
        first = self.pieces[0]
        last = self.pieces[-1]
        return {
            "ttft": [first - self.sent],
            "tpot": [(last - first) / (self.tokens - 1)] if self.tokens > 1 else [],
            "itl": [after - before for before, after in pairwise(self.pieces)],
            "e2el": [last - self.sent],
        }


def summarise(
    outcomes: Sequence[Outcome], seconds: float, limits: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Returns the figures of a measurement that took `seconds`.

    `limits` are milliseconds by METRICS. A request keeps a limit if none of its times is above it,
    so that itl is its longest gap.
    """
    whole = [each for each in outcomes if each.failure is None]
    failed = Counter(each.failure for each in outcomes if each.failure is not None)
    output = sum(each.tokens for each in whole)
    prompt = sum(each.prompt_tokens for each in whole)
    times: dict[str, list[float]] = {name: [] for name in METRICS}
    for each in whole:
        for name, values in each.times().items():
            times[name] += values
    times["wait"] = [each.sent - each.due for each in outcomes if each.sent]
    figures: dict[str, Any] = {
        "duration": seconds,
        "completed": len(whole),
        "failed": sum(failed.values()) - failed[UNFINISHED],
        "unfinished": failed.pop(UNFINISHED, 0),
        "failures": dict(failed),
        "failed_output_tokens": sum(each.tokens for each in outcomes) - output,
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "counted_by_pieces": sum(each.output_tokens is None for each in whole),
        "request_throughput": len(whole) / seconds,
        "output_throughput": output / seconds,
        "total_token_throughput": (prompt + output) / seconds,
    }
    if limits is not None:
        good = sum(_keeps(each, limits) for each in whole)
        figures |= {"good": good, "request_goodput": good / seconds}
    for name, values in times.items():
        figures |= _spread(name, [value * 1e3 for value in values])
    return figures


def _keeps(outcome: Outcome, limits: Mapping[str, float]) -> bool:
    """Returns whether no time of a request is above its limit, in milliseconds by METRICS."""
    times = outcome.times()
    return all(max(times[name], default=0.0) * 1e3 <= limit for name, limit in limits.items())


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Returns mean, percentiles (interpolated), maximum and more; None where there is no value."""
    if not values:
        keys = ("mean", *(f"p{p}" for p in PERCENTILES), "median", "std", "max")
        return {f"{key}_{name}_ms": None for key in keys}
    spread = {"mean": statistics.fmean(values), "std": statistics.pstdev(values)}
    spread |= {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    spread |= {"median": spread["p50"], "max": max(values)}
    return {f"{key}_{name}_ms": value for key, value in spread.items()}


def limits_of(words: Sequence[str]) -> dict[str, float]:
    """Reads limits such as "ttft:200"; ValueError for any other word."""
    limits = {}
    for word in words:
        name, mark, value = word.partition(":")
        hints.choose("limit of goodput", name, METRICS)
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if not mark or not limits[name] > 0:
            raise ValueError(f"goodput: got {word!r}, expected NAME:MILLISECONDS, as ttft:200")
    return limits


def check_lengths(tokens: int, shared: int) -> None:
    """Raises ValueError where no prompt has so many tokens, the first `shared` of them common."""
    if not 0 <= shared <= tokens or tokens < 1:
        raise ValueError(
            f"got {tokens} input tokens with {shared} shared, expected at least 1, "
            "and at most as many shared"
        )


def random_prompts(
    count: int, tokens: int, vocab_size: int | None, *, shared: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    """Draws prompts of `tokens` ids each, of which the first `shared` are the same in all.

    Without a vocabulary they are texts of so many words.
    """
    check_lengths(tokens, shared)
    draw = random.Random(seed)

    def some(length: int) -> list[Any]:
        if vocab_size is None:
            return draw.choices(WORDS, k=length)
        return [draw.randrange(vocab_size) for _ in range(length)]

    prefix = some(shared)
    prompts = [prefix + some(tokens - shared) for _ in range(count)]
    return [{"prompt": one if vocab_size is not None else " ".join(one)} for one in prompts]


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Reads prompts from lines: JSON objects with "prompt" or "messages" (.jsonl), or texts."""
    prompts: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append({"prompt": line})
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        used = {
            name: entry[name]
            for name in ("prompt", "messages")
            if isinstance(entry, dict) and name in entry
        }
        if len(used) != 1:
            raise ValueError(
                f"{path} line {number}: got {line[:60]!r}, "
                'expected a JSON object with "prompt" or "messages"'
            )
        prompts.append(used)
    if not prompts:
        raise ValueError(f"{path}: got no prompts, expected one a line")
    return prompts


def is_local(url: str) -> bool:
    """Returns whether a URL leads to this machine."""
    try:
        return httpx.URL(url).host in ("127.0.0.1", "localhost", "::1")
    except httpx.InvalidURL:
        return False


class Server:
    """A server of OpenAI's protocol at a base URL, with or without /v1.

    ValueError where it cannot be reached, refuses the key, or lacks the model.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ValueError(f"got url {url!r}, expected http://HOST:PORT ({error})") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"got url {url!r}, expected http://HOST:PORT")
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy of the environment leads away from this machine.
        self.trust_env = not is_local(self.url)
        listed = self.get("/v1/models")
        try:
            names = [card["id"] for card in listed["data"]]
        except (TypeError, KeyError):
            names = []
        if not names:
            raise ValueError(f"{self.url}/v1/models: got no list of models, expected OpenAI's")
        self.model = names[0] if model is None else hints.choose("model", model, names)
        info = self.get("/tokenizer_info", optional=True)
        size = info.get("vocab_size") if isinstance(info, dict) else None
        self.vocab_size: int | None = size if isinstance(size, int) else None

    def get(self, path: str, *, optional: bool = False) -> Any:
        """Returns what a route answers, as JSON; None for no answer of an optional one."""
        try:
            answer = httpx.get(
                self.url + path,
                headers=self.headers,
                timeout=CONNECT_SECONDS,
                trust_env=self.trust_env,
            )
        except httpx.RequestError as error:
            raise ValueError(
                f"{self.url}: got no connection ({_reason(error)}), expected a server there: "
                "rorqual serve RUN starts one"
            ) from error
        try:
            value = answer.json() if answer.is_success else None
        except ValueError:
            value = None
        if value is None and not optional:
            hint = "; try --api-key, or RORQUAL_API_KEY" if answer.status_code == 401 else ""
            raise ValueError(
                f"{self.url}{path}: got status {answer.status_code}, "
                f"expected a server of OpenAI's protocol{hint}"
            )
        return value

    def client(self, timeout: float) -> httpx.AsyncClient:
        """Returns a client for the measurement, with as many connections as are needed at once."""
        return httpx.AsyncClient(
            headers=self.headers,
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=self.trust_env,
        )

    async def stream(self, client: httpx.AsyncClient, load: Load, prompt: Any, to: Outcome) -> None:
        """Sends a request, and writes into `to` when each piece comes, or what failed."""
        path = "/v1/chat/completions" if "messages" in prompt else "/v1/completions"
        body = {
            "model": self.model,
            "max_tokens": load.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **load.options,
            **prompt,
        }
        to.sent = time.perf_counter()
        try:
            # The limit is for the whole request: a server that sends a byte now and then
            # would never time out.
            async with asyncio.timeout(load.timeout):
                async with client.stream("POST", self.url + path, json=body) as answer:
                    if answer.status_code != 200:
                        to.failure = str(answer.status_code)
                        to.message = _message(await answer.aread())
                    else:
                        await _listen(answer, to)
        except (httpx.ConnectTimeout, httpx.ConnectError) as error:
            to.failure = "no connection"
            to.message = _reason(error)
        except (TimeoutError, httpx.TimeoutException):
            to.failure = "timeout"
            to.message = f"no end within {load.timeout:g} s"
        except httpx.RequestError as error:
            to.failure = "hung up"
            to.message = _reason(error)


async def _listen(answer: httpx.Response, to: Outcome) -> None:
    """Reads server-sent events, and notes the times of those with text and the counts of usage."""
    ended = False
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            # What follows is read, too: a connection that is left earlier cannot be used again.
            continue
        try:
            event = json.loads(data)
            choices, usage, error = (event.get(name) for name in ("choices", "usage", "error"))
            if error:
                to.failure, to.message = "error in the stream", _message(data.encode())
                return
            if choices:
                finished = choices[0].get("finish_reason") is not None
                # A token without a text, at the end, is a piece where there was none before.
                if to.texts is not None:
                    to.texts.append(choices[0].get("text") or "")
                if _text(choices[0]) or (finished and not to.pieces):
                    to.pieces.append(time.perf_counter())
                ended |= finished
            if usage:
                to.prompt_tokens = usage.get("prompt_tokens") or 0
                to.output_tokens = usage.get("completion_tokens")
        except (ValueError, AttributeError, LookupError, TypeError):
            to.failure = "no event of OpenAI's"
            to.message = data[:LONGEST_MESSAGE]
            return
    to.failure = None if ended else "cut off"


def _text(choice: Mapping[str, Any]) -> bool:
    """Returns whether a choice has text of any kind: content, reasoning, or a call of a tool."""
    delta = choice.get("delta") or {}
    values = (choice.get("text"), *(value for name, value in delta.items() if name != "role"))
    return any(values)


def _message(body: bytes) -> str:
    """Returns the message of an error in OpenAI's shape, or else the beginning of the body."""
    try:
        return str(json.loads(body)["error"]["message"])[:LONGEST_MESSAGE]
    except (ValueError, LookupError, TypeError):
        return body[:LONGEST_MESSAGE].decode("utf-8", "replace")


def _reason(error: BaseException) -> str:
    """Returns the first line of an error, or its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(slots=True)
class _Measurement:
    """What a thread has measured so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    began: float | None = None
    ended: float | None = None
    error: BaseException | None = None


def measure(
    server: Server, load: Load, progress: Callable[[int], None] = lambda done: None
) -> tuple[list[Outcome], float]:
    """Sends every request and returns their outcomes, and the seconds that all took together.

    One request is sent before, so that connections and kernels are ready; ValueError where it
    fails. Ctrl-C ends the measurement, within END_SECONDS however many requests there are: what
    runs then is unfinished, and the rest is not there.
    """
    measured = _Measurement()
    done = threading.Event()
    loop = asyncio.new_event_loop()
    task = loop.create_task(_measure(server, load, progress, measured))

    def run() -> None:
        try:
            loop.run_until_complete(task)
            loop.close()
        except BaseException as error:
            measured.error = error
        done.set()

    # Closing thousands of connections takes long, which a daemon is not waited for.
    threading.Thread(target=run, name="rorqual bench", daemon=True).start()
    try:
        # Not `join`, which takes a thread for ended where Ctrl-C interrupts it.
        while not done.wait(WAIT_SECONDS):
            pass
    except KeyboardInterrupt:
        ended = time.perf_counter()
        # The thread may have closed its loop.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(task.cancel)
        done.wait(END_SECONDS)
        if measured.began is None:
            raise
        if not done.is_set():
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(loop.stop)
            # Copies, since the thread may go on for a while.
            outcomes = [replace(one, pieces=list(one.pieces)) for one in list(measured.outcomes)]
            return outcomes, (measured.ended or ended) - measured.began
    if measured.error is not None:
        raise measured.error
    assert measured.began is not None
    assert measured.ended is not None
    return measured.outcomes, measured.ended - measured.began


def warm_up(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a request of the same size as `body`, to be sent before the measurement.

    A prompt of ids is reversed, so that the server cannot keep its prefix for the measured one.
    """
    ids = body.get("prompt")
    return {**body, "prompt": ids[::-1]} if isinstance(ids, list) else dict(body)


async def _measure(
    server: Server, load: Load, progress: Callable[[int], None], measured: _Measurement
) -> None:
    """Sends the requests when they are due; what `measure` returns."""
    outcomes = measured.outcomes
    tasks: list[asyncio.Task] = []
    done = 0
    gate = asyncio.Semaphore(load.concurrency or len(load.prompts))
    draw = random.Random(load.seed)
    paced = load.rate < math.inf
    async with server.client(load.timeout) as client:
        first = Outcome(due=0.0)
        await server.stream(client, load, warm_up(load.prompts[0]), first)
        if first.failure is not None:
            raise ValueError(
                f"{server.url}: the first request failed: {first.failure}: {first.message}"
            )

        async def one(prompt: Mapping[str, Any], outcome: Outcome) -> None:
            """Sends one request, and counts it as done whatever became of it."""
            nonlocal done
            try:
                await server.stream(client, load, prompt, outcome)
            # One prompt that cannot be sent must not end the measurement.
            except Exception as error:
                outcome.failure, outcome.message = "not sent", _reason(error)
            finally:
                gate.release()
            done += 1
            progress(done)

        measured.began = due = time.perf_counter()
        try:
            for prompt in load.prompts:
                await asyncio.sleep(max(due - time.perf_counter(), 0.0))
                await gate.acquire()
                moment = due if paced else time.perf_counter()
                outcomes.append(Outcome(due=moment, texts=[] if load.texts else None))
                tasks.append(asyncio.create_task(one(prompt, outcomes[-1])))
                due += draw.expovariate(load.rate) if paced else 0.0
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            # Ctrl-C cancels this task: what was measured so far is the result.
            current = asyncio.current_task()
            assert current is not None
            current.uncancel()
        measured.ended = time.perf_counter()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Running(NamedTuple):
    """A server that this process started."""

    url: str
    process: int  # its id


@contextmanager
def running(run: str, options: Sequence[str]) -> Iterator[Running]:
    """Starts `rorqual serve RUN` on a free port of this machine, and ends it.

    ValueError with the server's last line where it ends before it answers.
    """
    command = [sys.executable, "-m", "rorqual", "serve", run, "--port", "0", *options]
    main = threading.current_thread() is threading.main_thread()
    # SIGTERM would end Python without the `finally` below, and leave the server behind.
    before = signal.signal(signal.SIGTERM, _end) if main else None
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with open(log, "ab") as file:
            server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)
        try:
            yield Running(_address(server, log), server.pid)
        finally:
            # Ctrl-C reaches the server too, which then ends by itself.
            server.terminate()
            try:
                server.wait(timeout=STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            if main:
                signal.signal(signal.SIGTERM, before)


def _end(*_: object) -> None:
    """Ends the process with 143, the status of SIGTERM, so that `finally` blocks run."""
    raise SystemExit(143)


def _address(server: subprocess.Popen, log: Path) -> str:
    """Waits until the server writes its address to its log."""
    due = time.monotonic() + START_SECONDS
    while time.monotonic() < due:
        ended = server.poll() is not None
        text = log.read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"http://127\.0\.0\.1:\d+", text):
            return match[0]
        if ended:
            last = (text.strip().splitlines() or ["no word"])[-1]
            raise ValueError(last.removeprefix("rorqual: error: "))
        time.sleep(0.05)
    raise ValueError(f"the server got no port within {START_SECONDS:g} s")
