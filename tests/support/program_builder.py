"""Build integer programs step by step: grids that fit what flows through them, so that codes spread over their range.

The builder carries a float sample of every value along. It computes each step on it in floats and takes the output's
grid from the range found, with a random share cut off or left unused.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from synq.engines import program as p
from synq.engines.float_program import LayerNorm, MatrixProduct, Softmax
from synq.engines.functions import FUNCTIONS

SAMPLE = 4


class ProgramBuilder:
    """Values are named by the step that makes them: v0, v1, ...; `image` holds floats."""

    def __init__(self, size: tuple[int, int, int], seed: int, *, weight_bits: int, act_bits: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.weight_bits, self.act_bits = weight_bits, act_bits
        self.steps: list[p.Step] = []
        self.grids: dict[str, p.Grid] = {}
        self.samples: dict[str, Tensor] = {"image": torch.randn(SAMPLE, *size, generator=self.random)}

    def integer(self, low: int, high: int) -> int:
        """A random whole number, both ends included."""
        return int(torch.randint(low, high + 1, (), generator=self.random))

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.random))

    def shape(self, value: str) -> tuple[int, ...]:
        return tuple(self.samples[value].shape[1:])

    def grid_of(self, sample: Tensor, bits: int) -> p.Grid:
        """A grid for a sample: exact powers of two now and then, else any scale; zero points at the ends, too."""
        quant_max = 2**bits - 1
        low, high = min(float(sample.min()), 0.0), max(float(sample.max()), 0.0)
        share = self.uniform(0.5, 1.1)
        scale = max((high - low) * share / quant_max, 1e-3)
        if self.integer(0, 5) == 0:
            scale = 2.0 ** round(float(torch.tensor(scale).log2()))
        scale = float(torch.tensor(scale, dtype=torch.float32))
        zero_point = min(max(round(-low * share / scale), 0), quant_max)
        if self.integer(0, 9) == 0:
            zero_point = self.integer(0, quant_max)
        return p.Grid(scale=scale, zero_point=zero_point, quant_max=quant_max)

    def add(
        self, step_of: type[p.Step], inputs: Sequence[str], sample: Tensor, grid: p.Grid | None, **fields: object
    ) -> str:
        """Append a step; its output has the grid, or holds floats."""
        output = f"v{len(self.steps)}"
        if issubclass(step_of, p.Limited) and grid is not None:
            fields = {**dict(zip(("low", "high"), self.limits(grid), strict=True)), **fields}
        step = step_of(inputs=tuple(inputs), output=output, layer=f"layer.{output}", **fields)  # type: ignore[arg-type]
        self.steps.append(step)
        if grid is not None:
            self.grids[output] = grid
            low, high = (step.low, step.high) if isinstance(step, p.Limited) else (0, grid.quant_max)
            codes = (sample / grid.scale).round().add(grid.zero_point).clamp(low, high)
            sample = (codes - grid.zero_point) * grid.scale
        self.samples[output] = sample
        return output

    def limits(self, grid: p.Grid) -> tuple[int, int]:
        """Limits of an output: none, a ReLU, a ReLU6 or a hardtanh."""
        kind = self.integer(0, 3)
        six = min(round(6 / grid.scale) + grid.zero_point, grid.quant_max)
        return {
            0: (0, grid.quant_max),
            1: (grid.zero_point, grid.quant_max),
            2: (grid.zero_point, six),
            3: (
                max(0, grid.zero_point - round(1 / grid.scale)),
                min(grid.zero_point + 1 + round(1 / grid.scale), grid.quant_max),
            ),
        }[kind]

    def quantize(self, value: str = "image", bits: int | None = None) -> str:
        sample = self.samples[value]
        return self.add(p.Quantize, [value], sample, self.grid_of(sample, bits or self.act_bits))

    def dequantize(self, value: str) -> str:
        return self.add(p.Dequantize, [value], self.samples[value], None)

    def weight(self, *shape: int) -> dict[str, Tensor]:
        """Random codes of a weight with a dead channel and extreme codes, and their scales."""
        largest = 2 ** (self.weight_bits - 1) - 1
        floats = torch.randn(shape, generator=self.random)
        codes = (floats * largest / 2.5).round().clamp(-largest, largest).to(torch.int8)
        codes[0].flatten()[:1] = largest
        if shape[0] > 2 and self.integer(0, 3) == 0:
            codes[1] = 0
        fan_in = codes[0].numel()
        scale = (0.5 + torch.rand(shape[0], generator=self.random)) * 2.5 / largest / fan_in**0.5
        return {"weight": codes, "weight_scale": scale}

    def bias(self, weight_scale: Tensor, scale: float) -> Tensor:
        floats = torch.randn(len(weight_scale), generator=self.random) * 0.2
        return (floats / (weight_scale * scale)).round().to(torch.int32)

    def convolution(
        self,
        value: str,
        channels: int,
        kernel: tuple[int, int] = (3, 3),
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] | None = None,
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        **limits: int,
    ) -> str:
        grid = self.grids[value]
        weight = self.weight(channels, self.shape(value)[0] // groups, *kernel)
        bias = self.bias(weight["weight_scale"], grid.scale)
        if padding is None:
            down, across = kernel[0] // 2 * dilation[0], kernel[1] // 2 * dilation[1]
            padding = (down, across, down, across)
        top, left, bottom, right = padding
        real = weight["weight"] * weight["weight_scale"].reshape(-1, 1, 1, 1)
        padded = F.pad(self.samples[value], (left, right, top, bottom))
        sample = F.conv2d(padded, real, bias * weight["weight_scale"] * grid.scale, stride, 0, dilation, groups)
        fields = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, **limits}
        fields |= {**weight, "bias": bias, "weight_bits": self.weight_bits}
        return self.add(p.Convolution, [value], sample, self.grid_of(sample, self.act_bits), **fields)

    def dense(self, value: str, features: int, *, floats: bool = False) -> str:
        grid = self.grids[value]
        weight = self.weight(features, self.shape(value)[-1])
        bias = self.bias(weight["weight_scale"], grid.scale)
        real = weight["weight"] * weight["weight_scale"][:, None]
        sample = F.linear(self.samples[value], real, bias * weight["weight_scale"] * grid.scale)
        output = None if floats else self.grid_of(sample, self.act_bits)
        fields = {**weight, "bias": bias, "weight_bits": self.weight_bits}
        return self.add(p.Dense, [value], sample, output, **fields)

    def sum(self, a: str, b: str, **fields: object) -> str:
        sample = self.samples[a] + self.samples[b]
        return self.add(p.Sum, [a, b], sample, self.grid_of(sample, self.act_bits), **fields)

    def product(self, a: str, b: str) -> str:
        sample = self.samples[a] * self.samples[b]
        return self.add(p.Product, [a, b], sample, self.grid_of(sample, self.act_bits))

    def matrix_product(self, a: str, b: str, *, floats: bool = False) -> str:
        sample = self.samples[a] @ self.samples[b]
        output = None if floats else self.grid_of(sample, self.act_bits)
        return self.add(MatrixProduct, [a, b], sample, output)

    def softmax(self, value: str) -> str:
        return self.add(Softmax, [value], self.samples[value].softmax(-1), None)

    def layer_norm(self, value: str) -> str:
        count = self.shape(value)[-1]
        weight, bias = torch.randn(count, generator=self.random), torch.randn(count, generator=self.random)
        sample = F.layer_norm(self.samples[value], (count,), weight, bias)
        return self.add(LayerNorm, [value], sample, None, weight=weight, bias=bias, eps=1e-5)

    def concatenation(self, values: Sequence[str], axis: int = 1) -> str:
        sample = torch.cat([self.samples[value] for value in values], dim=axis)
        return self.add(p.Concatenation, values, sample, self.grid_of(sample, self.act_bits), axis=axis)

    def global_average_pool(self, value: str) -> str:
        sample = self.samples[value].mean((2, 3), keepdim=True)
        return self.add(p.GlobalAveragePool, [value], sample, self.grid_of(sample, self.act_bits))

    def average_pool(
        self,
        value: str,
        kernel: tuple[int, int] = (2, 2),
        stride: tuple[int, int] = (2, 2),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        *,
        count_padding: bool = False,
    ) -> str:
        top, left, bottom, right = padding
        sides = (left, right, top, bottom)
        sample = F.avg_pool2d(F.pad(self.samples[value], sides), kernel, stride)
        if not count_padding:
            sample = sample / F.avg_pool2d(F.pad(torch.ones_like(self.samples[value]), sides), kernel, stride)
        fields = {"kernel": kernel, "stride": stride, "padding": padding, "count_padding": count_padding}
        return self.add(p.AveragePool, [value], sample, self.grid_of(sample, self.act_bits), **fields)

    def elementwise(self, value: str, function: str, **arguments: float) -> str:
        sample = FUNCTIONS[function](self.samples[value].double(), **arguments).float().nan_to_num()
        grid = self.grid_of(sample, self.act_bits)
        return self.add(p.Elementwise, [value], sample, grid, function=function, arguments=arguments)

    def max_pool(
        self,
        value: str,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (2, 2),
        padding: tuple[int, int, int, int] = (1, 1, 1, 1),
        dilation: tuple[int, int] = (1, 1),
    ) -> str:
        top, left, bottom, right = padding
        padded = F.pad(self.samples[value], (left, right, top, bottom), value=float("-inf"))
        sample = F.max_pool2d(padded, kernel, stride, 0, dilation)
        fields = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        return self.add(p.MaxPool, [value], sample, self.grids[value], **fields)

    def reshape(self, value: str, *shape: int) -> str:
        return self.add(p.Reshape, [value], self.samples[value].reshape(SAMPLE, *shape), self.grids[value], shape=shape)

    def flatten(self, value: str) -> str:
        return self.reshape(value, self.samples[value][0].numel())

    def transpose(self, value: str, *axes: int) -> str:
        return self.add(p.Transpose, [value], self.samples[value].permute(axes), self.grids[value], axes=axes)

    def slice(self, value: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        sample = self.samples[value][(slice(None),) * axis + (slice(start, stop, step),)]
        return self.add(p.Slice, [value], sample, self.grids[value], axis=axis, start=start, stop=stop, step=step)

    def pad(self, value: str, before: tuple[int, ...], after: tuple[int, ...]) -> str:
        sides = [side for pair in zip(reversed(before), reversed(after), strict=True) for side in pair]
        sample = F.pad(self.samples[value], sides)
        return self.add(p.Pad, [value], sample, self.grids[value], before=before, after=after)

    def nearest_resize(self, value: str, down: int, across: int) -> str:
        sample = self.samples[value].repeat_interleave(down, 2).repeat_interleave(across, 3)
        return self.add(p.NearestResize, [value], sample, self.grids[value], factors=(down, across))

    def build(self, logits: str, target: str = "onnxruntime") -> p.Program:
        shapes = {name: tuple(sample.shape[1:]) for name, sample in self.samples.items()}
        return p.Program(
            target=target, image="image", logits=logits, steps=tuple(self.steps), grids=self.grids, shapes=shapes
        )
