"""Continuous batching: every request says what it says alone, whoever comes and goes beside it."""

import random

import pytest
import torch

from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moba import MoBAConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.nsa import NSAConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve.decoding import decode
from rorqual.serve.engine import Engine
from rorqual.serve.sampling import Sampling

ENGRAM = EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2, head_dim=8)
SMALL = {"vocabulary": 61, "dim": 32, "layers": 2, "dense_width": 32, "init_std": 0.2}
CONFIGS = {
    "mla": ModelConfig(**SMALL, mla=MLAConfig(heads=2, q_lora_rank=8)),
    "all": ModelConfig(
        **SMALL,
        moe=MoEConfig(routed=6, active=2, width=16, first_dense=1),
        engram=ENGRAM,
        hyper=HyperConfig(streams=2, iterations=2),
        mtp=MTPConfig(),
    ),
    "gqa": ModelConfig(**SMALL, mla=None, gqa=GQAConfig(heads=4, kv_heads=2, head_dim=8)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return LanguageModel(CONFIGS[request.param], seed=3).eval()


def alone(model, prompt, **options) -> list[int]:
    return [step[0] for step in decode(model, [prompt], **options)]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(61) for _ in range(draw.randrange(1, 14))] for _ in range(count)]


@pytest.mark.parametrize("rows", [2, 8])
def test_all_at_once_or_few_at_a_time(model, rows):
    asked = prompts(5)
    assert Engine(model, rows=rows).run(asked, max_new_tokens=5) == [alone(model, p, max_new_tokens=5) for p in asked]


def test_requests_come_and_go(model):
    engine, draw, asked = Engine(model, rows=3, end_id=9), random.Random(1), prompts(7, seed=2)
    lengths = [draw.randrange(1, 9) for _ in asked]
    requests = []
    while not engine.idle or len(requests) < len(asked):
        for _ in range(draw.randrange(3)):
            if len(requests) < len(asked):
                at = len(requests)
                requests.append(engine.submit(asked[at], max_new_tokens=lengths[at]))
        got = engine.step()
        assert len(got) <= 3
    for request, prompt, length in zip(requests, asked, lengths, strict=True):
        assert request.ids == alone(model, prompt, max_new_tokens=length, end_id=9)
        assert request.finish == ("stop" if request.ids[-1] == 9 else "length")


def test_sampling_is_each_requests_own(model):
    asked, sampling = prompts(3, seed=4), Sampling(temperature=1.0, seed=5, repetition_penalty=1.3)
    engine = Engine(model, rows=3)
    mixed = [engine.submit(asked[0], max_new_tokens=6), engine.submit(asked[1], max_new_tokens=6, sampling=sampling)]
    while not engine.idle:
        engine.step()
    assert mixed[0].ids == alone(model, asked[0], max_new_tokens=6)
    assert mixed[1].ids == alone(model, asked[1], max_new_tokens=6, sampling=sampling)


GQA = {"mla": None, "gqa": GQAConfig(head_dim=8)}
ATTENTIONS = {
    "moba": ModelConfig(**SMALL, **GQA, moba=MoBAConfig(block=4, chosen=1)),
    "nsa": ModelConfig(**SMALL, **GQA, nsa=NSAConfig(block=4, stride=2, select_block=4, chosen=3, window=4)),
    "window": ModelConfig(**SMALL, mla=None, gqa=GQAConfig(head_dim=8, window=4, sinks=True)),
    "dsa": ModelConfig(**SMALL, mla=MLAConfig(q_lora_rank=8), dsa=DSAConfig(heads=2, dim=16, chosen=3)),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_can_be_joined(name):
    model, asked = LanguageModel(ATTENTIONS[name], seed=1).eval(), [[7] * 13 + [8, 9], [1, 2], [3, 4, 5, 6, 7, 8, 9]]
    assert Engine(model, rows=2).run(asked, max_new_tokens=4) == [alone(model, p, max_new_tokens=4) for p in asked]


def test_what_nobody_waits_for_leaves(model):
    engine, asked = Engine(model, rows=2), prompts(4, seed=6)
    requests = [engine.submit(prompt, max_new_tokens=6) for prompt in asked]
    engine.step()
    engine.cancel(requests[0])
    engine.cancel(requests[3])
    while not engine.idle:
        engine.step()
    assert [request.finish for request in requests] == ["cancelled", "length", "length", "cancelled"]
    assert requests[3].ids == []
    assert requests[2].ids == alone(model, asked[2], max_new_tokens=6)


def test_memory_does_not_outlive_the_longest_request():
    engine = Engine(LanguageModel(CONFIGS["mla"]).eval(), rows=2)
    engine.submit([1] * 40, max_new_tokens=2)
    engine.submit([2, 3], max_new_tokens=30)
    for _ in range(4):
        engine.step()
    engine.submit([4, 5, 6], max_new_tokens=2)
    engine.step()
    assert engine._cache.length < 10


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ([], {}, "expected at least one id"),
        ([61], {}, "each from 0 to 60"),
        ([-1], {}, "each from 0 to 60"),
        ([1] * 10, {"max_new_tokens": 7}, "at most 16 tokens in all"),
        ([1], {"max_new_tokens": 0}, "at least 1 new token"),
    ],
)
def test_what_cannot_be_run_is_refused_when_it_is_asked(prompt, options, said):
    with pytest.raises(ValueError, match=said):
        Engine(LanguageModel(CONFIGS["mla"]), context=16).submit(prompt, **options)


def test_drop_gives_everything_up():
    engine = Engine(LanguageModel(CONFIGS["mla"]).eval(), rows=2)
    requests = [engine.submit([1, 2], max_new_tokens=5) for _ in range(3)]
    engine.step()
    assert engine.drop() == requests[:2]
    assert [request.finish for request in requests] == ["error", "error", None]
    engine.step()
    assert len(requests[2].ids) == 1


@torch.no_grad()
def test_join_of_a_cache_with_padding_keeps_positions():
    model = LanguageModel(CONFIGS["all"], seed=3).eval()
    asked = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]
    engine = Engine(model, rows=3)
    first = [engine.submit(prompt, max_new_tokens=8) for prompt in asked[:2]]
    engine.step()
    engine.step()
    last = engine.submit(asked[2], max_new_tokens=8)
    while not engine.idle:
        engine.step()
    for request, prompt in zip([*first, last], asked, strict=True):
        assert request.ids == alone(model, prompt, max_new_tokens=8)


def test_ids_that_the_tokenizer_has_not_are_refused_alone(model):
    engine = Engine(model, vocabulary=50)
    good = engine.submit([3, 49], max_new_tokens=2)
    for bad in ([50], [3, 60], [-1]):
        with pytest.raises(ValueError, match="each from 0 to 49"):
            engine.submit(bad, sampling=Sampling(repetition_penalty=1.2))
    while not engine.idle:
        engine.step()
    assert len(good.ids) == 2
    assert Engine(model, vocabulary=70).vocabulary == 61
