"""Prepare a quantized student for fine-tuning: equalization, ranges, learned rounding, corrected statistics."""

from typing import Any

import torch
from torch import Tensor, fx

from synq.config.run import RunConfig
from synq.quant.adaround import reconstruct
from synq.quant.bn_correction import correct_statistics
from synq.quant.equalization import equalize
from synq.quant.keep_best import Synchronize
from synq.quant.student import observe_ranges
from synq.quant.transformer.log_quantizer import LogQuantizer, keep_best_grid
from synq.quant.transformer.scale_shift import locate_norms, scale_shift
from synq.teacher.pixel_range import PixelRange


def prepare_student(
    net: fx.GraphModule,
    teacher: fx.GraphModule,
    images: Tensor,
    config: RunConfig,
    device: torch.device,
    *,
    image_range: tuple[Tensor, Tensor] | None = None,
    synchronize: Synchronize = dict,
    progress: bool = False,
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """Calibrate a student, in place, and apply the configured steps before fine-tuning.

    quantize_model [-> equalize] [-> grid of softmax] [-> scale shift] -> observe ranges [-> learn the rounding]
    [-> correct statistics]

    Statistics are corrected last, because they compensate for the remaining rounding errors.

    Args:
        net: Network of a student from ``quantize_model(teacher, ...)``, on ``device``.
        teacher: Graph of its teacher, on ``device``; not modified.
        images: (N, C, H, W) synthetic images, filtered as for fine-tuning. Ranges and statistics are computed on the
            first ``quant.calib_images`` of them.
        config: Used are ``quant``, ``reconstruction`` and ``seed``.
        device: Device of the computation.
        image_range: Minimum and maximum of normalized pixels, each (1, C, 1, 1), to which ``images`` are clamped first.
        synchronize: Makes the metrics by which a change is kept the same on all processes.
        progress: Whether a terminal shows a progress bar.

    Returns:
        The float network that the student approximates tensor by tensor: the teacher, or a copy with the channel scales
        of the student. And the reports of the applied steps, by name ("equalization", "softmax", "scale_shift",
        "reconstruction", "bn_correction"), for the record.

    Raises:
        ValueError: As ``observe_ranges``.
    """
    quant = config.quant
    # The rest of the set, which may be a file larger than the memory, is not copied by the clamp.
    images = images[: max(quant.calib_images, config.reconstruction.images if quant.rounding == "adaround" else 0)]
    if image_range is not None:
        images = PixelRange(*image_range).clamp(images)
    calib = images[: quant.calib_images].to(device)

    def observe(student: fx.GraphModule) -> None:
        observe_ranges(student, calib, act_range=quant.act_range, weight_range=quant.weight_range, norm=quant.mse_norm)

    reference: fx.GraphModule = teacher
    report: dict[str, Any] = {}
    if quant.equalization:
        reference, report["equalization"] = equalize(net, teacher, calib, observe, synchronize)
    if quant.softmax == "log" and any(isinstance(module, LogQuantizer) for module in net.modules()):
        report["softmax"] = keep_best_grid(net, reference, calib, observe, synchronize)
    if quant.scale_shift and locate_norms(reference):
        reference, report["scale_shift"] = scale_shift(net, reference, calib, observe, synchronize)
    if not report:
        observe(net)
    if quant.rounding == "adaround":
        learned = reconstruct(
            net, reference, images, config.reconstruction, seed=config.seed, device=device, progress=progress
        )
        report["reconstruction"] = learned.rows()
    if quant.bn_correction:
        report["bn_correction"] = correct_statistics(net, reference, calib, synchronize=synchronize)
    return reference, report
