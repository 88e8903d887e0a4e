"""Measures the memory of ranks that share a table, the bytes they send, and a training's peak.

    python benchmarks/shard_rows.py memory       RSS of a rank by role, on 1 and on 4 ranks
    python benchmarks/shard_rows.py bytes        bytes sent a step, by table size and distinct ids
    python benchmarks/shard_rows.py train        peak RSS of `rorqual train`, one process
    python benchmarks/shard_rows.py build        peak RSS of a rank that builds a model, whole at
                                                 first, or its shards alone
    python benchmarks/shard_rows.py              all four

Ranks are gloo processes of one thread. A role's memory is by how much the resident memory of the
process grows when it is made: rows when the table is drawn, optimizer when its state is, steps in
twenty steps that read other rows each. Linux alone: /proc is read.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import nn
from workers import run_ranks, write_whales

from rorqual import distributed
from rorqual.distributed_config import DistributedConfig
from rorqual.layers.attention import MLAConfig
from rorqual.layers.engram import EngramConfig
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig, row_totals
from rorqual.sharded_rows import RowExchange, ShardedTable
from rorqual.tables import Table
from rorqual.train.config import DataConfig, TrainConfig
from rorqual.train.optim import OptimConfig, Optimizer

MIB = 1 << 20
STEPS = 20


def status(name: str) -> float:
    """Returns VmRSS or VmHWM (the peak of VmRSS) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"got no {name} in /proc/self/status, expected Linux")


def table_of(rows: int, width: int) -> Table:
    """Returns this rank's rows of a table, or all on one rank."""
    if distributed.world() == 1:
        return Table(rows, width, "host")
    return ShardedTable(rows, width, exchange=RowExchange())


def step_of(table: Table, optimizer: Optimizer, ids: torch.Tensor) -> None:
    optimizer.begin_step()
    table.prefetch(ids).wait().square().sum().backward()
    optimizer.clip()
    optimizer.step()


def rank_memory(rows: int, width: int, tokens: int) -> dict[str, float]:
    """Returns the MiB of each role in this process."""
    torch.manual_seed(distributed.rank())
    start = status("VmRSS")
    table = table_of(rows, width)
    table.draw(0.02)
    drawn = status("VmRSS")
    optimizer = Optimizer(nn.ModuleDict({"table": table}), OptimConfig())
    ready = status("VmRSS")
    for _ in range(STEPS):
        step_of(table, optimizer, torch.randint(0, rows, (tokens,)))
    trained = status("VmRSS")
    roles = {"rows": drawn - start, "optimizer": ready - drawn, "steps": trained - ready}
    return roles | {"other": start, "all": trained, "peak": status("VmHWM")}


def rank_bytes(sizes: list[int], counts: list[int], width: int) -> list[dict[str, float]]:
    """Returns the bytes that this rank sends a step, for tables and numbers of ids."""
    results = []
    exchange = RowExchange()
    for rows in sizes:
        table = ShardedTable(rows, width, exchange=exchange)
        optimizer = Optimizer(nn.ModuleDict({"table": table}), OptimConfig())
        for count in counts:
            generator = torch.Generator().manual_seed(distributed.rank())
            # Squares of uniform numbers: some n-grams are more frequent. A hash spreads them.
            ids = (torch.rand(count, generator=generator) ** 2 * min(rows, 65_536)).long()
            ids = ids * 2_654_435_761 % rows
            before = exchange.bytes_sent
            step_of(table, optimizer, ids)
            sent = exchange.bytes_sent - before
            results.append(
                {"rows": rows, "ids": count, "distinct": len(ids.unique()), "sent": sent}
            )
    return results


def show_memory(options: argparse.Namespace) -> None:
    size = f"--rows={options.rows}", f"--width={options.width}"
    print(f"a table of {options.rows:,} x {options.width} rows, MiB of rank 0")
    names = ("rows", "optimizer", "steps", "other", "all", "peak")
    print("ranks " + "".join(f"{name:>11}" for name in names))
    results = {}
    for world in (1, options.ranks):
        results[world] = run_ranks(__file__, world, "--as-rank", "memory", *size)[0]
        print(f"{world:5} " + "".join(f"{results[world][name]:11.0f}" for name in names))
    shared = ("rows", "optimizer")
    one, several = (sum(results[world][name] for name in shared) for world in (1, options.ranks))
    print(f"rows and optimizer: {several / one:.3f} of one rank's")


def show_bytes(options: argparse.Namespace) -> None:
    print(f"bytes that rank 0 of {options.ranks} sends a step, rows of {options.width} float32")
    print(f"{'table rows':>12}{'ids':>10}{'distinct':>10}{'sent':>14}{'a distinct id':>15}")
    results = run_ranks(__file__, options.ranks, "--as-rank", "bytes", f"--width={options.width}")
    for line in results[0]:
        each = line["sent"] / line["distinct"]
        print(
            f"{line['rows']:12,}{line['ids']:10,}{line['distinct']:10,}"
            f"{line['sent']:14,}{each:15.1f}"
        )


def train_config(folder: Path, rows: int, width: int) -> TrainConfig:
    """Returns the config of a small model with a large table."""
    model = ModelConfig(
        vocab_size=512,
        dim=64,
        layers=2,
        dense_width=128,
        mla=MLAConfig(heads=2, kv_lora_rank=16, nope_dim=16, rope_dim=8, value_dim=16),
        engram=EngramConfig(
            layers=(1,), rows_per_head=(rows // 4, rows // 4), heads=2, head_dim=width
        ),
    )
    data = DataConfig(
        source=str(folder / "text.jsonl"), vocab_size=512, cache=str(folder / "cache")
    )
    return TrainConfig(
        model=model,
        data=data,
        folder=str(folder / "run"),
        steps=STEPS,
        batch_size=8,
        seq_len=128,
        save_every=STEPS // 2,
        validate_every=STEPS // 2,
    )


def train_rank(folder: Path, rows: int, width: int) -> dict[str, float]:
    """Trains, and returns the peak of this process's memory in MiB."""
    from rorqual.train.trainer import train

    config = train_config(folder, rows, width)
    train(config)
    (total,) = row_totals(config.model.engram)
    return {"rows": total, "table": total * width * 4 / MIB, "peak": status("VmHWM")}


def show_train(options: argparse.Namespace) -> None:
    rows = options.train_rows
    with tempfile.TemporaryDirectory(prefix="rows-") as name:
        folder = Path(name)
        write_whales(folder, 20_000)
        size = f"--rows={rows}", f"--width={options.width}"
        arguments = ("--as-rank", "train", f"--folder={folder}", *size)
        result = run_ranks(__file__, 1, *arguments)[0]
        print(
            f"{STEPS} steps, two checkpoints and a model with {result['rows']:,} x "
            f"{options.width} rows, {result['table']:.0f} MiB: peak {result['peak']:.0f} MiB"
        )
        # A run without its model goes on from its last checkpoint.
        (folder / "run" / "model.safetensors").unlink()
        result = run_ranks(__file__, 1, *arguments)[0]
        print(f"resumed from its last checkpoint: peak {result['peak']:.0f} MiB")


def rank_build(whole: bool) -> dict[str, float]:
    """Builds a model, and returns the MiB of this process before, at most and after."""
    config = ModelConfig(
        vocab_size=32_000,
        dim=512,
        layers=8,
        dense_width=4096,
        mla=MLAConfig(heads=8, kv_lora_rank=128, nope_dim=64, rope_dim=32, value_dim=64),
    )
    layout = DistributedConfig()
    mesh = distributed.make_mesh(layout, "cpu")
    start = status("VmRSS")
    if whole:
        model = distributed.parallelize(LanguageModel(config, seed=0), mesh, layout)
    else:
        device = torch.device("cpu")
        model = distributed.build(
            lambda: LanguageModel(config, seed=None), mesh, layout, device, seed=0
        )
    size = sum(p.numel() for p in model.parameters()) * 4 / MIB
    largest = max(p.numel() for p in model.parameters()) * 4 / MIB
    after = status("VmRSS")
    return {
        "model": size,
        "largest": largest,
        "start": start,
        "peak": status("VmHWM") - start,
        "after": after - start,
    }


def show_build(options: argparse.Namespace) -> None:
    for way in ("whole", "shards"):
        result = run_ranks(__file__, options.ranks, "--as-rank", "build", f"--way={way}")[0]
        print(
            f"a model of {result['model']:.0f} MiB, its largest tensor {result['largest']:.0f}, on "
            f"{options.ranks} ranks, {way} at first: {result['peak']:.0f} MiB at most, "
            f"{result['after']:.0f} after, besides {result['start']:.0f}"
        )


def as_rank(options: argparse.Namespace) -> None:
    """Does one rank's part and prints what it measured."""
    joined = distributed.join(torch.device("cpu"))
    if options.what == "memory":
        outcome = rank_memory(options.rows, options.width, tokens=65_536)
    elif options.what == "bytes":
        outcome = rank_bytes([100_000, 1_000_000, 4_000_000], [4096, 16_384, 65_536], options.width)
    elif options.what == "build":
        outcome = rank_build(options.way == "whole")
    else:
        outcome = train_rank(options.folder, options.rows, options.width)
    print(json.dumps(outcome))
    if joined:
        distributed.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=("memory", "bytes", "train", "build"))
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--train-rows", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        as_rank(options)
        return
    shown = {"memory": show_memory, "bytes": show_bytes, "train": show_train, "build": show_build}
    for what, show in shown.items():
        if options.what in (None, what):
            show(options)


if __name__ == "__main__":
    main()
