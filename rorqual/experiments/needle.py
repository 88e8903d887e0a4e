"""Trains kinds of attention, with and without memory, to find values that a text hides.

The results are a table, figures and a conclusion. Every arm learns the four tasks of `data.needles`
with every seed, in the trainer; texts grow to their full length. An accuracy is the share of
held-out answers whose most likely id is right, given the answers before it. A sparse kind is
compared with the full attention that it replaces, and memory with none, by paired differences seed
by seed. Interrupted sweeps resume; finished runs are never repeated.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from rich.console import Console
from rich.table import Table

from rorqual.analyze import figures
from rorqual.data.needle_config import NeedleConfig
from rorqual.data.needles import DEPTHS, TASKS, chance, column, exam_lengths
from rorqual.experiments.paired import compared, mean_and_error
from rorqual.experiments.runs import last, run, seeded
from rorqual.io import atomic_write, write_text
from rorqual.model_config import (
    DSAConfig,
    EngramConfig,
    GQAConfig,
    MLAConfig,
    MoBAConfig,
    ModelConfig,
    NSAConfig,
    RopeConfig,
)
from rorqual.train.config import NEEDLE_RATE, OptimConfig, TrainConfig

Kind = Literal["gqa", "nsa", "moba", "mla", "dsa"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FULL = {"nsa": "gqa", "moba": "gqa", "dsa": "mla"}  # the full attention that a sparse kind replaces


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleSweep:
    """Which arms are trained, and for how long.

    The sizes are those at which the sparse kinds are sparse.
    """

    kinds: tuple[Kind, ...] = KINDS
    memory: Literal["both", "off", "on"] = "both"
    needles: NeedleConfig = field(default_factory=NeedleConfig)
    dim: int = 64
    layers: int = 2
    dense_width: int = 128
    rope: RopeConfig = field(default_factory=lambda: RopeConfig(base=1000.0))
    init_std: float = 0.05
    gqa: GQAConfig = field(default_factory=lambda: GQAConfig(heads=4, kv_heads=2, head_dim=32))
    mla: MLAConfig = field(default_factory=MLAConfig)
    nsa: NSAConfig = field(
        default_factory=lambda: NSAConfig(block=8, stride=4, select_block=8, top_k=6, window=24)
    )
    moba: MoBAConfig = field(default_factory=lambda: MoBAConfig(block=16, top_k=3))
    dsa: DSAConfig = field(default_factory=lambda: DSAConfig(heads=4, dim=16, top_k=48, warmup=400))
    engram: EngramConfig = field(
        default_factory=lambda: EngramConfig(
            layers=(0,),
            rows_per_head=(2048, 2048),
            heads=2,
            head_dim=16,
            conv=False,
            canonical=False,
        )
    )
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(kind="muon", lr=NEEDLE_RATE))
    steps: int = 600
    batch_size: int = 10
    seq_len: int = 192
    seeds: int = 2
    folder: str = "runs/sweep"
    workers: int | None = None  # processes at a time; None: one per core

    def __post_init__(self) -> None:
        for name in ("seeds", "dim", "layers", "dense_width", "steps", "batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if (
            not self.kinds
            or len(set(self.kinds)) < len(self.kinds)
            or not set(self.kinds) <= set(KINDS)
        ):
            raise ValueError(
                f"kinds: got {self.kinds}, expected different ones of {', '.join(KINDS)}"
            )


class Arm(NamedTuple):
    """One model of the sweep."""

    kind: Kind
    memory: bool
    config: ModelConfig

    @property
    def name(self) -> str:
        """The name of its folder and line, such as nsa-engram."""
        return self.kind + "-engram" * self.memory


Scores = dict[str, float]  # accuracies of a run, by the names that `column` returns


def arms(config: NeedleSweep) -> list[Arm]:
    """Returns every kind of attention, without memory, with it, or both."""
    plain = ModelConfig(
        vocab_size=config.needles.vocab_size,
        dim=config.dim,
        layers=config.layers,
        dense_width=config.dense_width,
        rope=config.rope,
        init_std=config.init_std,
    )
    arm_list = []
    for kind in config.kinds:
        outer = FULL.get(kind, kind)
        attention = {"mla": None, outer: getattr(config, outer), kind: getattr(config, kind)}
        for memory in {"both": (False, True), "off": (False,), "on": (True,)}[config.memory]:
            engram = config.engram if memory else None
            arm_list.append(Arm(kind, memory, replace(plain, engram=engram, **attention)))
    return arm_list


def main(config: NeedleSweep, *, console: Console | None = None) -> Path:
    """Runs the sweep and returns the folder of its results.

    It writes needle.csv, the figures and conclusion.txt there.
    """
    console = console or Console()
    folder = Path(config.folder) / "needle"
    entered = arms(config)
    jobs = {
        arm.name: seeded(folder, arm.name, _training(config, arm), config.seeds) for arm in entered
    }
    run([job for each in jobs.values() for job in each], workers=config.workers, console=console)
    scores = {
        name: [last(job.folder, _total(config)) for job in each] for name, each in jobs.items()
    }
    verdict = conclusion(config, entered, scores)
    _write(folder, config, entered, scores)
    write_text(folder / "conclusion.txt", verdict + "\n")
    console.print(_table(config, scores))
    console.print(verdict)
    return folder


def _training(config: NeedleSweep, arm: Arm) -> TrainConfig:
    """Returns the training of one arm, without a seed or a folder yet."""
    return TrainConfig(
        model=arm.config,
        needles=config.needles,
        optim=config.optim,
        steps=config.steps,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
    )


def _total(config: NeedleSweep) -> str:
    """Returns the name of a column that only a finished run's last line has."""
    return column(TASKS[0], config.seq_len)


def overall(scores: Scores, length: int) -> float:
    """Averages the four tasks' accuracies at one length."""
    return sum(scores[column(task, length)] for task in TASKS) / len(TASKS)


def conclusion(config: NeedleSweep, entered: Sequence[Arm], scores: dict[str, list[Scores]]) -> str:
    """States which differences are established at the trained length.

    The scores that are compared are the means of the four tasks.
    """
    means = {
        name: [overall(each, config.seq_len) for each in seeds] for name, seeds in scores.items()
    }
    pairs = [
        (arm.name, arm.name.replace(arm.kind, FULL[arm.kind], 1))
        for arm in entered
        if arm.kind in FULL
    ]
    pairs += [(arm.name, arm.kind) for arm in entered if arm.memory]
    parts = [
        compared(one, other, means[one], means[other], 3) for one, other in pairs if other in means
    ]
    best = max(means, key=lambda name: mean_and_error(means[name])[0])
    seeds = f"{config.seeds} seed{'s' * (config.seeds > 1)}"
    head = (
        f"{best} found most ({mean_and_error(means[best])[0]:.3f} of the answers "
        f"at {config.seq_len} tokens, {seeds})"
    )
    return "; ".join([head, *parts]) + " (95 %, paired t)."


def _table(config: NeedleSweep, scores: dict[str, list[Scores]]) -> Table:
    """Formats the share of answers found by arm and task, at the trained length, and chance."""
    table = Table(
        "",
        *TASKS,
        box=None,
        title=f"share of answers found at {config.seq_len} tokens",
        title_justify="left",
    )
    for name, seeds in scores.items():
        cells = (
            mean_and_error([each[column(task, config.seq_len)] for each in seeds]) for task in TASKS
        )
        table.add_row(
            name, *(f"{m:.3f}" if math.isnan(e) else f"{m:.3f} ± {e:.3f}" for m, e in cells)
        )
    table.add_row(
        "chance: a value of the text",
        *(f"{share:.3f}" for share in chance(config.needles).values()),
    )
    table.add_row("chance: any value", *[f"{1 / config.needles.values:.3f}"] * len(TASKS))
    return table


def _write(
    folder: Path, config: NeedleSweep, entered: Sequence[Arm], scores: dict[str, list[Scores]]
) -> None:
    """Writes needle.csv and the figures.

    The table has one line for every accuracy that was measured; its column `part` is the part of
    the text, empty for the whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lengths = exam_lengths(config.needles, config.seq_len)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["kind", "engram", "seed", "task", "seq_len", "part", "accuracy"])
    columns = [(t, n, p) for t in TASKS for n in lengths for p in (None, *range(DEPTHS))]
    for arm in entered:
        for seed, exam in enumerate(scores[arm.name]):
            for task, length, depth in columns:
                if (name := column(task, length, depth)) in exam:
                    writer.writerow([arm.kind, arm.memory, seed, task, length, depth, exam[name]])
    write_text(folder / "needle.csv", table.getvalue())
    for memory in {arm.memory for arm in entered}:
        best = {arm.name: scores[arm.name] for arm in entered if arm.memory == memory}
        ending = "-engram" * memory
        by_length = {
            name: [(float(n), *_spread([overall(each, n) for each in seeds])) for n in lengths]
            for name, seeds in best.items()
        }
        _draw(folder / f"length{ending}.svg", by_length, "tokens", log=True)
        by_depth = {name: _by_depth(seeds, config.seq_len) for name, seeds in best.items()}
        _draw(
            folder / f"depth{ending}.svg",
            by_depth,
            "where the needle stands, 0 the text's beginning, 1 its end",
        )


def _draw(
    path: Path, lines: dict[str, list[tuple[float, float, float]]], x: str, log: bool = False
) -> None:
    """Draws lines of (x, accuracy, error) by arm into an SVG file."""
    with figures.style(), atomic_write(path) as beside:
        figures.sweep(lines, x=x, y="share of answers found", log=log).savefig(beside, format="svg")


def _by_depth(seeds: Sequence[Scores], length: int) -> list[tuple[float, float, float]]:
    """Returns each part's middle, its mean accuracy and the standard error over seeds.

    The mean is over the tasks that have needles in that part of the text.
    """
    accuracies = []
    for depth_index in range(DEPTHS):
        names = [column(task, length, depth_index) for task in TASKS]
        shares = [[each[name] for name in names if name in each] for each in seeds]
        if all(shares):
            accuracies.append(
                ((depth_index + 0.5) / DEPTHS, *_spread([sum(s) / len(s) for s in shares]))
            )
    return accuracies


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard error as a figure shows them: no error of a single seed."""
    mean, error = mean_and_error(values)
    return mean, 0.0 if math.isnan(error) else error
