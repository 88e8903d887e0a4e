"""Tests sampling against transformers' own logits processors, closed forms and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rorqual.serve.sampling import (
    GREEDY,
    Sampling,
    SequenceSampler,
    logprobs_of,
    narrow,
    penalise,
    sample_batch,
)


def sample(logits, sampling, generators=None, seen=None):
    """Draws an id for every sequence, all by the same parameters."""
    samplers = []
    for index in range(len(logits)):
        generator = generators[index] if generators else sampling.generator()
        samplers.append(SequenceSampler([], sampling, generator, vocab_size=logits.shape[1]))
        samplers[-1].seen = None if seen is None else seen[index]
    drawn = sample_batch(logits, samplers)
    assert not drawn.errors
    return torch.tensor(drawn.ids)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.05, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)
def test_narrow_is_transformers_chain(seed, temperature, top_k, top_p, min_p):
    logits = torch.randn(3, 37, generator=torch.Generator().manual_seed(seed)) * 3
    chain = [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p else []
    chain += [MinPLogitsWarper(min_p)] if min_p is not None else []
    expected = logits.clone()
    for step in chain:
        expected = step(None, expected)
    got = narrow(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    torch.testing.assert_close(got, expected)


def test_penalty_is_transformers():
    logits = torch.randn(2, 11)
    ids = torch.tensor([[1, 4, 4], [0, 2, 10]])
    seen = torch.zeros(2, 11, dtype=torch.bool).scatter(1, ids, True)
    torch.testing.assert_close(
        penalise(logits, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    )


def test_top_p_keeps_the_likeliest_until_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    cached = narrow(logits, Sampling(temperature=1.0, top_p=0.7)).isfinite()
    assert cached.tolist() == [[True, True, False, False]]
    assert narrow(logits, Sampling(temperature=1.0, top_p=1e-6)).isfinite().sum() == 1


def test_greedy_needs_no_generator_and_respects_the_penalty():
    logits = torch.tensor([[1.0, 1.1, 0.0]])
    assert sample(logits, GREEDY).tolist() == [1]
    penalised = Sampling(temperature=0.0, repetition_penalty=2.0)
    assert sample(logits, penalised, seen=torch.tensor([[False, True, False]])).tolist() == [0]


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    sampling = Sampling(temperature=1.0, seed=7)
    generator = sampling.generator()
    drawn = torch.cat([sample(logits, sampling, [generator]) for _ in range(3000)])
    torch.testing.assert_close(
        drawn.bincount(minlength=3) / 3000, logits[0].exp(), atol=0.03, rtol=0
    )


def test_a_row_draws_the_same_whoever_stands_beside_it():
    logits = torch.randn(4, 50)
    sampling = Sampling(seed=3)
    together = sample(logits, sampling, [sampling.generator(index) for index in range(4)])
    alone = torch.cat(
        [
            sample(logits[index : index + 1], sampling, [sampling.generator(index)])
            for index in range(4)
        ]
    )
    assert torch.equal(together, alone)
    again = sample(logits, sampling, [sampling.generator(index) for index in range(4)])
    assert torch.equal(together, again)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -1.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_out_of_range_is_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}.*expected"):
        Sampling(**bad)


TINY = [0.0, 5e-324, 1e-320, 1e-45, 1e-38, 1.1754943e-38]


@pytest.mark.parametrize("size", [1e-30, 3.5, 1e4, 3e38])
@pytest.mark.parametrize("temperature", TINY)
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature, size):
    logits = torch.tensor([[-1.0, 0.5, 1.0, -torch.inf], [1.0, -1.0, -0.9, 0.0]]) * size
    for filters in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1.5}):
        sampling = Sampling(temperature=temperature, seed=0, **filters)
        assert sampling.greedy
        assert sample(
            logits, sampling, seen=torch.zeros_like(logits, dtype=torch.bool)
        ).tolist() == [2, 0]


@pytest.mark.parametrize("size", [3.5, 1e4, 3e38])
@pytest.mark.parametrize("temperature", [1.18e-38, 1e-30, 1e-5])
def test_the_smallest_temperatures_that_divide_take_the_likeliest(temperature, size):
    logits = torch.tensor([[-1.0, 0.5, 1.0, -torch.inf], [1.0, -1.0, -0.9, 0.0]]) * size
    for filters in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}):
        sampling = Sampling(temperature=temperature, **filters)
        assert not sampling.greedy
        assert sample(
            logits, sampling, [sampling.generator(index) for index in range(2)]
        ).tolist() == [
            2,
            0,
        ]


def test_equal_logits_share_at_any_temperature_that_divides():
    sampling = Sampling(temperature=1e-30, seed=2)
    generator = sampling.generator()
    drawn = {int(sample(torch.tensor([[8.0, 8.0, 7.9]]), sampling, [generator])) for _ in range(40)}
    assert drawn == {0, 1}


@pytest.mark.parametrize("penalty", [1e-3, 1e3])
def test_a_penalty_leaves_finite_logits_finite(penalty):
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[largest, -largest, 1.0, -torch.inf]])
    seen = torch.ones_like(logits, dtype=torch.bool)
    assert penalise(logits, seen, penalty).isfinite().tolist() == [[True, True, True, False]]
    sampling = Sampling(temperature=0.5, repetition_penalty=penalty, seed=1)
    assert sample(logits, sampling, [sampling.generator()], seen).tolist() == [0]


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(seed=1), Sampling(seed=1, repetition_penalty=2.0, top_p=0.5)]
)
@pytest.mark.parametrize(
    "bad", [[1.0, torch.nan, 0.0], [-torch.inf] * 3, [torch.inf, 1.0, 0.0], [torch.nan] * 3]
)
def test_sequences_that_hold_no_chances_fail(sampling, bad):
    logits = torch.tensor([[1.0, 2.0, 3.0], bad, [0.0, 0.0, 1.0], bad])
    samplers = [
        SequenceSampler([0], sampling, sampling.generator(index), vocab_size=3)
        for index in range(4)
    ]
    assert set(sample_batch(logits, samplers).errors) == {1, 3}


def sampler(sampling, prompt=(1, 2), index=0, **options):
    return SequenceSampler(prompt, sampling, sampling.generator(index), vocab_size=30, **options)


MIXED = [
    GREEDY,
    Sampling(temperature=0.7, top_k=3, seed=1),
    Sampling(temperature=1.3, top_p=0.6, seed=2, repetition_penalty=1.4),
    Sampling(temperature=2.0, min_p=0.2, seed=3, presence_penalty=1.0, frequency_penalty=0.5),
    Sampling(temperature=1.0, seed=4, logit_bias=((5, 4.0), (6, -100.0))),
    Sampling(temperature=1.0, seed=5, top_k=30, top_p=1.0, min_p=0.0),
]


def test_sequences_of_all_kinds_draw_together_what_each_draws_alone():
    draw = torch.Generator().manual_seed(1)
    together, alone = ([sampler(one) for one in MIXED] for _ in range(2))
    for _ in range(20):
        logits = torch.randn(len(MIXED), 30, generator=draw) * 3
        drawn = sample_batch(logits, together)
        assert not drawn.errors
        for index, one in enumerate(alone):
            assert sample_batch(logits[index : index + 1], [one]).ids == [drawn.ids[index]]
            one.accept(drawn.ids[index])
            together[index].accept(drawn.ids[index])


def test_penalties_count_new_ids_and_biases_are_added():
    options = Sampling(
        temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((3, 1.0),)
    )
    one = sampler(options, prompt=[4])
    for token in (1, 1, 2):
        one.accept(token)
    # id 1: 1.2 - 2 * 0.25 - 0.5 = 0.2; id 2: 1.0 - 0.25 - 0.5; id 3: -0.7 + 1; id 4 is no new id
    for logits, expected in (
        ([0.1, 1.2, 1.0, -0.7], 3),
        ([0.21, 1.2, 0.9, -0.9], 0),
        ([0.0, 1.2, 0.9, -0.9], 1),
        ([0.0, 1.2, 1.0, -0.9, 0.26], 4),
    ):
        whole = torch.full((1, 30), -9.0)
        whole[0, : len(logits)] = torch.tensor(logits)
        assert sample_batch(whole, [one]).ids == [expected]


def test_no_end_comes_before_min_tokens():
    one = sampler(Sampling(temperature=0.0, min_tokens=2), end_ids={7})
    logits = torch.zeros(1, 30)
    logits[0, 7], logits[0, 3] = 9.0, 1.0
    for expected, ended in ((3, False), (3, False), (7, True)):
        assert sample_batch(logits, [one]).ids == [expected]
        assert one.accept(expected) == ended


class Only:
    """Allows the ids of a list, or fails."""

    def __init__(self, *ids):
        self.ids = ids

    def mask(self):
        if not self.ids:
            raise ValueError("out of fuel")
        return torch.zeros(30, dtype=torch.bool).index_fill(0, torch.tensor(self.ids), True)

    def accept(self, token):
        return token == self.ids[0]


def test_a_sequence_that_fails_harms_no_other():
    kinds = [Sampling(temperature=1.0, seed=seed, repetition_penalty=1.2) for seed in range(6)]
    logits = torch.randn(6, 30)
    free = sample_batch(logits, [sampler(kind) for kind in kinds]).ids
    samplers = [sampler(kind) for kind in kinds]
    broken = logits.clone()
    broken[1, 4], broken[2], broken[3, 0] = torch.nan, -torch.inf, torch.inf
    samplers[4].matcher = Only()
    drawn = sample_batch(broken, samplers)
    assert set(drawn.errors) == {1, 2, 3, 4}
    assert drawn.ids == [free[0], -1, -1, -1, -1, free[5]]
    assert "out of fuel" in drawn.errors[4]
    assert broken[1, 4].isnan(), "the logits stay as they are"


def test_a_grammar_allows_its_ids_alone():
    one = sampler(Sampling(temperature=5.0, seed=1), matcher=Only(4, 9))
    ids = {sample_batch(torch.randn(1, 30) * 5, [one]).ids[0] for _ in range(50)}
    assert ids == {4, 9}
    assert (one.accept(9), one.accept(4)) == (False, True)


def test_the_tail_of_a_large_vocabulary_is_drawn():
    """In float32 a sum of 2^18 equal chances would lose its tail."""
    logits = torch.zeros(1, 2**18)
    sampling = Sampling(temperature=1.0, seed=1)
    generator = sampling.generator()
    drawn = torch.cat([sample(logits, sampling, [generator]) for _ in range(400)])
    counts = (drawn // 2**16).bincount(minlength=4)
    assert counts.shape == (4,) and counts.min() > 60


def test_log_probabilities_are_of_the_whole_table():
    logits = torch.randn(2, 12)
    one, other = logprobs_of(logits, torch.tensor([3, 11]), 2, 10)
    expected = logits.log_softmax(-1)
    assert (one.logprob, other.logprob) == (float(expected[0, 3]), float(expected[1, 11]))
    top = expected[0, :10].topk(2)
    assert one.top == tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    (least,) = logprobs_of(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]), 0, 2)
    assert (least.logprob, least.top) == (-9999.0, ())
