"""Tests the HTTP server: answers equal the run's own, streams equal whole answers, errors are 400.

Every error has a sentence that explains it.
"""

import contextlib
import gzip
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

uvicorn = pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

from rorqual import checkpoint  # noqa: E402 (after the extra is known to be there)
from rorqual.cli.main import main  # noqa: E402
from rorqual.data.tokenizer import train  # noqa: E402
from rorqual.layers.engram import EngramConfig  # noqa: E402
from rorqual.model import LanguageModel, ModelConfig  # noqa: E402
from rorqual.serve import generate, server  # noqa: E402
from rorqual.serve.generate import Run, load  # noqa: E402
from rorqual.serve.sampling import GREEDY, Sampling  # noqa: E402
from rorqual.serve.server import Service, TimedProtocol, application  # noqa: E402

TEMPLATE = """{%- if messages[0].content == "loop" -%}
{%- for i in range(90000) -%}{%- for j in range(90000) -%}{%- endfor -%}{%- endfor -%}
{%- elif messages[0].content == "power" -%}{%- set n = 9 -%}{{ n ** (n ** n) }}
{%- elif messages[0].content == "memory" -%}{{ "x" * 10 ** 10 }}{%- endif -%}
{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}assistant:"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whale"
    tokenizer = train(["A whale lives in the sea. 🐋 é"] * 4, 280)
    engram = EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2, head_dim=8)
    config = ModelConfig(
        vocab_size=290, dim=32, layers=2, dense_width=32, engram=engram, init_std=0.2
    )
    model = LanguageModel(config, torch.from_numpy(tokenizer.canonical_map()), seed=1)
    with torch.no_grad():
        model.head.weight[tokenizer.end_id] = 0.0
    checkpoint.save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def chatty(folder, tmp_path_factory):
    """The same folder with a chat template that never ends for the messages "loop" and "power"."""
    chatty = tmp_path_factory.mktemp("runs") / "chatty"
    shutil.copytree(folder, chatty)
    (chatty / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return chatty


@pytest.fixture(scope="module")
def run(folder):
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def service(run):
    return Service(run, max_batch_size=4, context=64)


@dataclass(frozen=True)
class Answer:
    status: int
    kind: str
    text: str
    headers: dict

    def json(self):
        return json.loads(self.text)

    @property
    def error(self):
        return self.json()["error"]


@dataclass(frozen=True)
class Client:
    port: int

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            kind = answer.headers.get("content-type", "")
            return Answer(answer.status, kind, answer.read().decode(), dict(answer.headers))

    def leave(self, path: str, body: dict, *, when) -> None:
        """Sends a request, and disconnects without an answer when `when()` is true."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(
            "POST", path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        until(when)
        connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


def until(condition):
    """Waits for the condition, a minute at most."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "nothing happened in a minute"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(service):
    """Runs a real server on a free port, in its own thread."""
    server = uvicorn.Server(
        uvicorn.Config(application(service), http=TimedProtocol, port=0, log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Client(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(service):
    with serving(service) as client:
        yield client


def post(client, body, path="/v1/completions"):
    return client.call(
        "POST", path, json.dumps(body).encode(), **{"content-type": "application/json"}
    )


def events(answer) -> list:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_the_runs_own(client, run):
    answer = post(client, {"prompt": "A whale", "max_tokens": 9, "temperature": 0}).json()
    ours = run.complete(["A whale"], max_new_tokens=9, sampling=GREEDY)[0]
    assert answer["object"] == "text_completion"
    assert answer["model"] == "whale"
    assert answer["choices"] == [
        {"index": 0, "text": ours.text, "logprobs": None, "finish_reason": "length"}
    ]
    assert answer["id"].startswith("cmpl-")
    length = len(run.prompt("A whale"))
    assert answer["usage"] == {
        "prompt_tokens": length,
        "completion_tokens": 9,
        "total_tokens": length + 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_prompts_and_copies_are_numbered_in_order(client, run):
    body = {"prompt": ["A", "the sea"], "n": 2, "max_tokens": 6, "temperature": 1.0, "seed": 4}
    choices = post(client, body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    ours = run.complete(
        ["A", "A", "the sea", "the sea"],
        max_new_tokens=6,
        sampling=Sampling(temperature=1.0, seed=4),
    )
    assert [choice["text"] for choice in choices] == [completion.text for completion in ours]


def test_ids_are_prompts_too(client, run):
    body = {"max_tokens": 5, "temperature": 0}
    ids = post(client, body | {"prompt": run.prompt("A whale")}).json()
    assert (
        ids["choices"][0]["text"]
        == post(client, body | {"prompt": "A whale"}).json()["choices"][0]["text"]
    )


def test_a_prompt_can_be_its_last_tokens(client, run):
    body = {"max_tokens": 4, "temperature": 0}
    ids = run.prompt("A whale lives")
    for prompt in ("A whale lives", ids):
        shorter = post(client, body | {"prompt": prompt, "truncate_prompt_tokens": 3}).json()
        assert shorter["usage"]["prompt_tokens"] == 3
        expected = post(client, body | {"prompt": ids[-3:]}).json()
        assert shorter["choices"][0]["text"] == expected["choices"][0]["text"]
    longer = post(client, body | {"prompt": ids, "truncate_prompt_tokens": 60}).json()
    assert longer["usage"]["prompt_tokens"] == len(ids)
    embedded = {"input": ids, "truncate_prompt_tokens": 3}
    assert post(client, embedded, "/v1/embeddings").json()["usage"]["prompt_tokens"] == 3
    # What would be too long fits then.
    assert post(client, body | {"prompt": [40] * 200}).status == 400
    assert post(client, body | {"prompt": [40] * 200, "truncate_prompt_tokens": 5}).status == 200


def test_a_stream_joins_to_the_whole(client):
    body = {"prompt": ["A whale", "é"], "max_tokens": 12, "temperature": 0}
    whole = [choice["text"] for choice in post(client, body).json()["choices"]]
    answer = post(client, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.kind.startswith("text/event-stream")
    chunks = events(answer)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 24
    for index in range(2):
        ours = [
            choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index
        ]
        assert "".join(choice["text"] for choice in ours) == whole[index]
        assert [choice["finish_reason"] for choice in ours][-1] == "length"
        assert all(choice["finish_reason"] is None for choice in ours[:-1])


def test_stop_strings(client):
    body = {"prompt": "A whale", "max_tokens": 12, "temperature": 0}
    text = post(client, body).json()["choices"][0]["text"]
    stop = text[3:5]
    choice = post(client, body | {"stop": [stop]}).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_many_at_once_are_each_themselves(client, run):
    prompts = ["A", "whale", "the sea lives", "é é", "in", "A whale lives in the sea"]
    body = {"max_tokens": 5, "temperature": 0}
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda prompt: post(client, body | {"prompt": prompt}).json(), prompts)
        )
    ours = [run.complete([prompt], max_new_tokens=5, sampling=GREEDY)[0].text for prompt in prompts]
    assert [answer["choices"][0]["text"] for answer in answers] == ours


def test_a_request_that_cannot_be_sampled_fails_alone(folder):
    broken = load(folder, device="cpu")
    with torch.no_grad():
        broken.model.embed.weight[7] = torch.nan
    texts = ["A whale", "the sea"]
    bodies = [{"prompt": text, "max_tokens": 20, "temperature": 0} for text in texts]
    for text in texts:
        assert 7 not in broken.prompt(text)
        assert 7 not in broken.complete([text], max_new_tokens=20, sampling=GREEDY)[0].ids
    bodies += [{"prompt": [7], "max_tokens": 20, "seed": 1}, bodies[0] | {"temperature": 1e-320}]
    bodies += [bodies[1] | {"temperature": 1e-38}]
    with (
        serving(Service(broken, max_batch_size=5, context=64)) as client,
        ThreadPoolExecutor(5) as pool,
    ):
        answers = list(pool.map(lambda body: post(client, body), bodies))
        assert client.call("GET", "/health").json()["running"] <= 1
    assert [answer.status for answer in answers] == [200, 200, 500, 200, 200]
    assert "see the server's log" in answers[2].json()["error"]["message"]
    ids = [answer.json()["choices"][0]["text"] for answer in (answers[n] for n in (0, 1, 3, 4))]
    assert (
        ids
        == [broken.complete([text], max_new_tokens=20, sampling=GREEDY)[0].text for text in texts]
        * 2
    )


def test_leaving_a_request_that_cannot_be_sampled_harms_nobody(folder, monkeypatch):
    """It is cancelled while its prompt is prefilled, and then has neither an answer nor an id."""
    broken = load(folder, device="cpu")
    with torch.no_grad():
        broken.model.embed.weight[7] = torch.nan
    service = Service(broken, max_batch_size=2, context=64)
    engine = service.worker.engine
    asked = []
    submit = engine.submit
    hidden = broken.model.hidden

    def noted(prompt, **options):
        asked.append(submit(prompt, **options))
        return asked[-1]

    def leaving(ids, **options):
        if (ids == 7).any():
            engine.cancel(next(request for request in asked if 7 in request.prompt))
        return hidden(ids, **options)

    monkeypatch.setattr(engine, "submit", noted)
    monkeypatch.setattr(broken.model, "hidden", leaving)
    body = {"prompt": "A whale", "max_tokens": 20, "temperature": 0}
    with serving(service) as client, ThreadPoolExecutor(2) as pool:
        cached = pool.submit(post, client, body)
        until(lambda: engine.running)
        pool.submit(post, client, {"prompt": [7], "max_tokens": 4}).result()
        assert cached.result().status == 200
    alone = broken.complete(["A whale"], max_new_tokens=20, sampling=GREEDY)[0].text
    assert cached.result().json()["choices"][0]["text"] == alone


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "prompt: expected"),
        ({"prompt": "A", "tempreature": 1}, "did you mean temperature"),
        ({"prompt": "A", "max_tokens": 100}, "maximum context length is 64 tokens"),
        ({"prompt": "A " * 100}, "maximum context length is 64 tokens"),
        ({"prompt": [9999]}, "each from 0 to 279"),
        ({"prompt": [285]}, "each from 0 to 279"),
        ({"prompt": "A", "top_p": 2}, "top_p: got 2"),
        ({"prompt": "A", "stop_token_ids": [280]}, "stop_token_ids: expected ids"),
    ],
)
def test_a_bad_request_is_given_what_is_wrong(client, body, message):
    answer = post(client, body)
    assert answer.status == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b'{"prompt": "A"}', "text/plain", "got text/plain, expected application/json"),
        (b"{", "application/json; charset=utf-8", "body is not JSON"),
        (b"[" * 100_000, "application/json", "too deep in one another"),
        (b" " * (9 * 2**20), "application/json", "expected a smaller request"),
    ],
)
def test_only_json_is_taken(client, content, kind, message):
    answer = client.call("POST", "/v1/completions", content, **{"content-type": kind})
    assert answer.status == 400
    assert message in answer.text


def test_other_names_are_not_answered(client):
    assert client.call("GET", "/health", host="evil.example").status == 400
    assert client.call("GET", "/health", host="localhost:8000").status == 200


def test_health_and_models(client):
    assert client.call("GET", "/health").json() == {
        "status": "ok",
        "running": 0,
        "waiting": 0,
        "max_batch_size": 4,
    }
    assert [model["id"] for model in client.call("GET", "/v1/models").json()["data"]] == ["whale"]
    assert client.call("GET", "/v1/completions").status == 405


def test_health_tells_of_tables_that_are_not_on_the_device(folder):
    run = load(folder, device="cpu", placement="disk")
    with serving(Service(run, max_batch_size=4, context=64)) as client:
        assert client.call("GET", "/health").json()["tables"][0]["rows"] == 0
        for _ in range(2):  # the second time its rows are cached
            post(client, {"prompt": "A whale", "max_tokens": 4, "temperature": 0})
        (table,) = client.call("GET", "/health").json()["tables"]
    assert table["rows"] >= table["different"] > table["hits"] > 0
    assert table["bytes"] == (table["different"] - table["hits"]) * 8 * 4
    assert table["hit_rate"] == table["hits"] / table["different"]


def test_who_hangs_up_is_no_longer_worked_for(client, service, monkeypatch):
    step = service.worker.engine.step
    monkeypatch.setattr(service.worker.engine, "step", lambda: (time.sleep(0.05), step())[1])
    body = json.dumps({"prompt": "A", "max_tokens": 60, "temperature": 0, "stream": True}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    request = service.worker.engine.running[0]
    answer.close()
    connection.close()
    while request.finish is None:
        time.sleep(0.01)
    assert request.finish == "cancelled"
    assert len(request.ids) < 60


def test_a_chat_needs_a_template(client, chatty):
    body = {"messages": [{"role": "user", "content": "A whale"}], "max_tokens": 6, "temperature": 0}
    answer = post(client, body, "/v1/chat/completions")
    assert (answer.status, "has no chat template" in answer.text) == (400, True)

    run = load(chatty, device="cpu")
    with serving(Service(run, context=64)) as chat:
        whole = post(chat, body, "/v1/chat/completions").json()
        ours = run.complete(["user: A whale\nassistant:"], max_new_tokens=6, sampling=GREEDY)[0]
        message = {"role": "assistant", "content": ours.text, "refusal": None}
        assert whole["choices"][0]["message"] == message
        assert whole["object"] == "chat.completion"
        deltas = [
            choice["delta"]
            for chunk in events(post(chat, body | {"stream": True}, "/v1/chat/completions"))
            for choice in chunk["choices"]
        ]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == ours.text


@pytest.fixture(scope="module")
def chat_client(chatty):
    with serving(Service(load(chatty, device="cpu"), max_batch_size=2, context=64)) as client:
        yield client


def chat(client, *contents, **options):
    messages = [{"role": "user", "content": content} for content in contents]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0} | options
    return post(client, body, "/v1/chat/completions")


def test_messages_are_texts_parts_of_text_or_nothing_reported(chat_client):
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "é"}]
    text = chat(chat_client, parts)
    assert text.json()["choices"] == chat(chat_client, "A\né").json()["choices"]
    silent = [{"role": "assistant", "content": None}, {"role": "user", "content": "A"}]
    assert chat(chat_client, messages=silent).status == 200
    assert chat(chat_client, messages=[{"role": "user", "content": None}]).status == 400
    image = [{"type": "image_url", "image_url": {"url": "data:" + "A" * 2**20}}]
    refused = chat(chat_client, parts + image)
    assert refused.status == 400
    assert "messages[0].content[2]: got a part of type 'image_url'" in refused.error["message"]
    assert len(refused.text) < 1000


def test_a_template_without_developers_has_them_as_the_system(folder, chat_client, tmp_path):
    def read(role, client):
        messages = [{"role": role, "content": "A"}]
        return post(client, {"messages": messages}, "/tokenize").json()["tokens"]

    assert read("developer", chat_client) == read("system", chat_client)
    knows = tmp_path / "knows"
    shutil.copytree(folder, knows)
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}{% endfor %}{# developer #}"
    (knows / "chat_template.jinja").write_text(template, encoding="utf-8")
    with serving(Service(load(knows, device="cpu"), context=64)) as client:
        assert len(read("developer", client)) > len(read("system", client))


def test_a_prompt_without_the_begin_of_a_document(client, run):
    body = {"prompt": "A whale", "max_tokens": 1}
    whole = post(client, body).json()["usage"]["prompt_tokens"]
    bare = post(client, body | {"add_special_tokens": False}).json()["usage"]["prompt_tokens"]
    assert bare == whole - 1 == len(run.tokenizer.encode("A whale"))
    refused = post(client, body | {"prompt": "", "add_special_tokens": False})
    assert (refused.status, refused.error["param"]) == (400, "add_special_tokens")
    ids = {"prompt": [5, 6], "max_tokens": 1, "add_special_tokens": False}
    assert post(client, ids).json()["usage"]["prompt_tokens"] == 2


def test_a_head_is_answered_as_a_get_without_a_body(client):
    for path in ("/health", "/", "/v1/models"):
        answer = client.call("HEAD", path)
        assert (answer.status, answer.text) == (200, "")
        got = client.call("GET", path)
        assert answer.headers["content-length"] == str(len(got.text.encode()))
    assert client.call("HEAD", "/v1/completions").status == 405


def test_models_with_a_slash_behind(client):
    assert client.call("GET", "/v1/models/").json() == client.call("GET", "/v1/models").json()


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/chat/completions", "did you mean /v1/chat/completions?"),
        ("/v1/chat/completion", "did you mean /v1/chat/completions?"),
        ("/models", "did you mean /v1/models?"),
        ("/v1/responses", "Not Found"),
        ("/v1/audio/speech", "see /docs"),
    ],
)
def test_an_unknown_path_is_answered_with_the_one_that_was_meant(client, path, hint):
    answer = post(client, {}, path)
    assert (answer.status, answer.error["type"]) == (404, "invalid_request_error")
    assert hint in answer.error["message"]


def test_bodies_with_a_mark_of_utf8_and_packed_ones(client):
    body = json.dumps({"prompt": "A", "max_tokens": 1}).encode()
    kind = {"content-type": "application/json"}
    assert client.call("POST", "/v1/completions", b"\xef\xbb\xbf" + body, **kind).status == 200
    packed = client.call(
        "POST", "/v1/completions", gzip.compress(body), **kind | {"content-encoding": "gzip"}
    )
    assert packed.status == 415
    assert packed.error["message"] == "content-encoding: got gzip, expected a plain body"


@pytest.mark.parametrize("host", ["example.org", "", "127.0.0.1.example.org"])
def test_another_host_is_refused_in_openais_shape(client, host):
    answer = client.call("GET", "/health", host=host)
    assert answer.status == 400
    assert answer.error["message"].startswith("host: got another name")


def test_half_a_character_is_a_replacement(chat_client):
    body = {"max_tokens": 4, "temperature": 0}
    halves = post(chat_client, body | {"prompt": "A \ud83d", "stop": "\udc0b"})
    assert halves.status == 200
    assert (
        halves.json()["choices"]
        == post(chat_client, body | {"prompt": "A \ufffd"}).json()["choices"]
    )
    assert (
        chat(chat_client, "A \udc0b").json()["choices"]
        == chat(chat_client, "A \ufffd").json()["choices"]
    )
    wrong = post(chat_client, body | {"prompt": "A", "\ud83d": 1})
    assert (wrong.status, wrong.error["type"]) == (400, "invalid_request_error")


@pytest.mark.slow
def test_a_chat_template_that_loops_is_ended_and_holds_up_nobody(chatty, monkeypatch):
    monkeypatch.setattr(generate, "TEMPLATE_SECONDS", 1.0)
    body = {"prompt": "A", "max_tokens": 2}
    with (
        serving(Service(load(chatty, device="cpu"), context=64)) as client,
        ThreadPoolExecutor(3) as pool,
    ):
        stuck = [pool.submit(chat, client, content) for content in ("loop", "power", "loop")]
        assert post(client, body).status == 200
        for answer in stuck:
            assert answer.result().status == 400
            assert "the chat template took more than 1 s" in answer.result().error["message"]
        assert chat(client, "A").status == 200


@pytest.mark.skipif(
    not Path("/proc/self/statm").is_file(), reason="this system does not say what a process holds"
)
def test_a_chat_template_that_wants_memory_is_refused(chatty):
    with serving(Service(load(chatty, device="cpu"), context=64)) as client:
        answer = chat(client, "memory")
        assert answer.status == 400
        assert "the chat template refuses them: MemoryError" in answer.error["message"]
        assert chat(client, "A").status == 200


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 3 << 30])
def test_a_chat_template_is_filled_on_many_cores_and_under_a_limit(chatty, monkeypatch, limit):
    """A thread for each of 64 cores would use more address space than the template may."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "64")
    start = subprocess.Popen

    def limited(command, **options):
        return start(["prlimit", f"--as={limit}", *command] if limit else command, **options)

    if limit is not None and shutil.which("prlimit") is None:
        pytest.skip("a system without limits of resources")
    monkeypatch.setattr(generate.subprocess, "Popen", limited)
    with serving(Service(load(chatty, device="cpu"), context=64)) as client:
        for content, status in (("A", 200), ("memory", 400), ("A", 200)):
            assert chat(client, content).status == status


@pytest.mark.slow
def test_a_chat_template_is_read_once(folder, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(folder, gone)
    (gone / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    with (
        serving(Service(load(gone, device="cpu"), context=64)) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        assert chat(client, "A").status == 200
        (gone / "tokenizer.json").unlink()
        assert [answer.status for answer in pool.map(lambda _: chat(client, "A"), range(6))] == [
            200
        ] * 6


def test_a_text_is_measured_before_it_is_tokenised(chat_client, monkeypatch):
    tokenised = []
    encode = generate.Tokenizer.encode_batch

    def spied(self, texts, **options):
        tokenised.extend(texts)
        return encode(self, texts, **options)

    monkeypatch.setattr(generate.Tokenizer, "encode_batch", spied)
    for prompt in ("whale" * 2**20, ["A", "A" * 1000]):
        answer = post(chat_client, {"prompt": prompt, "max_tokens": 2})
        assert answer.status == 400
        assert answer.error["code"] == "context_length_exceeded"
        assert answer.error["param"] == "prompt"
        assert "maximum context length is 64 tokens" in answer.error["message"]
        assert len(answer.text) < 1000
    assert all(len(text) == 1 for text in tokenised)
    answer = chat(chat_client, "whale" * 2**20)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (
        400,
        "context_length_exceeded",
        "messages",
    )
    # A text that fits by its bytes is tokenised, and may still be too long.
    answer = post(chat_client, {"prompt": "xy" * 40, "max_tokens": 2})
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert tokenised[-1] == "xy" * 40


def test_texts_are_tokenised_two_at_a_time_and_aside(client, monkeypatch):
    go = threading.Event()
    at_once = []
    lock = threading.Lock()
    prompt = Run.prompt

    def slow(self, text, **options):
        with lock:
            at_once.append(1)
        assert go.wait(60)
        with lock:
            at_once.pop()
        return prompt(self, text, **options)

    monkeypatch.setattr(Run, "prompt", slow)
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(post, client, {"prompt": "A", "max_tokens": 2}) for _ in range(4)]
        until(lambda: len(at_once) == 2)
        assert client.call("GET", "/health").status == 200
        assert post(client, {"prompt": [3, 4], "max_tokens": 2}).status == 200, (
            "ids need no tokeniser"
        )
        assert len(at_once) == 2
        go.set()
        assert [answer.result().status for answer in answers] == [200] * 4


def test_who_hangs_up_leaves_no_second_thread_behind(client, monkeypatch):
    """A text that is being tokenised keeps its turn, though no client waits for it."""
    go = threading.Event()
    at_once = []
    largest = []
    lock = threading.Lock()
    prompt = Run.prompt

    def slow(self, text, **options):
        with lock:
            at_once.append(1)
            largest.append(len(at_once))
        assert go.wait(60)
        with lock:
            at_once.pop()
        return prompt(self, text, **options)

    monkeypatch.setattr(Run, "prompt", slow)
    body = {"prompt": "A", "max_tokens": 2}
    with ThreadPoolExecutor(4) as pool:
        seen = threading.Event()
        gone = [pool.submit(client.leave, "/v1/completions", body, when=seen.is_set) for _ in "ab"]
        until(lambda: len(at_once) == 2)
        seen.set()
        for one in gone:
            one.result()
        answers = [pool.submit(post, client, body) for _ in "ab"]
        # The two have arrived when this request, which needs no tokeniser, is answered.
        assert post(client, {"prompt": [3, 4], "max_tokens": 2}).status == 200
        go.set()
        assert [answer.result().status for answer in answers] == [200, 200]
    assert max(largest) == 2


@contextlib.contextmanager
def gated(run, monkeypatch, **sizes):
    """A server whose model runs a step only while the gate is open."""
    service = Service(run, **sizes)
    gate = threading.Event()
    step = service.worker.engine.step
    monkeypatch.setattr(
        service.worker.engine, "step", lambda: (gate.wait(60), time.sleep(0.01), step())[2]
    )
    with serving(service) as client:
        try:
            yield client, service.worker.engine, gate
        finally:
            gate.set()


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_leaves_queue_and_batch(run, monkeypatch, stream):
    body = {"prompt": "A", "max_tokens": 60, "temperature": 0, "stream": stream}
    with gated(run, monkeypatch, max_batch_size=1, context=64) as (client, engine, gate):
        gate.set()
        with ThreadPoolExecutor(3) as pool:
            done = threading.Event()
            first = pool.submit(client.leave, "/v1/completions", body, when=done.is_set)
            until(lambda: engine.running and engine.running[0].ids)
            request = engine.running[0]
            gate.clear()
            seen = threading.Event()
            left = [
                pool.submit(client.leave, "/v1/completions", body, when=seen.is_set) for _ in "ab"
            ]
            until(lambda: engine.waiting == 2)
            seen.set()
            for one in left:
                one.result()
            # The model does not run: the requests are removed without it.
            until(lambda: engine.waiting == 0)
            done.set()
            first.result()
            until(lambda: request.finish == "cancelled")
            gate.set()
            until(lambda: not engine.running)
    assert len(request.ids) < 60


def test_a_full_queue_refuses_all_prompts_of_a_request_or_none(run, monkeypatch):
    body = {"prompt": "A", "max_tokens": 3, "temperature": 0}
    with gated(run, monkeypatch, max_batch_size=1, context=64, max_waiting=2) as (
        client,
        engine,
        gate,
    ):
        with ThreadPoolExecutor(2) as pool:
            taken = [pool.submit(post, client, body)]
            until(lambda: not engine.idle)
            taken.append(pool.submit(post, client, body))
            until(lambda: engine.waiting == 2)
            for more in ({"n": 2}, {"prompt": ["A", "A"]}, {"stream": True, "n": 2}):
                full = post(client, body | more)
                assert full.status == 429
                assert full.error["type"] == "rate_limit_error"
                assert int(full.headers["retry-after"]) >= 1
            assert engine.waiting == 2
            never = post(client, body | {"n": 4})
            assert (never.status, "at most 3 at once" in never.error["message"]) == (400, True)
            gate.set()
            assert [answer.result().status for answer in taken] == [200, 200]
        assert post(client, body | {"n": 3}).status == 200


def test_half_open_connections_end(run, monkeypatch):
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(server, "BODY_SECONDS", 0.5)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with gated(run, monkeypatch, max_batch_size=1, context=64) as (client, engine, gate):
        for half in (b"", head):
            with client.connect() as connection:
                connection.sendall(half)
                assert connection.recv(100) == b""
        with client.connect() as connection:
            connection.sendall(head + b'content-length: 100\r\n\r\n{"prompt": ')
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        # After an answer it may be used again for longer than a head may take.
        with client.connect() as connection:
            for _ in range(2):
                connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    more = connection.recv(10_000)
                    assert more
                    answer += more
                assert answer.startswith(b"HTTP/1.1 200")
                time.sleep(0.7)
        # A connection that waits for its answer is not half open.
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, client, {"prompt": "A", "max_tokens": 2})
            until(lambda: not engine.idle)
            time.sleep(1)
            gate.set()
            assert answer.result().status == 200


def test_fields_without_a_meaning_here_are_noted_once(client, capsys):
    body = {
        "prompt": "A",
        "max_tokens": 2,
        "user": "me",
        "store": True,
        "service_tier": "auto",
        "cache_prompt": True,
    }
    for _ in range(3):
        assert post(client, body | {"metadata": None, "top_k": -1, "top_p": 0}).status == 200
    notes = [
        line for line in capsys.readouterr().err.splitlines() if "changes nothing here" in line
    ]
    assert len(notes) == 1
    assert "user, store, service_tier, cache_prompt, metadata" in notes[0]


def test_top_p_0_is_the_likeliest(client):
    body = {"prompt": "A whale", "max_tokens": 8}
    greedy = post(client, body | {"temperature": 0}).json()["choices"]
    assert (
        post(client, body | {"temperature": 2, "top_p": 0, "top_k": -1}).json()["choices"] == greedy
    )


@pytest.mark.parametrize(
    ("method", "path", "status", "allowed"),
    [
        ("GET", "/v1/completions", 405, "POST"),
        ("POST", "/v1/models", 405, "GET"),
        ("POST", "/v1/images", 404, None),
        ("GET", "/" + "x" * 10_000, 404, None),
        ("GET", "/v1/models/gpt-4", 404, None),
    ],
)
def test_what_is_not_there_is_an_error_in_json(client, method, path, status, allowed):
    answer = client.call(method, path, b"{}" if method == "POST" else None)
    assert answer.status == status
    assert answer.kind == "application/json"
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["type"] == "invalid_request_error"
    assert len(answer.text) < 1000
    assert allowed is None or sorted(answer.headers["allow"].split(", ")) == allowed.split(", ")


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "A", "x" * 2**20: 1},
        {"prompt": "A", "model": "x" * 2**20},
        {"prompt": "A", "temperature": "x" * 2**20},
        {"prompt": "A", "stop": [["x" * 100] * 100] * 100},
        {"prompt": "A", "logit_bias": {str(n): 1 for n in range(2**16)}},
        {"prompt": "A", "n": 10**4000},
    ],
)
def test_an_error_never_repeats_a_megabyte(client, body):
    answer = post(client, body)
    assert answer.status in (400, 404)
    assert len(answer.text) < 1500


def test_another_models_name_is_not_found(client, folder):
    body = {"prompt": "A", "max_tokens": 2}
    for name in ("whale", "", None, str(folder)):
        assert post(client, body | {"model": name}).json()["model"] == "whale"
    answer = post(client, body | {"model": "gpt-4o"})
    assert answer.status == 404
    assert (answer.error["code"], answer.error["param"]) == ("model_not_found", "model")
    assert "'gpt-4o'" in answer.error["message"]
    assert "'whale'" in answer.error["message"]
    assert client.call("GET", "/v1/models/whale").json()["id"] == "whale"


@pytest.mark.parametrize("loss", ["removed", "cut"])
def test_health_says_which_table_cannot_be_read(folder, tmp_path, loss):
    shutil.copytree(folder, tmp_path / "run")
    run = load(tmp_path / "run", device="cpu", placement="disk", hot_bytes=0)
    weights = tmp_path / "run" / "model.safetensors"
    with serving(Service(run, max_batch_size=4, context=64)) as client:
        assert client.call("GET", "/health").status == 200
        if loss == "removed":
            weights.unlink()
        else:
            os.truncate(weights, 2000)
            assert post(client, {"prompt": "A whale", "max_tokens": 4}).status == 500
        answer = client.call("GET", "/health")
        assert answer.status == 503
        assert answer.json()["status"] != "ok"
        (lost,) = answer.json()["unreadable"]
        assert lost["table"] == 0
        assert "model.safetensors" in lost["error"]


def test_a_port_in_use_is_a_line_before_anything_is_announced(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 1
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert f"port {port}" in message
    assert "serving" not in message


@contextlib.contextmanager
def started(folder, *words):
    """Starts `rorqual serve` in its own process and finds the address that it prints."""
    command = [
        sys.executable,
        "-m",
        "rorqual",
        "serve",
        str(folder),
        "--port",
        "0",
        "--device",
        "cpu",
        *words,
    ]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "RORQUAL_SHAPES": "0"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, text=True) as process:
        try:
            for line in process.stderr:
                if result := re.search(r"http://(\S+):(\d+)/v1/completions", line):
                    yield process, result[1], int(result[2])
                    break
            else:
                raise AssertionError(f"it ended with code {process.wait()}")
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_whatever_runs_and_waits(chatty, how):
    sizes = ("--max-batch-size", "2", "--context", "1000000", "--max-waiting", "9")
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with started(chatty, *sizes) as (process, _, port), ThreadPoolExecutor(9) as pool:
        client = Client(port)
        # The likeliest token is never the end id.
        endless = {"prompt": "A", "max_tokens": 900_000, "temperature": 0, "stop": ["never"]}
        connections = [client.connect() for _ in range(3)]
        for connection, half in zip(
            connections, ("", head, head + "content-length: 99\r\n\r\n{"), strict=True
        ):
            connection.sendall(half.encode())
        asked = [
            pool.submit(post, client, endless | {"stream": stream})
            for stream in (True, False, False, True)
        ]
        asked.append(pool.submit(chat, client, "loop"))
        until(lambda: client.call("GET", "/health").json()["waiting"] == 2)
        process.send_signal(how)
        code = process.wait(timeout=60)
        for connection in connections:
            connection.close()
        for answer in asked:
            with contextlib.suppress(OSError, http.client.HTTPException):
                assert "stopping" in answer.result().text
    assert code in ((-signal.SIGTERM,) if how == signal.SIGTERM else (130, -signal.SIGINT))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_ctrl_c_ends_the_server_in_the_middle_of_a_long_prefill(folder):
    with (
        started(folder, "--max-batch-size", "1", "--context", "1000000") as (process, _, port),
        ThreadPoolExecutor(1) as pool,
    ):
        client = Client(port)
        asked = pool.submit(post, client, {"prompt": [3, 4, 5, 6] * 50_000, "max_tokens": 9})
        until(lambda: client.call("GET", "/health").json()["waiting"] == 0)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        with contextlib.suppress(OSError, http.client.HTTPException):
            assert asked.result().status == 503


@pytest.mark.slow
def test_it_serves_on_the_other_internet(folder):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no ::1")
    with started(folder, "--host", "::1") as (_, host, port):
        assert host == "[::1]"
        connection = http.client.HTTPConnection("::1", port, timeout=60)
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 200


def test_openais_own_client_is_understood(chat_client, chatty):
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{chat_client.port}/v1", api_key="none", max_retries=0
    )
    with client:
        assert [model.id for model in client.models.list()] == ["chatty"]
        body = {"model": "chatty", "max_tokens": 6, "temperature": 0}
        whole = client.completions.create(
            prompt="A whale", **body, user="me", extra_body={"top_k": -1}
        )
        pieces = client.completions.create(prompt="A whale", **body, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
        assert whole.usage.completion_tokens == 6

        messages = [{"role": "user", "content": [{"type": "text", "text": "A whale"}]}]
        text = client.chat.completions.create(
            messages=messages, **body, store=False, metadata={"a": "b"}
        )
        answer = text.choices[0].message
        pieces = client.chat.completions.create(messages=messages, **body, stream=True)
        assert "".join(piece.choices[0].delta.content for piece in pieces) == answer.content
        more = [*messages, answer.model_dump(), messages[0]]
        assert (
            client.chat.completions.create(messages=more, **body).choices[0].message.role
            == "assistant"
        )

        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(prompt="A", **(body | {"model": "gpt-4o"}))
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(prompt="whale " * 10_000, **body)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="reasoning_effort: got"):
            client.chat.completions.create(messages=messages, reasoning_effort="high", **body)


def test_a_step_that_fails_takes_no_other_request_with_it(client, service, monkeypatch):
    failed = threading.Event()
    step = service.worker.engine.step

    def once():
        if failed.is_set():
            return step()
        failed.set()
        step()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service.worker.engine, "step", once)
    body = {"prompt": "A whale", "max_tokens": 4, "temperature": 0}
    broken = post(client, body)
    assert broken.status == 500
    assert "the model failed" in broken.json()["error"]["message"]
    assert post(client, body).status == 200
    assert client.call("GET", "/health").json()["status"] == "ok"
