"""The line from agreement on harder views to agreement on real images, and how often its prediction is wrong.

Everything that is reported of a network was fitted on the other networks only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from synq.common.statistics import drop_stderr
from synq.evaluation.harder_views import VIEWS, confidence
from synq.runs.expected_agreement import FLOOR, MIN_LOSS, POOR, Calibration, logit

COVERAGE = 0.9
"""Share of residuals between the bounds of the interval."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A student: its agreement with the teacher in percent, on views and on labeled images, and its top-1 there."""

    network: str
    bits: str
    points: str
    variant: str
    plain: float
    harder: float
    """Mean over the views of the prediction."""
    confidence: float
    """The teacher's confidence on them, in percent."""
    real: float
    top1: float
    teacher_top1: float
    drop_stderr: float
    images: int
    """Held-out images of all views together."""
    labeled: int

    @property
    def has_collapsed(self) -> bool:
        """Return whether the student is no part of a fit."""
        return min(self.harder, self.plain) < FLOOR

    @property
    def x(self) -> float:
        """Return the logit of the agreement on the views."""
        return logit(self.harder, self.images)

    @property
    def z(self) -> float:
        """Return the logit of the teacher's confidence on the views."""
        return logit(self.confidence, self.images)

    @property
    def y(self) -> float:
        """Return the logit of the agreement on the labeled images."""
        return logit(self.real, self.labeled)


def row_of(path: Path) -> Row:
    """Return the row of a file of `agreement_study.measured`, NETWORK-BITS-POINTS-VARIANT.safetensors."""
    found = safetensors.torch.load(path.read_bytes())
    network, bits, points, variant = path.stem.split("-", 3)

    def same(name: str) -> float:
        return 100 * _share(found[f"t.{name}"].argmax(1) == found[f"s.{name}"].argmax(1))

    right = {who: found[f"{who}.labeled"].argmax(1) == found["labels"] for who in "ts"}
    lost, gained = (int((right[a] & ~right[b]).sum()) for a, b in ("ts", "st"))
    return Row(
        network=network,
        bits=bits,
        points=points,
        variant=variant,
        plain=same("plain"),
        harder=sum(same(name) for name in VIEWS) / len(VIEWS),
        confidence=sum(float(confidence(found[f"t.{name}"], found[f"s.{name}"]).mean()) for name in VIEWS) / len(VIEWS),
        real=same("labeled"),
        top1=100 * _share(right["s"]),
        teacher_top1=100 * _share(right["t"]),
        drop_stderr=drop_stderr(lost, gained, len(found["labels"])),
        images=sum(len(found[f"t.{name}"]) for name in VIEWS),
        labeled=len(found["labels"]),
    )


def _share(is_true: Tensor) -> float:
    return float(is_true.double().mean())


def fit(rows: Sequence[Row]) -> Calibration:
    """Fit a line by least squares, every network with the same weight, and the quantiles of left-out residuals."""
    names = sorted({row.network for row in rows})
    residuals, weights = [], []
    for name in names:
        inner = [row for row in rows if row.network != name]
        outer = [row for row in rows if row.network == name and not row.has_collapsed]
        intercept, slope, other = _least_squares(inner)
        residuals += [row.y - intercept - slope * row.x - other * row.z for row in outer]
        weights += [1 / len(outer)] * len(outer)
    tail = (1 - COVERAGE) / 2
    lower, upper = (_quantile(residuals, weights, share) for share in (tail, 1 - tail))
    return Calibration(*_least_squares(rows), lower, upper)


def _least_squares(rows: Sequence[Row]) -> tuple[float, float, float]:
    rows = [row for row in rows if not row.has_collapsed]
    count = {row.network: sum(other.network == row.network for other in rows) for row in rows}
    weights = np.array([count[row.network] ** -0.5 for row in rows])
    x, y, z = (np.array(values) for values in zip(*((row.x, row.y, row.z) for row in rows), strict=True))
    solution = np.linalg.lstsq(np.stack([np.ones_like(x), x, z], 1) * weights[:, None], y * weights, rcond=None)[0]
    return float(solution[0]), float(solution[1]), float(solution[2])


def _quantile(values: Sequence[float], weights: Sequence[float], share: float) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(np.array(weights)[order])
    position = int(np.searchsorted(cumulative, share * cumulative[-1]))
    return float(np.array(values)[order][min(position, len(values) - 1)])


@dataclass(frozen=True)
class Prediction:
    """A row with what the other networks predict for it."""

    row: Row
    value: float
    low: float
    high: float

    @property
    def is_inside(self) -> bool:
        """Return whether the interval holds the truth, which is itself known from a number of images only."""
        return self.low <= 100 / (1 + math.exp(-self.row.y)) <= self.high


def left_out(rows: Sequence[Row]) -> list[Prediction]:
    """Return each row with the prediction, and the interval, of the lines that saw no row of its network."""
    lines = {name: fit([row for row in rows if row.network != name]) for name in {row.network for row in rows}}
    return [
        Prediction(row, *lines[row.network].predict(row.harder, row.plain, row.confidence, row.images)) for row in rows
    ]


@dataclass(frozen=True)
class Pair:
    """A fine-tuned student and the rounded one of the same settings and images."""

    rounded: Row
    tuned: Row

    @property
    def lost(self) -> float:
        """Return what fine-tuning lost of the agreement on the views, in percentage points."""
        return self.rounded.harder - self.tuned.harder

    @property
    def really_lost(self) -> float:
        """Return the same of the agreement on labeled images."""
        return self.rounded.real - self.tuned.real


def pairs_of(rows: Sequence[Row]) -> list[Pair]:
    """Return all pairs; the rounded student of variant "poor_tuned" is "poor_rounded", of the others "rounded"."""
    known = {(row.network, row.bits, row.points, row.variant): row for row in rows}
    found = []
    for row in rows:
        prefix = "poor_" if row.variant.startswith("poor_") else ""
        rounded = known.get((row.network, row.bits, row.points, f"{prefix}rounded"))
        if rounded is not None and rounded is not row:
            found.append(Pair(rounded, row))
    return found


@dataclass(frozen=True)
class Errors:
    """How often a warning was right: of those that should have come and of those that should not."""

    found: int
    missed: int
    false: int
    silent: int

    @classmethod
    def count(cls, cases: Sequence[tuple[bool, bool]]) -> "Errors":
        """Count cases of (is true, was warned)."""
        kinds = ((True, True), (True, False), (False, True), (False, False))
        found, missed, false, silent = (sum(case == kind for case in cases) for kind in kinds)
        return cls(found, missed, false, silent)

    def text(self) -> str:
        """Return the counts as a text."""
        return (
            f"{self.found} of {self.found + self.missed} warned rightly, {self.missed} missed; {self.false} of "
            f"{self.false + self.silent} others warned wrongly"
        )


MARGIN = 1.0
"""Agreement on labeled images, in percentage points, that fine-tuning must lose to have made a student worse."""


def errors(rows: Sequence[Row]) -> dict[str, Any]:
    """Return how often prediction, interval and warnings were wrong, every network predicted by the others.

    Returns:
        mean_error (percentage points), inside (share of intervals that hold the truth), inside_by_network, poor and
        worse (`Errors`), worse_plain (the same rule on the unperturbed held-out images), worse_top1 (of the warned
        pairs, how many lost top-1).
    """
    found = left_out(rows)
    names = sorted({row.network for row in rows})
    inside = {name: [case.is_inside for case in found if case.row.network == name] for name in names}
    pairs = pairs_of(rows)
    warned = [pair for pair in pairs if pair.lost >= MIN_LOSS]
    plain = [(pair.really_lost > MARGIN, pair.rounded.plain - pair.tuned.plain >= MIN_LOSS) for pair in pairs]
    return {
        "mean_error": float(np.mean([abs(case.value - case.row.real) for case in found])),
        "inside": sum(map(sum, inside.values())) / len(rows),
        "inside_by_network": {name: sum(values) / len(values) for name, values in inside.items()},
        "poor": Errors.count([(case.row.real < POOR, case.value < POOR) for case in found]),
        "worse": Errors.count([(pair.really_lost > MARGIN, pair.lost >= MIN_LOSS) for pair in pairs]),
        "worse_plain": Errors.count(plain),
        "worse_top1": (sum(pair.tuned.top1 < pair.rounded.top1 for pair in warned), len(warned)),
    }


COLUMNS = (
    *("network", "bits", "points", "student", "plain", "views", "confidence", "expected", "interval", "real", "images"),
    *("drop", "verdict"),
)
"""All but the last two are in percent; "images" is the number of labeled ones."""


def table(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Return a row of text per student, by network; expected by the other networks, values in percent."""
    known = {id(pair.tuned): pair for pair in pairs_of(rows)}
    lines: list[dict[str, object]] = []
    for case in sorted(left_out(rows), key=lambda case: (case.row.network, -case.row.harder)):
        row, pair, notes = case.row, known.get(id(case.row)), []
        notes += [] if case.is_inside else ["outside"]
        notes += _verdict("poor", row.real < POOR, case.value < POOR)
        notes += [] if pair is None else _verdict("worse", pair.really_lost > MARGIN, pair.lost >= MIN_LOSS)
        values = [f"{value:.2f}" for value in (row.plain, row.harder, row.confidence)]
        values += [f"{case.value:.1f}", f"{case.low:.1f} to {case.high:.1f}", f"{row.real:.2f}", str(row.labeled)]
        drop = f"{row.teacher_top1 - row.top1:.2f} ± {row.drop_stderr:.2f}"
        cells = (row.network, row.bits, row.points, row.variant, *values, drop, ", ".join(notes))
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    return lines


def _verdict(name: str, is_true: bool, was_warned: bool) -> list[str]:
    if is_true == was_warned:
        return [name] if is_true else []
    return [f"{name} missed"] if is_true else [f"{name} wrongly"]
