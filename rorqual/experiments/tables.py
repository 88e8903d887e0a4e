"""Measures a table of rows in every placement on this machine, by itself and under a model.

    resident, host, disk warm, disk cold  x  prefetch  x  hot rows

Every combination has the same rows, weights and prompts. A cold disk is one whose files are dropped
from the page cache before each step; a warm one's were read whole just before. Dropping leaves
nothing of the model in the caches of a core, so its weights are read once before each step is
timed. Two layers have Engram, at a third and two thirds of the depth; without prefetch each reads
when it runs. All combinations must generate the same ids. Rounds of all combinations are
interleaved, and a speed is that of the median step.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from rorqual.model import LanguageModel
from rorqual.model_config import EngramConfig, MLAConfig, ModelConfig, row_totals
from rorqual.serve.decoding import decode
from rorqual.tables import RowFile, Table, TableConfig, draw_table, open_tables
from rorqual.tables.fp8 import FP8

Tables = Sequence[Table]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": FP8}
PROMPT = 16  # token ids
VOCAB_SIZE = 8192  # with a larger one the head of a model of this size takes most of a step


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """How large the table is, and which model reads it.

    Sizes in bytes have names that end in bytes.
    """

    rows: int = 1_000_000  # in all tables together
    width: int = 64
    dtype: Literal["float32", "bfloat16", "fp8"] = "bfloat16"
    folder: str = "."  # on the disk that is measured; the table is removed afterwards
    hot_bytes: int = 16 << 20  # size of the row cache in memory, where one is used
    dim: int = 512  # width of the model that generates
    layers: int = 6
    tokens: int = 32  # generated per round
    sequences: int = 1  # batch size
    rounds: int = 3
    seconds: float = 1.0  # to measure rows per second, for each placement
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "width", "dim", "layers", "sequences", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.tokens < 2:
            raise ValueError(
                f"tokens: got {self.tokens}, expected at least 2: the first is the prompt's"
            )
        if self.hot_bytes < 0 or not self.seconds > 0:
            got = f"{self.hot_bytes} hot bytes, {self.seconds} seconds"
            raise ValueError(f"got {got}, expected at least 0 and more than 0")


class Way(NamedTuple):
    """A placement, with or without prefetch, a row cache and a warm page cache."""

    name: str
    config: TableConfig
    cold: bool = False


class Line(NamedTuple):
    """Measurements of one placement; step times are the seconds of one step's fetch."""

    name: str
    rows_per_second: float
    step_p50: float
    step_p99: float
    tokens_per_second: float
    hit_rate: float  # of the distinct rows that the model looked up


def ways(hot_bytes: int) -> list[Way]:
    """Returns everything that is compared."""
    placements = [
        Way("resident", TableConfig()),
        Way("host memory", TableConfig(placement="host")),
        Way("host memory, no prefetch", TableConfig(placement="host", prefetch=False)),
    ]
    for state in ("warm", "cold"):
        for words, hot, prefetch in (
            ("", 0, True),
            (", no prefetch", 0, False),
            (", hot rows", hot_bytes, True),
        ):
            placed = TableConfig(placement="disk", hot_bytes=hot, prefetch=prefetch)
            placements.append(Way(f"disk {state}{words}", placed, cold=state == "cold"))
    return placements


def bench(config: BenchConfig, say: Callable[[str], None] = lambda _: None) -> list[Line]:
    """Measures every placement, the resident table first.

    RuntimeError if two of them generate different ids. ValueError where the disk has too little
    space for the table.
    """
    with tempfile.TemporaryDirectory(dir=config.folder, prefix="table-bench-") as directory:
        say(
            f"drawing {sum(row_totals(memory_of(config))):,} rows "
            f"of {config.width} values in {config.dtype}"
        )
        folder = drawn(config, Path(directory))
        every = [(way, opened(config, folder, way.config)) for way in ways(config.hot_bytes)]
        model = model_with(config, every[-1][1])
        speeds = _generated(config, model, every, say)
        lines = [_line(config, way, tables, speeds[way.name], say) for way, tables in every]
        for _, tables in every:
            for table in tables:
                table.close()
    return lines


def drawn(config: BenchConfig, folder: Path) -> Path:
    """Draws a table for each layer with Engram into `folder`, and returns the folder."""
    for n, rows in enumerate(row_totals(memory_of(config))):
        draw_table(
            folder / str(n), rows, config.width, dtype=DTYPES[config.dtype], seed=config.seed + n
        )
    return folder


def opened(config: BenchConfig, folder: Path, placed: TableConfig) -> Tables:
    """Opens the tables of that folder with the given placement."""
    tables = open_tables(folder, len(memory_of(config).layers), replace(placed, folder=str(folder)))
    return [table.eval() for table in tables]


def memory_of(config: BenchConfig) -> EngramConfig:
    """Returns two layers of two orders of eight heads, which share the rows between them."""
    layers = tuple(sorted({config.layers // 3, 2 * config.layers // 3}))
    each = max(2, config.rows // (16 * len(layers)))
    return EngramConfig(layers=layers, rows_per_head=(each, each), head_dim=config.width, heads=8)


def model_with(config: BenchConfig, tables: Tables) -> LanguageModel:
    """Builds a dense model whose Engram reads these tables."""
    shape = ModelConfig(
        vocab_size=VOCAB_SIZE,
        dim=config.dim,
        layers=config.layers,
        dense_width=4 * config.dim,
        mla=MLAConfig(heads=8),
        engram=memory_of(config),
    )
    return LanguageModel(shape, seed=config.seed, tables=tables).eval()


def _generated(
    config: BenchConfig,
    model: LanguageModel,
    every: list[tuple[Way, Tables]],
    say: Callable[[str], None],
) -> dict[str, float]:
    """Measures the tokens per second of each placement.

    A speed is that of the median step of interleaved rounds, after a warm-up round.
    """
    taken: dict[str, list[float]] = {way.name: [] for way, _ in every}
    weights = [
        weight for name, weight in model.named_parameters() if not name.startswith("tables.")
    ]
    for turn in range(config.rounds + 1):
        generated: list[list[list[int | None]]] = []
        draw = torch.Generator().manual_seed(config.seed + turn)
        prompts = torch.randint(
            model.config.vocab_size, (config.sequences, PROMPT), generator=draw
        ).tolist()
        for way, tables in every:
            model.tables = nn.ModuleList(tables)
            _cache_files(way, tables)
            steps = decode(model, prompts, max_new_tokens=config.tokens)
            ids, seconds = _walked(steps, tables if way.cold else (), weights)
            generated.append(ids)
            if turn:
                taken[way.name] += seconds
            if generated[-1] != generated[0]:
                raise RuntimeError(f"{way.name} says other ids than {every[0][0].name}")
        say(f"round {turn} of {config.rounds}: all ways say the same ids")
    return {name: config.sequences / statistics.median(seconds) for name, seconds in taken.items()}


def _cache_files(way: Way, tables: Tables) -> None:
    """Reads the files of a placement that is not cold into the page cache, if it has files.

    The cold placements of the round before have dropped them.
    """
    for table in tables:
        if isinstance(table.file, RowFile) and not way.cold:
            table.file.fill_page_cache()


def _walked(
    steps: Iterator[list[int | None]], cold: Tables, weights: Sequence[torch.Tensor]
) -> tuple[list[list[int | None]], list[float]]:
    """Returns all generated ids, and the seconds of each step after the first, the prompt's.

    The time to drop the page cache is not included.
    """
    generated = [next(steps)]
    seconds = list[float]()
    while True:
        for table in cold:
            _drop_page_cache(table)
        for weight in weights:
            weight.sum()
        began = time.perf_counter()
        if (step := next(steps, None)) is None:
            return generated, seconds
        seconds.append(time.perf_counter() - began)
        generated.append(step)


def _line(
    config: BenchConfig,
    way: Way,
    tables: Tables,
    speed: float,
    say: Callable[[str], None],
) -> Line:
    """Measures the first table by itself, and joins that with the model's speed and hit rate."""
    say(f"{way.name}: rows a second")
    table = tables[0]
    hits, different = (
        sum(each.metrics().get(name, 0.0) for each in tables) for name in ("hits", "different")
    )
    rate = hits / different if different else 0.0
    _cache_files(way, tables)
    before = (lambda: _drop_page_cache(table)) if way.cold else lambda: None
    measured = measure(
        table,
        rows_per_token=16 * config.sequences,
        seconds=config.seconds,
        seed=config.seed,
        before=before,
    )
    return Line(
        way.name,
        measured["rows_per_second"],
        measured["step_p50"],
        measured["step_p99"],
        speed,
        rate,
    )


def _drop_page_cache(table: Table) -> None:
    """Drops the files of a table from the page cache, if it is on a disk."""
    if isinstance(table.file, RowFile):
        table.file.drop_page_cache()


def measure(
    table: Table,
    *,
    rows_per_token: int = 16,
    seconds: float = 1.0,
    seed: int = 0,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Measures a table with ids that are drawn uniformly, the worst case for a cache.

    Returns rows_per_second in batches of 4,096 ids, and the median and 99th percentile of one
    token's fetch in seconds. `before` is called ahead of every fetch and not timed.
    """
    draw = torch.Generator().manual_seed(seed)

    def lap(count: int) -> float:
        ids = torch.randint(table.rows, (count,), generator=draw)
        before()
        began = time.perf_counter()
        table.prefetch(ids).wait()
        return time.perf_counter() - began

    def laps(count: int) -> list[float]:
        stop = time.perf_counter() + seconds / 2
        times = [lap(count)]
        while time.perf_counter() < stop:
            times.append(lap(count))
        return times

    with torch.no_grad():
        bulk = laps(4096)
        steps = laps(rows_per_token)
    p50, p99 = np.percentile(steps, [50, 99])
    rate = 4096 * len(bulk) / sum(bulk)
    return {"rows_per_second": rate, "step_p50": float(p50), "step_p99": float(p99)}
