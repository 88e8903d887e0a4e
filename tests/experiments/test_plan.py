"""Tests that budgets agree to their tolerances, and that plans reproduce the papers' models."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from rorqual.costs import costs
from rorqual.experiments.budget import FLOP_TOLERANCE, TOTAL_TOLERANCE, Budget
from rorqual.experiments.plan import agreement, plan_budget, solve_rows, split_budget
from rorqual.layers.engram import EngramConfig, row_totals
from rorqual.layers.router import RouterConfig
from rorqual.presets import preset

TINY = replace(preset("tiny"), engram=None)


@settings(max_examples=15, deadline=None)
@given(rho=st.floats(0.2, 0.95), routed=st.integers(24, 64), width=st.sampled_from([24, 32, 48]))
def test_totals_and_flops_agree_for_any_budget(rho, routed, width):
    base = replace(TINY, moe=replace(TINY.moe, routed=routed, width=width))
    plan = split_budget(base, rho, context=128)
    total, flops = agreement(plan)
    assert abs(total) <= TOTAL_TOLERANCE and abs(flops) <= FLOP_TOLERANCE
    assert plan.dense.costs.flops_per_token == pytest.approx(
        plan.moe.costs.flops_per_token, rel=FLOP_TOLERANCE
    )
    assert plan.dense.config.moe is None and plan.moe.config.engram is None


def test_the_papers_models():
    shape = preset("engram-27b").engram
    # The default shape of the memory is the paper's.
    plan = split_budget(preset("moe-27b"), 0.743)
    assert (plan.engram.config.engram.layers, plan.engram.config.engram.memory_width) == (
        (1, 14),
        1280,
    )
    assert replace(plan.engram.config.engram, rows_per_head=shape.rows_per_head) == shape
    assert plan.engram.config.moe.routed == 55
    assert plan.rho == pytest.approx(49 / 66)
    assert plan.engram.costs.memory == pytest.approx(5.75e9, rel=0.01), (
        "the paper prints 5.7e9, its rows hold 5.79e9"
    )
    assert plan.moe.config == preset("moe-27b"), (
        "the projections stay within the tolerance: nothing is widened"
    )
    total, flops = agreement(plan)
    assert abs(total) <= TOTAL_TOLERANCE and abs(flops) <= FLOP_TOLERANCE


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(30, 5000), heads=st.integers(1, 8), head_dim=st.sampled_from([4, 8]))
def test_the_rows_solved_for_are_the_closest(rows, heads, head_dim):
    memory = EngramConfig(heads=heads, head_dim=head_dim)

    def total_rows(count):
        return sum(row_totals(replace(memory, rows_per_head=(count, count)))) * head_dim

    empty = replace(TINY, hyper=None, engram=replace(memory, rows_per_head=(2, 2)))
    spent = costs(empty, 128)
    target = spent._replace(
        total=spent.total - spent.memory + rows * memory.rows_per_token * head_dim
    )
    result = solve_rows(target, empty, memory, 128).rows_per_head[0]
    free = rows * memory.rows_per_token * head_dim
    assert abs(total_rows(result) - free) == min(
        abs(total_rows(count) - free) for count in range(max(2, rows - 99), rows + 9)
    )


@pytest.mark.parametrize("rho", [0.3, 0.75])
def test_without_a_shared_expert_one_is_made_to_widen(rho):
    base = replace(TINY, moe=replace(TINY.moe, shared=0, shared_width=None))
    plan = split_budget(base, rho, context=128)
    assert plan.moe.config.moe.shared == 1 and plan.moe.config.moe.shared_width > 0
    assert plan.engram.config.moe.shared == 0
    total, flops = agreement(plan)
    assert abs(total) <= TOTAL_TOLERANCE and abs(flops) <= FLOP_TOLERANCE


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2"])
@pytest.mark.parametrize("rho", [0.0, 0.3, 0.743])
def test_kept_experts_fill_groups_and_devices(name, rho):
    base = replace(preset(name), layers=4)
    # MoEConfig itself refuses groups of unequal size.
    moe = split_budget(base, rho).engram.config.moe
    step = math.lcm(moe.router.groups, moe.balance.devices)
    wanted = moe.active + rho * (base.moe.routed - moe.active)
    size = moe.routed // moe.router.groups
    assert moe.routed % step == 0 and moe.router.groups_kept * size >= moe.active
    assert abs(moe.routed - wanted) <= step / 2 + 0.5 or rho == 0


def test_where_no_expert_can_be_given_up_the_rho_reached_is_one():
    router = RouterConfig(groups=4, groups_kept=2, group_score="top2")
    base = replace(TINY, moe=replace(TINY.moe, routed=8, active=4, router=router))
    plan = split_budget(base, 0.0)
    assert plan.rho == 1.0 and plan.engram.config == plan.moe.config == base


def test_everything_kept_is_the_pure_model():
    plan = split_budget(TINY, 1.0)
    assert plan.engram.config == plan.moe.config == TINY


@pytest.mark.parametrize("rho", [-0.1, 1.1])
def test_rho_outside_is_refused(rho):
    with pytest.raises(ValueError, match=r"rho: got .* expected 0\.\.1"):
        split_budget(TINY, rho)


def test_no_experts_and_no_room_are_refused():
    with pytest.raises(ValueError, match="without experts"):
        split_budget(replace(TINY, moe=None), 0.5)
    width = EngramConfig(heads=8, head_dim=64)
    with pytest.raises(ValueError, match=r"rho: got a memory of -?[\d,]+ parameters.*lower rho"):
        split_budget(replace(TINY, moe=replace(TINY.moe, width=4)), 0.9, width, context=128)
    with pytest.raises(ValueError, match=r"projections of [\d,]+ FLOPs.*narrow the memory"):
        split_budget(TINY, 0.5, width, context=128, pays="memory")


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(["tiny", "small", "moe-27b", "deepseek-v2-lite"]),
    rho=st.floats(0.3, 0.9),
    total=st.floats(1.0, 3.0),  # factor of the total, beyond that of the activated parameters
    activated=st.floats(0.6, 1.6),
    flops=st.booleans(),
)
def test_every_arm_has_the_budget(name, rho, total, activated, flops):
    """Every possible budget is met for any shape; others are refused with one sentence."""
    like = preset(name)
    # Costs are counted block by block, so a model of four blocks suffices.
    if like.layers > 4:
        like = replace(like, layers=4)
    have = costs(like, 256)
    axis = "flops_per_token" if flops else "activated"
    second = getattr(have, axis) * activated
    budget = Budget(
        have.total * max(activated, 1.0) * total, *((None, second) if flops else (second, None))
    )
    text = ""
    try:
        plan = plan_budget(like, budget, rho, context=256)
    except ValueError as error:
        text = str(error)
    event(text.partition(":")[0] or "planned")
    if text:
        assert re.match(
            r"(total|activated|flops_per_token|rho|engram|budget): got .*expected", text
        )
        return
    assert plan.moe.costs.total == pytest.approx(budget.total, rel=TOTAL_TOLERANCE)
    assert getattr(plan.moe.costs, axis) == pytest.approx(second, rel=FLOP_TOLERANCE)
    total, flops = agreement(plan)
    assert abs(total) <= TOTAL_TOLERANCE and abs(flops) <= FLOP_TOLERANCE
    assert plan.dense.costs.flops_per_token == pytest.approx(
        plan.moe.costs.flops_per_token, rel=FLOP_TOLERANCE
    )
    assert plan.moe.config.engram is None and (plan.rho == 1 or plan.engram.costs.memory > 0)


def test_the_pure_model_pays_or_the_memory_arm_does():
    narrow = EngramConfig(heads=4, head_dim=4)
    pure, memory = (
        split_budget(TINY, 0.75, narrow, context=128, pays=who) for who in ("pure", "memory")
    )
    assert memory.moe.config == TINY and pure.moe.config.moe.shared_hidden > TINY.moe.shared_hidden
    assert (
        memory.engram.config.moe.shared_hidden
        < pure.engram.config.moe.shared_hidden
        == TINY.moe.shared_hidden
    )
    for plan in (pure, memory):
        total, flops = agreement(plan)
        assert abs(total) <= TOTAL_TOLERANCE and abs(flops) <= FLOP_TOLERANCE


def test_a_router_that_lost_many_experts_is_made_up_for():
    """The router of the pure model costs more here than the projections of a narrow memory."""
    base = replace(TINY, moe=replace(TINY.moe, routed=400, width=8, active=2))
    plan = split_budget(base, 0.4, EngramConfig(layers=(1,), heads=1, head_dim=4), context=128)
    assert plan.engram.config.moe.shared_hidden > plan.moe.config.moe.shared_hidden
    assert abs(agreement(plan)[1]) <= FLOP_TOLERANCE


@pytest.mark.parametrize(("name", "rho", "routed", "billions"), [
    ("engram-27b", None, 72, 5.79), pytest.param("engram-27b", 0.743, 72, 5.78,
    marks=pytest.mark.slow),
    ("engram-40b", None, 109, 18.53),
])  # fmt: skip
def test_a_model_with_memory_finds_its_pure_mixture(name, rho, routed, billions):
    """Engram-27B leads back to MoE-27B; Engram-40B's table is that of 54 experts."""
    plan = plan_budget(preset(name), Budget(), rho)
    assert plan.moe.config == replace(
        preset("moe-27b"), moe=replace(preset("moe-27b").moe, routed=routed)
    )
    assert plan.engram.config.moe.routed == 55
    assert plan.engram.costs.memory / 1e9 == pytest.approx(billions, abs=0.006)
    assert rho is not None or plan.engram.config == preset(name)
    total, flops = agreement(plan)
    assert abs(total) <= TOTAL_TOLERANCE and abs(flops) <= FLOP_TOLERANCE


def test_without_a_budget_the_model_named_is_the_pure_one():
    assert plan_budget(TINY, Budget(), 0.6, context=128) == split_budget(TINY, 0.6, context=128)
    assert plan_budget(TINY, Budget(), context=128).rho == pytest.approx(0.75, abs=0.02)
