"""Decodes and encodes the quantised tensors of published checkpoints.

    e4m3         one byte a number, sign 1, exponent 4, mantissa 3
    e2m1         two numbers a byte: the even column is in its low half
    scale        one number a block of rows and columns: float32, or e8m0, one byte e, 2^(e - 127)

    weight = numbers * scale of their block                      in float32

| checkpoint   | tensors                     | numbers | block     | scale   | its name           |
|--------------|-----------------------------|---------|-----------|---------|--------------------|
| V3, R1, V3.2 | projections, experts        | e4m3    | 128 x 128 | float32 | x.weight_scale_inv |
| V4           | projections, shared experts | e4m3    | 128 x 128 | e8m0    | x.scale            |
| V4.1         | and Engram's projection     | e4m3    | 32 x 32   | e8m0    | x.scale            |
| V4, V4.1     | routed experts              | e2m1    | 1 x 32    | e8m0    | x.scale            |
| V4.1         | Engram's rows               | e4m3    | 1 x 32    | e8m0    | x.scale            |

e4m3: arXiv:2209.05433. e2m1 and e8m0: OCP Microscaling Formats (MX) 1.0.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from rorqual.layers.cache_formats import (
    E2M1_LARGEST,
    E4M3_LARGEST,
    LEVELS,
    e2m1_codes,
    power_of_two_above,
)

Block = tuple[int, int]  # rows and columns that share a scale

ROWS = (1, 32)  # the block of mxfp4 experts and of Engram's rows
DECODED_TOGETHER = 1 << 22  # numbers that are decoded at a time
E4M3 = "F8_E4M3"  # dtypes as safetensors names them
PACKED = ("I8", "U8")  # two e2m1 numbers a byte
QUANTISED = (E4M3, *PACKED)
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_SMALLEST_EXPONENT = 2.0**-126  # scales are normal float32 numbers


def is_packed(weight: Tensor) -> bool:
    """Returns whether each byte holds two e2m1 numbers."""
    return weight.dtype in (torch.int8, torch.uint8)


def decoded_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """Returns the shape of a stored tensor's numbers; `dtype` as safetensors names it."""
    return (*shape[:-1], 2 * shape[-1]) if dtype in PACKED else shape


def scale_shape(shape: tuple[int, ...], block: Block | None) -> tuple[int, ...]:
    """Returns the shape of the scales of a matrix; a tensor without blocks has one scale."""
    if block is None:
        return (1, 1)
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=False))


def scale_numbers(scale: Shaped[Tensor, "r c"]) -> Float[Tensor, "r c"]:
    """Returns scales as float32; bytes are e8m0, 2^(byte - 127)."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


def _numbers(weight: Tensor) -> Tensor:
    """Returns the numbers of stored rows in float32, without their scales."""
    if not is_packed(weight):
        return weight.to(torch.float32)
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)], device=weight.device)
    codes = weight.contiguous().view(torch.uint8).int()
    return torch.stack([levels[codes & 15], levels[codes >> 4]], dim=-1).flatten(-2)


def decode(
    weight: Shaped[Tensor, "R C"], scale: Shaped[Tensor, "..."], block: Block | None
) -> Float[Tensor, "R C2"]:
    """Decodes e4m3 or packed e2m1 numbers and multiplies them by their block's scale, in float32.

    The last block of an axis may be incomplete. block None: one scale for all. ValueError for
    scales of another shape.
    """
    rows = weight.shape[0]
    columns = weight.shape[1] * (2 if is_packed(weight) else 1)
    block = block or (rows, columns)
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    expected = scale_shape((rows, columns), block)
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"scales: got {tuple(scale.shape)} for {rows} rows of {columns} in blocks of "
            f"{block[0]} x {block[1]}, expected {expected}"
        )
    out = torch.empty(rows, columns, dtype=torch.float32, device=weight.device)
    step = max(1, DECODED_TOGETHER // max(1, columns) // block[0]) * block[0]
    for first in range(0, rows, step):
        target = out[first : first + step]
        scales = scale_numbers(scale[first // block[0] : -(-(first + len(target)) // block[0])])
        spread_scales = scales.repeat_interleave(block[0], 0)[: len(target)]
        spread_scales = spread_scales.repeat_interleave(block[1], 1)[:, :columns]
        torch.mul(_numbers(weight[first : first + step]), spread_scales, out=target)
    return out


def _largest(values: Float[Tensor, "R C"], block: Block) -> Float[Tensor, "r c"]:
    """Returns the largest magnitude of each block of a matrix, as a matrix of blocks."""
    padded = torch.nn.functional.pad(
        values.abs(), (0, -values.shape[1] % block[1], 0, -values.shape[0] % block[0])
    )
    return padded.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).amax((1, 3))


def _spread(scale: Float[Tensor, "r c"], shape: torch.Size, block: Block) -> Float[Tensor, "R C"]:
    """Repeats each block's scale for all of its numbers, [R, C]."""
    spread_scales = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return spread_scales.repeat_interleave(block[1], 1)[:, : shape[1]]


def encode_e4m3(
    values: Float[Tensor, "R C"], block: Block, *, power_of_two: bool
) -> tuple[Shaped[Tensor, "R C"], Shaped[Tensor, "r c"]]:
    """Encodes a matrix as e4m3 numbers and the scales of its blocks, e8m0 or float32.

    A scale is the block's largest magnitude / 448, rounded up if it is to be a power of two; that
    of a block of zeros is 1.
    """
    values = values.detach().float()
    largest = _largest(values, block)
    scale = torch.where(largest > 0, largest / E4M3_LARGEST, 1.0).clamp_min(_SMALLEST_EXPONENT)
    if power_of_two:
        scale = power_of_two_above(scale)
    scaled = (values / _spread(scale, values.shape, block)).clamp(-E4M3_LARGEST, E4M3_LARGEST)
    stored = scale.to(torch.float8_e8m0fnu) if power_of_two else scale
    return scaled.to(torch.float8_e4m3fn), stored


def encode_e2m1(
    values: Float[Tensor, "R C"],
) -> tuple[Shaped[Tensor, "R C/2"], Shaped[Tensor, "R C/32"]]:
    """Encodes a matrix as packed e2m1 numbers, two an int8, and e8m0 scales of 32 columns.

    ValueError for a width that is no multiple of 32.
    """
    if values.shape[1] % ROWS[1]:
        raise ValueError(
            f"mxfp4: got rows of width {values.shape[1]}, expected a multiple of {ROWS[1]}"
        )
    values = values.detach().float()
    largest = _largest(values, ROWS).clamp_min(E2M1_LARGEST * _SMALLEST_EXPONENT)
    scale = power_of_two_above(largest * (1 / E2M1_LARGEST))
    scaled = (values / _spread(scale, values.shape, ROWS)).clamp(-E2M1_LARGEST, E2M1_LARGEST)
    codes = (e2m1_codes(scaled) | (torch.signbit(scaled).long() << 3)).to(torch.uint8)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed.view(torch.int8), scale.to(torch.float8_e8m0fnu)
