"""Operations in a student: each is quantized, keeps its values, or is rejected by name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.student_tools import SIZE, Points, Residual, make
from synq.quant.layers import ActQuantizer, QuantConv2d
from synq.quant.student import observe_ranges


@pytest.mark.parametrize(
    "activation",
    [
        F.relu,
        torch.relu,
        lambda x: x.relu_(),
        lambda x: x.clamp(0, 6),
        F.relu6,
        F.hardswish,
        F.silu,
        nn.ReLU6(inplace=True),
    ],
)
def test_activations_written_in_any_way_are_quantized(activation: object) -> None:
    """Trap: a tool that only swaps nn.ReLU modules leaves functional activations in float without a word."""
    student = make(net=Residual(activation))
    observe_ranges(student.net, torch.randn(8, *SIZE), act_range="minmax")
    quantizers = [m for m in student.net.modules() if isinstance(m, ActQuantizer)]
    assert len(quantizers) == 3
    seen: list[Tensor] = []
    hooks = [q.register_forward_hook(lambda m, a, out: seen.append(out)) for q in quantizers]
    with torch.no_grad():
        student.net(torch.randn(4, *SIZE))
    for hook in hooks:
        hook.remove()
    assert [len(out.unique()) <= 16 for out in seen] == [True] * 3


def test_unknown_operations_are_rejected_by_name() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x)).flatten(2)
            return self.fc(torch.linalg.matrix_exp(torch.matmul(y, y.transpose(1, 2))).mean(2))

    with pytest.raises(ValueError, match=r"'linalg_matrix_exp' is linalg_matrix_exp: its tensors would stay"):
        make(net=Attention())

    class FunctionalConv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 1, 1))
            self.bn, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.relu(self.bn(F.conv2d(x, self.weight))).mean((2, 3)))

    with pytest.raises(ValueError, match=r"conv2d: its weight .* would stay float"):
        make(net=FunctionalConv())


class Middle(nn.Module):
    """Convolution, BatchNorm, what `middle` makes of it, a convolution and a classifier; no other non-linearity."""

    def __init__(self, middle: Callable[["Middle", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.fc, self.scale, self.middle = nn.Linear(8, 5), nn.Parameter(torch.rand(8)), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.middle(self, self.bn(self.conv1(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("middle", "names"),
    [
        (lambda net, x: x * x, ["mul"]),
        (lambda net, x: 1 / (x + 100), ["truediv"]),
        (lambda net, x: x * x.relu(), ["relu", "mul"]),
        (lambda net, x: torch.div(x.relu(), x.relu() + 1), ["relu", "relu_1", "div"]),
        (lambda net, x: x**2, ["pow_1"]),
        (lambda net, x: x * 2 / 3, []),
        (lambda net, x: 2 * x, []),
        (lambda net, x: x * net.scale.view(1, -1, 1, 1), []),
        (lambda net, x: x / net.scale.exp().view(1, -1, 1, 1), []),
        (lambda net, x: x.view(x.size(0), 8, x.shape[2], -1) * x.size(1), []),
        (lambda net, x: torch.cat(x.chunk(4, 1)[2:] + x.chunk(4, 1)[:2], 1), []),
        (lambda net, x: torch.hstack(x.chunk(4, 1)[2:] + x.chunk(4, 1)[:2]), []),
        (lambda net, x: x - torch.var_mean(x, (2, 3), keepdim=True)[1], []),
        (lambda net, x: x - torch.var_mean(x, (2, 3), keepdim=True)[0], ["getitem"]),
        (lambda net, x: x + torch.max(x, 1, keepdim=True)[0], []),
        (lambda net, x: x.reciprocal(), ["reciprocal"]),
    ],
)
def test_products_of_activations_are_nonlinear_and_scales_are_not(
    middle: Callable[[Middle, Tensor], Tensor], names: list[str]
) -> None:
    student = make(net=Middle(middle))
    assert [row.name for row in student.rows if row.role == "activation" and row.bits == 4] == names


@pytest.mark.parametrize(
    "split", [lambda x: x.chunk(2, 1), lambda x: torch.split(x, 4, 1), lambda x: x.view(-1, 2, 4, 16, 16).unbind(1)]
)
@pytest.mark.parametrize("act_points", ["relu", "inputs"])
def test_layers_that_read_a_part_of_a_split(
    split: Callable[[Tensor], tuple[Tensor, Tensor]], act_points: Points
) -> None:
    class Parted(Residual):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.conv1(x))
            first, second = split(x)
            x = torch.cat([first, self.relu(self.narrow(second))], 1).transpose(2, 3)
            x = F.channel_shuffle(x, 2) if act_points == "relu" else x
            return self.fc(self.relu(self.conv3(x)).mean((2, 3)))

    net = Parted()
    net.narrow = nn.Conv2d(4, 4, 1)
    student = make(act_points, net=net, first_bits=8)
    image, pooled = (32, 32) if act_points == "relu" else (8, 4)
    # The part of a split is as wide as the whole, and the concatenation as wide as its widest part.
    assert student.bitops == (8 * 8 * 256 * 27) * image + 4 * (4 * 4 * 256 * 4 + 4 * 8 * 256 * 8 + pooled * 40)


class Standardized(nn.Conv2d):
    """Weight standardisation, written where nn.Conv2d calls its kernel."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Doubled(nn.Linear):
    """Hides from the tracer that it computes something else."""

    __module__ = "torch.nn.modules.linear"

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_layers_with_a_custom_forward_are_rejected() -> None:
    net = Residual()
    net.conv2 = Standardized(8, 8, 3, padding=1)
    made = make(net=net)  # its weight is computed from parameters alone: that is the weight of a layer
    assert any(name.endswith("_layer") and isinstance(part, QuantConv2d) for name, part in made.net.named_modules())
    net = Residual()
    net.fc = Doubled(8, 5)
    with pytest.raises(ValueError, match=r"with all quantizers bypassed the student's logits differ .* by \d"):
        make(net=net)


def test_synchronised_batchnorm_is_a_batchnorm() -> None:
    net = Residual()
    net.bn2 = nn.SyncBatchNorm(8)
    student = make(net=net)
    observe_ranges(student.net, torch.randn(4, *SIZE), act_range="minmax")
    assert student.net(torch.randn(2, *SIZE)).isfinite().all()
