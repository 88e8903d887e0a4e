"""Attention to a window of keys that are also the values, and to compressed entries of all tokens.

    c      = norm(W_qa x)                          the query latent
    q_h    = rope(norm1(W_qb c)_h, t)              norm1 has no weight
    k_s    = rope(norm(W_kv x_s), s)               one head; the key of a token is also its value
    E_t    = {k_s : t - window < s <= t} and the compressed entries that t sees
    o_h    = sum_{k in E_t} p_h,k k                p_h: softmax over E_t and the head's sink
    out    = W_ob concat_g W_oa,g concat_{h in g} rope(o_h, -t)

rope rotates the last rope_dim values of a vector, in pairs (2i, 2i+1). A value is a key, which was
rotated by its position s; the output is rotated back by -t, so that it depends on s - t alone. The
sink is a learned logit that takes probability and has no value. The heads of a group share a
low-rank output projection.

    e_w    = rope(norm(sum_s g_s (W_c x_s)), r w)  entry w, of r tokens; seen by t if w < (t+1) // r
    g      = softmax_s(W_g x_s + ape_s)            for each value by itself, in float32
    HCA    s = r w .. r w + r - 1                  r = 128; every entry that t sees is in E_t
    CSA    s = r w - r .. r w + r - 1              r = 4; the first r tokens, of the entry before,
                                                   through one half of W_c, W_g and ape, the others
                                                   through the other; `top_k` entries are in E_t
    I[t,w] = sum_j v[t,j] relu(<q'_j[t], e'_w>)    the indexer's score: q' = rope(W_q' c),
                                                   v = W_v x (heads dim)^-1/2, e' as e of dim values
    loss   = mean_t KL(mean_h softmax(q_h . e) || softmax(I[t, .]))

The indexer is trained by the loss alone, from detached inputs, as in DSA (layers/dsa.py): during
its warm-up CSA attends to every entry that a token sees and the loss is over these, later both are
over the selected ones. Entries are counted from the start of each document.

DeepSeek-V4, section 2.3: compressed sparse attention (CSA) and heavily compressed attention (HCA).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.layers.cache import Bundle, Recent
from rorqual.layers.context import Attended, Context
from rorqual.layers.dsa import (
    IndexerLoss,
    LossSums,
    Ties,
    attention_target,
    index_scores,
    select_within,
    tied_queries,
)
from rorqual.layers.norm import RMSNorm
from rorqual.layers.rope import rotate
from rorqual.layers.sparse import Blocks
from rorqual.layers.top_k import largest
from rorqual.model_config import CSAConfig as CSAConfig

QUERIES = 64  # processed at a time: their window keys and scores stay in a core's cache
GATHERING = 3  # time of a gathered entry relative to one that is read in place
COPIED = 1 << 21  # numbers of entries gathered at a time


class GroupedLinear(nn.Module):
    """Maps each of `groups` equal parts of a vector by a matrix of its own, to `rank` values."""

    def __init__(self, width: int, rank: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(groups * rank, width // groups) * width**-0.5)

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T R"]:
        parts = x.unflatten(-1, (self.groups, -1)).flatten(0, 1).transpose(0, 1)  # [G, N, W / G]
        out = parts @ self.weight.unflatten(0, (self.groups, -1)).mT
        return out.transpose(0, 1).reshape(*x.shape[:2], -1)


@dataclass(eq=False)
class SharedKVCache(Bundle):
    """The cache of window attention: the keys of the last `window - 1` tokens."""

    window: Recent
    # Of a block with an indexer; None if its selection does not depend on the call.
    ties: Ties | None = field(default=None, kw_only=True)


@dataclass(eq=False)
class EntryCache(Bundle):
    """The cache of a compressor: its entries, and the tokens of which the next one is made."""

    tokens: Recent
    entries: Blocks


@dataclass(eq=False)
class HCACache(SharedKVCache):
    """The cache of window attention and of a compressor."""

    entries: EntryCache


@dataclass(eq=False)
class CSACache(HCACache):
    """The cache of window attention, of a compressor and of the indexer's."""

    index: EntryCache


class Entries(NamedTuple):
    """The compressed entries of each sequence, and which of them a token sees."""

    values: Float[Tensor, "B M P"]
    ratio: int  # tokens an entry
    index_keys: Float[Tensor, "B M I"] | None = None  # what the indexer scores in their place
    # Where documents are packed, the column of each entry's last token; beyond all columns for an
    # entry that does not exist. None: entry w ends at column ratio (w + 1) - 1.
    ends: Int[Tensor, "B M"] | None = None

    def reach(self, ctx: Context, run: slice) -> int:
        """Returns the number of first entries that include all that the new tokens `run` see."""
        if ctx.starts is not None or self.ends is not None:
            return self.values.shape[1]
        return (ctx.past + run.stop) // self.ratio

    def visible(self, ctx: Context, run: slice, count: int) -> Bool[Tensor, "#B T M"]:
        """Returns which of the first `count` entries the new tokens `run` see."""
        if self.ends is None:
            columns = ctx.columns[:, run] if ctx.starts is not None else ctx.columns[:1, run]
            entries = torch.arange(count, device=columns.device)
            return entries < (columns[..., None] + 1) // self.ratio
        assert ctx.key_document_ids is not None and ctx.document_ids is not None
        ends = self.ends[:, None, :count]
        columns = ends[:, 0].clamp_max(ctx.key_count - 1)
        theirs = ctx.key_document_ids.gather(1, columns)[:, None]
        same = theirs == ctx.document_ids[:, run, None]
        return same & (ends <= ctx.columns[:, run, None])

    def spans(self, ctx: Context) -> Int[Tensor, "B T 2"] | None:
        """Returns the first entry of each new token's document, and the one after its last.

        None where every sequence is one document of all columns.
        """
        tokens = ctx.spans()
        if tokens is None or self.ends is None:
            return None if tokens is None else tokens // self.ratio
        return torch.searchsorted(self.ends.contiguous(), tokens.flatten(1)).view_as(tokens)


class Pooled(NamedTuple):
    """Entries that the new tokens complete, before their norm."""

    values: Float[Tensor, "S N P"]  # S = B, or 1 where `sequences` says of which each is
    positions: Int[Tensor, "1 N"]  # of each entry's first token, in its document
    first: int  # number of the first entry, if they are the same ones in all sequences
    sequences: Int[Tensor, " N"] | None = None  # the sequence of each entry, and its number
    numbers: Int[Tensor, " N"] | None = None


class Compressor(nn.Module):
    """Compresses `ratio` tokens to one entry; the parameters are named as in DeepSeek-V4's.

    With `overlap` an entry is also made of the `ratio` tokens before: they go through the first
    half of the projections, and its tokens through the second.
    """

    def __init__(self, dim: int, width: int, ratio: int, overlap: bool, eps: float) -> None:
        super().__init__()
        self.width = width
        self.ratio = ratio
        self.overlap = overlap
        self.span = 2 * ratio if overlap else ratio  # tokens that an entry is made of
        size = 2 * width if overlap else width
        self.wkv = nn.Linear(dim, size, bias=False)
        self.wgate = nn.Linear(dim, size, bias=False)
        self.ape = nn.Parameter(torch.zeros(ratio, size))
        self.norm = RMSNorm(width, eps)

    def new_cache(self, capacity: int) -> EntryCache:
        """Returns an empty cache for `capacity` tokens."""
        return EntryCache(Recent(self.span - 1), Blocks(self.ratio, self.ratio, capacity))

    def pool(
        self, hidden: Float[Tensor, "B T D"], ctx: Context, cache: EntryCache | None
    ) -> Pooled:
        """Returns the weighted sums of the tokens of every entry that the new tokens complete."""
        ratio = self.ratio
        time = hidden.shape[1]
        tokens = torch.cat([self.wkv(hidden), self.wgate(hidden)], dim=-1)
        aligned = ctx.starts is None and ctx.key_document_ids is None
        first = ctx.past // ratio
        last = (ctx.past + time) // ratio
        if cache is None:
            tokens = F.pad(tokens, (0, 0, self.span - 1, 0))
        elif aligned and first == last:
            # No entry is completed.
            cache.tokens.store(tokens.detach(), ctx)
        else:
            before = cache.tokens.before(ctx, tokens)
            cache.tokens.store(tokens.detach(), ctx)
            tokens = torch.cat([before, tokens], dim=1)
        # The entry that new token t completes is made of tokens[:, t : t + span].
        if aligned:
            numbers = torch.arange(first, last, device=hidden.device)
            if first == last:
                empty = tokens.new_empty(len(hidden), 0, self.width)
                return Pooled(empty, numbers[None], first)
            start = -(ctx.past + 1) % ratio
            spans = tokens[:, start:].unfold(1, self.span, ratio).transpose(-1, -2)
            values = self.gated_sums(spans, (numbers == 0)[None, :, None, None])
            return Pooled(values, numbers[None] * ratio, first)
        sequences, new = ((ctx.positions + 1) % ratio == 0).nonzero(as_tuple=True)
        spans = tokens[
            sequences[:, None], new[:, None] + torch.arange(self.span, device=new.device)
        ]
        positions = ctx.positions[sequences, new] - (ratio - 1)
        columns = ctx.columns[sequences, new]
        values = self.gated_sums(spans, (positions == 0)[:, None, None])
        number = (columns + 1) // ratio - 1
        if ctx.key_positions is not None:
            number = self.numbers(ctx.key_positions)[sequences, columns]
        return Pooled(values[None], positions[None], 0, sequences, number)

    def gated_sums(
        self, tokens: Float[Tensor, "*B S E"], first: Bool[Tensor, "*#B 1 1"]
    ) -> Float[Tensor, "*B P"]:
        """Sums the tokens of each entry by their gates; a `first` one has none before its own."""
        ratio = self.ratio
        width = self.width
        values, gates = tokens.chunk(2, dim=-1)
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
        if not self.overlap:
            weights = (gates + self.ape.to(gates.dtype)).softmax(-2)
            return (values * weights.to(values.dtype)).sum(-2)
        before = gates[..., :ratio, :width]
        current = gates[..., ratio:, width:]
        ape = self.ape.to(gates.dtype)
        before = (before + ape[:, :width]).masked_fill(first, -torch.inf)
        weights = torch.cat([before, current + ape[:, width:]], dim=-2).softmax(-2).to(values.dtype)
        values = torch.cat([values[..., :ratio, :width], values[..., ratio:, width:]], dim=-2)
        return (values * weights).sum(-2)

    def store(
        self,
        values: Float[Tensor, "S N P"],
        pooled: Pooled,
        ctx: Context,
        cache: EntryCache | None,
    ) -> Float[Tensor, "B M P"]:
        """Rotates and stores new entries, the norms of `pooled`; returns those of all tokens."""
        total = ctx.key_count // self.ratio
        batch = len(ctx.positions)
        stored = None if cache is None else cache.entries.values.stored
        if pooled.sequences is None and not values.shape[1] and stored is not None and total:
            return stored[:, :total]
        assert ctx.compressed_frequencies is not None
        angles = pooled.positions[..., None].float() * ctx.compressed_frequencies
        cos, sin = (x * ctx.compressed_factor for x in (angles.cos(), angles.sin()))
        cos, sin = (x.expand(len(values), -1, -1) for x in (cos, sin))
        rest, turned = values.split([self.width - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
        values = torch.cat([rest, rotate(turned, cos, sin, interleaved=True)], dim=-1)
        if cache is None:
            if pooled.sequences is None:
                return values
            entries = values.new_zeros(batch, total, self.width)
            return entries.index_put((pooled.sequences, pooled.numbers), values[0])
        like = values.new_empty(batch, 0, self.width)
        buffer = cache.entries.values.reserve(like, total)
        # The dtype may differ from that of the first call, if autocast was switched since.
        new = values.detach().to(buffer.dtype)
        if pooled.sequences is None:
            buffer[:, pooled.first : total] = new
        else:
            buffer[pooled.sequences, pooled.numbers] = new[0]
        return values if pooled.sequences is None and not ctx.past else buffer[:, :total]

    def numbers(self, key_positions: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """Returns the number of the last entry that each token or one before it completes."""
        return ((key_positions + 1) % self.ratio == 0).cumsum(1) - 1

    def ends(self, ctx: Context) -> Int[Tensor, "B M"] | None:
        """Returns the column of each entry's last token, where documents are packed."""
        if ctx.key_positions is None:
            return None
        total = ctx.key_count // self.ratio
        numbers = self.numbers(ctx.key_positions)
        completes = (ctx.key_positions + 1) % self.ratio == 0
        columns = torch.arange(ctx.key_count, device=numbers.device).expand_as(numbers)
        ends = torch.full_like(numbers[:, : total + 1], ctx.key_count)
        return ends.scatter(1, numbers.where(completes, total), columns)[:, :total]


class SharedKV(nn.Module):
    """Window attention with sinks, whose keys are also its values; one key head for all.

    The parameters are named as in DeepSeek-V4's checkpoints. Subclasses add compressed entries:
    they override `compressed` and `select`.
    """

    def __init__(self, config: CSAConfig, dim: int, eps: float = 1e-6, compresses: bool = False):
        """Builds the projections; with `compresses` the rope is that of blocks with entries."""
        super().__init__()
        self.config = config
        self.eps = eps
        self.compresses = compresses
        self.rope_dim = config.rope_dim
        self.scale = config.head_dim**-0.5
        width = config.heads * config.head_dim
        self.wq_a = nn.Linear(dim, config.q_lora_rank, bias=False)
        self.q_norm = RMSNorm(config.q_lora_rank, eps)
        self.wq_b = nn.Linear(config.q_lora_rank, width, bias=False)
        self.wkv = nn.Linear(dim, config.head_dim, bias=False)
        self.kv_norm = RMSNorm(config.head_dim, eps)
        self.attn_sink = nn.Parameter(torch.zeros(config.heads))
        self.wo_a = GroupedLinear(width, config.o_lora_rank, config.groups)
        self.wo_b = nn.Linear(config.groups * config.o_lora_rank, dim, bias=False)

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> SharedKVCache:
        """Returns an empty cache; memory is allocated at the first token."""
        return SharedKVCache(Recent(self.config.window - 1))

    def forward(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Attended:
        """Returns the output of the new tokens, and an IndexerLoss if an indexer is trained.

        With `ctx.last_only` only the last token of each sequence has an output.
        """
        keys = self.keys(self.new_keys(hidden, ctx), ctx)
        entries = self.compressed(hidden, ctx)
        index_keys = self.index_keys(hidden, ctx)
        if entries is not None and index_keys is not None:
            entries = entries._replace(index_keys=index_keys)
        if ctx.last_only:
            keys = last_window(keys, self.config.window, ctx)
            hidden = ctx.last_of(hidden)
            ctx = ctx.last()
        latent = self.q_norm(self.wq_a(hidden))
        query = self.queries(latent, ctx)
        selection = self.select(hidden, latent, entries, ctx)
        out, loss = self.attend(query, keys, entries, selection, ctx)
        return Attended(self.output(out, ctx), loss)

    def queries(self, latent: Float[Tensor, "B T R"], ctx: Context) -> Float[Tensor, "B T H P"]:
        """Returns the rotated queries, each head normed without a weight before."""
        query = self.wq_b(latent).unflatten(-1, (self.config.heads, -1))
        return self.turn(unweighted_norm(query, self.eps), ctx)

    def new_keys(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B T P"]:
        """Returns the rotated keys of the new tokens, as they are cached."""
        return self.turn(self.kv_norm(self.wkv(hidden)), ctx)

    def keys(self, new: Float[Tensor, "B T P"], ctx: Context) -> Float[Tensor, "B W P"]:
        """Returns the keys of the window - 1 tokens before the new ones, and of those.

        Before the start of a sequence they are zeros and mean nothing.
        """
        if ctx.cache is None:
            return F.pad(new, (0, 0, self.config.window - 1, 0))
        return ctx.cache.attention.window.extend(new, ctx)

    def compressed(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Entries | None:
        """Returns the compressed entries of all tokens; here None, because there are none."""
        return None

    def index_keys(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Tensor | None:
        """Returns what an indexer scores in place of the entries; here None."""
        return None

    def select(
        self,
        hidden: Float[Tensor, "B T D"],
        latent: Float[Tensor, "B T R"],
        entries: Entries | None,
        ctx: Context,
    ) -> "EntrySelection | None":
        """Returns what selects entries for each query; None if every visible one is attended to."""
        return None

    def attend(
        self,
        query: Float[Tensor, "B T H P"],
        keys: Float[Tensor, "B W P"],
        entries: Entries | None,
        selection: "EntrySelection | None",
        ctx: Context,
    ) -> tuple[Float[Tensor, "B T H P"], IndexerLoss | None]:
        """Attends to the window and to the entries; returns an IndexerLoss if one is trained.

        Queries that see many times more entries than they select gather these; the others mask
        those that are not selected.
        """
        window = self.config.window
        time = query.shape[1]
        scale = self.scale
        sink = self.attn_sink
        document_ids = ctx.documents_before(window - 1)
        graded = torch.is_grad_enabled()
        outs = []
        losses = []
        start = 0
        while start < time:
            run = slice(start, min(start + QUERIES, time))
            count = 0 if entries is None else entries.reach(ctx, run)
            gathers = not graded and selection is not None and selection.gathers(count)
            if selection is not None and gathers:
                at_once = max(1, COPIED // (selection.top_k * query.shape[-1]))
                run = slice(start, min(start + at_once, run.stop))
            start = run.stop
            queries = query[:, run]
            key = keys[:, run.start : run.stop + window - 1]
            # A single token in sequences of the same length sees all that there is.
            all_seen = time == 1 and ctx.mask is None and ctx.past >= window - 1
            mask = None if all_seen else window_mask(ctx, window, run, document_ids)
            if entries is None or not count:
                outs.append(attend_with_sink(queries, key, mask, sink, scale))
                continue
            values = entries.values[:, :count]
            seen = None if all_seen else entries.visible(ctx, run, count)
            selecting = selection is not None and count > selection.top_k
            if mask is None and not selecting and ctx.indexer_warmup is None:
                key = torch.cat([key, values.to(key.dtype)], dim=1)
                outs.append(attend_with_sink(queries, key, None, sink, scale))
                continue
            if mask is None or seen is None:
                mask = window_mask(ctx, window, run, document_ids)
                seen = entries.visible(ctx, run, count)
            if selection is not None and gathers:
                selected = selection.select(selection.scores(run, count), seen, run)
                outs.append(
                    attend_gathered(queries, key, mask, entries.values, selected, sink, scale)
                )
                continue
            if selection is not None:
                if ctx.indexer_warmup is not None:
                    scores = selection.scores(run, count)
                    selected_mask = selection.mask(selection.select(scores, seen, run), count)
                    valid = None if ctx.valid is None else ctx.valid[:, run]
                    heads = queries, values, scale, ctx.indexer_warmup
                    losses.append(entry_loss(scores, seen, selected_mask, *heads, valid))
                    seen = seen if ctx.indexer_warmup else selected_mask
                elif count > selection.top_k:
                    with torch.no_grad():
                        selected = selection.select(selection.scores(run, count), seen, run)
                    seen = selection.mask(selected, count)
            both = torch.broadcast_tensors(mask[..., :1], seen[..., :1])[0].shape[:2]
            mask = torch.cat([mask.expand(*both, -1), seen.expand(*both, -1)], dim=-1)
            key = torch.cat([key, values.to(key.dtype)], dim=1)
            outs.append(attend_with_sink(queries, key, mask, sink, scale))
        out = torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]
        return out, mean_entry_loss(losses) if losses else None

    def output(self, out: Float[Tensor, "B T H P"], ctx: Context) -> Float[Tensor, "B T D"]:
        """Rotates the heads' outputs back and projects them, first in groups."""
        return self.wo_b(self.wo_a(self.turn(out, ctx, back=True).flatten(2)))

    def turn(self, x: Tensor, ctx: Context, back: bool = False) -> Tensor:
        """Rotates the last rope_dim values of each vector by its token's position, or back."""
        cos, sin = (
            (ctx.compressed_cos, ctx.compressed_sin) if self.compresses else (ctx.cos, ctx.sin)
        )
        assert cos is not None and sin is not None, "a context without rope"
        rest, turned = x.split([x.shape[-1] - self.rope_dim, self.rope_dim], dim=-1)
        turned = rotate(turned, cos, -sin if back else sin, interleaved=True)
        return torch.cat([rest, turned], dim=-1)


class HCA(SharedKV):
    """Window attention, and attention to every entry of a compressor."""

    overlap = False

    def __init__(self, config: CSAConfig, dim: int, eps: float = 1e-6):
        super().__init__(config, dim, eps, compresses=True)
        ratio = config.ratio if self.overlap else config.heavy_ratio
        self.compressor = Compressor(dim, config.head_dim, ratio, self.overlap, eps)

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> HCACache:
        """Returns an empty cache for `capacity` tokens."""
        window = Recent(self.config.window - 1)
        return HCACache(window, self.compressor.new_cache(capacity))

    def compressed(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Entries:
        """Compresses the new tokens and returns the entries of all tokens."""
        cache = ctx.cache
        compressor = self.compressor
        cache = None if cache is None else cache.attention.entries
        pooled = compressor.pool(hidden, ctx, cache)
        normed = compressor.norm(pooled.values) if pooled.values.shape[1] else pooled.values
        values = compressor.store(normed, pooled, ctx, cache)
        return Entries(values, compressor.ratio, ends=compressor.ends(ctx))


class Indexer(nn.Module):
    """Scores entries for each token by keys of its own compressor; trained by its loss alone."""

    def __init__(self, config: CSAConfig, dim: int, eps: float) -> None:
        super().__init__()
        self.config = config
        self.wq_b = nn.Linear(config.q_lora_rank, config.index_heads * config.index_dim, bias=False)
        self.weights_proj = nn.Linear(dim, config.index_heads, bias=False)
        self.compressor = Compressor(dim, config.index_dim, config.ratio, True, eps)


class CSA(HCA):
    """Window attention, and attention to the entries that an indexer selects."""

    overlap = True

    def __init__(self, config: CSAConfig, dim: int, eps: float = 1e-6):
        super().__init__(config, dim, eps)
        self.indexer = Indexer(config, dim, eps)

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> CSACache:
        """Returns an empty cache for `capacity` tokens."""
        compressors = self.compressor, self.indexer.compressor
        caches = (compressor.new_cache(capacity) for compressor in compressors)
        ties = Ties() if self.config.ties == "topk" else None
        return CSACache(Recent(self.config.window - 1), *caches, ties=ties)

    def index_keys(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B M I"]:
        """Returns the indexer's keys of all entries, from its own compressor of detached inputs."""
        cache = ctx.cache
        compressor = self.indexer.compressor
        cache = None if cache is None else cache.attention.index
        pooled = compressor.pool(hidden.detach(), ctx, cache)
        normed = compressor.norm(pooled.values) if pooled.values.shape[1] else pooled.values
        return compressor.store(normed, pooled, ctx, cache)

    def select(
        self,
        hidden: Float[Tensor, "B T D"],
        latent: Float[Tensor, "B T R"],
        entries: Entries | None,
        ctx: Context,
    ) -> "EntrySelection":
        """Returns the indexer's queries and head weights of the new tokens, and its keys.

        No gradient flows to the inputs. The weights include both scales, as a positive factor
        passes through relu.
        """
        assert entries is not None and entries.index_keys is not None
        c = self.config
        indexer = self.indexer
        query = indexer.wq_b(latent.detach()).unflatten(-1, (c.index_heads, -1))
        weights = indexer.weights_proj(hidden.detach()).float()
        weights = weights * (c.index_heads * c.index_dim) ** -0.5
        selection = EntrySelection(self.turn(query, ctx), weights, entries.index_keys, c.top_k)
        if c.ties == "last":
            return selection
        ties = None if ctx.cache is None else ctx.cache.attention.ties
        return selection._replace(as_topk=True, spans=entries.spans(ctx), ties=ties)


class SelectedEntries(NamedTuple):
    """The entries that each query of a run selects."""

    numbers: Int[Tensor, "B T K"]
    real: Bool[Tensor, "B T K"]  # False where a query sees fewer than it may select


class EntrySelection(NamedTuple):
    """Scores and selects entries for the queries of a call, one run of them at a time."""

    query: Float[Tensor, "B T J I"]
    weights: Float[Tensor, "B T J"]
    keys: Float[Tensor, "B M I"]
    top_k: int  # entries that a query may select
    as_topk: bool = False  # of equal scores those of torch.topk are selected, not the last ones
    # With `as_topk`: the first entry of each query's document, and the one after its last, of which
    # topk selects. None: all entries.
    spans: Int[Tensor, "B T 2"] | None = None
    ties: Ties | None = None  # where queries are recorded whose selection `as_topk` decided

    def gathers(self, count: int) -> bool:
        """Returns whether copying the selected of `count` entries costs less than a mask."""
        return count > GATHERING * self.top_k

    def scores(self, run: slice, count: int) -> Float[Tensor, "B T M"]:
        """Computes the scores of the first `count` entries for the queries `run`."""
        return index_scores(self.query[:, run], self.keys[:, :count], self.weights[:, run])

    def select(
        self, scores: Float[Tensor, "B T M"], visible: Bool[Tensor, "#B T M"], run: slice
    ) -> SelectedEntries:
        """Returns the visible entries of largest score of the queries `run`."""
        scores = scores.detach().masked_fill(~visible, -torch.inf)
        if self.as_topk:
            # Which of equal scores torch.topk selects depends on the number of all.
            scores = F.pad(scores, (0, self.keys.shape[1] - scores.shape[-1]), value=-torch.inf)
            index = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).indices
            tied = tied_queries(scores, index)
            if self.ties is not None:
                self.ties.note(tied)
            if self.spans is not None:
                select_within(self.spans[:, run], scores, index, tied)
        else:
            index = largest(scores, self.top_k)
        return SelectedEntries(index, scores.gather(-1, index) > -torch.inf)

    def mask(self, selected: SelectedEntries, count: int) -> Bool[Tensor, "B T M"]:
        """Returns True at those of the first `count` entries that `select` selected."""
        real = selected.real
        mask = real.new_zeros(*real.shape[:2], self.keys.shape[1])
        return mask.scatter_(-1, selected.numbers, real)[..., :count]


def entry_loss(
    scores: Float[Tensor, "B T M"],
    visible: Bool[Tensor, "#B T M"],
    selected_mask: Bool[Tensor, "B T M"],
    query: Float[Tensor, "B T H P"],
    values: Float[Tensor, "B M P"],
    scale: float,
    indexer_warmup: bool,
    valid: Bool[Tensor, "B T"] | None,
) -> LossSums:
    """Sums KL(attention over the entries || softmax(scores)) over the queries of a run.

    It is over every visible entry in the warm-up, later over the selected ones. The
    attention is the mean of the heads' and gets no gradient.
    """
    over = visible if indexer_warmup else selected_mask
    with torch.no_grad():
        key = values.detach()[:, :, None].expand(-1, -1, query.shape[2], -1)
        masks = visible[:, None], selected_mask[:, None]
        target = attention_target(query.detach(), key, *masks, scale, indexer_warmup)
    share = target.probabilities
    log = scores.masked_fill(~over, torch.finfo(scores.dtype).min).log_softmax(-1)
    terms = torch.special.xlogy(share, share) - share * log.masked_fill(~over, 0.0)
    number = visible.sum(-1)
    counts = (number > 0).expand_as(target.captured).float()
    counts = counts if valid is None else counts * valid
    selecting = counts * (number > selected_mask.sum(-1))
    # A query that sees no entry counts as none.
    equal = over.sum(-1).clamp_min(1).log()
    uniform = torch.special.xlogy(share, share).sum(-1) + equal
    return LossSums(
        loss=(counts * terms.sum(-1)).sum(),
        captured=(selecting * target.captured).sum(),
        uniform=(counts * uniform).sum(),
        queries=counts.sum(),
        selecting=selecting.sum(),
    )


def mean_entry_loss(losses: list[LossSums]) -> IndexerLoss:
    """Returns the means over the queries of all runs."""
    return LossSums(*(torch.stack(sums).sum() for sums in zip(*losses, strict=True))).mean()


def unweighted_norm(x: Float[Tensor, "*B P"], eps: float) -> Float[Tensor, "*B P"]:
    """Computes x / sqrt(mean(x^2) + eps), the root in float32."""
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    return x * (squares.mean(-1, keepdim=True) + eps).rsqrt().to(x.dtype)


def window_mask(
    ctx: Context, window: int, run: slice, document_ids: Int[Tensor, "B W"] | None
) -> Bool[Tensor, "#B T W2"]:
    """Returns which keys of `SharedKV.keys`, from run.start on, the new tokens `run` see.

    `document_ids` are those of all these keys, -1 where there is none; None without documents.
    """
    count = run.stop - run.start
    device = ctx.positions.device
    behind = torch.arange(count, device=device)[:, None] + window - 1
    behind = behind - torch.arange(count + window - 1, device=device)  # [T, W2] tokens
    inside = ((behind >= 0) & (behind < window))[None]
    if document_ids is not None:
        theirs = document_ids[:, run.start : run.stop + window - 1]
        return inside & (theirs[:, None] == theirs[:, window - 1 :, None])
    # There is no key before column 0.
    columns = ctx.columns[:, run] if ctx.starts is not None else ctx.columns[:1, run]
    return inside & (behind <= columns[..., None])


def last_window(keys: Float[Tensor, "B W P"], window: int, ctx: Context) -> Float[Tensor, "B W2 P"]:
    """Returns the `window` keys up to the last valid new token of each sequence."""
    if ctx.lengths is None:
        return keys[:, -window:]
    first = (ctx.lengths - 1).clamp_min(0)
    index = first[:, None] + torch.arange(window, device=keys.device)
    return keys[torch.arange(len(keys), device=keys.device)[:, None], index]


def attend_with_sink(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L P"],
    mask: Bool[Tensor, "#B T L"] | None,
    sink: Float[Tensor, " H"],
    scale: float,
) -> Float[Tensor, "B T H P"]:
    """Attends to keys that are also the values, with one logit more for each head, its sink.

    Without a mask every query sees every key.
    """
    logits = ((query * scale).flatten(1, 2) @ key.mT).unflatten(1, query.shape[1:3])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        # In place: the product's gradient does not need its result.
        logits = logits.masked_fill_(~mask[:, :, None], -torch.inf)
    sinks = sink.to(logits.dtype)[:, None].expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
    return (weights.to(key.dtype).flatten(1, 2) @ key).view_as(query)


def attend_gathered(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L P"],
    mask: Bool[Tensor, "#B T L"],
    values: Float[Tensor, "B M P"],
    selected: SelectedEntries,
    sink: Float[Tensor, " H"],
    scale: float,
) -> Float[Tensor, "B T H P"]:
    """Attends to window keys and to copies of the selected ones of the entries `values`."""
    numbers = selected.numbers
    # Gathering from a view of the cache, all sequences at once, would copy it whole.
    copies = [one.index_select(0, i.flatten()) for one, i in zip(values, numbers, strict=True)]
    entries = torch.stack(copies).unflatten(1, numbers.shape[1:]).to(key.dtype)  # [B, T, K, P]
    query = query * scale
    width = key.shape[1]
    logits_of_window = (query.flatten(1, 2) @ key.mT).unflatten(1, query.shape[1:3])
    logits = torch.cat([logits_of_window, query @ entries.mT], dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    seen = torch.cat([mask.expand(len(numbers), -1, -1), selected.real], dim=-1)
    logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
    sinks = sink.to(logits.dtype)[:, None].expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1].to(key.dtype)
    out = (weights[..., :width].flatten(1, 2) @ key).view_as(query)
    return out + weights[..., width:] @ entries
