"""A table of rows that are looked up by id, placed on the device, in host memory or on a disk.

    handle = table.prefetch(row_ids)    starts fetching; row_ids [...] are int64 or int32
    values = handle.wait()              [..., width], on the device of the ids

Row ids follow from the text alone, so a model prefetches the rows of all layers before its first
block and waits at each layer. A layer depends on neither the placement nor the format: fp8 rows
arrive as float32, and all placements give the same bits.

Conditional Memory via Scalable Lookup, section 2.5, arXiv:2601.07372.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from rorqual.tables.draw import draw_rows
from rorqual.tables.fp8 import FP8, dequantise, lookup, record_bytes, row_bytes, stored_as
from rorqual.tables.record_file import RecordFile, Update
from rorqual.tables.record_shards import RecordShard
from rorqual.tables.row_cache import RowCache
from rorqual.tables.row_file import RowFile
from rorqual.tables.staging import Staging
from rorqual.tables.thread import BackgroundThread

Placement = Literal["device", "host", "disk"]

_READ_AT_ONCE = 256  # ids looked up at once if all rows are in memory: waking the thread costs more
_ID_TYPES = (torch.int64, torch.int32)


class Handle(NamedTuple):
    """A fetch in progress; `wait()` returns its rows, [..., width]."""

    wait: Callable[[], Float[Tensor, "*B width"]]


class Table(nn.Module):
    """Rows of one width, in one of three placements, trainable or not.

    device    in a parameter `weight` [rows, width] of the model
    host      in host memory wherever the model is: in `weight` too if trainable, else in `values`
    disk      in files, trainable with the optimizer's state beside each row (`record_file`)

    `sparse`: gradients of a `weight` in memory have only the rows that were read. Few optimizers
    take such gradients: `rorqual.train.optim` does, and sets this for its steps.
    """

    weight: nn.Parameter  # None if rows are read only, in host memory or on a disk

    def __init__(
        self,
        rows: int,
        width: int,
        placement: Placement = "device",
        *,
        trainable: bool = True,
        dtype: torch.dtype = torch.float32,
        sparse: bool = False,
        source: Tensor | RowFile | RecordFile | None = None,
        cache: RowCache | None = None,
        prefetch: bool = True,
        thread: BackgroundThread | None = None,
    ) -> None:
        """Creates a table; new rows are normal, with deviation 0.02.

        fp8 rows, which are not trained, are 0. source: where the rows are already; a tensor, or one
        of the files. cache: of a `RowFile`. prefetch: whether a background thread fetches. thread:
        that of other tables, to share it.
        """
        super().__init__()
        if rows < 1 or width < 1:
            raise ValueError(
                f"table: got {rows} rows of width {width}, expected at least 1 of each"
            )
        self.rows = rows
        self.width = width
        self.placement = placement
        self.trainable = trainable and dtype != FP8
        self.dtype = dtype
        self.sparse = sparse
        self.row_bytes = (
            source.row_bytes if isinstance(source, RowFile) else row_bytes(width, dtype)
        )
        self.values = source if isinstance(source, Tensor) and placement == "host" else None
        self.file: Any = None if isinstance(source, Tensor) else source  # RowFile or RecordFile
        self.register_parameter("weight", self._parameter(source))
        self._staging = Staging(pinned=placement != "device" and torch.accelerator.is_available())
        self._counts = {
            "rows": 0.0,
            "different": 0.0,
            "hits": 0.0,
            "bytes": 0.0,
            "wait_seconds": 0.0,
        }
        if placement != "device":
            self._cache = RowCache(0, self.row_bytes, rows) if cache is None else cache
            self._background = prefetch
            self._thread = BackgroundThread() if thread is None else thread
            self._lock = threading.Lock()
            self._writing: Future[None] | None = None

    def _parameter(self, source: Tensor | RowFile | RecordFile | None) -> nn.Parameter | None:
        """Creates the parameter with the rows, or for their gradients; None if read only."""
        if self.placement == "disk":
            # The parameter only receives gradients; it has one number in memory.
            gradients = torch.zeros(1, 1).expand(self.rows, self.width)
            return nn.Parameter(gradients) if self.trainable else None
        if isinstance(source, Tensor):
            if self.placement == "host":
                return None
            return nn.Parameter(source, requires_grad=source.is_floating_point())
        if self.dtype == FP8:
            records = torch.zeros(self.rows, record_bytes(self.width), dtype=torch.uint8)
            return nn.Parameter(records, requires_grad=False)
        weight = nn.Parameter(torch.empty(self.rows, self.width, dtype=self.dtype))
        # a model draws values elsewhere from its seed
        with torch.random.fork_rng(devices=[], enabled=self.placement == "host"):
            nn.init.normal_(weight, std=0.02)
        return weight

    @classmethod
    def of_values(
        cls, values: Shaped[Tensor, "rows stored"], *, shared: bool = False, **options: Any
    ) -> "Table":
        """Makes a read-only table in host memory from numbers or fp8 records.

        shared: other processes have these values, too, so they are not copied to pinned memory.
        """
        width, dtype = stored_as(values)
        values = values.detach().cpu().contiguous()
        if torch.accelerator.is_available() and not shared:
            values = values.pin_memory()
        options |= {"trainable": False, "dtype": dtype, "source": values}
        return cls(len(values), width, "host", **options)

    @classmethod
    def of_file(
        cls,
        path: str | os.PathLike[str],
        name: str = "rows",
        *,
        cache_bytes: int = 64 << 20,
        cached_rows: Int[Tensor, " H"] | None = None,
        **options: Any,
    ) -> "Table":
        """Opens read-only rows on the disk, with a cache of some of them in memory.

        They are tensor `name` of a safetensors file, or a folder of shards. cached_rows: ids, most
        wanted first; as many of them as `cache_bytes` hold are read now and stay in memory. Without
        them the most recently used rows do.
        """
        return cls.of_rows(
            RowFile(path, name), cache_bytes=cache_bytes, cached_rows=cached_rows, **options
        )

    @classmethod
    def of_rows(
        cls,
        file: RowFile,
        *,
        cache_bytes: int = 64 << 20,
        cached_rows: Int[Tensor, " H"] | None = None,
        **options: Any,
    ) -> "Table":
        """Makes a read-only table on the disk of rows in files that are open."""
        if cache_bytes < 0:
            file.close()
            raise ValueError(f"table: got {cache_bytes} bytes of cached rows, expected at least 0")
        cache = RowCache(cache_bytes, file.row_bytes, file.rows)
        if cached_rows is not None and len(cached_rows) and cache.slots:
            check_ids(cached_rows, file.rows)
            ids, order = np.unique(cached_rows.numpy(), return_index=True)
            wanted = np.sort(ids[np.argsort(order)[: cache.slots]])
            cache.insert(wanted, file.read(wanted))
            cache.frozen = True
        options |= {"trainable": False, "dtype": file.dtype, "source": file, "cache": cache}
        return cls(file.rows, file.width, "disk", **options)

    @classmethod
    def of_records(
        cls, folder: str | os.PathLike[str], rows: int, width: int, *, keep: int = 3, **options: Any
    ) -> "Table":
        """Opens rows trained on the disk, with `keep` marks to go back to.

        `draw` fills a new folder.
        """
        return cls(rows, width, "disk", source=RecordFile(folder, rows, width, keep), **options)

    def is_far(self, ids: Tensor) -> bool:
        """Returns whether the rows are in other memory than these ids, so that they are fetched."""
        return self.placement == "disk" or (self.placement == "host" and not ids.is_cpu)

    def prefetch(self, row_ids: Int[Tensor, "*B"]) -> Handle:
        """Starts fetching rows. ValueError for ids outside the table.

        With gradients, those of rows in another memory than `row_ids` are sparse, and are copied
        back to the rows' memory.
        """
        if not self.is_far(row_ids):
            # nothing is nearer than this memory: rows are read when they are waited for
            check_ids(row_ids, self.rows)
            return Handle(lambda: self._lookup(row_ids))
        # an assertion on a device would end the process, so ids are checked here
        ids = row_ids.detach().cpu()
        check_ids(ids, self.rows)
        ids = ids.to(torch.int64)
        rows = self._fetch_at_once(ids)
        if rows is not None:
            values = rows.view(*row_ids.shape, self.width).to(row_ids.device, non_blocking=True)
            return Handle(lambda: values)
        # The caller may write to its ids before they are used.
        ids = ids.clone()
        fetched = self._fetching(ids)
        learns = self.trainable and self.training and torch.is_grad_enabled()

        def wait() -> Tensor:
            values = (
                fetched().view(*row_ids.shape, self.width).to(row_ids.device, non_blocking=True)
            )
            return _SparseGradient.apply(self.weight, values, ids) if learns else values

        return Handle(wait)

    def _fetching(self, ids: Tensor) -> Callable[[], Tensor]:
        """Starts a fetch; returns a function that waits for it."""
        fetch = self._fetch if self.placement == "disk" else self._fetch_from_memory
        if not self._background:
            return lambda: fetch(ids)
        future = self._thread.submit(fetch, ids)
        return lambda: self._wait(future)

    def _wait(self, future: "Future[Tensor]") -> Tensor:
        """Waits for a fetch, and adds the seconds to the counts."""
        began = time.perf_counter()
        values = future.result()
        self._counts["wait_seconds"] += time.perf_counter() - began
        return values

    def _fetch_at_once(self, ids: Tensor) -> Tensor | None:
        """Returns few rows that are in memory already, in the row cache or the page cache.

        None for others, which the disk starts to read. The ids are not made distinct first: that
        would take longer than to read a row twice.
        """
        small = ids.numel() <= _READ_AT_ONCE and isinstance(self.file, RowFile)
        if not small or not self._background or self._lock.locked():
            return None
        wanted = ids.reshape(-1).numpy()
        stored = self._stored(wanted, len(wanted), self.file.read_cached)
        return None if stored is None else self._numbers(stored)

    def _fetch(self, ids: Tensor) -> Tensor:
        """Returns rows from the row cache, and from the file those that are not cached."""
        unique, places = np.unique(ids.reshape(-1).numpy(), return_inverse=True)
        stored = self._stored(unique, len(places), self.file.read)
        assert stored is not None
        return gather(self._numbers(stored), torch.from_numpy(places), self.width, self._staging)

    def _stored(
        self, ids: np.ndarray, asked: int, read: Callable[[np.ndarray], Tensor | None]
    ) -> Tensor | None:
        """Returns rows as they are stored; None if `read` does not have those that are not cached.

        asked: the number of ids that were asked for.
        """
        with self._lock:
            rows, missing = self._cache.lookup(ids)
            uncached = ids[missing]
            if len(missing):
                values = read(uncached)
                if values is None:
                    return None
                self._cache.insert(uncached, values)
                if len(missing) == len(ids):
                    rows = values
                else:
                    rows[torch.from_numpy(missing)] = values
            self._count(asked, len(set(ids.tolist())), len(set(uncached.tolist())))
        return rows

    def _numbers(self, stored: Tensor) -> Tensor:
        """Converts rows from the form in which they are stored to numbers [K, width]."""
        if isinstance(self.file, RowFile):
            return self.file.numbers(stored)
        return dequantise(stored, self.width) if self.dtype == FP8 else stored.view(self.dtype)

    def _fetch_from_memory(self, ids: Tensor) -> Tensor:
        """Looks up rows in host memory without gradients, for the background thread."""
        with torch.no_grad():
            return self._lookup(ids)

    def _lookup(self, row_ids: Tensor) -> Tensor:
        """Looks up rows in memory, where the ids are too; with gradients if they are trained."""
        if self.placement == "host":
            self._count(row_ids.numel(), 0, row_ids.numel())
        if self.values is not None:
            return gather(self.values, row_ids, self.width, self._staging)
        weight = self.weight
        if torch.is_grad_enabled():
            if self.training and weight.dtype == torch.uint8:
                raise ValueError(
                    "table: got a lookup with gradients from fp8 rows, expected inference: call"
                    " eval() or use torch.no_grad(), or train rows in float32 or bfloat16 and"
                    " quantise them afterwards"
                )
            if weight.requires_grad:
                return F.embedding(row_ids, weight, sparse=self.sparse)
        return gather(weight, row_ids, self.width, self._staging)

    def _count(self, rows: int, different: int, read: int) -> None:
        """Adds a lookup to the counts that `metrics` returns.

        `rows` were asked for, `different` of them are distinct, and `read` were not cached.
        """
        self._counts["rows"] += rows
        self._counts["different"] += different
        self._counts["hits"] += max(0, different - read)
        self._counts["bytes"] += read * self.row_bytes

    def metrics(self) -> dict[str, float]:
        """Returns the counts of lookups; empty for rows on the device.

        Rows looked up, how many different, how many of these cached and their share, bytes read,
        seconds waited.
        """
        if self.placement == "device":
            return {}
        return self._counts | {
            "hit_rate": self._counts["hits"] / max(self._counts["different"], 1.0)
        }

    @torch.no_grad()
    def update(
        self, row_ids: Int[Tensor, " K"], gradient: Float[Tensor, "K W"], update: Update
    ) -> None:
        """Updates rows on the disk, whose ids rise; they are written while the model computes.

        update(rows, first, second, counts, which, gradient) changes the rows and their state in
        place. A read or a write that fails raises TableError at the next call, or at `flush`: one
        rank of several would otherwise raise where the others wait for it.
        """
        self.flush()
        ids = row_ids.numpy()
        file = self._record_file()
        before = file.kept_records(ids)
        if before is None:
            reading = self._run(file.records, ids)
            if reading.exception() is not None:
                self._writing = reading
                return
            before = reading.result()
        after = file.updated(before, gradient, update)
        self._writing = self._run(file.replace, ids, before, after)

    def _record_file(self) -> RecordFile:
        """Returns the file of rows that are trained on the disk. ValueError for any other table."""
        if not isinstance(self.file, RecordFile):
            raise ValueError(
                f"table: got rows on the {self.placement}, expected rows trained on a disk"
            )
        return self.file

    def _run(self, call: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Runs a call after those before it; waits for it if there is no prefetching."""
        future = self._thread.submit(call, *arguments)
        if not self._background:
            future.exception()
        return future

    def flush(self) -> None:
        """Waits for a write in progress. TableError if it failed."""
        writing = self._writing
        self._writing = None
        if writing is not None:
            writing.result()

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """Fills a new table with normal numbers from torch's generator, few in memory at a time.

        A table on the disk that is filled already stays.
        """
        if self.placement == "disk":
            self._record_file().draw(std)
            return
        for first, values in draw_rows(self.rows, self.width, std):
            self.weight[first : first + len(values)] = values.to(self.weight)

    def whole(self, local: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "all ..."]:
        """Returns a tensor with an entry a row, such as `weight`, as checkpoints save it: as it is.

        A table whose rows are sharded over ranks returns it as a DTensor of all ranks' rows.
        """
        return local

    def mark(self, step: int) -> None:
        """Makes the present rows on the disk a mark that `rewind` can restore.

        TableError or OSError if that is not possible, on every rank if it is so on one.
        """
        with self._together():
            self.flush()
            self._record_file().mark(step)

    def rewind(self, step: int) -> None:
        """Restores rows on the disk as of a mark, also one that several ranks made.

        TableError if they are not available, on every rank if it is so on one.
        """
        with self._together():
            self.flush()
        file = self._record_file()
        self.record_shard().take_over(file, step, self._together)
        with self._together():
            file.rewind(step)

    def record_shard(self) -> RecordShard:
        """Returns where the rows are that are trained on the disk."""
        return RecordShard(self._record_file().folder, self.rows, self.width)

    def _together(self) -> AbstractContextManager:
        """Returns a block whose error is raised on every rank of a table that is sharded."""
        return nullcontext()

    def read_trained(self, first: int, end: int) -> Float[Tensor, "rows W"]:
        """Returns rows first..end of a table that is trained on the disk.

        Of one whose rows are sharded over ranks, all have called `flush` before.
        """
        self.flush()
        return self.record_shard().read(first, end)

    def damage(self) -> str | None:
        """Returns why rows can no longer be read from their files; None while they can."""
        return self.file.damage() if isinstance(self.file, RowFile) else None

    def close(self) -> None:
        """Ends the thread and closes the files. TableError if the last write failed."""
        if self.placement == "device":
            return
        self._thread.close()
        if self.file is not None:
            with self._lock:
                self.file.close()
        self.flush()

    def _apply(self, fn: Any, recurse: bool = True) -> "Table":
        """Moves and casts rows on the device; others stay."""
        return super()._apply(fn, recurse) if self.placement == "device" else self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves rows in memory; those on the disk are in their files."""
        if self.placement != "disk":
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Loads rows in memory; those on the disk are in their files."""
        if self.placement != "disk":
            super()._load_from_state_dict(state_dict, prefix, *rest)


class _SparseGradient(torch.autograd.Function):
    """Passes fetched values on, and adds their gradient to the table's weight, row by row."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        ctx.ids = ids
        ctx.shape = weight.shape
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ids = ctx.ids.reshape(1, -1)
        values = gradients[0].reshape(-1, ctx.shape[1]).to(ids.device)
        return torch.sparse_coo_tensor(ids, values, ctx.shape, check_invariants=False), None, None


def check_ids(row_ids: Tensor, rows: int) -> None:
    """Raises ValueError for ids outside 0..rows-1.

    On an accelerator it is an assertion that does not wait.
    """
    if row_ids.dtype not in _ID_TYPES:
        raise ValueError(
            f"got row ids in {row_ids.dtype}, expected {_ID_TYPES[0]} or {_ID_TYPES[1]}"
        )
    if not row_ids.numel() or row_ids.is_meta:
        return
    if row_ids.device.type != "cpu" or torch.compiler.is_compiling():
        low, high = row_ids.aminmax()
        torch._assert_async((low >= 0) & (high < rows), "row ids outside the table")
        return
    ids = row_ids.detach().reshape(-1).numpy()
    outside = (ids < 0) | (ids >= rows)
    if outside.any():
        raise ValueError(f"got row id {ids[outside.argmax()]}, expected 0 to {rows - 1}")


def gather(stored: Tensor, row_ids: Tensor, width: int, staging: Staging) -> Tensor:
    """Copies stored rows, [..., width]; fp8 records become float32."""
    if stored.dtype == torch.uint8 and stored.device.type != "cpu":
        return lookup(stored, row_ids, width)
    ids = row_ids.reshape(-1)
    staged = stored.device.type == "cpu" and not torch.compiler.is_compiling()
    if staged:
        out = staging.take(len(ids), stored.shape[1], stored.dtype)
        rows = torch.index_select(stored, 0, ids, out=out)
    else:
        rows = torch.index_select(stored, 0, ids)
    if stored.dtype == torch.uint8:
        numbers = staging.take(len(ids), width, torch.float32) if staged else None
        rows = dequantise(rows, width, out=numbers)
    return rows.view(*row_ids.shape, width)
