"""Row ids in -> rows out, wherever they live: device memory, host memory or a file.

    pending = table.request(rows)    the fetch begins; rows [...] are int64 ids
    values  = pending.wait()         float [..., width], on the device of `rows`

A layer never knows which table it has, nor in which format it is kept: fp8 rows arrive as float32. Ids follow from the
text alone, so a caller asks for all layers' rows before the first block runs and waits for each at its layer; host and
disk tables fetch meanwhile in a thread of their own. Row ids outside the table are refused with ValueError, a malformed
or shrunken file with TableError, naming file and reason.

Conditional Memory via Scalable Lookup, section 2.5, arXiv:2601.07372.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from rorqual.kernels import pick
from rorqual.storage.formats import FP8, dequantise, kept_as, recall, record_bytes, row_bytes
from rorqual.storage.staging import Staging

_FEW = 256  # rows that are fetched at once where nothing must be waited for: to wake the thread costs more
_QUEUE = 16  # fetches asked for and not yet begun; asking for more waits


class Pending(NamedTuple):
    """Rows on their way; `wait()` returns them, float [..., width], once they are here."""

    wait: Callable[[], Float[Tensor, "*B width"]]


def check_ids(rows: Tensor, count: int) -> None:
    """ValueError unless all ids lie in 0..count-1; on an accelerator an assertion that does not wait for it."""
    if not rows.numel() or rows.is_meta:
        return
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        low, high = rows.aminmax()
        torch._assert_async((low >= 0) & (high < count), "row ids outside the table")
        return
    ids = rows.detach().numpy()
    unsigned = ids.view(f"u{ids.itemsize}")  # one pass for both ends: an id below 0 is a very large one here
    if unsigned.max() >= count:
        raise ValueError(f"got row id {ids.flat[unsigned.argmax()]}, expected 0 to {count - 1}")


def gather(values: Tensor, rows: Tensor, width: int, staging: Staging) -> Tensor:
    """[..., width] of kept rows, numbers as they are and records as float32; on a CPU in the staging's memory."""
    if values.dtype == torch.uint8 and values.device.type != "cpu":
        return pick("fp8_rows", recall, values, rows)(values, rows, width)
    ids = rows.reshape(-1)
    staged = values.device.type == "cpu" and not torch.compiler.is_compiling()
    out = staging.take(len(ids), values.shape[1], values.dtype) if staged else None
    found = torch.index_select(values, 0, ids, out=out)
    if values.dtype == torch.uint8:
        found = dequantise(found, width, out=staging.take(len(ids), width, torch.float32) if staged else None)
    return found.view(*rows.shape, width)


class DeviceTable(nn.Module):
    """Rows in a parameter `weight` [rows, width]; its gradients are sparse: row ids and a gradient for each.

    dtype float8_e4m3fn: `weight` holds fp8 records [rows, width + width / 32] in bytes, zero until they are loaded, and
    is not trained: a recall with gradients in training mode is a ValueError.
    """

    def __init__(self, rows: int, width: int, *, dtype: torch.dtype | None = None, sparse: bool = True) -> None:
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

    def request(self, rows: Int[Tensor, "*B"]) -> Pending:
        """The rows are read when they are waited for: nothing is nearer than the device's own memory."""
        check_ids(rows, self.rows)
        return Pending(lambda: self._recall(rows))

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
    """What host and disk tables share: a worker that fetches behind the model's back, hot rows, and counts.

    `hot_bytes` bounds the rows kept in memory in order of last use (0: none). Read only: gradients do not reach it.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, hot_bytes: int, prefetch: bool) -> None:
        super().__init__()
        if min(rows, width) < 1 or hot_bytes < 0:
            raise ValueError(f"table: got {rows} rows of width {width}, {hot_bytes} bytes of them hot, expected counts")
        self.rows, self.width, self.dtype = rows, width, dtype
        self.row_bytes = row_bytes(width, dtype)
        self.prefetch = prefetch
        self._staging = Staging(pinned=torch.accelerator.is_available())
        self._hot: Recent | Frozen = Recent(min(rows, hot_bytes // self.row_bytes), self.row_bytes)
        self._lock = threading.Lock()
        self._room = threading.BoundedSemaphore(_QUEUE)
        self._worker: ThreadPoolExecutor | None = None
        self._counts = {"rows": 0.0, "different": 0.0, "hits": 0.0, "bytes": 0.0, "wait_seconds": 0.0}

    def request(self, rows: Int[Tensor, "*B"]) -> Pending:
        """Begins the fetch; each row is fetched once however often it is named."""
        check_ids(rows, self.rows)
        ids = rows.detach().to("cpu", torch.int64, copy=True).flatten().numpy()
        if not self.prefetch:
            return Pending(lambda: self._deliver(self._fetch(ids), rows))
        if len(ids) <= _FEW and not self._lock.locked() and (found := self._fetch(ids, wait=False)) is not None:
            return Pending(lambda: self._deliver(found, rows))
        self._room.acquire()
        future: Future[Tensor] = self._do(self._fetch, ids)
        future.add_done_callback(lambda _: self._room.release())
        return Pending(lambda: self._deliver(self._waited(future), rows))

    def _do(self, work: Callable[..., Any], *given: Any) -> "Future[Any]":
        """By the worker, which does one thing after another; at once where nothing is fetched ahead."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="rows")
        future = self._worker.submit(work, *given)
        if not self.prefetch:
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

    def _fetch(self, ids: np.ndarray, wait: bool = True) -> Tensor | None:
        """Their rows; None where not all are to be had at once, and `wait` is False."""
        unique, places = np.unique(ids, return_inverse=True)
        found = torch.empty(len(unique), self.row_bytes, dtype=torch.uint8)
        with self._lock:
            missing = self._hot.take(unique, found)
            if len(missing):
                fresh = self._read(unique[missing], wait)
                if fresh is None:
                    return None
                self._hot.keep(unique[missing], fresh)
                found = fresh if len(missing) == len(unique) else found.index_copy_(0, torch.from_numpy(missing), fresh)
            self._count(rows=len(ids), different=len(unique), hits=len(unique) - len(missing))
        values = dequantise(found, self.width) if self.dtype == FP8 else found.view(self.dtype)
        return gather(values, torch.from_numpy(places), self.width, self._staging)

    def _count(self, **more: int | float) -> None:
        for name, value in more.items():
            self._counts[name] += value

    def _read(self, ids: np.ndarray, wait: bool = True) -> Tensor | None:
        """The rows of these ids, each different, in rising order, as bytes [rows, row_bytes]; None as of `_fetch`."""
        raise AssertionError("a home says how it reads")

    def metrics(self) -> dict[str, float]:
        """Rows asked for, how many different, how many of these hot, bytes fetched, seconds waited for the worker."""
        return dict(self._counts)

    def close(self) -> None:
        """Ends the worker; the table can be asked again."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None


class Frozen:
    """The rows of certain ids, rising and different, that are kept for good."""

    def __init__(self, ids: np.ndarray, values: Tensor) -> None:
        self.ids, self.values = ids, values

    def take(self, ids: np.ndarray, into: Tensor) -> np.ndarray:
        """Fills the rows that are held; returns the places in `ids` of those that are not."""
        places = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        held = self.ids[places] == ids
        into[torch.from_numpy(np.flatnonzero(held))] = self.values[torch.from_numpy(places[held])]
        return np.flatnonzero(~held)

    def keep(self, ids: np.ndarray, values: Tensor) -> None:
        """Nothing gives way, so nothing is put in."""


class Recent:
    """Rows by id in a fixed number of slots; the row that was used longest ago gives way."""

    def __init__(self, slots: int, row_bytes: int) -> None:
        self.slots = slots
        self.values = torch.empty(slots, row_bytes, dtype=torch.uint8)
        self.where: OrderedDict[int, int] = OrderedDict()

    def take(self, ids: np.ndarray, into: Tensor) -> np.ndarray:
        """Fills the rows that are hot; returns the places in `ids` of those that are not."""
        if not self.where:
            return np.arange(len(ids))
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


class HostTable(Fetched):
    """Rows in host memory, pinned where there is a device to feed; rows are copied to where the ids are.

    values: float32 or bfloat16 [rows, width], or fp8 records in bytes, [rows, width + width / 32].
    """

    def __init__(self, values: Shaped[Tensor, "rows kept"], *, prefetch: bool = True) -> None:
        super().__init__(values.shape[0], *kept_as(values), 0, prefetch)
        held = values.detach().cpu().contiguous()
        self.values = held.pin_memory() if torch.accelerator.is_available() else held

    def request(self, rows: Int[Tensor, "*B"]) -> Pending:
        """For a device the fetch begins; for a CPU the rows are read when they are waited for: nothing is nearer."""
        if rows.device.type != "cpu":
            return super().request(rows)
        check_ids(rows, self.rows)
        return Pending(lambda: self._gather(rows))

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
