"""Runs a sweep over one design choice and reports a table, a figure and a conclusion.

    allocation   loss over rho, the share of inactive experts that stay experts; totals, FLOPs equal
    experts      loss over routed experts, no memory; FLOPs equal: do experts pay at this size?
    slots        loss over rows per head, the backbone fixed
    layers       loss over the block that has Engram, rows fixed
    ablation     the memory without gates, convolution or canonical ids, with one gate for all
                 streams, or with other n-gram orders; rows fixed

Every point is trained with every seed at every learning rate. Points are compared by the paired
difference to the first one, seed by seed, with its standard error: at each rate, and each at its
best. The conclusion says "not established" where the difference is not. A point of which a run
diverged has no mean: it ranks last, and the conclusion names it. Interrupted sweeps resume;
finished and diverged runs are never repeated.
"""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from rorqual import config as configs
from rorqual.analyze import figures
from rorqual.costs import costs
from rorqual.experiments.paired import compared, difference, established, mean_and_error
from rorqual.experiments.plan import default_memory, split_budget, with_flops, with_rows
from rorqual.experiments.runs import Job, last, run, seeded
from rorqual.io import write_text
from rorqual.model_config import EngramConfig, ModelConfig
from rorqual.presets import preset
from rorqual.train.config import DataConfig, OptimConfig, TrainConfig, recipe
from rorqual.train.source import prepare

Kind = Literal["allocation", "experts", "slots", "layers", "ablation"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Rows per head of a memory that is too small to hold anything; rounded up to different primes.
FEWEST_ROWS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepConfig:
    """What a sweep compares, and how long each run trains."""

    kind: Kind = "allocation"
    preset: str = "tiny"  # or a run folder
    # the model that the points are derived from; flags change it
    model: ModelConfig = field(default_factory=lambda: preset("tiny"))
    rhos: tuple[float, ...] = (1.0, 0.7, 0.4)
    # numbers of routed experts; the number activated per token stays that of the model
    experts: tuple[int, ...] = (2, 8, 32)
    rows_per_head: tuple[int, ...] = (FEWEST_ROWS, 64, 1024, 16384)
    rho: float = 0.7  # allocation ratio of the kinds slots, layers and ablation
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=lambda: recipe(preset("tiny").dim))
    rates: tuple[float, ...] = (1.0,)  # factors of optim.lr; every point is trained at each
    steps: int = 200
    batch_size: int = 8
    seq_len: int = 128
    seeds: int = 2
    folder: str = "runs/sweep"
    workers: int | None = None  # processes at a time; None: one per core

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"sweep: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        for name in ("steps", "batch_size", "seq_len", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.workers is not None and self.workers < 1:
            raise ValueError(
                f"workers: got {self.workers}, expected at least 1, or none for one a core"
            )
        for name in ("rhos", "experts", "rows_per_head", "rates"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: got {values}, expected different values, at least one")
        if not all(rate > 0 for rate in self.rates):
            raise ValueError(f"rates: got {self.rates}, expected factors above 0")


class Point(NamedTuple):
    """One model of a sweep: a position on the axis, or a control beside it."""

    name: str
    x: float
    config: ModelConfig
    control: bool = False


class Row(NamedTuple):
    """Losses of one point at one learning rate, over its seeds."""

    point: Point
    rate: float
    losses: list[float]  # one per seed; nan for a run that diverged
    mean: float  # nan where a loss is nan
    error: float  # standard error of the mean; nan with one seed
    difference: float  # mean of the paired differences to the first point
    difference_error: float


def points(config: SweepConfig, base: ModelConfig) -> list[Point]:
    """Returns the models of a sweep; the others are compared with the first."""
    if base.moe is None:
        raise ValueError("model: got one without experts, expected moe to be on")
    if config.kind == "allocation":
        return _allocation(config, base)
    if config.kind == "experts":
        return _experts(config, base)
    planned = split_budget(base, config.rho, context=config.seq_len).engram.config
    memory = planned.engram or default_memory(base)
    if config.kind == "slots":
        return [
            Point(f"rows-{n}", float(n), replace(planned, engram=with_rows(memory, n)))
            for n in config.rows_per_head
        ]
    if config.kind == "layers":
        places = [replace(planned, engram=replace(memory, layers=(i,))) for i in range(base.layers)]
        return [Point(f"block-{i}", float(i), c) for i, c in enumerate(places)]
    parts = _ablations(memory, base.streams)
    return [
        Point(name, float(i), replace(planned, engram=m))
        for i, (name, m) in enumerate(parts.items())
    ]


def _allocation(config: SweepConfig, base: ModelConfig) -> list[Point]:
    """Returns the points of the allocation sweep, and its two controls.

    The pure model's shared expert is widened by the FLOPs of a memory's projections, since it would
    be cheaper than the others otherwise.
    """
    memory = base.engram or default_memory(base)
    alone = replace(base, engram=None)
    small = replace(base, engram=with_rows(memory, FEWEST_ROWS))
    more = (
        costs(small, config.seq_len).flops_per_token - costs(alone, config.seq_len).flops_per_token
    )
    pure = with_flops(alone, more)
    rhos = sorted(config.rhos, reverse=True)
    plans = [split_budget(pure, rho, memory, context=config.seq_len, pays="memory") for rho in rhos]
    # Two values of rho may keep the same number of experts.
    distinct = {p.rho: p.engram.config for p in plans if p.rho < 1}
    assert base.moe is not None
    # The digits depend on the model alone, so that a point keeps its name in every sweep.
    digits = 2 if base.moe.routed - base.moe.active <= 100 else 5
    curve = [Point(f"rho-{rho:.{digits}f}", rho, config) for rho, config in distinct.items()]
    controls = [
        Point("plain", 1.0, alone, control=True),
        Point("few-rows", 1.0, small, control=True),
    ]
    return [Point("rho-1.00", 1.0, pure), *curve, *controls]


def _experts(config: SweepConfig, base: ModelConfig) -> list[Point]:
    """Returns the points of the experts sweep, which cost equal FLOPs per token.

    Shared experts are widened by what the router of the most experts costs more.
    """
    assert base.moe is not None
    numbers = sorted(config.experts)
    models = [replace(base, engram=None, moe=replace(base.moe, routed=n)) for n in numbers]
    spent = [costs(model, config.seq_len).flops_per_token for model in models]
    level = [
        with_flops(model, max(spent) - flops) for model, flops in zip(models, spent, strict=True)
    ]
    return [Point(f"experts-{n}", float(n), model) for n, model in zip(numbers, level, strict=True)]


def _ablations(memory: EngramConfig, streams: int) -> dict[str, EngramConfig]:
    """Returns the memory with one thing changed at a time, by name.

    Other n-gram orders keep the rows per token and the size of the table: with fewer orders there
    are more heads.
    """
    rows = sum(memory.rows_per_head) // len(memory.rows_per_head)
    reads = memory.rows_per_token
    spread = memory.dilation or memory.ngram
    orders = {"bigrams-only": 1, "to-trigrams": 2, "to-5-grams": 4}
    return {
        "whole": memory,
        "no-gate": replace(memory, gating="open"),
        **({"one-gate": replace(memory, gating="shared")} if streams > 1 else {}),
        "no-conv": replace(memory, conv=False),
        "raw-ids": replace(memory, canonical=False),
        **{
            name: replace(memory, rows_per_head=(rows,) * n, heads=reads // n, dilation=spread)
            for name, n in orders.items()
            if n != len(memory.rows_per_head) and reads % n == 0
        },
    }


def main(config: SweepConfig, *, console: Console | None = None) -> Path:
    """Runs the sweep and returns the folder of its results.

    It writes sweep.json, sweep.csv, sweep.svg and conclusion.txt there.
    """
    console = console or Console()
    data = replace(config.data, vocab_size=config.data.vocab_size or config.model.vocab_size)
    config = replace(config, data=data)
    places = points(config, replace(config.model, vocab_size=prepare(data).vocab_size))
    folder = Path(config.folder) / config.kind
    tried = [(point, config.optim.lr * rate) for rate in config.rates for point in places]
    jobs = [
        seeded(folder, f"{p.name}-lr-{rate:g}", _training(config, p, rate), config.seeds)
        for p, rate in tried
    ]
    # Jobs are ordered by seed, so that a sweep that is stopped early has every point.
    in_turn = [job for turn in zip(*jobs, strict=True) for job in turn]
    run(in_turn, workers=config.workers, console=console, diverging=True)
    losses = [[_loss(job) for job in each] for each in jobs]
    rows = tabulate([(*cells, each) for cells, each in zip(tried, losses, strict=True)])
    verdict = conclusion(config.kind, rows)
    _write(folder, config, rows, verdict)
    console.print(_table(rows))
    console.print(verdict)
    return folder


def _loss(job: Job) -> float:
    """Returns the final validation loss of a run.

    It is NaN for one that diverged, whatever it logged before.
    """
    return (
        math.nan
        if job.diverged()
        else last(job.folder, "validation_loss").get("validation_loss", math.nan)
    )


def _training(config: SweepConfig, point: Point, rate: float) -> TrainConfig:
    """Returns the training of one point at learning rate `rate`, without a seed or a folder yet."""
    return TrainConfig(
        model=point.config,
        data=config.data,
        optim=replace(config.optim, lr=rate),
        steps=config.steps,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        # Runs are compared by their final validation loss.
        validate_every=0,
    )


Scored = tuple[Point, float, Sequence[float]]  # a point, a learning rate, one loss per seed


def tabulate(scored: Sequence[Scored]) -> list[Row]:
    """Returns one result per point and rate, compared with the first point at the same rate."""
    rates = dict.fromkeys(rate for _, rate, _ in scored)
    return [row for rate in rates for row in _compare([each for each in scored if each[1] == rate])]


def at_best(rows: Sequence[Row]) -> list[Row]:
    """Returns one result per point, at the rate with its lowest mean loss.

    Each is compared with the first point at that point's own best rate.
    """
    best: dict[str, Row] = {}
    for row in rows:
        best[row.point.name] = min(best.get(row.point.name, row), row, key=_rank)
    return _compare([(row.point, row.rate, row.losses) for row in best.values()])


def _rank(row: Row) -> tuple[bool, float]:
    """Returns a key that sorts by the mean loss; nan, which does not compare, comes last."""
    return math.isnan(row.mean), row.mean


def _compare(scored: Sequence[Scored]) -> list[Row]:
    """Returns results that are compared, seed by seed, with the first of them."""
    first = scored[0][2]
    return [
        Row(point, rate, list(losses), *mean_and_error(losses), *difference(losses, first))
        for point, rate, losses in scored
    ]


def conclusion(kind: Kind, rows: Sequence[Row]) -> str:
    """States which differences between the points are established.

    First come the points at their best rates, then the same two points at each rate, last the
    points of which runs diverged, and at which rate.
    """
    best = at_best(rows)
    axis = [r for r in best if not r.point.control]
    controls = [r for r in best if r.point.control]
    low, *others = sorted(axis, key=_rank)
    first = axis[0]
    rates = list(dict.fromkeys(row.rate for row in rows))
    seeds = len(low.losses)
    several = rates if len(rates) > 1 else []
    where = f" at a rate of {low.rate:g}" if several else ""
    conclusions = [
        f"{low.point.name} scored lowest "
        f"({low.mean:.4f} nats a token{where}, {seeds} seed{'s' * (seeds > 1)})"
    ]
    if math.isnan(low.mean):
        conclusions = ["no point has a mean, since runs of each diverged"]
    elif others:
        other = others[0] if low is first or math.isnan(first.mean) else first
        conclusions += [
            _against(low, other),
            *(
                f"at a rate of {rate:g} {_against_at_rate(rows, rate, low, other)}"
                for rate in several
            ),
        ]
        # Every ablated part is compared with the whole memory.
        if kind == "ablation":
            conclusions += [
                _against(row, first)
                for row in axis
                if not any(row is each for each in (first, low, other))
            ]
    for control in controls:
        conclusions += [_against(control, first)] + [_against(low, control)] * (low is not first)
    if kind in _QUESTIONS:
        question, clear = _QUESTIONS[kind]
        conclusions.append(f"{question}: {'established' if clear(axis) else 'not established'}")
    conclusions += [
        _diverged(row, f" at a rate of {row.rate:g}" if several else "")
        for row in rows
        if math.isnan(row.mean)
    ]
    return "; ".join(conclusions) + " (95 %, paired t)."


def _diverged(row: Row, where: str) -> str:
    """Formats how many runs of a point diverged; `where` names the rate if there are several."""
    gone = sum(not math.isfinite(loss) for loss in row.losses)
    return f"{gone} of {len(row.losses)} runs of {row.point.name}{where} diverged"


def _against(one: Row, other: Row) -> str:
    """Formats the paired difference of two points, with its error, as `compared` does."""
    return compared(one.point.name, other.point.name, one.losses, other.losses)


def _against_at_rate(rows: Sequence[Row], rate: float, one: Row, other: Row) -> str:
    """Formats the same for the two points at learning rate `rate`."""
    by_point = {row.point.name: row for row in rows if row.rate == rate}
    return _against(by_point[one.point.name], by_point[other.point.name])


def _below(one: Row, other: Row) -> bool:
    """Returns whether the loss of `one` is lower, which must be established."""
    mean, error = difference(one.losses, other.losses)
    return mean < 0 and established(mean, error, len(one.losses))


def _is_u(axis: Sequence[Row]) -> bool:
    """Returns whether an inner point of the axis is lower than both of its ends, established."""
    low = min(axis, key=_rank)
    return (
        low is not axis[0]
        and low is not axis[-1]
        and _below(low, axis[0])
        and _below(low, axis[-1])
    )


def _pays(axis: Sequence[Row]) -> bool:
    """Returns whether the lowest point is lower than the first one, established."""
    return _below(min(axis, key=_rank), axis[0])


_QUESTIONS: dict[str, tuple[str, Callable[[Sequence[Row]], bool]]] = {
    "allocation": ("a U-shape over rho", _is_u),
    "experts": ("more experts pay", _pays),
}


def _write(folder: Path, config: SweepConfig, rows: Sequence[Row], verdict: str) -> None:
    """Writes the config and the results of a sweep.

    Everything is drawn before the first file is replaced, so that the files agree.
    """
    drawn = io.StringIO()
    with figures.style():
        chart(config.kind, rows).savefig(drawn, format="svg", metadata={"Date": None})
    configs.save(config, folder / "sweep.json")
    contents = {
        "sweep.csv": _csv(rows, config.seeds),
        "sweep.svg": drawn.getvalue(),
        "conclusion.txt": verdict + "\n",
    }
    for name, content in contents.items():
        write_text(folder / name, content)


def _csv(rows: Sequence[Row], seeds: int) -> str:
    """Formats one line per point and rate; the last columns are the losses, one per seed."""
    best = {(row.point.name, row.rate) for row in at_best(rows)}
    file = io.StringIO()
    writer = csv.writer(file)
    numbers = ("mean", "standard_error", "difference", "difference_error")
    writer.writerow(
        ["point", "x", "control", "rate", "best_rate", *numbers, *map(str, range(seeds))]
    )
    for row in rows:
        columns = (row.mean, row.error, row.difference, row.difference_error)
        cells = (
            row.point.name,
            row.point.x,
            row.point.control,
            row.rate,
            (row.point.name, row.rate) in best,
        )
        writer.writerow([*cells, *columns, *row.losses])
    return file.getvalue()


AXES = {
    "allocation": "rho",
    "experts": "routed experts",
    "slots": "rows a head",
    "layers": "block",
    "ablation": "",
}


def chart(kind: Kind, rows: Sequence[Row]) -> Figure:
    """Draws one line per learning rate over the axis, with the controls as horizontal levels."""
    several = len({row.rate for row in rows}) > 1
    lines: dict[str, list[tuple[float, float, float]]] = {}
    levels: dict[str, float] = {}
    for row in rows:
        name = f"rate {row.rate:g}" if several else "validation"
        if math.isnan(row.mean):
            # A nan cannot be drawn; the conclusion names the point.
            continue
        if row.point.control:
            levels[row.point.name + f", {name}" * several] = row.mean
        else:
            error = 0.0 if math.isnan(row.error) else row.error
            lines.setdefault(name, []).append((row.point.x, row.mean, error))
    names = (
        list(dict.fromkeys(row.point.name for row in rows))
        if kind in ("layers", "ablation")
        else ()
    )
    y = "validation loss, nats a token"
    log = kind in ("slots", "experts")
    return figures.sweep(lines, x=AXES[kind], y=y, log=log, levels=levels, names=names)


def _table(rows: Sequence[Row]) -> Table:
    """Formats the results as a terminal's table; errors that are not known stay empty."""
    table = Table("point", "rate", "loss", "standard error", "difference", "its error", box=None)
    for row in rows:
        columns = (row.error, row.difference, row.difference_error)
        loss = "diverged" if math.isnan(row.mean) else f"{row.mean:.4f}"
        table.add_row(
            row.point.name,
            f"{row.rate:g}",
            loss,
            *("" if math.isnan(v) else f"{v:.4f}" for v in columns),
        )
    return table
