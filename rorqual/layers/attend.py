"""Queries, keys and values in -> each query's mean of the values, weighted by how its keys score, out.

    out[t] = sum_s softmax_s(scale q_t . k_s) v_s          over the keys a query sees; zeros where it sees none

One call of torch's fused attention, or, where that would spend its time above the diagonal, blocks of queries.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

FUSED_KEYS = 512  # that the fused path of a CPU takes together
BLOCK = 64  # queries; their scores stay in a core's cache


def attend(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    scale: float,
    mask: Bool[Tensor, "#B 1 #T L"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "B T H Q"]:
    """softmax(scale q . k) v, H query heads over G key heads; a query that sees no key gets zeros.

    Query t sees the keys where `mask` is True; without a mask those up to t (`causal`, T = L) or all. The fused path
    wants values as wide as keys: the narrower are padded with zeros, which change nothing. Where a row has one query,
    the heads of a group stand as if they were queries, so that each key is read once for all of them.
    """
    if query.shape[1] == 1 and query.shape[2] != key.shape[2]:
        folded = query[:, 0].unflatten(1, (key.shape[2], -1)).transpose(1, 2)
        return attend(folded, key, value, scale, mask).transpose(1, 2).flatten(1, 2)[:, None]
    dtype, key_width, value_width = query.dtype, key.shape[-1], value.shape[-1]
    if (
        query.device.type == "cpu"
        and query.requires_grad
        and dtype in (torch.bfloat16, torch.float16)
    ):
        query, key, value = (
            query.float(),
            key.float(),
            value.float(),
        )  # its backward is the faster one there
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if causal and _blocks_are_faster(query, key):
        return _by_blocks(query, key, value, scale)
    if value_width < key_width:
        value = F.pad(value, (0, key_width - value_width))
    elif value_width > key_width:
        query, key = (F.pad(x, (0, value_width - key_width)) for x in (query, key))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)[..., :value_width].to(dtype)


def attend_shared(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L P"],
    scale: float,
    mask: Bool[Tensor, "#B 1 #T L"] | None,
) -> Float[Tensor, "B T H P"]:
    """`attend` with one key head, whose keys are the values too, and no query before its mask: each key is read once
    for all heads."""
    heads = query.shape[2]
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat_interleave(heads, dim=2)  # each token's H queries see what it sees
    key = key.unsqueeze(2)
    return attend(query.flatten(1, 2).unsqueeze(2), key, key, scale, mask).view_as(query)


def _blocks_are_faster(query: Tensor, key: Tensor) -> bool:
    """Than the fused path, which looks at keys 512 at a time on a CPU: below that at all above the diagonal, too."""
    plain = query.is_cpu and query.dtype == torch.float32 and query.shape == key.shape
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return plain and not traced and query.shape[2] <= FUSED_KEYS


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of BLOCK queries of all heads at a time to the keys up to them; [B, H, T, P] to [B, T, H, Q]."""
    batch, heads, time, _ = query.shape
    later = query.new_full((BLOCK, BLOCK), -torch.inf).triu_(1)
    query, key, value = (x.reshape(batch * heads, time, -1) for x in (query * scale, key, value))
    out = value.new_empty(batch, time, heads, value.shape[-1])
    for start in range(0, time, BLOCK):
        end = min(start + BLOCK, time)
        scores = query[:, start:end] @ key[:, :end].transpose(1, 2)
        scores[..., start:] += later[: end - start, : end - start]
        out[:, start:end] = (
            (scores.softmax(-1) @ value[:, :end]).unflatten(0, (batch, heads)).transpose(1, 2)
        )
    return out


def by_head(first: Tensor, second: Tensor) -> Tensor:
    """[B, L, H, P1 + P2], a head's tokens side by side in memory: so the fused path reads them."""
    return torch.cat([first.transpose(1, 2), second.transpose(1, 2)], dim=-1).transpose(1, 2)
