"""Multi-head latent attention (MLA) and grouped-query attention (GQA).

MLA (arXiv 2405.04434, 2412.19437): c = norm(W_dkv x) is the latent of a token and r = rope(W_kr x)
its one rotary key:

    q_h   = [n_h | p_h],   n_h from W_q norm(W_dq x),  p_h = rope(...)
    k_h   = [W_uk,h c | r],   v_h = W_uv,h c
    out   = W_o concat_h softmax(scale q_h . k_h) v_h,   scale = (nope + rope)^-0.5 * mscale^2

    expanded   k_h and v_h are formed for every key: training, prefill
    absorbed   n_h . W_uk,h c = (W_uk,h^T n_h) . c  and  sum p W_uv,h c = W_uv,h sum p c: decoding
               reads [c | r] only, kv_lora_rank + rope_dim values a token, as if H queries
               shared one key head

GQA (arXiv 2305.13245): `heads` query heads share `kv_heads` key heads, optionally over the last
`window` keys only (2004.05150), with a learned sink in the softmax's denominator (2309.17453,
2508.10925), with normed queries and keys, of which a part may be rotated, and with an output that
is multiplied by sigmoid(W_g x), a gate for every value (2505.06708).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rorqual.layers.attend import attend, attend_shared, by_head
from rorqual.layers.cache import Appended, Bundle
from rorqual.layers.context import Attended as Attended
from rorqual.layers.context import Context
from rorqual.layers.norm import CentredRMSNorm, RMSNorm
from rorqual.layers.rope import softmax_factor
from rorqual.model_config import GQAConfig as GQAConfig
from rorqual.model_config import MLAConfig as MLAConfig
from rorqual.model_config import RopeConfig


def visibility(ctx: Context) -> tuple[Tensor | None, bool]:
    """Returns the arguments `mask` and `causal` of attend.

    One new token without a mask sees every key and needs neither.
    """
    if ctx.mask is None and ctx.past == 0:
        return None, ctx.positions.shape[1] > 1
    if ctx.mask is None and ctx.positions.shape[1] == 1:
        return None, False
    return ctx.visible(), False


@dataclass(eq=False)
class MLACache(Bundle):
    """Caches [latent | rotated key] of every token."""

    latent: Appended


@dataclass(eq=False)
class GQACache(Bundle):
    """Caches keys and values of every token."""

    keys: Appended
    values: Appended


class Expanded(NamedTuple):
    """What MLA attends with in the expanded form: every head has a key and a value of its own."""

    query: Float[Tensor, "B T H P"]  # P = nope_dim + rope_dim; rotated, as the keys are
    key: Float[Tensor, "B L H P"]  # of all tokens, cached ones first
    value: Float[Tensor, "B L H Q"]


class Projected(NamedTuple):
    """What GQA makes of the hidden states, before it attends."""

    query: Float[Tensor, "B T H P"]  # of the new tokens; rotated, as the keys are
    key: Float[Tensor, "B L G P"]  # of all tokens, cached ones first
    value: Float[Tensor, "B L G Q"]
    # Logits of the output's gates, of the new tokens; None without an output gate.
    gate: Float[Tensor, "B T H Q"] | None

    def last(self, ctx: Context) -> "Projected":
        """Returns the queries and gates of each sequence's last new token, with all keys."""
        gate = None if self.gate is None else ctx.last_of(self.gate)
        return self._replace(query=ctx.last_of(self.query), gate=gate)


class MLA(nn.Module):
    """Multi-head latent attention: one latent and one rotary key a token, shared by all heads.

    Projections are named and laid out as in DeepSeek's checkpoints: q per head [nope | rope], kv_a
    [latent | rope], kv_b per head [nope | value]. DSA is a subclass that selects keys.
    """

    def __init__(self, config: MLAConfig, dim: int, rope: RopeConfig):
        super().__init__()
        self.config = config
        self.interleaved = rope.interleaved
        self.rope_dim = config.rope_dim
        self.query_scale = rope.query_scale
        self.scale = (config.nope_dim + config.rope_dim) ** -0.5 * softmax_factor(rope)
        query = config.heads * (config.nope_dim + config.rope_dim)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(dim, query, bias=False)
        else:
            self.q_a_proj = nn.Linear(dim, config.q_lora_rank, bias=config.bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            dim, config.kv_lora_rank + config.rope_dim, bias=config.bias
        )
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, config.heads * (config.nope_dim + config.value_dim), bias=False
        )
        self.o_proj = nn.Linear(config.heads * config.value_dim, dim, bias=config.bias)

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> MLACache:
        """Returns an empty cache for `capacity` tokens of kv_lora_rank + rope_dim values.

        Memory is allocated at the first token.
        """
        return MLACache(Appended(capacity))

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        ctx: Context,
    ) -> Attended:
        """Returns the output of the new tokens.

        With `ctx.last_only` only the last token of each sequence has an output. With a cache the
        new tokens are appended to it. The form with fewer multiplications is used; both agree up to
        rounding.
        """
        latent = self.latents(hidden, ctx)
        if ctx.last_only:
            hidden = ctx.last_of(hidden)
            ctx = ctx.last()
        nope, rope = self.queries(self.query_latent(hidden), ctx)
        form = self.absorbed if self.absorbs(ctx) else self.expanded
        return Attended(self.o_proj(form(nope, rope, latent, *visibility(ctx)).flatten(2)))

    def latents(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B L R"]:
        """Returns [latent | rotated key] of all tokens, cached ones first: what is cached."""
        c = self.config
        latent, key = self.kv_a_proj_with_mqa(hidden).split([c.kv_lora_rank, c.rope_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        latent = torch.cat([latent, ctx.rotate(key, self.interleaved)], dim=-1)
        if ctx.cache is None:
            return latent
        cached = ctx.cache.attention.latent.append(latent, ctx)
        # Those that other ranks fill carry gradients (context_parallel.py).
        return cached if ctx.past or cached.requires_grad else latent

    def query_latent(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T R"]:
        """Returns what queries are made of: norm(W_dq x), or x if there is no W_dq."""
        if self.config.q_lora_rank is None:
            return hidden
        return self.q_a_layernorm(self.q_a_proj(hidden))

    def queries(
        self, query_latent: Float[Tensor, "B T R"], ctx: Context
    ) -> tuple[Float[Tensor, "B T H N"], Float[Tensor, "B T H P"]]:
        """Returns the queries of each head: the part without position, and the rotated part."""
        c = self.config
        query = self.q_proj(query_latent) if c.q_lora_rank is None else self.q_b_proj(query_latent)
        query = query.unflatten(-1, (c.heads, -1))
        if self.query_scale is not None:
            beta = self.query_scale.beta
            length = self.query_scale.original_length
            scale = 1 + beta * (1 + ctx.positions // length).float().log()
            query = query * scale[..., None, None].to(query.dtype)
        nope, rope = query.split([c.nope_dim, c.rope_dim], dim=-1)
        return nope, ctx.rotate(rope, self.interleaved)

    def absorbs(self, ctx: Context) -> bool:
        """Returns whether the new tokens attend in the absorbed form.

        They do after a cache, where it takes fewer products.
        """
        return ctx.past > 0 and self._absorbing_is_cheaper(ctx.positions.shape[1])

    def _absorbing_is_cheaper(self, time: int) -> bool:
        """Returns whether the absorbed form takes no more products than the expanded one.

        That is per key and head. The absorbed form takes `time` wider products; the expanded form
        expands the key once and takes `time` narrower ones.
        """
        c = self.config
        expanded = c.kv_lora_rank * (c.nope_dim + c.value_dim) + time * (
            c.nope_dim + c.rope_dim + c.value_dim
        )
        return time * (2 * c.kv_lora_rank + c.rope_dim) <= expanded

    def expanded(
        self, nope: Tensor, rope: Tensor, latent: Tensor, mask: Tensor | None, causal: bool
    ) -> Float[Tensor, "B T H Q"]:
        """Attends in the expanded form: each latent is projected to every head's key and value."""
        heads = self.expand(nope, rope, latent)
        return attend(heads.query, heads.key, heads.value, self.scale, mask, causal)

    def expand(self, nope: Tensor, rope: Tensor, latent: Tensor) -> Expanded:
        """Joins the parts of the queries, and forms every head's keys and values of the latents."""
        c = self.config
        latent, key = latent.split([c.kv_lora_rank, c.rope_dim], dim=-1)
        up = self.kv_b_proj(latent).unflatten(-1, (c.heads, -1))  # [B, L, H, nope + value]
        key_nope, value = up.split([c.nope_dim, c.value_dim], dim=-1)
        key = by_head(key_nope, key.unsqueeze(2).expand(-1, -1, c.heads, -1))
        return Expanded(by_head(nope, rope), key, value)

    def absorbed(
        self, nope: Tensor, rope: Tensor, latent: Tensor, mask: Tensor | None, causal: bool = False
    ) -> Float[Tensor, "B T H Q"]:
        """Attends in the absorbed form: the queries of every head multiply the latents directly."""
        query, value_up = self.absorb(nope, rope)
        return self.lift(attend_shared(query, latent, self.scale, mask), value_up)

    def absorb(
        self, nope: Tensor, rope: Tensor
    ) -> tuple[Float[Tensor, "B T H R"], Float[Tensor, "H Q C"]]:
        """Returns queries that multiply the latents, and what maps a sum of latents to values."""
        c = self.config
        key_up, value_up = (
            self._up_weight().unflatten(0, (c.heads, -1)).split([c.nope_dim, c.value_dim], dim=1)
        )
        return torch.cat([torch.einsum("bthn,hnr->bthr", nope, key_up), rope], dim=-1), value_up

    def lift(self, summed: Tensor, value_up: Tensor) -> Float[Tensor, "B T H Q"]:
        """Maps each head's sum of latents [B, T, H, R] to its value; the rotary part is dropped."""
        return torch.einsum("bthr,hvr->bthv", summed[..., : self.config.kv_lora_rank], value_up)

    def _up_weight(self) -> Float[Tensor, "HQ R"]:
        """Returns kv_b_proj as a matrix, even if it is no Linear (LoRA, quantised)."""
        if type(self.kv_b_proj) is nn.Linear:
            return self.kv_b_proj.weight
        weight = self.o_proj.weight
        return self.kv_b_proj(
            torch.eye(self.config.kv_lora_rank, dtype=weight.dtype, device=weight.device)
        ).T


class GQA(nn.Module):
    """Grouped-query attention; the first `rope_dim` values of every head are rotated.

    The projections are q_proj, k_proj, v_proj and o_proj. With an output gate q_proj is laid out
    per head as [query | gate]. MoBA, NSA and QSA are subclasses that select keys.
    """

    def __init__(self, config: GQAConfig, dim: int, rope: RopeConfig):
        super().__init__()
        self.config = config
        self.interleaved = rope.interleaved
        self.rope_dim = config.rotated
        self.value_dim = config.value_dim or config.head_dim
        self.scale = config.head_dim**-0.5 * softmax_factor(rope)
        self.gate_dim = self.value_dim if config.output_gate else 0
        widths = config.head_dim + self.gate_dim
        self.q_proj = nn.Linear(dim, config.heads * widths, bias=config.bias)
        self.k_proj = nn.Linear(dim, config.kv_heads * config.head_dim, bias=config.bias)
        self.v_proj = nn.Linear(dim, config.kv_heads * self.value_dim, bias=config.bias)
        self.o_proj = nn.Linear(config.heads * self.value_dim, dim, bias=config.bias)
        norm = CentredRMSNorm if config.centred else RMSNorm
        self.q_norm = norm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = norm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.sink_bias = nn.Parameter(torch.zeros(config.heads)) if config.sinks else None

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> GQACache:
        """Returns an empty cache for keys and values of `capacity` tokens.

        Memory is allocated at the first token.
        """
        return GQACache(Appended(capacity), Appended(capacity))

    def forward(
        self,
        hidden: Float[Tensor, "B T D"],
        ctx: Context,
    ) -> Attended:
        """Returns the output of the new tokens.

        With `ctx.last_only` only the last token has an output. GQA has no indexer to train. With a
        cache the new tokens are appended to it.
        """
        projected = self.project(hidden, ctx)
        if ctx.last_only:
            projected = projected.last(ctx)
            ctx = ctx.last()
        return Attended(self.finish(self._attend(projected, ctx), projected.gate))

    def finish(
        self, out: Float[Tensor, "B T H Q"], gate: Float[Tensor, "B T H Q"] | None
    ) -> Float[Tensor, "B T D"]:
        """Projects the heads' outputs, each multiplied by its gate if there is one."""
        return self.o_proj((out if gate is None else out * gate.sigmoid()).flatten(2))

    def project(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Projected:
        """Returns queries and gates of the new tokens, and keys and values of all tokens.

        With a cache the new keys and values are appended to it.
        """
        c = self.config
        query, key = (
            projection(hidden).unflatten(-1, (heads, -1))
            for projection, heads in ((self.q_proj, c.heads), (self.k_proj, c.kv_heads))
        )
        gate = None
        if self.gate_dim:
            query, gate = query.split([c.head_dim, self.gate_dim], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            query = self.q_norm(query)
            key = self.k_norm(key)
        both = torch.cat([query, key], dim=2)
        turned = ctx.rotate(both[..., : self.rope_dim], self.interleaved)
        if self.rope_dim < c.head_dim:
            turned = torch.cat([turned, both[..., self.rope_dim :]], dim=-1)
        query = turned[:, :, : c.heads]
        key = turned[:, :, c.heads :]
        value = self.v_proj(hidden).unflatten(-1, (c.kv_heads, -1))
        if ctx.cache is not None:
            cache = ctx.cache.attention
            cached = cache.keys.append(key, ctx), cache.values.append(value, ctx)
            # Those that other ranks fill carry gradients (context_parallel.py).
            key, value = cached if ctx.past or cached[0].requires_grad else (key, value)
        return Projected(query, key, value, gate)

    def _attend(self, projected: Projected, ctx: Context) -> Float[Tensor, "B T H Q"]:
        """Attends to all keys, or to those of the config's window, with the sinks if there are any.

        Where all sequences have one length, the keys before every window are not read at all;
        otherwise the mask excludes them.
        """
        query = projected.query
        key = projected.key
        value = projected.value
        window = self.config.window
        time = query.shape[1]
        if window is None or key.shape[1] <= window:
            mask, causal = visibility(ctx)
        else:
            mask = ctx.visible() & ctx.within(window)
            causal = False
            # With one length for all, the keys before `span` are outside every query's window.
            if ctx.starts is None:
                span = window + time - 1
                key = key[:, -span:]
                value = value[:, -span:]
                mask = mask[..., -span:]
        if self.sink_bias is not None:
            return self._attend_with_sink(query, key, value, ctx.visible() if causal else mask)
        return attend(query, key, value, self.scale, mask, causal)

    def _attend_with_sink(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attends with one extra key per head: its logit is the head's sink, its value zero.

        Queries and keys get one extra width: it is 1 in every query, 0 in every real key, and in
        the sink's key the number that gives the logit.
        """
        assert self.sink_bias is not None
        heads = query.shape[2]
        key, value = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value))
        # [H, P + 1]
        sink = F.pad((self.sink_bias / self.scale).to(key.dtype)[:, None], (key.shape[-1], 0))
        key = torch.cat([sink.expand(key.shape[0], 1, -1, -1), F.pad(key, (0, 1))], dim=1)
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=True)
        return attend(
            F.pad(query, (0, 1), value=1.0), key, F.pad(value, (0, 0, 0, 0, 1, 0)), self.scale, mask
        )
