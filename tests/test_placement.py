"""Where networks stand: layouts that are asked for, and those that a network cannot take."""

import pytest
import torch
from torch import Tensor, nn

from synq.configs import RuntimeConfig
from synq.placement import layout_of, place, to_layout
from synq.students import quantize_model
from synq.tracing import trace_classifier

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
    student = quantize_model(traced, weight_bits=4, act_bits=4)  # its ranges are not observed yet
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
