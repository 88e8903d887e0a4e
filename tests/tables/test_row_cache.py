"""Row ids in any order -> the rows that are held, and the one that gives way, as a list of them would have it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.kernels import hot as twins
from rorqual.tables import row_cache

pytestmark = pytest.mark.engram


@pytest.mark.parametrize("kind", [row_cache.RowCache, twins.RowCache])
@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(0, 40),
    size=st.integers(1, 9),
    far=st.sampled_from([1, 7, 2**33]),
    most=st.sampled_from([1, 3, 12, 60]),
    seed=st.integers(0, 2**32),
)
def test_what_was_used_last_stays(kind: type, slots: int, size: int, far: int, most: int, seed: int) -> None:
    """Against a plain list of ids, oldest first; ids far apart and side by side, more than there are slots."""
    draw = np.random.default_rng(seed)
    values = draw.integers(256, size=(60, size), dtype=np.uint8)
    kept, used = kind(slots, size), []
    for _ in range(20):
        wanted = draw.permutation(60)[: draw.integers(1, most + 1)].tolist()
        ids, into = np.array(wanted), torch.zeros(len(wanted), size, dtype=torch.uint8)
        missing = kept.lookup(ids * far, into)
        assert missing.tolist() == [place for place, row in enumerate(wanted) if row not in used]
        assert all(np.array_equal(into[p], values[row]) for p, row in enumerate(wanted) if row in used)
        used = [row for row in used if row not in wanted] + [row for row in wanted if row in used]
        kept.insert(ids[missing] * far, torch.from_numpy(values[ids[missing]]))
        used = (used + ids[missing].tolist())[max(0, len(used) + len(missing) - slots) :] if slots else []


@pytest.mark.parametrize("kind", [row_cache.RowCache, twins.RowCache])
def test_what_is_frozen_stays_for_good(kind: type) -> None:
    kept = kind(2, 1)
    kept.insert(np.array([3, 5]), torch.tensor([[30], [50]], dtype=torch.uint8))
    kept.frozen = True
    kept.insert(np.array([7]), torch.tensor([[70]], dtype=torch.uint8))
    into = torch.zeros(3, 1, dtype=torch.uint8)
    assert kept.lookup(np.array([3, 5, 7]), into).tolist() == [2]
    assert into.flatten().tolist() == [30, 50, 0]


@pytest.mark.parametrize("slots", [1 << 10, (1 << 10) + 1, 3000])
def test_to_find_a_row_costs_what_the_docs_say(slots: int) -> None:
    beside = sum(array.nbytes for array in twins.RowCache(slots, 1).arrays[:3])
    assert 24 * slots <= beside <= 32 * slots
