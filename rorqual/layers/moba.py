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
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.layers.cache import Bundle, Recent
from rorqual.layers.context import Context
from rorqual.layers.selection import (
    Blocks,
    attend_chosen,
    best_blocks,
    full_attention,
    most_blocks,
    runs,
    segments,
    straight,
    wide,
    windows,
)
from rorqual.layers.tiles import attend_tiles, tile_choices
from rorqual.model_config import MoBAConfig as MoBAConfig


def block_means(
    keys: Float[Tensor, "B L G P"],
    segment: Int[Tensor, "B L"],
    present: Bool[Tensor, "B L"] | None,
    count: int,
) -> Float[Tensor, "B M G P"]:
    """Averages the valid keys of each of a sequence's `count` blocks, in float32.

    A block without any has mean 0.
    """
    batch = keys.shape[0]
    rows = (segment + count * torch.arange(batch, device=keys.device)[:, None]).flatten()
    weight = torch.ones_like(rows) if present is None else present.flatten().long()
    kept = wide(keys).flatten(0, 1) * weight[:, None, None]
    sums = kept.new_zeros(batch * count, *keys.shape[2:]).index_add_(0, rows, kept)
    sizes = weight.new_zeros(batch * count).index_add_(0, rows, weight)
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
        """Attends from the last T of L tokens, or with `ctx.last_only` from the last one.

        Query and key must be rotated already.
        """
        cache = ctx.cache.attention.inner if ctx.cache is not None else None
        # A single new token after a cache; the last token of a prompt does not count as one.
        single = ctx.past > 0 and query.shape[1] == 1
        # With tiles the first query of a tile selects, even if only the last one is needed.
        if ctx.last_only and self.config.choice == "token":
            query, ctx = query[:, -1:], ctx.last()
        if self.always or (self.full and ctx.cache is None):
            return full_attention(query, key, value, ctx, scale)
        whole, (ctx, lead) = ctx, straight(ctx) if cache is not None else (ctx, None)
        segment, own, means = self._blocks(key, ctx, lead, cache)
        size, held = self.config.block, cache.choice if cache is not None else None
        first = own - ctx.positions // size

        def choose_at(rows: slice | Tensor) -> Tensor:
            end = (
                -(-(ctx.past + rows.stop) // size)
                if isinstance(rows, slice) and segment is None
                else None
            )
            return choose(
                query[:, rows], means[:, :end], own[:, rows], first[:, rows], self.config.chosen
            )

        if self.full or key.shape[1] <= size or (single and self.config.decode == "full"):
            if held is not None:
                tile_choices(choose_at, ctx, segment, held, lead)
            return full_attention(query, key, value, whole, scale)
        if self.config.choice == "tile":
            return attend_tiles(query, key, value, choose_at, ctx, segment, size, scale, held, lead)
        parts = [
            attend_chosen(
                query[:, run], key, value, choose_at(run), ctx, run, segment, size, scale, lead
            )
            for run in runs(query.shape[1])
        ]
        return torch.cat(parts, dim=1)

    def _blocks(
        self, key: Tensor, ctx: Context, lead, cache: MoBACache | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Returns the block of each key, the block of each query [B, T] and the means [B, M, G, P].

        The block of each key is None where columns determine it.
        """
        size = self.config.block
        if ctx.mask is not None:
            segment = segments(ctx, size)
            means = block_means(key.detach(), segment, ctx.key_present, most_blocks(segment))
            return segment, segment[:, ctx.past :], means
        if cache is not None:
            return None, ctx.positions // size, cache.means.update(key, _mean, lead)
        return None, ctx.positions // size, _mean(windows(key.detach(), size, size))


def _mean(keys: Float[Tensor, "B M G l P"]) -> Float[Tensor, "B M G P"]:
    return wide(keys).mean(-2)


def switch(model: nn.Module, full: bool) -> None:
    """Switches every MoBA of a model to full attention, or back to its config."""
    for module in model.modules():
        if isinstance(module, MoBA):
            module.full = full or module.always
