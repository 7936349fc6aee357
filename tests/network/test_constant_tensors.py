"""Constants of a network (buffers, tensors of its code) that meet the number of images: coordinates as channels."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.config.quant import QuantConfig
from synq.network.recorded_calls import SIZED_METHODS
from synq.network.tracing import trace_classifier
from synq.quant.student import observe_ranges, quantize_model

SIZE = (3, 8, 8)
Coordinates = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A classifier with one more channel, of which a function makes the values; it may branch on a size."""

    coords: Tensor

    def __init__(self, coordinates: Coordinates, branches: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        rows = torch.linspace(-1, 1, 8).view(1, 1, 8, 1)
        self.register_buffer("coords", rows.repeat(1, 1, 1, 8))
        self.plain = rows.expand(1, 1, 8, 8)
        self.learned = nn.Parameter(torch.randn(1, 1, 8, 8))
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)
        self.other = nn.Conv2d(5, 4, 3)
        self.coordinates, self.branches = coordinates, branches

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        if self.branches and x.shape[2] > 4:  # needs the sizes
            x = x * 2
        x = torch.cat([x, self.coordinates(self, x)], 1)
        return self.fc(F.relu(self.other(x)).mean((2, 3)))


def meshed(net: Net, x: Tensor) -> Tensor:
    grid = torch.stack(torch.meshgrid(torch.arange(x.size(2)), torch.arange(x.size(3)), indexing="ij"))
    return grid[None, :1].float().expand(x.size(0), -1, -1, -1)


def resized(net: Net, x: Tensor) -> Tensor:
    return F.interpolate(net.coords[:, :, :4, :4], size=x.shape[-2:]).expand(x.size(0), -1, -1, -1)


def written_before(net: Net, x: Tensor) -> Tensor:
    mask = torch.zeros(8, 8)
    mask[2:4] = 1
    return mask.expand(x.size(0), 1, -1, -1)


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize(
    "coordinates",
    [
        lambda net, x: net.coords.expand(x.size(0), -1, -1, -1),
        lambda net, x: net.coords.expand((x.shape[0], -1, -1, -1)),
        lambda net, x: net.coords.expand(size=[len(x), 1, 8, 8]),
        lambda net, x: net.coords.expand(x.size(0), *net.coords.shape[1:]),
        lambda net, x: net.coords[0].expand(x.size()[0], -1, x.size(2), x.size(3)),
        lambda net, x: net.coords.expand_as(x[:, :1]),
        lambda net, x: net.coords.repeat(x.size(0), 1, 1, 1),
        lambda net, x: torch.tile(net.coords, (x.size(0), 1, 1, 1)),
        lambda net, x: torch.broadcast_to(net.coords, (x.size(0), 1, 8, 8)),
        lambda net, x: net.coords.repeat_interleave(x.size(0), 0),
        lambda net, x: net.coords.expand(16, -1, -1, -1)[: x.size(0)],
        lambda net, x: net.coords.repeat(16, 1, 1, 1).narrow(0, 0, len(x)),
        lambda net, x: net.coords.to(x).expand(x.size(0), -1, -1, -1),
        lambda net, x: net.coords.new_ones(x.size(0), 1, 8, 8) + net.coords.new_zeros(len(x), 1, 8, 8),
        lambda net, x: net.coords.new_empty(x.size(0), 1, 8, 8).fill_(0.5),
        lambda net, x: net.plain.expand(x.size(0), -1, -1, -1),
        lambda net, x: net.plain.repeat([x.size(0), 1, 1, 1]),
        lambda net, x: net.learned.expand(x.size(0), -1, -1, -1),
        lambda net, x: torch.linspace(-1, 1, 8).view(1, 1, -1, 1).expand(x.shape[0], 1, -1, x.shape[3]),
        lambda net, x: torch.linspace(-1, 1, x.size(2)).view(1, 1, -1, 1).repeat(x.size(0), 1, 1, x.size(3)),
        lambda net, x: torch.tensor([[0.5]]).expand(x.size(0), 8, 8).unsqueeze(1),
        meshed,
        resized,
        written_before,
    ],
)
def test_a_constant_for_each_image(coordinates: Coordinates, branches: bool) -> None:
    net = Net(coordinates, branches).eval().requires_grad_(False)
    traced = trace_classifier(copy.deepcopy(net), SIZE)
    for count in (1, 2, 5):
        x = torch.randn(count, *SIZE)
        assert torch.equal(traced(x), net(x))
    student = quantize_model(traced, QuantConfig(weight_bits=8, act_bits=8)).net
    x = torch.randn(16, *SIZE)
    observe_ranges(student, x, act_range="minmax")
    with torch.no_grad():
        torch.testing.assert_close(student(x), net(x), atol=0.1, rtol=0.1)
    assert not any(name in vars(Tensor) for name in SIZED_METHODS), "the methods of a tensor are put back"


def read_twice(net: Net, x: Tensor) -> Tensor:
    mask = torch.zeros(8, 8)
    x = x + mask
    mask += 1
    return x[:, :1] * mask


def filled_from_images(net: Net, x: Tensor) -> Tensor:
    mask = torch.zeros(1, 8, 8)
    mask[0, 0, 0] = x.mean()
    return x[:, :1] + mask


def counting(net: Net, x: Tensor) -> Tensor:
    net.coords.add_(x.mean())
    return net.coords.expand(x.size(0), -1, -1, -1)


def into(net: Net, x: Tensor) -> Tensor:
    return torch.mul(x[:1, :1], 2, out=net.coords).expand(x.size(0), -1, -1, -1)


@pytest.mark.parametrize("coordinates", [read_twice, filled_from_images, counting, into])
def test_a_constant_that_a_forward_pass_overwrites_is_named(coordinates: Coordinates) -> None:
    with pytest.raises(ValueError, match=r"a tensor that is a constant.*Compute a new tensor instead") as caught:
        trace_classifier(Net(coordinates, branches=False).eval(), SIZE)
    assert "control flow" not in str(caught.value)


def test_sizes_as_an_object_of_pytorch_are_named() -> None:
    with pytest.raises(ValueError, match=r"without torch\.Size"):
        trace_classifier(Net(lambda net, x: net.coords.expand(torch.Size([len(x), 1, 8, 8])), False).eval(), SIZE)


def test_a_constant_whose_elements_share_memory_can_be_stored_and_loaded() -> None:
    net = Net(lambda net, x: net.plain.expand(64, -1, -1, -1)[: x.shape[0]], branches=True).eval()
    net.register_buffer("shared", torch.full((1, 1, 1), 0.5).expand(1, 8, 8))
    traced = trace_classifier(copy.deepcopy(net), SIZE)
    traced.load_state_dict({name: tensor.clone() for name, tensor in traced.state_dict().items()})
    images = torch.randn(3, *SIZE)
    assert torch.equal(traced(images), net(images))
