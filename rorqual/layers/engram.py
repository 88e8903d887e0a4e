"""Engram: adds looked-up n-gram memory to the residual streams of a block.

    memory = table[row], all heads of all orders side by side            constant-time lookup
    gate_s = sigmoid(ssqrt(<norm(hidden_s), norm(W_k,s memory)> / sqrt(D)))      one a stream s
    v_s    = gate_s W_v memory
    out_s  = v_s + silu(conv(norm(v_s)))              added to stream s before attention

For ablations `gating` is "shared", which gives all streams the gate of their mean, or "open", where
every gate is 1. Conditional Memory via Scalable Lookup, arXiv:2601.07372. The signed square root is
in the authors' code, not in eq. 4.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rorqual.kernels import kernel
from rorqual.layers.addresses import (
    Addresses,
    draw_multipliers,
    hash_rows,
)
from rorqual.layers.cache import Recent
from rorqual.layers.context import Context
from rorqual.layers.convolution import convolve
from rorqual.model_config import EngramConfig, head_primes, row_totals

# This module is the public API for the names of the paper.
__all__ = [
    "Addresses",
    "Engram",
    "EngramConfig",
    "Gate",
    "convolve",
    "draw_multipliers",
    "fuse",
    "gate",
    "hash_rows",
    "head_primes",
    "row_totals",
]

_FLAT = 1e-6  # below this |score| the signed square root is constant


class Gate(nn.Module):
    """Computes the gate of each stream on the looked-up memory.

    Hook its output to record the gates.
    """

    def __init__(self, config: EngramConfig, dim: int, streams: int) -> None:
        super().__init__()
        self.gating = config.gating
        self.sign = config.sign
        self.eps = config.eps
        self.offset = float(config.centred)
        if gates := config.gates(streams):
            self.key_norm = nn.Parameter(torch.full((gates, dim), 1.0 - self.offset))
            self.query_norm = nn.Parameter(torch.full((gates, dim), 1.0 - self.offset))

    def forward(
        self, hidden: Float[Tensor, "B T S D"], key: Float[Tensor, "B T G D"] | None
    ) -> Float[Tensor, "B T S"]:
        """Computes gates in (0, 1), float32, one for each key; they are 1 if there is no key."""
        shape = hidden.shape[:-1]
        if key is None:
            return torch.ones(shape, dtype=torch.float32, device=hidden.device)
        if self.gating == "shared":
            hidden = hidden.float().mean(2, keepdim=True)
        query_norm, key_norm = (
            norm_weight(x, self.offset) for x in (self.query_norm, self.key_norm)
        )
        query = _norm(hidden, query_norm, self.eps)
        return gate(query, _norm(key, key_norm, self.eps), self.sign).expand(shape)


def norm_weight(stored: Tensor, offset: float) -> Tensor:
    """Returns the weight that a norm multiplies with: what is stored, or one more, in float32."""
    return stored.float() + offset if offset else stored


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes the RMS norm over the last axis, with a weight for each stream, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps) * weight.float()


def gate(
    query: Float[Tensor, "B T S D"],
    key: Float[Tensor, "B T S D"],
    sign: Literal["sign", "copysign"] = "sign",
) -> Float[Tensor, "B T S"]:
    """Computes sigmoid(sign(score) sqrt(max(|score|, 1e-6))) in float32.

    score = <query, key> / sqrt(D). The slope of the root reaches 500 just above 1e-6 and is 0
    below.
    """
    score = (query.float() * key.float()).sum(-1) * query.shape[-1] ** -0.5
    root = score.abs().clamp_min(_FLAT).sqrt()
    return torch.sigmoid(root.copysign(score) if sign == "copysign" else root * score.sign())


def gate_value(
    gates: Float[Tensor, "B T S"],
    value: Float[Tensor, "B T D"],
    conv_norm: Float[Tensor, "S D"] | None,
    lookup_mask: Bool[Tensor, "B T"] | None,
    eps: float,
) -> tuple[Float[Tensor, "B T S D"], Float[Tensor, "B T S D"] | None]:
    """Computes v_s = gate_s value and norm(v_s).

    The gate is 0 where `lookup_mask` is False. The norm is None without its weight `conv_norm`.
    """
    if lookup_mask is not None:
        gates = gates.masked_fill(~lookup_mask[..., None], 0.0)
    gated = gates[..., None].to(value.dtype) * value[:, :, None]
    return gated, None if conv_norm is None else _norm(gated, conv_norm, eps).to(gated.dtype)


@kernel(triton="rorqual.kernels.triton_fuse:fuse")
def fuse(
    hidden: Float[Tensor, "B T S D"],
    key: Float[Tensor, "B T S D"],
    value: Float[Tensor, "B T D"],
    query_norm: Float[Tensor, "S D"],
    key_norm: Float[Tensor, "S D"],
    conv_norm: Float[Tensor, "S D"] | None,
    lookup_mask: Bool[Tensor, "B T"] | None,
    sign: Literal["sign", "copysign"],
    eps: float,
    conv_eps: float,
) -> tuple[Float[Tensor, "B T S D"], Float[Tensor, "B T S D"] | None]:
    """Computes the gates of the normed inputs and `gate_value`, as one function for a kernel.

    It is all from the projections to the convolution. Norms and gates are in float32, both results
    in the dtype of `value`.
    """
    gates = gate(_norm(hidden, query_norm, eps), _norm(key, key_norm, eps), sign)
    return gate_value(gates, value, conv_norm, lookup_mask, conv_eps)


def _hooked(module: nn.Module) -> bool:
    """Returns whether the module has hooks, its own or global ones."""
    hooked = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooked) or bool(nn.modules.module._has_any_global_hook())


class Engram(nn.Module):
    """Computes what a block's memory adds to the residual streams before attention."""

    def __init__(self, config: EngramConfig, dim: int, streams: int = 1) -> None:
        super().__init__()
        if dim < 1 or streams < 1:
            raise ValueError(
                f"Engram: got dim {dim} and {streams} streams, expected at least 1 of each"
            )
        self.config = config
        self.dim = dim
        self.streams = streams
        gates = config.gates(streams)
        self.key_proj = (
            nn.Linear(config.memory_width, gates * dim, bias=config.bias) if gates else None
        )
        self.value_proj = nn.Linear(config.memory_width, dim, bias=config.bias)
        self.gate = Gate(config, dim, streams)
        if config.conv:
            self.conv_norm = nn.Parameter(torch.full((streams, dim), 1.0 - config.centred))
            self.conv = nn.Parameter(torch.zeros(streams, dim, config.kernel))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Resets the parameters so that at first the output is the gated value alone.

        Projections are normal with deviation `std`, biases 0, norms multiply by 1, the convolution
        is 0.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.fill_(float(name.endswith("norm") and not self.config.centred))

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> Recent | None:
        """Returns a cache for the last (kernel-1) * dilation normed values of every stream.

        Returns None without a convolution.
        """
        return Recent(self.config.halo) if self.config.halo else None

    def forward(
        self,
        hidden: Float[Tensor, "B T S D"],
        ctx: Context,
    ) -> Float[Tensor, "B T S D"]:
        """Computes the update of `hidden` from the rows in `ctx`.

        The gate is 0 where `ctx.lookup_mask` (or ctx.valid) is False. ValueError for memory of
        another width than the config's: rows of a table that was made for another config.
        """
        memory = ctx.rows.wait().flatten(-2)  # [B, T, M]
        if memory.shape[-1] != self.config.memory_width:
            got = (
                f"got {memory.shape[-1]} numbers looked up a token, "
                f"expected {self.config.memory_width}"
            )
            read = f"{self.config.rows_per_token} rows of {self.config.head_dim}"
            raise ValueError(
                f"Engram: {got}, {read}: give it a table of that head_dim, or the table's config"
            )
        memory = memory.to(self.value_proj.weight.dtype)
        key = None if self.key_proj is None else self.key_proj(memory).unflatten(-1, (-1, self.dim))
        value = self.value_proj(memory)
        lookup_mask = ctx.valid if ctx.lookup_mask is None else ctx.lookup_mask
        offset = self.gate.offset
        conv_eps = self.config.conv_eps
        conv_norm = norm_weight(self.conv_norm, offset) if self.config.conv else None
        if key is None or self.config.gating != "streams" or _hooked(self.gate):
            gates = self.gate(hidden, key)
            gated, normed = gate_value(gates, value, conv_norm, lookup_mask, conv_eps)
        else:
            # One fused operation: every stream has its own gate, which no hook waits for.
            query_norm = norm_weight(self.gate.query_norm, offset)
            norms = (query_norm, norm_weight(self.gate.key_norm, offset), conv_norm)
            constants = (self.config.sign, self.config.eps, conv_eps)
            gated, normed = fuse(hidden, key, value, *norms, lookup_mask, *constants)
        return gated if normed is None else gated + F.silu(self._convolve(normed, ctx))

    def _convolve(self, normed: Tensor, ctx: Context) -> Tensor:
        """Applies the causal convolution to the normed values, within each document.

        Values before the first token are those of earlier calls, from the cache, or zeros without
        one.
        """
        cache = None if ctx.cache is None else ctx.cache.engram
        halo = self.config.halo
        if not halo:
            window = normed
        elif cache is None:
            window = F.pad(normed, (0, 0, 0, 0, halo, 0))
        else:
            window = cache.extend(normed, ctx)
        document_ids = ctx.documents_before(halo) if self.config.end_of_document else None
        return convolve(window, self.conv, document_ids, halo)
