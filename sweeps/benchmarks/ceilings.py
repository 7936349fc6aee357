"""Hardware limits, and the share of them that each kernel and a whole fine-tuning step reach (roofline)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from synq.finetune.responses import teacher_response
from synq.finetune.training_loss import training_loss
from synq.network.bn_stats import channel_moments
from synq.network.gradcam import cam_map
from synq.quant.fake_quant import choose_qparams, fake_quantize, fake_quantize_rectified
from synq.synthesis.lowpass import gaussian_lowpass

from .steps import CONFIG, updated
from .subjects import KINDS, build_subject
from .table import Context, Row
from .timing import Spread, alternate

FLOAT = 4
"""Bytes of a float32."""
MATRIX = {"cpu": 1024, "cuda": 8192}
"""Rows of the square matrices whose product is timed."""
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}


@dataclass(frozen=True)
class Kernel:
    """One operation with its operation count and memory traffic.

    Attributes:
        name: Name in the table.
        call: Runs the operation once.
        flops: Floating-point operations; a multiply-add counts as two.
        size: Minimum number of bytes read and written.
    """

    name: str
    call: Callable[[], object]
    flops: float
    size: float


def kernels(device: torch.device, batch: int, channels: int = 16, side: int = 32) -> list[Kernel]:
    """Return the kernels of a fine-tuning step, in the memory format that runs use.

    Args:
        device: Device of the tensors.
        batch: Images per batch.
        channels: Channels of the feature map; the default is the largest layer of a ResNet-20.
        side: Height and width of the feature map and of the images, in pixels.
    """
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format

    def tensor(*shape: int) -> Tensor:
        made = torch.randn(*shape, device=device)
        return made.contiguous(memory_format=layout) if len(shape) == 4 else made

    x = tensor(batch, channels, side, side).requires_grad_()
    weight = tensor(channels, channels, 3, 3).requires_grad_()
    gradient, ones = tensor(batch, channels, side, side), torch.ones(channels, device=device)
    mean, variance = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    gamma, beta = ones.clone().requires_grad_(), mean.clone().requires_grad_()
    scale, zero = torch.tensor(0.2, device=device), torch.tensor(0, dtype=torch.int32, device=device)
    features, alpha = tensor(batch, 4 * channels, side // 4, side // 4), tensor(batch, 4 * channels)
    images = torch.randn(batch, 3, side, side, device=device)
    values, count = x.numel() * FLOAT, x.numel()

    def normalize() -> Tensor:
        return F.batch_norm(x, mean, variance, gamma, beta)

    def quantize() -> Tensor:
        if device.type == "cpu":
            return fake_quantize_rectified(x, scale, 15)
        return fake_quantize(F.relu(x), scale, zero, 0, 15)

    def quantize_weight() -> Tensor:
        low, high = weight.detach().flatten(1).aminmax(dim=1)
        return fake_quantize(weight, *choose_qparams(low, high, -8, 7), -8, 7, axis=0)

    def moments() -> Tensor:
        mean, variance = channel_moments(x)
        return (mean + variance).sum()

    def backward(out: Tensor, inputs: tuple[Tensor, ...], pull: Tensor | None = None) -> Callable[[], object]:
        return partial(torch.autograd.grad, out, inputs, pull, retain_graph=True)

    convolve = 2 * count * channels * 9
    fft = 2.5 * images.numel() * math.log2(side * side)  # of real values
    return [
        Kernel("convolution 3 x 3, forward", lambda: F.conv2d(x, weight, padding=1), convolve, 2 * values),
        Kernel(
            "convolution 3 x 3, backward",
            backward(F.conv2d(x, weight, padding=1), (x, weight), gradient),
            2 * convolve,
            3 * values,
        ),
        Kernel("batch norm, forward", normalize, 2 * count, 2 * values),
        Kernel("batch norm, backward", backward(normalize(), (x, gamma, beta), gradient), 5 * count, 3 * values),
        Kernel("ReLU and fake quantization, forward", quantize, 4 * count, 2 * values),
        Kernel("ReLU and fake quantization, backward", backward(quantize(), (x,), gradient), 2 * count, 3 * values),
        Kernel(
            "PyTorch's own ReLU and fake quantization, forward",
            lambda: torch.fake_quantize_per_tensor_affine(F.relu(x), scale, zero, 0, 15),
            4 * count,
            2 * values,
        ),
        Kernel(
            "range and fake quantization of a weight", quantize_weight, 8 * weight.numel(), 2 * FLOAT * weight.numel()
        ),
        Kernel(
            "class-activation map", lambda: cam_map(features, alpha), 2 * features.numel(), FLOAT * features.numel()
        ),
        Kernel(
            "low-pass filter of a batch", lambda: gaussian_lowpass(images, 16.0), 2 * fft, 2 * FLOAT * images.numel()
        ),
        Kernel("moments for synthesis, forward", moments, 4 * count, values),
        Kernel("moments for synthesis, backward", backward(moments(), (x,)), 2 * count, 2 * values),
    ]


def rows(context: Context) -> Iterator[Row]:
    """Measure a matrix product, a copy, every kernel, and the full step of both networks."""
    device = context.device
    row = partial(Row, group="ceilings")
    products, copies = _limits(context)
    flops, bandwidth = max(products), max(copies)
    size, mebibytes = MATRIX[device.type], COPY_BYTES[device.type] // 2**20
    yield row(what=f"matrix product, {size} x {size}, float32", value=_scaled(products, 1e-9), unit="GFLOP/s")
    yield row(what=f"copy of {mebibytes} MiB, read and written", value=_scaled(copies, 1e-9), unit="GB/s")
    batch = KINDS["resnet20"].batch[device.type]
    for kernel in kernels(device, batch):
        seconds = alternate({"kernel": kernel.call}, rounds=2 * context.rounds, device=device).seconds["kernel"]
        floor = max(kernel.flops / flops, kernel.size / bandwidth)
        bound = "arithmetic" if kernel.flops / flops > kernel.size / bandwidth else "memory"
        cost = f"{kernel.flops / 1e6:.3g} MFLOP, {kernel.size / 1e6:.3g} MB"
        note = f"{cost}, limit by {bound} {1e3 * floor:.3g} ms, {100 * floor / min(seconds):.0f} % of it"
        yield row(what=f"batch {batch}: {kernel.name}", value=_scaled(seconds, 1e3), unit="ms", note=note)

    for key in KINDS:
        yield _whole_step(key, context, flops)


def _limits(context: Context) -> tuple[list[float], list[float]]:
    """Return operations per second of a matrix product, and bytes per second of a copy, one of each a round."""
    device = context.device
    size, length = MATRIX[device.type], COPY_BYTES[device.type] // FLOAT
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    source, target = torch.randn(length, device=device), torch.empty(length, device=device)
    calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    seconds = alternate(calls, rounds=context.rounds, device=device).seconds
    return [2 * size**3 / each for each in seconds["product"]], [2 * length * FLOAT / each for each in seconds["copy"]]


def _whole_step(key: str, context: Context, flops: float) -> Row:
    """Share of the matrix product's rate that a full step reaches, counted by PyTorch's own counter of operations."""
    from torch.utils.flop_counter import FlopCounterMode

    subject = build_subject(key, context.device, context.seed)
    view = teacher_response(subject.teacher, subject.images, subject.labels)
    net, student = subject.student.net, subject.student
    step = updated(net, lambda: training_loss(net, student, view, subject.images, subject.labels, CONFIG)[0])
    with FlopCounterMode(display=False) as counter:
        step()
    work = counter.get_total_flops()
    seconds = alternate({"step": step}, rounds=context.rounds, device=context.device).seconds["step"]
    return Row(
        group="ceilings",
        what=f"{subject.name}: full step, share of the matrix product's rate",
        value=Spread.of([100 * work / each / flops for each in seconds]),
        unit="%",
        note=f"{work / 1e9:.3g} GFLOP in convolutions and products",
    )


def _scaled(values: list[float], factor: float) -> Spread:
    return Spread.of([factor * value for value in values])
