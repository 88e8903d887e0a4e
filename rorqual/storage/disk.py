"""Row ids in -> rows out of a safetensors file, or a folder of shards, read one by one and never mapped.

Every header is checked to the last byte before the first row is read; what does not fit is refused with TableError,
naming file and reason.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from rorqual.storage.tables import Fetched

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_HEADER_LIMIT = 16 << 20  # bytes; a table's header is a few hundred


class TableError(ValueError):
    """A table's file that cannot be trusted; the message names the file and the reason."""


class DiskTable(Fetched):
    """Rows in one safetensors file, or in a folder of shards, read one by one at their positions and never mapped."""

    def __init__(
        self, path: str | os.PathLike[str], *, name: str = "rows", hot_bytes: int = 64 << 20, prefetch: bool = True
    ) -> None:
        """`name` is the tensor's: any two-dimensional float32 or bfloat16 tensor of any safetensors file will do."""
        self._shards = _open(Path(path), name)
        first = self._shards[0]
        self._starts = np.cumsum([0, *(shard.rows for shard in self._shards)])
        super().__init__(int(self._starts[-1]), first.width, first.dtype, hot_bytes, prefetch)

    def _read(self, ids: np.ndarray) -> Tensor:
        size = self.width * self.dtype.itemsize
        raw = torch.empty(len(ids), size, dtype=torch.uint8)
        target = raw.numpy().data.cast("B")
        which = np.searchsorted(self._starts, ids, side="right") - 1
        within = (ids - self._starts[which]).tolist()
        for place, (shard, row) in enumerate(zip(which.tolist(), within, strict=True)):
            self._shards[shard].read(row, size, target[place * size : (place + 1) * size])
        self._count(bytes=raw.numel())
        return raw.view(self.dtype)

    def close(self) -> None:
        """Ends the worker and closes the files."""
        super().close()
        for shard in self._shards:
            shard.close()


class _Shard:
    """One safetensors file, its header checked to the last byte before anything is read."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        try:
            self.file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise TableError(f"{path}: {error.strerror}") from error
        try:
            self.metadata, entry, self.start = _header(path, self.file, name)
        except Exception:
            self.close()
            raise
        self.rows, self.width = entry["shape"]
        self.dtype = DTYPES[entry["dtype"]]

    def read(self, row: int, size: int, into: memoryview) -> None:
        got = os.preadv(self.file, [into], self.start + row * size) if self.file >= 0 else 0
        if got != size:
            raise TableError(
                f"{self.path}: got {got} bytes of row {row}, expected {size}: cut or closed since it opened"
            )

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def _header(path: Path, file: int, name: str) -> tuple[Mapping[str, str], Mapping[str, Any], int]:
    """Metadata, the entry of `name`, and where its bytes begin. TableError for anything that does not fit."""
    total = os.fstat(file).st_size
    if total < 8:
        raise TableError(f"{path}: got {total} bytes, expected a safetensors file")
    (size,) = struct.unpack("<Q", os.pread(file, 8, 0))
    if size > min(_HEADER_LIMIT, total - 8):
        raise TableError(f"{path}: got a header of {size} bytes, expected at most {min(_HEADER_LIMIT, total - 8)}")
    try:
        header = json.loads(os.pread(file, size, 8).decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path}: its header is no JSON object with each name once ({error})") from error
    if not isinstance(header, dict):
        raise TableError(f"{path}: got a header that is a {type(header).__name__}, expected a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TableError(f"{path}: got metadata that are not strings by name")
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
        raise TableError(f"{path}: got tensors {', '.join(list(header)[:5]) or 'none'}, expected {name!r}")
    if entry["dtype"] not in DTYPES or len(entry["shape"]) != 2 or min(entry["shape"]) < 1:
        got = f"{entry['dtype']} of shape {entry['shape']}"
        raise TableError(f"{path}: got {name!r} as {got}, expected rows by width in {' or '.join(DTYPES)}")
    return metadata, entry, 8 + size + entry["data_offsets"][0]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ValueError("a name stands twice")
    return named


def _extent(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, from a header entry that must say so without contradiction."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise TableError(f"{path}: got an entry of {name!r} without exactly dtype, shape and data_offsets")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and isinstance(dtype, str)
    if not lists or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        raise TableError(f"{path}: got shape {shape} and offsets {offsets} of {name!r}, expected counts from 0")
    begin, end = offsets
    size = DTYPES[dtype].itemsize if dtype in DTYPES else 0
    if begin > end or (size and end - begin != size * math.prod(shape)):
        raise TableError(f"{path}: got bytes {begin} to {end} for {name!r}, expected {dtype} of shape {shape}")
    return begin, end


def _open(path: Path, name: str) -> list[_Shard]:
    """The shards in order of their rows: a file alone, or every .safetensors file of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise TableError(f"{path}: got a folder without .safetensors files, expected a table's shards")
    shards: list[_Shard] = []
    try:
        for file in files:
            shards.append(_Shard(file, name))
        return _in_order(path, shards) if path.is_dir() else shards
    except TableError:
        for shard in shards:
            shard.close()
        raise


def _in_order(path: Path, shards: list[_Shard]) -> list[_Shard]:
    """Shards sorted by their first row; TableError if one is missing, doubled or of another kind."""
    places: list[tuple[int, int, _Shard]] = []
    for shard in shards:
        numbers = [shard.metadata.get(key, "") for key in ("first_row", "rows_in_all")]
        if not all(number.isascii() and number.isdigit() for number in numbers):
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


def write_table(
    folder: str | os.PathLike[str], values: Float[Tensor, "rows width"], *, shard_rows: int = 1 << 22
) -> Path:
    """Writes a table as shards that DiskTable reads; each appears whole or not at all. ValueError if one is there."""
    folder = Path(folder)
    if shard_rows < 1 or values.dtype not in DTYPES.values():
        raise ValueError(f"got {values.dtype} rows, {shard_rows} a shard, expected float32 or bfloat16 and at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"got {folder}, which holds .safetensors files, expected a new or empty folder")
    starts = range(0, len(values), shard_rows)
    for number, start in enumerate(starts):
        target = folder / f"table-{number + 1:05d}-of-{len(starts):05d}.safetensors"
        beside = target.with_suffix(".part")
        metadata = {"first_row": str(start), "rows_in_all": str(len(values))}
        save_file({"rows": values[start : start + shard_rows].detach().cpu().contiguous()}, beside, metadata)
        beside.replace(target)
    return folder
