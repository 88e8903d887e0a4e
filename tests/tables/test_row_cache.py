"""Tests which rows the cache returns and evicts, against a plain list."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.tables.row_cache import RowCache

pytestmark = pytest.mark.engram


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(0, 40),
    size=st.integers(1, 9),
    far=st.sampled_from([1, 7, 2**33]),
    limit=st.sampled_from([1, 3, 12, 60]),
    seed=st.integers(0, 2**32),
)
def test_what_was_used_last_stays(slots: int, size: int, far: int, limit: int, seed: int) -> None:
    """Compares with a plain list of ids, oldest first.

    The ids are far apart and adjacent, and more than there are slots.
    """
    draw = np.random.default_rng(seed)
    values = draw.integers(256, size=(60, size), dtype=np.uint8)
    cached = RowCache(slots * size, size, 2**40)
    used = []
    for _ in range(20):
        wanted = draw.permutation(60)[: draw.integers(1, limit + 1)].tolist()
        ids = np.array(wanted)
        into, missing = cached.lookup(ids * far)
        assert missing.tolist() == [index for index, row in enumerate(wanted) if row not in used]
        assert all(
            np.array_equal(into[p], values[row]) for p, row in enumerate(wanted) if row in used
        )
        used = [row for row in used if row not in wanted] + [row for row in wanted if row in used]
        cached.insert(ids[missing] * far, torch.from_numpy(values[ids[missing]]))
        used = (
            (used + ids[missing].tolist())[max(0, len(used) + len(missing) - slots) :]
            if slots
            else []
        )


def test_what_is_frozen_stays_for_good() -> None:
    cached = RowCache(2, 1, 2**40)
    cached.insert(np.array([3, 5]), torch.tensor([[30], [50]], dtype=torch.uint8))
    cached.frozen = True
    cached.insert(np.array([7]), torch.tensor([[70]], dtype=torch.uint8))
    rows, missing = cached.lookup(np.array([3, 5, 7]))
    assert missing.tolist() == [2]
    assert rows[:2].flatten().tolist() == [30, 50]


def test_no_more_rows_are_kept_than_fit_or_the_table_has() -> None:
    assert RowCache(1000, 9, 2**40).slots == 111
    assert RowCache(1000, 9, 50).slots == 50
    assert RowCache(8, 9, 50).slots == 0


def test_repeated_ids_are_found_and_cached_once() -> None:
    cached = RowCache(3, 1, 2**40)
    cached.insert(np.array([3, 5, 3]), torch.tensor([[30], [50], [30]], dtype=torch.uint8))
    rows, missing = cached.lookup(np.array([5, 7, 5, 3, 7]))
    assert missing.tolist() == [1, 4]
    assert rows[[0, 2, 3]].flatten().tolist() == [50, 50, 30]
    cached.insert(np.array([7, 7]), torch.tensor([[70], [70]], dtype=torch.uint8))
    rows, missing = cached.lookup(np.array([3, 5, 7]))
    assert missing.tolist() == []
    assert rows.flatten().tolist() == [30, 50, 70]
    # A row that is cached stays as it is.
    cached.insert(np.array([9, 5]), torch.tensor([[90], [0]], dtype=torch.uint8))
    rows, missing = cached.lookup(np.array([3, 5, 7, 9]))
    assert missing.tolist() == [0]
    assert rows[1:].flatten().tolist() == [50, 70, 90]


def test_no_ids_give_no_rows_of_a_type_that_can_be_viewed() -> None:
    for slots in (0, 3):
        rows, missing = RowCache(8 * slots, 8, 2**40).lookup(np.array([], dtype=np.int64))
        assert rows.view(torch.float32).shape == (0, 2)
        assert len(missing) == 0
