"""Rotary positions, and the frequencies that longer contexts need.

    rotate(x) = (a cos - b sin, a sin + b cos) for each pair (a, b)
    YaRN      = frequencies stretched where they are slow
                (and linear, dynamic, llama3 and longrope, see rope_frequencies)

RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864; YaRN, 2309.00071.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rorqual.model_config import RopeConfig as RopeConfig
from rorqual.model_config import YarnConfig as YarnConfig
from rorqual.model_config import longest_context as longest_context


def _mscale(factor: float, weight: float) -> float:
    """Computes YaRN's attention factor, 0.1 weight ln(factor) + 1; 1 if factor <= 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _ramp_ends(yarn: YarnConfig, base: float, dim: int) -> tuple[float, float]:
    """Returns the pairs between which YaRN goes from the original to the slowed frequencies."""

    def pair(turns: float) -> float:
        return dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = pair(yarn.beta_fast)
    high = pair(yarn.beta_slow)
    if yarn.truncate:
        low = float(math.floor(low))
        high = float(math.ceil(high))
    low = max(low, 0.0)
    high = min(high, dim - 1.0)
    return low, high + 0.001 if low == high else high


def rope_frequencies(
    config: RopeConfig, dim: int, length: Int[Tensor, ""] | None = None
) -> Float[Tensor, " F"]:
    """Computes the rotary frequencies of the dim/2 pairs, in radians a token.

        f_i = base^(-2i/dim), and with YaRN f (1 - ramp) + f/s ramp,
        ramp(i) = clamp((i - low) / (high - low), 0, 1)

    | kind     | frequency                                                                   |
    |----------|-----------------------------------------------------------------------------|
    | linear   | f / s                                                                       |
    | dynamic  | base' = base (s n / N - s + 1)^(dim / (dim - 2)), n = max(`length`, N)      |
    | llama3   | f (1 - ramp) / s + f ramp, ramp = clamp((N f / 2 pi - low) / (high - low))  |
    | longrope | f / short_i, or f / long_i where `length` is more than N                    |

    N is original_length; `length` is one more than the longest position of a call, and None counts
    as N. ValueError if dim is odd.
    """
    if dim % 2:
        raise ValueError(f"got a rotary width of {dim}, expected an even one")
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    if length is not None:
        exponents = exponents.to(length.device)
    if (dynamic := config.dynamic) is not None and length is not None:
        if dim < 4:
            raise ValueError(f"rope.dynamic: got a rotary width of {dim}, expected at least 4")
        longest = length.clamp_min(dynamic.original_length)
        raised = dynamic.factor * longest / dynamic.original_length - (dynamic.factor - 1)
        return 1.0 / (config.base * raised ** (dim / (dim - 2))) ** exponents
    frequencies = 1.0 / config.base**exponents
    if config.linear is not None:
        return frequencies / config.linear.factor
    if (llama3 := config.llama3) is not None:
        turns = llama3.original_length * frequencies / (2 * math.pi)
        ramp = (turns - llama3.low_turns) / (llama3.high_turns - llama3.low_turns)
        ramp = ramp.clamp(0, 1)
        return frequencies * (1 - ramp) / llama3.factor + frequencies * ramp
    if (longrope := config.longrope) is not None:
        if len(longrope.short) != dim // 2:
            raise ValueError(
                f"rope.longrope: got {len(longrope.short)} factors, "
                f"expected one for each of the {dim // 2} pairs"
            )
        short, long = (exponents.new_tensor(factors) for factors in (longrope.short, longrope.long))
        if length is not None:
            short = torch.where(length > longrope.original_length, long, short)
        return frequencies / short
    if config.yarn is None:
        return frequencies
    low, high = _ramp_ends(config.yarn, config.base, dim)
    ramp = torch.arange(dim // 2, dtype=torch.float32, device=frequencies.device)
    ramp = ((ramp - low) / (high - low)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / config.yarn.factor * ramp


def rope_tables(
    config: RopeConfig,
    dim: int,
    positions: Int[Tensor, "B T"],
    length: Int[Tensor, ""] | None = None,
) -> tuple[Float[Tensor, "B T F"], Float[Tensor, "B T F"]]:
    """Computes cos and sin of position * frequency in float32.

    Both are multiplied by `rope_factor`. `length` is one more than the longest position that counts
    for dynamic and LongRoPE; None: of all positions.
    """
    if config.varies and length is None and positions.numel():
        length = positions.max() + 1
    frequencies = rope_frequencies(config, dim, length).to(positions.device)
    angles = positions.unsqueeze(-1).float() * frequencies
    if (factor := rope_factor(config)) == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * factor, angles.sin() * factor


def rope_factor(config: RopeConfig) -> float:
    """Returns the factor that cos and sin are multiplied by: YaRN's, LongRoPE's, or 1.

    It is mscale(s, mscale) / mscale(s, mscale_all_dim) with YaRN, the attention factor with
    LongRoPE, and else 1.
    """
    if (yarn := config.yarn) is not None:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    if (longrope := config.longrope) is not None:
        stretched = 1 + math.log(longrope.factor) / math.log(longrope.original_length)
        return longrope.attention_factor or math.sqrt(stretched)
    return 1.0


def rotate(
    x: Float[Tensor, "B T *H P"],
    cos: Float[Tensor, "B T F"],
    sin: Float[Tensor, "B T F"],
    interleaved: bool,
) -> Float[Tensor, "B T *H P"]:
    """Maps each pair (a, b) of the last axis to (a cos - b sin, a sin + b cos), P = 2 F.

    Heads may lie between T and P.
    """
    shape = (*cos.shape[:2], *(1,) * (x.dim() - 3), cos.shape[-1])
    cos = cos.view(shape)
    sin = sin.view(shape)
    # The gradient of a single vector may start at an odd storage offset.
    alone = x.requires_grad and x.numel() == x.shape[-1]
    # Interleaved pairs are rotated as complex numbers, which must start at an even storage offset.
    if interleaved and cos.dtype == x.dtype and not (alone or torch.compiler.is_compiling()):
        x = x.contiguous()
        x = x.clone() if x.storage_offset() % 2 else x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    return (
        torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    ).to(x.dtype)


def softmax_factor(config: RopeConfig) -> float:
    """Returns the factor that YaRN multiplies the softmax scale by; 1 without YaRN.

    It is mscale(s, mscale_all_dim)^2 (1.8739 for DeepSeek-V3), or 1 without YaRN.
    """
    return (
        1.0 if config.yarn is None else _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    )
