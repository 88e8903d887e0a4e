"""Queries, keys and values in -> values attended within a few blocks of keys out.

    score[t, i] = <q_t, mean of the keys of block i>           float32, per query head, unscaled
    chosen[t]   = own block and the best (chosen - 1) of the blocks before it in the document
    out_t       = softmax over the keys of the chosen blocks, up to t

The choice is hard: no gradient passes through scores or means. chosen >= the number of blocks is full causal attention,
chosen = 1 is block-diagonal. Blocks are counted from the start of each document, padding left out, so that a packed
or padded document attends exactly as it would alone.

MoBA: Mixture of Block Attention, arXiv:2502.13189.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.layers.basics import Layout, largest
from rorqual.layers.cache import Appended

QUERIES = 512  # attended at a time, so that no mask is T x T


@dataclass(frozen=True, kw_only=True, slots=True)
class MoBAConfig:
    """How keys are grouped and how many groups a query sees."""

    block: int = 512  # keys
    chosen: int = 3  # blocks, the query's own among them
    decode: Literal["sparse", "full"] = "sparse"  # what single new tokens do: the paper serves with full

    def __post_init__(self) -> None:
        for name in ("block", "chosen"):
            if getattr(self, name) < 1:
                raise ValueError(f"moba.{name}: got {getattr(self, name)}, expected at least 1")
        if self.decode not in ("sparse", "full"):
            raise ValueError(f"moba.decode: got {self.decode!r}, expected 'sparse' or 'full'")


class BlockMeans:
    """Means of the complete blocks of a growing sequence of keys, so that decoding never reads the keys again."""

    def __init__(self, block: int, capacity: int = 0):
        self.block, self.tokens = block, 0
        self.means = Appended(capacity // block)

    def update(self, keys: Float[Tensor, "B L G P"]) -> Float[Tensor, "B M G P"]:
        """Means of the complete blocks among all keys so far, float32; reads only blocks completed since last time."""
        self.tokens, done = keys.shape[1], self.means.length
        fresh = keys[:, done * self.block : self.tokens // self.block * self.block].unflatten(1, (-1, self.block))
        return self.means.append(fresh.float().mean(2))

    def select(self, index: Int[Tensor, " B"]) -> None:
        """Keep the rows `index`, in that order."""
        self.means.select(index)

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens, and the blocks that they leave incomplete."""
        self.tokens = max(0, self.tokens - count)
        self.means.crop(max(0, self.means.length - self.tokens // self.block))

    def reset(self) -> None:
        """Forget everything."""
        self.tokens = 0
        self.means.reset()


def segments(layout: Layout, block: int) -> Int[Tensor, "B L"]:
    """Which block of its row each key is in: documents in order, blocks in order, padding with its predecessor.

    Block m of a row belongs to the document of query t when own[t] - positions[t] // block <= m <= own[t].
    """
    starts = layout.key_positions % block == 0
    if layout.key_present is not None:
        starts = starts & layout.key_present
    return (starts.cumsum(1) - 1).clamp_min(0)


def block_means(
    keys: Float[Tensor, "B L G P"], segment: Int[Tensor, "B L"], present: Bool[Tensor, "B L"] | None, count: int
) -> Float[Tensor, "B M G P"]:
    """Mean of the present keys of each of the `count` blocks of a row, float32; 0 for a block without any."""
    batch = keys.shape[0]
    rows = (segment + count * torch.arange(batch, device=keys.device)[:, None]).flatten()
    weight = torch.ones_like(rows) if present is None else present.flatten().long()
    kept = keys.float().flatten(0, 1) * weight[:, None, None]
    sums = kept.new_zeros(batch * count, *keys.shape[2:]).index_add_(0, rows, kept)
    sizes = weight.new_zeros(batch * count).index_add_(0, rows, weight)
    return (sums / sizes.clamp_min(1)[:, None, None]).unflatten(0, (batch, count))


def choose(
    query: Float[Tensor, "B T H P"],
    means: Float[Tensor, "B M G P"],
    own: Int[Tensor, "B T"],
    first: Int[Tensor, "B T"],
    chosen: int,
) -> tuple[Int[Tensor, "B T H K"], Bool[Tensor, "B T H K"]]:
    """The `chosen` best blocks of each query head, and which of them are real: first <= block <= own.

    A block without a mean (the last, still growing) can only be own, which needs no score.
    """
    heads, groups = query.shape[2], means.shape[2]
    with torch.no_grad():
        grouped = query.float().unflatten(2, (groups, heads // groups))
        scores = torch.einsum("btghd,bmgd->btghm", grouped, means.float()).flatten(2, 3)  # [B, T, H, M]
        scores = F.pad(scores, (0, max(0, int(own.max()) + 1 - scores.shape[-1])))
        blocks = torch.arange(scores.shape[-1], device=query.device)
        before = (blocks >= first[..., None]) & (blocks < own[..., None])
        scores = scores.masked_fill(~before[:, :, None], -torch.inf)
        scores.scatter_(-1, own[:, :, None, None].expand(-1, -1, heads, 1), torch.inf)
        index = largest(scores, chosen)
    return index, scores.gather(-1, index) > -torch.inf


class MoBA(nn.Module):
    """Inner attention for GQA, without parameters. `full = True` makes it full (for a layer, a training phase)."""

    def __init__(self, config: MoBAConfig):
        super().__init__()
        self.config, self.full = config, False

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> BlockMeans:
        """The block means beside the keys that GQA keeps."""
        return BlockMeans(self.config.block, capacity)

    def forward(
        self,
        query: Float[Tensor, "B T H P"],
        key: Float[Tensor, "B L G P"],
        value: Float[Tensor, "B L G Q"],
        *,
        hidden: Float[Tensor, "B T D"],
        layout: Layout,
        scale: float,
        cache: BlockMeans | None = None,
    ) -> Float[Tensor, "B T H Q"]:
        """Attended values of the last T of L tokens; rotary positions are in query and key already."""
        time, length = query.shape[1], key.shape[1]
        means = cache.update(key) if cache is not None and layout.mask is None else None
        single = layout.past > 0 and time == 1
        if self.full or length <= self.config.block or (single and self.config.decode == "full"):
            return _attend(query, key, value, layout.visible(), scale)
        if means is not None and layout.past and time * self.config.chosen * self.config.block < length:
            return self._gathered(query, key, value, means, layout, scale)
        return self._masked(query, key, value, means, layout, scale)

    def _masked(
        self, query: Tensor, key: Tensor, value: Tensor, means: Tensor | None, layout: Layout, scale: float
    ) -> Tensor:
        """A boolean mask over all keys, a run of queries at a time."""
        segment = segments(layout, self.config.block)
        count = int(segment[:, -1].max()) + 1
        own = segment[:, layout.past :]
        first = own - layout.positions // self.config.block
        if means is None:
            means = block_means(key.detach(), segment, layout.key_present, count)
        out = []
        for start in range(0, query.shape[1], QUERIES):
            run = slice(start, min(start + QUERIES, query.shape[1]))
            index, real = choose(query[:, run], means, own[:, run], first[:, run], self.config.chosen)
            kept = real.new_zeros(*real.shape[:3], count).scatter_(-1, index, real).transpose(1, 2)  # [B, H, T, M]
            where = segment[:, None, None].expand(-1, kept.shape[1], kept.shape[2], -1)
            out.append(_attend(query[:, run], key, value, kept.gather(-1, where) & _visible(layout, run), scale))
        return torch.cat(out, dim=1)

    def _gathered(
        self, query: Tensor, key: Tensor, value: Tensor, means: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        """Reads the keys of the chosen blocks alone, for rows without documents or padding: m starts at m * block."""
        batch, heads = query.shape[0], query.shape[2]
        block, groups = self.config.block, key.shape[2]
        own = layout.positions // block
        index, real = choose(query, means, own, torch.zeros_like(own), self.config.chosen)
        columns = index[..., None] * block + torch.arange(block, device=key.device)  # [B, T, H, K, block]
        seen = (real[..., None] & (columns <= layout.positions[:, :, None, None, None])).flatten(3)
        columns = columns.flatten(3).clamp_max(key.shape[1] - 1)
        row = torch.arange(batch, device=key.device)[:, None, None, None]
        group = (torch.arange(heads, device=key.device) // (heads // groups))[:, None]
        scores = torch.einsum("bthd,bthkd->bthk", query, key[row, columns, group]) * scale
        weights = scores.float().masked_fill(~seen, -torch.inf).softmax(-1).to(value.dtype)
        return torch.einsum("bthk,bthkd->bthd", weights, value[row, columns, group])


def _visible(layout: Layout, run: slice) -> Bool[Tensor, "B 1 T L"]:
    """Which keys a run of the queries may see, without forming the mask of all queries."""
    if layout.mask is not None:
        return layout.mask[:, :, run]
    columns = torch.arange(layout.key_positions.shape[1], device=layout.key_positions.device)
    return (columns <= layout.past + torch.arange(run.start, run.stop, device=columns.device)[:, None])[None, None]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale q . k) v over the keys where the mask [B, 1 or H, T, L] is True."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
