"""Tests record_shards.py: records go from one number of ranks to another, as of a mark."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from rorqual.tables.record_file import RecordFile
from rorqual.tables.record_shards import RecordShard
from rorqual.tables.row_file import TableError

ROWS = 11
WIDTH = 3
WORLDS = (1, 4, 2, 16, 3, 1)


def opened(root: Path, world: int) -> list[RecordFile]:
    return [
        RecordFile(shard.folder, shard.each, WIDTH, keep=3)
        for shard in RecordShard(root, ROWS, WIDTH).of(world)
    ]


def write_ones(files: list[RecordFile], root: Path, value: float) -> None:
    """Gives every row's record one number, in all of its parts."""
    for file, shard in zip(files, RecordShard(root, ROWS, WIDTH).of(len(files)), strict=True):
        ids = np.arange(shard.size)
        numbers = np.full((shard.size, 3 * WIDTH + 1), value, np.float32)
        numbers += np.arange(shard.first, shard.first + shard.size, dtype=np.float32)[:, None]
        file.replace(ids, file.records(ids), numbers.view(np.uint8))


def resumed(root: Path, world: int, step: int) -> list[RecordFile]:
    """Opens the records as `world` ranks that go on from a mark would."""
    files = opened(root, world)
    barrier = threading.Barrier(world)
    torch.manual_seed(0)
    shards = RecordShard(root, ROWS, WIDTH).of(world)
    for file, shard in zip(files, shards, strict=True):
        file.draw(0.02, shard.first, ROWS)

    @contextmanager
    def together() -> Iterator[None]:
        yield
        barrier.wait()

    def resume(file: RecordFile, shard: RecordShard) -> None:
        shard.take_over(file, step, together)
        file.rewind(step)

    with ThreadPoolExecutor(world) as ranks:
        list(ranks.map(resume, files, shards))
    return files


def test_records_go_through_any_numbers_of_ranks(tmp_path):
    """What was written after the mark is undone first, and older marks stay with their ranks."""
    files = resumed(tmp_path, WORLDS[0], 0)
    for step, world in enumerate(WORLDS[1:], 1):
        write_ones(files, tmp_path, 100.0 * step)
        for file in files:
            file.mark(step)
        write_ones(files, tmp_path, -1.0)
        for file in files:
            file.close()
        files = resumed(tmp_path, world, step)
        expected = 100.0 * step + torch.arange(ROWS)[:, None].expand(ROWS, WIDTH)
        shards = RecordShard(tmp_path, ROWS, WIDTH).of(world)
        assert torch.equal(shards[0].read(0, ROWS), expected)
        assert torch.equal(shards[0].read(2, 9), expected[2:9])
        for file, shard in zip(files, shards, strict=True):
            records = file.records(np.arange(shard.size)).view(np.float32)
            assert (records == records[:, :1]).all()
    for file in files:
        file.close()


def test_an_older_mark_of_the_same_step_is_not_taken(tmp_path):
    """Two ranks mark a step whose checkpoint is never whole; four ranks make it again."""

    def trained(files: list[RecordFile], value: float, step: int) -> None:
        write_ones(files, tmp_path, value)
        for file in files:
            file.mark(step)
            file.close()

    trained(resumed(tmp_path, 4, 0), 100.0, 1)
    trained(resumed(tmp_path, 2, 1), 200.0, 2)
    trained(resumed(tmp_path, 4, 1), 300.0, 2)
    files = resumed(tmp_path, 2, 2)
    rows = RecordShard(tmp_path, ROWS, WIDTH).of(2)[0].read(0, ROWS)
    assert torch.equal(rows[:, 0], 300.0 + torch.arange(ROWS))
    for file in files:
        file.close()


def test_records_of_former_ranks_go_once_no_checkpoint_needs_them(tmp_path):
    for file in resumed(tmp_path, 1, 0):
        write_ones([file], tmp_path, 50.0)
        file.mark(1)
        file.mark(2)
        file.close()
    for file in resumed(tmp_path, 4, 2):
        file.mark(3)
        file.close()
    files = resumed(tmp_path, 2, 3)
    for file in files:
        file.mark(4)
    two = RecordShard(tmp_path, ROWS, WIDTH).of(2)[0]
    # Step 1 is of one process alone.
    assert not two.forget_others([1, 3, 4])
    assert (tmp_path / "records").is_file()
    assert two.forget_others([3, 4])
    assert {path.name for path in tmp_path.iterdir()} == {"rank0-of-2", "rank1-of-2"}
    assert two.forget_others([3, 4])
    assert torch.equal(two.read(0, ROWS)[:, 0], 50.0 + torch.arange(ROWS))
    for file in files:
        file.close()


def test_a_step_that_nobody_marked_is_refused(tmp_path):
    for file in resumed(tmp_path, 2, 0):
        file.close()
    with pytest.raises(TableError, match=r"got no mark of step 7, expected one of \[0\]"):
        resumed(tmp_path, 3, 7)
