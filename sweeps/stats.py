"""Statistics of repeated runs: means, standard deviations, paired t-tests, standard errors and rank correlation.

scipy is imported where it is needed: it takes a second, which a command that only reads tables need not wait.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SIGNIFICANT = 0.05
"""Significance level: without any effect, one of twenty tests is called significant."""


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values, None where there is none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def std(values: Iterable[float | None]) -> float | None:
    """Return the sample standard deviation (denominator n - 1) of the known values, None below two of them."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def t_test_p(t: float, df: int) -> float:
    """Return the two-sided p-value of Student's t, P(|T| >= |t|).

    For example t = 4.303 at df 2 gives 0.05.

    Args:
        t: The statistic.
        df: Degrees of freedom, >= 1; number of differences - 1 in a paired test.

    Raises:
        ValueError: `df` is below 1.
    """
    if df < 1:
        raise ValueError(f"`df` must be >= 1, but got {df}")
    from scipy import stats  # takes a second to import; most commands never test anything

    return float(2 * stats.t.sf(abs(t), df))


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Result of a paired t-test."""

    mean: float
    """Mean of the differences."""
    stderr: float | None
    """Standard error of that mean; None for a single difference."""
    t: float | None
    """mean / stderr; None where the differences have no spread."""
    p: float | None
    """Two-sided p-value of `t` with n - 1 degrees of freedom."""

    @property
    def significant(self) -> str:
        """Yes where p < 0.05, else no; "" without a p-value: a single difference, or no spread, is no evidence."""
        return "" if self.p is None else "yes" if self.p < SIGNIFICANT else "no"


def paired_gain(differences: Sequence[float]) -> Gain | None:
    """Return the paired t-test of the differences of two settings, one difference per shared seed.

    For example [1, 2, 3]: mean 2, stderr 0.577, t 3.46, p 0.074, so not significant: at three seeds |t| must exceed
    4.30.

    Returns:
        The result, or None without differences.
    """
    if not differences:
        return None
    average, spread = statistics.fmean(differences), std(differences)
    if spread is None:
        return Gain(mean=average, stderr=None, t=None, p=None)
    stderr = spread / math.sqrt(len(differences))
    # Equal decimals may differ in the last binary digit, which must not give a huge t.
    if stderr <= 1e-9 * max(map(abs, differences)):
        return Gain(mean=average, stderr=stderr, t=None, p=None)
    t = average / stderr
    return Gain(mean=average, stderr=stderr, t=t, p=t_test_p(t, len(differences) - 1))


def pooled_stderr(first: tuple[float, int], second: tuple[float, int]) -> float | None:
    """Return the standard error of the difference of two means over seeds, with a pooled variance.

    s sqrt(1 / n1 + 1 / n2) with s^2 = ((n1 - 1) s1^2 + (n2 - 1) s2^2) / (n1 + n2 - 2).

    Args:
        first: Sample standard deviation and number of seeds; the deviation of a single seed is ignored.
        second: The same of the other mean.

    Returns:
        The standard error, or None where both means have one seed.
    """
    (std1, n1), (std2, n2) = first, second
    if n1 + n2 <= 2:
        return None
    variance = ((n1 - 1) * std1**2 + (n2 - 1) * std2**2) / (n1 + n2 - 2)
    return math.sqrt(variance * (1 / n1 + 1 / n2))


def rank_correlation(a: "np.ndarray", b: "np.ndarray") -> "np.ndarray":
    """Return Spearman's rank correlation of each row of `a` with the same row of `b`; ties share their mean rank.

    All rows in one call, where `scipy.stats.spearmanr` takes one pair of rows: thousands of bootstrap samples are
    compared. Sums of ranks are exact, so two measures that rank equally have exactly the same correlation, which the
    count of ties relies on.

    Args:
        a: (R, n) values.
        b: (R, n) values.

    Returns:
        (R,) in [-1, 1]; 0 where a row of `a` or `b` is constant.
    """
    import numpy as np
    from scipy import stats

    x, y = (stats.rankdata(part, axis=1) for part in (a, b))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    scale = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.divide((x * y).sum(1), scale, out=np.zeros(len(x)), where=scale > 0)
