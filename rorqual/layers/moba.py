"""Mixture of Block Attention (MoBA): each query attends to its own block and the best earlier ones.

    score[t, i] = <q_t, mean of the keys of block i>           float32, per query head, unscaled
    blocks[t]   = own block and the best (top_k - 1) of the blocks before it in the document
    out_t       = softmax over the keys of these blocks, up to t

The selection is hard: no gradient passes through scores or means. top_k >= the number of blocks is
full causal attention, top_k = 1 is block-diagonal. Blocks are counted from the start of each
document, so that a packed document gives the same result as alone.

MoBA: Mixture of Block Attention, arXiv:2502.13189. `choice="tile"`, where the first of 128 queries
selects for all of them (layers/tiles.py), is ours.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rorqual.layers.attention import GQA, GQACache
from rorqual.layers.cache import Appended, Recent
from rorqual.layers.context import Attended, Context
from rorqual.layers.norm import as_float32
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
    windows,
)
from rorqual.model_config import GQAConfig, RopeConfig
from rorqual.model_config import MoBAConfig as MoBAConfig


class BlockMeans(NamedTuple):
    """The mean key of each block of each sequence, and where documents are in it."""

    means: Float[Tensor, "B M G P"]
    # The block of each key, counted through the documents of a sequence; None without documents.
    segment: Int[Tensor, "B L"] | None = None


def block_means(
    keys: Float[Tensor, "B L G P"], segment: Int[Tensor, "B L"], count: int
) -> Float[Tensor, "B M G P"]:
    """Averages the keys of each of a sequence's `count` blocks, in float32; 0 for an empty block.

    Only complete blocks are ever scored, so that columns beyond a sequence do not matter.
    """
    batch = keys.shape[0]
    blocks = (segment + count * torch.arange(batch, device=keys.device)[:, None]).flatten()
    every = as_float32(keys).flatten(0, 1)
    sums = every.new_zeros(batch * count, *keys.shape[2:]).index_add_(0, blocks, every)
    sizes = blocks.new_zeros(batch * count).index_add_(0, blocks, torch.ones_like(blocks))
    return (sums / sizes.clamp_min(1)[:, None, None]).unflatten(0, (batch, count))


def block_scores(
    query: Float[Tensor, "B T H P"], means: Float[Tensor, "B M G P"]
) -> Float[Tensor, "B T H N"]:
    """Computes <q_t, mean of the keys of block i> in float32, for N = M + 1 blocks.

    The block after the last that has a mean is still growing. It can only be a query's own, which
    needs no score.
    """
    # A rounded score would select other blocks.
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        grouped = as_float32(query).unflatten(2, (means.shape[2], -1))
        scores = torch.einsum("btghd,bmgd->btghm", grouped, means.to(grouped.dtype))
        return F.pad(scores.flatten(2, 3), (0, 1))


@dataclass(eq=False)
class MoBACache(GQACache):
    """The cache of keys, values, block means and the selection of the incomplete tile.

    A layer that always attends fully has no means.
    """

    means: Blocks | None = None
    tile_selection: Recent | None = None


class MoBA(GQA):
    """Grouped-query attention to selected blocks, without parameters of its own.

    While `full` is True it is full attention; `switch` sets it.
    """

    def __init__(
        self,
        config: MoBAConfig,
        gqa: GQAConfig,
        dim: int,
        rope: RopeConfig,
        left: int | None = None,
    ):
        """Builds the projections; the last `config.full_layers` layers always attend fully.

        `left` counts the layers from this one to the model's last, itself included.
        """
        gqa.check_sparse()
        gqa.check_plain()
        super().__init__(gqa, dim, rope)
        self.moba = config
        self.always = left is not None and left <= config.full_layers
        self.full = self.always
        self.tiles = config.choice == "tile" and not self.always

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> MoBACache:
        """Returns an empty cache for `capacity` tokens."""
        means = None if self.always else Blocks(self.moba.block, self.moba.block, capacity)
        tile_selection = Recent(1) if self.tiles else None
        return MoBACache(Appended(capacity), Appended(capacity), means, tile_selection)

    def forward(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Attended:
        """Returns the output of the new tokens.

        With `ctx.last_only` only the last token of each sequence has an output.
        """
        projected = self.project(hidden, ctx)
        # A single new token after a cache; the last token of a prompt does not count as one.
        single = ctx.past > 0 and hidden.shape[1] == 1
        full = self.full or (single and self.moba.decode == "full")
        # A cache needs means and selections even while attention is full: it may be switched.
        cached = ctx.cache is not None and not self.always
        blocks = self._means(projected.key, ctx) if cached or not full else None
        # With tiles the first query of a tile selects, even if only the last one is needed.
        if ctx.last_only and not self.tiles:
            projected = projected.last(ctx)
            ctx = ctx.last()
        keys = None
        if blocks is not None and (self.tiles or not full):
            keys = self.select(projected.query, blocks, ctx)
        pair = projected.key, projected.value
        if keys is None or full:
            out = full_attention(projected.query, *pair, ctx, self.scale)
        else:
            out = attend_selected(projected.query, *pair, keys, ctx, self.scale)
        out = ctx.last_of(out) if ctx.last_only else out
        return Attended(self.o_proj(out.flatten(2)))

    def select(
        self,
        query: Float[Tensor, "B T H P"],
        blocks: BlockMeans,
        ctx: Context,
    ) -> Selection | None:
        """Returns the blocks that each query attends to; None where there is no more than one.

        With tiles the selection of the incomplete tile is cached.
        """
        size = self.moba.block
        top_k = self.moba.top_k
        own_block = own_blocks(ctx, blocks.segment, size)
        first = own_block - ctx.positions // size
        if not self.tiles and ctx.key_count <= size:
            return None
        queries = tile_queries(ctx) if self.tiles else None
        index = [own_block.new_empty(len(own_block), 0, query.shape[2], top_k)]
        for run in runs(query.shape[1] if queries is None else len(queries)):
            run_queries = run if queries is None else queries[run]
            end = None
            if queries is None and ctx.mask is None:
                # No query of the run sees later blocks.
                end = -(-(ctx.past + run.stop) // size)
            scores = block_scores(query[:, run_queries], blocks.means[:, :end])
            index.append(
                best_blocks(scores, own_block[:, run_queries], first[:, run_queries], top_k)
            )
        if not self.tiles:
            return Selection(torch.cat(index, dim=1), size, blocks.segment)
        stored = None if ctx.cache is None else ctx.cache.attention.tile_selection
        keys = by_tiles(torch.cat(index, dim=1), ctx, blocks.segment, size, stored)
        return None if ctx.key_count <= size else keys

    def _means(self, key: Tensor, ctx: Context) -> BlockMeans:
        """Returns the means of all blocks; the cache keeps those of complete ones."""
        size = self.moba.block
        if (segment := segments(ctx, size)) is not None:
            means = block_means(key.detach(), segment, most_blocks(segment))
            return BlockMeans(means, segment)
        if ctx.cache is not None:
            return BlockMeans(ctx.cache.attention.means.update(key, _mean, ctx))
        return BlockMeans(_mean(windows(key.detach(), size, size)))


def _mean(keys: Float[Tensor, "B M G l P"]) -> Float[Tensor, "B M G P"]:
    """Averages the l keys of each block, in float32 at least."""
    return keys.to(torch.promote_types(keys.dtype, torch.float32)).mean(-2)


def switch(model: nn.Module, full: bool) -> None:
    """Switches every MoBA of a model to full attention, or back to its config."""
    for module in model.modules():
        if isinstance(module, MoBA):
            module.full = full or module.always
