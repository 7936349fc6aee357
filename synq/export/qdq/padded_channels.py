"""Whole blocks of channels for depthwise convolutions: the same logits, in a file that ONNX Runtime runs faster.

ONNX Runtime's integer kernels of depthwise convolutions take 16 channels at a time; where the number of channels is no
multiple of that, all of them run on a kernel that is three times slower (120 channels, 5 x 5, 28 x 28 pixels: 139 us;
128 channels: 49 us; ONNX Runtime 1.32.0, AMD EPYC with AVX-512 VNNI). So channels are added, from the convolution
before a depthwise one to the one after it: their weights are 0, and what reads them multiplies them by 0.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from synq.engines.program import (
    AveragePool,
    Convolution,
    Elementwise,
    GlobalAveragePool,
    MaxPool,
    NearestResize,
    Product,
    Program,
    Step,
    Sum,
)

BLOCK = 16
"""Channels that a kernel takes at a time."""
MAX_GROWTH = 1.25
"""Largest accepted growth of the number of channels: beyond, the added work costs more than the kernel saves."""
CHANNELWISE = (AveragePool, Elementwise, GlobalAveragePool, MaxPool, NearestResize, Product, Sum)
"""Steps whose output has the channels of their inputs, each computed from the same one."""


def with_whole_blocks(program: Program) -> Program:
    """Return a program with the same logits whose depthwise convolutions have whole blocks of channels, if they can.

    Channels are added to all values that are joined by depthwise convolutions, functions, sums, products and pools, if
    every one of them is made, and read, by these or by an ordinary convolution.
    """
    wider = {name: count for values in _groups(program) if (count := _wanted(program, values)) for name in values}
    if not wider:
        return program
    steps = tuple(_widened(program, step, wider) for step in program.steps)
    shapes = {name: (wider[name], *shape[1:]) if name in wider else shape for name, shape in program.shapes.items()}
    return replace(program, steps=steps, shapes=shapes)


def _groups(program: Program) -> Iterator[set[str]]:
    """Yield the sets of values that have the same channels."""
    joined: dict[str, set[str]] = {}
    for step in program.steps:
        values = {step.output, *step.inputs} if _keeps_channels(program, step) else {step.output}
        group = set().union(*(joined.get(value, {value}) for value in values))
        joined |= dict.fromkeys(group, group)
    yield from {id(group): group for group in joined.values()}.values()


def _keeps_channels(program: Program, step: Step) -> bool:
    return _is_depthwise(program, step) or isinstance(step, CHANNELWISE)


def _is_depthwise(program: Program, step: Step) -> bool:
    """Return whether a step is a depthwise convolution with as many outputs as inputs."""
    if not isinstance(step, Convolution) or step.groups == 1:
        return False
    return step.groups == len(step.weight) == program.shapes[step.inputs[0]][0]


def _wanted(program: Program, values: set[str]) -> int | None:
    """Return the number of channels that a set of values should have; None to leave it as it is."""
    involved = [step for step in program.steps if step.output in values or values.intersection(step.inputs)]
    depthwise = [step for step in involved if _is_depthwise(program, step)]
    counts = {program.shapes[name][0] for name in values}
    if not depthwise or len(counts) != 1 or not values.issubset(step.output for step in involved):
        return None
    count = counts.pop()
    wanted = -(-count // BLOCK) * BLOCK
    fits = all(
        _keeps_channels(program, step) or (isinstance(step, Convolution) and step.groups == 1) for step in involved
    )
    return wanted if fits and count < wanted <= MAX_GROWTH * count else None


def _widened(program: Program, step: Step, wider: dict[str, int]) -> Step:
    if not isinstance(step, Convolution):
        return step
    inputs, outputs = (wider.get(name, program.shapes[name][0]) for name in (step.inputs[0], step.output))
    depthwise = _is_depthwise(program, step)
    return replace(
        step,
        weight=_padded(step.weight, outputs, 1 if depthwise else inputs, 0),
        weight_scale=_padded(step.weight_scale, outputs, None, 1),
        bias=_padded(step.bias, outputs, None, 0),
        groups=outputs if depthwise else step.groups,
    )


def _padded(tensor: Tensor, outputs: int, inputs: int | None, fill: float) -> Tensor:
    """Return a tensor with more positions of its first axis, and of its second if ``inputs`` is not None."""
    shape = (outputs, *tensor.shape[1:]) if inputs is None else (outputs, inputs, *tensor.shape[2:])
    if shape == tuple(tensor.shape):
        return tensor
    padded = torch.full(shape, fill, dtype=tensor.dtype)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor.cpu()
    return padded
