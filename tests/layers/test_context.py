"""Tests positions and masks against loops over tokens, in one call and after a cache."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.layers.basics import RopeConfig, rope_tables
from rorqual.layers.cache import Past
from rorqual.layers.context import context


def slow_context(documents, present):
    """Computes positions and mask of whole sequences, one token at a time."""
    batch, length = documents.shape
    positions = torch.zeros(batch, length, dtype=torch.long)
    mask = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        seen = 0
        for t in range(length):
            if t == 0 or documents[row, t] != documents[row, t - 1]:
                seen = 0
            seen += int(present[row, t])
            positions[row, t] = max(seen - 1, 0)
            for key in range(t + 1):
                mask[row, t, key] = documents[row, t] == documents[row, key] and present[row, key]
            mask[row, t, t] = True
    return positions, mask[:, None]


def slow_mask_of_absent(mask, present):
    """Lets a padding query see itself and what a valid token in its place would see."""
    return mask & present[:, None, :, None]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_context_in_one_call_and_in_pieces(data):
    length = data.draw(st.integers(1, 9))
    starts = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(2)]
    )
    present = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=length, max_size=length)) for _ in range(2)]
    )
    documents = starts.long().cumsum(1)
    positions, mask = slow_context(documents, present)
    whole = context(2, length, "cpu", documents=documents, present=present)
    assert torch.equal(whole.positions, positions) and whole.past == 0
    assert torch.equal(slow_mask_of_absent(whole.mask, present), slow_mask_of_absent(mask, present))
    assert whole.mask.any(-1).all()
    past, begin = Past(), 0
    while begin < length:
        end = data.draw(st.integers(begin + 1, length))
        known = {"documents": documents[:, begin:end], "present": present[:, begin:end]}
        part = context(2, end - begin, "cpu", past=past, **known)
        assert torch.equal(part.positions, positions[:, begin:end]) and part.past == begin
        assert torch.equal(part.key_positions, positions[:, :end])
        assert torch.equal(part.key_documents, documents[:, :end]) and torch.equal(
            part.key_present, present[:, :end]
        )
        here = present[:, begin:end]
        assert torch.equal(
            slow_mask_of_absent(part.mask, here),
            slow_mask_of_absent(mask[:, :, begin:end, :end], here),
        )
        begin = end


def test_context_without_anything_to_hide_needs_no_mask():
    past = Past()
    for begin, time in ((0, 4), (4, 1), (5, 3)):
        where = context(2, time, "cpu", past=past)
        assert where.mask is None and where.documents is None and where.present is None
        assert where.positions.tolist() == [list(range(begin, begin + time))] * 2
        assert torch.equal(where.visible()[0, 0], torch.ones(time, begin + time).tril(begin).bool())


def test_decoding_goes_on_behind_left_padding():
    past = Past()
    context(
        2, 3, "cpu", present=torch.tensor([[False, False, True], [True, True, True]]), past=past
    )
    where = context(2, 1, "cpu", past=past)
    assert where.positions.tolist() == [[1], [3]]
    assert where.mask[:, 0, 0].tolist() == [[False, False, True, True], [True] * 4]


def test_the_last_position_is_that_of_the_whole_call():
    """Compares every per-token field; the other tokens count as cached ones."""
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    present = torch.tensor([[True] * 5, [False, True, True, True, True]])
    ids, live = torch.arange(10).view(2, 5), torch.rand(2, 5) > 0.5
    known = {
        "documents": documents,
        "present": present,
        "rope": (RopeConfig(), 6),
        "ids": ids,
        "live": live,
    }
    whole = context(2, 5, "cpu", last_only=True, **known)
    last = whole.last()
    assert last.past == 4 and not last.last_only
    for name in ("positions", "documents", "present", "cos", "sin", "ids", "live"):
        assert torch.equal(getattr(last, name), getattr(whole, name)[:, -1:]), name
    assert torch.equal(last.mask, whole.mask[:, :, -1:])
    assert torch.equal(last.key_positions, whole.key_positions)
    plain = context(2, 5, "cpu")
    assert torch.equal(plain.last().visible(), plain.visible()[:, :, -1:])


def test_rotations_are_those_of_the_positions_in_a_document():
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    ctx = context(1, 5, "cpu", documents=documents, rope=(RopeConfig(), 6))
    cos, sin = rope_tables(RopeConfig(), 6, torch.tensor([[0, 1, 0, 1, 2]]))
    assert torch.equal(ctx.cos, cos) and torch.equal(ctx.sin, sin)
