"""What a recipe's setting has given before, here or in a publication, and whether a new run agrees with it."""

from collections.abc import Mapping
from dataclasses import dataclass

from synq.config.parsing import between
from synq.runs.record import RunRecord

from ..stats import mean, pooled_stderr, std
from .ablation import format_value
from .settings_file import check_seeds

Cell = tuple[str, int]
"""Row and seed of a run."""
RECIPE = "recipe"
"""Row of the setting itself."""
TOLERANCE = 3
"""A measurement agrees with the expected result within so many standard errors."""
ROUNDING = 0.005
"""Largest rounding error of a number with two decimals."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """Expected result of the recipe's row; every key is required. Numbers in percent unless stated otherwise."""

    top1: float
    """Mean over the seeds."""
    std: float
    """Sample standard deviation over the seeds; 0 for one seed."""
    drop: float
    """Mean of teacher minus student, in percentage points."""
    images: int
    """Number of labeled images it was measured on."""
    teacher_top1: float
    """Top-1 of the teacher on them."""
    seeds: tuple[int, ...]
    """Seeds that were run."""
    commit: str
    """Commit of the code."""
    hardware: str
    """Description of the machine."""
    minutes: float
    """Minutes for all seeds of the row."""

    def __post_init__(self) -> None:
        for name in ("top1", "teacher_top1"):
            between(f"expected.{name}", getattr(self, name), 0, 100)
        between("expected.drop", self.drop, -100, 100)
        between("expected.std", self.std, 0)
        between("expected.images", self.images, 1)
        between("expected.minutes", self.minutes, 0)
        check_seeds(self.seeds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """A published result at the same bit-widths."""

    top1: float
    """Published top-1, in percent."""
    teacher_top1: float
    """Top-1 of the teacher in the publication, in percent."""
    source: str
    """Publication and table."""

    def __post_init__(self) -> None:
        for name in ("top1", "teacher_top1"):
            between(f"published.{name}", getattr(self, name), 0, 100)


def compare(expected: Expected, records: Mapping[Cell, RunRecord], same_settings: bool = True) -> str:
    """Return one line that compares the recipe's row with its expected result.

    It agrees within 3 standard errors of the difference of two means over seeds (`stats.pooled_stderr`) plus the
    rounding error of the expected top-1. Results of other settings, images or teachers are not compared.

    Args:
        expected: The expected result.
        records: The runs, by (row, seed).
        same_settings: Whether the runs use the file's settings unchanged.
    """
    runs = [record for (row, _), record in records.items() if row == RECIPE]
    where = f"commit {expected.commit}, {expected.hardware}"
    head = f"expected {format_value(expected.top1, spread=expected.std)} ({where})"
    top1 = mean(record.top1 for record in runs)
    if top1 is None:
        return f"{head}, not measured"
    spread = std(record.top1 for record in runs)
    measured = f"measured {format_value(top1, spread=spread)}"
    images, teacher = runs[0].num_eval, runs[0].teacher_top1
    stderr = pooled_stderr((expected.std, len(expected.seeds)), (spread or 0.0, len(runs)))
    reasons = (
        (same_settings, "the settings were changed"),
        (images == expected.images, f"it is on {images} images and not on {expected.images}"),
        (
            teacher is not None and abs(teacher - expected.teacher_top1) <= ROUNDING + 1e-9,
            f"the teacher has {format_value(teacher)} and not {expected.teacher_top1:.2f}",
        ),
        (stderr is not None, "one seed each has no standard error"),
    )
    for holds, reason in reasons:
        if not holds:
            return f"{measured}; not comparable with the {head} of the file, because {reason}"
    assert stderr is not None
    within = abs(top1 - expected.top1) <= TOLERANCE * stderr + ROUNDING
    verdict = f"{'within' if within else 'OUTSIDE'} {TOLERANCE} standard errors"
    return f"{head}, {measured}: {verdict} ({TOLERANCE * stderr:.2f})"
