"""Tests that tables have the same rows in every placement, and that bad configs are refused."""

import pathlib

import pytest
import torch
from safetensors.torch import save_file

from rorqual.tables import Table, TableConfig, TableError, hot_rows, open_tables, write_table

pytestmark = pytest.mark.engram

FP8 = torch.float8_e4m3fn
PLACEMENTS = [
    TableConfig(),
    TableConfig(placement="host"),
    TableConfig(placement="host", prefetch=False),
    TableConfig(placement="disk", hot_bytes=0),
    TableConfig(placement="disk", hot_bytes=1000, prefetch=False),
]


def run_of(folder: pathlib.Path) -> list[torch.Tensor]:
    """Writes two tables as a run's weights."""
    values = [torch.randn(50, 32), torch.randn(70, 32)]
    save_file(
        {f"tables.{n}.weight": each for n, each in enumerate(values)}, folder / "model.safetensors"
    )
    return values


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, FP8])
def test_every_placement_has_the_rows_of_the_files(
    dtype: torch.dtype | None, tmp_path: pathlib.Path
) -> None:
    values = run_of(tmp_path)
    folder = None
    if dtype is not None:
        folder = str(tmp_path / "other")
        for n, each in enumerate(values):
            write_table(f"{folder}/{n}", each, dtype=dtype, shard_rows=33)
        values = [
            Table.of_file(f"{folder}/{n}").prefetch(torch.arange(len(v))).wait()
            for n, v in enumerate(values)
        ]
    for config in PLACEMENTS:
        config = TableConfig(
            placement=config.placement,
            folder=folder,
            hot_bytes=config.hot_bytes,
            prefetch=config.prefetch,
        )
        tables = open_tables(tmp_path, 2, config)
        with torch.no_grad():
            for table, expected in zip(tables, values, strict=True):
                assert table.placement == config.placement
                assert torch.equal(table.prefetch(torch.arange(len(expected))).wait(), expected)


def test_rows_that_learnt_on_a_disk_are_found_where_the_weights_have_none(
    tmp_path: pathlib.Path,
) -> None:
    apart = torch.randn(9, 4)
    write_table(tmp_path / "tables" / "0", apart)
    with pytest.raises(TableError, match="expected a run's weights"):
        open_tables(tmp_path, 1, TableConfig(placement="host"))
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    (table,) = open_tables(tmp_path, 1, TableConfig(placement="host"))
    assert torch.equal(table.prefetch(torch.arange(9)).wait(), apart)
    with pytest.raises(TableError, match="No such file"):
        open_tables(tmp_path, 2, TableConfig(placement="host"))
    values = run_of(tmp_path)
    (table,) = open_tables(tmp_path, 1, TableConfig(placement="host"))
    assert torch.equal(table.prefetch(torch.arange(50)).wait(), values[0])


def test_rows_of_the_hot_list_are_kept_and_nothing_else(tmp_path: pathlib.Path) -> None:
    values = run_of(tmp_path)
    save_file({"1": torch.tensor([60, 3, 3, 9, 5])}, tmp_path / "hot")
    config = TableConfig(
        placement="disk", hot=str(tmp_path / "hot"), hot_bytes=3 * 128, prefetch=False
    )
    first, second = open_tables(tmp_path, 2, config)
    for ids, hits in (([60, 3, 9, 9], 3), ([5, 4], 3), ([5, 4], 3), ([60, 0, 69], 4)):
        assert torch.equal(second.prefetch(torch.tensor(ids)).wait(), values[1][ids])
        assert second.metrics()["hits"] == hits
    assert second.metrics()["bytes"] == (2 + 2 + 2) * 128
    for _ in range(2):
        first.prefetch(torch.tensor([1])).wait()
    # Without a list, the rows read last are cached.
    assert first.metrics()["hits"] == 1


def test_bad_configs_and_lists_are_refused(tmp_path: pathlib.Path) -> None:
    run_of(tmp_path)
    for arguments, reason in (
        ({"hot_bytes": -1}, "got -1"),
        ({"shared": True}, "expected host"),
        ({"hot": "x"}, "expected disk"),
    ):
        with pytest.raises(ValueError, match=reason):
            TableConfig(**arguments)
    lists = [{"1": torch.tensor([70])}, {"1": torch.tensor([1.0])}, {"rows": torch.tensor([1])}]
    for number, (content, reason) in enumerate(
        zip(
            lists,
            ["got row id 70, expected 0 to 69", "int64 row ids", "by their table's number"],
            strict=True,
        )
    ):
        path = tmp_path / f"hot{number}"
        save_file(content, path)
        with pytest.raises(ValueError, match=reason):
            open_tables(tmp_path, 2, TableConfig(placement="disk", hot=str(path)))
    for content in (b"", b"junk" * 10):
        (tmp_path / "hot").write_bytes(content)
        with pytest.raises(TableError, match="expected a file of row ids"):
            hot_rows(tmp_path / "hot")
