"""Gates an Engram value and normalizes it: the Triton kernel of layers.engram.fuse.

Forward and backward read each input once. A program processes a range of tokens of one stream, the
D values of one token at a time. It keeps the stream's norm weights in registers, and in backward
the sums that are their gradients. Only the inputs are saved from forward. With r the reciprocal
root mean square of the vector beside it, q = h r w_q, k = key r w_k:

    d score  = <d v_s, value> gate (1 - gate) / (2 sqrt |score|)           0 where the root is flat
    d h      = d score (r w_q k / sqrt(D) - r^2 h score / D)               d key: with q for k
    d w_q    = w_k P, d w_k = w_q P,   P = sum over tokens of d score (h r)(key r) / sqrt(D)
    d v_s   += r (u - v_s r^2 <u, v_s> / D),   u = w d norm(v_s)
"""

import inspect
from typing import Literal

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_FLAT = tl.constexpr(1e-6)  # below this |score| the signed square root is constant
_PROGRAMS = 1024  # several for each multiprocessor of any device
_LEAST = 4  # tokens a program, so that its weights are read for more than one


@triton.jit
@inspect.unwrap  # tests wrap every function to check its shapes
def _row(source, offset, inside):
    """Loads numbers of a vector as float32; 0 outside of it."""
    return tl.load(source + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
@inspect.unwrap
def _normed(x, dim, eps):
    """Returns x r and r, the reciprocal of the root mean square of x."""
    r = tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps)
    return x * r, r


@triton.jit
@inspect.unwrap
def _gate(score, COPYSIGN: tl.constexpr):
    """Returns the gate and its derivative with respect to the score."""
    size = tl.abs(score)
    root = tl.sqrt(tl.maximum(size, _FLAT))
    sign = tl.where(score < 0, -1.0, 1.0)
    if not COPYSIGN:
        sign = tl.where(score == 0, 0.0, sign)
    gate = tl.sigmoid(root * sign)
    return gate, tl.where(size >= _FLAT, gate * (1.0 - gate) * 0.5 / root, 0.0)


@triton.jit
@inspect.unwrap
def _forward(
    hidden, key, value, query_norm, key_norm, conv_norm, lookup_mask, gated, normed,
    tokens, span, dim, scale, eps, conv_eps, STREAMS: tl.constexpr, COPYSIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gated values of `span` tokens of one stream, and their norms with `conv_norm`."""
    first = tl.program_id(0) * span
    stream = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    of_query = _row(query_norm, stream * dim + columns, inside)
    of_key = _row(key_norm, stream * dim + columns, inside)
    for token in range(first, tl.minimum(first + span, tokens)):
        flat = tl.full([], token, tl.int64)  # values may be more than 2^31
        offset = (flat * STREAMS + stream) * dim + columns
        query, _ = _normed(_row(hidden, offset, inside), dim, eps)
        keyed, _ = _normed(_row(key, offset, inside), dim, eps)
        gate, _ = _gate(tl.sum((query * of_query) * (keyed * of_key), axis=0) * scale, COPYSIGN)
        if lookup_mask is not None:
            gate = tl.where(tl.load(lookup_mask + flat) != 0, gate, 0.0)
        gate = gate.to(gated.dtype.element_ty).to(tl.float32)
        added = (gate * _row(value, flat * dim + columns, inside)).to(gated.dtype.element_ty)
        tl.store(gated + offset, added, mask=inside)
        if conv_norm is not None:
            shape, _ = _normed(added.to(tl.float32), dim, conv_eps)
            of_conv = _row(conv_norm, stream * dim + columns, inside)
            tl.store(normed + offset, (shape * of_conv).to(normed.dtype.element_ty), mask=inside)


@triton.jit
@inspect.unwrap
def _backward(
    hidden, key, value, query_norm, key_norm, conv_norm, lookup_mask, d_gated, d_normed,
    d_hidden, d_key, d_value, d_gate, d_conv,
    tokens, span, dim, scale, eps, conv_eps, STREAMS: tl.constexpr, COPYSIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of `span` tokens of one stream.

    Those of the norms' weights are sums over these tokens, which the caller adds up.
    """
    run = tl.program_id(0)
    stream = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    of_query = _row(query_norm, stream * dim + columns, inside)
    of_key = _row(key_norm, stream * dim + columns, inside)
    for_gate = tl.zeros([BLOCK], tl.float32)
    for_conv = tl.zeros([BLOCK], tl.float32)
    for token in range(run * span, tl.minimum(run * span + span, tokens)):
        flat = tl.full([], token, tl.int64)
        offset = (flat * STREAMS + stream) * dim + columns
        h, h_r = _normed(_row(hidden, offset, inside), dim, eps)
        k, k_r = _normed(_row(key, offset, inside), dim, eps)
        score = tl.sum((h * of_query) * (k * of_key), axis=0) * scale
        gate, slope = _gate(score, COPYSIGN)
        if lookup_mask is not None:
            alive = tl.load(lookup_mask + flat) != 0
            gate = tl.where(alive, gate, 0.0)
            slope = tl.where(alive, slope, 0.0)
        gate = gate.to(d_gated.dtype.element_ty).to(tl.float32)
        valued = _row(value, flat * dim + columns, inside)
        change = _row(d_gated, offset, inside)
        if conv_norm is not None:
            v, v_r = _normed(
                (gate * valued).to(d_gated.dtype.element_ty).to(tl.float32), dim, conv_eps
            )
            d_norm = _row(d_normed, offset, inside)
            for_conv += d_norm * v
            u = d_norm * _row(conv_norm, stream * dim + columns, inside)
            change += v_r * (u - v * (tl.sum(u * v, axis=0) / dim))
        tl.store(d_value + offset, gate * change, mask=inside)
        d_score = tl.sum(change * valued, axis=0) * slope
        for_gate += (d_score * scale) * h * k
        both = (d_score * scale) * of_query * of_key
        back = d_score * score / dim
        tl.store(
            d_hidden + offset,
            (h_r * (both * k - back * h)).to(d_hidden.dtype.element_ty),
            mask=inside,
        )
        tl.store(
            d_key + offset, (k_r * (both * h - back * k)).to(d_key.dtype.element_ty), mask=inside
        )
    sums = (run * STREAMS + stream) * dim + columns
    tl.store(d_gate + sums, for_gate, mask=inside)
    if conv_norm is not None:
        tl.store(d_conv + sums, for_conv, mask=inside)


def _launch(
    kernel, tensors: tuple[Tensor | None, ...], shape: torch.Size, span: int, sign: str, *eps: float
) -> None:
    """Runs a kernel with one program for each `span` tokens of each stream."""
    tokens, (streams, dim) = shape[0] * shape[1], shape[2:]
    block = triton.next_power_of_2(dim)
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(tokens, span), streams)](
            *tensors, tokens, span, dim, dim**-0.5, *eps,
            STREAMS=streams, COPYSIGN=sign == "copysign", BLOCK=block,
            num_warps=min(max(block // 256, 1), 16),
        )  # fmt: skip


class _Fuse(torch.autograd.Function):
    """Runs the forward and the backward kernel, and saves only the inputs between them."""

    @staticmethod
    def forward(
        ctx, hidden, key, value, query_norm, key_norm, conv_norm, lookup_mask, sign, eps, conv_eps
    ):
        arguments = tuple(
            x if x is None else x.contiguous()
            for x in (hidden, key, value, query_norm, key_norm, conv_norm, lookup_mask)
        )
        tokens = hidden.shape[0] * hidden.shape[1]
        streams = hidden.shape[2]
        ctx.span = max(_LEAST, triton.cdiv(tokens, max(1, _PROGRAMS // streams)))
        ctx.rest = (sign, eps, conv_eps)
        ctx.save_for_backward(*arguments)
        gated = torch.empty(hidden.shape, dtype=value.dtype, device=value.device)
        normed = None if conv_norm is None else torch.empty_like(gated)
        if gated.numel():
            _launch(_forward, (*arguments, gated, normed), hidden.shape, ctx.span, *ctx.rest)
        return gated, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, d_gated, d_normed):
        saved = ctx.saved_tensors
        hidden, key, value, query_norm, key_norm, conv_norm, _ = saved
        runs = triton.cdiv(hidden.shape[0] * hidden.shape[1], ctx.span)
        d_hidden = torch.empty_like(hidden)
        d_key = torch.empty_like(key)
        d_value = torch.empty(hidden.shape, dtype=torch.float32, device=value.device)
        d_gate = torch.empty(runs, *query_norm.shape, dtype=torch.float32, device=value.device)
        d_conv = None if conv_norm is None else torch.empty_like(d_gate)
        changes = (d_gated.contiguous(), None if conv_norm is None else d_normed.contiguous())
        if d_value.numel():
            made = (d_hidden, d_key, d_value, d_gate, d_conv)
            _launch(_backward, (*saved, *changes, *made), hidden.shape, ctx.span, *ctx.rest)
        of_gate = d_gate.sum(0)
        of_query = (of_gate * key_norm).to(query_norm.dtype)
        of_key = (of_gate * query_norm).to(key_norm.dtype)
        of_conv = None if d_conv is None or conv_norm is None else d_conv.sum(0).to(conv_norm.dtype)
        return (
            d_hidden,
            d_key,
            d_value.sum(2).to(value.dtype),
            of_query,
            of_key,
            of_conv,
            None,
            None,
            None,
            None,
        )


def fuse(
    hidden: Float[Tensor, "B T S D"],
    key: Float[Tensor, "B T S D"],
    value: Float[Tensor, "B T D"],
    query_norm: Float[Tensor, "S D"],
    key_norm: Float[Tensor, "S D"],
    conv_norm: Float[Tensor, "S D"] | None,
    lookup_mask: Bool[Tensor, "B T"] | None,
    sign: Literal["sign", "copysign"],
    eps: float,
    conv_eps: float,
) -> tuple[Float[Tensor, "B T S D"], Float[Tensor, "B T S D"] | None]:
    """Computes layers.engram.fuse, within rounding."""
    return _Fuse.apply(
        hidden, key, value, query_norm, key_norm, conv_norm, lookup_mask, sign, eps, conv_eps
    )
