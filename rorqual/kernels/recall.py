"""Row ids, a matrix in memory -> the first id outside it, or its rows: compiled twins of storage.tables.

A row far from the one before costs a visit to memory, so rows to come are asked for while this one is copied. Rows of
whole cache lines are copied by lines, past the caches where they would not stay there: memory that is written whole
need not be read first. It is one thread's work: a second one of ours would wait for torch's, which still look for work.
"""

import numpy as np
import torch
from jaxtyping import Int, Shaped
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from rorqual.kernels import compiled

_AHEAD = 16  # rows between the one that is asked for and the one that is copied
_LINE = 64  # bytes
_LARGE = 512  # bytes of a row from which on two threads of torch's copy faster
_CACHED = 1 << 22  # bytes of a result that the caches may still hold when it is read
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
    """The place of the first id outside, -1 where there is none."""
    line = max(1, 64 // values.itemsize)
    for k in range(ids.shape[0]):
        row = np.int64(ids[k])
        if row < 0 or row >= values.shape[0]:
            return k
        if k + _AHEAD < ids.shape[0]:
            for i in range(0, values.shape[1], line):
                compiled.ask(values, np.int64(ids[k + _AHEAD]), i)
        given, to = values[row], out[k]
        for i in range(given.shape[0]):
            to[i] = given[i]
    return -1


def _copy(past_caches):
    """One line from an address to another, whole lines from its start."""

    def typed(context, source, target):
        def generate(context, builder, signature, arguments):
            kind = ir.VectorType(ir.FloatType(), 16).as_pointer()
            source, target = (builder.inttoptr(address, kind) for address in arguments)
            stored = builder.store(builder.load(source, align=4), target, align=_LINE)
            if past_caches:
                stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return intrinsic(typed)


@intrinsic
def _settle(context):
    """What went past the caches is there before anything that comes after."""

    def generate(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


_copy_line, _copy_past = _copy(False), _copy(True)


@compiled.compiled
def _gather_lines(values, count, size, ids, out, past_caches):  # pragma: no cover
    """`_gather` of rows of `size` bytes, `count` of them at address `values`, to address `out`."""
    for k in range(ids.shape[0]):
        row = np.int64(ids[k])
        if row < 0 or row >= count:
            return k
        if k + _AHEAD < ids.shape[0]:
            soon = values + np.int64(ids[k + _AHEAD]) * size
            for i in range(0, size, _LINE):
                compiled.prefetch(soon + i)
        given, to = values + row * size, out + k * size
        for i in range(0, size, _LINE):
            if past_caches:
                _copy_past(given + i, to + i)
            else:
                _copy_line(given + i, to + i)
    if past_caches:
        _settle()
    return -1


def gather_rows(
    values: Shaped[Tensor, "rows kept"], ids: Int[Tensor, " K"], out: Shaped[Tensor, "K kept"]
) -> Shaped[Tensor, "K kept"]:
    """torch.index_select(values, 0, ids, out=out). IndexError for an id outside, as of torch's."""
    size, threads = values.shape[1] * values.element_size(), torch.get_num_threads()
    plain = values.is_contiguous() and ids.is_contiguous() and out.is_contiguous()
    lines = size % _LINE == 0 and out.data_ptr() % _LINE == 0
    ours = (lines and (threads == 1 or (threads == 2 and size < _LARGE))) or (threads == 1 and size < _LARGE // 2)
    if len(ids) < _FEW or not plain or not ours:
        return torch.index_select(values, 0, ids, out=out)
    rows = ids.numpy()
    if lines:
        past_caches = len(rows) * size > _CACHED
        place = _gather_lines(values.data_ptr(), len(values), size, rows, out.data_ptr(), past_caches)
    else:
        word = next(word for word in _WORDS if size % np.dtype(word).itemsize == 0)
        given, to = (tensor.detach().view(torch.uint8).numpy().view(word) for tensor in (values, out))
        place = _gather(given, rows, to)
    if place >= 0:  # once more: who asked may have written to them since
        raise IndexError(f"got row id {rows[place]}, expected 0 to {len(values) - 1}")
    return out
