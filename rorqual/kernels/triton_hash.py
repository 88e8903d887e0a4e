"""Computes the table rows that a window of ids addresses: the kernel of layers.addresses.hash_rows.

A Triton program computes all orders and heads of a block of tokens of one layer, in exact 64-bit
integers. An invalid id sets a flag, which is read without waiting for the device.
"""

import inspect
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

_TOKENS = 64  # tokens a program


@triton.jit
@inspect.unwrap  # tests wrap every function to check its shapes
def _canonical_ids(ids, offset, canonical, size, inside, strange):
    """Returns canonical ids, and sets `strange` where an id has none."""
    raw = tl.load(ids + offset, mask=inside, other=0).to(tl.int64)
    valid = (raw >= 0) & (raw < size)
    canonical_ids = tl.load(canonical + raw, mask=inside & valid, other=-1).to(tl.int64)
    tl.store(strange + tl.zeros_like(offset), 1, mask=inside & (canonical_ids < 0))
    return canonical_ids


@triton.jit
@inspect.unwrap
def _hash(
    ids, reach, canonical, multipliers, primes, offsets, out, strange, tokens, time, size, pad,
    ORDERS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the rows of BLOCK tokens in one layer, of all orders and heads."""
    layer = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    current = token // time * (time + ORDERS) + token % time + ORDERS  # in the window
    head = tl.arange(0, HEAD_BLOCK)
    inside_heads = head < HEADS
    multiplier = multipliers + layer * (ORDERS + 1)
    mix = _canonical_ids(ids, current, canonical, size, inside, strange) * tl.load(multiplier)
    for order in range(ORDERS):
        earlier = _canonical_ids(ids, current - order - 1, canonical, size, inside, strange)
        if reach is not None:
            allowed = tl.load(reach + token, mask=inside, other=0) > order
            earlier = tl.where(allowed, earlier, pad)
        mix = mix ^ (earlier * tl.load(multiplier + order + 1))
        column = (layer * ORDERS + order) * HEADS + head
        prime = tl.load(primes + column, mask=inside_heads, other=1)
        row = (
            mix[:, None] % prime[None, :]
            + tl.load(offsets + column, mask=inside_heads, other=0)[None, :]
        )
        offset = ((layer * tokens + token) * ORDERS + order)[:, None] * HEADS + head[None, :]
        tl.store(out + offset, row, mask=inside[:, None] & inside_heads[None, :])


def hash_rows(
    ids: Int[Tensor, "B W"],
    reach: Int[Tensor, "B T"] | None,
    canonical_map: Int[Tensor, " V"],
    multipliers: Int[Tensor, "Lm N"],
    primes: Int[Tensor, "Lm O J"],
    offsets: Int[Tensor, "Lm R"],
    pad: int,
    out: Int[Tensor, "Lm B T R"] | None = None,
    scratch: dict[str, Any] | None = None,
) -> Int[Tensor, "Lm B T R"]:
    """Computes layers.addresses.hash_rows, bit for bit."""
    layers, orders, heads = primes.shape
    batch = ids.shape[0]
    time = ids.shape[1] - orders
    if out is None:
        out = torch.empty(layers, batch, time, orders * heads, dtype=torch.int64, device=ids.device)
    if not out.numel():
        return out
    strange = torch.zeros(1, dtype=torch.int32, device=ids.device)
    tensors = (ids, reach, canonical_map, multipliers, primes, offsets)
    with torch.cuda.device_of(ids):
        _hash[(triton.cdiv(batch * time, _TOKENS), layers)](
            *(x if x is None else x.contiguous() for x in tensors), out, strange,
            batch * time, time, len(canonical_map), pad,
            ORDERS=orders, HEADS=heads, BLOCK=_TOKENS, HEAD_BLOCK=triton.next_power_of_2(heads),
        )  # fmt: skip
    if ids.device.type != "cpu":
        # This check does not wait for the device.
        torch._assert_async(strange == 0, "Engram: an id has no canonical id")
    elif strange:
        raise IndexError("an id has no canonical id")
    return out
