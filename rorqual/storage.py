"""Row ids in -> rows out, wherever they live: device memory, host memory or a file.

    pending = table.request(rows)    the fetch begins; rows [...] are int64 ids
    values  = pending.wait()         float [..., width], on the device of `rows`

A layer never knows which table it has. Ids follow from the text alone, so a caller asks for all layers' rows before the
first block runs and waits for each at its layer; host and disk tables fetch meanwhile in a thread of their own. Row ids
outside the table are refused with ValueError, a malformed or shrunken file with TableError, naming file and reason.

Conditional Memory via Scalable Lookup, section 2.5, arXiv:2601.07372.
"""

import json
import math
import os
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_HEADER_LIMIT = 16 << 20  # bytes; a table's header is a few hundred
_QUEUE = 16  # fetches asked for and not yet begun; asking for more waits


class TableError(ValueError):
    """A table's file that cannot be trusted; the message names the file and the reason."""


class Pending(NamedTuple):
    """Rows on their way; `wait()` returns them, float [..., width], once they are here."""

    wait: Callable[[], Float[Tensor, "*B width"]]


def _check(rows: Tensor, count: int) -> None:
    """ValueError unless all ids lie in 0..count-1; on an accelerator an assertion that does not wait for it."""
    if not rows.numel() or rows.is_meta:
        return
    low, high = rows.aminmax()
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async((low >= 0) & (high < count), "row ids outside the table")
    elif low < 0 or high >= count:
        raise ValueError(f"got row id {int(low if low < 0 else high)}, expected 0 to {count - 1}")


class DeviceTable(nn.Module):
    """Rows in a parameter `weight` [rows, width]; its gradients are sparse: row ids and a gradient for each."""

    def __init__(self, rows: int, width: int, *, dtype: torch.dtype | None = None, sparse: bool = True) -> None:
        super().__init__()
        if rows < 1 or width < 1:
            raise ValueError(f"table: got {rows} rows of width {width}, expected at least 1 of each")
        self.rows, self.width, self.sparse = rows, width, sparse
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def request(self, rows: Int[Tensor, "*B"]) -> Pending:
        """The rows are read when they are waited for: nothing is nearer than the device's own memory."""
        _check(rows, self.rows)
        return Pending(lambda: F.embedding(rows, self.weight, sparse=self.sparse))

    def metrics(self) -> dict[str, float]:
        """Nothing is fetched, so nothing is counted."""
        return {}


class _Fetched(nn.Module):
    """What host and disk tables share: a worker that fetches behind the model's back, hot rows, and counts.

    `hot_bytes` bounds the rows kept in memory in order of last use (0: none). Read only: gradients do not reach it.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, hot_bytes: int, prefetch: bool) -> None:
        super().__init__()
        if min(rows, width) < 1 or hot_bytes < 0:
            raise ValueError(f"table: got {rows} rows of width {width}, {hot_bytes} bytes of them hot, expected counts")
        self.rows, self.width, self.dtype = rows, width, dtype
        self.prefetch = prefetch
        self._hot = _Hot(min(rows, hot_bytes // (width * dtype.itemsize)), width, dtype)
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(_QUEUE)
        self._worker: ThreadPoolExecutor | None = None
        self._counts = {"rows": 0.0, "hits": 0.0, "bytes": 0.0, "wait_seconds": 0.0}

    def request(self, rows: Int[Tensor, "*B"]) -> Pending:
        """Begins the fetch; each row is fetched once however often it is named."""
        _check(rows, self.rows)
        ids = rows.detach().to("cpu", torch.int64, copy=True).flatten().numpy()
        if not self.prefetch:
            return Pending(lambda: self._deliver(self._fetch(ids), rows))
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._room.acquire()
        future: Future[Tensor] = self._worker.submit(self._fetch, ids)
        future.add_done_callback(lambda _: self._room.release())
        return Pending(lambda: self._deliver(self._waited(future), rows))

    def _waited(self, future: "Future[Tensor]") -> Tensor:
        began = time.perf_counter()
        found = future.result()
        self._count(wait_seconds=time.perf_counter() - began)
        return found

    def _deliver(self, found: Tensor, rows: Tensor) -> Tensor:
        return found.view(*rows.shape, self.width).to(rows.device, non_blocking=True)

    def _fetch(self, ids: np.ndarray) -> Tensor:
        unique, places = np.unique(ids, return_inverse=True)
        found = torch.empty(len(unique), self.width, dtype=self.dtype)
        with self._lock:
            missing = self._hot.take(unique, found)
            self._count(rows=len(ids), hits=len(unique) - len(missing))
            if len(missing):
                fresh = self._read(unique[missing])
                found[torch.from_numpy(missing)] = fresh
                self._hot.keep(unique[missing], fresh)
        return found[torch.from_numpy(places)]

    def _count(self, **more: int | float) -> None:
        for name, value in more.items():
            self._counts[name] += value

    def _read(self, ids: np.ndarray) -> Tensor:
        """The rows of these ids, each different, in rising order."""
        raise AssertionError("a home says how it reads")

    def metrics(self) -> dict[str, float]:
        """Rows asked for, different rows found hot, bytes fetched from the home, seconds waited for the worker."""
        return dict(self._counts)

    def close(self) -> None:
        """Ends the worker; the table can be asked again."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None


class _Hot:
    """Rows by id in a fixed number of slots; the row that was used longest ago gives way."""

    def __init__(self, slots: int, width: int, dtype: torch.dtype) -> None:
        self.slots = slots
        self.values = torch.empty(slots, width, dtype=dtype)
        self.where: OrderedDict[int, int] = OrderedDict()

    def take(self, ids: np.ndarray, into: Tensor) -> np.ndarray:
        """Fills the rows that are hot; returns the places in `ids` of those that are not."""
        held = [self.where.get(i, -1) for i in ids.tolist()]
        for i, slot in zip(ids.tolist(), held, strict=True):
            if slot >= 0:
                self.where.move_to_end(i)
        slots = np.array(held, dtype=np.int64)
        hits = np.flatnonzero(slots >= 0)
        into[torch.from_numpy(hits)] = self.values[torch.from_numpy(slots[hits])]
        return np.flatnonzero(slots < 0)

    def keep(self, ids: np.ndarray, values: Tensor) -> None:
        """Puts new rows in; of more than there are slots only the last ones."""
        if not self.slots:
            return
        kept = ids[-self.slots :].tolist()
        slots = []
        for i in kept:
            slots.append(len(self.where) if len(self.where) < self.slots else self.where.popitem(last=False)[1])
            self.where[i] = slots[-1]
        self.values[torch.tensor(slots)] = values[-self.slots :]


class HostTable(_Fetched):
    """Rows in host memory, pinned where there is a device to feed; rows are copied to where the ids are."""

    def __init__(self, values: Float[Tensor, "rows width"], *, prefetch: bool = True) -> None:
        super().__init__(values.shape[0], values.shape[1], values.dtype, 0, prefetch)
        held = values.detach().cpu().contiguous()
        self.values = held.pin_memory() if torch.accelerator.is_available() else held

    def _fetch(self, ids: np.ndarray) -> Tensor:
        self._count(rows=len(ids), bytes=len(ids) * self.width * self.dtype.itemsize)
        return self.values.index_select(0, torch.from_numpy(ids))


class DiskTable(_Fetched):
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


def measure(
    table: DeviceTable | HostTable | DiskTable, *, rows_per_token: int = 16, seconds: float = 1.0, seed: int = 0
) -> dict[str, float]:
    """What this table gives on this machine with ids drawn uniformly, the worst case for hot rows.

    rows_per_second in batches of 4,096 ids, and the median and 99th percentile of one token's fetch, in seconds.
    """
    draw = torch.Generator().manual_seed(seed)

    def lap(count: int) -> float:
        ids = torch.randint(table.rows, (count,), generator=draw)
        began = time.perf_counter()
        table.request(ids).wait()
        return time.perf_counter() - began

    def laps(count: int) -> list[float]:
        stop, found = time.perf_counter() + seconds / 2, [lap(count)]
        while time.perf_counter() < stop:
            found.append(lap(count))
        return found

    with torch.no_grad():
        bulk, steps = laps(4096), laps(rows_per_token)
    p50, p99 = np.percentile(steps, [50, 99])
    return {"rows_per_second": 4096 * len(bulk) / sum(bulk), "step_p50": float(p50), "step_p99": float(p99)}
