"""Selects blocks of keys for each query of grouped-query attention with an indexer.

    q_j     = rope(norm(W_q,j x))                         a few index heads j
    k[m]    = rope(norm(mean of W_k x over block m))      at the position of the block's first key
    I[t, m] = sum_j relu(<q_j[t], k[m]>) / sqrt(width)    complete blocks up to t; float32
    S[t]    = the top_k blocks of largest I[t, .], and the keys after the last complete block
    out     = W_o (sigmoid(W_g x) * attention to the keys of S[t])

Blocks have `block` keys and are counted from the start of a document. The block that a query
completes is one among the others; only an incomplete one is always seen. Of blocks with equal
scores (0 where every head's product is negative) those are selected that torch.topk returns for the
scores of this query alone. The selection carries no gradient. This is the attention of
Qwen3.8-Flash-Next, every fourth block of it; the idea of an indexer: DeepSeek-V3.2,
arXiv:2512.02556.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.layers.attention import GQA, GQACache
from rorqual.layers.cache import Appended
from rorqual.layers.context import Attended, Context
from rorqual.layers.norm import CentredRMSNorm, RMSNorm, as_float32
from rorqual.layers.rope import rope_tables, rotate
from rorqual.layers.sparse import (
    Blocks,
    Selection,
    attend_selected,
    full_attention,
    most_blocks,
    own_blocks,
    runs,
    segments,
)
from rorqual.model_config import GQAConfig, RopeConfig
from rorqual.model_config import QSAConfig as QSAConfig


class IndexBlocks(NamedTuple):
    """The index keys of all complete blocks of each sequence, and where documents are in it."""

    keys: Float[Tensor, "B M P"]
    # The block of each key, counted through the documents of a sequence; None without documents.
    segment: Int[Tensor, "B L"] | None = None


class Indexer(nn.Module):
    """Scores blocks of keys; its parameters are named as in Qwen's checkpoints."""

    def __init__(self, config: QSAConfig, gqa: GQAConfig, dim: int, rope: RopeConfig):
        super().__init__()
        config.check_rope(rope, gqa.rotated)
        self.config = config
        self.rope = rope
        self.rope_dim = gqa.rotated
        norm = CentredRMSNorm if gqa.centred else RMSNorm
        self.index_qk_proj = nn.Linear(dim, (config.heads + 1) * config.dim, bias=False)
        self.q_layernorm = norm(config.dim, gqa.norm_eps)
        self.k_layernorm = norm(config.dim, gqa.norm_eps)

    def project(
        self, hidden: Float[Tensor, "B T D"], ctx: Context
    ) -> tuple[Float[Tensor, "B T J P"], Float[Tensor, "B L P"]]:
        """Returns the queries of the new tokens, and the keys of all tokens that blocks average."""
        both = self.index_qk_proj(hidden.detach()).unflatten(-1, (-1, self.config.dim))
        query = self.q_layernorm(both[:, :, :-1])
        key = both[:, :, -1]
        assert ctx.cos is not None and ctx.sin is not None
        query = self._rotated(query, ctx.cos, ctx.sin)
        if ctx.cache is not None:
            cached = ctx.cache.attention.index_keys.append(key, ctx)
            key = cached if ctx.past else key
        return query, key

    def blocks(self, keys: Float[Tensor, "B L P"], ctx: Context) -> IndexBlocks:
        """Returns the index keys of all complete blocks; the cache keeps them."""
        block = self.config.block
        device = keys.device
        cache = None if ctx.cache is None else ctx.cache.attention.index_blocks
        segment = segments(ctx, block)
        real = None
        if segment is not None:
            numbers = torch.arange(most_blocks(segment), device=device).expand(len(segment), -1)
            starts = torch.searchsorted(segment, numbers.contiguous())
        elif cache is not None:
            numbers, real = cache.missing(ctx)
            starts = numbers * block
        else:
            numbers = torch.arange(keys.shape[1] // block, device=device)[None]
            starts = numbers * block
        # [#B, M, block]; those of an incomplete block are its neighbours' and mean nothing.
        columns = starts[..., None] + torch.arange(block, device=device)
        columns = columns.clamp_max(keys.shape[1] - 1)
        sequences = torch.arange(len(keys), device=device)[:, None, None]
        pooled = as_float32(keys[sequences, columns]).mean(2).to(keys.dtype)
        positions = columns[..., 0].expand(len(keys), -1)
        if ctx.key_positions is not None:
            positions = ctx.key_positions.gather(1, positions)
        tables = rope_tables(self.rope, self.rope_dim, positions)
        new = self._rotated(self.k_layernorm(pooled), *tables)
        if segment is not None or cache is None:
            return IndexBlocks(new, segment)
        return IndexBlocks(cache.put(new, numbers, real, ctx))

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the first rope_dim values by these tables; the others stay."""
        turned, rest = x.split([self.rope_dim, self.config.dim - self.rope_dim], dim=-1)
        return torch.cat([rotate(turned, cos, sin, self.rope.interleaved), rest], dim=-1)


@dataclass(eq=False)
class QSACache(GQACache):
    """GQA's cache, the indexer's key of each token, and the key of each complete block."""

    index_keys: Appended
    index_blocks: Blocks


class QSA(GQA):
    """Grouped-query attention to the blocks of keys that an indexer selects."""

    def __init__(self, config: QSAConfig, gqa: GQAConfig, dim: int, rope: RopeConfig):
        gqa.check_sparse()
        super().__init__(gqa, dim, rope)
        self.indexer = Indexer(config, gqa, dim, rope)

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> QSACache:
        """Returns an empty cache for `capacity` tokens."""
        block = self.indexer.config.block
        return QSACache(
            Appended(capacity),
            Appended(capacity),
            index_keys=Appended(capacity),
            index_blocks=Blocks(block, block, capacity),
        )

    def forward(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Attended:
        """Returns the output of the new tokens.

        With `ctx.last_only` only the last token of each sequence has an output.
        """
        projected = self.project(hidden, ctx)
        index_query, index_keys = self.indexer.project(hidden, ctx)
        blocks = self.indexer.blocks(index_keys, ctx)
        if ctx.last_only:
            projected = projected.last(ctx)
            index_query = ctx.last_of(index_query)
            ctx = ctx.last()
        keys = self.select(index_query, blocks, ctx)
        pair = projected.key, projected.value
        if keys is None:
            out = full_attention(projected.query, *pair, ctx, self.scale)
        else:
            out = attend_selected(projected.query, *pair, keys, ctx, self.scale)
        return Attended(self.finish(out, projected.gate))

    def select(
        self, query: Float[Tensor, "B T J P"], blocks: IndexBlocks, ctx: Context
    ) -> Selection | None:
        """Returns the blocks that each new token sees; None if it is all keys up to it."""
        config = self.indexer.config
        if ctx.key_count // config.block <= config.top_k:
            return None
        index = []
        for run in runs(query.shape[1]):
            positions = ctx.positions[:, run]
            last = own_blocks(ctx, blocks.segment, config.block)[:, run]
            first = last - positions // config.block
            # The block that a token is in counts once it is complete, and is seen anyway before.
            complete = (positions + 1) % config.block == 0
            end = last + complete
            count = blocks.keys.shape[1]
            if ctx.mask is None:
                count = min(count, (ctx.past + run.stop) // config.block)
            scores = block_scores(query[:, run], blocks.keys[:, :count])
            best = best_complete(scores, first, end, config.top_k)
            tail = last.where(~complete, -1)[..., None]
            blocks_seen = torch.cat([tail, best], dim=-1).sort(-1, descending=True).values
            index.append(blocks_seen[:, :, None])
        # All groups of heads see the same blocks.
        same = torch.cat(index, dim=1).expand(-1, -1, self.config.kv_heads, -1)
        return Selection(same, config.block, blocks.segment)


def block_scores(
    query: Float[Tensor, "B T J P"], key: Float[Tensor, "B M P"]
) -> Float[Tensor, "B T M"]:
    """Computes sum_j relu(<q_j, k>) / sqrt(width) in float32, also under autocast."""
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        products = (query.float().flatten(1, 2) @ key.float().mT).relu_()
        return products.unflatten(1, query.shape[1:3]).sum(2) / query.shape[-1] ** 0.5


def best_complete(
    scores: Float[Tensor, "B T M"],
    first: Int[Tensor, "B T"],
    end: Int[Tensor, "B T"],
    top_k: int,
) -> Int[Tensor, "B T K"]:
    """Selects the `top_k` blocks of largest score from `first` to before `end`; -1 for fewer.

    If several blocks of equal score are the last to be selected, it is as torch.topk would select
    from this query's blocks alone: then one query and many select alike.
    """
    if torch.compiler.is_compiling():
        return _best_complete(scores.detach(), first, end, top_k)
    block = torch.arange(scores.shape[-1], device=scores.device)
    outside = (block < first[..., None]) | (block >= end[..., None])
    scores = scores.masked_fill(outside, -torch.inf)
    best = scores.topk(min(top_k + 1, scores.shape[-1]), dim=-1)
    index = best.indices.where(best.values > -torch.inf, -1)
    tied = _tied(best.values, top_k)
    for sequence, t in tied.nonzero().tolist() if tied is not None else ():
        start = int(first[sequence, t])
        stop = int(end[sequence, t])
        best_of_own = scores[sequence, t, start:stop].topk(top_k).indices
        index[sequence, t, :top_k] = best_of_own + start
    index = index[..., :top_k]
    return F.pad(index, (0, top_k - index.shape[-1]), value=-1)


@torch.library.custom_op("rorqual::best_complete", mutates_args=())
def _best_complete(scores: Tensor, first: Tensor, end: Tensor, top_k: int) -> Tensor:
    """Runs `best_complete` for a compiler, which cannot trace its loop over ties."""
    return best_complete(scores, first, end, top_k)


@_best_complete.register_fake
def _(scores: Tensor, first: Tensor, end: Tensor, top_k: int) -> Tensor:
    """Returns an empty tensor of the shape that `_best_complete` returns, for the compiler."""
    return torch.empty((*scores.shape[:-1], top_k), dtype=torch.int64, device=scores.device)


def _tied(values: Float[Tensor, "B T K"], top_k: int) -> Bool[Tensor, "B T"] | None:
    """Returns the queries whose last selected score is that of a block that is left out."""
    if values.shape[-1] <= top_k:
        return None
    return (values[..., top_k - 1] == values[..., top_k]) & (values[..., top_k] > -torch.inf)
