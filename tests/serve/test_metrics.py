"""Tests that the metrics of a server count what it did."""

import re
from dataclasses import replace
from functools import partial

import pytest

httpx = pytest.importorskip("httpx", reason="httpx is not installed")
pytest.importorskip("prometheus_client", reason="the extra [serve] is not installed")
pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("llguidance", reason="the extra [serve] is not installed")

from rorqual.layers.mtp import MTPConfig  # noqa: E402 (after the extra is known to be there)
from rorqual.model import LanguageModel  # noqa: E402
from rorqual.serve.generate import Run, load  # noqa: E402
from rorqual.serve.service import Service  # noqa: E402

# A loaded machine may take longer than the 5 s that httpx waits.
POST = partial(httpx.post, timeout=60)
GET = partial(httpx.get, timeout=60)


def test_metrics_count_what_was_done(run, serving):
    with serving(Service(run, max_batch_size=2, context=64)) as address:
        body = {"prompt": ["A whale", "é"], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        assert POST(f"{address}/v1/completions", json=body).status_code == 200
        assert POST(f"{address}/v1/completions", json={}).status_code == 400
        text = GET(f"{address}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    route = 'route="/v1/completions"'
    assert values[f'rorqual_requests_total{{{route},status="200"}}'] == "1.0"
    assert values[f'rorqual_requests_total{{{route},status="400"}}'] == "1.0"
    assert values["rorqual_generated_tokens_total"] == "10.0"
    assert float(values["rorqual_prompt_tokens_total"]) == len(run.prompt("A whale")) + len(
        run.prompt("é")
    )
    assert values['rorqual_finished_total{reason="length"}'] == "2.0"
    assert values["rorqual_time_to_first_token_seconds_count"] == "2.0"
    assert values["rorqual_inter_token_latency_seconds_count"] == "8.0"
    assert float(values["rorqual_requests_running"]) <= 2
    assert values["rorqual_prefix_hit_rate"] == values["rorqual_preemptions_total"] == "0.0"


def test_the_memory_of_caches_is_counted(run):
    """A short request beside a long one takes as much memory as that."""
    engine = Service(run, max_batch_size=2, context=256, prefix_cache=False).worker.engine
    assert (engine.stats().pages, engine.stats().allocated_bytes) == (0, 0)
    engine.submit([7] * 200, max_new_tokens=20)
    engine.step()
    assert engine.stats().allocated_bytes > 0
    engine.step()
    alone = engine.stats()
    assert alone.pages == 13
    engine.submit([7], max_new_tokens=20)
    engine.step()
    engine.step()
    both = engine.stats()
    assert both.pages == 14
    assert both.allocated_bytes == 2 * alone.allocated_bytes
    engine.drop()
    assert engine.stats().allocated_bytes == 0


def test_drafts_are_counted(run, serving):
    config = replace(run.config, mtp=MTPConfig())
    drafting = Run(LanguageModel(config, run.model.addresses.canonical_map), run.tokenizer)
    with serving(Service(drafting, context=64, drafts=True)) as address:
        body = {"prompt": "A whale", "max_tokens": 9, "temperature": 0, "ignore_eos": True}
        assert POST(f"{address}/v1/completions", json=body).status_code == 200
        text = GET(f"{address}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    drafted, accepted = (
        float(values[f"rorqual_{name}_total"]) for name in ("drafts", "drafts_accepted")
    )
    # Rounds of two ids, but for the first id and perhaps the last.
    assert 4 <= drafted <= 7
    assert float(values["rorqual_draft_acceptance_rate"]) == accepted / drafted


def test_a_prompt_that_was_read_before_is_counted(run, serving):
    with serving(Service(run, context=1000)) as address:
        body = {"prompt": [7] * 200, "max_tokens": 2}
        first, again = (
            POST(f"{address}/v1/completions", json=body).json()["usage"] for _ in range(2)
        )
        text = GET(f"{address}/metrics").text
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again["prompt_tokens_details"] == {"cached_tokens": 192}
    assert 0.4 < float(re.findall(r"\nrorqual_prefix_hit_rate (\S+)", text)[0]) < 0.5


def test_table_metrics_name_the_table(folder, serving):
    run = load(folder, device="cpu", placement="disk")
    with serving(Service(run, context=64)) as address:
        for _ in range(2):
            POST(f"{address}/v1/completions", json={"prompt": "A whale", "max_tokens": 4})
        text = GET(f"{address}/metrics").text
    (rate,) = re.findall(r'rorqual_table_hit_rate\{table="0"\} (\S+)', text)
    assert 0 < float(rate) < 1
