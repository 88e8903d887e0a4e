"""Caches the most recently used rows in memory."""

from collections import OrderedDict

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor


class RowCache:
    """Rows by id, bounded in bytes; a new row replaces the least recently used one.

    If `frozen`, the rows that are in it stay and no others come.
    """

    def __init__(self, max_bytes: int, row_bytes: int, rows: int) -> None:
        """Reserves memory for `max_bytes` of rows, but for no more than the table's `rows`."""
        self.slots = min(rows, max_bytes // row_bytes)
        self.frozen = False
        self._values = torch.empty(self.slots, row_bytes, dtype=torch.uint8)
        # slots by row id, the least recently used first
        self._slot_of: OrderedDict[int, int] = OrderedDict()

    def lookup(
        self, ids: Int[np.ndarray, " K"]
    ) -> tuple[UInt8[Tensor, "K bytes"], Int[np.ndarray, " missing"]]:
        """Returns rows of distinct ids, and the places of uncached ones, to be filled in."""
        if not self.slots:
            rows = torch.empty(len(ids), self._values.shape[1], dtype=torch.uint8)
            return rows, np.arange(len(ids))
        slots = np.array([self._use(row) for row in ids.tolist()], dtype=np.int64)
        missing = np.flatnonzero(slots < 0)
        # Missing rows get any row's bytes; the caller overwrites them.
        slots[missing] = 0
        return self._values.index_select(0, torch.from_numpy(slots)), missing

    def _use(self, row: int) -> int:
        """Returns the slot of a row and makes it the most recently used; -1 if it is not cached."""
        slot = self._slot_of.get(row, -1)
        if slot >= 0:
            self._slot_of.move_to_end(row)
        return slot

    def insert(self, ids: Int[np.ndarray, " K"], values: UInt8[Tensor, "K bytes"]) -> None:
        """Caches rows that are not cached yet; if they are more than fit, the last ones."""
        if not self.slots or self.frozen:
            return
        slots = [self._place(row) for row in ids[-self.slots :].tolist()]
        self._values[torch.tensor(slots, dtype=torch.int64)] = values[-self.slots :]

    def _place(self, row: int) -> int:
        """Returns a free slot, or the slot of the least recently used row, which is removed."""
        if len(self._slot_of) < self.slots:
            slot = len(self._slot_of)
        else:
            slot = self._slot_of.popitem(last=False)[1]
        self._slot_of[row] = slot
        return slot
