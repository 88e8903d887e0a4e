"""Measures the gain of each CPU kernel in training and generating with the project's own presets.

    for n in 1 2; do
        OMP_NUM_THREADS=$n python benchmarks/cpu_kernels.py --json kernels-$n.json
    done
    python benchmarks/cpu_kernels.py --merge kernels-1.json kernels-2.json

A workload is a training step of a preset with Engram (loss, backward, clip, optimizer), or a prompt
of 256 tokens and 48 that are generated after it. In every round each workload runs once with all
kernels, and then once for each kernel with that one alone replaced by its PyTorch reference; the
rounds take turns. A ratio is the median time without the kernel over the median with all. Kernels
that a workload never calls are left out of it. `--merge` prints the table of several runs, with the
geometric mean over training and generating that decides (1.1 in the mean, 1.3 somewhere, or a bar
of its own).

With `--placement disk` rows are trained, or read, in files below `--folder`, of which the page
cache holds every byte; a table that is read keeps `--hot-bytes` of its rows in memory.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import torch

from rorqual import kernels
from rorqual.experiments.demo import DemoConfig
from rorqual.experiments.plan import split_budget
from rorqual.model import LanguageModel
from rorqual.model_config import ModelConfig, row_totals
from rorqual.presets import preset
from rorqual.serve.decoding import decode
from rorqual.tables import Table, draw_table
from rorqual.train.config import recipe
from rorqual.train.optim import Optimizer

SHAPES = {"tiny": (16, 256), "small": (4, 256)}  # batch size and sequence length of training
PROMPT, CONTINUED = 256, 48  # tokens
CPU_KIND = "numba"


def training(model: LanguageModel, batch_size: int, seq_len: int) -> Callable[[], object]:
    """Returns a function that makes one training step."""
    optimizer = Optimizer(model, recipe(model.config.dim))
    ids = torch.randint(
        model.config.vocab_size,
        (batch_size, seq_len + 1),
        generator=torch.Generator().manual_seed(0),
    )

    def step() -> None:
        model.loss(ids[:, :-1], ids[:, 1:]).total.backward()
        optimizer.clip()
        optimizer.step()
        optimizer.begin_step()

    return step


def generating(model: LanguageModel) -> Callable[[], object]:
    """Returns a function that generates greedily from one prompt."""
    ids = torch.randint(
        model.config.vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    return lambda: list(
        decode(model, [ids], max_new_tokens=CONTINUED, vocab_size=model.config.vocab_size)
    )


def on_disk(config: ModelConfig, kind: str, folder: Path, hot_bytes: int) -> list[Table]:
    """Returns tables of the model's shape whose rows are in files."""
    results: list[Table] = []
    for number, rows in enumerate(row_totals(config.engram)):
        directory = folder / f"{kind}-{config.dim}-{number}"
        if kind == "train":
            results.append(Table.of_records(directory, rows, config.engram.head_dim))
        else:
            table = draw_table(directory, rows, config.engram.head_dim, seed=number)
            results.append(Table.of_file(table, cache_bytes=hot_bytes))
    return results


def called(work: Callable[[], object]) -> set[str]:
    """Returns the names of the kernels that the workload calls, by running it once."""
    names: set[str] = set()

    class Counting:
        """A compiled function, which has more attributes than a call."""

        def __init__(self, name: str, function: Callable[..., object]) -> None:
            self.name = name
            self.function = function

        def __call__(self, *arguments: object, **named: object) -> object:
            names.add(self.name)
            return self.function(*arguments, **named)

        def __getattr__(self, attribute: str) -> object:
            return getattr(self.function, attribute)

    with contextlib.ExitStack() as stack:
        for name, choice in kernels.registered().items():
            for kernel in choice.kernels:
                if kernel.kind == CPU_KIND:
                    counted = Counting(name, kernel.function)
                    stack.enter_context(mock.patch.object(kernel, "function", counted))
        # The workload before may have disabled one of the kernels.
        seconds(work, None)
    return names


def seconds(work: Callable[[], object], without: str | None) -> float:
    os.environ[kernels.VARIABLE] = "" if without is None else f"{without}=reference"
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratios(work: Callable[[], object], rounds: int) -> dict[str, float]:
    """Returns {kernel: time without it over time with all}, of medians.

    The entry "" is the time with all kernels, in milliseconds.
    """
    names = sorted(called(work))
    # The first run of each compiles and allocates.
    for name in (None, *names):
        seconds(work, name)
    times: dict[str | None, list[float]] = {name: [] for name in (None, *names)}
    for _ in range(rounds):
        for name, taken in times.items():
            taken.append(seconds(work, name))
    whole = statistics.median(times[None])
    item = {name: statistics.median(times[name]) / whole for name in names}
    return {"": whole * 1000} | item


def merged(tables: Iterable[dict[str, dict[str, float]]]) -> str:
    """Formats the runs' tables as one in markdown, one kernel per line.

    The last columns are the mean and the best over all workloads.
    """
    works = {work: item for table in tables for work, item in table.items()}
    names = sorted({name for item in works.values() for name in item if name})
    lines = [
        f"| without | {' | '.join(works)} | mean | best |",
        "| --- |" + " ---: |" * (len(works) + 2),
    ]
    for name in names:
        cells = [f"{item[name]:.2f}" if name in item else "" for item in works.values()]
        # A workload that never calls the kernel is neither faster nor slower for it.
        each = [item.get(name, 1.0) for item in works.values()]
        mean = math.exp(sum(map(math.log, each)) / len(each))
        lines.append(f"| `{name}` | {' | '.join(cells)} | {mean:.2f} | {max(each):.2f} |")
    whole = " | ".join(f"{item['']:.1f}" for item in works.values())
    lines.append(f"| milliseconds, all kernels | {whole} | | |")
    return "\n".join(lines)


def measured(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Returns the ratios of every workload."""
    table: dict[str, dict[str, float]] = {}
    for name, kind in itertools.product(options.presets, ("train", "decode")):
        config = preset(name)
        if config.engram is None:
            # The demo trains this model beside the preset itself.
            config = split_budget(config, DemoConfig().rho).engram.config
        canonical = torch.arange(config.vocab_size) if config.engram is not None else None
        disk = options.placement == "disk"
        tables = on_disk(config, kind, folder, options.hot_bytes) if disk else None
        model = LanguageModel(config, canonical, seed=0, tables=tables)
        work = training(model, *SHAPES[name]) if kind == "train" else generating(model.eval())
        table[f"{name} {kind} {torch.get_num_threads()}t"] = ratios(work, options.rounds)
        for each in tables or ():
            each.close()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--placement", choices=("device", "disk"), default="device")
    parser.add_argument("--hot-bytes", type=int, default=64 << 20)
    parser.add_argument(
        "--folder", type=Path, help="where the tables on a disk are made, and removed afterwards"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--merge", nargs="+", type=Path, help="print the table of runs that are there"
    )
    options = parser.parse_args()
    if options.merge:
        print(merged(json.loads(path.read_text(encoding="utf-8")) for path in options.merge))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = measured(options, Path(folder))
    print(merged([table]))
    if options.json is not None:
        options.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
