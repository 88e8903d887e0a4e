"""Tests the cache of a batch that requests join and leave."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rorqual.layers.cache import Cache
from rorqual.serve.engine import Engine
from tests.hub.doubles import Doubles
from tests.serve.plain import alone
from tests.serve.test_scheduler import KINDS, model_of


def test_nan_of_a_request_that_left_does_not_stay_in_its_slot():
    """The next request in its slot is shorter than its neighbour, so that old columns are masked.

    The longest prompt has the last slot, which is the next one's.
    """
    model = copy.deepcopy(model_of("gqa", engram=None))
    with torch.no_grad():
        model.embed.weight[60] = torch.nan
    engine = Engine(model, vocab_size=60)
    expected = [alone(model, p, max_new_tokens=6, vocab_size=60) for p in ([1] * 30, [2, 3])]
    engine.vocab_size = 61
    bad = engine.submit([60] * 40, max_new_tokens=3)
    engine.vocab_size = 60
    long = engine.submit([1] * 30, max_new_tokens=6)
    engine.step()
    short = engine.submit([2, 3], max_new_tokens=6)
    while not engine.idle:
        engine.step()
    assert bad.finish == "error"
    assert [long.ids, short.ids] == expected


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_loaded_cache_goes_on_as_the_one_it_was_copied_from(kind):
    """A copy of its first tokens, and a copy of that, after another text was cropped from both."""
    model = model_of(kind)
    precise = nullcontext
    bounds = {"rtol": 1e-4, "atol": 1e-5}
    # A state is a sum over all tokens, of which the norm after it may leave few digits.
    if kind == "delta net":
        model = model.double()
        precise = Doubles
        bounds = {"rtol": 1e-8, "atol": 1e-9}
    text, other = torch.randint(61, (2, 1, 60), generator=torch.Generator().manual_seed(3))
    source = model.new_cache(1)
    slack = 64 if kind == "delta net" else 100
    source.reserve_slack(slack)
    with precise():
        model.hidden(text[:, :40], cache=source)
        whole = model.hidden(text)[0]
    for length in (17, 33, 40):
        copy = model.new_cache(1)
        again = model.new_cache(1)
        copy.reserve_slack(slack)
        copy.load(source, length)
        with precise():
            model.hidden(other[:, :9], cache=copy)
            copy.crop(9 + 3)
            again.load(copy, length - 3)
            result = model.hidden(text[:, length - 3 :], cache=again)[0]
        torch.testing.assert_close(result, whole[:, length - 3 :], **bounds)
    assert source.lengths == (40,)


def test_sequences_of_requests_that_stay_are_not_moved():
    """The request that is last fills the hole of one that left; the others stay where they are."""
    model = model_of("gqa", engram=None)
    engine = Engine(model, max_batch_size=6)
    requests = [engine.submit([5, number], max_new_tokens=9) for number in range(4)]
    engine.step()
    engine.step()
    engine.cancel(requests[1])
    last = engine.submit([7], max_new_tokens=9)
    while not engine.idle:
        engine.step()
    for number in (0, 2, 3):
        assert requests[number].ids == alone(model, [5, number], max_new_tokens=9)
    assert last.ids == alone(model, [7], max_new_tokens=9)


class Copies(TorchDispatchMode):
    """Counts the bytes that operations copy, but not those that they set to zero."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("copy_", "index_put_", "clone", "cat", "index_select", "index", "_to_copy"):
            written = args[2] if name == "index_put_" else result
            self.count += written.numel() * written.element_size()
        return result


@pytest.mark.parametrize("kind", ["mla", "gqa", "nsa", "dsa", "v4"])
def test_whoever_joins_is_copied_alone(kind, monkeypatch):
    """The bytes do not depend on what runs, where the batch has memory for one more."""
    model = model_of(kind)
    join = Cache.join
    counts = []

    def counted(self, other):
        with Copies() as copies:
            join(self, other)
        counts.append(copies.count)

    for length in (20, 300):
        engine = Engine(model, max_batch_size=4, context=400, prefix_cache=False)
        others = [engine.submit([5] * length, max_new_tokens=60) for _ in range(4)]
        for _ in range(12):
            engine.step()
        engine.cancel(others[1])
        engine.step()
        monkeypatch.setattr(Cache, "join", counted)
        new = engine.submit([3] * 20, max_new_tokens=2)
        while not new.ids:
            engine.step()
        engine.step()
        monkeypatch.setattr(Cache, "join", join)
    short, long = counts
    assert short == long > 0
