"""Tests ranks.py: an error of one rank is raised by all, wherever a training saves or loads.

Run as a script, this file is two ranks, of which one cannot write.
"""

import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rorqual import checkpoint, distributed, ranks
from rorqual.data.needle_config import NeedleConfig
from rorqual.data.needles import NeedleStream
from rorqual.model import LanguageModel
from rorqual.model_config import EngramConfig, ModelConfig
from rorqual.sharded_rows import RowExchange, ShardedTable
from rorqual.tables import Table, TableError
from rorqual.train import engine
from rorqual.train.config import TrainConfig
from rorqual.train.step import Diverged, TrainStep
from rorqual.train.trainer import Stopped, train

sys.path.insert(0, str(Path(__file__).parent))
from processes import fork_ranks, run_script

CONFIG = ModelConfig(
    vocab_size=300,
    dim=16,
    layers=2,
    dense_width=24,
    engram=EngramConfig(layers=(1,), rows_per_head=(61, 61), heads=2, head_dim=4),
)


@contextmanager
def cannot_write(rank: int) -> Iterator[None]:
    """Makes every write of one rank to a file fail, as on a full disk."""
    if ranks.rank() != rank:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def error_of(work: Callable[[], object]) -> Exception:
    """Returns the error of this rank; AssertionError unless all ranks have the same one."""
    with pytest.raises(Exception) as raised:
        work()
    mine = f"{type(raised.value).__name__}: {raised.value}"
    errors = [""] * ranks.world()
    # Rank 0 has removed what it wrote by then.
    dist.all_gather_object(errors, mine)
    assert len(set(errors)) == 1, errors
    return raised.value


def check_kinds() -> None:
    """Errors are of one type and text on all ranks; where two fail, the first one's counts."""

    def fail(error: Exception, rank: int) -> None:
        with ranks.together():
            if ranks.rank() == rank:
                raise error

    for rank in (0, 1):
        error = error_of(lambda rank=rank: fail(OSError(28, "No space", "a/file"), rank))
        assert isinstance(error, OSError) and error.errno == 28 and error.filename == "a/file"
        assert error.__notes__ == [f"raised on rank {rank}"]
        error = error_of(lambda rank=rank: fail(checkpoint.Damaged("a file: got less"), rank))
        assert isinstance(error, checkpoint.Damaged)

    class Unsent(Exception):
        """An error that no other process can read, as its class is within a function."""

    with pytest.raises((Unsent, ValueError), match=r"^this way"):
        fail(Unsent("this way"), 1)

    def fail_both() -> None:
        with ranks.together():
            raise ValueError(f"of rank {ranks.rank()}")

    assert str(error_of(fail_both)) == "of rank 0"
    check_ends()
    with ranks.together():
        pass


def check_ends() -> None:
    """An interrupted rank interrupts the other; one that exits makes the other fail."""

    def end(error: BaseException, rank: int) -> None:
        with ranks.together():
            if ranks.rank() == rank:
                raise error

    for rank in (0, 1):
        with pytest.raises(KeyboardInterrupt, match="stopped at step 7") as interrupted:
            end(Stopped("stopped at step 7"), rank)
        assert (type(interrupted.value) is Stopped) == (ranks.rank() == rank)
        kind = SystemExit if ranks.rank() == rank else RuntimeError
        with pytest.raises(kind) as raised:
            end(SystemExit(3), rank)
        if kind is SystemExit:
            assert raised.value.code == 3
        else:
            assert str(raised.value) == "a rank has exited: SystemExit(3)"
            assert raised.value.__notes__ == [f"raised on rank {rank}"]

    for rank in (0, 1):
        with pytest.raises(KeyboardInterrupt), ranks.together():
            raise KeyboardInterrupt if ranks.rank() == rank else ValueError("of the other rank")


def check_rows(folder: Path) -> None:
    """A mark, and records that are taken over from another number of ranks."""
    if ranks.rank() == 0:
        table = Table.of_records(folder, 61, 4)
        table.draw(0.02)
        table.mark(5)
        table.close()
    ranks.barrier()
    table = ShardedTable(61, 4, "disk", exchange=RowExchange(), folder=folder)
    table.draw(0.02)
    for rank in (0, 1):

        def take_over(rank: int = rank) -> None:
            with cannot_write(rank):
                table.rewind(5)

        error = error_of(take_over)
        assert str(folder) in str(error) and "File too large" in str(error), error
    table.rewind(5)

    def mark() -> None:
        with cannot_write(1):
            table.mark(6)

    assert str(folder) in str(error_of(mark))
    table.mark(6)
    table.rewind(6)

    def change() -> None:
        table.update(torch.arange(3), torch.ones(3, 4), lambda rows, *_: rows.add_(1))
        table.flush()

    # The kernel that reads rows is compiled, and written to its cache, while that is possible.
    change()
    table.rewind(6)

    # Rows that are written while the model computes: the next step of every rank raises.
    def update() -> None:
        error = None
        with cannot_write(1):
            try:
                change()
            except (ValueError, OSError) as raised:
                error = raised
        ranks.raise_together(error)

    assert str(folder) in str(error_of(update))
    table.close()


def check_state(folder: Path) -> None:
    """A checkpoint whose parts cannot be written, hashed or named: nothing of it stays."""
    model = distributed.parallelize(
        LanguageModel(CONFIG, seed=1),
        distributed.make_mesh(TrainConfig().distributed, "cpu"),
        TrainConfig().distributed,
    )
    state = model.state_dict()
    for rank in (0, 1):

        def save(rank: int = rank) -> None:
            with cannot_write(rank):
                checkpoint.save_state(folder / "step1", state, {})

        assert "step1" in str(error_of(save))

        def complete(rank: int = rank) -> None:
            write = checkpoint.StateWrite(folder / "step1")
            write.add("all", state)
            with cannot_write(rank):
                write.complete({})

        assert f"step1.partial/rank{rank}.json" in str(error_of(complete))
        ranks.barrier()
        assert not list(folder.glob("step1*"))
        ranks.barrier()

        def write_model(rank: int = rank) -> None:
            with cannot_write(rank):
                checkpoint.write_together(folder / "model.safetensors", state)

        error = error_of(write_model)
        assert isinstance(error, OSError)
        assert error.filename == str(folder / "model.safetensors")
        assert not list(folder.glob("*"))
        ranks.barrier()

    def unnamed() -> None:
        # A folder is where the file should be, which only the rank that names it learns.
        if ranks.rank() == 0:
            (folder / "model.safetensors" / "within").mkdir(parents=True)
        checkpoint.write_together(folder / "model.safetensors", state)

    assert "model.safetensors" in str(error_of(unnamed))
    ranks.barrier()
    if ranks.rank() == 0:
        shutil.rmtree(folder / "model.safetensors")
    ranks.barrier()
    checkpoint.save_state(folder / "step1", state, {})
    checkpoint.write_together(folder / "model.safetensors", state)
    assert checkpoint.latest(folder, shared=True) == folder / "step1"


def check_rollback(folder: Path) -> None:
    """A damaged file is found by one rank, that one which reads it, and believed by all."""
    config = replace(TrainConfig(), folder=str(folder), on_diverged="rollback")
    tensors = {"a": torch.arange(9.0)}
    # The third one was saved after a skipped step, and goes.
    for step, skipped in ((1, 0), (2, 0), (3, 1)):
        values = {"callbacks": {"checkpointer": {"skipped": [skipped, skipped]}}}
        checkpoint.save_state(folder / "checkpoints" / f"step{step}", tensors, values)
    newest = folder / "checkpoints" / "step2"
    if ranks.rank() == 0:
        path = next(newest.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    ranks.barrier()
    where = engine.roll_back(config, 4, [], Diverged("no finite loss"))
    assert where.checkpoint == 1
    assert not (folder / "checkpoints" / "step3").exists()
    ranks.barrier()
    if ranks.rank() == 0:
        shutil.rmtree(folder / "checkpoints" / "step1")
    ranks.barrier()

    def roll_back() -> None:
        engine.roll_back(config, 4, [], Diverged("no finite loss"))

    error = error_of(roll_back)
    assert isinstance(error, checkpoint.Damaged) and str(folder) in str(error)


def config_of(folder: Path) -> TrainConfig:
    """Returns the config of a run in FOLDER/run."""
    needles = NeedleConfig(shortest=24, alone=1, grow=1, questions=2)
    return TrainConfig(
        model=replace(CONFIG, vocab_size=needles.vocab_size),
        needles=needles,
        folder=str(folder / "run"),
        steps=60,
        batch_size=2,
        seq_len=24,
        save_every=2,
    )


def check_training(folder: Path) -> None:
    """A checkpoint that is written beside training fails on one rank: both stop in one step."""
    config = config_of(folder)
    complete = checkpoint.StateWrite.complete

    def failing(self, values) -> None:
        # That of the first checkpoint succeeds.
        with cannot_write(1) if "step4" in str(self.folder) else nullcontext():
            complete(self, values)

    checkpoint.StateWrite.complete = failing
    error = error_of(lambda: train(config))
    checkpoint.StateWrite.complete = complete
    assert isinstance(error, OSError) and "step4" in str(error)
    assert [step for step, _ in checkpoint.steps(folder / "run" / "checkpoints")] == [2]


def check_data(folder: Path) -> None:
    """A batch of one rank cannot be read: both stop before the step."""
    following = NeedleStream.__next__
    read = []

    def failing(self):
        read.append(0)
        if len(read) == 3 and ranks.rank() == 1:
            raise OSError(5, "Input/output error", "a/file")
        return following(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NeedleStream, "__next__", failing)
        error = error_of(lambda: train(config_of(folder)))
    assert isinstance(error, OSError) and error.filename == "a/file"
    assert len(read) == 3


def check_training_on_a_disk(folder: Path) -> None:
    """Records of one rank are cut short between two steps: both stop in the next one."""
    config = replace(config_of(folder), placement="disk")
    records = folder / "run" / "learning" / "0" / "rank1-of-2" / "records"
    result = TrainStep.__call__
    made = []

    def cutting(self, batch, step):
        if step == 4 and ranks.rank() == 1:
            # A write that is under way would make the file longer again.
            self.optimizer.failed_write()
            os.truncate(records, 100)
        made.append(step)
        return result(self, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", cutting)
        error = error_of(lambda: train(config))
    assert isinstance(error, TableError) and str(records) in str(error)
    assert made == [1, 2, 3, 4]
    ranks.barrier()
    # No rank begins with records that one of them cannot open.
    error = error_of(lambda: train(config))
    assert isinstance(error, TableError) and "bytes of records" in str(error)


def everything(folder: Path) -> None:
    checks = (
        *(check_rows, check_state, check_rollback),
        *(check_training, check_data, check_training_on_a_disk),
    )
    for check in checks:
        (folder / check.__name__).mkdir(exist_ok=True)
    check_kinds()
    for check in checks:
        check(folder / check.__name__)
        ranks.barrier()


@pytest.mark.slow
def test_an_error_of_one_rank_is_raised_by_both(tmp_path):
    run_script(__file__, tmp_path)


def test_an_error_of_one_process_is_raised_as_it_is():
    error = ValueError("got less than 0")
    with pytest.raises(ValueError, match="got less than 0") as raised, ranks.together():
        raise error
    assert raised.value is error

    @ranks.together()
    def square(number: float) -> float:
        return number**2

    assert square(3.0) == 9.0


def test_one_process_is_rank_0_of_1():
    assert (ranks.rank(), ranks.world()) == (0, 1)
    tensor = torch.from_numpy(np.ones(3))
    assert ranks.total(tensor) is tensor
    ranks.barrier()


if __name__ == "__main__":
    fork_ranks(2, lambda: everything(Path(sys.argv[1])), 300)
