"""Hidden states in -> which keys each query may attend to out.

    I[t, s] = heads^-1/2 sum_j w[t, j] relu(dim^-1/2 <q_j[t], k[s]>)        float32
    q_j     = rope(W_q c)_j    k = rope(layer_norm(W_k x))    w = W_w x      c: MLA's query latent
    seen[t] = the `chosen` keys of largest I[t, .] among those t may see, of equal ones the latest

The lightning indexer of DeepSeek Sparse Attention (DeepSeek-V3.2-Exp). Its rope turns the pairs (i, i + rope/2) of the
first rope_dim values, unlike MLA's. The choice carries no gradient; the indexer learns by `indexer_loss` alone, from
detached inputs: KL of the main attention, summed over heads and L1-normalised, to softmax(I), first over every key
(dense warm-up, 1000 steps), later over the chosen.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.layers.basics import Layout, RopeConfig, largest, rotate
from rorqual.layers.cache import Appended

QUERIES = 512  # scored at a time, so that the scores of all indexer heads never stand for all queries


@dataclass(frozen=True, kw_only=True, slots=True)
class DSAConfig:
    """Sizes of the indexer; DeepSeek-V3.2: 64 heads of 128, 2048 chosen."""

    heads: int = 4
    dim: int = 32  # per head, at least MLA's rope_dim
    chosen: int = 2048  # keys a query sees

    def __post_init__(self) -> None:
        for name in ("heads", "dim", "chosen"):
            if getattr(self, name) < 1:
                raise ValueError(f"dsa.{name}: got {getattr(self, name)}, expected at least 1")


@runtime_checkable
class Latent(Protocol):
    """What the indexer must know of the attention around it; MLAConfig is one."""

    @property
    def q_lora_rank(self) -> int | None: ...
    @property
    def rope_dim(self) -> int: ...


class DSA(nn.Module):
    """The lightning indexer: MLA asks it `allowed(...)`. Parameters are named as in DeepSeek-V3.2's checkpoints."""

    def __init__(self, config: DSAConfig, dim: int, mla: Latent, rope: RopeConfig):
        """`rope` is MLA's; its tables come with every call and its pairing is not ours, so nothing is kept of it."""
        super().__init__()
        if config.dim < mla.rope_dim:
            raise ValueError(f"dsa.dim: got {config.dim}, expected at least mla.rope_dim, {mla.rope_dim}")
        self.config, self.rope_dim = config, mla.rope_dim
        self.wq_b = nn.Linear(mla.q_lora_rank or dim, config.heads * config.dim, bias=False)
        self.wk = nn.Linear(dim, config.dim, bias=False)
        self.k_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.weights_proj = nn.Linear(dim, config.heads, bias=False)

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Appended:
        """The indexer's keys, `dim` values a token."""
        return Appended(capacity)

    def project(
        self,
        hidden: Float[Tensor, "B T D"],
        query_latent: Float[Tensor, "B T R"],
        cos: Float[Tensor, "B T F"],
        sin: Float[Tensor, "B T F"],
    ) -> tuple[Float[Tensor, "B T J P"], Float[Tensor, "B T P"], Float[Tensor, "B T J"]]:
        """q, k and w of the new tokens; w in float32 and with both scales, dim^-1/2 heads^-1/2, in it.

        A positive factor passes through relu, so it may as well multiply the few weights as the many scores.
        """
        query = self.wq_b(query_latent).unflatten(-1, (self.config.heads, -1))
        weights = self.weights_proj(hidden).float() * (self.config.heads * self.config.dim) ** -0.5
        return self._turn(query, cos, sin), self._turn(self.k_norm(self.wk(hidden)), cos, sin), weights

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x.split([self.rope_dim, self.config.dim - self.rope_dim], dim=-1)
        return torch.cat([rotate(turned, cos, sin, interleaved=False), rest], dim=-1)

    def scores(
        self,
        hidden: Float[Tensor, "B T D"],
        query_latent: Float[Tensor, "B T R"],
        cos: Float[Tensor, "B T F"],
        sin: Float[Tensor, "B T F"],
    ) -> Float[Tensor, "B T T"]:
        """I with its gradient, for `indexer_loss`; the inputs are detached, so the model does not learn from it."""
        return index_scores(*self.project(hidden.detach(), query_latent.detach(), cos, sin))

    @torch.no_grad()
    def chosen(
        self,
        hidden: Float[Tensor, "B T D"],
        query_latent: Float[Tensor, "B T R"],
        layout: Layout,
        cos: Float[Tensor, "B T F"],
        sin: Float[Tensor, "B T F"],
        cache: Appended | None = None,
    ) -> tuple[Int[Tensor, "B T K"], Bool[Tensor, "B T K"]] | None:
        """The chosen keys of each query, and which of them it may see; None where every key is chosen, L <= chosen."""
        query, key, weights = self.project(hidden, query_latent, cos, sin)
        if cache is not None:
            kept = cache.append(key)
            key = kept if layout.past else key
        if key.shape[1] <= self.config.chosen:
            return None
        visible, index, real = layout.visible()[:, 0], [], []
        for start in range(0, query.shape[1], QUERIES):
            run = slice(start, start + QUERIES)
            scores = index_scores(query[:, run], key, weights[:, run]).masked_fill(~visible[:, run], -torch.inf)
            index.append(largest(scores, self.config.chosen))
            real.append(scores.gather(-1, index[-1]) > -torch.inf)
        return torch.cat(index, dim=1), torch.cat(real, dim=1)

    def allowed(
        self,
        hidden: Float[Tensor, "B T D"],
        query_latent: Float[Tensor, "B T R"],
        layout: Layout,
        cos: Float[Tensor, "B T F"],
        sin: Float[Tensor, "B T F"],
        cache: Appended | None = None,
    ) -> Bool[Tensor, "B 1 T L"] | None:
        """True at the chosen keys of each query; None where every key is chosen, so that MLA takes its dense path."""
        found = self.chosen(hidden, query_latent, layout, cos, sin, cache)
        if found is None:
            return None
        index, real = found
        seen = real.new_zeros(*real.shape[:2], layout.key_positions.shape[1])
        return seen.scatter_(-1, index, real)[:, None]


def index_scores(
    query: Float[Tensor, "B T J P"], key: Float[Tensor, "B L P"], weights: Float[Tensor, "B T J"]
) -> Float[Tensor, "B T L"]:
    """sum_j w_j relu(<q_j, k>), float32."""
    products = torch.einsum("btjp,blp->btjl", query.float(), key.float()).relu()
    return torch.einsum("btj,btjl->btl", weights.float(), products)


def attention_target(
    query: Float[Tensor, "B T H P"], key: Float[Tensor, "B L H P"], visible: Bool[Tensor, "#B 1 T L"], scale: float
) -> Float[Tensor, "B T L"]:
    """What the indexer should find: MLA's probabilities summed over its heads, each row divided by its sum."""
    with torch.no_grad():
        logits = torch.einsum("bthp,blhp->bhtl", query.float(), key.float()) * scale
        summed = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0).sum(1)
        return summed / summed.sum(-1, keepdim=True).clamp_min(1e-20)


def indexer_loss(
    scores: Float[Tensor, "B T L"], target: Float[Tensor, "B T L"], seen: Bool[Tensor, "#B T L"]
) -> Float[Tensor, ""]:
    """Mean over queries of KL(target || softmax(scores)) in nats, both over the keys `seen`.

    Warm-up: `seen` is every visible key. Afterwards: the chosen ones, over which the target is divided by its sum anew.
    Queries that see nothing do not count.
    """
    target = target.detach().float() * seen
    target = target / target.sum(-1, keepdim=True).clamp_min(1e-20)
    found = scores.float().masked_fill(~seen, torch.finfo(torch.float32).min).log_softmax(-1)
    terms = torch.special.xlogy(target, target) - target * found.masked_fill(~seen, 0.0)
    return terms.sum() / seen.any(-1).expand(terms.shape[:2]).sum().clamp_min(1)
