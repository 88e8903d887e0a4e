"""Mixture of Block Attention (MoBA): each query attends to its own block and the best earlier ones.

    score[t, i] = <q_t, mean of the keys of block i>           float32, per query head, unscaled
    chosen[t]   = own block and the best (chosen - 1) of the blocks before it in the document
    out_t       = softmax over the keys of the chosen blocks, up to t

The selection is hard: no gradient passes through scores or means. chosen >= the number of blocks is
full causal attention, chosen = 1 is block-diagonal. Blocks are counted from the start of each
document, without padding, so that a packed or padded document gives the same result as alone.

MoBA: Mixture of Block Attention, arXiv:2502.13189. `choice="tile"`, where the first of 128 queries
selects for all of them (layers/tiles.py), is ours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.layers.cache import Bundle, Recent
from rorqual.layers.context import Context
from rorqual.layers.sparse import (
    Blocks,
    Selection,
    attend_selected,
    best_blocks,
    by_tiles,
    full_attention,
    most_blocks,
    own_blocks,
    runs,
    segments,
    tile_queries,
    wide,
    windows,
)
from rorqual.model_config import MoBAConfig as MoBAConfig


def block_means(
    keys: Float[Tensor, "B L G P"], segment: Int[Tensor, "B L"], count: int
) -> Float[Tensor, "B M G P"]:
    """Averages the keys of each of a sequence's `count` blocks, in float32; 0 for an empty block.

    Only complete blocks are ever scored, so that columns beyond a sequence do not matter.
    """
    batch = keys.shape[0]
    rows = (segment + count * torch.arange(batch, device=keys.device)[:, None]).flatten()
    every = wide(keys).flatten(0, 1)
    sums = every.new_zeros(batch * count, *keys.shape[2:]).index_add_(0, rows, every)
    sizes = rows.new_zeros(batch * count).index_add_(0, rows, torch.ones_like(rows))
    return (sums / sizes.clamp_min(1)[:, None, None]).unflatten(0, (batch, count))


def choose(
    query: Float[Tensor, "B T H P"],
    means: Float[Tensor, "B M G P"],
    own: Int[Tensor, "B T"],
    first: Int[Tensor, "B T"],
    chosen: int,
) -> Int[Tensor, "B T H K"]:
    """Selects the `chosen` best blocks among first .. own for each query head.

    The index is -1 where there are fewer. The block after the last that has a mean is still
    growing; it can only be own, which needs no score.
    """
    # A rounded score would select other blocks.
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        grouped = wide(query).unflatten(2, (means.shape[2], -1))
        scores = torch.einsum("btghd,bmgd->btghm", grouped, means.to(grouped.dtype)).flatten(2, 3)
        return best_blocks(F.pad(scores, (0, 1)), own, first, chosen)  # of [B, T, H, M + 1]


@dataclass(eq=False)
class MoBACache(Bundle):
    """MoBA's cache besides GQA's keys and values."""

    means: Blocks
    choice: Recent | None = None  # selection of the incomplete tile


class MoBA(nn.Module):
    """Inner attention for GQA, without parameters.

    While `full` is True it is full attention; `switch` sets it.
    """

    def __init__(self, config: MoBAConfig, left: int | None = None):
        """Sets the mode; the last `config.full_layers` layers always attend fully.

        `left` counts the layers from this one to the model's last, itself included.
        """
        super().__init__()
        self.config, self.always = config, left is not None and left <= config.full_layers
        self.full = self.always

    @property
    def _by_tiles(self) -> bool:
        return self.config.choice == "tile" and not self.always

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> MoBACache | None:
        """Returns an empty cache for the block means and the selection of the incomplete tile.

        Returns None if the layer always attends fully. GQA caches the keys.
        """
        if self.always:
            return None
        choice = Recent(1) if self.config.choice == "tile" else None
        return MoBACache(Blocks(self.config.block, self.config.block, capacity), choice)

    def forward(
        self,
        query: Float[Tensor, "B T H P"],
        key: Float[Tensor, "B L G P"],
        value: Float[Tensor, "B L G Q"],
        hidden: Float[Tensor, "B T D"],
        ctx: Context,
        scale: float,
    ) -> Float[Tensor, "B T2 H Q"]:
        """Attends from the new tokens, or with `ctx.last_only` from the last one of each sequence.

        Query and key must be rotated already.
        """
        # A single new token after a cache; the last token of a prompt does not count as one.
        single = ctx.past > 0 and query.shape[1] == 1
        full, tiles = self.full or (single and self.config.decode == "full"), self._by_tiles
        # A cache needs means and selections even while attention is full: it may be switched.
        cached = ctx.cache is not None and not self.always
        segment, means = self._means(key, ctx) if cached or not full else (None, None)
        # With tiles the first query of a tile selects, even if only the last one is needed.
        if ctx.last_only and not tiles:
            query, ctx = ctx.last_of(query), ctx.last()
        keys = None
        if means is not None and (tiles or not full):
            keys = self.select(query, means, segment, ctx)
        if keys is None or full:
            out = full_attention(query, key, value, ctx, scale)
        else:
            out = attend_selected(query, key, value, keys, ctx, scale)
        return ctx.last_of(out) if ctx.last_only else out

    def select(
        self,
        query: Float[Tensor, "B T H P"],
        means: Float[Tensor, "B M G P"],
        segment: Int[Tensor, "B L"] | None,
        ctx: Context,
    ) -> Selection | None:
        """Returns the blocks that each query attends to; None where there is no more than one.

        With tiles the selection of the incomplete tile is cached.
        """
        size, chosen, tiles, found = self.config.block, self.config.chosen, self._by_tiles, []
        own = own_blocks(ctx, segment, size)
        first = own - ctx.positions // size
        if not tiles and ctx.key_count <= size:
            return None
        queries = tile_queries(ctx) if tiles else None
        for run in runs(query.shape[1] if queries is None else len(queries)):
            each = run if queries is None else queries[run]
            # Without a mask no query of the run sees later blocks.
            end = -(-(ctx.past + run.stop) // size) if ctx.mask is None and not tiles else None
            found.append(
                choose(query[:, each], means[:, :end], own[:, each], first[:, each], chosen)
            )
        if not tiles:
            return Selection(torch.cat(found, dim=1), size, segment)
        cache = None if ctx.cache is None else ctx.cache.attention.inner.choice
        index = (
            torch.cat(found, dim=1) if found else own.new_empty(len(own), 0, query.shape[2], chosen)
        )
        keys = by_tiles(index, ctx, segment, size, cache)
        return None if ctx.key_count <= size else keys

    def _means(
        self, key: Tensor, ctx: Context
    ) -> tuple[Int[Tensor, "B L"] | None, Float[Tensor, "B M G P"]]:
        """Returns the block of each key, None where columns determine it, and the blocks' means."""
        size = self.config.block
        if (segment := segments(ctx, size)) is not None:
            return segment, block_means(key.detach(), segment, most_blocks(segment))
        if ctx.cache is not None:
            return None, ctx.cache.attention.inner.means.update(key, _mean, ctx)
        return None, _mean(windows(key.detach(), size, size))


def _mean(keys: Float[Tensor, "B M G l P"]) -> Float[Tensor, "B M G P"]:
    return wide(keys).mean(-2)


def switch(model: nn.Module, full: bool) -> None:
    """Switches every MoBA of a model to full attention, or back to its config."""
    for module in model.modules():
        if isinstance(module, MoBA):
            module.full = full or module.always
