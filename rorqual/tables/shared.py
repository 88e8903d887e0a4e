"""Copies a table's rows to memory, of one process or shared by all processes of a node.

A shared copy is a file in SHARED/rorqual-USER, named after its source. Each process holds a lock on
it until it ends; the next process that opens a shared table removes copies without a lock.
"""

import hashlib
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from rorqual.io import atomic_write, lock, remove_partial
from rorqual.tables.fp8 import FP8
from rorqual.tables.row_file import RowFile

try:
    # POSIX alone; filelock has no shared lock
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

SHARED = Path("/dev/shm")
_PIECE = 1 << 16  # rows copied at a time
_PATIENCE = 3600.0  # timeout in seconds while another process copies


def copy_rows(file: RowFile, into: Tensor | None = None) -> Tensor:
    """Copies all rows as they are stored, to new memory or to the bytes of `into`."""
    raw = torch.empty(file.rows * file.row_bytes, dtype=torch.uint8) if into is None else into
    rows = _typed(raw, file)
    for first in range(0, file.rows, _PIECE):
        end = min(first + _PIECE, file.rows)
        rows[first:end] = file.stored(first, end)
    return rows


def shared_rows(file: RowFile, name: str) -> Tensor:
    """Returns all rows as they are stored, in memory that the processes of this node share."""
    if fcntl is None or not SHARED.is_dir():
        expected = "expected a system with memory that processes share by name"
        raise ValueError(f"shared: got no {SHARED}, {expected}")
    folder = SHARED / f"rorqual-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(f"shared: got {folder} of another user, expected a folder of this one")
    size = file.rows * file.row_bytes
    # A copy of a file has another inode and time, so it has another key.
    stats = [(str(shard.path.resolve()), shard.path.stat()) for shard in file.shards]
    stamps = [(path, about.st_ino, about.st_ctime_ns) for path, about in stats]
    key = hashlib.blake2b(repr((stamps, name, size)).encode(), digest_size=12).hexdigest()
    copy = folder / f"{key}.rows"
    busy = f"{folder}: another process copies for more than {_PATIENCE:.0f} s, expected less"
    with lock(folder / "lock", busy, timeout=_PATIENCE):
        remove_partial(folder)
        _remove_unused(folder, copy)
        if not copy.exists():
            free = shutil.disk_usage(folder).free
            if size > free:
                got = f"got {free:,} bytes free in {SHARED}"
                raise ValueError(f"{file.shards[0].path}: {got}, expected {size:,} for the table")
            with atomic_write(copy) as beside:
                copy_rows(file, _mapped(beside, size))
        # The file is never closed: the lock ends with this process.
        fcntl.flock(os.open(copy, os.O_RDONLY), fcntl.LOCK_SH)
    return _typed(_mapped(copy, size), file)


def _mapped(path: Path, size: int) -> Tensor:
    """Maps a file of `size` bytes into memory that all processes with this file share."""
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _typed(raw: Tensor, file: RowFile) -> Tensor:
    """Views bytes as rows in the type that the file stores, fp8 records as bytes."""
    rows = raw.view(file.rows, file.row_bytes)
    return rows if file.dtype == FP8 else rows.view(file.dtype)


def _remove_unused(folder: Path, wanted: Path) -> None:
    """Removes copies whose last process has ended, but for `wanted`."""
    for path in folder.glob("*.rows"):
        if path == wanted:
            continue
        file = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except BlockingIOError:
            continue
        finally:
            os.close(file)
