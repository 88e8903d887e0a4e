"""Converts rows to records of bytes, in the formats that a table stores, and back.

    float32     4 W bytes
    bfloat16    2 W bytes
    fp8         W e4m3 values, then W / 32 scales         264 bytes for W = 256

An fp8 row is cut into blocks of 32 values v that share a power of two s:

    s = 2^e, the smallest with max |v| / s <= 448    kept as one byte e + 127 (E8M0)
    q = e4m3(v / s), to nearest, ties to even    kept as one byte: sign 1, exponent 4, mantissa 3
    v ~ q s          off by at most |v| / 16, or s / 1024 where |v| is below s / 64

Formats: OCP Microscaling Formats (MX) 1.0 (E8M0, blocks of 32), FP8 Formats for Deep Learning,
arXiv:2209.05433 (e4m3).
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from rorqual.kernels import kernel

BLOCK = 32  # values that share a scale
FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, FP8)
_BIAS = 127  # added to an exponent in its byte; a byte of 255 is no number
_MIN_EXPONENT = -126  # smallest exponent of a stored scale: a normal float32
_LIMIT = 248 * 2.0**120  # values from here on round to 2^128, which float32 does not have
_DECODED_TOGETHER = 1 << 16  # values, whose intermediate results stay in a core's cache


def record_bytes(width: int) -> int:
    """Returns the bytes of an fp8 row of `width` values.

    ValueError unless the width is a multiple of 32.
    """
    if width < 1 or width % BLOCK:
        padded = max(1, -(-width // BLOCK)) * BLOCK
        raise ValueError(
            f"fp8: got rows of width {width}, expected a multiple of {BLOCK}:"
            f" pad them with zeros to {padded}, or keep them in bfloat16"
        )
    return width + width // BLOCK


def width_of(record: int) -> int:
    """Returns the width of rows whose fp8 records have this many bytes.

    ValueError if there is none.
    """
    if record < 1 or record % (BLOCK + 1):
        raise ValueError(
            f"fp8: got records of {record} bytes, expected a multiple of {BLOCK + 1}:"
            " 32 values, one scale"
        )
    return record * BLOCK // (BLOCK + 1)


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Returns the bytes that a row of this width and dtype takes in a file.

    ValueError for a dtype that no table has, or a width that fp8 cannot store.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"table: got {dtype} rows, expected {names}")
    return record_bytes(width) if dtype == FP8 else width * dtype.itemsize


def stored_as(values: Tensor) -> tuple[int, torch.dtype]:
    """Returns width and dtype of stored rows: a matrix of numbers, or of fp8 records in bytes."""
    if values.dtype == torch.uint8:
        return width_of(values.shape[1]), FP8
    return values.shape[1], values.dtype


def convert_rows(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts stored rows to another format: numbers, or fp8 records in bytes."""
    width, stored = stored_as(values)
    if stored == dtype:
        return values
    numbers = dequantise(values, width) if stored == FP8 else values
    return quantise(numbers) if dtype == FP8 else numbers.to(dtype)


def quantise(values: Float[Tensor, "rows W"]) -> UInt8[Tensor, "rows record"]:
    """Converts rows to fp8 records of W e4m3 bytes and W / 32 scale bytes.

    A block of zeros has scale 1. ValueError for a width that is no multiple of 32, and for nan,
    infinity and what rounds to it.
    """
    rows, width = values.shape
    records = torch.empty(rows, record_bytes(width), dtype=torch.uint8, device=values.device)
    blocks = values.detach().float().reshape(rows, width // BLOCK, BLOCK)
    largest = blocks.abs().amax(-1)
    finite = largest < _LIMIT
    if not finite.all():
        row = int((~finite).any(-1).nonzero()[0])
        raise ValueError(
            f"fp8: got a value in row {row} that is nan, infinite or beyond {_LIMIT:.4g}:"
            " mend it first"
        )
    # largest = fraction * 2^exponent, fraction in [1/2, 1)
    fraction, exponent = torch.frexp(largest)
    exponent = torch.where(fraction > 448 / 512, exponent - 8, exponent - 9)
    exponent = exponent.clamp(min=_MIN_EXPONENT)
    exponent = torch.where(largest == 0, 0, exponent)
    # 2^-e by its bits: no rounding, on any device
    inverse = (_BIAS - exponent << 23).view(torch.float32)
    records[:, :width] = (blocks * inverse[..., None]).view(rows, width).to(FP8).view(torch.uint8)
    records[:, width:] = (exponent + _BIAS).to(torch.uint8)
    return records


def _scales(codes: Tensor) -> Tensor:
    """Builds 2^(code - 127) from its bits, since torch.compile does not support E8M0.

    Code 0 is subnormal.
    """
    normal = (codes.int() << 23).view(torch.float32)
    return normal.masked_fill(codes == 0, 2.0**-127).masked_fill(codes == 255, torch.nan)


def dequantise(
    records: UInt8[Tensor, "*B record"], width: int, *, out: Float[Tensor, "*B W"] | None = None
) -> Float[Tensor, "*B W"]:
    """Converts fp8 records to float32 rows, written to `out` if it is given.

    A scale byte of 255, and e4m3's nan, are nan. ValueError for records of another width.
    """
    if records.shape[-1] != record_bytes(width):
        raise ValueError(
            f"fp8: got records of {records.shape[-1]} bytes, expected {record_bytes(width)}"
            f" for rows of width {width}"
        )
    if out is None:
        out = torch.empty(*records.shape[:-1], width, device=records.device)
    codes = torch.arange(256, dtype=torch.uint8, device=records.device)
    numbers = codes.view(FP8).float()
    scales = _scales(codes)
    step = max(1, _DECODED_TOGETHER // width)
    parts = records.reshape(-1, records.shape[-1]).split(step)
    for piece, target in zip(parts, out.view(-1, width).split(step), strict=True):
        torch.index_select(numbers, 0, piece[:, :width].flatten().int(), out=target.view(-1))
        scale = scales.index_select(0, piece[:, width:].flatten().int())
        target.view(-1, BLOCK).mul_(scale[:, None])
    return out


@kernel(triton="rorqual.kernels.triton_rows:lookup")
def lookup(
    records: UInt8[Tensor, "rows record"], ids: Int[Tensor, "*B"], width: int
) -> Float[Tensor, "*B W"]:
    """Returns float32 rows of these ids, from the records of a whole table."""
    return dequantise(records[ids], width)
