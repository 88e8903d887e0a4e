"""Decoding against a loop of whole forwards: batches, padding, ends, bounds, drafts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.layers.attention import GQAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve.decoding import Tally, decode, pad_left, speculate
from rorqual.serve.sampling import Sampling

ENGRAM = EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2, head_dim=8)
CONFIGS = {
    "mla": ModelConfig(vocabulary=61, dim=32, layers=2, dense_width=32, mtp=MTPConfig(), init_std=0.2),
    "all": ModelConfig(
        vocabulary=61,
        dim=32,
        layers=2,
        moe=MoEConfig(routed=6, active=2, width=16),
        engram=ENGRAM,
        hyper=HyperConfig(streams=2, iterations=2),
        mtp=MTPConfig(),
        init_std=0.2,
    ),
    "gqa": ModelConfig(
        vocabulary=61, dim=32, layers=2, dense_width=32, mla=None, gqa=GQAConfig(head_dim=8), init_std=0.2
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return LanguageModel(CONFIGS[request.param], seed=3).eval()


@torch.no_grad()
def plainly(model, prompt, count: int, end_id=None, vocabulary=None) -> list[int]:
    """Greedy by one whole forward a token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1, :vocabulary].argmax()))
        if ids[-1] == end_id:
            break
    return ids[len(prompt) :]


def together(model, prompts, **options) -> list[list[int]]:
    out: list[list[int]] = [[] for _ in prompts]
    for step in decode(model, prompts, **options):
        for row, token in enumerate(step):
            if token is not None:
                out[row].append(token)
    return out


PROMPTS = [[5, 6, 7, 8, 9, 10], [1], [2, 3, 2]]


def test_a_batch_says_what_each_says_alone(model):
    assert together(model, PROMPTS, max_new_tokens=6) == [plainly(model, p, 6) for p in PROMPTS]


def test_rows_end_by_themselves_and_the_others_go_on(model):
    free = [plainly(model, p, 6) for p in PROMPTS]
    end = free[0][3]
    ended = together(model, PROMPTS, max_new_tokens=6, end_id=end)
    assert ended == [plainly(model, p, 6, end_id=end) for p in PROMPTS]
    assert ended[0][-1] == end
    assert len(ended[0]) <= 4


def test_ids_beyond_the_tokenizer_are_never_drawn(model):
    assert together(model, PROMPTS, max_new_tokens=6, vocabulary=11) == [
        plainly(model, p, 6, vocabulary=11) for p in PROMPTS
    ]
    drawn = together(model, PROMPTS, max_new_tokens=10, vocabulary=3, sampling=Sampling(temperature=50.0, seed=0))
    assert {token for row in drawn for token in row} == {0, 1, 2}


def test_a_seed_repeats_and_rows_do_not_depend_on_neighbours(model):
    sampling = Sampling(temperature=1.0, seed=11, repetition_penalty=1.2)
    both = together(model, PROMPTS[:2], max_new_tokens=8, sampling=sampling)
    assert both == together(model, PROMPTS[:2], max_new_tokens=8, sampling=sampling)
    assert both[0] == together(model, PROMPTS[:1], max_new_tokens=8, sampling=sampling)[0]


def test_the_penalty_counts_prompt_and_answer(model):
    strong = Sampling(temperature=0.0, repetition_penalty=1000.0)
    said = together(model, [[1, 2, 3]], max_new_tokens=25, sampling=strong)[0]
    assert len(set(said)) == len(said)
    assert not {1, 2, 3} & set(said)


@pytest.mark.parametrize("name", ["mla", "all"])
@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_drafts_change_nothing(name, prompt):
    model = LanguageModel(CONFIGS[name], seed=3).eval()
    tally = Tally()
    assert list(speculate(model, prompt, max_new_tokens=9, tally=tally)) == plainly(model, prompt, 9)
    assert tally.drafted >= tally.accepted
    end = plainly(model, prompt, 9)[5]
    assert list(speculate(model, prompt, max_new_tokens=9, end_id=end)) == plainly(model, prompt, 9, end_id=end)


def test_a_trained_model_accepts_its_own_drafts():
    config = ModelConfig(vocabulary=12, dim=32, layers=1, dense_width=64, mtp=MTPConfig(), init_std=0.1)
    model, ids = LanguageModel(config), (torch.arange(25)[None] * 5 + torch.arange(4)[:, None]) % 12
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        model.loss(ids[:, :-1], ids[:, 1:]).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    tally = Tally()
    said = list(speculate(model.eval(), ids[0, :4].tolist(), max_new_tokens=16, tally=tally))
    assert said == ids[0, 4:20].tolist() == plainly(model, ids[0, :4].tolist(), 16)
    assert tally.acceptance > 0.8
    assert tally.drafted <= 9


def test_a_model_without_mtp_is_told_so():
    with pytest.raises(ValueError, match="got a model without MTP"):
        list(speculate(LanguageModel(CONFIGS["gqa"]), [1]))


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_padding_stands_left_and_is_marked(lengths):
    prompts = [list(range(1, n + 1)) for n in lengths]
    ids, present = pad_left(prompts, 0)
    if present is None:
        assert len(set(lengths)) == 1
        present = torch.ones_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        assert ids[row][present[row]].tolist() == prompt
        assert present[row, -len(prompt) :].all()
        assert present[row].sum() == len(prompt)


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_empty_prompts_are_refused(prompts):
    with pytest.raises(ValueError, match="empty prompt"):
        pad_left(prompts, 0)
