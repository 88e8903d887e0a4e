"""Attends to the top-k keys that an indexer selects: layers.dsa.attend_best, compiled.

For each token the kernel scores every key and finds the lowest score that is still selected, by a
radix selection: histograms of the scores' bits, up to eleven bits at a time. It then reads the
selected latents in place, to score and to sum them, without a gather. Threads split sequences and
tokens. float32, CPU, without gradients.
"""

import functools
import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rorqual.kernels import compiled
from rorqual.kernels.compiled import prefetch
from rorqual.kernels.select import shown
from rorqual.kernels.vectors import ZERO, dots, fill, largest, matrix_at, powers, score_tile, sums

_AHEAD = 8  # latents between the one that is prefetched and the one that is used
_ORDERED_ZERO = np.uint32(1 << 31)  # a score of 0 as `_ordered` writes it
_TILE = 64  # indexer keys, or latents, that stay in the first cache while every head reads them
_loop = functools.partial(compiled.compiled, any_order=True)  # sums may use vector instructions


@_loop
def _ordered(products, weights, start, end, ordered):  # pragma: no cover
    """Writes ordered[l] = sum_j weights[j] relu(products[j, l]) as order-preserving unsigned bits.

    `products` is overwritten.
    """
    totals = products[0]
    count = end - start
    for l in range(count):
        totals[l] = weights[0] * max(totals[l], ZERO)
    for j in range(1, weights.shape[0]):
        products_of_head = products[j]
        share = weights[j]
        for l in range(count):
            totals[l] += share * max(products_of_head[l], ZERO)
    bits = totals.view(np.int32)
    for l in range(count):
        totals[l] += ZERO  # -0 becomes 0
        ordered[start + l] = np.uint32(
            bits[l] ^ ((bits[l] >> np.int32(31)) | np.int32(-2147483648))
        )


@compiled.compiled
def _choose(ordered, end, topk_indices):  # pragma: no cover
    """Writes the columns of the largest of ordered[:end] into `topk_indices`, in ascending order.

    Of equal values the last ones are selected. Returns whether not all scores of 0 are selected,
    though some are.
    """
    prefix = np.uint32(0)
    mask = np.uint32(0)
    left = topk_indices.shape[0]
    equal = 0
    for shift in (21, 10, 0):
        counts = np.zeros(2048, np.int64)
        for l in range(end):
            if ordered[l] & mask == prefix:
                counts[(ordered[l] >> np.uint32(shift)) & np.uint32(2047)] += 1
        digit = 2047
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        prefix = np.uint32(prefix | np.uint32(digit << shift))
        equal = counts[digit]
        mask = np.uint32(mask | np.uint32((2047 << shift) & 0xFFFFFFFF))
    n = topk_indices.shape[0]
    tied = equal > left and prefix == _ORDERED_ZERO
    for l in range(end - 1, -1, -1):
        if ordered[l] > prefix or (ordered[l] == prefix and left > 0):
            left -= ordered[l] == prefix
            n -= 1
            topk_indices[n] = l
    return tied


@_loop
def _fetch(base, step, topk_indices, n, width):  # pragma: no cover
    """Prefetches the selected latents n .. n + 3, or as many of them as there are."""
    for k in range(n, min(n + 4, topk_indices.shape[0])):
        for i in range(0, width, 16):
            prefetch(base + topk_indices[k] * step + 4 * i)


@_loop
def _four(base, step, topk_indices, n):  # pragma: no cover
    """Returns the addresses of the selected latents n .. n + 3; past the end, the last one's."""
    # Four alike, which the caller's products take in this order: no names.
    last = topk_indices.shape[0] - 1
    a = base + topk_indices[min(n, last)] * step
    b = base + topk_indices[min(n + 1, last)] * step
    return (
        a,
        b,
        base + topk_indices[min(n + 2, last)] * step,
        base + topk_indices[min(n + 3, last)] * step,
    )


@_loop
def _scores_to_weights(scores, count, bits, best, total, out):  # pragma: no cover
    """Turns the scores of one query for `count` latents into weights, in place.

    The running maximum `best` is updated, and the earlier sums are rescaled to it (online softmax).
    """
    before, best[0] = best[0], max(best[0], largest(scores[:count]))
    if before < best[0]:
        factor = np.float32(math.exp(before - best[0]))
        total[0] *= factor
        for i in range(out.shape[0]):
            out[i] *= factor
    total[0] += powers(scores[:count], bits, best[0])
    for n in range(count):
        scores[n] = shown(scores[n])
    fill(scores[count:], ZERO)


@_loop
def _attend(query, base, step, topk_indices, scores, bits, out):  # pragma: no cover
    """Writes out[h], the mean of the selected latents weighted by the softmax of their scores.

    Each tile of latents is scored and summed while it is in the cache. The scores have space for
    three more columns, which are set to 0.
    """
    (heads, width), last = query.shape, topk_indices.shape[0]
    best = np.full((heads, 1), -np.inf, np.float32)
    total = np.zeros((heads, 1), np.float32)
    for h in range(heads):
        fill(out[h], ZERO)
    for start in range(0, last, _TILE):
        count = min(_TILE, last - start)
        for n in range(0, count, 4):
            _fetch(base, step, topk_indices, start + n + _AHEAD, width)
            a, b, c, d = _four(base, step, topk_indices, start + n)
            dots(query, a, b, c, d, scores, n)
        for h in range(heads):
            _scores_to_weights(
                scores[h, : (count + 3) // 4 * 4], count, bits[:count], best[h], total[h], out[h]
            )
        for n in range(0, count, 4):
            a, b, c, d = _four(base, step, topk_indices, start + n)
            sums(scores, n, a, b, c, d, out)
    for h in range(heads):
        for i in range(width):
            out[h, i] /= total[h, 0]


@_loop
def _tokens(
    query, index_query, weights, ends, layouts, length, top_k, scale, out, tied, first, last
):  # pragma: no cover
    """Scores, selects and attends for the tokens first .. last of all B T.

    `layouts` of the indexer's keys and of the latents: address, bytes from one sequence to the
    next, bytes from one column to the next. A token reads the first ends[b, t] columns. `tied`
    becomes True where of several keys of score 0 only some were selected.
    """
    (_, time, heads, width), (index_heads, narrow) = query.shape, index_query.shape[2:]
    products = np.empty((index_heads, _TILE), np.float32)
    ordered = np.empty(length, np.uint32)
    scores = np.empty((heads, _TILE), np.float32)
    bits = np.empty(_TILE, np.int32)
    scaled = np.zeros((heads, width), np.float32)
    topk_indices = np.empty(top_k, np.int64)
    for n in range(first, last):
        b = n // time
        t = n % time
        end = ends[b, t]
        keys = matrix_at(layouts[0, 0] + b * layouts[0, 1], end, narrow)
        for start in range(0, end, _TILE):
            stop = min(start + _TILE, end)
            score_tile(index_query[b, t], keys[start:stop], products, 0, stop - start)
            _ordered(products, weights[b, t], start, stop, ordered)
        count = min(top_k, end)
        tied[b, t] = _choose(ordered, end, topk_indices[:count])
        for h in range(heads):
            for i in range(width):
                scaled[h, i] = query[b, t, h, i] * scale
        latents = layouts[1, 0] + b * layouts[1, 1]
        _attend(scaled, latents, layouts[1, 2], topk_indices[:count], scores, bits, out[b, t])


def attend_best(
    query: Float[Tensor, "B T H R"],
    latent: Float[Tensor, "B L R"],
    index_query: Float[Tensor, "B T J P"],
    key: Float[Tensor, "B L P"],
    weights: Float[Tensor, "B T J"],
    top_k: int,
    scale: float,
    ends: Int[Tensor, "B T"] | None = None,
    tied: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H R"]:
    """Computes layers.dsa.attend_best, within float32 rounding."""
    (batch, time), length = query.shape[:2], key.shape[1]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    latent = latent if latent.stride(-1) == 1 else latent.contiguous()
    key = key if key.stride()[1:] == (key.shape[2], 1) else key.contiguous()
    layouts = np.array(
        [[x.data_ptr(), 4 * x.stride(0), 4 * x.stride(1)] for x in (key, latent)], np.int64
    )
    if ends is None:
        ends = torch.arange(length - time + 1, length + 1).expand(batch, -1)
    arguments = [x.detach().contiguous().numpy() for x in (query, index_query, weights, ends)]
    equal = np.zeros((batch, time), np.bool_)
    rest = layouts, length, top_k, np.float32(scale), out.numpy(), equal
    parts = min(torch.get_num_threads(), batch * time)
    compiled.spread(lambda _, *span: _tokens(*arguments, *rest, *span), batch * time, parts)
    if tied is not None:
        tied.copy_(torch.from_numpy(equal))
        for b, t in zip(*equal.nonzero(), strict=True):
            # The columns of the row that the last of its tokens sees.
            columns = key[b, : int(ends[b].max())]
            scores = weights[b, t] @ (index_query[b, t] @ columns.T).relu()
            scores[ends[b, t] :] = -torch.inf
            keys = latent[b, scores.topk(top_k).indices]
            out[b, t] = ((query[b, t] * scale) @ keys.T).softmax(-1) @ keys
    return out
