"""A table's files <-> rows at their positions: safetensors shards, checked to the last byte before the first row.

    table-00001-of-00004.safetensors    one matrix `rows`: float32, bfloat16, or fp8 records in bytes (U8)
    first_row, rows_in_all              where the shard stands in its table
    format, width                       of fp8 records alone
    xxh3_header                         a checksum of what stands before the rows, with 16 zeros in its own place
    xxh3_per_mib                        a checksum of every 2^20 bytes of rows, 16 hexadecimal digits each

What does not fit is refused with TableError, naming file and reason. Files are read by position and never mapped.
"""

import json
import math
import os
import stat
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from rorqual.io import BINARY, read_at
from rorqual.tables.fp8 import BLOCK, FP8

KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": FP8}
FORMAT = "fp8-e4m3-e8m0-32"
_HEADER_LIMIT = 16 << 20  # bytes; a table's header is a few hundred and 16 a MiB
BLANK = "0" * 16
_PIECE = 1 << 18  # bytes read together: a core's cache holds them until they are summed
BLOCK_BYTES = 1 << 20  # that share a checksum
_DIGITS = 20  # more than any file's rows have
_AXES = 64  # as many as torch knows; the product of a million sizes would take hours


class TableError(ValueError):
    """A table's file that cannot be trusted; the message names the file and the reason."""


class Shard:
    """One safetensors file, its header checked to the last byte before anything is read.

    rows, width, dtype: of the table's numbers; row_bytes: of one row as it is kept.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        try:
            # of a pipe it would wait for somebody who writes
            self.file = os.open(path, os.O_RDONLY | BINARY | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise TableError(f"{path}: {error.strerror}") from error
        self._closed = weakref.finalize(self, os.close, self.file)  # a table that is dropped keeps no disk space
        try:
            self.metadata, entry, self.start = _header(path, self.file, name)
            self.dtype = KINDS[entry["dtype"]]
            self.rows, kept = entry["shape"]
            self.width = _fp8_width(path, self.metadata, kept) if self.dtype == FP8 else kept
        except OSError as error:
            self.close()
            raise TableError(f"{path}: {error.strerror}") from error
        except Exception:
            self.close()
            raise
        self.row_bytes = kept * self.dtype.itemsize

    def read(self, row: int, into: memoryview) -> None:
        """Fills `into` from the first byte of `row` on. TableError where the file has lost them."""
        self._fill(into, row * self.row_bytes)

    def _fill(self, into: memoryview, at: int) -> None:
        """`into`, from byte `at` of the rows on."""
        try:
            got = read_at(self.file, into, self.start + at) if self.file >= 0 else 0
        except OSError as error:
            raise TableError(f"{self.path}: {error.strerror} at row {at // self.row_bytes}") from error
        if got != len(into):
            lost, left = divmod(at + got, self.row_bytes)
            raise TableError(
                f"{self.path}: got {left} bytes of row {lost}, expected {self.row_bytes}: cut or closed since it opened"
            )

    def damaged(self) -> list[int]:
        """Numbers of the blocks whose bytes are not those that were written. TableError without checksums."""
        size = self.rows * self.row_bytes
        noted = self.metadata.get("xxh3_per_mib", "")
        if len(noted) != 16 * -(-size // BLOCK_BYTES):
            raise TableError(f"{self.path}: got no checksum for each MiB, expected a file that write_table wrote")
        buffer, found = memoryview(bytearray(_PIECE)), []
        for number in range(len(noted) // 16):
            block, end = xxhash.xxh3_64(), min(size, (number + 1) * BLOCK_BYTES)
            for at in range(number * BLOCK_BYTES, end, _PIECE):
                part = buffer[: min(_PIECE, end - at)]
                self._fill(part, at)
                block.update(part)
            if block.hexdigest() != noted[16 * number : 16 * number + 16]:
                found.append(number)
        return found

    def close(self) -> None:
        self._closed()
        self.file = -1


def _fp8_width(path: Path, metadata: Mapping[str, str], kept: int) -> int:
    """The width that fp8 records are said to have. TableError unless format and size agree with it."""
    got, width = (metadata.get("format"), metadata.get("width")), kept * BLOCK // (BLOCK + 1)
    if got != (FORMAT, str(width)) or kept % (BLOCK + 1):
        said = f"got {kept}-byte rows, format {got[0]!r:.40}, width {got[1]!r:.40}"
        raise TableError(f"{path}: {said}, expected {FORMAT!r}, 33 bytes for 32")
    return width


def _header(path: Path, file: int, name: str) -> tuple[Mapping[str, str], Mapping[str, Any], int]:
    """Metadata, the entry of `name`, and where its bytes begin. TableError for anything that does not fit."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise TableError(f"{path}: got a folder, a device or a pipe, expected a safetensors file")
    total = os.fstat(file).st_size
    if total < 8:
        raise TableError(f"{path}: got {total} bytes, expected a safetensors file")
    size = int.from_bytes(_bytes_at(file, 8, 0), "little")
    if size > min(_HEADER_LIMIT, total - 8):
        raise TableError(f"{path}: got a header of {size} bytes, expected at most {min(_HEADER_LIMIT, total - 8)}")
    header, metadata = _spoken(path, _bytes_at(file, size, 8))
    ends = sorted(_extent(path, key, entry) for key, entry in header.items())
    edge = 0
    for begin, end in ends:
        if begin != edge:
            raise TableError(f"{path}: got a tensor at byte {begin} of the data, expected byte {edge}: gap or overlap")
        edge = end
    if edge != total - 8 - size:
        raise TableError(f"{path}: got {total - 8 - size} bytes of data, expected {edge}: cut or lengthened")
    entry = header.get(name)
    if entry is None:
        held = ", ".join(map(_told, list(header)[:5]))
        raise TableError(f"{path}: got tensors {held or 'none'}, expected {name!r}")
    if entry["dtype"] not in KINDS or len(entry["shape"]) != 2 or min(entry["shape"]) < 1:
        got = f"{_told(entry['dtype'])} of shape {entry['shape']!s:.60}"
        raise TableError(f"{path}: got {name!r} as {got}, expected rows by width in {' or '.join(KINDS)}")
    return metadata, entry, 8 + size + entry["data_offsets"][0]


def _spoken(path: Path, raw: bytes) -> tuple[dict[str, Any], Mapping[str, str]]:
    """The entries by name, and the metadata. TableError for what is no JSON of theirs, or not what was written."""
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path}: its header is no JSON object with each name once ({error})") from error
    if not isinstance(header, dict):
        raise TableError(f"{path}: got a header that is a {type(header).__name__}, expected a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TableError(f"{path}: got metadata that are not strings by name")
    if any(key.startswith("xxh3") for key in metadata):
        noted = metadata.get("xxh3_header", "")
        if xxhash.xxh3_64_hexdigest(raw.replace(noted.encode("utf-8", "replace"), BLANK.encode(), 1)) != noted:
            raise TableError(f"{path}: its header is not as it was written")
    return header, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError("a name stands twice")
    return named


def _extent(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, from a header entry that must say so without contradiction."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TableError(f"{path}: got an entry of {name!r:.60} without exactly dtype, shape and data_offsets")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and isinstance(dtype, str)
    fitting = lists and len(offsets) == 2 and len(shape) <= _AXES
    if not fitting or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        said = f"got shape {shape!s:.60} and offsets {offsets!s:.60} of {name!r:.60}"
        raise TableError(f"{path}: {said}, expected counts from 0")
    begin, end = offsets
    size = KINDS[dtype].itemsize if dtype in KINDS else 0
    if begin > end or (size and end - begin != size * math.prod(shape)):
        said = f"got bytes {begin} to {end} for {name!r:.60}"
        raise TableError(f"{path}: {said}, expected {_told(dtype)} of shape {shape!s:.60}")
    return begin, end


def _told(word: str) -> str:
    """A stranger's word as a part of one line."""
    return repr(word[:40])[1:-1]


def open_shards(path: Path, name: str) -> list[Shard]:
    """The shards in order of their rows: a file alone, or every .safetensors file of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise TableError(f"{path}: got a folder without .safetensors files, expected a table's shards")
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
    """Shards sorted by their first row; TableError if one is missing, doubled or of another kind."""
    places: list[tuple[int, int, Shard]] = []
    for shard in shards:
        numbers = [shard.metadata.get(key, "") for key in ("first_row", "rows_in_all")]
        if not all(number.isascii() and number.isdigit() and len(number) < _DIGITS for number in numbers):
            raise TableError(
                f"{shard.path}: got no first_row and rows_in_all in its metadata, expected a table's shard"
            )
        places.append((int(numbers[0]), int(numbers[1]), shard))
    places.sort(key=lambda place: place[0])
    row, total, first = 0, places[0][1], places[0][2]
    for begin, claimed, shard in places:
        if (claimed, shard.width, shard.dtype) != (total, first.width, first.dtype):
            raise TableError(f"{shard.path}: got a shard of another table than {first.path}")
        if begin != row:
            raise TableError(
                f"{shard.path}: got rows from {begin}, expected rows from {row}: a shard missing or doubled"
            )
        row += shard.rows
    if row != total:
        raise TableError(f"{path}: got {row} rows in {len(places)} shards, expected {total}: the last ones are missing")
    return [shard for _, _, shard in places]


class Damage(NamedTuple):
    """Rows that are not as they were written: `rows` of the table, in a block of `path`."""

    path: Path
    rows: range


def verify(path: str | os.PathLike[str]) -> list[Damage]:
    """Reads a whole table, a file or a folder of shards; returns every MiB that is not as it was written.

    TableError for what DiskTable refuses, and for files without checksums.
    """
    shards = open_shards(Path(path), "rows")
    try:
        return [Damage(shard.path, _rows_of(shard, block)) for shard in shards for block in shard.damaged()]
    finally:
        for shard in shards:
            shard.close()


def _rows_of(shard: Shard, block: int) -> range:
    begin = int(shard.metadata["first_row"])
    first, end = block * BLOCK_BYTES // shard.row_bytes, -(-(block + 1) * BLOCK_BYTES // shard.row_bytes)
    return range(begin + first, begin + min(end, shard.rows))


def _bytes_at(file: int, size: int, offset: int) -> bytes:
    found = bytearray(size)
    return bytes(found[: read_at(file, memoryview(found), offset)])
