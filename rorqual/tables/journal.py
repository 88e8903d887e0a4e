"""Rows before they are first overwritten -> the table as it was at any mark that is kept.

    FOLDER/marks.json           the marks that the table can go back to, the last one newest
    FOLDER/undo-STEP            after mark STEP: [count | checksum | checksum of both | ids | records], again and again

What a row was at a mark is noted before the row is overwritten for the first time after it. A process that is killed
leaves all it has written, so the table goes back to any mark whose notes are there: at most the last entry is cut, and
any other that is not whole is refused as damaged. A machine that stops may lose some of it: notes carry the boot that
they were written in, and those of another boot are refused.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from rorqual.io import BINARY, flush, write_all_at, write_json
from rorqual.tables.row_file import TableError

_HEAD = struct.Struct("<QQ")  # rows of an entry, checksum of its ids and records
_SEAL = struct.Struct("<Q")  # checksum of the head
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """The notes of one table of `rows` records of `size` bytes; of `keep` marks."""

    def __init__(self, folder: Path, rows: int, size: int, keep: int) -> None:
        self.folder, self.size, self.keep = folder, size, keep
        self._noted = np.zeros(rows, dtype=np.bool_)  # since the last mark
        self._file = -1
        self.marks: list[int] = []
        if (folder / "marks.json").is_file():
            self.marks = _marks(folder / "marks.json")

    def record(self, ids: np.ndarray, records: np.ndarray) -> None:
        """Keeps the records that these rows have now, of those not kept since the last mark.

        TableError where they cannot be written; the file is then as before, so that later notes are found behind it.
        """
        fresh = ~self._noted[ids]
        if not fresh.any():
            return
        if self._file < 0:
            self._open()
        ids, body = ids[fresh], records[fresh]
        whole = ids.astype("<i8").tobytes() + body.tobytes()
        head = _HEAD.pack(len(ids), xxhash.xxh3_64_intdigest(whole))
        before = os.fstat(self._file).st_size
        try:
            write_all_at(self._file, head + _seal(head) + whole, before)
        except OSError as error:
            os.ftruncate(self._file, before)
            raise TableError(
                f"{self.folder}: got {error.strerror}, expected room for notes of {len(ids)} rows"
            ) from error
        self._noted[ids] = True

    def _open(self) -> None:
        """The file's name is on the disk before the first row is overwritten, so that a stop is seen."""
        if not self.marks:
            raise TableError(f"{self.folder}: got no mark, expected a table that was filled before it learns")
        path = self.folder / f"undo-{self.marks[-1]}"
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        except FileExistsError:
            raise TableError(f"{path}: got notes of a process that ended, expected the table rewound first") from None
        write_all_at(self._file, _boot(), 0)
        os.fsync(self._file)
        flush(self.folder)

    def mark(self, step: int) -> None:
        """The table as it is on the disk now is `step`; the newest `keep` marks are kept."""
        self.close()
        (self.folder / f"undo-{step}").unlink(missing_ok=True)  # of an earlier mark of the same name
        marks = [*(mark for mark in self.marks if mark < step), step]
        self._save(marks[-self.keep :])
        for mark in marks[: -self.keep]:
            (self.folder / f"undo-{mark}").unlink(missing_ok=True)

    def rewind(self, step: int, write: Callable[[np.ndarray, np.ndarray], None], flush: Callable[[], None]) -> None:
        """Writes back what rows were at mark `step`, newest notes first. TableError where they are not to be had."""
        if step not in self.marks:
            raise TableError(f"{self.folder}: got no mark of step {step}, expected one of {self.marks}")
        self.close()
        later = [mark for mark in reversed(self.marks) if mark >= step]
        for mark in later:
            if (path := self.folder / f"undo-{mark}").is_file():
                self._play(path, write, mark == self.marks[-1])
        flush()
        self._save([mark for mark in self.marks if mark <= step])
        for mark in later:
            (self.folder / f"undo-{mark}").unlink(missing_ok=True)

    def _play(self, path: Path, write: Callable[[np.ndarray, np.ndarray], None], newest: bool) -> None:
        """All entries but a last one that is cut: the rows of that one had not been touched yet.

        TableError for a cut where there is a later mark: those rows were.
        """
        boot = _boot()
        with path.open("rb") as file:
            if file.read(len(boot)) != boot:
                raise TableError(
                    f"{path}: the machine has stopped since these rows were trained, so some may be lost: start again"
                    " with a copy of the table, or from the beginning in another folder"
                )
            end = file.tell()
            while (entry := self._entry(path, file)) is not None:
                write(*entry)
                end = file.tell()
            if not newest and end != os.fstat(file.fileno()).st_size:
                raise TableError(f"{path}: got a note cut behind byte {end}, expected it as it was written")

    def _entry(self, path: Path, file: BinaryIO) -> tuple[np.ndarray, np.ndarray] | None:
        """The next ids and records; None behind the last whole ones. TableError for what was whole and is not now."""
        head = file.read(_HEAD.size + _SEAL.size)
        if len(head) < _HEAD.size + _SEAL.size:
            return None
        count, expected = _HEAD.unpack_from(head)
        if head[_HEAD.size :] != _seal(head[: _HEAD.size]):
            raise TableError(f"{path}: got a damaged note before byte {file.tell()}, expected it as it was written")
        whole = file.read(count * (8 + self.size))
        if len(whole) < count * (8 + self.size):
            return None
        if xxhash.xxh3_64_intdigest(whole) != expected:
            raise TableError(f"{path}: got a damaged note before byte {file.tell()}, expected it as it was written")
        ids = np.frombuffer(whole, dtype="<i8", count=count)
        return ids, np.frombuffer(whole, dtype=np.uint8, offset=8 * count).reshape(count, self.size)

    def _save(self, marks: list[int]) -> None:
        write_json(self.folder / "marks.json", marks)
        self.marks = marks

    def close(self) -> None:
        """What comes next is noted anew, in the file of a mark or after a return."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._noted = np.zeros(len(self._noted), dtype=np.bool_)  # new memory, not taken before it is written to


def _boot() -> bytes:
    """What differs from one start of the machine to the next, where the system says so; 40 bytes."""
    return (_BOOT.read_bytes().strip() if _BOOT.is_file() else b"").ljust(40)


def _marks(path: Path) -> list[int]:
    """TableError for a file that is not a list of steps."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(f"{path}: {error}, expected a list of steps") from error
    if not isinstance(found, list) or not all(type(step) is int for step in found):
        raise TableError(f"{path}: got {found!r:.60}, expected a list of steps")
    return found


def _seal(head: bytes) -> bytes:
    return _SEAL.pack(xxhash.xxh3_64_intdigest(head))
