"""A table's files and a TableConfig in -> the table in the home that it names out.

disk    rows stay where they lie: a run's weights, or a table's own folder
host    a copy in memory; `shared`: one copy for all processes of a node, in a file of /dev/shm. It outlives the
        last of them, and is removed when the next shared table is opened
"""

import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rorqual.tables.disk_table import DiskTable
from rorqual.tables.fp8 import FP8, kept_as
from rorqual.tables.row_file import TableError
from rorqual.tables.table import DeviceTable, HostTable
from rorqual.tables.thread import BackgroundThread

try:
    import fcntl  # POSIX alone; filelock has no shared lock
except ImportError:
    fcntl = None  # type: ignore[assignment]

Home = DeviceTable | HostTable | DiskTable

SHARED = Path("/dev/shm")
_PREFIX = "rorqual-table-"
_ROWS = 1 << 16  # copied at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """Where a model's tables live. Rows are kept as their files keep them: a run's in float32."""

    placement: Literal["device", "host", "disk"] = "device"
    folder: str | None = None  # tables 0, 1, ... in the order of the layers; none: those of the run itself
    hot_bytes: int = 64 << 20  # of rows of a table on a disk that are kept in memory
    hot: str | None = None  # a file of row ids, most wanted first, kept for good; none: those read last are kept
    prefetch: bool = True  # in a thread, from the request on
    shared: bool = False  # one copy in host memory for all processes of this node

    def __post_init__(self) -> None:
        if self.placement not in ("device", "host", "disk"):
            raise ValueError(f"tables: got placement {self.placement!r}, expected device, host or disk")
        if self.hot_bytes < 0:
            raise ValueError(f"hot_bytes: got {self.hot_bytes}, expected at least 0")
        if self.shared and self.placement != "host":
            raise ValueError(
                f"shared: got placement {self.placement!r}, expected host: other homes have nothing to share"
            )
        if self.hot is not None and self.placement != "disk":
            raise ValueError(f"hot: got placement {self.placement!r}, expected disk: elsewhere all rows are in memory")


def open_tables(folder: str | os.PathLike[str], count: int, config: TableConfig) -> list[Home]:
    """The `count` tables of a run in the home that the config names; those of the device are in memory yet.

    One thread fetches for all of them.
    TableError where files are missing or unsound; they are read where they lie and never copied to another disk.
    """
    hot = hot_rows(Path(config.hot)) if config.hot is not None else {}
    thread, found = BackgroundThread(), enumerate(places(Path(folder), count, config))
    return [open_table(*place, config, hot.get(str(n)), thread) for n, place in found]


def places(folder: Path, count: int, config: TableConfig) -> list[tuple[Path, str]]:
    """Where each table lies, and its tensor's name: the weights' own, or else those that learnt on a disk."""
    if config.folder is not None:
        return [(Path(config.folder) / str(n), "rows") for n in range(count)]
    if (folder / "tables").is_dir() and not within(folder / "model.safetensors"):
        return [(folder / "tables" / str(n), "rows") for n in range(count)]
    return [(folder / "model.safetensors", f"tables.{n}.weight") for n in range(count)]


def within(path: Path) -> list[str]:
    """The names of the tables in a file of weights, in the order of their layers. TableError for no such file."""
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if re.fullmatch(r"tables\.\d+\.weight", name)]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TableError(f"{path}: {error}, expected a run's weights") from error
    return sorted(names, key=lambda name: int(name.split(".")[1]))


def open_table(
    path: Path, name: str, config: TableConfig, hot: Tensor | None = None, thread: BackgroundThread | None = None
) -> Home:
    """One table. `hot`: int64 row ids, most wanted first. `thread`: what fetches, if others are fetched by it, too."""
    if config.placement == "device":
        rows = copied(path, name)
        width, dtype = kept_as(rows)
        with torch.device("meta"):
            table = DeviceTable(len(rows), width, dtype=dtype)
        table.weight = nn.Parameter(rows, requires_grad=rows.is_floating_point())
        return table
    if config.placement == "disk":
        sizes = {"hot_bytes": config.hot_bytes, "hot_rows": hot}
        return DiskTable(path, name=name, prefetch=config.prefetch, thread=thread, **sizes)  # type: ignore[arg-type]
    rows = _shared(path, name) if config.shared else copied(path, name)
    return HostTable(rows, prefetch=config.prefetch, shared=config.shared, thread=thread)


def hot_rows(path: Path) -> dict[str, Tensor]:
    """Table's number -> row ids, most wanted first. TableError for a file that does not say so."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TableError(f"{path}: {error}, expected a file of row ids") from error
    if not all(name.isdigit() and ids.dim() == 1 and ids.dtype == torch.int64 for name, ids in found.items()):
        raise TableError(f"{path}: got other tensors, expected int64 row ids by their table's number")
    return found


def copied(path: Path, name: str, into: Tensor | None = None) -> Tensor:
    """All rows of a table as it keeps them, [rows, width] or fp8 records; into memory given, if it is."""
    table = DiskTable(path, name=name, hot_bytes=0, prefetch=False)
    try:
        raw = torch.empty(table.rows, table.row_bytes, dtype=torch.uint8) if into is None else into
        raw = raw.view(table.rows, table.row_bytes)
        for first in range(0, table.rows, _ROWS):
            ids = np.arange(first, min(first + _ROWS, table.rows))
            part = table._read(ids)
            assert part is not None
            raw[first : first + len(ids)] = part
    finally:
        table.close()
    return raw if table.dtype == FP8 else raw.view(table.dtype)


def _shared(path: Path, name: str) -> Tensor:
    """`copied`, once for all processes of the node. Its file has a lock that each of them shares until it ends."""
    table = DiskTable(path, name=name, hot_bytes=0)
    table.close()
    size = table.rows * table.row_bytes
    files = sorted(path.resolve().glob("*")) or [path.resolve()]
    stamps = [(str(file), of.st_ino, of.st_ctime_ns) for file in files if (of := file.stat())]  # no copy keeps these
    key = hashlib.blake2b(repr((stamps, name, size)).encode(), digest_size=12).hexdigest()
    if fcntl is None or not SHARED.is_dir():
        raise ValueError(f"shared: got no {SHARED}, expected a system with memory that processes share by name")
    target = SHARED / f"{_PREFIX}{os.getuid()}-{key}"
    with (SHARED / f"rorqual-{os.getuid()}.lock").open("a", encoding="utf-8") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # one process at a time looks, copies or sweeps
        _sweep(target)
        if not target.exists():
            _copy_whole(path, name, target, size)
        fcntl.flock(os.open(target, os.O_RDONLY), fcntl.LOCK_SH)
    raw = torch.from_file(str(target), shared=True, size=size, dtype=torch.uint8).view(table.rows, table.row_bytes)
    return raw if table.dtype == FP8 else raw.view(table.dtype)


def _copy_whole(path: Path, name: str, target: Path, size: int) -> None:
    """The file appears when all rows are in it. ValueError where memory does not suffice."""
    if size > (free := shutil.disk_usage(SHARED).free):
        raise ValueError(f"{path}: got {free:,} bytes free in {SHARED}, expected {size:,} for the table")
    beside = target.with_suffix(".part")
    try:
        os.close(os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600))
        copied(path, name, torch.from_file(str(beside), shared=True, size=size, dtype=torch.uint8))
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def _sweep(wanted: Path) -> None:
    """Removes this user's copies, but `wanted`, whose last process is gone, however it went."""
    for path in SHARED.glob(f"{_PREFIX}{os.getuid()}-*"):
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
