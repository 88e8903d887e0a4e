"""Tests drafts in the batch: they change no id, however many of them are right."""

import functools
import random
from dataclasses import replace

import pytest
import torch

from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel
from rorqual.model_config import DynamicRopeConfig, RopeConfig
from rorqual.serve.decoding import decode
from rorqual.serve.drafts import AcceptanceStats, Drafter
from rorqual.serve.engine import Engine
from rorqual.serve.sampling import GREEDY, Sampling
from rorqual.serve.scheduler import Watch
from rorqual.tables import Table, write_table
from tests.serve.plain import alone
from tests.serve.test_scheduler import KINDS, check, model_of, texts

# A model and its number of depths.
CASES = {
    **{kind: (kind, 1 + number % 3, {}) for number, kind in enumerate(KINDS)},
    "v4 on streams": ("v4", 2, {"mtp": MTPConfig(depth=2, streams=True)}),
}
del CASES["moba decodes fully"]


def some(*fast: str) -> list:
    """All cases, those but `fast` marked as slow."""
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


SAMPLINGS = [
    GREEDY,
    Sampling(temperature=1.0, seed=5, top_p=0.9, repetition_penalty=1.3, presence_penalty=0.5),
]


@functools.cache
def drafting(case: str, **parts) -> LanguageModel:
    kind, depth, more = CASES[case]
    return model_of(kind, **({"mtp": MTPConfig(depth=depth)} | more | parts))


def guess(monkeypatch, share: float, following: dict[tuple, list[int]], *, compared=None) -> None:
    """Makes this share of all drafts the ids that will be drawn, and the others wrong.

    `compared` receives each request and its drafts as they were.
    """
    draw = random.Random(0)
    propose = Drafter.propose

    def guessed(self, requests, cache):
        drafts = propose(self, requests, cache)
        for slot, request in enumerate(requests):
            if compared is not None:
                compared(request, drafts[slot].tolist())
            ids = following[request.prompt]
            first = len(request.ids)
            for depth in range(self.depths):
                true = ids[first + depth] if first + depth < len(ids) else 0
                right = draw.random() < share
                drafts[slot, depth] = true if right else (true + 1) % self.vocab_size
        return drafts

    monkeypatch.setattr(Drafter, "propose", guessed)


def following_of(model, prompts, counts: int | list, sampling=GREEDY) -> dict[tuple, list[int]]:
    """Returns the ids that each prompt gets alone, as many as its count."""
    counts = [counts] * len(prompts) if isinstance(counts, int) else counts
    return {
        tuple(prompt): alone(model, prompt, max_new_tokens=count, sampling=sampling)
        for prompt, count in zip(prompts, counts, strict=True)
    }


@pytest.mark.parametrize("case", some("mla", "nsa", "v4 on streams", "qwen4"))
def test_ids_are_those_of_a_request_alone(case, monkeypatch):
    """Few pages, so that some are sent back; then long prompts in chunks of 17 tokens."""
    model = drafting(case)
    sampling = SAMPLINGS[list(CASES).index(case) % 2]
    prompts = texts(3, [100, 2, 100, 5], shared=0)
    counts = [60, 3, 40, 5]
    following = following_of(model, prompts, counts, sampling)
    guess(monkeypatch, 0.7, following)
    options = {"context": 220, "drafts": True, "sampling": sampling}
    engine = check(model, prompts, counts=counts, expected=following, cache_tokens=256, **options)
    stats = engine.stats()
    assert stats.preemptions
    assert stats.drafted > stats.accepted > stats.drafted // 4
    monkeypatch.undo()
    prompts = texts(3, [20, 2, 70, 5], shared=130)
    counts = [3, 11, 5, 9]
    following = following_of(model, prompts, counts, sampling)
    guess(monkeypatch, 0.7, following)
    options |= {"seed": 1, "max_batch_size": 3, "prefill_chunk": 17}
    engine = check(model, prompts, counts=counts, expected=following, **options)
    assert bool(engine.stats().prefix_tokens) or case in ("delta net", "qwen4")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "share"), [*((case, 0.5) for case in CASES), ("mla", 0.0), ("v4 on streams", 1.0)]
)
def test_ids_are_those_of_a_request_alone_under_many_arrivals(case, share, monkeypatch):
    model = drafting(case, moe=MoEConfig(routed=6, active=2, width=16, first_dense=1))
    for seed, (shared, sampling) in enumerate(zip((0, 130), SAMPLINGS, strict=True)):
        prompts = texts(seed, [1, 50, 2, 64], shared)
        prompts.append(prompts[3] + [1, 2, 3])
        counts = [40, 9, 50, 6, 30]
        following = following_of(model, prompts, counts, sampling)
        guess(monkeypatch, share, following)
        options = {"context": 260, "cache_tokens": 288, "prefill_chunk": 40, "seed": seed}
        options |= {"drafts": True, "sampling": sampling}
        engine = check(model, prompts, counts=counts, expected=following, **options)
        stats = engine.stats()
        assert (stats.accepted > 0) == (share > 0)
        assert (stats.accepted < stats.drafted) == (share < 1)
        monkeypatch.undo()


@torch.no_grad()
def drafts_of(model, ids) -> list[int]:
    """Returns the drafts after `ids`, all of which every module reads without a cache."""
    text = torch.tensor([ids])
    drafts = []
    hidden = model.hidden(text[:, :-1], for_mtp=True)[0]
    following = text[:, 1:]
    for depth, module in enumerate(model.mtp):
        hidden = model.draft(hidden, following, depth=depth)[0]
        draft = model.head(module.head_input(hidden))[:, -1:].argmax(-1)
        drafts.append(int(draft))
        following = torch.cat([following[:, 1:], draft], 1)
    return drafts


@pytest.mark.parametrize("case", some("mla", "v4 on streams"))
def test_drafts_are_those_of_modules_that_read_everything(case, monkeypatch):
    """Whether prompts come in chunks, from the cache of an earlier one, or a second time."""
    model = drafting(case)
    wrong = []
    count = 0

    def compared(request, drafts):
        nonlocal count
        count += 1
        if drafts != drafts_of(model, request.sequence):
            wrong.append((len(request.prompt), len(request.ids)))

    options = {"context": 220, "drafts": True}
    for seed, (lengths, shared, tokens) in enumerate(
        (((60, 1, 58), 0, 240), ((20, 2, 40), 70, 1280))
    ):
        prompts = texts(seed, list(lengths), shared=shared)
        counts = [20, 3, 12]
        following = following_of(model, prompts, counts)
        guess(monkeypatch, 0.6, following, compared=compared)
        more = {"cache_tokens": tokens, "prefill_chunk": 17} | options
        check(model, prompts, counts=counts, expected=following, seed=seed, **more)
        monkeypatch.undo()
    assert count > 20
    assert not wrong


def test_drafts_that_are_right_save_steps(monkeypatch):
    model = drafting("gqa")
    prompt = [1, 2, 3]
    assert len(model.mtp) == 2
    guess(monkeypatch, 1.0, following_of(model, [prompt], 31))
    engine = Engine(model, drafts=True)
    request = engine.submit(prompt, max_new_tokens=31)
    sizes = []
    while not engine.idle:
        before = len(request.ids)
        assert engine.step() == [request]
        sizes.append(len(request.ids) - before)
    assert sizes == [1] + [3] * 10
    assert request.ids == alone(model, prompt, max_new_tokens=31)
    assert engine.acceptance_stats == AcceptanceStats(drafted=20, accepted=20, rounds=10)
    assert (engine.stats().drafted, engine.stats().accepted) == (20, 20)


def test_what_a_request_is_shown_is_the_same_with_drafts(monkeypatch):
    """Log-probabilities, experts and memory: once for every id, and for no draft besides."""
    model = drafting("mla", moe=MoEConfig(routed=6, active=2, width=16))
    prompts = texts(2, [30, 40, 1], shared=0)
    sampling = Sampling(temperature=1.0, seed=5, repetition_penalty=1.3, logprobs=2)
    guess(monkeypatch, 0.6, following_of(model, prompts, 40, sampling))

    def run(**limits) -> list:
        engine = Engine(model, context=200, **limits)
        options = {"max_new_tokens": 40, "sampling": replace(sampling, prompt_logprobs=True)}
        requests = [
            engine.submit(prompt, watch=Watch(experts=True, memory=True), **options)
            for prompt in prompts
        ]
        while not engine.idle:
            engine.step()
        assert (engine.stats().accepted > 0) == bool(limits)
        return requests

    for ours, plain in zip(run(drafts=True), run(), strict=True):
        assert ours.ids == plain.ids
        assert [len(one.experts) for one in ours.observed] == [len(ours.prompt)] + [1] * 39
        assert [one.experts for one in ours.observed] == [one.experts for one in plain.observed]
        rows, expected = (
            [
                [read.rows for token in one.memory for read in token.values()]
                for one in request.observed
            ]
            for request in (ours, plain)
        )
        assert rows == expected
        for name in ("logprobs", "prompt_logprobs"):
            result, expected = (
                torch.tensor([one.logprob for one in getattr(request, name)])
                for request in (ours, plain)
            )
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
            assert len(result) == (40 if name == "logprobs" else len(ours.prompt) - 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ends_and_biases_are_those_without_drafts(temperature, monkeypatch):
    """A stop id among accepted drafts ends the text, and none comes before min_tokens."""
    model = drafting("gqa")
    prompt = [4, 5]
    free = Sampling(temperature=temperature, seed=1, logit_bias=((7, 1.5), (9, -50.0)))
    ids = alone(model, prompt, max_new_tokens=30, sampling=free)
    for stop in sorted(set(ids))[:3]:
        for least in (0, 3):
            sampling = replace(free, stop_token_ids=(stop,), min_tokens=least)
            expected = alone(model, prompt, max_new_tokens=30, sampling=sampling)
            guess(monkeypatch, 1.0, {tuple(prompt): expected + ids})
            engine = Engine(model, drafts=True)
            request = engine.submit(prompt, max_new_tokens=30, sampling=sampling)
            while not engine.idle:
                engine.step()
            assert request.ids == expected
            assert request.finish == ("stop" if expected[-1] == stop else "length")
            monkeypatch.undo()


class Counting:
    """Allows what leaves the remainder of the number of ids so far by 3; is complete after 20."""

    def __init__(self, after=lambda: None):
        self.count = 0
        self.after = after

    def mask(self):
        return torch.arange(61) % 3 == self.count % 3

    def accept(self, token):
        assert token % 3 == self.count % 3
        self.count += 1
        self.after()
        return self.count == 20


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_a_grammar_sees_the_ids_one_by_one(share, sampling, monkeypatch):
    model = drafting("mla")
    prompt = [1, 2, 3]
    expected = alone(model, prompt, max_new_tokens=50, sampling=sampling, matcher=Counting())
    assert len(expected) == 20
    others = texts(0, [5, 9], shared=0)
    following = following_of(model, others, 25)
    guess(monkeypatch, share, following | {tuple(prompt): expected})
    engine = Engine(model, drafts=True)
    rest = [engine.submit(other, max_new_tokens=25) for other in others]
    options = {"max_new_tokens": 50, "sampling": sampling}
    request = engine.submit(prompt, matcher=Counting(), **options)
    while not engine.idle:
        engine.step()
    assert (request.ids, request.finish) == (expected, "stop")
    assert [one.ids for one in rest] == list(following.values())


def test_who_is_cancelled_within_a_round_gets_no_more_ids(monkeypatch):
    model = drafting("gqa")
    prompt = [1, 2, 3]
    other = [9]
    expected = alone(model, prompt, max_new_tokens=50, matcher=Counting())
    guess(monkeypatch, 1.0, following_of(model, [other], 20) | {tuple(prompt): expected})
    engine = Engine(model, drafts=True)

    def after():
        if matcher.count == 6:
            engine.cancel(request)

    matcher = Counting(after)
    second = engine.submit(other, max_new_tokens=20)
    request = engine.submit(prompt, max_new_tokens=50, matcher=matcher)
    while not engine.idle:
        engine.step()
    assert (request.ids, request.finish) == (expected[:6], "cancelled")
    assert second.ids == alone(model, other, max_new_tokens=20)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_request_whose_logits_become_nan_ends_with_what_it_reported(share, monkeypatch):
    model = model_of("gqa", mtp=MTPConfig(depth=2), engram=None)
    prompts = [[1, 2, 3, 4], [5, 6], [7]]
    loud = {"temperature": 9.0}
    samplings = [Sampling(seed=seed, **loud) for seed in (2, 3, 4)]
    free = [
        alone(model, prompt, max_new_tokens=12, sampling=sampling)
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    # Neither is it a draft of others.
    others = {
        wrong % 61 for one in (free[0], free[2]) for token in one for wrong in (token, token + 1)
    }
    bad = next(token for token in free[1][4:-1] if token not in {*others, *range(8)})
    with torch.no_grad():
        model.embed.weight[bad] = torch.nan
    following = dict(zip(map(tuple, prompts), free, strict=True))
    guess(monkeypatch, share, following)
    engine = Engine(model, drafts=True)
    pairs = zip(prompts, samplings, strict=True)
    requests = [engine.submit(p, max_new_tokens=12, sampling=one) for p, one in pairs]
    while not engine.idle:
        engine.step()
    assert [request.finish for request in requests] == ["length", "error", "length"]
    # A draft that is read makes the logits before it NaN, too: then the last ids are missing.
    whole = free[1][: free[1].index(bad) + 1]
    assert requests[1].ids == whole[: len(requests[1].ids)]
    assert len(whole) - len(requests[1].ids) <= (2 if share else 0)
    assert [requests[0].ids, requests[2].ids] == [free[0], free[2]]


def test_after_a_step_that_failed_the_engine_goes_on(monkeypatch):
    model = drafting("mla")
    prompts = texts(0, [3, 9], shared=0)
    engine = Engine(model, drafts=True)
    for prompt in prompts:
        engine.submit(prompt, max_new_tokens=20)
    engine.step()
    hidden = model.hidden

    def broken(*args, **options):
        raise OSError("a row cannot be read")

    monkeypatch.setattr(model, "hidden", broken)
    with pytest.raises(OSError, match="cannot be read"):
        engine.step()
    monkeypatch.setattr(model, "hidden", hidden)
    assert {request.finish for request in engine.drop()} == {"error"}
    assert engine.idle
    expected = [alone(model, prompt, max_new_tokens=20) for prompt in prompts]
    assert engine.run(prompts, max_new_tokens=20) == expected


@pytest.mark.parametrize(
    "parts",
    [
        {"rope": RopeConfig(dynamic=DynamicRopeConfig(factor=4.0, original_length=20))},
        {"dsa": DSAConfig(heads=1, dim=16, top_k=3, ties="topk")},
    ],
    ids=["dynamic rope", "ties"],
)
def test_drafts_that_would_change_the_logits_before_them_are_not_made(parts, monkeypatch):
    """Where the rotary frequencies, or a choice among equals, depend on the length of a call."""
    model = model_of("dsa", mtp=MTPConfig(depth=2), engram=None, **parts)
    prompts = texts(0, [12, 2, 7], shared=0)
    following = following_of(model, prompts, 16)
    guess(monkeypatch, 0.7, following)
    engine = check(model, prompts, counts=[16, 16, 16], expected=following, drafts=True)
    assert bool(engine.stats().drafted) == ("dsa" not in parts)


@pytest.mark.parametrize("drafts", [False, True])
def test_rows_on_a_disk_are_fetched_as_soon_as_ids_are_drawn(drafts, tmp_path, monkeypatch):
    """A decoding forward begins no fetch: all its rows have been announced, drafts included."""
    engram = EngramConfig(layers=(0, 1), rows_per_head=(97, 97), heads=2, head_dim=8)
    resident = model_of("mla", engram=engram, mtp=MTPConfig(depth=2))
    tables = [
        Table.of_file(write_table(tmp_path / str(number), table.weight.detach()), cache_bytes=0)
        for number, table in enumerate(resident.tables)
    ]
    model = LanguageModel(resident.config, tables=tables)
    model.load_state_dict(resident.state_dict(), strict=False)
    model.eval()
    inside = [0]
    fetched = []
    prefetch = Table.prefetch
    hidden = LanguageModel.hidden

    def fetching(self, ids):
        fetched.append(bool(inside[0]))
        return prefetch(self, ids)

    def forward(self, ids, **options):
        # Reading a prompt fetches its rows itself.
        inside[0] = ids.shape[1] <= 3
        try:
            return hidden(self, ids, **options)
        finally:
            inside[0] = 0

    prompts = texts(1, [9, 9, 9], shared=0)
    following = following_of(resident, prompts, 20)
    expected = list(following.values())
    guess(monkeypatch, 0.0, following)
    propose = Drafter.propose
    announce = LanguageModel.announce

    def announced(self, requests, cache):
        """Announces the drafts that were replaced."""
        first = cache.announced[:1]
        drafts = propose(self, requests, cache)
        cache.announced = first
        announce(self.model, drafts, cache)
        return drafts

    monkeypatch.setattr(Drafter, "propose", announced)
    monkeypatch.setattr(Table, "prefetch", fetching)
    monkeypatch.setattr(LanguageModel, "hidden", forward)
    engine = Engine(model, drafts=drafts)
    requests = [engine.submit(prompt, max_new_tokens=20) for prompt in prompts]
    engine.step()
    engine.step()
    fetched.clear()
    while not engine.idle:
        engine.step()
    assert [request.ids for request in requests] == expected
    assert fetched
    assert not any(fetched)
    for table in tables:
        table.close()


def test_generate_with_drafts_yields_step_by_step(monkeypatch):
    """Also of a model that reads one prompt after the other."""
    for rope in (RopeConfig(), RopeConfig(dynamic=DynamicRopeConfig(original_length=64))):
        model = model_of("gqa", mtp=MTPConfig(), engram=None, rope=rope)
        prompts = texts(4, [5, 1, 9], shared=0)
        guess(monkeypatch, 0.5, following_of(model, prompts, 11))
        stats = AcceptanceStats()
        for sampling in SAMPLINGS:
            plain = list(decode(model, prompts, max_new_tokens=11, sampling=sampling))
            options = {"max_new_tokens": 11, "sampling": sampling, "acceptance_stats": stats}
            assert list(decode(model, prompts, **options)) == plain
            assert len(plain) == 11
        assert stats.accepted
        monkeypatch.undo()
