"""Reads the rows of a table as they were at one moment, while they are trained on.

A copy of a large table would not fit beside it. A step changes few rows: those that are about to
change are copied first, and the others are read where they are.
"""

import threading
from collections.abc import Mapping

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


class RowSnapshot:
    """Tensors with an entry for each row of one table, as they are when the snapshot is made.

    One thread trains, and calls `preserve` before it changes rows. Another reads each tensor once,
    from its first row to its last.
    """

    def __init__(self, tensors: Mapping[str, Shaped[Tensor, "rows ..."]]) -> None:
        self._tensors = dict(tensors)
        first = next(iter(self._tensors.values()))
        self._lock = threading.Lock()
        # Rows of each tensor before this one are read.
        self._read = dict.fromkeys(self._tensors, 0)
        self._preserved = torch.zeros(len(first), dtype=torch.bool, device=first.device)
        # What `preserve` copied, call by call.
        self._ids: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = {name: [] for name in self._tensors}

    def preserve(self, ids: Int[Tensor, " K"]) -> None:
        """Copies rows that are about to change, but for those that are read or copied already."""
        with self._lock:
            if not self._tensors:
                return
            first = min(self._read.values())
            fresh = ids[(ids >= first) & ~self._preserved[ids]]
            if not len(fresh):
                return
            self._preserved[fresh] = True
            self._ids.append(fresh)
            for name, tensor in self._tensors.items():
                self._values[name].append(tensor.index_select(0, fresh))

    def rows(self, name: str, first: int, end: int) -> Shaped[Tensor, "K ..."]:
        """Returns rows first..end of a tensor; those before `end` are not read again."""
        with self._lock:
            # A row that changes at this moment is among those that were copied.
            rows = self._tensors[name][first:end].clone()
            for ids, values in zip(self._ids, self._values[name], strict=True):
                inside = (ids >= first) & (ids < end)
                rows[ids[inside] - first] = values[inside]
            self._read[name] = end
        return rows

    def close(self) -> None:
        """Releases all copies; nothing is preserved any more."""
        with self._lock:
            self._tensors.clear()
            self._ids.clear()
            self._values.clear()
