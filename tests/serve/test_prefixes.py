"""Tests that what prompts begin with is read once, and that caches of old prompts go."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rorqual.layers import delta_net
from rorqual.layers.engram import EngramConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.model_config import DynamicRopeConfig, RopeConfig
from rorqual.serve.engine import Engine
from rorqual.serve.prefixes import PAGE, Prefixes, keys_of
from rorqual.serve.sampling import Sampling
from tests.serve.plain import alone
from tests.serve.test_engine import ATTENTIONS, SMALL
from tests.serve.test_scheduler import model_of, texts

IGNORES_END = Sampling(temperature=0.0, ignore_eos=True)


def test_a_shared_prefix_is_read_once():
    model = model_of("mla")
    engine = Engine(model)
    prompts = texts(0, [30, 40, 0, 10], shared=300)
    read = []
    hidden = model.hidden

    def counted(ids, **options):
        read.append(ids.shape[1])
        return hidden(ids, **options)

    model.hidden = counted
    for prompt in prompts:
        (ids,) = engine.run([prompt], max_new_tokens=1)
        assert ids == alone(model_of("mla"), prompt, max_new_tokens=1)
    # Whole pages of 16 are shared, and the last token is always read.
    assert read == [330, 340 - 288, 300 - 288, 310 - 288]
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.prefix_tokens) == (330 + 340 + 300 + 310, 3 * 288)


def test_of_prompts_that_come_together_the_shared_prefix_is_read_once():
    model = model_of("mla")
    engine = Engine(model)
    prompts = texts(0, [30, 40, 30, 10], shared=300)
    expected = [alone(model, prompt, max_new_tokens=4) for prompt in prompts]
    assert engine.run(prompts, max_new_tokens=4) == expected
    assert engine.stats().prefix_tokens == 3 * 288


def test_keys_of_another_length_are_not_shared_where_frequencies_vary():
    """With dynamic rope the keys of the first 64 tokens depend on how many follow them."""
    rope = RopeConfig(dynamic=DynamicRopeConfig(factor=4.0, original_length=32))
    model = model_of("gqa", rope=rope)
    long, short = texts(0, [200, 80], shared=70)
    engine = Engine(model, prefill_chunk=40)
    expected = [alone(model, prompt, max_new_tokens=20) for prompt in (long, short)]
    for prompt, ids in zip((long, short), expected, strict=True):
        assert engine.run([prompt], max_new_tokens=20) == [ids]
    assert engine.run([long, short], max_new_tokens=20) == expected
    assert engine.stats().prefix_tokens == 0


@pytest.mark.parametrize("chunk", [64, pytest.param(48, marks=pytest.mark.slow)])
def test_prompts_of_a_delta_net_share_what_was_read_to_the_end_of_a_page(chunk):
    """Its state is kept every 256 tokens, in whatever pieces the prompts were read."""
    model = LanguageModel(ModelConfig(**SMALL | ATTENTIONS["qwen4"]), seed=1).eval()
    prompts = texts(0, [30, 140, 100], shared=600)
    expected = [alone(model, prompt, max_new_tokens=4) for prompt in prompts]
    engine = Engine(model, prefill_chunk=chunk)
    beside = engine.submit([3, 1, 4], max_new_tokens=60, sampling=IGNORES_END)
    engine.step()
    shared = 0
    for number, (prompt, ids) in enumerate(zip(prompts, expected, strict=True)):
        request = engine.submit(prompt, max_new_tokens=4)
        while request.finish is None:
            engine.step()
        assert request.ids == ids
        # Behind a shorter prefix reading goes on, and its states are kept in turn.
        assert (request.prefix > 256) == (number > 0)
        shared += request.prefix
    assert engine.stats().prefix_tokens == shared
    # The end of a prompt can be left, too, as it is for the next turn of a chat.
    turn = engine.submit([*prompts[1], *range(20)], max_new_tokens=4)
    while turn.finish is None:
        engine.step()
    assert turn.prefix == len(prompts[1]) // PAGE * PAGE
    assert turn.ids == alone(model, [*prompts[1], *range(20)], max_new_tokens=4)
    assert beside.finish in (None, "length")


def read_behind_a_prefix(model, prefixes, ids):
    """Reads a prompt of 1,024 cached ids and some; compares it with the whole one's numbers."""
    prompt = [*ids[:1100], 1, 2]
    cache, length = prefixes.start(prompt)
    assert length == 1024
    tail = torch.tensor([prompt[1024:]])
    whole = model.hidden(torch.tensor([prompt]))[0][:, 1024:]
    torch.testing.assert_close(model.hidden(tail, cache=cache)[0], whole, rtol=1e-4, atol=1e-4)
    return cache, tail, whole


@torch.inference_mode()
def test_states_of_a_delta_net_are_bounded_and_counted():
    model = LanguageModel(ModelConfig(**SMALL | ATTENTIONS["qwen4"]), seed=1).eval()
    prefixes = Prefixes(model)
    ids = texts(0, [0], shared=1500)[0]
    cache, _ = prefixes.start(ids)
    without = model.new_cache(1)
    model.hidden(torch.tensor([ids]), cache=cache)
    model.hidden(torch.tensor([ids]), cache=without)
    (state,) = (one for one in cache.states() if hasattr(one, "earlier"))
    assert sorted(state.earlier) == [256, 512, 768, 1024, 1280]
    size = sum(one.nbytes for one in state.earlier.values())
    assert size == 5 * state.state.nbytes
    prefixes.add(ids, cache)
    assert prefixes.allocated_bytes >= size
    (plain,) = (one for one in without.states() if hasattr(one, "earlier"))
    assert not plain.earlier
    # What is read behind a prefix has the numbers of the whole.
    again, tail, whole = read_behind_a_prefix(model, prefixes, ids)
    # It can be cropped as every cache.
    again.crop(60)
    result = model.hidden(tail[:, -60:], cache=again)[0]
    torch.testing.assert_close(result, whole[:, -60:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="crop: got 70 tokens"):
        again.crop(70)


@torch.inference_mode()
def test_a_long_prompt_of_a_delta_net_keeps_few_states(monkeypatch):
    monkeypatch.setattr(delta_net, "MAX_STATES", 3)
    model = LanguageModel(ModelConfig(**SMALL | ATTENTIONS["qwen4"]), seed=1).eval()
    prefixes = Prefixes(model)
    ids = texts(0, [0], shared=1500)[0]
    cache, _ = prefixes.start(ids)
    for first in range(0, 1500, 256):
        model.hidden(torch.tensor([ids[first : first + 256]]), cache=cache)
    (state,) = (one for one in cache.states() if hasattr(one, "earlier"))
    assert sorted(state.earlier) == [512, 1024]
    assert state.every == 512
    prefixes.add(ids, cache)
    alone_bytes = prefixes.allocated_bytes
    again, *_ = read_behind_a_prefix(model, prefixes, ids)
    # The two have the states of their common prefix once.
    prefixes.add([*ids[:1100], 1, 2], again)
    shared = sum(one.untyped_storage().nbytes() for one in state.earlier.values())
    assert prefixes.allocated_bytes == alone_bytes + again.allocated_bytes - shared


@torch.inference_mode()
def test_states_behind_a_crop_are_those_of_the_new_text():
    """A state that was kept of tokens that are gone is not taken for that of others."""
    model = LanguageModel(ModelConfig(**SMALL | ATTENTIONS["qwen4"]), seed=1).eval()
    prefixes = Prefixes(model)
    old, new, tail = texts(0, [532, 700, 10], shared=0)
    new = old[:500] + new[500:]
    cache, _ = prefixes.start(new)
    model.hidden(torch.tensor([old[:256]]), cache=cache)
    model.hidden(torch.tensor([old[256:]]), cache=cache)
    cache.crop(32)
    model.hidden(torch.tensor([new[500:]]), cache=cache)
    prefixes.add(new, cache)
    prompt = [*new[:512], *tail]
    again, length = prefixes.start(prompt)
    result = model.hidden(torch.tensor([prompt[length:]]), cache=again)[0]
    whole = model.hidden(torch.tensor([prompt]))[0][:, length:]
    torch.testing.assert_close(result, whole, rtol=1e-4, atol=1e-4)


def test_chunks_end_with_pages_beside_a_prompt_that_is_read():
    """A short neighbour takes an odd part of a step, and the states are kept all the same."""
    model = LanguageModel(ModelConfig(**SMALL | ATTENTIONS["qwen4"]), seed=1).eval()
    first, again = texts(0, [200, 40], shared=600)
    other = [number % 50 for number in range(139)]
    engine = Engine(model)
    engine.submit([3, 1, 4], max_new_tokens=100, sampling=IGNORES_END)
    engine.step()
    beside = [engine.submit(prompt, max_new_tokens=2) for prompt in (other, first)]
    while any(request.finish is None for request in beside):
        engine.step()
    request = engine.submit(again, max_new_tokens=4)
    while request.finish is None:
        engine.step()
    assert request.prefix >= 512
    assert request.ids == alone(model, again, max_new_tokens=4)


def test_without_prefix_cache_all_is_read():
    model = model_of("mla")
    prompt = texts(0, [10], shared=200)[0]
    engine = Engine(model, prefix_cache=False)
    assert engine.run([prompt], max_new_tokens=3) == engine.run([prompt], max_new_tokens=3)
    assert engine.stats().prefix_tokens == 0


def test_the_last_token_is_always_read():
    model = model_of("mla")
    prompt = texts(0, [0], shared=128)[0]
    engine = Engine(model)
    first, again = (engine.run([prompt], max_new_tokens=4)[0] for _ in range(2))
    assert first == again == alone(model, prompt, max_new_tokens=4)
    assert engine.stats().prefix_tokens == 112


@settings(max_examples=50, deadline=None)
@given(
    ids=st.lists(st.integers(0, 3), min_size=0, max_size=300),
    other=st.lists(st.integers(0, 3), min_size=0, max_size=300),
)
@example(ids=[0] * 2 * PAGE, other=[1] * PAGE + [0] * PAGE)
def test_keys_are_equal_as_far_as_pages_are(ids, other):
    equal = 0
    while (equal + 1) * PAGE <= min(len(ids), len(other)) and ids[: (equal + 1) * PAGE] == other[
        : (equal + 1) * PAGE
    ]:
        equal += 1
    ours = keys_of(ids)
    theirs = keys_of(other)
    assert len(ours) == len(ids) // PAGE
    assert [a == b for a, b in zip(ours, theirs, strict=False)] == [
        page < equal for page in range(min(len(ours), len(theirs)))
    ]


@torch.inference_mode()
def test_prefixes_are_dropped_when_they_were_not_used_for_longest():
    model = model_of("mla", engram=EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2))
    prefixes = Prefixes(model)
    prompts = [[number] * 130 for number in range(4)]
    for prompt in prompts[:3]:
        cache, length = prefixes.start(prompt)
        assert length == 0
        model.hidden(torch.tensor([prompt]), cache=cache)
        prefixes.add(prompt, cache)
    assert prefixes.pages == 3 * 9
    assert prefixes.start(prompts[0])[1] == 128
    prefixes.shrink(2 * 9)
    assert [prefixes.start(prompt)[1] for prompt in prompts] == [128, 0, 128, 0]
    prefixes.shrink(0)
    assert prefixes.pages == 0
