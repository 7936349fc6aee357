"""Pools: means and maxima over windows, and over the whole height and width."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from synq.engines.aten.builder import Builder
from synq.engines.aten.floats import in_floats
from synq.engines.aten.floats import mean as float_mean
from synq.engines.aten.moves import chosen, padded, reshaped, transposed
from synq.engines.aten.symbols import Call, Codes, Symbol, made, moved
from synq.engines.program import AveragePool, Convolution, GlobalAveragePool, MaxPool

Windows = tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int]]
"""Kernel, stride, and padding at the top, left, bottom and right."""
ZERO_CODE_PADDING = frozenset({"openvino"})
"""Engines whose average pool counts its padding as code 0, and not as the value 0: where codes have another zero point,
a `Pad` before the pool adds it. Measured in OpenVINO 2026.4.1."""


def mean(builder: Builder, call: Call) -> Symbol:
    """Lower a mean over axes after N."""
    symbol = call.argument("self")
    rank = len(symbol.shape) + 1
    given = call.argument("dim")
    axes = sorted({int(axis) % rank for axis in given}) if given else list(range(rank))
    if axes[0] == 0:
        builder.reject(call, "it takes the mean over images")
    if in_floats(builder, symbol):
        return float_mean(builder, call, symbol, axes)
    codes = builder.codes(call, symbol)
    return _global_mean(builder, call, codes, axes)


def _global_mean(builder: Builder, call: Call, codes: Codes, axes: list[int]) -> Symbol:
    """Return the mean over axes, as a global pool between movements if they are not height and width."""
    kept = [axis for axis in range(1, len(codes.shape) + 1) if axis not in axes]
    ordered = transposed(builder, codes, [0, *kept, *axes])
    if not (len(codes.shape) == 3 and axes == [2, 3]):
        count = _product(tuple(codes.shape[axis - 1] for axis in axes))
        ordered = reshaped(builder, ordered, (_product(tuple(codes.shape[axis - 1] for axis in kept)), count, 1))
    pooled = (ordered.shape[0], 1, 1)
    result = made(GlobalAveragePool(inputs=(ordered.name,), output="", layer=call.layer), pooled)
    if call.shape == pooled:
        return result
    return moved(result, call.shape, lambda value: reshaped(builder, value, call.shape))


def adaptive_average(builder: Builder, call: Call) -> Symbol:
    """Lower an average pool with a given output size, whose windows must have one size."""
    if in_floats(builder, call.argument("self")) and call.shape[1:] == (1, 1):
        return float_mean(builder, call, call.argument("self"), [2, 3])
    codes = builder.codes(call, call.argument("self"))
    if call.shape[1:] == (1, 1):
        return _global_mean(builder, call, codes, [2, 3])
    if (repeated := _repeated(builder, call, codes)) is not None:
        return repeated
    kernel = _even_windows(builder, call, codes)
    return _average(builder, call, codes, (kernel, kernel, (0, 0, 0, 0)), count_padding=False)


def average(builder: Builder, call: Call) -> Symbol:
    """Lower an average pool over windows."""
    codes = builder.codes(call, call.argument("self"))
    windows = _windows(builder, call, codes)
    kernel, stride, padding = windows
    divisor = call.argument("divisor_override")
    counts = bool(call.argument("count_include_pad"))
    divisors = F.avg_pool2d(
        torch.ones(1, 1, *codes.shape[1:], dtype=torch.float64),
        kernel,
        stride,
        call.numbers("padding"),
        bool(call.argument("ceil_mode")),
        counts,
        divisor,
    )  # the share of its divisor that a window has on the image
    for count_padding in (False, True):
        if torch.allclose(divisors[0, 0], _shares(codes.shape[1:], windows, count_padding), rtol=1e-12):
            return _average(builder, call, codes, windows, count_padding=count_padding)
    if divisor is None:
        builder.reject(call, "with ceil_mode and counted padding, its last windows are divided by another number")
    channels, largest = codes.shape[0], builder.largest_code
    template = Convolution(
        inputs=(codes.name,),
        output="",
        layer=call.layer,
        weight=torch.full((channels, 1, *kernel), largest, dtype=torch.int8),
        weight_scale=torch.full((channels,), 1.0 / largest, dtype=torch.float64),
        bias=torch.zeros(channels, dtype=torch.int32),
        weight_bits=largest.bit_length() + 1,
        stride=stride,
        padding=padding,
        dilation=(1, 1),
        groups=channels,
    )
    factor = torch.full((channels,), 1.0 / int(divisor), dtype=torch.float64)
    return replace(made(template, call.shape), factor=factor, offset=torch.zeros_like(factor))


def maximum(builder: Builder, call: Call) -> Any:
    """Lower a maximum over windows, or over height and width."""
    symbol = call.argument("self")
    if call.name == "amax":
        axes = sorted({int(axis) % (len(symbol.shape) + 1) for axis in call.argument("dim")})
        if axes != [2, 3] or len(symbol.shape) != 3:
            builder.reject(call, "it takes a maximum over other axes than height and width")
        return _maximum(builder, call, symbol, (symbol.shape[1:], (1, 1), (0, 0, 0, 0)), (1, 1))
    if call.name == "adaptive_max_pool2d":
        if isinstance(symbol, Codes) and (repeated := _repeated(builder, call, symbol)) is not None:
            return [repeated, None]
        kernel = _even_windows(builder, call, symbol)
        return [_maximum(builder, call, symbol, (kernel, kernel, (0, 0, 0, 0)), (1, 1)), None]
    dilation = call.numbers("dilation")
    windows = _windows(builder, call, symbol, dilation)
    result = _maximum(builder, call, symbol, windows, (dilation[0], dilation[1]))
    return [result, None] if call.name == "max_pool2d_with_indices" else result


def _maximum(builder: Builder, call: Call, symbol: Symbol, windows: Windows, dilation: tuple[int, int]) -> Symbol:
    kernel, stride, padding = windows
    channels, height, width = symbol.shape
    pooled = (channels, *_output_size((height, width), windows, dilation))
    template = MaxPool(
        inputs=(), output="", layer=call.layer, kernel=kernel, stride=stride, padding=padding, dilation=dilation
    )

    def pool(codes: Codes) -> Codes:
        return reshaped(builder, builder.move(codes, template, pooled), call.shape)

    return moved(symbol, call.shape, pool)


def _average(builder: Builder, call: Call, codes: Codes, windows: Windows, *, count_padding: bool) -> Symbol:
    kernel, stride, padding = windows
    if kernel == codes.shape[1:] and not any(padding):
        return _global_mean(builder, call, codes, [2, 3])
    if not any(padding):
        count_padding = False
    if count_padding and builder.target in ZERO_CODE_PADDING and codes.grid is not None and codes.grid.zero_point:
        top, left, bottom, right = padding
        codes = padded(builder, codes, (0, 0, top, left), (0, 0, bottom, right))
        padding, count_padding = (0, 0, 0, 0), False
    template = AveragePool(
        inputs=(codes.name,),
        output="",
        layer=call.layer,
        kernel=kernel,
        stride=stride,
        padding=padding,
        count_padding=count_padding,
    )
    return made(template, call.shape)


def _windows(builder: Builder, call: Call, symbol: Symbol, dilation: tuple[int, ...] = (1, 1)) -> Windows:
    """Return the windows of a pool, with the padding that its last windows need (ceil_mode)."""
    if len(symbol.shape) != 3:
        builder.reject(call, "it reads a tensor that is not (N, C, H, W)")
    kernel = call.numbers("kernel_size")
    stride = call.numbers("stride") if call.argument("stride") else kernel
    given = call.numbers("padding")
    ends = []
    for axis in (0, 1):
        reach = (call.shape[axis + 1] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        ends.append(max(given[axis], reach - symbol.shape[axis + 1] - given[axis]))
    return (kernel[0], kernel[1]), (stride[0], stride[1]), (given[0], given[1], ends[0], ends[1])


def _repeated(builder: Builder, call: Call, codes: Codes) -> Codes | None:
    """Return the codes repeated if an adaptive pool has a multiple of the positions that it reads, else None."""
    _, height, width = codes.shape
    rows, columns = call.shape[1:]
    if rows % height or columns % width:
        return None
    by_rows = chosen(builder, call, codes, 2, [row * height // rows for row in range(rows)])
    return chosen(builder, call, by_rows, 3, [column * width // columns for column in range(columns)])


def _even_windows(builder: Builder, call: Call, symbol: Symbol) -> tuple[int, int]:
    _, height, width = symbol.shape
    rows, columns = call.shape[1:]
    if height % rows or width % columns:
        builder.reject(call, f"its windows differ in size: {height} x {width} positions become {rows} x {columns}")
    return height // rows, width // columns


def _shares(size: tuple[int, ...], windows: Windows, count_padding: bool) -> torch.Tensor:
    """Return the share of its divisor that each window of an `AveragePool` has on the image, (H', W')."""
    kernel, stride, (top, left, bottom, right) = windows
    ones = F.pad(torch.ones(1, 1, *size, dtype=torch.float64), (left, right, top, bottom))
    found = F.avg_pool2d(ones, kernel, stride)[0, 0]
    return found if count_padding else torch.ones_like(found)


def _output_size(size: tuple[int, int], windows: Windows, dilation: tuple[int, int]) -> tuple[int, int]:
    kernel, stride, padding = windows
    height, width = (
        (size[axis] + padding[axis] + padding[axis + 2] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )
    return height, width


def _product(numbers: tuple[int, ...]) -> int:
    total = 1
    for number in numbers:
        total *= number
    return total


POOLS: dict[str, Callable[[Builder, Call], Any]] = {
    "mean": mean,
    "adaptive_avg_pool2d": adaptive_average,
    "_adaptive_avg_pool2d": adaptive_average,
    "avg_pool2d": average,
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices", "adaptive_max_pool2d", "amax"), maximum),
}
"""Lowering of each operator by its name."""
