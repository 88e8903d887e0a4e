"""Row ids -> those of their rows that are kept in memory, the one used longest ago giving way.

`frozen` keeps what is held: the rows of a list that somebody made. See kernels.hot for the compiled twin.
"""

from collections import OrderedDict

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor


class RowCache:
    """`slots` rows of `row_bytes` bytes; `where` knows their places in `values`, the row used longest ago first."""

    def __init__(self, slots: int, row_bytes: int) -> None:
        self.slots, self.frozen = slots, False
        self.values = torch.empty(slots, row_bytes, dtype=torch.uint8)
        self.where: OrderedDict[int, int] = OrderedDict()

    def lookup(self, ids: Int[np.ndarray, " K"], into: UInt8[Tensor, "K bytes"]) -> Int[np.ndarray, " missing"]:
        """Fills the rows that are hot; returns the places in `ids`, each different, of those that are not."""
        held = [self.where.get(i, -1) for i in ids.tolist()]
        for i, slot in zip(ids.tolist(), held, strict=True):
            if slot >= 0:
                self.where.move_to_end(i)
        slots = np.array(held, dtype=np.int64)
        hits = np.flatnonzero(slots >= 0)
        into[torch.from_numpy(hits)] = self.values[torch.from_numpy(slots[hits])]
        return np.flatnonzero(slots < 0)

    def insert(self, ids: Int[np.ndarray, " K"], values: UInt8[Tensor, "K bytes"]) -> None:
        """Puts in rows that are not held; of more than there are slots only the last ones."""
        if not self.slots or self.frozen:
            return
        slots = []
        for i in ids[-self.slots :].tolist():
            slots.append(len(self.where) if len(self.where) < self.slots else self.where.popitem(last=False)[1])
            self.where[i] = slots[-1]
        self.values[torch.tensor(slots, dtype=torch.int64)] = values[-self.slots :]
