"""Student's t against printed tables and against numeric integration; paired tests by hand; drops against a
simulation.
"""

import math
import random
import statistics

import numpy as np
import pytest
from scipy import stats

from support import reference
from synq.common.statistics import drop_stderr
from synq.sweeps.stats import Gain, mean, paired_gain, pooled_stderr, rank_correlation, std, t_test_p


@pytest.mark.parametrize(
    ("df", "t", "p"),
    [
        # Critical values as printed in any statistics book (two-sided).
        (1, 12.706, 0.05),
        (1, 63.657, 0.01),
        (1, 1.0, 0.5),
        (2, 4.303, 0.05),
        (2, 9.925, 0.01),
        (3, 3.182, 0.05),
        (4, 2.776, 0.05),
        (4, 8.610, 0.001),
        (5, 2.571, 0.05),
        (9, 2.262, 0.05),
        (10, 3.169, 0.01),
        (30, 2.042, 0.05),
        (120, 1.980, 0.05),
    ],
)
def test_p_values_of_the_tables(df: int, t: float, p: float) -> None:
    assert t_test_p(t, df) == pytest.approx(p, rel=2e-3)
    assert t_test_p(-t, df) == t_test_p(t, df)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 12])
def test_p_values_are_the_integral_of_the_density(df: int) -> None:
    def density(x: float) -> float:
        scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
        return scale * (1 + x * x / df) ** (-(df + 1) / 2)

    t, steps = 1.7, 2000
    width = t / steps
    inside = sum(density((i + 0.5) * width) * width for i in range(steps))  # midpoints over [0, t]
    assert t_test_p(t, df) == pytest.approx(1 - 2 * inside, abs=1e-6)
    assert t_test_p(0.0, df) == 1.0 and t_test_p(1e9, df) == pytest.approx(0.0, abs=1e-8)


def test_no_degree_of_freedom_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`df` must be >= 1, but got 0"):
        t_test_p(1.0, 0)


def test_a_paired_gain_by_hand() -> None:
    gain = paired_gain([1.0, 2.0, 3.0])
    assert gain is not None and gain.mean == 2.0 and gain.stderr == pytest.approx(1 / math.sqrt(3))
    assert gain.t == pytest.approx(2 * math.sqrt(3)) and gain.p == pytest.approx(0.0742, abs=1e-4)
    assert gain.significant == "no", "|t| is 3.46; two standard errors are no evidence at three seeds"
    clear = paired_gain([1.9, 2.0, 2.1])
    assert clear is not None and clear.significant == "yes"
    negative = paired_gain([-1.9, -2.0, -2.1])
    assert negative is not None and negative.significant == "yes" and negative.p == clear.p


def test_one_seed_or_no_spread_tells_nothing() -> None:
    assert paired_gain([]) is None
    assert paired_gain([0.5]) == Gain(mean=0.5, stderr=None, t=None, p=None)
    for same in ([0.0, 0.0, 0.0], [0.3, 0.1 + 0.2, 0.3]):
        gain = paired_gain(same)
        assert gain is not None and gain.t is None and gain.p is None and gain.significant == ""


def test_means_and_spreads_pass_over_what_is_unknown() -> None:
    assert mean([1.0, None, 3.0]) == 2.0 and mean([None]) is None
    assert std([1.0, None, 3.0]) == pytest.approx(math.sqrt(2)) and std([1.0, None]) is None


def test_the_error_of_a_drop_is_that_of_the_mean_difference_of_the_images() -> None:
    lost, gained, n = 60, 20, 1000
    differences = [1] * lost + [-1] * gained + [0] * (n - lost - gained)
    assert drop_stderr(lost, gained, n) == pytest.approx(100 * statistics.pstdev(differences) / math.sqrt(n))
    assert drop_stderr(lost, gained, n) == pytest.approx(0.885, abs=1e-3)
    assert drop_stderr(0, 0, 10) == 0.0
    draw = random.Random(0)
    drops = [100 * sum(draw.choices(differences, k=n)) / n for _ in range(400)]  # other images of the same kind
    assert statistics.stdev(drops) == pytest.approx(drop_stderr(lost, gained, n), rel=0.12)


def test_two_means_with_one_spread() -> None:
    assert pooled_stderr((0.2, 3), (0.2, 3)) == pytest.approx(0.2 * math.sqrt(2 / 3))
    assert pooled_stderr((0.3, 3), (0.1, 2)) == pytest.approx(math.sqrt((2 * 0.09 + 0.01) / 3 * (1 / 3 + 1 / 2)))
    assert pooled_stderr((0.3, 3), (9.9, 1)) == pytest.approx(0.3 * math.sqrt(4 / 3)), "one seed has no spread"
    assert pooled_stderr((0.0, 1), (0.0, 1)) is None


def test_rank_correlation_equals_scipy_and_the_twin_with_ties() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (50, 9)).astype(float), rng.normal(size=(50, 9))
    got = rank_correlation(a, b)
    assert got.tolist() == pytest.approx([stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)])
    assert got.tolist() == pytest.approx(
        [reference.spearman(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    )
    assert rank_correlation(np.ones((1, 4)), b[:1, :4]).tolist() == [0.0], "a measure that says nothing ranks nothing"
