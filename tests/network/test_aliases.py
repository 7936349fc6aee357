"""In-place operations on tensors that share memory, loops over the parts of a tensor, and detached tensors."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.network.tracing import trace_classifier

SIZE = (3, 8, 8)
Middle = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A classifier whose middle is a function, so that its code has the lines of a forward pass."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branches = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(2)])
        self.drop, self.fc = nn.Dropout(), nn.Linear(8, 5)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self, F.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))


def same(middle: Middle) -> torch.fx.GraphModule:
    """Trace a network with a middle, and compare graph and network bit for bit."""
    torch.manual_seed(0)
    net = Net(middle).eval().requires_grad_(False)
    traced = trace_classifier(copy.deepcopy(net), SIZE)
    for count in (1, 2, 3):
        x = torch.randn(count, *SIZE)
        assert torch.equal(traced(x.clone()), net(x.clone()))
    return traced


def second_name(net: Net, x: Tensor) -> Tensor:
    y = x
    y += 1
    return x * y


def old_name(net: Net, x: Tensor) -> Tensor:
    shortcut = x.contiguous()
    x.add_(1.0)
    return x * shortcut


def every_operator(net: Net, x: Tensor) -> Tensor:
    y = x
    x += 0.5
    x -= 0.25
    x *= y
    x /= 3
    return x + y


def through_dropout(net: Net, x: Tensor) -> Tensor:
    return net.drop(x).add_(1.0) * x


def part(net: Net, x: Tensor) -> Tensor:
    first = x[:, :4]
    first.mul_(2.0)
    return x


def part_and_back(net: Net, x: Tensor) -> Tensor:
    x[:, :4] *= x[:, 4:]
    x[:, 0] = x[:, 1]
    return x


def parts_that_do_not_overlap(net: Net, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    first += second
    second.neg_()
    return torch.cat([first, second], 1)


def a_count(net: Net, x: Tensor) -> Tensor:
    count = x.shape[0]
    count += 0
    count *= 1
    return x.view(count, -1).view(count, *x.shape[1:])


@pytest.mark.parametrize(
    "middle",
    [second_name, old_name, every_operator, through_dropout, part, part_and_back, parts_that_do_not_overlap, a_count],
)
def test_whatever_shares_the_memory_reads_the_result(middle: Middle) -> None:
    same(middle)


def test_operations_in_place_keep_the_names_of_others() -> None:
    def residual(net: Net, x: Tensor) -> Tensor:
        y = x.neg()
        y += x
        return y

    def plain(net: Net, x: Tensor) -> Tensor:
        return x.neg() + x

    in_place, other = same(residual), same(plain)
    assert in_place.code == other.code
    assert [node.name for node in in_place.graph.nodes] == [node.name for node in other.graph.nodes]


def two_parts(net: Net, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    first.mul_(2.0)
    return x + torch.cat([second, first], 1)


def transposed(net: Net, x: Tensor) -> Tensor:
    x.transpose(2, 3).add_(1.0)
    return x


@pytest.mark.parametrize("middle", [two_parts, transposed])
def test_what_cannot_be_followed_is_named(middle: Middle) -> None:
    with pytest.raises(ValueError, match=r"must not overwrite parts .* node '\w+_' works in place on a part of 'relu'"):
        same(middle)


def listed(net: Net, x: Tensor) -> Tensor:
    return torch.cat([F.relu(p) if i else p for i, p in enumerate(x.split(2, 1))], 1)


def zipped(net: Net, x: Tensor) -> Tensor:
    return torch.cat([conv(p) for conv, p in zip(net.branches, x.chunk(2, 1), strict=True)], 1)


def summed(net: Net, x: Tensor) -> Tensor:
    x = sum(x.chunk(2, 1))
    return torch.cat([x, x], 1)


def starred(net: Net, x: Tensor) -> Tensor:
    first, *others = x.chunk(4, 1)
    return torch.cat([*others, first], dim=1)


def indexed(net: Net, x: Tensor) -> Tensor:
    parts = x.chunk(4, 1)
    return torch.cat([parts[i] for i in range(len(parts))][::-1], 1)


def backwards(net: Net, x: Tensor) -> Tensor:
    return torch.stack(list(reversed(x.unbind(1))), 1)


def hierarchical(net: Net, x: Tensor) -> Tensor:
    out: list[Tensor] = []
    for p in torch.split(x, 2, dim=1):
        out.append(F.relu(p + out[-1]) if out else p)
    return torch.cat(out, 1)


def unpacked(net: Net, x: Tensor) -> Tensor:
    first, second = x.reshape(x.shape[0], 2, -1, *x.shape[2:]).transpose(0, 1)
    if x.shape[2] > 4:
        first = first * 2
    return torch.cat([first, second], 1)


@pytest.mark.parametrize("middle", [unpacked, listed, zipped, summed, starred, indexed, backwards, hierarchical])
def test_the_parts_of_a_tensor_can_be_looped_over(middle: Middle) -> None:
    same(middle)


def test_a_loop_over_the_images_is_rejected() -> None:
    with pytest.raises(ValueError, match="must be traceable"):
        same(lambda net, x: torch.stack([image * 2 for image in x]))


def scaled_data(x: Tensor) -> Tensor:
    x.data.mul_(0.5)
    return x


@pytest.mark.parametrize(
    "detach", [torch.detach, lambda x: x.detach(), lambda x: x.data, lambda x: x.detach_(), scaled_data]
)
def test_a_detached_activation_hides_no_layer_from_fine_tuning(detach: Callable[[Tensor], Tensor]) -> None:
    traced = same(lambda net, x: detach(x) * 2).requires_grad_(True)
    images = torch.randn(2, *SIZE, requires_grad=True)
    traced(images).sum().backward()
    assert traced.get_parameter("conv.weight").grad is not None
    assert images.grad is not None
