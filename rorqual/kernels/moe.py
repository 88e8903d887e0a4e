"""Biased scores, or chosen experts, in -> the best experts, or rows sorted by expert, out: compiled twins, on the CPU.

best   one pass over a token's scores with its K best in hand        twin of layers.router.best
sort   counts, then one pass that puts every slot into its place     twin of layers.moe.sort_by_expert
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rorqual.kernels.compiled import compiled


@compiled
def _best(scores, chosen):  # pragma: no cover
    """Equal scores: the lower expert. The K best so far are kept in order, so most scores cost one comparison."""
    tokens, experts = scores.shape
    active = chosen.shape[1]
    values = np.empty(active, scores.dtype)
    for t in range(tokens):
        row, places = scores[t], chosen[t]
        values[:] = -np.inf
        for k in range(active):
            places[k] = k
        worst = values[0]
        for e in range(experts):
            value = row[e]
            if value > worst:
                k = active - 1
                while k > 0 and values[k - 1] < value:
                    values[k], places[k] = values[k - 1], places[k - 1]
                    k -= 1
                values[k], places[k] = value, e
                worst = values[active - 1]


@compiled
def _sort(chosen, order, rows, ends):  # pragma: no cover
    """`ends` comes as zeros and first holds where each expert's rows start."""
    slots, experts = chosen.shape[0], ends.shape[0]
    for s in range(slots):
        ends[chosen[s]] += 1
    start = 0
    for e in range(experts):
        ends[e], start = start, start + ends[e]
    for s in range(slots):
        row = ends[chosen[s]]
        order[row], rows[s] = s, row
        ends[chosen[s]] = row + 1


def best(scores: Float[Tensor, "*N E"], active: int) -> Int[Tensor, "*N K"]:
    """The `active` best experts of every token, best first."""
    flat = scores.detach().reshape(-1, scores.shape[-1])
    chosen = torch.empty(len(flat), active, dtype=torch.long)
    _best(flat.numpy(), chosen.numpy())
    return chosen.view(*scores.shape[:-1], active)


def sort(chosen: Int[Tensor, " slots"], experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order [slots], rows [slots], and the row behind each expert's last, [E]; slots of expert E come last."""
    order, rows, ends = torch.empty_like(chosen), torch.empty_like(chosen), chosen.new_zeros(experts + 1)
    _sort(chosen.numpy(), order.numpy(), rows.numpy(), ends.numpy())
    return order, rows, ends[:-1]
