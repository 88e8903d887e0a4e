"""Plans how to spend a budget: on experts alone, on experts and memory, or on a dense control.

    rho = (E - k) / (E0 - k)        share of the inactive experts that stay experts;
                                    E0 are the experts of the pure model
    E   = k + round(rho (E0 - k))   routed experts beside the memory, k activated per token; then
                                    the nearest number that the router's groups and the devices
                                    divide, with enough experts for k

The parameters of the other experts go to Engram's rows, after its projections have been paid for,
so that the totals agree. Where the projections add more FLOPs per token than `FLOP_TOLERANCE`, a
shared expert evens them out: the pure model's is widened, or the memory arm's is narrowed where the
pure model has its budget already.

Conditional Memory via Scalable Lookup, arXiv 2601.07372, section 3.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from rorqual.costs import Costs, costs
from rorqual.experiments.budget import (
    FLOP_TOLERANCE,
    TOTAL_TOLERANCE,
    Budget,
    least_experts,
    scaled_memory,
    spend,
    step_of,
)
from rorqual.experiments.devices import Machine
from rorqual.model_config import EngramConfig, ModelConfig, MoEConfig, row_totals

RHO = 0.75  # the minimum of the paper's curve


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """Spends one budget in three ways: on experts, on experts and memory, and on a dense model.

    The dense model has the same FLOPs alone. The bytes and the step time of each on the machine are
    estimates from its maker's figures.

    rorqual plan --like moe-27b --rho 0.743
    rorqual plan --total 2.7e10 --activated 3.8e9 --device h200 --devices 64
    """

    # a preset or run folder with experts: the shape, and every budget that is not given
    like: str = "moe-27b"
    # the model of `like`; flags change it
    model: ModelConfig = field(default_factory=ModelConfig)
    total: float | None = None  # parameters; backbone and experts are solved for
    activated: float | None = None  # parameters used per token, all but the input embedding
    flops: float | None = None  # per token, forward pass; instead of `activated`
    # share of the inactive experts that stay experts; 0.75, or that of a `like` with memory
    rho: float | None = None
    context: int = 4096  # sequence length; a token attends over half of it on average
    machine: Machine = field(default_factory=Machine)


class Arm(NamedTuple):
    """One way to spend the budget."""

    name: str
    config: ModelConfig
    costs: Costs


class Plan(NamedTuple):
    """Arms of equal total parameters and FLOPs per token; `dense` has equal FLOPs alone."""

    rho: float  # as reached with whole experts
    moe: Arm
    engram: Arm
    dense: Arm


def plan_budget(
    like: ModelConfig, budget: Budget, rho: float | None = None, *, context: int = 4096
) -> Plan:
    """Returns arms shaped like `like` that have the budget; open values are those of `like`.

    A `like` with memory, no budget and no rho is the memory arm itself, and its pure mixture is
    solved for. Otherwise a rho of None means 0.75. ValueError for what cannot be had.
    """
    if like.moe is None or (budget == Budget() and like.engram is None):
        return split_budget(like, RHO if rho is None else rho, context=context)
    pure = spend(like, budget, context=context)
    if rho is not None or budget != Budget():
        shape = None if like.engram is None else scaled_memory(like.engram, like, pure)
        return split_budget(
            pure, RHO if rho is None else rho, shape, context=context, pays="memory"
        )
    assert like.engram is not None and pure.moe is not None
    reached = (like.moe.routed - like.moe.active) / (pure.moe.routed - pure.moe.active)
    arm = Arm("moe", pure, costs(pure, context))
    return Plan(reached, arm, Arm("engram", like, costs(like, context)), _dense(arm, context))


def split_budget(
    base: ModelConfig,
    rho: float,
    engram: EngramConfig | None = None,
    *,
    context: int = 4096,
    pays: Literal["pure", "memory"] = "pure",
) -> Plan:
    """Gives 1 - rho of the inactive experts of `base` to a memory shaped like `engram`.

    The rows of the memory are solved for. `pays` selects the shared expert that evens out the FLOPs
    of the projections: "pure" widens that of the pure model, "memory" narrows that of the memory
    arm. ValueError when rho is outside [0, 1], `base` has no experts, or the projections cost more
    than what is given up. Where no expert can be given up, the rho reached is 1 and the memory arm
    is `base` without memory.
    """
    if base.moe is None:
        raise ValueError("base: got a model without experts, expected moe to be on")
    if not 0.0 <= rho <= 1.0:
        raise ValueError(
            f"rho: got {rho}, expected 0..1, the share of inactive experts that stay experts"
        )
    moe = replace(base, engram=None)
    kept_experts = _kept_experts(base.moe, rho)
    reached = (kept_experts - base.moe.active) / max(1, base.moe.routed - base.moe.active)
    if kept_experts == base.moe.routed:
        arm = Arm("moe", moe, costs(moe, context))
        return Plan(1.0, arm, arm._replace(name="engram"), _dense(arm, context))
    template = engram or base.engram or default_memory(base)
    empty = replace(base, moe=replace(base.moe, routed=kept_experts), engram=with_rows(template, 2))
    pure, filled = _evened(moe, empty, context, pays)
    filled = replace(filled, engram=solve_rows(pure.costs, filled, template, context))
    plan = Plan(reached, pure, Arm("engram", filled, costs(filled, context)), _dense(pure, context))
    total, flops = agreement(plan)
    if abs(total) > TOTAL_TOLERANCE or abs(flops) > FLOP_TOLERANCE:
        raise ValueError(
            f"rho: got a memory arm {total:+.2%} in parameters and {flops:+.2%} in FLOPs "
            f"from the pure one, expected {TOTAL_TOLERANCE:.1%} and {FLOP_TOLERANCE:.0%}: "
            "primes and whole widths are too coarse for a memory this small; "
            "lower rho, or give it fewer heads"
        )
    return plan


def _kept_experts(moe: MoEConfig, rho: float) -> int:
    """Returns how many experts rho keeps, a number that the groups and devices divide."""
    step = step_of(moe)
    wanted = moe.active + round(rho * (moe.routed - moe.active))
    return min(moe.routed, max(least_experts(moe), step * round(wanted / step)))


def default_memory(base: ModelConfig) -> EngramConfig:
    """Returns a small memory of the paper's shape: orders 2 and 3, in one early block.

    From eight blocks on, a second is near the middle.
    """
    layers = (1,) if base.layers < 8 else (1, base.layers // 2 - 1)
    head_dim = max(8, base.dim // 32 // 4 * 4)
    return EngramConfig(
        layers=tuple(i for i in layers if i < base.layers) or (0,), heads=8, head_dim=head_dim
    )


def with_rows(config: EngramConfig, rows: int) -> EngramConfig:
    """Returns the same memory with this many rows per head in every order."""
    return replace(config, rows_per_head=(rows,) * len(config.rows_per_head))


def _evened(
    moe: ModelConfig, empty: ModelConfig, context: int, pays: str
) -> tuple[Arm, ModelConfig]:
    """Evens out the FLOPs per token of the pure arm and of the memory arm.

    Returns the pure arm and the memory arm's config, whose rows are not solved for yet. Their FLOPs
    differ within the tolerance.
    """
    have = costs(moe, context)
    more = costs(empty, context).flops_per_token - have.flops_per_token
    if abs(more) > FLOP_TOLERANCE * have.flops_per_token:
        if more > 0 and pays == "pure":
            moe = with_flops(moe, more)
            have = costs(moe, context)
        else:
            empty = with_flops(empty, -more)
    return Arm("moe", moe, have), empty


def with_flops(config: ModelConfig, more: int) -> ModelConfig:
    """Widens or narrows the shared expert of `config` so that a token costs `more` FLOPs more."""
    assert config.moe is not None
    blocks = sum(config.has_experts(i) for i in range(config.layers))
    width = config.moe.shared_hidden + (
        round(more / (2 * 3 * config.dim * blocks)) if blocks else 0
    )
    if width < 0:
        raise ValueError(
            f"engram: got projections of {-more:,} FLOPs a token, "
            "expected no more than those of the shared expert, which pays for them; "
            "narrow the memory (fewer heads or layers, a smaller head_dim), or raise the budget"
        )
    if width == config.moe.shared_hidden:
        return config
    count = max(1, config.moe.shared) if width else 0
    return replace(config, moe=replace(config.moe, shared=count, shared_width=width or None))


def solve_rows(
    target: Costs, empty: ModelConfig, template: EngramConfig, context: int
) -> EngramConfig:
    """Finds the rows per head whose primes come closest to the free parameters.

    It bisects, since primes are not evenly spaced.
    """
    spent = costs(empty, context)
    free = target.total - (spent.total - spent.memory)
    if free < spent.memory:
        raise ValueError(
            f"rho: got a memory of {free:,} parameters after its projections, "
            f"expected at least {spent.memory:,}; "
            "lower rho, or narrow the memory (fewer heads, a smaller head_dim, fewer layers)"
        )

    def total_rows(rows: int) -> int:
        return sum(row_totals(with_rows(template, rows))) * template.head_dim

    low = 2
    high = free // (len(template.layers) * template.rows_per_token * template.head_dim) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if total_rows(middle) <= free else (low, middle)
    return with_rows(template, min(low, high, key=lambda rows: abs(total_rows(rows) - free)))


def _dense(pure: Arm, context: int) -> Arm:
    """Returns the control that shows what sparsity gains, a dense model of the same FLOPs."""
    config = replace(pure.config, moe=None, engram=None)
    step = 2 * 3 * config.dim * config.layers
    narrow = costs(replace(config, dense_width=1), context).flops_per_token
    width = max(1, 1 + round((pure.costs.flops_per_token - narrow) / step))
    config = replace(config, dense_width=width)
    return Arm("dense", config, costs(config, context))


def agreement(plan: Plan) -> tuple[float, float]:
    """Returns how far the memory arm is from the pure one, relative to that.

    The first number is of total parameters, the second of FLOPs per token.
    """
    a = plan.moe.costs
    b = plan.engram.costs
    return b.total / a.total - 1, b.flops_per_token / a.flops_per_token - 1
