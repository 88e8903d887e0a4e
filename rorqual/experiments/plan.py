"""A budget -> the configs that spend it: pure mixture of experts, part of it given to memory, dense control.

    rho = (E - k) / (E0 - k)        share of the inactive experts that stay experts, of E0 in the pure model
    E   = k + round(rho (E0 - k))   routed experts beside the memory, k chosen for a token; then the nearest number
                                    that the router's groups and the devices divide, with room for k

What the other experts held goes to Engram's rows, after its projections have been paid for: the totals agree. Where the
projections add more FLOPs a token than `FLOP_TOLERANCE`, the pure model's shared expert is widened by as many.
Conditional Memory via Scalable Lookup, arXiv 2601.07372, section 3.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from rorqual.costs import Costs, costs
from rorqual.layers.engram import EngramConfig
from rorqual.layers.moe import MoEConfig
from rorqual.model import ModelConfig

FLOP_TOLERANCE = 0.01  # of the pure model's activated FLOPs
TOTAL_TOLERANCE = 0.005  # of its parameters


class Arm(NamedTuple):
    """One way to spend the budget."""

    name: str
    config: ModelConfig
    costs: Costs


class Plan(NamedTuple):
    """Arms of equal total parameters and equal activated FLOPs a token; `dense` has the FLOPs alone."""

    rho: float  # as reached with whole experts
    moe: Arm
    engram: Arm
    dense: Arm


def split_budget(
    base: ModelConfig, rho: float, engram: EngramConfig | None = None, *, context: int = 4096, widen: bool = True
) -> Plan:
    """Gives 1 - rho of the inactive experts of `base` to a memory shaped like `engram` (its rows are solved for).

    `widen` False keeps `base` as it is, to see what the projections cost. ValueError when rho is outside [0, 1], `base`
    has no experts, or the projections cost more than the experts given up. Where no expert can be given up, the rho
    reached is 1 and the memory arm is `base`.
    """
    if base.moe is None:
        raise ValueError("base: got a model without experts, expected moe to be on")
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"rho: got {rho}, expected 0..1, the share of inactive experts that stay experts")
    moe = replace(base, engram=None)
    kept = _kept_experts(base.moe, rho)
    reached = (kept - base.moe.active) / max(1, base.moe.routed - base.moe.active)
    if kept == base.moe.routed:
        arm = Arm("moe", moe, costs(moe, context))
        return Plan(1.0, arm, arm._replace(name="engram"), _dense(arm, context))
    template = engram or base.engram or default_memory(base)
    fewer = replace(base.moe, routed=kept)
    empty = replace(base, moe=fewer, engram=with_rows(template, 2))
    if widen:
        moe = _widened(moe, costs(empty, context), context)
    pure = Arm("moe", moe, costs(moe, context))
    config = replace(empty, engram=_solve_rows(pure.costs, empty, template, context))
    return Plan(reached, pure, Arm("engram", config, costs(config, context)), _dense(pure, context))


def _kept_experts(moe: MoEConfig, rho: float) -> int:
    router, step = moe.router, math.lcm(moe.router.groups, moe.balance.devices)
    size = math.ceil(moe.active / router.groups_kept)  # least experts a group
    if router.groups_kept < router.groups and router.group_score == "top2":
        size = max(2, size)
    least = math.ceil(router.groups * size / step) * step
    wanted = moe.active + round(rho * (moe.routed - moe.active))
    return min(moe.routed, max(least, step * round(wanted / step)))


def default_memory(base: ModelConfig) -> EngramConfig:
    """The paper's shape in small: one early block, a second near the middle from eight blocks on, orders 2 and 3."""
    layers = (1,) if base.layers < 8 else (1, base.layers // 2 - 1)
    head_dim = max(8, base.dim // 32 // 4 * 4)
    return EngramConfig(layers=tuple(i for i in layers if i < base.layers) or (0,), heads=8, head_dim=head_dim)


def with_rows(config: EngramConfig, rows: int) -> EngramConfig:
    """The same memory with this many rows a head in every order."""
    return replace(config, rows_per_head=(rows,) * len(config.rows_per_head))


def _widened(moe: ModelConfig, wanted: Costs, context: int) -> ModelConfig:
    """The pure model with its shared expert widened until its FLOPs reach `wanted`."""
    assert moe.moe is not None
    have = costs(moe, context).flops_per_token
    missing = wanted.flops_per_token - have
    if missing <= FLOP_TOLERANCE * have:
        return moe
    blocks = sum(moe.has_experts(i) for i in range(moe.layers))
    more = round(missing / (2 * 3 * moe.dim * blocks)) if blocks else 0
    if not more:
        return moe
    return replace(moe, moe=replace(moe.moe, shared=max(1, moe.moe.shared), shared_width=moe.moe.shared_hidden + more))


def _solve_rows(target: Costs, empty: ModelConfig, template: EngramConfig, context: int) -> EngramConfig:
    spent = costs(empty, context)
    free = target.total - (spent.total - spent.memory)
    row = len(template.layers) * len(template.rows_per_head) * template.heads * template.head_dim
    rows = free // row
    if rows < 2:
        raise ValueError(
            f"rho: got a memory of {free:,} parameters after its projections, expected at least {2 * row:,}; "
            "lower rho, or narrow the memory (fewer heads, a smaller head_dim, fewer layers)"
        )
    config = with_rows(template, rows)
    got = costs(replace(empty, engram=config), context).total  # primes lie a little above what was asked for
    return with_rows(template, rows - max(0, round((got - target.total) / row)))


def _dense(pure: Arm, context: int) -> Arm:
    """No experts, the same FLOPs a token: the control that says what sparsity brought."""
    config = replace(pure.config, moe=None, engram=None)
    step = 2 * 3 * config.dim * config.layers
    narrow = costs(replace(config, dense_width=1), context).flops_per_token
    width = max(1, 1 + round((pure.costs.flops_per_token - narrow) / step))
    config = replace(config, dense_width=width)
    return Arm("dense", config, costs(config, context))


def agreement(plan: Plan) -> tuple[float, float]:
    """How far the memory arm is from the pure one: relative difference of total parameters, of FLOPs a token."""
    a, b = plan.moe.costs, plan.engram.costs
    return b.total / a.total - 1, b.flops_per_token / a.flops_per_token - 1
