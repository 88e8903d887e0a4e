"""Values over time, taps in -> their causal convolution out: layers.engram.convolve compiled, on the CPU.

Every value is read once for all taps. In backward a value gathers from the tokens that it went to, so that no two
threads write to one place. In float32.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from rorqual.kernels.compiled import compiled, spread

_WORTH_A_THREAD = 1 << 16  # values; below, starting threads takes longer than the work


@compiled
def _forward(window, weight, documents, halo, out, first, last):  # pragma: no cover
    """window [B, W, C], weight [taps, C], out [B, T, C]; first and last count the tokens of the batch."""
    taps, time = len(weight), out.shape[1]
    step = halo // max(taps - 1, 1)
    for n in range(first, last):
        b, t = n // time, n % time
        target = out[b, t]
        target[:] = np.float32(0)
        for j in range(taps):
            place = t + halo - j * step
            if not len(documents) or documents[b, place] == documents[b, t + halo]:
                w, value = weight[taps - 1 - j], window[b, place]
                for c in range(len(value)):
                    target[c] += w[c] * value[c]


@compiled
def _backward(window, weight, documents, halo, d_out, d_window, d_weight, first, last):  # pragma: no cover
    """Adds to d_weight, which is of these places only; first and last count the places of all windows."""
    taps, time, wide = len(weight), d_out.shape[1], window.shape[1]
    step = halo // max(taps - 1, 1)
    for n in range(first, last):
        b, place = n // wide, n % wide
        value, target = window[b, place], d_window[b, place]
        target[:] = np.float32(0)
        for j in range(taps):
            t = place - halo + j * step
            if 0 <= t < time and (not len(documents) or documents[b, place] == documents[b, t + halo]):
                change, w, of_weight = d_out[b, t], weight[taps - 1 - j], d_weight[taps - 1 - j]
                for c in range(len(value)):
                    target[c] += w[c] * change[c]
                    of_weight[c] += value[c] * change[c]


def _arrays(window: Tensor, weight: Tensor, documents: Tensor | None) -> list[np.ndarray]:
    """Streams and their values on one axis, taps first. The weight is a copy: see fuse._arrays."""
    none = window.new_empty(0, 1, dtype=torch.int64)
    given = (window.flatten(2), weight.flatten(0, 1).t().clone(), none if documents is None else documents)
    return [tensor.detach().contiguous().numpy() for tensor in given]


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, window, weight, documents, halo):
        ctx.save_for_backward(window, weight, documents)
        ctx.halo, ctx.parts = halo, min(torch.get_num_threads(), max(1, window.numel() // _WORTH_A_THREAD))
        out = window.new_empty(window.shape[0], window.shape[1] - halo, *window.shape[2:])
        arrays, target = _arrays(window, weight, documents), out.flatten(2).numpy()
        tokens = target.shape[0] * target.shape[1]
        spread(lambda _, *span: _forward(*arrays, halo, target, *span), tokens, ctx.parts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        window, weight, documents = ctx.saved_tensors
        arrays, change = _arrays(window, weight, documents), d_out.contiguous().flatten(2).numpy()
        d_window, d_weight = window.new_empty(window.shape), weight.new_zeros(ctx.parts, *arrays[1].shape)
        target, sums = d_window.flatten(2).numpy(), d_weight.numpy()

        def loop(part: int, first: int, last: int) -> None:
            _backward(*arrays, ctx.halo, change, target, sums[part], first, last)

        spread(loop, window.shape[0] * window.shape[1], ctx.parts)
        return d_window, d_weight.sum(0).t().reshape(weight.shape), None, None


def convolve(
    window: Float[Tensor, "B W S D"],
    weight: Float[Tensor, "S D taps"],
    documents: Int[Tensor, "B W"] | None,
    halo: int,
) -> Float[Tensor, "B T S D"]:
    """See layers.engram.convolve, whose numbers these are within float32 rounding."""
    return _Convolve.apply(window, weight, documents, halo)
