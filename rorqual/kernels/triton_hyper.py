"""Reads and writes residual streams: Triton kernels of streams.pre_mapping and post_mapping.

A program processes a few tokens with all their streams, so that forward and backward of either
function read the streams once. The S x S matrices, Sinkhorn's iterates among them, stay in
registers: backward recomputes them from the logits and keeps the divisor of each step. With
P = c dL/dc a step c' = c / d has the backward P <- P - c' sum P, c <- c' d.

    pre_mapping    d x_i  = pre_i du         d pre_i = <du, x_i>
                   then through the sigmoids and Sinkhorn to the logits
    post_mapping   d x_j  = sum_k comb[j, k] dy_k      d comb[j, k] = <x_j, dy_k>
                   d out  = sum_k post_k dy_k          d post_k = <dy_k, out>
"""

import inspect
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.results import Read

_TILE = 64  # tokens times streams of a tile, and its columns
_TINY = 1.1754943508222875e-38  # float32's smallest normal number


@triton.jit
@inspect.unwrap  # tests wrap every function to check its shapes
def _start(m, scale, base, n, tokens, eps, floor, S: tl.constexpr, P: tl.constexpr):
    """Returns the softmax over the last axis [n, j, k] and Sinkhorn's first matrix; 0 outside."""
    j = tl.arange(0, P)[None, :, None]
    k = tl.arange(0, P)[None, None, :]
    inside = (j < S) & (k < S)
    row = (2 + j) * S + k
    in_range = inside & (n < tokens)[:, None, None]
    logits = tl.load(m + row * tokens + n[:, None, None], mask=in_range, other=0.0) * tl.load(
        scale + 2
    )
    logits = tl.where(k < S, logits + tl.load(base + row, mask=inside, other=0.0), float("-inf"))
    powers = tl.exp(logits - tl.max(logits, axis=2)[:, :, None])
    start = tl.where(inside, powers / tl.sum(powers, axis=2)[:, :, None], 0.0)
    return start, tl.where(inside, start + tl.maximum(eps, floor), 0.0)


@triton.jit
@inspect.unwrap
def _sigmoids(m, scale, base, n, tokens, which: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """Returns the sigmoid of the logits of pre (which 0) or post (1), [n, s]."""
    s = tl.arange(0, P)
    row = which * S + s
    in_range = (s < S)[None, :] & (n < tokens)[:, None]
    logits = tl.load(m + row[None, :] * tokens + n[:, None], mask=in_range, other=0.0) * tl.load(
        scale + which
    )
    return tl.sigmoid(logits + tl.load(base + row, mask=s < S, other=0.0)[None, :])


@triton.jit
@inspect.unwrap
def _divisor(comb, eps, axis: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """Returns the divisor of a Sinkhorn step, [n, the other axis]; 1 outside."""
    return tl.where((tl.arange(0, P) < S)[None, :], tl.sum(comb, axis=axis) + eps, 1.0)


@triton.jit
@inspect.unwrap
def _pre_mapping(
    streams, m, scale, base, handed_on, u, pre, post, comb,
    tokens, dim, eps, floor, iterations, S: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes u, pre, post and comb of ROWS tokens."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.arange(0, P)
    in_range = (s < S)[None, :] & (n < tokens)[:, None]
    offset = s[None, :] * tokens + n[:, None]
    weights = _sigmoids(m, scale, base, n, tokens, 0, S, P) + eps
    tl.store(pre + offset, weights, mask=in_range)
    tl.store(post + offset, 2.0 * _sigmoids(m, scale, base, n, tokens, 1, S, P), mask=in_range)
    _, c = _start(m, scale, base, n, tokens, eps, floor, S, P)
    c = c / _divisor(c, eps, 1, S, P)[:, None, :]
    for _ in range(iterations - 1):
        c = c / _divisor(c, eps, 2, S, P)[:, :, None]
        c = c / _divisor(c, eps, 1, S, P)[:, None, :]
    offsets = (s[None, :, None] * S + s[None, None, :]) * tokens + n[:, None, None]
    tl.store(comb + offsets, c, mask=in_range[:, :, None] & (s < S)[None, None, :])
    if handed_on is not None:
        weights = tl.load(handed_on + offset, mask=in_range, other=0.0)
    flat = n.to(tl.int64)  # values may be more than 2^31
    for first in range(0, dim, WIDTH):
        d = first + tl.arange(0, WIDTH)
        inside = in_range[:, :, None] & (d < dim)[None, None, :]
        x = tl.load(
            streams + (flat[:, None, None] * S + s[None, :, None]) * dim + d[None, None, :],
            mask=inside,
            other=0.0,
        )
        summed = tl.sum(x.to(tl.float32) * weights[:, :, None], axis=1)
        mask = (n < tokens)[:, None] & (d < dim)[None, :]
        tl.store(u + flat[:, None] * dim + d[None, :], summed.to(u.dtype.element_ty), mask=mask)


@triton.jit
@inspect.unwrap
def _unwind(
    m,
    scale,
    base,
    d_comb,
    n,
    tokens,
    eps,
    floor,
    iterations,
    S: tl.constexpr,
    P: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Returns the gradient of the logits of comb, [n, j, k]."""
    s = tl.arange(0, P)
    t = tl.arange(0, STEPS)[None, None, :]
    start, c = _start(m, scale, base, n, tokens, eps, floor, S, P)
    total = _divisor(c, eps, 1, S, P)
    start_sum = tl.where(t == 0, total[:, :, None], 0.0)
    c = c / total[:, None, :]
    for i in range(iterations - 1):
        total = _divisor(c, eps, 2, S, P)
        start_sum = tl.where(t == 2 * i + 1, total[:, :, None], start_sum)
        c = c / total[:, :, None]
        total = _divisor(c, eps, 1, S, P)
        start_sum = tl.where(t == 2 * i + 2, total[:, :, None], start_sum)
        c = c / total[:, None, :]
    offsets = (s[None, :, None] * S + s[None, None, :]) * tokens + n[:, None, None]
    in_range = (s < S)[None, :, None] & (s < S)[None, None, :] & (n < tokens)[:, None, None]
    flow = c * tl.load(d_comb + offsets, mask=in_range, other=0.0)
    for i in range(iterations - 1):
        last = 2 * (iterations - 1 - i)
        flow -= c * tl.sum(flow, axis=1)[:, None, :]
        c = c * tl.sum(tl.where(t == last, start_sum, 0.0), axis=2)[:, None, :]
        flow -= c * tl.sum(flow, axis=2)[:, :, None]
        c = c * tl.sum(tl.where(t == last - 1, start_sum, 0.0), axis=2)[:, :, None]
    flow -= c * tl.sum(flow, axis=1)[:, None, :]
    flow = tl.where(start > 0, flow * (start / (start + eps)), 0.0)
    return flow - start * tl.sum(flow, axis=2)[:, :, None]


@triton.jit
@inspect.unwrap
def _pre_mapping_backward(
    streams, m, scale, base, handed_on, d_u, d_pre, d_post, d_comb, d_streams, d_logits, d_handed,
    tokens, dim, eps, floor, iterations, S: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the streams, m scale + base, and `handed_on`, of ROWS tokens."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.arange(0, P)
    in_range = (s < S)[None, :] & (n < tokens)[:, None]
    offset = s[None, :] * tokens + n[:, None]
    opened = _sigmoids(m, scale, base, n, tokens, 0, S, P)
    weights = opened + eps
    if handed_on is not None:
        weights = tl.load(handed_on + offset, mask=in_range, other=0.0)
    flat = n.to(tl.int64)
    back = tl.zeros([ROWS, P], tl.float32)
    for first in range(0, dim, WIDTH):
        d = first + tl.arange(0, WIDTH)
        inside = in_range[:, :, None] & (d < dim)[None, None, :]
        where = (flat[:, None, None] * S + s[None, :, None]) * dim + d[None, None, :]
        mask = (n < tokens)[:, None] & (d < dim)[None, :]
        change = tl.load(d_u + flat[:, None] * dim + d[None, :], mask=mask, other=0.0).to(
            tl.float32
        )[:, None, :]
        x = tl.load(streams + where, mask=inside, other=0.0).to(tl.float32)
        back += tl.sum(x * change, axis=2)
        tl.store(
            d_streams + where,
            (weights[:, :, None] * change).to(d_streams.dtype.element_ty),
            mask=inside,
        )
    of_pre = tl.load(d_pre + offset, mask=in_range, other=0.0)
    if handed_on is not None:
        tl.store(d_handed + offset, back, mask=in_range)
    else:
        of_pre += back
    tl.store(d_logits + offset, of_pre * opened * (1.0 - opened), mask=in_range)
    opened = _sigmoids(m, scale, base, n, tokens, 1, S, P)
    of_post = tl.load(d_post + offset, mask=in_range, other=0.0)
    tl.store(d_logits + S * tokens + offset, 2.0 * of_post * opened * (1.0 - opened), mask=in_range)
    flow = _unwind(m, scale, base, d_comb, n, tokens, eps, floor, iterations, S, P, STEPS)
    offsets = ((2 + s[None, :, None]) * S + s[None, None, :]) * tokens + n[:, None, None]
    tl.store(d_logits + offsets, flow, mask=in_range[:, :, None] & (s < S)[None, None, :])


@triton.jit
@inspect.unwrap
def _post_mapping(
    streams, out, post, comb, made,
    tokens, dim, S: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes post_k out + sum_j comb[j, k] x_j of ROWS tokens; comb None is the identity."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.arange(0, P)
    here = n < tokens
    flat = n.to(tl.int64)
    in_range = (s < S)[None, :] & here[:, None]
    for first in range(0, dim, WIDTH):
        d = first + tl.arange(0, WIDTH)
        mask = here[:, None] & (d < dim)[None, :]
        where = (flat[:, None, None] * S + s[None, :, None]) * dim + d[None, None, :]
        x = tl.load(
            streams + where, mask=in_range[:, :, None] & (d < dim)[None, None, :], other=0.0
        ).to(tl.float32)
        added = tl.load(out + flat[:, None] * dim + d[None, :], mask=mask, other=0.0).to(tl.float32)
        for k in tl.static_range(S):
            if comb is not None:
                way = tl.load(
                    comb + (s[None, :] * S + k) * tokens + n[:, None], mask=in_range, other=0.0
                )
            else:
                way = tl.where(s == k, 1.0, 0.0)[None, :]
            share = tl.load(post + k * tokens + n, mask=here, other=0.0)
            row = tl.sum(way[:, :, None] * x, axis=1) + share[:, None] * added
            tl.store(
                made + (flat[:, None] * S + k) * dim + d[None, :],
                row.to(made.dtype.element_ty),
                mask=mask,
            )


@triton.jit
@inspect.unwrap
def _post_mapping_backward(
    streams, out, post, comb, d_made, d_streams, d_out, d_post, d_comb,
    tokens, dim, S: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of the streams, out, post and comb, of ROWS tokens."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    s = tl.arange(0, P)
    here = n < tokens
    flat = n.to(tl.int64)
    in_range = (s < S)[None, :] & here[:, None]
    of_post = tl.zeros([ROWS, P], tl.float32)
    of_comb = tl.zeros([ROWS, P, P], tl.float32)
    for first in range(0, dim, WIDTH):
        d = first + tl.arange(0, WIDTH)
        mask = here[:, None] & (d < dim)[None, :]
        inside = in_range[:, :, None] & (d < dim)[None, None, :]
        where = (flat[:, None, None] * S + s[None, :, None]) * dim + d[None, None, :]
        added = tl.load(out + flat[:, None] * dim + d[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(streams + where, mask=inside, other=0.0).to(tl.float32)
        of_x = tl.zeros([ROWS, P, WIDTH], tl.float32)
        of_out = tl.zeros([ROWS, WIDTH], tl.float32)
        for k in tl.static_range(S):
            change = tl.load(
                d_made + (flat[:, None] * S + k) * dim + d[None, :], mask=mask, other=0.0
            ).to(tl.float32)
            of_out += tl.load(post + k * tokens + n, mask=here, other=0.0)[:, None] * change
            of_post += tl.where(s == k, 1.0, 0.0)[None, :] * tl.sum(change * added, axis=1)[:, None]
            if comb is not None:
                way = tl.load(
                    comb + (s[None, :] * S + k) * tokens + n[:, None], mask=in_range, other=0.0
                )
                of_comb += (
                    tl.where(s == k, 1.0, 0.0)[None, None, :]
                    * tl.sum(x * change[:, None, :], axis=2)[:, :, None]
                )
            else:
                way = tl.where(s == k, 1.0, 0.0)[None, :]
            of_x += way[:, :, None] * change[:, None, :]
        tl.store(d_streams + where, of_x.to(d_streams.dtype.element_ty), mask=inside)
        tl.store(
            d_out + flat[:, None] * dim + d[None, :], of_out.to(d_out.dtype.element_ty), mask=mask
        )
    tl.store(d_post + s[None, :] * tokens + n[:, None], of_post, mask=in_range)
    if comb is not None:
        offsets = (s[None, :, None] * S + s[None, None, :]) * tokens + n[:, None, None]
        tl.store(d_comb + offsets, of_comb, mask=in_range[:, :, None] & (s < S)[None, None, :])


def _launch(kernel: Any, tensors: tuple[Any, ...], *rest: float, **constants: int) -> None:
    """Runs a kernel with one program for each tile of tokens; `tensors` begin with the streams."""
    tokens, streams, dim = tensors[0].shape
    if not tensors[0].numel():
        return
    side = triton.next_power_of_2(streams)
    rows = max(1, _TILE // side)
    width = min(_TILE, triton.next_power_of_2(dim))
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(tokens, rows),)](
            *tensors, tokens, dim, *rest, S=streams, P=side, ROWS=rows, WIDTH=width, **constants
        )


def _contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Makes tensors contiguous; None stays None."""
    return tuple(x if x is None else x.contiguous() for x in tensors)


class _PreMapping(torch.autograd.Function):
    """Runs the kernels of pre_mapping, and saves only the inputs between them."""

    @staticmethod
    def forward(ctx, streams, m, scale, base, handed_on, iterations, eps):
        arguments = _contiguous(streams, m, scale, base, handed_on)
        ctx.save_for_backward(*arguments)
        ctx.rest = (eps, 0.0 if eps else _TINY, iterations)
        tokens, count, dim = streams.shape
        u = streams.new_empty(tokens, dim)
        pre = m.new_empty(count, tokens)
        post = torch.empty_like(pre)
        comb = m.new_empty(count, count, tokens)
        _launch(_pre_mapping, (*arguments, u, pre, post, comb), *ctx.rest)
        return u, pre, post, comb

    @staticmethod
    @once_differentiable
    def backward(ctx, *changes):
        streams, m, scale, base, handed_on = ctx.saved_tensors
        made = (
            torch.empty_like(streams), torch.empty_like(m),
            None if handed_on is None else torch.empty_like(handed_on),
        )  # fmt: skip
        steps = triton.next_power_of_2(2 * ctx.rest[-1] - 1)
        saved = (streams, m, scale, base, handed_on, *_contiguous(*changes))
        _launch(_pre_mapping_backward, (*saved, *made), *ctx.rest, STEPS=steps)
        d_streams, d_logits, d_handed = made
        parts = (streams.shape[1], streams.shape[1], m.shape[0] - 2 * streams.shape[1])
        d_scale = torch.stack([piece.sum() for piece in (d_logits * m).split(parts)])
        d_m = d_logits * scale.repeat_interleave(torch.tensor(parts, device=scale.device))[:, None]
        return d_streams, d_m, d_scale, d_logits.sum(1), d_handed, None, None


class _PostMapping(torch.autograd.Function):
    """Runs the kernels of post_mapping, and saves only the inputs between them."""

    @staticmethod
    def forward(ctx, streams, out, post, comb):
        arguments = _contiguous(streams, out, post, comb)
        ctx.save_for_backward(*arguments)
        made = torch.empty_like(arguments[0])
        _launch(_post_mapping, (*arguments, made))
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx, d_made):
        saved = ctx.saved_tensors
        made = tuple(x if x is None else torch.empty_like(x) for x in saved)
        _launch(_post_mapping_backward, (*saved, d_made.contiguous(), *made))
        return made


def pre_mapping(
    streams: Float[Tensor, "N S D"],
    m: Float[Tensor, "K N"],
    scale: Float[Tensor, "3"],
    base: Float[Tensor, " K"],
    handed_on: Float[Tensor, "S N"] | None = None,
    iterations: int = 20,
    eps: float = 1e-6,
) -> Read:
    """Computes layers.streams.pre_mapping, within rounding."""
    return Read(*_PreMapping.apply(streams, m, scale, base, handed_on, iterations, eps))


def post_mapping(
    streams: Float[Tensor, "N S D"],
    out: Float[Tensor, "N D"],
    post: Float[Tensor, "S N"],
    comb: Float[Tensor, "S S N"] | None,
) -> Float[Tensor, "N S D"]:
    """Computes layers.streams.post_mapping, within rounding."""
    return _PostMapping.apply(streams, out, post, comb)
