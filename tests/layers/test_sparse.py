"""Tests that the ways of attending to selected blocks are one sum, and the selection rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual import kernels
from rorqual.kernels import select
from rorqual.layers import selection
from rorqual.layers.cache import Past
from rorqual.layers.context import context
from rorqual.layers.selection import (
    Blocks,
    attend_chosen,
    best_blocks,
    full_attention,
    selected_attention,
    straight,
    windows,
)

pytestmark = pytest.mark.nsa

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
    chosen,
    block,
    dtype=torch.float32,
):
    """Builds the last `time` of `length` tokens.

    Keys and values are views of a longer buffer, as a cache's are.
    """
    query = torch.randn(batch, time, heads, width).to(dtype)
    key = torch.randn(batch, length + 9, groups, width).to(dtype)[:, :length]
    value = torch.randn(batch, length + 9, groups, value_width).to(dtype)[:, :length]
    positions = torch.arange(length - time, length).expand(batch, -1)
    index = torch.rand(batch, time, choices, -(-length // block)).argsort(-1)[..., :chosen]
    index = index.where(
        (torch.rand(index.shape) < 0.8) & (index * block <= positions[..., None, None]), -1
    )
    return query, key, value, index, positions, block, 0.4


def brute(query, key, value, index, positions, block, scale):
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for b, t, h in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        g, j = h * key.shape[2] // query.shape[2], h * index.shape[2] // query.shape[2]
        chosen = set(index[b, t, j].tolist())
        columns = [c for c in range(key.shape[1]) if c // block in chosen and c <= positions[b, t]]
        if columns:
            out[b, t, h] = (key[b, columns, g] @ query[b, t, h] * scale).softmax(0) @ value[
                b, columns, g
            ]
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_its_definition(shape):
    given = case(*shape, dtype=torch.float64)
    torch.testing.assert_close(
        selected_attention.reference(*given), brute(*given), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_twin_gives_the_references_numbers(shape, poisoned):
    given = case(*shape)
    torch.testing.assert_close(
        select.selected_attention(*given), selected_attention.reference(*given), atol=2e-6, rtol=0
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([(1, 1, 1), (4, 2, 2), (6, 2, 6), (5, 1, 5), (9, 3, 3)]),
    st.integers(1, 19),
    st.integers(4, 70),
    st.integers(1, 6),
    st.integers(1, 17),
)
def test_the_twin_at_any_size(batch, time, heads, width, length, chosen, block):
    given = case(batch, time, *heads, width, width, length, chosen, block)
    torch.testing.assert_close(
        select.selected_attention(*given), selected_attention.reference(*given), atol=5e-6, rtol=0
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shifted_row_attends_as_if_alone(shape, poisoned):
    """Sequence b starts at its own column, and columns before it are never read."""
    query, key, value, index, positions, block, scale = case(*shape)
    length, lead = key.shape[1], torch.tensor([4, 0, 7])[: len(key)]
    expected = selected_attention.reference(query, key, value, index, positions, block, scale)
    shifted = [torch.full((len(x), length + 7, *x.shape[2:]), torch.nan) for x in (key, value)]
    for b, start in enumerate(lead.tolist()):
        for room, x in zip(shifted, (key, value), strict=True):
            room[b, start : start + length] = x[b]
            # A gather may read past the end of a sequence with weight 0.
            room[b, start + length :] = 0.0
    for way in (selected_attention.reference, select.selected_attention):
        out = way(query, *(x.nan_to_num() for x in shifted), index, positions, block, scale, lead)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    out = select.selected_attention(query, *shifted, index, positions, block, scale, lead)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_weights_that_no_sum_shows_take_no_time_and_no_number_hides():
    query, key, value, index, positions, block, _ = case(*SHAPES[1])
    out = select.selected_attention(query, key, value, index, positions, block, 40.0)
    torch.testing.assert_close(
        out, selected_attention.reference(query, key, value, index, positions, block, 40.0)
    )
    query[0, 0, 0, 0] = torch.nan
    out = select.selected_attention(query, key, value, index, positions, block, 0.4)
    assert out[0, 0, 0].isnan().all()
    assert out[0, 0, 1:].isfinite().all()


def padded(lead, length, past):
    present = torch.arange(length) >= torch.tensor(lead)[:, None]
    history = Past()
    context(len(lead), past, "cpu", past=history, present=present[:, :past])
    return context(len(lead), length - past, "cpu", past=history, present=present[:, past:])


def test_rows_padded_on_the_left_are_shifted_and_others_are_not():
    where, lead = straight(padded([2, 0, 5], 9, 7))
    assert lead.tolist() == [2, 0, 5]
    assert where.mask is None
    assert where.positions.tolist() == [[5, 6], [7, 8], [2, 3]]
    assert straight(padded([2, 8], 9, 7))[1] is None  # a new token is padding
    assert straight(padded([2, 1], 40, 7))[1] is None  # many new tokens
    assert straight(context(2, 4, "cpu"))[1] is None
    history, present = Past(), torch.tensor([[True, True, False, True]])
    context(1, 4, "cpu", past=history, present=present)
    assert straight(context(1, 1, "cpu", past=history))[1] is None  # padding in between
    history = Past()
    context(
        1,
        4,
        "cpu",
        past=history,
        documents=torch.zeros(1, 4, dtype=torch.long),
        present=torch.ones(1, 4).bool(),
    )
    assert straight(context(1, 1, "cpu", past=history))[1] is None


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(1, 3),
    st.data(),
)
def test_blocks_of_growing_rows_are_those_of_each_row_alone(pieces, size, parts, data):
    """Sequences are cropped and reordered in between; each complete block is computed once."""
    stride, block, length = size, size * parts, sum(pieces)
    lead = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=3)))
    keys, blocks, done = torch.randn(3, length + 4, 2, 3), Blocks(block, stride), 4
    for piece in pieces:
        done += piece
        if data.draw(st.booleans()):
            index = torch.tensor(data.draw(st.permutations(range(3))))
            keys, lead = keys[index], lead[index]
            blocks.select(index)
        if data.draw(st.booleans()):
            back = data.draw(st.integers(0, piece))
            blocks.update(keys[:, :done], lambda x: x.mean(-2), lead)
            blocks.crop(back)
            keys[:, done - back :] = torch.randn_like(keys[:, done - back :])
        held = blocks.update(keys[:, :done], lambda x: x.mean(-2), lead)
        for row, start in enumerate(lead.tolist()):
            alone = windows(keys[row : row + 1, start:done], block, stride).mean(-2)[0]
            torch.testing.assert_close(held[row, : len(alone)], alone)
            assert (held[row, len(alone) :].isfinite()).all()
    blocks.reset()
    assert blocks.update(keys[:, :0], lambda x: x.mean(-2)).shape == (3, 0, 2, 3)


def test_a_block_is_made_once():
    keys, blocks, asked = torch.randn(2, 17, 2, 3), Blocks(4, 2), []

    def make(x):
        asked.append(x.shape[0] * x.shape[1])
        return x.mean(-2)

    for length in (1, 4, 5, 17):
        made = blocks.update(keys[:, :length], make)
    torch.testing.assert_close(made, keys.unfold(1, 4, 2).mean(-1))
    assert sum(asked) == 2 * 7
    blocks.crop(2)
    assert blocks.made.length == 6


def test_blocks_keep_their_dtype():
    """The prompt was under autocast and what follows is not, with and without padding."""
    keys, lead = torch.randn(2, 30, 1, 3), torch.tensor([0, 3])
    for shift in (lead, None):
        blocks = Blocks(4, 2)
        blocks.update(keys[:, :20].bfloat16(), lambda x: x.mean(-2), shift)
        held = blocks.update(keys, lambda x: x.mean(-2), shift)
        assert held.dtype == torch.bfloat16
        torch.testing.assert_close(
            held[0].float(), windows(keys, 4, 2).mean(-2)[0], atol=0.05, rtol=0
        )


def test_the_twin_on_threads():
    given, threads = case(2, 30, 4, 2, 2, 64, 64, 400, 12, 32), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        exact = selected_attention.reference(
            *(x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in given)
        )
        torch.testing.assert_close(
            select.selected_attention(*given).double(), exact, atol=2e-6, rtol=0
        )
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[5] == shape[6]], ids=str)
def test_gathered_is_masked(shape, dtype):
    """Compares both ways for the last tokens of a cache, with gradients."""
    query, key, value, index, positions, block, scale = case(*shape, dtype=dtype)
    history = Past()
    history.length = int(positions[0, 0])
    where = context(*query.shape[:2], "cpu", past=history)
    given = [x.clone().requires_grad_() for x in (query, key, value)]
    masked = selection.masked_attention(
        *given, index, where, slice(0, query.shape[1]), None, block, scale
    )
    gathered = selected_attention.reference(*given, index, positions, block, scale)
    loose = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(masked, gathered, atol=loose, rtol=0)
    pull = torch.randn_like(masked)
    grads = (torch.autograd.grad((y * pull).sum(), given) for y in (masked, gathered))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=loose * max(1.0, b.abs().max().item()), rtol=0)


def test_the_way_is_chosen_by_what_is_asked(monkeypatch):
    """The kernel is used where it can run; else a gather for few queries and a mask for many."""
    query, key, value, index, positions, block, scale = case(1, 8, 4, 2, 2, 6, 6, 64, 2, 4)
    history = Past()
    history.length = 56
    where, used = context(1, 8, "cpu", past=history), []
    for owner, name in (
        (selected_attention.choice.kernels[0], "function"),
        (selection, "masked_attention"),
    ):
        way = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *g, way=way, name=name: (used.append(name), way(*g))[1]
        )
    for kind, count, expected in (
        ("", 8, ["function"]),
        ("reference", 8, ["masked_attention"]),
        ("reference", 2, []),
    ):
        monkeypatch.setenv(kernels.VARIABLE, kind)
        used.clear()
        run = slice(8 - count, 8)
        given = query[:, run], key, value, index[:, run]
        out = attend_chosen(*given, where, run, None, block, scale)
        assert used == expected
        exact = selected_attention.reference(*given, positions[:, run], block, scale)
        torch.testing.assert_close(out, exact, atol=2e-6, rtol=0)


def test_a_query_without_keys_gets_nothing():
    query, key, value, index, positions, block, scale = case(1, 3, 4, 2, 2, 6, 6, 20, 3, 4)
    empty = torch.full_like(index, -1)
    for way in (selected_attention.reference, select.selected_attention):
        assert (way(query, key, value, empty, positions, block, scale) == 0).all()


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("time", [1, 2, 9])
def test_full_attention_is_its_definition(past, time, monkeypatch):
    monkeypatch.setattr(selection, "QUERIES", 4)
    length = past + time
    query, key, value = (
        torch.randn(2, time, 6, 4),
        torch.randn(2, length, 2, 4),
        torch.randn(2, length, 2, 4),
    )
    history = Past()
    history.length = past
    every = torch.zeros(2, time, 2, 1, dtype=torch.long)
    expected = brute(
        query, key, value, every, torch.arange(past, length).expand(2, -1), length, 0.4
    )
    out = full_attention(query, key, value, context(2, time, "cpu", past=history), 0.4)
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


def test_fewer_blocks_than_may_be_chosen():
    index = best_blocks(torch.randn(1, 2, 1, 5), torch.tensor([[0, 2]]), torch.tensor([[0, 1]]), 4)
    assert index[0, 0, 0].tolist() == [0, -1, -1, -1]
    assert index[0, 1, 0].tolist() == [2, 1, -1, -1]
    assert best_blocks(torch.randn(1, 1, 1, 2), torch.tensor([[1]]), torch.tensor([[0]]), 4)[
        0, 0, 0, 2:
    ].tolist() == [
        -1,
        -1,
    ]
