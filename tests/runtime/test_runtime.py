"""Where networks stand: layouts that are asked for, and those that a network cannot take."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from synq.config.run import QuantConfig, RuntimeConfig
from synq.network.tracing import trace_classifier
from synq.quant.layers import QuantConv2d
from synq.quant.student import quantize_model
from synq.quant.transformer.log_quantizer import LogQuantizer
from synq.runtime import layout_of, place, synchronize_parameters, to_layout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("runtime", "device", "wanted"),
    [
        (RuntimeConfig(), CPU, torch.channels_last),
        (RuntimeConfig(), CUDA, torch.contiguous_format),
        (RuntimeConfig(precision="bf16"), CUDA, torch.channels_last),
        (RuntimeConfig(memory_format="contiguous"), CPU, torch.contiguous_format),
        (RuntimeConfig(memory_format="channels_last"), CUDA, torch.channels_last),
    ],
)
def test_layouts(runtime: RuntimeConfig, device: torch.device, wanted: torch.memory_format) -> None:
    assert layout_of(runtime, device) is wanted


def test_placing_a_network_gives_its_weights_format_and_layout(tiny_classifier: nn.Module) -> None:
    traced = trace_classifier(tiny_classifier, (3, 8, 8))
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4))  # its ranges are not observed yet
    place(student.net, RuntimeConfig(precision="fp64"), CPU, (3, 8, 8))
    kernels = [p for p in student.net.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels and all(p.dtype == torch.float64 and not p.is_contiguous() for p in kernels)
    place(student.net, RuntimeConfig(memory_format="contiguous"), CPU, (3, 8, 8))
    assert all(p.dtype == torch.float32 for p in student.net.parameters())
    to_layout(student.net, torch.contiguous_format, (3, 8, 8))
    assert all(p.is_contiguous() for p in kernels)


def test_a_network_that_cannot_take_channels_last_stays_contiguous() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 8 * 8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.linear(x.view(x.shape[0], -1))

    net = Viewed()
    assert to_layout(net, torch.channels_last, (3, 8, 8)) is torch.contiguous_format
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize(
    ("conv", "taken_before"),
    [
        (nn.Conv2d(3, 8, 1, stride=2), True),
        (nn.Conv2d(1, 8, 1, stride=(1, 3)), True),
        (nn.Conv2d(3, 8, 1, stride=2, padding="valid"), True),
        (nn.Conv2d(3, 8, 1, stride=2, padding=1), False),
        (nn.Conv2d(3, 8, 1), False),
        (nn.Conv2d(3, 8, 3, stride=2), False),
        (nn.Conv2d(4, 8, 1, stride=2, groups=2), False),
        (nn.Conv2d(16, 8, 1, stride=2), False),
    ],
)
def test_the_pixels_of_a_thin_strided_point_are_taken_out_before(conv: nn.Conv2d, taken_before: bool) -> None:
    """oneDNN writes past its memory in the backward pass of such a layer: its own strides must not get there."""
    layer = QuantConv2d.from_float(conv, bits=4).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for side in (12, 13):
        images = torch.randn(2, conv.in_channels, side, side).to(memory_format=torch.channels_last)
        with torch.no_grad():
            plain = layer(images)
            assert torch.equal(plain, layer._conv_forward(images, layer.weight_quantizer(layer.weight), layer.bias))
        learning = layer(images)
        assert learning.grad_fn._saved_stride == ((1, 1) if taken_before else conv.stride)
        torch.testing.assert_close(learning, plain)


THIN_POINT = """
import torch
from torch import nn
from synq.quant.layers import QuantConv2d

torch.manual_seed(0)
layer = QuantConv2d.from_float(nn.Conv2d(3, 48, 1, stride=2), bits=4).to(memory_format=torch.channels_last)
images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
for _ in range(5):
    layer.zero_grad()
    layer(images).square().sum().backward()
weight = layer.weight_quantizer(layer.weight).detach().double().requires_grad_()
nn.functional.conv2d(images.double(), weight, layer.bias.detach().double(), 2).square().sum().backward()
torch.testing.assert_close(layer.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-3 *
weight.grad.abs().max().item())
print("right")
"""
"""RepVGG's first layer. Its range is that of its weights, so that no gradient is masked."""


@pytest.mark.slow
def test_a_thin_strided_point_learns() -> None:
    """In a process of its own, because what it is about ends the process."""
    done = subprocess.run([sys.executable, "-c", THIN_POINT], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "right", (done.returncode, done.stderr[-2000:])


def test_tensors_of_five_axes_keep_their_layout() -> None:
    """Such as the masks of shifted windows."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    net.register_buffer("mask", torch.zeros(1, 4, 1, 2, 2))
    assert to_layout(net, torch.channels_last, (3, 8, 8)) is torch.channels_last
    weight = net[0].weight
    assert isinstance(weight, nn.Parameter) and weight.is_contiguous(memory_format=torch.channels_last)
    assert net.mask.is_contiguous()


def test_what_a_module_holds_as_a_number_is_that_of_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of a logarithmic grid is a buffer and a number; processes may have chosen different ones."""
    quantizer = LogQuantizer(4)
    quantizer.set_step(0.5)

    def from_main(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(1.0) if tensor.ndim == 0 and tensor.is_floating_point() else tensor

    monkeypatch.setattr("synq.runtime.broadcast", from_main)
    synchronize_parameters(quantizer)
    assert float(quantizer.step) == 1.0 == quantizer.octaves
