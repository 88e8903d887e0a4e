"""Tests what MLA and GQA compute: against transformers, a naive loop, and each other's forms.

What every attention must do (causality, documents, padding, caches) is in test_attention_kinds.py.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2RotaryEmbedding,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from rorqual.layers.attention import GQA, MLA, GQAConfig, MLAConfig
from rorqual.layers.cache import BlockCache, Past
from rorqual.layers.context import context
from rorqual.layers.dsa import DSA, DSAConfig
from rorqual.layers.moba import MoBA, MoBAConfig
from rorqual.layers.norm import RMSNorm
from rorqual.layers.nsa import NSA, NSAConfig
from rorqual.layers.rope import RopeConfig, YarnConfig

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = {"heads": 4, "kv_lora_rank": 16, "nope_dim": 12, "rope_dim": 8, "value_dim": 10}
YARN = YarnConfig(factor=4.0, original_length=64)
RELEASES = {
    "deepseek_v3_tiny": (
        MLAConfig(q_lora_rank=20, **SIZES),
        RopeConfig(yarn=YARN),
        DeepseekV3Attention,
        48,
    ),
    "deepseek_v2_lite_tiny": (MLAConfig(**SIZES), RopeConfig(), DeepseekV2Attention, 48),
}
VARIANTS = {
    "mla": (MLA, MLAConfig(q_lora_rank=20, **SIZES)),
    "gqa": (GQA, GQAConfig(heads=6, kv_heads=2, head_dim=8, value_dim=5)),
    "window": (GQA, GQAConfig(heads=4, kv_heads=1, head_dim=6, window=3)),
    "sinks": (GQA, GQAConfig(heads=4, kv_heads=2, head_dim=6, sinks=True)),
    "window and sinks": (
        GQA,
        GQAConfig(heads=4, kv_heads=2, head_dim=6, window=4, sinks=True, value_dim=9),
    ),
    "normed": (GQA, GQAConfig(heads=4, kv_heads=4, head_dim=6, qk_norm=True)),
}


def build(name: str, dim: int = 24, rope: RopeConfig | None = None) -> nn.Module:
    kind, config = VARIANTS[name]
    layer = kind(config, dim, rope or RopeConfig(base=50.0, yarn=YARN))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    return layer


def run(layer, hidden, past=None, cache=None, rope=None, **expected):
    rope = rope or RopeConfig(base=50.0, yarn=YARN), layer.rope_dim
    cached = BlockCache(cache) if cache is not None else None
    return layer(
        hidden,
        context(*hidden.shape[:2], hidden.device, past=past, rope=rope, cache=cached, **expected),
    )[0]


def in_pieces(layer, hidden, pieces):
    """Returns the layer's output when the tokens come in calls of these lengths."""
    past = Past(2)
    cache = layer.new_cache(len(hidden), 8, hidden.dtype, hidden.device)
    return torch.cat([run(layer, piece, past, cache) for piece in hidden.split(pieces, 1)], 1)


@pytest.mark.parametrize("name", RELEASES)
def test_mla_agrees_with_transformers(name):
    config, rope, oracle, dim = RELEASES[name]
    theirs_config = AutoConfig.from_pretrained(GOLDEN / name, attn_implementation="eager")
    weights = load_file(GOLDEN / name / "model.safetensors")
    prefix = "model.layers.1.self_attn."
    weights = {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }
    ours = MLA(config, dim, rope)
    theirs = oracle(theirs_config, 0)
    ours.load_state_dict(weights)
    theirs.load_state_dict(weights)
    hidden = torch.randn(2, 61, dim, requires_grad=True)
    where = context(2, 61, "cpu")
    rotary = (
        DeepseekV3RotaryEmbedding if oracle is DeepseekV3Attention else DeepseekV2RotaryEmbedding
    )
    embeddings = rotary(theirs_config)(hidden, where.positions)
    hides = torch.full((61, 61), -torch.inf).triu(1)[None, None]
    expected = theirs(hidden, position_embeddings=embeddings, attention_mask=hides)[0]
    out = run(ours, hidden, rope=rope)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    toward = torch.randn_like(out)
    mine = torch.autograd.grad(out, [hidden, *map(ours.get_parameter, weights)], toward)
    wanted = torch.autograd.grad(expected, [hidden, *map(theirs.get_parameter, weights)], toward)
    for key, a, b in zip(("hidden", *weights), mine, wanted, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item(), msg=lambda m, key=key: key + m
        )


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("name", RELEASES)
@torch.no_grad()
def test_mla_absorbed_equals_expanded(name, form, monkeypatch):
    config, rope, _, dim = RELEASES[name]
    layer = MLA(config, dim, rope)
    hidden = torch.randn(2, 150, dim)
    used = []
    for each in ("absorbed", "expanded"):
        plain = getattr(layer, each)
        monkeypatch.setattr(
            layer, each, lambda *a, each=each, plain=plain: used.append(each) or plain(*a)
        )
    monkeypatch.setattr(layer, "absorbs", lambda ctx: ctx.past > 0 and form == "absorbed")
    past = Past(2)
    cache = layer.new_cache(2, 150, hidden.dtype, hidden.device)
    outs = [
        run(layer, piece, past=past, cache=cache, rope=rope)
        for piece in hidden.split([100, 1, 49], 1)
    ]
    assert used == ["expanded"] + 2 * [form]
    whole = run(layer, hidden, rope=rope)
    torch.testing.assert_close(
        torch.cat(outs, 1), whole, rtol=1e-5, atol=1e-5 * whole.abs().max().item()
    )


def test_mla_chooses_the_form_that_multiplies_less():
    v3 = MLA(
        MLAConfig(heads=1, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
        8,
        RopeConfig(),
    )

    def absorbs(cached: int, time: int) -> bool:
        past = Past(1)
        past.append([cached])
        return v3.absorbs(context(1, time, "cpu", past=past))

    assert [absorbs(9, time) for time in (1, 170, 171, 4096)] == [True, True, False, False]
    assert not absorbs(0, 1)


@torch.no_grad()
def test_mla_caches_the_latent_and_the_rotary_key_only():
    layer = MLA(
        MLAConfig(heads=2, kv_lora_rank=512, nope_dim=8, rope_dim=64, value_dim=8), 16, RopeConfig()
    )
    past = Past(3)
    cache = layer.new_cache(3, 20, torch.float32, torch.device("cpu"))
    run(layer, torch.randn(3, 5, 16), past=past, cache=cache)
    assert cache.latent.buffer.shape == (3, 20, 576)


@torch.no_grad()
def test_mla_decodes_through_what_stands_in_for_a_projection():
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear):
            super().__init__()
            self.base = base
            self.weight = base.weight
            self.low, self.high = (
                torch.randn(2, base.in_features),
                torch.randn(base.out_features, 2),
            )

        def forward(self, x):
            return self.base(x) + x @ self.low.T @ self.high.T

    layer = build("mla")
    hidden = torch.randn(2, 9, 24)
    layer.kv_b_proj = Adapted(layer.kv_b_proj)
    torch.testing.assert_close(
        in_pieces(layer, hidden, [4, 1, 4]), run(layer, hidden), rtol=1e-4, atol=1e-4
    )


def slowly(query, key, value, scale, visible, sink=None):
    """Computes attention of one sequence, one query and head at a time."""
    out = torch.zeros(query.shape[0], query.shape[1], value.shape[-1], dtype=query.dtype)
    for t in range(query.shape[0]):
        for h in range(query.shape[1]):
            group = h * key.shape[1] // query.shape[1]
            logits = torch.stack(
                [scale * query[t, h] @ key[s, group] for s in range(len(key)) if visible[t, s]]
            )
            values = torch.stack([value[s, group] for s in range(len(key)) if visible[t, s]])
            if sink is not None:
                logits = torch.cat([logits, sink[h, None]])
                values = torch.cat([values, torch.zeros_like(values[:1])])
            out[t, h] = logits.softmax(0) @ values
    return out


@pytest.mark.parametrize("name", ["gqa", "window", "sinks", "window and sinks", "normed"])
def test_gqa_equals_one_query_at_a_time(name):
    layer = build(name).double()
    c = layer.config
    hidden = torch.randn(1, 11, 24, dtype=torch.float64, requires_grad=True)
    where = context(1, 11, "cpu", rope=(RopeConfig(base=50.0, yarn=YARN), c.head_dim))
    projected = layer.project(hidden, where)
    gap = torch.arange(11)[:, None] - torch.arange(11)
    visible = (gap >= 0) & (gap < (c.window or 99))
    expected = layer.o_proj(
        slowly(
            projected.query[0],
            projected.key[0],
            projected.value[0],
            layer.scale,
            visible,
            layer.sink_bias,
        ).flatten(1)
    )
    out = layer(hidden, where).out[0]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    toward = torch.randn_like(out)
    sources = (hidden, *layer.parameters())
    pairs = zip(
        torch.autograd.grad(out, sources, toward),
        torch.autograd.grad(expected, sources, toward),
        strict=True,
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_a_large_sink_takes_the_attention():
    layer = build("sinks")
    hidden = torch.randn(1, 6, 24)
    layer.sink_bias.fill_(60.0)
    assert run(layer, hidden).abs().max() < 1e-6
    without = GQA(GQAConfig(heads=4, kv_heads=2, head_dim=6), 24, RopeConfig(base=50.0, yarn=YARN))
    without.load_state_dict(layer.state_dict(), strict=False)
    layer.sink_bias.fill_(-60.0)
    torch.testing.assert_close(run(layer, hidden), run(without, hidden))


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: MLAConfig(rope_dim=7), "rope_dim: got 7"),
        (lambda: MLAConfig(heads=0), "heads: got 0"),
        (lambda: MLAConfig(q_lora_rank=0), "q_lora_rank: got 0"),
        (lambda: GQAConfig(heads=4, kv_heads=3), "kv_heads: got 3"),
        (lambda: GQAConfig(head_dim=5), "head_dim: got 5"),
        (lambda: GQAConfig(window=0), "window: got 0"),
        (
            lambda: MoBA(MoBAConfig(), GQAConfig(window=4), 8, RopeConfig()),
            "one or the other",
        ),
        (
            lambda: NSA(NSAConfig(), GQAConfig(sinks=True), 8, RopeConfig()),
            "one or the other",
        ),
    ],
)
def test_impossible_sizes_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


class Net(nn.Module):
    """Two layers of one kind of attention that learn to repeat.

    The second half of each sequence is its first half again.
    """

    def __init__(self, kind: str):
        super().__init__()
        dim = 32
        rope = RopeConfig(base=200.0)
        gqa = GQAConfig(heads=4, kv_heads=2, head_dim=8)
        mla = MLAConfig(
            heads=4, q_lora_rank=16, kv_lora_rank=12, nope_dim=8, rope_dim=4, value_dim=8
        )
        make = {
            "nsa": lambda **tile: NSA(NSAConfig(**SPARSE, **tile), gqa, dim, rope),
            "moba": lambda **tile: MoBA(MoBAConfig(block=4, top_k=4, **tile), gqa, dim, rope),
            "dsa": lambda: DSA(DSAConfig(heads=2, dim=8, top_k=20), mla, dim, rope),
        }[kind.split()[0]]
        expected = {"choice": "tile"} if kind.endswith("tile") else {}
        self.rope, self.embed = rope, nn.Embedding(24, dim)
        self.layers = nn.ModuleList(make(**expected) for _ in range(2))
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(3))

    def forward(self, ids, past=None, caches=(None, None), indexer_losses=None, **expected):
        indexer_warmup = None if indexer_losses is None else False
        rope = (self.rope, self.layers[0].rope_dim)
        ctx = context(
            *ids.shape,
            ids.device,
            past=past,
            rope=rope,
            indexer_warmup=indexer_warmup,
            **expected,
        )
        hidden = self.embed(ids)
        for attention, norm, cache in zip(self.layers, self.norms, caches, strict=False):
            attended = attention(
                norm(hidden), ctx.for_block(None if cache is None else BlockCache(cache))
            )
            hidden = hidden + attended.out
            if attended.indexer_loss is not None:
                indexer_losses.append(attended.indexer_loss)
        return self.norms[2](hidden) @ self.embed.weight.T


SPARSE = {"block": 8, "stride": 4, "select_block": 4, "top_k": 4, "window": 6}


@pytest.mark.parametrize("kind", ["nsa", "nsa tile", "moba", "moba tile", "dsa"])
def test_a_trained_net_decodes_what_one_call_gives(kind):
    """Trained weights attend sharply to few keys.

    Small errors of one layer change the selections of the next.
    """
    net = Net(kind)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    results = []
    for _ in range(30):
        half = torch.randint(24, (8, 24))
        ids = torch.cat([half, half], 1)
        indexer_losses = []
        loss = nn.functional.cross_entropy(
            net(ids, indexer_losses=indexer_losses)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        results.append(loss.item())
        optimiser.zero_grad()
        (loss + sum(indexer_loss.loss for indexer_loss in indexer_losses)).backward()
        optimiser.step()
    assert results[-1] < 0.98 * results[0]
    half = torch.randint(24, (3, 35))
    ids = torch.cat([half, half], 1)
    with torch.no_grad():
        expected = net(ids)
        for lengths in ([30, 30, 30], [30, 25, 13]):
            past = Past(3)
            caches = [layer.new_cache(3, 70, torch.float32, ids.device) for layer in net.layers]
            outs = net(ids[:, :30], past, caches, lengths=lengths)
            results = [[row[:length]] for row, length in zip(outs, lengths, strict=True)]
            for time in [1] * 30 + [3, 2, 1, 4]:
                rows = zip(ids, past.lengths, strict=True)
                piece = torch.stack([row[start : start + time] for row, start in rows])
                for row, out in zip(results, net(piece, past, caches), strict=True):
                    row.append(out)
            for row, length, whole in zip(results, lengths, expected, strict=True):
                torch.testing.assert_close(torch.cat(row), whole[: length + 40], atol=1e-4, rtol=0)
