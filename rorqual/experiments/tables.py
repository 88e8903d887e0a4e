"""A number of rows -> how fast a table of them is on this machine in every home, by itself and under a model.

    resident, host, disk warm, disk cold  x  prefetch  x  hot rows      each with the same rows, weights and prompts

A cold disk is one whose file the system was told to forget before each round. All ways must say the same ids. Rounds
of all ways are interleaved, and medians are told.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from rorqual.layers.addresses import EngramConfig, row_totals
from rorqual.layers.attention import MLAConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve.decoding import decode
from rorqual.storage import DeviceTable, DiskTable, HostTable, StorageConfig, draw_table, measure, open_table
from rorqual.storage.formats import FP8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": FP8}
PROMPT = 16  # ids


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """How large the table is, and what reads it. Sizes in bytes where they say so."""

    rows: int = 1_000_000
    width: int = 64
    dtype: Literal["float32", "bfloat16", "fp8"] = "bfloat16"
    folder: str = "."  # on the disk that is measured; the table is removed afterwards
    hot_bytes: int = 16 << 20  # where rows are kept in memory
    dim: int = 512  # of the model that generates
    layers: int = 6
    tokens: int = 32  # generated a round
    sequences: int = 1  # at once
    rounds: int = 3
    seconds: float = 1.0  # for rows a second, a way
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "width", "dim", "layers", "tokens", "sequences", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.hot_bytes < 0 or not self.seconds > 0:
            got = f"{self.hot_bytes} hot bytes, {self.seconds} seconds"
            raise ValueError(f"got {got}, expected at least 0 and more than 0")


class Way(NamedTuple):
    """A home, and whether the system holds the file, rows are fetched ahead, and some are kept."""

    name: str
    storage: StorageConfig
    cold: bool = False


class Line(NamedTuple):
    """What a way gives; seconds of one step's fetch."""

    name: str
    rows_per_second: float
    step_p50: float
    step_p99: float
    tokens_per_second: float
    hit_rate: float  # of the different rows asked for


def ways(hot_bytes: int) -> list[Way]:
    """Everything that is compared."""
    found = [
        Way("resident", StorageConfig()),
        Way("host memory", StorageConfig(home="host")),
        Way("host memory, no prefetch", StorageConfig(home="host", prefetch=False)),
    ]
    for state in ("warm", "cold"):
        for words, hot, prefetch in (("", 0, True), (", no prefetch", 0, False), (", hot rows", hot_bytes, True)):
            storage = StorageConfig(home="disk", hot_bytes=hot, prefetch=prefetch)
            found.append(Way(f"disk {state}{words}", storage, cold=state == "cold"))
    return found


def bench(config: BenchConfig, say: Callable[[str], None] = lambda _: None) -> list[Line]:
    """A line a way, the resident table first. RuntimeError if two ways say different ids.

    ValueError where the disk has no room for the table.
    """
    rows = row_totals(memory_of(config))[0]
    with tempfile.TemporaryDirectory(dir=config.folder, prefix="table-bench-") as place:
        say(f"drawing {rows:,} rows of {config.width} values in {config.dtype}")
        path = draw_table(Path(place) / "rows", rows, config.width, dtype=DTYPES[config.dtype], seed=config.seed)
        every = [(way, open_table(path, "rows", way.storage).eval()) for way in ways(config.hot_bytes)]
        model = model_with(config, next(table for _, table in every if isinstance(table, DiskTable)))
        speeds = _generated(config, model, every, say)
        lines = [_line(config, way, table, speeds[way.name], say) for way, table in every]
        for _, table in every:
            getattr(table, "close", lambda: None)()
    return lines


def memory_of(config: BenchConfig) -> EngramConfig:
    """Two orders of eight heads that share the rows between them."""
    each = max(2, config.rows // 16)
    return EngramConfig(layers=(min(1, config.layers - 1),), rows_per_head=(each, each), head_dim=config.width, heads=8)


def model_with(config: BenchConfig, table: DiskTable) -> LanguageModel:
    shape = ModelConfig(
        dim=config.dim,
        layers=config.layers,
        dense_width=4 * config.dim,
        mla=MLAConfig(heads=8),
        engram=memory_of(config),
    )
    return LanguageModel(shape, seed=config.seed, tables=[table]).eval()


def _generated(
    config: BenchConfig,
    model: LanguageModel,
    every: list[tuple[Way, DeviceTable | HostTable | DiskTable]],
    say: Callable[[str], None],
) -> dict[str, float]:
    """Tokens a second of each way, the median of interleaved rounds after one to warm up."""
    taken: dict[str, list[float]] = {way.name: [] for way, _ in every}
    for turn in range(config.rounds + 1):
        said: list[list[list[int | None]]] = []
        draw = torch.Generator().manual_seed(config.seed + turn)
        prompts = torch.randint(model.config.vocabulary, (config.sequences, PROMPT), generator=draw).tolist()
        for way, table in every:
            model.tables[0] = table
            if way.cold:
                table.forget()  # type: ignore[operator]
            steps = decode(model, prompts, max_new_tokens=config.tokens)
            said.append([next(steps)])  # the prompt is not what is measured
            began = time.perf_counter()
            said[-1] += list(steps)
            if turn:
                taken[way.name].append(time.perf_counter() - began)
            if said[-1] != said[0]:
                raise RuntimeError(f"{way.name} says other ids than {every[0][0].name}")
        say(f"round {turn} of {config.rounds}: all ways say the same ids")
    fresh = config.sequences * max(1, config.tokens - 1)
    return {name: fresh / max(statistics.median(seconds), 1e-9) for name, seconds in taken.items()}


def _line(
    config: BenchConfig,
    way: Way,
    table: DeviceTable | HostTable | DiskTable,
    speed: float,
    say: Callable[[str], None],
) -> Line:
    say(f"{way.name}: rows a second")
    before = table.forget if way.cold and isinstance(table, DiskTable) else lambda: None
    found = measure(
        table, rows_per_token=16 * config.sequences, seconds=config.seconds, seed=config.seed, before=before
    )
    counted = table.metrics()
    rate = counted["hits"] / counted["different"] if counted.get("different") else 0.0
    return Line(way.name, found["rows_per_second"], found["step_p50"], found["step_p99"], speed, rate)
