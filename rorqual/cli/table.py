"""Implements `rorqual table`: builds, inspects, verifies, converts and measures tables of rows."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from rorqual.cli.parse import Positional, UsageError, emit, parse_new, split_first, take
from rorqual.hints import choose
from rorqual.io import write_json

Dtype = Literal["float32", "bfloat16", "fp8"]
EXAMPLE = "rorqual table inspect runs/demo/engram"


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """Writes a table of normal numbers, or of rows of a run or safetensors file.

    It writes shard by shard. Ctrl-C leaves the shards that are whole in TABLE.partial; the same
    command goes on.

    rorqual table build memory --rows 10000000 --width 256 --dtype fp8
    rorqual table build engram-rows --source runs/demo/engram --number 0 --dtype bfloat16
    """

    table: Positional[str]  # the new folder
    source: str | None = None  # a run folder, a safetensors file or a table; none: normal numbers
    number: int = 0  # which of a run's tables
    name: str | None = None  # the tensor of a safetensors file
    rows: int | None = None  # without a source: how many
    width: int | None = None  # without a source: values of a row
    dtype: Dtype | None = None  # none: the source's, or float32
    std: float = 0.02  # standard deviation of the numbers
    seed: int = 0
    shard_bytes: int = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """Writes a table again in another format, shard by shard.

    rorqual table convert memory memory-fp8 --dtype fp8
    """

    source: Positional[str]  # a table's folder, a run folder or a safetensors file
    table: Positional[str]  # the new folder
    dtype: Dtype
    number: int = 0  # which of a run's tables
    name: str | None = None  # the tensor of a safetensors file
    shard_bytes: int = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspect:
    """Prints shapes, formats, shards, sizes and hot rows of tables.

    The exit code is 1 for files that are no table.

    rorqual table inspect runs/demo/engram --hot hot.safetensors
    """

    table: Positional[str]  # a table's folder, a run folder or a safetensors file
    name: str | None = None  # the tensor of a safetensors file
    hot: str | None = None  # a list that `rorqual table hot` wrote


@dataclass(frozen=True, kw_only=True, slots=True)
class Verify:
    """Reads every byte of a table and names the rows that are not as they were written.

    The exit code is 1 if there are any.

    rorqual table verify memory
    """

    table: Positional[str]  # a folder that `rorqual table build` or `convert` wrote


@dataclass(frozen=True, kw_only=True, slots=True)
class Hot:
    """Writes a list of the rows of a run's tables that a corpus reads most, to keep in memory.

    rorqual table hot runs/demo/engram hot.safetensors --data wordnet
    """

    run: Positional[str]  # a run folder
    out: Positional[str]  # the new file, for TableConfig's `hot`
    data: str = "wordnet"  # a corpus name, a file or a folder
    column: str = "text"  # the field of the corpus that holds the text
    limit: int = 1000  # documents of the corpus
    rows: int = 65_536  # how many of each table


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Measures a table on this machine in every placement.

    It measures rows a second, a step's fetch, and tokens a second under a model. The rows, weights
    and prompts are the same in each placement; all must generate the same ids. For a cold disk the
    file is removed from the system's page cache.

    rorqual table bench --rows 10000000 --figure placements.svg
    """

    rows: int = 1_000_000  # rows of the table, rounded up to the model's primes
    width: int = 64  # values of a row
    dtype: Dtype = "bfloat16"
    folder: str = "."  # a folder on the disk that is measured; the table is removed afterwards
    hot_bytes: int = 16 << 20  # bytes of hot rows, in the lines that have them
    dim: int = 512  # width of the model that generates
    layers: int = 6
    tokens: int = 32  # tokens generated a round
    sequences: int = 1  # sequences generated at once
    rounds: int = 3
    seconds: float = 1.0  # time to measure rows a second, for each line
    seed: int = 0
    figure: str | None = None  # where to draw tokens a second: .svg, .png or .pdf
    run: str | None = None  # a run folder whose page (`rorqual report`) is to show the figure


def table_command(argv: list[str]) -> int:
    """Runs one of the verbs of `rorqual table`; returns the exit code."""
    as_json, argv = take("--json", argv)
    verb, rest = split_first(argv, f"one of {', '.join(VERBS)}", EXAMPLE)
    if verb in ("-h", "--help"):
        print("usage: rorqual table VERB [ARGUMENTS]      rorqual table VERB --help says more\n")
        print(
            *(
                f"  {name:8} {(cls.__doc__ or '').splitlines()[0]}"
                for name, (cls, _) in VERBS.items()
            ),
            sep="\n",
        )
        return 0
    try:
        cls, call = VERBS[choose("verb of table", verb, VERBS)]
    except ValueError as error:
        raise UsageError(str(error)) from None
    return call(parse_new(cls, rest, f"table {verb}"), as_json)


def build(options: Build, as_json: bool) -> int:
    """Writes a table as files, of normal numbers or from a run; returns the exit code."""
    from rorqual import tables

    if options.source is not None:
        if options.rows is not None or options.width is not None:
            raise UsageError(
                "got --source with --rows or --width, expected one of them: "
                "a source has its own shape"
            )
        return _written(options, options.source, as_json)
    if options.rows is None or options.width is None:
        raise UsageError(
            "got no --source and not both --rows and --width, expected where the rows come from"
        )
    if options.name is not None or options.number:
        raise UsageError(
            "got --name or --number without --source, expected the source that they are about"
        )
    if options.rows < 1 or options.width < 1:
        raise UsageError(
            f"got {options.rows} rows of width {options.width}, expected at least 1 of each"
        )
    from rorqual.tables.fp8 import row_bytes

    dtype = _dtype(options.dtype or "float32")
    size = row_bytes(options.width, dtype)
    shard_rows = _shard_rows(options, size)
    with _ProgressBar(options.rows * size) as progress:
        tables.draw_table(
            options.table,
            options.rows,
            options.width,
            dtype=dtype,
            std=options.std,
            seed=options.seed,
            shard_rows=shard_rows,
            progress=progress,
        )
    return inspect(Inspect(table=options.table), as_json)


def convert(options: Convert, as_json: bool) -> int:
    """Writes a table anew in another format; returns the exit code."""
    return _written(options, options.source, as_json)


def _written(options: Build | Convert, source: str, as_json: bool) -> int:
    """Writes a table from another, and prints it as `inspect` does."""
    from rorqual import tables
    from rorqual.tables.fp8 import row_bytes

    names = tables_in(Path(source), options.name)
    if not 0 <= options.number < len(names):
        raise UsageError(
            f"got --number {options.number}, expected 0 to {len(names) - 1}: "
            f"{source} has so many tables"
        )
    path, name = names[options.number]
    before = tables.RowFile(path, name)
    before.close()
    dtype = before.dtype if options.dtype is None else _dtype(options.dtype)
    size = row_bytes(before.width, dtype)
    shard_rows = _shard_rows(options, size)
    with _ProgressBar(before.rows * size) as progress:
        tables.convert(
            path, options.table, name=name, dtype=dtype, shard_rows=shard_rows, progress=progress
        )
    return inspect(Inspect(table=options.table), as_json)


def _shard_rows(options: Build | Convert, size: int) -> int:
    """Returns how many rows of `size` bytes a shard has. UsageError where it is none."""
    if options.shard_bytes < size:
        raise UsageError(
            f"got --shard-bytes {options.shard_bytes}, expected at least the {size} bytes of a row"
        )
    return options.shard_bytes // size


def inspect(options: Inspect, as_json: bool) -> int:
    """Describes tables in files; returns the exit code."""
    descriptions = [
        _about(path, name) for path, name in tables_in(Path(options.table), options.name)
    ]
    if options.hot is not None:
        from rorqual.tables import hot_rows

        lists = hot_rows(Path(options.hot))
        for number, about in enumerate(descriptions):
            ids = lists[str(number)].tolist() if str(number) in lists else []
            about["hot"] = {
                "rows": len(ids),
                "bytes": len(ids) * about["row_bytes"],
                "first": ids[:5],
            }
    if as_json:
        emit({"tables": descriptions})
        return 0
    for about in descriptions:
        print(
            f"{about['path']} {about['name']}: {about['rows']:,} rows of {about['width']} values "
            f"in {about['dtype']}, "
            f"{about['row_bytes']} bytes each, {about['bytes']:,} bytes in {len(about['shards'])} "
            f"file{'s' if len(about['shards']) > 1 else ''}, "
            f"{'with' if about['checksums'] else 'without'} checksums"
        )
        for shard in about["shards"] if len(about["shards"]) > 1 else ():
            print(
                f"  {shard['file']}  rows {shard['first']:,} to "
                f"{shard['first'] + shard['rows'] - 1:,}"
            )
        if (hot := about.get("hot")) is not None:
            print(
                f"  hot: {hot['rows']:,} rows, {hot['bytes']:,} bytes; "
                f"first {', '.join(map(str, hot['first']))}"
            )
    return 0


def _about(path: Path, name: str) -> dict[str, Any]:
    """Returns what `inspect` says of a table as JSON values, read from the headers of its files."""
    from rorqual.tables.row_file import open_shards

    shards = open_shards(path, name)
    starts = [sum(shard.rows for shard in shards[:n]) for n in range(len(shards))]
    for shard in shards:
        shard.close()
    rows = sum(shard.rows for shard in shards)
    first = shards[0]
    stored_dtype = str(first.dtype).removeprefix("torch.")
    return {
        "path": str(path),
        "name": name,
        "rows": rows,
        "width": first.width,
        "dtype": "fp8" if stored_dtype.startswith("float8") else stored_dtype,
        "row_bytes": first.row_bytes,
        "bytes": rows * first.row_bytes,
        "checksums": all("xxh3_per_mib" in shard.metadata for shard in shards),
        "shards": [
            {"file": shard.path.name, "first": start, "rows": shard.rows}
            for shard, start in zip(shards, starts, strict=True)
        ],
    }


def verify(options: Verify, as_json: bool) -> int:
    """Names the rows that are not as they were written; returns 1 if there are any."""
    from rorqual import tables

    damaged = tables.verify(options.table)
    if as_json:
        rows = [
            {"file": each.path, "first": each.rows.start, "last": each.rows.stop - 1}
            for each in damaged
        ]
        emit({"sound": not damaged, "damaged": rows})
    elif not damaged:
        print(f"{options.table}: every byte is as it was written")
    else:
        for each in damaged:
            print(
                f"{each.path}: rows {each.rows.start:,} to {each.rows.stop - 1:,} are not as they "
                "were written"
            )
    return 1 if damaged else 0


def hot(options: Hot, as_json: bool) -> int:
    """Writes the row ids that a corpus reads most; returns the exit code."""
    from safetensors.torch import save_file
    from torch import int64, tensor

    from rorqual import evaluate, memory
    from rorqual.serve.generate import load
    from rorqual.tables import hot_rows

    if options.rows < 1 or options.limit < 1:
        raise UsageError(
            f"got --rows {options.rows} and --limit {options.limit}, expected at least 1 of each"
        )
    if not Path(options.out).parent.is_dir() or Path(options.out).is_dir():
        raise UsageError(f"got {options.out}, expected a file in a folder that is there")
    if Path(options.out).exists():
        # Only such a list is overwritten, and never a run's weights.
        hot_rows(Path(options.out))
    run = load(options.run)
    if run.config.engram is None:
        raise ValueError(f"{options.run}: got a run without tables, expected a model with Engram")
    hot_lists = []
    for layer in run.config.engram.layers:
        texts = evaluate.texts(
            options.data, split="all", limit=options.limit, column=options.column
        )
        hot_lists.append(memory.popular(run.model, run.tokenizer, texts, layer, options.rows))
    lists = {
        str(n): tensor([row for row, _, _ in largest], dtype=int64)
        for n, largest in enumerate(hot_lists)
    }
    save_file(lists, options.out)
    sums = [sum(reads for _, reads, _ in largest) for largest in hot_lists]
    lines = [
        {"rows": len(m), "reads": reads, "first": m[:5]}
        for m, reads in zip(hot_lists, sums, strict=True)
    ]
    if as_json:
        emit({"file": options.out, "tables": lines})
        return 0
    for number, largest in enumerate(hot_lists):
        small = "  ".join(f"{row} ({ngram!r}, {reads:,})" for row, reads, ngram in largest[:5])
        print(
            f"table {number}: {len(largest):,} rows that {sums[number]:,} reads go to; "
            f"first {small}"
        )
    return 0


def bench(options: Bench, as_json: bool) -> int:
    """Measures the lookups of every placement; returns the exit code."""
    from rorqual.experiments import tables

    names = [field.name for field in fields(tables.BenchConfig)]
    try:
        config = tables.BenchConfig(**{name: getattr(options, name) for name in names})
    except ValueError as error:
        raise UsageError(str(error)) from None
    console = Console(stderr=True)
    if not Path(options.folder).is_dir():
        raise UsageError(f"got --folder {options.folder}, expected a folder that is there")
    if options.run is not None and not (Path(options.run) / "config.json").is_file():
        raise UsageError(f"got --run {options.run}, expected a run folder with config.json")
    if (figure := options.figure) is not None and not (
        Path(figure).suffix in (".svg", ".png", ".pdf") and Path(figure).parent.is_dir()
    ):
        raise UsageError(
            f"got --figure {figure}, expected a .svg, .png or .pdf in a folder that is there"
        )
    lines = tables.bench(config, lambda words: console.print(f"[dim]{words}[/]", highlight=False))
    speeds = {line.name: line.tokens_per_second for line in lines}
    if options.run is not None:
        write_json(Path(options.run) / "placements.json", speeds)
    if figure is not None:
        from rorqual.analyze import figures

        drawn = figures.bars(speeds, x="tokens a second")
        with figures.style():
            drawn.savefig(figure)
    if as_json:
        emit({"lines": lines, "figure": figure})
        return 0
    shown = Table(
        "placement", *("rows/s", "step p50", "step p99", "hot", "tokens/s", "of resident"), box=None
    )
    for line in lines:
        times = (
            f"{line.rows_per_second:,.0f}",
            f"{line.step_p50 * 1e6:,.0f} us",
            f"{line.step_p99 * 1e6:,.0f} us",
        )
        speed = line.tokens_per_second
        share = line.tokens_per_second / lines[0].tokens_per_second
        shown.add_row(line.name, *times, f"{line.hit_rate:.0%}", f"{speed:,.1f}", f"{share:.1%}")
    Console().print(shown)
    return 0


def tables_in(path: Path, name: str | None) -> list[tuple[Path, str]]:
    """Returns the path and the tensor's name of each table: a run's by number, or one.

    One table is that of a file or folder.
    """
    if name is None and (path / "config.json").is_file():
        from rorqual.tables import placement

        count = len(placement.table_names(path / "model.safetensors")) or len(
            list(path.glob("tables/*"))
        )
        if not count:
            raise ValueError(f"{path}: got a run without tables, expected a model with Engram")
        return placement.table_places(path, count, placement.TableConfig())
    return [(path, name or "rows")]


def _dtype(name: str) -> Any:
    """Returns torch's dtype of an option; fp8 is e4m3."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[name]


class _ProgressBar:
    """Shows bytes done as a bar on a terminal, and nothing elsewhere."""

    def __init__(self, total: int) -> None:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._shown = Progress(*columns, console=Console(stderr=True), transient=True)
        self._total = total

    def __enter__(self) -> Callable[[int], None]:
        self._shown.start()
        task = self._shown.add_task("", total=self._total)
        return lambda done: self._shown.update(task, completed=done)

    def __exit__(self, *raised: object) -> None:
        self._shown.stop()


VERBS: dict[str, tuple[type, Callable[[Any, bool], int]]] = {
    "build": (Build, build),
    "inspect": (Inspect, inspect),
    "verify": (Verify, verify),
    "convert": (Convert, convert),
    "hot": (Hot, hot),
    "bench": (Bench, bench),
}
