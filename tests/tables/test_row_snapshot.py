"""Tests row_snapshot.py: rows are read as they were, whatever is trained meanwhile."""

import gc
import threading

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.tables.row_snapshot import RowSnapshot

ROWS = 23
NAMES = ("weight", "average", "updates")


def tensors() -> dict[str, torch.Tensor]:
    weight = torch.arange(ROWS * 2.0).view(ROWS, 2)
    return {"weight": weight, "average": weight * 3, "updates": torch.arange(ROWS)}


@settings(deadline=None)
@given(st.data())
def test_rows_are_those_of_its_beginning(data):
    """Updates and reads come in any order; rows that were read are not copied any more."""
    trained = tensors()
    snapshot = RowSnapshot(trained)
    read: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    left = dict.fromkeys(NAMES, 0)
    while any(first < ROWS for first in left.values()):
        if data.draw(st.booleans()):
            ids = data.draw(st.lists(st.integers(0, ROWS - 1), unique=True, max_size=6))
            touched = torch.tensor(sorted(ids), dtype=torch.int64)
            snapshot.preserve(touched)
            for tensor in trained.values():
                tensor[touched] += 100
        name = data.draw(st.sampled_from([name for name in NAMES if left[name] < ROWS]))
        end = min(ROWS, left[name] + data.draw(st.integers(1, 9)))
        read[name].append(snapshot.rows(name, left[name], end))
        left[name] = end
    for name, expected in tensors().items():
        assert torch.equal(torch.cat(read[name]), expected), name


def test_two_threads_share_it():
    trained = {"weight": torch.zeros(1000, 4)}
    snapshot = RowSnapshot(trained)
    stop = threading.Event()

    def train() -> None:
        generator = torch.Generator().manual_seed(0)
        while not stop.is_set():
            ids = torch.randint(0, 1000, (50,), generator=generator).unique()
            snapshot.preserve(ids)
            trained["weight"].index_add_(0, ids, torch.ones(len(ids), 4))

    thread = threading.Thread(target=train)
    thread.start()
    pieces = [snapshot.rows("weight", first, first + 10) for first in range(0, 1000, 10)]
    stop.set()
    thread.join()
    assert not torch.cat(pieces).any()
    assert trained["weight"].any()


def copies_of_three() -> int:
    """Counts tensors of three rows of two numbers."""
    return sum(type(each) is torch.Tensor and each.shape == (3, 2) for each in gc.get_objects())


def test_copies_go_with_the_tensor_that_is_read():
    snapshot = RowSnapshot(tensors())
    snapshot.preserve(torch.tensor([1, 2, 9]))
    assert copies_of_three() == 2
    snapshot.rows("weight", 0, 10)
    assert copies_of_three() == 2
    snapshot.rows("weight", 10, ROWS)
    assert copies_of_three() == 1
    # What is read is not copied again, and what is copied once is not, either.
    snapshot.preserve(torch.tensor([2, 3, 4, 5]))
    assert copies_of_three() == 2
    snapshot.rows("average", 0, ROWS)
    assert copies_of_three() == 0


def test_after_close_nothing_is_copied():
    snapshot = RowSnapshot(tensors())
    snapshot.preserve(torch.tensor([1, 2, 3]))
    snapshot.close()
    snapshot.preserve(torch.tensor([4, 5, 6]))
    assert copies_of_three() == 0
