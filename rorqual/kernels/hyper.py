"""Reads, mixes and writes residual streams of a few tokens: functions of layers.streams, compiled.

    sinkhorn       all normalisations of the mixing matrices in one loop
    pre_mapping    coefficients, Sinkhorn and the sublayer's input
    post_mapping   the streams after a sublayer

The references take some 150 operations of torch for a sublayer, which for the few tokens of a
decoding step cost far more than their arithmetic. float32, CPU, without gradients.
"""

import functools
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rorqual.kernels import compiled, registered
from rorqual.kernels.results import Read

SMALL_BATCH = 16  # tokens; for more, torch's products are as fast
_TILE = 64  # tokens that stay in the first cache
_TINY = float(np.finfo(np.float32).tiny)
_loop = functools.partial(compiled.compiled, any_order=True)  # sums may use vector instructions


@_loop
def _normalise(comb, steps, eps):  # pragma: no cover
    """Divides comb [S, S, N] by its sums along axis 0, then axis 1, and so on, in place."""
    streams = comb.shape[0]
    tokens = comb.shape[2]
    sums = np.empty((streams, _TILE), np.float32)
    for start in range(0, tokens, _TILE):
        count = min(_TILE, tokens - start)
        for step in range(steps):
            sums[:] = eps
            for j in range(streams):
                for k in range(streams):
                    total = sums[j if step % 2 else k]
                    values = comb[j, k, start : start + count]
                    for n in range(count):
                        total[n] += values[n]
            for j in range(streams):
                for k in range(streams):
                    total = sums[j if step % 2 else k]
                    values = comb[j, k, start : start + count]
                    for n in range(count):
                        # np.divide does not check for 0.
                        values[n] = np.divide(values[n], total[n])


@_loop
def _coefficients(m, scale, base, pre, post, comb, eps, least):  # pragma: no cover
    """Writes pre, post and the exponentials of comb, whose rows sum to 1, plus `least`."""
    streams = pre.shape[0]
    for n in range(m.shape[1]):
        for i in range(streams):
            j = streams + i
            pre[i, n] = np.float32(1.0 / (1.0 + math.exp(-(m[i, n] * scale[0] + base[i])))) + eps
            post[i, n] = np.float32(2.0 / (1.0 + math.exp(-(m[j, n] * scale[1] + base[j]))))
        for j in range(streams):
            first = (2 + j) * streams
            best = -np.inf
            total = 0.0
            for k in range(streams):
                logit = m[first + k, n] * scale[2] + base[first + k]
                comb[j, k, n] = logit
                best = max(best, logit)
            for k in range(streams):
                comb[j, k, n] = math.exp(comb[j, k, n] - best)
                total += comb[j, k, n]
            for k in range(streams):
                comb[j, k, n] = np.float32(comb[j, k, n] / total) + least


@_loop
def _read(streams, pre, out):  # pragma: no cover
    """Writes out[n] = sum_i pre[i, n] streams[n, i]."""
    for n in range(streams.shape[0]):
        row = out[n]
        row[:] = 0.0
        for i in range(streams.shape[1]):
            share = pre[i, n]
            values = streams[n, i]
            for d in range(row.shape[0]):
                row[d] += share * values[d]


@_loop
def _write(streams, out, post, comb, mixed):  # pragma: no cover
    """Writes mixed[n, k] = post[k, n] out[n] + sum_j comb[j, k, n] streams[n, j]."""
    for n in range(streams.shape[0]):
        for k in range(streams.shape[1]):
            row = mixed[n, k]
            share = post[k, n]
            values = out[n]
            for d in range(row.shape[0]):
                row[d] = share * values[d]
            for j in range(streams.shape[1]):
                share = comb[j, k, n]
                values = streams[n, j]
                for d in range(row.shape[0]):
                    row[d] += share * values[d]


def sinkhorn(
    logits: Float[Tensor, "S S N"], iterations: int = 20, eps: float = 1e-6
) -> Float[Tensor, "S S N"]:
    """Computes layers.streams.sinkhorn, within float32 rounding."""
    comb = logits.detach().contiguous().softmax(1).add_(eps or _TINY)
    _normalise(comb.numpy(), 2 * iterations - 1, np.float32(eps))
    return comb


def pre_mapping(
    streams: Float[Tensor, "N S D"],
    m: Float[Tensor, "K N"],
    scale: Float[Tensor, "3"],
    base: Float[Tensor, " K"],
    handed_on: Float[Tensor, "S N"] | None = None,
    iterations: int = 20,
    eps: float = 1e-6,
) -> Read:
    """Computes layers.streams.pre_mapping, within float32 rounding."""
    tokens, S = streams.shape[:2]
    if tokens > SMALL_BATCH:
        reference = registered()["pre_mapping"].reference
        assert reference is not None
        return reference(streams, m, scale, base, handed_on, iterations, eps)
    pre, post, comb = (m.new_empty(*shape, tokens) for shape in ((S,), (S,), (S, S)))
    # Copies, since FSDP frees the memory of parameters, which an array of it would forbid.
    arrays = m.detach().contiguous(), scale.detach().clone(), base.detach().clone()
    made = pre.numpy(), post.numpy(), comb.numpy()
    inputs = (x.numpy() for x in arrays)
    _coefficients(*inputs, *made, np.float32(eps), np.float32(eps or _TINY))
    _normalise(made[2], 2 * iterations - 1, np.float32(eps))
    out = streams.new_empty(tokens, streams.shape[2])
    weights = pre if handed_on is None else handed_on.detach().contiguous()
    _read(streams.detach().contiguous().numpy(), weights.numpy(), out.numpy())
    return Read(out, pre, post, comb)


def post_mapping(
    streams: Float[Tensor, "N S D"],
    out: Float[Tensor, "N D"],
    post: Float[Tensor, "S N"],
    comb: Float[Tensor, "S S N"] | None,
) -> Float[Tensor, "N S D"]:
    """Computes layers.streams.post_mapping, within float32 rounding."""
    if len(streams) > SMALL_BATCH or comb is None:
        reference = registered()["post_mapping"].reference
        assert reference is not None
        return reference(streams, out, post, comb)
    mixed = torch.empty(streams.shape)
    arrays = (x.detach().contiguous().numpy() for x in (streams, out, post, comb))
    _write(*arrays, mixed.numpy())
    return mixed
