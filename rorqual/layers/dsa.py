"""Hidden states in -> which keys each query may see, and how far from that its attention looked, out.

    I[t, s] = heads^-1/2 sum_j w[t, j] relu(dim^-1/2 <q_j[t], k[s]>)        float32
    q_j     = rope(W_q c)_j    k = rope(layer_norm(W_k x))    w = W_w x      c: MLA's query latent
    S[t]    = the `chosen` keys of largest I[t, .] among those t may see, of equal ones the latest
    loss    = mean_t KL(mean_h p_h[t, .] || softmax(I[t, .]))                p_h: the probabilities of MLA's head h

The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv 2512.02556). Its rope turns the pairs
(i, i + rope/2) of the first rope_dim values, unlike MLA's. The choice carries no gradient; the indexer learns by the
loss alone, from detached inputs: first over every key while MLA attends to all of them (dense warm-up, 1000 steps),
then over S while MLA attends to S, p_h being its probabilities there.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rorqual import kernels
from rorqual.layers.attend import attend, attend_shared
from rorqual.layers.basics import largest
from rorqual.layers.cache import Appended
from rorqual.layers.context import Context
from rorqual.layers.selection import FEW, straight
from rorqual.model_config import DSAConfig as DSAConfig
from rorqual.model_config import RopeConfig

QUERIES = 512  # looked at together, at most
SCORES = 1 << 23  # that stand at a time: 32 MiB of float32
COPIED = 1 << 21  # numbers of latents gathered at a time


@runtime_checkable
class Latent(Protocol):
    """What the indexer must know of the attention around it; MLAConfig is one."""

    @property
    def q_lora_rank(self) -> int | None: ...
    @property
    def rope_dim(self) -> int: ...


class Lesson(NamedTuple):
    """How an indexer did in one call of its attention, or several in the mean."""

    loss: Float[Tensor, ""]  # nats a query
    recall: Float[
        Tensor, ""
    ]  # of the probability over every key, what the chosen carry; of queries that must choose


def mean_lesson(lessons: list[Lesson]) -> Lesson | None:
    """Over the layers; None without any."""
    return (
        Lesson(*(torch.stack(part).mean() for part in zip(*lessons, strict=True)))
        if lessons
        else None
    )


class DSA(nn.Module):
    """The lightning indexer: MLA asks it `look(...)`. Parameters are named as in DeepSeek-V3.2's checkpoints."""

    def __init__(self, config: DSAConfig, dim: int, mla: Latent, rope: RopeConfig):
        """`rope` is MLA's; its tables come with every call and its pairing is not ours, so nothing is kept of it."""
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
        """The indexer's keys, `dim` values a token."""
        return Appended(capacity)

    def keys(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B L P"]:
        """k of every token, the cached ones first; the new ones are appended to the cache."""
        new = self._turn(self.k_norm(self.wk(hidden.detach())), ctx)
        kept = ctx.cache.attention.inner.append(new) if ctx.cache is not None else new
        return kept if ctx.past else new

    def look(
        self,
        hidden: Float[Tensor, "B T D"],
        query_latent: Float[Tensor, "B T R"],
        key: Float[Tensor, "B L P"],
        ctx: Context,
    ) -> "Look":
        """q and w of the new tokens beside the keys of all. Nothing that comes in gets a gradient through it.

        w has both scales, dim^-1/2 heads^-1/2, in it: a positive factor passes through relu, so it may as well
        multiply the few weights as the many scores.
        """
        query = self.wq_b(query_latent.detach()).unflatten(-1, (self.config.heads, -1))
        weights = (
            self.weights_proj(hidden.detach()).float()
            * (self.config.heads * self.config.dim) ** -0.5
        )
        asked = self._turn(query, ctx), weights, key
        return Look(*asked, ctx.mask, self.config.chosen, straight(ctx)[1])

    def _turn(self, x: Tensor, ctx: Context) -> Tensor:
        turned, rest = x.split([self.rope_dim, self.config.dim - self.rope_dim], dim=-1)
        return torch.cat([ctx.rotate(turned, interleaved=False), rest], dim=-1)


class Look(NamedTuple):
    """What the indexer says of T queries and L keys, asked a run of queries at a time.

    A run sees no key after its last query, so all that is said of it is said of the `end` keys up to there.
    """

    query: Float[Tensor, "B T J P"]
    weights: Float[Tensor, "B T J"]
    key: Float[Tensor, "B L P"]
    mask: Bool[Tensor, "B 1 T L"] | None  # None: a query sees the keys up to its own
    most: int  # keys that a query may choose
    lead: Int[Tensor, " B"] | None = (
        None  # where a mask of few queries says no more: columns before each row's first
    )

    @property
    def chooses(self) -> bool:
        """Whether there are keys to leave out."""
        return self.key.shape[1] > self.most

    def runs(self, heads: int = 0) -> Iterator[slice]:
        """The queries in runs whose scores, of the indexer's heads and `heads` others, are SCORES at most."""
        batch, time, own, _ = self.query.shape
        step = max(1, min(QUERIES, SCORES // (batch * (own + heads) * self.key.shape[1])))
        return (slice(at, min(at + step, time)) for at in range(0, time, step))

    def end(self, run: slice) -> int:
        return self.key.shape[1] - self.query.shape[1] + run.stop

    def visible(self, run: slice) -> Bool[Tensor, "#B 1 T end"]:
        """Whether chosen or not."""
        end, count = self.end(run), run.stop - run.start
        if self.mask is not None:
            return self.mask[:, :, run, :end]
        return torch.ones(1, 1, count, end, dtype=torch.bool, device=self.key.device).tril(
            end - count
        )

    def chosen(
        self, run: slice, scores: Float[Tensor, "B T end"] | None = None
    ) -> tuple[Int[Tensor, "B T K"], Bool[Tensor, "B T K"] | None] | None:
        """The chosen keys of each query, and which of them it may see, None: all. None where every key is chosen.
        `scores` are index_scores' where they are known."""
        end, count = self.end(run), run.stop - run.start
        if end <= self.most:
            return None
        # not as a decorator, which torch.compile cannot trace on a method of a tuple
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
        """True at the chosen keys of each query that it may see."""
        found = self.chosen(run, scores)
        if found is None:
            return self.visible(run)
        index, real = found
        seen = torch.zeros(*index.shape[:2], self.end(run), dtype=torch.bool, device=index.device)
        return (seen.scatter_(-1, index, True) if real is None else seen.scatter_(-1, index, real))[
            :, None
        ]

    def split(self, count: int) -> tuple["Look", "Look"]:
        """Of the first `count` queries, with the keys up to them, and of the others."""
        length, mask = self.key.shape[1] - self.query.shape[1] + count, self.mask
        before, after = (
            (None, None) if mask is None else (mask[:, :, :count, :length], mask[:, :, count:])
        )
        return (
            Look(
                self.query[:, :count],
                self.weights[:, :count],
                self.key[:, :length],
                before,
                self.most,
                self.lead,
            ),
            Look(
                self.query[:, count:],
                self.weights[:, count:],
                self.key,
                after,
                self.most,
                self.lead,
            ),
        )

    def hiding(
        self,
        query: Float[Tensor, "B T H P2"],
        key: Float[Tensor, "B L H P2"],
        value: Float[Tensor, "B L H Q"],
        scale: float,
    ) -> Float[Tensor, "B T H Q"]:
        """Attention in which the keys that are not chosen are masked: every key is read, one mask a run."""
        outs = []
        for run in self.runs():
            keys, values = key[:, : self.end(run)], value[:, : self.end(run)]
            outs.append(attend(query[:, run], keys, values, scale, self.seen(run)))
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]

    def gathering(
        self, query: Float[Tensor, "B T H R"], latent: Float[Tensor, "B L R"], scale: float
    ) -> Float[Tensor, "B T H R"]:
        """The same to keys that all heads share and that are the values too: the chosen are read where they lie, or
        copied out, and the others never read. For queries that all have more keys than they may choose."""
        if (self.mask is None or self.lead is not None) and query.shape[1] <= FEW:
            given = query, latent, self.query, self.key, self.weights
            return kernels.pick("dsa_few", attend_best, *given)(*given, self.most, scale, self.lead)
        return self.copying(query, latent, scale)

    def copying(
        self, query: Float[Tensor, "B T H R"], latent: Float[Tensor, "B L R"], scale: float
    ) -> Float[Tensor, "B T H R"]:
        """`gathering` of any number of queries, COPIED numbers at a time, and SCORES scores."""
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

    def lesson(
        self,
        query: Float[Tensor, "B T H P2"],
        key: Float[Tensor, "B L H P2"],
        scale: float,
        warm: bool,
        present: Bool[Tensor, "B T"] | None = None,
    ) -> Lesson:
        """The loss against the attention of these queries to these keys, a mean over the queries present.

        Neither gets a gradient. At most SCORES scores stand at a time: the gradient is formed beside the loss.
        """
        attention = query.detach(), key.detach(), scale, warm
        summed, carried, queries, choosing = _Divergence.apply(*self[:5], *attention, present)
        recall = torch.where(choosing > 0, carried / choosing.clamp_min(1), 1.0)
        return Lesson(summed / queries.clamp_min(1), recall)


def attend_best(
    query: Float[Tensor, "B T H R"],
    latent: Float[Tensor, "B L R"],
    looking: Float[Tensor, "B T J P"],
    key: Float[Tensor, "B L P"],
    weights: Float[Tensor, "B T J"],
    most: int,
    scale: float,
    lead: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T H R"]:
    """The last T of L tokens attend each to the `most` latents whose keys score best with the indexer's query,
    `looking`. Row b starts at column lead[b], or at the first. kernels/dsa.py is its twin."""
    time, length, mask = query.shape[1], key.shape[1], None
    if lead is not None:
        columns = torch.arange(length, device=key.device)
        mask = ((columns >= lead[:, None, None]) & (columns <= columns[length - time :, None]))[
            :, None
        ]
    return Look(looking, weights, key, mask, most).copying(query, latent, scale)


def _attend_to(
    query: Tensor, latent: Tensor, index: Tensor, real: Tensor | None, scale: float
) -> Tensor:
    """[B, T, H, R] to the latents `index` [B, T, K]; row by row, or a view of the cache would be copied whole."""
    rows = []
    for row in range(len(query)):
        key = (
            latent[row].index_select(0, index[row].flatten()).unflatten(0, index.shape[1:])
        )  # [T, K, R]
        mask = None if real is None else real[row, :, None, None]
        rows.append(attend_shared(query[row].unsqueeze(1), key, scale, mask).squeeze(1))
    return torch.stack(rows)


def index_scores(
    query: Float[Tensor, "B T J P"], key: Float[Tensor, "B L P"], weights: Float[Tensor, "B T J"]
) -> Float[Tensor, "B T L"]:
    """sum_j w_j relu(<q_j, k>), float32."""
    return _weighted(_products(query, key), weights)


def _products(query: Tensor, key: Tensor) -> Float[Tensor, "B T J L"]:
    """relu(<q_j, k>), float32 whatever autocast says: a rounded score chooses other keys."""
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
    """What the indexer should find: the mean over heads of the probabilities that MLA has, over every key it may look
    at while `warm`, later over those `seen`. Beside it, how much of the probability over every key the seen carry."""
    with torch.autocast(query.device.type, enabled=False):
        logits = (query.float().transpose(1, 2) * scale) @ key.float().permute(
            0, 2, 3, 1
        )  # [B, H, T, L]
    powers = logits.masked_fill_(~visible, -torch.inf)
    powers = powers.sub_(powers.amax(-1, keepdim=True).clamp_min(-1e30)).exp_()
    every = powers.sum(-1, keepdim=True).clamp_min(1e-30)
    among = (powers * seen).sum(-1, keepdim=True)
    carried = (among / every).mean(1).squeeze(-1)
    if warm:
        return powers.div_(every).mean(1), carried
    return powers.mul_(seen).div_(among.clamp_min(1e-30)).mean(1), carried


class _Divergence(torch.autograd.Function):
    """Sums over queries: KL(target || softmax(I)), recall where there is a choice, and how many queries each counts.

    With e = dKL/dI = softmax(I) - target and s_j = <q_j, k>:  dw_j = sum_s e relu(s_j),  ds_j = e w_j [s_j > 0].
    """

    @staticmethod
    def forward(ctx, query, weights, key, mask, most, attended, attended_key, scale, warm, present):
        look = Look(query, weights, key, mask, most)
        graded = any(ctx.needs_input_grad)
        grads = [torch.zeros_like(x, dtype=torch.float32) for x in look[:3]] if graded else []
        sums = torch.zeros(4, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            for run in look.runs(attended.shape[2]):
                keys, visible = key[:, : look.end(run)], look.visible(run)
                products = _products(query[:, run], keys)
                scores = _weighted(products, weights[:, run])
                seen = look.seen(run, scores)
                heads = attended[:, run], attended_key[:, : look.end(run)]
                target, carried = attention_target(*heads, visible, seen, scale, warm)
                terms, error = _compared(scores, target, (visible if warm else seen)[:, 0])
                counts = torch.ones_like(terms) if present is None else present[:, run].float()
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
                    _add_gradients(grads, run, products, error * counts.unsqueeze(-1), look)
        ctx.grads = grads
        found = sums.unbind()
        ctx.mark_non_differentiable(*found[1:])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        return *(own * grads[0] for own in ctx.grads), *(None,) * 7


def _compared(scores: Tensor, target: Tensor, over: Tensor) -> tuple[Tensor, Tensor]:
    """KL(target || softmax(scores)) of each query, nats, and its gradient by the scores, both over the keys `over`."""
    log = scores.masked_fill(~over, torch.finfo(scores.dtype).min).log_softmax(-1)
    terms = torch.special.xlogy(target, target) - target * log.masked_fill(~over, 0.0)
    return terms.sum(-1), log.exp_().mul_(over).sub_(target)


def _add_gradients(
    grads: list[Tensor], run: slice, products: Tensor, error: Tensor, look: Look
) -> None:
    """Into those of query, weights and key; `products` is used up."""
    (of_query, of_weights, of_key), end = grads, look.end(run)
    query, weights, key = (
        look.query[:, run].float(),
        look.weights[:, run].float(),
        look.key[:, :end].float(),
    )
    of_weights[:, run] = (products @ error.unsqueeze(-1)).squeeze(-1)
    pull = products.gt_(0).mul_(error.unsqueeze(2)).mul_(weights.unsqueeze(-1)).flatten(1, 2)
    of_query[:, run] = (pull @ key).view_as(query)
    of_key[:, :end] += pull.mT @ query.flatten(1, 2)
