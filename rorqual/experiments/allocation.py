"""A kind of sweep -> runs -> a table, a figure and a sentence that may say "not established".

    allocation   loss over rho, the share of inactive experts that stay experts, totals and FLOPs equal
    slots        loss over rows a head, the backbone fixed
    layers       loss over the block that remembers, budget fixed
    ablation     the memory without its gate's convolution, canonical ids, orders

Every point is run with every seed; points are compared by the paired difference to the first one, seed by seed, with
its standard error. Interrupted sweeps go on; finished runs are never repeated.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from rorqual.analyze import figures
from rorqual.experiments.paired import difference, established, mean_and_error
from rorqual.experiments.plan import default_memory, split_budget, with_rows
from rorqual.experiments.runs import Job, last, run
from rorqual.model import ModelConfig
from rorqual.presets import preset
from rorqual.train.optim import OptimConfig
from rorqual.train.trainer import DataConfig, TrainConfig, prepare

KINDS = ("allocation", "slots", "layers", "ablation")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """What is compared, and at what length."""

    kind: Literal["allocation", "slots", "layers", "ablation"] = "allocation"
    preset: str = "tiny"
    rhos: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4)
    rows_per_head: tuple[int, ...] = (64, 512, 4096, 32768)
    rho: float = 0.7  # of the sweeps other than allocation
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(kind="muon", lr=0.02))
    steps: int = 420
    rows: int = 8
    length: int = 128
    seeds: int = 2
    folder: str = "runs/sweep"
    workers: int | None = None  # processes at a time; None: one a core

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"sweep: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.seeds < 1:
            raise ValueError(f"seeds: got {self.seeds}, expected at least 1")


class Point(NamedTuple):
    """One place on the axis."""

    name: str
    x: float
    config: ModelConfig


class Row(NamedTuple):
    """What a point scored, over its seeds."""

    point: Point
    losses: list[float]
    mean: float
    error: float  # standard error of the mean; nan with one seed
    difference: float  # mean of the paired differences to the first point
    difference_error: float


def points(config: SweepConfig, base: ModelConfig) -> list[Point]:
    """The models of a sweep; the first is what the others are compared with."""
    if config.kind == "allocation":
        plans = [split_budget(base, rho, context=config.length) for rho in sorted(config.rhos, reverse=True)]
        # the pure model pays for the projections too, or it would be the cheaper one
        pure = Point("rho-1.00", 1.0, plans[-1].moe.config)
        distinct = {p.rho: p.engram.config for p in plans if p.rho < 1}  # two rhos may keep the same experts
        digits = 2 if len({f"{rho:.2f}" for rho in (1.0, *distinct)}) > len(distinct) else 5
        return [pure, *(Point(f"rho-{rho:.{digits}f}", rho, found) for rho, found in distinct.items())]
    planned = split_budget(base, config.rho, context=config.length).engram.config
    memory = planned.engram or default_memory(base)
    if config.kind == "slots":
        sizes = [replace(planned, engram=with_rows(memory, rows)) for rows in config.rows_per_head]
        return [Point(f"rows-{n}", float(n), c) for n, c in zip(config.rows_per_head, sizes, strict=True)]
    if config.kind == "layers":
        places = [replace(planned, engram=replace(memory, layers=(i,))) for i in range(base.layers)]
        return [Point(f"block-{i}", float(i), c) for i, c in enumerate(places)]
    variants = [
        ("whole", memory),
        ("no-conv", replace(memory, conv=False)),
        ("raw-ids", replace(memory, canonical=False)),
        ("bigrams-only", replace(memory, rows_per_head=(sum(memory.rows_per_head),))),
    ]
    return [Point(name, float(i), replace(planned, engram=m)) for i, (name, m) in enumerate(variants)]


def main(config: SweepConfig, *, console: Console | None = None) -> Path:
    """Runs the sweep; writes sweep.csv, sweep.svg and conclusion.txt into its folder, and returns the folder."""
    console = console or Console()
    tokens = prepare(config.data)
    base = replace(preset(config.preset), engram=None, vocabulary=tokens.vocabulary)
    places = points(config, base)
    folder = Path(config.folder) / config.kind
    jobs = {(p.name, seed): _job(config, p, seed, folder) for p in places for seed in range(config.seeds)}
    run(list(jobs.values()), workers=config.workers, console=console)
    losses = [
        [last(jobs[p.name, s].folder, "validation_loss")["validation_loss"] for s in range(config.seeds)]
        for p in places
    ]
    rows = compare(places, losses)
    said = conclusion(config.kind, rows)
    _write(folder, config, rows, said)
    console.print(_table(rows))
    console.print(said)
    return folder


def _job(config: SweepConfig, point: Point, seed: int, folder: Path) -> Job:
    name = f"{point.name}-seed-{seed}"
    return Job(
        name,
        TrainConfig(
            model=point.config,
            data=config.data,
            optim=config.optim,
            steps=config.steps,
            rows=config.rows,
            length=config.length,
            seed=seed,
            folder=str(folder / name),
        ),
    )


def compare(places: Sequence[Point], losses: Sequence[Sequence[float]]) -> list[Row]:
    """Means, standard errors, and paired differences to the first point."""
    rows = []
    for point, own in zip(places, losses, strict=True):
        rows.append(Row(point, list(own), *mean_and_error(own), *difference(own, losses[0])))
    return rows


def conclusion(kind: str, rows: Sequence[Row]) -> str:
    """What the differences allow one to say."""
    best = min(rows, key=lambda row: row.mean)
    if len(rows[0].losses) < 2:
        return f"{best.point.name} scored lowest ({best.mean:.4f} nats), with one seed: not established."
    first = rows[0].point.name
    if best is rows[0]:
        return f"{first} scored lowest ({best.mean:.4f} nats); no other point beat it."
    seeds = len(best.losses)
    clear = established(best.difference, best.difference_error, seeds)
    said = (
        f"{best.point.name} scored lowest ({best.mean:.4f} nats): {-best.difference:.4f} +- {best.difference_error:.4f}"
        f" below {first}, over {seeds} seeds; "
        f"{'established' if clear else 'not established'} at 95 % (paired t)."
    )
    if kind != "allocation":
        return said
    inside = best is not rows[-1]
    u = inside and clear and established(*difference(rows[-1].losses, best.losses), seeds)
    return said + f" A U-shape over rho is {'established' if u else 'not established'} here."


def _write(folder: Path, config: SweepConfig, rows: Sequence[Row], said: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["point", "x", "mean", "standard_error", "difference", "difference_error", *map(str, range(config.seeds))]
        )
        for row in rows:
            writer.writerow(
                [row.point.name, row.point.x, row.mean, row.error, row.difference, row.difference_error, *row.losses]
            )
    x = {"allocation": "rho", "slots": "rows a head", "layers": "block", "ablation": "variant"}[config.kind]
    lines = {"validation": [(row.point.x, row.mean, 0.0 if math.isnan(row.error) else row.error) for row in rows]}
    figures.sweep(lines, x=x, y="validation loss, nats a token", log=config.kind == "slots").savefig(
        folder / "sweep.svg"
    )
    (folder / "conclusion.txt").write_text(said + "\n", encoding="utf-8")


def _table(rows: Sequence[Row]) -> Table:
    table = Table("point", "loss", "standard error", "difference", "its error", box=None)
    for row in rows:
        figures_of = (row.mean, row.error, row.difference, row.difference_error)
        table.add_row(row.point.name, *("" if math.isnan(value) else f"{value:.4f}" for value in figures_of))
    return table
