"""Products, norms and softmax of vectors and matrices, for use in compiled code.

Every function runs on one thread, in float32, with sums in any order so that they use vector
instructions; products are added to `out`. Loops replace numpy's functions, since each of those
costs a second of compilation.
"""

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from llvmlite.binding import get_host_cpu_features  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from rorqual.kernels.compiled import compiled, pointer

ZERO = np.float32(0)
ONE = np.float32(1)


@compiled
def matrix_at(address, rows, columns):  # pragma: no cover
    """Views the float32 numbers at an address as a matrix."""
    return numba.carray(pointer(address), (rows, columns), np.float32)


def _any_order(function):
    """Compiles a function whose sums may be in any order, so that it uses vector instructions."""
    return compiled(function, any_order=True)


@_any_order
def norm(x, weight, eps, out):  # pragma: no cover
    """Computes out = RMSNorm(x) * weight of one vector."""
    total = ZERO
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = ONE / np.sqrt(total / np.float32(x.shape[0]) + np.float32(eps))
    for i in range(x.shape[0]):
        out[i] = x[i] * factor * weight[i]


@compiled
def rotate(x, cos, sin, interleaved):  # pragma: no cover
    """Rotates each pair by its angle, in place."""
    half = cos.shape[0]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        first = x[a]
        second = x[b]
        x[a] = first * cos[i] - second * sin[i]
        x[b] = first * sin[i] + second * cos[i]


@compiled
def fill(x, value):  # pragma: no cover
    """Sets every number of a vector."""
    for i in range(x.shape[0]):
        x[i] = value


@_any_order
def largest(numbers):  # pragma: no cover
    """Returns the largest number of a vector."""
    best = numbers[0]
    for l in range(1, numbers.shape[0]):
        best = max(best, numbers[l])
    return best


@_any_order
def powers(scores, bits, best):  # pragma: no cover
    """Computes scores[l] = exp(scores[l] - best) in place and returns their sum.

    exp(s) = 2^k 2^f with integer k: 2^f by its series, to 1e-8 for |f| <= 1/2, and 2^k by a float's
    exponent.
    """
    for l in range(scores.shape[0]):
        turned = max((scores[l] - best) * np.float32(1.4426950408889634), np.float32(-126))
        whole = np.floor(turned + np.float32(0.5))
        f = turned - whole
        p = np.float32(1.5252734e-5) * f + np.float32(1.5403530e-4)
        p = ((p * f + np.float32(1.3333558e-3)) * f + np.float32(9.6181291e-3)) * f + np.float32(
            5.5504109e-2
        )
        scores[l] = ((p * f + np.float32(2.4022651e-1)) * f + np.float32(6.9314718e-1)) * f + ONE
        bits[l] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    scales = bits.view(np.float32)
    total = ZERO
    for l in range(scores.shape[0]):
        scores[l] *= scales[l]
        total += scores[l]
    return total


@_any_order
def softmax(scores, bits):  # pragma: no cover
    """Applies the softmax to one row of scores, in place; `bits` is memory for as many numbers."""
    share = ONE / powers(scores, bits, largest(scores))
    for l in range(scores.shape[0]):
        scores[l] *= share


# Numbers a vector, and rows of `queries` or `out` at a time, in the two loops below. Sums that do
# not fit into the registers are written to memory and read back for every product: AVX-512 has 32
# registers of 16 numbers, AVX2 16 of 8 and NEON 32 of 4.
LANES, ROWS = (16, 4) if get_host_cpu_features().get("avx512f") else (8, 2)
_FLOAT = ir.FloatType()
_WHOLE = ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_FOUR = ir.VectorType(_FLOAT, 4)
_FUSED = ("contract",)  # a product and its sum may be rounded once
_NINE = types.void(*[types.int64] * 9)


def _load(builder, address, more, kind=_VECTOR):
    """Emits a read of a vector, or another `kind`, at address + more, in bytes."""
    pointer = builder.inttoptr(builder.add(address, more), kind.as_pointer())
    return builder.load(pointer, align=4)


def _store(builder, value, address, more):
    """Emits a write of a vector at address + more, in bytes."""
    builder.store(
        value, builder.inttoptr(builder.add(address, more), value.type.as_pointer()), align=4
    )


def _picked(builder, one, other, lanes):
    """Emits a shuffle: lane i is the one numbered lanes[i], counted through both vectors."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(one, other, mask)


def _everywhere(builder, number):
    """Returns a vector whose lanes all have one number."""
    none = ir.Constant(_VECTOR, ir.Undefined)
    return _picked(
        builder,
        builder.insert_element(none, number, ir.Constant(ir.IntType(32), 0)),
        none,
        [0] * LANES,
    )


def _across(builder, vectors):
    """Reduces four vectors to one of four lanes, lane n the sum of the n-th.

    Neighbouring lanes are added within blocks of four, where a shuffle is one instruction, and then
    the blocks.
    """
    while len(vectors) > 1:
        sums = []
        for one, other in zip(vectors[::2], vectors[1::2], strict=True):
            blocks = range(0, LANES, 4)
            even = [n for b in blocks for n in (b, b + 2, LANES + b, LANES + b + 2)]
            pair = [_picked(builder, one, other, [n + k for n in even]) for k in (0, 1)]
            sums.append(builder.fadd(*pair))
        vectors = sums
    (total,), lanes = vectors, LANES
    while lanes > 4:
        lanes //= 2
        halves = [_picked(builder, total, total, list(range(n, n + lanes))) for n in (0, lanes)]
        total = builder.fadd(*halves)
    return total


def _offsets(builder, bytes_apart, count):
    """Emits the products of `bytes_apart` with 0, 1, ..., count - 1."""
    return [builder.mul(bytes_apart, ir.Constant(_WHOLE, n)) for n in range(count)]


def _dots(heads):
    """Makes an intrinsic: out[h, k] = the dot product of query h and the numbers at address k.

    Address k is one of a, b, c, d; LANES `chunks` numbers are multiplied.
    """

    def typed(context, queries, apart, a, b, c, d, chunks, out, out_apart):
        def generate(context, builder, signature, arguments):
            queries, apart, a, b, c, d, chunks, out, out_apart = arguments
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            more = _offsets(builder, apart, heads)
            totals = [cgutils.alloca_once_value(builder, zero) for _ in range(4 * heads)]
            with cgutils.for_range(builder, chunks) as loop:
                pointer = builder.mul(loop.index, ir.Constant(_WHOLE, 4 * LANES))
                keys = [_load(builder, row, pointer) for row in (a, b, c, d)]
                for h in range(heads):
                    query = _load(builder, queries, builder.add(more[h], pointer))
                    for total, key in zip(totals[4 * h : 4 * h + 4], keys, strict=True):
                        product = builder.fmul(query, key, flags=_FUSED)
                        builder.store(
                            builder.fadd(builder.load(total), product, flags=_FUSED), total
                        )
            for h, at_h in enumerate(_offsets(builder, out_apart, heads)):
                ours = [builder.load(total) for total in totals[4 * h : 4 * h + 4]]
                _store(builder, _across(builder, ours), out, at_h)
            return context.get_dummy_value()

        return _NINE, generate

    return intrinsic(typed)


def _sums(heads):
    """Makes an intrinsic that adds the sum over k of weights[h, k] times values k to out[h, i].

    The values are the LANES `chunks` numbers at address k of a, b, c, d.
    """

    def typed(context, weights, apart, a, b, c, d, chunks, out, out_apart):
        def generate(context, builder, signature, arguments):
            weights, apart, a, b, c, d, chunks, out, out_apart = arguments
            stride = _offsets(builder, apart, heads)
            more = _offsets(builder, out_apart, heads)
            fours = [_load(builder, weights, at_h, _FOUR) for at_h in stride]
            lanes = [ir.Constant(ir.IntType(32), k) for k in range(4)]
            shares = [
                [_everywhere(builder, builder.extract_element(four, k)) for k in lanes]
                for four in fours
            ]
            with cgutils.for_range(builder, chunks) as loop:
                pointer = builder.mul(loop.index, ir.Constant(_WHOLE, 4 * LANES))
                values = [_load(builder, row, pointer) for row in (a, b, c, d)]
                for h in range(heads):
                    there = builder.add(more[h], pointer)
                    total = _load(builder, out, there)
                    for share, value in zip(shares[h], values, strict=True):
                        total = builder.fadd(
                            total, builder.fmul(share, value, flags=_FUSED), flags=_FUSED
                        )
                    _store(builder, total, out, there)
            return context.get_dummy_value()

        return _NINE, generate

    return intrinsic(typed)


def _columns(heads, vectors):
    """Makes an intrinsic that adds sum_l weights[h, l] row l to out[h], for some columns.

    They are LANES `vectors` numbers, whose sums stay in registers over all rows. Row l is at
    `first` + l `step`.
    """

    def typed(context, weights, apart, first, step, count, out, out_apart):
        def generate(context, builder, signature, arguments):
            weights, apart, first, step, count, out, out_apart = arguments
            beside = [ir.Constant(_WHOLE, 4 * LANES * v) for v in range(vectors)]
            totals = [
                [
                    cgutils.alloca_once_value(builder, _load(builder, out, builder.add(at_h, more)))
                    for more in beside
                ]
                for at_h in _offsets(builder, out_apart, heads)
            ]
            stride = _offsets(builder, apart, heads)
            with cgutils.for_range(builder, count) as loop:
                row = builder.add(first, builder.mul(loop.index, step))
                values = [_load(builder, row, more) for more in beside]
                here = builder.mul(loop.index, ir.Constant(_WHOLE, 4))
                for h in range(heads):
                    weight = _load(builder, weights, builder.add(stride[h], here), _FLOAT)
                    share = _everywhere(builder, weight)
                    for total, value in zip(totals[h], values, strict=True):
                        product = builder.fmul(share, value, flags=_FUSED)
                        builder.store(
                            builder.fadd(builder.load(total), product, flags=_FUSED), total
                        )
            for h, at_h in enumerate(_offsets(builder, out_apart, heads)):
                for total, more in zip(totals[h], beside, strict=True):
                    _store(builder, builder.load(total), out, builder.add(at_h, more))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return intrinsic(typed)


_dots_rows = _dots(ROWS)
_dots_1 = _dots(1)
_sums_rows = _sums(ROWS)
_sums_1 = _sums(1)
_columns_rows_4 = _columns(ROWS, 4)
_columns_rows_1 = _columns(ROWS, 1)
_columns_1_4 = _columns(1, 4)
_columns_1_1 = _columns(1, 1)
_TILE = 8  # rows that are read for some columns before the same rows are for the next ones


@_any_order
def dots(queries, a, b, c, d, scores, l):  # pragma: no cover
    """Writes scores[h, l .. l + 3] = queries[h] . the rows at addresses a, b, c, d.

    It processes ROWS queries at a time: each number that is loaded is used several times.
    """
    (heads, width), h = queries.shape, 0
    arguments = queries.ctypes.data
    apart = queries.strides[0]
    chunks = width // LANES
    out = scores.ctypes.data + 4 * l
    out_apart = scores.strides[0]
    while h + ROWS <= heads:
        _dots_rows(arguments + h * apart, apart, a, b, c, d, chunks, out + h * out_apart, out_apart)
        h += ROWS
    while h < heads:
        _dots_1(arguments + h * apart, apart, a, b, c, d, chunks, out + h * out_apart, out_apart)
        h += 1
    if width % LANES:
        p = matrix_at(a, 1, width)[0]
        q = matrix_at(b, 1, width)[0]
        s = matrix_at(c, 1, width)[0]
        t = matrix_at(d, 1, width)[0]
        for h in range(heads):
            for i in range(chunks * LANES, width):
                x = queries[h, i]
                scores[h, l], scores[h, l + 1] = (
                    scores[h, l] + x * p[i],
                    scores[h, l + 1] + x * q[i],
                )
                scores[h, l + 2], scores[h, l + 3] = (
                    scores[h, l + 2] + x * s[i],
                    scores[h, l + 3] + x * t[i],
                )


@_any_order
def sums(weights, l, a, b, c, d, out):  # pragma: no cover
    """Adds weights[h, l .. l + 3] times the rows at addresses a, b, c, d to out[h]."""
    (heads, width), h = out.shape, 0
    arguments = weights.ctypes.data + 4 * l
    apart = weights.strides[0]
    chunks = width // LANES
    made = out.ctypes.data
    out_apart = out.strides[0]
    while h + ROWS <= heads:
        _sums_rows(
            arguments + h * apart, apart, a, b, c, d, chunks, made + h * out_apart, out_apart
        )
        h += ROWS
    while h < heads:
        _sums_1(arguments + h * apart, apart, a, b, c, d, chunks, made + h * out_apart, out_apart)
        h += 1
    if width % LANES:
        p = matrix_at(a, 1, width)[0]
        q = matrix_at(b, 1, width)[0]
        s = matrix_at(c, 1, width)[0]
        t = matrix_at(d, 1, width)[0]
        for h in range(heads):
            x = weights[h, l]
            y = weights[h, l + 1]
            z = weights[h, l + 2]
            w = weights[h, l + 3]
            for i in range(chunks * LANES, width):
                out[h, i] += x * p[i] + y * q[i] + z * s[i] + w * t[i]


@_any_order
def score_tile(queries, keys, scores, start, end):  # pragma: no cover
    """Writes scores[h, l] = queries[h] . keys[l] for l from `start` to `end`."""
    l = start
    first = keys.ctypes.data
    step = keys.strides[0]
    while l + 4 <= end:
        a = first + l * step
        dots(queries, a, a + step, a + 2 * step, a + 3 * step, scores, l)
        l += 4
    for k in range(l, end):
        for h in range(queries.shape[0]):
            p = ZERO
            for i in range(keys.shape[1]):
                p += queries[h, i] * keys[k, i]
            scores[h, k] = p


@_any_order
def _sum_tile(weights, apart, first, step, count, heads, width, out, out_apart):  # pragma: no cover
    """Adds the sum over `count` rows to ROWS or 1 rows of `out`; all are addresses."""
    column = 0
    while column + 4 * LANES <= width:
        where = first + 4 * column
        there = out + 4 * column
        if heads == ROWS:
            _columns_rows_4(weights, apart, where, step, count, there, out_apart)
        else:
            _columns_1_4(weights, apart, where, step, count, there, out_apart)
        column += 4 * LANES
    while column + LANES <= width:
        where = first + 4 * column
        there = out + 4 * column
        if heads == ROWS:
            _columns_rows_1(weights, apart, where, step, count, there, out_apart)
        else:
            _columns_1_1(weights, apart, where, step, count, there, out_apart)
        column += LANES


@_any_order
def sum_rows(weights, first, step, count, out):  # pragma: no cover
    """Adds the sum over l < count of weights[h, l] times row l to out[h].

    Row l is at address `first` + l `step`; its first out.shape[1] numbers are used. Rows are read
    _TILE at a time, so that rows that are far apart are not read column by column from memory.
    """
    heads, width = out.shape
    apart = weights.strides[0]
    out_apart = out.strides[0]
    for l in range(0, count, _TILE):
        rows = min(_TILE, count - l)
        start = first + l * step
        h = 0
        while h < heads:
            several = ROWS if h + ROWS <= heads else 1
            share = weights.ctypes.data + h * apart + 4 * l
            total = out.ctypes.data + h * out_apart
            _sum_tile(share, apart, start, step, rows, several, width, total, out_apart)
            h += several
        for n in range(l, l + rows):
            row = matrix_at(first + n * step, 1, width)[0]
            for h in range(heads):
                for i in range(width // LANES * LANES, width):
                    out[h, i] += weights[h, n] * row[i]
