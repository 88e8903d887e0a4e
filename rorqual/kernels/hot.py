"""Row ids -> those of their rows that are kept in memory: the compiled twin of tables.row_cache.

    buckets [2^n]       an id's slot, or -1, at its hash or the next free place behind it; at most half are taken
    keys    [slots]     the id in a slot
    links   [slots, 2]  the slots used just before it and just after it; -1 at the ends
    ends    [3]         the slot used last, the one used longest ago, how many are taken

A row costs 24 to 32 bytes beside its own.
"""

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from rorqual.kernels import compiled


@compiled.compiled
def _home(row, mask):  # pragma: no cover
    """Where an id's search begins: the high bits of a product, since rows of a head stand side by side."""
    mixed = np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)
    return np.int64(mixed >> np.uint64(32)) & mask


@compiled.compiled
def place_of(buckets, keys, row):  # pragma: no cover
    """The bucket of an id, or the free one where it would be."""
    mask = buckets.shape[0] - 1
    at = _home(row, mask)
    while buckets[at] >= 0 and keys[buckets[at]] != row:
        at = (at + 1) & mask
    return at


@compiled.compiled
def _unlink(links, ends, slot):  # pragma: no cover
    newer, older = links[slot, 0], links[slot, 1]
    if newer >= 0:
        links[newer, 1] = older
    else:
        ends[0] = older
    if older >= 0:
        links[older, 0] = newer
    else:
        ends[1] = newer


@compiled.compiled
def _link(links, ends, slot):  # pragma: no cover
    links[slot, 0], links[slot, 1] = -1, ends[0]
    if ends[0] >= 0:
        links[ends[0], 0] = slot
    ends[0] = slot
    if ends[1] < 0:
        ends[1] = slot


@compiled.compiled
def use(links, ends, slot):  # pragma: no cover
    """This slot is the one used last."""
    if ends[0] != slot:
        _unlink(links, ends, slot)
        _link(links, ends, slot)


@compiled.compiled
def _drop(buckets, keys, row):  # pragma: no cover
    """Frees an id's bucket; those behind it that began before the gap move into it."""
    mask = buckets.shape[0] - 1
    gap = place_of(buckets, keys, row)
    at = (gap + 1) & mask
    while buckets[at] >= 0:
        if ((at - _home(keys[buckets[at]], mask)) & mask) >= ((at - gap) & mask):
            buckets[gap] = buckets[at]
            gap = at
        at = (at + 1) & mask
    buckets[gap] = -1


@compiled.compiled
def put(buckets, keys, links, ends, held, row, value):  # pragma: no cover
    """A row that is not held, in place of the one used longest ago where there is no room."""
    if ends[2] < keys.shape[0]:
        slot = ends[2]
        ends[2] += 1
    else:
        slot = ends[1]
        _drop(buckets, keys, keys[slot])
        _unlink(links, ends, slot)
    keys[slot] = row
    buckets[place_of(buckets, keys, row)] = slot
    _link(links, ends, slot)
    held[slot] = value


@compiled.compiled
def _take(buckets, keys, links, ends, held, ids, into, missing):  # pragma: no cover
    count = 0
    for k in range(ids.shape[0]):
        slot = buckets[place_of(buckets, keys, ids[k])]
        if slot >= 0:
            use(links, ends, slot)
            into[k] = held[slot]
        else:
            missing[count] = k
            count += 1
    return count


@compiled.compiled
def _keep(buckets, keys, links, ends, held, ids, values):  # pragma: no cover
    for k in range(max(0, ids.shape[0] - keys.shape[0]), ids.shape[0]):
        put(buckets, keys, links, ends, held, ids[k], values[k])


class RowCache:
    """See tables.row_cache.RowCache, whose rows and order these are."""

    def __init__(self, slots: int, row_bytes: int) -> None:
        self.slots, self.frozen = slots, False
        self.values = torch.empty(slots, row_bytes, dtype=torch.uint8)
        place = np.int32 if slots < 1 << 31 else np.int64  # of a slot
        buckets = np.full(max(2, 1 << (2 * slots - 1).bit_length()) if slots else 2, -1, place)
        keys, links, ends = np.empty(slots, np.int64), np.empty((slots, 2), place), np.array([-1, -1, 0])
        self.arrays = (buckets, keys, links, ends, self.values.numpy())

    def lookup(self, ids: Int[np.ndarray, " K"], into: UInt8[Tensor, "K bytes"]) -> Int[np.ndarray, " missing"]:
        """Fills the rows that are hot; returns the places in `ids`, each different, of those that are not."""
        missing = np.empty(len(ids), np.int64)
        return missing[: _take(*self.arrays, ids, into.numpy(), missing)]

    def insert(self, ids: Int[np.ndarray, " K"], values: UInt8[Tensor, "K bytes"]) -> None:
        """Puts in rows that are not held; of more than there are slots only the last ones."""
        if self.slots and not self.frozen:
            _keep(*self.arrays, ids, values.numpy())
