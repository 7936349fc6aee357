"""Axes of percent end at 100."""

from pathlib import Path
from typing import Literal

import pytest
from matplotlib.figure import Figure as Canvas

from support.made_sweeps import made_sweep
from synq.sweeps.reports.drawing import cap_percent
from synq.sweeps.reports.headline import sweep_chart
from synq.sweeps.reports.sweep_view import read_sweep


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize("values", [[100.0], [60.0, 100.0], [98.4, 99.9]])
def test_an_axis_of_percent_has_no_tick_above_100(axis: Literal["x", "y"], values: list[float]) -> None:
    axes = Canvas().subplots()
    axes.scatter(values, values)
    before = axes.get_xlim() if axis == "x" else axes.get_ylim()
    cap_percent(axes, axis)
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    ticks = axes.get_xticks() if axis == "x" else axes.get_yticks()
    assert low == before[0] and max(values) <= high <= 100 + 0.05 * (100 - low)
    assert all(tick <= 100 for tick in ticks if low <= tick <= high)


def test_an_axis_far_from_100_stays() -> None:
    axes = Canvas().subplots()
    axes.scatter([10.0, 20.0], [10.0, 20.0])
    before = axes.get_xlim()
    cap_percent(axes, "x")
    assert axes.get_xlim() == before


def test_a_caption_counts_one_as_one(tmp_path: Path) -> None:
    chart = sweep_chart(read_sweep(made_sweep(tmp_path / "one", trials=1, bits=("W4A4",))).standings())
    assert chart is not None and chart.caption == "Best setting of 1 ranking, 1 setting in total."
