"""Tests what csa2 adds to attention with compressed entries; tests/hub holds it to the reference.

Tokens in pieces, packed documents and caches are tested with all kinds of attention, in
test_attention_kinds.py.
"""

import dataclasses

import pytest
import torch

from rorqual.layers.context import context
from rorqual.layers.csa2 import (
    CSA2,
    Coarse,
    TieRule,
    Visible,
    best,
    new_entries,
    visible_entries,
)
from rorqual.layers.dsa import Ties
from rorqual.model import LanguageModel
from rorqual.model_config import CSA2Config, CSAConfig
from rorqual.presets import preset


def test_visible_entries_are_the_complete_ones_of_the_document():
    document_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]])
    packed = context(1, 12, "cpu", document_ids=document_ids)
    visible = visible_entries(packed, 2)
    assert visible.end[0].tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5]
    assert visible.first[0].tolist() == [0] * 5 + [2] * 4 + [4] * 3
    places = new_entries(packed, 2)
    assert places.steps[0].tolist() == [1, 3, 6, 8, 10]
    assert places.numbers[0].tolist() == [0, 1, 2, 3, 4]
    assert places.positions[0].tolist() == [0, 2, 0, 2, 0]
    alone = visible_entries(context(1, 7, "cpu"), 3)
    assert alone.end[0].tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert not alone.first.any()


@pytest.mark.parametrize("packed", [False, True])
def test_coarse_blocks_hold_the_best_and_the_last(packed):
    scores = torch.tensor([[[9.0, 1, 1, 1, 8, 1, 1, -5, 0]]])
    visible = Visible(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[9]]), packed)
    coarse = Coarse(2, visible)
    selected = best(coarse.maxima(scores, slice(0, 1)), 2, TieRule("last"))
    assert sorted(selected[0, 0].tolist()) == [0, 4], "the last has one entry, and a low score"
    mask = coarse.mask(selected, 9, slice(0, 1))
    assert mask[0, 0].tolist() == [True, True, *[False] * 6, True]


def test_coarse_blocks_are_counted_from_the_start_of_the_document():
    scores = torch.tensor([[[9.0, 9, 9, 1, 1, 5, 1]]])
    visible = Visible(torch.tensor([[3]]), torch.tensor([[7]]), packed=True)
    coarse = Coarse(2, visible)
    scores = scores.masked_fill(~visible.mask(7, slice(0, 1)), -torch.inf)
    selected = best(coarse.maxima(scores, slice(0, 1)), 1, TieRule("last"))
    assert selected[0, 0].tolist() == [1]
    mask = coarse.mask(selected, 7, slice(0, 1))
    assert mask[0, 0].tolist() == [False] * 5 + [True, True]


@pytest.mark.parametrize("ties", ["last", "topk"])
def test_fewer_entries_than_are_selected(ties):
    scores = torch.tensor([[[1.0, -torch.inf, 3.0, -torch.inf]]])
    assert sorted(best(scores, 3, TieRule(ties))[0, 0].tolist()) == [-1, 0, 2]
    assert best(scores[..., :0], 3, TieRule(ties)).shape == (1, 1, 0)
    assert best(torch.zeros(1, 1, 5), 2, TieRule("last"))[0, 0].sort().values.tolist() == [3, 4]


def test_only_sources_store_entries():
    config = preset("v4.1-tiny")
    model = LanguageModel(config)
    sizes = 1, 8, torch.float32, torch.device("cpu")
    caches = [block.new_cache(*sizes).attention for block in model.blocks]
    stored = [hasattr(cache, "entries") for cache in caches]
    assert stored == [False, True, False, True, False]
    kinds = [(b.attention.compressor is not None, b.attention.indexer is not None)
             for b in model.blocks]  # fmt: skip
    assert kinds == [(False, False), (True, True), (False, False), (True, True), (False, True)]


def test_blocks_use_the_entries_of_their_source():
    config = dataclasses.replace(preset("v4.1-tiny"), engram=None)
    model = LanguageModel(config).eval()
    ids = torch.randint(config.vocab_size, (1, 60))
    seen = []
    for block in model.blocks:
        block.attention.register_forward_hook(
            lambda _, arguments, attended: seen.append(attended.shared)
        )
    with torch.no_grad():
        model(ids)
    assert seen[0] is None
    assert seen[2].entries is seen[1].entries and seen[2].selected is seen[1].selected
    assert seen[1].entries.shape[1] == 30 and seen[3].entries.shape[1] == 60
    assert seen[4].entries is seen[3].entries and seen[4].selected is not seen[3].selected
    assert seen[3].coarse is not None and seen[4].coarse is seen[3].coarse
    for shared in (seen[1], seen[3], seen[4]):
        rows = shared.selected[0]
        assert (rows.diff(dim=-1) >= 0).all(), "selected entries rise, none first"


def test_every_parameter_learns_and_the_indexers_from_their_loss_alone():
    config = preset("v4.1-tiny")
    model = LanguageModel(config).train()
    ids = torch.randint(config.vocab_size, (2, 50))
    for indexer_warmup in (True, False):
        loss = model.loss(ids, ids.roll(-1, 1), indexer_warmup=indexer_warmup)
        assert loss.indexer_loss is not None and loss.indexer_loss.loss > 0
        loss.total.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        model.zero_grad()
    loss.indexer_loss.loss.detach()
    loss = model.loss(ids, ids.roll(-1, 1))
    loss.next_token.backward()
    names = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert names and all(".indexer." in name for name in names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_entries_give_what_masked_ones_give(dtype):
    shares = CSA2Config(ratios=(1,), kv_sources=(0,), index_sources=(0,))
    attention = CSA2(shares, CSAConfig(window=4, top_k=3), 24).to(dtype)
    hidden = torch.randn(2, 40, 24, dtype=dtype)
    rope = CSAConfig().compress_rope
    ctx = context(2, 40, "cpu", rope=(rope, 8), compress_rope=rope)
    with torch.no_grad():
        gathered = attention(hidden, ctx).out
    masked = attention(hidden, ctx).out
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(gathered, masked, atol=tolerance, rtol=tolerance)


REFUSED = {
    "ratios": {"ratios": (2, -1)},
    "candidate_block": {"candidate_block": 0},
    "kv_sources": {"kv_sources": (3, 1)},
    "index_sources": {"ratios": (1, 1), "kv_sources": (0,), "index_sources": ()},
    "csa2.ratios": {"ratios": (0, 1)},
    "candidate_source": {"ratios": (1,), "candidate_source": 0},
    "whose ratio is 0": {"ratios": (0, 1), "kv_sources": (0, 1), "index_sources": (0, 1)},
    "after candidate_source": {
        "ratios": (1, 2),
        "kv_sources": (0, 1),
        "index_sources": (0, 1),
        "candidate_source": 0,
    },
}


@pytest.mark.parametrize("words", REFUSED)
def test_schedules_that_cannot_be_are_refused(words):
    with pytest.raises(ValueError, match=words):
        CSA2Config(**REFUSED[words])


def test_csa2_works_inside_csa():
    config = preset("v4.1-tiny")
    with pytest.raises(ValueError, match="csa2: got attention mla"):
        dataclasses.replace(preset("tiny"), csa2=config.csa2)
    with pytest.raises(ValueError, match=r"csa2\.ratios: got 5"):
        dataclasses.replace(config, layers=6)
    csa = dataclasses.replace(config.csa, kinds=("csa",) * 5)
    with pytest.raises(ValueError, match=r"csa\.kinds"):
        dataclasses.replace(config, csa=csa)


def test_equal_scores_of_exact_products_are_noted():
    """Of rounded queries and keys equal scores are equal in every call; of others by rounding."""
    scores = torch.tensor([[[3.0, 1.5, 1.5, 0.0]]])
    for exact in (True, False):
        ties = Ties()
        best(scores, 2, TieRule("topk", ties, exact=exact))
        assert ties.tied is exact
    ties = Ties()
    best(scores, 3, TieRule("topk", ties, exact=True))
    assert not ties.tied
