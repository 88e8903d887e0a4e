"""Files of rows, sound, scattered and cut, in -> the rows, the reads or the refusal that must come."""

import os
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rorqual.kernels import files as twins
from rorqual.tables import DiskTable, TableError, dequantise, quantise, write_table
from rorqual.tables.disk_table import read_places

pytestmark = pytest.mark.engram

ROWS, WIDTH = 101, 7


def test_any_matrix_of_any_safetensors_file_is_a_table(tmp_path: pathlib.Path) -> None:
    weight = torch.randn(ROWS, WIDTH)
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3, dtype=torch.int8), "tables.0.weight": weight, "z": torch.ones(2, 2)}, path)
    table = DiskTable(path, name="tables.0.weight")
    assert torch.equal(table.prefetch(torch.arange(ROWS)).wait(), weight)
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
    assert torch.equal(table.prefetch(ids).wait(), values[ids])
    table.close()


def test_neighbours_are_one_read_and_long_runs_several(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(20_000, 32)  # 128 bytes a row
    table = DiskTable(write_table(tmp_path / "t", values, shard_rows=15_000), hot_bytes=0, prefetch=False)
    seen: list[int] = []
    monkeypatch.setenv("RORQUAL_KERNELS", "reference")
    read = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, into, at, *how: (seen.append(len(into[0])), read(file, into, at, *how))[1]
    )

    def sizes(ids: list[int]) -> list[int]:
        seen.clear()
        assert torch.equal(table.prefetch(torch.tensor(ids)).wait(), values[ids])
        return seen

    assert sizes([5]) == [128]
    assert sizes([6, 5, 7, 5]) == [3 * 128]
    assert sizes([5, 7]) == [128, 128]
    assert sizes([14_999, 15_000]) == [128, 128]  # another shard
    assert sizes(list(range(20_000))) == [1 << 20, 15_000 * 128 - (1 << 20), 5000 * 128]


def test_the_system_is_told_of_every_read_once_before_it_comes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(5000, 120)
    table = DiskTable(write_table(tmp_path / "t", values), hot_bytes=0, prefetch=False)
    events: list[tuple[str, int]] = []
    monkeypatch.setenv("RORQUAL_KERNELS", "reference")
    read, tell = os.preadv, os.posix_fadvise
    monkeypatch.setattr(
        os, "preadv", lambda file, into, at, *how: (events.append(("read", at)), read(file, into, at, *how))[1]
    )
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, at, size, how: (events.append(("told", at)), tell(file, at, size, how))[1]
    )
    ids = torch.randperm(2500) * 2
    assert torch.equal(table.prefetch(ids).wait(), values[ids])
    told = [at for kind, at in events if kind == "told"]
    asked = [at for kind, at in events if kind == "read"]
    assert told == asked
    assert len(asked) == 2500
    ahead = np.cumsum([1 if kind == "told" else -1 for kind, _ in events])
    assert ahead.min() == 0
    assert ahead.max() == 1024


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_twin_reads_what_the_reference_reads(data: st.DataObject, tmp_path_factory) -> None:
    """Several files, any places, ends of files, closed files: the same bytes, and the same reads that failed."""
    folder = tmp_path_factory.mktemp("files")
    sizes = data.draw(st.lists(st.integers(0, 20_000), min_size=1, max_size=3))
    files = []
    for number, size in enumerate(sizes):
        (folder / str(number)).write_bytes(np.random.default_rng(number).bytes(size))
        files.append(os.open(folder / str(number), os.O_RDONLY))
    count = data.draw(st.integers(0, 200))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    files_of = np.array([*files, -1])[draw.integers(0, len(files) + data.draw(st.integers(0, 1)), count)]
    lengths = draw.integers(0, 300, count)
    places = np.cumsum(lengths) - lengths
    given = (files_of, np.sort(draw.integers(0, 20_000, count)), lengths, places)
    ours, theirs = (np.zeros(int(lengths.sum()), np.uint8) for _ in range(2))
    failed, expected = twins.read_places(*given, ours), read_places(*given, theirs)
    assert np.array_equal(failed, expected)
    for place, length, lost in zip(places, lengths, failed, strict=True):
        assert lost or np.array_equal(ours[place : place + length], theirs[place : place + length])
    for file in files:
        os.close(file)


@pytest.mark.parametrize("count", [3, 64, 65, 3000])
def test_rows_that_the_system_does_not_hold_are_waited_for(count: int, tmp_path: pathlib.Path) -> None:
    """After the system was told to forget the file; few rows and many, near and apart."""
    values = torch.randn(6000, 300)
    (path,) = write_table(tmp_path / "t", values).glob("*")
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    table = DiskTable(path.parent, hot_bytes=0, prefetch=False)
    ids = torch.randperm(6000)[:count]
    assert torch.equal(table.prefetch(ids).wait(), values[ids])
    table.close()


def test_few_rows_that_the_system_holds_need_no_thread(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that it does not hold, and many, are the thread's; the rows are the same."""
    monkeypatch.setenv("RORQUAL_KERNELS", "reference")
    values, read = torch.randn(600, 4), DiskTable._read
    table = DiskTable(write_table(tmp_path / "t", values), hot_bytes=0)
    asked: list[bool] = []

    def held(own: DiskTable, ids: np.ndarray, wait: bool = True) -> torch.Tensor | None:
        asked.append(wait)
        return read(own, ids) if wait or held.all else None

    monkeypatch.setattr(DiskTable, "_read", held)
    for everything, count, expected, thread in (
        (True, 256, [False], 0),
        (False, 256, [False, True], 1),
        (True, 257, [True], 1),
    ):
        held.all = everything
        asked.clear()
        ids = torch.randint(600, (count,))
        assert torch.equal(table.prefetch(ids).wait(), values[ids])
        assert (asked, int(table._thread.started)) == (expected, thread)
    assert table.metrics()["rows"] == 256 + 256 + 257
    table.close()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_few_rows_are_those_that_many_would_be(data: st.DataObject, tmp_path_factory) -> None:
    """Duplicates, shards, hot rows that give way or stay, a cut file: the same rows, counts, or the general way."""
    values = torch.arange(90).view(90, 1) + torch.arange(5) / 8
    folder = write_table(tmp_path_factory.mktemp("t") / "t", values, shard_rows=data.draw(st.integers(7, 90)))
    hot = data.draw(st.sampled_from([0, 20, 60, 2000]))
    frozen = torch.tensor(data.draw(st.lists(st.integers(0, 89), max_size=4)), dtype=torch.int64)
    table = DiskTable(folder, hot_bytes=hot, hot_rows=frozen)
    seen: set[int] = set()
    for ids in data.draw(st.lists(st.lists(st.integers(0, 89), min_size=1, max_size=20), max_size=5)):
        before = table.metrics()
        assert torch.equal(table._at_once(np.array(ids)), values[ids])
        more = {name: value - before[name] for name, value in table.metrics().items()}
        assert (more["rows"], more["different"]) == (len(ids), len(set(ids)))
        assert more["bytes"] == (more["different"] - more["hits"]) * 20
        if hot == 2000 and not len(frozen):
            assert more["hits"] == len(seen & set(ids))
        seen |= set(ids)
    for path in folder.glob("*"):
        os.truncate(path, 1)
    table._cache = type(table._cache)(0, 20)
    assert table._at_once(np.array([3])) is None
    table.close()


@pytest.mark.parametrize("kernels", ["", "reference"])
def test_what_is_not_in_memory_is_not_given_without_a_wait(
    kernels: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is given is right; on a file that the system forgot, nothing need be."""
    monkeypatch.setenv("RORQUAL_KERNELS", kernels)
    values = torch.randn(3000, 300)
    table = DiskTable(write_table(tmp_path / "t", values), hot_bytes=0, prefetch=False)
    ids = np.arange(0, 3000, 7)
    table.drop_page_cache()
    for _ in range(2):
        found = table._read(ids, wait=False)
        assert found is None or torch.equal(found.view(torch.float32), values[::7])
        assert torch.equal(table._read(ids).view(torch.float32), values[::7])
    table.close()
    assert table._read(ids, wait=False) is None


def test_memory_too_small_for_what_is_read_is_refused() -> None:
    with pytest.raises(ValueError, match="got some up to byte 8, expected at most 7"):
        twins.read_places(*(np.array([n]) for n in (0, 0, 5, 3)), np.zeros(7, np.uint8))


def test_hot_rows_of_fp8_cost_their_record(tmp_path: pathlib.Path) -> None:
    records = quantise(torch.randn(ROWS, 64))
    table = DiskTable(write_table(tmp_path / "t", records), hot_bytes=2 * 66, prefetch=False)
    for ids, hits in (([1, 2], 0), ([1, 2], 2), ([3], 2), ([2], 3), ([3], 4)):
        assert torch.equal(table.prefetch(torch.tensor(ids)).wait(), dequantise(records, 64)[ids])
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
    pending = table.prefetch(torch.tensor([9]))
    with pytest.raises(TableError, match=r"got 7 bytes of row 9, expected 12"):
        pending.wait()
    assert torch.equal(table.prefetch(torch.tensor([0, 8])).wait(), values[[0, 8]])
    path.unlink()  # an open file stays readable
    assert torch.equal(table.prefetch(torch.tensor([1])).wait(), values[1:2])
    table.close()
    with pytest.raises(TableError, match="closed"):
        table.prefetch(torch.tensor([1])).wait()


def test_a_cut_names_the_first_row_that_is_lost(tmp_path: pathlib.Path) -> None:
    values = torch.randn(10, 3)
    (path,) = write_table(tmp_path / "t", values).glob("*.safetensors")
    table = DiskTable(path.parent, hot_bytes=0, prefetch=False)
    os.truncate(path, path.stat().st_size - 3 * 12 - 5)
    with pytest.raises(TableError, match=r"got 7 bytes of row 6, expected 12"):
        table.prefetch(torch.arange(10)).wait()
    assert torch.equal(table.prefetch(torch.arange(6)).wait(), values[:6])
    table.close()


def test_files_replaced_fifty_times_while_serving(tmp_path: pathlib.Path) -> None:
    """Cut, replaced, unlinked in turn: the call that needs lost rows fails, the process and the next table live."""
    values = torch.randn(100, 16)
    for turn in range(50):
        folder = write_table(tmp_path / str(turn), values)
        (path,) = folder.glob("*.safetensors")
        table = DiskTable(folder, hot_bytes=0, prefetch=bool(turn % 2))
        ids = torch.randint(100, (40,))
        pending = table.prefetch(ids)
        if turn % 3 == 0:
            pending.wait()
            os.truncate(path, path.stat().st_size - 1)
            with pytest.raises(TableError, match="row 99"):
                table.prefetch(torch.tensor([99])).wait()
        elif turn % 3 == 1:
            fresh = write_table(tmp_path / f"{turn} anew", values + 1)
            next(fresh.glob("*")).replace(path)
        else:
            path.unlink()
        if turn % 3:
            assert torch.equal(pending.wait(), values[ids])
            assert torch.equal(table.prefetch(ids).wait(), values[ids])
        table.close()


def test_files_that_the_system_was_made_to_remember_need_no_wait(tmp_path: pathlib.Path) -> None:
    values = torch.randn(3000, 300)
    table = DiskTable(write_table(tmp_path / "t", values, shard_rows=1000), hot_bytes=0)
    ids = torch.arange(0, 3000, 40)
    for _ in range(3):
        table.drop_page_cache()
        table.fill_page_cache()
        assert torch.equal(table.prefetch(ids).wait(), values[ids])
    assert not table._thread.started
    table.close()
