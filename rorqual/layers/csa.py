"""Attention to a window of keys that are also the values, and to compressed ones before it.

    c      = norm(W_qa x)                          the query latent
    q_h    = rope(norm1(W_qb c)_h, t)              norm1 has no weight
    k_s    = rope(norm(W_kv x_s), s)               one head; the key of a token is also its value
    E_t    = {k_s : t - window < s <= t} and the compressed entries that t sees
    o_h    = sum_{k in E_t} p_h,k k                p_h = softmax over E_t and the head's sink
    out    = W_ob concat_g W_oa,g concat_{h in g} rope(o_h, -t)

rope rotates the last rope_dim values of a vector, in pairs (2i, 2i+1). A value is a key, which was
rotated by its position s; the output is rotated back by -t, so that it depends on s - t alone. The
sink is a learned logit that takes probability and has no value. The heads of a group share a
low-rank output projection.

DeepSeek-V4, section 2.3: compressed sparse attention (CSA) and heavily compressed attention (HCA).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.layers.basics import RMSNorm, rotate
from rorqual.layers.cache import Bundle, Recent
from rorqual.layers.context import Context
from rorqual.layers.sparse import runs
from rorqual.model_config import CSAConfig as CSAConfig


class GroupedLinear(nn.Module):
    """Maps each of `groups` equal parts of a vector by a matrix of its own, to `rank` values."""

    def __init__(self, width: int, rank: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(groups * rank, width // groups) * width**-0.5)

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T R"]:
        parts = x.unflatten(-1, (self.groups, -1)).flatten(0, 1).transpose(0, 1)  # [G, N, W / G]
        weight = self.weight.unflatten(0, (self.groups, -1))
        out = parts @ weight.to(parts.dtype).mT
        return out.transpose(0, 1).reshape(*x.shape[:2], -1)


@dataclass(eq=False)
class SharedKVCache(Bundle):
    """The cache of window attention: the keys of the last `window - 1` tokens."""

    window: Recent


class SharedKV(nn.Module):
    """Window attention with sinks, whose keys are also its values; one key head for all.

    The parameters are named as in DeepSeek-V4's checkpoints. Subclasses add compressed entries:
    they override `compressed` and `select`.
    """

    def __init__(self, config: CSAConfig, dim: int, eps: float = 1e-6, compresses: bool = False):
        """Builds the projections; with `compresses` the compressed layers' rope is used."""
        super().__init__()
        self.config, self.eps, self.compresses = config, eps, compresses
        self.rope_dim, self.scale = config.rope_dim, config.head_dim**-0.5
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

    def forward(
        self, hidden: Float[Tensor, "B T D"], ctx: Context
    ) -> tuple[Float[Tensor, "B T2 D"], Any]:
        """Returns the output of the new tokens, and an IndexerLoss if an indexer is trained.

        With `ctx.last_only` only the last token of each sequence has an output.
        """
        keys = self.keys(hidden, ctx)
        entries = self.compressed(hidden, ctx)
        if ctx.last_only:
            keys = last_window(keys, self.config.window, ctx)
            hidden, ctx = ctx.last_of(hidden), ctx.last()
        latent = self.q_norm(self.wq_a(hidden))
        query = self.queries(latent, ctx)
        selected = self.select(hidden, latent, entries, ctx)
        out, loss = self.attend(query, keys, entries, selected, ctx)
        return self.output(out, ctx), loss

    def queries(self, latent: Float[Tensor, "B T R"], ctx: Context) -> Float[Tensor, "B T H P"]:
        """Returns the rotated queries, each head normed without a weight before."""
        query = self.wq_b(latent).unflatten(-1, (self.config.heads, -1))
        return self.turn(unweighted_norm(query, self.eps), ctx)

    def new_keys(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B T P"]:
        """Returns the rotated keys of the new tokens, as they are cached."""
        return self.turn(self.kv_norm(self.wkv(hidden)), ctx)

    def keys(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Float[Tensor, "B W P"]:
        """Returns the keys of the window - 1 tokens before the new ones, and of those.

        Before the start of a sequence they mean nothing.
        """
        new = self.new_keys(hidden, ctx)
        if ctx.cache is None:
            return F.pad(new, (0, 0, self.config.window - 1, 0))
        return ctx.cache.attention.window.extend(new, ctx)

    def compressed(self, hidden: Float[Tensor, "B T D"], ctx: Context) -> Any:
        """Returns the compressed entries of all tokens; here None, because there are none."""
        return None

    def select(
        self,
        hidden: Float[Tensor, "B T D"],
        latent: Float[Tensor, "B T R"],
        entries: Any,
        ctx: Context,
    ) -> Any:
        """Returns what selects entries for each query; None if every visible one is attended to."""
        return None

    def attend(
        self,
        query: Float[Tensor, "B T H P"],
        keys: Float[Tensor, "B W P"],
        entries: Any,
        selected: Any,
        ctx: Context,
    ) -> tuple[Float[Tensor, "B T H P"], Any]:
        """Attends to the window and to the entries, and returns None or an IndexerLoss."""
        outs = []
        for run in runs(query.shape[1]):
            span = slice(run.start, run.stop + self.config.window - 1)
            mask = window_mask(ctx, self.config.window, run)
            outs.append(
                attend_with_sink(query[:, run], keys[:, span], mask, self.attn_sink, self.scale)
            )
        return torch.cat(outs, dim=1), None

    def output(self, out: Float[Tensor, "B T H P"], ctx: Context) -> Float[Tensor, "B T D"]:
        """Rotates the heads' outputs back and projects them, first in groups."""
        return self.wo_b(self.wo_a(self.turn(out, ctx, back=True).flatten(2)))

    def turn(self, x: Tensor, ctx: Context, back: bool = False) -> Tensor:
        """Rotates the last rope_dim values of each vector of the new tokens."""
        cos, sin = (
            (ctx.compressed_cos, ctx.compressed_sin) if self.compresses else (ctx.cos, ctx.sin)
        )
        assert cos is not None and sin is not None, "a context without rope"
        return rotate_last(x, cos, -sin if back else sin)


def unweighted_norm(x: Float[Tensor, "*B P"], eps: float) -> Float[Tensor, "*B P"]:
    """Computes x / sqrt(mean(x^2) + eps), the root in float32."""
    squares = x if x.dtype == torch.float64 else x.float()
    return x * (squares.square().mean(-1, keepdim=True) + eps).rsqrt().to(x.dtype)


def rotate_last(
    x: Float[Tensor, "B T *H P"], cos: Float[Tensor, "B T F"], sin: Float[Tensor, "B T F"]
) -> Float[Tensor, "B T *H P"]:
    """Rotates the pairs (2i, 2i+1) of the last 2 F values of each vector."""
    width = 2 * cos.shape[-1]
    if x.shape[-1] == width:
        return rotate(x, cos, sin, interleaved=True)
    rest, turned = x.split([x.shape[-1] - width, width], dim=-1)
    return torch.cat([rest, rotate(turned, cos, sin, interleaved=True)], dim=-1)


def window_mask(ctx: Context, window: int, run: slice) -> Bool[Tensor, "#B T W"]:
    """Returns which keys of `SharedKV.keys` the new tokens `run` see, among those of the run.

    Key j of the run is j - window + 1 tokens behind its first query.
    """
    count, device = run.stop - run.start, ctx.positions.device
    behind = torch.arange(count, device=device)[:, None] + window - 1
    behind = behind - torch.arange(count + window - 1, device=device)  # [T, W]
    inside = ((behind >= 0) & (behind < window))[None]
    document_ids = ctx.documents_before(window - 1)
    if document_ids is not None:
        theirs = document_ids[:, run.start : run.stop + window - 1]
        return inside & (theirs[:, None] == theirs[:, window - 1 :, None])
    # Keys before column 0 do not exist.
    columns = ctx.columns[:, run] if ctx.starts is not None else ctx.columns[:1, run]
    return inside & (behind <= columns[..., None])


def last_window(
    keys: Float[Tensor, "B W P"], window: int, ctx: Context
) -> Float[Tensor, "B W2 P"]:
    """Returns the `window` keys up to the last valid new token of each sequence."""
    if ctx.lengths is None:
        return keys[:, -window:]
    first = (ctx.lengths - 1).clamp_min(0)
    index: Int[Tensor, "B W2"] = first[:, None] + torch.arange(window, device=keys.device)
    return keys[torch.arange(len(keys), device=keys.device)[:, None], index]


def attend_with_sink(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L P"],
    mask: Bool[Tensor, "#B T L"],
    sink: Float[Tensor, " H"],
    scale: float,
) -> Float[Tensor, "B T H P"]:
    """Attends to keys that are also the values, with one logit more for each head, its sink."""
    logits = ((query * scale).flatten(1, 2) @ key.mT).unflatten(1, query.shape[1:3])
    logits = logits.float() if logits.dtype != torch.float64 else logits
    logits = logits.masked_fill(~mask[:, :, None], -torch.inf)
    sinks = sink.to(logits.dtype)[:, None].expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
    return (weights.to(key.dtype).flatten(1, 2) @ key).view_as(query)
