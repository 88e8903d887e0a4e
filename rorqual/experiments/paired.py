"""Compares two arms by the paired differences of their scores, one score per seed.

    d_s   = a_s - b_s                        seed by seed
    error = stdev(d) / sqrt(seeds)
    established when |mean(d)| > t error     t: Student's two-sided 95 % quantile for seeds - 1
                                             degrees of freedom

The score of a run that diverged is not finite. It makes mean and error nan, and nothing
established.
"""

import math
import statistics
from collections.abc import Sequence

T_95 = {
    0: math.inf,
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
}


def t_factor(seeds: int) -> float:
    """Returns the two-sided 95 % quantile of Student's t for this many paired differences.

    A mean is established if it is more than so many standard errors away from 0. From 10 degrees of
    freedom v on it is z + (z^3 + z) / 4v + (5z^5 + 16z^3 + 3z) / 96v^2 + .., to 2e-4, with z = 1.96
    of the normal distribution (Abramowitz and Stegun 26.7.5).
    """
    v = seeds - 1
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return T_95.get(v) or sum(term / v**n for n, term in enumerate(terms))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error.

    The error is nan with one value; both are nan where a value is not finite.
    """
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def difference(losses: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard error of losses - other, seed by seed."""
    return mean_and_error([a - b for a, b in zip(losses, other, strict=True)])


def established(mean: float, error: float, seeds: int) -> bool:
    """Returns whether a mean of paired differences is away from 0 at 95 %; False with one seed."""
    return abs(mean) > t_factor(seeds) * error


def compared(
    one: str, other: str, losses: Sequence[float], others: Sequence[float], digits: int = 4
) -> str:
    """Formats a comparison of two arms.

    It has their names, the mean of losses - others with its error, and whether it is established.
    """
    mean, error = difference(losses, others)
    figure = f"{mean:+.{digits}f}" if math.isfinite(mean) else "no number"
    figure += f" +- {error:.{digits}f}" if math.isfinite(error) else ""
    verdict = "established" if established(mean, error, len(losses)) else "not established"
    return f"{one} against {other} {figure}, {verdict}"
