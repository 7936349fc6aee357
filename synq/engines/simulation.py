"""Run a program in PyTorch with the arithmetic of its engine: the same logits, to the last bit, without the engine.

The frame is one for all engines: the order of the steps, the exact integer sums, the movements of codes, the limits of
an output and the memory. How a step rounds is the matter of the engine's `Arithmetic`.
"""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.engines.arithmetic import Arithmetic, table
from synq.engines.exact_sums import ExactSums
from synq.engines.float_program import FloatStep, MatrixProduct
from synq.engines.onnxruntime_arithmetic import OnnxRuntimeArithmetic
from synq.engines.openvino_arithmetic import OpenVinoArithmetic
from synq.engines.program import (
    AveragePool,
    Concatenation,
    Convolution,
    Dense,
    Dequantize,
    Elementwise,
    GlobalAveragePool,
    Grid,
    Layer,
    Limited,
    MaxPool,
    Movement,
    NearestResize,
    Pad,
    Product,
    Program,
    Quantize,
    Reshape,
    Slice,
    SpaceToDepth,
    Step,
    Sum,
    Transpose,
)
from synq.engines.standard_arithmetic import StandardArithmetic
from synq.engines.xnnpack_arithmetic import XnnpackArithmetic

ARITHMETICS: dict[str, Callable[[Program], Arithmetic]] = {
    "onnxruntime": OnnxRuntimeArithmetic,
    "openvino": OpenVinoArithmetic,
    "litert": XnnpackArithmetic,
    "executorch": XnnpackArithmetic,
    "tensorrt": StandardArithmetic,
    "qnn": StandardArithmetic,
}
"""Arithmetic of each target."""


class Simulation(nn.Module):
    """A program as a module: images (N, C, H, W) float32 -> logits (N, K) float32.

    It computes no gradients. Weights and tables are buffers, so that ``.to(device)`` moves all of it; each value is
    freed after its last reader. Memory grows with N: callers split large sets into batches.

    Args:
        program: The program.
        arithmetic: How steps are rounded; by default that of the program's target.

    Raises:
        ValueError: If the target has no arithmetic, a function's input holds floats, or a layer's sums could exceed
            int32.
    """

    def __init__(self, program: Program, arithmetic: Arithmetic | None = None) -> None:
        super().__init__()
        if arithmetic is None:
            if program.target not in ARITHMETICS:
                choices = ", ".join(ARITHMETICS)
                raise ValueError(f"`target` must be one of {choices}, but got {program.target}: choose one of them")
            arithmetic = ARITHMETICS[program.target](program)
        self.program, self.arithmetic = program, arithmetic
        self.sums = nn.ModuleDict()
        for number, step in enumerate(program.steps):
            if isinstance(step, Layer):
                self.sums[str(number)] = ExactSums(step, program.grids[step.inputs[0]])
                axes = (-1, 1, 1) if isinstance(step, Convolution) else (-1,)
                scale, bias = step.weight_scale.float().reshape(axes), step.bias.double().reshape(axes)
                self.register_buffer(f"weight_scale_{number}", scale, persistent=False)
                self.register_buffer(f"bias_{number}", bias, persistent=False)
            elif isinstance(step, Elementwise):
                self.register_buffer(f"table_{number}", table(arithmetic, step), persistent=False)
        self._last_reader = {value: number for number, step in enumerate(program.steps) for value in step.inputs}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, K) of images (N, C, H, W)."""
        return self.values(images, (self.program.logits,))[self.program.logits]

    @torch.no_grad()
    def values(self, images: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """Return the values with the given names, codes as float32 whole numbers.

        Args:
            images: (N, C, H, W), normalized.
            names: Of the images, of outputs of steps.
        """
        values, kept = {self.program.image: images.float()}, {}
        with torch.autocast(images.device.type, enabled=False):
            for number, step in enumerate(self.program.steps):
                output = self._run(number, step, [values[name] for name in step.inputs])
                values[step.output] = self._limited(step, output)
                for name in dict.fromkeys((*step.inputs, step.output)):  # a step may read a value twice
                    if name in names:
                        kept[name] = values[name]
                    if self._last_reader.get(name, number) == number:
                        values.pop(name, None)
        return kept

    def _limited(self, step: Step, output: Tensor) -> Tensor:
        if not self.arithmetic.is_rounded(step.output):
            return output
        if isinstance(step, Limited):
            return output.clamp(step.low, step.high)
        return output.clamp(0, self.program.grids[step.output].quant_max) if isinstance(step, Quantize) else output

    def _run(self, number: int, step: Step, inputs: list[Tensor]) -> Tensor:
        """Return the output of a step before its limits."""
        arithmetic, x = self.arithmetic, inputs[0]
        match step:
            case Quantize():
                return arithmetic.quantize(step, x)
            case Dequantize():
                return arithmetic.dequantize(step, x)
            case Convolution():
                return arithmetic.convolution(step, *self._layer(number, x))
            case Dense():
                return arithmetic.dense(step, *self._layer(number, x))
            case Sum():
                return arithmetic.sum(step, x, inputs[1])
            case Product():
                return arithmetic.product(step, x, inputs[1])
            case MatrixProduct():
                return arithmetic.matrix_product(step, x, inputs[1])
            case FloatStep():
                return arithmetic.float_step(step, inputs)
            case Concatenation():
                return arithmetic.concatenation(step, inputs)
            case GlobalAveragePool():
                return arithmetic.global_average_pool(step, x)
            case AveragePool():
                return arithmetic.average_pool(step, x)
            case Elementwise():
                return self.get_buffer(f"table_{number}")[x.long()]
            case Movement():
                return moved(step, x, self.program.grids.get(step.inputs[0]))
        raise TypeError(f"no arithmetic for {type(step).__name__}")

    def _layer(self, number: int, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums = self.sums[str(number)](codes)
        return sums, self.get_buffer(f"weight_scale_{number}"), self.get_buffer(f"bias_{number}")


def moved(step: Movement, x: Tensor, grid: Grid | None) -> Tensor:
    """Return the output of a step that moves or chooses codes: the same in every engine.

    Args:
        step: The step.
        x: Its input.
        grid: Grid of the input; None for floats, which a Pad pads with 0.

    Raises:
        TypeError: If the step is of a kind that is not known.
    """
    match step:
        case MaxPool():
            top, left, bottom, right = step.padding
            lowest = float("-inf") if grid is None else 0.0
            padded = F.pad(x, (left, right, top, bottom), value=lowest)
            return F.max_pool2d(padded, step.kernel, step.stride, 0, step.dilation)
        case Reshape():
            return x.reshape(len(x), *step.shape)
        case Transpose():
            return x.permute(step.axes)
        case Slice():
            return x[(slice(None),) * step.axis + (slice(step.start, step.stop, step.step),)]
        case Pad():
            sides = [side for pair in zip(reversed(step.before), reversed(step.after), strict=True) for side in pair]
            return F.pad(x, sides, value=0.0 if grid is None else float(grid.zero_point))
        case NearestResize():
            return x.repeat_interleave(step.factors[0], dim=-2).repeat_interleave(step.factors[1], dim=-1)
        case SpaceToDepth(block=(rows, columns)):
            channels, height, width = x.shape[1:]
            parts = x.reshape(-1, channels, height // rows, rows, width // columns, columns).permute(0, 3, 5, 1, 2, 4)
            return parts.reshape(-1, channels * rows * columns, height // rows, width // columns)
    raise TypeError(f"no movement for {type(step).__name__}")
