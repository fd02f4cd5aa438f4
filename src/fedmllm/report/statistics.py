"""What may be said of means over seeds: intervals, paired tests, many comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

ENOUGH = 5  # seeds; below that nothing is called significant
LEVEL = 0.05


def mean_and_half(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None]:
    """Mean, and half the width of its confidence interval by Student's t; None for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
    from scipy import stats  # only where it is needed: it takes a second to load

    quantile = float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    return mean, quantile * deviation / math.sqrt(len(values))


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """`mean_and_half` as it may be printed: no interval of fewer than `ENOUGH` values, since one
    from two or three would hold the whole table."""
    mean, half = mean_and_half(values)
    return mean, half if len(values) >= ENOUGH else None


def paired_p(a: Mapping[int, float], b: Mapping[int, float]) -> float | None:
    """Two-sided p of the paired t-test over the seeds that both have; None with less than
    `ENOUGH` of them.

    Student, Biometrika 6 (1908). Differences that are all the same leave nothing to chance: p is
    0, or 1 where they are all zero.
    """
    seeds = sorted(set(a) & set(b))
    if len(seeds) < ENOUGH:
        return None
    differences = [a[seed] - b[seed] for seed in seeds]
    if max(differences) - min(differences) < 1e-12:
        return 0.0 if abs(differences[0]) > 1e-12 else 1.0
    from scipy import stats

    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p, in the order given: the chance of one false claim or more among all of them
    stays below the level. Holm, Scandinavian Journal of Statistics 6 (1979)."""
    count, largest = len(p_values), 0.0
    adjusted = [0.0] * count
    for rank, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
