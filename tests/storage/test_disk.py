"""Files of rows, sound, scattered and cut, in -> the rows, the reads or the refusal that must come."""

import os
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rorqual.storage import DiskTable, TableError, dequantise, quantise, write_table
from rorqual.storage.shards import Shard

pytestmark = pytest.mark.engram

ROWS, WIDTH = 101, 7


def test_any_matrix_of_any_safetensors_file_is_a_table(tmp_path: pathlib.Path) -> None:
    weight = torch.randn(ROWS, WIDTH)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, dtype=torch.int8), "tables.0.weight": weight, "z": torch.ones(2, 2)}, path)
    table = DiskTable(path, name="tables.0.weight")
    assert torch.equal(table.request(torch.arange(ROWS)).wait(), weight)
    for name, reason in (("rows", "expected 'rows'"), ("a", "expected rows by width")):
        with pytest.raises(TableError, match=reason):
            DiskTable(path, name=name)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_that_lie_apart_and_together_are_the_ones_asked_for(data: st.DataObject, tmp_path_factory) -> None:
    """Rows of 400 bytes in shards: next to each other, a few apart, a page apart, in other shards."""
    values = torch.arange(300).view(300, 1) + torch.arange(100) / 128
    rows = data.draw(st.integers(1, 320))
    table = DiskTable(write_table(tmp_path_factory.mktemp("table") / "t", values, shard_rows=rows), hot_bytes=0)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 299), min_size=1, max_size=60)))
    assert torch.equal(table.request(ids).wait(), values[ids])
    table.close()


def test_near_rows_are_one_read_and_long_runs_several(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(20_000, 32)  # 128 bytes a row
    table = DiskTable(write_table(tmp_path / "t", values, shard_rows=15_000), hot_bytes=0, prefetch=False)
    reads: list[int] = []
    read = Shard.read
    monkeypatch.setattr(Shard, "read", lambda own, row, into: (reads.append(len(into)), read(own, row, into))[1])

    def sizes(ids: list[int]) -> list[int]:
        reads.clear()
        assert torch.equal(table.request(torch.tensor(ids)).wait(), values[ids])
        return reads

    assert sizes([5]) == [128]
    assert sizes([6, 5, 7, 5]) == [3 * 128]
    assert sizes([5, 9]) == [5 * 128]
    assert sizes([5, 5 + 33]) == [34 * 128]
    assert sizes([5, 5 + 34]) == [128, 128]
    assert sizes([14_999, 15_000]) == [128, 128]  # another shard
    assert sizes(list(range(20_000))) == [1 << 20, 15_000 * 128 - (1 << 20), 5000 * 128]


def test_the_system_is_told_of_every_read_once_before_it_comes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(5000, 1200)  # more than a page a row, so that every second row is a read of its own
    table = DiskTable(write_table(tmp_path / "t", values), hot_bytes=0, prefetch=False)
    events: list[tuple[str, int]] = []
    read, foretell = Shard.read, Shard.foretell
    monkeypatch.setattr(Shard, "read", lambda own, row, into: (events.append(("read", row)), read(own, row, into))[1])
    monkeypatch.setattr(
        Shard, "foretell", lambda own, row, count: (events.append(("told", row)), foretell(own, row, count))[1]
    )
    ids = torch.randperm(5000)[:2500]
    assert torch.equal(table.request(ids).wait(), values[ids])
    told = [row for kind, row in events if kind == "told"]
    asked = [row for kind, row in events if kind == "read"]
    assert told == asked
    assert len(asked) > 1024
    assert all(events.index(("told", row)) < events.index(("read", row)) for row in asked[::50])
    ahead = np.cumsum([1 if kind == "told" else -1 for kind, _ in events])
    assert ahead.max() <= 2 * 1024


def test_hot_rows_of_fp8_cost_their_record(tmp_path: pathlib.Path) -> None:
    records = quantise(torch.randn(ROWS, 64))
    table = DiskTable(write_table(tmp_path / "t", records), hot_bytes=2 * 66, prefetch=False)
    for ids, hits in (([1, 2], 0), ([2, 1], 2), ([3], 2), ([2], 3), ([3], 4)):
        assert torch.equal(table.request(torch.tensor(ids)).wait(), dequantise(records, 64)[ids])
        assert table.metrics()["hits"] == hits, ids
    assert table.metrics()["bytes"] == 3 * 66
    table.close()


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_file_cut_while_serving_fails_the_call_and_no_more(prefetch: bool, tmp_path: pathlib.Path) -> None:
    values = torch.randn(10, 3)
    folder = write_table(tmp_path / "t", values)
    (path,) = folder.glob("*.safetensors")
    table = DiskTable(folder, hot_bytes=0, prefetch=prefetch)
    os.truncate(path, path.stat().st_size - 5)
    pending = table.request(torch.tensor([9]))
    with pytest.raises(TableError, match=r"got 7 bytes of row 9, expected 12"):
        pending.wait()
    assert torch.equal(table.request(torch.tensor([0, 8])).wait(), values[[0, 8]])
    path.unlink()  # an open file stays readable
    assert torch.equal(table.request(torch.tensor([1])).wait(), values[1:2])
    table.close()
    with pytest.raises(TableError, match="closed"):
        table.request(torch.tensor([1])).wait()


def test_a_cut_names_the_first_row_that_is_lost(tmp_path: pathlib.Path) -> None:
    values = torch.randn(10, 3)
    (path,) = write_table(tmp_path / "t", values).glob("*.safetensors")
    table = DiskTable(path.parent, hot_bytes=0, prefetch=False)
    os.truncate(path, path.stat().st_size - 3 * 12 - 5)
    with pytest.raises(TableError, match=r"got 7 bytes of row 6, expected 12"):
        table.request(torch.arange(10)).wait()
    assert torch.equal(table.request(torch.arange(6)).wait(), values[:6])
    table.close()


def test_files_replaced_fifty_times_while_serving(tmp_path: pathlib.Path) -> None:
    """Cut, replaced, unlinked in turn: the call that needs lost rows fails, the process and the next table live."""
    values = torch.randn(100, 16)
    for turn in range(50):
        folder = write_table(tmp_path / str(turn), values)
        (path,) = folder.glob("*.safetensors")
        table = DiskTable(folder, hot_bytes=0, prefetch=bool(turn % 2))
        ids = torch.randint(100, (40,))
        pending = table.request(ids)
        if turn % 3 == 0:
            pending.wait()
            os.truncate(path, path.stat().st_size - 1)
            with pytest.raises(TableError, match="row 99"):
                table.request(torch.tensor([99])).wait()
        elif turn % 3 == 1:
            fresh = write_table(tmp_path / f"{turn} anew", values + 1)
            next(fresh.glob("*")).replace(path)
        else:
            path.unlink()
        if turn % 3:
            assert torch.equal(pending.wait(), values[ids])
            assert torch.equal(table.request(ids).wait(), values[ids])
        table.close()
