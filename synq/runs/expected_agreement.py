"""What a run expects of its student on real images, from held-out synthetic ones alone. Standard library only.

The agreement of student and teacher on harder views of the held-out images (`synq/evaluation/harder_views.py`) is
mapped to their agreement on real images by a line through the logits of both, fitted on networks with labeled images
(docs/results/CALIBRATION.md). Nothing here changes a student, a choice of settings or a ranking.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from synq.runs.next_step import next_step

if TYPE_CHECKING:
    from synq.runs.record import RunRecord

MIN_CONFIDENCE, MAX_CONFIDENCE = 44.0, 85.0
"""Smallest and largest confidence of the calibration's teachers, in percent."""
NETWORKS = 8
"""Networks of the calibration."""
SOURCE = "docs/results/CALIBRATION.md"
MIN_IMAGES = 64
"""Fewest held-out images: the calibration had 256, and fewer are blended with several partners each."""
MANY_IMAGES = 200
"""Held-out images from which on `MIN_LOSS` is more than two standard errors."""
MAX_CLASSES = 100
MAX_SIDE = 32
"""Most classes, and longest side of an image in pixels, of the calibration."""
MIN_SHOWN = 0.5
"""Smallest share of held-out images that the teacher gives their assigned class."""
FLOOR = 40.0
"""Agreement in percent, on the held-out images or on the views, below which a student has collapsed: it is no part of
the fit, and on real images it is taken to agree no more than on the held-out ones, with 0 as the lower bound."""
POOR = 90.0
"""Expected agreement in percent below which a student is called poor."""
MIN_LOSS = 3.0
"""Agreement on the views, in percentage points, that fine-tuning must lose to count as harm."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What decides whether a prediction is within the calibration."""

    images: int
    """Number of held-out images that views are made of."""
    classes: int
    """Classes of the teacher."""
    side: int
    """Longer side of its images, in pixels."""
    shown: float
    """Share (0..1) of the held-out images that the teacher gives their assigned class."""
    confidence: float | None = None
    """Mean largest probability of the teacher on the views, in percent; None if nothing was measured."""

    def reason(self) -> str:
        """Return why nothing can be predicted; "" if it can."""
        if self.images < MIN_IMAGES:
            return f"there are {self.images} held-out images and it takes {MIN_IMAGES} (`evaluation.heldout_images`)"
        if self.classes > MAX_CLASSES:
            return f"it is calibrated up to {MAX_CLASSES} classes, and the teacher has {self.classes}"
        if self.side > MAX_SIDE:
            return f"it is calibrated up to images of {MAX_SIDE} pixels, and the teacher's have {self.side}"
        if self.shown < MIN_SHOWN:
            return (
                f"the teacher classifies only {100 * self.shown:.0f} % of the held-out images as their assigned class "
                "(more `synthesis.iterations` help)"
            )
        if self.confidence is None:
            return "the run did not measure it"
        if not MIN_CONFIDENCE <= self.confidence <= MAX_CONFIDENCE:
            return (
                f"the teacher's confidence on blends of held-out images, {self.confidence:.0f} %, is outside the "
                f"calibration's, {MIN_CONFIDENCE:.0f} to {MAX_CONFIDENCE:.0f} %"
            )
        return ""


def logit(percent: float, images: int) -> float:
    """Return the logit of a share of ``images``, with half an image added on both sides: all of them is no infinity."""
    count = percent / 100 * images
    return math.log((count + 0.5) / (images - count + 0.5))


@dataclass(frozen=True, slots=True)
class Calibration:
    """A plane through logits, and the bounds of its residuals.

    logit(real agreement) = intercept + slope logit(agreement on the views) + confidence_slope logit(confidence). A
    teacher that is certain of blends has few real images that a small error moves to another class.
    """

    intercept: float
    slope: float
    confidence_slope: float
    lower: float
    upper: float
    """Residuals, in logits, between which 90 % of those of left-out networks are."""

    def predict(self, agreement: float, plain: float, confidence: float, images: int) -> tuple[float, float, float]:
        """Return the expected agreement on real images and its interval, all in percent.

        Args:
            agreement: Mean agreement with the teacher on the views, in percent.
            plain: Agreement on the unperturbed held-out images, in percent.
            confidence: The teacher's confidence on the views, in percent.
            images: Images of all views together.
        """
        middle = self.intercept + self.slope * logit(agreement, images)
        middle += self.confidence_slope * logit(confidence, images)
        value, low, high = (100 / (1 + math.exp(-(middle + shift))) for shift in (0.0, self.lower, self.upper))
        return (value, low, high) if min(agreement, plain) >= FLOOR else (min(value, plain), 0.0, high)


CALIBRATION = Calibration(0.9057, 1.0038, 0.5617, -2.0012, 1.731)
"""What `launch/calibrate_agreement.py` printed, see docs/results/CALIBRATION.md."""


def expected_agreement(
    rtn: Mapping[str, float | None],
    final: Mapping[str, float | None],
    heldout: HeldOut,
    views: int,
    plain: float | None,
) -> dict[str, Any]:
    """Return the record's field: value, low, high (percent; None where nothing can be predicted), reason and evidence.

    Args:
        rtn: `Measurement.harder` of the student before fine-tuning.
        final: The same after it.
        heldout: The held-out set.
        views: Number of views.
        plain: Agreement on the unperturbed held-out images after fine-tuning, in percent.
    """
    agreement, confidence = final.get("agreement"), final.get("confidence")
    heldout = replace(heldout, confidence=confidence)
    reason = heldout.reason()
    measured = (agreement, plain, final.get("kl"))
    if any(number is None or not math.isfinite(number) for number in measured):
        reason = "the student has no finite logits"
    value = low = high = None
    if not reason and agreement is not None and confidence is not None and plain is not None:
        value, low, high = CALIBRATION.predict(agreement, plain, confidence, views * heldout.images)
    values = {"value": value, "low": low, "high": high, "reason": reason, "calibration": SOURCE}
    return {**values, "views": {**final}, "rtn_views": {**rtn}, "heldout": asdict(heldout)}


def agreement_line(field: Mapping[str, Any]) -> str:
    """Return the expected agreement of a record in one line.

    Args:
        field: `RunRecord.expected_agreement`; empty for a run of an earlier version.
    """
    head = "expected agreement with the teacher on real images"
    if not field:
        return f"{head}: cannot be estimated: the run did not measure it"
    if field["reason"]:
        return f"{head}: cannot be estimated: {field['reason']}"
    return (
        f"{head}: {field['value']:.0f} % ({field['low']:.0f} to {field['high']:.0f}; calibrated on {NETWORKS} "
        f"networks, see {field['calibration']} in the sources of SynQ)"
    )


def poor_warnings(field: Mapping[str, Any]) -> list[str]:
    """Return a warning, with what to do, if the expected agreement is below `POOR`."""
    if not field or field["value"] is None or field["value"] >= POOR:
        return []
    return [
        f"the student is poor: it is expected to give real images its teacher's class in only {field['value']:.0f} % "
        f"({field['low']:.0f} to {field['high']:.0f}) of the cases; more bits (`synq mixed-precision` finds where), "
        "more images or epochs, or another `finetune.lr` may help; measure it on labeled images before it is used"
    ]


def worse_warnings(field: Mapping[str, Any]) -> list[str]:
    """Return a warning if the rounded student agrees clearly more with the teacher on the views than the tuned one."""
    if not field:
        return []
    before, after = (field[name].get("agreement") for name in ("rtn_views", "views"))
    if before is None or after is None or before - after < _least_loss(before, after, field):
        return []
    return [
        f"fine-tuning probably made the student worse: on blends of held-out images it agrees with its teacher for "
        f"{after:.1f} %, the rounded student for {before:.1f} %; `--finetune.epochs 0` keeps the rounded one, a lower "
        "`finetune.lr` changes it less"
    ]


def _least_loss(before: float, after: float, field: Mapping[str, Any]) -> float:
    """Return the loss, in percentage points, from which on fine-tuning counts as harm.

    With fewer images than the calibration had, at least two standard errors of a difference: of 16, one is 6 points.
    The views of an image are not independent, so only images are counted.
    """
    images, share = field["heldout"]["images"], (before + after) / 200
    if images >= MANY_IMAGES:
        return MIN_LOSS
    return max(MIN_LOSS, 200 * math.sqrt(2 * share * (1 - share) / max(images, 1)))


def doubts(field: Mapping[str, Any]) -> list[str]:
    """Return the warnings about a student: that it is poor, or worse than the rounded one."""
    return [*poor_warnings(field), *worse_warnings(field)]


def closing_notes(record: "RunRecord") -> list[str]:
    """Return what is printed after a run: its warnings, the expected agreement of a completed one, and what would help.

    Args:
        record: The run.
    """
    expected = [agreement_line(record.expected_agreement)] if record.status == "completed" else []
    proposals = [line] if (line := next_step(record)) else []
    return [*(f"warning: {text}" for text in record.warnings), *expected, *proposals]
