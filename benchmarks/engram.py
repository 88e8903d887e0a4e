"""Engram's addresses against a plain numpy loop over the heads, and recall against torch.index_select.

    python benchmarks/engram.py --tokens 1000000

16 rows a token (bigrams and trigrams, 8 heads each). Both compute the same rows, which is checked. A decode step is one
new token of each of 32 sequences, with the ids before it from the cache. Rounds are interleaved; medians are printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from rorqual.layers.basics import layout
from rorqual.layers.engram import Addresses, EngramConfig
from rorqual.storage import DeviceTable

VOCABULARY = 32_768


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, the median of interleaved rounds after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) * 1e3 for name, times in seconds.items()}


def per_head(ids: np.ndarray, own: Addresses) -> np.ndarray:
    """[T, R], a head at a time: the product of every order mixed by xor, then the remainder by the head's prime."""
    known = own.canonical_map.numpy().astype(np.int64)[ids]
    multipliers, primes, offsets = own.multipliers[0].numpy(), own.primes[0].numpy(), own.offsets[0].numpy()
    rows = np.empty((len(ids), len(offsets)), dtype=np.int64)
    mix = known * multipliers[0]
    for order in range(1, len(primes) + 1):
        earlier = np.concatenate([np.full(order, own.pad), known[:-order]])
        mix = mix ^ (earlier * multipliers[order])
        for head, prime in enumerate(primes[order - 1]):
            column = (order - 1) * len(primes[0]) + head
            rows[:, column] = mix % prime + offsets[column]
    return rows


def decoding(own: Addresses) -> Callable[[], object]:
    """One new token of 32 sequences."""
    history = own.new_cache(32, 64, torch.float32, torch.device("cpu"))
    where = layout(32, 1, torch.device("cpu"))
    ids = torch.randint(VOCABULARY, (32, 1))
    return lambda: own(ids, where, history)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=65_536, help="of each head")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--recalled", type=int, default=16_384, help="tokens whose rows are read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = EngramConfig(rows_per_head=(options.rows, options.rows), heads=8, head_dim=options.width)
    own = Addresses(config, None, VOCABULARY)
    ids, where = torch.randint(VOCABULARY, (1, options.tokens)), layout(1, options.tokens, torch.device("cpu"))
    rows = own(ids, where)[0, 0]
    assert np.array_equal(rows.numpy(), per_head(ids[0].numpy(), own)), "the two do not compute the same rows"
    table = DeviceTable(int(own.primes.sum()), options.width)
    asked = rows[: options.recalled]
    flat, out = asked.flatten(), torch.empty(asked.numel(), options.width)
    hashing = {"addresses": lambda: own(ids, where), "numpy": lambda: per_head(ids[0].numpy(), own)}
    reading = {
        "recall": lambda: table.request(asked).wait(),
        "index_select": lambda: torch.index_select(table.weight, 0, flat, out=out),
    }
    found = measure(hashing, options.rounds) | measure(reading, 5 * options.rounds)
    found |= measure({"decode step of 32": decoding(own)}, 200)
    ratios = {
        "addresses_vs_numpy": found["numpy"] / found["addresses"],
        "recall_vs_index_select": found["index_select"] / found["recall"],
        "decode_microseconds": found["decode step of 32"] * 1e3,
    }
    if options.json:
        print(json.dumps(ratios | {"milliseconds": found, "threads": torch.get_num_threads()}))
        return
    print(f"{options.tokens:,} tokens, 16 rows each, {torch.get_num_threads()} threads")
    print(*(f"{name:20} {milliseconds:9.3f} ms" for name, milliseconds in found.items()), sep="\n")
    print(*(f"{name:24} {ratio:9.2f}" for name, ratio in ratios.items()), sep="\n")


if __name__ == "__main__":
    main()
