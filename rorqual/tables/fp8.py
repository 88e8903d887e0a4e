"""Rows of numbers -> records of bytes, and back: how a table keeps its rows, the same in every home.

    float32     4 W bytes
    bfloat16    2 W bytes
    fp8         W e4m3 values, then W / 32 scales         264 bytes for W = 256

An fp8 row is cut into blocks of 32 values v that share a power of two s:

    s = 2^e, the smallest with max |v| / s <= 448          kept as one byte e + 127 (E8M0)
    q = e4m3(v / s), to nearest, ties to even              kept as one byte, sign 1, exponent 4, mantissa 3
    v ~ q s                                                off by at most |v| / 16, or s / 1024 below s / 64

Formats: OCP Microscaling Formats (MX) 1.0 (E8M0, blocks of 32), FP8 Formats for Deep Learning, arXiv:2209.05433 (e4m3).
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

BLOCK = 32  # values that share a scale
FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, FP8)  # what a table may be kept in
_BIAS = 127  # a scale's byte is its exponent and this; 255 is no number
_LEAST = -126  # the smallest exponent written: a normal float32, where the format would go one further
_LIMIT = 248 * 2.0**120  # would round to 2^128, which float32 does not hold
_AT_ONCE = 1 << 16  # values decoded together: what lies between stays in a core's cache


def record_bytes(width: int) -> int:
    """Bytes of an fp8 row of `width` values. ValueError unless the width is a multiple of 32."""
    if width < 1 or width % BLOCK:
        fitting = max(1, -(-width // BLOCK)) * BLOCK
        raise ValueError(
            f"fp8: got rows of width {width}, expected a multiple of {BLOCK}: pad them with zeros to {fitting},"
            " or keep them in bfloat16"
        )
    return width + width // BLOCK


def width_of(record: int) -> int:
    """The width whose fp8 record has so many bytes. ValueError where there is none."""
    width = record * BLOCK // (BLOCK + 1)
    if record < 1 or record % (BLOCK + 1):
        raise ValueError(
            f"fp8: got records of {record} bytes, expected a multiple of {BLOCK + 1}: 32 values, one scale"
        )
    return width


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes of a row as it is kept. ValueError for a dtype that no table has, or fp8 without whole blocks."""
    if dtype not in DTYPES:
        raise ValueError(f"table: got {dtype} rows, expected {', '.join(str(known) for known in DTYPES)}")
    return record_bytes(width) if dtype == FP8 else width * dtype.itemsize


def kept_as(values: Tensor) -> tuple[int, torch.dtype]:
    """Width and dtype of rows as they are kept: a matrix of numbers, or of fp8 records in bytes."""
    return (width_of(values.shape[1]), FP8) if values.dtype == torch.uint8 else (values.shape[1], values.dtype)


def quantise(values: Float[Tensor, "rows W"]) -> UInt8[Tensor, "rows record"]:
    """Records of W e4m3 bytes and W / 32 scale bytes; an all-zero block has scale 1.

    ValueError for a width that is no multiple of 32, and for nan, infinity and what would round to it.
    """
    rows, width = values.shape
    records = torch.empty(rows, record_bytes(width), dtype=torch.uint8, device=values.device)
    blocks = values.detach().float().reshape(rows, width // BLOCK, BLOCK)
    largest = blocks.abs().amax(-1)
    if not (sound := largest < _LIMIT).all():
        row = int((~sound).any(-1).nonzero()[0])
        raise ValueError(f"fp8: got a value in row {row} that is nan, infinite or beyond {_LIMIT:.4g}: mend it first")
    fraction, exponent = torch.frexp(largest)  # largest = fraction * 2^exponent, fraction in [1/2, 1)
    exponent = torch.where(fraction > 448 / 512, exponent - 8, exponent - 9).clamp(min=_LEAST)
    exponent = torch.where(largest == 0, 0, exponent)
    inverse = (_BIAS - exponent << 23).view(torch.float32)  # 2^-e by its bits: no rounding, on any device
    records[:, :width] = (blocks * inverse[..., None]).view(rows, width).to(FP8).view(torch.uint8)
    records[:, width:] = (exponent + _BIAS).to(torch.uint8)
    return records


def _scales(codes: Tensor) -> Tensor:
    """2^(code - 127) by their bits, since torch.compile does not know E8M0; the first is subnormal, the last nan."""
    normal = (codes.int() << 23).view(torch.float32)
    return normal.masked_fill(codes == 0, 2.0**-127).masked_fill(codes == 255, torch.nan)


def dequantise(
    records: UInt8[Tensor, "*B record"], width: int, *, out: Float[Tensor, "*B W"] | None = None
) -> Float[Tensor, "*B W"]:
    """float32 rows from their records, into `out` if given. A scale byte of 255, and e4m3's nan, are nan.

    ValueError where the records are not those of rows of this width.
    """
    if records.shape[-1] != record_bytes(width):
        raise ValueError(
            f"fp8: got records of {records.shape[-1]} bytes, expected {record_bytes(width)} for rows of width {width}"
        )
    if out is None:
        out = torch.empty(*records.shape[:-1], width, device=records.device)
    codes = torch.arange(256, dtype=torch.uint8, device=records.device)
    numbers, scales = codes.view(FP8).float(), _scales(codes)
    step = max(1, _AT_ONCE // width)
    parts = zip(records.reshape(-1, records.shape[-1]).split(step), out.view(-1, width).split(step), strict=True)
    for part, target in parts:
        torch.index_select(numbers, 0, part[:, :width].flatten().int(), out=target.view(-1))
        scale = scales.index_select(0, part[:, width:].flatten().int())
        target.view(-1, BLOCK).mul_(scale[:, None])
    return out


def recall(records: UInt8[Tensor, "rows record"], ids: Int[Tensor, "*B"], width: int) -> Float[Tensor, "*B W"]:
    """float32 rows of these ids, from the records of a whole table."""
    return dequantise(records[ids], width)
