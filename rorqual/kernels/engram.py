"""Computes the table rows that token ids address: compiled kernels of layers.addresses, on the CPU.

hash_rows     rows of a window of ids              kernel of layers.addresses.hash_rows
follow_rows   rows of new ids behind cached ones   kernel of layers.addresses.follow_rows

Tokens are processed in blocks, one head at a time over a block, so that all arithmetic uses vector
instructions. Where every prime p is at least 2^13 and below 2^31, the remainder is computed without
a division, and is still exact. With u = 2^-53, in float64,

    q = round(x i + 2^52) - 2^52,  i = 1/p,    r = x - q p,    then r + p if r < 0

x < 2^63, i and x i are each rounded once, by at most u, so that x i is at most 3u 2^63/p <= 3/8
from x/p, and q, the nearest integer, at most 7/8: -p < r < p. Since x i < 2^50, the lowest bits of
x i + 2^52 are those of q. 32 bits suffice for r, and there min(r, r + p), without signs, is what is
looked for. Threads split the tokens; the compiled code
releases Python's lock. It takes memory addresses, since the conversion of each tensor to an array
costs more than the hash of a whole decoding step.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rorqual.kernels.compiled import compiled, pointer

_BLOCK = 256  # tokens at a time: their intermediate values stay in the first caches
_SMALL_CALL = 64  # tokens that each call writes to the cache of ids itself
_EXACT = 2**13, 2**31  # primes from the first and below the second: the proof above holds
_LOW = 2**32 - 1  # masks the lowest 32 bits
_WORTH_A_THREAD = 16384  # addresses; below, starting threads takes longer than the work


@compiled
def _look_up(
    ids, stride, ids_before, time, reach, canonical, pad, canonical_ids, start, count
):  # pragma: no cover
    """Writes canonical_ids[k, j] = canonical id k before token start + j; False if an id has none.

    `ids_before` ids precede the tokens of each sequence.
    """
    # Any bit that is set in `unknown`, or the sign in `unmapped`: an id that has no canonical id.
    unknown = np.uint64(0)
    unmapped = np.int64(0)
    top = np.uint64(len(canonical))
    done = 0
    row = start // time
    t = start % time
    while done < count:
        run = min(count - done, time - t)
        column = row * stride + ids_before + t
        raw_ids = ids[column : column + run]
        values = canonical_ids[0, done : done + run]
        for j in range(run):
            raw = np.uint64(raw_ids[j])
            # Unsigned, so that a negative id is a large one, and one comparison is enough.
            safe = raw if raw < top else np.uint64(0)
            values[j] = np.int64(canonical[safe])
            unknown |= raw - safe
            unmapped |= values[j]
        for k in range(1, len(canonical_ids)):
            canonical_ids[k, done] = pad
            if k <= t + ids_before:
                raw = np.uint64(ids[column - k])
                safe = raw if raw < top else np.uint64(0)
                canonical_ids[k, done] = np.int64(canonical[safe])
                unknown |= raw - safe
                unmapped |= canonical_ids[k, done]
            for j in range(done + 1, done + run):
                canonical_ids[k, j] = canonical_ids[k - 1, j - 1]
        done = done + run
        row = row + 1
        t = 0
    if len(reach):
        for k in range(1, len(canonical_ids)):
            for j in range(count):
                canonical_ids[k, j] = canonical_ids[k, j] if reach[start + j] >= k else pad
    return unknown == 0 and unmapped >= 0


@compiled
def _invert(primes):  # pragma: no cover
    """Returns the proof's factors i, shaped as `primes`; empty where the proof does not hold."""
    inverse = np.empty(primes.shape)
    for layer in range(primes.shape[0]):
        for order in range(primes.shape[1]):
            for head in range(primes.shape[2]):
                inverse[layer, order, head] = 1.0 / primes[layer, order, head]
                if not _EXACT[0] <= primes[layer, order, head] < _EXACT[1]:
                    return inverse[:, :0]
    return inverse


@compiled
def _mix(
    canonical, multipliers, primes, inverse, offsets, mix, width, sums, rows, count
):  # pragma: no cover
    """Writes rows[head, j] of one layer, orders side by side; divides where `inverse` is empty.

    `mix`, `width` and `sums` are memory for `count` numbers.
    """
    orders, heads = primes.shape
    bits = sums.view(np.int64)
    for j in range(count):
        mix[j] = canonical[0, j] * multipliers[0]
    for order in range(orders):
        for j in range(count):
            mix[j] ^= canonical[order + 1, j] * multipliers[order + 1]
            width[j] = np.float64(mix[j])
        for head in range(heads):
            prime = primes[order, head]
            index = order * heads + head
            offset = offsets[index]
            if len(inverse):
                factor = inverse[order, head]
                for j in range(count):
                    sums[j] = width[j] * factor + 2.0**52
                for j in range(count):
                    rest = (mix[j] - (bits[j] & _LOW) * (prime & _LOW)) & _LOW
                    rows[index, j] = min(rest, (rest + prime) & _LOW) + offset
            else:
                for j in range(count):
                    rows[index, j] = mix[j] % prime + offset


@compiled
def _hash(
    fixed, new, new_stride, ids, stride, ids_before, batch, time, reach, pad, out, first, last,
):  # pragma: no cover  # fmt: skip
    """Fills out[:, first:last], with tokens counted over the batch; False if an id is unknown.

    The ids `new` are written to the cache first.
    """
    canonical, multipliers, primes, offsets, layers, orders, heads, top = fixed
    width = orders * heads
    memory = numba.carray(pointer(ids), batch * stride, np.int64)
    if new:
        source = numba.carray(pointer(new), batch * new_stride, np.int64)
        for row in range(batch):
            for t in range(time):
                memory[row * stride + ids_before + t] = source[row * new_stride + t]
    reach_rows = numba.carray(pointer(reach), batch * time if reach else 0, np.int64)
    folded = numba.carray(pointer(canonical), top, np.int32)
    factors = numba.carray(pointer(multipliers), (layers, orders + 1), np.int64)
    moduli = numba.carray(pointer(primes), (layers, orders, heads), np.int64)
    starts = numba.carray(pointer(offsets), (layers, width), np.int64)
    rows = numba.carray(pointer(out), (layers, batch * time, width), np.int64)
    inverse = _invert(moduli)
    canonical_ids = np.empty((orders + 1, _BLOCK), np.int64)
    block = np.empty((width, _BLOCK), np.int64)
    mix = np.empty(_BLOCK, np.int64)
    wider = np.empty(_BLOCK)
    sums = np.empty(_BLOCK)
    for start in range(first, last, _BLOCK):
        count = min(_BLOCK, last - start)
        if not _look_up(
            memory, stride, ids_before, time, reach_rows, folded, pad, canonical_ids, start, count
        ):
            return False
        for layer in range(layers):
            _mix(
                canonical_ids,
                factors[layer],
                moduli[layer],
                inverse[layer],
                starts[layer],
                mix,
                wider,
                sums,
                block,
                count,
            )
            for j in range(count):
                for offset in range(width):
                    rows[layer, start + j, offset] = block[offset, j]
    return True


def hash_rows(
    ids: Int[Tensor, "B W"],
    reach: Int[Tensor, "B T"] | None,
    canonical_map: Int[Tensor, " V"],
    multipliers: Int[Tensor, "Lm N"],
    primes: Int[Tensor, "Lm O J"],
    offsets: Int[Tensor, "Lm R"],
    pad: int,
    out: Int[Tensor, "Lm B T R"] | None = None,
    scratch: dict[str, Any] | None = None,
) -> Int[Tensor, "Lm B T R"]:
    """Computes layers.addresses.hash_rows, bit for bit."""
    ids, stride = _plain(ids)
    reach_rows = None if reach is None else reach.long().contiguous()
    fixed = _fixed_tensors(scratch, canonical_map, multipliers, primes, offsets)
    batch, width = ids.shape
    return _run(
        fixed,
        0,
        0,
        ids.data_ptr(),
        stride,
        fixed.orders,
        batch,
        width - fixed.orders,
        reach_rows,
        pad,
        out,
    )


def follow_rows(
    ids: Int[Tensor, "B T"],
    window_ids: Int[Tensor, "B L"] | None,
    column: int,
    canonical_map: Int[Tensor, " V"],
    multipliers: Int[Tensor, "Lm N"],
    primes: Int[Tensor, "Lm O J"],
    offsets: Int[Tensor, "Lm R"],
    pad_id: int,
    out: Int[Tensor, "Lm B T R"] | None = None,
    scratch: dict[str, Any] | None = None,
) -> Int[Tensor, "Lm B T R"]:
    """Computes layers.addresses.follow_rows, bit for bit."""
    fixed = _fixed_tensors(scratch, canonical_map, multipliers, primes, offsets)
    batch, time = ids.shape
    ids, stride = _plain(ids)
    if window_ids is None:
        return _run(
            fixed,
            0,
            0,
            ids.data_ptr(),
            stride,
            0,
            batch,
            time,
            None,
            int(canonical_map[pad_id]),
            out,
        )
    width, reach_rows = window_ids.stride()
    assert window_ids.dtype is torch.int64 and reach_rows == 1
    before = window_ids.data_ptr() + 8 * (column - fixed.orders)
    if batch * time <= _SMALL_CALL:
        return _run(
            fixed, ids.data_ptr(), stride, before, width, fixed.orders, batch, time, None, 0, out
        )
    window_ids[:, column : column + time] = ids
    return _run(fixed, 0, 0, before, width, fixed.orders, batch, time, None, 0, out)


class _FixedTensors(NamedTuple):
    """The addresses and sizes of four tensors, cached.

    Reading them again costs more than the hash of a decoding step.
    """

    exact: tuple[Tensor, ...]  # referenced, so that their memory is not reused
    pointers: tuple[int, ...]
    numbers: tuple[int, ...]  # the pointers, then Lm, O, J and V
    layers: int
    orders: int
    width: int


def _fixed_tensors(
    scratch: dict[str, Any] | None,
    canonical_map: Tensor,
    multipliers: Tensor,
    primes: Tensor,
    offsets: Tensor,
) -> _FixedTensors:
    """Returns the cached addresses and sizes, or reads them again where the tensors have moved."""
    pointers = (
        canonical_map.data_ptr(),
        multipliers.data_ptr(),
        primes.data_ptr(),
        offsets.data_ptr(),
    )
    fixed = scratch.get("fixed") if scratch else None
    if fixed is not None and fixed.pointers == pointers:
        return fixed
    exact = (canonical_map, multipliers, primes, offsets)
    assert all(x.is_contiguous() for x in exact) and canonical_map.dtype is torch.int32
    layers, orders, heads = primes.shape
    numbers = (*pointers, layers, orders, heads, len(canonical_map))
    fixed = _FixedTensors(exact, pointers, numbers, layers, orders, orders * heads)
    if scratch is not None:
        scratch["fixed"] = fixed
    return fixed


def _plain(ids: Tensor) -> tuple[Tensor, int]:
    """Returns the ids as int64, contiguous in each sequence, and the stride between sequences."""
    ids = ids if ids.dtype is torch.int64 else ids.long()
    stride, reach_rows = ids.stride()
    return (ids, stride) if reach_rows == 1 else (ids.contiguous(), ids.shape[1])


def _run(fixed, new, new_stride, ids, stride, ids_before, batch, time, reach, pad, out) -> Tensor:
    """Hashes `batch` times `time` tokens to rows, by several threads where that is worth it.

    The first token is `ids_before` ids after the address `ids`.
    """
    if out is None:
        # This takes half the time of torch.empty.
        out = torch.from_numpy(np.empty((fixed.layers, batch, time, fixed.width), np.int64))
    else:
        assert out.is_contiguous()
    reach_rows = 0 if reach is None else reach.data_ptr()
    arguments = (
        fixed.numbers,
        new,
        new_stride,
        ids,
        stride,
        ids_before,
        batch,
        time,
        reach_rows,
        pad,
        out.data_ptr(),
    )
    size = fixed.layers * batch * time * fixed.width
    if size < 2 * _WORTH_A_THREAD:
        canonical = _hash(*arguments, 0, batch * time)
    else:
        canonical = _by_threads(
            arguments, batch * time, min(torch.get_num_threads(), size // _WORTH_A_THREAD)
        )
    if not canonical:
        raise IndexError("an id has no canonical id")
    return out


def _by_threads(arguments: tuple[Any, ...], tokens: int, parts: int) -> bool:
    """Runs `_hash` on equal shares of the tokens, each on a thread; False if any id is unknown."""
    step = math.ceil(tokens / parts)
    edges = [min(tokens, step * i) for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        return all(pool.map(lambda span: _hash(*arguments, *span), itertools.pairwise(edges)))
