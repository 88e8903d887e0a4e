"""Tests that differences are paired by seed, and that Student's t decides what is established."""

import math

import pytest

from rorqual.experiments.paired import compared, difference, established, mean_and_error, t_factor


def test_paired_differences_and_their_error():
    assert difference([3.9, 4.8, 5.7], [4.0, 5.0, 6.0]) == pytest.approx((-0.2, 0.1 / 3**0.5))
    mean, error = mean_and_error([2.0])
    assert mean == 2 and math.isnan(error)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        difference([1.0, 2.0], [1.0])


def test_established_is_what_the_t_test_says():
    """Compares with scipy.

    scipy.stats.ttest_rel([3.9, 4.8, 5.7], [4, 5, 6]) gives p = 0.0742; of four such differences
    with this mean and deviation, p = 0.028.
    """
    mean, error = difference([3.9, 4.8, 5.7], [4.0, 5.0, 6.0])
    assert not established(mean, error, 3)
    assert established(mean, error * (3 / 4) ** 0.5, 4) and established(
        -mean, error * (3 / 4) ** 0.5, 4
    )
    assert not established(5.0, math.nan, 1) and not established(0.0, 0.0, 3)


def test_factors_fall_towards_the_normal_one():
    factors = [t_factor(seeds) for seeds in range(2, 12)]
    assert factors == sorted(factors, reverse=True) and factors[0] == 12.706 and factors[-1] > 1.96


@pytest.mark.parametrize(
    ("freedom", "t"),
    [
        (10, 2.2281),
        (11, 2.2010),
        (15, 2.1314),
        (20, 2.0860),
        (30, 2.0423),
        (60, 2.0003),
        (999, 1.9623),
    ],
)
def test_factors_of_many_seeds_are_students(freedom, t):
    """The values are those of any printed table of Student's distribution."""
    assert t_factor(freedom + 1) == pytest.approx(t, abs=2.5e-4)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_run_that_diverged_establishes_nothing(wrong):
    for ours, other in (([wrong, 3.0, 3.0], [9.0, 9.0, 9.1]), ([3.0, 3.0, 3.1], [9.0, wrong, 9.0])):
        mean, error = difference(ours, other)
        assert math.isnan(mean) and math.isnan(error) and not established(mean, error, 3)
        assert compared("a", "b", ours, other) == "a against b no number, not established"
    assert all(map(math.isnan, mean_and_error([wrong])))


def test_a_comparison_in_words():
    assert (
        compared("a", "b", [3.9, 4.8, 5.7], [4.0, 5.0, 6.0])
        == "a against b -0.2000 +- 0.0577, not established"
    )
    assert (
        compared("a", "b", [4.1, 5.1, 6.2], [4.0, 5.0, 6.0], 2)
        == "a against b +0.13 +- 0.03, not established"
    )
    assert (
        compared("a", "b", [4.5, 5.5, 6.6], [4.0, 5.0, 6.0], 3)
        == "a against b +0.533 +- 0.033, established"
    )
    assert compared("a", "b", [1.0], [3.0]) == "a against b -2.0000, not established"
