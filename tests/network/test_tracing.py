"""Tracing of a classifier, and the location of its class activation map."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from synq.network.cam_site import locate_cam
from synq.network.gradcam import autograd_weights, cam_map, closed_form_weights
from synq.network.tracing import FeatureTap, batchnorm_parameters, trace_classifier, with_features

SIZE = (3, 16, 16)


class Functional(nn.Module):
    """Activations as functions, methods and in-place operators; the shortcut reads an overwritten tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        y = x.relu_()
        z = self.conv2(y)
        z += x  # x was overwritten: this adds the rectified tensor
        return self.fc(F.relu(z).mean((2, 3)))


class Head(nn.Module):
    """A backbone with the given head."""

    def __init__(self, head: nn.Module, channels: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.conv(x))))


class Pooled(nn.Module):
    """A head whose pool is written as a function."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool, self.fc = pool, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x))


def heads() -> dict[str, tuple[nn.Module, str, int]]:
    """Head by name, with the expected kind and number of cells."""
    flat = nn.Flatten
    return {
        "global pool": (nn.Sequential(nn.AdaptiveAvgPool2d(1), flat(), nn.Linear(6, 5)), "closed_form", 1),
        "2x2 pool": (nn.Sequential(nn.AvgPool2d(4), flat(), nn.Dropout(0.5), nn.Linear(24, 5)), "closed_form", 4),
        "no pool": (nn.Sequential(flat(), nn.Linear(6 * 64, 5)), "closed_form", 64),
        "1x1 conv classifier": (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 5, 1), flat()),
            "closed_form",
            1,
        ),
        "hidden layer": (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), flat(), nn.Linear(6, 7), nn.Hardswish(), nn.Linear(7, 5)),
            "autograd",
            1,
        ),
        "linear after linear": (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), flat(), nn.Linear(6, 7), nn.Linear(7, 5)),
            "autograd",
            1,
        ),
        "max pool": (nn.Sequential(nn.AdaptiveMaxPool2d(1), flat(), nn.Linear(6, 5)), "autograd", 1),
        "mean of mean": (Pooled(lambda x: x.mean(3).mean(2)), "closed_form", 1),
        "mean of a view": (Pooled(lambda x: x.view(x.size(0), x.size(1), -1).mean(2)), "closed_form", 1),
        "mean of pixels in a row": (Pooled(lambda x: x.flatten(2).mean(-1)), "closed_form", 1),
        "pool of pixels in a row": (
            Pooled(lambda x: F.adaptive_avg_pool1d(x.flatten(2), 1).flatten(1)),
            "closed_form",
            1,
        ),
    }


def test_traced_graph_computes_the_same_and_shares_parameters() -> None:
    net = Functional().eval()
    traced = trace_classifier(net, SIZE)
    x = torch.randn(3, *SIZE)
    with torch.no_grad():
        assert torch.equal(traced(x), net(x.clone()))
    assert traced.get_parameter("conv1.weight") is net.conv1.weight


def test_no_in_place_operation_is_left_and_later_readers_see_the_result() -> None:
    traced = trace_classifier(Functional(), SIZE)
    names = [str(node.target) for node in traced.graph.nodes]
    assert not [name for name in names if name.endswith("_") and not name.endswith("__")]
    relu = next(node for node in traced.graph.nodes if node.target == "relu")
    total = next(node for node in traced.graph.nodes if getattr(node.target, "__name__", "") == "add")
    assert relu in total.all_input_nodes, "the residual must read the rectified tensor"


@pytest.mark.parametrize("name", list(heads()))
def test_cam_location_by_structure(name: str) -> None:
    head, kind, cells = heads()[name]
    torch.manual_seed(0)
    traced = trace_classifier(Head(head), SIZE)
    location = locate_cam(traced)
    assert (location.kind, location.node) == (kind, "relu")
    assert (location.channels, location.height, location.width) == (6, 8, 8)
    if kind == "closed_form":
        assert location.cells == cells


@pytest.mark.parametrize("name", ["global pool", "2x2 pool", "no pool", "1x1 conv classifier"])
def test_closed_form_equals_autograd_grad_cam(name: str) -> None:
    torch.manual_seed(1)
    net = Head(heads()[name][0]).double()
    traced = trace_classifier(net, SIZE)
    location = locate_cam(traced)
    tapped = with_features(traced, location.node)
    x, labels = torch.randn(4, *SIZE, dtype=torch.float64), torch.tensor([0, 3, 1, 4])
    logits, features = tapped(x)
    slow = cam_map(features, autograd_weights(logits, features, labels, retain_graph=False))
    weight = traced.get_submodule(location.linear).weight.flatten(1)
    fast = cam_map(features, closed_form_weights(weight, labels, location.channels, location.cells, 64))
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    assert slow.max() > 0


def test_last_convolution_that_is_the_classifier_is_not_the_cam_location() -> None:
    """Trap: "the last conv" of MobileNetV2 is its 1x1 classifier."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 5, 1), nn.Flatten())
    location = locate_cam(trace_classifier(Head(head), SIZE))
    assert location.node == "relu" and location.height * location.width == 64


def test_no_spatial_feature_means_no_cam() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 16 * 16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1))

    location = locate_cam(trace_classifier(Vector(), SIZE))
    assert location.kind == "none" and "no spatial feature" in location.reason


def test_override_names_another_layer_and_is_checked() -> None:
    traced = trace_classifier(Head(heads()["global pool"][0]), SIZE)
    location = locate_cam(traced, "conv")
    assert (location.node, location.kind) == ("conv", "autograd")
    with pytest.raises(ValueError, match=r"teacher.cam_layer must name a node .* got 'layer9'"):
        locate_cam(traced, "layer9")


def test_with_features_gives_both_outputs_without_hooks() -> None:
    traced = trace_classifier(Head(heads()["global pool"][0]), SIZE)
    tapped = with_features(traced, "relu")
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        logits, features = tapped(x)
        assert torch.equal(logits, traced(x))
    assert features.shape == (2, 6, 8, 8)
    assert not [m for m in tapped.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert {id(p) for p in tapped.parameters()} == {id(p) for p in traced.parameters()}


def test_feature_tap_opens_a_graph_only_where_none_is() -> None:
    tap = FeatureTap()
    frozen = torch.ones(1, 2, 2, 2)
    assert tap(frozen).requires_grad
    with torch.no_grad():
        assert not tap(frozen).requires_grad
    live = torch.ones(1, 2, 2, 2, requires_grad=True) * 2
    assert tap(live) is live


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: x.mean() if x.sum() > 0 else x, "traceable by torch.fx"),
        (
            lambda self, x: {"logits": x.flatten(1)},
            "one .N, classes. tensor of logits, but Odd returned a dict; .*: logits",
        ),
        (lambda self, x: x, "tensor of logits"),
        (lambda self, x: x @ torch.ones(3, 3), "failed on them"),
    ],
)
def test_rejections_name_the_cause(forward: object, message: str) -> None:
    odd = type("Odd", (nn.Module,), {"forward": forward})()
    with pytest.raises(ValueError, match=message):
        trace_classifier(odd, SIZE)


class Body(nn.Module):
    """Convolution and BatchNorm, then `rest`, a mean and a classifier; `extra` are more modules."""

    def __init__(self, rest: Callable[["Body", Tensor], Tensor], **extra: nn.Module) -> None:
        super().__init__()
        self.rest = rest
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)
        for name, module in extra.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rest(self, self.bn(self.conv(x))).mean((2, 3)))


def _ignores_result_twice(net: Body, x: Tensor) -> Tensor:
    net.act(x)  # type: ignore[operator]
    y = net.conv2(x)  # type: ignore[operator]
    net.act(y)  # type: ignore[operator]
    return x + y


@pytest.mark.parametrize(
    "rest",
    [
        _ignores_result_twice,
        lambda net, x: net.act(input=x) + x,
        lambda net, x: F.leaky_relu_(x, 0.2) + x,
        lambda net, x: F.relu(input=x, inplace=True) + x,
    ],
    ids=["shared module", "keyword", "function", "function by keyword"],
)
def test_readers_of_an_overwritten_tensor_see_the_result(rest: Callable[[Body, Tensor], Tensor]) -> None:
    net = Body(rest, act=nn.ReLU(inplace=True), conv2=nn.Conv2d(6, 6, 1)).eval()
    x = torch.randn(3, *SIZE)
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(trace_classifier(copy.deepcopy(net), SIZE)(x), expected)


def test_what_the_logits_do_not_read_is_left_out() -> None:
    class Aux(Body):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.aux(x.flatten(1))  # type: ignore[operator]
            return y

    traced = trace_classifier(Aux(lambda net, x: x.relu_(), aux=nn.Linear(3 * 256, 2)), SIZE)
    assert {name.partition(".")[0] for name, _ in traced.named_parameters()} == {"conv", "bn", "fc"}
    assert not [node for node in traced.graph.nodes if str(node.target) == "aux"]


def test_hooks_on_layers_are_rejected_by_name() -> None:
    net = Body(lambda net, x: x)
    net.conv.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match=r"layer 'conv' \(Conv2d\) carries a forward hook"):
        trace_classifier(net, SIZE)


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)
def test_computed_weights_are_rejected_by_name(wrap: Callable[[nn.Module], nn.Module]) -> None:
    net = Body(lambda net, x: x)
    net.fc = wrap(net.fc)
    with pytest.raises(ValueError, match=r"the weight of layer 'fc' is computed .* remove the parametrization first"):
        trace_classifier(net, SIZE)


def test_override_off_the_path_to_the_logits_is_rejected() -> None:
    def with_side(net: Body, x: Tensor) -> Tensor:
        torch._assert(net.side(x).sum() > -1e9, "kept by an assertion only")  # type: ignore[operator]
        return x.relu()

    traced = trace_classifier(Body(with_side, side=nn.Conv2d(6, 4, 1)), SIZE)
    assert [node for node in traced.graph.nodes if str(node.target) == "side"], "the case needs a node off the way"
    with pytest.raises(ValueError, match=r"on the way to the logits, but got 'side' \(the last: .*relu\)"):
        locate_cam(traced, "side")
    assert locate_cam(traced, "conv").node == "conv"


def test_batchnorm_parameters_of_layers_and_of_calls() -> None:
    normed = nn.BatchNorm2d(6)

    def flat(net: Body, x: Tensor) -> Tensor:
        y = F.batch_norm(x.flatten(2), normed.running_mean, normed.running_var, normed.weight, bias=normed.bias)
        return y.reshape(x.shape)

    net = Body(flat, normed=normed)
    traced = trace_classifier(net, SIZE)
    assert not isinstance(getattr(traced, "normed", None), nn.BatchNorm2d), "the case needs a norm that is no layer"
    found = batchnorm_parameters(traced)
    expected = [net.bn.weight, net.bn.bias, *normed.parameters()]  # type: ignore[union-attr]
    assert len(found) == 4 and {id(p) for p in found} == {id(p) for p in expected}


@pytest.mark.parametrize("value", [False, True])
def test_an_assertion_about_a_shape_reads_nothing(value: bool) -> None:
    """It would count as a second reader of its tensor, and no layer could be folded into the one before it."""

    def asserted(net: Body, x: Tensor) -> Tensor:
        torch._assert(x.sum() > -1e9 if value else x.ndim == 4, "kept where it looks at values")  # type: ignore[no-untyped-call]
        return x.relu()

    traced = trace_classifier(Body(asserted), SIZE)
    (norm,) = (node for node in traced.graph.nodes if str(node.target) == "bn")
    assert len(norm.users) == (2 if value else 1)
