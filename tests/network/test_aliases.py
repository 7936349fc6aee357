"""In-place operations on tensors that share memory, loops over the parts of a tensor, and detached tensors."""

import copy
import random
from collections.abc import Callable
from typing import Any

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


VIEWS = (
    "{v}.transpose(2, 3)",
    "torch.transpose({v}, 1, -1)",
    "{v}.swapaxes(axis0=1, axis1=2)",
    "{v}.permute(0, 2, 3, 1)",
    "torch.permute({v}, dims=(0, -1, 1, 2))",
    "{v}.movedim(1, 3)",
    "torch.moveaxis({v}, (1, 2), (2, 1))",
    "{v}.mT",
    "{v}[:, 1:]",
    "{v}[..., ::2, :]",
    "{v}[:, :, 1]",
    "{v}[:, None]",
    "{v}.select(1, -1)",
    "{v}.narrow(2, 1, 2)",
    "{v}.chunk(2, 1)[1]",
    "{v}.split((1, {v}.shape[1] - 1), dim=1)[-1]",
    "torch.tensor_split({v}, 3, dim=2)[0]",
    "{v}.unbind(2)[1]",
    "{v}.flatten(2)",
    "{v}.view({v}.size(0), -1)",
    "{v}.unsqueeze(2)",
    "{v}.squeeze(2)",
    "{v}.unflatten(1, (2, -1))",
    "{v}.view_as({v})",
    "torch.diagonal({v}, dim1=1, dim2=2)",
)
CHANGES = (
    "{v}.add_(1.0)",
    "{v}.mul_(2)",
    "{v} += 0.5",
    "{v}[:, 0] = 0.25",
    "{v}[:, 1:] *= 3.0",
    "{v}[:, :1] = {v}[:, -1:] * 0.5",
    "torch.relu_({v})",
    "{v}.neg_()",
    "{v}.copy_({v} * 0.5)",
    "{v}.fill_(0.5)",
)


def program(seed: int) -> str:
    """Return a function of views of one tensor, some of them overwritten, that reads all of them at the end.

    Not ``contiguous``: whether it returns a view may depend on the number of images.
    """
    rng = random.Random(seed)
    lines, scope, names = ["x = x.clone()"], {"torch": torch, "x": torch.randn(2, 4, 6, 6)}, ["x"]
    while len(lines) < 12:
        source, name = rng.choice(names), f"v{len(lines)}"
        line = f"{name} = {rng.choice(VIEWS)}" if rng.random() < 0.6 else rng.choice(CHANGES)
        line = line.format(v=source)
        try:
            exec(line, scope)
        except (RuntimeError, IndexError, TypeError):  # a view that this shape has not
            continue
        if name in scope and (scope[name].shape[0] != 2 or scope[name].numel() == 0):  # images in another place
            del scope[name]
            continue
        lines.append(line)
        if name in scope:
            names.append(name)
    total = " + ".join(f"{name}.flatten(1).sum(1) * {number + 1}" for number, name in enumerate(names))
    return "\n    ".join(["def middle(net, x):", *lines, f"return x + ({total}).view(-1, 1, 1, 1)"])


@pytest.mark.parametrize("seed", range(40))
def test_views_of_views_read_what_was_written_through_others(seed: int) -> None:
    scope: dict[str, Any] = {"torch": torch}
    exec(program(seed), scope)
    try:
        same(scope["middle"])
    except AssertionError as error:
        raise AssertionError(program(seed)) from error


def two_parts(net: Net, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    first.mul_(2.0)
    return x + torch.cat([second, first], 1)


def transposed(net: Net, x: Tensor) -> Tensor:
    rows = x.mT
    x.transpose(2, 3)[:, 0].add_(1.0)
    return x * rows


@pytest.mark.parametrize("middle", [two_parts, transposed])
def test_a_part_or_a_turned_view_is_put_back(middle: Middle) -> None:
    graph = same(middle).graph
    assert not any(str(node.target).endswith("_") for node in graph.nodes if node.op == "call_method")


def windows(net: Net, x: Tensor) -> Tensor:
    x.unfold(2, 2, 2).add_(1.0)
    return x


def bits(net: Net, x: Tensor) -> Tensor:
    x.view(torch.int32)[:, :1].bitwise_and_(-2)
    return x


@pytest.mark.parametrize("middle", [windows, bits])
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
