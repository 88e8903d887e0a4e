"""Tests positions and masks against loops over tokens, in one call and after a cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.layers.cache import Past
from rorqual.layers.context import context
from rorqual.layers.rope import RopeConfig, rope_tables


def slow_context(document_ids: list[list[int]]):
    """Computes positions and visible keys of whole sequences, one token at a time."""
    positions = []
    visible = []
    for row in document_ids:
        places = []
        seen = []
        for t, document in enumerate(row):
            places.append(places[-1] + 1 if t and document == row[t - 1] else 0)
            seen.append([s for s in range(t + 1) if row[s] == document])
        positions.append(places)
        visible.append(seen)
    return positions, visible


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_context_in_one_call_and_in_pieces(data):
    """Sequences of different lengths, in calls that extend each by a number of its own."""
    packed = data.draw(st.booleans())
    past = Past(2)
    rows = [[], []]
    for _ in range(data.draw(st.integers(1, 4))):
        time = data.draw(st.integers(1, 5))
        begins = data.draw(
            st.lists(st.lists(st.booleans(), min_size=time, max_size=time), min_size=2, max_size=2)
        )
        last = [row[-1] if row else 0 for row in rows]
        new = (torch.tensor(last)[:, None] + torch.tensor(begins).cumsum(1)) * packed
        counts = data.draw(st.none() | st.lists(st.integers(0, time), min_size=2, max_size=2))
        before = [len(row) for row in rows]
        ctx = context(
            2, time, "cpu", past=past, document_ids=new if packed else None, lengths=counts
        )
        for b, row in enumerate(rows):
            row += new[b, : time if counts is None else counts[b]].tolist()
        positions, visible = slow_context(rows)
        assert ctx.past == max(before) and ctx.key_count == max(before) + time
        assert (ctx.starts is None) == (before[0] == before[1])
        for b in range(2):
            for t in range(time if counts is None else counts[b]):
                offset = before[b] + t
                assert ctx.positions[b, t] == positions[b][offset]
                assert ctx.columns.expand(2, -1)[b, t] == offset
                mask = ctx.visible().expand(2, -1, -1, -1)[b, 0, t]
                assert mask.nonzero().flatten().tolist() == visible[b][offset]
                if packed:
                    assert (
                        ctx.document_ids[b, t] == ctx.key_document_ids[b, offset] == rows[b][offset]
                    )
        if counts is not None and min(counts) < time:
            assert ctx.valid.sum(1).tolist() == counts
        else:
            assert ctx.valid is None
        assert past.lengths == [len(row) for row in rows]


def test_context_without_anything_to_hide_needs_no_mask():
    past = Past(2)
    for start, time in ((0, 4), (4, 1), (5, 3)):
        ctx = context(2, time, "cpu", past=past)
        assert ctx.mask is None and ctx.document_ids is None and ctx.valid is None
        assert ctx.positions.tolist() == [list(range(start, start + time))] * 2
        assert torch.equal(ctx.visible()[0, 0], torch.ones(time, start + time).tril(start).bool())


def test_padding_behind_the_tokens_needs_no_mask():
    past = Past(2)
    ctx = context(2, 3, "cpu", lengths=[1, 3], past=past)
    assert ctx.mask is None and ctx.valid.tolist() == [[True, False, False], [True] * 3]
    ctx = context(2, 1, "cpu", past=past)
    assert ctx.positions.tolist() == [[1], [3]]
    assert ctx.mask[:, 0, 0].tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize("lengths", [[3], [4, 1], [-1, 1], [1, 2, 3]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match=r"lengths: got .* expected 2 numbers of tokens from 0"):
        context(2, 3, "cpu", lengths=lengths)


def test_documents_go_on_where_none_are_given():
    past = Past(2)
    context(2, 2, "cpu", past=past)
    first = context(2, 3, "cpu", document_ids=torch.tensor([[0, 0, 1], [4, 5, 5]]), past=past)
    assert first.key_document_ids.tolist() == [[0, 0, 0, 0, 1], [0, 0, 4, 5, 5]]
    past.crop([0, 2])
    ctx = context(2, 2, "cpu", past=past)
    assert ctx.document_ids.tolist() == [[1, 1], [4, 4]]
    assert ctx.positions.tolist() == [[1, 2], [1, 2]]
    assert ctx.documents_before(2).tolist() == [[0, 1, 1, 1], [0, 4, 4, 4]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lengths", [None, [2, 5]])
def test_the_last_position_is_that_of_the_whole_call(packed, lengths):
    """Compares every field of a token; the other tokens count as cached ones."""
    document_ids = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]) if packed else None
    ids = torch.arange(10).view(2, 5)
    lookup_mask = torch.rand(2, 5) > 0.5
    expected = {"document_ids": document_ids, "lengths": lengths, "rope": (RopeConfig(), 6)}
    whole = context(2, 5, "cpu", last_only=True, ids=ids, lookup_mask=lookup_mask, **expected)
    last = whole.last()
    places = torch.tensor(lengths or [5, 5]) - 1
    assert last.past == 4 and not last.last_only and last.lengths is None
    for name in ("positions", "document_ids", "cos", "sin", "ids", "lookup_mask"):
        value = getattr(whole, name)
        if value is None:
            assert not packed and getattr(last, name) is None
        else:
            assert torch.equal(getattr(last, name)[:, 0], value[[0, 1], places]), name
    seen = whole.visible().expand(2, -1, -1, -1)[[0, 1], 0, places]
    assert torch.equal(last.visible().expand(2, -1, -1, -1)[:, 0, 0], seen)
    assert torch.equal(last.columns.expand(2, -1)[:, 0], places)
    assert last.key_count == whole.key_count


def test_rotations_are_those_of_the_positions_in_a_document():
    document_ids = torch.tensor([[0, 0, 1, 1, 1]])
    ctx = context(1, 5, "cpu", document_ids=document_ids, rope=(RopeConfig(), 6))
    cos, sin = rope_tables(RopeConfig(), 6, torch.tensor([[0, 1, 0, 1, 2]]))
    assert torch.equal(ctx.cos, cos) and torch.equal(ctx.sin, sin)
