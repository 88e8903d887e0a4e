"""Normalises the mixing matrices of residual streams: layers.streams.sinkhorn, compiled.

The reference takes three operations of torch for each of 39 normalisations, which for the few
tokens of a decoding step cost far more than the arithmetic. The kernel runs them all in one loop,
over a tile of tokens that stays in the first cache. float32, CPU, without gradients.
"""

import functools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rorqual.kernels import compiled

_TILE = 64  # tokens
_loop = functools.partial(compiled.compiled, any_order=True)  # sums may use vector instructions


@_loop
def _normalise(comb, steps, eps):  # pragma: no cover
    """Divides comb [S, S, N] by its sums along axis 0, then axis 1, and so on, in place."""
    streams, tokens = comb.shape[0], comb.shape[2]
    sums = np.empty((streams, _TILE), np.float32)
    for start in range(0, tokens, _TILE):
        count = min(_TILE, tokens - start)
        for step in range(steps):
            sums[:] = eps
            for j in range(streams):
                for k in range(streams):
                    total, values = sums[j if step % 2 else k], comb[j, k, start : start + count]
                    for n in range(count):
                        total[n] += values[n]
            for j in range(streams):
                for k in range(streams):
                    total, values = sums[j if step % 2 else k], comb[j, k, start : start + count]
                    for n in range(count):
                        # np.divide does not check for 0.
                        values[n] = np.divide(values[n], total[n])


def sinkhorn(
    logits: Float[Tensor, "S S N"], iterations: int = 20, eps: float = 1e-6
) -> Float[Tensor, "S S N"]:
    """Computes layers.streams.sinkhorn, within float32 rounding."""
    comb = logits.detach().contiguous().softmax(1).add_(eps or torch.finfo(torch.float32).tiny)
    _normalise(comb.numpy(), 2 * iterations - 1, np.float32(eps))
    return comb
