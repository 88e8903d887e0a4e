"""Rows, part by part, in -> a table's files out: from a tensor, from another table, or drawn.

    rows -> as `dtype` keeps them -> NAME.partial/table-00001-of-00004.safetensors, ... -> NAME

No more than a part of a shard is ever in memory. A shard appears whole or not at all, the table when its last shard is
there. A build that was stopped goes on after its last whole shard when it is asked for again, and no other may take its
place.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from jaxtyping import Shaped
from torch import Tensor

from rorqual.io import atomic_write, flush, lock, remove_partial
from rorqual.tables.fp8 import FP8, dequantise, kept_as, quantise, row_bytes
from rorqual.tables.row_file import BLANK, BLOCK_BYTES, FORMAT, KINDS, Shard, open_shards

Source = Callable[[int, int], Tensor]  # (first, end) -> those rows, as numbers or as fp8 records

_PART = 16 << 20  # bytes of rows made and written at a time
_SHARD = 1 << 39  # bytes, whose checksums are 8 MiB of a header; no reader takes one of more than 16
_NOTE = "origin.json"  # what a build that is not finished is made of


class Plan(NamedTuple):
    """A table to be written: how many rows of which width, kept how, and from where."""

    rows: int
    width: int
    dtype: torch.dtype
    source: Source

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.width, self.dtype)


def write_table(
    folder: str | os.PathLike[str],
    values: Shaped[Tensor, "rows kept"],
    *,
    dtype: torch.dtype | None = None,
    shard_rows: int | None = None,
) -> Path:
    """Writes a table as shards that DiskTable reads. ValueError if something is there.

    values: float32 or bfloat16 [rows, width], or fp8 records in bytes. dtype: what they are to be kept in, float32,
    bfloat16 or float8_e4m3fn (fp8 records); as they are if none. shard_rows: a GiB of them if none. Every MiB gets a
    checksum, which `verify` reads.
    """
    width, given = kept_as(values)
    row_bytes(width, given)
    plan = Plan(len(values), width, dtype or given, lambda first, end: values[first:end].detach().cpu())
    return _write(Path(folder), plan, shard_rows, None)


def write_rows(folder: str | os.PathLike[str], rows: int, width: int, source: Source) -> Path:
    """Writes float32 rows that `source(first, end)` gives, part by part."""
    return _write(Path(folder), Plan(rows, width, torch.float32, source), None, None)


def convert(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    name: str = "rows",
    dtype: torch.dtype | None = None,
    shard_rows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the table `name` of a file or folder again, in another format or other shards, part by part.

    progress: told the bytes of rows written so far. TableError where the source is not sound.
    """
    path, shards = Path(path), open_shards(Path(path), name)
    try:
        first = shards[0]
        told = [[str(shard.path.resolve()), *_stamp(shard.path)] for shard in shards]
        plan = Plan(sum(shard.rows for shard in shards), first.width, dtype or first.dtype, _stored(shards))
        return _write(Path(folder), plan, shard_rows, ["rows of", name, told], progress)
    finally:
        for shard in shards:
            shard.close()


def draw_table(
    folder: str | os.PathLike[str],
    rows: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    std: float = 0.02,
    seed: int = 0,
    shard_rows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes a table of normal numbers; the same arguments give the same bytes. progress: as for `convert`."""
    if min(rows, width) < 1 or not 0 <= std < float("inf") or seed < 0:
        got = f"{rows} rows of width {width}, deviation {std}, seed {seed}"
        raise ValueError(f"table: got {got}, expected at least 1, 1, 0 and 0")

    def source(first: int, end: int) -> Tensor:
        own = np.random.default_rng([seed, first])  # torch's generator would heed 32 bits of this
        return torch.from_numpy(own.standard_normal((end - first, width), dtype=np.float32)).mul_(std)

    return _write(Path(folder), Plan(rows, width, dtype, source), shard_rows, ["drawn", std, seed], progress)


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a file is written again."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _stored(shards: list[Shard]) -> Source:
    """Rows of an open table, as it keeps them."""
    kind = torch.uint8 if shards[0].dtype == FP8 else shards[0].dtype

    def source(first: int, end: int) -> Tensor:
        raw, at, begin = torch.empty(end - first, shards[0].row_bytes, dtype=torch.uint8), 0, 0
        for shard in shards:
            low, high = max(first, begin), min(end, begin + shard.rows)
            if low < high:
                shard.read(low - begin, raw[at : at + high - low].numpy().data.cast("B"))
                at += high - low
            begin += shard.rows
        return raw.view(kind)

    return source


def _write(
    folder: Path,
    plan: Plan,
    shard_rows: int | None,
    origin: list | None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """All shards beside the table's place, then the table into its place. Without an origin nothing half is kept."""
    usual = max(1, (1 << 30) // plan.row_bytes)
    shard_rows = usual if shard_rows is None else min(shard_rows, plan.rows)
    if not 1 <= shard_rows * plan.row_bytes <= max(plan.row_bytes, _SHARD):
        most = max(1, _SHARD // plan.row_bytes)
        raise ValueError(f"table: got {shard_rows} rows a shard, expected 1 to {most}: its checksums fill the header")
    text = json.dumps([origin, plan.rows, plan.width, str(plan.dtype), shard_rows])
    partial = _begin(folder, plan, text)
    with _alone(partial):
        remove_partial(partial)
        if origin is None:
            _clear(partial)  # of rows that a process had in memory: nobody knows whether they are the same now
        try:
            _write_shards(partial, plan, shard_rows, progress)
        except BaseException:
            if origin is None:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(folder)
        flush(folder.parent)
        (folder / _NOTE).unlink()  # last: until the table has its name, the same command goes on
    return folder


def _write_shards(partial: Path, plan: Plan, shard_rows: int, progress: Callable[[int], None] | None) -> None:
    """Those that are not there yet."""
    starts = range(0, plan.rows, shard_rows)
    for number, start in enumerate(starts):
        target, end = partial / f"table-{number + 1:05d}-of-{len(starts):05d}.safetensors", start + shard_rows
        if not target.exists():
            _write_shard(target, plan, start, min(end, plan.rows))
        if progress is not None:
            progress(min(end, plan.rows) * plan.row_bytes)


def _clear(partial: Path) -> None:
    for file in partial.iterdir():
        if file.name != _NOTE:
            file.unlink()


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """While no other process writes this table. ValueError if one does."""
    place = partial.with_name(partial.name + ".lock")
    with lock(place, f"{partial}: another process writes this table, expected one at a time"):
        try:
            yield
        finally:
            # before the release, or two processes may hold locks on two files of this name; Windows deletes none
            with suppress(OSError):
                place.unlink()


def _begin(folder: Path, plan: Plan, text: str) -> Path:
    """The folder to write into, new or of the same build. ValueError where something else is in the way."""
    if folder.name in ("", ".."):
        raise ValueError(f"got {str(folder)!r}, which has no name of its own, expected a new or empty folder's")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"got {folder}, which is there, expected a new or empty folder")
    partial = folder.with_name(folder.name + ".partial")
    note = partial / _NOTE
    if partial.exists() and (not note.is_file() or note.read_text(encoding="utf-8") != text):
        raise ValueError(
            f"{partial}: got the beginning of another table, expected none: finish it by the command that began it,"
            " or delete the folder"
        )
    partial.mkdir(parents=True, exist_ok=True)
    needed, free = plan.rows * plan.row_bytes, shutil.disk_usage(partial).free
    if needed > free + sum(file.stat().st_size for file in partial.iterdir()):
        partial.rmdir() if not any(partial.iterdir()) else None
        raise ValueError(f"{folder}: got a disk with {free:,} bytes free, expected {needed:,} for the table")
    note.write_text(text, encoding="utf-8")
    return partial


def _write_shard(target: Path, plan: Plan, first: int, end: int) -> None:
    """Rows first..end of the table, the checksums last, on the disk before the file has its name."""
    step, sums = max(1, _PART // plan.row_bytes), Checksums()
    with atomic_write(target) as beside, beside.open("wb") as file:
        file.write(_header(plan, first, end, "0" * 16 * -(-(end - first) * plan.row_bytes // BLOCK_BYTES)))
        for at in range(first, end, step):
            part = _kept(plan.source(at, min(at + step, end)), plan.dtype).contiguous()
            raw = part.view(torch.uint8).numpy().data.cast("B")
            file.write(raw)
            sums.add(raw)
        file.seek(0)
        file.write(_header(plan, first, end, sums.digits()))


def _header(plan: Plan, first: int, end: int, sums: str) -> bytes:
    """What stands before the rows, in safetensors' words; as long for one set of checksums as for another."""
    metadata = {"xxh3_header": BLANK, "first_row": str(first), "rows_in_all": str(plan.rows), "xxh3_per_mib": sums}
    kept = plan.row_bytes // plan.dtype.itemsize
    if plan.dtype == FP8:
        metadata |= {"format": FORMAT, "width": str(plan.width)}
    kind = next(word for word, dtype in KINDS.items() if dtype == plan.dtype)
    entry = {"dtype": kind, "shape": [end - first, kept], "data_offsets": [0, (end - first) * plan.row_bytes]}
    text = json.dumps({"__metadata__": metadata, "rows": entry}).encode()
    text += b" " * (-len(text) % 8)
    text = text.replace(BLANK.encode(), xxhash.xxh3_64_hexdigest(text).encode(), 1)
    return len(text).to_bytes(8, "little") + text


def _kept(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as numbers or records -> the same rows as `dtype` keeps them."""
    width, now = kept_as(values)
    if now == dtype:
        return values
    numbers = dequantise(values, width) if now == FP8 else values
    return quantise(numbers) if dtype == FP8 else numbers.to(dtype)


class Checksums:
    """Bytes in any pieces -> 16 hexadecimal digits for every MiB of them."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._block, self._held = xxhash.xxh3_64(), 0

    def add(self, raw: memoryview) -> None:
        at = 0
        while at < len(raw):
            part = raw[at : at + BLOCK_BYTES - self._held]
            self._block.update(part)
            self._held += len(part)
            at += len(part)
            if self._held == BLOCK_BYTES:
                self._close()

    def _close(self) -> None:
        self._done.append(self._block.hexdigest())
        self._block, self._held = xxhash.xxh3_64(), 0

    def digits(self) -> str:
        """Of everything added; the last block may be shorter."""
        if self._held:
            self._close()
        return "".join(self._done)
