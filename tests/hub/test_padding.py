"""Tests that padding anywhere is packed and put back, and that columns count it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.hub.padding import Columns, Packing, packing

ROWS = st.integers(1, 6).flatmap(
    lambda time: st.lists(
        st.lists(st.booleans(), min_size=time, max_size=time), min_size=2, max_size=2
    )
)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, width=st.booleans())
def test_tokens_come_first_and_return_to_their_places(rows, width):
    valid = torch.tensor(rows)
    packed = Packing(valid)
    time = valid.shape[1]
    x = torch.arange(1, 2 * time + 1).view(2, time)
    x = x[..., None].expand(-1, -1, 3) * 1.0 if width else x
    packed_rows = packed.pack(x)
    for row, length in enumerate(packed.lengths):
        assert length == sum(rows[row])
        assert torch.equal(packed_rows[row, :length], x[row, valid[row]])
    back = packed.unpack(packed_rows)
    assert torch.equal(back[valid], x[valid])
    assert not back[~valid].any()


def test_what_is_not_padded_is_not_packed():
    assert packing(None) is None
    assert packing(torch.ones(2, 3, dtype=torch.bool)) is None
    assert packing(torch.tensor([[True, False]])) is not None


@settings(max_examples=60, deadline=None)
@given(calls=st.lists(ROWS, min_size=1, max_size=4), data=st.data())
def test_a_crop_of_columns_takes_the_tokens_among_them(calls, data):
    columns = Columns()
    every = torch.zeros(2, 0, dtype=torch.bool)
    for rows in calls:
        valid = torch.tensor(rows)
        columns.append(2, valid.shape[1], packing(valid))
        every = torch.cat([every, valid], 1)
        if data.draw(st.booleans()):
            columns.select(torch.tensor([1, 1]))
            every = every[[1, 1]]
        count = data.draw(st.integers(0, every.shape[1]))
        cached = every.shape[1] - count
        assert columns.tokens(count, 2) == every[:, cached:].sum(1).tolist()
        columns.crop(count)
        every = every[:, :cached]
        assert columns.count == cached
    columns.reset()
    assert columns.count == 0
    assert columns.tokens(0, 2) == [0, 0]
