"""Joined passes compute what the passes apart compute, bit by bit, and only where they may be joined."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.config.run import QuantConfig
from synq.network.tracing import trace_classifier, with_features
from synq.quant.fake_quant import fake_quantize, fake_quantize_rectified
from synq.quant.fusion import RectifiedQuantizer, fuse_rectified
from synq.quant.layers import ActQuantizer, quantizers_bypassed
from synq.quant.student import observe_ranges, quantize_model


class Mixed(nn.Module):
    """A ReLU that may be joined as a function, one as a module, one with a padded shortcut, and a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.act2 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.conv3, self.act3 = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.GELU()
        self.linear = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        x = self.act2(self.conv2(x))
        x = F.relu(self.conv3(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.linear(self.act3(x).mean((2, 3)))


@pytest.mark.parametrize("act_points", ["relu", "inputs"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_joined_network_is_the_network(act_points: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    traced = trace_classifier(Mixed(), (3, 8, 8))
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=3, act_points=act_points))  # type: ignore[arg-type]
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    observe_ranges(student.net, images, act_range="mse")
    node = next(node.name for node in student.net.graph.nodes if node.op == "placeholder")
    apart = with_features(student.net, node).to(memory_format=layout)  # type: ignore[call-overload]
    joined = with_features(copy.deepcopy(student.net), node).to(memory_format=layout)  # type: ignore[call-overload]
    # "relu": three ReLUs, and the GELU stays. "inputs": the second is read by the shortcut as well, the third by the
    # GELU alone.
    assert fuse_rectified(joined) == {"relu": 3, "inputs": 1}[act_points]
    assert fuse_rectified(joined) == 0
    found, wanted = joined(images)[0], apart(images)[0]
    assert torch.equal(found, wanted)
    for net in (joined, apart):
        net.requires_grad_(True)
        net(images)[0].square().sum().backward()
    for name, parameter in apart.named_parameters():
        torch.testing.assert_close(joined.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6)
    assert joined.state_dict().keys() == apart.state_dict().keys()
    with quantizers_bypassed(joined), quantizers_bypassed(apart):
        assert torch.equal(joined(images)[0], apart(images)[0])


def test_what_may_not_be_joined_stays() -> None:
    student = quantize_model(trace_classifier(Mixed(), (3, 8, 8)), QuantConfig(weight_bits=4, act_bits=4))
    node = next(node.name for node in student.net.graph.nodes if node.op == "placeholder")
    assert fuse_rectified(with_features(student.net, node)) == 0, "no range is known yet"
    for module in student.net.modules():
        if isinstance(module, ActQuantizer):
            module.set_range(-1.0, 2.0)
    assert fuse_rectified(with_features(student.net, node)) == 0, "the zero point is not 0"


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_joined_function_at_every_edge(bits: int) -> None:
    high = 2**bits - 1
    scale, zero = torch.tensor(0.37), torch.tensor(0, dtype=torch.int32)
    edges = (torch.arange(-2, high + 2) + 0.5) * scale
    near = [edges.nextafter(torch.full_like(edges, end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat([edges, *near, torch.tensor([0.0, -0.0, -1e-30, 1e-30, -5.0, 1e9])])
    pull = torch.randn(len(x), generator=torch.Generator().manual_seed(0))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outs = [
        fake_quantize_rectified(leaves[0], scale, high),
        fake_quantize(F.relu(leaves[1]), scale, zero, 0, high),
    ]
    assert torch.equal(*outs)
    assert torch.equal(*(torch.autograd.grad(out, leaf, pull)[0] for out, leaf in zip(outs, leaves, strict=True)))


def test_other_number_formats_and_compilers_take_the_two_steps() -> None:
    student = quantize_model(trace_classifier(Mixed(), (3, 8, 8)), QuantConfig(weight_bits=4, act_bits=4))
    observe_ranges(student.net, torch.randn(4, 3, 8, 8), act_range="minmax")
    node = next(node.name for node in student.net.graph.nodes if node.op == "placeholder")
    joined = with_features(student.net, node)
    fuse_rectified(joined)
    pair = next(module for module in joined.modules() if isinstance(module, RectifiedQuantizer))
    x = torch.randn(50)
    wanted = pair(x)
    torch.testing.assert_close(pair(x.double()).float(), wanted, rtol=0, atol=0)
    assert pair(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(torch.compile(pair, backend="aot_eager")(x), wanted)
