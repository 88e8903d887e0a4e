"""Times one step of row-sparse Adam against dense fused AdamW on the same table in one run.

    python benchmarks/rows.py --rows 1000000 --width 128 --touched 16384

A step here is what training pays: coalesce the gradient of `--touched` row ids (duplicates among
them), clip, update. The peers are torch.optim.AdamW(fused=True) on a dense gradient that is there
already, and torch.optim.SparseAdam, whose bias correction counts steps of the whole table. Rounds
are interleaved; medians are printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from rorqual.tables import Table
from rorqual.train.config import OptimConfig
from rorqual.train.optim import Optimizer


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Returns the milliseconds of each step.

    It is the median of interleaved rounds, after one to warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) * 1e3 for name, times in seconds.items()}


def ours(rows: int, width: int, index: torch.Tensor, values: torch.Tensor) -> Callable[[], None]:
    model = nn.ModuleDict({"table": Table(rows, width)})
    optimizer = Optimizer(model, OptimConfig())
    table = optimizer.parameters["table.weight"]

    def step() -> None:
        table.grad = torch.sparse_coo_tensor(
            index[None], values, table.shape, check_invariants=False
        )
        optimizer.clip()
        optimizer.step()

    return step


def dense(rows: int, width: int) -> Callable[[], None]:
    table = nn.Parameter(torch.randn(rows, width))
    table.grad = torch.randn(rows, width)
    return torch.optim.AdamW([table], fused=True).step


def sparse_adam(
    rows: int, width: int, index: torch.Tensor, values: torch.Tensor
) -> Callable[[], None]:
    table = nn.Parameter(torch.randn(rows, width))
    optimizer = torch.optim.SparseAdam([table])

    def step() -> None:
        table.grad = torch.sparse_coo_tensor(
            index[None], values, table.shape, check_invariants=False
        )
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--touched", type=int, default=16_384)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    index = torch.randint(0, options.rows, (options.touched,))
    values = torch.randn(options.touched, options.width)
    size = (options.rows, options.width)
    steps = {
        "row-sparse Adam": ours(*size, index, values),
        "dense fused AdamW": dense(*size),
        "torch SparseAdam": sparse_adam(*size, index, values),
    }
    outcome = measure(steps, options.rounds)
    mine = outcome["row-sparse Adam"]
    ratio = {name: outcome[name] / mine for name in outcome}
    if options.json:
        result = {
            "sparse_step_vs_dense": ratio["dense fused AdamW"],
            "sparse_step_vs_sparse_adam": ratio["torch SparseAdam"],
        }
        print(json.dumps(result | {"milliseconds": outcome, "threads": torch.get_num_threads()}))
        return
    print(
        f"{size[0]:,} x {size[1]} rows, {options.touched:,} touched, "
        f"{torch.get_num_threads()} threads"
    )
    for name, milliseconds in outcome.items():
        print(f"{name:20} {milliseconds:9.2f} ms   {ratio[name]:6.2f} x")


if __name__ == "__main__":
    main()
