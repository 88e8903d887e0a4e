"""Tests shared-KV attention, compressors and the indexer against naive loops.

How tokens reach the model is tested for every kind in test_attention_kinds.py, and a whole model
against transformers in tests/hub/test_deepseek_v4.py.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rorqual.layers import csa
from rorqual.layers.context import Context, context
from rorqual.layers.csa import CSA, HCA, Compressor, CSAConfig, SharedKV
from rorqual.layers.rope import RopeConfig, rope_tables, rotate
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig, YarnConfig

DIM = 12
CONFIG = CSAConfig(
    heads=4,
    head_dim=8,
    rope_dim=4,
    q_lora_rank=6,
    groups=2,
    o_lora_rank=5,
    window=5,
    ratio=3,
    heavy_ratio=4,
    index_heads=3,
    index_dim=6,
    top_k=2,
    compress_rope=RopeConfig(base=70.0, yarn=YarnConfig(factor=4.0, original_length=16)),
)
MAIN = RopeConfig(base=30.0)


def drawn(module: torch.nn.Module, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator))
    return module.to(dtype)


def where(time: int, batch: int = 1) -> Context:
    rope = (MAIN, CONFIG.rope_dim)
    return context(batch, time, "cpu", rope=rope, compress_rope=CONFIG.compress_rope)


def turned(x: Tensor, position: int, config: RopeConfig, back: bool = False) -> Tensor:
    cos, sin = rope_tables(config, CONFIG.rope_dim, torch.tensor([[position]]))
    rest = x[: -CONFIG.rope_dim]
    last = x[-CONFIG.rope_dim :]
    last = rotate(last[None, None], cos.to(x.dtype), (-sin if back else sin).to(x.dtype), True)
    return torch.cat([rest, last[0, 0]])


def normed(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def entries(compressor: Compressor, x: Tensor, config: RopeConfig) -> list[Tensor]:
    """Computes every entry of a document token by token."""
    ratio = compressor.ratio
    width = compressor.width
    values = x @ compressor.wkv.weight.T
    gates = x @ compressor.wgate.weight.T
    result = []
    for w in range(len(x) // ratio):
        terms = []
        for s in range(ratio):
            half = slice(width, None) if compressor.overlap else slice(None)
            t = w * ratio + s
            terms.append((values[t, half], gates[t, half] + compressor.ape[s, half]))
            if compressor.overlap and w:
                t = t - ratio
                half = slice(width)
                terms.append((values[t, half], gates[t, half] + compressor.ape[s, half]))
        weights = torch.stack([gate for _, gate in terms]).softmax(0)
        pooled = (torch.stack([value for value, _ in terms]) * weights).sum(0)
        result.append(turned(normed(pooled, compressor.norm.weight), w * ratio, config))
    return result


def expected(layer: SharedKV, x: Tensor) -> Tensor:
    """Computes the attention of a document query by query, head by head."""
    rope = CONFIG.compress_rope if layer.compresses else MAIN
    keys = [
        turned(normed(layer.wkv.weight @ x[t], layer.kv_norm.weight), t, rope)
        for t in range(len(x))
    ]
    compressor = getattr(layer, "compressor", None)
    compressed = [] if compressor is None else entries(compressor, x, rope)
    index_keys = entries(layer.indexer.compressor, x, rope) if isinstance(layer, CSA) else []
    outs = []
    for t in range(len(x)):
        latent = normed(layer.wq_a.weight @ x[t], layer.q_norm.weight)
        seen = list(range(0 if compressor is None else (t + 1) // compressor.ratio))
        if isinstance(layer, CSA) and len(seen) > CONFIG.top_k:
            queries = (layer.indexer.wq_b.weight @ latent).view(CONFIG.index_heads, -1)
            weights = layer.indexer.weights_proj.weight @ x[t]
            scores = torch.stack(
                [
                    sum(
                        v * (turned(q, t, rope) @ index_keys[w]).relu()
                        for v, q in zip(weights, queries, strict=True)
                    )
                    for w in seen
                ]
            )
            # Of equal scores the last.
            order = sorted(seen, key=lambda w: (scores[w].item(), w), reverse=True)
            seen = order[: CONFIG.top_k]
        every = keys[max(0, t - CONFIG.window + 1) : t + 1] + [compressed[w] for w in seen]
        heads = []
        for h, query in enumerate((layer.wq_b.weight @ latent).view(CONFIG.heads, -1)):
            query = turned(normed(query), t, rope)
            logits = torch.stack([query @ key for key in every]) * CONFIG.head_dim**-0.5
            weights = torch.cat([logits, layer.attn_sink[h : h + 1]]).softmax(0)
            out = sum(w * key for w, key in zip(weights, every, strict=False))
            heads.append(turned(out, t, rope, back=True))
        groups = torch.cat(heads).view(CONFIG.groups, -1)
        blocks = layer.wo_a.weight.view(CONFIG.groups, CONFIG.o_lora_rank, -1)
        outs.append(
            layer.wo_b.weight @ torch.cat([b @ g for b, g in zip(blocks, groups, strict=True)])
        )
    return torch.stack(outs)


@pytest.mark.parametrize("kind", [SharedKV, HCA, CSA])
def test_attention_is_that_of_a_naive_loop(kind: type[SharedKV]) -> None:
    layer = drawn(kind(CONFIG, DIM))
    x = torch.randn(2, 16, DIM, dtype=torch.float64)
    attended = layer(x, where(16, 2))
    assert attended.indexer_loss is None
    for row in range(2):
        torch.testing.assert_close(attended.out[row], expected(layer, x[row]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("queries", [1, 7, 128])
def test_gathered_entries_give_what_masked_ones_give(
    queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = drawn(CSA(CONFIG, DIM))
    x = torch.randn(2, 60, DIM, dtype=torch.float64)
    results = []
    for gathering, copied in ((99, 1), (1, queries * CONFIG.top_k * CONFIG.head_dim)):
        monkeypatch.setattr(csa, "GATHERING", gathering)
        monkeypatch.setattr(csa, "COPIED", copied)
        with torch.no_grad():
            results.append(layer(x, where(60, 2)).out)
    torch.testing.assert_close(*results)


def test_of_equal_scores_the_last_are_selected_or_those_of_topk() -> None:
    query = torch.ones(1, 1, 1, 2)
    weights = torch.ones(1, 1, 1)
    keys = torch.tensor([[[1.0, 0], [2, 0], [1, 0], [1, 0], [0, 0]]])
    visible = torch.tensor([[[True, True, True, True, False]]])
    selection = csa.EntrySelection(query, weights, keys, 2)
    scores = selection.scores(slice(0, 1), 5)
    run = slice(0, 1)
    assert set(selection.select(scores, visible, run).numbers.flatten().tolist()) == {1, 3}
    selected = selection._replace(as_topk=True).select(scores, visible, run)
    assert torch.equal(selected.numbers, scores.masked_fill(~visible, -torch.inf).topk(2).indices)


def model(**changes: object) -> LanguageModel:
    config = ModelConfig(
        vocab_size=30,
        dim=DIM,
        layers=2,
        dense_width=8,
        mla=None,
        csa=replace(CONFIG, kinds=("csa", "hca"), **changes),
    )
    return drawn(LanguageModel(config)).train()


@pytest.mark.parametrize("warmup", [True, False])
def test_only_the_indexers_learn_by_their_loss_and_nothing_else_trains_them(warmup: bool) -> None:
    one = model()
    ids = torch.randint(30, (2, 40))
    loss = one.loss(ids, ids, indexer_warmup=warmup)
    names = {name for name, _ in one.named_parameters() if ".indexer." in name}
    leaves = dict(one.named_parameters())
    grads = torch.autograd.grad(
        loss.indexer_loss.loss, list(leaves.values()), allow_unused=True, retain_graph=True
    )
    assert {name for name, grad in zip(leaves, grads, strict=True) if grad is not None} == names
    grads = torch.autograd.grad(loss.next_token, list(leaves.values()), allow_unused=True)
    assert {name for name, grad in zip(leaves, grads, strict=True) if grad is None} == names
    assert 0 < loss.indexer_loss[1] < 1


def test_the_indexer_learns_the_attention() -> None:
    one = model()
    ids = torch.randint(30, (2, 40))
    learned = [p for name, p in one.named_parameters() if ".indexer." in name]
    optimizer = torch.optim.Adam(learned, 0.02)
    losses = []
    for _ in range(60):
        loss = one.loss(ids, ids, indexer_warmup=True).indexer_loss
        losses.append(loss.loss.item())
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]


def test_padding_does_not_count_in_the_loss() -> None:
    one = model()
    ids = torch.randint(30, (1, 40))
    alone = one.loss(ids[:, :29], ids[:, :29]).indexer_loss
    labels = torch.full_like(ids, -100)
    padded = one.loss(ids, labels, lengths=torch.tensor([29])).indexer_loss
    torch.testing.assert_close(tuple(alone), tuple(padded))


def test_without_weight_the_indexer_loss_is_measured_and_not_minimised() -> None:
    ids = torch.randint(30, (1, 40))
    loss = model(weight=0.0).loss(ids, ids)
    assert loss.indexer_loss.loss > 0
    assert loss.total == loss.next_token


def test_other_dtypes_stay_near() -> None:
    layer = drawn(CSA(CONFIG, DIM))
    x = torch.randn(1, 30, DIM, dtype=torch.float64)
    result = layer(x, where(30)).out
    half = layer.to(torch.bfloat16)(x.bfloat16(), where(30)).out
    assert half.dtype == torch.bfloat16
    errors = (half - result).norm(dim=-1) / result.norm(dim=-1)
    assert errors.median() < 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": 3}, "csa.groups: got 3, expected a divisor of 4"),
        ({"rope_dim": 5}, "csa.rope_dim: got 5, expected an even width"),
        ({"rope_dim": 8}, "csa.rope_dim: got 8"),
        ({"window": 0}, "csa.window: got 0"),
        ({"top_k": 0}, "csa.top_k: got 0"),
        ({"weight": -1.0}, "csa.weight: got -1.0"),
    ],
)
def test_impossible_sizes_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **change)


def test_blocks_without_a_kind_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"csa\.kinds: got 1 kinds, expected one for each of the 3"
    ):
        ModelConfig(mla=None, csa=replace(CONFIG, kinds=("csa",)), layers=3)
    with pytest.raises(ValueError, match="exactly one of mla, gqa and csa"):
        ModelConfig(csa=CONFIG)
