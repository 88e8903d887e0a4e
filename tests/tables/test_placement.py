"""Configs and files in -> tables in their homes, the same rows in all, or the refusal that must come."""

import pathlib
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from rorqual.tables import DeviceTable, DiskTable, HostTable, TableConfig, TableError, open_tables, write_table
from rorqual.tables import placement as placement_file

pytestmark = pytest.mark.engram

FP8 = torch.float8_e4m3fn
HOMES = [
    TableConfig(),
    TableConfig(placement="host"),
    TableConfig(placement="host", prefetch=False),
    TableConfig(placement="disk", hot_bytes=0),
    TableConfig(placement="disk", hot_bytes=1000, prefetch=False),
]


def run_of(folder: pathlib.Path) -> list[torch.Tensor]:
    """Two tables of a run's weights."""
    values = [torch.randn(50, 32), torch.randn(70, 32)]
    save_file({f"tables.{n}.weight": each for n, each in enumerate(values)}, folder / "model.safetensors")
    return values


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, FP8])
def test_every_home_has_the_rows_of_the_files(dtype: torch.dtype | None, tmp_path: pathlib.Path) -> None:
    values = run_of(tmp_path)
    folder = None
    if dtype is not None:
        folder = str(tmp_path / "other")
        for n, each in enumerate(values):
            write_table(f"{folder}/{n}", each, dtype=dtype, shard_rows=33)
        values = [DiskTable(f"{folder}/{n}").prefetch(torch.arange(len(v))).wait() for n, v in enumerate(values)]
    for config, kind in zip(HOMES, [DeviceTable, HostTable, HostTable, DiskTable, DiskTable], strict=True):
        config = TableConfig(
            placement=config.placement, folder=folder, hot_bytes=config.hot_bytes, prefetch=config.prefetch
        )
        tables = open_tables(tmp_path, 2, config)
        with torch.no_grad():
            for table, expected in zip(tables, values, strict=True):
                assert isinstance(table, kind)
                assert torch.equal(table.prefetch(torch.arange(len(expected))).wait(), expected)
                assert getattr(table, "background", config.prefetch) == config.prefetch


def test_rows_that_learnt_on_a_disk_are_found_where_the_weights_have_none(tmp_path: pathlib.Path) -> None:
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
    config = TableConfig(placement="disk", hot=str(tmp_path / "hot"), hot_bytes=3 * 128, prefetch=False)
    first, second = open_tables(tmp_path, 2, config)
    for ids, hits in (([60, 3, 9, 9], 3), ([5, 4], 3), ([5, 4], 3), ([60, 0, 69], 4)):
        assert torch.equal(second.prefetch(torch.tensor(ids)).wait(), values[1][ids])
        assert second.metrics()["hits"] == hits
    assert second.metrics()["bytes"] == (3 + 2 + 2 + 2) * 128
    for _ in range(2):
        first.prefetch(torch.tensor([1])).wait()
    assert first.metrics()["hits"] == 1  # without a list those read last


def test_bad_configs_and_lists_are_refused(tmp_path: pathlib.Path) -> None:
    run_of(tmp_path)
    for given, reason in (
        ({"hot_bytes": -1}, "got -1"),
        ({"shared": True}, "expected host"),
        ({"hot": "x"}, "expected disk"),
    ):
        with pytest.raises(ValueError, match=reason):
            TableConfig(**given)
    lists = [{"1": torch.tensor([70])}, {"1": torch.tensor([1.0])}, {"rows": torch.tensor([1])}]
    for number, (content, reason) in enumerate(
        zip(lists, ["got row id 70, expected 0 to 69", "int64 row ids", "by their table's number"], strict=True)
    ):
        path = tmp_path / f"hot{number}"
        save_file(content, path)
        with pytest.raises(ValueError, match=reason):
            open_tables(tmp_path, 2, TableConfig(placement="disk", hot=str(path)))
    for content in (b"", b"junk" * 10):
        (tmp_path / "hot").write_bytes(content)
        with pytest.raises(TableError, match="expected a file of row ids"):
            placement_file.hot_rows(tmp_path / "hot")


CHILD = """
import sys, torch
from rorqual.tables import TableConfig, open_tables
table = open_tables(sys.argv[1], 1, TableConfig(placement="host", shared=True))[0]
print(table.prefetch(torch.arange(50)).wait().double().sum().item(), flush=True)
sys.stdin.readline()
table.values[7] = 3
print("written", flush=True)
sys.stdin.readline()
"""


def copies() -> set[pathlib.Path]:
    return set(placement_file.SHARED.glob(f"{placement_file._PREFIX}*"))


@pytest.mark.skipif(not placement_file.SHARED.is_dir(), reason="no memory that processes share by name")
def test_processes_share_one_copy_that_goes_with_the_last(tmp_path: pathlib.Path) -> None:
    """What one writes the other reads; a killed one lets go as well."""
    (values, _), before = run_of(tmp_path), copies()
    command, pipe = [sys.executable, "-c", CHILD, str(tmp_path)], subprocess.PIPE
    children = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    try:
        for child in children:
            assert float(child.stdout.readline()) == pytest.approx(values.double().sum().item())
        assert len(copies() - before) == 1
        (table,) = open_tables(tmp_path, 1, TableConfig(placement="host", shared=True))
        assert len(copies() - before) == 1
        children[0].stdin.write("\n")
        children[0].stdin.flush()
        assert children[0].stdout.readline() == "written\n"
        assert (table.prefetch(torch.tensor([7])).wait() == 3).all()
        assert torch.equal(table.prefetch(torch.arange(7)).wait(), values[:7])
    finally:
        for child in children:
            child.send_signal(signal.SIGKILL)
            child.wait()


def test_a_copy_that_nobody_holds_is_removed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_file, "SHARED", tmp_path / "shared")
    (tmp_path / "shared").mkdir()
    values = run_of(tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys, pathlib; from rorqual.tables import TableConfig, open_tables, placement;"
            "placement.SHARED = pathlib.Path(sys.argv[2]);"
            "open_tables(sys.argv[1], 1, TableConfig(placement='host', shared=True))",
            str(tmp_path),
            str(tmp_path / "shared"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (left,) = copies()
    open_tables(tmp_path, 2, TableConfig(placement="host", shared=True))
    assert left in copies()  # its rows were wanted again
    assert len(copies()) == 2
    save_file({"tables.0.weight": values[0] + 1}, tmp_path / "model.safetensors")
    (table,) = open_tables(tmp_path, 1, TableConfig(placement="host", shared=True))
    assert torch.equal(table.prefetch(torch.arange(50)).wait(), values[0] + 1)
    assert left in copies()  # held by this process
