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
        self._values = np.empty((self.slots, row_bytes), np.uint8)
        # slots by row id, the least recently used first
        self._slot_of: OrderedDict[int, int] = OrderedDict()

    def lookup(
        self, ids: Int[np.ndarray, " K"]
    ) -> tuple[UInt8[Tensor, "K bytes"], Int[np.ndarray, " missing"]]:
        """Returns rows, and the places of those that are not cached, to be filled in."""
        rows = torch.empty(len(ids), self._values.shape[1], dtype=torch.uint8)
        if not self.slots:
            return rows, np.arange(len(ids))
        wanted = ids.tolist()
        slots = np.array([self._slot_of.get(row, -1) for row in wanted], dtype=np.int64)
        for row, slot in zip(wanted, slots.tolist(), strict=True):
            if slot >= 0:
                self._slot_of.move_to_end(row)
        # Missing rows get any row's bytes; the caller overwrites them.
        self._values.take(slots, axis=0, out=rows.numpy(), mode="clip")
        return rows, np.flatnonzero(slots < 0)

    def insert(self, ids: Int[np.ndarray, " K"], values: UInt8[Tensor, "K bytes"]) -> None:
        """Caches rows that are not cached yet; if they are more than fit, the last ones."""
        if not self.slots or self.frozen:
            return
        first = max(0, len(ids) - self.slots)
        places = {
            self._slot(row): index
            for index, row in enumerate(ids[first:].tolist(), first)
            if row not in self._slot_of
        }
        self._values[list(places)] = values.numpy()[list(places.values())]

    def _slot(self, row: int) -> int:
        """Returns a free slot, or the slot of the least recently used row, which is removed."""
        if len(self._slot_of) < self.slots:
            slot = len(self._slot_of)
        else:
            slot = self._slot_of.popitem(last=False)[1]
        self._slot_of[row] = slot
        return slot
