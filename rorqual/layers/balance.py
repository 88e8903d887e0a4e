"""Losses that spread tokens evenly over the experts, and the bias that does it without a loss.

For one sequence of T tokens, E experts, K selected, s the scores:

    f_i = E / (K T) * tokens that took i        P_i = mean over t of s_i / sum_j s_j
    sequence       a * sum_i f_i P_i                                        V3, 1e-4
    expert         the same, s as they are (softmax)                        V1 and V2, 1e-3 to 1e-2
    device         a * sum_d mean(f_i of d) * sum(P_i of d)                 V2, 0.05
    communication  a * sum_d D / (M T) * tokens sent to d * sum(P_i of d)   V2, 0.02
    z_loss         a * mean over tokens of logsumexp(logits)^2              ST-MoE, 1e-3
    bias_i        <- bias_i + rate * sign(mean(counts) - counts_i)          once a step, no gradient

A loss is the mean over sequences, and exactly its coefficient when routing is uniform; the gradient
flows through P. Padding is left out of all of them. DeepSeekMoE arXiv:2401.06066, V2 2405.04434, V3
2412.19437; the bias: 2408.15664; ST-MoE: 2202.08906.
"""

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from rorqual.layers.router import SUM_EPS, Routing
from rorqual.model_config import BalanceConfig as BalanceConfig


def losses(routing: Routing, config: BalanceConfig, active: int) -> dict[str, Float[Tensor, ""]]:
    """Computes every loss with a coefficient, multiplied by it, by the name of its field.

    `active` is K. If token ids select the experts, only the z-loss is left.
    """
    terms = {}
    if not routing.fixed and (
        config.sequence or config.expert or config.device or config.communication
    ):
        whole: Routing = routing if routing.whole is None else routing.whole
        load = _load(whole, active)  # [B, E]
        shares = routing.scores / (routing.scores.sum(-1, keepdim=True) + SUM_EPS)
        if config.sequence:
            terms["sequence"] = config.sequence * _mean(
                (load * _over_time(shares, routing)).sum(-1), routing
            )
        probability = _over_time(routing.scores, routing)  # [B, E]
        if config.expert:
            terms["expert"] = config.expert * _mean((load * probability).sum(-1), routing)
        of_device = probability.unflatten(-1, (config.devices, -1)).sum(-1)  # [B, devices]
        if config.device:
            loads = load.unflatten(-1, (config.devices, -1)).mean(-1)
            terms["device"] = config.device * _mean((loads * of_device).sum(-1), routing)
        if config.communication:
            sent = _sent(whole, config.devices) * config.devices / config.device_limit
            terms["communication"] = config.communication * _mean(
                (sent * of_device).sum(-1), routing
            )
    if config.z_loss:
        terms["z_loss"] = config.z_loss * z_loss(routing.logits, routing.valid)
    return terms


def z_loss(
    logits: Float[Tensor, "B T E"], valid: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, ""]:
    """Averages logsumexp(logits)^2 over valid tokens; this keeps router logits small."""
    squared = logits.logsumexp(-1).square()
    return squared.mean() if valid is None else (squared * valid).sum() / valid.sum().clamp_min(1)


@torch.no_grad()
def update_bias(bias: Float[Tensor, " E"] | None, counts: Num[Tensor, " E"], rate: float) -> None:
    """Computes bias_i += rate * sign(mean(counts) - counts_i), in place.

    `counts` are those of a whole optimizer step, summed over all micro-batches and ranks. A router
    without a bias (None) is left unchanged.
    """
    if bias is not None:
        load = counts.to(bias.device, torch.float64)
        bias += rate * (load.mean() - load).sign().to(bias.dtype)


def max_violation(counts: Num[Tensor, " E"]) -> float:
    """Computes MaxVio = max(counts) / mean(counts) - 1.

    It is 0 when balanced (or empty), and E/K - 1 when all tokens take the same K.
    """
    load = counts.double()
    return float(load.max() / load.mean()) - 1 if load.sum() else 0.0


def _tokens(routing: Routing) -> Int[Tensor, " B"] | int:
    """Returns the number of tokens of a sequence: T, or with padding that of each, at least 1."""
    return routing.scores.shape[1] if routing.valid is None else routing.valid.sum(1).clamp_min(1)


def _per_token(summed: Tensor, routing: Routing) -> Float[Tensor, "B X"]:
    """Divides sums over the tokens of each sequence by the number of its valid tokens."""
    tokens = _tokens(routing)
    return summed / (tokens[:, None] if isinstance(tokens, Tensor) else max(tokens, 1))


def _over_time(values: Float[Tensor, "B T E"], routing: Routing) -> Float[Tensor, "B E"]:
    """Averages values over the valid tokens of each sequence."""
    masked = values if routing.valid is None else values * routing.valid[..., None]
    return _per_token(masked.sum(1), routing)


def _mean(values: Float[Tensor, " B"], routing: Routing) -> Float[Tensor, ""]:
    """Averages over the sequences that hold a valid token."""
    if routing.valid is None:
        return values.mean() if routing.scores.shape[1] else values.sum()
    return values.sum() / routing.valid.any(1).sum().clamp_min(1)


def _load(routing: Routing, active: int) -> Float[Tensor, "B E"]:
    """Computes f, which is 1 for every expert when routing is uniform."""
    experts = routing.scores.shape[-1]
    taken = routing.taken().flatten(1).to(routing.scores.dtype)
    counts = taken.new_zeros(len(taken), experts).scatter_add_(
        1, routing.topk_indices.flatten(1), taken
    )
    return _per_token(counts, routing) * (experts / active)


def _sent(routing: Routing, devices: int) -> Float[Tensor, "B devices"]:
    """Computes the share of a sequence's tokens with at least one expert on each device."""
    device = routing.topk_indices // (routing.scores.shape[-1] // devices)  # [B, T, K]
    taken = routing.taken().to(routing.scores.dtype)
    on = taken.new_zeros(*device.shape[:2], devices).scatter_reduce(-1, device, taken, "amax")
    return _per_token(on.sum(1), routing)
