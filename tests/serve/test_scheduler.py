"""Tests chunks of prompts, shared prefixes and pages: no request's ids depend on any of it."""

import math
import random
from pathlib import Path

import pytest
import torch

from rorqual.hub import checkpoints
from rorqual.layers.delta_net import DeltaNetConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve import runner
from rorqual.serve.engine import Engine
from rorqual.serve.sampling import GREEDY, Sampling
from rorqual.serve.scheduler import Watch
from tests.serve.plain import alone
from tests.serve.test_engine import ATTENTIONS, ENGRAM, GQA, SMALL

KINDS = ATTENTIONS | {
    "delta net": GQA
    | {"delta": DeltaNetConfig(key_heads=1, value_heads=2, key_dim=8, value_dim=8, full_every=2)},
}


GOLDEN = Path(__file__).parents[1] / "golden"
PRODUCTION = ("deepseek_v32_tiny", "deepseek_v4_tiny", "deepseek_v41_tiny", "qwen4_exp_tiny")


def model_of(kind: str, **parts) -> LanguageModel:
    parts = {"engram": ENGRAM, "hyper": HyperConfig(streams=2, iterations=2)} | parts
    return LanguageModel(ModelConfig(**SMALL | KINDS[kind] | parts), seed=1).eval()


def texts(seed: int, lengths: list[int], shared: int) -> list[list[int]]:
    """Prompts that begin with the same `shared` tokens."""
    draw = random.Random(seed)
    first = [draw.randrange(61) for _ in range(shared)]
    return [first + [draw.randrange(61) for _ in range(length)] for length in lengths]


def check(
    model,
    prompts,
    *,
    seed=0,
    counts: list | None = None,
    sampling: Sampling = GREEDY,
    expected: dict[tuple, list[int]] | None = None,
    **options,
) -> Engine:
    """Requests come, are sent back and cancelled at random; each gets the ids it gets alone.

    `expected`: these ids of each prompt, where they are known already.
    """
    draw = random.Random(seed)
    engine = Engine(model, **options)
    requests = []
    counts = counts or [draw.randrange(1, 12) for _ in prompts]
    while not engine.idle or len(requests) < len(prompts):
        for _ in range(draw.randrange(3)):
            if (number := len(requests)) < len(prompts):
                wanted = {"max_new_tokens": counts[number], "sampling": sampling}
                requests.append(engine.submit(prompts[number], **wanted))
        if len(requests) == 3 and requests[1].finish is None and len(requests[1].ids) > 1:
            engine.cancel(requests[1])
        engine.step()
        stats = engine.stats()
        assert stats.cached_tokens <= stats.capacity
    for request, prompt, count in zip(requests, prompts, counts, strict=True):
        if expected is None:
            ids = alone(model, prompt, max_new_tokens=count, sampling=sampling)
        else:
            ids = expected[tuple(prompt)][:count]
        if request.finish == "cancelled":
            ids = ids[: len(request.ids)]
        assert request.ids == ids
    assert engine.stats().cached_tokens == 0
    return engine


# What is left to the slow tests differs from one of these in nothing that a scheduler sees.
FAST = {"mla", "dsa", "v4.1", "moba decodes fully", "delta net"}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow) for kind in KINDS]
)
def test_ids_are_those_of_a_request_alone(kind):
    """Few pages, so that some are sent back; then long prompts in chunks of 17 tokens."""
    model = model_of(kind)
    prompts = texts(3, [60, 2, 58, 55], shared=0)
    engine = check(model, prompts, counts=[80, 6, 75, 30], context=220, cache_tokens=256)
    divisible = kind != "moba decodes fully"
    assert bool(engine.stats().preemptions) == divisible
    prompts = texts(3, [20, 2, 70, 5], shared=130)
    engine = check(model, prompts, seed=1, context=220, max_batch_size=3, prefill_chunk=17)
    # Of a delta net a prefix is shared near its end alone.
    assert bool(engine.stats().prefix_tokens) == divisible or kind == "delta net"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_a_request_alone_under_many_arrivals(kind):
    model = model_of(kind, moe=MoEConfig(routed=6, active=2, width=16, first_dense=1))
    for seed, shared in enumerate((0, 130)):
        prompts = texts(seed, [1, 50, 2, 64], shared)
        prompts.append(prompts[3] + [1, 2, 3])
        options = {"context": 260, "cache_tokens": 288, "prefill_chunk": 40, "seed": seed}
        check(model, prompts, counts=[40, 9, 50, 6, 30], **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTION)
def test_ids_of_production_folders_are_those_of_a_request_alone(name):
    """Their indexers choose among equal scores as torch.topk does.

    Without V4.1's rounding of what is cached, which may round a last bit's difference up.
    """
    formats = {"cache_formats": "none"} if name == "deepseek_v41_tiny" else {}
    model = checkpoints.load(GOLDEN / name, **formats).eval()
    for seed, shared in enumerate((0, 130)):
        prompts = texts(seed, [1, 50, 2, 64, 20], shared)
        options = {"context": 260, "cache_tokens": 288, "prefill_chunk": 40, "seed": seed}
        check(model, prompts, counts=[40, 9, 50, 6, 30], **options)


def test_a_request_that_decodes_does_not_wait_for_a_long_prompt():
    model = model_of("mla")
    engine = Engine(model, context=1000, prefill_chunk=32)
    first = engine.submit([1, 2, 3], max_new_tokens=200)
    engine.step()
    long = engine.submit([5] * 900, max_new_tokens=2)
    steps = 1
    while long not in engine.step():
        steps += 1
        assert len(first.ids) == steps
    # A step reads a chunk of it, or so many blocks of one as there is time for.
    assert 29 <= steps <= 29 * len(model.blocks)


def pausing(model, monkeypatch, prefill_chunk=48, **options):
    """Returns an engine whose reads pause behind every block, and a request that decodes."""
    monkeypatch.setattr(runner, "READING", -math.inf)
    engine = Engine(model, context=400, prefill_chunk=prefill_chunk, **options)
    decoding = engine.submit([1, 2, 3], max_new_tokens=60)
    engine.step()
    return engine, decoding


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "moba decodes fully"])
@pytest.mark.parametrize("drafts", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_read_that_pauses_behind_every_block_changes_nothing(kind, drafts, monkeypatch):
    model = model_of(kind, mtp=MTPConfig() if drafts else None)
    engine, decoding = pausing(model, monkeypatch, drafts=drafts)
    prompts = texts(0, [150, 200, 90, 7], shared=0)
    gone, *others = [engine.submit(prompt, max_new_tokens=5) for prompt in prompts]
    for _ in range(4):
        assert decoding in engine.step()
    # In the middle of its chunk; the read of the next one begins.
    assert not gone.ids
    engine.cancel(gone)
    while not engine.idle:
        engine.step()
    for request, count in (decoding, 60), *((one, 5) for one in others):
        assert request.ids == alone(model, list(request.prompt), max_new_tokens=count)
    assert engine.stats().pages == 0


def test_the_cache_of_a_read_that_pauses_is_counted(monkeypatch):
    engine, _ = pausing(model_of("mla"), monkeypatch, prefix_cache=False)
    before = engine.stats().allocated_bytes
    long = engine.submit([5] * 200, max_new_tokens=2)
    engine.step()
    assert engine.running[-1] is long and not long.cached
    # Latents of 200 tokens of each layer, as soon as the first of them has read a part.
    latent = model_of("mla").config.mla
    size = 200 * 4 * (latent.kv_lora_rank + latent.rope_dim)
    assert engine.stats().allocated_bytes >= before + size


def test_a_request_that_is_sent_back_in_a_pause_is_read_from_its_start(monkeypatch):
    model = model_of("mla")
    engine, decoding = pausing(model, monkeypatch, 16, cache_tokens=416, max_batch_size=4)
    others = [engine.submit([n] * 14, max_new_tokens=200) for n in (4, 6)]
    engine.step()
    long = engine.submit([5] * 300, max_new_tokens=5)
    while not engine.stats().preemptions:
        engine.step()
    assert not long.ids and not long.cached and long not in engine.running
    while not engine.idle:
        engine.step()
    for request in (decoding, *others, long):
        ids = alone(model, list(request.prompt), max_new_tokens=request.max_new_tokens)
        assert request.ids == ids


def test_a_request_that_is_cancelled_in_its_read_is_returned(monkeypatch):
    model = model_of("mla")
    engine, decoding = pausing(model, monkeypatch)
    long = engine.submit([5] * 200, max_new_tokens=2)
    by_block = model.hidden_by_block

    def leaving(*args, **options):
        engine.cancel(long)
        return by_block(*args, **options)

    monkeypatch.setattr(model, "hidden_by_block", leaving)
    # By the engine alone, so that nobody else knows.
    assert engine.step() == [decoding, long]
    assert long.finish == "cancelled"
    assert engine.running == [decoding]


def test_a_header_that_all_prompts_share_makes_none_wait():
    model = model_of("mla")
    engine = Engine(model, context=400)
    requests = [engine.submit(prompt) for prompt in texts(0, [200] * 3, shared=20)]
    assert set(engine.step()) == set(requests)
    # What shares more waits, and is not read again.
    engine = Engine(model, context=400)
    requests = [engine.submit(prompt) for prompt in texts(1, [20] * 3, shared=180)]
    assert engine.step() == requests[:1]
    engine.step()
    assert engine.stats().prefix_tokens >= 2 * 176


def test_who_wants_the_whole_prompt_gets_it_despite_a_shared_prefix():
    model = model_of("mla")
    prompt = texts(0, [10], shared=200)[0]
    engine = Engine(model)
    engine.run([prompt], max_new_tokens=1)
    sampling = Sampling(temperature=0.0, logprobs=1, prompt_logprobs=True)
    request = engine.submit(prompt, max_new_tokens=1, sampling=sampling)
    while not engine.idle:
        engine.step()
    assert len(request.prompt_logprobs) == len(prompt) - 1


def test_a_request_that_was_sent_back_goes_on_as_if_nothing_had_happened():
    """Its sampler, its log-probabilities and what it watches have each token once."""
    model = model_of("mla", moe=MoEConfig(routed=6, active=2, width=16))
    sampling = Sampling(temperature=1.0, seed=5, repetition_penalty=1.3, logprobs=2)
    options = {
        "max_new_tokens": 70,
        "sampling": sampling,
        "watch": Watch(experts=True, memory=True),
    }
    prompts = texts(2, [30, 40, 50], shared=0)

    def run(tokens: int) -> list:
        engine = Engine(model, context=200, cache_tokens=tokens)
        requests = [engine.submit(p, index=index, **options) for index, p in enumerate(prompts)]
        while not engine.idle:
            engine.step()
        assert bool(engine.stats().preemptions) == (tokens == 240)
        return requests

    for narrow, ample in zip(run(240), run(2560), strict=True):
        assert narrow.ids == ample.ids
        assert [len(one.experts) for one in narrow.observed] == [len(narrow.prompt)] + [1] * 69
        assert [one.experts for one in narrow.observed] == [one.experts for one in ample.observed]
        rows = [
            [
                [read.rows for read in token.values()]
                for one in request.observed
                for token in one.memory
            ]
            for request in (narrow, ample)
        ]
        assert rows[0] == rows[1]
        result = torch.tensor([one.logprob for one in narrow.logprobs])
        expected = torch.tensor([one.logprob for one in ample.logprobs])
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_a_prompt_that_cannot_be_read_harms_nobody(monkeypatch):
    model = model_of("mla")
    engine = Engine(model, max_batch_size=4, context=300)
    first = engine.submit([1, 2, 3], max_new_tokens=9)
    engine.step()
    prepare = model.prepare

    def broken(ids, *args, **options):
        if 7 in ids:
            raise OSError("a row cannot be read")
        return prepare(ids, *args, **options)

    monkeypatch.setattr(model, "prepare", broken)
    bad = [engine.submit([7] * 3, max_new_tokens=3)]
    # It is read together with the first that fails, after which the step reads a part of the other.
    good = engine.submit([8, 9], max_new_tokens=3)
    bad.append(engine.submit([7] * 200, max_new_tokens=3))
    changed = engine.step()
    assert changed.count(bad[0]) == changed.count(bad[1]) == 1
    while not engine.idle:
        engine.step()
    assert [(request.finish, request.ids) for request in bad] == [("error", [])] * 2
    assert first.ids == alone(model, [1, 2, 3], max_new_tokens=9)
    assert good.ids == alone(model, [8, 9], max_new_tokens=3)


def test_who_came_first_is_never_sent_back():
    model = model_of("mla")
    engine = Engine(model, context=200, cache_tokens=240)
    first = engine.submit([1] * 60, max_new_tokens=130)
    others = [engine.submit([2, number], max_new_tokens=100) for number in range(6)]
    for _ in range(130):
        engine.step()
    assert first.finish == "length"
    while not engine.idle:
        engine.step()
    assert all(request.finish == "length" for request in others)
    ended = [request.ids for request in others]
    assert ended == [alone(model, [2, n], max_new_tokens=100) for n in range(6)]


def test_clients_that_hang_up_leave_nothing():
    model = model_of("mla")
    engine = Engine(model, max_batch_size=4, context=300)
    draw = random.Random(0)
    requests = []
    for _ in range(200):
        prompt = [draw.randrange(61) for _ in range(draw.randrange(1, 200))]
        requests.append(engine.submit(prompt, max_new_tokens=50))
        if draw.random() < 0.5:
            engine.step()
        for request in draw.sample(requests, 1):
            engine.cancel(request)
    for request in requests:
        engine.cancel(request)
    engine.step()
    assert engine.idle
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cached_tokens) == (0, 0, 0)
    assert all(request.cache is None for request in requests)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_tokens": 100}, "cache_tokens: got 100, expected at least 4112"),
        ({"prefill_chunk": 0}, "prefill_chunk: got 0, expected at least 1 token"),
        ({"max_batch_size": 0}, "expected at least 1 sequence"),
    ],
)
def test_sizes_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Engine(model_of("mla"), **options)
