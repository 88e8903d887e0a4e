"""Opens the tables of a run in the placement that its config names."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rorqual.tables.fp8 import stored_as
from rorqual.tables.row_file import RowFile, TableError
from rorqual.tables.shared import copy_rows, shared_rows
from rorqual.tables.table import Placement, Table
from rorqual.tables.thread import BackgroundThread


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """The placement of a model's tables. Rows keep their files' format: a run's are float32."""

    placement: Placement = "device"
    # folder of tables 0, 1, ... in the order of the layers; None: the run's own
    folder: str | None = None
    hot_bytes: int = 64 << 20  # bytes of cached rows of a table on a disk
    hot: str | None = None  # a file of row ids, most wanted first, cached for good
    prefetch: bool = True  # whether rows are fetched on a background thread
    shared: bool = False  # one copy in host memory for all processes of this node

    def __post_init__(self) -> None:
        if self.placement not in ("device", "host", "disk"):
            raise ValueError(f"placement: got {self.placement!r}, expected device, host or disk")
        if self.hot_bytes < 0:
            raise ValueError(f"hot_bytes: got {self.hot_bytes}, expected at least 0")
        if self.shared and self.placement != "host":
            raise ValueError(f"shared: got placement {self.placement!r}, expected host")
        if self.hot is not None and self.placement != "disk":
            raise ValueError(f"hot: got placement {self.placement!r}, expected disk")


def open_tables(folder: str | os.PathLike[str], count: int, config: TableConfig) -> list[Table]:
    """Opens the `count` tables of a run's folder; one thread fetches for all of them.

    TableError for files that are missing or not sound.
    """
    hot = hot_rows(Path(config.hot)) if config.hot is not None else {}
    thread = BackgroundThread()
    places = table_places(Path(folder), count, config)
    return [open_table(*index, config, hot.get(str(n)), thread) for n, index in enumerate(places)]


def table_places(folder: Path, count: int, config: TableConfig) -> list[tuple[Path, str]]:
    """Returns the file or folder of each table, and its tensor's name.

    Rows that were trained on a disk are in FOLDER/tables, others in the weights.
    """
    if config.folder is not None:
        return [(Path(config.folder) / str(n), "rows") for n in range(count)]
    weights = folder / "model.safetensors"
    if (folder / "tables").is_dir() and not table_names(weights):
        return [(folder / "tables" / str(n), "rows") for n in range(count)]
    return [(weights, f"tables.{n}.weight") for n in range(count)]


def table_names(path: Path) -> list[str]:
    """Returns the names of the tables in a file of weights, in the order of their layers."""
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except (OSError, SafetensorError) as error:
        raise TableError(f"{path}: {error}, expected a run's weights") from error
    names = [name for name in keys if re.fullmatch(r"tables\.\d+\.weight", name)]
    return sorted(names, key=lambda name: int(name.split(".")[1]))


def open_table(
    path: Path,
    name: str,
    config: TableConfig,
    hot: Tensor | None = None,
    thread: BackgroundThread | None = None,
) -> Table:
    """Opens one table in the placement of the config: copied to memory, or read on the disk.

    hot: row ids, most wanted first. thread: that of other tables.
    """
    fetching = {"prefetch": config.prefetch, "thread": thread}
    if config.placement == "disk":
        return Table.of_file(path, name, cache_bytes=config.hot_bytes, cached_rows=hot, **fetching)
    file = RowFile(path, name)
    try:
        values = shared_rows(file, name) if config.shared else copy_rows(file)
    finally:
        file.close()
    if config.placement == "host":
        return Table.of_values(values, shared=config.shared, **fetching)
    width, dtype = stored_as(values)
    return Table(len(values), width, dtype=dtype, source=values)


def hot_rows(path: Path) -> dict[str, Tensor]:
    """Reads row ids by the number of their table, most wanted first.

    TableError for another file.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TableError(f"{path}: {error}, expected a file of row ids") from error
    for name, ids in tensors.items():
        if not name.isdigit() or ids.dim() != 1 or ids.dtype != torch.int64:
            expected = "expected int64 row ids by their table's number"
            raise TableError(f"{path}: got other tensors, {expected}")
    return tensors
