import pytest
import torch
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer

from rorqual.layers import dsa
from rorqual.layers.attention import MLA, MLAConfig
from rorqual.layers.basics import RopeConfig, layout, rope_tables
from rorqual.layers.cache import Past
from rorqual.layers.dsa import DSA, DSAConfig, attention_target, index_scores, indexer_loss

ROPE = RopeConfig(base=50.0)
LATENT = MLAConfig(heads=4, q_lora_rank=12, kv_lora_rank=10, nope_dim=6, rope_dim=4, value_dim=7)


def stirred(module, std=0.4):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return module


def layer(chosen=5, mla=LATENT):
    return stirred(MLA(mla, 20, ROPE, DSA(DSAConfig(heads=3, dim=8, chosen=chosen), 20, mla, ROPE)))


def run(attention, hidden, past=None, cache=None, **known):
    where = layout(*hidden.shape[:2], hidden.device, past=past, **known)
    return attention(hidden, where, *rope_tables(ROPE, attention.rope_dim, where.positions), cache)


def dense(attention):
    """The same attention without an indexer."""
    plain = MLA(attention.config, 20, ROPE)
    plain.load_state_dict({n: p for n, p in attention.state_dict().items() if not n.startswith("inner.")})
    return plain


@pytest.mark.parametrize(("batch", "time", "chosen"), [(2, 17, 5), (1, 40, 11), (2, 9, 8)])
def test_chooses_what_transformers_chooses(batch, time, chosen):
    config = DeepseekV32Config(
        hidden_size=20, index_n_heads=3, index_head_dim=8, index_topk=chosen, q_lora_rank=12, qk_rope_head_dim=4
    )
    reference, ours = (
        stirred(DeepseekV32Indexer(config, 0)),
        DSA(DSAConfig(heads=3, dim=8, chosen=chosen), 20, LATENT, ROPE),
    )
    ours.load_state_dict(reference.state_dict())
    hidden, latent, where = torch.randn(batch, time, 20), torch.randn(batch, time, 12), layout(batch, time, "cpu")
    cos, sin = rope_tables(ROPE, 4, where.positions)
    causal = where.visible()[0, 0]
    theirs = reference(
        hidden,
        latent,
        (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)),
        causal.expand(batch, -1, -1),
        where.positions,
    )
    expected = torch.zeros(batch, time, time, dtype=torch.bool).scatter(-1, theirs.long(), True) & causal
    got, scores = ours.allowed(hidden, latent, where, cos, sin)[:, 0], ours.scores(hidden, latent, cos, sin)
    differ = got ^ expected  # only among keys that score alike, which their topk leaves open
    assert torch.equal(got.sum(-1), expected.sum(-1))
    assert (scores[differ] == 0).all()
    assert differ.float().mean() < 0.2


def test_scores_are_their_equation():
    q, k, w = torch.randn(1, 5, 3, 8), torch.randn(1, 7, 8), torch.randn(1, 5, 3)
    got = index_scores(q, k, w)
    for t in range(5):
        for s in range(7):
            expected = sum(w[0, t, j] * (q[0, t, j] @ k[0, s]).clamp_min(0) for j in range(3))
            assert got[0, t, s].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    "mla", [LATENT, MLAConfig(heads=2, kv_lora_rank=8, nope_dim=4, rope_dim=8, value_dim=4)], ids=str
)
def test_attends_to_the_chosen_keys_alone(mla):
    attention, hidden = layer(4, mla), torch.randn(2, 13, 20)
    where = layout(2, 13, "cpu")
    cos, sin = rope_tables(ROPE, mla.rope_dim, where.positions)
    latent = hidden if mla.q_lora_rank is None else attention.q_a_layernorm(attention.q_a_proj(hidden))
    q, k, w = attention.inner.project(hidden, latent, cos, sin)
    scores, out = index_scores(q, k, w), run(attention, hidden)
    plain = dense(attention)
    for b in range(2):
        for t in range(13):
            kept = sorted(range(t + 1), key=lambda s, row=scores[b, t]: (row[s].item(), s))[-4:]
            mask = torch.zeros(2, 1, 13, 13, dtype=torch.bool)
            mask[..., kept] = True
            free = type(where)(**{n: getattr(where, n) for n in where.__slots__} | {"mask": mask})
            expected = plain(hidden, free, cos, sin)
            torch.testing.assert_close(out[b, t], expected[b, t], atol=1e-5, rtol=0)


@pytest.mark.parametrize("time", [1, 6, 17])
def test_choosing_everything_is_dense_attention(time):
    attention, hidden = layer(17), torch.randn(2, time, 20, requires_grad=True)
    outs = [run(module, hidden) for module in (attention, dense(attention))]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    pull = torch.randn_like(outs[0])
    torch.testing.assert_close(*(torch.autograd.grad((y * pull).sum(), hidden)[0] for y in outs), atol=1e-5, rtol=0)


def test_no_query_sees_what_comes_after_it():
    attention, hidden = layer(), torch.randn(1, 15, 20)
    before = run(attention, hidden)
    for t in range(15):
        changed = hidden.clone()
        changed[:, t:] += 3.0 * torch.randn(1, 15 - t, 20)
        torch.testing.assert_close(run(attention, changed)[:, :t], before[:, :t], atol=1e-6, rtol=0)


def test_packed_documents_attend_as_if_alone():
    attention, lengths = layer(), (9, 1, 14, 4)
    hidden = torch.randn(1, sum(lengths), 20)
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    alone = torch.cat([run(attention, part) for part in hidden.split(lengths, 1)], 1)
    torch.testing.assert_close(run(attention, hidden, documents=documents), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("left", "right"), [(4, 0), (0, 4), (3, 2)])
def test_padding_changes_nothing(left, right):
    attention, hidden = layer(), torch.randn(2, 15, 20)
    padded = torch.cat([torch.randn(2, left, 20), hidden, torch.randn(2, right, 20)], 1)
    present = torch.zeros(2, padded.shape[1], dtype=torch.bool)
    present[:, left : left + 15] = True
    out = run(attention, padded, present=present)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, left : left + 15], run(attention, hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pieces", [[1] * 21, [9] + [1] * 12, [4, 3, 1, 6, 7]])
def test_decoding_equals_one_call(pieces):
    attention, hidden = layer(), torch.randn(2, 21, 20)
    past, cache = Past(), attention.new_cache(2, 8, hidden.dtype, hidden.device)
    outs = [run(attention, part, past, cache) for part in hidden.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(outs, 1), run(attention, hidden), atol=1e-5, rtol=0)


def test_the_cache_forgets_and_reorders():
    attention, hidden, index = layer(), torch.randn(3, 20, 20), torch.tensor([2, 0])
    past, cache = Past(), attention.new_cache(3, 8, hidden.dtype, hidden.device)
    run(attention, hidden[:, :12], past, cache)
    run(attention, torch.randn(3, 5, 20), past, cache)
    for kept in (past, cache):
        kept.crop(5)
        kept.select(index)
    outs = [run(attention, part, past, cache) for part in hidden[index, 12:].split(1, 1)]
    torch.testing.assert_close(torch.cat(outs, 1), run(attention, hidden[index])[:, 12:], atol=1e-5, rtol=0)


def test_runs_of_queries_change_nothing(monkeypatch):
    attention, hidden = layer(), torch.randn(2, 23, 20)
    whole = run(attention, hidden)
    monkeypatch.setattr(dsa, "QUERIES", 5)
    torch.testing.assert_close(run(attention, hidden), whole, atol=1e-6, rtol=0)


def test_the_model_does_not_learn_from_the_choice_nor_from_the_indexers_loss():
    attention, hidden = layer(), torch.randn(1, 12, 20, requires_grad=True)
    run(attention, hidden).sum().backward()
    assert all(p.grad is None for p in attention.inner.parameters())
    hidden.grad = None
    where = layout(1, 12, "cpu")
    scores = attention.inner.scores(
        hidden, attention.q_a_layernorm(attention.q_a_proj(hidden)), *rope_tables(ROPE, 4, where.positions)
    )
    indexer_loss(scores, torch.rand(1, 12, 12), where.visible()[:, 0]).backward()
    assert hidden.grad is None
    assert all(p.grad.isfinite().all() for p in attention.inner.parameters())
    assert attention.inner.wk.weight.grad.abs().max() > 0


class TestLoss:
    def test_is_the_divergence(self):
        scores, target = torch.randn(2, 3, 7), torch.rand(2, 3, 7).softmax(-1)
        everything = torch.ones(2, 3, 7, dtype=torch.bool)
        expected = (target * (target.log() - scores.log_softmax(-1))).sum(-1).mean()
        torch.testing.assert_close(indexer_loss(scores, target, everything), expected)

    def test_over_the_chosen_both_sides_are_normalised_anew(self):
        scores, target = torch.randn(1, 2, 7), torch.rand(1, 2, 7).softmax(-1)
        seen = torch.zeros(1, 2, 7, dtype=torch.bool)
        seen[..., [1, 4, 5]] = True
        inside = target[..., [1, 4, 5]] / target[..., [1, 4, 5]].sum(-1, keepdim=True)
        expected = (inside * (inside.log() - scores[..., [1, 4, 5]].log_softmax(-1))).sum(-1).mean()
        torch.testing.assert_close(indexer_loss(scores, target, seen), expected)

    def test_is_zero_at_its_target_and_for_queries_that_see_nothing(self):
        target = torch.rand(1, 3, 7).softmax(-1)
        assert indexer_loss(target.log(), target, torch.ones(1, 3, 7, dtype=torch.bool)).abs() < 1e-6
        scores = torch.randn(1, 3, 7, requires_grad=True)
        loss = indexer_loss(scores, target, torch.zeros(1, 3, 7, dtype=torch.bool))
        loss.backward()
        assert loss == 0
        assert (scores.grad == 0).all()

    def test_target_is_the_mean_over_heads_of_the_probabilities(self):
        q, k, visible = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4), layout(2, 5, "cpu").visible()
        weights = (torch.einsum("bthp,blhp->bhtl", q, k) * 0.3).masked_fill(~visible, -torch.inf).softmax(-1)
        torch.testing.assert_close(attention_target(q, k, visible, 0.3), weights.mean(1))

    def test_an_indexer_learns_to_find_what_attention_looks_at(self):
        hidden, where = torch.randn(4, 24, 20), layout(4, 24, "cpu")
        tables = rope_tables(ROPE, 4, where.positions)
        q, k = torch.randn(20, 12), torch.randn(20, 12)
        target = attention_target(
            (hidden @ q).unflatten(-1, (2, 6)), (hidden @ k).unflatten(-1, (2, 6)), where.visible(), 0.1
        )
        indexer = DSA(DSAConfig(heads=8, dim=16, chosen=6), 20, MLAConfig(rope_dim=4), ROPE)
        optimiser, losses = torch.optim.Adam(indexer.parameters(), lr=1e-2), []
        for _ in range(80):
            losses.append(indexer_loss(indexer.scores(hidden, hidden, *tables), target, where.visible()[:, 0]))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
        assert losses[-1] < 0.5 * losses[0]


def test_refuses_what_cannot_be():
    for name in ("heads", "dim", "chosen"):
        with pytest.raises(ValueError, match=f"dsa.{name}: got 0, expected at least 1"):
            DSAConfig(**{name: 0})
    with pytest.raises(ValueError, match=r"dsa.dim: got 2, expected at least mla.rope_dim, 4"):
        DSA(DSAConfig(dim=2), 20, LATENT, ROPE)
