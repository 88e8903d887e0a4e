"""Files that appear whole or not at all, locks that end with their process, reads and writes at a position.

Everything that rorqual keeps is written through this module, so that a kill or a full disk at any moment leaves the
file that was there before.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

PARTIAL = ".partial"  # how the name of a file ends that is not whole yet
BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends
_POSITION = threading.Lock()  # held while a file's position is moved, where it cannot be read at another


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new path beside `path` to write to; when the block ends that file is on the disk under `path`.

    If the block raises, the new file is deleted and what was at `path` stays. The file may be read by whom the umask
    lets, whatever the library that wrote it prefers. Where the system refuses safetensors it is an OSError, too. What a
    killed process leaves is removed by `remove_partial`.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        beside.touch()
        mode = stat.S_IMODE(beside.stat().st_mode)
        yield beside
        beside.chmod(mode)
        flush(beside)
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
        raise
    flush(path.parent)


def remove_partial(folder: Path) -> None:
    """Deletes what killed processes were writing in `folder`. For the one process that writes there."""
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, whole or not at all; line ends stay as they are."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def replace_folder(new: Path, folder: Path) -> None:
    """Renames the folder `new` to `folder`; one that is there waits under another name until that is done.

    `restore_folders` puts it back where a process was killed in between.
    """
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    new.rename(folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_folders(parent: Path) -> None:
    """Ends what a killed `replace_folder` began in `parent`. For the one process that writes there."""
    for replaced in parent.glob("*.replaced"):
        place = replaced.with_suffix("")
        if place.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(place)


def flush(path: Path) -> None:
    """Waits until a file's bytes, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows does not open folders
    file = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def lock(path: Path, refusal: str, *, timeout: float = 0) -> Iterator[None]:
    """Holds the lock file `path`, which no other process gets until the block or this process ends.

    ValueError with the text `refusal` where another has it for longer than `timeout` seconds.
    """
    with acquired(path, refusal, timeout=timeout):
        yield


def acquired(path: Path, refusal: str, *, timeout: float = 0, thread_local: bool = True) -> BaseFileLock:
    """Returns the lock that `lock` holds, for those who release it elsewhere, or on another thread."""
    held = FileLock(path, timeout=timeout, thread_local=thread_local)
    try:
        held.acquire(poll_interval=0.1)
    except Timeout:
        raise ValueError(refusal) from None
    return held


def size_and_sha256(path: Path) -> dict[str, Any]:
    """Returns {"bytes": ..., "sha256": ...} of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_at(file: int, into: memoryview, offset: int) -> int:
    """Reads from an open file into memory, from byte `offset` on; returns how many bytes there were."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [into], offset)
    with _POSITION:
        os.lseek(file, offset, os.SEEK_SET)
        found = os.read(file, len(into))
    into[: len(found)] = found
    return len(found)


def write_at(file: int, data: memoryview, offset: int) -> int:
    """Writes to an open file from byte `offset` on; returns how many bytes it took."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, offset)
    with _POSITION:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)


def write_all_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of it from byte `offset` on, however little the system takes at a time."""
    data = memoryview(data)
    while data:
        done = write_at(file, data, offset)
        data, offset = data[done:], offset + done
