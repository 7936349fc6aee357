"""Programs of a single step, to time it in its engine: the image is quantized, and the result becomes floats."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from synq.engines.program import (
    Dequantize,
    GlobalAveragePool,
    Grid,
    Layer,
    Limited,
    Program,
    Quantize,
    Reshape,
    Slice,
    Step,
)

IMAGE, LOGITS, OUTPUT = "images", "logits", "output"
"""Names of the values of such a program."""


def with_weight_bits(step: Layer, bits: int) -> Layer:
    """Return a layer whose weight has another bit-width: its codes are limited, which changes no time of an engine."""
    largest = 2 ** (bits - 1) - 1
    return replace(step, weight=step.weight.clamp(-largest, largest), weight_bits=bits)


def with_output_bits(step: Step, grid: Grid, bits: int) -> tuple[Step, Grid]:
    """Return a step whose output has another bit-width, and its grid; a ReLU that limits its codes stays one.

    Args:
        step: The step.
        grid: Of its output now.
        bits: The bit-width, 2 to 8.
    """
    quant_max = 2**bits - 1
    factor = quant_max / grid.quant_max
    zero_point = round(grid.zero_point * factor)
    changed = Grid(scale=grid.scale / factor, zero_point=zero_point, quant_max=quant_max)
    if isinstance(step, Limited):
        low, high = round(step.low * factor), max(round(step.high * factor), round(step.low * factor) + 1)
        step = replace(step, low=min(low, quant_max - 1), high=min(high, quant_max))
    return step, changed


def single_step(program: Program, step: Step, grid: Grid | None) -> Program:
    """Return a program that computes one step on parts of an image.

    Args:
        program: The program that the step is from, for the shapes and grids of its inputs.
        step: The step, perhaps with another weight.
        grid: Of its output; None if it stays in floats.

    Returns:
        A program of the same target. Inputs of different shapes are slices, reshaped parts or means of one image.
    """
    inputs = [program.shapes[name] for name in step.inputs]
    largest = max(inputs, key=prod)
    image = (*largest, *(1,) * (3 - len(largest)))
    if isinstance(step, Quantize):
        return _ended(program, [replace(step, inputs=(IMAGE,), output=OUTPUT)], {IMAGE: image}, {}, grid)
    steps: list[Step] = []
    shapes: dict[str, tuple[int, ...]] = {IMAGE: image}
    grids: dict[str, Grid] = {}
    names = []
    for number, (name, shape) in enumerate(zip(step.inputs, inputs, strict=True)):
        codes = f"codes{number}"
        steps.append(Quantize(inputs=(IMAGE,), output=codes, layer=codes))
        shapes[codes], grids[codes] = image, program.grids[name]
        for part in _parts(image, shape):
            made = f"{codes}.{type(part).__name__.lower()}{len(steps)}"
            steps.append(replace(part, inputs=(codes,), output=made, layer=made))
            shapes[made], grids[made] = _shape_after(part, shapes[codes]), grids[codes]
            codes = made
        names.append(codes)
    steps.append(replace(step, inputs=tuple(names), output=OUTPUT))
    shapes[OUTPUT] = program.shapes[step.output]
    return _ended(program, steps, shapes, grids, grid)


def signature(program: Program) -> str:
    """Return what the time of a program depends on, as text: its steps without names and values of weights."""
    parts = []
    for step in program.steps:
        known: dict[str, Any] = {
            key: value for key, value in vars(step).items() if not hasattr(value, "shape") and key not in _NAMES
        }
        if isinstance(step, Layer):
            known["weight"] = tuple(step.weight.shape)
        grid = program.grids.get(step.output)
        if isinstance(step, Limited) and grid is not None:
            known["low"], known["high"] = step.low == 0, step.high == 255
        zero = None if grid is None else grid.zero_point == 0
        parts.append(f"{type(step).__name__}{sorted(known.items())}{program.shapes[step.output]}{zero}")
    return f"{program.target} {program.shapes[program.image]} " + " ".join(parts)


_NAMES = ("inputs", "output", "layer")


def _parts(image: tuple[int, ...], shape: tuple[int, ...]) -> Sequence[Step]:
    """Return the movements that make a value of ``shape`` of an image."""
    if shape == image:
        return []
    if len(shape) == 3 and shape[1:] == (1, 1) and image[1:] != (1, 1):
        pool = GlobalAveragePool(inputs=(), output="")
        return [pool] if shape[0] == image[0] else [pool, _slice(1, shape[0])]
    found: list[Step] = []
    padded = (*shape, *(1,) * (3 - len(shape)))
    found += [
        _slice(axis + 1, size) for axis, (size, have) in enumerate(zip(padded, image, strict=True)) if size < have
    ]
    return [*found, Reshape(inputs=(), output="", shape=shape)] if len(shape) < 3 else found


def _slice(axis: int, stop: int) -> Slice:
    return Slice(inputs=(), output="", axis=axis, start=0, stop=stop)


def _shape_after(step: Step, shape: tuple[int, ...]) -> tuple[int, ...]:
    match step:
        case GlobalAveragePool():
            return (shape[0], 1, 1)
        case Slice():
            return tuple(step.stop if axis == step.axis - 1 else size for axis, size in enumerate(shape))
        case Reshape():
            return step.shape
    raise TypeError(f"no part of an image is made by {type(step).__name__}")


def _ended(
    program: Program,
    steps: list[Step],
    shapes: dict[str, tuple[int, ...]],
    grids: dict[str, Grid],
    grid: Grid | None,
) -> Program:
    """Return a program whose last step's codes become floats (N, K)."""
    last = steps[-1]
    shape = shapes.setdefault(last.output, program.shapes.get(last.output, shapes[IMAGE]))
    if grid is not None:
        grids[last.output] = grid
    if len(shape) > 1:
        flat = replace(Reshape(inputs=(last.output,), output="flat", shape=(prod(shape),)), layer="flat")
        steps, shapes["flat"] = [*steps, flat], flat.shape
        if grid is not None:
            grids["flat"] = grid
    logits = steps[-1].output
    if grid is not None:
        steps = [*steps, Dequantize(inputs=(logits,), output=LOGITS, layer=LOGITS)]
        shapes[LOGITS], logits = shapes[logits], LOGITS
    return Program(target=program.target, image=IMAGE, logits=logits, steps=tuple(steps), grids=grids, shapes=shapes)
