"""Writes files whole or not at all, flushes, locks and checks them, and reads at a position.

Configs, weights, tokenizers, tables and edits of memory are written through this module, so that a
kill or a full disk at any moment leaves the file that was there before. Locks end with their
process.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from xxhash import xxh3_64

if TYPE_CHECKING:
    from filelock import BaseFileLock

BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends otherwise
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.partial")  # the names of files that are not whole yet
_ABANDONED = 3600.0  # seconds since its last write, after which a partial file counts as abandoned
# The checksum of rows, headers and journals: Checksum(data).hexdigest(), or .update piece by piece.
Checksum = xxh3_64
# Some file systems refuse to flush a folder with one of these.
_NO_FLUSH = (
    errno.EINVAL,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTSUP,
)
_LONGEST = 50  # characters of a name that its partial file keeps: 200 bytes at most
# Held while a file's position is moved, on systems without reads and writes at a given position.
_POSITION = threading.Lock()


class Locked(ValueError):
    """An error: another process, or another caller in this one, has the lock."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new path beside `path` to write to, and renames it to `path` when the block ends.

    The file is on the disk by then. If the block raises, the new file is deleted and what was at
    `path` stays; a link at `path` is replaced, not followed. The file is readable as the umask
    allows, whatever the library that wrote it sets. An OSError names `path`, also where safetensors
    has an error of its own. What a killed process leaves is deleted when the same path is written
    an hour later, or by `remove_partial`.
    """
    path = Path(path)
    for abandoned in _partial(path.parent, f".{path.name[:_LONGEST]}.", _ABANDONED):
        with suppress(OSError):
            abandoned.unlink()
    # The name is random, since threads and containers may share a process id.
    beside = path.with_name(f".{path.name[:_LONGEST]}.{secrets.token_hex(8)}.partial")
    try:
        os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = stat.S_IMODE(beside.stat().st_mode)
        yield beside
        beside.chmod(mode)
        flush(beside)
        beside.replace(path)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        number = (
            re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        )
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
        # A write to an open file names none.
        if isinstance(error, OSError) and error.filename in (None, os.fspath(beside)):
            error.filename = os.fspath(path)
        raise
    flush(path.parent)


def remove_partial(folder: Path, age: float = 0.0) -> None:
    """Deletes the files that killed processes were writing in `folder`.

    A file is deleted if nothing was written to it for `age` seconds. An age of 0 is for the only
    process that writes there.
    """
    for path in _partial(folder, ".", age):
        path.unlink(missing_ok=True)


def _partial(folder: Path, prefix: str, age: float) -> list[Path]:
    """Returns the partial files with this prefix that were not written to for `age` seconds."""
    partial_files = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(prefix) and _PARTIAL.fullmatch(path.name):
            # Another process may rename or delete it meanwhile.
            with suppress(FileNotFoundError):
                about = path.lstat()
                if stat.S_ISREG(about.st_mode) and time.time() - about.st_mtime >= age:
                    partial_files.append(path)
    return partial_files


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, whole or not at all; line ends stay as they are."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_file(new: Path, path: Path) -> None:
    """Renames the file `new`, which it flushes first, to `path`; what was there is replaced."""
    flush(new)
    new.replace(path)
    flush(path.parent)


def rename(old: Path, new: Path) -> None:
    """Renames a file or folder that is flushed; the new name is on the disk afterwards."""
    old.rename(new)
    flush(new.parent)


def replace_folder(new: Path, folder: Path) -> None:
    """Renames the folder `new`, whose files it flushes first, to `folder`.

    A folder that is there is kept under another name until that is done. `restore_folders` puts it
    back where a process was killed in between.
    """
    flush_folder(new)
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    rename(new, folder)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def new_folder(path: Path, is_whole: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields a folder beside `path` to write in, which becomes `path` when the block ends.

    A damaged folder of that name is replaced; a whole one, which another process has made
    meanwhile, stays. If the block raises, nothing is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield beside
        _put(beside, path, is_whole)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _put(beside: Path, path: Path, is_whole: Callable[[Path], bool]) -> None:
    """Renames the folder to its name, unless another process was first; replaces a damaged one."""
    for attempt in range(2):
        try:
            os.rename(beside, path)
            break
        except OSError:
            if is_whole(path):
                return
            if attempt:
                raise
            shutil.rmtree(path, ignore_errors=True)
    flush(path.parent)


def restore_folders(parent: Path) -> None:
    """Completes or reverts what a killed `replace_folder` began in `parent`.

    It is for the only process that writes there.
    """
    for replaced in parent.glob("*.replaced"):
        folder = replaced.with_suffix("")
        if folder.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(folder)


def flush(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    # Windows does not open folders.
    if os.name == "nt" and path.is_dir():
        return
    try:
        file = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            flush_open(file)
        finally:
            os.close(file)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_FLUSH:
            raise


def flush_open(file: int) -> None:
    """Waits until all bytes of an open file are on the disk."""
    os.fsync(file)


def flush_folder(folder: Path) -> None:
    """Waits until the files of a folder and their names are on the disk."""
    for path in folder.iterdir():
        flush(path)
    flush(folder)


@contextmanager
def lock(path: Path, refusal: str, *, timeout: float = 0) -> Iterator[None]:
    """Holds the lock file `path` until the block or this process ends.

    No other process gets it until then. Locked, with the text `refusal`, where another holds it for
    longer than `timeout` seconds.
    """
    file_lock = acquired(path, refusal, timeout=timeout)
    try:
        yield
    finally:
        file_lock.release()


@contextmanager
def lock_beside(folder: Path, refusal: str) -> Iterator[None]:
    """Holds a lock file beside a folder, which is removed afterwards. Locked as in `lock`."""
    path = folder.with_name(folder.name + ".lock")
    with lock(path, refusal):
        try:
            yield
        finally:
            # Removed before the release, or two processes may lock two files of this name. Windows
            # refuses to remove it.
            with suppress(OSError):
                path.unlink()


def acquired(
    path: Path,
    refusal: str,
    *,
    timeout: float = 0,
    thread_local: bool = True,
    error: type[ValueError] = Locked,
) -> "BaseFileLock":
    """Returns the lock that `lock` holds, acquired.

    It is for callers that release it elsewhere, or on another thread.
    """
    # filelock loads asyncio, which takes longer than most commands that only describe a model.
    from filelock import FileLock, Timeout

    file_lock = FileLock(path, timeout=timeout, thread_local=thread_local)
    try:
        file_lock.acquire(poll_interval=0.1)
    except Timeout:
        raise error(refusal) from None
    return file_lock


def size_and_sha256(path: Path) -> dict[str, Any]:
    """Returns {"bytes": ..., "sha256": ...} of a file."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def read_at(file: int, into: memoryview, offset: int) -> int:
    """Reads from an open file into memory, from byte `offset` on; returns the bytes read."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [into], offset)
    with _POSITION:
        os.lseek(file, offset, os.SEEK_SET)
        count = os.read(file, len(into))
    into[: len(count)] = count
    return len(count)


def write_at(file: int, data: memoryview, offset: int) -> int:
    """Writes to an open file from byte `offset` on; returns the number of bytes written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, offset)
    with _POSITION:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)


def write_all_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of the data from byte `offset` on, even if the system takes it in pieces."""
    data = memoryview(data)
    while data:
        done = write_at(file, data, offset)
        data = data[done:]
        offset = offset + done
