"""Attends with one selection of blocks for each tile of 128 queries.

    tile of t   = positions[t] // 128, positions counted from the start of the document
    blocks of t = those selected by the first query of its tile, and those that the tile has begun
                  since, up to t's own

This is ours, in no paper. One query selects for a tile, so that the keys of a tile are gathered
once and multiplied as matrices. It is the first one, because a mean over the tile would let later
tokens influence earlier queries: no selection depends on the future, and decoding gives the same
result as one call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from rorqual.layers.cache import Recent
from rorqual.layers.context import Context
from rorqual.layers.selection import attend_chosen, runs
from rorqual.model_config import Choice as Choice

TILE = 128  # queries


def attend_tiles(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    choose: Callable[[Tensor], Tensor],
    ctx: Context,
    segment: Int[Tensor, "B L"] | None,
    block: int,
    scale: float,
    cache: Recent | None = None,
    lead: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T H Q"]:
    """Attends from each query to the blocks selected for its tile.

    `choose` maps columns [N] of the call's queries to the blocks [B, N, J, K] that these select,
    own first. `segment` is segments(ctx, block) if there are documents or padding, else None;
    `cache` keeps the selection of the incomplete tile for the next call; `lead` is from
    selection.straight.
    """
    if segment is None and lead is None and query.shape[1] >= TILE:
        return _whole_tiles(
            query, key, value, tile_choices(choose, ctx, None, cache), ctx.past, block, scale
        )
    index = token_choices(choose, ctx, segment, block, cache, lead)
    parts = [
        attend_chosen(
            query[:, run], key, value, index[:, run], ctx, run, segment, block, scale, lead
        )
        for run in runs(query.shape[1])
    ]
    return torch.cat(parts, dim=1)


def token_choices(
    choose: Callable[[Tensor], Tensor],
    ctx: Context,
    segment: Int[Tensor, "B L"] | None,
    block: int,
    cache: Recent | None,
    lead: Int[Tensor, " B"] | None = None,
) -> Int[Tensor, "B T J E"]:
    """Returns the blocks of each token: its tile's selection and the blocks begun since.

    The index is -1 where there are fewer.
    """
    index = tile_choices(choose, ctx, segment, cache, lead)
    if segment is None and lead is None:
        index = _to_tokens(index, ctx)
    own = segment[:, ctx.past :] if segment is not None else ctx.positions // block
    return torch.cat([index, _begun(ctx.positions, own, block, index.shape[2])], dim=-1)


def tile_choices(
    choose: Callable[[Tensor], Tensor],
    ctx: Context,
    segment: Int[Tensor, "B L"] | None,
    cache: Recent | None,
    lead: Int[Tensor, " B"] | None = None,
) -> Int[Tensor, "B N J K"]:
    """Returns the selection of every tile that the call touches and caches it for the next call.

    With documents or padding it is returned for every token instead, the selection of its tile.
    """
    plain = segment is None and lead is None
    return _choices(choose, ctx, cache) if plain else _choices_of_rows(choose, ctx, cache)


def _choices(
    choose: Callable[[Tensor], Tensor], ctx: Context, cache: Recent | None
) -> Int[Tensor, "B N J K"]:
    """Returns the selections of all tiles of the call.

    A tile starts at the same column in all sequences here.
    """
    time, begin = ctx.positions.shape[1], -ctx.past % TILE
    found = []
    if begin:
        assert cache is not None
        found.append(_held(cache))
    if begin < time:
        found.append(choose(torch.arange(begin, time, TILE, device=ctx.positions.device)))
    tiles = torch.cat(found, dim=1)
    if cache is not None:
        cache.extend(_to_tokens(tiles, ctx).int())
    return tiles


def _choices_of_rows(
    choose: Callable[[Tensor], Tensor], ctx: Context, cache: Recent | None
) -> Int[Tensor, "B T J K"]:
    """Returns each token's selection when documents or padding let tiles start at any column.

    Padding before the first tile uses its own selection.
    """
    columns = torch.arange(ctx.positions.shape[1], device=ctx.positions.device)
    starts = ctx.positions % TILE == 0
    if ctx.present is not None:
        starts = starts & ctx.present
    # No tile starts in this call: every token uses the cached selection.
    if cache is not None and cache.length and not starts.any():
        index = _held(cache).expand(-1, len(columns), -1, -1)
        cache.extend(index.int())
        return index
    index = torch.cat([choose(columns[run]) for run in runs(len(columns))], dim=1)
    lead = columns.where(starts, -1).cummax(1).values[:, :, None, None]
    before = _held(cache) if cache is not None and cache.length else index
    index = index.gather(1, lead.clamp_min(0).expand_as(index)).where(lead >= 0, before)
    if cache is not None:
        cache.extend(index.int())
    return index


def _held(cache: Recent) -> Int[Tensor, "B 1 J K"]:
    """Returns the cached selection of the last token's tile."""
    assert cache.buffer is not None
    return cache.buffer[:, cache.end - 1 : cache.end].long()


def _to_tokens(tiles: Tensor, ctx: Context) -> Int[Tensor, "B T J K"]:
    columns = ctx.past + torch.arange(ctx.positions.shape[1], device=tiles.device)
    return tiles.index_select(1, columns // TILE - ctx.past // TILE)


def _begun(positions: Tensor, own: Tensor, block: int, choices: int) -> Int[Tensor, "B T J E"]:
    """Returns the blocks that a token's tile has begun since its first query.

    The index is -1 where it has begun fewer than it may.
    """
    aligned = block % TILE == 0 or TILE % block == 0
    back = torch.arange(
        (TILE - 1) // block if aligned else -(-(TILE - 1) // block), device=own.device
    )
    begun = positions // block - positions // TILE * TILE // block
    blocks = (own[..., None] - back).where(back < begun[..., None], -1)
    return blocks[:, :, None].expand(-1, -1, choices, -1)


def _whole_tiles(query, key, value, tiles: Tensor, past: int, block: int, scale: float) -> Tensor:
    """Uses FlexAttention where it has a backward and fuses, that is on a GPU without a cache.

    On a CPU the loop needs no compiler and is faster.
    """
    if query.is_cuda and past == 0:
        return flex_tiles(query, key, value, tiles, block, scale)
    return loop_tiles(query, key, value, tiles, past, block, scale)


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

    For sequences without documents or padding. In `tiles`, the own block of each tile's first query
    comes first and, while fewer than K exist, -1 last. The blocks between lie before the tile, so
    that every query of the tile sees all of them.
    """
    (batch, length, groups), choices, out = key.shape[:3], tiles.shape[2], []
    far = [_by_block(x, block) for x in (key, value)]  # [B G M, block, P or Q]
    row = torch.arange(batch, device=key.device)[:, None] * groups
    row = (row + torch.arange(choices, device=key.device) * groups // choices)[..., None] * (
        length // block
    )
    for n, start in enumerate(range(past // TILE * TILE, length, TILE)):
        begin, end, own = max(start, past), min(start + TILE, length), start // block
        places = (row + tiles[:, n, :, 1 : own + 1]).flatten()
        chosen = [x.index_select(0, places).view(batch, choices, -1, x.shape[-1]) for x in far]
        near = [x[:, own * block : end].transpose(1, 2) for x in (key, value)]
        near = [x.repeat_interleave(choices // groups, dim=1) for x in near]
        keys, values = (torch.cat(both, dim=2) for both in zip(chosen, near, strict=True))
        mask = torch.ones(end - begin, keys.shape[2], dtype=torch.bool, device=key.device)
        mask = mask.tril(keys.shape[2] - (end - begin))
        own_query = query[:, begin - past : end - past].transpose(1, 2)
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
    """Builds the mask of FlexAttention.

    Selected blocks before the tile are seen in full, the tile's own blocks up to each query.
    """
    batch, count, choices, _ = tiles.shape
    width = -(-time // block)
    start = torch.arange(count, device=tiles.device) * TILE
    own, last = start // block, ((start + TILE).clamp_max(time) - 1) // block
    order = torch.arange(width, device=tiles.device)
    near = (own[:, None] + order).clamp_max(width - 1).expand(batch, heads, -1, -1)
    far = tiles[..., 1:].transpose(1, 2).repeat_interleave(heads // choices, dim=1)
    far_count = (far >= 0).sum(-1)
    far = F.pad(far.clamp_min(0), (0, max(0, width - far.shape[-1])))[..., :width]
    return flex.BlockMask.from_kv_blocks(
        (last - own + 1).expand(batch, heads, -1).int().contiguous(),
        near.int().contiguous(),
        far_count.int().contiguous(),
        far.int().contiguous(),
        BLOCK_SIZE=(TILE, block),
        mask_mod=_causal,
        seq_lengths=(time, time),
    )


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex.flex_attention)
