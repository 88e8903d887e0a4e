"""Attends to selected blocks of keys: layers.sparse's gathered form, compiled.

The keys of a selected block are read in place, once for all heads that share the selection, and
stay in the core's first cache while these heads score them; nothing is gathered. Keys that are
not contiguous are prefetched, since they would otherwise be read from memory one by one. Threads
split tokens and selections. float32, CPU, without gradients.
"""

import functools

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rorqual.kernels import compiled
from rorqual.kernels.compiled import prefetch
from rorqual.kernels.vectors import ZERO, dots, fill, softmax, sums

_WORTH_A_THREAD = 1 << 22  # products; below, starting threads takes longer than the work
_AHEAD = 16  # keys between the one that is prefetched and the one that is used
_LEAST = np.float32(1e-20)
_loop = functools.partial(compiled.compiled, any_order=True)  # sums may use vector instructions


@_loop
def _line(address, width):  # pragma: no cover
    """Views the `width` float32 numbers at an address as a vector."""
    return numba.carray(compiled.pointer(address), (width,), np.float32)


@_loop
def shown(weight):  # pragma: no cover
    """Rounds a negligible weight to zero.

    No float32 sum would change by it, and products with denormal results take a hundred times as
    long.
    """
    # NaN stays NaN.
    return ZERO if weight <= _LEAST else weight


@_loop
def _fetch(rows, step, count, following, l, width):  # pragma: no cover
    """Prefetches the four rows that are _AHEAD of row l.

    Past the last row, those at the address `following` are prefetched.
    """
    for n in range(l + _AHEAD, l + _AHEAD + 4):
        row = rows + n * step if n < count else following + (n - count) * step
        for i in range(0, width, 16):
            prefetch(row + 4 * i)


@_loop
def _score(queries, keys, step, count, following, scores):  # pragma: no cover
    """Writes scores[h, l] = queries[h] . the key at address keys + l step."""
    width = queries.shape[1]
    l = 0
    while l + 4 <= count:
        _fetch(keys, step, count, following, l, width)
        a = keys + l * step
        dots(queries, a, a + step, a + 2 * step, a + 3 * step, scores, l)
        l += 4
    for k in range(l, count):
        a = _line(keys + k * step, width)
        for h in range(queries.shape[0]):
            x = queries[h]
            p = ZERO
            for i in range(width):
                p += x[i] * a[i]
            scores[h, k] = p


@_loop
def _sum(weights, values, step, count, following, out):  # pragma: no cover
    """Adds to out[h] the sum over l of weights[h, l] times the value at address values + l step.

    `weights` is not modified: callers compare them.
    """
    width = out.shape[1]
    l = 0
    small = np.empty((out.shape[0], 4), np.float32)
    while l + 4 <= count:
        _fetch(values, step, count, following, l, width)
        for h in range(out.shape[0]):
            for k in range(4):
                small[h, k] = shown(weights[h, l + k])
        a = values + l * step
        sums(small, 0, a, a + step, a + 2 * step, a + 3 * step, out)
        l += 4
    for k in range(l, count):
        a = _line(values + k * step, width)
        for h in range(out.shape[0]):
            out_row = out[h]
            p = shown(weights[h, k])
            for i in range(width):
                out_row[i] += p * a[i]


@_loop
def over_blocks(
    queries, index, end, block, key, key_step, value, value_step, scores, bits, result
):  # pragma: no cover
    """Writes result[h], the attention of queries[h] to the keys before `end` in the blocks `index`.

    Keys and values lie at the addresses key + l key_step and value + l value_step.
    """
    blocks = index.shape[0]
    seen = 0
    for n in range(blocks):
        count = min(block, end - index[n] * block)
        if index[n] >= 0 and count > 0:
            after = (
                key + index[n + 1] * block * key_step
                if n + 1 < blocks
                else value + index[0] * block * value_step
            )
            _score(
                queries, key + index[n] * block * key_step, key_step, count, after, scores[:, seen:]
            )
            seen += count
    for h in range(queries.shape[0]):
        fill(result[h], ZERO)
        if seen:
            softmax(scores[h, :seen], bits[:seen])
    seen = 0
    for n in range(blocks):
        count = min(block, end - index[n] * block)
        if index[n] >= 0 and count > 0:
            after = value + index[n + 1] * block * value_step if n + 1 < blocks else value
            _sum(
                scores[:, seen:],
                value + index[n] * block * value_step,
                value_step,
                count,
                after,
                result,
            )
            seen += count


@_loop
def scaled(query, scale, out):  # pragma: no cover
    """Computes out = scale query for the heads of one token, [H, P]."""
    for h in range(out.shape[0]):
        for i in range(out.shape[1]):
            out[h, i] = query[h, i] * scale


@_loop
def _attend(
    query, index, positions, key, value, length, block, scale, out, first, last
):  # pragma: no cover
    """Computes the attention of selections first .. last of all B T J.

    `key` and `value`: address, and bytes from one sequence, column and group to the next.
    """
    (_, time, heads, width), (choices, top_k), groups = query.shape, index.shape[2:], length[1]
    share = heads // choices
    queries = np.empty((share, width), np.float32)
    scores = np.empty((share, top_k * block), np.float32)
    bits = np.empty(top_k * block, np.int32)
    for n in range(first, last):
        b = n // (time * choices)
        t = n // choices % time
        j = n % choices
        group = j * groups // choices
        end = min(positions[b, t] + 1, length[0])
        scaled(query[b, t, j * share :], scale, queries)
        keys = key[0] + b * key[1] + group * key[3]
        values = value[0] + b * value[1] + group * value[3]
        result = out[b, t, j * share : (j + 1) * share]
        over_blocks(
            queries,
            index[b, t, j],
            end,
            block,
            keys,
            key[2],
            values,
            value[2],
            scores,
            bits,
            result,
        )


def where(x: Tensor) -> np.ndarray:
    """Returns the address, and the bytes from one sequence, column and group to the next."""
    return np.array([x.data_ptr(), *(x.element_size() * step for step in x.stride()[:3])], np.int64)


def selected_attention(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    index: Int[Tensor, "B T J K"],
    positions: Int[Tensor, "B T"],
    block: int,
    scale: float,
) -> Float[Tensor, "B T H Q"]:
    """Computes layers.sparse.selected_attention, within float32 rounding."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    arguments = [x.detach().contiguous().numpy() for x in (query, index, positions)]
    length = np.array(key.shape[1:3], np.int64)
    made = out.numpy()
    items = index[..., 0].numel()
    work = index.numel() * block * (query.shape[2] // index.shape[2])
    parts = min(torch.get_num_threads(), max(1, work * query.shape[3] // _WORTH_A_THREAD), items)
    rest = where(key), where(value), length, block, np.float32(scale), made
    compiled.spread(lambda _, *span: _attend(*arguments, *rest, *span), items, parts)
    return out
