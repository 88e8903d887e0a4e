"""Keeps an undo journal of rows that are trained in a file, to restore them as of a mark.

    FOLDER/marks.json     the marks that the table can go back to, the newest last
    FOLDER/undo-STEP      after mark STEP, repeated: count, checksum, checksum of both, ids, records

A row's record is written to the journal before it is first overwritten after a mark. A killed
process leaves all that it wrote, so at most the last entry is cut, and its rows were not touched;
any other damage is refused. A machine that stops may lose writes in any order: a journal carries
the boot that it was written in, and that of another boot is refused.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rorqual.io import BINARY, Checksum, flush, flush_open, write_all_at, write_json
from rorqual.tables.row_file import TableError

_HEAD = struct.Struct("<QQ")  # rows of an entry, checksum of its ids and records
_SEAL = struct.Struct("<Q")  # checksum of the head
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Write = Callable[[np.ndarray, np.ndarray], None]  # called with (ids, records)


class Journal:
    """The journal of a table of `rows` records of `size` bytes; keeps the newest `keep` marks."""

    def __init__(self, folder: Path, rows: int, size: int, keep: int) -> None:
        self.folder = folder
        self.size = size
        self.keep = keep
        self._recorded = np.zeros(rows, dtype=np.bool_)  # rows recorded since the last mark
        self._file = -1
        self.marks = read_marks(folder)

    def record(self, ids: np.ndarray, records: np.ndarray) -> None:
        """Records these rows as they are now, except rows recorded since the last mark.

        TableError if it cannot; the file is then as before, so that later entries can be read.
        """
        fresh = ~self._recorded[ids]
        if not fresh.any():
            return
        if self._file < 0:
            self._open()
        ids = ids[fresh]
        body = ids.astype("<i8").tobytes() + records[fresh].tobytes()
        head = _HEAD.pack(len(ids), Checksum(body).intdigest())
        end = os.fstat(self._file).st_size
        try:
            write_all_at(self._file, head + _seal(head) + body, end)
        except OSError as error:
            os.ftruncate(self._file, end)
            wanted = f"room for notes of {len(ids)} rows"
            raise TableError(f"{self.folder}: got {error.strerror}, expected {wanted}") from error
        self._recorded[ids] = True

    def _open(self) -> None:
        """Creates the file; its name is on the disk before the first row is overwritten."""
        if not self.marks:
            raise TableError(f"{self.folder}: got no mark, expected a table that was filled")
        path = self.folder / f"undo-{self.marks[-1]}"
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        except FileExistsError:
            got = "got notes of a process that ended"
            raise TableError(f"{path}: {got}, expected the table rewound first") from None
        try:
            write_all_at(self._file, _boot(), 0)
            flush_open(self._file)
            flush(self.folder)
        except OSError as error:
            self.close()
            path.unlink()
            raise TableError(f"{path}: got {error.strerror}, expected room for notes") from error

    def mark(self, step: int) -> None:
        """Makes the table, as it is on the disk now, the newest mark, and drops old ones."""
        self.close()
        # A file of this name belongs to an earlier mark of the same step.
        (self.folder / f"undo-{step}").unlink(missing_ok=True)
        marks = [*(mark for mark in self.marks if mark < step), step]
        self._save(marks[-self.keep :])
        for mark in marks[: -self.keep]:
            (self.folder / f"undo-{mark}").unlink(missing_ok=True)

    def rewind(self, step: int, write: Write, flush: Callable[[], None]) -> None:
        """Restores the rows as of mark `step`, newest entries first.

        TableError if there is no such mark, or its entries are damaged.
        """
        if step not in self.marks:
            got = f"got no mark of step {step}"
            raise TableError(f"{self.folder}: {got}, expected one of {self.marks}")
        self.close()
        later = [mark for mark in reversed(self.marks) if mark >= step]
        for mark in later:
            path = self.folder / f"undo-{mark}"
            if path.is_file():
                self._replay(path, write, newest=mark == self.marks[-1])
        flush()
        self._save([mark for mark in self.marks if mark <= step])
        for mark in later:
            (self.folder / f"undo-{mark}").unlink(missing_ok=True)

    def _replay(self, path: Path, write: Write, newest: bool) -> None:
        """Writes back all entries of a file; only the file of the newest mark may be cut."""
        boot = _boot()
        with path.open("rb") as file:
            if file.read(len(boot)) != boot:
                raise TableError(
                    f"{path}: the machine has stopped since these rows were trained, so some may be"
                    " lost: start again with a copy of the table, or from the beginning in another"
                    " folder"
                )
            end = file.tell()
            while (entry := self._entry(path, file)) is not None:
                write(*entry)
                end = file.tell()
            if not newest and end != os.fstat(file.fileno()).st_size:
                got = f"got a note cut behind byte {end}"
                raise TableError(f"{path}: {got}, expected it as it was written")

    def _entry(self, path: Path, file: BinaryIO) -> tuple[np.ndarray, np.ndarray] | None:
        """Reads the next ids and records; None at the end, or where an entry is cut."""
        head = file.read(_HEAD.size + _SEAL.size)
        if len(head) < _HEAD.size + _SEAL.size:
            return None
        count, expected = _HEAD.unpack_from(head)
        sealed = head[_HEAD.size :] == _seal(head[: _HEAD.size])
        body = file.read(count * (8 + self.size)) if sealed else b""
        if sealed and len(body) < count * (8 + self.size):
            return None
        if not sealed or Checksum(body).intdigest() != expected:
            got = f"got a damaged note before byte {file.tell()}"
            raise TableError(f"{path}: {got}, expected it as it was written")
        ids = np.frombuffer(body, dtype="<i8", count=count)
        return ids, np.frombuffer(body, np.uint8, offset=8 * count).reshape(count, self.size)

    def _save(self, marks: list[int]) -> None:
        """Writes the marks to marks.json and keeps them in memory."""
        write_json(self.folder / "marks.json", marks)
        self.marks = marks

    def reset(self) -> None:
        """Forgets all marks, before other rows take the place of these."""
        self.close()
        marks = self.marks
        self._save([])
        for mark in marks:
            (self.folder / f"undo-{mark}").unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file; afterwards rows are recorded anew."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        # new memory, which the system does not provide before it is written to
        self._recorded = np.zeros(len(self._recorded), dtype=np.bool_)


def _boot() -> bytes:
    """Returns 40 bytes that identify the machine's current boot, where the system has them."""
    return (BOOT_ID.read_bytes().strip() if BOOT_ID.is_file() else b"").ljust(40)


def read_marks(folder: Path) -> list[int]:
    """Reads the marks of a table's folder; none where there is no table.

    TableError for a file that is not a list of steps.
    """
    path = folder / "marks.json"
    if not path.is_file():
        return []
    try:
        marks = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(f"{path}: {error}, expected a list of steps") from error
    if not isinstance(marks, list) or not all(type(step) is int for step in marks):
        raise TableError(f"{path}: got {marks!r:.60}, expected a list of steps")
    return marks


def _seal(head: bytes) -> bytes:
    """Returns the checksum of an entry's head, which tells a damaged entry from one that is cut."""
    return _SEAL.pack(Checksum(head).intdigest())
