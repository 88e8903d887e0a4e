"""Vectors and matrices in -> products, norms and softmax of them out: what compiled steps are made of.

Every function is for one thread, in float32, with sums in any order so that they run on vectors; products are added to
`out`. Loops where numpy would have a word: each such word costs the compiler a second.
"""

import numba
import numpy as np

from rorqual.kernels.compiled import compiled, pointer

ZERO, ONE = np.float32(0), np.float32(1)


@compiled
def at(address, rows, columns):  # pragma: no cover
    return numba.carray(pointer(address), (rows, columns), np.float32)


def _any_order(function):
    return compiled(function, any_order=True)


@_any_order
def norm(x, weight, eps, out):  # pragma: no cover
    total = ZERO
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = ONE / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@_any_order
def rows(weight, x, out, begin, end):  # pragma: no cover
    """out[r] += weight[r] . x, four rows at a time so that their sums do not wait for each other."""
    r = begin
    while r + 4 <= end:
        a, b, c, d = weight[r], weight[r + 1], weight[r + 2], weight[r + 3]
        p, q, s, t = ZERO, ZERO, ZERO, ZERO
        for i in range(x.shape[0]):
            p += a[i] * x[i]
            q += b[i] * x[i]
            s += c[i] * x[i]
            t += d[i] * x[i]
        out[r] += p
        out[r + 1] += q
        out[r + 2] += s
        out[r + 3] += t
        r += 4
    for k in range(r, end):
        p = ZERO
        for i in range(x.shape[0]):
            p += weight[k, i] * x[i]
        out[k] += p


@_any_order
def columns(weight, x, out, begin, end):  # pragma: no cover
    """out[begin:end] += x @ weight[:, begin:end], four rows of the weight at a time."""
    own, i = out[begin:end], 0
    while i + 4 <= x.shape[0]:
        a, b, c, d = (
            weight[i, begin:end],
            weight[i + 1, begin:end],
            weight[i + 2, begin:end],
            weight[i + 3, begin:end],
        )
        p, q, s, t = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(own.shape[0]):
            own[j] += p * a[j] + q * b[j] + s * c[j] + t * d[j]
        i += 4
    for k in range(i, x.shape[0]):
        for j in range(own.shape[0]):
            own[j] += x[k] * weight[k, begin + j]


@compiled
def rotate(x, cos, sin, interleaved):  # pragma: no cover
    """In place, each pair by its angle."""
    half = cos.shape[0]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        first, second = x[a], x[b]
        x[a] = first * cos[i] - second * sin[i]
        x[b] = first * sin[i] + second * cos[i]


@compiled
def fill(x, value):  # pragma: no cover
    for i in range(x.shape[0]):
        x[i] = value


@_any_order
def softmax(scores, bits):  # pragma: no cover
    """In place. exp(s) = 2^k 2^f with k whole: 2^f by its series, to 1e-8 for |f| <= 1/2, 2^k by a float's exponent."""
    best = scores[0]
    for l in range(1, scores.shape[0]):
        best = max(best, scores[l])
    for l in range(scores.shape[0]):
        turned = max((scores[l] - best) * np.float32(1.4426950408889634), np.float32(-126))
        whole = np.floor(turned + np.float32(0.5))
        f = turned - whole
        p = np.float32(1.5252734e-5) * f + np.float32(1.5403530e-4)
        p = ((p * f + np.float32(1.3333558e-3)) * f + np.float32(9.6181291e-3)) * f + np.float32(5.5504109e-2)
        scores[l] = ((p * f + np.float32(2.4022651e-1)) * f + np.float32(6.9314718e-1)) * f + ONE
        bits[l] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    powers, total = bits.view(np.float32), ZERO
    for l in range(scores.shape[0]):
        scores[l] *= powers[l]
        total += scores[l]
    share = ONE / total
    for l in range(scores.shape[0]):
        scores[l] *= share


@_any_order
def score_tile(queries, keys, scores, begin, end):  # pragma: no cover
    """scores[h, l] = queries[h] . keys[l], four heads at a time so that a key is read once for them."""
    h = 0
    while h + 4 <= queries.shape[0]:
        a, b, c, d = queries[h], queries[h + 1], queries[h + 2], queries[h + 3]
        for l in range(begin, end):
            key = keys[l]
            p, q, s, t = ZERO, ZERO, ZERO, ZERO
            for i in range(key.shape[0]):
                p += a[i] * key[i]
                q += b[i] * key[i]
                s += c[i] * key[i]
                t += d[i] * key[i]
            scores[h, l], scores[h + 1, l], scores[h + 2, l], scores[h + 3, l] = p, q, s, t
        h += 4
    for k in range(h, queries.shape[0]):
        for l in range(begin, end):
            p = ZERO
            for i in range(keys.shape[1]):
                p += queries[k, i] * keys[l, i]
            scores[k, l] = p
