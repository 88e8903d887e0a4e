"""Row ids, a matrix in memory -> the first id outside it, or its rows: compiled twins of storage.tables.

A row far from the one before costs a visit to memory, so rows to come are asked for while this one is copied. From 256
bytes a row on torch's copy is as good, and with several threads better: beside its threads this took 1.7 times as long.
"""

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from rorqual.kernels import compiled

_AHEAD = 32  # rows between the one that is asked for and the one that is copied
_LARGE = 256  # bytes of a row that torch copies as fast
_FEW = 4096  # rows below which the call itself counts
_WORDS = (np.uint64, np.uint32, np.uint16, np.uint8)


@compiled.compiled
def _bad(ids, count):  # pragma: no cover
    outside = np.int64(0)
    for k in range(ids.shape[0]):  # without a branch, so on vectors: an id outside has a sign in one or the other
        outside |= np.int64(ids[k]) | (count - 1 - np.int64(ids[k]))
    if outside >= 0:
        return -1
    for k in range(ids.shape[0]):
        if ids[k] < 0 or ids[k] >= count:
            return k
    return -1


def bad_row(ids: Int[np.ndarray, " K"], count: int) -> int:
    """See storage.tables.bad_row, whose answers these are."""
    return _bad(ids, count)


@compiled.compiled
def _gather(values, ids, out):  # pragma: no cover
    line = max(1, 64 // values.itemsize)
    for k in range(ids.shape[0]):
        if k + _AHEAD < ids.shape[0]:
            for i in range(0, values.shape[1], line):
                compiled.ask(values, np.int64(ids[k + _AHEAD]), i)
        given, to = values[ids[k]], out[k]
        for i in range(given.shape[0]):
            to[i] = given[i]


def gather_rows(
    values: Shaped[Tensor, "rows kept"], ids: Int[Tensor, " K"], out: Shaped[Tensor, "K kept"]
) -> Shaped[Tensor, "K kept"]:
    """torch.index_select(values, 0, ids, out=out). IndexError for an id outside, as of torch's."""
    size = values.shape[1] * values.element_size()
    plain = values.is_contiguous() and ids.is_contiguous()
    if len(ids) < _FEW or size >= _LARGE or torch.get_num_threads() > 1 or not plain:
        return torch.index_select(values, 0, ids, out=out)
    word = next(word for word in _WORDS if size % np.dtype(word).itemsize == 0)
    given, to = (tensor.detach().view(torch.uint8).numpy().view(word) for tensor in (values, out))
    rows = ids.numpy()
    if (place := _bad(rows, len(values))) >= 0:  # once more: who asked may have written to them since
        raise IndexError(f"got row id {rows[place]}, expected 0 to {len(values) - 1}")
    _gather(given, rows, to)
    return out
