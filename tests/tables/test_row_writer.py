"""Tests that tables are written whole or not at all, from given, stored or drawn rows."""

import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rorqual.tables import (
    Table,
    TableError,
    convert,
    dequantise,
    draw_table,
    quantise,
    verify,
    write_table,
)

pytestmark = pytest.mark.engram

FP8 = torch.float8_e4m3fn


def rows_of(folder: pathlib.Path) -> torch.Tensor:
    """Returns the rows as they are stored, read by another library."""
    return torch.cat([load_file(file)["rows"] for file in sorted(folder.glob("*"))])


def test_a_table_is_written_in_the_format_asked_for(tmp_path: pathlib.Path) -> None:
    values = torch.randn(10, 64)
    records = quantise(values)
    for dtype, values_given, cached in [
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
        assert torch.equal(torch.cat(parts), cached)
        expected = dequantise(cached, 64) if cached.dtype == torch.uint8 else cached
        table = Table.of_file(folder)
        assert (table.rows, table.width) == expected.shape
        assert torch.equal(table.prefetch(torch.arange(len(cached))).wait(), expected)
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
    with pytest.raises(
        ValueError, match=r"got torch.float64 rows, expected torch.float32, .*bfloat16, .*e4m3fn"
    ):
        write_table(tmp_path / "u", torch.randn(4, 3).double())
    with pytest.raises(ValueError, match=r"got torch.float16 rows"):
        write_table(tmp_path / "u", torch.randn(4, 3), dtype=torch.float16)
    with pytest.raises(ValueError, match="got rows of width 3, expected a multiple of 32"):
        write_table(tmp_path / "u", torch.randn(4, 3), dtype=FP8)
    with pytest.raises(ValueError, match="got 0 rows a shard"):
        write_table(tmp_path / "u", torch.randn(4, 3), shard_rows=0)
    assert not (tmp_path / "u").exists()
    for position in ("", ".", "..", "/", tmp_path / "none" / ".."):
        with pytest.raises(
            ValueError, match="has no name of its own, expected a new or empty folder's"
        ):
            write_table(position, torch.randn(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize("into", [torch.float32, torch.bfloat16, FP8])
def test_a_table_is_converted_shard_by_shard(
    dtype: torch.dtype, into: torch.dtype, tmp_path: pathlib.Path
) -> None:
    values = torch.randn(50, 64)
    stored = write_table(tmp_path / "a", values, dtype=dtype, shard_rows=17)
    text: list[int] = []
    folder = convert(stored, tmp_path / "b", dtype=into, shard_rows=23, progress=text.append)
    expected = write_table(tmp_path / "c", rows_of(stored), dtype=into)
    assert torch.equal(rows_of(folder), rows_of(expected))
    row = rows_of(folder).shape[1] * rows_of(folder).itemsize
    assert text == [23 * row, 46 * row, 50 * row]


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
    one, two = (
        draw_table(tmp_path / name, 20_000, 32, std=0.5, seed=3, shard_rows=7000) for name in "ab"
    )
    assert torch.equal(rows_of(one), rows_of(two))
    other = rows_of(draw_table(tmp_path / "c", 20_000, 32, std=0.5, seed=4, shard_rows=7000))
    assert not (other == rows_of(one)).any(1).any()
    assert abs(other.std() - 0.5) < 0.005
    assert len(other.unique(dim=0)) == 20_000
    fp8 = rows_of(
        draw_table(tmp_path / "d", 20_000, 32, std=0.5, seed=4, shard_rows=7000, dtype=FP8)
    )
    assert torch.equal(fp8, quantise(other))
    with pytest.raises(ValueError, match="got 0 rows of width 3"):
        draw_table(tmp_path / "e", 0, 3)


def test_a_tensor_that_cannot_be_written_leaves_nothing(tmp_path: pathlib.Path) -> None:
    values = torch.randn(20, 32)
    values[15, 3] = torch.nan
    with pytest.raises(ValueError, match="is nan, infinite"):
        write_table(tmp_path / "t", values, dtype=FP8, shard_rows=7)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        ValueError, match=r"bytes free, expected 4,000,000,000,000,000 for the table"
    ):
        draw_table(tmp_path / "t", 10**12, 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_table_in_parts_and_shards_is_the_same_table(tmp_path: pathlib.Path) -> None:
    """The rows take 40 MiB, more than is written at a time."""
    values = torch.randn(41, 1 << 18)
    for number, shard_rows in enumerate((13, 41, 500, None)):
        folder = write_table(tmp_path / str(number), values, shard_rows=shard_rows)
        assert torch.equal(rows_of(folder), values)
        assert verify(folder) == []
        shutil.rmtree(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_was_stopped_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stops the build within every shard in turn.

    There is no table until the last shard; its bytes are the same, and no shard is made again.
    """
    whole = draw_table(tmp_path / "whole", 40, 64, shard_rows=10)
    expected = {file.name: file.read_bytes() for file in whole.glob("*")}
    generator = np.random.default_rng
    made = []

    def once(seed: list[int]) -> np.random.Generator:
        made.append(seed)
        if len(made) == 2:
            raise KeyboardInterrupt
        return generator(seed)

    monkeypatch.setattr(np.random, "default_rng", once)
    folder = tmp_path / "t"
    drawn = list[list[int]]()
    while not folder.exists():
        made.clear()
        try:
            draw_table(folder, 40, 64, shard_rows=10)
        except KeyboardInterrupt:
            assert len(list((tmp_path / "t.partial").glob("*.safetensors"))) == len(drawn) + 1
            with pytest.raises(
                ValueError, match="finish it by the command that began it, or delete"
            ):
                draw_table(folder, 41, 64, shard_rows=10)
        drawn.append(made[0])
    assert len(drawn) == len({tuple(seed) for seed in drawn}) == 4
    assert {file.name: file.read_bytes() for file in folder.glob("*")} == expected


def test_a_build_that_was_stopped_before_the_table_had_its_name_goes_on(
    tmp_path: pathlib.Path,
) -> None:
    """All shards are there, and none is written again."""
    size = 40 * 8 * 4

    def stop(done: int) -> None:
        if done == size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_table(tmp_path / "t", 40, 8, shard_rows=10, progress=stop)
    written = {
        path.name: path.stat().st_ino for path in (tmp_path / "t.partial").glob("*.safetensors")
    }
    folder = draw_table(tmp_path / "t", 40, 8, shard_rows=10)
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == written
    assert len(written) == 4
    assert list(tmp_path.iterdir()) == [folder]


KILLED = """
import os, sys, torch
from rorqual.tables import write_rows
def source(first, end):
    if first:
        os._exit(1)
    return torch.zeros(end - first, 1 << 18)
write_rows(sys.argv[1], 2000, 1 << 18, source)
"""


def test_rows_that_were_in_memory_are_written_anew(tmp_path: pathlib.Path) -> None:
    """A killed process leaves a shard of its rows, which differ from those of the next process."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "t")], check=False)
    assert done.returncode == 1
    assert (tmp_path / "t.partial").is_dir()
    with pytest.raises(ValueError, match="got the beginning of another table"):
        write_table(tmp_path / "t", torch.randn(20, 8), shard_rows=10)
    values = torch.randn(20, 8)
    partial = tmp_path / "u.partial"
    write_table(partial, torch.zeros(20, 8), shard_rows=10)
    note = '[null, 20, 8, "torch.float32", 10]'
    (partial / "origin.json").write_text(note, encoding="utf-8")
    assert torch.equal(rows_of(write_table(tmp_path / "u", values, shard_rows=10)), values)


def test_one_process_writes_a_table(tmp_path: pathlib.Path) -> None:
    """The same command is refused while the table is being written."""
    refused: list[str] = []

    def again(done: int) -> None:
        if not refused:
            with pytest.raises(
                ValueError, match="another process writes this table, expected one at a"
            ) as error:
                draw_table(tmp_path / "t", 20, 8, shard_rows=10)
            refused.append(str(error.value))

    folder = draw_table(tmp_path / "t", 20, 8, shard_rows=10, progress=again)
    assert "t.partial" in refused[0]
    assert verify(folder) == []
    with pytest.raises(
        ValueError, match="got 549755813889 rows a shard, expected 1 to 17179869184: its checksums"
    ):
        draw_table(tmp_path / "u", 2**40, 8, shard_rows=2**39 + 1)
