from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from rorqual.kernels import dsa as twin
from rorqual.layers import attention as attending
from rorqual.layers import dsa
from rorqual.layers.attention import MLA, MLAConfig
from rorqual.layers.basics import RopeConfig
from rorqual.layers.cache import BlockCache, Past
from rorqual.layers.context import context
from rorqual.layers.dsa import (
    DSA,
    DSAConfig,
    IndexerSelection,
    attend_best,
    index_scores,
    mean_indexer_loss,
)

ROPE = RopeConfig(base=50.0)
LATENT = MLAConfig(heads=4, q_lora_rank=12, kv_lora_rank=10, nope_dim=6, rope_dim=4, value_dim=7)


def stirred(module, std=0.4):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def layer(chosen=5, mla=LATENT):
    return stirred(MLA(mla, 20, ROPE, DSA(DSAConfig(heads=3, dim=8, chosen=chosen), 20, mla, ROPE)))


def run(attention, hidden, past=None, cache=None, indexer_losses=None, **known):
    """Returns the output; the loss of an indexer that is trained goes to `indexer_losses`."""
    known |= {"past": past, "cache": BlockCache(cache) if cache is not None else None}
    out, indexer_loss = attention(
        hidden, context(*hidden.shape[:2], hidden.device, rope=(ROPE, attention.rope_dim), **known)
    )
    assert (indexer_loss is None) == (known.get("warm") is None)
    if indexer_loss is not None and indexer_losses is not None:
        indexer_losses.append(indexer_loss)
    return out


def selected(attention, hidden, **known):
    """Returns the indexer's IndexerSelection of a call."""
    ctx = context(*hidden.shape[:2], hidden.device, rope=(ROPE, attention.rope_dim), **known)
    plain = attention.config.q_lora_rank is None
    latent = hidden if plain else attention.q_a_layernorm(attention.q_a_proj(hidden))
    return attention.inner.select(hidden, latent, attention.inner.keys(hidden, ctx), ctx)


@pytest.fixture(params=["hiding", "gathering"])
def way(request, monkeypatch):
    """Forces each of the two ways to attend to selected keys, whichever is cheaper.

    With gradients, unselected keys are always masked.
    """
    monkeypatch.setattr(attending, "GATHERING", {"hiding": 1e9, "gathering": 0.0}[request.param])
    return request.param


def dense(attention):
    """Builds the same attention without an indexer."""
    plain = MLA(attention.config, 20, ROPE)
    plain.load_state_dict(
        {n: p for n, p in attention.state_dict().items() if not n.startswith("inner.")}
    )
    return plain


@pytest.mark.parametrize(("batch", "time", "chosen"), [(2, 17, 5), (1, 40, 11), (2, 9, 8)])
def test_chooses_what_transformers_chooses(batch, time, chosen):
    config = DeepseekV32Config(
        hidden_size=20,
        index_n_heads=3,
        index_head_dim=8,
        index_topk=chosen,
        q_lora_rank=12,
        qk_rope_head_dim=4,
    )
    reference, ours = (
        stirred(DeepseekV32Indexer(config, 0)),
        DSA(DSAConfig(heads=3, dim=8, chosen=chosen), 20, LATENT, ROPE),
    )
    ours.load_state_dict(reference.state_dict())
    hidden, latent = torch.randn(batch, time, 20), torch.randn(batch, time, 12)
    where = context(batch, time, "cpu", rope=(ROPE, 4))
    cos, sin = where.cos, where.sin
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
    got, scores = (
        selection.seen(slice(0, time))[:, 0],
        index_scores(selection.query, selection.key, selection.weights),
    )
    differ = got ^ expected  # only among keys of equal score, which their topk leaves open
    assert torch.equal(got.sum(-1), expected.sum(-1))
    assert (scores[differ] == 0).all()
    assert differ.float().mean() < 0.2


@pytest.mark.parametrize(("time", "chosen"), [(17, 5), (9, 20), (40, 11)])
def test_is_the_naive_code_of_flash_linear_attention(time, chosen):
    """Compares forward and backward.

    There are so many heads that no key scores 0, because their code may select any of those.
    """
    naive = pytest.importorskip(
        "fla.ops.dsa.naive", reason="fla-core is not installed", exc_type=ImportError
    )
    looking, weights, key = (
        torch.randn(2, time, 16, 8),
        torch.randn(2, time, 16),
        torch.randn(2, time, 8),
    )
    given = [torch.randn(2, time, 3, 6, requires_grad=True) for _ in range(3)]
    ours = IndexerSelection(looking, weights, key, None, chosen).hiding(*given, 0.4)
    theirs = naive.naive_dsa(*given, looking, key, weights, topk=chosen, scale=0.4)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    pull = torch.randn_like(theirs)
    for a, b in zip(
        *(torch.autograd.grad((y * pull).sum(), given) for y in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_scores_are_their_equation():
    q, k, w = torch.randn(1, 5, 3, 8), torch.randn(1, 7, 8), torch.randn(1, 5, 3)
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
def test_attends_to_the_chosen_keys_alone(mla, way):
    attention, hidden = layer(4, mla), torch.randn(2, 13, 20)
    where = context(2, 13, "cpu", rope=(ROPE, mla.rope_dim))
    selection, plain = selected(attention, hidden), dense(attention)
    scores, out = (
        index_scores(selection.query, selection.key, selection.weights),
        run(attention, hidden),
    )
    for b in range(2):
        for t in range(13):
            kept = sorted(range(t + 1), key=lambda s, row=scores[b, t]: (row[s].item(), s))[-4:]
            mask = torch.zeros(2, 1, 13, 13, dtype=torch.bool)
            mask[..., kept] = True
            expected = plain(hidden, replace(where, mask=mask))[0]
            torch.testing.assert_close(out[b, t], expected[b, t], atol=1e-5, rtol=0)


@pytest.mark.parametrize("time", [1, 6, 17])
def test_choosing_everything_is_dense_attention(time):
    attention, hidden = layer(17), torch.randn(2, time, 20, requires_grad=True)
    outs = [run(module, hidden) for module in (attention, dense(attention))]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    pull = torch.randn_like(outs[0])
    torch.testing.assert_close(
        *(torch.autograd.grad((y * pull).sum(), hidden)[0] for y in outs), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_no_query_sees_what_comes_after_it(way):
    attention, hidden = layer(), torch.randn(1, 15, 20)
    before = run(attention, hidden)
    for t in range(15):
        changed = hidden.clone()
        changed[:, t:] += 3.0 * torch.randn(1, 15 - t, 20)
        torch.testing.assert_close(run(attention, changed)[:, :t], before[:, :t], atol=1e-6, rtol=0)


@torch.no_grad()
def test_packed_documents_attend_as_if_alone(way):
    attention, lengths = layer(), (9, 1, 14, 4)
    hidden = torch.randn(1, sum(lengths), 20)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    alone = torch.cat([run(attention, part) for part in hidden.split(lengths, 1)], 1)
    torch.testing.assert_close(
        run(attention, hidden, documents=documents), alone, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_packed_documents_go_on_behind_a_cache(way):
    """New documents begin in any call; tokens without document ids belong to the last one."""
    attention, hidden = layer(), torch.randn(2, 30, 20)
    documents = torch.arange(30) // torch.tensor([[11], [4]])
    whole = run(attention, hidden, documents=documents)
    past, cache, done, outs = Past(), attention.new_cache(2, 8, hidden.dtype, hidden.device), 0, []
    for count in (9, 1, 1, 6, 1, 2, 10):
        part, begins = (
            slice(done, done + count),
            not torch.equal(documents[:, done - 1], documents[:, done + count - 1]),
        )
        told = {"documents": documents[:, part]} if begins or not done else {}
        outs.append(run(attention, hidden[:, part], past, cache, **told))
        done += count
    torch.testing.assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("left", "right"), [(4, 0), (0, 4), (3, 2)])
@torch.no_grad()
def test_padding_changes_nothing(left, right, way, poisoned):
    attention, hidden = layer(), torch.randn(2, 15, 20)
    padded = torch.cat([torch.randn(2, left, 20), hidden, torch.randn(2, right, 20)], 1)
    present = torch.zeros(2, padded.shape[1], dtype=torch.bool)
    present[:, left : left + 15] = True
    out = run(attention, padded, present=present)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, left : left + 15], run(attention, hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pieces", [[1] * 21, [9] + [1] * 12, [4, 3, 1, 6, 7], [2, 19]])
@torch.no_grad()
def test_decoding_equals_one_call(pieces, way):
    attention, hidden = layer(), torch.randn(2, 21, 20)
    past, cache = Past(), attention.new_cache(2, 8, hidden.dtype, hidden.device)
    outs = [run(attention, part, past, cache) for part in hidden.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(outs, 1), run(attention, hidden), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_cache_forgets_and_reorders(way):
    attention, hidden, index = layer(), torch.randn(3, 20, 20), torch.tensor([2, 0])
    past, cache = Past(), attention.new_cache(3, 8, hidden.dtype, hidden.device)
    run(attention, hidden[:, :12], past, cache)
    run(attention, torch.randn(3, 5, 20), past, cache)
    for kept in (past, cache):
        kept.crop(5)
        kept.select(index)
    outs = [run(attention, part, past, cache) for part in hidden[index, 12:].split(1, 1)]
    torch.testing.assert_close(
        torch.cat(outs, 1), run(attention, hidden[index])[:, 12:], atol=1e-5, rtol=0
    )
    for kept in (past, cache):
        kept.reset()
    outs = [run(attention, part, past, cache) for part in hidden[:1].split([11, 1, 1, 7], 1)]
    torch.testing.assert_close(torch.cat(outs, 1), run(attention, hidden[:1]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_padded_batch_decodes_from_its_cache(way):
    attention, hidden = layer(), torch.randn(2, 21, 20)
    padded = torch.cat([torch.randn(2, 4, 20), hidden], 1)
    present = (torch.arange(25) >= 4).expand(2, -1)
    past, cache = Past(), attention.new_cache(2, 8, hidden.dtype, hidden.device)
    outs = [run(attention, padded[:, :9], past, cache, present=present[:, :9])]
    outs += [run(attention, part, past, cache) for part in padded[:, 9:].split([1, 1, 3, 1, 10], 1)]
    torch.testing.assert_close(torch.cat(outs, 1)[:, 4:], run(attention, hidden), atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_different_lengths_decode_by_the_compiled_call(monkeypatch):
    """Some sequences are shorter than the selection, some longer, and one has no padding."""
    monkeypatch.setattr(attending, "GATHERING", 0.0)
    attention, leads = layer(), (0, 3, 8)
    hidden, calls, own = torch.randn(3, 17, 20), [], twin.attend_best
    present = torch.arange(17) >= torch.tensor(leads)[:, None]
    monkeypatch.setattr(
        attend_best.choice.kernels[0], "function", lambda *x: calls.append("attend_best") or own(*x)
    )
    past, cache = Past(), attention.new_cache(3, 8, hidden.dtype, hidden.device)
    outs = [run(attention, hidden[:, :10], past, cache, present=present[:, :10])]
    assert not calls
    outs += [run(attention, part, past, cache) for part in hidden[:, 10:].split([1, 2, 1, 1, 2], 1)]
    assert calls == ["attend_best"] * 5
    for row, lead in enumerate(leads):
        alone = run(attention, hidden[row : row + 1, lead:])
        torch.testing.assert_close(
            torch.cat(outs, 1)[row : row + 1, lead:], alone, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("before", [0, 9])
@torch.no_grad()
def test_the_last_token_alone_gets_what_it_gets_among_all(before, way):
    attention, hidden = layer(), torch.randn(2, 15, 20)
    past, cache = Past(), attention.new_cache(2, 8, hidden.dtype, hidden.device)
    if before:
        run(attention, hidden[:, :before], past, cache)
    found = run(attention, hidden[:, before:], past, cache, last_only=True)
    torch.testing.assert_close(found, run(attention, hidden)[:, -1:], atol=1e-5, rtol=0)
    following = torch.randn(2, 1, 20)
    expected = run(attention, torch.cat([hidden, following], 1))[:, -1:]
    torch.testing.assert_close(run(attention, following, past, cache), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_runs_of_queries_change_nothing(monkeypatch, way):
    attention, hidden = layer(), torch.randn(2, 23, 20)
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
    attention, time, sizes = layer(), 400, []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    with Largest():
        run(attention, torch.randn(1, time, 20))
    assert max(sizes) < time * time


def test_hidden_keys_get_no_gradient_and_the_others_that_of_dense_attention():
    attention, hidden = layer(4), torch.randn(1, 11, 20, requires_grad=True)
    mask = selected(attention, hidden).seen(slice(0, 11))
    masked = replace(context(1, 11, "cpu", rope=(ROPE, 4)), mask=mask)
    outs = run(attention, hidden), dense(attention)(hidden, masked)[0]
    pull = torch.randn_like(outs[0])
    mine, theirs = (torch.autograd.grad((y * pull).sum(), hidden)[0] for y in outs)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gathered", [False, True])
@torch.no_grad()
def test_bfloat16_stays_near_float32(gathered, monkeypatch):
    monkeypatch.setattr(attending, "GATHERING", 0.0 if gathered else 1e9)
    attention, hidden = layer(20), torch.randn(2, 30, 20)
    expected = run(attention, hidden)
    out = run(attention.bfloat16(), hidden.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 0.05 * expected.norm()


def best_case(batch, time, heads, wide, length, own, narrow, most, ties=False):
    """Builds the last `time` of `length` tokens, with latents and keys in longer buffers."""
    latent, key = (
        torch.randn(batch, length + 3, wide)[:, :length],
        torch.randn(batch, length + 5, narrow)[:, :length],
    )
    if ties:
        key = key.round()
    looking, weights = (
        torch.randn(batch, time, own, narrow).round(),
        torch.randn(batch, time, own).round(),
    )
    return torch.randn(batch, time, heads, wide), latent, looking, key, weights, most, 0.4


CASES = [
    (1, 1, 16, 40, 500, 4, 8, 64),
    (2, 3, 3, 7, 50, 3, 5, 11),
    (1, 2, 1, 1, 20, 1, 1, 18),
    (3, 4, 5, 33, 9, 2, 3, 1),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_twin_gives_the_references_numbers(case, ties, poisoned):
    given = best_case(*case, ties=ties)
    torch.testing.assert_close(
        twin.attend_best(*given), attend_best.reference(*given), atol=5e-6, rtol=0
    )


@pytest.mark.parametrize("lead", [[0, 7], [46, 1], [30, 30]])
def test_the_twin_begins_each_row_where_it_begins(lead, poisoned):
    given, lead = best_case(2, 3, 3, 7, 50, 3, 5, 11), torch.tensor(lead)
    found = twin.attend_best(*given, lead)
    torch.testing.assert_close(found, attend_best.reference(*given, lead), atol=5e-6, rtol=0)
    for row, at in enumerate(lead.tolist()):
        if at > 30:  # fewer keys than may be selected
            continue
        query, latent, looking, key, weights = (x[row : row + 1] for x in given[:5])
        alone = attend_best.reference(
            query, latent[:, at:], looking, key[:, at:], weights, *given[5:]
        )
        torch.testing.assert_close(found[row : row + 1], alone, atol=5e-6, rtol=0)


def test_few_queries_copy_few_latents_at_a_time(monkeypatch):
    """COPIED and SCORES bound 16 tokens as they bound a prompt.

    That is where no kernel runs, in bfloat16 or on a GPU.
    """
    given, asked, own = best_case(2, 16, 4, 20, 90, 4, 8, 30), [], dsa._attend_to
    expected = attend_best.reference(*given)
    monkeypatch.setattr(
        dsa, "_attend_to", lambda *x: asked.append(x[2].numel() // 2 * 20) or own(*x)
    )
    for name, value in (("COPIED", 1200), ("SCORES", 2 * 4 * 90 * 3)):
        monkeypatch.setattr(dsa, name, value)
        torch.testing.assert_close(attend_best.reference(*given), expected, atol=1e-6, rtol=0)
    assert max(asked) <= 1200


def test_the_twin_takes_no_rows():
    assert twin.attend_best(*best_case(0, 2, 4, 20, 90, 4, 8, 30)).shape == (0, 2, 4, 20)


def test_the_twin_on_threads():
    given, threads = best_case(3, 2, 4, 20, 90, 4, 8, 30), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        torch.testing.assert_close(
            twin.attend_best(*given), attend_best.reference(*given), atol=5e-6, rtol=0
        )
    finally:
        torch.set_num_threads(threads)


def test_of_equal_keys_the_twin_chooses_the_last():
    """Zeros of either sign are among the scores."""
    latent = torch.arange(9.0).view(1, 9, 1)
    key, looking, weights = (
        torch.zeros(1, 9, 1),
        torch.ones(1, 1, 2, 1),
        torch.tensor([[[-1.0, 1.0]]]),
    )
    key[0, 2] = -1.0
    given = torch.zeros(1, 1, 1, 1), latent, looking, key, weights, 3, 1.0
    for way in (twin.attend_best, attend_best.reference):
        assert way(*given).item() == pytest.approx(7.0)  # the mean of 6, 7 and 8


def slowly(selection, query, key, scale, warm, present=None, visible=None):
    """Computes the loss and the recall one query at a time, in float64, with a gradient."""
    scores, terms, carried = index_scores_slowly(selection), [], []
    for b in range(query.shape[0]):
        for t in range(query.shape[1]):
            if present is not None and not present[b, t]:
                continue
            keys = [s for s in range(t + 1) if visible is None or visible[b, t, s]]
            order = sorted(keys, key=lambda s, row=scores[b, t]: (row[s].item(), s))
            chosen = sorted(order[-selection.most :])
            logits = scale * torch.einsum("hp,shp->hs", query[b, t].double(), key[b].double())
            over = keys if warm else chosen
            target = logits[:, over].softmax(-1).mean(0).detach()
            terms.append((target * (target.log() - scores[b, t, over].log_softmax(-1))).sum())
            if len(keys) > selection.most:
                carried.append(
                    logits[:, keys]
                    .softmax(-1)[:, [keys.index(s) for s in chosen]]
                    .sum(-1)
                    .mean()
                    .item()
                )
    return torch.stack(terms).mean(), sum(carried) / len(carried) if carried else 1.0


def index_scores_slowly(selection):
    products = torch.einsum(
        "btjp,blp->btjl", selection.query.double(), selection.key.double()
    ).clamp_min(0)
    return torch.einsum("btj,btjl->btl", selection.weights.double(), products)


def leaves(batch=2, time=9, most=4, mask=None, heads=3):
    """Builds a IndexerSelection whose tensors need gradients, and the attention that trains it."""
    query, weights, key = (
        torch.randn(batch, time, 2, 6),
        torch.randn(batch, time, 2),
        torch.randn(batch, time, 6),
    )
    tensors = [x.requires_grad_() for x in (query, weights, key)]
    return (
        IndexerSelection(*tensors, mask, most),
        torch.randn(batch, time, heads, 5),
        torch.randn(batch, time, heads, 5),
    )


class TestIndexerLoss:
    @pytest.mark.parametrize("warm", [True, False])
    @pytest.mark.parametrize("most", [1, 4, 20])
    @pytest.mark.parametrize("queries", [512, 4])
    def test_is_the_divergence_and_its_gradient(self, warm, most, queries, monkeypatch):
        monkeypatch.setattr(dsa, "QUERIES", queries)
        selection, query, key = leaves(most=most)
        found = selection.indexer_loss(query, key, 0.7, warm)
        loss, recall = slowly(selection, query, key, 0.7, warm)
        torch.testing.assert_close(found.loss, loss.float(), rtol=1e-5, atol=1e-6)
        assert found.recall.item() == pytest.approx(recall, abs=1e-5)
        mine, theirs = (
            torch.autograd.grad(3.0 * x, selection[:3], allow_unused=True)
            for x in (found.loss, loss)
        )
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("warm", [True, False])
    def test_documents_and_padding_are_left_out(self, warm, poisoned):
        documents = torch.tensor([[0] * 6 + [1] * 3, [2] * 9])
        present = torch.tensor([[True] * 9, [False] * 2 + [True] * 7])
        mask = context(2, 9, "cpu", documents=documents, present=present).mask
        selection, query, key = leaves(most=3, mask=mask)
        found = selection.indexer_loss(query, key, 0.7, warm, present)
        loss, recall = slowly(selection, query, key, 0.7, warm, present, mask[:, 0])
        torch.testing.assert_close(found.loss, loss.float(), rtol=1e-5, atol=1e-6)
        assert found.recall.item() == pytest.approx(recall, abs=1e-5)
        mine, theirs = (torch.autograd.grad(x, selection[:3]) for x in (found.loss, loss))
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert not mine[0][1, :2].any()
        assert mine[0][1, 4:].any()

    def test_is_float32_under_autocast_too(self):
        selection, query, key = leaves()
        expected = selection.indexer_loss(query, key, 0.7, False)
        with torch.autocast("cpu", torch.bfloat16):
            found = selection.indexer_loss(query, key, 0.7, False)
            assert torch.equal(
                selection.chosen(slice(0, 9))[0],
                IndexerSelection(*selection).chosen(slice(0, 9))[0],
            )
        assert found.loss.dtype == torch.float32
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.recall, expected.recall)

    def test_nobody_present_costs_nothing(self):
        selection, query, key = leaves()
        found = selection.indexer_loss(query, key, 0.7, True, torch.zeros(2, 9, dtype=torch.bool))
        assert found.loss == 0
        assert found.recall == 1
        assert all(not g.any() for g in torch.autograd.grad(found.loss, selection[:3]))

    def test_without_a_gradient_is_the_same_number(self):
        selection, query, key = leaves()
        expected = selection.indexer_loss(query, key, 0.7, False)
        with torch.no_grad():
            assert torch.equal(selection.indexer_loss(query, key, 0.7, False).loss, expected.loss)

    def test_several_are_their_mean(self):
        indexer_losses = [
            selection.indexer_loss(query, key, 0.7, True)
            for selection, query, key in (leaves(), leaves())
        ]
        assert (
            mean_indexer_loss(indexer_losses).loss
            == (indexer_losses[0].loss + indexer_losses[1].loss) / 2
        )
        assert mean_indexer_loss([]) is None


@pytest.mark.parametrize("warm", [True, False])
def test_a_taught_call_attends_as_it_would_and_obeys_once_it_is_warm(warm):
    attention, hidden, indexer_losses = layer(), torch.randn(2, 14, 20), []
    out = run(attention, hidden, indexer_losses=indexer_losses, warm=warm)
    expected = run(dense(attention) if warm else attention, hidden)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)
    assert len(indexer_losses) == 1
    assert indexer_losses[0].loss > 0
    assert 0 < indexer_losses[0].recall < 1


@pytest.mark.parametrize("warm", [True, False])
def test_is_taught_under_autocast(warm):
    attention, hidden, found = layer(), torch.randn(2, 30, 20), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = run(attention, hidden, indexer_losses=found, warm=warm)
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert found[1].loss.dtype == torch.float32
    assert found[1].loss.item() == pytest.approx(found[0].loss.item(), rel=0.1)
    assert found[1].recall.item() == pytest.approx(found[0].recall.item(), abs=0.1)
    (out.sum() + found[1].loss).backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in attention.parameters()
    )


@pytest.mark.parametrize("warm", [True, False])
def test_the_model_learns_neither_from_the_choice_nor_from_the_lesson(warm):
    attention, hidden, indexer_losses = layer(), torch.randn(1, 12, 20, requires_grad=True), []
    run(attention, hidden, indexer_losses=indexer_losses, warm=warm).sum().backward(
        retain_graph=True
    )
    assert all(p.grad is None for p in attention.inner.parameters())
    before = {
        name: p.grad.clone() for name, p in attention.named_parameters() if p.grad is not None
    }
    before["hidden"] = hidden.grad.clone()
    indexer_losses[0].loss.backward()
    assert torch.equal(hidden.grad, before["hidden"])
    for name, p in attention.named_parameters():
        if name.startswith("inner."):
            assert p.grad.isfinite().all()
            assert p.grad.any(), name
        else:
            assert torch.equal(p.grad, before[name]), name


@pytest.mark.parametrize("warm", [True, False])
def test_an_indexer_learns_to_find_what_attention_looks_at(warm):
    attention, hidden = layer(6), torch.randn(8, 32, 20)
    attention.inner = DSA(DSAConfig(heads=8, dim=16, chosen=6), 20, LATENT, ROPE)
    optimiser, found = torch.optim.Adam(attention.inner.parameters(), lr=2e-2), []
    for step in range(60):
        indexer_losses = []
        run(attention, hidden, indexer_losses=indexer_losses, warm=warm or step < 30)
        optimiser.zero_grad()
        indexer_losses[0].loss.backward()
        optimiser.step()
        found.append(indexer_losses[0])
    assert found[29].loss < 0.6 * found[0].loss
    assert found[59].recall > found[0].recall + 0.1
    assert warm or found[59].loss < found[30].loss


@pytest.mark.compiled
@pytest.mark.slow
def test_a_compiled_call_is_one_graph(monkeypatch):
    """Compiles forward and backward, with and without the indexer loss.

    Sequences are packed and padded, too; and there is a prompt, which gathers the selected keys.
    """
    monkeypatch.setattr(attending, "GATHERING", 0.0)
    attention, hidden = layer(), torch.randn(2, 21, 20)
    packed = torch.arange(21) // torch.tensor([[11], [7]])
    present = torch.arange(21) >= torch.tensor([[0], [4]])
    padded = {"present": present}
    cases = [({"documents": packed}, None), (padded, None), (padded | {"documents": packed}, False)]
    for known, warm in cases:

        def call(x, known=known, warm=warm):
            indexer_losses = []
            out = run(attention, x, indexer_losses=indexer_losses, warm=warm, **known)
            return [out, *(value for indexer_loss in indexer_losses for value in indexer_loss)]

        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        results = []
        for function in (compiled, call):
            given = hidden.clone().requires_grad_()
            outs = function(given)
            loss = outs[0].square().sum() + sum(outs[1:2])
            grads = torch.autograd.grad(loss, [given, *attention.parameters()], allow_unused=True)
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


def test_refuses_what_cannot_be():
    for name in ("heads", "dim", "chosen"):
        with pytest.raises(ValueError, match=f"dsa.{name}: got 0, expected at least 1"):
            DSAConfig(**{name: 0})
    for name in ("warmup", "weight"):
        with pytest.raises(ValueError, match=f"dsa.{name}: got -1, expected 0 or more"):
            DSAConfig(**{name: -1})
    with pytest.raises(ValueError, match=r"dsa.dim: got 2, expected at least mla.rope_dim, 4"):
        DSA(DSAConfig(dim=2), 20, LATENT, ROPE)
