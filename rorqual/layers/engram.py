"""Recalled rows and hidden states in -> what is added to the hidden states out.

    memory = table[row], all heads of all orders side by side                     constant-time recall
    gate_s = sigmoid(ssqrt(<norm(hidden_s), norm(W_k,s memory)> / sqrt(D)))       how far stream s trusts it
    v_s    = gate_s W_v memory
    out_s  = v_s + silu(conv(norm(v_s)))                                          added to stream s before attention

Conditional Memory via Scalable Lookup, arXiv:2601.07372. The signed square root is in the authors' code, not in eq. 4.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rorqual.layers.addresses import (
    Addresses,
    EngramConfig,
    draw_multipliers,
    find_primes,
    hash_rows,
    last_columns,
    row_totals,
)
from rorqual.layers.basics import Layout
from rorqual.layers.cache import Recent

# The paper's names have one door, this one.
__all__ = [
    "Addresses",
    "Engram",
    "EngramConfig",
    "Gate",
    "draw_multipliers",
    "find_primes",
    "gate",
    "hash_rows",
    "row_totals",
]

_FLAT = 1e-6  # below this |score| the signed square root is constant


class Gate(nn.Module):
    """How far each stream trusts what was recalled. Hook its output to see the gates."""

    def __init__(self, config: EngramConfig, dim: int, streams: int) -> None:
        super().__init__()
        self.sign, self.eps = config.sign, config.eps
        self.key_norm = nn.Parameter(torch.ones(streams, dim))
        self.query_norm = nn.Parameter(torch.ones(streams, dim))

    def forward(self, hidden: Float[Tensor, "B T S D"], key: Float[Tensor, "B T S D"]) -> Float[Tensor, "B T S"]:
        """In (0, 1), float32."""
        query = _norm(hidden, self.query_norm, self.eps)
        return gate(query, _norm(key, self.key_norm, self.eps), self.sign)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, a weight for each stream; float32."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps) * weight.float()


def gate(
    query: Float[Tensor, "B T S D"], key: Float[Tensor, "B T S D"], sign: Literal["sign", "copysign"] = "sign"
) -> Float[Tensor, "B T S"]:
    """sigmoid(sign(score) sqrt(max(|score|, 1e-6))), score = <query, key> / sqrt(D), in float32.

    The slope of the root reaches 500 just above 1e-6 and is 0 below.
    """
    score = (query.float() * key.float()).sum(-1) * query.shape[-1] ** -0.5
    root = score.abs().clamp_min(_FLAT).sqrt()
    return torch.sigmoid(root.copysign(score) if sign == "copysign" else root * score.sign())


class Engram(nn.Module):
    """What a block remembers: memory and residual streams -> what is added to the streams before attention."""

    def __init__(self, config: EngramConfig, dim: int, streams: int = 1) -> None:
        super().__init__()
        if dim < 1 or streams < 1:
            raise ValueError(f"Engram: got dim {dim} and {streams} streams, expected at least 1 of each")
        self.config, self.dim, self.streams = config, dim, streams
        self.key_proj = nn.Linear(config.memory_width, streams * dim, bias=config.bias)
        self.value_proj = nn.Linear(config.memory_width, dim, bias=config.bias)
        self.gate = Gate(config, dim, streams)
        if config.conv:
            self.conv_norm = nn.Parameter(torch.ones(streams, dim))
            self.conv = nn.Parameter(torch.zeros(streams, dim, config.kernel))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None, std: float = 0.02) -> None:
        """Projections normal with deviation `std`, biases 0, norm weights 1, convolution 0: at first out = v."""
        for name, parameter in self.named_parameters():
            if name.endswith("proj.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.fill_(float(name.endswith("norm")))

    def new_cache(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> Recent | None:
        """The last (kernel-1) * dilation normed values of every stream; None without a convolution."""
        return Recent(self.config.halo) if self.config.halo else None

    def forward(
        self,
        hidden: Float[Tensor, "B T S D"],
        memory: Float[Tensor, "B T M"],
        layout: Layout,
        cache: Recent | None = None,
        live: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T S D"]:
        """What to add to `hidden`. Where `live` (by default layout.present) is False the gate is 0."""
        memory = memory.to(self.key_proj.weight.dtype)
        key = self.key_proj(memory).unflatten(-1, (self.streams, self.dim))
        value = self.value_proj(memory)
        gates = self.gate(hidden, key)
        live = layout.present if live is None else live
        if live is not None:
            gates = gates.masked_fill(~live[..., None], 0.0)
        gated = gates[..., None].to(value.dtype) * value[:, :, None]  # [B, T, S, D]
        if not self.config.conv:
            return gated
        normed = _norm(gated, self.conv_norm, self.config.conv_eps).to(gated.dtype)
        return gated + F.silu(self._convolve(normed, layout, cache))

    def _convolve(self, normed: Tensor, layout: Layout, cache: Recent | None) -> Tensor:
        """Depthwise and causal: weight[..., kernel-1-j] takes the value j * dilation before, within its document."""
        time, halo, kernel = normed.shape[1], self.config.halo, self.config.kernel
        window = normed if not halo else F.pad(normed, (0, 0, 0, 0, halo, 0)) if cache is None else cache.extend(normed)
        documents = layout.key_documents if self.config.end_of_document else None
        kept = None if documents is None else last_columns(documents, halo + time, -1)
        out = normed * self.conv[..., -1]
        for j in range(1, kernel):
            start = halo - j * (halo // (kernel - 1))
            tap = window[:, start : start + time]
            if kept is not None:
                other = kept[:, start : start + time] != kept[:, halo:]
                tap = tap.masked_fill(other[..., None, None], 0.0)
            out = out + tap * self.conv[..., kernel - 1 - j]
        return out
