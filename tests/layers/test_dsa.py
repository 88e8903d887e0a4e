"""Tests what DSA selects and attends to, its kernel, and how its indexer is trained.

What every attention must do (causality, documents, padding, caches) is in test_attention_kinds.py.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from rorqual import kernels
from rorqual.kernels import dsa as kernel
from rorqual.layers import dsa
from rorqual.layers.attention import MLA, MLAConfig
from rorqual.layers.cache import BlockCache, Past
from rorqual.layers.context import context
from rorqual.layers.dsa import (
    DSA,
    DSAConfig,
    Indexer,
    IndexerSelection,
    attend_best,
    index_scores,
    mean_indexer_loss,
    selected_mask,
)
from rorqual.layers.rope import RopeConfig
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig, MoEConfig, MTPConfig

ROPE = RopeConfig(base=50.0)
LATENT = MLAConfig(heads=4, q_lora_rank=12, kv_lora_rank=10, nope_dim=6, rope_dim=4, value_dim=7)


def stirred(module, std=0.4):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def layer(top_k=5, mla=LATENT):
    return stirred(DSA(DSAConfig(heads=3, dim=8, top_k=top_k), mla, 20, ROPE))


def run(attention, hidden, indexer_losses=None, **expected):
    """Returns the output; the loss of an indexer that is trained goes to `indexer_losses`."""
    attended = attention(
        hidden,
        context(*hidden.shape[:2], hidden.device, rope=(ROPE, attention.rope_dim), **expected),
    )
    assert (attended.indexer_loss is None) == (expected.get("indexer_warmup") is None)
    if attended.indexer_loss is not None and indexer_losses is not None:
        indexer_losses.append(attended.indexer_loss)
    return attended.out


def selected(attention, hidden, **expected):
    """Returns the indexer's IndexerSelection of a call."""
    ctx = context(*hidden.shape[:2], hidden.device, rope=(ROPE, attention.rope_dim), **expected)
    plain = attention.config.q_lora_rank is None
    latent = hidden if plain else attention.q_a_layernorm(attention.q_a_proj(hidden))
    return attention.indexer.select(hidden, latent, attention.indexer.keys(hidden, ctx), ctx)


@pytest.fixture(params=["masked", "gathered"])
def way(request, monkeypatch):
    """Forces each of the two ways to attend to selected keys, whichever is cheaper.

    With gradients, unselected keys are always masked.
    """
    monkeypatch.setattr(dsa, "GATHERING", {"masked": 1e9, "gathered": 0.0}[request.param])
    return request.param


def dense(attention):
    """Builds the same attention without an indexer."""
    plain = MLA(attention.config, 20, ROPE)
    plain.load_state_dict(
        {n: p for n, p in attention.state_dict().items() if not n.startswith("indexer.")}
    )
    return plain


@pytest.mark.parametrize(("batch", "time", "top_k"), [(2, 17, 5), (1, 40, 11), (2, 9, 8)])
def test_chooses_what_transformers_chooses(batch, time, top_k):
    config = DeepseekV32Config(
        hidden_size=20,
        index_n_heads=3,
        index_head_dim=8,
        index_topk=top_k,
        q_lora_rank=12,
        qk_rope_head_dim=4,
    )
    reference = stirred(DeepseekV32Indexer(config, 0))
    ours = Indexer(DSAConfig(heads=3, dim=8, top_k=top_k), LATENT, 20)
    ours.load_state_dict(reference.state_dict())
    hidden = torch.randn(batch, time, 20)
    latent = torch.randn(batch, time, 12)
    where = context(batch, time, "cpu", rope=(ROPE, 4))
    cos = where.cos
    sin = where.sin
    causal = where.visible()[0, 0]
    theirs = reference(
        hidden,
        latent,
        (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)),
        causal.expand(batch, -1, -1),
        where.positions,
    )
    expected = (
        torch.zeros(batch, time, time, dtype=torch.bool).scatter(-1, theirs.long(), True) & causal
    )
    selection = ours.select(hidden, latent, ours.keys(hidden, where), where)
    got = selected_mask(selection, slice(0, time), selection.select(slice(0, time)))[:, 0]
    scores = index_scores(selection.query, selection.key, selection.weights)
    differ = got ^ expected  # only among keys of equal score, which their topk leaves open
    assert torch.equal(got.sum(-1), expected.sum(-1))
    assert (scores[differ] == 0).all()
    assert differ.float().mean() < 0.2


@pytest.mark.parametrize(("time", "top_k"), [(17, 5), (9, 20), (40, 11)])
def test_is_the_naive_code_of_flash_linear_attention(time, top_k):
    """Compares forward and backward.

    There are so many heads that no key scores 0, because their code may select any of those.
    """
    naive = pytest.importorskip(
        "fla.ops.dsa.naive", reason="fla-core is not installed", exc_type=ImportError
    )
    index_query = torch.randn(2, time, 16, 8)
    weights = torch.randn(2, time, 16)
    key = torch.randn(2, time, 8)
    arguments = [torch.randn(2, time, 3, 6, requires_grad=True) for _ in range(3)]
    ours = IndexerSelection(index_query, weights, key, None, top_k).attend_masked(*arguments, 0.4)
    theirs = naive.naive_dsa(*arguments, index_query, key, weights, topk=top_k, scale=0.4)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    pull = torch.randn_like(theirs)
    for a, b in zip(
        *(torch.autograd.grad((y * pull).sum(), arguments) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_scores_are_their_equation():
    q = torch.randn(1, 5, 3, 8)
    k = torch.randn(1, 7, 8)
    w = torch.randn(1, 5, 3)
    got = index_scores(q, k, w)
    for t in range(5):
        for s in range(7):
            expected = sum(w[0, t, j] * (q[0, t, j] @ k[0, s]).clamp_min(0) for j in range(3))
            assert got[0, t, s].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    "mla",
    [LATENT, MLAConfig(heads=2, kv_lora_rank=8, nope_dim=4, rope_dim=8, value_dim=4)],
    ids=str,
)
@torch.no_grad()
def test_attends_to_the_selected_keys_alone(mla, way):
    attention = layer(4, mla)
    hidden = torch.randn(2, 13, 20)
    where = context(2, 13, "cpu", rope=(ROPE, mla.rope_dim))
    selection = selected(attention, hidden)
    plain = dense(attention)
    scores = index_scores(selection.query, selection.key, selection.weights)
    out = run(attention, hidden)
    for b in range(2):
        for t in range(13):
            cached = sorted(range(t + 1), key=lambda s, row=scores[b, t]: (row[s].item(), s))[-4:]
            mask = torch.zeros(2, 1, 13, 13, dtype=torch.bool)
            mask[..., cached] = True
            expected = plain(hidden, replace(where, mask=mask)).out
            torch.testing.assert_close(out[b, t], expected[b, t], atol=1e-5, rtol=0)


@pytest.mark.parametrize("time", [1, 6, 17])
def test_choosing_everything_is_dense_attention(time):
    attention = layer(17)
    hidden = torch.randn(2, time, 20, requires_grad=True)
    outs = [run(module, hidden) for module in (attention, dense(attention))]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    pull = torch.randn_like(outs[0])
    torch.testing.assert_close(
        *(torch.autograd.grad((y * pull).sum(), hidden)[0] for y in outs), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_runs_of_queries_change_nothing(monkeypatch, way):
    attention = layer()
    hidden = torch.randn(2, 23, 20)
    whole = run(attention, hidden)
    for name, value in (("QUERIES", 5), ("SCORES", 600), ("COPIED", 200)):
        monkeypatch.setattr(dsa, name, value)
        torch.testing.assert_close(run(attention, hidden), whole, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_call_that_gathers_never_holds_a_mask_of_all_queries(monkeypatch, way):
    """The largest tensor of a prefill grows with T alone.

    In slices of 8 queries, none has T x T values.
    """
    monkeypatch.setattr(dsa, "QUERIES", 8)
    attention = layer()
    time = 400
    sizes = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    with Largest():
        run(attention, torch.randn(1, time, 20))
    assert max(sizes) < time * time


def test_hidden_keys_get_no_gradient_and_the_others_that_of_dense_attention():
    attention = layer(4)
    hidden = torch.randn(1, 11, 20, requires_grad=True)
    selection = selected(attention, hidden)
    every = slice(0, 11)
    mask = selected_mask(selection, every, selection.select(every))
    masked = replace(context(1, 11, "cpu", rope=(ROPE, 4)), mask=mask)
    outs = run(attention, hidden), dense(attention)(hidden, masked).out
    pull = torch.randn_like(outs[0])
    mine, theirs = (torch.autograd.grad((y * pull).sum(), hidden)[0] for y in outs)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.fixture
def references(monkeypatch):
    """Makes the functions of layers the references; the kernel is called by its own name."""
    monkeypatch.setenv(kernels.VARIABLE, "reference")


def best_case(batch, time, heads, width, length, ours, narrow, top_k, ties=False):
    """Builds the last `time` of `length` tokens, with latents and keys in longer buffers."""
    latent = torch.randn(batch, length + 3, width)[:, :length]
    key = torch.randn(batch, length + 5, narrow)[:, :length]
    if ties:
        key = key.round()
    index_query = torch.randn(batch, time, ours, narrow).round()
    weights = torch.randn(batch, time, ours).round()
    return torch.randn(batch, time, heads, width), latent, index_query, key, weights, top_k, 0.4


@pytest.mark.parametrize("lengths", [[50, 43], [4, 49], [11, 12]], ids=str)
def test_the_kernel_reads_each_sequence_to_its_end(lengths, references, poisoned):
    """Some rows have fewer keys than may be selected. NaN follows the tokens of a row."""
    arguments = best_case(2, 3, 3, 7, 50, 3, 5, 11)
    ends = torch.tensor(lengths)[:, None] - 2 + torch.arange(3)
    expected = attend_best(*arguments, ends)
    for row, length in enumerate(lengths):
        query, latent, index_query, key, weights = (x[row : row + 1] for x in arguments[:5])
        if length - 2 > 11:
            shorter = query, latent[:, :length], index_query, key[:, :length], weights
            alone = attend_best(*shorter, *arguments[5:])
            torch.testing.assert_close(expected[row : row + 1], alone, atol=5e-6, rtol=0)
        latent[:, length:], key[:, length:] = torch.nan, torch.nan
    torch.testing.assert_close(kernel.attend_best(*arguments, ends), expected, atol=5e-6, rtol=0)


@torch.no_grad()
def test_few_queries_copy_few_latents_at_a_time(monkeypatch, references):
    """COPIED and SCORES bound 16 tokens after a cache as they bound a prompt.

    That is where no kernel runs, in bfloat16 or on a GPU.
    """
    attention = layer(12)
    hidden = torch.randn(2, 76, 20)
    past = Past(2)
    monkeypatch.setattr(dsa, "GATHERING", 0.0)
    expected = run(attention, hidden)[:, 60:]
    sizes = []
    cache = BlockCache(attention.new_cache(2, 80, hidden.dtype, hidden.device))
    run(attention, hidden[:, :60], past=past, cache=cache)
    for name, value in (("COPIED", 600), ("SCORES", 2 * 3 * 76 * 3)):
        monkeypatch.setattr(dsa, name, value)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if "index_select" in str(function):
                sizes.append(out.numel())
            return out

    with Copies():
        result = run(attention, hidden[:, 60:], past=past, cache=cache)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    assert sizes and max(sizes) <= 600


def test_the_kernel_takes_an_empty_batch():
    assert kernel.attend_best(*best_case(0, 2, 4, 20, 90, 4, 8, 30)).shape == (0, 2, 4, 20)


def test_of_equal_keys_the_kernel_chooses_the_last(references):
    """Zeros of either sign are among the scores."""
    latent = torch.arange(9.0).view(1, 9, 1)
    key = torch.zeros(1, 9, 1)
    index_query = torch.ones(1, 1, 2, 1)
    weights = torch.tensor([[[-1.0, 1.0]]])
    key[0, 2] = -1.0
    arguments = torch.zeros(1, 1, 1, 1), latent, index_query, key, weights, 3, 1.0
    for way in (kernel.attend_best, attend_best):
        assert way(*arguments).item() == pytest.approx(7.0)  # the mean of 6, 7 and 8


@pytest.mark.parametrize("case", [(1, 1, 60), (2, 3, 60), (2, 2, 900)], ids=str)
def test_the_kernel_leaves_ties_to_topk_where_that_is_asked(case, references):
    """Queries and weights are round, so that many keys tie; a tie is reported."""
    batch, time, length = case
    arguments = best_case(batch, time, 4, 20, length, 2, 8, 11, ties=True)
    reported = [torch.zeros(batch, time, dtype=torch.bool) for _ in range(2)]
    ours = kernel.attend_best(*arguments, None, reported[0])
    torch.testing.assert_close(ours, attend_best(*arguments, None, reported[1]), atol=5e-6, rtol=0)
    assert torch.equal(*reported) and reported[0].any()


def test_only_scores_of_0_leave_a_choice_open():
    # The second and the third key have equal scores, and one of them is selected.
    scores = torch.tensor([[[3.0, 1.0, 1.0, -2.0], [3.0, 0.0, 0.0, -2.0], [3.0, -0.0, 0.0, -2.0]]])
    index = scores.topk(2).indices
    assert dsa.tied_queries(scores, index).tolist() == [[False, True, True]]
    # Both are selected, neither is, and neither may be seen.
    others = torch.tensor([[[3.0, 0.0, 0.0, -2.0], [3.0, 2.0, 0.0, 0.0], [3.0, *[-torch.inf] * 3]]])
    index = torch.tensor([[[0, 1, 2], [0, 1, 1], [0, 1, 2]]])
    assert dsa.tied_queries(others, index).tolist() == [[False, False, False]]


@pytest.mark.parametrize("score, again", [(0.0, True), (0.5, False)])
def test_a_cached_call_computes_nothing_again_for_scores_that_rounding_made_equal(
    score, again, references, monkeypatch
):
    def scores_of(query, key, weights):
        # The first two keys have one score, the others a lower one.
        scores = torch.full((len(query), query.shape[1], key.shape[1]), -1.0)
        scores[..., :2] = score
        return scores

    monkeypatch.setattr(dsa, "index_scores", scores_of)
    config = DSAConfig(heads=2, dim=8, top_k=1, ties="topk")
    model = LanguageModel(
        ModelConfig(vocab_size=40, dim=16, layers=2, dense_width=16, mla=LATENT, dsa=config), seed=1
    ).eval()
    cache = model.new_cache(1, 8)
    with torch.no_grad():
        model.hidden(torch.arange(5)[None], cache=cache)
    assert cache.tied is again


@pytest.mark.parametrize("top_k", [2, 5, 9])
@pytest.mark.parametrize("runs", [512, 4])
def test_ties_are_topks_where_that_is_asked(top_k, runs, monkeypatch):
    """The row that topk gets has all columns of the call, whichever queries are a slice."""
    monkeypatch.setattr(dsa, "QUERIES", runs)
    key = torch.randn(2, 24, 4)
    query = torch.randn(2, 24, 1, 4)
    weights = torch.randn(2, 24, 1)
    selection = IndexerSelection(query, weights, key, None, top_k, ties=24)
    scores = index_scores(query, key, weights)
    causal = torch.ones(24, 24, dtype=torch.bool).tril()
    expected = scores.masked_fill(~causal, -torch.inf).topk(top_k, dim=-1).indices
    wanted = torch.zeros(2, 24, 24, dtype=torch.bool).scatter_(-1, expected, True) & causal
    latest = IndexerSelection(query, weights, key, None, top_k)
    differ = 0
    for run in selection.runs():
        mask = selected_mask(selection, run, selection.select(run))[:, 0]
        assert torch.equal(mask.expand(2, -1, -1), wanted[:, run, : run.stop])
        other = selected_mask(latest, run, latest.select(run))[:, 0]
        differ += (mask ^ other).sum().item()
    assert differ > 0
    indices = selection.topk_indices()
    again = selection._replace(indices=indices, query=query[..., :0, :0], weights=weights[..., :0])
    for run in selection.runs():
        mask = selected_mask(again, run, again.select(run))[:, 0]
        assert torch.equal(mask.expand(2, -1, -1), wanted[:, run, : run.stop])


def test_a_block_without_an_indexer_attends_to_the_keys_of_the_block_before(way):
    config = DSAConfig(heads=3, dim=8, top_k=4, shared=(1,))
    first, second = (stirred(DSA(config, LATENT, 20, ROPE, index)) for index in range(2))
    assert second.indexer is None and first.publishes and not second.publishes
    hidden = torch.randn(2, 13, 20)
    where = context(2, 13, "cpu", rope=(ROPE, 4))
    attended = first(hidden, where)
    selected = attended.shared
    assert attended.indexer_loss is None and selected.shape == (2, 13, 4)
    attended = second(hidden, replace(where, shared=selected))
    mask = torch.zeros(2, 1, 13, 13, dtype=torch.bool)
    mask = mask.scatter_(-1, selected[:, None], True) & where.visible()
    expected = dense(second)(hidden, replace(where, mask=mask)).out
    assert attended.indexer_loss is None
    torch.testing.assert_close(attended.out, expected, atol=1e-5, rtol=0)
    every = second(hidden, where).out  # nothing was selected: all keys
    torch.testing.assert_close(every, dense(second)(hidden, where).out, atol=1e-5, rtol=0)


def test_a_dense_layer_has_no_indexer_loss():
    attention = layer(4)
    hidden = torch.randn(2, 13, 20)
    dsa.switch(attention, True)
    for indexer_warmup in (None, False, True):
        where = context(2, 13, "cpu", rope=(ROPE, 4), indexer_warmup=indexer_warmup)
        attended = attention(hidden, where)
        assert attended.indexer_loss is None
        torch.testing.assert_close(
            attended.out, dense(attention)(hidden, where).out, atol=1e-5, rtol=0
        )
    dsa.switch(attention, False)
    assert (run(attention, hidden) - attended.out).abs().max() > 1e-3


@pytest.mark.parametrize("indexer_warmup", [True, False])
def test_the_loss_of_equal_scores_is_the_baseline(indexer_warmup):
    """An indexer whose weights are 0 scores all keys alike."""
    attention = layer(4)
    hidden = torch.randn(2, 13, 20)
    torch.nn.init.zeros_(attention.indexer.weights_proj.weight)
    losses = []
    run(attention, hidden, indexer_losses=losses, indexer_warmup=indexer_warmup)
    torch.testing.assert_close(losses[0].loss, losses[0].uniform, atol=1e-6, rtol=1e-5)
    assert losses[0].loss > 0.01


def slowly(selection, query, key, scale, indexer_warmup, valid=None, visible=None):
    """Computes the loss and the recall one query at a time, in float64, with a gradient."""
    scores = index_scores_slowly(selection)
    terms = []
    captured = []
    for b in range(query.shape[0]):
        for t in range(query.shape[1]):
            if valid is not None and not valid[b, t]:
                continue
            keys = [s for s in range(t + 1) if visible is None or visible[b, t, s]]
            order = sorted(keys, key=lambda s, row=scores[b, t]: (row[s].item(), s))
            selected = sorted(order[-selection.top_k :])
            logits = scale * torch.einsum("hp,shp->hs", query[b, t].double(), key[b].double())
            over = keys if indexer_warmup else selected
            target = logits[:, over].softmax(-1).mean(0).detach()
            terms.append((target * (target.log() - scores[b, t, over].log_softmax(-1))).sum())
            if len(keys) > selection.top_k:
                captured.append(
                    logits[:, keys]
                    .softmax(-1)[:, [keys.index(s) for s in selected]]
                    .sum(-1)
                    .mean()
                    .item()
                )
    return torch.stack(terms).mean(), sum(captured) / len(captured) if captured else 1.0


def index_scores_slowly(selection):
    products = torch.einsum(
        "btjp,blp->btjl", selection.query.double(), selection.key.double()
    ).clamp_min(0)
    return torch.einsum("btj,btjl->btl", selection.weights.double(), products)


def leaves(batch=2, time=9, top_k=4, mask=None, heads=3):
    """Builds a IndexerSelection whose tensors need gradients, and the attention that trains it."""
    query = torch.randn(batch, time, 2, 6)
    weights = torch.randn(batch, time, 2)
    key = torch.randn(batch, time, 6)
    tensors = [x.requires_grad_() for x in (query, weights, key)]
    return (
        IndexerSelection(*tensors, mask, top_k),
        torch.randn(batch, time, heads, 5),
        torch.randn(batch, time, heads, 5),
    )


class TestIndexerLoss:
    @pytest.mark.parametrize("indexer_warmup", [True, False])
    @pytest.mark.parametrize("top_k", [1, 4, 20])
    @pytest.mark.parametrize("queries", [512, 4])
    def test_is_the_divergence_and_its_gradient(self, indexer_warmup, top_k, queries, monkeypatch):
        monkeypatch.setattr(dsa, "QUERIES", queries)
        selection, query, key = leaves(top_k=top_k)
        result = selection.kl_loss(query, key, 0.7, indexer_warmup)
        loss, recall = slowly(selection, query, key, 0.7, indexer_warmup)
        torch.testing.assert_close(result.loss, loss.float(), rtol=1e-5, atol=1e-6)
        assert result.recall.item() == pytest.approx(recall, abs=1e-5)
        mine, theirs = (
            torch.autograd.grad(3.0 * x, selection[:3], allow_unused=True)
            for x in (result.loss, loss)
        )
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("indexer_warmup", [True, False])
    def test_documents_and_padding_are_left_out(self, indexer_warmup, poisoned):
        document_ids = torch.tensor([[0] * 6 + [1] * 3, [2] * 9])
        ctx = context(2, 9, "cpu", document_ids=document_ids, lengths=[9, 7])
        mask = ctx.mask
        valid = ctx.valid
        selection, query, key = leaves(top_k=3, mask=mask)
        result = selection.kl_loss(query, key, 0.7, indexer_warmup, valid)
        loss, recall = slowly(selection, query, key, 0.7, indexer_warmup, valid, mask[:, 0])
        torch.testing.assert_close(result.loss, loss.float(), rtol=1e-5, atol=1e-6)
        assert result.recall.item() == pytest.approx(recall, abs=1e-5)
        mine, theirs = (torch.autograd.grad(x, selection[:3]) for x in (result.loss, loss))
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert not mine[0][1, 7:].any()
        assert mine[0][1, 4:7].any()

    def test_is_float32_under_autocast_too(self):
        selection, query, key = leaves()
        expected = selection.kl_loss(query, key, 0.7, False)
        with torch.autocast("cpu", torch.bfloat16):
            result = selection.kl_loss(query, key, 0.7, False)
            assert torch.equal(
                selection.select(slice(0, 9)).columns,
                IndexerSelection(*selection).select(slice(0, 9)).columns,
            )
        assert result.loss.dtype == torch.float32
        assert torch.equal(result.loss, expected.loss)
        assert torch.equal(result.recall, expected.recall)

    def test_no_valid_query_costs_nothing(self):
        selection, query, key = leaves()
        result = selection.kl_loss(query, key, 0.7, True, torch.zeros(2, 9, dtype=torch.bool))
        assert result.loss == 0
        assert result.recall == 1
        assert all(not g.any() for g in torch.autograd.grad(result.loss, selection[:3]))

    def test_without_a_gradient_is_the_same_number(self):
        selection, query, key = leaves()
        expected = selection.kl_loss(query, key, 0.7, False)
        with torch.no_grad():
            assert torch.equal(selection.kl_loss(query, key, 0.7, False).loss, expected.loss)

    def test_several_are_their_mean(self):
        indexer_losses = [
            selection.kl_loss(query, key, 0.7, True)
            for selection, query, key in (leaves(), leaves())
        ]
        assert (
            mean_indexer_loss(indexer_losses).loss
            == (indexer_losses[0].loss + indexer_losses[1].loss) / 2
        )
        assert mean_indexer_loss([]) is None


@pytest.mark.parametrize("indexer_warmup", [True, False])
def test_a_call_that_trains_the_indexer_attends_densely_during_the_warm_up(indexer_warmup):
    attention = layer()
    hidden = torch.randn(2, 14, 20)
    indexer_losses = []
    out = run(attention, hidden, indexer_losses=indexer_losses, indexer_warmup=indexer_warmup)
    expected = run(dense(attention) if indexer_warmup else attention, hidden)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    assert len(indexer_losses) == 1
    assert indexer_losses[0].loss > 0
    assert 0 < indexer_losses[0].recall < 1


@pytest.mark.parametrize("indexer_warmup", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_the_indexer_loss_is_a_mean_over_the_queries_of_all_documents(indexer_warmup, packed):
    """Each document counts as if alone, and padding does not count."""
    attention = layer()
    hidden = torch.randn(2, 14, 20)
    losses = []
    alone = []
    reference = {"document_ids": torch.arange(14).expand(2, -1) // 8} if packed else {}
    out = run(
        attention, hidden, losses, indexer_warmup=indexer_warmup, lengths=[14, 11], **reference
    )
    cuts = [[8, 6], [8, 3]] if packed else [[14], [11]]
    for row, sizes in enumerate(cuts):
        parts = hidden[row : row + 1, : sum(sizes)].split(sizes, 1)
        outs = [run(attention, piece, alone, indexer_warmup=indexer_warmup) for piece in parts]
        torch.testing.assert_close(
            out[row : row + 1, : sum(sizes)], torch.cat(outs, 1), atol=1e-5, rtol=0
        )
    sizes = torch.tensor([float(size) for row in cuts for size in row])
    expected = (torch.stack([each.loss for each in alone]) * sizes).sum() / sizes.sum()
    torch.testing.assert_close(losses[0].loss, expected, atol=1e-5, rtol=1e-5)
    # The recall is over the queries that have more keys than they may select.
    choosing = (sizes - 5).clamp_min(0)
    expected = (torch.stack([each.recall for each in alone]) * choosing).sum() / choosing.sum()
    torch.testing.assert_close(losses[0].recall, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("indexer_warmup", [True, False])
def test_is_trained_under_autocast(indexer_warmup):
    attention = layer()
    hidden = torch.randn(2, 30, 20)
    result = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = run(attention, hidden, indexer_losses=result, indexer_warmup=indexer_warmup)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert result[1].loss.dtype == torch.float32
    assert result[1].loss.item() == pytest.approx(result[0].loss.item(), rel=0.1)
    assert result[1].recall.item() == pytest.approx(result[0].recall.item(), abs=0.1)
    (out.sum() + result[1].loss).backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in attention.parameters()
    )


@pytest.mark.parametrize("indexer_warmup", [True, False])
def test_the_model_learns_neither_from_the_choice_nor_from_the_indexer_loss(indexer_warmup):
    attention = layer()
    hidden = torch.randn(1, 12, 20, requires_grad=True)
    indexer_losses = []
    run(
        attention, hidden, indexer_losses=indexer_losses, indexer_warmup=indexer_warmup
    ).sum().backward(retain_graph=True)
    assert all(p.grad is None for p in attention.indexer.parameters())
    before = {
        name: p.grad.clone() for name, p in attention.named_parameters() if p.grad is not None
    }
    before["hidden"] = hidden.grad.clone()
    indexer_losses[0].loss.backward()
    assert torch.equal(hidden.grad, before["hidden"])
    for name, p in attention.named_parameters():
        if name.startswith("indexer."):
            assert p.grad.isfinite().all()
            assert p.grad.any(), name
        else:
            assert torch.equal(p.grad, before[name]), name


@pytest.mark.parametrize("indexer_warmup", [True, False])
def test_an_indexer_learns_to_find_what_attention_looks_at(indexer_warmup):
    attention = layer(6)
    hidden = torch.randn(8, 32, 20)
    attention.indexer = Indexer(DSAConfig(heads=8, dim=16, top_k=6), LATENT, 20)
    optimiser = torch.optim.Adam(attention.indexer.parameters(), lr=2e-2)
    result = []
    for step in range(60):
        indexer_losses = []
        run(
            attention,
            hidden,
            indexer_losses=indexer_losses,
            indexer_warmup=indexer_warmup or step < 30,
        )
        optimiser.zero_grad()
        indexer_losses[0].loss.backward()
        optimiser.step()
        result.append(indexer_losses[0])
    assert result[29].loss < 0.6 * result[0].loss
    assert result[59].recall > result[0].recall + 0.1
    assert indexer_warmup or result[59].loss < result[30].loss


@pytest.mark.compiled
@pytest.mark.slow
def test_a_compiled_call_is_one_graph(monkeypatch):
    """Compiles forward and backward, with and without the indexer loss.

    Sequences are packed and padded, too; and there is a prompt, which gathers the selected keys.
    """
    monkeypatch.setattr(dsa, "GATHERING", 0.0)
    attention = layer()
    hidden = torch.randn(2, 21, 20)
    packed = torch.arange(21) // torch.tensor([[11], [7]])
    padded = {"lengths": [21, 17]}
    cases = [
        ({"document_ids": packed}, None),
        (padded, None),
        (padded | {"document_ids": packed}, False),
    ]
    for reference, indexer_warmup in cases:

        def call(x, expected=reference, indexer_warmup=indexer_warmup):
            indexer_losses = []
            out = run(
                attention,
                x,
                indexer_losses=indexer_losses,
                indexer_warmup=indexer_warmup,
                **expected,
            )
            return [out, *(value for indexer_loss in indexer_losses for value in indexer_loss)]

        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        results = []
        for function in (compiled, call):
            arguments = hidden.clone().requires_grad_()
            outs = function(arguments)
            loss = outs[0].square().sum() + sum(outs[1:2])
            grads = torch.autograd.grad(
                loss, [arguments, *attention.parameters()], allow_unused=True
            )
            results.append((outs, grads))
        (ours, mine), (expected, theirs) = results
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        for one, other in zip(mine, theirs, strict=True):
            assert (one is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda x: run(attention, x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(hidden), run(attention, hidden), atol=1e-5, rtol=0)


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("ties", ["last", "topk"])
def test_a_compiled_model_is_one_graph(ties):
    """Compiles the logits and the loss of a whole model, whose last block has no indexer."""
    config = ModelConfig(
        vocab_size=50,
        dim=16,
        layers=2,
        dense_width=24,
        mla=MLAConfig(heads=2, q_lora_rank=8, kv_lora_rank=8, nope_dim=4, rope_dim=4, value_dim=4),
        dsa=DSAConfig(heads=3, dim=8, top_k=5, shared=(1,), ties=ties),
        moe=MoEConfig(routed=4, active=2, width=8, first_dense=1),
        mtp=MTPConfig(),
        init_std=0.3,
    )
    model = LanguageModel(config)
    ids = torch.randint(50, (2, 17))
    # In a traced call torch.topk gets whole rows, packed or not.
    document_ids = torch.arange(17).expand(2, -1) // 9 if ties == "last" else None

    def logits(ids):
        return model(ids, document_ids=document_ids)

    def losses(ids):
        loss = model.loss(ids, ids, document_ids=document_ids)
        return loss.total, *loss.indexer_loss

    torch._dynamo.reset()
    compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), logits(ids), atol=1e-5, rtol=0)
    model.train()
    torch._dynamo.reset()
    results = []
    for function in (torch.compile(losses, fullgraph=True, backend="aot_eager"), losses):
        model.zero_grad()
        total, *others = function(ids)
        total.backward()
        results.append((total, others, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_refuses_what_cannot_be():
    for name in ("heads", "dim", "top_k"):
        with pytest.raises(ValueError, match=f"dsa.{name}: got 0, expected at least 1"):
            DSAConfig(**{name: 0})
    for name in ("warmup", "weight", "dense"):
        with pytest.raises(ValueError, match=f"dsa.{name}: got -1, expected 0 or more"):
            DSAConfig(**{name: -1})
    with pytest.raises(ValueError, match=r"dsa.shared: got \(0,\), expected block indices from 1"):
        DSAConfig(shared=(0,))
    with pytest.raises(ValueError, match=r"dsa.shared: got \[3\], expected block indices 1..2"):
        ModelConfig(layers=3, dsa=DSAConfig(shared=(3,)))
    with pytest.raises(ValueError, match=r"dsa.dim: got 2, expected at least mla.rope_dim, 4"):
        DSA(DSAConfig(dim=2), LATENT, 20, ROPE)
