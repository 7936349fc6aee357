"""Errors of the layers of a student, and histograms of what its activation quantizers read."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from synq.diagnostics.activation_recorder import ActivationRecorder
from synq.diagnostics.probe_parts import NUM_BINS, REACH, LayerError, RangeCount
from synq.evaluation.fidelity import sqnr_db
from synq.quant.layers import ActQuantizer, QuantConv2d, QuantLinear


def layer_errors(teacher: fx.GraphModule, student: fx.GraphModule, batches: Iterable[Tensor]) -> list[LayerError]:
    """Return the SQNR of each convolutional and linear layer, in order of execution.

    Args:
        teacher: The traced teacher.
        student: The student, whose layers have the names of the teacher's.
        batches: Images (N, C, H, W), normalized; all activations of a batch are in memory.
    """
    kinds = (nn.Conv2d, nn.Linear)
    expected, found = ActivationRecorder(teacher, kinds), ActivationRecorder(student, kinds)
    powers: dict[str, Tensor] = {}
    for images in batches:
        reference = expected(images)
        for name, output in found(images).items():
            target = reference[name].double()
            sums = torch.stack([target.square().sum(), (target - output.double()).square().sum()])
            powers[name] = powers.get(name, 0) + sums
    errors = []
    for name, (signal, noise) in powers.items():
        layer, original = student.get_submodule(name), teacher.get_submodule(name)
        assert isinstance(layer, QuantConv2d | QuantLinear) and isinstance(original.weight, Tensor)
        rounded = layer.weight_quantizer(layer.weight)
        errors.append(
            LayerError(
                name=name,
                bits=layer.weight_quantizer.bits,
                weight_db=sqnr_db(original.weight, rounded.detach()),
                output_db=math.inf if noise == 0 else float(10 * torch.log10(signal / noise)),
            )
        )
    return errors


def range_counts(student: fx.GraphModule, batches: Iterable[Tensor]) -> list[RangeCount]:
    """Return a histogram of the input of each activation quantizer, in order of execution.

    Args:
        student: The student.
        batches: As for `layer_errors`.
    """
    recorder = ActivationRecorder(student, ActQuantizer, inputs=True)
    found: dict[str, tuple[Tensor, int, int]] = {}
    for images in batches:
        for name, values in recorder(images).items():
            quantizer = _quantizer(student, name)
            low, high = _range(quantizer)
            reach, step = REACH * max(-low, high), (high - low) / (2**quantizer.bits - 1)
            # Values up to half a step outside the range round to its first or last code and are not clipped.
            outside = int(((values < low - step / 2) | (values > high + step / 2)).sum())
            counts = torch.histc(values.double().clamp(-reach, reach), NUM_BINS, -reach, reach)
            before = found.get(name, (torch.zeros_like(counts), 0, 0))
            found[name] = (before[0] + counts, before[1] + outside, before[2] + values.numel())
    ranges = []
    for name, (counts, outside, number) in found.items():
        quantizer = _quantizer(student, name)
        low, high = _range(quantizer)
        shares = (counts / number).numpy()
        ranges.append(
            RangeCount(name=name, bits=quantizer.bits, low=low, high=high, shares=shares, clipped=outside / number)
        )
    return ranges


def _quantizer(student: fx.GraphModule, name: str) -> ActQuantizer:
    quantizer = student.get_submodule(name)
    assert isinstance(quantizer, ActQuantizer)
    return quantizer


def _range(quantizer: ActQuantizer) -> tuple[float, float]:
    """Return the smallest and largest value that a quantizer represents."""
    scale, zero = float(quantizer.scale), int(quantizer.zero_point)
    return scale * (quantizer.quant_min - zero), scale * (quantizer.quant_max - zero)
