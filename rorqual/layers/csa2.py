"""Compressed sparse attention whose entries and selections several blocks share.

    l_w    = norm(W_kv x)                                            ratio 1
    l_w    = norm(sum_j softmax_j(W_gate x_j) * W_kv x_j)      ratio r: tokens from r w on
    k_w    = rope(l_w, r w)                  an entry: key and value, as those of the window are
    i_w    = rope(norm(W_k l_w), r w)        the indexer's key of it
    I[t,w] = sum_j (W_w x_t)_j (dim heads)^-1/2 relu(<rope(W_q c_t, t)_j, i_w>)
    S[t]   = the top_k entries of largest I[t, .] among w < (t + 1) // r

A source compresses tokens to entries, and selects. A later block of its ratio selects anew, by
queries of its own and the source's keys, or it attends to the entries that were selected last. One
source, of a long context, selects coarse blocks of entries, too, and later blocks select only
inside of these: those with the largest maxima, and the one of the last visible entry.

The indexers are trained as those of CSA are (layers/csa.py). Queries have no norm of their own,
unlike V4's. With `cache_formats` the keys of the window, the entries, and the queries and keys of
the indexer are rounded as they are stored.

DeepSeek-V4.1-Flash.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.layers.cache import Recent
from rorqual.layers.cache_formats import rounded
from rorqual.layers.context import Attended, Context
from rorqual.layers.csa import (
    COPIED,
    GATHERING,
    QUERIES,
    SelectedEntries,
    SharedKV,
    SharedKVCache,
    attend_gathered,
    attend_with_sink,
    entry_loss,
    last_window,
    mean_entry_loss,
    window_mask,
)
from rorqual.layers.dsa import IndexerLoss, Ties, select_within, tied_queries
from rorqual.layers.norm import RMSNorm
from rorqual.layers.rope import rotate
from rorqual.layers.sparse import Blocks
from rorqual.layers.top_k import largest
from rorqual.model_config import CSA2Config as CSA2Config
from rorqual.model_config import CSAConfig

SCORES = 1 << 22  # scores of the indexer's heads in memory at a time


class Shared(NamedTuple):
    """What a source, and the blocks that select after it, leave for later blocks.

    Entries are numbered through the documents of a sequence; -1 stands for none.
    """

    entries: Float[Tensor, "B M P"]
    index_keys: Float[Tensor, "B M C"]
    selected: Int[Tensor, "B T K"] | None = None
    coarse: Int[Tensor, "B T N"] | None = None  # blocks of entries, counted in the document

    def last(self, ctx: Context) -> "Shared":
        """Returns what is left for the last valid new token of each sequence."""
        left = (None if x is None else ctx.last_of(x) for x in (self.selected, self.coarse))
        return Shared(self.entries, self.index_keys, *left)


class Visible(NamedTuple):
    """The entries first .. end - 1 that each new token sees: the complete ones of its document."""

    first: Int[Tensor, "#B T"]
    end: Int[Tensor, "#B T"]
    packed: bool = False  # whether a sequence may have several documents; else `first` is 0

    def mask(self, count: int, run: slice) -> Bool[Tensor, "#B T M"]:
        """Returns which of `count` entries the new tokens `run` see."""
        entry = torch.arange(count, device=self.end.device)
        return (entry >= self.first[:, run, None]) & (entry < self.end[:, run, None])

    def spans(self, ctx: Context, ratio: int) -> Int[Tensor, "B T 2"] | None:
        """Returns the first entry of each new token's document, and the one after its last.

        None where every sequence is one document of all columns.
        """
        tokens = ctx.spans()
        if tokens is None:
            return None
        counts = (tokens[..., 1] - tokens[..., 0]) // ratio
        return torch.stack([self.first.expand_as(counts), self.first + counts], dim=-1)


def visible_entries(ctx: Context, ratio: int) -> Visible:
    """Returns the entries that the new tokens see, in blocks of this ratio."""
    if ctx.key_positions is None:
        # Where all sequences have the same length, one serves the batch.
        columns = ctx.columns if ctx.starts is not None else ctx.columns[:1]
        end = (columns + 1) // ratio
        return Visible(torch.zeros_like(end), end)
    complete = (ctx.key_positions % ratio == ratio - 1).cumsum(1)
    end = complete.gather(1, ctx.columns)
    return Visible(end - (ctx.positions + 1) // ratio, end, packed=True)


class NewEntries(NamedTuple):
    """The entries that new tokens complete, E a sequence: their last tokens and numbers."""

    steps: Int[Tensor, "#B E"]  # the new token that completes each
    numbers: Int[Tensor, "#B E"]  # of the entries
    positions: Int[Tensor, "#B E"]  # of their first tokens, in the document
    complete: Bool[Tensor, "#B E"]  # False where a sequence completes fewer than E

    def of(self, x: Float[Tensor, "B T P"]) -> Float[Tensor, "B E P"]:
        """Returns, of the values of all new tokens, those of the tokens that complete an entry."""
        index = self.steps.expand(len(x), -1)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def new_entries(ctx: Context, ratio: int) -> NewEntries:
    """Returns the entries that the new tokens complete, at most E in each sequence."""
    end = visible_entries(ctx, ratio).end
    positions = ctx.positions[: len(end)]
    if ratio == 1:
        steps = torch.arange(positions.shape[1], device=end.device).expand_as(positions)
        return NewEntries(steps, end - 1, positions, torch.ones_like(steps, dtype=torch.bool))
    completes = positions % ratio == ratio - 1
    if ctx.starts is None and ctx.key_positions is None:
        every = torch.arange(end.shape[1], device=end.device)
        steps = every[None, (-ctx.past - 1) % ratio :: ratio]
    else:
        # Completing tokens first, in their order.
        count = int(completes.sum(1).max())
        steps = (~completes).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return NewEntries(
        steps,
        end.gather(1, steps) - 1,
        positions.gather(1, steps) - (ratio - 1),
        completes.gather(1, steps),
    )


def numbered(
    new: Float[Tensor, "B E P"], completed: NewEntries, ctx: Context, ratio: int
) -> Float[Tensor, "B M P"]:
    """Returns the entries by their numbers, without a cache; with their gradients."""
    if ctx.key_positions is None:
        return new
    total = ctx.key_count // ratio
    # What a sequence does not complete goes to one entry more, which is left out.
    index = completed.numbers.where(completed.complete, total)[..., None].expand_as(new)
    out = new.new_zeros(len(new), total + 1, new.shape[-1])
    return out.scatter(1, index, new)[:, :total]


@dataclass(eq=False)
class SourceCache(SharedKVCache):
    """The cache of a source: its entries, their keys, and the tokens of an incomplete entry."""

    entries: Blocks
    index_keys: Blocks
    pending: Recent | None = None  # [W_kv x | W_gate x] of the last ratio - 1 tokens


class PlainCompressor(nn.Module):
    """Pools groups of `ratio` tokens, which do not overlap, to one latent each."""

    def __init__(self, dim: int, width: int, ratio: int, eps: float) -> None:
        super().__init__()
        self.ratio = ratio
        self.wkv = nn.Linear(dim, width, bias=False)
        self.norm = RMSNorm(width, eps)
        self.wgate = nn.Linear(dim, width, bias=False) if ratio > 1 else None

    def forward(
        self, hidden: Float[Tensor, "B T D"], completed: NewEntries, ctx: Context
    ) -> Float[Tensor, "B E P"]:
        """Returns the latents of the entries that the new tokens complete, before their norm.

        Weights and sums of a group are in float32.
        """
        if self.wgate is None:
            return self.wkv(hidden)
        both = [self._project(linear, hidden) for linear in (self.wkv, self.wgate)]
        tokens = torch.cat(both, dim=-1)
        before = self.ratio - 1
        if ctx.cache is None:
            tokens = F.pad(tokens, (0, 0, before, 0))
        else:
            cache = ctx.cache.attention.pending
            earlier = cache.before(ctx, tokens)
            cache.store(tokens.detach(), ctx)
            tokens = torch.cat([earlier, tokens], dim=1)
        groups = [completed.of(tokens[:, j : j + hidden.shape[1]]) for j in range(self.ratio)]
        values, scores = torch.stack(groups, dim=2).chunk(2, dim=-1)  # [B, E, r, P]
        return (values * scores.softmax(2)).sum(2).to(hidden.dtype)

    def _project(self, linear: nn.Linear, hidden: Tensor) -> Tensor:
        """Projects in float32 at least, outside of autocast."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), linear.weight.to(dtype))


class SharedIndexer(nn.Module):
    """The indexer of a block that selects; a source has the keys, too.

    The parameters are named as in DeepSeek-V4.1's checkpoints.
    """

    def __init__(self, config: CSAConfig, dim: int, eps: float, has_keys: bool) -> None:
        super().__init__()
        self.config = config
        width = config.index_heads * config.index_dim
        self.wq_b = nn.Linear(config.q_lora_rank, width, bias=False)
        self.weights_proj = nn.Linear(dim, config.index_heads, bias=False)
        if has_keys:
            self.wk = nn.Linear(config.head_dim, config.index_dim, bias=False)
            self.k_norm = RMSNorm(config.index_dim, eps)

    def queries(self, latent: Float[Tensor, "B T R"]) -> Float[Tensor, "B T J C"]:
        """Projects the query latent to the queries of all index heads, not rotated yet."""
        return self.wq_b(latent).unflatten(-1, (self.config.index_heads, -1))

    def weights(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T J"]:
        """Returns the weight of each head, with both scales."""
        c = self.config
        return self.weights_proj(hidden) * (c.index_dim**-0.5 * c.index_heads**-0.5)


def shared_scores(
    query: Float[Tensor, "B T J C"], key: Float[Tensor, "B M C"], weights: Float[Tensor, "B T J"]
) -> Float[Tensor, "B T M"]:
    """Computes sum_j w_j relu(<q_j, k>), rounded where the tensors' dtype rounds each operation.

    A score that is rounded otherwise would select other entries.
    """
    with torch.autocast(query.device.type, enabled=False):
        products = (query.flatten(1, 2) @ key.mT).unflatten(1, query.shape[1:3])
        return (products.relu() * weights[..., None]).sum(2)


class TieRule(NamedTuple):
    """The rule by which some of equal scores are selected, and the record of where it decided."""

    rule: Literal["last", "topk"]
    noted: Ties | None = None  # the block's cache of it
    # The first entry of each query's document, and the one after its last, of which topk selects.
    # None: all entries.
    spans: Int[Tensor, "B T 2"] | None = None
    # Whether scores are sums of exact products, so that equal ones are equal in every call.
    exact: bool = False

    def of(self, run: slice, block: int | None = None) -> "TieRule":
        """Returns the rule of the queries `run`, for entries or for coarse blocks of them."""
        if self.spans is None:
            return self
        spans = self.spans[:, run]
        if block is not None:
            ends = -(-(spans[..., 1] - spans[..., 0]) // block)
            spans = torch.stack([torch.zeros_like(ends), ends], dim=-1)
        return self._replace(spans=spans)


def best(scores: Float[Tensor, "B T M"], count: int, ties: TieRule) -> Int[Tensor, "B T K"]:
    """Returns the indices of the `count` largest scores; -1 where there are fewer above -inf."""
    if ties.rule == "topk":
        index = scores.topk(min(count, scores.shape[-1]), dim=-1, sorted=False).indices
        if index.shape[-1]:
            tied = tied_queries(scores, index, ties.exact)
            if ties.noted is not None:
                ties.noted.note(tied)
            if ties.spans is not None:
                select_within(ties.spans, scores, index, tied)
    else:
        index = largest(scores.float(), count)
    return index.where(scores.gather(-1, index) > -torch.inf, -1)


class Coarse(NamedTuple):
    """Coarse blocks of `block` entries, counted from the first entry of each query's document."""

    block: int
    visible: Visible

    def of_entries(self, count: int, run: slice) -> Int[Tensor, "#B T M"]:
        """Returns the coarse block of each of `count` entries; below 0 before the document."""
        entry = torch.arange(count, device=self.visible.first.device)
        return (entry - self.visible.first[:, run, None]).div(self.block, rounding_mode="floor")

    def maxima(self, scores: Float[Tensor, "B T M"], run: slice) -> Float[Tensor, "B T N"]:
        """Returns the largest score of each block; inf for that of the last visible entry."""
        count = -(-scores.shape[-1] // self.block)
        if self.visible.packed:
            index = self.of_entries(scores.shape[-1], run).clamp_min(0).expand_as(scores)
            shape = (*scores.shape[:2], count)
            maxima = scores.new_full(shape, -torch.inf).scatter_reduce(-1, index, scores, "amax")
        else:
            padded = F.pad(scores, (0, count * self.block - scores.shape[-1]), value=-torch.inf)
            maxima = padded.unflatten(-1, (count, self.block)).amax(-1)
        seen = (self.visible.end - self.visible.first)[:, run, None]
        last = (seen - 1).div(self.block, rounding_mode="floor")
        return maxima.masked_fill(torch.arange(count, device=scores.device) == last, torch.inf)

    def mask(self, coarse: Int[Tensor, "B T N"], count: int, run: slice) -> Bool[Tensor, "B T M"]:
        """Returns which of `count` entries are in the blocks of each query."""
        blocks = -(-count // self.block)
        some = torch.zeros(*coarse.shape[:2], blocks + 1, dtype=torch.bool, device=coarse.device)
        some.scatter_(-1, coarse.where(coarse >= 0, blocks), True)
        some[..., blocks] = False
        index = self.of_entries(count, run)
        return some.gather(-1, index.where(index >= 0, blocks).expand(*coarse.shape[:2], -1))


class CSA2(SharedKV):
    """Attention to a window and to selected entries that a source has made."""

    def __init__(
        self, shares: CSA2Config, config: CSAConfig, dim: int, eps: float = 1e-6, index: int = 0
    ) -> None:
        """Builds the attention of block `index`; sources have a compressor, some an indexer."""
        ratio = shares.ratio(index)
        super().__init__(config, dim, eps, compresses=ratio > 0)
        self.shares = shares
        self.ratio = ratio
        self.rounds = shares.cache_formats != "none"
        source = ratio > 0 and index in shares.kv_sources
        self.compressor = PlainCompressor(dim, config.head_dim, ratio, eps) if source else None
        selects = ratio > 0 and index in shares.index_sources
        self.indexer = SharedIndexer(config, dim, eps, source) if selects else None
        candidate = shares.candidate_source
        self.selects_coarse = candidate == index
        self.within_coarse = candidate is not None and candidate < index

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> SharedKVCache:
        """Returns an empty cache; only a source stores more than its window."""
        window = Recent(self.config.window - 1)
        selects_as_topk = self.indexer is not None and self.config.ties == "topk"
        ties = Ties() if selects_as_topk else None
        if self.compressor is None:
            return SharedKVCache(window, ties=ties)
        pending = Recent(self.ratio - 1) if self.ratio > 1 else None
        entries, keys = (Blocks(self.ratio, self.ratio, capacity) for _ in range(2))
        return SourceCache(window, entries, keys, pending, ties=ties)

    def forward(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Attended:
        """Returns the output of the new tokens, an IndexerLoss, and what later blocks share.

        With `ctx.last_only` only the last token of each sequence has an output.
        """
        keys = self.keys(self.new_keys(hidden, ctx), ctx)
        shared = self.publish(hidden, ctx) if self.compressor is not None else ctx.shared
        if ctx.last_only:
            keys = last_window(keys, self.config.window, ctx)
            shared = None if shared is None else shared.last(ctx)
            hidden = ctx.last_of(hidden)
            ctx = ctx.last()
        latent = self.q_norm(self.wq_a(hidden))
        query = self.queries(latent, ctx)
        loss = None
        if self.indexer is not None:
            shared, loss = self.select_entries(hidden, latent, query, shared, ctx)
        out = self.attend_shared(query, keys, shared if self.ratio else None, ctx)
        return Attended(self.output(out, ctx), loss, shared)

    def queries(self, latent: Float[Tensor, "B T R"], ctx: Context) -> Float[Tensor, "B T H P"]:
        """Returns the rotated queries."""
        return self.turn(self.wq_b(latent).unflatten(-1, (self.config.heads, -1)), ctx)

    def new_keys(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B T P"]:
        """Returns the rotated keys of the new tokens, as they are cached."""
        keys = self.turn(self.kv_norm(self.wkv(hidden)), ctx)
        return rounded(keys, "fp8") if self.rounds else keys

    def publish(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Shared:
        """Compresses the new tokens; returns the entries of all tokens and their index keys."""
        assert self.compressor is not None and self.indexer is not None
        completed = new_entries(ctx, self.ratio)
        latents = self.compressor.norm(self.compressor(hidden, completed, ctx))
        new = rotate_entries(latents, completed, ctx)
        new = rounded(new, "nvfp4") if self.rounds else new
        with torch.set_grad_enabled(torch.is_grad_enabled() and ctx.indexer_warmup is not None):
            keys = self.indexer.k_norm(self.indexer.wk(latents.detach()))
            keys = rotate_entries(keys, completed, ctx)
            keys = rounded(keys, "mxfp4") if self.rounds else keys
        # The coarse blocks of an earlier source of this ratio stay.
        coarse = None if ctx.shared is None else ctx.shared.coarse
        if ctx.cache is None:
            entries, index_keys = (numbered(x, completed, ctx, self.ratio) for x in (new, keys))
        else:
            cache = ctx.cache.attention
            # Without documents, sequences of one length complete the same entries.
            same = ctx.starts is None and ctx.key_positions is None
            complete = None if same else completed.complete
            entries = cache.entries.put(new, completed.numbers, complete, ctx)
            index_keys = cache.index_keys.put(keys, completed.numbers, complete, ctx)
        return Shared(entries, index_keys, coarse=coarse)

    def select_entries(
        self,
        hidden: Float[Tensor, "B T D"],
        latent: Float[Tensor, "B T R"],
        query: Float[Tensor, "B T H P"],
        shared: Shared | None,
        ctx: Context,
    ) -> tuple[Shared, IndexerLoss | None]:
        """Selects entries for each new token, and coarse blocks where this block does.

        The IndexerLoss is that of the block's attention over the entries, if it is trained.
        """
        assert self.indexer is not None and shared is not None
        trained = ctx.indexer_warmup is not None
        selected = []
        blocks = []
        losses = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            asked = self.indexer.queries(latent.detach())
            asked = self.turn(asked, ctx)
            asked = rounded(asked, "mxfp4") if self.rounds else asked
            weights = self.indexer.weights(hidden.detach())
            visible = visible_entries(ctx, self.ratio)
            count = shared.entries.shape[1]
            cache = None if ctx.cache is None else ctx.cache.attention
            noted = None if cache is None else cache.ties
            # Products of rounded queries and keys have few bits, so equal tokens have equal scores.
            exact = self.rounds and asked.dtype == torch.float32
            ties = TieRule(self.config.ties, noted, visible.spans(ctx, self.ratio), exact)
            coarse = Coarse(self.shares.candidate_block, visible)
            for run in self.runs(asked, count):
                seen = visible.mask(count, run)
                all_scores = shared_scores(asked[:, run], shared.index_keys, weights[:, run])
                scores = all_scores.detach().masked_fill(~seen, -torch.inf)
                if self.within_coarse and shared.coarse is not None:
                    inside = coarse.mask(shared.coarse[:, run], count, run)
                    scores = scores.masked_fill(~inside, -torch.inf)
                if self.selects_coarse:
                    maxima = coarse.maxima(scores, run)
                    rule = ties.of(run, coarse.block)
                    blocks.append(best(maxima, self.shares.candidate_blocks, rule))
                # They rise, none first.
                selected.append(best(scores, self.config.top_k, ties.of(run)).sort(-1).values)
                if trained and count:
                    valid = None if ctx.valid is None else ctx.valid[:, run]
                    warmup = bool(ctx.indexer_warmup)
                    attended = query[:, run], shared.entries, self.scale, warmup
                    mask = entry_mask(selected[-1], count)
                    losses.append(entry_loss(all_scores, seen, mask, *attended, valid))
        shared = shared._replace(selected=torch.cat(selected, dim=1))
        shared = shared._replace(coarse=torch.cat(blocks, dim=1)) if blocks else shared
        return shared, mean_entry_loss(losses) if losses else None

    def runs(self, query: Float[Tensor, "B T J C"], count: int) -> Iterator[slice]:
        """Splits the queries into slices with at most SCORES scores of all heads."""
        batch, time, heads = query.shape[:3]
        step = max(1, SCORES // max(1, batch * heads * count))
        return (slice(start, min(start + step, time)) for start in range(0, time, step))

    def attend_shared(
        self,
        query: Float[Tensor, "B T H P"],
        keys: Float[Tensor, "B W P"],
        shared: Shared | None,
        ctx: Context,
    ) -> Float[Tensor, "B T H P"]:
        """Attends to the window and, in a block with entries, to those that are selected.

        While the indexers warm up it attends to every visible entry. Queries that see many times
        more entries than they select gather these; the others mask those that are not selected.
        """
        window = self.config.window
        time = query.shape[1]
        scale = self.scale
        sink = self.attn_sink
        document_ids = ctx.documents_before(window - 1)
        outs = []
        start = 0
        count = 0 if shared is None else shared.entries.shape[1]
        width = 0 if shared is None or shared.selected is None else shared.selected.shape[-1]
        gathers = not torch.is_grad_enabled() and count > GATHERING * width
        at_once = max(1, COPIED // max(1, width * query.shape[-1])) if gathers else QUERIES
        while start < time:
            run = slice(start, min(start + min(QUERIES, at_once), time))
            start = run.stop
            queries = query[:, run]
            key = keys[:, run.start : run.stop + window - 1]
            mask = window_mask(ctx, window, run, document_ids)
            if shared is None or shared.selected is None or not count:
                outs.append(attend_with_sink(queries, key, mask, sink, scale))
                continue
            selected = shared.selected[:, run]
            if gathers:
                copied = SelectedEntries(selected.clamp_min(0), selected >= 0)
                outs.append(
                    attend_gathered(queries, key, mask, shared.entries, copied, sink, scale)
                )
                continue
            if ctx.indexer_warmup:
                seen = visible_entries(ctx, self.ratio).mask(count, run)
            else:
                seen = entry_mask(selected, count)
            mask = torch.cat([x.expand(len(queries), -1, -1) for x in (mask, seen)], dim=-1)
            every = torch.cat([key, shared.entries.to(key.dtype)], dim=1)
            outs.append(attend_with_sink(queries, every, mask, sink, scale))
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]


def rotate_entries(
    x: Float[Tensor, "B E P"], completed: NewEntries, ctx: Context
) -> Float[Tensor, "B E P"]:
    """Rotates the last values of entries by the positions of their first tokens."""
    assert ctx.compressed_frequencies is not None, "a context without rope"
    angles = completed.positions[..., None].float() * ctx.compressed_frequencies
    cos, sin = (value * ctx.compressed_factor for value in (angles.cos(), angles.sin()))
    cos, sin = (value.expand(len(x), -1, -1) for value in (cos, sin))
    width = 2 * cos.shape[-1]
    rest, turned = x.split([x.shape[-1] - width, width], dim=-1)
    return torch.cat([rest, rotate(turned, cos, sin, interleaved=True)], dim=-1)


def entry_mask(selected: Int[Tensor, "B T K"], count: int) -> Bool[Tensor, "B T M"]:
    """Returns True at the entries whose numbers are selected, of the first `count`."""
    mask = torch.zeros(*selected.shape[:2], count + 1, dtype=torch.bool, device=selected.device)
    return mask.scatter_(-1, selected.where(selected >= 0, count), True)[..., :count]
