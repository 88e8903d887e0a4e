"""Writes the files of a table: from a tensor, from another table, or of random numbers.

    rows -> rows in the table's format -> NAME.partial/table-00001-of-00004.safetensors, ... -> NAME

Few rows are in memory at a time. A shard appears whole or not at all, and the table with its last
shard. The same command resumes a build that was stopped, after its last whole shard.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from rorqual.io import Checksum, atomic_write, lock_beside, remove_partial, rename
from rorqual.tables.fp8 import FP8, convert_rows, row_bytes, stored_as
from rorqual.tables.row_file import BLANK, CHECKED_BYTES, FORMAT, KINDS, RowFile, checksums

Source = Callable[[int, int], Tensor]  # (first, end) -> those rows, as numbers or as fp8 records
Progress = Callable[[int], None]  # called with the bytes of rows written so far

_PIECE = 16 << 20  # bytes of rows made and written at a time
_MAX_SHARD = 1 << 39  # bytes, whose checksums are 8 MiB of a header; readers take 16
_ORIGIN = "origin.json"  # in the folder of a build that is not finished: what it is made of


def write_table(
    folder: str | os.PathLike[str],
    values: Shaped[Tensor, "rows stored"],
    *,
    dtype: torch.dtype | None = None,
    shard_rows: int | None = None,
) -> Path:
    """Writes a tensor as a table. ValueError if something is there.

    values: float32 or bfloat16 [rows, width], or fp8 records in bytes. dtype: the format of the
    files, float32, bfloat16 or float8_e4m3fn (fp8 records); that of `values` if None.
    shard_rows: a GiB of rows if None.
    """
    width, stored = stored_as(values)
    row_bytes(width, stored)

    def source(first: int, end: int) -> Tensor:
        return values[first:end].detach().cpu()

    return _Build(len(values), width, dtype or stored, source, shard_rows).write(Path(folder))


def write_rows(folder: str | os.PathLike[str], rows: int, width: int, source: Source) -> Path:
    """Writes float32 rows that `source(first, end)` returns part by part."""
    return _Build(rows, width, torch.float32, source).write(Path(folder))


def convert(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    name: str = "rows",
    dtype: torch.dtype | None = None,
    shard_rows: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the table `name` of a file or folder again, in another format or other shards.

    TableError if the source is not sound.
    """
    file = RowFile(path, name)
    try:
        files = [(shard.path.resolve(), shard.path.stat()) for shard in file.shards]
        stamps = [[str(path), about.st_size, about.st_mtime_ns] for path, about in files]
        origin = ["rows of", name, stamps]
        build = _Build(
            file.rows, file.width, dtype or file.dtype, file.stored, shard_rows, origin, progress
        )
        return build.write(Path(folder))
    finally:
        file.close()


def draw_table(
    folder: str | os.PathLike[str],
    rows: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    std: float = 0.02,
    seed: int = 0,
    shard_rows: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes a table of normal numbers; the same arguments give the same bytes."""
    if min(rows, width) < 1 or not 0 <= std < float("inf") or seed < 0:
        got = f"{rows} rows of width {width}, deviation {std}, seed {seed}"
        raise ValueError(f"table: got {got}, expected at least 1, 1, 0 and 0")

    def source(first: int, end: int) -> Tensor:
        # NumPy's generator uses all bits of the seed; torch's would use 32.
        generator = np.random.default_rng([seed, first])
        values = generator.standard_normal((end - first, width), dtype=np.float32)
        return torch.from_numpy(values).mul_(std)

    origin = ["drawn", std, seed]
    return _Build(rows, width, dtype, source, shard_rows, origin, progress).write(Path(folder))


@dataclass
class _Build:
    """A table to be written. Without an origin, nothing of a stopped build is used again."""

    rows: int
    width: int
    dtype: torch.dtype
    source: Source
    shard_rows: int | None = None
    origin: list | None = None
    progress: Progress | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the files."""
        return row_bytes(self.width, self.dtype)

    def write(self, folder: Path) -> Path:
        """Writes all shards beside the table's place, then renames their folder."""
        partial = self._new_folder(folder)
        refusal = f"{partial}: another process writes this table, expected one at a time"
        with lock_beside(partial, refusal):
            remove_partial(partial)
            if self.origin is None:
                # Rows that a process had in memory may be others now.
                _remove_shards(partial)
            try:
                self._write_shards(partial)
            except BaseException:
                if self.origin is None:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            rename(partial, folder)
            # Removed last: until the table has its name, the same command can resume the build.
            (folder / _ORIGIN).unlink()
        return folder

    def _shard_rows(self) -> int:
        """Returns the rows of a shard: those asked for, else a GiB.

        ValueError for shards whose checksums a header cannot hold.
        """
        if self.shard_rows is None:
            return max(1, (1 << 30) // self.row_bytes)
        rows = min(self.shard_rows, self.rows)
        if not 1 <= rows * self.row_bytes <= max(self.row_bytes, _MAX_SHARD):
            largest = max(1, _MAX_SHARD // self.row_bytes)
            raise ValueError(
                f"table: got {rows} rows a shard, expected 1 to {largest}:"
                " its checksums fill the header"
            )
        return rows

    def _new_folder(self, folder: Path) -> Path:
        """Returns the folder to write into. ValueError if it is taken, or the disk is too small."""
        if folder.name in ("", ".."):
            got = f"{str(folder)!r}, which has no name of its own"
            raise ValueError(f"got {got}, expected a new or empty folder's")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"got {folder}, which is there, expected a new or empty folder")
        partial = folder.with_name(folder.name + ".partial")
        note = partial / _ORIGIN
        text = json.dumps([self.origin, self.rows, self.width, str(self.dtype), self._shard_rows()])
        if partial.exists() and (not note.is_file() or note.read_text(encoding="utf-8") != text):
            raise ValueError(
                f"{partial}: got the beginning of another table, expected none: finish it by the"
                " command that began it, or delete the folder"
            )
        partial.mkdir(parents=True, exist_ok=True)
        needed = self.rows * self.row_bytes
        free = shutil.disk_usage(partial).free
        if needed > free + sum(file.stat().st_size for file in partial.iterdir()):
            if not any(partial.iterdir()):
                partial.rmdir()
            raise ValueError(
                f"{folder}: got a disk with {free:,} bytes free, expected {needed:,} for the table"
            )
        note.write_text(text, encoding="utf-8")
        return partial

    def _write_shards(self, partial: Path) -> None:
        """Writes the shards that are not there yet."""
        shard_rows = self._shard_rows()
        starts = range(0, self.rows, shard_rows)
        for number, first in enumerate(starts, 1):
            end = min(first + shard_rows, self.rows)
            path = partial / f"table-{number:05d}-of-{len(starts):05d}.safetensors"
            if not path.exists():
                self._write_shard(path, first, end)
            if self.progress is not None:
                self.progress(end * self.row_bytes)

    def _write_shard(self, path: Path, first: int, end: int) -> None:
        """Writes rows first..end as one shard, and then their checksums into its header."""
        blocks = -(-(end - first) * self.row_bytes // CHECKED_BYTES)
        with atomic_write(path) as beside, beside.open("wb") as file:
            file.write(self._header(first, end, BLANK * blocks))
            sums = "".join(checksums(self._written(file, first, end)))
            file.seek(0)
            file.write(self._header(first, end, sums))

    def _written(self, file: BinaryIO, first: int, end: int) -> Iterator[memoryview]:
        """Writes rows part by part, and yields the bytes of each part."""
        step = max(1, _PIECE // self.row_bytes)
        for start in range(first, end, step):
            piece = convert_rows(
                self.source(start, min(start + step, end)), self.dtype
            ).contiguous()
            raw = piece.view(torch.uint8).numpy().data.cast("B")
            file.write(raw)
            yield raw

    def _header(self, first: int, end: int, sums: str) -> bytes:
        """Returns the bytes before the rows; their number does not depend on the checksums."""
        metadata = {
            "xxh3_header": BLANK,
            "first_row": str(first),
            "rows_in_all": str(self.rows),
            "xxh3_per_mib": sums,
        }
        if self.dtype == FP8:
            metadata |= {"format": FORMAT, "width": str(self.width)}
        kind = next(word for word, dtype in KINDS.items() if dtype == self.dtype)
        entry = {
            "dtype": kind,
            "shape": [end - first, self.row_bytes // self.dtype.itemsize],
            "data_offsets": [0, (end - first) * self.row_bytes],
        }
        text = json.dumps({"__metadata__": metadata, "rows": entry}).encode()
        text += b" " * (-len(text) % 8)
        text = text.replace(BLANK.encode(), Checksum(text).hexdigest().encode(), 1)
        return len(text).to_bytes(8, "little") + text


def _remove_shards(partial: Path) -> None:
    """Removes everything from the folder of a build but the note of what it is made of."""
    for file in partial.iterdir():
        if file.name != _ORIGIN:
            file.unlink()
