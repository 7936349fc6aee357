"""Consistency of an integer program: what its writers and simulations may rely on."""

from collections.abc import Iterator

from synq.engines.float_program import FloatStep, LayerNorm, MatrixProduct
from synq.engines.program import (
    Concatenation,
    Convolution,
    Dequantize,
    Layer,
    Limited,
    Movement,
    Program,
    Quantize,
    Step,
    Sum,
)


def validate(program: Program) -> None:
    """Check that a program is consistent.

    Every value is made once, before it is read, and has a shape; grids have valid numbers; codes are limited within
    their grid; movements keep the grid; layers read codes, and their weights and biases are in range; only movements
    read floats.

    Raises:
        ValueError: At the first fault; the message names the step.
    """
    known = {program.image}
    for step in program.steps:
        for fault in _faults(program, step, known):
            raise ValueError(f"step {step.output!r} ({type(step).__name__} of {step.layer!r}) must {fault}")
        known.add(step.output)
    if program.logits not in known or program.logits in program.grids:
        raise ValueError(f"the logits must be made in floats, but {program.logits!r} is not")
    if len(program.shapes.get(program.logits, ())) != 1:
        raise ValueError(f"the logits must be (N, K), but they are (N, {program.shapes.get(program.logits)})")


def _faults(program: Program, step: Step, known: set[str]) -> Iterator[str]:
    grids, shapes = program.grids, program.shapes
    missing = [name for name in step.inputs if name not in known]
    if missing:
        yield f"read values that were made before, but {missing[0]!r} was not"
    if not step.inputs or step.output in known:
        yield "have inputs, and make a value that no other step makes"
    if step.output not in shapes or any(size < 1 for size in shapes[step.output]):
        yield f"have an output with a shape of positive numbers, but it is {shapes.get(step.output)}"
    grid = grids.get(step.output)
    if grid is not None and not (
        grid.scale > 0 and 0 <= grid.zero_point <= grid.quant_max <= 255 and 2 <= grid.bits <= 8
    ):
        yield f"have a grid with a scale above 0 and codes within 0..255, but it is {grid}"
    inputs = [grids.get(name) for name in step.inputs]
    if isinstance(step, Quantize):
        if inputs != [None] or grid is None:
            yield "map floats to codes"
    elif isinstance(step, FloatStep):
        if grid is not None or any(given is not None for given in inputs):
            yield "map floats to floats"
        yield from _float_faults(program, step)
    elif isinstance(step, Movement):
        if any(given != grid for given in inputs):
            yield f"keep the grid, but reads {inputs[0]} and makes {grid}"
    elif any(given is None for place, given in enumerate(inputs) if not _is_fused(step, place)):
        yield "read codes, but reads floats"
    if isinstance(step, Dequantize) and grid is not None:
        yield "make floats"
    if isinstance(step, Limited) and grid is not None and not 0 <= step.low <= step.high <= grid.quant_max:
        yield f"have limits within 0..{grid.quant_max}, but they are {step.low} and {step.high}"
    if isinstance(step, Sum) and {shapes[name] for name in step.inputs} != {shapes[step.output]}:
        yield f"add values of one shape, but they have {[shapes[name] for name in step.inputs]}"
    if isinstance(step, Concatenation) and step.axis < 1:
        yield "leave the axis of the images alone"
    if isinstance(step, MatrixProduct):
        first, second = (shapes[name] for name in step.inputs)
        if first[:-2] != second[:-2] or first[-1] != second[-2]:
            yield f"multiply matrices that fit, but they are {first} and {second}"
    if isinstance(step, Layer):
        yield from _layer_faults(program, step)


def _is_fused(step: Step, place: int) -> bool:
    """Return whether a step is a sum into which the engine fuses the layer that makes its input."""
    return isinstance(step, Sum) and step.unrounded == place


def _float_faults(program: Program, step: FloatStep) -> Iterator[str]:
    if isinstance(step, LayerNorm) and step.weight.shape != step.bias.shape != program.shapes[step.output][-1:]:
        yield f"have a weight and a bias for each feature, but they are {step.weight.shape} and {step.bias.shape}"


def _layer_faults(program: Program, step: Layer) -> Iterator[str]:
    channels, largest = len(step.weight), 2 ** (step.weight_bits - 1) - 1
    if not 2 <= step.weight_bits <= 8 or int(step.weight.int().abs().max()) > largest:
        yield f"have weight codes within +-{largest}, but they reach {int(step.weight.int().abs().max())}"
    if step.weight_scale.shape != (channels,) or not bool((step.weight_scale > 0).all()):
        yield "have a weight scale above 0 for each output channel"
    if step.bias.shape != (channels,):
        yield "have a bias for each output channel"
    source = program.grids[step.inputs[0]]
    products = step.weight.flatten(1).double().abs().sum(1) * max(
        source.zero_point, source.quant_max - source.zero_point
    )
    if float((products + step.bias.double().abs()).max()) >= 2**31:
        yield "add up to less than 2^31"
    if isinstance(step, Convolution):
        shape = program.shapes[step.inputs[0]]
        if len(shape) != 3 or shape[0] != step.weight.shape[1] * step.groups or channels % step.groups:
            yield f"have a weight that fits its input {shape}, but it is {tuple(step.weight.shape)}"
        if min(step.padding) < 0:
            yield f"have padding of at least 0, but it is {step.padding}"
    elif program.shapes[step.inputs[0]][-1] != step.weight.shape[1]:
        yield f"have a weight that fits its input, but it is {tuple(step.weight.shape)}"
