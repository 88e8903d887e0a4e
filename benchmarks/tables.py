"""Measures what tables must achieve, and prints each bar beside the measured value.

    OMP_NUM_THREADS=2 python benchmarks/tables.py --folder /mnt/disk

    host         lookup from host memory against torch.index_select(out=), rows of 64 to 4,096
                 bytes; batches of 65,536 rows against F.embedding
    ids          the check of row ids, as a share of the gather that it guards
    verify       bytes per second of one core over a table in the page cache
    cold         rows per second from a file dropped from the page cache, in batches of 12,000 of
                 264 bytes
    generation   tokens per second with two tables resident, in host memory, on the disk warm and
                 cold, with and without prefetch, for one sequence and for several at once; all
                 must generate the same ids. Cold: the files are dropped from the page cache before
                 every step. Without prefetch each layer reads when it runs
    training     a step of a small model whose rows learn on the disk, against the same step with a
                 resident table
    limit        a process that may have only a quarter of its table's bytes in memory generates the
                 same ids as one that has all, and cannot load that table
    refusals     the tests of parity over 1e6 rows and 64 generations, of 1,000 mutated files, of
                 10,000 batches of bad ids, and of 50 files cut, replaced or unlinked while serving:
                 how many fail, of how many

Rounds are interleaved, medians are printed. `--only` names the parts to run.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from rorqual.experiments import tables
from rorqual.layers.engram import EngramConfig, row_totals
from rorqual.model import LanguageModel, ModelConfig
from rorqual.tables import Table, draw_table, verify
from rorqual.tables.fp8 import FP8
from rorqual.tables.table import check_ids
from rorqual.train.config import OptimConfig
from rorqual.train.optim import Optimizer

BATCH = 65_536  # rows


class Shown(NamedTuple):
    """One number, and the least (or most) that it must be."""

    name: str
    value: float
    bar: float | None = None
    limit: bool = False  # the bar is an upper one

    @property
    def holds(self) -> bool | None:
        return (
            None
            if self.bar is None
            else (self.value <= self.bar if self.limit else self.value >= self.bar)
        )


def interleaved(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the median seconds of each, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def host(options: argparse.Namespace) -> list[Shown]:
    results: list[Shown] = []
    for size in (64, 256, 1024, 4096):
        values = torch.randn(max(BATCH, options.host_bytes // size), size // 4)
        table = Table.of_values(values)
        ids = torch.randint(len(values), (BATCH,))
        out = torch.empty(BATCH, size // 4)
        steps = {
            "recall": lambda table=table, ids=ids: table.prefetch(ids).wait(),
            "select": lambda values=values, ids=ids, out=out: torch.index_select(
                values, 0, ids, out=out
            ),
            "embedding": lambda values=values, ids=ids: F.embedding(ids, values),
        }
        took = interleaved(steps, options.rounds)
        results.append(
            Shown(
                f"host recall / index_select(out=), {size} bytes",
                took["select"] / took["recall"],
                0.9,
            )
        )
        bar = 1.3 if size == 256 else None
        results.append(
            Shown(
                f"F.embedding / host recall, {size} bytes", took["embedding"] / took["recall"], bar
            )
        )
        table.close()
    return results


def ids(options: argparse.Namespace) -> list[Shown]:
    """Measures how much longer a gather takes when its ids are checked first.

    The ids were written just before, as hashes are.
    """
    values = torch.randn(max(BATCH, options.host_bytes // 256), 64)
    hashed = torch.randint(len(values), (BATCH,))
    out = torch.empty(BATCH, 64)
    wanted = torch.empty_like(hashed)
    spans: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(10 * options.rounds):
        # The second of a pair has more in the caches, or less, so they take turns.
        for check in (False, True) if turn % 2 else (True, False):
            wanted.copy_(hashed)
            began = time.perf_counter()
            if check:
                check_ids(wanted, len(values))
            torch.index_select(values, 0, wanted, out=out)
            spans[check].append(time.perf_counter() - began)
    share = statistics.median(spans[True]) / statistics.median(spans[False]) - 1
    return [
        Shown(
            "a gather of 256 bytes each with its ids checked / without, - 1",
            share,
            0.02,
            limit=True,
        )
    ]


def checked(options: argparse.Namespace, folder: Path) -> list[Shown]:
    table = draw_table(folder / "verify", options.verify_bytes // 256, 64)
    size = sum(file.stat().st_size for file in table.iterdir())
    verify(table)
    rates = []
    for _ in range(options.rounds):
        began = time.process_time()
        assert verify(table) == []
        rates.append(size / (time.process_time() - began) / 1e9)
    return [Shown("verify, GB a second of a core", statistics.median(rates), 5.0)]


def cold(options: argparse.Namespace, folder: Path) -> list[Shown]:
    count = 12_000
    path = draw_table(folder / "cold", options.cold_bytes // 264, 256, dtype=FP8, std=1.0)
    table = Table.of_file(path, cache_bytes=0)
    rates = []
    for _ in range(options.rounds):
        wanted = torch.randint(table.rows, (count,))
        table.file.drop_page_cache()
        began = time.perf_counter()
        table.prefetch(wanted).wait()
        rates.append(count / (time.perf_counter() - began))
    table.close()
    return [Shown("cold rows a second, 264 bytes", statistics.median(rates), 35_000)]


def generation(options: argparse.Namespace, folder: Path) -> list[Shown]:
    sizes = {
        "rows": options.rows,
        "width": options.width,
        "dim": options.dim,
        "layers": options.layers,
    }
    arguments = {
        "folder": str(folder),
        "tokens": options.tokens,
        "rounds": options.rounds,
        "seconds": 0.2,
    }
    bars = {"disk warm": 0.97, "disk cold": 0.85}
    results = []
    for sequences in (1, options.sequences):
        config = tables.BenchConfig(sequences=sequences, **arguments, **sizes)
        lines = {line.name: line for line in tables.bench(config)}
        resident = lines.pop("resident").tokens_per_second
        words = f"{sequences} sequence{'s' if sequences > 1 else ''}"
        results.append(Shown(f"{words}: tokens a second, resident", resident))
        for name, line in lines.items():
            results.append(
                Shown(
                    f"{words}: {name} / resident", line.tokens_per_second / resident, bars.get(name)
                )
            )
    return results


def training(options: argparse.Namespace, folder: Path) -> list[Shown]:
    """Times a training step with resident rows and with rows on the disk.

    Both models have the same seed and the same batches; the losses must be equal.
    """
    per_head = options.rows // 16
    shape = ModelConfig(
        dim=options.train_dim,
        layers=4,
        dense_width=4 * options.train_dim,
        engram=EngramConfig(
            layers=(1,), rows_per_head=(per_head, per_head), heads=8, head_dim=options.width
        ),
    )
    (rows,) = row_totals(shape.engram)
    arms: dict[str, Callable[[], float]] = {}
    for name in ("resident", "disk"):
        stored = (
            [Table.of_records(folder / "learning", rows, options.width)] if name == "disk" else None
        )
        model = LanguageModel(shape, seed=0, tables=stored).train()
        arms[name] = step_of(model, Optimizer(model, OptimConfig()), options.train_tokens)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(5 * options.rounds + 1):
        losses = []
        for name, step in arms.items():
            began = time.perf_counter()
            losses.append(step())
            seconds[name].append(time.perf_counter() - began)
        assert losses[0] == losses[1], f"the losses differ: {losses}"
    took = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    return [
        Shown("training step with resident rows, seconds", took["resident"]),
        Shown(
            "training step, rows on disk / resident",
            took["disk"] / took["resident"],
            1.1,
            limit=True,
        ),
    ]


def step_of(model: LanguageModel, optimizer: Optimizer, tokens: int) -> Callable[[], float]:
    draw = torch.Generator().manual_seed(0)

    @torch.enable_grad()
    def step() -> float:
        ids = torch.randint(model.config.vocab_size, (tokens // 256, 257), generator=draw)
        optimizer.begin_step()
        loss = model.loss(ids[:, :-1], ids[:, 1:]).total
        loss.backward()
        optimizer.clip()
        optimizer.step()
        return loss.item()

    return step


# A process of its own prints the ids that a model generates whose table is on the disk. Its memory
# may be limited to less than the table.
CHILD = """
import json, resource, sys
import torch
from pathlib import Path
from rorqual.experiments.tables import BenchConfig
from rorqual.experiments import tables
from rorqual.serve.decoding import decode
from rorqual.tables import TableConfig
def told(name):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
folder, allowed = Path(sys.argv[1]), int(sys.argv[3])
config = BenchConfig(**json.loads(sys.argv[2]))
torch.set_num_threads(1)
on_disk = TableConfig(placement="disk", hot_bytes=0)
model = tables.model_with(config, tables.opened(config, folder, on_disk))
draw = torch.Generator().manual_seed(0)
prompts = torch.randint(model.config.vocab_size, (1, 16), generator=draw).tolist()
list(decode(model, prompts, max_new_tokens=2))
loaded = False
if allowed:
    used = told("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))
    try:
        tables.opened(config, folder, TableConfig())
        loaded = True
    except (RuntimeError, MemoryError):
        pass
else:
    model.tables = torch.nn.ModuleList(tables.opened(config, folder, TableConfig()))
said = list(decode(model, prompts, max_new_tokens=64))
print(json.dumps({"said": said, "loaded": loaded, "peak": told("VmHWM")}))
"""


def limited(options: argparse.Namespace, folder: Path) -> list[Shown]:
    config = tables.BenchConfig(rows=options.limit_bytes // 256, dtype="float32", dim=64, layers=2)
    rows = sum(tables.row_totals(tables.memory_of(config)))
    path = tables.drawn(config, folder / "limit")
    sizes = json.dumps({"rows": config.rows, "dtype": "float32", "dim": 64, "layers": 2})
    results = []
    for allowed in (0, rows * 256 // 4):
        command = [sys.executable, "-c", CHILD, str(path), sizes, str(allowed)]
        results.append(
            json.loads(
                subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
            )
        )
    free, bound = results
    return [
        Shown(
            "within a quarter of the table's bytes: ids that differ of 64",
            different(free, bound),
            0,
            limit=True,
        ),
        Shown("the table could be loaded within them", float(bound["loaded"]), 0, limit=True),
        Shown("peak memory, bound / free", bound["peak"] / free["peak"]),
    ]


def different(one: dict, other: dict) -> float:
    return float(sum(a != b for a, b in zip(one["said"], other["said"], strict=True)))


def refusals() -> list[Shown]:
    wanted = "thousand or fifty or million or same_bits"
    files = ["tests/tables", "tests/experiments/test_tables.py"]
    words = ["-m", "pytest", "-qp", "no:cacheprovider", "-m"]
    command = [sys.executable, *words, "not compiled", "-k", wanted, *files]
    output = subprocess.run(
        command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    ).stdout
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", output)
    }
    return [
        Shown(
            "tests of parity and refusals that fail",
            counts.get("failed", 0) + counts.get("error", 0),
            0,
            limit=True,
        ),
        Shown("tests of parity and refusals that hold", counts.get("passed", 0), 1),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ("host", "ids", "verify", "cold", "generation", "training", "limit", "refusals")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts)
    parser.add_argument("--folder", default=".", help="on the disk that is measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--host-bytes", type=int, default=256 << 20)
    parser.add_argument("--verify-bytes", type=int, default=256 << 20)
    parser.add_argument("--cold-bytes", type=int, default=1 << 30)
    parser.add_argument("--limit-bytes", type=int, default=1 << 30)
    parser.add_argument("--rows", type=int, default=2_000_000, help="of the table that generates")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--sequences", type=int, default=8, help="at once, in the second part of generation"
    )
    parser.add_argument("--train-dim", type=int, default=256)
    parser.add_argument("--train-tokens", type=int, default=4096, help="of a batch, in rows of 256")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    results: list[Shown] = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="storage-") as directory:
        folder = Path(directory)
        runs: dict[str, Callable[[], list[Shown]]] = {
            "host": lambda: host(options),
            "ids": lambda: ids(options),
            "verify": lambda: checked(options, folder),
            "cold": lambda: cold(options, folder),
            "generation": lambda: generation(options, folder),
            "training": lambda: training(options, folder),
            "limit": lambda: limited(options, folder),
            "refusals": refusals,
        }
        for piece in options.only:
            with torch.no_grad():
                results += (fresh := runs[piece]())
            if not options.json:
                show(fresh)
    if options.json:
        measured = {
            each.name: {"value": each.value, "bar": each.bar, "holds": each.holds}
            for each in results
        }
        print(json.dumps({"measured": measured, "threads": torch.get_num_threads()}))


def show(result: list[Shown]) -> None:
    for each in result:
        bar = "" if each.bar is None else f"{'at most' if each.limit else 'at least'} {each.bar:g}"
        stored = "" if each.holds in (None, True) else "NOT REACHED"
        print(f"{each.name:64} {each.value:12,.3f}   {bar:16} {stored}", flush=True)


if __name__ == "__main__":
    main()
