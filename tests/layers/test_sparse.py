"""Tests that the ways of attending to selected blocks are one sum, and the selection rule."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual import kernels
from rorqual.kernels import select
from rorqual.layers import sparse
from rorqual.layers.cache import Past
from rorqual.layers.context import Context, context
from rorqual.layers.sparse import (
    Blocks,
    Selection,
    attend_selected,
    best_blocks,
    full_attention,
    masked_attention,
    selected_attention,
    windows,
)

pytestmark = pytest.mark.nsa


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the functions of layers the references; kernels are called by their own names."""
    monkeypatch.setenv(kernels.VARIABLE, "reference")


SHAPES = [  # batch, queries, heads, groups, choices, key width, value width, keys, chosen, block
    (2, 3, 6, 2, 2, 6, 5, 23, 3, 4),
    (1, 1, 16, 4, 4, 8, 8, 100, 5, 16),
    (1, 5, 16, 1, 1, 3, 7, 37, 4, 5),
    (3, 2, 3, 3, 3, 33, 17, 5, 2, 3),
    (1, 4, 6, 2, 6, 7, 7, 40, 9, 5),
    (2, 7, 1, 1, 1, 1, 1, 9, 1, 64),
]


def case(
    batch,
    time,
    heads,
    groups,
    choices,
    width,
    value_width,
    length,
    top_k,
    block,
    dtype=torch.float32,
    shorter=(0, 0, 0),
):
    """Builds the last `time` of `length` tokens, or of as many fewer as `shorter` says for a row.

    Keys and values are views of a longer buffer, as a cache's are.
    """
    query = torch.randn(batch, time, heads, width).to(dtype)
    key = torch.randn(batch, length + 9, groups, width).to(dtype)[:, :length]
    value = torch.randn(batch, length + 9, groups, value_width).to(dtype)[:, :length]
    ends = length - torch.tensor(shorter)[:batch, None]
    positions = ends - time + torch.arange(time)
    index = torch.rand(batch, time, choices, -(-length // block)).argsort(-1)[..., :top_k]
    index = index.where(
        (torch.rand(index.shape) < 0.8) & (index * block <= positions[..., None, None]), -1
    )
    return query, key, value, index, positions, block, 0.4


def behind(positions: torch.Tensor) -> Context:
    """Builds the context of new tokens at these positions, behind those that are cached."""
    past = Past(len(positions))
    past.append(positions[:, 0].tolist())
    return context(*positions.shape, "cpu", past=past)


def brute(query, key, value, index, positions, block, scale):
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for b, t, h in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        g = h * key.shape[2] // query.shape[2]
        j = h * index.shape[2] // query.shape[2]
        selected = set(index[b, t, j].tolist())
        columns = [
            c for c in range(key.shape[1]) if c // block in selected and c <= positions[b, t]
        ]
        if columns:
            out[b, t, h] = (key[b, columns, g] @ query[b, t, h] * scale).softmax(0) @ value[
                b, columns, g
            ]
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_its_definition(shape):
    arguments = case(*shape, dtype=torch.float64)
    torch.testing.assert_close(
        selected_attention(*arguments), brute(*arguments), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns_beyond_a_sequence_are_never_read(shape, poisoned):
    """Each row has a length of its own, and NaN follows; a gather multiplies it by 0."""
    arguments = case(*shape, shorter=(2, 0, 1))
    query, key, value, index, positions, *rest = arguments
    expected = brute(*arguments)
    torch.testing.assert_close(selected_attention(*arguments), expected, atol=2e-6, rtol=0)
    for row, end in enumerate((positions[:, -1] + 1).tolist()):
        key[row, end:], value[row, end:] = torch.nan, torch.nan
    result = select.selected_attention(query, key, value, index, positions, *rest)
    torch.testing.assert_close(result, expected, atol=2e-6, rtol=0)


def test_weights_that_no_sum_shows_take_no_time_and_no_number_hides():
    query, key, value, index, positions, block, _ = case(*SHAPES[1])
    out = select.selected_attention(query, key, value, index, positions, block, 40.0)
    torch.testing.assert_close(
        out, selected_attention(query, key, value, index, positions, block, 40.0)
    )
    query[0, 0, 0, 0] = torch.nan
    out = select.selected_attention(query, key, value, index, positions, block, 0.4)
    assert out[0, 0, 0].isnan().all()
    assert out[0, 0, 1:].isfinite().all()


def mean(keys):
    return keys.mean(-2)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(1, 3),
    st.data(),
)
def test_blocks_of_growing_sequences_are_those_of_each_alone(pieces, size, parts, data):
    """Rows of different lengths are padded, cropped, reordered and removed in between."""
    torch.manual_seed(0)
    stride = size
    block = size * parts
    length = sum(pieces)
    keys = torch.randn(3, length, 2, 3)
    past = Past(3)
    blocks = Blocks(block, stride)
    for piece in pieces:
        if data.draw(st.booleans()):
            index = data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3))
            blocks.select(torch.tensor(index), past.length)
            past.select(index, torch.tensor(index))
            keys = keys[index]
        if data.draw(st.booleans()):
            past.crop([data.draw(st.integers(0, count)) for count in past.lengths])
            for row, count in enumerate(past.lengths):
                keys[row, count:] = torch.randn_like(keys[row, count:])
        counts = [data.draw(st.integers(1, piece)) for _ in range(3)]
        ctx = context(3, max(counts), "cpu", past=past, lengths=counts)
        stored = blocks.update(keys[:, : ctx.key_count], mean, ctx)
        for row, count in enumerate(past.lengths):
            alone = mean(windows(keys[row : row + 1, :count], block, stride))[0]
            torch.testing.assert_close(stored[row, : len(alone)], alone)
    ctx = context(3, 1, "cpu", past=Past(3))
    assert Blocks(block + 1, 1).update(keys[:, :1], mean, ctx).shape == (3, 0, 2, 3)


@pytest.mark.parametrize("counts", [[17, 17], [17, 12]], ids=str)
def test_a_block_is_computed_once(counts):
    keys = torch.randn(2, 17, 2, 3)
    blocks = Blocks(4, 2)
    past = Past(2)
    computed = []

    def make(x):
        computed.append(x.shape[0] * x.shape[1])
        return x.mean(-2)

    for end in (1, 4, 5, 17):
        new = [min(end, count) - length for count, length in zip(counts, past.lengths, strict=True)]
        if min(new) > 0:
            ctx = context(2, max(new), "cpu", past=past, lengths=new)
            blocks.update(keys[:, : ctx.key_count], make, ctx)
    # The last call may compute blocks of padding, too.
    assert 7 + 5 <= sum(computed) <= 7 + 7


@pytest.mark.parametrize("prompt", [[20, 20], [20, 17]], ids=str)
def test_blocks_keep_their_dtype(prompt):
    """The prompt was under autocast and what follows is not."""
    keys = torch.randn(2, 30, 1, 3)
    blocks = Blocks(4, 2)
    past = Past(2)
    ctx = context(2, 20, "cpu", past=past, lengths=prompt)
    blocks.update(keys[:, :20].bfloat16(), mean, ctx)
    ctx = context(2, 10, "cpu", past=past)
    stored = blocks.update(keys, mean, ctx)
    assert stored.dtype == torch.bfloat16
    expected = mean(windows(keys, 4, 2))[:, : blocks.count(min(past.lengths))]
    torch.testing.assert_close(stored[:, : expected.shape[1]].float(), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shorter", [(0, 0, 0), (1, 0, 2)], ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[5] == shape[6]], ids=str)
def test_gathered_is_masked(shape, shorter, dtype):
    """Compares both ways for the last tokens of a cache, with gradients."""
    query, key, value, index, positions, block, scale = case(*shape, dtype, shorter)
    ctx = behind(positions)
    run = slice(0, query.shape[1])
    key = key[:, : ctx.key_count]
    value = value[:, : ctx.key_count]
    arguments = [x.clone().requires_grad_() for x in (query, key, value)]
    masked = masked_attention(*arguments, index, Selection(index, block), ctx, run, scale)
    gathered = selected_attention(*arguments, index, positions, block, scale)
    loose = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(masked, gathered, atol=loose, rtol=0)
    pull = torch.randn_like(masked)
    grads = (torch.autograd.grad((y * pull).sum(), arguments) for y in (masked, gathered))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=loose * max(1.0, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize("wanted", ["", "reference"])
@pytest.mark.parametrize("shorter", [(0, 0), (0, 9)], ids=str)
@pytest.mark.parametrize("time", [1, 2, 8, 30])
def test_few_and_many_queries_attend_alike(time, shorter, wanted, monkeypatch):
    """The cheapest way depends on how many there are; a few read their selected blocks alone."""
    monkeypatch.setenv(kernels.VARIABLE, wanted)
    monkeypatch.setattr(sparse, "QUERIES", 16)
    arguments = case(2, time, 4, 2, 2, 6, 6, 64, 2, 4, shorter=shorter)
    query, key, value, index, positions, block, scale = arguments
    ctx = behind(positions)
    expected = brute(*arguments)
    if time <= 2:
        read = torch.zeros(2, 64, 2, dtype=torch.bool)
        for b, t, j, k in torch.cartesian_prod(*map(torch.arange, index.shape)).tolist():
            first = max(0, int(index[b, t, j, k])) * block
            read[b, first : first + block, j] = True
        key[~read], value[~read] = torch.nan, torch.nan
    out = attend_selected(query, key, value, Selection(index, block), ctx, scale)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_a_query_without_keys_gets_nothing():
    query, key, value, index, positions, block, scale = case(1, 3, 4, 2, 2, 6, 6, 20, 3, 4)
    empty = torch.full_like(index, -1)
    for way in (selected_attention, select.selected_attention):
        assert (way(query, key, value, empty, positions, block, scale) == 0).all()


@pytest.mark.parametrize("starts", [(0, 0), (5, 5), (5, 2)], ids=str)
@pytest.mark.parametrize("time", [1, 2, 9])
def test_full_attention_is_its_definition(starts: Sequence[int], time: int, monkeypatch):
    monkeypatch.setattr(sparse, "QUERIES", 4)
    length = max(starts) + time
    query = torch.randn(2, time, 6, 4)
    key = torch.randn(2, length, 2, 4)
    value = torch.randn(2, length, 2, 4)
    positions = torch.tensor(starts)[:, None] + torch.arange(time)
    every = torch.zeros(2, time, 2, 1, dtype=torch.long)
    expected = brute(query, key, value, every, positions, length, 0.4)
    out = full_attention(query, key, value, behind(positions), 0.4)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_of_equal_scores_the_later_block():
    scores = torch.zeros(1, 1, 2, 9)
    scores[0, 0, 1, 2] = 1.0
    index = best_blocks(scores, torch.tensor([[7]]), torch.tensor([[1]]), 4)
    # Block 8 is later than own, and block 0 belongs to another document.
    assert index[0, 0].tolist() == [
        [7, 6, 5, 4],
        [7, 6, 5, 2],
    ]
    index = best_blocks(scores, torch.tensor([[7]]), torch.tensor([[1]]), 4, forced=3)
    assert index[0, 0].tolist() == [[7, 6, 5, 1], [7, 6, 2, 1]]


def test_fewer_blocks_than_may_be_selected():
    index = best_blocks(torch.randn(1, 2, 1, 5), torch.tensor([[0, 2]]), torch.tensor([[0, 1]]), 4)
    assert index[0, 0, 0].tolist() == [0, -1, -1, -1]
    assert index[0, 1, 0].tolist() == [2, 1, -1, -1]
    assert best_blocks(torch.randn(1, 1, 1, 2), torch.tensor([[1]]), torch.tensor([[0]]), 4)[
        0, 0, 0, 2:
    ].tolist() == [
        -1,
        -1,
    ]
