"""Rows given, stored or drawn in -> the files that must come, whole or not at all."""

import pathlib
import shutil

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rorqual.tables import (
    DiskTable,
    TableError,
    convert,
    dequantise,
    draw_table,
    quantise,
    row_writer,
    verify,
    write_table,
)

pytestmark = pytest.mark.engram

FP8 = torch.float8_e4m3fn


def rows_of(folder: pathlib.Path) -> torch.Tensor:
    """As they are kept, by another reader than ours."""
    return torch.cat([load_file(file)["rows"] for file in sorted(folder.glob("*"))])


def test_a_table_is_written_in_the_format_asked_for(tmp_path: pathlib.Path) -> None:
    values = torch.randn(10, 64)
    records = quantise(values)
    for dtype, values_given, kept in [
        (None, values, values),
        (torch.bfloat16, values, values.bfloat16()),
        (FP8, values, records),
        (None, records, records),
        (torch.float32, records, dequantise(records, 64)),
        (FP8, values.bfloat16(), quantise(values.bfloat16())),
        (None, values[::2, :3], values[::2, :3]),
    ]:
        folder = write_table(tmp_path / "t", values_given, dtype=dtype, shard_rows=4)
        parts = [load_file(file)["rows"] for file in sorted(folder.glob("*"))]
        assert torch.equal(torch.cat(parts), kept)
        expected = dequantise(kept, 64) if kept.dtype == torch.uint8 else kept
        table = DiskTable(folder)
        assert (table.rows, table.width) == expected.shape
        assert torch.equal(table.prefetch(torch.arange(len(kept))).wait(), expected)
        table.close()
        shutil.rmtree(folder)


def test_fp8_files_say_what_they_are(tmp_path: pathlib.Path) -> None:
    folder = write_table(tmp_path / "t", torch.randn(3, 256), dtype=FP8)
    with safe_open(next(folder.glob("*")), "pt") as file:
        assert file.metadata()["format"] == "fp8-e4m3-e8m0-32"
        assert file.metadata()["width"] == "256"
        assert file.get_slice("rows").get_shape() == [3, 264]


def test_bad_sizes_and_places_are_refused(tmp_path: pathlib.Path) -> None:
    folder = write_table(tmp_path / "t", torch.randn(4, 3))
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        write_table(folder, torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"got torch.float64 rows, expected torch.float32, .*bfloat16, .*e4m3fn"):
        write_table(tmp_path / "u", torch.randn(4, 3).double())
    with pytest.raises(ValueError, match=r"got torch.float16 rows"):
        write_table(tmp_path / "u", torch.randn(4, 3), dtype=torch.float16)
    with pytest.raises(ValueError, match="got rows of width 3, expected a multiple of 32"):
        write_table(tmp_path / "u", torch.randn(4, 3), dtype=FP8)
    with pytest.raises(ValueError, match="got 0 rows a shard"):
        write_table(tmp_path / "u", torch.randn(4, 3), shard_rows=0)
    assert not (tmp_path / "u").exists()
    for place in ("", ".", "..", "/", tmp_path / "none" / ".."):
        with pytest.raises(ValueError, match="has no name of its own, expected a new or empty folder's"):
            write_table(place, torch.randn(4, 3))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 3 << 20), max_size=6), size=st.integers(0, 3 << 20))
def test_checksums_are_those_of_each_mib_however_it_comes(cuts: list[int], size: int) -> None:
    raw = bytes(size)
    sums, edges = row_writer.Checksums(), sorted({0, size, *(cut for cut in cuts if cut < size)})
    for begin, end in zip(edges, edges[1:], strict=False):
        sums.add(memoryview(raw)[begin:end])
    expected = [xxhash.xxh3_64_hexdigest(raw[at : at + (1 << 20)]) for at in range(0, size, 1 << 20)]
    assert sums.digits() == "".join(expected)


def test_a_table_in_parts_and_shards_is_the_same_table(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_writer, "_PART", 7 * 64)
    values = torch.randn(101, 64)
    for number, shard_rows in enumerate((1, 13, 101, 500, None)):
        folder = write_table(tmp_path / str(number), values, shard_rows=shard_rows)
        assert torch.equal(rows_of(folder), values)
        assert verify(folder) == []
        assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16, FP8])
def test_a_table_is_converted_shard_by_shard(
    dtype: torch.dtype, into: torch.dtype, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_writer, "_PART", 1000)
    values = torch.randn(50, 64)
    stored = write_table(tmp_path / "a", values, dtype=dtype, shard_rows=17)
    told: list[int] = []
    folder = convert(stored, tmp_path / "b", dtype=into, shard_rows=23, progress=told.append)
    expected = write_table(tmp_path / "c", rows_of(stored), dtype=into)
    assert torch.equal(rows_of(folder), rows_of(expected))
    row = rows_of(folder).shape[1] * rows_of(folder).itemsize
    assert told == [23 * row, 46 * row, 50 * row]


def test_a_tensor_of_any_file_becomes_a_table(tmp_path: pathlib.Path) -> None:
    weight = torch.randn(9, 5)
    save_file({"tables.0.weight": weight, "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    folder = convert(tmp_path / "model.safetensors", tmp_path / "t", name="tables.0.weight")
    assert torch.equal(rows_of(folder), weight)
    with pytest.raises(TableError, match="expected 'rows'"):
        convert(tmp_path / "model.safetensors", tmp_path / "u")
    with pytest.raises(ValueError, match="got rows of width 5, expected a multiple of 32"):
        convert(folder, tmp_path / "u", dtype=FP8)
    assert not list(tmp_path.glob("u*"))


def test_drawn_rows_are_normal_and_the_same_again(tmp_path: pathlib.Path) -> None:
    one, two = (draw_table(tmp_path / name, 20_000, 32, std=0.5, seed=3, shard_rows=7000) for name in "ab")
    assert torch.equal(rows_of(one), rows_of(two))
    other = rows_of(draw_table(tmp_path / "c", 20_000, 32, std=0.5, seed=4, shard_rows=7000))
    assert not (other == rows_of(one)).any(1).any()
    assert abs(other.std() - 0.5) < 0.005
    assert len(other.unique(dim=0)) == 20_000
    fp8 = rows_of(draw_table(tmp_path / "d", 20_000, 32, std=0.5, seed=4, shard_rows=7000, dtype=FP8))
    assert torch.equal(fp8, quantise(other))
    with pytest.raises(ValueError, match="got 0 rows of width 3"):
        draw_table(tmp_path / "e", 0, 3)


def test_a_build_that_was_stopped_goes_on(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at every part in turn: no table until the last, the same bytes then, no shard written twice."""
    monkeypatch.setattr(row_writer, "_PART", 5 * 64 * 4)
    whole = draw_table(tmp_path / "whole", 40, 64, shard_rows=10)
    expected = {file.name: file.read_bytes() for file in whole.glob("*")}
    finished, kept, left = row_writer._write_shard, row_writer._kept, 0

    def stop(*given: object) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return kept(*given)

    written: list[str] = []
    monkeypatch.setattr(row_writer, "_kept", stop)
    monkeypatch.setattr(row_writer, "_write_shard", lambda *a: (finished(*a), written.append(a[0].name))[0])
    folder, interrupted = tmp_path / "t", 0
    for turn in range(9):
        left = 1 + turn % 2 * 2  # a shard has two parts: stopped within the first missing one, or the one after
        try:
            draw_table(folder, 40, 64, shard_rows=10)
            break
        except KeyboardInterrupt:
            interrupted += 1
            assert not folder.exists()
            with pytest.raises(ValueError, match="expected none: finish it by the command that began it, or delete"):
                draw_table(folder, 41, 64, shard_rows=10)
    assert interrupted > 1
    assert len(written) == len(set(written)) == 4
    assert {file.name: file.read_bytes() for file in folder.glob("*")} == expected


def test_shards_of_rows_that_were_in_memory_are_not_taken_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was killed leaves shards of its rows; those of the next are others."""
    with monkeypatch.context() as patch:
        patch.setattr(row_writer.shutil, "rmtree", lambda *_, **__: None)
        shard = row_writer._write_shard

        def once(*given: object) -> None:
            shard(*given)
            raise KeyboardInterrupt

        patch.setattr(row_writer, "_write_shard", once)
        with pytest.raises(KeyboardInterrupt):
            write_table(tmp_path / "t", torch.zeros(20, 8), shard_rows=10)
    assert len(list((tmp_path / "t.partial").glob("*.safetensors"))) == 1
    values = torch.randn(20, 8)
    assert torch.equal(rows_of(write_table(tmp_path / "t", values, shard_rows=10)), values)


def test_one_process_writes_a_table(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for again while it is being written, by the same command."""
    shard, refused = row_writer._write_shard, []

    def twice(*given: object) -> None:
        if not refused:
            refused.append("")
            with pytest.raises(ValueError, match="another process writes this table, expected one at a time") as told:
                draw_table(tmp_path / "t", 20, 8, shard_rows=10)
            refused.append(str(told.value))
        shard(*given)

    monkeypatch.setattr(row_writer, "_write_shard", twice)
    folder = draw_table(tmp_path / "t", 20, 8, shard_rows=10)
    assert "t.partial" in refused[1]
    assert verify(folder) == []
    with pytest.raises(ValueError, match="got 549755813889 rows a shard, expected 1 to 17179869184: its checksums"):
        draw_table(tmp_path / "u", 2**40, 8, shard_rows=2**39 + 1)


def test_a_tensor_that_cannot_be_written_leaves_nothing(tmp_path: pathlib.Path) -> None:
    values = torch.randn(20, 32)
    values[15, 3] = torch.nan
    with pytest.raises(ValueError, match="is nan, infinite"):
        write_table(tmp_path / "t", values, dtype=FP8, shard_rows=7)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"bytes free, expected 4,000,000,000,000,000 for the table"):
        draw_table(tmp_path / "t", 10**12, 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_was_killed_before_the_table_had_its_name_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards are there: none is written again."""
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            draw_table(tmp_path / "t", 40, 8, shard_rows=10)
    monkeypatch.setattr(row_writer, "_write_shard", None)
    folder = draw_table(tmp_path / "t", 40, 8, shard_rows=10)
    assert verify(folder) == []
    assert sorted(path.suffix for path in folder.iterdir()) == [".safetensors"] * 4
    assert list(tmp_path.iterdir()) == [folder]
