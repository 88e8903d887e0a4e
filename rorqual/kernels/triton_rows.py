"""Decodes rows of an fp8 table to float32: the Triton kernel of tables.fp8.lookup.

Tables in float32 and bfloat16 need no kernel: torch.embedding already reads and writes each row
once. An fp8 row would be copied, looked up value by value and scaled, in three passes; here its
bytes become numbers in registers. They are decoded by hand, since only newer devices have a type
for e4m3:

    value = (1 + mantissa / 8) 2^(exponent - 7), or mantissa / 512 where the exponent is 0;
            127 and 255 are nan
    scale = 2^(byte - 127); 255 is nan
"""

import inspect

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

VALUES = 1024  # values a program
_SHARE = tl.constexpr(32)  # values that share a scale


@triton.jit
@inspect.unwrap  # tests wrap every function to check its shapes
def _e4m3(byte):
    """Decodes bytes of e4m3 to float32."""
    exponent = (byte >> 3) & 15
    mantissa = byte & 7
    large = (((exponent + 120) << 23) | (mantissa << 20)).to(tl.float32, bitcast=True)
    size = tl.where(exponent == 0, mantissa.to(tl.float32) / 512, large)
    size = tl.where((byte & 127) == 127, float("nan"), size)
    return tl.where(byte > 127, -size, size)


@triton.jit
@inspect.unwrap
def _lookup(records, ids, out, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Writes BLOCK values of the rows `ids`, each multiplied by its scale."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    column = offset % WIDTH
    record = records + tl.load(ids + offset // WIDTH, mask=inside, other=0).to(tl.int64) * (
        WIDTH + WIDTH // _SHARE
    )
    value = _e4m3(tl.load(record + column, mask=inside, other=0).to(tl.int32))
    power = tl.load(record + WIDTH + column // _SHARE, mask=inside, other=0).to(tl.int32)
    bits = tl.where(power == 0, 1 << 22, tl.where(power == 255, 0x7FC00000, power << 23))
    tl.store(out + offset, value * bits.to(tl.float32, bitcast=True), mask=inside)


def lookup(
    records: UInt8[Tensor, "rows record"], ids: Int[Tensor, "*B"], width: int
) -> Float[Tensor, "*B W"]:
    """Computes tables.fp8.lookup, bit for bit."""
    out = torch.empty(*ids.shape, width, dtype=torch.float32, device=records.device)
    if out.numel():
        with torch.cuda.device_of(records):
            grid = (triton.cdiv(out.numel(), VALUES),)
            _lookup[grid](
                records.contiguous(), ids.contiguous(), out, out.numel(), WIDTH=width, BLOCK=VALUES
            )
    return out
