"""Tests that processes share one copy of a table's rows, which the last of them removes."""

import pathlib
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from rorqual.tables import TableConfig, open_tables, shared

pytestmark = pytest.mark.engram


def run_of(folder: pathlib.Path) -> list[torch.Tensor]:
    """Writes two tables as a run's weights."""
    values = [torch.randn(50, 32), torch.randn(70, 32)]
    save_file(
        {f"tables.{n}.weight": each for n, each in enumerate(values)}, folder / "model.safetensors"
    )
    return values


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
    return set(shared.SHARED.glob("rorqual-*/*.rows"))


@pytest.mark.skipif(not shared.SHARED.is_dir(), reason="no memory that processes share by name")
def test_processes_share_one_copy_that_goes_with_the_last(tmp_path: pathlib.Path) -> None:
    """One process reads what another writes; a killed process releases the copy, too."""
    (values, _), before = run_of(tmp_path), copies()
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    pipe = subprocess.PIPE
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


def test_a_copy_that_nobody_holds_is_removed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "SHARED", tmp_path / "shared")
    (tmp_path / "shared").mkdir()
    values = run_of(tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys, pathlib; from rorqual.tables import TableConfig, open_tables, shared;"
            "shared.SHARED = pathlib.Path(sys.argv[2]);"
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
    # The copy stays, since its rows are in use again.
    assert left in copies()
    assert len(copies()) == 2
    save_file({"tables.0.weight": values[0] + 1}, tmp_path / "model.safetensors")
    (table,) = open_tables(tmp_path, 1, TableConfig(placement="host", shared=True))
    assert torch.equal(table.prefetch(torch.arange(50)).wait(), values[0] + 1)
    # This process holds the copy.
    assert left in copies()
