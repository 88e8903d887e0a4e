"""Budgets are equal to the last per cent, and the papers' own models come out."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.experiments.plan import FLOP_TOLERANCE, TOTAL_TOLERANCE, agreement, split_budget
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
    assert plan.dense.costs.flops_per_token == pytest.approx(plan.moe.costs.flops_per_token, rel=FLOP_TOLERANCE)
    assert plan.dense.config.moe is None and plan.moe.config.engram is None


def test_the_papers_models():
    shape = preset("engram-27b").engram
    plan = split_budget(preset("moe-27b"), 0.743, shape)
    assert plan.engram.config.moe.routed == 55
    assert plan.rho == pytest.approx(49 / 66)
    assert plan.engram.costs.memory == pytest.approx(5.75e9, rel=0.01), "the paper prints 5.7e9, its rows hold 5.79e9"
    assert plan.moe.config == preset("moe-27b"), "the projections stay within the tolerance: nothing is widened"
    total, flops = agreement(plan)
    assert abs(total) <= TOTAL_TOLERANCE and abs(flops) <= FLOP_TOLERANCE


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
    base = preset(name)
    moe = split_budget(base, rho).engram.config.moe  # MoEConfig itself refuses broken groups
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
    with pytest.raises(ValueError, match="lower rho"):
        split_budget(TINY, 0.97, context=128, widen=False)
