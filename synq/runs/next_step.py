"""What would help a student next: the settings that gave most on similar networks, with what they cost."""

import math
from typing import TYPE_CHECKING, Any

from synq.config.budget import BLENDED_ABOVE, NOTHING_LOST
from synq.config.quant import BYTE_BITS

if TYPE_CHECKING:
    from synq.runs.record import RunRecord

MOST = 2
"""Proposals in one line."""


def next_step(record: "RunRecord") -> str:
    """Return proposals in one line, the one that gave most first; "" where there is nothing to win, or none known.

    The gains are those of docs/results/LOG.md, on CIFAR ResNet-20s, for the bit-widths that a proposal is for.

    Args:
        record: A run; one that did not complete, or has no KL to the teacher, has no proposals.
    """
    kl = record.fidelity.get("kl")
    if record.status != "completed" or kl is None or kl <= NOTHING_LOST:
        return ""
    proposals = [
        f"{setting} ({gain})"
        for applies, setting, gain in _proposals(record, record.config.get("quant", {}))
        if applies
    ]
    return f"to lose less: {'; '.join(proposals[:MOST])}" if proposals else ""


def _proposals(record: "RunRecord", quant: dict[str, Any]) -> list[tuple[bool, str, str]]:
    """Return (whether it is for this run, what to set, what it gave at which cost), largest gain first."""
    quality, rounded = record.budget.get("quality"), record.budget.get("rounded_kl", 0.0)
    rounded = math.inf if rounded is None else rounded  # JSON has no infinity
    weights, acts = record.weight_bits, record.act_bits
    uniform = not quant.get("layer_weight_bits") and not quant.get("layer_act_bits")
    return [
        (
            weights == 2 and quant.get("rounding") == "nearest",
            "`--quant.rounding adaround --quant.weight_range mse`",
            "at W2A4 half of the drop, for as long as the fine-tuning takes",
        ),
        (
            quality == "standard" and rounded > BLENDED_ABOVE,
            "`--quality best`",
            "at W3A3 1.2 points, for three times the fine-tuning",
        ),
        (
            weights <= 4 and acts < BYTE_BITS,
            "`--quant.act_bits 8`",
            "at W4 1.1 points, for twice the bytes of activations",
        ),
        (
            uniform and weights <= 4 and acts < BYTE_BITS,
            "bits by layer, from `synq mixed-precision --activations`",
            "at W4A4 0.2 to 1.1 points in the same bytes, for a scan of minutes",
        ),
        (
            quality == "draft" and rounded > NOTHING_LOST,  # else the two choose the same
            "`--quality standard`",
            "at W4A4 0.3 points, for seven times the time",
        ),
    ]
