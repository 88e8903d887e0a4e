"""Selects the keys that each query attends to with a lightning indexer, and trains the indexer.

    I[t, s] = heads^-1/2 sum_j w[t, j] relu(dim^-1/2 <q_j[t], k[s]>)        float32
    q_j     = rope(W_q c)_j    k = rope(layer_norm(W_k x))    w = W_w x      c: MLA's query latent
    S[t]    = the `top_k` keys of largest I[t, .] among those t may see; of equal ones see `ties`
    loss    = mean_t KL(mean_h p_h[t, .] || softmax(I[t, .]))    p_h: probabilities of MLA's head h

This is DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv 2512.02556). The indexer's rope rotates the
pairs (i, i + rope/2) of the first rope_dim values, unlike MLA's, or (2i, 2i + 1) if it is
`interleaved` (GLM). The selection carries no gradient; the indexer is trained by the loss alone,
from detached inputs. During the dense warm-up (1000 steps) the loss is over every key and MLA
attends to all of them; then it is over S and MLA attends to S, where p_h are its probabilities.

A block of `shared` has no indexer and attends to the S of the nearest block before that has one
(GLM, arXiv 2603.12201). S then leaves the block in Aux and enters the next as ctx.shared.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rorqual.kernels import kernel
from rorqual.layers.attend import attend, attend_shared
from rorqual.layers.attention import MLA, MLACache, visibility
from rorqual.layers.cache import Appended, Lengths
from rorqual.layers.context import Attended, Context
from rorqual.layers.context import IndexerLoss as IndexerLoss
from rorqual.layers.rope import rotate
from rorqual.layers.sparse import SMALL_BATCH
from rorqual.layers.top_k import largest
from rorqual.model_config import DSAConfig as DSAConfig
from rorqual.model_config import MLAConfig, RopeConfig

QUERIES = 512  # processed at a time, at most
SCORES = 1 << 23  # scores in memory at a time: 32 MiB of float32
GATHERING = 2.0  # time of a gathered key relative to one that is read in place
COPIED = 1 << 21  # numbers of latents gathered at a time


def mean_indexer_loss(indexer_losses: list[IndexerLoss]) -> IndexerLoss | None:
    """Averages over the layers; returns None if the list is empty."""
    return (
        IndexerLoss(*(torch.stack(values).mean() for values in zip(*indexer_losses, strict=True)))
        if indexer_losses
        else None
    )


class Indexer(nn.Module):
    """The lightning indexer; its parameters are named as in DeepSeek-V3.2's checkpoints."""

    def __init__(self, config: DSAConfig, mla: MLAConfig, dim: int):
        super().__init__()
        config.check_rope_dim(mla.rope_dim)
        self.config = config
        self.rope_dim = mla.rope_dim
        self.wq_b = nn.Linear(mla.q_lora_rank or dim, config.heads * config.dim, bias=False)
        self.wk = nn.Linear(dim, config.dim, bias=False)
        self.k_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.weights_proj = nn.Linear(dim, config.heads, bias=False)

    def keys(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B L P"]:
        """Returns k of every token, cached ones first, and appends the new ones to the cache."""
        new = self._rotated(self.k_norm(self.wk(hidden.detach())), ctx)
        if ctx.cache is None:
            return new
        cached = ctx.cache.attention.index_keys.append(new, ctx)
        return cached if ctx.past else new

    def select(
        self,
        hidden: Float[Tensor, "B T D"],
        query_latent: Float[Tensor, "B T R"],
        key: Float[Tensor, "B L P"],
        ctx: Context,
    ) -> "IndexerSelection":
        """Returns q and w of the new tokens with the keys of all, as an IndexerSelection.

        No gradient flows to the inputs. w includes both scales, dim^-1/2 heads^-1/2: a positive
        factor passes through relu, so it can multiply the few weights in place of the many scores.
        """
        query = self.wq_b(query_latent.detach()).unflatten(-1, (self.config.heads, -1))
        weights = (
            self.weights_proj(hidden.detach()).float()
            * (self.config.heads * self.config.dim) ** -0.5
        )
        # With one document a sequence the columns of the queries say which keys they see.
        ragged = ctx.starts is not None and ctx.key_document_ids is None
        ends = ctx.columns + 1 if ragged else None
        asked = self._rotated(query, ctx), weights, key
        selection = IndexerSelection(*asked, ctx.mask, self.config.top_k, ends)
        if self.config.ties == "last":
            return selection
        cached = None if ctx.cache is None else ctx.cache.attention.ties
        return selection._replace(ties=key.shape[1], spans=ctx.spans(), cached_ties=cached)

    def _rotated(self, x: Tensor, ctx: Context) -> Tensor:
        """Rotates the first rope_dim values by the position of each token; the others stay."""
        turned, rest = x.split([self.rope_dim, self.config.dim - self.rope_dim], dim=-1)
        assert ctx.cos is not None and ctx.sin is not None
        turned = rotate(turned, ctx.cos, ctx.sin, interleaved=self.config.interleaved)
        return torch.cat([turned, rest], dim=-1)


class Ties:
    """Records whether torch.topk had to choose among keys of score 0 (`tied_queries`).

    Which it takes depends on the number of columns. So a model that selects as transformers' models
    do may select other keys for the cached tokens when there are more tokens; it then computes them
    again (LanguageModel.hidden).
    """

    def __init__(self) -> None:
        self.noted: Bool[Tensor, " B"] | None = None

    @property
    def tied(self) -> bool:
        """Whether torch.topk had to choose for any sequence of the batch."""
        return self.noted is not None and bool(self.noted.any())

    def note(self, tied: Bool[Tensor, "B T"]) -> None:
        """Records the sequences with a tied token, besides those of earlier calls."""
        sequences = tied.any(-1)
        if self.noted is not None and len(self.noted) == len(sequences):
            sequences = sequences | self.noted
        self.noted = sequences

    def select(self, index: Int[Tensor, " B"], length: int) -> None:
        """Keeps the sequences `index` of the batch, in this order; `length` is not needed."""
        if self.noted is not None:
            self.noted = self.noted[index.to(self.noted.device)]

    def join(self, other: "Ties", lengths: Lengths) -> None:
        """Appends the sequences of `other`; one in which nothing was recorded has no ties."""
        if self.noted is None and other.noted is None:
            return
        both = zip((self, other), lengths, strict=True)
        noted = [
            [False] * len(of) if each.noted is None else each.noted.tolist() for each, of in both
        ]
        device = next(each.noted.device for each in (self, other) if each.noted is not None)
        self.noted = torch.tensor(noted[0] + noted[1], device=device)

    def load(self, other: "Ties", length: int) -> None:
        """Becomes a copy of `other`, whose ties may be of tokens after the first `length`."""
        self.noted = other.noted

    def clear(self) -> None:
        """Forgets all ties."""
        self.noted = None


@dataclass(eq=False)
class DSACache(MLACache):
    """MLA's cache and the indexer's keys, `dim` values a token; None without an indexer."""

    index_keys: Appended | None
    ties: Ties | None = None  # None if the selection does not depend on the call


class DSA(MLA):
    """Multi-head latent attention to the keys that an indexer selects.

    While `dense` is True it attends to every key and its indexer is not trained; `switch` sets it.
    """

    def __init__(
        self, config: DSAConfig, mla: MLAConfig, dim: int, rope: RopeConfig, index: int = 0
    ):
        """Builds the attention of the block with this index, without an indexer if it is shared."""
        super().__init__(mla, dim, rope)
        self.indexer = None if index in config.shared else Indexer(config, mla, dim)
        self.publishes = index + 1 in config.shared
        self.dense = False
        self.top_k = config.top_k

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> DSACache:
        """Returns an empty cache for `capacity` tokens; with an indexer it has its keys, too."""
        if self.indexer is None:
            return DSACache(Appended(capacity), None)
        ties = Ties() if self.indexer.config.ties == "topk" else None
        return DSACache(Appended(capacity), Appended(capacity), ties)

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        ctx: Context,
    ) -> Attended:
        """Returns the output of the new tokens, and an IndexerLoss if the indexer is trained.

        The selected columns are shared if the next block attends to the same keys; None is every
        key. With `ctx.last_only` only the last token of each sequence has an output. During the
        indexer warm-up every key is attended to. Queries with few keys mask those that are not
        selected; those after them gather the selected keys. The split is where one becomes cheaper.
        """
        latent = self.latents(hidden, ctx)
        index_key = None
        if self.indexer is not None and (ctx.cache is not None or not self.dense):
            index_key = self.indexer.keys(hidden, ctx)
        if ctx.last_only:
            shared = None if ctx.shared is None else ctx.last_of(ctx.shared)
            hidden = ctx.last_of(hidden)
            ctx = replace(ctx.last(), shared=shared)
        query_latent = self.query_latent(hidden)
        queries = self.queries(query_latent, ctx)
        if self.indexer is None or index_key is None or self.dense:
            selection = shared_selection(latent, ctx, self.top_k)
        else:
            selection = self.indexer.select(hidden, query_latent, index_key, ctx)
        if self.publishes and not self.dense and not ctx.indexer_warmup:
            selection = selection._replace(indices=selection.topk_indices())
        if ctx.indexer_warmup is not None:
            heads = self.expand(*queries, latent)
            loss = None
            if self.indexer is not None and not self.dense:
                loss = selection.kl_loss(
                    heads.query, heads.key, self.scale, ctx.indexer_warmup, ctx.valid
                )
            arguments = heads.query, heads.key, heads.value, self.scale
            if selection.selects and not ctx.indexer_warmup:
                out = selection.attend_masked(*arguments)
            else:
                out = attend(*arguments, *visibility(ctx))
            return self._attended(out, loss, selection)
        absorbing = self.absorbs(ctx)
        if not selection.selects:
            form = self.absorbed if absorbing else self.expanded
            return self._attended(form(*queries, latent, *visibility(ctx)), None, selection)
        (nope, rope), outs = queries, []
        graded = torch.is_grad_enabled() and latent.requires_grad
        cut = nope.shape[1] if graded else self._gathers_from(selection, absorbing)
        early, late = selection.split(cut)
        if cut and absorbing:
            for run in early.runs():
                mask = selected_mask(early, run, early.select(run))
                keys = latent[:, : early.end(run)]
                outs.append(self.absorbed(nope[:, run], rope[:, run], keys, mask))
        elif cut:
            heads = self.expand(nope[:, :cut], rope[:, :cut], latent[:, : ctx.past + cut])
            outs.append(early.attend_masked(heads.query, heads.key, heads.value, self.scale))
        if cut < nope.shape[1]:
            query, value_up = self.absorb(nope[:, cut:], rope[:, cut:])
            inputs = query, latent, late.query, late.key, late.weights
            # The kernel scores and selects by itself.
            compiled = late.small_batch and late.indices is None
            # It does not know where the valid tokens of each sequence end.
            compiled &= late.spans is None or late.query.shape[1] == 1
            if compiled and attend_best.choose(*inputs) is not None:
                tied = None
                if late.ties is not None:
                    tied = torch.zeros(late.query.shape[:2], dtype=torch.bool)
                out = attend_best(*inputs, late.top_k, self.scale, late.ends, tied)
                if tied is not None and late.cached_ties is not None:
                    late.cached_ties.note(tied)
            else:
                out = late.attend_gathered(query, latent, self.scale)
            outs.append(self.lift(out, value_up))
        return self._attended(torch.cat(outs, dim=1), None, selection)

    def _attended(
        self, out: Tensor, loss: IndexerLoss | None, selection: "IndexerSelection"
    ) -> Attended:
        """Projects the heads' outputs; shares the selection if the next block attends by it."""
        shared = selection.indices if self.publishes else None
        return Attended(self.o_proj(out.flatten(2)), loss, shared)

    def _gathers_from(self, selection: "IndexerSelection", absorbing: bool) -> int:
        """Returns the first query for which copying the selected keys costs less than masking."""
        c = self.config
        factor = GATHERING
        time = selection.query.shape[1]
        if not absorbing:
            factor *= (2 * c.kv_lora_rank + c.rope_dim) / (c.nope_dim + c.rope_dim + c.value_dim)
        keys = int(selection.top_k * max(factor, 1.0))
        return min(max(keys - (selection.key.shape[1] - time), 0), time)


class Selected(NamedTuple):
    """The keys that each query of a slice selects."""

    columns: Int[Tensor, "B T K"]  # of the keys
    visible: Bool[Tensor, "B T K"] | None = None  # which of them the query may see; None: all


class LossSums(NamedTuple):
    """Sums over queries that indexer loss and recall are made of, and the numbers of queries."""

    loss: Float[Tensor, ""]  # of the divergences, in nats
    captured: Float[Tensor, ""]  # of the selected keys' shares, over the `selecting` queries
    uniform: Float[Tensor, ""]  # of the divergences of equal scores
    queries: Float[Tensor, ""]  # that count in the loss
    selecting: Float[Tensor, ""]  # of these, that see more keys than they may select

    def mean(self) -> IndexerLoss:
        """Returns the means over the queries; the recall is 1 where none had to select."""
        share = torch.where(self.selecting > 0, self.captured / self.selecting.clamp_min(1), 1.0)
        count = self.queries.clamp_min(1)
        return IndexerLoss(self.loss / count, share, self.uniform / count)


class IndexerSelection(NamedTuple):
    """Scores and selects keys for T queries and L keys, one slice of queries at a time.

    A slice sees no key after its last query, so its results cover only the `end` keys up to there.
    """

    query: Float[Tensor, "B T J P"]
    weights: Float[Tensor, "B T J"]
    key: Float[Tensor, "B L P"]
    mask: Bool[Tensor, "B 1 T L"] | None  # None: a query sees the keys up to its own
    top_k: int  # keys that a query may select
    # The number of keys that each query sees, if `mask` only says that these are the first ones.
    ends: Int[Tensor, "B T"] | None = None
    # Of equal keys those are selected that torch.topk returns for scores of so many columns, those
    # that a query may not see among them; None: the latest.
    ties: int | None = None
    # With `ties`: the first column of each query's document, and the one after its last. torch.topk
    # gets those alone, so that a query selects as if its document were a call. None: all columns.
    spans: Int[Tensor, "B T 2"] | None = None
    # The columns of the selected keys, those that a query may not see among them; None: the keys of
    # largest score.
    indices: Int[Tensor, "B T K"] | None = None
    cached_ties: "Ties | None" = None  # records the sequences where `ties` decided

    @property
    def selects(self) -> bool:
        """Whether there are more keys than a query may select."""
        return self.key.shape[1] > self.top_k

    @property
    def small_batch(self) -> bool:
        """Whether these are few queries, each of which sees all keys up to its own."""
        return (self.mask is None or self.ends is not None) and self.query.shape[1] <= SMALL_BATCH

    def runs(self, heads: int = 0) -> Iterator[slice]:
        """Splits the queries into slices with at most SCORES scores.

        Scores of the indexer's heads and of `heads` others are counted.
        """
        batch, time, index_heads, _ = self.query.shape
        each = max(1, batch * (index_heads + heads) * self.key.shape[1])
        step = max(1, min(QUERIES, SCORES // each))
        return (slice(column, min(column + step, time)) for column in range(0, time, step))

    def end(self, run: slice) -> int:
        """Returns the number of keys up to the last query of the slice `run`."""
        return self.key.shape[1] - self.query.shape[1] + run.stop

    def visible(self, run: slice) -> Bool[Tensor, "#B 1 T end"]:
        """Returns the keys that the queries may see, selected or not."""
        end = self.key.shape[1] - self.query.shape[1] + run.stop
        count = run.stop - run.start
        if self.mask is not None:
            return self.mask[:, :, run, :end]
        return torch.ones(1, 1, count, end, dtype=torch.bool, device=self.key.device).tril(
            end - count
        )

    def select(
        self,
        run: slice,
        scores: Float[Tensor, "B T end"] | None = None,
        every_column: bool = False,
    ) -> Selected | None:
        """Returns the selected keys of the queries `run`; None if every key is selected.

        `scores` are those of index_scores, if they are computed already. Selected keys that a query
        may not see are clamped to columns below `end` unless `every_column` is True.
        """
        end = self.end(run)
        count = run.stop - run.start
        if end <= self.top_k:
            return None
        # torch.compile cannot trace no_grad as a decorator on a method of a tuple.
        with torch.no_grad():
            if self.indices is not None:
                index = self.indices[:, run]
                inside = index.clamp_max(end - 1)
                visible = self.visible(run)[:, 0].expand(len(index), -1, -1)
                return Selected(inside, visible.gather(-1, inside) & (index < end))
            if scores is None:
                scores = index_scores(self.query[:, run], self.key[:, :end], self.weights[:, run])
            if self.mask is not None or count > 1:
                scores = scores.masked_fill(~self.visible(run)[:, 0], -torch.inf)
            if self.ties is None:
                index = largest(scores, self.top_k)
            else:
                scores = F.pad(scores, (0, self.ties - end), value=-torch.inf)
                index = scores.topk(self.top_k, dim=-1).indices
                tied = tied_queries(scores, index)
                if self.cached_ties is not None:
                    self.cached_ties.note(tied)
                if self.spans is not None:
                    select_within(self.spans[:, run], scores, index, tied)
            if self.mask is None and end - count + 1 >= self.top_k:
                return Selected(index)
            visible = scores.gather(-1, index) > -torch.inf
            return Selected(index if every_column else index.clamp_max(end - 1), visible)

    def topk_indices(self) -> Int[Tensor, "B T K"] | None:
        """Returns the columns of all queries' selected keys, None if every key is selected."""
        if not self.selects or self.indices is not None:
            return self.indices
        parts = []
        for run in self.runs():
            selected = self.select(run, every_column=True)
            if selected is None:
                # The first keys are all that these queries see.
                shape = len(self.query), run.stop - run.start, self.top_k
                parts.append(torch.arange(self.top_k, device=self.key.device).expand(shape))
            else:
                parts.append(selected.columns)
        return torch.cat(parts, dim=1)

    def split(self, count: int) -> tuple["IndexerSelection", "IndexerSelection"]:
        """Splits into the first `count` queries, with the keys up to them, and the others."""
        length = self.key.shape[1] - self.query.shape[1] + count
        mask = self.mask
        before, after = (
            (None, None) if mask is None else (mask[:, :, :count, :length], mask[:, :, count:])
        )
        return (
            self._replace(
                query=self.query[:, :count],
                weights=self.weights[:, :count],
                key=self.key[:, :length],
                mask=before,
                ends=None if self.ends is None else self.ends[:, :count],
                indices=None if self.indices is None else self.indices[:, :count],
                spans=None if self.spans is None else self.spans[:, :count],
            ),
            self._replace(
                query=self.query[:, count:],
                weights=self.weights[:, count:],
                mask=after,
                ends=None if self.ends is None else self.ends[:, count:],
                indices=None if self.indices is None else self.indices[:, count:],
                spans=None if self.spans is None else self.spans[:, count:],
            ),
        )

    def attend_masked(
        self,
        query: Float[Tensor, "B T H P2"],
        key: Float[Tensor, "B L H P2"],
        value: Float[Tensor, "B L H Q"],
        scale: float,
    ) -> Float[Tensor, "B T H Q"]:
        """Attends with a mask over the keys that are not selected.

        Every key is read, and one mask is formed for each slice of queries.
        """
        outs = []
        for run in self.runs():
            keys = key[:, : self.end(run)]
            values = value[:, : self.end(run)]
            mask = selected_mask(self, run, self.select(run))
            outs.append(attend(query[:, run], keys, values, scale, mask))
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]

    def attend_gathered(
        self, query: Float[Tensor, "B T H R"], latent: Float[Tensor, "B L R"], scale: float
    ) -> Float[Tensor, "B T H R"]:
        """Attends to copies of the selected latents, which all heads share as keys and as values.

        The others are never read. Every query must have more keys than it may select. At most
        COPIED numbers and SCORES scores are in memory at a time.
        """
        at_once = max(1, COPIED // (self.top_k * latent.shape[-1]))
        outs = []
        for run in self.runs():
            selected = self.select(run)
            assert selected is not None
            for column in range(run.start, run.stop, at_once):
                chunk = slice(column - run.start, column - run.start + at_once)
                some = query[:, column : min(column + at_once, run.stop)]
                visible = selected.visible
                visible = None if visible is None else visible[:, chunk, None, None]
                outs_of_sequences = []
                # Gathering from a view of the cache, all sequences at once, would copy it whole.
                for sequence, index in enumerate(selected.columns[:, chunk]):
                    keys = latent[sequence].index_select(0, index.flatten())
                    keys = keys.unflatten(0, index.shape)  # [T, K, R]
                    mask = None if visible is None else visible[sequence]
                    queries = some[sequence].unsqueeze(1)
                    outs_of_sequences.append(attend_shared(queries, keys, scale, mask).squeeze(1))
                outs.append(torch.stack(outs_of_sequences))
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]

    def kl_loss(
        self,
        query: Float[Tensor, "B T H P2"],
        key: Float[Tensor, "B L H P2"],
        scale: float,
        indexer_warmup: bool,
        valid: Bool[Tensor, "B T"] | None = None,
    ) -> IndexerLoss:
        """Computes the indexer loss and recall for the attention of these queries to these keys.

        The loss is a mean over the valid queries. Queries and keys get no gradient. At most SCORES
        scores are in memory at a time: the gradient is formed together with the loss.
        """
        attention = query.detach(), key.detach(), scale, indexer_warmup
        sums = _Divergence.apply(*self[:5], *attention, valid, self.ties, self.spans)
        return LossSums(*sums).mean()


def shared_selection(
    latent: Float[Tensor, "B L R"], ctx: Context, top_k: int
) -> "IndexerSelection":
    """Returns the selection of an earlier block, ctx.shared, as one of this block.

    The indexer's queries and keys have no values. Without ctx.shared every key is selected.
    """
    if ctx.shared is None:
        top_k = latent.shape[1]
    queries = latent.new_empty(*ctx.positions.shape, 0)
    return IndexerSelection(
        queries[..., None], queries, latent[..., :0], ctx.mask, top_k, indices=ctx.shared
    )


def switch(model: nn.Module, dense: bool) -> None:
    """Lets every DSA of a model attend to every key without training its indexer, or ends that."""
    for module in model.modules():
        if isinstance(module, DSA):
            module.dense = dense


def selected_mask(
    selection: IndexerSelection,
    run: slice,
    selected: Selected | None,
) -> Bool[Tensor, "#B 1 T end"]:
    """Returns True at the keys that `select` returned and that the query may see."""
    if selected is None:
        return selection.visible(run)
    columns = selected.columns
    shape = *columns.shape[:2], selection.end(run)
    mask = torch.zeros(shape, dtype=torch.bool, device=columns.device)
    mask = mask.scatter_(-1, columns, True)[:, None]
    # A query that selected keys it may not see sees no more than it may select.
    return mask if selected.visible is None else mask & selection.visible(run)


@kernel(numba="rorqual.kernels.dsa:attend_best")
def attend_best(
    query: Float[Tensor, "B T H R"],
    latent: Float[Tensor, "B L R"],
    index_query: Float[Tensor, "B T J P"],
    key: Float[Tensor, "B L P"],
    weights: Float[Tensor, "B T J"],
    top_k: int,
    scale: float,
    ends: Int[Tensor, "B T"] | None = None,
    tied: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H R"]:
    """Attends from each token to the `top_k` latents of best score among its first `ends` ones.

    `index_query` are the indexer's queries, and `key` and `weights` its keys and head weights.
    Without `ends` the tokens are the last of all sequences. Of equal scores the latest are taken,
    or with `tied` those that torch.topk returns where it has to choose among scores of 0; `tied`
    becomes True there. This says what the kernel computes; where no kernel runs,
    IndexerSelection.attend_gathered computes it in bounded memory.
    """
    scores = index_scores(index_query, key, weights)
    if ends is None:
        length = key.shape[1]
        ends = torch.arange(length - query.shape[1] + 1, length + 1, device=key.device)[None]
    visible = torch.arange(key.shape[1], device=key.device) < ends[..., None]
    scores = scores.masked_fill(~visible, -torch.inf)
    index = largest(scores, top_k)
    if tied is not None:
        tied.copy_(tied_queries(scores, index))
        for sequence, token in tied.nonzero().tolist():
            columns = scores[sequence, token, : int(ends.expand(len(scores), -1)[sequence].max())]
            index[sequence, token] = columns.topk(top_k).indices
    real = visible.expand_as(scores).gather(-1, index)[:, :, None, None]
    outs = []
    for sequence, selected in enumerate(index):
        keys = latent[sequence].index_select(0, selected.flatten()).unflatten(0, selected.shape)
        outs.append(
            attend_shared(query[sequence].unsqueeze(1), keys, scale, real[sequence]).squeeze(1)
        )
    return torch.stack(outs)


def tied_queries(
    scores: Float[Tensor, "B T L"], index: Int[Tensor, "B T K"], exact: bool = False
) -> Bool[Tensor, "B T"]:
    """Returns whether a key that is not selected has the score 0, as one that is selected has.

    A key that no head's product is above 0 for has that score, whatever computes it. Other scores
    are equal by rounding alone (in float32 one query in 20,000, of 8,192 keys): another shape of
    the same product parts them, so that no choice among them could be repeated. With `exact`
    products, as of few bits, all equal scores count but the -inf of keys that are not visible.
    """
    lowest = scores.gather(-1, index).amin(-1)
    if exact:
        above = (scores >= lowest[..., None]).sum(-1)
        return (lowest > -torch.inf) & (above > index.shape[-1])
    return (lowest == 0) & ((scores >= 0).sum(-1) > index.shape[-1])


def select_within(
    spans: Int[Tensor, "#B T 2"],
    scores: Float[Tensor, "B T L"],
    index: Int[Tensor, "B T K"],
    tied: Bool[Tensor, "B T"],
) -> None:
    """Selects again, in `index`, where scores are `tied`: by topk of a span's columns alone.

    A span is the first column of the query's document and the one after its last. So neither
    padding nor other documents change which of equal scores are selected.
    """
    # A compiler cannot trace a loop over what is tied.
    if torch.compiler.is_compiling():
        return
    sequences, queries = tied.nonzero(as_tuple=True)
    if not len(sequences):
        return
    alike = torch.cat(
        [sequences[:, None], spans.expand(len(scores), -1, -1)[sequences, queries]], dim=1
    )
    alike, group = alike.unique(dim=0, return_inverse=True)
    for number, (sequence, first, stop) in enumerate(alike.tolist()):
        # Padding may see more than its document has.
        if stop - first > index.shape[-1]:
            tied = queries[group == number]
            columns = scores[sequence, tied, first:stop]
            index[sequence, tied] = first + columns.topk(index.shape[-1], dim=-1).indices


def index_scores(
    query: Float[Tensor, "B T J P"], key: Float[Tensor, "B L P"], weights: Float[Tensor, "B T J"]
) -> Float[Tensor, "B T L"]:
    """Computes sum_j w_j relu(<q_j, k>) in float32, also under autocast.

    A rounded score would select other keys.
    """
    with torch.autocast(query.device.type, enabled=False):
        products = (query.float().flatten(1, 2) @ key.float().mT).relu_()
        return (weights.float().unsqueeze(2) @ products.unflatten(1, query.shape[1:3])).squeeze(2)


class AttentionTarget(NamedTuple):
    """What an indexer learns: how the attention's probability is spread over the keys."""

    probabilities: Float[Tensor, "B T L"]  # averaged over the heads
    captured: Float[Tensor, "B T"]  # share of that over every key which the selected keys carry


def attention_target(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L H P"],
    visible: Bool[Tensor, "#B 1 T L"],
    seen: Bool[Tensor, "#B 1 T L"],
    scale: float,
    indexer_warmup: bool,
) -> AttentionTarget:
    """Computes the indexer's target: MLA's attention probabilities, averaged over the heads.

    During the warm-up they are over every visible key, later over the selected ones, `seen`.
    """
    with torch.autocast(query.device.type, enabled=False):
        # [B, H, T, L]
        logits = (query.float().transpose(1, 2) * scale) @ key.float().permute(0, 2, 3, 1)
    powers = logits.masked_fill_(~visible, -torch.inf)
    powers = powers.sub_(powers.amax(-1, keepdim=True).clamp_min(-1e30)).exp_()
    every = powers.sum(-1, keepdim=True).clamp_min(1e-30)
    among = (powers * seen).sum(-1, keepdim=True)
    captured = (among / every).mean(1).squeeze(-1)
    if indexer_warmup:
        return AttentionTarget(powers.div_(every).mean(1), captured)
    return AttentionTarget(powers.mul_(seen).div_(among.clamp_min(1e-30)).mean(1), captured)


class _Divergence(torch.autograd.Function):
    """Computes the LossSums of a call, and the gradient of its loss together with it.

    The divergence is KL(target || softmax(I)). With s_j = <q_j, k> the gradients are

        e = dKL/dI = softmax(I) - target    dw_j = sum_s e relu(s_j)    ds_j = e w_j [s_j > 0]
    """

    @staticmethod
    def forward(
        ctx,
        query,
        weights,
        key,
        mask,
        top_k,
        attended,
        attended_key,
        scale,
        indexer_warmup,
        valid,
        ties,
        spans,
    ):
        selection = IndexerSelection(query, weights, key, mask, top_k, ties=ties, spans=spans)
        graded = any(ctx.needs_input_grad)
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in selection[:3]] if graded else []
        sums = torch.zeros(5, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            for run in selection.runs(attended.shape[2]):
                keys = key[:, : selection.end(run)]
                visible = selection.visible(run)
                queries = query[:, run].float()
                products = (queries.flatten(1, 2) @ keys.float().mT).relu_()
                products = products.unflatten(1, queries.shape[1:3])  # [B, T, J, L]
                scores = (weights[:, run].float().unsqueeze(2) @ products).squeeze(2)
                seen = selected_mask(selection, run, selection.select(run, scores))
                heads = attended[:, run], attended_key[:, : selection.end(run)]
                target = attention_target(*heads, visible, seen, scale, indexer_warmup)
                share = target.probabilities
                over = (visible if indexer_warmup else seen)[:, 0]
                terms, error = _compared(scores, share, over)
                uniform = torch.special.xlogy(share, share).sum(-1) + over.sum(-1).log()
                counts = torch.ones_like(terms) if valid is None else valid[:, run].float()
                selecting = counts * (visible[:, 0].sum(-1) > top_k)
                of_run = LossSums(
                    loss=(counts * terms).sum(),
                    captured=(selecting * target.captured).sum(),
                    uniform=(counts * uniform).sum(),
                    queries=counts.sum(),
                    selecting=selecting.sum(),
                )
                sums += torch.stack(of_run)
                if graded:
                    _add_gradients(grads, run, products, error * counts.unsqueeze(-1), selection)
        ctx.grads = grads
        totals = sums.unbind()
        ctx.mark_non_differentiable(*totals[1:])
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return *(grad * grads[0] for grad in ctx.grads), *(None,) * 9


def _compared(scores: Tensor, target: Tensor, over: Tensor) -> tuple[Tensor, Tensor]:
    """Computes KL(target || softmax(scores)) of each query and its gradient by the scores.

    The divergence is in nats; both are over the keys `over`.
    """
    log = scores.masked_fill(~over, torch.finfo(scores.dtype).min).log_softmax(-1)
    terms = torch.special.xlogy(target, target) - target * log.masked_fill(~over, 0.0)
    return terms.sum(-1), log.exp_().mul_(over).sub_(target)


def _add_gradients(
    grads: list[Tensor], run: slice, products: Tensor, error: Tensor, selection: IndexerSelection
) -> None:
    """Adds to the gradients of query, weights and key. `products` is overwritten."""
    (of_query, of_weights, of_key), end = grads, selection.end(run)
    query = selection.query[:, run].float()
    weights = selection.weights[:, run].float()
    key = selection.key[:, :end].float()
    of_weights[:, run] = (products @ error.unsqueeze(-1)).squeeze(-1)
    pull = products.gt_(0).mul_(error.unsqueeze(2)).mul_(weights.unsqueeze(-1)).flatten(1, 2)
    of_query[:, run] = (pull @ key).view_as(query)
    of_key[:, :end] += pull.mT @ query.flatten(1, 2)
