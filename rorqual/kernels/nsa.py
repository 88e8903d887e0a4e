"""Attends to compressed, selected and window keys in one pass: the kernel of layers.nsa.

For each token the kernel scores the compressed keys of its group, selects blocks by these scores,
and reads the selected blocks and the window in place; nothing is gathered, masked or stored in
between. Threads split sequences, tokens and groups. float32, CPU, without gradients.
"""

import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rorqual.kernels import compiled
from rorqual.kernels.select import over_blocks, scaled, where
from rorqual.kernels.vectors import ZERO, fill

_WORTH_A_THREAD = 1 << 22  # products; below, starting threads takes longer than the work
_loop = functools.partial(compiled.compiled, any_order=True)  # sums may use vector instructions


@_loop
def _importance(weights, seen, each, per, importance):  # pragma: no cover
    """Writes importance[j] = sum over h and i of weights[h, i] W[i, j].

    A compressed block i is `each` pieces long, a selection block j `per`. `weights` is overwritten.
    """
    fill(importance, ZERO)
    summed = weights[0]
    for h in range(1, weights.shape[0]):
        for i in range(seen):
            summed[i] += weights[h, i]
    for n in range(each):
        j = n // per
        left = per - n % per
        for i in range(seen):
            importance[j] += summed[i]
            left -= 1
            if left == 0:
                j = j + 1
                left = per


@_loop
def _choose(importance, own_block, index):  # pragma: no cover
    """Selects the forced blocks, then the most important others before `own_block`.

    Of equally important blocks the later one is selected; -1 fills the rest.
    """
    count = min(own_block + 1, 3)
    for n in range(index.shape[0]):
        index[n] = -1
    for n in range(count):
        index[n] = 0 if n == 2 else own_block - n
        importance[index[n]] = np.float32(-1)
    for n in range(count, index.shape[0]):
        best = -1
        most_seen = ZERO
        for j in range(own_block):
            if importance[j] >= most_seen:
                best = j
                most_seen = importance[j]
        index[n] = best
        if best < 0:
            break
        importance[best] = np.float32(-1)


@_loop
def _attend(
    query, selected, positions, layouts, block_count, length, sizes, scale, out, first, last
):  # pragma: no cover
    """Computes groups first .. last of all B T G: the three branches of a token and group.

    `layouts` of the compressed keys and values, the keys and values, and the window's: address, and
    bytes from one sequence, column and group to the next. `block_count` is the number of compressed
    blocks, `length` that of keys.
    """
    block, stride, size, top_k, window = sizes
    time, (groups, selected_count) = out.shape[1], selected.shape[2:]
    share = out.shape[3] // groups
    limit = selected_count if selected_count else top_k
    longest = max(block_count, limit * size, window)
    queries = np.empty((share, query.shape[3]), np.float32)
    scores = np.empty((share, longest), np.float32)
    bits = np.empty(longest, np.int32)
    index = np.empty(limit, np.int64)
    none = np.zeros(1, np.int64)
    addresses = np.empty(6, np.int64)
    importance = np.empty(length // size + 2, np.float32)
    for n in range(first, last):
        b = n // (time * groups)
        t = n // groups % time
        g = n % groups
        position = positions[b, t]
        scaled(query[b, t, g * share :], scale, queries)
        for x in range(6):
            addresses[x] = layouts[x, 0] + b * layouts[x, 1] + g * layouts[x, 3]
        heads = slice(g * share, (g + 1) * share)
        seen = max(0, min(block_count, (position + 1 - block) // stride + 1))
        over_blocks(
            queries,
            none,
            seen,
            block_count,
            addresses[0],
            layouts[0, 2],
            addresses[1],
            layouts[1, 2],
            scores,
            bits,
            out[b, t, 0, heads],
        )
        if selected_count:
            for k in range(selected_count):
                index[k] = selected[b, t, g, k]
        else:
            _importance(scores, seen, block // stride, size // stride, importance)
            _choose(importance, position // size, index)
        end = position + 1
        over_blocks(
            queries,
            index,
            end,
            size,
            addresses[2],
            layouts[2, 2],
            addresses[3],
            layouts[3, 2],
            scores,
            bits,
            out[b, t, 1, heads],
        )
        start = max(0, end - window)
        window_at = addresses[4] + start * layouts[4, 2], addresses[5] + start * layouts[5, 2]
        count = end - start
        over_blocks(
            queries,
            none,
            count,
            count,
            window_at[0],
            layouts[4, 2],
            window_at[1],
            layouts[5, 2],
            scores,
            bits,
            out[b, t, 2, heads],
        )


def attend_small_batch(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    compressed_key: Float[Tensor, "B M G P"],
    compressed_value: Float[Tensor, "B M G Q"],
    window_key: Float[Tensor, "B L G P"],
    window_value: Float[Tensor, "B L G Q"],
    index: Int[Tensor, "B T G K"] | None,
    positions: Int[Tensor, "B T"],
    config: Any,
    scale: float,
) -> Float[Tensor, "B T 3 H Q"]:
    """Computes layers.nsa.attend_small_batch, within float32 rounding."""
    (batch, time, heads, width), groups = query.shape, key.shape[2]
    index = positions.new_zeros(batch, time, groups, 0) if index is None else index
    pairs = compressed_key, compressed_value, key, value, window_key, window_value
    # Referenced as long as their addresses are used.
    dense = [x if x.stride(-1) == 1 else x.contiguous() for x in pairs]
    layouts = np.array([where(x) for x in dense])
    sizes = _sizes(config)
    out = query.new_empty(batch, time, 3, heads, value.shape[-1])
    arguments = [x.detach().contiguous().numpy() for x in (query, index, positions)]
    items = batch * time * groups
    block_count = compressed_key.shape[1]
    keys = block_count + config.top_k * config.select_block + config.window
    work = items * (heads // groups) * keys * width
    parts = min(torch.get_num_threads(), max(1, work // _WORTH_A_THREAD), items)
    rest = layouts, block_count, key.shape[1], sizes, np.float32(scale), out.numpy()
    compiled.spread(lambda _, *span: _attend(*arguments, *rest, *span), items, parts)
    return out


def _sizes(config: Any) -> tuple[int, int, int, int, int]:
    """Returns block, stride, select_block, top_k and window: compiled code takes no dataclass."""
    return config.block, config.stride, config.select_block, config.top_k, config.window
