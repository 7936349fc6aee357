"""Write a program to a file of LiteRT (.tflite), operator by operator: its logits are those of the simulation, exactly.

    image (N, H, W, C) float -> QUANTIZE -> CONV_2D, ADD, MEAN, FULLY_CONNECTED ... int8 -> DEQUANTIZE -> logits float

Maps have the channels last (`channels_last`). Weights are int8 with a scale per output channel, biases int32. The batch
is 1 in the file, and may be set with ``resize_tensor_input`` before ``allocate_tensors``. No converter and no
calibration is involved. Compare logits with the engine's default delegate, XNNPACK: its reference kernels round
otherwise.

Operators are chosen by measurement (LiteRT 2.3.0, x86 with AVX-512 VNNI): those of XNNPACK whose arithmetic is known to
the last bit, see `xnnpack_arithmetic`. So an average pool is a depthwise convolution with the weight 1 / (height x
width), five times as fast as AVERAGE_POOL_2D; a function is written in floats between DEQUANTIZE and QUANTIZE, which
XNNPACK replaces by a table of 256 codes when it loads the file.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from synq.engines.image_blocks import with_image_blocks
from synq.engines.kernels import check_kernels, unsupported
from synq.engines.program import (
    AveragePool,
    Concatenation,
    Convolution,
    Dense,
    Dequantize,
    Elementwise,
    GlobalAveragePool,
    Layer,
    MaxPool,
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
from synq.engines.windows import same_padding
from synq.engines.xnnpack_arithmetic import pool_as_convolution
from synq.export.mobile.channels_last import memory_axes, memory_axis, memory_shape, reshape_moves, transpose_moves
from synq.export.mobile.emitter import OFFSET, Emitter
from synq.export.mobile.functions import emit_function
from synq.export.mobile.ranges import check_ratio, kernel_weight_scale

SAME, VALID = 0, 1
"""Numbers of paddings in the format."""


def write_tflite(program: Program, *, floats: bool = False) -> bytes:
    """Return the bytes of a .tflite file.

    The file has one signature, ``serving_default``, with the names of the program's input and output.

    Args:
        program: A program of the target ``litert``.
        floats: Write the network without quantization instead, in float32 and with its ReLUs: what the speed of the
            integer file is compared with.

    Raises:
        ValueError: If the engine has no exact integer kernel for a step.
        ModuleNotFoundError: If LiteRT's package or flatbuffers is not installed.
    """
    return _Writer(program, floats).write()


class _Writer(Emitter):
    def __init__(self, program: Program, floats: bool) -> None:
        super().__init__(program if floats else with_image_blocks(program, rows=False), floats)
        self.kinds: dict[type[Step], Callable[[Any], None]] = {
            Quantize: self.quantize,
            Dequantize: self.dequantize,
            Convolution: self.convolution,
            Dense: self.dense,
            Sum: self.sum,
            Product: self.product,
            Concatenation: self.concatenation,
            GlobalAveragePool: self.global_average_pool,
            AveragePool: self.average_pool,
            Elementwise: self.elementwise,
            MaxPool: self.max_pool,
            Reshape: self.reshape,
            Transpose: self.transpose,
            Slice: self.slice,
            Pad: self.pad,
            NearestResize: self.nearest_resize,
            SpaceToDepth: self.space_to_depth,
        }

    def write(self) -> bytes:
        program = self.program
        check_kernels(program)
        self.tensors[program.image] = self.tensor(program.image, self.shape(program.image), None)
        for step in program.steps:
            if type(step) not in self.kinds:
                raise ValueError(unsupported("litert", f"`{step.layer}` is a step {type(step).__name__}"))
            self.kinds[type(step)](step)
        inputs, outputs = ({name: self.tensors[name]} for name in (program.image, program.logits))
        return self.graph.serialize(inputs, outputs, "float network" if self.floats else "integer network")

    # From floats to codes and back.

    def quantize(self, step: Quantize) -> None:
        if self.floats:
            self.tensors[step.output] = self.tensors[step.inputs[0]]
        else:
            self.emit(step, "QUANTIZE", self.inputs(step), options="Quantize")

    def dequantize(self, step: Dequantize) -> None:
        if self.floats:
            self.tensors[step.output] = self.tensors[step.inputs[0]]
        else:
            self.emit(step, "DEQUANTIZE", self.inputs(step), 2, "Dequantize")

    # Layers.

    def weights(self, step: Layer, weight: Tensor, axis: int) -> list[int]:
        """Add the weight and the bias.

        Args:
            step: The layer.
            weight: Its codes in the order of memory.
            axis: Of the output channels.
        """
        source, output = self.program.grids[step.inputs[0]], self.program.grids[step.output]
        codes, scales = weight.contiguous().numpy(), kernel_weight_scale(step, source, output).numpy()
        steps = scales * np.float32(source.scale)
        name = step.layer or step.output
        if self.floats:
            real = codes * scales.reshape([-1 if number == axis else 1 for number in range(codes.ndim)])
            bias = (step.bias.double().numpy() * steps).astype(np.float32)
            return [self.graph.constant(f"{name}.weight", real), self.graph.constant(f"{name}.bias", bias)]
        return [
            self.graph.constant(f"{name}.weight", codes.astype(np.int8), scales.tolist(), axis=axis),
            self.graph.constant(f"{name}.bias", step.bias.int().numpy(), steps.tolist()),
        ]

    def convolution(self, step: Convolution) -> None:
        channels = self.program.shapes[step.inputs[0]][0]
        source, padding = self.padded(step, step.weight.shape[2:], step.dilation)
        values = {"padding": padding, "strideH": step.stride[0], "strideW": step.stride[1]}
        values |= {"dilationHFactor": step.dilation[0], "dilationWFactor": step.dilation[1]}
        if step.groups == channels and channels > 1:
            layer = self.weights(step, step.weight.permute(1, 2, 3, 0), 3)
            values["depthMultiplier"] = len(step.weight) // channels
            self.emit(step, "DEPTHWISE_CONV_2D", [source, *layer], 3, "DepthwiseConv2D", fuses=True, **values)
        else:
            layer = self.weights(step, step.weight.permute(0, 2, 3, 1), 0)
            self.emit(step, "CONV_2D", [source, *layer], 3, "Conv2D", fuses=True, **values)

    def dense(self, step: Dense) -> None:
        if self.program.grids.get(step.output) is None:
            cure = "give its output a grid, and dequantize it"
            raise ValueError(
                unsupported("litert", f"`{step.layer}` is a linear layer with an output in floats: {cure}")
            )
        rank = self.rank(step.output)
        layer = self.weights(step, step.weight, 0)
        inputs = [*self.inputs(step), *layer]
        self.emit(step, "FULLY_CONNECTED", inputs, 5, "FullyConnected", fuses=True, keepNumDims=rank > 2)

    def padded(
        self, step: Convolution | MaxPool | AveragePool, kernel: Sequence[int], dilation: tuple[int, int]
    ) -> tuple[int, int]:
        """Return the input of an operator with windows, padded if need be, and the operator's padding."""
        [source] = self.inputs(step)
        top, left, bottom, right = step.padding
        channels, height, width = self.program.shapes[step.inputs[0]]
        if not any(step.padding):
            return source, VALID
        if same_padding((height, width), (kernel[0], kernel[1]), step.stride, dilation) == step.padding:
            return source, SAME
        grid, offset = self.grid(step.inputs[0]), self.offsets.get(step.inputs[0], OFFSET)
        padded = self.tensor(
            f"{step.output}.padded", (height + top + bottom, width + left + right, channels), grid, offset
        )
        inputs = [source, self.numbers([(0, 0), (top, bottom), (left, right), (0, 0)])]
        if not isinstance(step, MaxPool) or self.program.grids[step.inputs[0]].zero_point == 0:  # 0 is the least value
            self.graph.operator("PAD", inputs, padded, 2, "Pad")
        elif grid is None:
            lowest = self.graph.constant("lowest", np.full(1, np.finfo(np.float32).min))
            self.graph.operator("PADV2", [*inputs, lowest], padded, 2, "PadV2")
        else:
            lowest = self.graph.constant("lowest", np.full(1, -OFFSET, np.int8), [grid.scale], grid.zero_point - offset)
            self.graph.operator("PADV2", [*inputs, lowest], padded, 2, "PadV2")
        return padded, VALID

    # Sums, products, pools, functions.

    def sum(self, step: Sum) -> None:
        check_ratio(self.program, step, "litert")
        self.emit(step, "ADD", self.inputs(step), 2, "Add", fuses=True)

    def product(self, step: Product) -> None:
        check_ratio(self.program, step, "litert")
        self.emit(step, "MUL", self.inputs(step), 2, "Mul", fuses=True)

    def concatenation(self, step: Concatenation) -> None:
        grid, parts = self.grid(step.output), self.inputs(step)
        if grid is not None:
            offset = self.limits(step).offset
            parts = [self.requantized(value, grid, offset) for value in step.inputs]
        axis = memory_axis(step.axis, self.rank(step.output))
        self.emit(step, "CONCATENATION", parts, 2, "Concatenation", axis=axis)

    def global_average_pool(self, step: GlobalAveragePool) -> None:
        self.emit(step, "MEAN", [*self.inputs(step), self.numbers([1, 2])], 2, "Reducer", keepDims=True)

    def average_pool(self, step: AveragePool) -> None:
        channels = self.program.shapes[step.inputs[0]][0]
        if step.count_padding or not any(step.padding):
            self.convolution(pool_as_convolution(step, channels))
            return
        own, shape = self.grid(step.inputs[0]), self.shape(step.output)
        source = self.tensors[step.inputs[0]] if own is None else self.requantized(step.inputs[0], own, OFFSET)
        pooled = self.tensor(f"{step.output}.pooled", shape, own)
        self.graph.operator("AVERAGE_POOL_2D", [source], pooled, 2, "Pool2D", **_pool_values(step, SAME))
        if own is None:
            self.tensors[step.output] = pooled
            return
        real = self.tensor(f"{step.output}.real", shape, None)
        self.graph.operator("DEQUANTIZE", [pooled], real, 2, "Dequantize")
        self.emit(step, "QUANTIZE", [real], options="Quantize")

    def elementwise(self, step: Elementwise) -> None:
        emit_function(self, step)

    # Movements.

    def max_pool(self, step: MaxPool) -> None:
        source, padding = self.padded(step, step.kernel, step.dilation)
        self.emit(step, "MAX_POOL_2D", [source], 2, "Pool2D", **_pool_values(step, padding))

    def reshape(self, step: Reshape) -> None:
        self.moved(step, reshape_moves(self.program.shapes[step.inputs[0]], step.shape))

    def transpose(self, step: Transpose) -> None:
        self.moved(step, transpose_moves(self.program.shapes[step.inputs[0]], step.axes))

    def slice(self, step: Slice) -> None:
        rank = self.rank(step.output)
        axis = memory_axis(step.axis, rank)
        begin, end, strides = [0] * rank, [0] * rank, [1] * rank
        begin[axis], end[axis], strides[axis] = step.start, step.stop, step.step
        mask = sum(1 << number for number in range(rank) if number != axis)
        bounds = [self.numbers(numbers) for numbers in (begin, end, strides)]
        self.emit(step, "STRIDED_SLICE", [*self.inputs(step), *bounds], 2, "StridedSlice", beginMask=mask, endMask=mask)

    def pad(self, step: Pad) -> None:
        amounts = [(step.before[axis], step.after[axis]) for axis in memory_axes(len(step.before))]
        self.emit(step, "PAD", [*self.inputs(step), self.numbers(amounts)], 2, "Pad")

    def nearest_resize(self, step: NearestResize) -> None:
        _, height, width = self.program.shapes[step.output]
        inputs = [*self.inputs(step), self.numbers([height, width])]
        self.emit(step, "RESIZE_NEAREST_NEIGHBOR", inputs, 3, "ResizeNearestNeighbor", halfPixelCenters=True)

    def space_to_depth(self, step: SpaceToDepth) -> None:
        assert step.block[0] == 1, "columns of one row are next to each other in memory, so that nothing moves"
        shape = memory_shape(self.program.shapes[step.output])
        self.moved(step, [("reshape", (-1, *shape))])


def _pool_values(step: MaxPool | AveragePool, padding: int) -> dict[str, Any]:
    values = {"padding": padding, "strideH": step.stride[0], "strideW": step.stride[1]}
    return {**values, "filterHeight": step.kernel[0], "filterWidth": step.kernel[1]}
