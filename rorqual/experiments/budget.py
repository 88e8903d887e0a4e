"""Solves for a mixture of experts that has a given number of parameters and FLOPs.

    w = (t - a) / (E - K)      width of one of E routed experts, K of them activated per token
    s = a - K w                width of the shared expert

t and a are what the total and the activated budget leave after the backbone and the routers, in
weights of one SwiGLU of width 1 in every block with experts. These are two equations for two
widths; E is chosen so that w is close to its value in the given model. Where the activated budget
requires another backbone, its depth and every width of it are scaled by one factor.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from rorqual.costs import Costs, costs
from rorqual.model_config import (
    CSAConfig,
    EngramConfig,
    GQAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
)

TOTAL_TOLERANCE = 0.005  # relative, of the total parameters
FLOP_TOLERANCE = 0.01  # relative, of the activated parameters or FLOPs per token
# An activated budget this close is spent on the widths of the experts, and the backbone stays.
SAME = 0.05
AXES = {"activated": "activated parameters", "flops_per_token": "FLOPs a token"}
# Fraction of a tolerance; below it, a smaller error is not bought with a less similar shape.
FINE = 0.2


class Budget(NamedTuple):
    """The parameters and FLOPs that a model may have; None keeps those of the given model."""

    total: float | None = None  # parameters, MTP's modules not counted
    activated: float | None = None  # parameters used per token, all but the input embedding
    flops: float | None = None  # per token, forward pass; instead of `activated`


class Wanted(NamedTuple):
    """A budget without open values, and the name of the cost that is its second axis."""

    total: float
    activated: float
    axis: str  # "activated" or "flops_per_token"


def wanted(budget: Budget, have: Costs) -> Wanted:
    """Fills the open values of a budget from `have`.

    ValueError for both activated parameters and FLOPs, and for values that are not finite and above
    0.
    """
    if budget.activated is not None and budget.flops is not None:
        raise ValueError(
            "budget: got activated parameters and FLOPs, expected one of them: "
            "both say what a token may cost"
        )
    axis = "activated" if budget.activated is not None else "flops_per_token"
    second = budget.activated if budget.activated is not None else budget.flops
    total = have.total if budget.total is None else budget.total
    second = getattr(have, axis) if second is None else second
    for name, value in (("total", total), (axis.partition("_")[0], second)):
        if not (0 < value < math.inf):
            raise ValueError(f"{name}: got {value:g}, expected a finite number above 0")
    return Wanted(total, second, axis)


def spend(like: ModelConfig, budget: Budget, *, context: int = 4096) -> ModelConfig:
    """Returns a mixture of experts shaped like `like`, without memory, that has the budget.

    Its costs agree with the budget to the tolerances. ValueError where `like` has no experts, and
    for a budget that no such model has.
    """
    if like.moe is None:
        raise ValueError("like: got a model without experts, expected moe to be on")
    want = wanted(budget, costs(like, context))
    return _fitted(_backbone(replace(like, engram=None), want, context), want, context)


def fit(like: ModelConfig, budget: Budget, *, context: int = 4096) -> ModelConfig:
    """Returns `like` with other experts, so that it has the budget.

    Its backbone and its memory stay as they are. Errors as in `spend`.
    """
    if like.moe is None:
        raise ValueError("like: got a model without experts, expected moe to be on")
    return _fitted(like, wanted(budget, costs(like, context)), context)


def _fitted(base: ModelConfig, want: Wanted, context: int) -> ModelConfig:
    """Changes the number and the widths of the experts of `base`, until it has what is wanted."""
    assert base.moe is not None
    have = costs(base, context)
    only_experts = _only_experts(base, have, want)
    if only_experts is not None and _errors(costs(only_experts, context), want) <= 1:
        return only_experts
    best: tuple[float, ModelConfig] | None = None
    # The two equations leave out details such as a router that differs by block, which the costs
    # include: solving again from the solution corrects for them.
    for _ in range(3):
        widths = _widths(base, have, want)
        after = costs(widths, context)
        error = _errors(after, want)
        best = min(best or (error, widths), (error, widths), key=lambda pair: pair[0])
        if error <= FINE:
            break
        base = widths
        have = after
    assert best is not None
    if best[0] > 1:
        raise ValueError(
            f"budget: got {want.total:.4g} parameters and {want.activated:.4g} {AXES[want.axis]}, "
            "expected sizes that whole widths of experts add up to: "
            "a larger total, or --like a model with narrower experts"
        )
    return best[1]


def _errors(have: Costs, want: Wanted) -> float:
    """Returns the larger of the two relative errors, each divided by its tolerance."""
    total = have.total / want.total - 1
    second = getattr(have, want.axis) / want.activated - 1
    return max(abs(total) / TOTAL_TOLERANCE, abs(second) / FLOP_TOLERANCE)


def _unit(config: ModelConfig) -> int:
    """Counts the weights of one SwiGLU of width 1 in every block with experts."""
    blocks = sum(config.has_experts(i) for i in range(config.layers))
    if not blocks:
        raise ValueError(
            f"like: got {config.layers} blocks, all of them dense, expected blocks with experts"
        )
    return 3 * config.dim * blocks


def _router(config: ModelConfig) -> int:
    """Counts the router's weights for one more expert in every block with experts."""
    assert config.moe is not None
    return _unit(config) // 3 + _unit(config) // (3 * config.dim) * config.moe.router.bias


def step_of(moe: MoEConfig) -> int:
    """Returns the number that the experts must be a multiple of.

    It is the least common multiple of the router's groups and the devices.
    """
    return math.lcm(moe.router.groups, moe.balance.devices)


def least_experts(moe: MoEConfig) -> int:
    """Returns the fewest experts with which the selected groups have enough for a token."""
    router = moe.router
    step = step_of(moe)
    size = math.ceil(moe.active / router.groups_kept)
    if router.groups_kept < router.groups and router.group_score == "top2":
        size = max(2, size)
    return math.ceil(router.groups * size / step) * step


def _only_experts(base: ModelConfig, have: Costs, want: Wanted) -> ModelConfig | None:
    """Changes only the number of experts of `base`, and keeps all widths.

    None where the router would be left without a choice.
    """
    assert base.moe is not None
    step = step_of(base.moe)
    more = (want.total - have.total) / (_unit(base) * base.moe.width + _router(base))
    routed = step * round((base.moe.routed + more) / step)
    return (
        replace(base, moe=replace(base.moe, routed=routed))
        if routed > least_experts(base.moe)
        else None
    )


def _widths(base: ModelConfig, have: Costs, want: Wanted) -> ModelConfig:
    """Solves the two equations for the widths of the experts.

    Of the possible numbers of experts it takes the one that keeps their width closest to `base`'s.
    """
    moe = base.moe
    unit = _unit(base)
    router = _router(base)
    assert moe is not None
    # A weight costs two FLOPs.
    second = 2 if want.axis == "flops_per_token" else 1
    inner_width = moe.active * moe.width + moe.shared_hidden
    total = (want.total - have.total) / unit + moe.routed * moe.width + moe.shared_hidden
    spent = (want.activated - getattr(have, want.axis)) / second / unit + inner_width
    capacity = total - spent  # width of the experts that are not activated: (E - K) w
    best: tuple[float, int, int, int] | None = None
    for routed in _numbers(moe, capacity):
        width = max(1, round(capacity / (routed - moe.active)))
        shared = round(spent - moe.active * width - (routed - moe.routed) * router / unit)
        off = abs((routed - moe.active) * width - capacity) * unit / want.total / TOTAL_TOLERANCE
        if shared >= 0:
            shape = abs(math.log(width / moe.width)) + abs(shared - moe.shared_hidden) / spent
            score = max(FINE, off) * 100 + shape
            best = min(best or (score, routed, width, shared), (score, routed, width, shared))
    if best is None:
        raise ValueError(_refusal(moe, want, capacity))
    _, routed, width, shared = best
    plain = None if shared in (0, moe.shared * width) else shared
    count = 0 if not shared else max(1, moe.shared)
    return replace(
        base, moe=replace(moe, routed=routed, width=width, shared=count, shared_width=plain)
    )


def _refusal(moe: MoEConfig, want: Wanted, capacity: float) -> str:
    """Returns the message for a budget that no number of experts meets.

    `capacity` is the width that it leaves to the experts that are not activated.
    """
    got = f"got {want.total:.4g} parameters beside {want.activated:.4g} {AXES[want.axis]}"
    if capacity < least_experts(moe) - moe.active + 1:
        return (
            f"total: {got}, expected room for more than the {moe.active} experts "
            "that a token takes; raise total, or lower what a token may cost"
        )
    return (
        f"total: {got}, which leaves a token no room for its {moe.active} experts "
        "beside the backbone and a router of so many, "
        "expected a smaller total, or more that a token may cost; or --like a smaller model"
    )


def _numbers(moe: MoEConfig, capacity: float) -> Iterator[int]:
    """Yields the numbers of experts to try, all multiples of `step_of`.

    With them an expert is between half and twice as wide as now.
    """
    step = step_of(moe)
    least = least_experts(moe)
    if capacity <= 0:
        return
    low, high = (moe.active + capacity / (moe.width * factor) for factor in (2.0, 0.5))
    first = math.floor(low / step)
    last = math.ceil(high / step)
    for n in range(first, last + 1, max(1, (last - first) // 2000)):
        if n * step >= max(least, moe.active + 1):
            yield n * step


def _backbone(like: ModelConfig, want: Wanted, context: int) -> ModelConfig:
    """Returns `like`, scaled until its cost per token is near the budget.

    The mixture of experts keeps its share of that cost. ValueError where no scale comes close
    enough.
    """
    factor = 1.0
    candidate = like
    for _ in range(6):
        ratio = want.activated / getattr(costs(candidate, context), want.axis)
        if abs(ratio - 1) <= SAME:
            break
        # The cost grows as depth times width squared.
        factor *= ratio ** (1 / 3)
        candidate = scaled(like, factor)
    else:
        # The widths of the experts make up for a smaller difference.
        if not 0.8 < ratio < 1.25:
            raise ValueError(
                f"{want.axis}: got {want.activated:.4g}, "
                f"expected about {want.activated / ratio:.4g}, the nearest that "
                f"this shape reaches with a vocabulary of {like.vocab_size:,}; "
                "--like another model, or a smaller vocabulary"
            )
    return candidate


def scaled(like: ModelConfig, factor: float) -> ModelConfig:
    """Scales depth, width, heads, latent ranks and the experts' widths by `factor`.

    The widths of heads stay. The result has no memory.
    """
    layers = max(2, round(like.layers * factor))
    moe = like.moe
    if moe is not None:
        width = _even(moe.width * factor)
        shared = None if moe.shared_width is None else _even(moe.shared_width * factor)
        moe = replace(
            moe, width=width, shared_width=shared, first_dense=min(moe.first_dense, layers - 1)
        )
    return replace(
        like,
        layers=layers,
        dim=_even(like.dim * factor),
        dense_width=_even(like.dense_width * factor),
        mla=None if like.mla is None else _scaled_mla(like.mla, factor),
        gqa=None if like.gqa is None else _scaled_gqa(like.gqa, factor),
        csa=None if like.csa is None else _scaled_csa(like, layers, factor),
        moe=moe,
        engram=None,
    )


def _even(value: float) -> int:
    """Rounds a width to a multiple that suits matrix units.

    The step is 64 from 1,024 on, 16 from 256 on, 8 below.
    """
    step = 64 if value >= 1024 else 16 if value >= 256 else 8
    return max(step, step * round(value / step))


def _scaled_mla(mla: MLAConfig, factor: float) -> MLAConfig:
    """Scales the heads and the latent ranks of MLA; the widths of a head stay."""
    rank = None if mla.q_lora_rank is None else _even(mla.q_lora_rank * factor)
    return replace(
        mla,
        heads=max(1, round(mla.heads * factor)),
        q_lora_rank=rank,
        kv_lora_rank=_even(mla.kv_lora_rank * factor),
    )


def _scaled_csa(like: ModelConfig, layers: int, factor: float) -> CSAConfig:
    """Scales the heads and ranks of CSA, and gives each block the kind of one as deep in `like`."""
    csa = like.csa
    assert csa is not None
    kinds = tuple(csa.kind(index * like.layers // layers) for index in range(layers))
    return replace(
        csa,
        heads=csa.groups * max(1, round(csa.heads * factor / csa.groups)),
        q_lora_rank=_even(csa.q_lora_rank * factor),
        o_lora_rank=_even(csa.o_lora_rank * factor),
        kinds=kinds if csa.kinds else (),
    )


def _scaled_gqa(gqa: GQAConfig, factor: float) -> GQAConfig:
    """Scales the key-value heads, with as many query heads for each as before."""
    kv_heads = max(1, round(gqa.kv_heads * factor))
    return replace(gqa, heads=kv_heads * (gqa.heads // gqa.kv_heads), kv_heads=kv_heads)


def scaled_memory(engram: EngramConfig, like: ModelConfig, base: ModelConfig) -> EngramConfig:
    """Adapts the memory of `like` to the backbone of `base`.

    Its blocks are at the same relative depth, and the width of its heads scales with the model's
    width.
    """
    if (base.layers, base.dim) == (like.layers, like.dim):
        return engram
    layers = tuple(dict.fromkeys(layer * base.layers // like.layers for layer in engram.layers))
    return replace(
        engram, layers=layers, head_dim=max(4, 4 * round(engram.head_dim * base.dim / like.dim / 4))
    )
