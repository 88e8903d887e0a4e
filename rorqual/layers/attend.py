"""Computes softmax attention, masked or causal, for grouped query heads.

    out[t] = sum_s softmax_s(scale q_t . k_s) v_s     over the keys t sees; zeros if it sees none

It is one call of torch's fused attention, or a loop over blocks of queries where the fused call
would spend its time above the diagonal.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

FUSED_KEYS = 512  # keys that the fused path of a CPU processes together
BLOCK = 64  # queries; their scores fit a core's cache


def attend(
    query: Float[Tensor, "B T H P"],
    key: Float[Tensor, "B L G P"],
    value: Float[Tensor, "B L G Q"],
    scale: float,
    mask: Bool[Tensor, "#B 1 #T L"] | None = None,
    causal: bool = False,
) -> Float[Tensor, "B T H Q"]:
    """Computes softmax(scale q . k) v with H query heads over G key heads.

    Query t sees the keys where `mask` is True. Without a mask it sees those up to t (`causal`, T =
    L) or all. A query that sees no key gets zeros. The fused path needs values as wide as keys: the
    narrower of the two are padded with zeros, which change nothing. If each sequence has one query,
    the heads of a group are treated as queries, so that each key is read once for all of them.
    """
    if query.shape[1] == 1 and query.shape[2] != key.shape[2]:
        folded = query[:, 0].unflatten(1, (key.shape[2], -1)).transpose(1, 2)
        return attend(folded, key, value, scale, mask).transpose(1, 2).flatten(1, 2)[:, None]
    dtype = query.dtype
    key_width = key.shape[-1]
    value_width = value.shape[-1]
    if (
        query.device.type == "cpu"
        and query.requires_grad
        and dtype in (torch.bfloat16, torch.float16)
    ):
        # The backward pass is faster in float32 on a CPU.
        query = query.float()
        key = key.float()
        value = value.float()
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
    """Attends with one key head whose keys are also the values.

    Each key is read once for all query heads. Without a mask every query sees every key.
    """
    heads = query.shape[2]
    if mask is not None and mask.shape[2] > 1:
        # All H queries of a token see the same keys.
        mask = mask.repeat_interleave(heads, dim=2)
    key = key.unsqueeze(2)
    return attend(query.flatten(1, 2).unsqueeze(2), key, key, scale, mask).view_as(query)


def _blocks_are_faster(query: Tensor, key: Tensor) -> bool:
    """Returns whether the loop over blocks is faster than the fused path.

    The fused path of a CPU processes 512 keys at a time, so up to that length it computes
    everything above the diagonal too.
    """
    plain = query.is_cpu and query.dtype == torch.float32 and query.shape == key.shape
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return plain and not traced and query.shape[2] <= FUSED_KEYS


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Computes causal attention for BLOCK queries of all heads at a time, over the keys up to them.

    Maps [B, H, T, P] to [B, T, H, Q].
    """
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
    """Concatenates two tensors to [B, L, H, P1 + P2], the tokens of each head contiguous.

    The fused path reads them in this layout.
    """
    return torch.cat([first.transpose(1, 2), second.transpose(1, 2)], dim=-1).transpose(1, 2)
