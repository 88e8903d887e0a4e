"""A shape -> memory for rows, taken again as soon as no tensor lies on it.

A large tensor that is made and dropped at every step is given back to the operating system and mapped anew: its pages
cost more than the rows that are written to them. Here they are kept. Memory is taken again when its last tensor, view
or graph is gone, and never before: two requests under way at once get two pieces.
"""

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 20  # bytes; what is smaller the allocator keeps by itself
_KEPT = 2  # pieces; an fp8 recall holds records and values at once
_LINE = 64  # bytes; rows begin where a core's cache line does


class Staging:
    """What one table hands its rows out on. `pinned`: page-locked for a device, by torch's own cache of such memory."""

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._pieces: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        """A copy begins with no memory."""
        return Staging, (self.pinned,)

    def take(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """[rows, width] of any content on the CPU, nobody else's while a tensor on it lives."""
        size = rows * width * dtype.itemsize
        if self.pinned or size < _SMALL:
            return torch.empty(rows, width, dtype=dtype, pin_memory=self.pinned)
        with self._lock:
            lease = self._lease(size)
        return torch.from_numpy(lease).view(dtype).view(rows, width)

    def _lease(self, size: int) -> np.ndarray:
        """Bytes on a free piece. torch holds this very array while a tensor lies on it, so its death frees them."""
        free = [place for place, (_, lease) in enumerate(self._pieces) if lease() is None]
        for place in free:
            piece = self._pieces[place][0]
            if len(piece) >= size:
                lease = piece[:size]
                self._pieces[place] = piece, weakref.ref(lease)
                return lease
        for place in reversed(free):  # too small by now
            del self._pieces[place]
        whole = np.empty(size + _LINE, dtype=np.uint8)
        start = -whole.ctypes.data % _LINE
        lease = whole[start : start + size]
        if len(self._pieces) < _KEPT:
            self._pieces.append((whole[start:], weakref.ref(lease)))
        return lease
