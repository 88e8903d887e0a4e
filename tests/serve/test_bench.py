"""Tests the measurement of servers: closed forms of scripted times, servers that misbehave."""

import contextlib
import json
import math
import random
import re
import socket
import socketserver
import statistics
import threading
import time
from types import SimpleNamespace

import pytest

from rorqual.serve import bench
from rorqual.serve.bench import Load, Outcome, Server, limits_of, measure, summarise


def whole(
    sent: float, *pieces: float, tokens: int | None = None, due: float | None = None
) -> Outcome:
    return Outcome(
        due=sent if due is None else due,
        sent=sent,
        pieces=[sent + piece for piece in pieces],
        failure=None,
        prompt_tokens=10,
        output_tokens=len(pieces) if tokens is None else tokens,
    )


def test_figures_of_a_scripted_timeline_are_the_closed_forms() -> None:
    """Request i of n begins at i, says its first token after f, and k - 1 more, g apart."""
    n = 20
    f = 0.25
    g = 0.05
    k = 9
    outcomes = [whole(float(i), *(f + g * j for j in range(k)), due=i - 0.5) for i in range(n)]
    figures = summarise(outcomes, 40.0)
    assert (figures["completed"], figures["failed"], figures["unfinished"]) == (n, 0, 0)
    assert figures["request_throughput"] == n / 40
    assert figures["output_throughput"] == n * k / 40
    assert figures["total_token_throughput"] == n * (k + 10) / 40
    constants = {"ttft": f, "itl": g, "tpot": g, "e2el": f + g * (k - 1), "wait": 0.5}
    for name, value in constants.items():
        for column in ("mean", "p50", "p90", "p99", "max", "median"):
            assert figures[f"{column}_{name}_ms"] == pytest.approx(value * 1e3, rel=1e-9)
        assert figures[f"std_{name}_ms"] == pytest.approx(0.0, abs=1e-6)


def test_percentiles_are_those_of_all_requests_and_of_all_gaps() -> None:
    outcomes = [whole(0.0, (i + 1) / 1000, (i + 1) / 1000 + 0.02) for i in range(100)]
    figures = summarise(outcomes, 1.0)
    assert figures["mean_ttft_ms"] == pytest.approx(50.5)
    assert figures["p50_ttft_ms"] == pytest.approx(50.5)
    assert figures["p90_ttft_ms"] == pytest.approx(90.1)
    assert figures["p99_ttft_ms"] == pytest.approx(99.01)
    assert figures["std_ttft_ms"] == pytest.approx(statistics.pstdev(range(1, 101)))
    # One request of 3 gaps and one of 1 weigh as 4 gaps.
    gaps = summarise([whole(0.0, 0.0, 0.1, 0.2, 0.3), whole(0.0, 0.0, 0.5)], 1.0)
    assert gaps["mean_itl_ms"] == pytest.approx(200.0)


def test_pieces_of_several_tokens_count_by_the_servers_usage() -> None:
    figures = summarise([whole(0.0, 0.1, 0.5, tokens=5)], 2.0)
    assert figures["total_output_tokens"] == 5
    assert figures["mean_tpot_ms"] == pytest.approx(100.0)
    assert figures["mean_itl_ms"] == pytest.approx(400.0)
    assert figures["counted_by_pieces"] == 0
    unsaid = whole(0.0, 0.1, 0.5)
    unsaid.output_tokens = None
    figures = summarise([unsaid], 2.0)
    assert (figures["total_output_tokens"], figures["counted_by_pieces"]) == (2, 1)


def test_what_failed_counts_by_its_kind_and_for_no_figure() -> None:
    failed = Outcome(due=0.0, sent=0.0, pieces=[9.0], failure="cut off", output_tokens=7)
    refused = [Outcome(due=0.0, sent=0.0, failure="429") for _ in range(2)]
    figures = summarise([whole(0.0, 0.1, 0.2), failed, *refused, Outcome(due=0.0)], 1.0)
    assert (figures["completed"], figures["failed"], figures["unfinished"]) == (1, 3, 1)
    assert figures["failures"] == {"cut off": 1, "429": 2}
    assert (figures["total_output_tokens"], figures["failed_output_tokens"]) == (2, 7)
    assert figures["max_ttft_ms"] == pytest.approx(100.0)


def test_nothing_measured_is_none_and_no_error() -> None:
    figures = summarise([Outcome(due=0.0)], 1.0, {"ttft": 5.0})
    assert figures["mean_ttft_ms"] is figures["p99_itl_ms"] is None
    assert figures["request_goodput"] == 0


def test_a_single_token_has_no_time_per_output_token() -> None:
    figures = summarise([whole(0.0, 0.1)], 1.0, {"tpot": 1.0, "itl": 1.0})
    assert figures["mean_tpot_ms"] is None
    assert figures["good"] == 1


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 100.0}, 2),
        ({"ttft": 99.0}, 1),
        ({"itl": 51.0}, 1),  # the longest gap of each
        ({"tpot": 61.0}, 2),
        ({"e2el": 1000.0, "ttft": 50.0}, 1),
        ({"e2el": 1.0}, 0),
    ],
)
def test_goodput_counts_requests_within_every_limit(limits: dict[str, float], good: int) -> None:
    outcomes = [whole(0.0, 0.1, 0.15, 0.2), whole(5.0, 0.05, 0.1, 0.17)]
    figures = summarise(outcomes, 4.0, limits)
    assert figures["good"] == good
    assert figures["request_goodput"] == good / 4


def test_limits_are_read_and_wrong_ones_are_a_line() -> None:
    assert limits_of(["ttft:200", "e2el:9e3"]) == {"ttft": 200.0, "e2el": 9000.0}
    for word in ("ttft", "ttft:", "ttft:fast", "ttft:-1", "ttft:nan", "tttf:3"):
        with pytest.raises(ValueError, match="expected"):
            limits_of([word])


def test_prompts_are_drawn_by_their_seed_and_share_a_beginning() -> None:
    prompts = bench.random_prompts(5, 40, 300, shared=30, seed=3)
    assert prompts == bench.random_prompts(5, 40, 300, shared=30, seed=3)
    assert prompts != bench.random_prompts(5, 40, 300, shared=30, seed=4)
    ids = [one["prompt"] for one in prompts]
    assert all(len(one) == 40 and one[:30] == ids[0][:30] for one in ids)
    assert len({tuple(one) for one in ids}) == 5
    texts = bench.random_prompts(2, 7, None)
    assert all(len(one["prompt"].split()) == 7 for one in texts)
    for tokens, shared in ((0, 0), (4, 5), (4, -1)):
        with pytest.raises(ValueError, match="expected at least 1"):
            bench.random_prompts(1, tokens, None, shared=shared)


def test_prompts_are_read_from_files(tmp_path) -> None:
    file = tmp_path / "some.jsonl"
    chat = {"messages": [{"role": "user", "content": "A"}]}
    file.write_text(json.dumps({"prompt": "A", "id": 4}) + "\n\n" + json.dumps(chat))
    assert bench.read_prompts(file) == [{"prompt": "A"}, chat]
    for wrong in ("{", "[]", "{}", json.dumps({"prompt": "A"} | chat)):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="line 1: got"):
            bench.read_prompts(file)
    text = tmp_path / "some.txt"
    text.write_text("A whale\n\nB\n")
    assert bench.read_prompts(text) == [{"prompt": "A whale"}, {"prompt": "B"}]
    text.write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        bench.read_prompts(text)


def event(text: str = "", finish: str | None = None, **more) -> str:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice]} | more)}\n\n"


COUNTS = {"prompt_tokens": 3, "completion_tokens": 4}
USAGE = f"data: {json.dumps({'choices': [], 'usage': COUNTS})}\n\n"
DONE = "data: [DONE]\n\n"
# What the fake server says to a prompt: status, body in parts that 20 ms lie between.
SCRIPTS: dict[str, tuple[int, list[str]]] = {
    "good": (200, [event("a"), event("b"), event("c", "stop"), USAGE + DONE]),
    "parts of events": (200, [event("a")[:9], event("a")[9:] + event("b")[:20], event("b")[20:],
                              event("", "length"), USAGE, DONE]),
    "comments": (200, [": ping\n\n", event("a"), ": ping\n\n", event("b", "stop") + USAGE + DONE]),
    "without usage": (200, [event("a"), event("b"), event("", "stop") + DONE]),
    "no text": (200, [event("", "stop") + USAGE + DONE]),
    "cut off": (200, [event("a"), event("b")]),
    "error event": (200, [event("a"), 'data: {"error": {"message": "out of pages"}}\n\n', DONE]),
    "no json": (200, [event("a"), "data: {\n\n"]),
    "no events": (200, ["<html>"]),
    "full": (429, ['{"error": {"message": "The queue is full"}}']),
    "broken": (500, ["Internal Server Error"]),
    "hang up": (200, [event("a"), "HANG UP"]),
    "slow": (200, [event("a"), "SLEEP", event("b", "stop") + DONE]),
    "late": (200, [event("a"), *["SLEEP"] * 4, event("b", "stop") + DONE]),
}  # fmt: skip


class Handler(socketserver.StreamRequestHandler):
    """A server of OpenAI's protocol that does what the prompt says."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            size = 0
            while (header := self.rfile.readline().strip().lower()) != b"":
                if header.startswith(b"content-length:"):
                    size = int(header.split(b":")[1])
            body = json.loads(self.rfile.read(size)) if size else {}
            if line.startswith(b"GET /v1/models"):
                self.answer(200, [json.dumps({"data": [{"id": "fake"}, {"id": "other"}]})])
            elif line.startswith(b"GET"):
                self.answer(404, ["{}"])
            else:
                self.server.bodies.append(body)  # type: ignore[attr-defined]
                with self.server.counted():  # type: ignore[attr-defined]
                    self.answer(*SCRIPTS[body["prompt"]])

    def answer(self, status: int, parts: list[str]) -> None:
        self.wfile.write(f"HTTP/1.1 {status} X\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for piece in parts:
            if piece == "HANG UP":
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if piece == "SLEEP":
                time.sleep(2.0)
                continue
            self.wfile.write(f"{len(piece.encode()):x}\r\n{piece}\r\n".encode())
            time.sleep(0.02)
        self.wfile.write(b"0\r\n\r\n")


class Fake(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.running = self.highest = 0
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def counted(self):
        with self.lock:
            self.running += 1
            self.highest = max(self.highest, self.running)
        try:
            yield
        finally:
            with self.lock:
                self.running -= 1

    def handle_error(self, request, client_address) -> None:
        """Says nothing: clients that hang up are what is tested."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def fake():
    with Fake() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def load(*names: str, **options) -> Load:
    prompts = [{"prompt": name} for name in names]
    return Load(prompts=prompts, output_tokens=4, **options)


@pytest.mark.parametrize(
    ("name", "pieces", "tokens"),
    [("good", 3, 4), ("parts of events", 2, 4), ("comments", 2, 4), ("no text", 1, 4)],
)
def test_streams_are_read_however_they_are_cut(fake, name, pieces, tokens) -> None:
    (outcome,), seconds = measure(Server(fake.url), load(name))
    assert outcome.failure is None, outcome
    assert (len(outcome.pieces), outcome.tokens, outcome.prompt_tokens) == (pieces, tokens, 3)
    assert outcome.due <= outcome.sent < outcome.pieces[0] <= outcome.pieces[-1]
    assert outcome.pieces[-1] - outcome.sent <= seconds
    assert outcome.pieces == sorted(outcome.pieces)
    body = fake.bodies[-1]
    assert body["stream_options"] == {"include_usage": True}
    assert (body["model"], body["max_tokens"], body["stream"]) == ("fake", 4, True)


def test_a_server_that_does_not_count_is_counted_by_pieces(fake) -> None:
    (outcome,), _ = measure(Server(fake.url), load("without usage"))
    assert (outcome.failure, outcome.output_tokens, outcome.tokens) == (None, None, 2)


def test_every_failure_has_its_name_and_harms_no_other(fake) -> None:
    names = {
        "cut off": ("cut off", ""),
        "error event": ("error in the stream", "out of pages"),
        "no json": ("no event of OpenAI's", "{"),
        "no events": ("cut off", ""),
        "full": ("429", "The queue is full"),
        "broken": ("500", "Internal Server Error"),
        "hang up": ("hung up", "incomplete|closed"),
        "late": ("timeout", "within 5 s"),
    }
    outcomes, _ = measure(Server(fake.url), load("good", *names, "good", timeout=5.0))
    for outcome, (failure, message) in zip(outcomes[1:-1], names.values(), strict=True):
        assert outcome.failure == failure
        assert re.search(message, outcome.message), outcome
    assert outcomes[0].failure is outcomes[-1].failure is None
    figures = summarise(outcomes, 1.0)
    assert (figures["completed"], figures["failed"]) == (2, len(names))


def test_no_more_run_at_once_than_allowed(fake) -> None:
    outcomes, _ = measure(Server(fake.url), load(*["good"] * 12, concurrency=3))
    assert len(outcomes) == 12
    assert fake.highest == 3
    outcomes, _ = measure(Server(fake.url), load(*["good"] * 6))
    assert fake.highest == 6


def test_requests_are_due_by_a_poisson_process_of_the_seed(fake) -> None:
    def gaps(seed: int) -> list[float]:
        outcomes, _ = measure(Server(fake.url), load(*["good"] * 8, rate=100.0, seed=seed))
        assert all(each.sent >= each.due for each in outcomes)
        return [each.due - outcomes[0].due for each in outcomes]

    assert gaps(1) == pytest.approx(gaps(1), abs=1e-9)
    assert gaps(1) != pytest.approx(gaps(2), abs=1e-9)
    draw = random.Random(1)
    assert gaps(1)[1] == pytest.approx(draw.expovariate(100.0), abs=1e-9)


def test_what_waits_for_others_says_how_long(fake) -> None:
    outcomes, _ = measure(Server(fake.url), load(*["good"] * 4, rate=1e6, concurrency=1))
    for before, after in zip(outcomes, outcomes[1:], strict=False):
        assert after.sent >= before.pieces[-1]
    assert summarise(outcomes, 1.0)["max_wait_ms"] > 100


class Interrupted(threading.Event):
    """Stands for the event that the main thread waits for when ctrl-C comes."""

    def __init__(self, when) -> None:
        super().__init__()
        self.when = when

    def wait(self, timeout=None):
        if self.when is not None and self.when():
            self.when = None
            raise KeyboardInterrupt
        return super().wait(timeout)


@pytest.mark.parametrize("slow", [2, 200])
def test_an_interrupt_returns_what_was_measured(fake, monkeypatch, slow) -> None:
    """However many requests are there, it takes no longer."""
    done = []
    event = Interrupted(lambda: len(done) == 2)
    namespace = SimpleNamespace(Event=lambda: event, Thread=threading.Thread)
    monkeypatch.setattr(bench, "threading", namespace)
    # The rest of what two hundred connections need to close is not waited for.
    monkeypatch.setattr(bench, "END_SECONDS", 1.0 if slow == 2 else 0.0)
    server = Server(fake.url)
    names = load("good", "good", *["slow"] * slow, "good", concurrency=2)
    outcomes, seconds = measure(server, names, done.append)
    failures = [each.failure for each in outcomes]
    assert failures[:2] == [None, None]
    assert set(failures[2:]) <= {"unfinished"}
    assert len(outcomes) <= 4
    assert seconds > 0
    assert summarise(outcomes, seconds)["completed"] == 2


def test_an_interrupt_before_the_first_request_is_answered_has_nothing(fake, monkeypatch) -> None:
    event = Interrupted(lambda: True)
    namespace = SimpleNamespace(Event=lambda: event, Thread=threading.Thread)
    monkeypatch.setattr(bench, "threading", namespace)
    with pytest.raises(KeyboardInterrupt):
        measure(Server(fake.url), load("slow"))


def test_the_first_request_decides_whether_there_is_anything_to_measure(fake) -> None:
    with pytest.raises(ValueError, match="the first request failed: 429: The queue is full"):
        measure(Server(fake.url), load("full", "good"))


def test_a_wrong_address_is_a_line(fake) -> None:
    assert Server(fake.url + "/v1/").url == fake.url
    assert Server(fake.url, model="other").model == "other"
    with pytest.raises(ValueError, match=r"got model 'othr', .* did you mean 'other'"):
        Server(fake.url, model="othr")
    for url in ("127.0.0.1:80", "ftp://x", "", "http://"):
        with pytest.raises(ValueError, match="expected http://HOST:PORT"):
            Server(url)
    with pytest.raises(ValueError, match="got no connection"):
        Server("http://127.0.0.1:9")


def test_a_server_of_another_kind_is_a_line(fake, monkeypatch) -> None:
    monkeypatch.setattr(Handler, "answer", lambda self, status, parts: self.wfile.write(
        b"HTTP/1.1 401 X\r\ncontent-length: 0\r\n\r\n"))  # fmt: skip
    with pytest.raises(ValueError, match=r"got status 401, .* try --api-key"):
        Server(fake.url)


def test_it_measures_our_server(run, serving) -> None:
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    from rorqual.serve.service import Service

    with serving(Service(run, max_batch_size=2, context=64), api_key="k") as url:
        with pytest.raises(ValueError, match="401"):
            Server(url)
        server = Server(url, api_key="k")
        assert server.vocab_size == run.tokenizer.vocab_size
        options = {"ignore_eos": True, "temperature": 0.0}
        prompts = bench.random_prompts(6, 20, server.vocab_size, shared=5)
        asked = Load(prompts=prompts, output_tokens=9, options=options, rate=math.inf)
        outcomes, seconds = measure(server, asked)
        chat = [{"messages": [{"role": "user", "content": "A whale"}]}] * 2
        chats, _ = measure(server, Load(prompts=chat, output_tokens=5, options=options))
    figures = summarise(outcomes, seconds, {"e2el": 60_000.0})
    assert (figures["completed"], figures["failed"], figures["good"]) == (6, 0, 6)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (6 * 20, 6 * 9)
    assert [each.failure for each in chats] == [None, None]
    assert [each.tokens for each in chats] == [5, 5]
