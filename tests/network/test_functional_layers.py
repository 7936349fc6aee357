"""Functional calls that are rewritten as layers, and what the other stages do with these layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.config.run import QuantConfig
from synq.network.op_traits import node_module, operation_name
from synq.network.tracing import batchnorm_parameters, trace_classifier
from synq.quant.bn_correction import correct_statistics
from synq.quant.equalization import equalize
from synq.quant.integer_form import integer_form
from synq.quant.student import observe_ranges, quantize_model

SIZE = (3, 16, 16)


class Normed(nn.BatchNorm2d):
    """As timm writes it: an assertion, normalization as a function, an activation inside the layer."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.act = nn.ReLU()
        with torch.no_grad():
            for tensor in (*self.parameters(), self.running_mean, self.running_var):
                tensor.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "expected 4 axes")  # type: ignore[no-untyped-call]
        return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.weight, bias=self.bias, eps=self.eps))


class Body(nn.Module):
    """A convolution, `rest`, a mean and a classifier; `extra` are more modules."""

    def __init__(self, rest: Callable[["Body", Tensor], Tensor], **extra: nn.Module) -> None:
        super().__init__()
        self.rest = rest
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
        for name, module in extra.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rest(self, self.conv(x)).mean((2, 3)))


def calls(traced: fx.GraphModule) -> int:
    return sum(operation_name(node) == "batch_norm" for node in traced.graph.nodes)


@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"affine": False}])
def test_the_layer_has_the_tensors_and_the_names_of_the_module(options: dict[str, Any]) -> None:
    net = Body(lambda net, x: net.normed(net.normed(x)), normed=Normed(6, **options))  # type: ignore[operator]
    traced = trace_classifier(net, SIZE)
    layer = traced.get_submodule("normed")
    assert type(layer) is nn.BatchNorm2d and layer.eps == options.get("eps", 1e-5) and not layer.training
    assert [str(n.target) for n in traced.graph.nodes if node_module(traced, n) is layer] == ["normed"] * 2
    assert calls(traced) == 0 and not any(n.op == "get_attr" for n in traced.graph.nodes)
    own, theirs = traced.state_dict(keep_vars=True), net.state_dict(keep_vars=True)
    assert own.keys() == theirs.keys()
    assert all(own[name] is theirs[name] for name in own if "batches" not in name), "shared, not copied"
    x = torch.randn(2, *SIZE)
    assert torch.equal(traced(x), net(x))
    assert len(batchnorm_parameters(traced)) == (0 if options.get("affine") is False else 2)


def frozen(normed: nn.Module) -> nn.Module:
    """The affine tensors as buffers, as detectors freeze them."""
    for name in ("weight", "bias"):
        value = getattr(normed, name).detach()
        delattr(normed, name)
        normed.register_buffer(name, value)
    return normed


def trainable(normed: nn.Module) -> nn.Module:
    """The statistics as parameters."""
    for name in ("running_mean", "running_var"):
        value = getattr(normed, name)
        delattr(normed, name)
        setattr(normed, name, nn.Parameter(value, requires_grad=False))
    return normed


@pytest.mark.parametrize(
    "how",
    [
        *("own statistics", "two modules", "other eps", "flat", "with and without", "a layer without"),
        *("frozen", "trainable"),
    ],
)  # fmt: skip
def test_what_is_no_plain_batch_norm_stays_a_call(how: str) -> None:
    normed, other, plain = Normed(6), Normed(6), nn.BatchNorm2d(6)
    normed = {"frozen": frozen, "trainable": trainable}.get(how, nn.Identity())(normed)  # type: ignore[assignment]
    nn.init.uniform_(plain.weight)

    def extra(net: Body, x: Tensor) -> Tensor:
        statistics = (normed.running_mean, normed.running_var)
        if how == "own statistics":
            return F.batch_norm(x, normed.running_mean, x.detach().mean((0, 2, 3)).abs() + 1, normed.weight)
        if how == "two modules":
            return F.batch_norm(x, *statistics, other.weight, other.bias)
        if how == "flat":
            return F.batch_norm(x.flatten(2), *statistics, normed.weight, normed.bias).reshape(x.shape)
        if how == "with and without":
            return F.batch_norm(normed(x), *statistics)
        if how == "a layer without":
            return F.batch_norm(plain(x), plain.running_mean, plain.running_var)
        if how == "other eps":
            return F.batch_norm(normed(x), *statistics, normed.weight, normed.bias, eps=0.1)
        return normed(x)

    net = Body(extra, normed=normed, other=other, plain=plain)
    traced = trace_classifier(net, SIZE)
    assert calls(traced) == 1
    x = torch.randn(2, *SIZE)
    assert torch.equal(traced(x), net(x))


def test_further_tensors_of_the_module_stay_what_they_are() -> None:
    class Gained(Normed):
        def __init__(self) -> None:
            super().__init__(6)
            self.register_buffer("gain", torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    net = Body(lambda net, x: net.normed(x), normed=Gained())  # type: ignore[operator]
    traced = trace_classifier(net, SIZE)
    assert type(traced.get_submodule("normed")) is nn.BatchNorm2d
    assert "normed.gain" in traced.state_dict() and traced.double().get_buffer("normed.gain").dtype == torch.float64


@pytest.fixture
def parts() -> tuple[fx.GraphModule, fx.GraphModule, Tensor]:
    """A teacher with two such norms, its student at 4 bits, and images."""
    torch.manual_seed(0)

    def rest(net: Body, x: Tensor) -> Tensor:
        return net.second(net.conv2(net.first(x)))  # type: ignore[operator]

    net = Body(rest, first=Normed(6), conv2=nn.Conv2d(6, 6, 3), second=Normed(6))
    traced, images = trace_classifier(net.requires_grad_(False), SIZE), torch.randn(32, *SIZE)
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4, act_points="inputs")).net
    observe_ranges(student, images, act_range="mse")
    return traced, student, images


def test_a_plain_dictionary_of_weights_fits(parts: tuple[fx.GraphModule, fx.GraphModule, Tensor]) -> None:
    _, student, _ = parts
    student.load_state_dict(dict(student.state_dict()))  # without the versions that torch.save keeps


def test_they_are_corrected_equalized_and_exported_like_any_other(
    parts: tuple[fx.GraphModule, fx.GraphModule, Tensor],
) -> None:
    traced, student, images = parts

    def observe(net: fx.GraphModule) -> None:
        observe_ranges(net, images, act_range="mse")

    reference, report = equalize(student, traced, images, observe)
    assert report["pairs"], report
    corrected = correct_statistics(student, reference, images)
    assert corrected["batch_norms"] == 2
    with torch.no_grad():
        form, wanted = integer_form(student), student(images)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in form.modules()), "in the layers' gains"
        assert not any("running" in name for name in form.state_dict())
        torch.testing.assert_close(form(images), wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))


class Scaled(nn.Conv2d):
    """A functional convolution after a separate padding."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.static_padding(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=self.padding, groups=self.groups)


class Product(nn.Module):
    """A functional linear layer on the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (lambda: Scaled(6, 6, 3), nn.Conv2d),
        (lambda: Scaled(6, 6, 3, stride=2, groups=3, bias=False), nn.Conv2d),
        (Product, nn.Linear),
    ],
)
def test_a_product_as_a_function_is_a_layer_and_goes_all_the_way(made: Callable[[], nn.Module], kind: type) -> None:
    torch.manual_seed(0)
    net = Body(lambda net, x: F.relu(net.normed(net.part(x))), part=made(), normed=Normed(6))  # type: ignore[operator]
    traced, images = trace_classifier(net.requires_grad_(False), SIZE), torch.randn(16, *SIZE)
    assert type(traced.get_submodule("part")) is kind and torch.equal(traced(images), net(images))
    assert traced.state_dict().keys() == net.state_dict().keys()
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4, act_points="inputs"))
    observe_ranges(student.net, images, act_range="mse")
    assert [row.name for row in student.rows if row.role == "weight"] == ["conv", "part", "fc"]
    with torch.no_grad():
        torch.testing.assert_close(integer_form(student.net)(images), student.net(images), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("fixed", "'part.blur' is a constant"),
        ("twice", "'part.weight' is a parameter that is not the weight of one layer"),
        ("scaled", "'part.weight' is a parameter that is not the weight of one layer"),
    ],
)
def test_what_is_no_plain_product_stays_a_call_and_is_rejected(how: str, reason: str) -> None:
    def rest(net: Body, x: Tensor) -> Tensor:
        part: Any = net.part
        if how == "fixed":
            return F.conv2d(x, part.blur, groups=6)
        if how == "scaled":
            return part(x) * part.gain
        return F.conv2d(part(x), part.weight, part.bias, dilation=2)

    part = Scaled(6, 6, 3)
    if how in ("fixed", "scaled"):
        part.register_buffer("blur", torch.ones(6, 1, 3, 3))
        part.register_buffer("gain", torch.tensor(2.0))
    net = Body(rest, part=part)
    traced = trace_classifier(net.requires_grad_(False), SIZE)
    x = torch.randn(2, *SIZE)
    assert torch.equal(traced(x), net(x))
    with pytest.raises(
        ValueError, match=rf"node 'conv2d(_1)?' is conv2d: its weight (is )?{reason} and would stay float"
    ):
        quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4))


def test_a_product_of_weights_alone_is_no_layer() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.table = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x + F.linear(self.table, self.weight).sum(1).reshape(1, 6, 1, 1)

    net = Body(lambda net, x: net.part(x), part=Table())  # type: ignore[operator]
    traced, x = trace_classifier(net.requires_grad_(False), SIZE), torch.randn(3, *SIZE)
    assert torch.equal(traced(x), net(x)) and any(node.target is F.linear for node in traced.graph.nodes)
    assert [
        row.name for row in quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4)).rows if row.role == "weight"
    ] == [
        "conv",
        "fc",
    ]


def test_modules_below_a_layer_stay_only_where_they_are_called() -> None:
    class Spare(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(6, 6, 3)
            self.spare = nn.Linear(3, 3)

    net = Body(lambda net, x: net.part(x), part=Spare())  # type: ignore[operator]
    student = quantize_model(trace_classifier(net.requires_grad_(False), SIZE), QuantConfig(weight_bits=4, act_bits=4))
    assert not any("spare" in name for name in student.net.state_dict())
