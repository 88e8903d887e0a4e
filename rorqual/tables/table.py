"""Row ids in -> rows out, wherever they live: device memory, host memory or a file.

    pending = table.prefetch(rows)    the fetch begins; rows [...] are int64 ids
    values  = pending.wait()         float [..., width], on the device of `rows`

A layer never knows which table it has, nor in which format it is kept: fp8 rows arrive as float32. Ids follow from the
text alone, so a caller asks for all layers' rows before the first block runs and waits for each at its layer; host and
disk tables fetch meanwhile in a thread of their own. Row ids outside the table are refused with ValueError, a malformed
or shrunken file with TableError, naming file and reason.

Conditional Memory via Scalable Lookup, section 2.5, arXiv:2601.07372.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from rorqual.kernels import pick
from rorqual.tables.fp8 import FP8, dequantise, kept_as, recall, record_bytes, row_bytes
from rorqual.tables.row_cache import RowCache
from rorqual.tables.staging import Staging
from rorqual.tables.thread import BackgroundThread

_FEW = 256  # rows that are fetched at once where nothing must be waited for: to wake the thread costs more
_IDS = (torch.int64, torch.int32)


class Handle(NamedTuple):
    """Rows on their way; `wait()` returns them, float [..., width], once they are here."""

    wait: Callable[[], Float[Tensor, "*B width"]]


def check_ids(rows: Tensor, count: int) -> None:
    """ValueError unless all ids lie in 0..count-1; on an accelerator an assertion that does not wait for it."""
    if rows.dtype not in _IDS:
        raise ValueError(f"got row ids in {rows.dtype}, expected {_IDS[0]} or {_IDS[1]}")
    if not rows.numel() or rows.is_meta:
        return
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        low, high = rows.aminmax()
        torch._assert_async((low >= 0) & (high < count), "row ids outside the table")
        return
    ids = rows.detach().reshape(-1).numpy()
    outside = (ids < 0) | (ids >= count)
    if outside.any():
        raise ValueError(f"got row id {ids[outside.argmax()]}, expected 0 to {count - 1}")


def gather(values: Tensor, rows: Tensor, width: int, staging: Staging) -> Tensor:
    """[..., width] of kept rows, numbers as they are and records as float32; on a CPU in the staging's memory."""
    if values.dtype == torch.uint8 and values.device.type != "cpu":
        return pick("fp8_rows", recall, values, rows)(values, rows, width)
    ids = rows.reshape(-1)
    staged = values.device.type == "cpu" and not torch.compiler.is_compiling()
    out = staging.take(len(ids), values.shape[1], values.dtype) if staged else None
    if out is None:
        found = torch.index_select(values, 0, ids)
    else:
        found = torch.index_select(values, 0, ids, out=out)
    if values.dtype == torch.uint8:
        found = dequantise(found, width, out=staging.take(len(ids), width, torch.float32) if staged else None)
    return found.view(*rows.shape, width)


class DeviceTable(nn.Module):
    """Rows in a parameter `weight` [rows, width], on the model's device; any optimizer trains it.

    `sparse` makes its gradients name only the rows that were read: row ids and a gradient for each. Nothing of the
    table's size is then written in a step, but few optimizers take such gradients (rorqual.train.optim does, and turns
    this on during its steps; torch's SparseAdam). It may be set at any time.
    dtype float8_e4m3fn: `weight` holds fp8 records [rows, width + width / 32] in bytes, zero until they are loaded, and
    is not trained: a recall with gradients in training mode is a ValueError.
    """

    def __init__(self, rows: int, width: int, *, dtype: torch.dtype | None = None, sparse: bool = False) -> None:
        super().__init__()
        if rows < 1 or width < 1:
            raise ValueError(f"table: got {rows} rows of width {width}, expected at least 1 of each")
        self.rows, self.width, self.sparse = rows, width, sparse
        if dtype == FP8:
            self.weight = nn.Parameter(torch.zeros(rows, record_bytes(width), dtype=torch.uint8), requires_grad=False)
        else:
            self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype))
            nn.init.normal_(self.weight, std=0.02)
        self._staging = Staging()

    def prefetch(self, rows: Int[Tensor, "*B"]) -> Handle:
        """The rows are read when they are waited for: nothing is nearer than the device's own memory."""
        check_ids(rows, self.rows)
        return Handle(lambda: self._recall(rows))

    def _recall(self, rows: Tensor) -> Tensor:
        trained = torch.is_grad_enabled()
        if trained and self.training and self.weight.dtype == torch.uint8:
            raise ValueError(
                "table: got a recall with gradients from fp8 rows, expected inference: call eval() or use"
                " torch.no_grad(), or train rows in float32 or bfloat16 and quantise them afterwards"
            )
        if trained and self.weight.requires_grad:
            return F.embedding(rows, self.weight, sparse=self.sparse)
        return gather(self.weight, rows, self.width, self._staging)

    def metrics(self) -> dict[str, float]:
        """Nothing is fetched, so nothing is counted."""
        return {}


class Fetched(nn.Module):
    """What host and disk tables share: a thread that fetches behind the model's back, hot rows, and counts.

    `hot_bytes` bounds the rows kept in memory in order of last use (0: none). `thread`: that of the model's other
    tables, none for one of its own. Read only: gradients do not reach it.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        dtype: torch.dtype,
        hot_bytes: int,
        prefetch: bool,
        thread: BackgroundThread | None = None,
    ) -> None:
        super().__init__()
        if min(rows, width) < 1 or hot_bytes < 0:
            raise ValueError(f"table: got {rows} rows of width {width}, {hot_bytes} bytes of them hot, expected counts")
        self.rows, self.width, self.dtype = rows, width, dtype
        self.row_bytes = row_bytes(width, dtype)
        self.background = prefetch
        self._staging = Staging(pinned=torch.accelerator.is_available())
        hot = pick("hot_rows", RowCache, torch.device("cpu"))
        self._cache: RowCache = hot(min(rows, hot_bytes // self.row_bytes), self.row_bytes)
        self._lock = threading.Lock()
        self._thread = BackgroundThread() if thread is None else thread
        self._counts = {"rows": 0.0, "different": 0.0, "hits": 0.0, "bytes": 0.0, "wait_seconds": 0.0}

    def prefetch(self, rows: Int[Tensor, "*B"]) -> Handle:
        """Begins the fetch; each row is fetched once however often it is named."""
        given = rows.detach().to("cpu")  # to be checked here: an assertion on a device ends its process
        check_ids(given, self.rows)
        if self.background and given.numel() <= _FEW and not self._lock.locked():
            found = self._at_once(given.to(torch.int64).reshape(-1).numpy())
            if found is not None:
                return Handle(lambda: self._deliver(found, rows))
        ids = given.to(torch.int64, copy=True).reshape(-1).numpy()
        if not self.background:
            return Handle(lambda: self._deliver(self._now(ids), rows))
        future: Future[Tensor] = self._do(self._fetch, ids)
        return Handle(lambda: self._deliver(self._waited(future), rows))

    def _do(self, work: Callable[..., Any], *given: Any) -> "Future[Any]":
        """By the thread, which does one thing after another; at once where nothing is fetched ahead."""
        future = self._thread.submit(work, *given)
        if not self.background:
            future.exception()
        return future

    def _waited(self, future: "Future[Tensor]") -> Tensor:
        began = time.perf_counter()
        found = future.result()
        self._count(wait_seconds=time.perf_counter() - began)
        return found

    def _deliver(self, found: Tensor | None, rows: Tensor) -> Tensor:
        assert found is not None
        return found.view(*rows.shape, self.width).to(rows.device, non_blocking=True)

    def _now(self, ids: np.ndarray) -> Tensor | None:
        found = self._at_once(ids) if len(ids) <= _FEW else None
        return self._fetch(ids) if found is None else found

    def _at_once(self, ids: np.ndarray) -> Tensor | None:
        """Few rows, None where not all are to be had without a wait."""
        return self._fetch(ids, wait=False)

    def _fetch(self, ids: np.ndarray, wait: bool = True) -> Tensor | None:
        """Their rows; None where not all are to be had at once, and `wait` is False."""
        unique, places = np.unique(ids, return_inverse=True)
        found = torch.empty(len(unique), self.row_bytes, dtype=torch.uint8)
        with self._lock:
            missing = self._cache.lookup(unique, found)
            if len(missing):
                fresh = self._read(unique[missing], wait)
                if fresh is None:
                    return None
                self._cache.insert(unique[missing], fresh)
                found = fresh if len(missing) == len(unique) else found.index_copy_(0, torch.from_numpy(missing), fresh)
            self._count(rows=len(ids), different=len(unique), hits=len(unique) - len(missing))
        return gather(self._numbers(found), torch.from_numpy(places), self.width, self._staging)

    def _numbers(self, raw: Tensor) -> Tensor:
        return dequantise(raw, self.width) if self.dtype == FP8 else raw.view(self.dtype)

    def _count(self, **more: int | float) -> None:
        for name, value in more.items():
            self._counts[name] += value

    def _read(self, ids: np.ndarray, wait: bool = True) -> Tensor | None:
        """The rows of these ids, each different, in rising order, as bytes [rows, row_bytes]; None as of `_fetch`."""
        raise AssertionError("a home says how it reads")

    def metrics(self) -> dict[str, float]:
        """Rows asked for, how many different, how many of these hot, bytes fetched, seconds waited for the worker; and
        what share of the different ones was hot."""
        counts = dict(self._counts)
        return counts | {"hit_rate": counts["hits"] / max(counts["different"], 1.0)}

    def close(self) -> None:
        """Ends the thread; the table can be asked again."""
        self._thread.close()


class HostTable(Fetched):
    """Rows in host memory, pinned where there is a device to feed; rows are copied to where the ids are.

    values: float32 or bfloat16 [rows, width], or fp8 records in bytes, [rows, width + width / 32].
    """

    def __init__(
        self,
        values: Shaped[Tensor, "rows kept"],
        *,
        prefetch: bool = True,
        shared: bool = False,
        thread: BackgroundThread | None = None,
    ) -> None:
        """`shared`: other processes have these values, too, so they stay where they are instead of in pinned memory."""
        super().__init__(values.shape[0], *kept_as(values), 0, prefetch, thread)
        held = values.detach().cpu().contiguous()
        self.values = held.pin_memory() if torch.accelerator.is_available() and not shared else held

    def prefetch(self, rows: Int[Tensor, "*B"]) -> Handle:
        """For a device the fetch begins; for a CPU the rows are read when they are waited for: nothing is nearer."""
        if rows.device.type != "cpu":
            return super().prefetch(rows)
        check_ids(rows, self.rows)
        return Handle(lambda: self._gather(rows))

    def _fetch(self, ids: np.ndarray, wait: bool = True) -> Tensor:
        return self._gather(torch.from_numpy(ids))

    def _gather(self, rows: Tensor) -> Tensor:
        with self._lock:
            self._count(rows=rows.numel(), bytes=rows.numel() * self.row_bytes)
        return gather(self.values, rows, self.width, self._staging)


def measure(
    table: DeviceTable | Fetched,
    *,
    rows_per_token: int = 16,
    seconds: float = 1.0,
    seed: int = 0,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """What this table gives on this machine with ids drawn uniformly, the worst case for hot rows.

    rows_per_second in batches of 4,096 ids, and the median and 99th percentile of one token's fetch, in seconds.
    `before` is called ahead of every fetch and not timed.
    """
    draw = torch.Generator().manual_seed(seed)

    def lap(count: int) -> float:
        ids = torch.randint(table.rows, (count,), generator=draw)
        before()
        began = time.perf_counter()
        table.prefetch(ids).wait()
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
