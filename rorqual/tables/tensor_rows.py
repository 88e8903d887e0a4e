"""Reads a table's rows out of published checkpoints, where they are, by position.

    layers.1.engram.embed.weight  e4m3 [rows, W]        a row is read from both tensors and becomes
    layers.1.engram.embed.scale   e8m0 [rows, W / 32]   the fp8 record that other tables store
    shard_{0..n}.weight           e4m3 [rows_i, W]      one scale for the whole table

Nothing is copied or converted beforehand: opening a table of 95 GB reads the headers of its files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from rorqual.tables.fp8 import BLOCK, FP8
from rorqual.tables.row_file import (
    RowFile,
    TableError,
    TensorShard,
    read_from,
    read_once,
)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F8_E4M3": FP8}
SCALES = {"F8_E8M0": torch.uint8, "U8": torch.uint8}


class Source(NamedTuple):
    """One tensor of rows: its file, its name, and which row of the table its first one is."""

    path: Path
    name: str
    first_row: int = 0


class Columns(NamedTuple):
    """Bytes of every row: those that one tensor has, in one piece or in several shards of rows."""

    shards: list[TensorShard]
    first_rows: Int[np.ndarray, " F1"]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in these shards."""
        return self.shards[0].row_bytes

    @property
    def rows(self) -> int:
        """Rows of all shards together."""
        return int(self.first_rows[-1])


def open_columns(sources: Sequence[Source], kinds: Mapping[str, torch.dtype]) -> Columns:
    """Opens the shards of a tensor's rows. TableError if they do not follow each other."""
    shards: list[TensorShard] = []
    row = 0
    try:
        for source in sources:
            shard = TensorShard(source.path, source.name, kinds)
            shards.append(shard)
            first = shards[0]
            if (shard.kind, shard.columns) != (first.kind, first.columns):
                got = f"{shard.kind} of width {shard.columns}"
                raise TableError(
                    f"{source.path}: got {source.name!r} as {got}, "
                    f"expected {first.kind} of width {first.columns} as the first shard"
                )
            if source.first_row != row:
                raise TableError(
                    f"{source.path}: got {source.name!r} as rows from {source.first_row}, "
                    f"expected rows from {row}: a shard missing or doubled"
                )
            row += shard.rows
    except TableError:
        for shard in shards:
            shard.close()
        raise
    return Columns(shards, np.cumsum([0, *(shard.rows for shard in shards)]))


class TensorRows(RowFile):
    """A table's rows in tensors of published checkpoints.

    With `scales`, tensors of e8m0 scales [rows, width / 32], rows are read as fp8 records. With
    `scale`, one number for the whole table, rows are read as e4m3 bytes.
    """

    def __init__(
        self,
        values: Sequence[Source],
        scales: Sequence[Source] = (),
        *,
        scale: float | None = None,
        rows: int | None = None,
    ) -> None:
        """Opens and checks all tensors; `rows` is how many a table has whose files pad it.

        TableError for files that are not sound, or that do not fit each other.
        """
        if not values:
            raise ValueError("table: got no tensor of rows, expected at least one")
        self._columns = [open_columns(values, DTYPES)]
        self.shards = self._columns[0].shards
        self._failed = None
        self._scale = scale
        try:
            self._check(scales, rows)
        except TableError:
            self.close()
            raise

    def _check(self, scales: Sequence[Source], rows: int | None) -> None:
        """Sets width, dtype and rows, and opens the scales. TableError if they do not fit."""
        values = self._columns[0]
        first = values.shards[0]
        self.width = first.columns
        self.dtype = DTYPES[first.kind]
        if scales:
            self._columns.append(open_columns(scales, SCALES))
            self.shards = [*self.shards, *self._columns[1].shards]
        where = f"{first.path}: got rows of {first.kind}"
        if (self.dtype == FP8) != (bool(scales) or self._scale is not None):
            expected = "scales with e4m3 rows, and no scales with others"
            raise TableError(
                f"{where} {'with' if scales else 'without'} scales, expected {expected}"
            )
        if scales:
            block = self._columns[1]
            got = (block.rows, block.row_bytes)
            if self.width % BLOCK or got != (values.rows, self.width // BLOCK):
                raise TableError(
                    f"{where}, {values.rows} by {self.width}, with scales {got[0]} by {got[1]}, "
                    f"expected one for {BLOCK} numbers of a row"
                )
        self.rows = values.rows if rows is None else rows
        if self.rows > values.rows:
            raise TableError(f"{first.path}: got {values.rows} rows, expected {self.rows}")
        self.row_bytes = sum(columns.row_bytes for columns in self._columns)

    def read(self, ids: Int[np.ndarray, " K"]) -> UInt8[Tensor, "K bytes"]:
        """Returns rows as they are stored, an fp8 row with its scales behind it."""
        pieces = []
        try:
            for columns in self._columns:
                raw = np.empty((len(ids), columns.row_bytes), np.uint8)
                read_from(columns.shards, columns.first_rows, ids, raw)
                pieces.append(raw)
        except TableError:
            self._failed = ids
            raise
        return self._joined(pieces)

    def read_cached(self, ids: Int[np.ndarray, " K"]) -> UInt8[Tensor, "K bytes"] | None:
        """Returns the rows if the system has all of them in memory.

        If not, it returns None, and the disk starts to read them.
        """
        pieces = []
        complete = True
        for columns in self._columns:
            raw = np.empty((len(ids), columns.row_bytes), np.uint8)
            got = read_once(columns.shards, columns.first_rows, ids, raw, wait=False)
            complete = complete and got == len(ids)
            pieces.append(raw)
        return self._joined(pieces) if complete else None

    def _joined(self, pieces: list[np.ndarray]) -> Tensor:
        """Puts the bytes of the values and of their scales side by side, row by row."""
        return torch.from_numpy(pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1))

    def numbers(self, stored: UInt8[Tensor, "K bytes"]) -> Float[Tensor, "K width"]:
        """Converts rows as they are stored to numbers; fp8 becomes float32."""
        if self._scale is None:
            return super().numbers(stored)
        return stored.view(FP8).float() * self._scale

    def stored(self, first: int, end: int) -> Tensor:
        """Returns rows first..end as numbers, or as fp8 records if rows have scales."""
        if self._scale is not None:
            return self.numbers(self.read(np.arange(first, end)))
        return super().stored(first, end)
