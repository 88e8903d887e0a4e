"""Native Sparse Attention: attends to compressed blocks, selected blocks and a window of keys.

    out      = g_cmp Attn(q, K_cmp, V_cmp) + g_slc Attn(q, K_slc, V_slc)
               + g_win Attn(q, K_win, V_win)
    g        = sigmoid(MLP(hidden))                          one a head and branch
    K_cmp,i  = mean(k) + MLP(vec(k + position)),  k = keys i d .. i d + l - 1 of the document;
               V_cmp likewise; query t sees block i when i d + l - 1 <= t; 0 if it sees none
    p_slc    = sum over the heads of a group of p_cmp W
               W[i, j]: number of stride-d pieces of block i in selection block j
    K_slc    = keys of the `top_k` selection blocks of l' keys with the largest p_slc, up to t;
               always among them: the document's first, the query's own and the one before
    K_win    = the last `window` keys

Each branch has keys and values of its own: GQA's are the selected branch's, the other two are
projected here. All keys are rotated before anything else. The selection carries no gradient. Blocks
are counted from the start of each document, so that a packed document gives the same result as
alone.

Native Sparse Attention, arXiv:2502.11089. The mean added to the MLP is ours: compression starts as
mean pooling. So is `choice="tile"`, where the first of 128 queries selects for all of them
(layers/tiles.py).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.kernels import kernel
from rorqual.layers.attend import attend
from rorqual.layers.attention import GQA, GQACache
from rorqual.layers.cache import Appended, Bundle, Recent
from rorqual.layers.context import Attended, Context
from rorqual.layers.norm import as_float32
from rorqual.layers.sparse import (
    SMALL_BATCH,
    Blocks,
    Selection,
    attend_selected,
    best_blocks,
    by_tiles,
    most_blocks,
    own_blocks,
    runs,
    segments,
    selected_attention,
    tile_queries,
    windows,
)
from rorqual.model_config import GQAConfig, RopeConfig
from rorqual.model_config import NSAConfig as NSAConfig


class Compressed(NamedTuple):
    """The compressed blocks of each sequence, and where their keys are.

    Without documents, block i is the keys i d .. i d + l - 1.
    """

    keys: Float[Tensor, "B M G P"]
    values: Float[Tensor, "B M G Q"]
    ends: Int[Tensor, "B M"] | None = None  # column of the last key
    pieces: Int[Tensor, "B M U"] | None = None  # selection block of each stride-d piece
    real: Bool[Tensor, "B M"] | None = None  # a sequence may have fewer than M blocks
    segment: Int[Tensor, "B L"] | None = None  # selection block of each key


class KeyValue(NamedTuple):
    """Keys and values of all tokens that a branch projects for itself, cached ones first."""

    key: Float[Tensor, "B L G P"]  # rotated
    value: Float[Tensor, "B L G Q"]


class Branches(NamedTuple):
    """What the branches beside the selected one project; that has GQA's keys and values."""

    uncompressed: KeyValue  # of which the blocks of the compressed branch are made
    window: KeyValue


class Scored(NamedTuple):
    """The importance of selection blocks to some queries, and which of them each may select."""

    importance: Float[Tensor, "B T G J"]  # p_slc
    own_block: Int[Tensor, "B T"]  # the block that the query is in
    first: Int[Tensor, "B T"]  # the first block of the query's document


class Compression(nn.Module):
    """Compresses the keys (or values) of a block into one.

        mean(x) + W_2 silu(W_1 vec(x + position))

    The parameters are the same for every group.
    """

    def __init__(self, block: int, dim: int):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(block, dim))
        self.up = nn.Linear(block * dim, dim, bias=False)
        self.down = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "B M G l P"]) -> Float[Tensor, "B M G P"]:
        return x.mean(-2) + self.down(F.silu(self.up((x + self.position).flatten(-2))))


@dataclass(eq=False)
class KeysAndValues(Bundle):
    """A container of keys and one of values, of one kind."""

    keys: Any
    values: Any


@dataclass(eq=False)
class NSACache(GQACache):
    """The cache of the three branches; the selected branch's keys and values are GQA's."""

    compressed: KeysAndValues  # both Blocks
    uncompressed: KeysAndValues  # what they are made from
    window: KeysAndValues
    tile_selection: Recent | None = None  # selection of the incomplete tile


class NSA(GQA):
    """Grouped-query attention with a compressed, a selected and a window branch.

    The compressed and the window branch have keys and values of their own.
    """

    def __init__(self, config: NSAConfig, gqa: GQAConfig, dim: int, rope: RopeConfig):
        gqa.check_sparse()
        gqa.check_plain()
        super().__init__(gqa, dim, rope)
        self.nsa = config
        self.tiles = config.choice == "tile"
        width = gqa.kv_heads * (gqa.head_dim + self.value_dim)
        self.compressed_kv = nn.Linear(dim, width, bias=False)
        self.window_kv = nn.Linear(dim, width, bias=False)
        self.compress_key = Compression(config.block, gqa.head_dim)
        self.compress_value = Compression(config.block, self.value_dim)
        self.gate_up = nn.Linear(dim, 3 * gqa.heads, bias=False)
        self.gate_down = nn.Linear(3 * gqa.heads, 3 * gqa.heads)

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> NSACache:
        """Returns an empty cache for `capacity` tokens."""
        size = self.nsa.block, self.nsa.stride, capacity
        return NSACache(
            Appended(capacity),
            Appended(capacity),
            compressed=KeysAndValues(Blocks(*size), Blocks(*size)),
            uncompressed=KeysAndValues(Appended(capacity), Appended(capacity)),
            window=KeysAndValues(Appended(capacity), Appended(capacity)),
            tile_selection=Recent(1) if self.tiles else None,
        )

    def forward(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Attended:
        """Returns the output of the new tokens.

        With `ctx.last_only` only the last token of each sequence has an output.
        """
        whole = ctx
        scale = self.scale
        projected = self.project(hidden, ctx)
        branches = self._project_branches(hidden, ctx)
        blocks = self._compress(branches.uncompressed, ctx)
        # With tiles the first query of a tile selects, even if only the last one is needed.
        if ctx.last_only and not self.tiles:
            projected = projected.last(ctx)
            ctx = ctx.last()
        query = projected.query
        pair = projected.key, projected.value
        if ctx.past and blocks.segment is None and query.shape[1] <= SMALL_BATCH:
            index = self.select(query, blocks, ctx).blocks if self.tiles else None
            pairs = *pair, blocks.keys, blocks.values, *branches.window
            out = attend_small_batch(query, *pairs, index, ctx.positions, self.nsa, scale)
        else:
            compressed, keys = self.attend_compressed(query, blocks, ctx)
            keys = self.select(query, blocks, ctx) if keys is None else keys
            selected = attend_selected(query, *pair, keys, ctx, scale)
            window = self._attend_window(query, branches.window, ctx)
            out = torch.stack([compressed, selected, window], dim=2)
        if whole.last_only:
            out = ctx.last_of(out)
            hidden = whole.last_of(hidden)
        gates = self.gates(hidden).to(out.dtype)[..., None]  # [B, T2, 3, H, 1]
        return Attended(self.o_proj((gates * out).sum(2).flatten(2)))

    def gates(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T 3 H"]:
        """Computes each head's weights, in (0, 1), of the three branches.

        Their order is the compressed, the selected and the window branch.
        """
        return torch.sigmoid(self.gate_down(F.silu(self.gate_up(hidden)))).unflatten(-1, (3, -1))

    def select(
        self, query: Float[Tensor, "B T H P"], blocks: Compressed, ctx: Context
    ) -> Selection:
        """Returns the selection blocks that the first query of each tile selects for all of it.

        They are those of largest p_slc. The selection of the incomplete tile is cached.
        """
        size = self.nsa.select_block
        top_k = self.nsa.top_k
        queries = tile_queries(ctx)
        index = [queries.new_empty(len(query), 0, self.config.kv_heads, top_k)]
        for run in runs(len(queries)):
            run_queries = queries[run]
            seen = self._seen(blocks, ctx, run_queries)
            keys = blocks.keys[:, : seen.shape[-1]]
            weights = _probabilities(query[:, run_queries], keys, seen, self.scale)
            scored = self._importance(weights, blocks, ctx, run_queries)
            index.append(
                best_blocks(scored.importance, scored.own_block, scored.first, top_k, forced=3)
            )
        stored = None if ctx.cache is None else ctx.cache.attention.tile_selection
        return by_tiles(torch.cat(index, dim=1), ctx, blocks.segment, size, stored)

    def attend_compressed(
        self, query: Float[Tensor, "B T H P"], blocks: Compressed, ctx: Context
    ) -> tuple[Float[Tensor, "B T H Q"], Selection | None]:
        """Attends to the compressed blocks; returns the output and the blocks that it selects.

        Every query selects by its probabilities, which are formed once for both. With tiles only
        the first query of each selects, and None is returned.
        """
        top_k = self.nsa.top_k
        outs = []
        index = []
        for run in runs(query.shape[1]):
            queries = query[:, run]
            seen = self._seen(blocks, ctx, run)
            keys, values = (x[:, : seen.shape[-1]] for x in (blocks.keys, blocks.values))
            values = values.to(queries.dtype)
            if self.tiles:
                outs.append(attend(queries, keys.to(queries.dtype), values, self.scale, seen))
                continue
            weights = _probabilities(queries, keys, seen, self.scale)
            out = torch.einsum("bghtm,bmgq->btghq", weights.to(queries.dtype), values)
            outs.append(out.flatten(2, 3))
            scored = self._importance(weights, blocks, ctx, run)
            index.append(
                best_blocks(scored.importance, scored.own_block, scored.first, top_k, forced=3)
            )
        if self.tiles:
            return torch.cat(outs, dim=1), None
        selection = Selection(torch.cat(index, dim=1), self.nsa.select_block, blocks.segment)
        return torch.cat(outs, dim=1), selection

    def _project_branches(self, hidden: Tensor, ctx: Context) -> Branches:
        """Projects the keys and values of the compressed and the window branch."""
        both = [
            linear(hidden).unflatten(-1, (self.config.kv_heads, -1))
            for linear in (self.compressed_kv, self.window_kv)
        ]
        keys, values = torch.cat(both, dim=2).split([self.config.head_dim, self.value_dim], dim=-1)
        turned = ctx.rotate(keys, self.interleaved)
        branches = Branches(*map(KeyValue, turned.chunk(2, 2), values.chunk(2, 2)))
        if ctx.cache is None:
            return branches
        cache = ctx.cache.attention
        stored = (
            KeyValue(containers.keys.append(new.key, ctx), containers.values.append(new.value, ctx))
            for containers, new in zip((cache.uncompressed, cache.window), branches, strict=True)
        )
        cached = Branches(*stored)
        return cached if ctx.past else branches

    def _compress(self, uncompressed: KeyValue, ctx: Context) -> Compressed:
        """Compresses the complete blocks of the compressed branch's keys and values."""
        keys = uncompressed.key
        values = uncompressed.value
        block = self.nsa.block
        stride = self.nsa.stride
        if (segment := segments(ctx, self.nsa.select_block)) is not None:
            columns, real = _block_columns(ctx, block, stride)
            sequences = torch.arange(keys.shape[0], device=keys.device)[:, None, None]
            pieces = segment.gather(1, columns[..., ::stride].flatten(1)).unflatten(
                1, (-1, block // stride)
            )
            # [B, M, G, l, P]
            keys, values = (x[sequences, columns].transpose(2, 3) for x in (keys, values))
            keys = self.compress_key(keys)
            values = self.compress_value(values)
            return Compressed(keys, values, columns[..., -1], pieces, real, segment)
        if ctx.cache is not None:
            blocks = ctx.cache.attention.compressed
            return Compressed(
                blocks.keys.update(keys, self.compress_key, ctx),
                blocks.values.update(values, self.compress_value, ctx),
            )
        return Compressed(
            self.compress_key(windows(keys, block, stride)),
            self.compress_value(windows(values, block, stride)),
        )

    def _seen(
        self, blocks: Compressed, ctx: Context, queries: slice | Tensor
    ) -> Bool[Tensor, "#B 1 T M"]:
        """Returns the compressed blocks whose keys are all visible to the given new tokens.

        Blocks after the last one are left out.
        """
        if blocks.ends is not None and blocks.real is not None and ctx.mask is not None:
            mask = ctx.mask[:, :, queries]
            ends = blocks.ends[:, None, None].expand(-1, -1, mask.shape[2], -1)
            return mask.gather(-1, ends) & blocks.real[:, None, None]
        count = blocks.keys.shape[1]
        # Without a mask no query of a slice sees later blocks.
        if isinstance(queries, slice) and ctx.mask is None:
            end = ctx.past + queries.stop
            count = min(count, max(0, (end - self.nsa.block) // self.nsa.stride + 1))
        return _complete(count, ctx.positions[:, queries], self.nsa)[:, None]

    def _importance(
        self, weights: Tensor, blocks: Compressed, ctx: Context, queries: slice | Tensor
    ) -> Scored:
        """Computes p_slc of the new tokens `queries`, of their probabilities p_cmp."""
        size = self.nsa.select_block
        positions = ctx.positions[:, queries]
        own_block = own_blocks(ctx, blocks.segment, size)[:, queries]
        probabilities = weights.detach().sum(2)  # [B, G, T, M]
        if blocks.segment is not None and blocks.pieces is not None:
            count = most_blocks(blocks.segment)
            share = F.one_hot(blocks.pieces, count).sum(2).to(weights.dtype)  # W, [B, M, J]
            with torch.autocast(probabilities.device.type, enabled=False):
                importance = probabilities @ share[:, None]
        else:
            end = ctx.key_count
            # Without a mask no query of a slice sees later blocks.
            if isinstance(queries, slice) and ctx.mask is None:
                end = ctx.past + queries.stop
            importance = importance_of(probabilities, -(-end // size), self.nsa)
        return Scored(importance.transpose(1, 2), own_block, own_block - positions // size)

    def _attend_window(
        self, query: Tensor, branch: KeyValue, ctx: Context
    ) -> Float[Tensor, "B T H Q"]:
        """Attends to the last `window` keys of the document, up to the query."""
        key = branch.key
        value = branch.value
        window = self.nsa.window
        parts = []
        for run in runs(query.shape[1]):
            queries = query[:, run]
            if ctx.mask is not None:
                mask = ctx.visible(run) & ctx.within(window, run)
                parts.append(attend(queries, key, value, self.scale, mask))
                continue
            first = ctx.past + run.start
            last = ctx.past + run.stop
            # Keep the keys from the start of the window to the last query.
            start = max(0, first - window + 1)
            pair = key[:, start:last], value[:, start:last]
            back = torch.arange(first, last, device=key.device)[:, None] - torch.arange(
                start, last, device=key.device
            )
            within = ((back >= 0) & (back < window))[None, None]
            parts.append(
                attend(
                    queries,
                    *pair,
                    self.scale,
                    within if queries.shape[1] > 1 else None,
                )
            )
        return torch.cat(parts, dim=1)


def importance_of(
    probabilities: Float[Tensor, "*B M"], count: int, config: NSAConfig
) -> Float[Tensor, "*B J"]:
    """Computes p_cmp W: the importance of each of `count` selection blocks.

    A selection block gets the probability of a compressed block once for each shared stride-d
    piece.
    """
    each = config.block // config.stride
    per = config.select_block // config.stride
    pieces = F.pad(probabilities, (0, each - 1))
    for n in range(1, each):
        pieces = pieces + F.pad(probabilities, (n, each - 1 - n))
    return F.pad(pieces, (0, count * per - pieces.shape[-1])).unflatten(-1, (count, per)).sum(-1)


def _complete(
    count: int, positions: Int[Tensor, "B T"], config: NSAConfig
) -> Bool[Tensor, "B T M"]:
    """Returns which of the first `count` compressed blocks of their sequence the queries see.

    Blocks are counted as positions are.
    """
    ends = torch.arange(count, device=positions.device) * config.stride + config.block - 1
    return ends <= positions[..., None]


def _probabilities(
    query: Float[Tensor, "B T H P"],
    keys: Float[Tensor, "B M G P"],
    seen: Bool[Tensor, "B 1 T M"],
    scale: float,
) -> Float[Tensor, "B G N T M"]:
    """Computes p_cmp in float32; 0 everywhere for a query that sees no block."""
    # A rounded score would select other blocks.
    with torch.autocast(query.device.type, enabled=False):
        logits = (
            torch.einsum(
                "btghp,bmgp->bghtm",
                as_float32(query.unflatten(2, (keys.shape[2], -1))),
                as_float32(keys),
            )
            * scale
        )
    seen = seen[:, :, None]
    return logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen


@kernel(numba="rorqual.kernels.nsa:attend_small_batch")
def attend_small_batch(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    compressed_key: Float[Tensor, "B M G P"],
    compressed_value: Float[Tensor, "B M G Q"],
    window_key: Float[Tensor, "B L G P"],
    window_value: Float[Tensor, "B L G Q"],
    index: Int[Tensor, "B T G K"] | None,
    positions: Int[Tensor, "B T"],
    config: NSAConfig,
    scale: float,
) -> Float[Tensor, "B T 3 H Q"]:
    """Computes the three branches of a few tokens after a cache, before the gates.

    The branches are the compressed, the selected and the window branch. `index` holds the blocks
    selected already; if it is None, each token selects. The kernel is kernels/nsa.py.
    """
    weights = _probabilities(
        query, compressed_key, _complete(compressed_key.shape[1], positions, config)[:, None], scale
    )
    compressed = torch.einsum(
        "bghtm,bmgq->btghq", weights.to(query.dtype), compressed_value.to(query.dtype)
    ).flatten(2, 3)
    if index is None:
        own_block = positions // config.select_block
        count = -(-key.shape[1] // config.select_block)
        scores = importance_of(weights.detach().sum(2), count, config).transpose(1, 2)
        index = best_blocks(scores, own_block, torch.zeros_like(own_block), config.top_k, forced=3)
    back = torch.arange(config.window, device=key.device)
    # Each key of the window is a block of its own.
    columns = (positions[..., None, None] - back).expand(-1, -1, key.shape[2], -1)
    size = config.select_block
    selected = selected_attention(query, key, value, index, positions, size, scale)
    # The kernel does not take blocks of one key.
    window = selected_attention.reference(
        query, window_key, window_value, columns, positions, 1, scale
    )
    return torch.stack([compressed, selected, window], dim=2)


def _block_columns(
    ctx: Context, block: int, stride: int
) -> tuple[Int[Tensor, "B M l"], Bool[Tensor, "B M"]]:
    """Returns the columns of each compressed block's keys, and which blocks exist.

    It is for packed documents. A block ends at each key whose position is l - 1, l - 1 + d, ...;
    its keys are the l ones up to there.
    """
    positions = ctx.key_positions
    assert positions is not None
    length = positions.shape[1]
    ends = (positions >= block - 1) & ((positions - block + 1) % stride == 0)
    # This bounds the blocks of any documents, because a block is no shorter than a stride.
    bound = max(0, (length - block) // stride + 1)
    largest = bound if torch.compiler.is_compiling() else int(ends.sum(1).max())
    last = (~ends).long().argsort(dim=1, stable=True)[:, :largest]  # [B, M]
    span = torch.arange(1 - block, 1, device=positions.device)
    return (last[..., None] + span).clamp_min(0), ends.gather(1, last)
