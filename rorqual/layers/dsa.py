"""Selects the keys that each query attends to with a lightning indexer, and trains the indexer.

    I[t, s] = heads^-1/2 sum_j w[t, j] relu(dim^-1/2 <q_j[t], k[s]>)        float32
    q_j     = rope(W_q c)_j    k = rope(layer_norm(W_k x))    w = W_w x      c: MLA's query latent
    S[t]    = the `chosen` keys of largest I[t, .] among those t may see, of equal ones the latest
    loss    = mean_t KL(mean_h p_h[t, .] || softmax(I[t, .]))    p_h: probabilities of MLA's head h

This is DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv 2512.02556). The indexer's rope rotates the
pairs (i, i + rope/2) of the first rope_dim values, unlike MLA's. The selection carries no gradient;
the indexer is trained by the loss alone, from detached inputs. During the dense warm-up (1000
steps) the loss is over every key and MLA attends to all of them; then it is over S and MLA attends
to S, where p_h are its probabilities.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rorqual.kernels import kernel
from rorqual.layers.attend import attend, attend_shared
from rorqual.layers.basics import largest
from rorqual.layers.cache import Appended
from rorqual.layers.context import Context
from rorqual.layers.sparse import FEW
from rorqual.model_config import DSAConfig as DSAConfig
from rorqual.model_config import RopeConfig

QUERIES = 512  # processed at a time, at most
SCORES = 1 << 23  # scores in memory at a time: 32 MiB of float32
COPIED = 1 << 21  # numbers of latents gathered at a time


@runtime_checkable
class Latent(Protocol):
    """The sizes of the surrounding attention that the indexer needs; MLAConfig has them."""

    @property
    def q_lora_rank(self) -> int | None: ...
    @property
    def rope_dim(self) -> int: ...


class IndexerLoss(NamedTuple):
    """The indexer loss and recall of one attention call, or their mean over several."""

    loss: Float[Tensor, ""]  # nats a query
    # Share of the probability over every key that the selected keys carry, over queries with more
    # keys than they may select.
    recall: Float[Tensor, ""]


def mean_indexer_loss(indexer_losses: list[IndexerLoss]) -> IndexerLoss | None:
    """Averages over the layers; returns None if the list is empty."""
    return (
        IndexerLoss(*(torch.stack(part).mean() for part in zip(*indexer_losses, strict=True)))
        if indexer_losses
        else None
    )


class DSA(nn.Module):
    """The lightning indexer; MLA calls its `select(...)`.

    Parameters are named as in DeepSeek-V3.2's checkpoints.
    """

    def __init__(self, config: DSAConfig, dim: int, mla: Latent, rope: RopeConfig):
        """Builds the projections. `rope` is MLA's and is not stored.

        Its tables come with every call, and the indexer has its own pairing.
        """
        super().__init__()
        config.check_rope_dim(mla.rope_dim)
        self.config, self.rope_dim = config, mla.rope_dim
        self.wq_b = nn.Linear(mla.q_lora_rank or dim, config.heads * config.dim, bias=False)
        self.wk = nn.Linear(dim, config.dim, bias=False)
        self.k_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.weights_proj = nn.Linear(dim, config.heads, bias=False)

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> Appended:
        """Returns an empty cache for the indexer's keys, `dim` values a token."""
        return Appended(capacity)

    def keys(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B L P"]:
        """Returns k of every token, cached ones first, and appends the new ones to the cache."""
        new = self._turn(self.k_norm(self.wk(hidden.detach())), ctx)
        kept = ctx.cache.attention.inner.append(new, ctx) if ctx.cache is not None else new
        return kept if ctx.past else new

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
        # With one document a row the columns of the queries say which keys they see.
        ragged = ctx.starts is not None and ctx.key_documents is None
        ends = ctx.columns + 1 if ragged else None
        asked = self._turn(query, ctx), weights, key
        return IndexerSelection(*asked, ctx.mask, self.config.chosen, ends)

    def _turn(self, x: Tensor, ctx: Context) -> Tensor:
        turned, rest = x.split([self.rope_dim, self.config.dim - self.rope_dim], dim=-1)
        return torch.cat([ctx.rotate(turned, interleaved=False), rest], dim=-1)


class IndexerSelection(NamedTuple):
    """Scores and selects keys for T queries and L keys, one slice of queries at a time.

    A slice sees no key after its last query, so its results cover only the `end` keys up to there.
    """

    query: Float[Tensor, "B T J P"]
    weights: Float[Tensor, "B T J"]
    key: Float[Tensor, "B L P"]
    mask: Bool[Tensor, "B 1 T L"] | None  # None: a query sees the keys up to its own
    most: int  # keys that a query may select
    # The number of keys that each query sees, if `mask` only says that these are the first ones.
    ends: Int[Tensor, "B T"] | None = None

    @property
    def chooses(self) -> bool:
        """Whether there are more keys than a query may select."""
        return self.key.shape[1] > self.most

    def runs(self, heads: int = 0) -> Iterator[slice]:
        """Splits the queries into slices with at most SCORES scores.

        Scores of the indexer's heads and of `heads` others are counted.
        """
        batch, time, own, _ = self.query.shape
        step = max(1, min(QUERIES, SCORES // (batch * (own + heads) * self.key.shape[1])))
        return (slice(at, min(at + step, time)) for at in range(0, time, step))

    def end(self, run: slice) -> int:
        return self.key.shape[1] - self.query.shape[1] + run.stop

    def visible(self, run: slice) -> Bool[Tensor, "#B 1 T end"]:
        """Returns the keys that the queries may see, selected or not."""
        end, count = self.end(run), run.stop - run.start
        if self.mask is not None:
            return self.mask[:, :, run, :end]
        return torch.ones(1, 1, count, end, dtype=torch.bool, device=self.key.device).tril(
            end - count
        )

    def chosen(
        self, run: slice, scores: Float[Tensor, "B T end"] | None = None
    ) -> tuple[Int[Tensor, "B T K"], Bool[Tensor, "B T K"] | None] | None:
        """Returns the selected keys of each query, and which of them it may see (None: all).

        Returns None if every key is selected. `scores` are those of index_scores, if they are
        already known.
        """
        end, count = self.end(run), run.stop - run.start
        if end <= self.most:
            return None
        # torch.compile cannot trace no_grad as a decorator on a method of a tuple.
        with torch.no_grad():
            if scores is None:
                scores = index_scores(self.query[:, run], self.key[:, :end], self.weights[:, run])
            if self.mask is not None or count > 1:
                scores = scores.masked_fill(~self.visible(run)[:, 0], -torch.inf)
            index = largest(scores, self.most)
            if self.mask is None and end - count + 1 >= self.most:
                return index, None
            return index, scores.gather(-1, index) > -torch.inf

    def seen(
        self, run: slice, scores: Float[Tensor, "B T end"] | None = None
    ) -> Bool[Tensor, "#B 1 T end"]:
        """Returns True at the selected keys of each query that it may see."""
        found = self.chosen(run, scores)
        if found is None:
            return self.visible(run)
        index, real = found
        seen = torch.zeros(*index.shape[:2], self.end(run), dtype=torch.bool, device=index.device)
        return (seen.scatter_(-1, index, True) if real is None else seen.scatter_(-1, index, real))[
            :, None
        ]

    def split(self, count: int) -> tuple["IndexerSelection", "IndexerSelection"]:
        """Splits into the first `count` queries, with the keys up to them, and the others."""
        length, mask = self.key.shape[1] - self.query.shape[1] + count, self.mask
        before, after = (
            (None, None) if mask is None else (mask[:, :, :count, :length], mask[:, :, count:])
        )
        return (
            IndexerSelection(
                self.query[:, :count],
                self.weights[:, :count],
                self.key[:, :length],
                before,
                self.most,
                None if self.ends is None else self.ends[:, :count],
            ),
            IndexerSelection(
                self.query[:, count:],
                self.weights[:, count:],
                self.key,
                after,
                self.most,
                None if self.ends is None else self.ends[:, count:],
            ),
        )

    def hiding(
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
            keys, values = key[:, : self.end(run)], value[:, : self.end(run)]
            outs.append(attend(query[:, run], keys, values, scale, self.seen(run)))
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]

    def gathering(
        self, query: Float[Tensor, "B T H R"], latent: Float[Tensor, "B L R"], scale: float
    ) -> Float[Tensor, "B T H R"]:
        """Attends to selected keys that all heads share and that are also the values.

        The selected keys are read in place or copied out; the others are never read. Every query
        must have more keys than it may select.
        """
        if (self.mask is None or self.ends is not None) and query.shape[1] <= FEW:
            given = query, latent, self.query, self.key, self.weights
            return attend_best(*given, self.most, scale, self.ends)
        return self.copying(query, latent, scale)

    def copying(
        self, query: Float[Tensor, "B T H R"], latent: Float[Tensor, "B L R"], scale: float
    ) -> Float[Tensor, "B T H R"]:
        """Computes `gathering` for any number of queries.

        At most COPIED numbers and SCORES scores are in memory at a time.
        """
        few, outs = max(1, COPIED // (self.most * latent.shape[-1])), []
        for run in self.runs():
            found = self.chosen(run)
            assert found is not None
            for at in range(run.start, run.stop, few):
                part = slice(at - run.start, at - run.start + few)
                some = query[:, at : min(at + few, run.stop)]
                real = None if found[1] is None else found[1][:, part]
                outs.append(_attend_to(some, latent, found[0][:, part], real, scale))
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]

    def indexer_loss(
        self,
        query: Float[Tensor, "B T H P2"],
        key: Float[Tensor, "B L H P2"],
        scale: float,
        warm: bool,
        valid: Bool[Tensor, "B T"] | None = None,
    ) -> IndexerLoss:
        """Computes the indexer loss and recall for the attention of these queries to these keys.

        The loss is a mean over the valid queries. Queries and keys get no gradient. At most SCORES
        scores are in memory at a time: the gradient is formed together with the loss.
        """
        attention = query.detach(), key.detach(), scale, warm
        summed, carried, queries, choosing = _Divergence.apply(*self[:5], *attention, valid)
        recall = torch.where(choosing > 0, carried / choosing.clamp_min(1), 1.0)
        return IndexerLoss(summed / queries.clamp_min(1), recall)


@kernel(numba="rorqual.kernels.dsa:attend_best")
def attend_best(
    query: Float[Tensor, "B T H R"],
    latent: Float[Tensor, "B L R"],
    looking: Float[Tensor, "B T J P"],
    key: Float[Tensor, "B L P"],
    weights: Float[Tensor, "B T J"],
    most: int,
    scale: float,
    ends: Int[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T H R"]:
    """Attends from each token to the `most` latents of best score among its first `ends` ones.

    `looking` are the indexer's queries, and `key` and `weights` its keys and head weights. Without
    `ends` the tokens are the last of all sequences. The kernel is kernels/dsa.py.
    """
    mask = None
    if ends is not None:
        mask = (torch.arange(key.shape[1], device=key.device) < ends[..., None])[:, None]
    return IndexerSelection(looking, weights, key, mask, most).copying(query, latent, scale)


def _attend_to(
    query: Tensor, latent: Tensor, index: Tensor, real: Tensor | None, scale: float
) -> Tensor:
    """Attends from queries [B, T, H, R] to the latents `index` [B, T, K].

    It loops over the sequences, because gathering from a view of the cache would copy it whole.
    """
    rows = []
    for row in range(len(query)):
        # [T, K, R]
        key = latent[row].index_select(0, index[row].flatten()).unflatten(0, index.shape[1:])
        mask = None if real is None else real[row, :, None, None]
        rows.append(attend_shared(query[row].unsqueeze(1), key, scale, mask).squeeze(1))
    return torch.stack(rows)


def index_scores(
    query: Float[Tensor, "B T J P"], key: Float[Tensor, "B L P"], weights: Float[Tensor, "B T J"]
) -> Float[Tensor, "B T L"]:
    """Computes sum_j w_j relu(<q_j, k>) in float32."""
    return _weighted(_products(query, key), weights)


def _products(query: Tensor, key: Tensor) -> Float[Tensor, "B T J L"]:
    """Computes relu(<q_j, k>) in float32, also under autocast.

    A rounded score would select other keys.
    """
    with torch.autocast(query.device.type, enabled=False):
        return (query.float().flatten(1, 2) @ key.float().mT).relu_().unflatten(1, query.shape[1:3])


def _weighted(products: Tensor, weights: Tensor) -> Float[Tensor, "B T L"]:
    with torch.autocast(products.device.type, enabled=False):
        return (weights.float().unsqueeze(2) @ products).squeeze(2)


def attention_target(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L H P"],
    visible: Bool[Tensor, "#B 1 T L"],
    seen: Bool[Tensor, "#B 1 T L"],
    scale: float,
    warm: bool,
) -> tuple[Float[Tensor, "B T L"], Float[Tensor, "B T"]]:
    """Computes the indexer's target: MLA's attention probabilities, averaged over the heads.

    During the warm-up they are over every visible key, later over those in `seen`. The second
    result is the share of the probability over every key that the `seen` keys carry.
    """
    with torch.autocast(query.device.type, enabled=False):
        # [B, H, T, L]
        logits = (query.float().transpose(1, 2) * scale) @ key.float().permute(0, 2, 3, 1)
    powers = logits.masked_fill_(~visible, -torch.inf)
    powers = powers.sub_(powers.amax(-1, keepdim=True).clamp_min(-1e30)).exp_()
    every = powers.sum(-1, keepdim=True).clamp_min(1e-30)
    among = (powers * seen).sum(-1, keepdim=True)
    carried = (among / every).mean(1).squeeze(-1)
    if warm:
        return powers.div_(every).mean(1), carried
    return powers.mul_(seen).div_(among.clamp_min(1e-30)).mean(1), carried


class _Divergence(torch.autograd.Function):
    """Sums the KL divergence and the recall over queries, and counts the queries of each.

    The divergence is KL(target || softmax(I)). The recall is over queries that have more keys than
    they may select. The gradients, with s_j = <q_j, k>, are

        e = dKL/dI = softmax(I) - target    dw_j = sum_s e relu(s_j)    ds_j = e w_j [s_j > 0]
    """

    @staticmethod
    def forward(ctx, query, weights, key, mask, most, attended, attended_key, scale, warm, valid):
        selection = IndexerSelection(query, weights, key, mask, most)
        graded = any(ctx.needs_input_grad)
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in selection[:3]] if graded else []
        sums = torch.zeros(4, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            for run in selection.runs(attended.shape[2]):
                keys, visible = key[:, : selection.end(run)], selection.visible(run)
                products = _products(query[:, run], keys)
                scores = _weighted(products, weights[:, run])
                seen = selection.seen(run, scores)
                heads = attended[:, run], attended_key[:, : selection.end(run)]
                target, carried = attention_target(*heads, visible, seen, scale, warm)
                terms, error = _compared(scores, target, (visible if warm else seen)[:, 0])
                counts = torch.ones_like(terms) if valid is None else valid[:, run].float()
                choosing = counts * (visible[:, 0].sum(-1) > most)
                sums += torch.stack(
                    [
                        (counts * terms).sum(),
                        (choosing * carried).sum(),
                        counts.sum(),
                        choosing.sum(),
                    ]
                )
                if graded:
                    _add_gradients(grads, run, products, error * counts.unsqueeze(-1), selection)
        ctx.grads = grads
        found = sums.unbind()
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return *(own * grads[0] for own in ctx.grads), *(None,) * 7


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
    query, weights, key = (
        selection.query[:, run].float(),
        selection.weights[:, run].float(),
        selection.key[:, :end].float(),
    )
    of_weights[:, run] = (products @ error.unsqueeze(-1)).squeeze(-1)
    pull = products.gt_(0).mul_(error.unsqueeze(2)).mul_(weights.unsqueeze(-1)).flatten(1, 2)
    of_query[:, run] = (pull @ key).view_as(query)
    of_key[:, :end] += pull.mT @ query.flatten(1, 2)
