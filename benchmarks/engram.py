"""Times Engram's addresses, lookup and training, each beside its peer in one run.

    OMP_NUM_THREADS=2 python benchmarks/engram.py --tokens 1000000

    addresses    one layer, 16 rows per token (bigrams and trigrams, 8 heads each), against a plain
                 numpy loop over the heads in the structure of the authors' code, without what that
                 computes twice; both must give the same rows, or the run ends. Also on one thread.
    decode       one layer and two, 16 rows each, one new token of each of 32 sequences. The hash
                 itself is the compiled kernel on given ids, as a model calls it, with its result's
                 memory and the check of every id; the whole step is what a model calls: reading the
                 earlier ids from the cache, storing these in it, choosing the kernel.
    recall       lookup of rows into memory that is allocated already, against
                 torch.index_select(out=)
    sparse step  see rows.py, whose functions these are

Rounds are interleaved; medians are printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import rows as rows_benchmark
import torch

from rorqual.layers.addresses import Addresses, EngramConfig, follow_rows
from rorqual.layers.context import context
from rorqual.tables import Table

VOCAB_SIZE = 32_768
CPU = torch.device("cpu")


def measure(steps: dict[str, Callable[[], object]], rounds: int, each: int = 1) -> dict[str, float]:
    """Returns the milliseconds of each step.

    It is the median of interleaved rounds of `each` calls, after one round to warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(each):
                step()
            seconds[name].append((time.perf_counter() - began) / each)
    return {name: statistics.median(times[1:]) * 1e3 for name, times in seconds.items()}


def per_head(ids: np.ndarray, addresses: Addresses) -> np.ndarray:
    """Returns the row ids [B, T, R] of one layer, computed one head at a time.

    It shifts and mixes the ids of every order, then takes the remainder.
    """
    canonical = addresses.canonical_map.numpy().astype(np.int64)[ids]
    multipliers = addresses.multipliers[0].numpy()
    primes = addresses.primes[0].numpy()
    offsets = addresses.offsets[0].numpy()
    rows = np.empty((*ids.shape, len(offsets)), dtype=np.int64)
    mix = canonical * multipliers[0]
    for order, heads in enumerate(primes, start=1):
        earlier = np.pad(canonical, ((0, 0), (order, 0)), constant_values=addresses.pad)[
            :, : canonical.shape[1]
        ]
        mix = mix ^ (earlier * multipliers[order])
        for head, prime in enumerate(heads):
            column = (order - 1) * len(heads) + head
            rows[..., column] = mix % prime + offsets[column]
    return rows


def config(rows: int, layers: tuple[int, ...] = (1,)) -> EngramConfig:
    return EngramConfig(layers=layers, rows_per_head=(rows, rows), heads=8, head_dim=64)


def hashing(tokens: int, rows: int, rounds: int) -> dict[str, float]:
    addresses = Addresses(config(rows), None, VOCAB_SIZE)
    where = context(1, tokens, CPU)
    ids = torch.randint(VOCAB_SIZE, (1, tokens))
    threads = torch.get_num_threads()
    assert np.array_equal(addresses(ids, where)[0].numpy(), per_head(ids.numpy(), addresses)), (
        "they do not compute the same rows"
    )

    def alone() -> None:
        torch.set_num_threads(1)
        addresses(ids, where)
        torch.set_num_threads(threads)

    steps = {
        "addresses": lambda: addresses(ids, where),
        "numpy": lambda: per_head(ids.numpy(), addresses),
    }
    return measure(steps | {"addresses, one thread": alone}, rounds)


def decoding(rows: int, rounds: int) -> dict[str, float]:
    return measure(
        {**decode_steps(rows, (1,), "one layer"), **decode_steps(rows, (1, 14), "two layers")},
        rounds,
        2000,
    )


def decode_steps(rows: int, layers: tuple[int, ...], name: str) -> dict[str, Callable[[], object]]:
    addresses = Addresses(config(rows, layers), None, VOCAB_SIZE)
    history = addresses.new_cache(32, 64, torch.float32, CPU)
    where = context(32, 1, CPU)
    ids = torch.randint(VOCAB_SIZE, (32, 1))
    addresses(ids, where, history)
    buffer = history.reserve(ids, 64)
    start = history.before
    exact = (addresses.canonical_map, addresses.multipliers, addresses.primes, addresses.offsets)
    scratch = dict[str, Any]()
    return {
        f"hash of a 32-token decode step, {name}": lambda: follow_rows(
            ids, buffer, start, *exact, 0, None, scratch
        ),
        f"whole step with history, {name}": lambda: addresses(ids, where, history),
    }


def looking_up(rows: int, width: int, tokens: int, rounds: int) -> dict[str, float]:
    table = Table(rows * 16, width)
    asked = torch.randint(rows * 16, (tokens, 16))
    flat = asked.flatten()
    out = torch.empty(asked.numel(), width)
    steps = {
        "recall": lambda: table.prefetch(asked).wait(),
        "index_select": lambda: torch.index_select(table.weight, 0, flat, out=out),
    }
    return measure(steps, rounds)


def training(rows: int, width: int, touched: int, rounds: int) -> dict[str, float]:
    index = torch.randint(0, rows, (touched,))
    values = torch.randn(touched, width)
    steps = {
        "sparse step": rows_benchmark.ours(rows, width, index, values),
        "dense fused AdamW": rows_benchmark.dense(rows, width),
    }
    return rows_benchmark.measure(steps, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=65_536, help="of each head")
    parser.add_argument("--width", type=int, default=64, help="of a row that is recalled")
    parser.add_argument(
        "--looked-up", type=int, default=16_384, help="tokens whose 16 rows are read"
    )
    parser.add_argument(
        "--trained", type=int, default=1_000_000, help="rows of 128 in the table that is trained"
    )
    parser.add_argument("--touched", type=int, default=16_384, help="of these in a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        result = hashing(options.tokens, options.rows, options.rounds)
        result |= decoding(options.rows, options.rounds)
        result |= looking_up(options.rows, options.width, options.looked_up, 5 * options.rounds)
    result |= training(options.trained, 128, options.touched, 2 * options.rounds)
    ratios = {
        "addresses_vs_numpy": result["numpy"] / result["addresses"],
        "addresses_vs_numpy_one_thread": result["numpy"] / result["addresses, one thread"],
        "recall_vs_index_select": result["index_select"] / result["recall"],
        "sparse_step_vs_dense": result["dense fused AdamW"] / result["sparse step"],
        "decode_microseconds": result["hash of a 32-token decode step, one layer"] * 1e3,
        "decode_step_microseconds": result["whole step with history, one layer"] * 1e3,
    }
    if options.json:
        print(json.dumps(ratios | {"milliseconds": result, "threads": torch.get_num_threads()}))
        return
    print(f"{options.tokens:,} tokens, 16 rows each, {torch.get_num_threads()} threads")
    print(
        *(f"{name:42} {milliseconds:10.4f} ms" for name, milliseconds in result.items()), sep="\n"
    )
    print(*(f"{name:42} {ratio:10.2f}" for name, ratio in ratios.items()), sep="\n")


if __name__ == "__main__":
    main()
