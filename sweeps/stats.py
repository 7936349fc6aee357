"""How sure a difference is: means, spreads, Student's t over paired differences, and drops paired by image. Standard library only."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SIGNIFICANT = 0.05
"""A difference is called significant below this p-value; of twenty such words about nothing one is wrong."""


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the known values, None where there is none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def std(values: Iterable[float | None]) -> float | None:
    """Return the sample standard deviation (denominator n - 1) of the known values, None below two of them."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def t_test_p(t: float, df: int) -> float:
    """Return the two-sided p-value of Student's t, P(|T| >= |t|), in closed form.

    With theta = atan(t / sqrt(df)) and c = cos(theta)^2, P(|T| < t) is for even df

        sin(theta) (1 + 1/2 c + 1/2 3/4 c^2 + ...)

    with df / 2 terms, and for odd df

        2 / pi (theta + sin(theta) cos(theta) (1 + 2/3 c + 2/3 4/5 c^2 + ...))

    with (df - 1) / 2 terms in the inner sum. For example t = 4.303 at df 2 gives 0.05.

    Args:
        t: The statistic, any finite number.
        df: Degrees of freedom, >= 1; number of differences - 1 in a paired test.

    Raises:
        ValueError: `df` is below 1.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if df < 1:
        raise ValueError(f"`df` must be >= 1, but got {df}")
    theta = math.atan(abs(t) / math.sqrt(df))
    odd = df % 2
    term, total = 1.0, 0.0
    for number in range(1, (df - odd) // 2 + 1):
        total += term
        term *= math.cos(theta) ** 2 * (2 * number - 1 + odd) / (2 * number + odd)
    inside = math.sin(theta) * total
    if odd:
        inside = 2 / math.pi * (theta + math.cos(theta) * inside)
    return min(1.0, max(0.0, 1 - inside))


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What a paired comparison says."""

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
        """yes where p < 0.05, else no; "" where there is no p: a single difference, or no spread, is no evidence."""
        return "" if self.p is None else "yes" if self.p < SIGNIFICANT else "no"


def paired_gain(differences: Sequence[float]) -> Gain | None:
    """Test whether differences, one for each seed that two settings share, are 0 on average (paired t-test).

    For example [1, 2, 3]: mean 2, stderr 0.577, t 3.46, p 0.074, so not significant: at three seeds |t| must exceed 4.30.

    Returns:
        The gain, or None without differences.
    """
    if not differences:
        return None
    average, spread = statistics.fmean(differences), std(differences)
    if spread is None:
        return Gain(mean=average, stderr=None, t=None, p=None)
    stderr = spread / math.sqrt(len(differences))
    # Equal decimals differ in their last binary digit, which must not become a huge t.
    if stderr <= 1e-9 * max(map(abs, differences)):
        return Gain(mean=average, stderr=stderr, t=None, p=None)
    t = average / stderr
    return Gain(mean=average, stderr=stderr, t=t, p=t_test_p(t, len(differences) - 1))


def drop_stderr(lost: int, gained: int, num_images: int) -> float:
    """Return the standard error of a drop in top-1, paired by image, in percentage points.

    The drop is the mean over n images of teacher_correct - student_correct, which is 1 on the b lost ones, -1 on the c gained
    ones and 0 elsewhere: 100 sqrt((b + c) - (b - c)^2 / n) / n. For example b = 60, c = 20, n = 1,000: a drop of 4.00 with 0.885,
    where two unpaired figures near 90 % would give 1.3.

    Args:
        lost: Images that only the teacher has right.
        gained: Images that only the student has right.
        num_images: All images, >= 1.
    """
    return 100 * math.sqrt(lost + gained - (lost - gained) ** 2 / num_images) / num_images


def pooled_stderr(first: tuple[float, int], second: tuple[float, int]) -> float | None:
    """Return the standard error of the difference of two means over seeds, their spread taken to be the same.

    s sqrt(1 / n1 + 1 / n2) with s^2 = ((n1 - 1) s1^2 + (n2 - 1) s2^2) / (n1 + n2 - 2).

    Args:
        first: Sample standard deviation and number of seeds of the one; the deviation of a single seed does not count.
        second: The same of the other.

    Returns:
        The standard error, or None where both have one seed only.
    """
    (std1, n1), (std2, n2) = first, second
    if n1 + n2 <= 2:
        return None
    variance = ((n1 - 1) * std1**2 + (n2 - 1) * std2**2) / (n1 + n2 - 2)
    return math.sqrt(variance * (1 / n1 + 1 / n2))
