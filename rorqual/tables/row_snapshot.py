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
    from its first row to its last. Copies of a tensor go when all of it is read.
    """

    def __init__(self, tensors: Mapping[str, Shaped[Tensor, "rows ..."]]) -> None:
        self._unread = {name: _Unread(tensor) for name, tensor in tensors.items()}
        first = next(iter(tensors.values()))
        self._lock = threading.Lock()
        self._preserved = torch.zeros(len(first), dtype=torch.bool, device=first.device)

    def preserve(self, ids: Int[Tensor, " K"]) -> None:
        """Copies rows that are about to change, but for those that are read or copied already.

        ids: distinct, in ascending order.
        """
        with self._lock:
            if not self._unread:
                return
            fresh = ids[~self._preserved[ids]]
            self._preserved[fresh] = True
            for unread in self._unread.values():
                unread.copy(fresh)

    def rows(self, name: str, first: int, end: int) -> Shaped[Tensor, "K ..."]:
        """Returns rows first..end of a tensor; those before `end` are not read again."""
        unread = self._unread[name]
        # Rows that change meanwhile are copied before they do, and so they are among the copies.
        rows = unread.tensor[first:end].clone()
        with self._lock:
            unread.restore(rows, first, end)
            if end >= len(unread.tensor):
                self._unread.pop(name, None)
        return rows

    def close(self) -> None:
        """Releases all copies; nothing is preserved any more."""
        with self._lock:
            self._unread.clear()


class _Unread:
    """A tensor of which not all rows are read, and copies of rows that have changed since."""

    def __init__(self, tensor: Shaped[Tensor, "rows ..."]) -> None:
        self.tensor = tensor
        self.first = 0  # rows before it are read
        self.copies: list[tuple[Tensor, Tensor]] = []  # ids, which rise, and their rows

    def copy(self, ids: Int[Tensor, " K"]) -> None:
        """Copies rows that are about to change, but for those that are read."""
        ids = ids[int(torch.searchsorted(ids, self.first)) :]
        if len(ids):
            self.copies.append((ids, self.tensor.index_select(0, ids)))

    def restore(self, rows: Shaped[Tensor, "K ..."], first: int, end: int) -> None:
        """Replaces those of the rows first..end that have changed; they count as read then."""
        for ids, values in self.copies:
            low, high = torch.searchsorted(ids, ids.new_tensor([first, end])).tolist()
            rows[ids[low:high] - first] = values[low:high]
        self.first = end
