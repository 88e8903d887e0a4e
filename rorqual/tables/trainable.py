"""Row ids and gradients -> rows that learn where they live: on a disk, or in host memory beside a device.

    record of a row on the disk     values [W], average of gradients [W], of their squares [W], number of updates

A request brings whole records; an update changes those that are still here and hands them to the worker, which writes
them while the model computes. The worker does one thing after another, so a later request reads what was written.
Numbers are those of a DeviceTable to the last bit: the caller's own update runs on the records.

In host memory rows are a parameter that stays on the CPU, and so do its gradient, the optimizer's state and the update;
what goes to the device and comes back are the rows that were asked for and their gradients.
"""

import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import BaseFileLock
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.io import BINARY, acquired, write_all_at
from rorqual.kernels import pick
from rorqual.tables.disk_table import read_places, write_places
from rorqual.tables.journal import Journal
from rorqual.tables.row_file import TableError
from rorqual.tables.table import DeviceTable, Fetched, Handle, check_ids, gather
from rorqual.tables.thread import BackgroundThread

Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]  # rows, averages, counts, which, gradient
_FILLED = 1 << 20  # values drawn at a time; a multiple of 16, at which torch's normal numbers are those of one draw
_HELD = 4  # requests whose records wait for an update; of others they are read again


class _Recall(torch.autograd.Function):
    """Rows that are here -> themselves, and a sparse gradient for the table they came from."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, rows: Tensor) -> Tensor:
        ctx.rows, ctx.shape, ctx.device = rows, weight.shape, weight.device
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rows, values = ctx.rows.reshape(1, -1), gradients[0].reshape(-1, ctx.shape[1])
        rows, values = rows.to(ctx.device), values.to(ctx.device)
        return torch.sparse_coo_tensor(rows, values, ctx.shape, check_invariants=False), None, None


class HostedTable(DeviceTable):
    """float32 rows that learn in host memory wherever the model is; a parameter on the CPU, in every state_dict.

    Rows for a device are gathered by the thread, from the request on; for the CPU it is a DeviceTable.
    """

    def __init__(self, rows: int, width: int, *, thread: BackgroundThread | None = None) -> None:
        with torch.random.fork_rng(devices=[]):  # a model draws its own values, from a seed
            super().__init__(rows, width, dtype=torch.float32, sparse=True)
        self._thread = BackgroundThread() if thread is None else thread

    def _apply(self, fn: Any, recurse: bool = True) -> "HostedTable":
        """Stays where it is when the model moves."""
        return self

    def prefetch(self, rows: Int[Tensor, "*B"]) -> Handle:
        """For a device the rows are on their way; with gradients theirs come back to the CPU, sparse."""
        if rows.device.type == "cpu":
            return super().prefetch(rows)
        ids, learns = rows.detach().to("cpu", copy=True), torch.is_grad_enabled() and self.training
        check_ids(ids, self.rows)
        weight = self.weight.detach()
        future: Future[Tensor] = self._thread.submit(gather, weight, ids, self.width, self._staging)

        def wait() -> Tensor:
            values = future.result().to(rows.device, non_blocking=True)
            return _Recall.apply(self.weight, values, ids) if learns else values

        return Handle(wait)

    def close(self) -> None:
        """Ends the thread; the table can be asked again."""
        self._thread.close()


class LearningTable(Fetched):
    """float32 rows in FOLDER/records with all that row-sparse Adam keeps of each; see undo.py on what a kill leaves.

    `weight` stands for the rows in gradients and has none of them in memory. It is in no state_dict: the files are.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        rows: int,
        width: int,
        *,
        keep: int = 3,
        prefetch: bool = True,
        thread: BackgroundThread | None = None,
    ) -> None:
        """A new folder holds nothing until `draw` has filled it. `keep`: marks that it can go back to.

        TableError for a folder of another shape.
        """
        super().__init__(rows, width, torch.float32, 0, prefetch, thread)
        self.folder, self.record = Path(folder), 4 * (3 * width + 1)
        self.weight = nn.Parameter(torch.zeros(1, 1).expand(rows, width))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.folder, rows, self.record, keep)
        self._file, self._owned = _own(self.folder / "records")
        if self._journal.marks and (got := os.fstat(self._file).st_size) != rows * self.record:
            os.close(self._file)
            self._owned.release()
            raise TableError(f"{self.folder}: got {got} bytes of records, expected {rows} times {self.record}")
        self._closed = weakref.finalize(self, _let_go, self._file, self._journal, self._owned)
        self._held: list[tuple[np.ndarray, np.ndarray]] = []
        self._writing: Future[None] | None = None

    def _apply(self, fn: Any, recurse: bool = True) -> "LearningTable":
        """Stays where it is when the model moves."""
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Nothing."""

    @torch.no_grad()
    def draw(self, std: float) -> None:
        """Normal numbers from torch's generator, as one draw of the whole table would give them; in a table that is
        filled already the generator moves on and the rows stay."""
        step, filled = max(16, _FILLED // self.width // 16 * 16), bool(self._journal.marks)
        if not filled:
            os.ftruncate(self._file, 0)  # of a larger table that was never whole
        for first in range(0, self.rows, step):
            left = self.rows - first
            count = left if left < step + 16 else step
            if first and left < 16 and step > 16:
                break  # the part before took them along
            values = torch.randn(count, self.width) * std
            if not filled:
                records = np.zeros((count, self.record // 4), np.float32)
                records[:, : self.width] = values.numpy()
                self._fill(first, records)
            if count == left:
                break
        if not filled:
            self.mark(0)

    def _fill(self, first: int, records: np.ndarray) -> None:
        try:
            write_all_at(self._file, records.data.cast("B"), first * self.record)
        except OSError as error:
            needed = f"expected room for {self.rows * self.record:,} bytes"
            raise TableError(f"{self.folder}: got {error.strerror} at row {first}, {needed}") from error

    def prefetch(self, rows: Int[Tensor, "*B"]) -> Handle:
        """As of any table; with gradients the records stay here for the update to come."""
        pending, learns = super().prefetch(rows), torch.is_grad_enabled() and self.training
        if not learns:
            return pending
        return Handle(lambda: _Recall.apply(self.weight, pending.wait(), rows))

    def _read(self, ids: np.ndarray, wait: bool = True) -> Tensor | None:
        if not wait:
            return None  # behind what is being written
        records = self._records(ids)
        self._held = [*self._held[1 - _HELD :], (ids, records)]
        self._count(bytes=records.nbytes)
        return torch.from_numpy(records[:, : 4 * self.width])

    def _places(self, ids: np.ndarray) -> tuple[np.ndarray, ...]:
        size = np.full(len(ids), self.record)
        return np.full(len(ids), self._file), ids * self.record, size, np.arange(len(ids)) * self.record

    def _records(self, ids: np.ndarray) -> np.ndarray:
        found = np.empty((len(ids), self.record), np.uint8)
        failed = pick("read_places", read_places, torch.device("cpu"))(*self._places(ids), found.reshape(-1))
        self._whole(failed, ids)
        return found

    def _write(self, ids: np.ndarray, records: np.ndarray) -> None:
        given = np.ascontiguousarray(records).reshape(-1).view(np.uint8)
        failed = pick("write_places", write_places, torch.device("cpu"))(*self._places(ids), given)
        self._whole(failed, ids)

    def _whole(self, failed: np.ndarray, ids: np.ndarray) -> None:
        if failed.any():
            row = ids[failed.argmax()]
            raise TableError(f"{self.folder / 'records'}: row {row} is lost: cut, closed, or no room on the disk")

    @torch.no_grad()
    def update(self, touched: Int[Tensor, " K"], gradient: Float[Tensor, "K W"], change: Update) -> None:
        """change(rows, first, second, updates, which, gradient) on the records of the rows `touched`, which rise.

        Written back by the worker; what it cannot write raises TableError at the next call.
        """
        ids = touched.numpy()
        self.flush()
        held = next((records for known, records in self._held if np.array_equal(known, ids)), None)
        before = self._do(self._records, ids).result() if held is None else held
        after, shape = before.view(np.float32).copy(), (-1, 3, self.width)
        parts = np.ascontiguousarray(after[:, :-1].reshape(shape).transpose(1, 0, 2))  # as the update wants them
        rows, first, second = torch.from_numpy(parts).unbind()
        updates = torch.from_numpy(after[:, -1].copy().view(np.int32))
        change(rows, first, second, updates, torch.arange(len(ids)), gradient)
        after[:, :-1] = parts.transpose(1, 0, 2).reshape(len(ids), -1)
        after[:, -1] = updates.numpy().view(np.float32)
        self._writing = self._do(self._replace, ids, before, after)

    def _replace(self, ids: np.ndarray, before: np.ndarray, after: np.ndarray) -> None:
        self._journal.record(ids, before)
        self._write(ids, after)
        self._held = []  # what was read before is no longer so; what is read from now on is

    def flush(self) -> None:
        """Waits for the worker's write. TableError if it failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def mark(self, step: int) -> None:
        """Everything is on the disk, and the table can come back to this step."""
        self.flush()
        os.fsync(self._file)
        self._journal.mark(step)

    def rewind(self, step: int) -> None:
        """The table as it was at mark `step`. TableError where there is no such mark, or its notes are not sound."""
        self.flush()
        self._held = []
        self._journal.rewind(step, self._write, lambda: os.fsync(self._file))

    def values(self, first: int, end: int) -> Float[Tensor, "rows W"]:
        """These rows, float32."""
        self.flush()
        return torch.from_numpy(self._records(np.arange(first, end))[:, : 4 * self.width].copy()).view(torch.float32)

    def close(self) -> None:
        """Ends the worker, when it has written, and closes the files. TableError if it could not write."""
        super().close()
        self._closed()
        self._file = -1
        self.flush()


def _let_go(file: int, journal: Journal, lock: BaseFileLock) -> None:
    os.close(file)
    journal.close()
    lock.release(force=True)


def _own(path: Path) -> tuple[int, BaseFileLock]:
    """The open file and its lock, which nobody else gets until it is released or this process ends.

    TableError while another table has it, here or in another process. A fork of this process does not keep it.
    """
    found = "got rows that another table trains now, in this process or another"
    refusal = f"{path}: {found}; expected one at a time: close the other"
    # a finalizer may release it on any thread
    lock = acquired(path.with_name(path.name + ".lock"), refusal, thread_local=False, error=TableError)
    return os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o666), lock
