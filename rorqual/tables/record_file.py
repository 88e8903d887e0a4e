"""Stores rows that are trained in a file, with the state of row-sparse Adam beside each.

    FOLDER/records    for each row: values [W], averages of gradients [W] and of their squares [W],
                      number of updates

One read fetches all that an update needs, and one write stores it. See journal.py for what a killed
process leaves.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import BaseFileLock
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from rorqual.io import BINARY, acquired, flush_open, write_all_at
from rorqual.tables.draw import draw_rows
from rorqual.tables.journal import Journal
from rorqual.tables.row_file import ONE_FILE, FileRows, TableError, read_from

# rows, averages, averages of squares, numbers of updates, which of them, gradient
Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]

_CACHED_READS = 4  # reads whose records are kept for an update; those of others are read again


class RecordFile:
    """Rows in float32 and their optimizer state in FOLDER/records, with marks to go back to.

    `keep` is how many marks there are.

    `read` and `replace` are called in order by one thread.
    """

    def __init__(self, folder: str | os.PathLike[str], rows: int, width: int, keep: int) -> None:
        """Opens the folder, or creates one that `draw` fills.

        TableError for a folder of other sizes.
        """
        self.folder = Path(folder)
        self.rows = rows
        self.width = width
        self.record_bytes = 4 * (3 * width + 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.folder, rows, self.record_bytes, keep)
        file, lock = _open_alone(self.folder / "records")
        self._close = weakref.finalize(self, _release, file, self._journal, lock)
        self._records = FileRows(self.folder / "records", file, 0, self.record_bytes)
        size = os.fstat(file).st_size
        if self._journal.marks and size != rows * self.record_bytes:
            self._close()
            expected = f"expected {rows} times {self.record_bytes}"
            raise TableError(f"{self.folder}: got {size} bytes of records, {expected}")
        self._read: list[tuple[np.ndarray, np.ndarray]] = []

    def read(self, ids: Int[np.ndarray, " K"]) -> UInt8[Tensor, "K bytes"]:
        """Returns the values of rising ids; their records are cached for the next update."""
        records = np.empty((len(ids), self.record_bytes), np.uint8)
        read_from([self._records], ONE_FILE, ids, records)
        self._read = [*self._read[1 - _CACHED_READS :], (ids, records)]
        return torch.from_numpy(records[:, : 4 * self.width])

    def records(self, ids: Int[np.ndarray, " K"]) -> UInt8[np.ndarray, "K record"]:
        """Returns whole records of rising ids: values, averages and numbers of updates."""
        records = np.empty((len(ids), self.record_bytes), np.uint8)
        self._records.read(ids, records)
        return records

    def kept_records(self, ids: Int[np.ndarray, " K"]) -> UInt8[np.ndarray, "K record"] | None:
        """Returns the records of a recent `read` of the same ids, if nothing was written since."""
        return next(
            (records for read_ids, records in self._read if np.array_equal(read_ids, ids)), None
        )

    def updated(
        self, before: UInt8[np.ndarray, "K record"], gradient: Float[Tensor, "K W"], update: Update
    ) -> UInt8[np.ndarray, "K record"]:
        """Returns the records after one update of their values and state; nothing is written."""
        after = before.view(np.float32).copy()
        # The update takes three matrices, and a vector of counts.
        parts = after[:, :-1].reshape(-1, 3, self.width).transpose(1, 0, 2)
        matrices = np.ascontiguousarray(parts)
        rows, first, second = torch.from_numpy(matrices).unbind()
        counts = torch.from_numpy(after[:, -1].copy().view(np.int32))
        update(rows, first, second, counts, torch.arange(len(before)), gradient)
        after[:, :-1] = matrices.transpose(1, 0, 2).reshape(len(before), -1)
        after[:, -1] = counts.numpy().view(np.float32)
        return after.view(np.uint8)

    def replace(
        self,
        ids: Int[np.ndarray, " K"],
        before: UInt8[np.ndarray, "K record"],
        after: UInt8[np.ndarray, "K record"],
    ) -> None:
        """Writes new records, after the journal has recorded the old ones."""
        self._journal.record(ids, before)
        self._records.write(ids, after)
        # records read before are out of date, those read from now on are not
        self._read = []

    @torch.no_grad()
    def draw(self, std: float, first: int = 0, rows: int | None = None) -> None:
        """Fills the table with normal numbers, the same as one draw from torch's generator.

        If it is filled already, the generator moves on and the rows stay. A file with the rows from
        `first` on, of a table of `rows` rows, gets theirs; rows behind the table's end are 0.
        """
        rows = self.rows if rows is None else rows
        end = min(first + self.rows, rows)
        filled = bool(self._journal.marks)
        if not filled:
            # The file may have the records of a larger table that was never finished.
            self._resize(0)
        for start, values in draw_rows(rows, self.width, std, first, end):
            if not filled:
                self._fill(start - first, values)
        if not filled:
            self._resize(self.rows)
            self.mark(0)

    def replace_all(self, pieces: Iterable[UInt8[np.ndarray, "K record"]], step: int) -> None:
        """Replaces all records by those of the pieces, in order, and forgets every mark but `step`.

        Records behind them are 0.
        """
        self._read = []
        self._journal.reset()
        self._resize(0)
        first = 0
        for records in pieces:
            self._write_new(first, records)
            first += len(records)
        self._resize(self.rows)
        self.mark(step)

    def _fill(self, first: int, values: Tensor) -> None:
        """Writes new records from row `first` on: these values, with averages and counts of 0."""
        records = np.zeros((len(values), self.record_bytes // 4), np.float32)
        records[:, : self.width] = values.numpy()
        self._write_new(first, records)

    def _write_new(self, first: int, records: np.ndarray) -> None:
        """Writes records of rows from `first` on, without noting what was there."""
        with self._explained(f"at row {first}"):
            write_all_at(self._records.file, records.data.cast("B"), first * self.record_bytes)

    def _resize(self, rows: int) -> None:
        """Sets the size of the file to so many records; those that are new are 0."""
        with self._explained(f"at row {rows}"):
            os.ftruncate(self._records.file, rows * self.record_bytes)

    @contextmanager
    def _explained(self, where: str) -> Iterator[None]:
        """Converts an OSError to a TableError that names the folder."""
        try:
            yield
        except OSError as error:
            needed = f"expected room for {self.rows * self.record_bytes:,} bytes"
            got = f"got {error.strerror} {where}"
            raise TableError(f"{self.folder}: {got}, {needed}") from error

    def mark(self, step: int) -> None:
        """Waits until all writes are on the disk, and makes `step` a mark to go back to."""
        with self._explained("when they were flushed"):
            flush_open(self._records.file)
        self._journal.mark(step)

    def rewind(self, step: int) -> None:
        """Restores rows and state as of mark `step`. TableError if they are not available."""
        self._read = []
        self._journal.rewind(step, self._records.write, lambda: flush_open(self._records.file))

    def close(self) -> None:
        """Closes the files and releases the lock."""
        self._close()
        self._records.file = -1


def read_records(folder: Path, rows: range, width: int) -> UInt8[np.ndarray, "K record"]:
    """Reads records from a folder that no table writes to meanwhile.

    TableError for rows that it does not have.
    """
    path = folder / "records"
    record_bytes = 4 * (3 * width + 1)
    records = np.empty((len(rows), record_bytes), np.uint8)
    try:
        file = os.open(path, os.O_RDONLY | BINARY)
    except OSError as error:
        raise TableError(f"{path}: {error.strerror}, expected trained rows") from error
    try:
        piece = FileRows(path, file, 0, record_bytes)
        piece.read_bytes(records.reshape(-1).data, rows.start * record_bytes)
    finally:
        os.close(file)
    return records


def _release(file: int, journal: Journal, lock: BaseFileLock) -> None:
    """Closes the file and the journal, and releases the lock.

    It is no method, since a finalizer must not refer to its object.
    """
    os.close(file)
    journal.close()
    lock.release(force=True)


def _open_alone(path: Path) -> tuple[int, BaseFileLock]:
    """Opens a file for one table only, until the lock is released or this process ends.

    TableError if another table has it, here or in another process. A fork does not keep the lock.
    """
    refusal = (
        f"{path}: got rows that another table trains now, in this process or another;"
        " expected one at a time: close the other"
    )
    # The lock is not thread-local, since a finalizer may release it on any thread.
    lock_path = path.with_name(path.name + ".lock")
    lock = acquired(lock_path, refusal, thread_local=False, error=TableError)
    return os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o666), lock
