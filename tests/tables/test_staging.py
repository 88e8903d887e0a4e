"""Tests the memory that staging returns: its shape, its reuse and its bounds."""

import copy
import gc
import pickle
import threading
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
import torch

from rorqual.tables.staging import Staging

pytestmark = pytest.mark.engram

ROWS, WIDTH = 1000, 300  # 1.2 MB in float32, the size from which memory is reused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(
    ("rows", "width"), [(0, 3), (3, 5), (ROWS, WIDTH), (1 << 15, 77), (1, 1 << 21)]
)
def test_memory_has_the_shape_and_type_asked_for(dtype: torch.dtype, rows: int, width: int) -> None:
    arguments = Staging().take(rows, width, dtype)
    assert arguments.shape == (rows, width)
    assert arguments.dtype == dtype
    assert arguments.is_contiguous()
    assert arguments.data_ptr() % 64 == 0 or not rows
    arguments.fill_(3)
    assert (arguments == 3).all()


def test_living_tensors_never_share_memory() -> None:
    staging = Staging()
    arguments = [staging.take(ROWS, WIDTH, torch.float32).fill_(n) for n in range(5)]
    assert all((each == n).all() for n, each in enumerate(arguments))


def test_the_last_view_holds_the_memory() -> None:
    staging = Staging()
    arguments = staging.take(ROWS, WIDTH, torch.float32)
    position = arguments.data_ptr()
    view = arguments[3:5].t().view(torch.int32)
    del arguments
    other = staging.take(ROWS, WIDTH, torch.float32)
    assert other.data_ptr() != position
    array = view.numpy()
    del view
    third = staging.take(ROWS, WIDTH, torch.float32)
    assert third.data_ptr() not in (position, other.data_ptr())
    del array
    assert staging.take(ROWS, WIDTH, torch.float32).data_ptr() == position


@pytest.fixture
def allocated() -> Iterator[Callable[[], int]]:
    """Returns the bytes allocated since the test began, including Python's small objects."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()


SMALL = 100_000


def test_smaller_ones_go_where_larger_ones_were(allocated: Callable[[], int]) -> None:
    staging = Staging()
    position = staging.take(4 * ROWS, WIDTH, torch.float32).data_ptr()
    for rows in (4 * ROWS, ROWS, 2 * ROWS):
        assert staging.take(rows, WIDTH, torch.float32).data_ptr() == position
    staging.take(5 * ROWS, WIDTH, torch.float32)
    assert 0 <= allocated() - 5 * ROWS * WIDTH * 4 <= SMALL


def test_what_is_kept_is_bounded(allocated: Callable[[], int]) -> None:
    staging = Staging()
    arguments = [staging.take(ROWS, WIDTH, torch.float32) for _ in range(9)]
    del arguments
    gc.collect()
    assert allocated() <= 2 * ROWS * WIDTH * 4 + SMALL


def test_copies_begin_with_nothing(allocated: Callable[[], int]) -> None:
    staging = Staging()
    staging.take(ROWS, WIDTH, torch.float32)
    others = [copy.deepcopy(staging), pickle.loads(pickle.dumps(staging))]
    assert allocated() <= ROWS * WIDTH * 4 + SMALL
    for other in others:
        assert other.take(ROWS, WIDTH, torch.float32).shape == (ROWS, WIDTH)


def test_threads_get_memory_of_their_own() -> None:
    staging = Staging()
    wrong = []

    def work(number: int) -> None:
        for _ in range(200):
            arguments = staging.take(ROWS, WIDTH, torch.float32)
            arguments[:, 0].fill_(number)
            if not (arguments[:, 0] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
