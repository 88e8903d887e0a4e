"""Tests that rows trained on disk equal those of a resident table, through stops and damage."""

import gc
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from rorqual.tables import Table, TableError
from rorqual.tables.record_file import RecordFile
from rorqual.train.config import OptimConfig
from rorqual.train.optim import Optimizer

pytestmark = pytest.mark.engram

ROWS = 301
WIDTH = 12


def of(table: nn.Module) -> nn.ModuleDict:
    """Returns a model with the table and a dense layer on top."""
    model = nn.ModuleDict({"table": table, "out": nn.Linear(WIDTH, 3)})
    with torch.no_grad():
        for number, parameter in enumerate(model["out"].parameters()):
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            )
    return model.train()


def pair(folder: pathlib.Path, prefetch: bool = True) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Returns the same model twice: with a resident table, and with one on disk."""
    resident = Table(ROWS, WIDTH)
    table = Table.of_records(folder, ROWS, WIDTH, prefetch=prefetch)
    with torch.no_grad():
        torch.manual_seed(5)
        resident.weight.copy_(torch.randn(ROWS, WIDTH) * 0.02)
        after = torch.rand(3)
        torch.manual_seed(5)
        table.draw(0.02)
        # The generator's state is the one after a single draw of all rows.
        assert torch.equal(torch.rand(3), after)
    return of(resident), of(table)


def batch(step: int, size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    # Every third batch has many duplicates.
    ids = torch.randint(ROWS, (2, size), generator=draw) % (ROWS if step % 3 else 17)
    return ids, torch.randn(2, size, 3, generator=draw)


def train(model: nn.ModuleDict, optimizer: Optimizer, step: int, micro: int = 1) -> float:
    ids, target = batch(step)
    optimizer.begin_step()
    for piece, wanted in zip(ids.chunk(micro), target.chunk(micro), strict=True):
        loss = (model["out"](model["table"].prefetch(piece).wait()) - wanted).square().mean()
        loss.backward()
    norm = optimizer.clip()
    optimizer.step(1 / (1 + step % 4))
    return float(norm)


def rows(model: nn.ModuleDict) -> torch.Tensor:
    table = model["table"]
    return table.read_trained(0, ROWS) if table.file is not None else table.weight.detach()


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("micro", [1, 2])
def test_rows_learn_as_resident_ones_do(
    prefetch: bool,
    kernels: str,
    micro: int,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compares values, norms and the dense weights after each step.

    Rows, averages and counts are compared at the end.
    """
    monkeypatch.setenv("RORQUAL_KERNELS", kernels)
    resident, other = pair(tmp_path, prefetch)
    ours = Optimizer(other, OptimConfig(clip=0.1))
    theirs = Optimizer(resident, OptimConfig(clip=0.1))
    assert ours.state.keys() == {name for name in theirs.state if not name.startswith("table.")}
    for step in range(8):
        assert train(other, ours, step, micro) == train(resident, theirs, step, micro)
        assert torch.equal(rows(other), rows(resident))
    assert all(
        torch.equal(*each)
        for each in zip(other["out"].parameters(), resident["out"].parameters(), strict=True)
    )
    table = other["table"]
    table.flush()
    records = torch.from_numpy(np.fromfile(tmp_path / "records", np.float32)).view(ROWS, -1)
    assert torch.equal(records[:, WIDTH : 2 * WIDTH], theirs.state["table.weight.exp_avg"])
    assert torch.equal(records[:, 2 * WIDTH : 3 * WIDTH], theirs.state["table.weight.exp_avg_sq"])
    assert torch.equal(
        records[:, -1].contiguous().view(torch.int32), theirs.state["table.weight.updates"]
    )
    with torch.no_grad():
        assert torch.equal(table.prefetch(batch(1)[0]).wait(), rows(resident)[batch(1)[0]])
    table.close()


@pytest.mark.parametrize(
    ("count", "width"), [(1, 1), (1, 17), (300, 1), (7000, 300), (70_000, 16), (65_537, 16)]
)
def test_drawn_in_parts_as_in_one(count: int, width: int, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(1)
    expected = torch.randn(count, width) * 0.02
    following = torch.rand(1)
    # The second time, the table is filled already.
    for _ in range(2):
        torch.manual_seed(1)
        table = Table.of_records(tmp_path / "t", count, width)
        table.draw(0.02)
        assert torch.equal(torch.rand(1), following)
        assert torch.equal(table.read_trained(0, count), expected)
        table.close()


def test_it_is_in_no_state_and_stays_where_it_is(tmp_path: pathlib.Path) -> None:
    _, model = pair(tmp_path)
    assert list(model.state_dict()) == ["out.weight", "out.bias"]
    model.double()
    assert model["table"].weight.dtype == torch.float32
    assert model["table"].weight.untyped_storage().nbytes() == 4
    model.load_state_dict(model.state_dict())


def test_a_table_goes_back_to_every_mark(tmp_path: pathlib.Path) -> None:
    """Rewinds after any number of steps between marks, one mark without any.

    Then it trains on other batches and rewinds again.
    """
    _, model = pair(tmp_path)
    optimizer = Optimizer(model, OptimConfig())
    cached = {0: rows(model).clone()}
    for step in range(1, 7):
        if step != 4:
            train(model, optimizer, step)
        if step in (2, 3, 4):
            optimizer.mark(step)
            cached[step] = rows(model).clone()
    with pytest.raises(TableError, match=r"got no mark of step 0, expected one of \[2, 3, 4\]"):
        # Three marks are kept.
        optimizer.rewind(0)
    for back in (4, 3, 2):
        optimizer.rewind(back)
        assert torch.equal(rows(model), cached[back])
        train(model, optimizer, 10 + back)
        assert not torch.equal(rows(model), cached[back])
        optimizer.rewind(back)
        assert torch.equal(rows(model), cached[back])
    model["table"].close()


KILLED = """
import sys, signal, os, torch
sys.path.insert(0, sys.argv[2])
from test_record_file import *
_, model = pair(pathlib.Path(sys.argv[1]))
optimizer = Optimizer(model, OptimConfig())
for step in range(1, 9):
    train(model, optimizer, step)
    if step in (3, 6):
        optimizer.mark(step)
        print(step, flush=True)
print("on", flush=True)
for step in range(9, 10**6):
    train(model, optimizer, step)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_table_that_goes_back(tmp_path: pathlib.Path) -> None:
    """Kills training in the middle of steps.

    Rewound to the last mark, it continues like one that was never stopped.
    """
    resident, _ = pair(tmp_path / "unused")
    theirs = Optimizer(resident, OptimConfig())
    command = [
        sys.executable,
        "-c",
        KILLED,
        str(tmp_path / "t"),
        str(pathlib.Path(__file__).parent),
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while child.stdout.readline() != "on\n":
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    table = Table.of_records(tmp_path / "t", ROWS, WIDTH)
    table.rewind(6)
    for step in range(1, 7):
        train(resident, theirs, step)
    assert torch.equal(table.read_trained(0, ROWS), rows(resident))
    model = of(table)
    model["out"].load_state_dict(resident["out"].state_dict())
    ours = Optimizer(model, OptimConfig())
    ours.load_state_dict(
        {name: value for name, value in theirs.state.items() if name in ours.state}
    )
    for step in range(7, 10):
        train(resident, theirs, step)
        train(model, ours, step)
        assert torch.equal(rows(model), rows(resident))
    table.close()


def test_one_process_trains_a_table(tmp_path: pathlib.Path) -> None:
    """Another process is refused until the first ends, however it ends."""
    code = (
        "import sys, time; from rorqual.tables import Table;"
        "table = Table.of_records(sys.argv[1], 5, 3); print('here', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "here\n"
        with pytest.raises(TableError, match="records: got rows that another table trains now"):
            Table.of_records(tmp_path, 5, 3)
    finally:
        child.kill()
        child.wait()
    Table.of_records(tmp_path, 5, 3).close()


def test_one_table_of_a_process_trains_the_rows(tmp_path: pathlib.Path) -> None:
    """A second table is refused until the first is closed or gone.

    The refusal does not release the lock of the first.
    """
    code = "import sys; from rorqual.tables import Table; Table.of_records(sys.argv[1], 5, 3)"
    table = Table.of_records(tmp_path, 5, 3)
    with pytest.raises(
        TableError, match=r"records: got rows that another table trains now.*close the other"
    ):
        Table.of_records(tmp_path, 5, 3)
    other = [sys.executable, "-c", code, str(tmp_path)]
    assert (
        "another table trains now"
        in subprocess.run(other, capture_output=True, text=True, check=False).stderr
    )
    table.close()
    table = Table.of_records(tmp_path, 5, 3)
    del table
    gc.collect()
    Table.of_records(tmp_path, 5, 3).close()


def test_rows_asked_for_before_an_update_are_not_what_the_next_one_changes(
    tmp_path: pathlib.Path,
) -> None:
    """No update is lost when the next batch is prefetched before the update of this one."""
    _, model = pair(tmp_path)
    table = model["table"]
    ids = torch.arange(6)
    gradient = torch.ones(6, WIDTH)

    def add(rows: torch.Tensor, *rest: torch.Tensor) -> None:
        rows += 1

    before = table.read_trained(0, 6).clone()
    table.prefetch(ids).wait()
    ahead = table.prefetch(ids)
    table.update(ids, gradient, add)
    ahead.wait()
    table.update(ids, gradient, add)
    assert torch.equal(table.read_trained(0, 6), before + 1 + 1)
    table.close()


def test_records_that_cannot_be_read_for_an_update_are_an_error_of_the_next_call(
    tmp_path: pathlib.Path,
) -> None:
    """Of several ranks the one that fails would otherwise raise alone, within the update."""
    _, model = pair(tmp_path)
    table = model["table"]
    ids = torch.arange(6)
    table.flush()
    os.truncate(table.file.folder / "records", 100)
    table.update(ids, torch.ones(6, WIDTH), lambda rows, *_: rows.add_(1))
    with pytest.raises(TableError, match="records"):
        table.flush()
    table.close()


def test_rows_in_host_memory_learn_as_resident_ones_do_and_stay_there() -> None:
    torch.manual_seed(3)
    after = torch.rand(1)
    torch.manual_seed(3)
    hosted = Table(ROWS, WIDTH, "host")
    # Creating the table does not advance the global generator.
    assert torch.equal(torch.rand(1), after)
    resident = Table(ROWS, WIDTH)
    resident.load_state_dict(hosted.state_dict())
    ours = of(hosted)
    theirs = of(resident)
    one = Optimizer(ours, OptimConfig(clip=0.1))
    other = Optimizer(theirs, OptimConfig(clip=0.1))
    for step in range(6):
        assert train(ours, one, step) == train(theirs, other, step)
    assert torch.equal(hosted.weight, resident.weight)
    assert one.state_dict().keys() == other.state_dict().keys()
    assert hosted.to("meta").weight.device.type == "cpu"
    assert hosted.double().weight.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no device to feed")
def test_rows_in_host_memory_feed_a_device() -> None:
    hosted = Table(ROWS, WIDTH, "host")
    resident = Table(ROWS, WIDTH).cuda()
    resident.load_state_dict(hosted.state_dict())
    ids = torch.randint(ROWS, (3, 50), device="cuda")
    scale = torch.randn(WIDTH, device="cuda")
    for table in (hosted.train(), resident.train()):
        (table.prefetch(ids).wait() * scale).sum().backward()
    assert hosted.weight.grad.is_sparse
    assert hosted.weight.grad.device.type == "cpu"
    torch.testing.assert_close(hosted.weight.grad.to_dense(), resident.weight.grad.to_dense().cpu())
    with pytest.raises(ValueError, match=f"got row id {ROWS}"):
        hosted.prefetch(torch.tensor([ROWS], device="cuda"))


def test_notes_cut_anywhere_and_flipped_are_no_harm_or_are_seen(tmp_path: pathlib.Path) -> None:
    """The rows of an incomplete entry are unchanged, since it was being written.

    An entry of another boot is refused.
    """
    _, model = pair(tmp_path)
    table = model["table"]
    optimizer = Optimizer(model, OptimConfig())
    first = rows(model).clone()
    train(model, optimizer, 1)
    after = rows(model).clone()
    notes = tmp_path / "undo-0"
    whole = notes.read_bytes()
    for size in (len(whole) - 1, 41, 40):
        notes.write_bytes(whole[:size])
        table.rewind(0)
        assert torch.equal(rows(model), after)
    notes.write_bytes(whole)
    table.rewind(0)
    assert torch.equal(rows(model), first)
    notes.write_bytes(b"x" + whole[1:])
    with pytest.raises(TableError, match="the machine has stopped since"):
        table.rewind(0)
    table.close()


def test_other_shapes_and_lost_rows_are_refused(tmp_path: pathlib.Path) -> None:
    _, model = pair(tmp_path)
    model["table"].close()
    with pytest.raises(TableError, match="expected 300 times 148"):
        Table.of_records(tmp_path, ROWS - 1, WIDTH)
    table = Table.of_records(tmp_path, ROWS, WIDTH)
    os.truncate(tmp_path / "records", 148 * 10)
    with pytest.raises(TableError, match="got 0 bytes of row 10, expected 148"):
        table.prefetch(torch.arange(20)).wait()
    train_again = Table.of_records(tmp_path / "new", ROWS, WIDTH)
    with pytest.raises(TableError, match="got 0 bytes of row 0, expected 148"):
        train_again.prefetch(torch.tensor([0])).wait()


def test_what_is_left_of_a_larger_table_that_was_never_whole_is_no_harm(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table is killed while it is drawn; a smaller one in its place can be opened again."""
    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "mark", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        table = Table.of_records(tmp_path, 500, 4)
        with pytest.raises(KeyboardInterrupt):
            table.draw(0.02)
        table.close()
    table = Table.of_records(tmp_path, 30, 4)
    table.draw(0.02)
    expected = table.read_trained(0, 30)
    table.close()
    again = Table.of_records(tmp_path, 30, 4)
    assert torch.equal(again.read_trained(0, 30), expected)
    again.close()


def open_files(folder: pathlib.Path) -> list[str]:
    gc.collect()
    places = (pathlib.Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return [
        str(position.readlink())
        for position in places
        if position.is_symlink() and str(folder) in os.readlink(position)
    ]


@pytest.mark.parametrize("closed", [True, False])
def test_a_table_that_is_closed_or_dropped_keeps_no_file_open(
    closed: bool, tmp_path: pathlib.Path
) -> None:
    def change(rows: torch.Tensor, *rest: torch.Tensor) -> None:
        rows += 1

    table = Table.of_records(tmp_path / "t", 10, 4)
    table.draw(0.02)
    table.update(torch.arange(3), torch.ones(3, 4), change)
    table.flush()
    assert len(open_files(tmp_path)) == 3, "records, their lock, what they were before"
    if closed:
        table.close()
    del table
    assert open_files(tmp_path) == []


def test_a_table_that_could_not_write_closes_all_the_same(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, raw: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    _, model = pair(tmp_path)
    table = model["table"]
    table.prefetch(torch.arange(3)).wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        train(model, Optimizer(model, OptimConfig()), 1)
        with pytest.raises(TableError, match="got No space left on device"):
            table.close()
    assert open_files(tmp_path) == []
