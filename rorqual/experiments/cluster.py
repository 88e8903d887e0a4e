"""Simulates training steps of many ranks, with routing and n-grams recorded from a trained model.

    loads       of a block: the sorted shares of experts of a recorded batch, stretched to the
                plan's number of experts and dealt to its experts in a drawn order
    ids         distinct n-grams of a recorded text among n tokens, by the number of tokens;
                d n-grams are R (1 - exp(-d / R)) rows of a head with R rows, and owners are drawn
    products    of a rank vary by `jitter`, the deviation of a normal factor

Every rank has a clock. A collective begins when its last rank is there; the pieces' seconds are
those of `plan_costs`, an all-to-all of tokens and the products of experts take as long as the
fullest rank, and one of rows as long as the rank that asks or serves most. So the difference
between a simulated step and the formulas is what uneven loads and ranks that wait for each other
cost. The network is the formulas': no cluster was measured.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rorqual.model_config import EngramConfig, ModelConfig, head_primes
from rorqual.plan_costs import Block, Cluster, Layout, Pieces, distinct_ids, pieces

RECORDED = Path(__file__).with_name("traffic.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What was recorded of a trained model: expert loads, and distinct n-grams.

    loads       [batches][experts], each sorted from the fullest on, with a mean of 1
    tokens      numbers of tokens at which n-grams were counted
    distinct    by order, from 2 on: [samples][tokens]
    about       where it comes from
    """

    loads: tuple[tuple[float, ...], ...]
    tokens: tuple[int, ...]
    distinct: tuple[tuple[tuple[int, ...], ...], ...]
    about: str

    def n_grams(self, order: int, tokens: float, sample: int | None = None) -> float:
        """Returns distinct n-grams among so many tokens, of a sample or the mean of all.

        Between and beyond the recorded numbers it is a power of the number of tokens; orders that
        were not recorded count as the longest that was.
        """
        curves = np.asarray(self.distinct[min(order - 2, len(self.distinct) - 1)], dtype=float)
        counts = curves.mean(0) if sample is None else curves[sample % len(curves)]
        x = np.log(np.asarray(self.tokens, dtype=float))
        y = np.log(counts)
        if tokens > self.tokens[-1]:
            slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
            return float(np.exp(y[-1] + slope * (math.log(tokens) - x[-1])))
        return float(np.exp(np.interp(math.log(max(tokens, 1)), x, y)))


def read_traffic(path: str | Path = RECORDED) -> Traffic:
    """Reads a recording. ValueError for a file that is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        traffic = Traffic(
            loads=tuple(map(tuple, values["loads"])),
            tokens=tuple(values["tokens"]),
            distinct=tuple(tuple(map(tuple, order)) for order in values["distinct"]),
            about=values["about"],
        )
        sizes = {len(sample) for order in traffic.distinct for sample in order}
        if not traffic.loads or sizes != {len(traffic.tokens)}:
            raise ValueError(f"got samples of {sizes} numbers, expected {len(traffic.tokens)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: got {error!r}, expected a recording of scripts/record_traffic.py"
        ) from error
    return traffic


def rows_of(
    engram: EngramConfig, layer: int, traffic: Traffic, tokens: int, sample: int | None
) -> int:
    """Returns the distinct rows of a layer's table that so many tokens look up."""
    total = 0.0
    for order, primes in enumerate(head_primes(engram)[layer], 2):
        n_grams = traffic.n_grams(order, tokens, sample)
        total += sum(prime * -math.expm1(-n_grams / prime) for prime in primes)
    return round(total)


def recorded_ids(config: ModelConfig, layout: Layout, traffic: Traffic) -> list[int]:
    """Returns the distinct ids of each table that a rank looks up in a micro-batch, in the mean."""
    if config.engram is None:
        return []
    limits = distinct_ids(config, layout)
    return [
        min(limit, rows_of(config.engram, layer, traffic, layout.tokens, None))
        for layer, limit in enumerate(limits)
    ]


class Simulated(NamedTuple):
    """Seconds of simulated steps."""

    steps: tuple[float, ...]
    load: float  # the mean over blocks of the fullest expert rank's load, 1 if loads are even
    ids: tuple[int, ...]  # distinct ids of each table, the mean over ranks

    @property
    def mean(self) -> float:
        """The mean seconds of a step."""
        return sum(self.steps) / len(self.steps)


def simulate(
    config: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    traffic: Traffic,
    *,
    steps: int = 3,
    seed: int = 0,
    jitter: float = 0.02,
) -> Simulated:
    """Simulates steps of all ranks. ValueError for a layout that does not divide the devices."""
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter: got {jitter}, expected 0 <= jitter < 1")
    draw = np.random.default_rng(seed)
    mean_ids = recorded_ids(config, layout, traffic)
    each = pieces(config, cluster, layout, mean_ids)
    seconds = []
    loads: list[float] = []
    ids: list[np.ndarray] = []
    for _ in range(steps):
        clock = _Clock(cluster, layout, each, jitter, draw)
        for number in range(layout.micro_batches):
            rows, counts = _row_factors(config, cluster, layout, traffic, mean_ids, draw)
            ids.append(counts)
            drawn = _loads(config, cluster, layout, traffic, draw)
            loads += clock.micro_batch(drawn, rows, number + 1 == layout.micro_batches)
        seconds.append(float(clock.now.max()) + each.update)
    means = np.mean(ids, axis=0).round().astype(int).tolist() if mean_ids else []
    return Simulated(tuple(seconds), float(np.mean(loads)) if loads else 1.0, tuple(means))


def _loads(
    config: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    traffic: Traffic,
    draw: np.random.Generator,
) -> np.ndarray:
    """Draws the load of each rank's experts, of each block: [blocks, groups, expert ranks].

    The mean of a group is 1.
    """
    groups = cluster.devices // layout.expert
    shape = (config.layers, groups, layout.expert)
    if config.moe is None or layout.expert == 1:
        return np.ones(shape)
    recorded = np.asarray(traffic.loads)
    places = (np.arange(config.moe.routed) + 0.5) / config.moe.routed
    known_places = (np.arange(recorded.shape[1]) + 0.5) / recorded.shape[1]
    stretched = np.stack([np.interp(places, known_places, one) for one in recorded])
    stretched /= stretched.mean(1, keepdims=True)
    sampled = stretched[draw.integers(len(stretched), size=shape[:2])]
    dealt = draw.permuted(sampled, axis=-1)
    return dealt.reshape(*shape, -1).mean(-1)


def _row_factors(
    config: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    traffic: Traffic,
    mean_ids: Sequence[int],
    draw: np.random.Generator,
) -> tuple[dict[int, float], np.ndarray]:
    """Returns how much longer each table's exchange takes than with even ids, and the mean ids."""
    factors: dict[int, float] = {}
    means = []
    if config.engram is None:
        return factors, np.zeros(0)
    ranks = cluster.devices
    samples = len(traffic.distinct[0])
    for number, (layer, mean) in enumerate(zip(config.engram.layers, mean_ids, strict=True)):
        by_sample = np.array(
            [rows_of(config.engram, number, traffic, layout.tokens, n) for n in range(samples)]
        )
        asked = np.minimum(by_sample[draw.integers(samples, size=ranks)], 2 * mean)
        # Ids are hashes: every owner is asked for each with the same probability.
        served = draw.multinomial(int(asked.sum()), np.full(ranks, 1 / ranks))
        factors[layer] = float(max(asked.max(), served.max()) / mean)
        means.append(asked.mean())
    return factors, np.array(means)


class _Clock:
    """The time of every rank, and of its stream of parameters and gradients."""

    def __init__(
        self,
        cluster: Cluster,
        layout: Layout,
        each: Pieces,
        jitter: float,
        draw: np.random.Generator,
    ) -> None:
        self.layout = layout
        self.each = each
        self.gathers = [block.gather + block.gather_experts for block in each.blocks]
        self.now = np.zeros(cluster.devices)
        self.moved = np.zeros(cluster.devices)  # when the stream of parameters is free
        self.fetched = 0.0  # when the exchange of rows is free
        self.jitter = jitter
        self.draw = draw

    def micro_batch(self, loads: np.ndarray, rows: dict[int, float], last_one: bool) -> list[float]:
        """Runs forward and backward; returns the fullest rank's load of each block with experts.

        Behind the last one of a step copies average their gradients.
        """
        blocks = self.each.blocks
        last = len(blocks) - 1
        self._move(self.each.root + self.gathers[0])
        self.now = np.maximum(self.now, self.moved)
        arrival = self._request(rows) if self.layout.overlap_rows else {}
        for index, block in enumerate(blocks):
            if index < last:
                self._move(self.gathers[index + 1])
            self._rows_arrive(index, rows, arrival)
            self._block(block, loads[index], 1)
            self.now = np.maximum(self.now, self.moved)
        self._compute(3 * self.each.head)
        for index in range(last, -1, -1):
            seconds = self.gathers[index - 1] if index else 0.0
            self._move(seconds + (self.gathers[index + 1] if index < last else 0.0))
            if self.layout.recompute:
                self._block(blocks[index], loads[index], 1)
            self._block(blocks[index], loads[index], 2)
            self.now = np.maximum(self.now, self.moved)
            if index in rows:
                self._send_gradients(index, rows[index])
        self._move(self.gathers[0] + self.each.root + (self.each.copies if last_one else 0.0))
        self.now = np.maximum(self.now, self.moved)
        self.now = np.maximum(self.now, self.fetched)
        peaks = loads.max(axis=(1, 2))
        return [float(p) for p, block in zip(peaks, blocks, strict=True) if block.experts]

    def _compute(self, seconds: float | np.ndarray) -> None:
        """Lets every rank compute for `seconds`, one number or one a rank, with drawn jitter."""
        factors = 1 + self.jitter * self.draw.standard_normal(len(self.now))
        self.now = self.now + seconds * np.maximum(factors, 0.0)

    def _move(self, seconds: float) -> None:
        """Moves parameters or gradients on their stream, with the ranks that share them."""
        shape = (self.layout.replicate, -1)
        ready = np.maximum(self.now, self.moved).reshape(shape)
        self.moved = np.broadcast_to(ready.max(1, keepdims=True) + seconds, ready.shape).reshape(-1)

    def _block(self, block: Block, loads: np.ndarray, products: int) -> None:
        """Runs a block: `products` is 1 forward and 2 backward, which has as many all-to-alls."""
        self._compute(products * block.dense)
        mapping = block.mapping
        if self.layout.overlap_mapping:
            mapping = max(0.0, mapping - 2 * block.exchange)
        self.now = self.now + mapping
        if not block.experts:
            return
        fullest = loads.max(1)
        self._exchange(block.exchange * fullest)
        self._compute(products * block.experts * loads.reshape(-1))
        self._exchange(block.exchange * fullest)

    def _exchange(self, seconds: np.ndarray) -> None:
        """Exchanges tokens within each group of expert ranks, so many seconds in each."""
        groups = self.now.reshape(-1, self.layout.expert)
        if self.layout.expert > 1:
            ends = groups.max(1) + seconds
            self.now = np.broadcast_to(ends[:, None], groups.shape).reshape(-1)

    def _request(self, rows: dict[int, float]) -> dict[int, float]:
        """Requests the rows of all tables, one after another; returns when they are there."""
        arrival: dict[int, float] = {}
        self.fetched = max(self.fetched, float(self.now.max()))
        for layer in sorted(rows):
            self.fetched += self.each.rows[layer][0] * rows[layer]
            arrival[layer] = self.fetched
        return arrival

    def _rows_arrive(self, index: int, rows: dict[int, float], arrival: dict[int, float]) -> None:
        """Waits for the rows of a block's table: requested before, or only now by all ranks."""
        if index in arrival:
            self.now = np.maximum(self.now, arrival[index])
        elif index in rows:
            end = self.now.max() + self.each.rows[index][0] * rows[index]
            self.now = np.full_like(self.now, end)

    def _send_gradients(self, index: int, factor: float) -> None:
        """Sends the gradients of a table's rows, behind the blocks before it or at once."""
        self.fetched = max(self.fetched, float(self.now.max()))
        self.fetched += self.each.rows[index][1] * factor
        if not self.layout.overlap_rows:
            self.now = np.full_like(self.now, self.fetched)


def as_json(simulated: Simulated) -> dict[str, Any]:
    """Returns a simulation as JSON values."""
    return {
        "seconds": simulated.mean,
        "steps": list(simulated.steps),
        "fullest_rank": simulated.load,
        "distinct_ids": list(simulated.ids),
    }
