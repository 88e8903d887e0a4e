"""Tests attention to the blocks that an indexer selects, against a naive loop."""

import pytest
import torch
from torch import Tensor

from rorqual.layers.attention import GQAConfig
from rorqual.layers.context import context
from rorqual.layers.qsa import QSA, QSAConfig, best_complete, block_scores
from rorqual.layers.rope import RopeConfig
from rorqual.model_config import MLAConfig, ModelConfig, NSAConfig

GQA = GQAConfig(
    heads=4, kv_heads=2, head_dim=8, qk_norm=True, centred=True, rope_dim=4, output_gate=True
)
CONFIG = QSAConfig(heads=2, dim=6, block=4, budget=12)
ROPE = RopeConfig(base=100.0, interleaved=False)
DIM = 10


def build() -> QSA:
    layer = QSA(CONFIG, GQA, DIM, ROPE).double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_(0.0, 0.5)
    return layer


def rotated(x: Tensor, position: int) -> Tensor:
    """Rotates the pairs (i, i + 2) of the first four values."""
    angles = position * 100.0 ** (-torch.arange(2, dtype=torch.float64) / 2)
    a = x[..., :2]
    b = x[..., 2:4]
    turned = a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()
    return torch.cat([*turned, x[..., 4:]], dim=-1)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)


def naive(layer: QSA, hidden: Tensor) -> Tensor:
    """Attends for one token after another; hidden is [T, D]."""
    indexer = layer.indexer
    outs = []
    both = (hidden @ indexer.index_qk_proj.weight.T).unflatten(-1, (3, 6))
    q_proj = (hidden @ layer.q_proj.weight.T).unflatten(-1, (4, 16))
    keys = (hidden @ layer.k_proj.weight.T).unflatten(-1, (2, 8))
    values = (hidden @ layer.v_proj.weight.T).unflatten(-1, (2, 8))
    turned_keys = torch.stack(
        [rotated(normed(k, layer.k_norm.weight), t) for t, k in enumerate(keys)]
    )
    for t in range(len(hidden)):
        count = (t + 1) // 4
        query = rotated(normed(both[t, :2], indexer.q_layernorm.weight), t)
        scores = []
        for m in range(count):
            pooled = normed(both[4 * m : 4 * m + 4, 2].mean(0), indexer.k_layernorm.weight)
            scores.append((query @ rotated(pooled, 4 * m)).clamp_min(0).sum() / 6**0.5)
        best = torch.tensor(scores).float().topk(min(3, count)).indices.tolist()
        seen = [4 * m + i for m in best for i in range(4)] + list(range(4 * count, t + 1))
        out = []
        for head in range(4):
            q = rotated(normed(q_proj[t, head, :8], layer.q_norm.weight), t)
            weights = (turned_keys[seen, head // 2] @ q / 8**0.5).softmax(0)
            out.append(weights @ values[seen, head // 2] * q_proj[t, head, 8:].sigmoid())
        outs.append(torch.cat(out) @ layer.o_proj.weight.T)
    return torch.stack(outs)


def test_every_token_attends_as_a_naive_loop_does():
    layer = build()
    hidden = torch.randn(1, 41, DIM, dtype=torch.float64)
    ctx = context(1, 41, "cpu", rope=(ROPE, 4))
    attended = layer(hidden, ctx)
    assert attended.indexer_loss is None
    torch.testing.assert_close(attended.out[0], naive(layer, hidden[0]), atol=1e-6, rtol=1e-6)


def test_a_block_that_a_token_completes_is_seen_only_if_it_is_selected():
    layer = build()
    hidden = torch.randn(3, 40, DIM, dtype=torch.float64)
    ctx = context(3, 40, "cpu", rope=(ROPE, 4))
    query, keys = layer.indexer.project(hidden, ctx)
    selection = layer.select(query, layer.indexer.blocks(keys, ctx), ctx)
    assert selection is not None
    blocks = selection.blocks[:, :, 0]
    itself = (blocks == torch.arange(40)[:, None] // 4).any(-1)
    complete = torch.arange(40) % 4 == 3
    assert itself[:, ~complete].all() and not itself[:, complete].all()
    assert ((blocks >= 0).sum(-1) == (torch.arange(40) + 1).div(4, rounding_mode="floor")
            .clamp_max(3) + ~complete).all()  # fmt: skip


def test_few_keys_are_all_seen():
    layer = build()
    ctx = context(1, 15, "cpu", rope=(ROPE, 4))
    query, keys = layer.indexer.project(torch.randn(1, 15, DIM, dtype=torch.float64), ctx)
    assert layer.select(query, layer.indexer.blocks(keys, ctx), ctx) is None


def test_scores_are_those_of_no_negative_product():
    query = torch.randn(2, 3, 4, 6)
    key = torch.randn(2, 5, 6)
    products = torch.einsum("btjp,bmp->btjm", query, key)
    torch.testing.assert_close(block_scores(query, key), products.relu().sum(2) / 6**0.5)


def test_ties_are_those_of_topk_over_the_blocks_of_the_query():
    """Where many scores are 0, one query and many select alike."""
    scores = torch.randn(4, 30, 12).relu()
    first = torch.tensor([0, 2]).repeat(2, 15)[:, :30].repeat(2, 1)
    end = torch.randint(3, 13, (4, 30))
    result = best_complete(scores, first, end, 3)
    for row in range(4):
        for t in range(30):
            start = first[row, t]
            stop = end[row, t]
            best = scores[row, t, start:stop].topk(min(3, stop - start)).indices + start
            assert set(result[row, t].tolist()) - {-1} == set(best.tolist())
            one = best_complete(
                scores[row : row + 1, t : t + 1, :stop],
                first[row : row + 1, t : t + 1],
                end[row : row + 1, t : t + 1],
                3,
            )
            assert set(one[0, 0].tolist()) == set(result[row, t].tolist())


def test_the_selection_has_no_gradient():
    layer = build().requires_grad_()
    hidden = torch.randn(1, 40, DIM, dtype=torch.float64, requires_grad=True)
    layer(hidden, context(1, 40, "cpu", rope=(ROPE, 4))).out.sum().backward()
    assert hidden.grad is not None
    assert all(p.grad is None for p in layer.indexer.parameters())
    assert all(p.grad is not None for n, p in layer.named_parameters() if "indexer" not in n)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"budget": 10}, "qsa.budget: got 10 keys, expected a multiple of the 4"),
        ({"heads": 0}, "qsa.heads: got 0, expected at least 1"),
    ],
)
def test_impossible_sizes_are_refused(fields, reason):
    with pytest.raises(ValueError, match=reason):
        QSAConfig(**{"heads": 2, "dim": 6, "block": 4, "budget": 12} | fields)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"qsa.dim: got 2, expected at least the 4 values"):
        QSA(QSAConfig(dim=2), GQA, DIM, ROPE)
    with pytest.raises(ValueError, match="qsa: got attention mla, expected gqa"):
        ModelConfig(mla=MLAConfig(), qsa=CONFIG)
    with pytest.raises(ValueError, match="got nsa and qsa, expected at most one"):
        ModelConfig(mla=None, gqa=GQA, qsa=CONFIG, nsa=NSAConfig())
    with pytest.raises(ValueError, match="output_gate True"):
        ModelConfig(mla=None, gqa=GQA, nsa=NSAConfig()).check_parts()
    with pytest.raises(ValueError, match="rope_dim: got 3, expected an even width up to"):
        GQAConfig(rope_dim=3)
