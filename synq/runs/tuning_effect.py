"""Whether fine-tuning improved a student: the rounded and the tuned one by each measure. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from synq.common.text_tables import enumeration

MIN_KL_INCREASE = 0.01
"""Smallest increase of the KL to the teacher, in nats, that counts as worse: at 8 bits it is nearly 0 before and
after."""
MIN_KL_RATIO = 1.1
"""Smallest ratio of the KL after and before fine-tuning that counts as worse."""

MIN_AGREEMENT_AT_8_BITS = 95.0
"""Agreement with the teacher, in percent, below which a student of 8 bits is suspect."""


@dataclass(frozen=True, slots=True)
class Change:
    """One measure of a student before and after its fine-tuning."""

    measure: str
    """Name of the measure, for messages."""
    before: float
    """Of the rounded student."""
    after: float
    """Of the tuned student."""
    form: str
    """Format of both values."""
    change: int
    """1 if the tuned student is better by it, -1 if the rounded one is, 0 if they are equal or nearly so."""

    def __str__(self) -> str:
        return f"{self.measure} ({self.before:{self.form}} before, {self.after:{self.form}} after)"


def tuning_changes(
    rtn_top1: float | None,
    top1: float | None,
    rtn_fidelity: Mapping[str, float | None],
    fidelity: Mapping[str, float | None],
) -> list[Change]:
    """Return the measures that exist both before and after fine-tuning: top-1, agreement, KL.

    A lower top-1 or agreement always counts as worse; a higher KL from `MIN_KL_INCREASE` and `MIN_KL_RATIO` on.

    Args:
        rtn_top1: Top-1 before fine-tuning in percent; None without labels.
        top1: Top-1 after it.
        rtn_fidelity: Fidelity to the teacher on held-out synthetic images before fine-tuning, by measure.
        fidelity: The same after it.
    """
    pairs: list[tuple[str, float | None, float | None, str]] = [
        ("top-1", rtn_top1, top1, ".2f"),
        ("agreement with the teacher on held-out synthetic images", rtn_fidelity.get("agreement"),
            fidelity.get("agreement"), ".1f"),
        ("KL to the teacher on held-out synthetic images", rtn_fidelity.get("kl"), fidelity.get("kl"), ".3g"),
    ]  # fmt: skip
    changes = []
    for name, before, after, form in pairs:
        if before is None or after is None:
            continue
        if name.startswith("KL"):
            is_worse = after >= MIN_KL_RATIO * before and after - before >= MIN_KL_INCREASE
            sign = -1 if is_worse else 1 if after < before else 0
        else:
            sign = (after > before) - (after < before)
        changes.append(Change(name, before, after, form, sign))
    return changes


def rounding_warnings(bits: int, rtn_fidelity: Mapping[str, float | None], act_range: str = "minmax") -> list[str]:
    """Return a warning if a student disagrees with its teacher though it was rounded to 8 bits only.

    Measured at W8A8: 98.4 % and more where teacher and student see the same pixels, 84 to 91 % in the runs of before,
    whose students clipped pixels that their teachers did not (docs/results/LOG.md).

    Args:
        bits: The smallest width of a weight or activation.
        rtn_fidelity: Fidelity to the teacher on held-out synthetic images before fine-tuning, by measure.
        act_range: Range of the activations, `quant.act_range`.
    """
    advice = "`quant.equalization`" if act_range == "mse" else "`quant.act_range` mse or `quant.equalization`"
    agreement = rtn_fidelity.get("agreement")
    if bits < 8 or agreement is None or agreement >= MIN_AGREEMENT_AT_8_BITS:
        return []
    return [
        f"rounded to 8 bits, the student agrees with its teacher on only {agreement:.1f} % of the held-out synthetic "
        "images, which so many bits cannot explain: look for a tensor of extreme range in `synq report` (layers), try "
        f"{advice}, or check that `teacher.mean` and `teacher.std` are those of "
        "its training"
    ]


def harm_warnings(changes: list[Change]) -> list[str]:
    """Return a warning, with what to do, if the rounded student is better than the tuned one by a measure."""
    worse = [str(change) for change in changes if change.change < 0]
    better = [str(change) for change in changes if change.change > 0]
    if not worse:
        return []
    effect = f"the tuned one by {enumeration(better)}" if better else "the tuned one by none"
    return [
        f"fine-tuning made the student worse by a measure: the rounded student is better by {enumeration(worse)}, "
        f"{effect}; `--finetune.epochs 0` keeps the rounded one, a lower `finetune.lr` changes it less"
    ]


def effect_sentence(record: Any) -> str:
    """Return what fine-tuning did to the student of a record, in a sentence for its report; "" if it is not known."""
    changes = tuning_changes(record.rtn_top1, record.top1, record.rtn_fidelity, record.fidelity)
    if not changes or not record.loss_history:
        return ""
    parts = [
        f"{verb} {enumeration([str(change) for change in changes if change.change == sign])}"
        for sign, verb in ((1, "improved"), (-1, "made worse"), (0, "did not change"))
        if any(change.change == sign for change in changes)
    ]
    return f"Fine-tuning {enumeration(parts)}."
