"""Tests what MoBA computes, and how it switches between full and sparse attention.

What every attention must do (causality, documents, padding, caches) is in test_attention_kinds.py.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rorqual.layers import moba, sparse, tiles
from rorqual.layers.attention import GQA, GQAConfig, Projected
from rorqual.layers.cache import BlockCache, Past
from rorqual.layers.context import context
from rorqual.layers.moba import MoBA, MoBAConfig, switch
from rorqual.layers.rope import RopeConfig

ROPE = RopeConfig(base=50.0)
CHOICES = pytest.mark.parametrize("choice", ["token", "tile"])


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Makes tiles small, so that a few tokens fill several.

    The size 6 divides some of the blocks and is divided by others.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module in (sparse, tiles):
            patch.setattr(module, "TILE", 6)
        yield


def brute(query, key, value, scale, block, top_k, choice="token"):
    """Computes the definition one query head at a time.

    One document fills the sequence.
    """
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for b in range(query.shape[0]):
        for t in range(query.shape[1]):
            for h in range(query.shape[2]):
                g = h * key.shape[2] // query.shape[2]
                chooser = t // tiles.TILE * tiles.TILE if choice == "tile" else t
                ours = chooser // block
                asking = query[b, chooser, h]
                score = {
                    i: (asking @ key[b, i * block : (i + 1) * block, g].mean(0)).float().item()
                    for i in range(ours)
                }
                cached = sorted(score, key=lambda i, score=score: (score[i], i))[::-1][: top_k - 1]
                cached += range(ours, t // block + 1)
                columns = [s for i in cached for s in range(i * block, min((i + 1) * block, t + 1))]
                weights = (key[b, columns, g] @ query[b, t, h] * scale).softmax(0)
                out[b, t, h] = weights @ value[b, columns, g]
    return out


def tensors(batch, time, heads=4, groups=2, width=6, value_width=6, **kind):
    shapes = (time, heads, width), (time, groups, width), (time, groups, value_width)
    return [torch.randn(batch, *shape, requires_grad=True, **kind) for shape in shapes]


def moba_of(q, k, left=None, **options):
    """Returns MoBA for these heads; `call` gives it queries, keys and values."""
    gqa = GQAConfig(heads=q.shape[2], kv_heads=k.shape[2], head_dim=q.shape[3])
    return MoBA(MoBAConfig(**options), gqa, 20, ROPE, left)


def call(attention, q, k, v, cache=None, history=None, **expected):
    """Returns what the attention makes of given queries, keys and values, at a scale of 0.4."""
    attention.project = lambda hidden, ctx: Projected(q, k, v, None)
    attention.o_proj = Taken()
    attention.scale = 0.4
    cached = None if cache is None else BlockCache(cache)
    ctx = context(*q.shape[:2], q.device, past=history, cache=cached, **expected)
    attention(torch.zeros(*q.shape[:2], 20), ctx)
    return attention.o_proj.taken.unflatten(-1, (q.shape[2], -1))


class Taken(torch.nn.Module):
    """Stands for the output projection and records what it is given."""

    def forward(self, x):
        self.taken = x
        return x.new_zeros(*x.shape[:-1], 20)


def layer(block=4, top_k=2, decode="sparse", kv_heads=2, choice="token"):
    config = MoBAConfig(block=block, top_k=top_k, decode=decode, choice=choice)
    attention = MoBA(config, GQAConfig(heads=4, kv_heads=kv_heads, head_dim=6), 20, ROPE)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention


def run(attention, hidden, past=None, cache=None, **expected):
    cached = BlockCache(cache) if cache is not None else None
    expected |= {"past": past, "rope": (ROPE, attention.rope_dim), "cache": cached}
    return attention(hidden, context(*hidden.shape[:2], hidden.device, **expected)).out


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 2),
    st.integers(1, 19),
    st.integers(1, 7),
    st.integers(1, 5),
    st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3), (16, 1)]),
    st.sampled_from(["token", "tile"]),
)
def test_is_its_definition(batch, time, block, top_k, heads, choice):
    q, k, v = tensors(batch, time, *heads, value_width=5, dtype=torch.float64)
    inner = moba_of(q, k, block=block, top_k=top_k, choice=choice)
    ours = call(inner, q, k, v)
    expected = brute(q, k, v, 0.4, block, top_k, choice)
    torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
    pull = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * pull).sum(), (q, k, v)) for y in (ours, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("time", [1, 3, 4, 17, 32])
def test_choosing_everything_is_full_attention(time):
    q, k, v = tensors(2, time)
    full = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, scale=0.4, enable_gqa=True
    ).transpose(1, 2)
    pull = torch.randn_like(full)
    grads = torch.autograd.grad((full * pull).sum(), (q, k, v))
    swapped = moba_of(q, k, block=4, top_k=1)
    swapped.full = True
    every = (
        moba_of(q, k, block=4, top_k=8),
        moba_of(q, k, block=64, top_k=1),
        moba_of(q, k, block=4, top_k=8, choice="tile"),
    )
    for inner in (*every, swapped):
        ours = call(inner, q, k, v)
        torch.testing.assert_close(ours, full, atol=1e-5, rtol=0)
        for a, b in zip(torch.autograd.grad((ours * pull).sum(), (q, k, v)), grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_one_block_is_block_diagonal():
    q, k, v = tensors(1, 14)
    ours = call(moba_of(q, k, block=4, top_k=1), q, k, v)
    pieces = [
        call(moba_of(q, k, block=4, top_k=1), *(x[:, s : s + 4] for x in (q, k, v)))
        for s in range(0, 14, 4)
    ]
    torch.testing.assert_close(ours, torch.cat(pieces, 1), atol=1e-6, rtol=0)


def test_the_choice_and_the_means_carry_no_gradient():
    q, k, v = tensors(1, 12, 1, 1)
    call(moba_of(q, k, block=4, top_k=2), q, k, v)[:, -1].sum().backward()
    touched = k.grad[0].flatten(1).abs().sum(1) > 0
    # The own block and one other are read; of the third only the mean is used.
    assert touched.view(3, 4).all(1).tolist().count(True) == 2


def test_decoding_reads_the_selected_blocks_only():
    q, k, v = (x.detach() for x in tensors(1, 41, 1, 1))
    inner = moba_of(q, k, block=4, top_k=2)
    history = Past(1)
    cache = inner.new_cache(1, 64, q.dtype, q.device)
    call(inner, q[:, :40], k[:, :40], v[:, :40], cache=cache, history=history)
    means = k[:, :40].unflatten(1, (10, 4)).mean(2)
    scores = moba.block_scores(q[:, 40:], means)
    index = sparse.best_blocks(scores, torch.tensor([[10]]), torch.tensor([[0]]), 2)
    spoiled = torch.full_like(v, torch.nan)
    for i in index.flatten().tolist():
        spoiled[:, 4 * i : 4 * i + 4] = v[:, 4 * i : 4 * i + 4]
    k_spoiled = torch.where(spoiled.isnan(), torch.nan, k)
    out = call(inner, q[:, 40:], k_spoiled, spoiled, cache=cache, history=history)
    torch.testing.assert_close(out, brute(q, k, v, 0.4, 4, 2)[:, 40:], atol=1e-5, rtol=0)


@CHOICES
def test_the_last_of_a_prompt_is_no_single_new_token(choice):
    """The last token of a prompt attends as the others of its call, even if only it is needed.

    decode="full" begins after the prompt.
    """
    attention = layer(decode="full", choice=choice)
    hidden = torch.randn(2, 30, 20)
    expected = run(attention, hidden)[:, -1:]
    for cache in (None, attention.new_cache(2, 8, hidden.dtype, hidden.device)):
        result = run(attention, hidden, None, cache, last_only=True)
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


@CHOICES
@pytest.mark.parametrize("prompts", [[23, 23], [15, 23]], ids=str)
def test_full_decoding_after_sparse_prefill(choice, prompts):
    """Several tokens at once are sparse again after full decoding.

    The selection of the single tokens' tile has been cached.
    """
    partial = layer(choice=choice)
    decoding = layer(decode="full", choice=choice)
    decoding.load_state_dict(partial.state_dict())
    full = GQA(partial.config, 20, ROPE)
    full.load_state_dict(partial.state_dict())
    hidden = torch.randn(2, 40, 20)
    past = Past(2)
    cache = decoding.new_cache(2, 8, hidden.dtype, hidden.device)
    for counts in (prompts, [1, 1], [1, 1], [1, 1], [11, 8], [1, 1]):
        starts = past.lengths
        time = max(counts)
        new = torch.stack([hidden[row, n : n + time] for row, n in enumerate(starts)])
        out = run(decoding, new, past, cache, lengths=counts)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            attention = full if time == 1 else partial
            alone = run(attention, hidden[row : row + 1, : start + count])[0, start:]
            torch.testing.assert_close(out[row, :count], alone, atol=1e-5, rtol=0)


def test_a_layer_is_full_while_it_is_given_to_be():
    """Tests full attention in one call and in pieces after a cache; then sparse attention again."""
    attention = layer()
    hidden = torch.randn(2, 23, 20)
    expected = run(attention, hidden)
    past = Past(2)
    cache = attention.new_cache(2, 8, hidden.dtype, hidden.device)
    attention.full = True
    whole = run(attention, hidden)
    plain = GQA(attention.config, 20, ROPE)
    plain.load_state_dict(attention.state_dict())
    torch.testing.assert_close(whole, run(plain, hidden), atol=1e-5, rtol=0)
    parts = torch.cat(
        [run(attention, piece, past, cache) for piece in hidden.split([7, 9, 1, 6], 1)], 1
    )
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    attention.full = False
    torch.testing.assert_close(run(attention, hidden), expected)


@CHOICES
def test_sequences_of_any_length_may_be_switched(choice):
    """A cache holds what sparse attention needs while attention is full, and the other way round.

    Keys do not depend on attention in one layer, so that each call is as if it had never been
    switched.
    """
    attention = layer(choice=choice)
    hidden = torch.randn(2, 60, 20)
    past = Past(2)
    cache = attention.new_cache(2, 8, hidden.dtype, hidden.device)
    calls = ([9, 14], True), ([1, 1], False), ([3, 1], True), ([1, 1], True), ([8, 20], False)
    for counts, full in (*calls, ([1, 1], True), ([1, 1], False), ([13, 13], False)):
        switch(attention, full)
        starts = past.lengths
        time = max(counts)
        new = torch.stack([hidden[row, n : n + time] for row, n in enumerate(starts)])
        out = run(attention, new, past, cache, lengths=counts)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            alone = run(attention, hidden[row : row + 1, : start + count])[0, start:]
            torch.testing.assert_close(out[row, :count], alone, atol=1e-5, rtol=0)


@CHOICES
def test_runs_of_queries_change_nothing(monkeypatch, choice):
    attention = layer(choice=choice).double()
    hidden = torch.randn(2, 23, 20, dtype=torch.float64)
    whole = run(attention, hidden)
    monkeypatch.setattr(sparse, "QUERIES", 5)
    torch.testing.assert_close(run(attention, hidden), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("wrong", [{"block": 0}, {"top_k": 0}])
def test_bad_sizes_say_so(wrong):
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
        MoBAConfig(**wrong)


def test_unknown_words_say_so():
    for name in ("choice", "decode"):
        with pytest.raises((ValueError, TypeCheckError), match=name):
            MoBAConfig(**{name: "block"})


def test_the_last_layers_and_the_last_phase_are_full():
    q, k, _ = tensors(1, 2)
    model = torch.nn.ModuleList(moba_of(q, k, left, full_layers=2) for left in (3, 2, 1))
    assert [piece.full for piece in model] == [False, True, True]
    switch(model, True)
    assert all(piece.full for piece in model)
    switch(model, False)
    assert [piece.full for piece in model] == [False, True, True]
    # A layer that always attends fully needs no block means.
    assert model[2].new_cache(2, 8, torch.float32, torch.device("cpu")).means is None
    for wrong in ({"full_layers": -1}, {"full_from": 1.1}):
        with pytest.raises(ValueError, match="moba: got full_layers"):
            MoBAConfig(**wrong)


@CHOICES
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_changes_no_choice(choice, packed):
    """In bfloat16, scores of neighbouring blocks would be equal."""
    query, key, _ = (x.detach() for x in tensors(3, 90))
    inner = moba_of(query, key, block=2, top_k=4, choice=choice)
    document_ids = (torch.arange(90) // 70).expand(3, -1)
    ctx = context(3, 90, "cpu", document_ids=document_ids if packed else None)
    segment = sparse.segments(ctx, 2)
    columns = (torch.arange(90) // 2).expand(3, -1)
    means = moba.block_means(key, columns if segment is None else segment, 45)
    blocks = moba.BlockMeans(means, segment)
    expected = inner.select(query, blocks, ctx)
    with torch.autocast("cpu", torch.bfloat16):
        result = inner.select(query, blocks, ctx)
    assert torch.equal(result.blocks, expected.blocks)
