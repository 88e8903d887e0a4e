"""Tests that a mixture of experts meets its budget, by hand and at the paper's sizes.

Impossible budgets are refused in one sentence.
"""

from dataclasses import replace

import pytest

from rorqual.costs import costs
from rorqual.experiments import budget
from rorqual.experiments.budget import Budget, fit, scaled, scaled_memory, spend
from rorqual.layers.balance import BalanceConfig
from rorqual.layers.engram import EngramConfig
from rorqual.layers.router import RouterConfig
from rorqual.presets import preset

TINY = replace(preset("tiny"), engram=None)


def test_its_own_budget_is_itself():
    have = costs(TINY, 128)
    assert spend(TINY, Budget(), context=128) == TINY
    assert spend(TINY, Budget(have.total, have.activated), context=128) == TINY
    assert spend(TINY, Budget(have.total, flops=have.flops_per_token), context=128) == TINY


@pytest.mark.parametrize("routed", [20, 33, 51])
def test_a_total_alone_changes_the_number_of_experts(routed):
    """The router's own weights add to the activated parameters, within the tolerance here."""
    asked = replace(TINY, moe=replace(TINY.moe, routed=routed))
    assert spend(TINY, Budget(costs(asked, 128).total), context=128) == asked


@pytest.mark.parametrize(("routed", "width", "shared"), [(40, 44, 20), (20, 24, 90), (64, 18, 60)])
def test_the_widths_are_the_solution_of_the_two_equations(routed, width, shared):
    """For any widths of a model, a model of the same costs is found."""
    asked = replace(TINY, moe=replace(TINY.moe, routed=routed, width=width, shared_width=shared))
    want = costs(asked, 128)
    result = spend(TINY, Budget(want.total, want.activated), context=128)
    have = costs(result, 128)
    assert have.total == pytest.approx(want.total, rel=budget.TOTAL_TOLERANCE)
    assert have.activated == pytest.approx(want.activated, rel=budget.FLOP_TOLERANCE)


@pytest.mark.parametrize("name", ["tiny", "v4-tiny", "v4.1-tiny", "qwen4-tiny"])
def test_other_experts_alone_meet_a_budget(name):
    """The backbone and the memory of a preset stay as they are."""
    like = preset(name)
    have = costs(like, 128)
    want = Budget(total=1.3 * have.total, flops=1.2 * have.flops_per_token)
    result = fit(like, want, context=128)
    assert replace(result, moe=like.moe) == like
    got = costs(result, 128)
    assert got.total == pytest.approx(want.total, rel=budget.TOTAL_TOLERANCE)
    assert got.flops_per_token == pytest.approx(want.flops, rel=budget.FLOP_TOLERANCE)
    with pytest.raises(ValueError, match="without experts"):
        fit(replace(TINY, moe=None), Budget())


def test_experts_come_in_groups_that_devices_divide():
    base = replace(
        TINY,
        moe=replace(
            TINY.moe,
            routed=36,
            active=4,
            router=RouterConfig(groups=6, groups_kept=2),
            balance=BalanceConfig(devices=4, device_limit=2),
        ),
    )
    have = costs(base, 128)
    for times in (0.8, 1.3, 2.0):
        moe = spend(base, Budget(times * have.total, have.activated), context=128).moe
        assert moe is not None and moe.routed % 12 == 0
    assert budget.step_of(base.moe) == 12 and budget.least_experts(base.moe) == 12


def test_an_activated_budget_scales_the_backbone():
    """Tests a sixth of MoE-27B's activated parameters: the paper's sweep has 568e6 of 5.7e9."""
    result = spend(preset("moe-27b"), Budget(5.7e9, 568e6))
    have = costs(result)
    assert have.total == pytest.approx(5.7e9, rel=0.005) and have.activated == pytest.approx(
        568e6, rel=0.01
    )
    assert result.layers < 30 and result.dim < 2560 and result.mla.nope_dim == 128
    assert result.moe.width / result.dim == pytest.approx(0.6, rel=0.15), (
        "an expert stays as wide for the width"
    )


def test_scaled_is_itself_at_one_and_fits_together_below():
    for name in ("tiny", "small", "classroom", "deepseek-v2-lite", "deepseekmoe-16b"):
        like = replace(preset(name), engram=None)
        for factor in (0.05, 0.3, 0.8, 1.0, 1.7):
            # The configs themselves refuse sizes that do not fit together.
            result = scaled(like, factor)
            assert result.layers > result.moe.first_dense
        assert scaled(like, 1.0) == like
    width = scaled(replace(preset("classroom")), 2.5)
    assert (width.dim, width.layers, width.gqa.heads, width.gqa.head_dim) == (160, 5, 10, 16)


def test_a_memory_keeps_its_place_and_share():
    like = preset("engram-27b")
    base = replace(scaled(replace(like, engram=None), 0.5))
    memory = scaled_memory(like.engram, like, base)
    assert memory.layers == (0, 7) and memory.head_dim == 40 and memory.heads == 8
    assert scaled_memory(like.engram, like, replace(like, engram=None)) is like.engram
    flat = scaled_memory(
        EngramConfig(layers=(1, 2), head_dim=4), replace(like, layers=30), replace(base, layers=2)
    )
    assert flat.layers == (0,) and flat.head_dim == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Budget(activated=1e6, flops=1e6), "got activated parameters and FLOPs, expected one"),
        (Budget(total=-1.0), "total: got -1, expected a finite number above 0"),
        (Budget(total=float("nan")), "total: got nan"),
        (Budget(total=float("inf")), "total: got inf"),
        (Budget(activated=0.0), "activated: got 0"),
        (Budget(flops=float("inf")), "flops: got inf"),
        (Budget(total=5e5), r"total: got 5e\+05 parameters beside .* FLOPs a token, expected room"),
        (
            Budget(total=1e9, activated=1e4),
            r"activated: got 1e\+04, expected about .*vocabulary of 4,096",
        ),
        (
            Budget(total=1e9, activated=2.7e5),
            r"total: got 1e\+09 .*a router of so many, expected a smaller total",
        ),
    ],
)
def test_what_no_model_has_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        spend(TINY, wrong, context=128)


def test_models_without_experts_are_refused():
    with pytest.raises(ValueError, match="without experts"):
        spend(preset("dense-4b"), Budget(1e9))
    with pytest.raises(ValueError, match="all of them dense"):
        spend(replace(TINY, moe=replace(TINY.moe, first_dense=3)), Budget(3e6), context=128)
