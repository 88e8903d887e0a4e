"""The whole model: cache equals forward, documents are sealed, every part trains, initial values and losses by hand."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.layers.attention import GQAConfig, MLAConfig
from rorqual.layers.dsa import DSAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.layers.moba import MoBAConfig
from rorqual.layers.moe import MoEConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.layers.nsa import NSAConfig
from rorqual.model import IGNORED, LanguageModel, ModelConfig

BASE = ModelConfig(
    vocabulary=61,
    dim=16,
    layers=3,
    dense_width=20,
    mla=MLAConfig(heads=2, kv_lora_rank=8, nope_dim=4, rope_dim=4, value_dim=6),
    moe=MoEConfig(routed=6, active=2, shared=1, width=8, first_dense=1),
    engram=EngramConfig(layers=(0, 2), rows_per_head=(40, 50), heads=2, head_dim=4),
    hyper=HyperConfig(streams=3),
    mtp=MTPConfig(depth=2),
    init_std=0.3,
)
GQA = replace(BASE, mla=None, gqa=GQAConfig(heads=4, kv_heads=2, head_dim=4))
VARIANTS = {
    "everything": BASE,
    "plain": replace(BASE, moe=None, engram=None, hyper=None, mtp=None),
    "tied": replace(BASE, tied=True),
    "q-lora": replace(BASE, mla=replace(BASE.mla, q_lora_rank=6)),
    "single-pass": replace(BASE, hyper=HyperConfig(streams=2, kind="single_pass")),
    "hc": replace(BASE, hyper=HyperConfig(streams=2, kind="hc")),
    "gqa": GQA,
    "window": replace(GQA, gqa=replace(GQA.gqa, window=4, sinks=True)),
    "nsa": replace(GQA, nsa=NSAConfig(block=4, stride=2, select_block=4, chosen=3, window=5)),
    "moba": replace(GQA, moba=MoBAConfig(block=4, chosen=2)),
    "dsa": replace(BASE, dsa=DSAConfig(heads=2, dim=8, chosen=6)),
}


def _model(name: str) -> LanguageModel:
    model = LanguageModel(VARIANTS[name], seed=3).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".conv"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _ids(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, BASE.vocabulary, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return _model(request.param)


@torch.no_grad()
def test_token_by_token_equals_one_forward(model):
    ids = _ids(2, 13)
    cache = model.new_cache(2, capacity=4)
    steps = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(13)], dim=1)
    assert torch.allclose(steps, model(ids), atol=1e-5)
    assert cache.length == 13


@torch.no_grad()
def test_chunks_crop_and_reorder_equal_one_forward(model):
    ids = _ids(3, 15)
    cache = model.new_cache(3)
    model(ids[:, :5], cache=cache)
    model(_ids(3, 4, seed=9), cache=cache)
    cache.crop(4)
    cache.select(torch.tensor([2, 0]))
    rest = model(ids[[2, 0], 5:], cache=cache)
    assert torch.allclose(rest, model(ids[[2, 0]])[:, 5:], atol=1e-5)
    cache.reset()
    assert torch.allclose(model(ids[:2], cache=cache), model(ids[:2]), atol=1e-5)


@torch.no_grad()
def test_left_padding_is_invisible(model):
    ids = _ids(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    present = torch.arange(13)[None] >= 4
    assert torch.allclose(model(padded, present=present)[:, 4:], model(ids), atol=1e-5)
    cache = model.new_cache(1)
    model(padded[:, :8], present=present[:, :8], cache=cache)
    assert torch.allclose(model(padded[:, 8:], cache=cache), model(ids)[:, 4:], atol=1e-5)


@torch.no_grad()
def test_packed_documents_never_see_each_other(model):
    first, second = _ids(1, 6), _ids(1, 8, seed=1)
    packed = torch.cat([first, second], 1)
    documents = torch.tensor([[4] * 6 + [5] * 8])
    together = model(packed, documents=documents)
    assert torch.allclose(together[:, :6], model(first), atol=1e-5)
    assert torch.allclose(together[:, 6:], model(second), atol=1e-5)


@torch.no_grad()
def test_the_future_is_unseen(model):
    ids = _ids(1, 12)
    other = ids.clone()
    other[0, 8] = (other[0, 8] + 1) % BASE.vocabulary
    changed = (model(ids) - model(other)).abs().amax(-1)[0]
    assert (changed[:8] < 1e-6).all() and changed[8] > 1e-3


def test_every_parameter_learns(model):
    model = LanguageModel(model.config, seed=0).train()
    ids = _ids(4, 33)
    model.loss(ids[:, :-1], ids[:, 1:]).total.backward()
    silent = [
        name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad.to_dense()).all()
    ]
    allowed = ("indexer", "inner")  # DSA's indexer has a loss of its own
    assert [name for name in silent if not any(word in name for word in allowed)] == []


def test_the_same_seed_is_the_same_model_and_the_callers_randomness_is_untouched():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (LanguageModel(BASE, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.embed.weight, c.embed.weight)


def test_initial_values_are_the_tables():
    model = LanguageModel(replace(BASE, vocabulary=500, init_std=0.02), seed=0)
    values = dict(model.named_parameters())
    assert values["embed.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert values["blocks.1.ffn.experts.gate_up"].std().item() == pytest.approx(0.02, rel=0.1)
    assert values["tables.0.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert all((p == 0).all() for n, p in values.items() if n.endswith(".conv"))
    assert all((p == 1).all() for n, p in values.items() if n.endswith(("norm.weight", "_norm")) and "mixer" not in n)


def test_loss_is_the_mean_cross_entropy_of_the_labels_that_count():
    model = LanguageModel(VARIANTS["plain"], seed=3)
    ids = _ids(2, 11)
    labels = ids[:, 1:].clone()
    labels[0, 3] = IGNORED
    found = model.loss(ids[:, :-1], labels)
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    assert torch.allclose(found.next_token, expected, atol=1e-5)
    assert found.tokens == 19 and found.mtp is None and torch.equal(found.total, found.next_token)


def test_mtp_targets_stay_within_the_document():
    """Depth k of a token is trained only where the token k ahead is of its document: count by which labels matter."""
    model = LanguageModel(replace(VARIANTS["plain"], mtp=MTPConfig(depth=1)), seed=3)
    ids, documents = _ids(1, 9), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    base = model.loss(ids[:, :-1], ids[:, 1:], documents=documents).mtp
    counted = []
    for t in range(8):
        labels = ids[:, 1:].clone()
        labels[0, t] = IGNORED
        counted.append(not torch.equal(model.loss(ids[:, :-1], labels, documents=documents).mtp, base))
    # label t is the target of position t - 1 where both are of one document, and the input of position t
    assert counted == [True, True, True, True, True, True, True, True]
    loss = model.loss(ids[:, :-1], ids[:, 1:], documents=documents)
    hidden, _ = model.hidden(ids[:, :-1], documents=documents)
    drafted, _ = model.draft(hidden, ids[:, 1:], documents=documents)
    logits = model.head(model.mtp[0].norm(drafted))
    places = [0, 1, 3, 4, 5, 6]
    expected = F.cross_entropy(logits[0, places], ids[0, [p + 2 for p in places]])
    assert torch.allclose(loss.mtp, expected, atol=1e-5)


def test_counts_and_balance_come_from_every_mixture():
    model = LanguageModel(BASE, seed=3)
    ids = _ids(2, 11)
    found = model.loss(ids[:, :-1], ids[:, 1:])
    assert found.counts.shape == (2 + 2, 6) and found.counts.sum(-1).tolist() == [40] * 4
    assert set(found.balance) == {"sequence"}
    weighted = found.next_token + BASE.mtp.weight * found.mtp + found.balance["sequence"]
    assert torch.allclose(found.total, weighted)


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 99))
@torch.no_grad()
def test_any_split_of_the_text_gives_the_same_logits(cuts, seed):
    model, ids = _everything(), _ids(2, sum(cuts), seed)
    cache = model.new_cache(2, capacity=2)
    parts = torch.cat([model(part, cache=cache) for part in ids.split(cuts, dim=1)], dim=1)
    assert torch.allclose(parts, model(ids), atol=1e-5)


@functools.cache
def _everything() -> LanguageModel:
    return _model("everything")


def test_bfloat16_is_close_to_float32():
    model, ids = _model("plain"), _ids(2, 9)
    with torch.no_grad():
        exact = model(ids).log_softmax(-1)
        rough = model.to(torch.bfloat16)(ids).log_softmax(-1)
    assert rough.dtype == torch.float32 and (exact - rough).abs().max() < 0.35


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mla": None}, "got none, expected exactly one of mla and gqa"),
        ({"gqa": GQAConfig()}, "got mla and gqa"),
        ({"nsa": NSAConfig()}, "nsa: got attention mla, expected gqa"),
        ({"layers": 0}, "layers: got 0"),
        ({"layers": 2}, r"engram.layers: got \[2\], expected block indices 0..1"),
        ({"moe": MoEConfig(first_dense=4)}, "moe.first_dense: got 4"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **change)


def test_cache_refuses_what_it_does_not_hold():
    cache = _everything().new_cache(1)
    with pytest.raises(ValueError, match=r"crop: got 1, expected 0\.\.0"):
        cache.crop(1)
    with pytest.raises(ValueError, match="got batch 0"):
        _everything().new_cache(0)
