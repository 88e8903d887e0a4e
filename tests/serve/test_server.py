"""The HTTP face: answers equal the run's own, streams equal wholes, errors are 400 with a sentence."""

import asyncio
import contextlib
import http.client
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch

uvicorn = pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")

from rorqual import checkpoint  # noqa: E402 (after the extra is known to be there)
from rorqual.data.tokenizer import train  # noqa: E402
from rorqual.layers.attention import GQAConfig  # noqa: E402
from rorqual.layers.engram import EngramConfig  # noqa: E402
from rorqual.layers.moba import MoBAConfig  # noqa: E402
from rorqual.layers.mtp import MTPConfig  # noqa: E402
from rorqual.layers.nsa import NSAConfig  # noqa: E402
from rorqual.model import LanguageModel, ModelConfig  # noqa: E402
from rorqual.serve.generate import load  # noqa: E402
from rorqual.serve.sampling import GREEDY, Sampling  # noqa: E402
from rorqual.serve.server import Service, application  # noqa: E402

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whale"
    tokenizer = train(["A whale lives in the sea. 🐋 é"] * 4, 280)
    engram = EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2, head_dim=8)
    config = ModelConfig(vocabulary=290, dim=32, layers=2, dense_width=32, engram=engram, init_std=0.2)
    model = LanguageModel(config, torch.from_numpy(tokenizer.canonical_map()), seed=1)
    with torch.no_grad():
        model.head.weight[tokenizer.end_id] = 0.0
    checkpoint.save_model(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def service(run):
    return Service(run, rows=4, context=64)


@dataclass(frozen=True)
class Answer:
    status: int
    kind: str
    text: str

    def json(self):
        return json.loads(self.text)


@dataclass(frozen=True)
class Client:
    port: int

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers.get("content-type", ""), answer.read().decode())


@contextlib.contextmanager
def serving(service):
    """A real server on a free port, in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(application(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield Client(server.servers[0].sockets[0].getsockname()[1])
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(service):
    with serving(service) as client:
        yield client


def ask(client, body, path="/v1/completions"):
    return client.call("POST", path, json.dumps(body).encode(), **{"content-type": "application/json"})


def events(answer) -> list:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_the_runs_own(client, run):
    answer = ask(client, {"prompt": "A whale", "max_tokens": 9, "temperature": 0}).json()
    own = run.complete(["A whale"], max_new_tokens=9, sampling=GREEDY)[0]
    assert answer["object"] == "text_completion"
    assert answer["model"] == "whale"
    assert answer["choices"] == [{"index": 0, "text": own.text, "logprobs": None, "finish_reason": "length"}]
    length = len(run.prompt("A whale"))
    assert answer["usage"] == {"prompt_tokens": length, "completion_tokens": 9, "total_tokens": length + 9}


def test_prompts_and_copies_are_numbered_in_order(client, run):
    body = {"prompt": ["A", "the sea"], "n": 2, "max_tokens": 6, "temperature": 1.0, "seed": 4}
    choices = ask(client, body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    own = run.complete(["A", "A", "the sea", "the sea"], max_new_tokens=6, sampling=Sampling(temperature=1.0, seed=4))
    assert [choice["text"] for choice in choices] == [completion.text for completion in own]


def test_ids_are_prompts_too(client, run):
    body = {"max_tokens": 5, "temperature": 0}
    ids = ask(client, body | {"prompt": run.prompt("A whale")}).json()
    assert ids["choices"][0]["text"] == ask(client, body | {"prompt": "A whale"}).json()["choices"][0]["text"]


def test_a_stream_joins_to_the_whole(client):
    body = {"prompt": ["A whale", "é"], "max_tokens": 12, "temperature": 0}
    whole = [choice["text"] for choice in ask(client, body).json()["choices"]]
    answer = ask(client, body | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.kind.startswith("text/event-stream")
    chunks = events(answer)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 24
    for index in range(2):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in own) == whole[index]
        assert [choice["finish_reason"] for choice in own][-1] == "length"
        assert all(choice["finish_reason"] is None for choice in own[:-1])


def test_stop_strings(client):
    body = {"prompt": "A whale", "max_tokens": 12, "temperature": 0}
    text = ask(client, body).json()["choices"][0]["text"]
    stop = text[3:5]
    choice = ask(client, body | {"stop": [stop]}).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_many_at_once_are_each_themselves(client, run):
    prompts = ["A", "whale", "the sea lives", "é é", "in", "A whale lives in the sea"]
    body = {"max_tokens": 5, "temperature": 0}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda prompt: ask(client, body | {"prompt": prompt}).json(), prompts))
    own = [run.complete([prompt], max_new_tokens=5, sampling=GREEDY)[0].text for prompt in prompts]
    assert [answer["choices"][0]["text"] for answer in answers] == own


BLOCKWISE = {
    "nsa": {"nsa": NSAConfig(block=4, stride=2, select_block=4, chosen=3, window=4)},
    "moba": {"moba": MoBAConfig(block=4, chosen=1)},
}


@pytest.mark.parametrize("name", BLOCKWISE)
def test_a_model_whose_attention_is_by_blocks_answers_many_at_once(tmp_path, run, name):
    gqa = GQAConfig(heads=4, kv_heads=2, head_dim=8)
    parts = {"mla": None, "gqa": gqa, "engram": run.config.engram, "mtp": MTPConfig()} | BLOCKWISE[name]
    config = ModelConfig(vocabulary=290, dim=32, layers=2, dense_width=32, init_std=0.2, **parts)
    checkpoint.save_model(tmp_path, LanguageModel(config, run.tokenizer.canonical_map(), seed=2), run.tokenizer)
    sparse = load(tmp_path, device="cpu")
    prompts = [" ".join(["whale", "sea", "é"] * count) for count in (1, 3, 2, 1, 4, 2, 3)]
    with serving(Service(sparse, rows=3, context=64)) as client, ThreadPoolExecutor(7) as pool:
        bodies = [{"prompt": prompt, "max_tokens": 3 + n, "temperature": 0} for n, prompt in enumerate(prompts)]
        answers = list(pool.map(lambda body: ask(client, body), bodies))
    assert [answer.status for answer in answers] == [200] * 7
    for answer, body in zip(answers, bodies, strict=True):
        own = sparse.complete([body["prompt"]], max_new_tokens=body["max_tokens"], sampling=GREEDY)[0]
        assert answer.json()["choices"][0]["text"] == own.text


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
    with serving(Service(broken, rows=5, context=64)) as client, ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda body: ask(client, body), bodies))
        assert client.call("GET", "/health").json()["running"] <= 1
    assert [answer.status for answer in answers] == [200, 200, 500, 200, 200]
    assert "see the server's log" in answers[2].json()["error"]["message"]
    said = [answer.json()["choices"][0]["text"] for answer in (answers[n] for n in (0, 1, 3, 4))]
    assert said == [broken.complete([text], max_new_tokens=20, sampling=GREEDY)[0].text for text in texts] * 2


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "prompt: expected"),
        ({"prompt": "A", "tempreature": 1}, "did you mean temperature"),
        ({"prompt": "A", "max_tokens": 100}, "at most 64 tokens in all"),
        ({"prompt": "A " * 100}, "at most 64 tokens in all"),
        ({"prompt": [9999]}, "each from 0 to 279"),
        ({"prompt": [285]}, "each from 0 to 279"),
        ({"prompt": "A", "top_p": 2}, "top_p: got 2"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(client, body, said):
    answer = ask(client, body)
    assert answer.status == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b'{"prompt": "A"}', "text/plain", "got text/plain, expected application/json"),
        (b"{", "application/json; charset=utf-8", "body is not JSON"),
        (b"[" * 100_000, "application/json", "too deep in one another"),
        (b" " * (9 * 2**20), "application/json", "expected a smaller request"),
    ],
)
def test_only_json_is_taken(client, content, kind, said):
    answer = client.call("POST", "/v1/completions", content, **{"content-type": kind})
    assert answer.status == 400
    assert said in answer.text


def test_other_names_are_not_answered(client):
    assert client.call("GET", "/health", host="evil.example").status == 400
    assert client.call("GET", "/health", host="localhost:8000").status == 200


def test_health_and_models(client):
    assert client.call("GET", "/health").json() == {"status": "ok", "running": 0, "waiting": 0, "rows": 4}
    assert [model["id"] for model in client.call("GET", "/v1/models").json()["data"]] == ["whale"]
    assert client.call("GET", "/v1/completions").status == 405


def test_health_tells_of_tables_that_are_not_on_the_device(folder):
    run = load(folder, device="cpu", tables="disk")
    with serving(Service(run, rows=4, context=64)) as client:
        assert client.call("GET", "/health").json()["tables"][0]["rows"] == 0
        for _ in range(2):  # the second time its rows are hot
            ask(client, {"prompt": "A whale", "max_tokens": 4, "temperature": 0})
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


def test_a_chat_needs_a_template(client, folder, tmp_path):
    body = {"messages": [{"role": "user", "content": "A whale"}], "max_tokens": 6, "temperature": 0}
    answer = ask(client, body, "/v1/chat/completions")
    assert (answer.status, "has no chat template" in answer.text) == (400, True)

    chatty = tmp_path / "chatty"
    shutil.copytree(folder, chatty)
    (chatty / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    run = load(chatty, device="cpu")
    with serving(Service(run, context=64)) as chat:
        whole = ask(chat, body, "/v1/chat/completions").json()
        own = run.complete(["user: A whale\nassistant:"], max_new_tokens=6, sampling=GREEDY)[0]
        assert whole["choices"][0]["message"] == {"role": "assistant", "content": own.text}
        assert whole["object"] == "chat.completion"
        deltas = [
            choice["delta"]
            for chunk in events(ask(chat, body | {"stream": True}, "/v1/chat/completions"))
            for choice in chunk["choices"]
        ]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == own.text


def test_a_chat_template_is_read_once_and_not_by_the_thread_that_answers(folder, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    chatty, read, loops = tmp_path / "chatty", AutoTokenizer.from_pretrained, []
    shutil.copytree(folder, chatty)
    (chatty / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")

    def counted(*args, **options):
        try:
            loops.append(asyncio.get_running_loop())
        except RuntimeError:
            loops.append(None)
        return read(*args, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", counted)
    body = {"messages": [{"role": "user", "content": "A whale"}], "max_tokens": 2}
    with serving(Service(load(chatty, device="cpu"), context=64)) as chat, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(chat, body, "/v1/chat/completions").status, range(6)))
    assert answers == [200] * 6
    assert loops == [None]


def test_a_step_that_fails_takes_no_other_request_with_it(client, service, monkeypatch):
    failed, step = threading.Event(), service.worker.engine.step

    def once():
        if failed.is_set():
            return step()
        failed.set()
        step()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(service.worker.engine, "step", once)
    body = {"prompt": "A whale", "max_tokens": 4, "temperature": 0}
    broken = ask(client, body)
    assert broken.status == 500
    assert "the model failed" in broken.json()["error"]["message"]
    assert ask(client, body).status == 200
    assert client.call("GET", "/health").json()["status"] == "ok"
