"""Attends with one selection of blocks for each tile of 128 queries.

    tile of t   = positions[t] // 128, positions counted from the start of the document
    blocks of t = those selected by the first query of its tile, and those that the tile has begun
                  since, up to t's own

This is ours, in no paper. One query selects for a tile, so that the keys of a tile are gathered
once and multiplied as matrices. It is the first one, because a mean over the tile would let later
tokens influence earlier queries: no selection depends on the future, and decoding gives the same
result as one call. The selection itself is in layers/sparse.py.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from rorqual.model_config import Choice as Choice

TILE = 128  # queries


def loop_tiles(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    tiles: Int[Tensor, "B N J K"],
    past: int,
    block: int,
    scale: float,
) -> Float[Tensor, "B T H Q"]:
    """Attends one tile at a time to its gathered selected blocks and its own keys.

    For sequences of one length without documents. In `tiles`, the own block of each tile's first
    query comes first and, while fewer than K exist, -1 last. The blocks between lie before the
    tile, so that every query of the tile sees all of them.
    """
    (batch, length, groups), choices, out = key.shape[:3], tiles.shape[2], []
    far = [_by_block(x, block) for x in (key, value)]  # [B G M, block, P or Q]
    row = torch.arange(batch, device=key.device)[:, None] * groups
    row = (row + torch.arange(choices, device=key.device) * groups // choices)[..., None] * (
        length // block
    )
    for n, start in enumerate(range(past // TILE * TILE, length, TILE)):
        first = max(start, past)
        end = min(start + TILE, length)
        first_block = start // block
        block_index = (row + tiles[:, n, :, 1 : first_block + 1]).flatten()
        selected = [
            x.index_select(0, block_index).view(batch, choices, -1, x.shape[-1]) for x in far
        ]
        own_block = [x[:, first_block * block : end].transpose(1, 2) for x in (key, value)]
        own_block = [x.repeat_interleave(choices // groups, dim=1) for x in own_block]
        keys, values = (torch.cat(both, dim=2) for both in zip(selected, own_block, strict=True))
        mask = torch.ones(end - first, keys.shape[2], dtype=torch.bool, device=key.device)
        mask = mask.tril(keys.shape[2] - (end - first))
        own_query = query[:, first - past : end - past].transpose(1, 2)
        grouped = own_query.shape[1] != choices
        out.append(
            F.scaled_dot_product_attention(
                own_query, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped
            )
        )
    return torch.cat(out, dim=2).transpose(1, 2)


def _by_block(x: Float[Tensor, "B L G P"], block: int) -> Float[Tensor, "BGM block P"]:
    """Returns the complete blocks, with those of a sequence and group side by side."""
    count = x.shape[1] // block
    whole = x[:, : count * block].unflatten(1, (count, block)).permute(0, 3, 1, 2, 4)
    return whole.reshape(-1, block, x.shape[-1])


def flex_tiles(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B T G P"],
    value: Float[Tensor, "B T G Q"],
    tiles: Int[Tensor, "B N J K"],
    block: int,
    scale: float,
) -> Float[Tensor, "B T H Q"]:
    """Computes loop_tiles with compiled FlexAttention, for past = 0. Its backward needs a GPU."""
    mask = block_mask(tiles, query.shape[1], query.shape[2], block)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = _compiled()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def block_mask(tiles: Int[Tensor, "B N J K"], time: int, heads: int, block: int) -> flex.BlockMask:
    """Builds FlexAttention's mask: selected blocks in full, the tile's own up to each query.

    The selected blocks are those before the tile.
    """
    batch, count, choices, _ = tiles.shape
    width = -(-time // block)
    start = torch.arange(count, device=tiles.device) * TILE
    first_block = start // block
    last = ((start + TILE).clamp_max(time) - 1) // block
    order = torch.arange(width, device=tiles.device)
    own_block = (first_block[:, None] + order).clamp_max(width - 1).expand(batch, heads, -1, -1)
    far = tiles[..., 1:].transpose(1, 2).repeat_interleave(heads // choices, dim=1)
    far_count = (far >= 0).sum(-1)
    far = F.pad(far.clamp_min(0), (0, max(0, width - far.shape[-1])))[..., :width]
    return flex.BlockMask.from_kv_blocks(
        (last - first_block + 1).expand(batch, heads, -1).int().contiguous(),
        own_block.int().contiguous(),
        far_count.int().contiguous(),
        far.int().contiguous(),
        BLOCK_SIZE=(TILE, block),
        mask_mod=_causal,
        seq_lengths=(time, time),
    )


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Says which keys FlexAttention shows to a query: those up to its own column."""
    return key <= query


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Returns FlexAttention, which torch compiles once a process, at its first call."""
    return torch.compile(flex.flex_attention)
