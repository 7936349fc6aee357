"""First convolutions that read blocks of pixels as channels: the same integer sums, which engines compute faster.

An integer kernel copies the channels of each pixel under a window, or pads them to its unit, one pixel at a time. With
the 3 channels of an image that costs more than the products. A convolution with stride s is one with stride 1 on blocks
of s x s pixels, each of s * s * C channels, with fewer and wider positions: 7 x 7 with stride 2 on 3 channels becomes
4 x 4 on 12. Its weights that no pixel of the window meets are 0, so each sum is the same. Blocks of columns only, 7 x 4
on 6 channels, move no data where the channels are last in memory.
"""

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from synq.common.names import unique_name
from synq.engines.program import Convolution, Grid, Pad, Program, SpaceToDepth, Step

MAX_CHANNELS = 4
"""Largest number of channels of an image; with more, a kernel has enough to do for each pixel."""
MIN_SAVED_READS = 30_000
"""Fewest reads of a pixel that must be saved for an image: fewer cost less than the operators that make the blocks."""

Pair = tuple[int, int]


def with_image_blocks(program: Program, *, rows: bool = True) -> Program:
    """Return a program with the same logits in which convolutions of an image with a stride read blocks of pixels.

    Args:
        program: The program; one without such a convolution is returned as it is.
        rows: Whether blocks have as many rows as columns; else they have one row.
    """
    used = set(program.shapes)
    steps: list[Step] = []
    grids, shapes = dict(program.grids), dict(program.shapes)
    for step in program.steps:
        block = _block(program, step, rows)
        if isinstance(step, Convolution) and block is not None:
            steps += _on_blocks(program, step, block, used, grids, shapes)
        else:
            steps.append(step)
    if len(steps) == len(program.steps):
        return program
    return replace(program, steps=tuple(steps), grids=grids, shapes=shapes)


def _block(program: Program, step: Step, rows: bool) -> Pair | None:
    """Return the size of the blocks that a step should read; None if it has no such form or saves too few reads."""
    if not isinstance(step, Convolution) or step.groups != 1 or step.dilation != (1, 1):
        return None
    channels, (_, *size), kernel = program.shapes[step.inputs[0]][0], program.shapes[step.output], _kernel(step)
    block = (step.stride[0] if rows else 1, step.stride[1])
    if channels > MAX_CHANNELS or block[1] == 1 or any(a < b for a, b in zip(kernel, block, strict=True)):
        return None
    axes = [_Axis.of(program, step, axis, block[axis]) for axis in (0, 1)]
    saved = size[0] * size[1] * (kernel[0] * kernel[1] - axes[0].kernel * axes[1].kernel)
    return block if saved >= MIN_SAVED_READS and all(axis.after >= 0 for axis in axes) else None


def _kernel(step: Convolution) -> Pair:
    return step.weight.shape[2], step.weight.shape[3]


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Height or width of a convolution on blocks.

    Attributes:
        block: Pixels of a block.
        missing: Pixels after the image that fill its last block.
        shift: Pixels of the first block under a window that are before the window of pixels.
        kernel: Blocks under a window.
        before, after: Padding in blocks.
    """

    block: int
    missing: int
    shift: int
    kernel: int
    before: int
    after: int

    @classmethod
    def of(cls, program: Program, step: Convolution, axis: int, block: int) -> "_Axis":
        size, positions = (program.shapes[name][axis + 1] for name in (step.inputs[0], step.output))
        before = -(-step.padding[axis] // block)
        shift = before * block - step.padding[axis]
        kernel = -(-(shift + _kernel(step)[axis]) // block)
        blocks = -(-size // block)
        needed = step.stride[axis] // block * (positions - 1) + kernel
        after = step.padding[axis + 2] if block == 1 else needed - before - blocks
        missing = blocks * block - size
        return cls(block=block, missing=missing, shift=shift, kernel=kernel, before=before, after=after)


def _on_blocks(
    program: Program,
    step: Convolution,
    block: Pair,
    used: set[str],
    grids: dict[str, Grid],
    shapes: dict[str, tuple[int, ...]],
) -> list[Step]:
    """Return the step that makes blocks, after a padding if need be, and the convolution on them; add their values."""
    down, across = (_Axis.of(program, step, axis, block[axis]) for axis in (0, 1))
    source = step.inputs[0]
    channels, height, width = program.shapes[source]
    steps: list[Step] = []
    padded = source
    if down.missing or across.missing:
        padded = unique_name(f"{source}.padded", used)
        after = (0, 0, down.missing, across.missing)
        steps.append(Pad(inputs=(source,), output=padded, layer=step.layer, before=(0, 0, 0, 0), after=after))
        shapes[padded] = channels, height + down.missing, width + across.missing
    blocks = unique_name(f"{source}.blocks", used)
    steps.append(SpaceToDepth(inputs=(padded,), output=blocks, layer=step.layer, block=block))
    size = shapes[padded][1:]
    shapes[blocks] = channels * block[0] * block[1], size[0] // block[0], size[1] // block[1]
    grids |= dict.fromkeys((padded, blocks), grids[source])
    convolution = replace(
        step,
        inputs=(blocks,),
        weight=_weight_on_blocks(step.weight, down, across),
        stride=(step.stride[0] // block[0], step.stride[1] // block[1]),
        padding=(down.before, across.before, down.after, across.after),
    )
    return [*steps, convolution]


def _weight_on_blocks(weight: Tensor, down: _Axis, across: _Axis) -> Tensor:
    """Return a weight (C_out, C, height, width) in the order of `SpaceToDepth`, with zeros at its ends."""
    outputs, channels, *kernel = weight.shape
    sides = [
        (axis.shift, axis.kernel * axis.block - axis.shift - size)
        for axis, size in zip((across, down), reversed(kernel), strict=True)
    ]
    parts = F.pad(weight, [side for pair in sides for side in pair])
    parts = parts.reshape(outputs, channels, down.kernel, down.block, across.kernel, across.block)
    parts = parts.permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(outputs, -1, down.kernel, across.kernel).contiguous()
