"""Budgets are equal to the last per cent, and the papers' own models come out."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.experiments.plan import FLOP_TOLERANCE, TOTAL_TOLERANCE, agreement, split_budget
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
