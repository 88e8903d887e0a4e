"""Provides memory for large results, and reuses it once no tensor refers to it.

The system maps a large tensor anew each time that it is made, and its new pages cost more than the
rows that are written to them.
"""

import threading
import weakref

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 20  # bytes; torch's allocator keeps smaller blocks itself
_MAX_BLOCKS = 2  # blocks; a lookup in an fp8 table needs two at once
_LINE = 64  # bytes of a cache line, where rows begin


class Staging:
    """Provides memory of any size. `pinned`: page-locked memory, from torch's cache."""

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._blocks: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        """Makes a copy start without memory."""
        return Staging, (self.pinned,)

    def take(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """Returns an uninitialised tensor [rows, width] on the CPU, in memory that is reused.

        Nothing else uses its memory while a view lives.
        """
        size = rows * width * dtype.itemsize
        if self.pinned or size < _SMALL:
            return torch.empty(rows, width, dtype=dtype, pin_memory=self.pinned)
        with self._lock:
            lease = self._lease(size)
        return torch.from_numpy(lease).view(dtype).view(rows, width)

    def _lease(self, size: int) -> np.ndarray:
        """Returns the bytes of a free block, or of a new one if none is large enough.

        Tensors hold the array; the block is free when it dies.
        """
        free = [slot for slot, (_, lease) in enumerate(self._blocks) if lease() is None]
        for slot in free:
            block = self._blocks[slot][0]
            if len(block) >= size:
                lease = block[:size]
                self._blocks[slot] = block, weakref.ref(lease)
                return lease
        # All free blocks are too small.
        for slot in reversed(free):
            del self._blocks[slot]
        whole = np.empty(size + _LINE, dtype=np.uint8)
        start = -whole.ctypes.data % _LINE
        lease = whole[start : start + size]
        if len(self._blocks) < _MAX_BLOCKS:
            self._blocks.append((whole[start:], weakref.ref(lease)))
        return lease
