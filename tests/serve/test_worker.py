"""Tests that the worker hands tokens to the event loop, and ends what is no longer read."""

import asyncio

import pytest

from rorqual.layers.moe import MoEConfig
from rorqual.serve.engine import Engine
from rorqual.serve.sampling import GREEDY, Sampling
from rorqual.serve.scheduler import Watch
from rorqual.serve.worker import Worker
from tests.serve.plain import alone
from tests.serve.test_drafts import Counting, drafting, following_of, guess


@pytest.fixture
def worker(run):
    worker = Worker(Engine(run.model, max_batch_size=2, context=64, vocab_size=280))
    worker.start()
    yield worker
    worker.stop()


def test_tokens_come_with_their_log_probabilities(worker, run):
    async def read():
        sampling = Sampling(temperature=0.0, logprobs=1)
        handle = worker.submit(run.prompt("A whale"), max_new_tokens=4, sampling=sampling)
        return [token async for token in handle.tokens(60)]

    tokens = asyncio.run(read())
    ours = run.complete(["A whale"], max_new_tokens=4, sampling=GREEDY)[0].ids
    assert [token.id for token in tokens] == list(ours)
    assert [token.finish for token in tokens] == [None, None, None, "length"]
    assert all(token.logprobs.top[0] == (token.id, token.logprobs.logprob) for token in tokens)
    assert worker.unfinished == 0


def test_ids_that_come_together_are_handed_on_one_by_one(monkeypatch):
    """Each with its log-probabilities and experts; the last with the finish, or what failed it."""
    model = drafting("gqa", moe=MoEConfig(routed=6, active=2, width=16))
    prompt = [1, 2, 3]
    following = following_of(model, [prompt], 11)
    following[1, 2] = alone(model, [1, 2], max_new_tokens=20, matcher=Counting())
    guess(monkeypatch, 1.0, following)

    def fail():
        if failing.count == 6:
            raise ValueError("out of fuel")

    failing = Counting(fail)
    worker = Worker(Engine(model, drafts=True))
    worker.start()

    async def read(prompt, **options):
        sampling = Sampling(temperature=0.0, logprobs=1)
        options |= {"sampling": sampling, "watch": Watch(experts=True)}
        handle = worker.submit(prompt, **options)
        return handle.request, [token async for token in handle.tokens(60)]

    request, tokens = asyncio.run(read(prompt, max_new_tokens=11))
    assert [token.id for token in tokens] == following[tuple(prompt)]
    assert [token.finish for token in tokens] == [None] * 10 + ["length"]
    assert [token.logprobs for token in tokens] == request.logprobs
    assert [token.observed for token in tokens] == request.observed
    assert worker.engine.stats().accepted == 6
    request, tokens = asyncio.run(read([1, 2], max_new_tokens=20, matcher=failing))
    assert [token.id for token in tokens] == [*following[1, 2][:5], None]
    assert [token.finish for token in tokens] == [None] * 5 + ["error"]
    assert worker.unfinished == 0
    worker.stop()


def test_a_request_that_is_freed_leaves(worker, run):
    async def leave():
        handle = worker.submit(run.prompt("A"), max_new_tokens=60)
        async for _ in handle.tokens(60):
            break
        worker.free(handle)
        return handle

    handle = asyncio.run(leave())
    assert (handle.request.finish, worker.unfinished) == ("cancelled", 0)


def test_a_wait_has_a_limit(run):
    idle = Worker(Engine(run.model, max_batch_size=2, context=64, vocab_size=280))

    async def wait():
        handle = idle.submit(run.prompt("A"), max_new_tokens=4)
        async for _ in handle.tokens(0.05):
            pass

    with pytest.raises(TimeoutError):
        asyncio.run(wait())
