"""Tests sharded_rows.py: one to four gloo processes compute the numbers of one with whole tables.

Run as a script, this file is the processes.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from rorqual import checkpoint, distributed
from rorqual.distributed_config import DistributedConfig
from rorqual.layers.attention import MLAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.model_config import row_totals
from rorqual.sharded_rows import RowExchange, ShardedTable
from rorqual.tables import Table, TableError
from rorqual.tables.record_shards import RecordShard
from rorqual.train.config import DataConfig, OptimConfig, TrainConfig
from rorqual.train.optim import Optimizer
from rorqual.train.run_folder import losses
from rorqual.train.trainer import train

sys.path.insert(0, str(Path(__file__).parent))
from processes import fork_ranks, run_script, write_text

# Without experts and gates: a choice of experts tips with rounding, and the slope of the gate's
# root is 500 at a score of 1e-6. One process that adds its micro-batches in another order then has
# other norms, too, by 0.5 % after 20 steps (by 3e-6 without gates).
CONFIG = ModelConfig(
    vocab_size=300,
    dim=16,
    layers=2,
    dense_width=24,
    mla=MLAConfig(heads=2, kv_lora_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
    engram=EngramConfig(layers=(0, 1), rows_per_head=(61, 61), heads=2, head_dim=4, gating="open"),
    init_std=0.1,
)
STEPS = 20
FEW_STEPS = 4
BATCH = 12  # divides among 1, 2, 3 and 4 ranks
WIDTH = 4
PLACEMENTS = ("device", "host", "disk")


def ids_of(rows: int, rank: int, call: int) -> torch.Tensor:
    """Returns the ids that a rank looks up: another number on each, with duplicates.

    Rank 1 looks nothing up in the first call, and nobody asks for the rows of the last rank then.
    """
    if rank == 1 and call == 0:
        return torch.zeros(0, 3, dtype=torch.int64)
    generator = torch.Generator().manual_seed(100 * rank + call)
    upper = max(1, rows // 4) if call == 0 else rows
    return torch.randint(0, upper, (5 + 3 * rank, 3), generator=generator)


def weights_of(ids: torch.Tensor, rank: int) -> torch.Tensor:
    """Returns what the looked up numbers of a rank are multiplied with to make its loss."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(*ids.shape, WIDTH, generator=generator)


def drawn(table: Table) -> Table:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        table.draw(0.02)
    return table


def check_tables(folder: Path) -> None:
    """Compares lookups and gradients with those of a whole table."""
    exchange = RowExchange()
    world = exchange.world
    for rows in (3, 61):
        for placement in PLACEMENTS:
            name = folder / f"records-{world}-{rows}"
            table = ShardedTable(rows, WIDTH, placement, exchange=exchange, folder=name)
            check_table(drawn(table), drawn(Table(rows, WIDTH)))
            if placement == "disk":
                table.close()


def check_table(table: ShardedTable, whole: Table) -> None:
    exchange = table.exchange
    assert table.weight.shape[0] == -(-table.rows // exchange.world)
    for call in range(2):
        ids = ids_of(table.rows, exchange.rank, call)
        handle = table.prefetch(ids)
        ids.mul_(0)
        values = handle.wait()
        ids = ids_of(table.rows, exchange.rank, call)
        assert torch.equal(values, whole.prefetch(ids).wait())
        # Recomputed activations wait again.
        assert torch.equal(handle.wait(), values)
        (values * weights_of(ids, exchange.rank)).sum().backward()
        for rank in range(exchange.world):
            ids = ids_of(table.rows, rank, call)
            loss = (whole.prefetch(ids).wait() * weights_of(ids, rank)).sum()
            (loss / exchange.world).backward()
    assert table.weight.grad is not None
    mine = table.weight.grad.to_dense()
    expected = whole.weight.grad[table.first : table.first + table.count]
    torch.testing.assert_close(mine[: table.count], expected, rtol=1e-5, atol=1e-6)
    assert not mine[table.count :].any()
    check_wrong_ids(table)


def check_wrong_ids(table: ShardedTable) -> None:
    """An id outside the table on one rank is an error of all, and the next lookup works."""
    rank = table.exchange.rank
    for wrong in (-1, table.rows):
        ids = torch.tensor([0, wrong if rank == table.exchange.world - 1 else 0])
        handles = [table.prefetch(ids), table.prefetch(ids * 0)]
        with pytest.raises(ValueError, match=f"got row id {wrong}, expected 0 to") as raised:
            handles[0].wait()
        assert raised.value.__notes__ == [f"raised on rank {table.exchange.world - 1}"]
        assert handles[1].wait().shape == (2, WIDTH)


def check_failures(folder: Path) -> None:
    """An error of one rank within an exchange is raised by both, and the next one works."""
    exchange = RowExchange()
    table = ShardedTable(61, WIDTH, "disk", exchange=exchange, folder=folder / "failing")
    drawn(table)
    ids = torch.arange(61).roll(7 * exchange.rank)
    expected = table.prefetch(ids).wait().detach()
    for rank in range(exchange.world):
        records = RecordShard(folder / "failing", 61, WIDTH, rank, exchange.world).folder
        with cut_short(records / "records", rank):
            # The second exchange is under way when the first one fails.
            for handle in [table.prefetch(ids), table.prefetch(ids.flip(0))]:
                check_error(handle.wait, TableError, str(records), rank)
        assert torch.equal(table.prefetch(ids).wait(), expected)
        with torch.no_grad():
            assert torch.equal(table.prefetch(ids).wait(), expected)

        loss = table.prefetch(ids).wait().sum()
        with out_of_memory(rank):
            check_error(loss.backward, MemoryError, "no memory for sums", rank)
        table.prefetch(ids).wait().sum().backward()
        gradient = table.weight.grad
        assert gradient is not None
        table.weight.grad = None

        # A rank that cannot read the records to update says so when all of them look.
        mine = torch.arange(0, table.count, 2)
        with cut_short(records / "records", rank):
            table.update(mine, torch.ones(len(mine), WIDTH), lambda rows, *_: rows.add_(1))
            check_error(partial(flush_together, table), TableError, str(records), rank)
        table.rewind(0)
        assert torch.equal(table.prefetch(ids).wait(), expected)
    table.close()


def flush_together(table: ShardedTable) -> None:
    with distributed.together():
        table.flush()


def check_error(work: Callable[[], object], kind: type[Exception], text: str, rank: int) -> None:
    """AssertionError unless this rank raises such an error, and says which rank had it."""
    with pytest.raises(kind, match=re.escape(text)) as raised:
        work()
    assert raised.value.__notes__ == [f"raised on rank {rank}"]


@contextmanager
def cut_short(path: Path, rank: int) -> Iterator[None]:
    """Takes the end of a file away in the block, which one rank does for all."""
    distributed.barrier()
    content = path.read_bytes()
    distributed.barrier()
    if distributed.rank() == rank:
        os.truncate(path, 100)
    distributed.barrier()
    yield
    distributed.barrier()
    if distributed.rank() == rank:
        path.write_bytes(content)
    distributed.barrier()


@contextmanager
def out_of_memory(rank: int) -> Iterator[None]:
    """Makes one rank fail where it adds up the gradients of a row."""

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError("no memory for sums")

    with pytest.MonkeyPatch.context() as patch:
        if distributed.rank() == rank:
            patch.setattr("rorqual.sharded_rows.F.embedding_bag", fail)
        yield


def sharded_model(placement: str = "device", folder: Path | None = None) -> LanguageModel:
    """Returns a model with sharded tables and parameters; on one process a plain one."""
    if distributed.world() == 1:
        return LanguageModel(CONFIG, seed=2)
    exchange = RowExchange()
    tables = [
        ShardedTable(
            rows,
            CONFIG.engram.head_dim,
            placement,
            exchange=exchange,
            folder=None if folder is None else folder / str(number),
        )
        for number, rows in enumerate(row_totals(CONFIG.engram))
    ]
    model = LanguageModel(CONFIG, seed=2, tables=tables)
    mesh = distributed.make_mesh(DistributedConfig(), "cpu")
    return distributed.parallelize(model, mesh, DistributedConfig())


def train_steps(
    model: LanguageModel, steps: int = STEPS
) -> tuple[Optimizer, dict[str, list[float]]]:
    """Trains on this rank's share of the batch, in two micro-batches."""
    # Adam divides gradients that are only rounding error by themselves, but for a large eps.
    optimizer = Optimizer(model, OptimConfig(lr=1e-2, clip=0.5, eps=1e-3))
    history: dict[str, list[float]] = {"loss": [], "norm": []}
    share = BATCH // distributed.world()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 300, (BATCH, 11), generator=generator)
        mine = ids[distributed.rank() * share : (distributed.rank() + 1) * share]
        optimizer.begin_step()
        losses = []
        for some in mine.split(-(-share // 2)):
            weight = len(some) / share
            loss = model.loss(some[:, :-1], some[:, 1:]).total * weight
            loss.backward()
            losses.append(loss.detach())
        history["loss"].append(float(distributed.total(sum(losses)) / distributed.world()))
        history["norm"].append(float(optimizer.clip()))
        optimizer.step()
    return optimizer, history


def state_of(model: LanguageModel, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    return state | {f"optim.{key}": value for key, value in optimizer.state_dict().items()}


def train_twenty(folder: Path) -> None:
    """Trains, and saves the state, the model and what happened."""
    model = sharded_model()
    optimizer, history = train_steps(model)
    world = distributed.world()
    checkpoint.save_state(folder / f"trained-{world}", state_of(model, optimizer), history)
    checkpoint.save_model(folder / f"model-{world}", model)


def train_elsewhere(folder: Path) -> None:
    """Trains rows in host memory and on a disk; rank 0 reads those of all ranks."""
    for placement in ("host", "disk"):
        model = sharded_model(placement, folder / "learning")
        train_steps(model, FEW_STEPS)
        rows = {}
        for number, table in enumerate(model.tables):
            if placement == "disk":
                table.flush()
                distributed.barrier()
                rows[str(number)] = table.read_trained(0, table.rows)
                assert torch.equal(table.read_trained(7, 150), rows[str(number)][7:150])
            else:
                rows[str(number)] = table.whole(table.weight).full_tensor()
        if distributed.rank() == 0:
            save_file(rows, folder / f"{placement}.safetensors")


def reshard(folder: Path, source: str) -> None:
    """Reads a checkpoint of another number of ranks and writes it again.

    A model's weights are read from it in the same way.
    """
    model = sharded_model()
    optimizer = Optimizer(model, OptimConfig())
    state = state_of(model, optimizer)
    for tensor in state.values():
        tensor.zero_()
    values = checkpoint.load_state(folder / source, state)
    checkpoint.save_state(folder / f"{source}-{distributed.world()}", state, values)
    again = sharded_model()
    again.load_state_dict(model.state_dict())
    for ours, theirs in zip(again.tables, model.tables, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
    for table in again.tables:
        table.weight.data.zero_()
    other = Optimizer(again, OptimConfig())
    other.load_state_dict(optimizer.state_dict())
    for name, value in optimizer.state_dict().items():
        ours = other.state_dict()[name]
        assert torch.equal(
            *(one.to_local() if isinstance(one, DTensor) else one for one in (ours, value))
        ), name
    whole = [
        value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
        if name.startswith("tables.")
    ]
    plain = {f"{n}.weight": value for n, value in enumerate(whole)}
    again.tables.load_state_dict(plain)
    for ours, theirs in zip(again.tables, model.tables, strict=True):
        # Rows that fill up the last shard have no id.
        count = ours.count if isinstance(ours, ShardedTable) else ours.rows
        assert torch.equal(ours.weight[:count], theirs.weight[:count])


def run_config(folder: Path, name: str) -> TrainConfig:
    """Returns the config of a run whose name is that of its placement."""
    data = DataConfig(
        source=str(folder / "text.jsonl"), vocab_size=300, cache=str(folder / "cache")
    )
    return TrainConfig(
        model=CONFIG,
        data=data,
        folder=str(folder / name),
        placement=name.partition("-")[0],
        steps=10,
        batch_size=6,
        seq_len=12,
        save_every=5,
    )


def run_twice(folder: Path) -> None:
    """Trains ten steps, and goes on from the fifth again, with rows in memory and on a disk."""
    for placement in ("device", "disk"):
        train(run_config(folder, placement))
        distributed.barrier()
        if distributed.rank() == 0:
            undo_half(folder / placement, folder / f"{placement}-again")
        distributed.barrier()
        train(replace(run_config(folder, placement), folder=str(folder / f"{placement}-again")))


def undo_half(run: Path, copy: Path) -> None:
    """Copies a run as it was before its last checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step10")
    shutil.rmtree(copy / "tables", ignore_errors=True)
    (copy / "model.safetensors").unlink()


def go_on(folder: Path) -> None:
    """Goes on from the fifth step with another number of ranks, with rows on a disk."""
    name = f"disk-{distributed.world()}"
    if distributed.rank() == 0:
        undo_half(folder / "disk", folder / name)
    distributed.barrier()
    train(replace(run_config(folder, "disk"), folder=str(folder / name)))


def everything_on_four(folder: Path) -> None:
    check_tables(folder)
    train_twenty(folder)
    train_elsewhere(folder)


def everything_on_two(folder: Path) -> None:
    train_twenty(folder)
    reshard(folder, "trained-4")
    run_twice(folder)


def everything_on_one(folder: Path) -> None:
    reshard(folder, "trained-4-2")
    go_on(folder)


def everything_on_three(folder: Path) -> None:
    reshard(folder, "trained-4-2-1")
    go_on(folder)


def everything_on_four_again(folder: Path) -> None:
    reshard(folder, "trained-4-2")
    reshard(folder, "trained-4-2-1")


def fast_on_two(folder: Path) -> None:
    check_tables(folder)
    check_failures(folder)


PHASES = {
    "fast": ((2, fast_on_two),),
    "slow": (
        (4, everything_on_four),
        (2, everything_on_two),
        (1, everything_on_one),
        (3, everything_on_three),
        (4, everything_on_four_again),
    ),
}


def run_phases(phases: str, folder: Path) -> Path:
    """Runs this file as the processes of some phases; returns the folder with their results."""
    write_text(folder)
    run_script(__file__, phases, folder, shapes=False)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return run_phases("slow", tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """The state and the history of one process that trained on the whole batches."""
    model = LanguageModel(CONFIG, seed=2)
    optimizer, history = train_steps(model)
    return state_of(model, optimizer), history


def loaded(path: Path, like: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict]:
    state = {key: torch.zeros_like(value) for key, value in like.items()}
    return state, checkpoint.load_state(path, state)


def test_lookups_and_gradients_are_those_of_a_whole_table(tmp_path):
    """Two ranks, one without ids at first; an error of one, such as wrong ids, is one of both."""
    run_phases("fast", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_twenty_steps_are_those_of_one_process(folder, alone, world):
    """Losses, gradient norms, rows and all state are equal, and so is the exported model."""
    expected, history = alone
    state, values = loaded(folder / f"trained-{world}", expected)
    assert values["loss"] == pytest.approx(history["loss"], rel=1e-5)
    assert values["norm"] == pytest.approx(history["norm"], rel=1e-5)
    for key, value in expected.items():
        message = f"{key}: {{}}"
        torch.testing.assert_close(
            state[key],
            value,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda m, message=message: message.format(m),
        )
        if key.endswith("updates"):
            assert torch.equal(state[key], value)
    weights = load_file(folder / f"model-{world}" / "model.safetensors")
    assert weights.keys() == {key[6:] for key in expected if key.startswith("model.")}
    for name, value in weights.items():
        assert torch.equal(value, state[f"model.{name}"])


@pytest.mark.slow
def test_rows_elsewhere_are_trained_as_rows_on_the_device(folder):
    model = LanguageModel(CONFIG, seed=2)
    train_steps(model, FEW_STEPS)
    for placement in ("host", "disk"):
        rows = load_file(folder / f"{placement}.safetensors")
        for number in range(2):
            expected = model.tables[number].weight
            torch.testing.assert_close(rows[str(number)], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_four_two_one_and_three_ranks_read_each_others_checkpoints(folder, alone):
    """Rows, their Adam state and everything else stay the same to the bit."""
    expected, values = loaded(folder / "trained-4", alone[0])
    names = ("4-2", "4-2-1", "4-2-1-3", "4-2-4", "4-2-1-4")
    for name in (f"trained-{ranks}" for ranks in names):
        state, same_values = loaded(folder / name, expected)
        assert same_values == values
        for key, value in expected.items():
            assert torch.equal(state[key], value), (name, key)


def checkpoint_files(run: Path) -> dict[str, bytes]:
    """Returns the tensors of the last checkpoint, file by file."""
    return {path.name: path.read_bytes() for path in run.glob("checkpoints/step10/*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["device", "disk"])
def test_a_resumed_run_makes_the_same_steps_to_the_bit(folder, placement):
    run = folder / placement
    again = folder / f"{placement}-again"
    assert losses(again) == losses(run)
    files = checkpoint_files(run)
    assert len(files) == (4 if placement == "device" else 2)
    assert checkpoint_files(again) == files
    if placement == "disk":
        rows = [run / "tables" / "0", again / "tables" / "0"]
        assert torch.equal(*(Table.of_file(path).file.read(np.arange(120)) for path in rows))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
def test_rows_on_a_disk_go_on_with_other_ranks(folder, world):
    assert losses(folder / f"disk-{world}") == pytest.approx(losses(folder / "disk"), rel=1e-5)
    assert losses(folder / "disk") == pytest.approx(losses(folder / "device"), rel=1e-6)
    # Those of two ranks went with the last checkpoint that needed them.
    records = {path.name for path in (folder / f"disk-{world}" / "learning" / "0").glob("*")}
    assert {f"rank{rank}-of-2" for rank in range(2)}.isdisjoint(records)
    assert ("rank0-of-3" in records) == (world == 3)


if __name__ == "__main__":
    for ranks, work in PHASES[sys.argv[1]]:
        fork_ranks(ranks, partial(work, Path(sys.argv[2])))
