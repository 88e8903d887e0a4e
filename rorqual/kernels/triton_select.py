"""Attends to selected blocks of keys: the Triton kernel of layers.sparse.selected_attention.

Forward, and the gradient of the queries, run by token: a program takes the heads of one selection
and iterates over the selected blocks, with a running maximum. The gradient of the keys runs by
block: the selections are sorted by block, and a program takes a piece of a block and iterates over
the tokens that selected it, so that every sum has a fixed order and no atomic addition is needed.
Saved from forward are the inputs, the output and the logarithm of the softmax's denominator:

    p = exp(scale q . k - log sum)      d s = p (<d out, v> - <d out, out>)
    d q = scale d s k                   d k = scale d s q                   d v = p d out
"""

import inspect
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

_LEAST = 16  # the shortest side of a matrix product
_PIECE = 64  # keys of a block at a time


@triton.jit
@inspect.unwrap  # tests wrap every function to check its shapes
def _rows(source, row, in_range, width, PADDED: tl.constexpr):
    """Loads source[row], `width` values each, [len(row), PADDED]; 0 outside."""
    column = tl.arange(0, PADDED)
    inside = in_range[:, None] & (column < width)[None, :]
    return tl.load(source + row[:, None] * width + column[None, :], mask=inside, other=0.0)


@triton.jit
@inspect.unwrap
def _keys(
    source,
    batch,
    columns,
    group,
    in_range,
    width,
    stride_b,
    stride_l,
    stride_g,
    PADDED: tl.constexpr,
):
    """Loads source[batch, columns, group], [len(columns), PADDED]; 0 outside."""
    matrix_at = (
        batch * stride_b
        + columns.to(tl.int64)[:, None] * stride_l
        + group * stride_g
        + tl.arange(0, PADDED)[None, :]
    )
    return tl.load(
        source + matrix_at,
        mask=in_range[:, None] & (tl.arange(0, PADDED) < width)[None, :],
        other=0.0,
    )


@triton.jit
@inspect.unwrap
def _dot(left, right, EXACT: tl.constexpr):
    """Multiplies two matrices without rounding them to TF32; EXACT is for Triton's interpreter."""
    # Triton's interpreter multiplies bfloat16 as if it were integers.
    if EXACT:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
@inspect.unwrap
def _columns(which, first, block, limit, PIECE: tl.constexpr):
    """Returns the columns of a piece of a block, and which are keys of the block before `limit`."""
    inner = first + tl.arange(0, PIECE)
    columns = which * block + inner
    return columns, (inner < block) & (columns < limit)


@triton.jit
@inspect.unwrap
def _forward(
    query, key, value, index, positions, out, sums,
    key_b, key_l, key_g, value_b, value_l, value_g,
    time, length, groups, choices, top_k, block, width, deep, scale,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH_BLOCK: tl.constexpr, DEEP: tl.constexpr,
    PIECE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Writes the outputs of one token's heads of one selection, and their log sums."""
    batch = (tl.program_id(1) // choices).to(tl.int64)
    choice = tl.program_id(1) % choices
    token = batch * time + tl.program_id(0)
    group = choice * groups // choices
    r = tl.arange(0, ROWS)
    row = (token * choices + choice) * HEADS + r
    in_range = r < HEADS
    q = _rows(query, row, in_range, width, WIDTH_BLOCK)
    limit = tl.minimum(tl.load(positions + token) + 1, length)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, DEEP], tl.float32)
    for n in range(top_k):
        which = tl.load(index + (token * choices + choice) * top_k + n)
        if which >= 0:
            for first in range(0, block, PIECE):
                columns, seen = _columns(which, first, block, limit, PIECE)
                k = _keys(key, batch, columns, group, seen, width, key_b, key_l, key_g, WIDTH_BLOCK)
                v = _keys(value, batch, columns, group, seen, deep, value_b, value_l, value_g, DEEP)
                logits = _dot(q, tl.trans(k), EXACT) * scale
                logits = tl.where(seen[None, :], logits, float("-inf"))
                higher = tl.maximum(top, tl.max(logits, axis=1))
                weights = tl.exp(logits - higher[:, None])
                rescale = tl.exp(top - higher)
                total = total * rescale + tl.sum(weights, axis=1)
                top = higher
                summed = summed * rescale[:, None] + _dot(weights.to(v.dtype), v, EXACT)
    some = total > 0
    summed = summed / tl.where(some, total, 1.0)[:, None]
    column = tl.arange(0, DEEP)[None, :]
    inside = in_range[:, None] & (column < deep)
    tl.store(out + row[:, None] * deep + column, summed.to(out.dtype.element_ty), mask=inside)
    tl.store(
        sums + row,
        tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("inf")),
        mask=in_range,
    )


@triton.jit
@inspect.unwrap
def _backward_queries(
    query, key, value, index, positions, out, sums, d_out, d_query, products,
    key_b, key_l, key_g, value_b, value_l, value_g,
    time, length, groups, choices, top_k, block, width, deep, scale,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH_BLOCK: tl.constexpr, DEEP: tl.constexpr,
    PIECE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of one token's queries of one selection, and <d out, out> of each."""
    batch = (tl.program_id(1) // choices).to(tl.int64)
    choice = tl.program_id(1) % choices
    token = batch * time + tl.program_id(0)
    group = choice * groups // choices
    r = tl.arange(0, ROWS)
    row = (token * choices + choice) * HEADS + r
    in_range = r < HEADS
    q = _rows(query, row, in_range, width, WIDTH_BLOCK)
    change = _rows(d_out, row, in_range, deep, DEEP)
    product = tl.sum(
        change.to(tl.float32) * _rows(out, row, in_range, deep, DEEP).to(tl.float32), axis=1
    )
    tl.store(products + row, product, mask=in_range)
    sum_of = tl.load(sums + row, mask=in_range, other=float("inf"))
    limit = tl.minimum(tl.load(positions + token) + 1, length)
    made = tl.zeros([ROWS, WIDTH_BLOCK], tl.float32)
    for n in range(top_k):
        which = tl.load(index + (token * choices + choice) * top_k + n)
        if which >= 0:
            for first in range(0, block, PIECE):
                columns, seen = _columns(which, first, block, limit, PIECE)
                k = _keys(key, batch, columns, group, seen, width, key_b, key_l, key_g, WIDTH_BLOCK)
                v = _keys(value, batch, columns, group, seen, deep, value_b, value_l, value_g, DEEP)
                logits = _dot(q, tl.trans(k), EXACT) * scale
                weights = tl.where(seen[None, :], tl.exp(logits - sum_of[:, None]), 0.0)
                moved = weights * (_dot(change, tl.trans(v), EXACT) - product[:, None])
                made += _dot(moved.to(k.dtype), k, EXACT)
    column = tl.arange(0, WIDTH_BLOCK)[None, :]
    made = (made * scale).to(d_query.dtype.element_ty)
    tl.store(
        d_query + row[:, None] * width + column, made, mask=in_range[:, None] & (column < width)
    )


@triton.jit
@inspect.unwrap
def _backward_keys(
    query, key, value, positions, sums, d_out, products, order, starts, d_key, d_value,
    key_b, key_l, key_g, value_b, value_l, value_g,
    length, groups, choices, blocks, block, width, deep, scale,
    HEADS: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, WIDTH_BLOCK: tl.constexpr,
    DEEP: tl.constexpr,
    PIECE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a piece of a block's keys and values.

    They are summed over all tokens that selected the block, in the order of `order`.
    """
    pieces = tl.cdiv(block, PIECE)
    which = tl.program_id(0) // pieces
    first = tl.program_id(0) % pieces * PIECE
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    columns, real = _columns(which, first, block, length, PIECE)
    k = _keys(key, batch, columns, group, real, width, key_b, key_l, key_g, WIDTH_BLOCK)
    v = _keys(value, batch, columns, group, real, deep, value_b, value_l, value_g, DEEP)
    of_key = tl.zeros([PIECE, WIDTH_BLOCK], tl.float32)
    of_value = tl.zeros([PIECE, DEEP], tl.float32)
    bucket = tl.program_id(1) * blocks + which
    r = tl.arange(0, ROWS)
    end = tl.load(starts + bucket + 1)
    for entry in range(tl.load(starts + bucket), end, ROWS // EACH):
        offset = entry + r // EACH
        in_range = (offset < end) & (r % EACH < HEADS)
        pair = tl.load(order + offset, mask=in_range, other=0)  # a token and a choice
        row = pair * HEADS + r % EACH
        q = _rows(query, row, in_range, width, WIDTH_BLOCK)
        change = _rows(d_out, row, in_range, deep, DEEP)
        seen = in_range[:, None] & (
            columns[None, :]
            <= tl.load(positions + pair // choices, mask=in_range, other=-1)[:, None]
        )
        logits = _dot(q, tl.trans(k), EXACT) * scale
        sum_of = tl.load(sums + row, mask=in_range, other=float("inf"))
        weights = tl.where(seen & real[None, :], tl.exp(logits - sum_of[:, None]), 0.0)
        of_value += _dot(tl.trans(weights.to(change.dtype)), change, EXACT)
        product = tl.load(products + row, mask=in_range, other=0.0)
        moved = weights * (_dot(change, tl.trans(v), EXACT) - product[:, None])
        of_key += _dot(tl.trans(moved.to(q.dtype)), q, EXACT)
    line = (batch * length + columns.to(tl.int64)) * groups + group
    column = tl.arange(0, WIDTH_BLOCK)[None, :]
    of_key = (of_key * scale).to(d_key.dtype.element_ty)
    tl.store(d_key + line[:, None] * width + column, of_key, mask=real[:, None] & (column < width))
    column = tl.arange(0, DEEP)[None, :]
    of_value = of_value.to(d_value.dtype.element_ty)
    tl.store(
        d_value + line[:, None] * deep + column, of_value, mask=real[:, None] & (column < deep)
    )


def _padded(size: int) -> int:
    """Returns the power of two that is not below `size`, at least _LEAST."""
    return max(_LEAST, triton.next_power_of_2(size))


def _constants(query: Tensor, value: Tensor, choices: int, block: int) -> dict[str, int]:
    """Returns the sizes for which the kernels are compiled, the widths as powers of two."""
    piece = min(_PIECE, _padded(block))
    heads = query.shape[2] // choices
    return {
        "HEADS": heads,
        "WIDTH_BLOCK": _padded(query.shape[3]),
        "DEEP": _padded(value.shape[3]),
        "PIECE": piece,
        "EXACT": query.device.type == "cpu",
    }


def _by_block(
    index: Int[Tensor, "B T J K"], groups: int, blocks: int
) -> tuple[Int[Tensor, " places"], Int[Tensor, " edges"]]:
    """Sorts the (token, selection) pairs by the block that they select, per sequence and group.

    Returns the numbers of the pairs in order, and the B G blocks + 1 edges: where the pairs of each
    block start, and last where those of the last block end.
    """
    batch, _, choices, top_k = index.shape
    row = torch.arange(batch, device=index.device)[:, None] * groups
    row = row + torch.arange(choices, device=index.device) * groups // choices
    bucket = row[:, None, :, None] * blocks + index
    bucket = bucket.masked_fill((index < 0) | (index >= blocks), batch * groups * blocks).flatten()
    named, order = bucket.sort(stable=True)
    edges = torch.arange(batch * groups * blocks + 1, device=index.device)
    return order // top_k, torch.searchsorted(named, edges)


class _Selected(torch.autograd.Function):
    """Runs the forward and the two backward kernels; saves the inputs, outputs and log sums."""

    @staticmethod
    def forward(ctx, query, key, value, index, positions, block, scale):
        key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
        query = query.contiguous()
        index = index.contiguous()
        positions = positions.contiguous()
        out = torch.empty(*query.shape[:3], value.shape[3], dtype=value.dtype, device=value.device)
        sums = torch.empty(query.shape[:3], dtype=torch.float32, device=value.device)
        ctx.save_for_backward(query, key, value, index, positions, out, sums)
        ctx.block = block
        ctx.scale = scale
        if out.numel():
            _by_token(_forward, (query, key, value, index, positions, out, sums), ctx)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        query, key, value, index, positions, out, sums = ctx.saved_tensors
        d_out = d_out.contiguous()
        products = torch.empty_like(sums)
        d_query = torch.empty_like(query)
        d_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
        d_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        if out.numel():
            _by_token(_backward_queries, (*ctx.saved_tensors, d_out, d_query, products), ctx)
        (batch, length, groups, width), choices = key.shape, index.shape[2]
        blocks = triton.cdiv(length, ctx.block)
        if d_key.numel():
            constants = _constants(query, value, choices, ctx.block)
            each = triton.next_power_of_2(constants["HEADS"])
            with torch.cuda.device_of(query):
                _backward_keys[(blocks * triton.cdiv(ctx.block, constants["PIECE"]),
                batch * groups)](
                    query, key, value, positions, sums, d_out, products, *_by_block(index, groups,
                    blocks),
                    d_key, d_value, *key.stride()[:3], *value.stride()[:3], length, groups, choices,
                    blocks,
                    ctx.block, width, value.shape[3], ctx.scale, EACH=each, ROWS=max(2 * _LEAST,
                    each), **constants,
                )  # fmt: skip
        return d_query, d_key, d_value, None, None, None, None


def _by_token(kernel: Any, tensors: tuple[Tensor, ...], ctx: Any) -> None:
    """Launches one program for each token and selection."""
    query, key, value, index = tensors[:4]
    (batch, time, choices, top_k), (_, length, groups, width) = index.shape, key.shape
    constants = _constants(query, value, choices, ctx.block)
    with torch.cuda.device_of(query):
        kernel[(time, batch * choices)](
            *tensors, *key.stride()[:3], *value.stride()[:3], time, length, groups, choices, top_k,
            ctx.block, width,
            value.shape[3], ctx.scale, ROWS=_padded(constants["HEADS"]), **constants,
        )  # fmt: skip


def selected_attention(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    index: Int[Tensor, "B T J K"],
    positions: Int[Tensor, "B T"],
    block: int,
    scale: float,
) -> Float[Tensor, "B T H Q"]:
    """Computes layers.sparse.selected_attention and all its gradients, within rounding."""
    both = torch.promote_types(query.dtype, key.dtype)
    query = query.to(both)
    key = key.to(both)
    return _Selected.apply(query, key, value, index, positions, block, scale)
