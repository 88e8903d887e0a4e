"""Tests that the worker hands tokens to the event loop, and ends what is no longer read."""

import asyncio

import pytest

from rorqual.serve.engine import Engine
from rorqual.serve.sampling import GREEDY, Sampling
from rorqual.serve.worker import Worker


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
