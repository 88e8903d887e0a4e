"""Tests continuous batching: a request's ids do not depend on the other requests of the batch."""

import copy
import functools
import itertools
import operator
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.csa import CSAConfig
from rorqual.layers.csa2 import CSA2Config
from rorqual.layers.delta_net import DeltaNetConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moba import MoBAConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.nsa import NSAConfig
from rorqual.layers.qsa import QSAConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve.engine import Engine
from rorqual.serve.sampling import Sampling
from rorqual.serve.scheduler import Watch
from tests.serve.plain import alone

ENGRAM = EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2, head_dim=8)
SMALL = {"vocab_size": 61, "dim": 32, "layers": 2, "dense_width": 32, "init_std": 0.2}
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


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(61) for _ in range(draw.randrange(1, 14))] for _ in range(count)]


@pytest.mark.parametrize("max_batch_size", [2, 8])
def test_all_at_once_or_few_at_a_time(model, max_batch_size):
    asked = prompts(5)
    assert Engine(model, max_batch_size=max_batch_size).run(asked, max_new_tokens=5) == [
        alone(model, p, max_new_tokens=5) for p in asked
    ]


def test_requests_come_and_go(model):
    engine = Engine(model, max_batch_size=3, end_id=9)
    draw = random.Random(1)
    asked = prompts(7, seed=2)
    lengths = [draw.randrange(1, 9) for _ in asked]
    requests = []
    while not engine.idle or len(requests) < len(asked):
        for _ in range(draw.randrange(3)):
            if len(requests) < len(asked):
                offset = len(requests)
                requests.append(engine.submit(asked[offset], max_new_tokens=lengths[offset]))
        got = engine.step()
        assert len(got) <= 3
    for request, prompt, length in zip(requests, asked, lengths, strict=True):
        assert request.ids == alone(model, prompt, max_new_tokens=length, end_id=9)
        assert request.finish == ("stop" if request.ids[-1] == 9 else "length")


def test_sampling_is_each_requests_own(model):
    asked = prompts(3, seed=4)
    sampling = Sampling(temperature=1.0, seed=5, repetition_penalty=1.3)
    engine = Engine(model, max_batch_size=3)
    mixed = [
        engine.submit(asked[0], max_new_tokens=6),
        engine.submit(asked[1], max_new_tokens=6, sampling=sampling),
    ]
    while not engine.idle:
        engine.step()
    assert mixed[0].ids == alone(model, asked[0], max_new_tokens=6)
    assert mixed[1].ids == alone(model, asked[1], max_new_tokens=6, sampling=sampling)


GQA = {"mla": None, "gqa": GQAConfig(heads=4, kv_heads=2, head_dim=8)}
NSA = {"block": 4, "stride": 2, "select_block": 4, "top_k": 3, "window": 5}
CSA = CSAConfig(
    heads=2,
    head_dim=8,
    rope_dim=4,
    q_lora_rank=8,
    groups=2,
    o_lora_rank=4,
    window=4,
    kinds=("csa", "hca"),
    ratio=2,
    heavy_ratio=3,
    index_heads=2,
    index_dim=8,
    top_k=3,
)
ATTENTIONS = {
    "mla": {"mla": MLAConfig(heads=2)},
    "gqa": GQA,
    "window": {"mla": None, "gqa": GQAConfig(head_dim=8, window=4, sinks=True)},
    "dsa": {"mla": MLAConfig(q_lora_rank=8), "dsa": DSAConfig(heads=2, dim=16, top_k=3)},
    "nsa": GQA | {"nsa": NSAConfig(**NSA)},
    "nsa tile": GQA | {"nsa": NSAConfig(**NSA, choice="tile")},
    "moba": GQA | {"moba": MoBAConfig(block=4, top_k=2)},
    "moba tile": GQA | {"moba": MoBAConfig(block=4, top_k=2, choice="tile")},
    "v4": {"mla": None, "csa": CSA},
    "v4.1": {
        "mla": None,
        "csa": replace(CSA, kinds=()),
        "csa2": CSA2Config(ratios=(2, 1), kv_sources=(0, 1), index_sources=(0, 1)),
    },
    "qwen4": {
        "mla": None,
        "gqa": GQAConfig(heads=4, kv_heads=2, head_dim=8, output_gate=True),
        "qsa": QSAConfig(heads=2, dim=8, block=2, budget=6),
        "delta": DeltaNetConfig(
            key_heads=2, value_heads=4, key_dim=6, value_dim=5, kernel=3, layers=(0,)
        ),
    },
    "moba decodes fully": GQA | {"moba": MoBAConfig(block=4, top_k=1, decode="full")},
    "moba and a full layer": GQA | {"moba": MoBAConfig(block=4, top_k=1, full_layers=1)},
}
PARTS = {
    "engram": {"engram": ENGRAM},
    "streams": {"hyper": HyperConfig(streams=2, iterations=2)},
    "mtp": {"mtp": MTPConfig()},
}


def come_and_go(model, lengths: list[int], seed: int) -> None:
    """Requests arrive while others run, at most three at once.

    Each must get the ids that it gets alone.
    """
    draw = random.Random(seed)
    engine = Engine(model, max_batch_size=3)
    requests = []
    asked = [
        ([draw.randrange(61) for _ in range(length)], draw.randrange(2, 9)) for length in lengths
    ]
    while not engine.idle or len(requests) < len(asked):
        for prompt, count in asked[len(requests) : len(requests) + draw.randrange(3)]:
            requests.append(engine.submit(prompt, max_new_tokens=count))
        engine.step()
    assert [request.finish for request in requests] == ["length"] * len(asked)
    expected = [alone(model, prompt, max_new_tokens=count) for prompt, count in asked]
    assert [request.ids for request in requests] == expected


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_can_be_joined(name):
    parts = ATTENTIONS[name] | PARTS["engram"] | PARTS["streams"] | PARTS["mtp"]
    model = LanguageModel(ModelConfig(**SMALL | parts), seed=1).eval()
    come_and_go(model, [14, 3, 21, 1], seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("count", range(len(PARTS) + 1))
@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_attention_beside_every_part(name, count):
    for selected in itertools.combinations(PARTS.values(), count):
        parts = functools.reduce(operator.or_, selected, ATTENTIONS[name])
        model = LanguageModel(ModelConfig(**SMALL | parts), seed=2).eval()
        come_and_go(model, [14, 3, 126, 1, 131], seed=6)


def observe(engine, prompt, *, memory):
    """Submits a prompt of which everything is wanted, and an embedding of it."""
    sampling = Sampling(temperature=0.0, logprobs=2, prompt_logprobs=True)
    watch = Watch(experts=True, memory=memory)
    embedding = Watch(embedding=True)
    return [
        engine.submit(prompt, max_new_tokens=2, sampling=sampling, watch=watch),
        engine.submit(prompt, max_new_tokens=0, watch=embedding),
    ]


def check_observed(requests, expected, tolerance=1e-6):
    """Compares everything that was wanted with that of other requests."""
    (read, embedded), (read_whole, embedded_whole) = requests, expected
    assert read.ids == read_whole.ids
    assert [one.experts for one in read.observed] == [one.experts for one in read_whole.observed]
    for one, other in zip(read.observed, read_whole.observed, strict=True):
        for token, same in zip(one.memory, other.memory, strict=True):
            assert {i: r.rows for i, r in token.items()} == {i: r.rows for i, r in same.items()}
            for layer, memory in token.items():
                assert memory.gates == pytest.approx(same[layer].gates, abs=tolerance)
    logprobs, same = read.prompt_logprobs, read_whole.prompt_logprobs
    assert len(logprobs) == len(read.prompt) - 1
    assert [one.logprob for one in logprobs] == pytest.approx(
        [one.logprob for one in same], rel=tolerance, abs=2 * tolerance
    )
    embedding = embedded_whole.embedding
    assert embedded.embedding == pytest.approx(embedding, rel=tolerance, abs=tolerance)


SOME = ("mla",)  # of ATTENTIONS, in the fast tests
EACH = [
    pytest.param(name, drafts, marks=[] if name in SOME and not drafts else pytest.mark.slow)
    for name in ATTENTIONS
    for drafts in (False, True)
    if not drafts or name != "moba decodes fully"
]


@pytest.mark.parametrize(("name", "drafts"), EACH)
def test_what_is_wanted_of_a_whole_prompt_stops_no_request_that_decodes(name, drafts):
    """It is read in chunks beside them, with the numbers of the whole prompt."""
    parts = ATTENTIONS[name] | PARTS["engram"] | PARTS["streams"] | PARTS["mtp"]
    parts |= {"moe": MoEConfig(routed=6, active=2, width=16, first_dense=1)}
    model = LanguageModel(ModelConfig(**SMALL | parts), seed=1).eval()
    draw = random.Random(3)
    prompt = [draw.randrange(61) for _ in range(150)]
    options = {"context": 400, "prefill_chunk": 40, "drafts": drafts}
    whole = Engine(model, **options)
    expected = observe(whole, prompt, memory=True)
    while not whole.idle:
        whole.step()
    engine = Engine(model, **options)
    # What was kept of an equal prompt is of no use: its outputs are wanted.
    engine.run([prompt], max_new_tokens=1)
    running = engine.submit(prompt[:5], max_new_tokens=40)
    engine.step()
    requests = observe(engine, prompt, memory=True)
    steps = 0
    while any(request.finish is None for request in requests):
        before = len(running.ids)
        engine.step()
        assert len(running.ids) > before
        steps += 1
    if model.config.moba is None or model.config.moba.decode != "full":
        assert steps >= 300 // 40
    # A delta net adds up its state in the order of the pieces.
    check_observed(requests, expected, 1e-6 if model.config.delta is None else 5e-5)
    while not engine.idle:
        engine.step()
    assert running.ids == alone(model, prompt[:5], max_new_tokens=40)


def test_a_prompt_that_was_sent_back_while_it_was_read_is_observed_once():
    parts = {"moe": MoEConfig(routed=6, active=2, width=16, first_dense=1), "engram": ENGRAM}
    model = LanguageModel(ModelConfig(**SMALL | parts), seed=1).eval()
    draw = random.Random(4)
    prompt = [draw.randrange(61) for _ in range(150)]
    whole = Engine(model, context=300)
    expected = observe(whole, prompt, memory=True)
    while not whole.idle:
        whole.step()
    # The tokens that decode take the pages of the prompt that is read.
    engine = Engine(model, context=300, cache_tokens=320, prefill_chunk=1, max_batch_size=3)
    running = engine.submit(prompt[:60], max_new_tokens=200)
    engine.step()
    requests = observe(engine, prompt, memory=True)
    while not engine.idle:
        engine.step()
    assert engine.stats().preemptions
    assert len(running.ids) == 200
    check_observed(requests, expected)


@torch.inference_mode()
def test_blocks_of_a_long_row_that_left_are_not_taken_for_those_of_a_shorter():
    """The sequence that stays is as long as the one that joins it."""
    model = LanguageModel(ModelConfig(**SMALL | ATTENTIONS["moba"]), seed=4).eval()
    text = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    left = model.new_cache(2)
    right = model.new_cache(1)
    padded = torch.stack([text[0, :39], F.pad(text[1, :11], (0, 28))])
    model.hidden(padded, lengths=[39, 11], cache=left)
    model.hidden(text[:, 11:12], cache=left)
    left.select(torch.tensor([1]))
    model.hidden(text[:1, :12], cache=right)
    left.join(right)
    flipped = text.flip(0)
    for start in range(12, 40):
        result = model.hidden(flipped[:, start : start + 1], cache=left)[0]
        expected = model.hidden(flipped[:, : start + 1])[0][:, -1:]
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


BAD = 60  # an id whose embedding is NaN


@pytest.fixture
def poisoned(model):
    """The model, with one id that makes every logit after it NaN."""
    poisoned = copy.deepcopy(model)
    with torch.no_grad():
        poisoned.embed.weight[BAD] = torch.nan
    return poisoned


@pytest.mark.parametrize("prompt", [[BAD, 1, 2, 3], [5] * 257 + [BAD]])
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0), Sampling(seed=3, repetition_penalty=1.2)]
)
def test_a_request_whose_logits_are_nan_ends_alone(poisoned, prompt, sampling):
    asked = [[1, 2, 3, 4], [5, 6, 7, 8, 9]]
    options = {"max_new_tokens": 6, "sampling": sampling, "vocab_size": BAD}
    expected = [alone(poisoned, one, **options) for one in asked]
    engine = Engine(poisoned, max_batch_size=3)
    engine.vocab_size = BAD  # so that no other request samples it
    first = engine.submit(asked[0], max_new_tokens=6, sampling=sampling)
    engine.step()
    engine.vocab_size = BAD + 1
    bad = engine.submit(prompt, max_new_tokens=6, sampling=sampling)
    engine.vocab_size = BAD
    last = engine.submit(asked[1], max_new_tokens=6, sampling=sampling)
    count = 0
    while not engine.idle:
        count += bad in engine.step()
    assert count == 1
    assert (bad.finish, bad.ids) == ("error", [])
    assert [first.ids, last.ids] == expected
    assert (first.finish, last.finish) == ("length", "length")


def test_a_request_whose_logits_become_nan_ends_with_what_it_reported(model):
    asked = [
        ([1, 2, 3, 4], {"max_new_tokens": 6, "sampling": Sampling(temperature=9.0, seed=2)}),
        ([5, 6], {"max_new_tokens": 6, "sampling": Sampling(temperature=9.0, seed=3)}),
        ([7], {"max_new_tokens": 6, "sampling": Sampling(temperature=9.0, seed=4)}),
    ]
    free = [alone(model, prompt, **options) for prompt, options in asked]
    bad = next(token for token in free[1][1:-1] if token not in {*free[0], *free[2], *range(8)})
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embed.weight[bad] = torch.nan
    engine = Engine(broken, max_batch_size=3)
    requests = [engine.submit(prompt, **options) for prompt, options in asked]
    while not engine.idle:
        engine.step()
    assert [request.finish for request in requests] == ["length", "error", "length"]
    assert requests[1].ids == free[1][: free[1].index(bad) + 1]
    assert [requests[0].ids, requests[2].ids] == [free[0], free[2]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-38])
def test_a_tiny_temperature_is_greedy_and_harms_nobody(model, temperature):
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.norm.weight.mul_(20.0)  # logits are far above 3.4
    asked = prompts(3, seed=8)
    tiny = Sampling(temperature=temperature, seed=1)
    engine = Engine(loud, max_batch_size=3)
    requests = [engine.submit(prompt, max_new_tokens=5, sampling=tiny) for prompt in asked[:2]]
    requests.append(engine.submit(asked[2], max_new_tokens=5))
    while not engine.idle:
        engine.step()
    assert [request.ids for request in requests] == [
        alone(loud, prompt, max_new_tokens=5) for prompt in asked
    ]
    assert alone(loud, asked[0], max_new_tokens=5, sampling=tiny) == requests[0].ids


def test_prompts_are_prefilled_beside_those_of_like_length(monkeypatch):
    model = LanguageModel(CONFIGS["mla"]).eval()
    read: list[tuple[int, ...]] = []
    hidden = model.hidden

    def counted(ids, **options):
        read.append(tuple(ids.shape))
        return hidden(ids, **options)

    monkeypatch.setattr(model, "hidden", counted)
    engine = Engine(model, max_batch_size=9)
    lengths = [90, 4, 70, 5, 90, 700, 4, 60, 71]
    requests = [engine.submit([1] * length, max_new_tokens=2) for length in lengths]
    assert {id(request) for request in engine.step()} == {id(request) for request in requests}
    assert sorted(read) == [(1, 700), (3, 5), (5, 90)]
    engine.step()
    assert [len(request.ids) for request in requests] == [2] * 9


@pytest.mark.parametrize("lengths", [[30, 2, 31, 400, 3, 401, 401], [300, 1], [1, 1, 1]])
def test_what_a_prompt_says_does_not_depend_on_whom_it_was_prefilled_with(model, lengths):
    draw = random.Random(9)
    asked = [[draw.randrange(61) for _ in range(length)] for length in lengths]
    result = Engine(model, max_batch_size=8).run(asked, max_new_tokens=4)
    assert result == [alone(model, prompt, max_new_tokens=4) for prompt in asked]


def test_what_nobody_waits_for_leaves(model):
    engine = Engine(model, max_batch_size=2)
    asked = prompts(4, seed=6)
    requests = [engine.submit(prompt, max_new_tokens=6) for prompt in asked]
    engine.step()
    engine.cancel(requests[0])
    engine.cancel(requests[3])
    while not engine.idle:
        engine.step()
    assert [request.finish for request in requests] == [
        "cancelled",
        "length",
        "length",
        "cancelled",
    ]
    assert requests[3].ids == []
    assert requests[2].ids == alone(model, asked[2], max_new_tokens=6)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "expected at least one id"),
        ([61], {}, "each from 0 to 60"),
        ([-1], {}, "each from 0 to 60"),
        ([1] * 10, {"max_new_tokens": 7}, "at most 16 tokens in all"),
        ([1], {"max_new_tokens": 0}, "at least 1 new token"),
    ],
)
def test_what_cannot_be_run_is_refused_when_it_is_asked(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(LanguageModel(CONFIGS["mla"]), context=16).submit(prompt, **options)


def test_drop_gives_everything_up():
    engine = Engine(LanguageModel(CONFIGS["mla"]).eval(), max_batch_size=2)
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
    engine = Engine(model, max_batch_size=3)
    first = [engine.submit(prompt, max_new_tokens=8) for prompt in asked[:2]]
    engine.step()
    engine.step()
    last = engine.submit(asked[2], max_new_tokens=8)
    while not engine.idle:
        engine.step()
    for request, prompt in zip([*first, last], asked, strict=True):
        assert request.ids == alone(model, prompt, max_new_tokens=8)


def test_ids_that_the_tokenizer_has_not_are_refused_alone(model):
    engine = Engine(model, vocab_size=50)
    good = engine.submit([3, 49], max_new_tokens=2)
    for bad in ([50], [3, 60], [-1]):
        with pytest.raises(ValueError, match="each from 0 to 49"):
            engine.submit(bad, sampling=Sampling(repetition_penalty=1.2))
    while not engine.idle:
        engine.step()
    assert len(good.ids) == 2
    assert Engine(model, vocab_size=70).vocab_size == 61


def test_warming_up_selects_among_keys_and_leaves_nothing():
    """Reads in chunks and steps that decode both see more keys than an indexer selects."""
    dsa = DSAConfig(heads=2, dim=16, top_k=100)
    parts = {"mla": MLAConfig(q_lora_rank=8), "dsa": dsa}
    model = LanguageModel(ModelConfig(**SMALL | parts), seed=1).eval()
    engine = Engine(model, context=1000, max_batch_size=2)
    seen = []
    attention = model.blocks[0].attention
    forward = attention.forward

    def spied(hidden, ctx):
        seen.append((hidden.shape[1], ctx.past))
        return forward(hidden, ctx)

    attention.forward = spied
    engine.warm_up()
    assert max(past for length, past in seen if length == 1) >= 600 - 1
    assert max(past for length, past in seen if length > 1) > dsa.top_k
    assert engine.stats() == Engine(model, context=1000, max_batch_size=2).stats()
    assert engine.idle
    # The prompt of the warm-up is read as if it had never been there.
    request = engine.submit(list(range(61)) * 3, max_new_tokens=2)
    while not engine.idle:
        engine.step()
    assert (request.prefix, len(request.ids)) == (0, 2)


@pytest.mark.parametrize("context", [2, 3, 64])
def test_a_short_context_can_be_warmed_up(context):
    model = LanguageModel(ModelConfig(**SMALL), seed=1).eval()
    engine = Engine(model, context=context, max_batch_size=1)
    engine.warm_up()
    assert engine.idle
