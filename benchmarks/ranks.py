"""Compares one process of several threads with as many processes of one thread.

    python benchmarks/ranks.py                          preset small, two processes
    python benchmarks/ranks.py --rounds 5 --steps 4     rounds by turns, steps in each

Every way trains the same model on the same batches, with the step of the trainer (TrainStep). All
of them are started first and wait; then they run by turns, one round after the other, so that
other work on the machine slows all alike. Printed are medians over rounds, and the median of each
round's ratio to the one process. The first round is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from workers import start_ranks

from rorqual import config as configs
from rorqual import distributed, runtime
from rorqual.distributed_config import DistributedConfig
from rorqual.model import LanguageModel
from rorqual.model_config import row_totals
from rorqual.presets import preset
from rorqual.sharded_rows import RowExchange, ShardedTable
from rorqual.train.config import TrainConfig, recipe
from rorqual.train.optim import Optimizer
from rorqual.train.step import TrainStep

# What is said of a way, and its layout on so many processes.
LAYOUTS = {
    "shards": DistributedConfig(),
    "copies": DistributedConfig(replicate=2),
    "copies of rows too": DistributedConfig(replicate=2, rows="replicate"),
}


def batch_of(config: TrainConfig, step: int) -> dict[str, torch.Tensor]:
    """Returns this rank's part of a batch, whose ids are as uneven as those of a text."""
    generator = torch.Generator().manual_seed(step)
    shape = config.batch_size, config.seq_len + 1
    uniform = torch.rand(shape, generator=generator)
    ids = (config.model.vocab_size**uniform).long() - 1
    number, parts = config.distributed.data_rank(distributed.rank(), distributed.world())
    mine = ids.chunk(parts)[number]
    return {
        "ids": mine[:, :-1],
        "labels": mine[:, 1:],
        "document_ids": torch.zeros_like(mine[:, 1:]),
    }


def train_step(options: argparse.Namespace) -> TrainStep:
    """Returns what trains the model on all ranks, or on this process alone."""
    shape = preset(options.preset)
    config = TrainConfig(
        model=shape,
        optim=recipe(shape.dim),
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        distributed=configs.from_dict(DistributedConfig, json.loads(options.layout)),
    )
    canonical_map = torch.arange(shape.vocab_size)
    if distributed.world() == 1:
        model = LanguageModel(shape, canonical_map, seed=0)
        return TrainStep(model, Optimizer(model, config.optim), config)
    tables = None
    if shape.engram is not None and config.distributed.rows == "shard":
        exchange = RowExchange()
        tables = [
            ShardedTable(rows, shape.engram.head_dim, exchange=exchange)
            for rows in row_totals(shape.engram)
        ]
    model = distributed.build(
        lambda: LanguageModel(shape, canonical_map, seed=None, tables=tables),
        distributed.make_mesh(config.distributed, "cpu"),
        config.distributed,
        torch.device("cpu"),
        seed=0,
    )
    return TrainStep(model, Optimizer(model, config.optim), config)


def be_worker(options: argparse.Namespace) -> None:
    """Trains so many steps as each line of the input says, and prints their seconds."""
    runtime.threads(options.threads)
    distributed.join(torch.device("cpu"))
    step = train_step(options)
    number = 0
    for line in sys.stdin:
        distributed.barrier()
        began = time.perf_counter()
        before = time.process_time()
        for _ in range(int(line)):
            number += 1
            result = step(batch_of(step.config, number), number)
        seconds = time.perf_counter() - began
        loss = float(distributed.total(result.means["loss"])) / distributed.world()
        print(json.dumps([seconds, time.process_time() - before, loss]), flush=True)
    distributed.leave()


def run_round(workers: list[subprocess.Popen], steps: int) -> tuple[float, float, float]:
    """Returns the seconds of a round, by the clock and of all CPUs, and the last loss."""
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(f"{steps}\n")
        worker.stdin.flush()
    results = []
    for worker in workers:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            raise SystemExit("a process failed; what it said stands above")
        results.append(json.loads(line))
    seconds, cpu, losses = zip(*results, strict=True)
    return max(seconds), sum(cpu), losses[0]


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--ways", nargs="*", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.layout is not None:
        be_worker(options)
        return
    words = [f"--preset={options.preset}", f"--batch-size={options.batch_size}"]
    words += [f"--seq-len={options.seq_len}"]
    alone = f"1 process, {options.ranks} threads"
    ways = {alone: (1, options.ranks, DistributedConfig())}
    for name in options.ways:
        layout = LAYOUTS[name]
        if layout.replicate > 1:
            layout = configs.replace(layout, "replicate", options.ranks)
        ways[f"{options.ranks} processes, {name}"] = (options.ranks, 1, layout)
    workers = {}
    try:
        for name, (ranks, threads, layout) in ways.items():
            text = json.dumps(configs.to_dict(layout))
            command = [*words, f"--threads={threads}", f"--layout={text}"]
            workers[name] = start_ranks(__file__, ranks, command, threads=threads)
        rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds + 1):
            for name in ways:
                rounds[name].append(run_round(workers[name], options.steps))
    finally:
        for group in workers.values():
            for worker in group:
                worker.terminate()
                worker.wait()
    tokens = options.steps * options.batch_size * options.seq_len
    results = {}
    for name, measured in rounds.items():
        ratios = [
            one[0] / mine[0] for one, mine in zip(rounds[alone][1:], measured[1:], strict=True)
        ]
        results[name] = {
            "tokens_a_second": tokens / statistics.median(each[0] for each in measured[1:]),
            "ratio": statistics.median(ratios),
            "smallest_ratio": min(ratios),
            "largest_ratio": max(ratios),
            "cpu_seconds_a_step": statistics.median(each[1] for each in measured[1:])
            / options.steps,
            "loss": measured[-1][2],
        }
    if options.json:
        print(json.dumps(results))
        return
    print(f"{options.preset}, {options.batch_size} x {options.seq_len} tokens a step, medians of")
    print(
        f"{options.rounds} rounds of {options.steps} steps by turns; load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':34}{'tokens/s':>10}{'ratio':>8}{'from':>7}{'to':>7}{'CPU s/step':>12}{'loss':>10}")
    for name, result in results.items():
        rate, *ratios, cpu, loss = result.values()
        columns = "".join(f"{ratio:7.3f}" for ratio in ratios)
        print(f"{name:34}{rate:10.0f} {columns}{cpu:12.2f}{loss:10.5f}")


if __name__ == "__main__":
    main()
