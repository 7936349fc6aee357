"""Random programs for the tests of all engines: any shapes, steps, bit-widths and grids."""

from collections.abc import Callable, Collection

from support.program_builder import ProgramBuilder
from synq.engines.program import Program

MAX_AXIS = 24
Piece = Callable[[ProgramBuilder, str], str]


def _convolution(builder: ProgramBuilder, value: str) -> str:
    channels, height, width = builder.shape(value)
    kernel = (builder.integer(1, min(4, height)), builder.integer(1, min(4, width)))
    dilation = (1, 1) if builder.integer(0, 2) else (2, 2)
    stride = (builder.integer(1, 2), builder.integer(1, 2))
    padding = tuple(builder.integer(0, 2) for _ in range(4))
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True)]
    if reach[0] > height + padding[0] + padding[2] or reach[1] > width + padding[1] + padding[3]:
        dilation = (1, 1)
    groups = builder.integer(1, 2) if channels % 2 == 0 else 1
    outputs = groups * builder.integer(1, 8)
    assert len(padding) == 4
    return builder.convolution(value, outputs, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _depthwise(builder: ProgramBuilder, value: str) -> str:
    channels, height, width = builder.shape(value)
    if min(height, width) < 3:
        return builder.convolution(value, channels, (1, 1), groups=channels)
    return builder.convolution(value, channels, stride=(builder.integer(1, 2),) * 2, groups=channels)


def _sum(builder: ProgramBuilder, value: str) -> str:
    """A residual block, whose shortcut is the first or the second input."""
    branch = builder.convolution(value, builder.shape(value)[0])
    pair = (branch, value) if builder.integer(0, 1) else (value, branch)
    return builder.sum(*pair)


def _two_branches(builder: ProgramBuilder, value: str) -> str:
    return builder.sum(builder.convolution(value, 6, (1, 1)), builder.convolution(value, 6))


def _gate(builder: ProgramBuilder, value: str) -> str:
    """A block of squeeze and excitation."""
    channels = builder.shape(value)[0]
    squeezed = builder.convolution(builder.global_average_pool(value), max(channels // 2, 1), (1, 1))
    gate = builder.elementwise(builder.convolution(squeezed, channels, (1, 1)), "sigmoid")
    return builder.product(value, gate)


def _product(builder: ProgramBuilder, value: str) -> str:
    return builder.product(value, builder.convolution(value, builder.shape(value)[0]))


def _concatenation(builder: ProgramBuilder, value: str) -> str:
    parts = [value, builder.convolution(value, builder.integer(1, 5))]
    if builder.integer(0, 1):
        parts.append(builder.convolution(value, builder.integer(1, 5), (1, 1)))
    return builder.concatenation(parts)


def _twice(builder: ProgramBuilder, value: str) -> str:
    """Steps that read one value twice."""
    joined = builder.concatenation([value, value])
    return builder.product(joined, joined) if builder.integer(0, 1) else builder.sum(joined, joined)


def _average_pool(builder: ProgramBuilder, value: str) -> str:
    _, height, width = builder.shape(value)
    kernel = (builder.integer(1, min(3, height)), builder.integer(1, min(3, width)))
    padding = tuple(builder.integer(0, kernel[side % 2] - 1) for side in range(4))
    assert len(padding) == 4
    stride = (builder.integer(1, 2), builder.integer(1, 2))
    return builder.average_pool(value, kernel, stride, padding, count_padding=bool(builder.integer(0, 1)))


def _max_pool(builder: ProgramBuilder, value: str) -> str:
    _, height, width = builder.shape(value)
    kernel = (builder.integer(1, min(3, height)), builder.integer(1, min(3, width)))
    padding = tuple(builder.integer(0, kernel[side % 2] - 1) for side in range(4))
    assert len(padding) == 4
    return builder.max_pool(value, kernel, (builder.integer(1, 2), builder.integer(1, 2)), padding)


def _reshape(builder: ProgramBuilder, value: str) -> str:
    """Channels side by side in width, and back: a shuffle of channels without its transposition."""
    channels, height, width = builder.shape(value)
    return builder.reshape(builder.reshape(value, channels * height, width), channels, height, width)


def _transpose(builder: ProgramBuilder, value: str) -> str:
    return builder.transpose(value, 0, 1, 3, 2)


def _shuffle(builder: ProgramBuilder, value: str) -> str:
    channels, height, width = builder.shape(value)
    if channels % 2:
        return _transpose(builder, value)
    grouped = builder.transpose(builder.reshape(value, 2, channels // 2, height, width), 0, 2, 1, 3, 4)
    return builder.reshape(grouped, channels, height, width)


def _slice(builder: ProgramBuilder, value: str) -> str:
    axis = builder.integer(1, 3)
    size = builder.shape(value)[axis - 1]
    start = builder.integer(0, size - 1)
    return builder.slice(value, axis, start, builder.integer(start + 1, size), builder.integer(1, 2))


def _pad(builder: ProgramBuilder, value: str) -> str:
    before, after = ((0, *(builder.integer(0, 2) for _ in range(3))) for _ in range(2))
    return builder.pad(value, before, after)


def _resize(builder: ProgramBuilder, value: str) -> str:
    return builder.nearest_resize(value, builder.integer(1, 2), 2)


PIECES: dict[str, Piece] = {
    "convolution": _convolution,
    "depthwise": _depthwise,
    "sum": _sum,
    "two_branches": _two_branches,
    "gate": _gate,
    "product": _product,
    "concatenation": _concatenation,
    "twice": _twice,
    "average_pool": _average_pool,
    "max_pool": _max_pool,
    "reshape": _reshape,
    "transpose": _transpose,
    "shuffle": _shuffle,
    "slice": _slice,
    "pad": _pad,
    "resize": _resize,
}
"""What a random program is made of."""


def random_program(
    seed: int,
    *,
    target: str = "onnxruntime",
    weight_bits: int = 8,
    act_bits: int = 8,
    pieces: Collection[str] = tuple(PIECES),
    length: int = 6,
    float_logits: bool = True,
) -> Program:
    """A program of random pieces: an image of 8 bits, pieces, a global pool or a flattening, a hidden and a last layer.

    Args:
        seed: Of everything random.
        target: Its target.
        weight_bits, act_bits: Bit-widths of the codes, 2 to 8.
        pieces: Keys of `PIECES` to choose from.
        length: Number of pieces.
        float_logits: Whether the last layer has floats as output; else its codes are dequantized.
    """
    builder = ProgramBuilder((3, 12, 11), seed, weight_bits=weight_bits, act_bits=act_bits)
    names = sorted(pieces)
    value = builder.convolution(builder.quantize(bits=8), 8)
    for _ in range(length):
        value = PIECES[names[builder.integer(0, len(names) - 1)]](builder, value)
        if max(builder.shape(value)) > MAX_AXIS:
            value = builder.convolution(value, 6, (1, 1), stride=(2, 2))
    return finished(builder, value, float_logits=float_logits, target=target)


def finished(builder: ProgramBuilder, value: str, *, float_logits: bool, target: str = "onnxruntime") -> Program:
    """The program with its head: of a map, or of features that it has already."""
    if len(builder.shape(value)) == 3:
        if builder.integer(0, 1):
            value = builder.global_average_pool(value)
        value = builder.flatten(value)
    hidden = builder.dense(value, builder.integer(3, 12))
    logits = builder.dense(hidden, 5, floats=float_logits)
    return builder.build(logits if float_logits else builder.dequantize(logits), target)
