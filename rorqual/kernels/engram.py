"""Hashes n-grams of token ids to the table rows that they address: the CPU kernel of layers.addresses.hash_rows.

Tokens are taken in blocks, a head at a time over a block, so that all arithmetic runs on vectors. Where every prime
exceeds 8191 the remainder is taken without a division, and still exactly. With u = 2^-53, in float64,

    i = (1/p) (1 - 4u),   q = trunc(x i),   r = x - q p in int64,   then r - p if r >= p

1/p, i, x < 2^63 and x i are each rounded once, by at most u: x i lies below x/p, and by less than 8u 2^63/p <= 1, so
that q is the quotient or one less. Threads split the tokens; the compiled code holds no lock of Python's.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rorqual.kernels.compiled import compiled

_BLOCK = 64  # tokens at a time: what is computed of them stays in the nearest cache
_EXACT_FROM = 8192  # the smallest prime for which the proof above holds
_NO_REACH = np.empty(0, np.int64)
_WORTH_A_THREAD = 16384  # addresses; below, starting threads takes longer than the work


@compiled
def _look_up(ids, stride, lead, time, reach, canonical, pad, known, start, count):  # pragma: no cover
    """known[k, j] = canonical id k before token start + j; False if an id has none.

    Before the `time` tokens of a row stand the `lead` ids that they look back at, at least as many as len(known) - 1.
    """
    strange, done, top = False, 0, len(canonical)
    row, t = start // time, start % time
    while done < count:
        run, at = min(count - done, time - t), row * stride + lead + t
        for j in range(run):
            raw = ids[at + j]
            safe = raw if raw >= 0 and raw < top else 0
            value = np.int64(canonical[safe])
            strange |= (raw != safe) | (value < 0)
            known[0, done + j] = value
        for k in range(1, len(known)):
            raw = ids[at - k]
            strange |= raw < 0 or raw >= top or canonical[raw] < 0
            known[k, done] = canonical[raw] if not strange else 0
            for j in range(done + 1, done + run):
                known[k, j] = known[k - 1, j - 1]
        done, row, t = done + run, row + 1, 0
    if len(reach):
        for k in range(1, len(known)):
            for j in range(count):
                known[k, j] = known[k, j] if reach[start + j] >= k else pad
    return not strange


@compiled
def _invert(primes):  # pragma: no cover
    """The factors i of the proof, shaped as `primes`; none where it does not hold."""
    inverse = np.empty(primes.shape)
    for layer in range(primes.shape[0]):
        for order in range(primes.shape[1]):
            for head in range(primes.shape[2]):
                inverse[layer, order, head] = 1.0 / primes[layer, order, head] * (1.0 - 2.0**-51)
                if primes[layer, order, head] < _EXACT_FROM:
                    return inverse[:, :0]
    return inverse


@compiled
def _mix(known, multipliers, primes, inverse, offsets, mix, wide, rows, count):  # pragma: no cover
    """rows[head, j] of one layer, its orders side by side; divides where `inverse` is empty."""
    orders, heads = primes.shape
    for j in range(count):
        mix[j] = known[0, j] * multipliers[0]
    for order in range(orders):
        for j in range(count):
            mix[j] ^= known[order + 1, j] * multipliers[order + 1]
            wide[j] = np.float64(mix[j])
        for head in range(heads):
            prime, place = primes[order, head], order * heads + head
            offset = offsets[place]
            if len(inverse):
                part = inverse[order, head]
                for j in range(count):
                    rest = mix[j] - np.int64(wide[j] * part) * prime
                    rest -= prime if rest >= prime else 0
                    rows[place, j] = rest + offset
            else:
                for j in range(count):
                    rows[place, j] = mix[j] % prime + offset


@compiled
def _hash(ids, reach, canonical, multipliers, primes, offsets, pad, out, first, last):  # pragma: no cover
    """Fills out[:, first:last], tokens counted over the batch; False if an id is not known."""
    layers, orders, heads = primes.shape
    stride, width = ids.shape[1], orders * heads
    time, memory = stride - orders, ids.reshape(-1)
    rows = out.reshape(layers, ids.shape[0] * time, width)
    inverse = _invert(primes)
    known, block = np.empty((orders + 1, _BLOCK), np.int64), np.empty((width, _BLOCK), np.int64)
    mix, wide = np.empty(_BLOCK, np.int64), np.empty(_BLOCK)
    for start in range(first, last, _BLOCK):
        count = min(_BLOCK, last - start)
        if not _look_up(memory, stride, orders, time, reach, canonical, pad, known, start, count):
            return False
        for layer in range(layers):
            _mix(known, multipliers[layer], primes[layer], inverse[layer], offsets[layer], mix, wide, block, count)
            for j in range(count):
                for place in range(width):
                    rows[layer, start + j, place] = block[place, j]
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
) -> Int[Tensor, "Lm B T R"]:
    """Gives the rows of layers.addresses.hash_rows, bit for bit."""
    layers, orders, heads = primes.shape
    batch, time = ids.shape[0], ids.shape[1] - orders
    if out is None:
        out = torch.empty(layers, batch, time, orders * heads, dtype=torch.int64)
    near = _NO_REACH if reach is None else reach.long().contiguous().numpy().reshape(-1)
    exact = (tensor.numpy() for tensor in (canonical_map, multipliers, primes, offsets))
    given = (ids.long().contiguous().numpy(), near, *exact, pad, out.numpy())
    parts = min(torch.get_num_threads(), out.numel() // _WORTH_A_THREAD)
    known = _hash(*given, 0, batch * time) if parts < 2 else _by_threads(given, batch * time, parts)
    if not known:
        raise IndexError("an id has no canonical id")
    return out


def _by_threads(given: tuple[Any, ...], tokens: int, parts: int) -> bool:
    step = math.ceil(tokens / parts)
    edges = [min(tokens, step * i) for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        return all(pool.map(lambda span: _hash(*given, *span), itertools.pairwise(edges)))
