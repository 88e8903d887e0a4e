"""Scores of two arms, one a seed -> the mean of their differences, its error, and whether that is established.

d_s   = a_s - b_s                        seed by seed
error = stdev(d) / sqrt(seeds)
established when |mean(d)| > t error     t: Student's two-sided 95 % for seeds - 1 degrees of freedom
"""

import math
import statistics
from collections.abc import Sequence

T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # Student, two-sided


def t_factor(seeds: int) -> float:
    """Standard errors that a mean of so many paired differences must be away from 0 to be established at 95 %."""
    return T_95.get(seeds - 1, 2.228)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, nan with one value."""
    mean = statistics.fmean(values)
    return mean, statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def difference(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of own - other, seed by seed."""
    return mean_and_error([a - b for a, b in zip(own, other, strict=True)])


def established(mean: float, error: float, seeds: int) -> bool:
    """Whether a mean of so many paired differences is away from 0 at 95 %; never with one seed."""
    return seeds > 1 and abs(mean) > t_factor(seeds) * error


def compared(one: str, other: str, own: Sequence[float], others: Sequence[float], digits: int = 4) -> str:
    """The two arms' names, the mean of own - others with its error, and whether it is established."""
    mean, error = difference(own, others)
    figure = f"{mean:+.{digits}f}" + (f" +- {error:.{digits}f}" if math.isfinite(error) else "")
    found = "established" if established(mean, error, len(own)) else "not established"
    return f"{one} against {other} {figure}, {found}"
