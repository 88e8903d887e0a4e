"""Measures what the choice of a kernel adds to a call on the CPU.

    OMP_NUM_THREADS=1 python benchmarks/dispatch.py

Each kernel is replaced by a function that does nothing. A figure is the shortest of 3000 bursts of
50 calls of the reference's name, less that of direct calls, in microseconds: the shortest, since
on a machine that works on something else every other one measures that.
"""

import time
from collections.abc import Callable
from unittest import mock

import torch

from rorqual import kernels
from rorqual.layers.addresses import Addresses, follow_rows, hash_rows
from rorqual.layers.dsa import attend_best
from rorqual.layers.nsa import attend_small_batch
from rorqual.layers.sparse import selected_attention
from rorqual.model_config import EngramConfig, NSAConfig
from rorqual.train.optim import row_adam

BURSTS = 3000
CALLS = 50


def nothing(*arguments: object) -> None:
    """Stands for a kernel."""


def shortest(function: Callable[..., object], arguments: tuple[object, ...]) -> float:
    """Returns the microseconds of a call in the shortest burst."""
    best = float("inf")
    for _ in range(BURSTS):
        began = time.perf_counter_ns()
        for _ in range(CALLS):
            function(*arguments)
        best = min(best, time.perf_counter_ns() - began)
    return best / CALLS / 1000


def added(operation: kernels.Operation, arguments: tuple[object, ...]) -> float:
    (kernel,) = (kernel for kernel in operation.choice.kernels if kernel.kind == "numba")
    with mock.patch.object(kernel, "function", nothing):
        return shortest(operation, arguments) - shortest(nothing, arguments)


def main() -> None:
    ours = Addresses(EngramConfig(), None, 50)
    exact = ours.canonical_map, ours.multipliers, ours.primes, ours.offsets
    ids = torch.randint(50, (1, 1))
    stored = torch.randint(50, (1, 90))
    query = torch.randn(1, 1, 4, 8)
    key = torch.randn(1, 64, 2, 8)
    index = torch.zeros(1, 1, 2, 1, dtype=torch.long)
    positions = torch.tensor([[63]])
    rows = torch.randn(9, 4)
    counts = torch.zeros(9, dtype=torch.int32)
    touched = torch.arange(9)
    calls = (
        (follow_rows, (ids, stored, 4, *exact, 7, None, {})),
        (hash_rows, (stored, None, *exact, 7, None, {})),
        (row_adam, (rows, rows, rows, counts, touched, rows, 0.1, (0.9, 0.9), 1e-8)),
        (selected_attention, (query, key, key, index, positions, 4, 0.3)),
        (attend_best, (query, key, query, key, query, 4, 0.3)),
        (attend_small_batch, (query, *[key] * 6, None, positions, NSAConfig(), 0.3)),
    )
    for operation, arguments in calls:
        tensors = sum(isinstance(x, torch.Tensor) for x in arguments)
        with torch.inference_mode():
            print(f"{operation.__name__:20}{tensors} tensors {added(operation, arguments):5.2f}")


if __name__ == "__main__":
    main()
