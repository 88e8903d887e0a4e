"""Tests gated delta net against the recurrence, flash-linear-attention's, and its own cache."""

import math
from dataclasses import replace

import pytest
import torch
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from torch import Tensor

from rorqual.layers import delta_net
from rorqual.layers.context import context
from rorqual.layers.delta_net import DeltaNet, DeltaNetConfig, Writes, chunked, step
from rorqual.model import LanguageModel
from rorqual.model_config import GQAConfig, ModelConfig

CONFIG = DeltaNetConfig(key_heads=2, value_heads=6, key_dim=5, value_dim=4)


def drawn(time: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor, Writes]:
    """Returns queries and writes of 2 key heads and 6 value heads."""
    query, key = torch.nn.functional.normalize(torch.randn(2, batch, time, 2, 5), dim=-1)
    writes = Writes(
        key,
        torch.randn(batch, time, 6, 4),
        -torch.rand(batch, time, 6),
        torch.rand(batch, time, 6),
        torch.zeros(batch, time),
    )
    return query.to(dtype), Writes(*(x.to(dtype) for x in writes))


@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 200])
def test_chunks_are_the_recurrence(time):
    """The oracle computes one token after another, with a state to begin with."""
    query, writes = drawn(time)
    state = torch.randn(2, 6, 5, 4)
    repeated = (x.repeat_interleave(3, dim=2) for x in (query, writes.key))
    expected, last = naive_recurrent_gated_delta_rule(
        *repeated, writes.value, writes.beta, writes.decay, initial_state=state,
        output_final_state=True,
    )  # fmt: skip
    result = chunked(query, writes, state)
    torch.testing.assert_close(result.out, expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(result.state, last, atol=2e-6, rtol=2e-6)
    assert torch.equal(chunked(None, writes, state).state, result.state)


def test_a_step_is_a_chunk_of_one_token():
    query, writes = drawn(1, torch.float64)
    state = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    out, after = step(query, writes, state)
    result = chunked(query, writes, state)
    torch.testing.assert_close(out, result.out)
    torch.testing.assert_close(after, result.state)


def test_gradients_of_chunks(monkeypatch):
    monkeypatch.setattr(delta_net, "CHUNK", 3)
    query, writes = drawn(7, torch.float64, batch=1)
    writes.begins[0, 4] = 1.0
    leaves = [query, *writes[:4], torch.randn(1, 6, 5, 4, dtype=torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()

    def outputs(query, key, value, decay, beta, state):
        result = chunked(query, Writes(key, value, decay, beta, writes.begins), state)
        return result.out, result.state

    assert torch.autograd.gradcheck(outputs, leaves)


def test_a_document_begins_with_an_empty_state(monkeypatch):
    """Within a chunk, at its edges, and twice in one chunk."""
    monkeypatch.setattr(delta_net, "CHUNK", 8)
    query, writes = drawn(40, torch.float64)
    begins = [0, 3, 5, 16, 23, 24]
    writes.begins[:, begins] = 1.0
    state = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    result = chunked(query, writes, state)
    for start, end in zip(begins, [*begins[1:], 40], strict=True):
        piece = Writes(*(x[:, start:end] for x in writes))
        one = chunked(query[:, start:end], piece, torch.zeros_like(state))
        torch.testing.assert_close(result.out[:, start:end], one.out)
    torch.testing.assert_close(result.state, one.state)


def test_the_state_between_is_that_after_so_many_chunks(monkeypatch):
    monkeypatch.setattr(delta_net, "CHUNK", 8)
    _, writes = drawn(30, torch.float64, batch=5)
    state = torch.randn(5, 6, 5, 4, dtype=torch.float64)
    chunks = torch.tensor([0, 1, 2, 3, 4])
    between = chunked(None, writes, state, chunks).between
    for row, count in enumerate(chunks.tolist()):
        piece = Writes(*(x[row : row + 1, : 8 * count] for x in writes))
        expected = state[row] if not count else chunked(None, piece, state[row : row + 1]).state[0]
        torch.testing.assert_close(between[row], expected)


def test_packed_writes_come_back():
    _, writes = drawn(3)
    for one, other in zip(writes.unpack(writes.pack()), writes, strict=True):
        assert torch.equal(one, other)


def build(dtype: torch.dtype = torch.float64, **fields) -> LanguageModel:
    config = ModelConfig(
        vocab_size=30, dim=12, layers=2, dense_width=10, mla=None,
        gqa=GQAConfig(heads=2, kv_heads=1, head_dim=4),
        delta=replace(CONFIG, layers=(0, 1), **fields),
    )  # fmt: skip
    model = LanguageModel(config, seed=3).to(dtype).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "norm.weight")):
            parameter.normal_(0.0, 0.4)
    return model


@pytest.mark.parametrize("slack", [0, 1, 5, 64, 100])
def test_a_long_sequence_goes_back_as_far_as_the_slack(slack, monkeypatch):
    """Tokens come in all ways, are removed up to the slack, and others follow."""
    monkeypatch.setattr(delta_net, "CHUNK", 16)
    model = build()
    generator = torch.Generator().manual_seed(slack)
    cache = model.new_cache(3)
    cache.reserve_slack(slack)
    ids: list[list[int]] = [[], [], []]
    for number in range(40):
        largest = 130 if number % 7 == 0 else 20 if number % 3 == 0 else 1
        counts = torch.randint(1, largest + 1, (3,), generator=generator).tolist()
        new = torch.randint(30, (3, max(counts)), generator=generator)
        result = model.hidden(new, lengths=counts, cache=cache)[0]
        for row, count in enumerate(counts):
            ids[row] += new[row, :count].tolist()
        if number % 2:
            back = torch.randint(0, slack + 1, (3,), generator=generator).tolist()
            far = [longest - len(row) for longest, row in zip(cache.past.longest, ids, strict=True)]
            back = [
                max(0, min(b, slack - f, len(row)))
                for b, f, row in zip(back, far, ids, strict=True)
            ]
            cache.crop(back)
            ids = [row[: len(row) - b] for row, b in zip(ids, back, strict=True)]
        elif number % 5 == 0:
            for row, count in enumerate(counts):
                expected = model.hidden(torch.tensor([ids[row]]))[0][0, -count:]
                torch.testing.assert_close(result[row, :count], expected)
    new = torch.randint(30, (3, 1), generator=generator)
    result = model.hidden(new, cache=cache)[0]
    for row in range(3):
        expected = model.hidden(torch.tensor([[*ids[row], int(new[row])]]))[0]
        torch.testing.assert_close(result[row, 0], expected[0, -1])


def test_more_than_the_slack_is_refused():
    model = build()
    cache = model.new_cache(1)
    cache.reserve_slack(8)
    model.hidden(torch.randint(30, (1, 50)), cache=cache)
    with pytest.raises(ValueError, match="expected 0 to 8, or all 50"):
        cache.crop(9)
    cache.crop(50)
    ids = torch.randint(30, (1, 5))
    torch.testing.assert_close(model.hidden(ids, cache=cache)[0], model.hidden(ids)[0])


def test_the_cache_does_not_grow():
    model = build()
    sizes = []
    for time in (300, 3000):
        cache = model.new_cache(1)
        model.hidden(torch.randint(30, (1, time)), cache=cache)
        state = cache.layers[0].attention.state
        sizes.append((state.state.numel(), state.writes.buffer.numel()))
    assert sizes[0] == sizes[1] and sizes[0][0] == 6 * 5 * 4


def test_decay_and_step_size():
    """One token writes beta v k^T, and the next one keeps exp(-exp(A) softplus(a + dt)) of it."""
    layer = DeltaNet(CONFIG, 8).double()
    hidden = torch.randn(1, 2, 8, dtype=torch.float64)
    ctx = context(1, 2, "cpu")
    mixed = torch.randn(1, 2, layer.in_proj_qkv.out_features, dtype=torch.float64)
    _, writes = layer.project(hidden, mixed, ctx)
    a = hidden @ layer.in_proj_a.weight.T + layer.dt_bias
    expected = -layer.A_log.exp() * torch.log1p(a.exp())
    torch.testing.assert_close(writes.decay, expected)
    torch.testing.assert_close(writes.beta, (hidden @ layer.in_proj_b.weight.T).sigmoid())
    torch.testing.assert_close(writes.key.norm(dim=-1), torch.ones(1, 2, 2, dtype=torch.float64),
                               atol=1e-3, rtol=0)  # fmt: skip


def test_initial_values():
    model = LanguageModel(ModelConfig(mla=None, gqa=GQAConfig(), delta=CONFIG), seed=1)
    layer = model.blocks[0].attention
    assert isinstance(layer, DeltaNet)
    assert layer.dt_bias.eq(1).all() and layer.norm.weight.eq(1).all()
    decay = layer.A_log.exp()
    assert decay.min() > 0.0 and decay.max() <= 16.001 and decay.std() > 0.5
    assert layer.conv.abs().max() <= 0.5 and layer.conv.std() > 0.2
    assert layer.in_proj_qkv.weight.std().item() == pytest.approx(model.config.init_std, rel=0.1)


def test_bfloat16_and_autocast_stay_close():
    model = build(torch.float32)
    ids = torch.randint(30, (2, 90))
    expected = model.hidden(ids)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.hidden(ids)[0]
    low = model.to(torch.bfloat16).hidden(ids)[0]
    for result in (mixed, low):
        error = (result.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert result.isfinite().all() and error.median() < 0.05


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"value_heads": 3}, "value_heads: got 3, expected a multiple of 2"),
        ({"kernel": 0}, "kernel: got 0, expected at least 1"),
        ({"layers": (1, 1)}, r"layers: got \(1, 1\), expected different"),
    ],
)
def test_impossible_sizes_are_refused(fields, reason):
    with pytest.raises(ValueError, match=f"delta.{reason}"):
        replace(CONFIG, **fields)


def test_which_blocks_have_it():
    config = ModelConfig(layers=9, mla=None, gqa=GQAConfig(), delta=CONFIG)
    assert [config.has_delta(index) for index in range(9)] == [True, True, True, False] * 2 + [True]
    assert not config.has_delta(9), "MTP's blocks have attention"
    chosen_by_name = replace(config, delta=replace(CONFIG, layers=(2, 5)))
    assert [i for i in range(9) if chosen_by_name.has_delta(i)] == [2, 5]
    with pytest.raises(ValueError, match=r"delta.layers: got \[9\], expected block indices 0..8"):
        replace(config, delta=replace(CONFIG, layers=(9,)))
    assert math.prod((2, 5)) * 2 + 6 * 4 == CONFIG.conv_width
