"""Gradients where a function has no finite slope: a quantized root at zero."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.config.quant import QuantConfig
from synq.network.slopes import finite_gradient
from synq.network.tracing import trace_classifier
from synq.quant.integer_form import integer_form
from synq.quant.student import observe_ranges, quantize_model

SIZE = (3, 8, 8)


class Headed(nn.Module):
    def __init__(self, head: Callable[["Headed", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.power, self.pool, self.head = nn.Parameter(torch.tensor(3.0)), nn.LPPool2d(3, 2), head

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self, self.conv(x))
        return self.fc(x.mean((2, 3)) if x.ndim == 4 else x)


def generalized_mean(net: Headed, x: Tensor) -> Tensor:
    return F.avg_pool2d(x.clamp(min=1e-6).pow(net.power), (x.size(-2), x.size(-1))).pow(1.0 / net.power).flatten(1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    "head",
    [
        generalized_mean,
        lambda net, x: x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3),
        lambda net, x: x.pow(2).mean((2, 3)).sqrt(),
        lambda net, x: net.pool(x.relu()),
        lambda net, x: x.relu() ** 0.5,
        lambda net, x: torch.pow(x.relu(), torch.tensor(0.3)),
        lambda net, x: x.sign() * x.abs().sqrt(),
        lambda net, x: x.relu().norm(dim=(2, 3)),
        lambda net, x: torch.log(x.clamp(min=1e-4)),
        lambda net, x: F.softplus(x).log(),
        lambda net, x: x.clamp(min=1e-6).log().mean((2, 3)).exp(),
        lambda net, x: x.sigmoid().logit(),
        lambda net, x: x.clamp(min=0.01).reciprocal(),
        lambda net, x: 1 / x.clamp(min=0.01),
        lambda net, x: x.clamp(min=0.01).rsqrt(),
        lambda net, x: torch.special.entr(x.sigmoid()),
    ],
)
def test_the_gradients_of_a_student_are_finite(head: Callable[[Headed, Tensor], Tensor], bits: int) -> None:
    net = Headed(head).eval().requires_grad_(False)
    traced = trace_classifier(net, SIZE)
    images = torch.randn(16, *SIZE, generator=torch.Generator().manual_seed(1))
    assert torch.equal(traced(images), net(images)), "values stay"
    student = quantize_model(traced, QuantConfig(weight_bits=bits, act_bits=bits)).net
    observe_ranges(student, images, act_range="minmax")
    dark = torch.cat([images, torch.zeros(1, *SIZE)]).requires_grad_()
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    student(dark).square().sum().backward()
    gradients = {"images": dark.grad, **{name: p.grad for name, p in student.named_parameters()}}
    for name, gradient in gradients.items():
        assert gradient is not None and bool(gradient.isfinite().all()), name
    assert float(gradients["conv.weight"].abs().max()) > 0  # type: ignore[union-attr]
    student.requires_grad_(False)
    torch.testing.assert_close(integer_form(student)(images), student(images), rtol=1e-3, atol=1e-3)


def test_a_gradient_is_autograds_but_where_the_slope_is_infinite() -> None:
    x = torch.tensor([0.0, 0.25, 4.0], requires_grad=True)
    finite_gradient(x).sqrt().sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 0.25]))  # type: ignore[arg-type]
    assert finite_gradient(x.detach()).data_ptr() == x.data_ptr(), "without gradients nothing is computed"
    positive = (torch.rand(4, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: finite_gradient(v).pow(1.5), positive)
    assert torch.autograd.gradgradcheck(lambda v: finite_gradient(v).pow(1.5), positive)


@pytest.mark.parametrize(
    ("head", "stand"),
    [(lambda net, x: x.relu().pow(2), 0), (lambda net, x: x.sigmoid() / 2, 0), (lambda net, x: x.relu().sqrt(), 1)],
)
def test_functions_with_a_slope_everywhere_are_left_as_they_are(
    head: Callable[[Headed, Tensor], Tensor], stand: int
) -> None:
    traced = trace_classifier(Headed(head).eval(), SIZE)
    assert sum(node.target is finite_gradient for node in traced.graph.nodes) == stand
