"""Tests the limits of the service: time, failures of one request, warming up."""

import threading
import time

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("prometheus_client", reason="the extra [serve] is not installed")
pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("llguidance", reason="the extra [serve] is not installed")

from rorqual.serve import grammar  # noqa: E402 (after the extra is known to be there)
from rorqual.serve.service import Service  # noqa: E402


def test_a_request_that_takes_too_long_ends(run, monkeypatch, serving):
    service = Service(run, context=128, timeout=0.3)
    step = service.worker.engine.step
    monkeypatch.setattr(service.worker.engine, "step", lambda: (time.sleep(0.05), step())[1])
    body = {"prompt": "A whale", "max_tokens": 100, "ignore_eos": True}
    with serving(service) as address:
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
        assert (answer.status_code, answer.json()["error"]["type"]) == (504, "server_error")
        stream = httpx.post(f"{address}/v1/completions", json=body | {"stream": True}, timeout=60)
        assert stream.text.endswith("data: [DONE]\n\n")
        assert "took longer than this server allows" in stream.text


def test_a_grammar_that_fails_harms_no_other(run, monkeypatch, serving):
    def fail(self):
        raise ValueError("grammar: out of fuel")

    alone = run.complete(["A whale"], max_new_tokens=8)[0].text
    monkeypatch.setattr(grammar.JsonMatcher, "mask", fail)
    with serving(Service(run, max_batch_size=2, context=64)) as address:
        broken = {"prompt": "A", "response_format": {"type": "json_object"}, "max_tokens": 8}
        answers = [None, None]

        def ask(index, body):
            answers[index] = httpx.post(f"{address}/v1/completions", json=body, timeout=60)

        good = {"prompt": "A whale", "max_tokens": 8, "temperature": 0}
        threads = [
            threading.Thread(target=ask, args=(index, body))
            for index, body in enumerate((broken, good))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in answers] == [500, 200]
    assert answers[1].json()["choices"][0]["text"] == alone


def test_warming_up_leaves_nothing_behind(run):
    service = Service(run, max_batch_size=4, context=64)
    service.warm_up()
    stats = service.worker.engine.stats()
    assert (stats.running, stats.waiting, stats.cached_tokens) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.prefix_tokens) == (0, 0)
