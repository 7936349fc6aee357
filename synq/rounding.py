"""From a student rounded to nearest to the one that fine-tuning starts from: equalised channels, ranges, corrected statistics."""

from typing import Any

from torch import Tensor, fx

from synq.bn_correction import correct_statistics
from synq.configs import QuantConfig
from synq.equalization import equalize
from synq.guard import Agree
from synq.students import observe_ranges


def prepare_student(
    net: fx.GraphModule, teacher: fx.GraphModule, images: Tensor, quant: QuantConfig, agree: Agree = dict
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Set the ranges of a student, in place, after equalisation and before correction where the configuration asks for them.

    Args:
        net: Network of a student from ``quantize_model(teacher, ...)``.
        teacher: Its teacher's graph; not changed.
        images: (N, C, H, W) synthetic images on the device of both, filtered as those of the fine-tuning.
        quant: ``equalization``, ``bn_correction``, and how ranges are chosen.
        agree: Makes figures, by which something is kept or not, the same on all processes.

    Returns:
        The float network that the student imitates tensor by tensor: the teacher, or a copy whose channels are scaled as the
        student's. And what was done, for the record.

    Raises:
        ValueError: As ``observe_ranges``.
    """

    def observe(student: fx.GraphModule) -> None:
        observe_ranges(student, images, act_range=quant.act_range, weight_range=quant.weight_range, norm=quant.mse_norm)

    reference, report = teacher, {}
    if quant.equalization:
        reference, report["equalization"] = equalize(net, teacher, images, observe, agree)
    else:
        observe(net)
    if quant.bn_correction:
        report["bn_correction"] = correct_statistics(net, reference, images, agree=agree)
    return reference, report
