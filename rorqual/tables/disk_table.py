"""Row ids in -> rows out of a safetensors file, or a folder of shards, read at their positions and never mapped.

Rows that lie side by side are one read. What the system has in memory is copied; of the rest it is told ahead, or asked
by many threads at once, so that the disk answers many reads at a time (kernels.files).
"""

import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from rorqual.io import read_at, write_at
from rorqual.kernels import pick
from rorqual.tables.row_file import Shard, TableError, open_shards
from rorqual.tables.table import Fetched, check_ids
from rorqual.tables.thread import BackgroundThread

_RUN = 1 << 20  # bytes; a run of rows ends where it passes a multiple of it
_AHEAD = 1024  # reads that the system is told of before the first of them


def read_places(
    files: Int[np.ndarray, " K"],
    offsets: Int[np.ndarray, " K"],
    sizes: Int[np.ndarray, " K"],
    places: Int[np.ndarray, " K"],
    into: UInt8[np.ndarray, " bytes"],
    wait: bool = True,
) -> Bool[np.ndarray, " K"]:
    """Fills into[places[k]:][:sizes[k]] from byte offsets[k] of the open file files[k]; which k the file did not give.

    What lies where nothing was read is anything. Without `wait` what the system does not hold in memory is not given.
    """
    target, failed = into.data.cast("B"), np.zeros(len(files), np.bool_)
    if not wait and not (hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")):
        return ~failed
    columns = (files, offsets, sizes, places)
    reads = list(zip(*(column.tolist() for column in columns), strict=True))
    for k, (file, offset, size, place) in enumerate(reads):
        if wait and k % _AHEAD == 0 and len(reads) > 1:
            _foretell(reads[k : k + _AHEAD])
        try:
            part = target[place : place + size]
            failed[k] = (
                read_at(file, part, offset) if wait else os.preadv(file, [part], offset, os.RWF_NOWAIT)
            ) != size
        except OSError:
            failed[k] = True
    return failed


def _foretell(reads: list[tuple[int, int, int, int]]) -> None:
    for file, offset, size, _ in reads:
        if file >= 0 and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, offset, size, os.POSIX_FADV_WILLNEED)


def write_places(
    files: Int[np.ndarray, " K"],
    offsets: Int[np.ndarray, " K"],
    sizes: Int[np.ndarray, " K"],
    places: Int[np.ndarray, " K"],
    given: UInt8[np.ndarray, " bytes"],
) -> Bool[np.ndarray, " K"]:
    """The inverse of `read_places`: which k the file did not take whole."""
    source, failed = given.data.cast("B"), np.zeros(len(files), np.bool_)
    columns = (files, offsets, sizes, places)
    for k, (file, offset, size, place) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        try:
            failed[k] = write_at(file, source[place : place + size], offset) != size
        except OSError:
            failed[k] = True
    return failed


def _few_rows() -> None:
    """Stands for the way that many rows go where a twin for few is looked for."""


class DiskTable(Fetched):
    """Rows in one safetensors file, or in a folder of shards, read at their positions and never mapped."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        name: str = "rows",
        hot_bytes: int = 64 << 20,
        hot_rows: Int[Tensor, " H"] | None = None,
        prefetch: bool = True,
        thread: BackgroundThread | None = None,
    ) -> None:
        """`name` is the tensor's: any float32 or bfloat16 matrix of any safetensors file, or a table of fp8 records.

        hot_rows: ids, most wanted first; as many of these rows as `hot_bytes` hold are read now and kept for good.
        Without them the rows that were read last are kept.
        """
        self._shards = open_shards(Path(path), name)
        first = self._shards[0]
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
        self._begins = np.array([shard.start for shard in self._shards])
        self._files = np.array([shard.file for shard in self._shards])
        # where the last failed read began, and its bytes
        self._lost: tuple[Shard, int, int] | None = None
        super().__init__(int(self._starts[-1]), first.width, first.dtype, hot_bytes, prefetch, thread)
        slots = self._cache.slots
        if hot_rows is not None and len(hot_rows) and slots:
            check_ids(hot_rows, self.rows)
            ids, seen = np.unique(hot_rows.numpy(), return_index=True)
            wanted = np.sort(ids[np.argsort(seen)[:slots]])
            rows = self._read(wanted)
            assert rows is not None
            self._cache.insert(wanted, rows)
            self._cache.frozen = True

    def _at_once(self, ids: np.ndarray) -> Tensor | None:
        few = pick("few_rows", _few_rows, torch.device("cpu"))
        if few is _few_rows or not hasattr(self._cache, "arrays"):
            return super()._at_once(ids)
        found = torch.empty(len(ids), self.row_bytes, dtype=torch.uint8)
        with self._lock:
            told = few(ids, self._starts, self._files, self._begins, self._cache, found)
            if told is None:
                return None
            different, hits = told
            self._count(rows=len(ids), different=different, hits=hits, bytes=(different - hits) * self.row_bytes)
        return self._numbers(found)

    def _read(self, ids: np.ndarray, wait: bool = True) -> Tensor | None:
        raw = torch.empty(len(ids), self.row_bytes, dtype=torch.uint8)
        which, first, begins, ends = self._runs(ids)
        files, starts, size = self._files[which], self._begins[which], self.row_bytes
        read = pick("read_places", read_places, raw)
        where = (files, starts + first * size, (ends - begins) * size, begins * size)
        failed = read(*where, raw.numpy().reshape(-1), wait)
        if not wait and failed.any():
            return None
        for k in np.flatnonzero(failed).tolist():  # once more, for the reason
            target = raw.numpy()[begins[k] : ends[k]].data.cast("B")
            self._lost = (self._shards[which[k]], int(first[k]), len(target))
            self._shards[which[k]].read(int(first[k]), target)
            self._lost = None
        self._count(bytes=raw.numel())
        return raw

    def _runs(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rising ids cut into runs of neighbours: their shard, its row, and from where to where they stand in `ids`.

        A run ends where its shard does or it would grow too long.
        """
        which = np.searchsorted(self._starts, ids, side="right") - 1
        within = ids - self._starts[which]
        apart = (np.diff(within) != 1) | (np.diff(which) != 0) | (np.diff(within * self.row_bytes // _RUN) != 0)
        edges = np.flatnonzero(np.concatenate([[True], apart, [True]]))
        begins, ends = edges[:-1], edges[1:]
        return which[begins], within[begins], begins, ends

    def damage(self) -> str | None:
        """Why rows can no longer be read, naming the file; None while they can.

        It looks whether each file is still there and holds its last row, and reads again what a
        recall could not read.
        """
        lost = self._lost
        try:
            for shard in self._shards:
                os.stat(shard.path)
                shard.read(shard.rows - 1, memoryview(bytearray(shard.row_bytes)))
            if lost is not None:
                shard, row, size = lost
                shard.read(row, memoryview(bytearray(size)))
        except TableError as error:
            return str(error)
        except OSError as error:
            return f"{shard.path}: {error.strerror}"
        if self._lost is lost:
            self._lost = None
        return None

    def drop_page_cache(self) -> None:
        """Has the system drop what it holds of the files in memory, so that the disk itself is measured."""
        for shard in self._shards:
            os.fsync(shard.file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(shard.file, 0, 0, os.POSIX_FADV_DONTNEED)

    def fill_page_cache(self) -> None:
        """Has the system read the files whole, so that no row waits for the disk as long as memory holds them."""
        buffer = bytearray(_RUN)
        for shard in self._shards:
            at = 0
            while got := read_at(shard.file, memoryview(buffer), at):
                at += got

    def close(self) -> None:
        """Ends the worker and closes the files."""
        super().close()
        with self._lock:  # whoever asks from another thread reads from all files or from none
            for shard in self._shards:
                shard.close()
            self._files[:] = -1
