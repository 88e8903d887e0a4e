"""Places in files <-> the bytes that lie there: compiled twins of tables.disk_table.

What the system holds in memory is copied at once, without a wait and without Python's lock. The rest waits for the
disk on many threads together, so that the disk has many reads to choose from; rows of one page or the next are asked
for as one. On Linux, where a read can be told not to wait (preadv2, RWF_NOWAIT).
"""

import sys

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from numba import types
from torch import Tensor

from rorqual.kernels import compiled, hot

NEAR = 4096  # bytes between rows that are asked for together: the disk reads whole pages anyhow
RUN = 1 << 20  # bytes asked for together at most
_NO_WAIT = 8  # RWF_NOWAIT
_WILL_NEED = 3  # POSIX_FADV_WILLNEED
_FEW = 512  # reads that one thread tells the system of: a decoding step's, which others' starting would slow
_THREADS = 32  # that wait together; 16 to 64 measured alike, 8 slower

_pread = types.ExternalFunction("pread", types.intp(types.intc, types.uintp, types.uintp, types.int64))
_preadv2 = types.ExternalFunction("preadv2", types.intp(types.intc, types.uintp, types.intc, types.int64, types.intc))
_pwrite = types.ExternalFunction("pwrite", types.intp(types.intc, types.uintp, types.uintp, types.int64))
_advise = types.ExternalFunction("posix_fadvise", types.intc(types.intc, types.int64, types.int64, types.intc))


@compiled.compiled
def _in_memory(files, offsets, sizes, places, into, missing):  # pragma: no cover
    """Reads what needs no wait; how many others there are, whose numbers are the first of `missing`."""
    vector, count, base = np.empty(2, np.uint64), 0, into.ctypes.data
    for k in range(files.shape[0]):
        vector[0], vector[1] = base + places[k], sizes[k]
        if _preadv2(files[k], vector.ctypes.data, 1, offsets[k], _NO_WAIT) != sizes[k]:
            missing[count] = k
            count += 1
    return count


@compiled.compiled
def _waited(files, offsets, sizes, places, into, numbers, failed, begin, end, foretold):  # pragma: no cover
    """Reads the numbers begin..end; `foretold` has the system told of all of them first."""
    base, told = into.ctypes.data, begin
    for at in range(begin, end):
        while told < end and (told <= at or foretold):
            first = last = numbers[told]
            told += 1
            while told < end and files[numbers[told]] == files[first]:
                k = numbers[told]
                apart = offsets[k] - offsets[last] - sizes[last]
                if apart < 0 or apart > NEAR or offsets[k] + sizes[k] - offsets[first] > RUN:
                    break
                last = k
                told += 1
            if foretold or last != first:
                _advise(files[first], offsets[first], offsets[last] + sizes[last] - offsets[first], _WILL_NEED)
        k = numbers[at]
        failed[k] = _pread(files[k], base + places[k], sizes[k], offsets[k]) != sizes[k]


@compiled.compiled
def _few(ids, starts, files, begins, frozen, buckets, keys, links, ends, held, into, counts):  # pragma: no cover
    """Whether all rows were to be had; counts: different ones, those of them hot."""
    vector, size = np.empty(2, np.uint64), into.shape[1]
    fresh, count = np.empty(ids.shape[0], np.int64), 0
    for k in range(ids.shape[0]):
        row, before = ids[k], 0
        while ids[before] != row:
            before += 1
        if before < k:
            into[k] = into[before]
            continue
        slot = buckets[hot.place_of(buckets, keys, row)]
        if slot >= 0:
            hot.use(links, ends, slot)
            into[k] = held[slot]
            counts[1] += 1
        else:
            shard = np.searchsorted(starts, row, side="right") - 1
            vector[0], vector[1] = into.ctypes.data + k * size, size
            place = begins[shard] + (row - starts[shard]) * size
            if _preadv2(files[shard], vector.ctypes.data, 1, place, _NO_WAIT) != size:
                return False
            fresh[count] = k
            count += 1
    counts[0] = counts[1] + count
    if keys.shape[0] and not frozen:
        for k in fresh[max(0, count - keys.shape[0]) : count]:
            hot.put(buckets, keys, links, ends, held, ids[k], into[k])
    return True


def few_rows(
    ids: Int[np.ndarray, " K"],
    starts: Int[np.ndarray, " S1"],
    files: Int[np.ndarray, " S"],
    begins: Int[np.ndarray, " S"],
    kept: "hot.RowCache",
    into: UInt8[Tensor, "K bytes"],
) -> tuple[int, int] | None:
    """Fills the rows of these ids: how many differ, how many of those were kept; None where one had to be waited for.

    Shard s holds rows starts[s] to starts[s + 1] of its table, from byte begins[s] of files[s] on.
    """
    counts = np.zeros(2, np.int64)
    whole = _few(ids, starts, files, begins, kept.frozen, *kept.arrays, into.numpy(), counts)
    return (int(counts[0]), int(counts[1])) if whole else None


def read_places(
    files: Int[np.ndarray, " K"],
    offsets: Int[np.ndarray, " K"],
    sizes: Int[np.ndarray, " K"],
    places: Int[np.ndarray, " K"],
    into: UInt8[np.ndarray, " bytes"],
    wait: bool = True,
) -> Bool[np.ndarray, " K"]:
    """See tables.disk_table.read_places, whose bytes these are."""
    _check(places, sizes, into)
    missing, failed = np.empty(len(files), np.int64), np.zeros(len(files), np.bool_)
    given = (files, offsets, sizes, places, into)
    count = _in_memory(*given, missing)
    if not wait:
        failed[missing[:count]] = True
        return failed
    parts = 1 if count <= _FEW else _THREADS

    def loop(part: int, begin: int, end: int) -> None:
        _waited(*given, missing, failed, begin, end, parts == 1)

    if count:
        compiled.spread(loop, count, parts)
    return failed


@compiled.compiled
def _written(files, offsets, sizes, places, given, failed):  # pragma: no cover
    base = given.ctypes.data
    for k in range(files.shape[0]):
        failed[k] = _pwrite(files[k], base + places[k], sizes[k], offsets[k]) != sizes[k]


def write_places(
    files: Int[np.ndarray, " K"],
    offsets: Int[np.ndarray, " K"],
    sizes: Int[np.ndarray, " K"],
    places: Int[np.ndarray, " K"],
    given: UInt8[np.ndarray, " bytes"],
) -> Bool[np.ndarray, " K"]:
    """See tables.disk_table.write_places, whose bytes these are."""
    _check(places, sizes, given)
    failed = np.zeros(len(files), np.bool_)
    _written(files, offsets, sizes, places, given, failed)
    return failed


def _check(places: np.ndarray, sizes: np.ndarray, memory: np.ndarray) -> None:
    end = int((places + sizes).max()) if len(places) else 0
    if end > len(memory):
        raise ValueError(f"places: got some up to byte {end}, expected at most {len(memory)}")


def usable(*where: Tensor | torch.device) -> str:
    """Why it cannot run here; "" if it can."""
    if sys.platform != "linux":
        return f"it reads by preadv2, which {sys.platform} lacks"
    return compiled.usable(*where)
