"""Tests lookups, gradients, metrics and refusals of tables in every placement and format."""

import copy
import pathlib
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rorqual.tables import (
    Table,
    TableConfig,
    dequantise,
    draw_table,
    open_table,
    quantise,
    write_table,
)

pytestmark = pytest.mark.engram

ROWS = 101
WIDTH = 7
BLOCKS = 64
FP8 = torch.float8_e4m3fn


@pytest.fixture(
    scope="module", params=[torch.float32, torch.bfloat16, FP8], ids=["float32", "bfloat16", "fp8"]
)
def stored(request: pytest.FixtureRequest) -> Tensor:
    """Returns rows as a table stores them: numbers, or records of fp8."""
    if request.param == FP8:
        return quantise(torch.randn(ROWS, BLOCKS) * 5)
    return torch.randn(ROWS, WIDTH).to(request.param)


def numbers(stored: Tensor) -> Tensor:
    """Returns the rows that a layer must get."""
    return dequantise(stored, BLOCKS) if stored.dtype == torch.uint8 else stored


def on_device(stored: Tensor) -> Table:
    fp8 = stored.dtype == torch.uint8
    table = Table(ROWS, BLOCKS if fp8 else WIDTH, dtype=FP8 if fp8 else stored.dtype)
    table.load_state_dict({"weight": stored})
    return table.eval()


def placements(stored: Tensor, folder: pathlib.Path) -> list:
    row = stored.shape[1] * stored.dtype.itemsize
    disks = [
        Table.of_file(folder, cache_bytes=hot, prefetch=bool(hot % 2))
        for hot in (0, 1, row, 13 * row, 1 << 20)
    ]
    return [
        on_device(stored),
        Table.of_values(stored),
        Table.of_values(stored, prefetch=False),
        *disks,
    ]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_every_placement_gives_the_same_bits(
    stored: Tensor, data: st.DataObject, tmp_path_factory
) -> None:
    folder = write_table(
        tmp_path_factory.mktemp("table") / "t", stored, shard_rows=data.draw(st.integers(1, 150))
    )
    tables = placements(stored, folder)
    values = numbers(stored)
    for _ in range(data.draw(st.integers(1, 6))):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
        ids = torch.randint(ROWS, shape)
        for table in tables:
            assert torch.equal(table.prefetch(ids).wait(), values[ids])
            with torch.no_grad():
                assert torch.equal(table.prefetch(ids).wait(), values[ids])
    for table in tables[3:]:
        table.close()


def test_large_looks_up_have_the_same_bits(tmp_path: pathlib.Path) -> None:
    """Tests sizes at which memory is reused, ids that are a slice, and 32-bit ids."""
    values = torch.randn(5000, 128)
    table = Table(5000, 128)
    table.load_state_dict({"weight": values})
    disk = Table.of_file(write_table(tmp_path / "t", values, shard_rows=1999), cache_bytes=1 << 20)
    ids = torch.randint(5000, (9000, 3))[:, 1]
    for placement in (table, Table.of_values(values), disk):
        with torch.inference_mode():
            for some in (ids, ids[:4000], ids.int()):
                assert torch.equal(placement.prefetch(some).wait(), values[some])
    disk.close()


@pytest.mark.parametrize("prefetch", [True, False])
def test_looks_up_that_are_partly_hot_have_the_same_bits(
    prefetch: bool, tmp_path: pathlib.Path
) -> None:
    """Cached rows are scattered among the ids of a call.

    The ids are too many to be fetched one by one.
    """
    values = torch.randn(5000, 8)
    table = Table.of_file(
        write_table(tmp_path / "t", values), cache_bytes=2000 * 8 * 4, prefetch=prefetch
    )
    for _ in range(8):
        ids = torch.randint(5000, (700,))
        assert torch.equal(table.prefetch(ids).wait(), values[ids])
    assert 0 < table.metrics()["hits"] < table.metrics()["different"]
    table.close()


def test_several_requests_on_their_way_at_once(stored: Tensor, tmp_path: pathlib.Path) -> None:
    table = Table.of_file(write_table(tmp_path / "t", stored), cache_bytes=200)
    values = numbers(stored)
    # These are more than fit into the queue.
    ids = [torch.randint(ROWS, (5, 3)) for _ in range(40)]
    pending = [table.prefetch(each) for each in ids]
    for each, rows in zip(reversed(ids), reversed(pending), strict=True):
        assert torch.equal(rows.wait(), values[each])
        assert torch.equal(rows.wait(), values[each])
    table.close()


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_rows_stay_while_somebody_holds_them(placement: str, tmp_path: pathlib.Path) -> None:
    """Later lookups of a table never write into the memory of earlier rows that are in use.

    Beams, concurrent requests and views hold such rows.
    """
    values = torch.randn(5000, 128)
    if placement == "device":
        table = Table(5000, 128)
        table.load_state_dict({"weight": values})
    else:
        table = (
            Table.of_values(values)
            if placement == "host"
            else Table.of_file(write_table(tmp_path / "t", values))
        )
    with torch.no_grad():
        ids = [torch.randint(5000, (3, 1000)) for _ in range(6)]
        pending = [table.prefetch(each) for each in ids]
        # Only a view holds the rows.
        stored = [each.wait().flatten(1)[:, 128:] for each in pending]
        for each, rows in zip(ids, stored, strict=True):
            assert torch.equal(rows, values[each].flatten(1)[:, 128:])


def test_memory_of_rows_that_are_gone_is_taken_again() -> None:
    table = Table(5000, 128)
    ids = torch.randint(5000, (3000,))
    with torch.no_grad():
        rows = table.prefetch(ids).wait()
        position = rows.data_ptr()
        rows = rows[:1]
        assert table.prefetch(ids).wait().data_ptr() != position
        del rows
        assert position in {table.prefetch(ids).wait().data_ptr() for _ in range(2)}


def test_rows_saved_for_a_backward_pass_are_not_overwritten() -> None:
    """The graph holds the rows of a frozen table under a trainable layer."""
    table = Table(5000, 128).requires_grad_(False)
    weight = torch.randn(128, requires_grad=True)
    ids = torch.randint(5000, (3000,))
    loss = (table.prefetch(ids).wait() * weight).sum()
    table.prefetch(ids.flip(0) // 2).wait()
    loss.backward()
    torch.testing.assert_close(weight.grad, table.weight[ids].sum(0))


def test_a_table_is_copied_and_pickled_after_a_lookup() -> None:
    table = Table(5000, 128)
    ids = torch.randint(5000, (3000,))
    with torch.no_grad():
        expected = table.prefetch(ids).wait()
        for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
            assert torch.equal(other.prefetch(ids).wait(), expected)


def test_gradients_of_the_device_table_are_dense_unless_asked_for_sparse_ones() -> None:
    ids = torch.tensor([[1, 4], [4, 8]])
    grad = torch.randn(2, 2, 3)
    expected = torch.zeros(9, 3).index_add(0, ids.flatten(), grad.view(4, 3))
    plain = Table(9, 3)
    asked = Table(9, 3, sparse=True)
    switched = Table(9, 3)
    switched.sparse = True
    for table, sparse in ((plain, False), (asked, True), (switched, True)):
        (table.prefetch(ids).wait() * grad).sum().backward()
        assert table.weight.grad.is_sparse == sparse
        torch.testing.assert_close(table.weight.grad.to_dense(), expected)
    assert 0.015 < Table(1000, 10).weight.std() < 0.025


def test_gradients_of_fp8_rows_are_refused() -> None:
    table = Table(9, 32, dtype=FP8)
    ids = torch.tensor([1, 4])
    assert [name for name, each in table.named_parameters() if each.requires_grad] == []
    assert not table.eval().prefetch(ids).wait().any()
    with pytest.raises(ValueError, match="expected inference"):
        table.train().prefetch(ids).wait()
    with torch.no_grad():
        assert table.prefetch(ids).wait().shape == (2, 32)
    with pytest.raises(RuntimeError, match="floating point"):
        table.requires_grad_(True)
    with pytest.raises(ValueError, match="got rows of width 33, expected a multiple of 32"):
        Table(9, 33, dtype=FP8)


def test_fp8_rows_on_the_device_follow_casts_of_the_model() -> None:
    records = quantise(torch.randn(ROWS, BLOCKS))
    table = on_device(records).to(torch.bfloat16)
    assert torch.equal(table.prefetch(torch.arange(ROWS)).wait(), dequantise(records, BLOCKS))


def test_outside_of_training_and_inside_are_the_same_rows() -> None:
    table = Table(5000, 128)
    ids = torch.randint(5000, (2, 1500))
    learned = table.prefetch(ids).wait()
    assert learned.requires_grad
    with torch.no_grad():
        looked_up = table.prefetch(ids).wait()
    assert not looked_up.requires_grad
    assert torch.equal(looked_up, learned)
    assert torch.equal(looked_up, F.embedding(ids, table.weight))


@pytest.mark.parametrize("bad", [-1, ROWS, 2**40, -(2**62)])
def test_ids_outside_the_table_are_refused(
    stored: Tensor, bad: int, tmp_path: pathlib.Path
) -> None:
    values = numbers(stored)
    for table in placements(stored, write_table(tmp_path / "t", stored)):
        with pytest.raises(ValueError, match=f"got row id {bad}, expected 0 to {ROWS - 1}"):
            table.prefetch(torch.tensor([[0, bad], [1, 2]]))
        assert torch.equal(table.prefetch(torch.tensor([3])).wait(), values[3:4])


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_bad_ids_are_found_wherever_they_stand(data: st.DataObject) -> None:
    """Tests one id out of range among good ones, in both integer types, contiguous or not."""
    table = Table(ROWS, 2)
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32]))
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    ids = torch.randint(ROWS, [*shape, 2]).to(dtype)[..., 0]
    assert torch.equal(table.prefetch(ids).wait(), table.weight[ids.long()])
    least = torch.iinfo(dtype).min
    largest = torch.iinfo(dtype).max
    bad = data.draw(st.one_of(st.integers(least, -1), st.integers(ROWS, largest)))
    ids[tuple(data.draw(st.integers(0, n - 1)) for n in shape)] = bad
    with pytest.raises(ValueError, match=f"got row id {bad}, expected 0 to {ROWS - 1}"):
        table.prefetch(ids)


@pytest.mark.parametrize("bad", [-1, 300_000, 2**40, -(2**62)])
@pytest.mark.parametrize("position", [0, 70_000])
def test_ids_that_are_written_to_before_the_wait_read_no_other_memory(
    bad: int, position: int
) -> None:
    """Changing ids after the prefetch that checked them raises an error.

    No other memory is read.
    """
    values = torch.randn(300_000, 8)
    ids = torch.zeros(70_001, dtype=torch.int64)
    for table in (Table.of_values(values), Table(300_000, 8)):
        with torch.no_grad():
            pending = table.prefetch(ids)
            ids[position] = bad
            with pytest.raises(IndexError, match="out of range"):
                pending.wait()
            ids[position] = 0


def test_ids_that_are_no_whole_numbers_are_refused(tmp_path: pathlib.Path) -> None:
    values = torch.randn(ROWS, WIDTH)
    for table in placements(values, write_table(tmp_path / "t", values)):
        for dtype in (torch.float32, torch.bool, torch.uint8, torch.int16):
            with pytest.raises(
                ValueError, match=f"got row ids in {dtype}, expected torch.int64 or torch.int32"
            ):
                table.prefetch.__wrapped__(table, torch.zeros(2, dtype=dtype))


def test_ten_thousand_bad_batches_are_refused(tmp_path: pathlib.Path) -> None:
    """Tests one id or many out of range, near the ends and far, in every placement.

    None is answered, in particular not with zeros.
    """
    values = torch.randn(ROWS, WIDTH)
    tables = placements(values, write_table(tmp_path / "t", values))[:4]
    draw = np.random.default_rng(0)
    for turn in range(10_000):
        ids = draw.integers(ROWS, size=int(draw.integers(1, 40)))
        count = int(draw.integers(1, len(ids) + 1))
        far = draw.choice([1, ROWS, 2**31, 2**62])
        bad = np.where(
            draw.random(count) < 0.5,
            -draw.integers(1, far + 1, count),
            ROWS + draw.integers(far, size=count),
        )
        ids[draw.permutation(len(ids))[:count]] = bad
        with pytest.raises(ValueError, match=r"got row id -?\d+, expected 0 to 100"):
            tables[turn % 4].prefetch(torch.from_numpy(ids))
    assert all(table.metrics().get("rows", 0) == 0 for table in tables)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_a_million_rows_are_the_same_bits_everywhere(
    dtype: torch.dtype, tmp_path: pathlib.Path
) -> None:
    """Compares the bits of all placements.

    There are duplicates, evictions, three sizes of the row cache, a frozen list, prefetch on and
    off.
    """
    folder = draw_table(tmp_path / "t", 1_000_003, 32, dtype=dtype, shard_rows=300_000)
    whole = open_table(folder, "rows", TableConfig()).eval()
    row = whole.weight.shape[1] * whole.weight.element_size()
    others = [
        open_table(folder, "rows", TableConfig(placement="host", prefetch=on))
        for on in (True, False)
    ]
    for hot in (0, row, 1000 * row, 1 << 30):
        others += [Table.of_file(folder, cache_bytes=hot, prefetch=on) for on in (True, False)]
    others.append(
        Table.of_file(folder, cache_bytes=5000 * row, cached_rows=torch.randint(1_000_003, (9000,)))
    )
    with torch.no_grad():
        for turn in range(40):
            ids = torch.randint(1_000_003, (25_000,))
            # This makes duplicates within a batch, and rows that occur again later.
            ids[::2] %= 1 + 2000 * turn
            expected = whole.prefetch(ids).wait()
            for table in others:
                assert torch.equal(
                    table.prefetch(ids).wait().view(torch.uint8), expected.view(torch.uint8)
                )


def test_hot_rows_are_counted_and_the_oldest_gives_way(tmp_path: pathlib.Path) -> None:
    values = torch.randn(ROWS, WIDTH)
    table = Table.of_file(
        write_table(tmp_path / "t", values), cache_bytes=2 * WIDTH * 4, prefetch=False
    )
    for ids, hits in (([1, 1, 2], 0), ([1], 1), ([3], 1), ([2], 1), ([3], 2), ([1], 2)):
        table.prefetch(torch.tensor(ids)).wait()
        assert table.metrics()["hits"] == hits, ids
    assert table.metrics()["rows"] == 8
    assert table.metrics()["bytes"] == 5 * WIDTH * 4
    assert Table(2, 2).metrics() == {}


def test_bad_sizes_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="got 0 rows"):
        Table(0, 3)
    with pytest.raises(ValueError, match="-1 bytes"):
        Table.of_file(write_table(tmp_path / "t", torch.randn(4, 3)), cache_bytes=-1)
    with pytest.raises(
        ValueError, match=r"got torch.float64 rows, expected torch.float32, .*bfloat16, .*e4m3fn"
    ):
        Table.of_values(torch.randn(4, 3).double())
    with pytest.raises(ValueError, match="got records of 3 bytes"):
        Table.of_values(torch.zeros(4, 3, dtype=torch.uint8))


@pytest.mark.slow
@pytest.mark.compiled
def test_lookup_of_fp8_rows_is_one_compiled_graph() -> None:
    records = quantise(torch.randn(ROWS, BLOCKS))
    ids = torch.randint(ROWS, (3, 5))
    table = on_device(records)
    lookup = torch.compile(lambda rows: table.prefetch(rows).wait(), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(lookup(ids), dequantise(records, BLOCKS)[ids])
