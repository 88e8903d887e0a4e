"""Rounds values to the formats that DeepSeek-V4.1 stores in its caches, with a plain gradient.

    fp8      e4m3, one power of two s for 32 values: s = 2^ceil(log2(max(amax, 1e-4) / 448))
    mxfp4    e2m1, one power of two s for 32 values: s = 2^ceil(log2(max(amax, 6 * 2^-126) / 6))
    nvfp4    e2m1, one e4m3 number s for 16 values:  s = e4m3(max(amax, 6 * 2^-9) / 6)
    rounded  = s q(v / s)       to nearest, a tie to the even code; the gradient passes unchanged

The model is trained with this rounding, so it is one of its layers and not an approximation of it.
OCP Microscaling Formats 1.0; e4m3: arXiv:2209.05433; nvfp4: arXiv:2509.25149.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CacheFormat = Literal["fp8", "mxfp4", "nvfp4"]

E4M3_LARGEST = 448.0
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of e2m1, in the order of its codes
E2M1_LARGEST = LEVELS[-1]
# Values that share a scale.
BLOCKS: dict[CacheFormat, int] = {"fp8": 32, "mxfp4": 32, "nvfp4": 16}


def power_of_two_above(x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Returns the smallest power of two that is not below x, for positive normal float32 numbers.

    It adds one to the exponent unless the mantissa is zero, so no logarithm rounds.
    """
    bits = x.contiguous().view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return (exponent.to(torch.int32) << 23).view(torch.float32)


def e2m1_codes(x: Float[Tensor, "*B"]) -> Int[Tensor, "*B"]:
    """Returns the magnitude codes 0..7 of |x|, to nearest, a tie to the even code."""
    levels = torch.tensor(LEVELS, device=x.device)
    middles = (levels[1:] + levels[:-1]) / 2
    magnitude = x.abs().contiguous()
    below = torch.bucketize(magnitude, middles)  # middles[below - 1] < magnitude <= middles[below]
    tie = magnitude == middles[below.clamp_max(len(LEVELS) - 2)]
    return below + (tie & (below % 2 == 1))


class _Rounded(torch.autograd.Function):
    """Rounds in the forward pass and passes the gradient on in the backward pass."""

    @staticmethod
    def forward(ctx, values: Tensor, kind: CacheFormat) -> Tensor:
        width = values.shape[-1]
        block = BLOCKS[kind]
        blocks = F.pad(values.float(), (0, -width % block)).unflatten(-1, (-1, block))
        largest = blocks.abs().amax(-1, keepdim=True)
        if kind == "fp8":
            scale = power_of_two_above(largest.clamp_min(1e-4) * (1 / E4M3_LARGEST))
            scaled = (blocks / scale).clamp(-E4M3_LARGEST, E4M3_LARGEST)
            rounded = scaled.to(torch.float8_e4m3fn).float()
        else:
            if kind == "nvfp4":
                scale = largest.clamp_min(E2M1_LARGEST * 2.0**-9) / E2M1_LARGEST
                scale = scale.to(torch.float8_e4m3fn).float()
            else:
                least = E2M1_LARGEST * 2.0**-126
                scale = power_of_two_above(largest.clamp_min(least) * (1 / E2M1_LARGEST))
            scaled = (blocks / scale).clamp(-E2M1_LARGEST, E2M1_LARGEST)
            levels = torch.tensor(LEVELS, device=values.device)
            rounded = levels[e2m1_codes(scaled)].copysign(scaled)
        return (rounded * scale).flatten(-2)[..., :width].to(values.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def rounded(values: Float[Tensor, "*B C"], kind: CacheFormat) -> Float[Tensor, "*B C"]:
    """Rounds the last axis to what `kind` can store; an incomplete last block is padded with zeros.

    The result has the dtype of `values`, and its gradient is that of `values`.
    """
    return _Rounded.apply(values, kind)
