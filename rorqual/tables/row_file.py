"""Reads the files of a table: safetensors shards, checked before the first row is read.

    table-00001-of-00004.safetensors    a matrix `rows`: float32, bfloat16, or bytes (fp8 records)
    first_row, rows_in_all              where the shard stands in its table
    format, width                       of fp8 records alone
    xxh3_header                         a checksum of the header, with 16 zeros in its own place
    xxh3_per_mib                        a checksum of every 2^20 bytes of rows, 16 digits each

Rows are read by position. A file that is not sound is refused with TableError, which names the file
and the reason. Files are never mapped: one that is cut while it is read fails a call and not the
process.
"""

import json
import math
import os
import stat
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from rorqual.io import BINARY, Checksum, flush_open, read_at, write_all_at
from rorqual.kernels import kernel
from rorqual.tables.fp8 import BLOCK, FP8, dequantise

KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": FP8}
# bytes of a number in each dtype whose extent is checked, as safetensors names them
SIZES = {name: dtype.itemsize for name, dtype in KINDS.items()} | {"F8_E4M3": 1, "F8_E8M0": 1}
FORMAT = "fp8-e4m3-e8m0-32"
BLANK = "0" * 16  # stands for the header's checksum while it is computed
CHECKED_BYTES = 1 << 20  # bytes that share a checksum
_PIECE = 1 << 18  # bytes that verification reads at a time: they stay in a core's cache
_MAX_HEADER = 16 << 20  # bytes; a header has a few hundred, and 16 a MiB of rows
_MAX_DIGITS = 20  # digits of a number of rows
_MAX_AXES = 64  # torch's limit; the product of a million sizes would take hours
ONE_FILE = np.array([0, np.iinfo(np.int64).max])  # the first rows of a file and of the next
_ANNOUNCED = 512  # reads that one thread makes after announcing all of them to the system
_THREADS = 32  # threads that share more reads, so that the disk can order many of them


class TableError(ValueError):
    """An error: a table's file cannot be used. The message names the file and the reason."""


class FileRows:
    """Rows of equal size in one open file, from byte `start` on."""

    def __init__(self, path: Path, file: int, start: int, row_bytes: int) -> None:
        self.path = path
        self.file = file
        self.start = start
        self.row_bytes = row_bytes

    def read(self, ids: Int[np.ndarray, " K"], into: UInt8[np.ndarray, "K bytes"]) -> None:
        """Reads rows. TableError names the first one that the file does not have."""
        read_from([self], ONE_FILE, ids, into)

    def read_bytes(self, into: memoryview, offset: int) -> None:
        """Fills `into` with bytes from byte `offset` of the rows on."""
        got = 0
        try:
            while self.file >= 0 and got < len(into):
                more = read_at(self.file, into[got:], self.start + offset + got)
                if not more:
                    break
                got += more
        except OSError as error:
            row = (offset + got) // self.row_bytes
            raise TableError(f"{self.path}: {error.strerror} at row {row}") from error
        if got < len(into):
            row, left = divmod(offset + got, self.row_bytes)
            raise TableError(
                f"{self.path}: got {left} bytes of row {row}, expected {self.row_bytes}:"
                " cut or closed since it opened"
            )

    def write(self, ids: Int[np.ndarray, " K"], rows: UInt8[np.ndarray, "K bytes"]) -> None:
        """Writes rows of rising ids. TableError names the row that could not be written."""
        source = np.ascontiguousarray(rows).reshape(-1).data
        size = self.row_bytes
        for offset, count, _, row in _runs(ids, ONE_FILE):
            try:
                piece = source[offset * size : (offset + count) * size]
                write_all_at(self.file, piece, self.start + row * size)
            except OSError as error:
                got = f"got {error.strerror} at row {row}"
                raise TableError(f"{self.path}: {got}, expected room for it") from error


def read_from(
    files: Sequence[FileRows],
    first_rows: Int[np.ndarray, " F1"],
    ids: Int[np.ndarray, " K"],
    into: UInt8[np.ndarray, "K bytes"],
    share: bool = True,
) -> None:
    """Reads rows from several files. TableError names the first one that its file does not have.

    File n has the rows first_rows[n] to first_rows[n + 1]. share: False in one of the threads that
    share many reads; else few are announced to the system before any is waited for.
    """
    if share and 1 + np.count_nonzero(np.diff(ids) != 1) > _ANNOUNCED:
        count = -(-len(ids) // _THREADS)
        pieces = [slice(start, start + count) for start in range(0, len(ids), count)]
        with ThreadPoolExecutor(_THREADS) as threads:
            list(
                threads.map(
                    lambda piece: read_from(files, first_rows, ids[piece], into[piece], False),
                    pieces,
                )
            )
        return
    descriptors = np.array([each.file for each in files])
    starts = np.array([each.start for each in files])
    done = read_rows(descriptors, starts, first_rows, ids, into, False) if share else 0
    while True:
        done += read_rows(descriptors, starts, first_rows, ids[done:], into[done:], True)
        if done >= len(ids):
            return
        # This row is read once more, for the reason why it could not be read.
        n = int(np.searchsorted(first_rows, ids[done], side="right")) - 1
        row = int(ids[done] - first_rows[n])
        files[n].read_bytes(into[done].data, row * files[n].row_bytes)
        done += 1


def read_once(
    files: Sequence[FileRows],
    first_rows: np.ndarray,
    ids: np.ndarray,
    into: np.ndarray,
    wait: bool = True,
) -> int:
    """Calls read_rows, which reads what it can without waiting, or waits for the disk."""
    descriptors = np.array([each.file for each in files])
    starts = np.array([each.start for each in files])
    return read_rows(descriptors, starts, first_rows, ids, into, wait)


@kernel(
    numba="rorqual.kernels.files:read_rows",
    missing="" if hasattr(os, "RWF_NOWAIT") else "this system has no preadv2 with RWF_NOWAIT",
)
def read_rows(
    files: Int[np.ndarray, " F"],
    starts: Int[np.ndarray, " F"],
    first_rows: Int[np.ndarray, " F1"],
    ids: Int[np.ndarray, " K"],
    into: UInt8[np.ndarray, "K bytes"],
    wait: bool,
) -> int:
    """Reads rows from open files; returns the place of the first that was not read, or K.

    File n has the rows first_rows[n] to first_rows[n + 1], from byte starts[n] on. Without `wait`,
    rows are read that the system has in memory, and the disk starts to read the others.
    """
    size = into.shape[1]
    target = into.reshape(-1).data
    first_missing = len(ids)
    for offset, count, n, row in _runs(ids, first_rows):
        piece = target[offset * size : (offset + count) * size]
        try:
            got = _read_run(int(files[n]), piece, int(starts[n]) + row * size, wait)
        except OSError:
            got = 0
        if got < len(piece):
            first_missing = min(first_missing, offset + got // size)
            if wait:
                break
    return first_missing


def _read_run(file: int, into: memoryview, offset: int, wait: bool) -> int:
    """Reads a run of rows, waiting for the disk or not, and returns how many bytes were read."""
    if wait:
        return read_at(file, into, offset)
    got = 0
    if hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT"):
        with suppress(BlockingIOError):
            got = os.preadv(file, [into], offset, os.RWF_NOWAIT)
    if got < len(into) and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, len(into), os.POSIX_FADV_WILLNEED)
    return got


def _runs(ids: np.ndarray, first_rows: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Cuts ids into runs of rows that follow each other in one file.

    Returns the place of each run in `ids`, its number of rows, its file, and its row in the file.
    """
    files = np.searchsorted(first_rows, ids, side="right") - 1
    apart = (np.diff(ids, prepend=-2) != 1) | (np.diff(files, prepend=-1) != 0)
    places = np.flatnonzero(apart)
    counts = np.diff(places, append=len(ids))
    files = files[places]
    columns = (places, counts, files, ids[places] - first_rows[files])
    return list(zip(*(column.tolist() for column in columns), strict=True))


class TensorShard(FileRows):
    """The rows of one tensor of a safetensors file, whose header is checked before any is read.

    `kind` is their dtype, as safetensors names it, one of `kinds`; they have `columns` numbers.
    """

    def __init__(self, path: Path, name: str, kinds: Mapping[str, torch.dtype]) -> None:
        try:
            # Without O_NONBLOCK, opening a pipe would wait for a writer.
            file = os.open(path, os.O_RDONLY | BINARY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise TableError(f"{path}: {error.strerror}") from error
        # The finalizer also closes the file of a table that is garbage-collected.
        self._close = weakref.finalize(self, os.close, file)
        try:
            self.metadata, entry, start = read_header(path, file, name, kinds)
        except OSError as error:
            self._close()
            raise TableError(f"{path}: {error.strerror}") from error
        except Exception:
            self._close()
            raise
        self.kind: str = entry["dtype"]
        self.rows, self.columns = entry["shape"]
        super().__init__(path, file, start, self.columns * kinds[self.kind].itemsize)

    def close(self) -> None:
        """Closes the file; later reads are refused."""
        self._close()
        self.file = -1


class Shard(TensorShard):
    """A shard of a table that `write_table` or a run wrote.

    rows, width, dtype: of the table's numbers; row_bytes: of one row in the file.
    """

    def __init__(self, path: Path, name: str) -> None:
        super().__init__(path, name, KINDS)
        self.dtype = KINDS[self.kind]
        self.width = self.columns
        if self.dtype == FP8:
            try:
                self.width = _fp8_width(path, self.metadata, self.columns)
            except TableError:
                self.close()
                raise

    def damaged(self) -> list[int]:
        """Returns the numbers of the MiB that are not as they were written.

        TableError without checksums.
        """
        size = self.rows * self.row_bytes
        noted = self.metadata.get("xxh3_per_mib", "")
        if len(noted) != 16 * -(-size // CHECKED_BYTES):
            expected = "expected a file that write_table wrote"
            raise TableError(f"{self.path}: got no checksum for each MiB, {expected}")
        digests = checksums(self._pieces(size))
        return [n for n, digest in enumerate(digests) if digest != noted[16 * n : 16 * n + 16]]

    def _pieces(self, size: int) -> Iterator[memoryview]:
        """Yields the bytes of all rows in pieces of one buffer, which the next piece overwrites."""
        buffer = memoryview(bytearray(_PIECE))
        for start in range(0, size, _PIECE):
            piece = buffer[: min(_PIECE, size - start)]
            self.read_bytes(piece, start)
            yield piece

    def rows_of(self, block: int) -> range:
        """Returns the rows of the table that lie in one MiB of this shard."""
        first = block * CHECKED_BYTES // self.row_bytes
        end = min(-(-(block + 1) * CHECKED_BYTES // self.row_bytes), self.rows)
        shift = int(self.metadata["first_row"])
        return range(shift + first, shift + end)


class RowFile:
    """A table's rows in one safetensors file, or in a folder of shards."""

    def __init__(self, path: str | os.PathLike[str], name: str = "rows") -> None:
        """Opens and checks all shards; `name` is the tensor's.

        TableError for files that are not sound.
        """
        shards = open_shards(Path(path), name)
        self.shards: Sequence[TensorShard] = shards
        first = shards[0]
        self.width = first.width
        self.dtype = first.dtype
        self.row_bytes = first.row_bytes
        # the first row of each shard, and of the one that would follow
        self._first_rows = np.cumsum([0, *(shard.rows for shard in self.shards)])
        self.rows = int(self._first_rows[-1])
        self._failed: np.ndarray | None = None

    def read(self, ids: Int[np.ndarray, " K"]) -> UInt8[Tensor, "K bytes"]:
        """Returns the rows `ids` as they are stored, whatever shard each is in."""
        raw = np.empty((len(ids), self.row_bytes), np.uint8)
        try:
            read_from(self.shards, self._first_rows, ids, raw)
        except TableError:
            self._failed = ids
            raise
        return torch.from_numpy(raw)

    def read_cached(self, ids: Int[np.ndarray, " K"]) -> UInt8[Tensor, "K bytes"] | None:
        """Returns the rows if the system has all of them in memory.

        If not, it returns None, and the disk starts to read them.
        """
        raw = np.empty((len(ids), self.row_bytes), np.uint8)
        complete = read_once(self.shards, self._first_rows, ids, raw, wait=False) == len(ids)
        return torch.from_numpy(raw) if complete else None

    def numbers(self, stored: UInt8[Tensor, "K bytes"]) -> Float[Tensor, "K width"]:
        """Converts rows as they are stored to numbers; fp8 becomes float32."""
        return dequantise(stored, self.width) if self.dtype == FP8 else stored.view(self.dtype)

    def stored(self, first: int, end: int) -> Tensor:
        """Returns rows first..end in the type they are stored in: numbers, or fp8 in bytes."""
        raw = self.read(np.arange(first, end))
        return raw if self.dtype == FP8 else raw.view(self.dtype)

    def damage(self) -> str | None:
        """Returns why rows can no longer be read, naming the file; None while they can.

        Checks whether each file is there and has its last row, and reads again what failed last.
        """
        failed = self._failed
        try:
            for shard in self.shards:
                os.stat(shard.path)
                last = memoryview(bytearray(shard.row_bytes))
                shard.read_bytes(last, (shard.rows - 1) * shard.row_bytes)
            if failed is not None:
                self.read(failed)
        except TableError as error:
            return str(error)
        except OSError as error:
            return f"{shard.path}: {error.strerror}"
        if self._failed is failed:
            self._failed = None
        return None

    def drop_page_cache(self) -> None:
        """Makes the system drop these files from its memory, to measure the disk itself."""
        for shard in self.shards:
            flush_open(shard.file)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(shard.file, 0, 0, os.POSIX_FADV_DONTNEED)

    def fill_page_cache(self) -> None:
        """Makes the system read these files whole, so that no row waits for the disk."""
        buffer = memoryview(bytearray(CHECKED_BYTES))
        for shard in self.shards:
            offset = 0
            while got := read_at(shard.file, buffer, offset):
                offset += got

    def close(self) -> None:
        """Closes the files of all shards; later reads are refused."""
        for shard in self.shards:
            shard.close()


class Damage(NamedTuple):
    """Rows that are not as they were written: `rows` of the table, in a MiB of `path`."""

    path: Path
    rows: range


def verify(path: str | os.PathLike[str]) -> list[Damage]:
    """Reads a whole table and returns every MiB that is not as it was written.

    TableError for files that are not sound, or have no checksums.
    """
    shards = open_shards(Path(path), "rows")
    try:
        return [Damage(shard.path, shard.rows_of(n)) for shard in shards for n in shard.damaged()]
    finally:
        for shard in shards:
            shard.close()


def checksums(pieces: Iterable[memoryview]) -> Iterator[str]:
    """Yields 16 hexadecimal digits for every MiB of bytes that come in pieces of any size."""
    digest = Checksum()
    left = CHECKED_BYTES
    for piece in pieces:
        while piece:
            chunk = piece[:left]
            digest.update(chunk)
            left -= len(chunk)
            piece = piece[len(chunk) :]
            if not left:
                yield digest.hexdigest()
                digest = Checksum()
                left = CHECKED_BYTES
    if left < CHECKED_BYTES:
        yield digest.hexdigest()


def open_shards(path: Path, name: str) -> list[Shard]:
    """Opens the shards in order of their rows: one file, or every .safetensors file of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        got = "got a folder without .safetensors files"
        raise TableError(f"{path}: {got}, expected a table's shards")
    shards: list[Shard] = []
    try:
        for file in files:
            shards.append(Shard(file, name))
        return _in_order(path, shards) if path.is_dir() else shards
    except TableError:
        for shard in shards:
            shard.close()
        raise


def _in_order(path: Path, shards: list[Shard]) -> list[Shard]:
    """Sorts shards by their first row. TableError if they are not one table."""
    places: list[tuple[int, int, Shard]] = []
    for shard in shards:
        numbers = [shard.metadata.get(key, "") for key in ("first_row", "rows_in_all")]
        if not all(n.isascii() and n.isdigit() and len(n) < _MAX_DIGITS for n in numbers):
            got = "got no first_row and rows_in_all in its metadata"
            raise TableError(f"{shard.path}: {got}, expected a table's shard")
        places.append((int(numbers[0]), int(numbers[1]), shard))
    places.sort(key=lambda offset: offset[0])
    row = 0
    _, total, first = places[0]
    for start, claimed, shard in places:
        if (claimed, shard.width, shard.dtype) != (total, first.width, first.dtype):
            raise TableError(f"{shard.path}: got a shard of another table than {first.path}")
        if start != row:
            expected = f"expected rows from {row}: a shard missing or doubled"
            raise TableError(f"{shard.path}: got rows from {start}, {expected}")
        row += shard.rows
    if row != total:
        got = f"got {row} rows in {len(places)} shards"
        raise TableError(f"{path}: {got}, expected {total}: the last ones are missing")
    return [shard for _, _, shard in places]


def _fp8_width(path: Path, metadata: Mapping[str, str], columns: int) -> int:
    """Returns the numbers of a row that is stored as an fp8 record of `columns` bytes.

    TableError unless format and width fit the records.
    """
    width = columns * BLOCK // (BLOCK + 1)
    claimed = (metadata.get("format"), metadata.get("width"))
    if claimed != (FORMAT, str(width)) or columns % (BLOCK + 1):
        got = f"{columns}-byte rows, format {claimed[0]!r:.40}, width {claimed[1]!r:.40}"
        raise TableError(f"{path}: got {got}, expected {FORMAT!r}, 33 bytes for 32")
    return width


def read_header(
    path: Path, file: int, name: str, kinds: Mapping[str, torch.dtype] = KINDS
) -> tuple[Mapping[str, str], Mapping[str, Any], int]:
    """Returns metadata, the entry of tensor `name`, and the byte where it begins, all checked.

    `kinds` are the dtypes that the tensor may have, as safetensors names them.
    """
    about = os.fstat(file)
    if not stat.S_ISREG(about.st_mode):
        raise TableError(f"{path}: got a folder, a device or a pipe, expected a safetensors file")
    total = about.st_size
    if total < 8:
        raise TableError(f"{path}: got {total} bytes, expected a safetensors file")
    size = int.from_bytes(_bytes_at(file, 8, 0), "little")
    largest = min(_MAX_HEADER, total - 8)
    if size > largest:
        raise TableError(f"{path}: got a header of {size} bytes, expected at most {largest}")
    entries, metadata = _parse(path, _bytes_at(file, size, 8))
    edge = 0
    for start, end in sorted(_extent(path, key, entry) for key, entry in entries.items()):
        if start != edge:
            got = f"got a tensor at byte {start} of the data"
            raise TableError(f"{path}: {got}, expected byte {edge}: gap or overlap")
        edge = end
    if edge != total - 8 - size:
        got = f"got {total - 8 - size} bytes of data"
        raise TableError(f"{path}: {got}, expected {edge}: cut or lengthened")
    entry = entries.get(name)
    if entry is None:
        names = ", ".join(map(_short, list(entries)[:5]))
        raise TableError(f"{path}: got tensors {names or 'none'}, expected {name!r}")
    if entry["dtype"] not in kinds or len(entry["shape"]) != 2 or min(entry["shape"]) < 1:
        got = f"{_short(entry['dtype'])} of shape {entry['shape']!s:.60}"
        expected = f"expected rows by width in {' or '.join(kinds)}"
        raise TableError(f"{path}: got {name!r} as {got}, {expected}")
    return metadata, entry, 8 + size + entry["data_offsets"][0]


def _parse(path: Path, raw: bytes) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Returns a header's entries by name, and its metadata, which must fit a checksum in them."""
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_names)
    except (ValueError, RecursionError) as error:
        reason = f"its header is no JSON object with each name once ({error})"
        raise TableError(f"{path}: {reason}") from error
    if not isinstance(header, dict):
        kind = type(header).__name__
        raise TableError(f"{path}: got a header that is a {kind}, expected a JSON object")
    metadata = header.pop("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(w, str) for w in metadata.values())
    if not strings:
        raise TableError(f"{path}: got metadata that are not strings by name")
    if any(key.startswith("xxh3") for key in metadata):
        noted = metadata.get("xxh3_header", "")
        blank = raw.replace(noted.encode("utf-8", "replace"), BLANK.encode(), 1)
        if Checksum(blank).hexdigest() != noted:
            raise TableError(f"{path}: its header is not as it was written")
    return header, metadata


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict of a JSON object's pairs. ValueError if a name occurs twice."""
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError("a name stands twice")
    return named


def _extent(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Returns the bytes of the data between which a tensor lies, checked against its shape.

    TableError for an entry that contradicts itself.
    """
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        got = f"got an entry of {name!r:.60}"
        raise TableError(f"{path}: {got} without exactly dtype, shape and data_offsets")
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    dtype = entry["dtype"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and isinstance(dtype, str)
    fitting = lists and len(offsets) == 2 and len(shape) <= _MAX_AXES
    if not fitting or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        got = f"shape {shape!s:.60} and offsets {offsets!s:.60} of {name!r:.60}"
        raise TableError(f"{path}: got {got}, expected counts from 0")
    start, end = offsets
    size = SIZES.get(dtype, 0)
    if start > end or (size and end - start != size * math.prod(shape)):
        got = f"bytes {start} to {end} for {name!r:.60}"
        raise TableError(f"{path}: got {got}, expected {_short(dtype)} of shape {shape!s:.60}")
    return start, end


def _short(word: str) -> str:
    """Shortens a text from a file to 40 letters of one line, with special ones escaped."""
    return repr(word[:40])[1:-1]


def _bytes_at(file: int, size: int, offset: int) -> bytes:
    """Reads up to `size` bytes at an offset of an open file."""
    data = bytearray(size)
    return bytes(data[: read_at(file, memoryview(data), offset)])
