"""Reads rows of a file at their positions: the compiled kernel of tables.row_file.

All reads of a call are made without the interpreter's lock. Only Linux has reads that do not wait
for the disk (preadv2 with RWF_NOWAIT), so the kernel runs there.
"""

import os

import numpy as np
from jaxtyping import Int, UInt8
from numba import types

from rorqual.kernels import compiled

_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)
_WILL_NEED = getattr(os, "POSIX_FADV_WILLNEED", 0)

_preadv2 = types.ExternalFunction(
    "preadv2", types.intp(types.intc, types.uintp, types.intc, types.int64, types.intc)
)
_posix_fadvise = types.ExternalFunction(
    "posix_fadvise", types.intc(types.intc, types.int64, types.int64, types.intc)
)


@compiled.compiled
def _read(files, starts, first_rows, ids, into, flags):  # pragma: no cover
    """Computes read_rows; `flags` of 0 wait for the disk."""
    vector = np.empty(2, np.uint64)
    base = into.ctypes.data
    size = into.shape[1]
    count = ids.shape[0]
    first_missing = count
    start = 0
    while start < count:
        n = np.searchsorted(first_rows, ids[start], side="right") - 1
        end = start + 1
        while end < count and ids[end] == ids[end - 1] + 1 and ids[end] < first_rows[n + 1]:
            end += 1
        length = (end - start) * size
        offset = starts[n] + (ids[start] - first_rows[n]) * size
        vector[0], vector[1] = base + start * size, length
        got = _preadv2(files[n], vector.ctypes.data, 1, offset, flags)
        if got != length:
            first_missing = min(first_missing, start + max(got, 0) // size)
            if not flags:
                break
            _posix_fadvise(files[n], offset, length, _WILL_NEED)
        start = end
    return first_missing


def read_rows(
    files: Int[np.ndarray, " F"],
    starts: Int[np.ndarray, " F"],
    first_rows: Int[np.ndarray, " F1"],
    ids: Int[np.ndarray, " K"],
    into: UInt8[np.ndarray, "K bytes"],
    wait: bool,
) -> int:
    """Computes tables.row_file.read_rows, with the same bytes."""
    return _read(files, starts, first_rows, ids, into, 0 if wait else _NO_WAIT)
