"""Queries, latents, an indexer's queries and keys in -> attended to the best keys out: layers.dsa.attend_best compiled.

A token scores every key, finds the least score that is chosen from how many keys lie above each (a histogram of the
scores' bits, eleven at a time), and reads the chosen latents where they lie, to score and to sum them, with nothing
gathered. Threads split rows and tokens. float32, CPU, without gradients.
"""

import functools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rorqual.kernels import compiled
from rorqual.kernels.compiled import prefetch
from rorqual.kernels.select import shown
from rorqual.kernels.vectors import ZERO, at, fill, score_tile, softmax

_AHEAD = 8  # latents asked for before they are used
_TILE = 64  # indexer keys that stay in the first cache while every head reads them
_loop = functools.partial(compiled.compiled, any_order=True)  # sums may run on vectors


@_loop
def _ordered(products, weights, begin, end, ordered):  # pragma: no cover
    """ordered[l] = sum_j weights[j] relu(products[j, l]) in bits that compare as it does, unsigned."""
    for l in range(begin, end):
        total = ZERO
        for j in range(weights.shape[0]):
            total += weights[j] * max(products[j, l - begin], ZERO)
        products[0, l - begin] = total + ZERO  # -0 becomes 0
    bits = products[0].view(np.int32)
    for l in range(begin, end):
        own = bits[l - begin]
        ordered[l] = np.uint32(own ^ ((own >> np.int32(31)) | np.int32(-2147483648)))


@compiled.compiled
def _choose(ordered, end, chosen):  # pragma: no cover
    """The columns of the largest of ordered[:end], of equal ones the last, into `chosen`, ascending."""
    known, mask, left = np.uint32(0), np.uint32(0), chosen.shape[0]
    for shift in (21, 10, 0):
        counts = np.zeros(2048, np.int64)
        for l in range(end):
            if ordered[l] & mask == known:
                counts[(ordered[l] >> np.uint32(shift)) & np.uint32(2047)] += 1
        digit = 2047
        while counts[digit] < left:
            left -= counts[digit]
            digit -= 1
        known = np.uint32(known | np.uint32(digit << shift))
        mask = np.uint32(mask | np.uint32((2047 << shift) & 0xFFFFFFFF))
    n = chosen.shape[0]
    for l in range(end - 1, -1, -1):
        if ordered[l] > known or (ordered[l] == known and left > 0):
            left -= ordered[l] == known
            n -= 1
            chosen[n] = l


@_loop
def _fetch(base, step, chosen, n, width):  # pragma: no cover
    for k in range(n, min(n + 4, chosen.shape[0])):
        for i in range(0, width, 16):
            prefetch(base + chosen[k] * step + 4 * i)


@_loop
def _four(base, step, chosen, n, width):  # pragma: no cover
    """The latents n .. n + 3 of those chosen; behind the last stands the last."""
    last = chosen.shape[0] - 1
    a, b = at(base + chosen[min(n, last)] * step, 1, width), at(base + chosen[min(n + 1, last)] * step, 1, width)
    c, d = at(base + chosen[min(n + 2, last)] * step, 1, width), at(base + chosen[min(n + 3, last)] * step, 1, width)
    return a[0], b[0], c[0], d[0]


@_loop
def _score(query, base, step, chosen, scores):  # pragma: no cover
    """scores[h, n] = query[h] . the n-th chosen latent: of four heads and four latents at a time, so that a number is
    used four times for each time that it is loaded."""
    width = query.shape[1]
    for n in range(0, chosen.shape[0], 4):
        _fetch(base, step, chosen, n + _AHEAD, width)
        a, b, c, d = _four(base, step, chosen, n, width)
        for h in range(0, query.shape[0], 4):
            x, y, z, w = query[h], query[h + 1], query[h + 2], query[h + 3]
            xa, xb, xc, xd, ya, yb, yc, yd = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
            za, zb, zc, zd, wa, wb, wc, wd = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
            for i in range(width):
                xa, xb, xc, xd = xa + x[i] * a[i], xb + x[i] * b[i], xc + x[i] * c[i], xd + x[i] * d[i]
                ya, yb, yc, yd = ya + y[i] * a[i], yb + y[i] * b[i], yc + y[i] * c[i], yd + y[i] * d[i]
                za, zb, zc, zd = za + z[i] * a[i], zb + z[i] * b[i], zc + z[i] * c[i], zd + z[i] * d[i]
                wa, wb, wc, wd = wa + w[i] * a[i], wb + w[i] * b[i], wc + w[i] * c[i], wd + w[i] * d[i]
            scores[h, n], scores[h, n + 1], scores[h, n + 2], scores[h, n + 3] = xa, xb, xc, xd
            scores[h + 1, n], scores[h + 1, n + 1], scores[h + 1, n + 2], scores[h + 1, n + 3] = ya, yb, yc, yd
            scores[h + 2, n], scores[h + 2, n + 1], scores[h + 2, n + 2], scores[h + 2, n + 3] = za, zb, zc, zd
            scores[h + 3, n], scores[h + 3, n + 1], scores[h + 3, n + 2], scores[h + 3, n + 3] = wa, wb, wc, wd


@_loop
def _sum(scores, base, step, chosen, out):  # pragma: no cover
    """out[h] += sum over n of scores[h, n] the n-th chosen latent, eight at a time."""
    width = out.shape[1]
    for n in range(0, chosen.shape[0], 8):
        _fetch(base, step, chosen, n + _AHEAD, width)
        _fetch(base, step, chosen, n + _AHEAD + 4, width)
        a, b, c, d = _four(base, step, chosen, n, width)
        e, f, g, k = _four(base, step, chosen, n + 4, width)
        for h in range(out.shape[0]):
            own, p, q, s, t = out[h], scores[h, n], scores[h, n + 1], scores[h, n + 2], scores[h, n + 3]
            u, v, w, x = scores[h, n + 4], scores[h, n + 5], scores[h, n + 6], scores[h, n + 7]
            for i in range(width):
                own[i] += p * a[i] + q * b[i] + s * c[i] + t * d[i] + u * e[i] + v * f[i] + w * g[i] + x * k[i]


@_loop
def _attend(query, base, step, chosen, scores, bits, out):  # pragma: no cover
    """out[h] = the mean of the chosen latents, weighted by how they score against query[h]. Queries come in fours; the
    scores have room for more than are chosen, which count for nothing."""
    _score(query, base, step, chosen, scores)
    count = chosen.shape[0]
    for h in range(out.shape[0]):
        softmax(scores[h, :count], bits[:count])
        for n in range(count):
            scores[h, n] = shown(scores[h, n])
        fill(scores[h, count:], ZERO)
        fill(out[h], ZERO)
    _sum(scores, base, step, chosen, out)


@_loop
def _tokens(query, looking, weights, places, length, most, scale, out, first, last):  # pragma: no cover
    """Tokens first .. last of B T. `places` of the indexer's keys and of the latents: address, and bytes a row and a
    column further."""
    (_, time, heads, width), (own, narrow) = query.shape, looking.shape[2:]
    products, ordered = np.empty((own, _TILE), np.float32), np.empty(length, np.uint32)
    fours = (heads + 3) // 4 * 4
    scores, bits = np.empty((fours, most + 8), np.float32), np.empty(most, np.int32)
    scaled, chosen = np.zeros((fours, width), np.float32), np.empty(most, np.int64)
    for n in range(first, last):
        b, t = n // time, n % time
        end = length - time + t + 1
        keys = at(places[0, 0] + b * places[0, 1], end, narrow)
        for begin in range(0, end, _TILE):
            stop = min(begin + _TILE, end)
            score_tile(looking[b, t], keys[begin:stop], products, 0, stop - begin)
            _ordered(products, weights[b, t], begin, stop, ordered)
        count = min(most, end)
        _choose(ordered, end, chosen[:count])
        for h in range(heads):
            for i in range(width):
                scaled[h, i] = query[b, t, h, i] * scale
        _attend(scaled, places[1, 0] + b * places[1, 1], places[1, 2], chosen[:count], scores, bits, out[b, t])


def attend_best(
    query: Float[Tensor, "B T H R"],
    latent: Float[Tensor, "B L R"],
    looking: Float[Tensor, "B T J P"],
    key: Float[Tensor, "B L P"],
    weights: Float[Tensor, "B T J"],
    most: int,
    scale: float,
) -> Float[Tensor, "B T H R"]:
    """See layers.dsa.attend_best, whose numbers these are within float32 rounding."""
    (batch, time), length = query.shape[:2], key.shape[1]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    latent = latent if latent.stride(-1) == 1 else latent.contiguous()
    key = key if key.stride()[1:] == (key.shape[2], 1) else key.contiguous()
    places = np.array([[x.data_ptr(), 4 * x.stride(0), 4 * x.stride(1)] for x in (key, latent)], np.int64)
    given = [x.detach().contiguous().numpy() for x in (query, looking, weights)]
    rest = places, length, most, np.float32(scale), out.numpy()
    parts = min(torch.get_num_threads(), batch * time)
    compiled.spread(lambda _, *span: _tokens(*given, *rest, *span), batch * time, parts)
    return out
