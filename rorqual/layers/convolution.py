"""A causal depthwise convolution over time, which Engram and delta net apply."""

from jaxtyping import Float, Int
from torch import Tensor


def convolve(
    window: Float[Tensor, "B W S D"],
    weight: Float[Tensor, "S D taps"],
    document_ids: Int[Tensor, "B W"] | None,
    halo: int,
) -> Float[Tensor, "B T S D"]:
    """Applies a causal depthwise convolution over the T = W - halo last tokens.

    weight[..., taps-1-j] multiplies the value j dilations before. halo is (taps - 1) dilations, the
    number of tokens before the first one. A value of another document counts as 0.
    """
    time = window.shape[1] - halo
    taps = weight.shape[-1]
    out = window[:, halo:] * weight[..., -1]
    for j in range(1, taps):
        start = halo - j * (halo // (taps - 1))
        tap = window[:, start : start + time]
        if document_ids is not None:
            other = document_ids[:, start : start + time] != document_ids[:, halo:]
            tap = tap.masked_fill(other[..., None, None], 0.0)
        out = out + tap * weight[..., taps - 1 - j]
    return out
