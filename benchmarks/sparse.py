"""Times kinds of attention by context length, and reports where each pays.

    python benchmarks/sparse.py
    python benchmarks/sparse.py --lengths 1024 4096 --heads 8 --kv-heads 2 --rounds 3 --json

It measures time and memory of one layer's attention, batch size 1, float32:

    decode     the last of T tokens after a cache of the others, including its projections
    attend     the same without the projections of queries, keys, values and outputs that full
               attention has as well. This shows what the selection itself brings, since the
               projections take the same time however long the context is
    prefill    a prompt of T tokens into an empty cache, including its projections

A round calls every kind once, so that a busy machine slows them alike and a kind finds none of its
weights in the processor's caches, as in a model of many layers; the median over the rounds is
printed. Where no prompt is timed, all of the cache but its last tile is random numbers. The last
token of a tile uses the tile's selection; one token in 128 makes it and takes longer. The last of
these T completes one of NSA's blocks, as one token in 16 does. A kind's peer is full attention of
its own sort: gqa for NSA and MoBA, absorbed mla for DSA. A kind pays from the first length at
which, and from which on, it is faster.

Memory is the peak that a prefill allocates, by torch's own record of every allocation, and the size
of its cache.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from rorqual.layers.attention import GQA, MLA, GQAConfig, MLAConfig
from rorqual.layers.cache import Appended, BlockCache, Past, Recent
from rorqual.layers.context import Context, context
from rorqual.layers.dsa import DSA, DSAConfig
from rorqual.layers.moba import MoBA, MoBAConfig
from rorqual.layers.nsa import NSA, NSAConfig
from rorqual.layers.rope import RopeConfig
from rorqual.layers.sparse import Blocks
from rorqual.layers.tiles import TILE, Choice

ROPE = RopeConfig()
PHASES = ("decode", "attend", "prefill")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Kind:
    """One kind of attention.

    `build(options)` returns one layer; `peer` names the full attention that it is compared with.
    """

    build: Callable[[argparse.Namespace], GQA | MLA]
    peer: str


def gqa(options: argparse.Namespace) -> GQAConfig:
    return GQAConfig(heads=options.heads, kv_heads=options.kv_heads, head_dim=options.head_dim)


def mla(options: argparse.Namespace) -> MLAConfig:
    """Returns an MLA config with DeepSeek's widths per head.

    Only the rotary width differs, since an indexer of 32 must contain it.
    """
    return MLAConfig(
        heads=options.heads,
        q_lora_rank=384,
        kv_lora_rank=512,
        nope_dim=128,
        rope_dim=32,
        value_dim=128,
    )


def nsa(choice: Choice) -> Callable[[argparse.Namespace], GQA | MLA]:
    """Returns a builder of NSA with the paper's sizes."""

    def build(options: argparse.Namespace) -> GQA | MLA:
        config = NSAConfig(top_k=options.top_k, window=options.window, choice=choice)
        return NSA(config, gqa(options), options.dim, ROPE)

    return build


def moba(choice: Choice) -> Callable[[argparse.Namespace], GQA | MLA]:
    def build(options: argparse.Namespace) -> GQA | MLA:
        config = MoBAConfig(block=64, top_k=options.top_k, choice=choice)
        return MoBA(config, gqa(options), options.dim, ROPE)

    return build


def dsa(options: argparse.Namespace) -> GQA | MLA:
    config = DSAConfig(heads=4, dim=32, top_k=options.dsa_selected)
    return DSA(config, mla(options), options.dim, ROPE)


KINDS = {
    "gqa": Kind(lambda options: GQA(gqa(options), options.dim, ROPE), "gqa"),
    "nsa": Kind(nsa("token"), "gqa"),
    "nsa tile": Kind(nsa("tile"), "gqa"),
    "moba": Kind(moba("token"), "gqa"),
    "moba tile": Kind(moba("tile"), "gqa"),
    "mla": Kind(lambda options: MLA(mla(options), options.dim, ROPE), "mla"),
    "dsa": Kind(dsa, "mla"),
}


def placed(attention: GQA | MLA, time: int, past: Past, cache: Any = None) -> Context:
    """Returns the context of a call, which a model makes once for all layers."""
    ctx = context(1, time, "cpu", past=past, rope=(ROPE, attention.rope_dim))
    return ctx if cache is None else ctx.for_block(BlockCache(cache))


def call(attention: GQA | MLA, hidden: torch.Tensor, past: Past, cache: Any) -> torch.Tensor:
    return attention(hidden, placed(attention, hidden.shape[1], past, cache)).out


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")


class FixedOutput(nn.Module):
    """Replaces the projection of one token by a fixed result."""

    def __init__(self, width: int):
        super().__init__()
        self.result = torch.randn(1, 1, width)

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.result


def bare(attention: GQA | MLA) -> GQA | MLA:
    """Returns the same layer without the time of its projections."""
    result = copy.copy(attention)
    widths = {
        name: getattr(attention, name).out_features
        for name in PROJECTIONS
        if hasattr(attention, name)
    }
    result._modules = attention._modules | {
        name: FixedOutput(width) for name, width in widths.items()
    }
    return result


class Runner:
    """Calls a layer of one kind in one of three ways."""

    def __init__(self, kind: Kind, options: argparse.Namespace, length: int):
        torch.manual_seed(0)
        self.attention = kind.build(options).eval()
        self.bare = bare(self.attention)
        self.hidden = torch.randn(1, length, options.dim)
        self.past, self.cache = Past(1, length), self.new_cache()

    def new_cache(self) -> Any:
        return self.attention.new_cache(
            1, self.hidden.shape[1] + 64, torch.float32, torch.device("cpu")
        )

    def prefill(self) -> None:
        self.past, self.cache = Past(1, self.hidden.shape[1]), self.new_cache()
        call(self.attention, self.hidden, self.past, self.cache)

    def fill(self) -> None:
        """Fills the cache with random values of T - 1 tokens, unless a prefill filled it."""
        length = self.hidden.shape[1]
        if not self.past.length:
            call(self.attention, self.hidden[:, :1], self.past, self.cache)
            for container in containers(self.cache):
                if isinstance(container, Appended) and container.buffer is not None:
                    container.reserve(container.buffer[:, :1], length).normal_()
            start = max(1, (length - 1) // TILE * TILE)
            self.past.append([start - 1])
            for offset in range(start, length - 1):
                call(self.attention, self.hidden[:, offset : offset + 1], self.past, self.cache)
            # A step computes the blocks that its token completes, and those before were never made.
            for container in containers(self.cache):
                if isinstance(container, Blocks) and container.values.buffer is not None:
                    container.values.buffer.normal_()
        self.past.crop([self.past.length - (length - 1)])
        self._rebuild_context()

    def _rebuild_context(self) -> None:
        self.placed = placed(self.attention, 1, self.past, self.cache)
        self.past.crop([1])

    def decode(self) -> None:
        self._step(self.attention)

    def attend(self) -> None:
        self._step(self.bare)

    def _step(self, attention: GQA | MLA) -> None:
        attention(self.hidden[:, :1], self.placed)


def containers(cache: Any) -> list[Appended | Recent | Blocks]:
    """Returns every container of a layer's cache, including nested ones."""
    return cache.states()


def cache_bytes(cache: Any, tokens: int) -> int:
    """Counts the cache's bytes for so many tokens, without space reserved for more."""
    total = 0
    for container in containers(cache):
        if isinstance(container, Blocks):
            buffer = container.values.buffer
            columns = container.count(tokens)
        else:
            buffer = container.buffer
            columns = tokens if isinstance(container, Appended) else container.count
        total += 0 if buffer is None else buffer[:, :columns].nbytes
    return total


def peak_bytes(run: Callable[[], None]) -> int:
    """Returns the most bytes allocated at one time by `run`, above what was allocated before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    # The profile's own events() sums the events up by operation.
    events = record.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    now = limit = 0
    for _, change in changes:
        now += change
        limit = max(limit, now)
    return limit


def timed(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(options: argparse.Namespace, length: int) -> list[dict[str, Any]]:
    """Returns one result for each kind and phase."""
    runners = {name: Runner(KINDS[name], options, length) for name in options.kinds}
    results: dict[str, dict[str, float]] = {}
    memory: dict[str, int] = {}
    if "prefill" in options.phases:
        # Memory is measured first, so that the layers are warmed up before they are timed.
        if length <= options.memory_up_to:
            memory = {name: peak_bytes(runner.prefill) for name, runner in runners.items()}
        rounds = max(1, options.rounds * 1024 // length)
        results["prefill"] = timed(
            {name: runner.prefill for name, runner in runners.items()}, rounds
        )
    steps = [phase for phase in ("decode", "attend") if phase in options.phases]
    for runner in runners.values() if steps else ():
        runner.fill()
        runner.decode()
    for phase in steps:
        results[phase] = timed(
            {name: getattr(runner, phase) for name, runner in runners.items()}, options.rounds
        )
    rows = []
    for phase, seconds in results.items():
        for name, value in seconds.items():
            peer = seconds.get(KINDS[name].peer)
            row = {"length": length, "phase": phase, "kind": name, "seconds": value,
                   "times_full": peer / value if peer is not None else None,
                   "cache_bytes": cache_bytes(runners[name].cache, length)}  # fmt: skip
            rows.append(row | ({"peak_bytes": memory.get(name)} if phase == "prefill" else {}))
    return rows


def pays(rows: list[dict[str, Any]]) -> dict[str, dict[str, int | None]]:
    """Returns {phase: {kind: the length from which on it is the faster}}.

    The length is None where the kind is not faster at the longest.
    """
    results: dict[str, dict[str, int | None]] = {}
    # The lengths ascend.
    for row in rows:
        if row["times_full"] is not None and KINDS[row["kind"]].peer != row["kind"]:
            of_phase = results.setdefault(row["phase"], {})
            since = of_phase.get(row["kind"])
            of_phase[row["kind"]] = (
                None if row["times_full"] <= 1 else row["length"] if since is None else since
            )
    return results


def tables(rows: list[dict[str, Any]], options: argparse.Namespace) -> Iterator[str]:
    """Yields lines of text with the time and memory of each kind, by phase and length.

    The number behind a time is how many times as fast as its peer the kind is.
    """
    for phase in options.phases:
        every = [row for row in rows if row["phase"] == phase]
        yield f"{phase}: milliseconds (times as fast as full attention of its sort)"
        yield " " * 8 + "".join(f"{name:>20s}" for name in options.kinds)
        for length in options.lengths:
            cells = [
                f"{1000 * row['seconds']:12.2f} {_ratio(row)}"
                for row in every
                if row["length"] == length
            ]
            yield f"{length:8d}" + "".join(cells)
        for name, unit in (("peak_bytes", "MiB at the peak"), ("cache_bytes", "MiB of cache")):
            if every and every[0].get(name) is not None:
                yield f"{phase}: {unit}"
                for length in options.lengths:
                    cells = [
                        f"{(row[name] or 0) / 2**20:20.1f}"
                        for row in every
                        if row["length"] == length
                    ]
                    yield f"{length:8d}" + "".join(cells)
    for phase, kinds in pays(rows).items():
        for name, length in kinds.items():
            yield f"{phase}: {name} pays " + (
                f"from {length} tokens on" if length else "at none of these lengths"
            )


def _ratio(row: dict[str, Any]) -> str:
    return f"({row['times_full']:5.2f})" if row["times_full"] is not None else " " * 7


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of context, ascending"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="among them the full ones"
    )
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=16, help="blocks of 64 keys")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--dsa-selected", type=int, default=2048, help="keys")
    parser.add_argument(
        "--rounds",
        type=int,
        default=15,
        help="of decoding; of prefill as many at 1024, fewer beyond",
    )
    parser.add_argument(
        "--memory-up-to", type=int, default=32768, help="tokens; costs one more prefill a kind"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for length in sorted(options.lengths):
            rows += measure(options, length)
    if options.json:
        print(json.dumps({"options": vars(options), "rows": rows, "pays": pays(rows)}))
        return
    print("\n".join(tables(rows, options)))


if __name__ == "__main__":
    main()
