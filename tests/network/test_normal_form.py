"""Forward passes of every style: further arguments, calls by keyword, a single image, sizes, assignments."""

import copy
import types
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, arange, nn
from torch import zeros as imported_zeros

from support.forward_nets import CLASSES, SIZE, ByKeyword, Doubled, Plain, block
from synq.config.run import QuantConfig, ReconstructionConfig
from synq.network.blocks import block_ends, segment
from synq.network.tracing import trace_classifier
from synq.quant.adaround import reconstruct
from synq.quant.bn_correction import correct_statistics
from synq.quant.integer_form import integer_form
from synq.quant.layers import quantizers_bypassed
from synq.quant.student import observe_ranges, quantize_model
from synq.synthesis.swing import SwingConvolutions, reflect_shift


def forward(net: type[Plain], pass_: Callable[..., Any]) -> nn.Module:
    """Return a network of class `net` with another forward pass."""
    return type(net.__name__, (net,), {"forward": pass_})().eval()


def same(net: nn.Module, counts: tuple[int, ...] = (1, 2, 3)) -> torch.fx.GraphModule:
    """Trace a copy of a network, and compare graph and network bit for bit for several numbers of images."""
    net.eval()
    traced = trace_classifier(copy.deepcopy(net), SIZE)
    for count in counts:
        x = torch.randn(count, *SIZE)
        with torch.no_grad():
            assert torch.equal(traced(x.clone()), net(x.clone()))
    assert sum(node.op == "placeholder" for node in traced.graph.nodes) == 1
    return traced


def features_if_asked(self: Plain, x: Tensor, return_features: bool = False) -> Tensor:
    features = self.stem(x)
    return features if return_features else self.head(features)


def masked(self: Plain, x: Tensor, mask: Tensor | None = None) -> Tensor:
    features = self.stem(x)
    return self.head(features if mask is None else features * mask)


def with_number(self: Plain, x: Tensor, temperature: float = 2.0) -> Tensor:
    return self.head(self.stem(x)) / temperature


def keyword_only(self: Plain, x: Tensor, *, scale: float = 3.0, mode: str = "max") -> Tensor:
    x = self.stem(x)
    return self.fc(x.amax((2, 3)) if mode == "mean" else x.mean((2, 3))) * scale


def any_number(self: Plain, *inputs: Tensor, **options: Any) -> Tensor:
    return self.head(self.stem(inputs[0])) * options.get("scale", 2.0)


def tensor_default(self: Plain, x: Tensor, shift: Tensor = torch.arange(5.0)) -> Tensor:  # noqa: B008
    return self.head(self.stem(x)) + shift


def sizes_default(
    self: Plain, x: Tensor, size: tuple[int, int] = (1, 1), options: dict[str, int] | None = None
) -> Tensor:
    return self.fc(F.adaptive_avg_pool2d(self.stem(x), size).flatten((options or {"start": 1})["start"]))


@pytest.mark.parametrize(
    "pass_",
    [features_if_asked, masked, with_number, keyword_only, any_number, tensor_default, sizes_default],
)
def test_bugs_3_further_arguments_have_their_defaults(pass_: Callable[..., Any]) -> None:
    traced = same(forward(Plain, pass_))
    assert len(block_ends(traced)) == 2, "the stem and the logits"


def test_bugs_3_a_number_argument_passes_every_step_before_fine_tuning() -> None:
    traced = same(forward(Plain, with_number))
    images = torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(0))
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4, rounding="adaround"))
    observe_ranges(student.net, images, act_range="minmax")
    config = ReconstructionConfig(iterations=2, images=8, batch_size=4)
    report = reconstruct(student.net, traced, images, config, seed=0, device=torch.device("cpu"))
    assert [row.block for row in report.blocks] == ["stem_2", "truediv"]
    found = correct_statistics(student.net, traced, images)
    assert found["batch_norms"] == 1 and all(torch.isfinite(torch.tensor(cost)) for cost in found["kl"].values())


@pytest.mark.parametrize(
    ("pass_", "message"),
    [
        (lambda self, x, meta: x, "classify one image tensor, but its forward pass has 2 inputs: x, meta"),
        (lambda self, x, y, z, *, k: x, "has 4 inputs: x, y, z, k"),
        (lambda self, *, x: x, "first argument of its forward pass, but it takes only by keyword: x"),
        (lambda self: 1, "first argument of its forward pass, but it takes none"),
    ],
)
def test_f_6_other_numbers_of_inputs_are_named(pass_: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace_classifier(forward(Plain, pass_), SIZE)


def test_bugs_3_hooks_and_a_forward_pass_of_the_instance_are_part_of_the_graph() -> None:
    after, before, own = Plain(), Plain(), Plain()
    after.register_forward_hook(lambda module, args, out: 2 * out)
    before.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    own.forward = types.MethodType(with_number, own)  # type: ignore[method-assign]
    for net in (after, before, own):
        same(net)


def test_bugs_4_layers_called_by_keyword_everywhere() -> None:
    net = ByKeyword().eval()
    traced = same(net)
    assert not [node for node in traced.graph.nodes if node.op == "call_module" and node.kwargs]
    images = torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(0))
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4, rounding="adaround", act_points="inputs"))
    with quantizers_bypassed(student.net), torch.no_grad():
        assert torch.equal(student.net(images), net(images))
    observe_ranges(student.net, images, act_range="minmax")
    config = ReconstructionConfig(iterations=2, images=8, batch_size=4)
    assert reconstruct(student.net, traced, images, config, seed=0, device=torch.device("cpu")).blocks
    with torch.no_grad():
        torch.testing.assert_close(integer_form(student.net)(images), student.net(images), rtol=1e-3, atol=1e-3)


def test_bugs_4_our_layers_take_the_name_of_pytorchs_argument() -> None:
    traced = same(Plain())
    images = torch.randn(4, *SIZE)
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4))
    observe_ranges(student.net, images, act_range="minmax")
    for net, inputs in ((student.net, images), (integer_form(student.net), images)):
        layer = net.get_submodule("stem.0")
        with torch.no_grad():
            assert torch.equal(layer(input=inputs), layer(inputs))


def test_bugs_4_a_swing_convolution_called_by_keyword_is_shifted() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(input=x)

    net, x = Keyword(), torch.randn(2, *SIZE)
    with torch.no_grad(), SwingConvolutions(net, [[(1, -1)]]) as swing:
        swing.set_step(0)
        shifted = net(x)
    assert torch.equal(shifted, net.conv(reflect_shift(x, (1, -1))))
    assert not torch.equal(shifted, net(x))


def doubled(x: Tensor) -> Tensor:
    return torch.relu(x) * 2.0


def squeezed(head: Callable[[Plain, Tensor], Tensor]) -> nn.Module:
    return type("Squeezed", (Plain,), {"head": head})().eval()


@pytest.mark.parametrize(
    "head",
    [
        lambda net, x: net.fc(F.adaptive_avg_pool2d(x, 1).squeeze()),
        lambda net, x: net.fc(torch.squeeze(F.adaptive_avg_pool2d(x, 1))),
        lambda net, x: net.fc(torch.squeeze(input=F.adaptive_avg_pool2d(x, 1))),
        lambda net, x: net.fc(F.adaptive_avg_pool2d(x, 1).squeeze_()),
        lambda net, x: net.fc(F.adaptive_avg_pool2d(x, 1).squeeze((0, 2, 3))),
        lambda net, x: net.fc(x.mean((2, 3)).squeeze(0)),
        lambda net, x: net.fc(x.mean((2, 3))).squeeze(dim=0),
        lambda net, x: net.fc(F.adaptive_avg_pool2d(x, 1).squeeze().squeeze()),
    ],
)
def test_bugs_5_a_single_image_keeps_its_axis(head: Callable[[Plain, Tensor], Tensor]) -> None:
    net = squeezed(head)
    traced = same(net, (2, 3))
    x = torch.randn(3, *SIZE)
    with torch.no_grad():
        single = traced(x[:1])
        assert single.shape == (1, CLASSES)
        torch.testing.assert_close(single, net(x)[:1])


def test_bugs_5_a_squeeze_that_serves_a_single_image_is_left_as_it_is() -> None:
    traced = same(squeezed(lambda net, x: net.fc(F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2))))
    calls = [node.args[1:] for node in traced.graph.nodes if node.target == "squeeze"]
    assert calls == [(3,), (2,)]


def _ones_and_full(net: Plain, x: Tensor) -> Tensor:
    return x * torch.ones(x.shape[0], 1, 1, 1) + torch.full((x.size(0), net.channels, 1, 1), 0.5)


def _positions(net: Plain, x: Tensor) -> Tensor:
    return x + torch.linspace(0, 1, x.size(3)) + arange(x.size(2)).view(-1, 1) * 0.1


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"zeros": lambda net, x: imported_zeros((x.size(0), net.channels, *x.shape[2:]))},
        {"zeros": lambda net, x: torch.zeros(len(x), net.channels, x.size(2), x.size(3))},
        {"zeros": lambda net, x: torch.zeros([x.shape[0], net.channels, 1, 1]).expand(-1, -1, x.size(2), x.size(3))},
        {"head": lambda net, x: net.fc(F.adaptive_avg_pool2d(x, 1).view(len(x), -1))},
        {"head": lambda net, x: net.fc(x.mean((2, 3))) if len(x.shape) == 4 else x},
        {"mid": lambda net, x: net.wide(_ones_and_full(net, x))},
        {"mid": lambda net, x: net.wide(_positions(net, x))},
    ],
)
def test_bugs_9_sizes_given_to_functions_that_make_tensors(parts: dict[str, Any]) -> None:
    traced = same(type("Sizes", (Doubled,), parts)().eval())
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4)).net
    observe_ranges(student, torch.randn(4, *SIZE), act_range="minmax")
    assert student(torch.randn(3, *SIZE)).shape == (3, CLASSES)
    names = vars(torch)["zeros"], "len" in globals()
    assert names == (imported_zeros, False), "what the code calls is put back"


def _assigned(net: Plain, x: Tensor) -> Tensor:
    y = x * 1.0
    y[:, 0] = 0
    y[:, 1:3] = x[:, 3:5]
    return y


def _padded(net: Doubled, x: Tensor) -> Tensor:
    out = torch.zeros(x.size(0), 2 * net.channels, x.size(2), x.size(3))
    out[:, net.channels :] = x
    return net.wide(x) + out


@pytest.mark.parametrize(("base", "mid"), [(Plain, _assigned), (Doubled, _padded)])
def test_bugs_9_an_assignment_to_a_part_works(base: type[Plain], mid: Callable[..., Tensor]) -> None:
    traced = same(type("Assigned", (base,), {"mid": mid})().eval())
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4)).net
    observe_ranges(student, torch.randn(4, *SIZE), act_range="minmax")
    form, x = integer_form(student), torch.randn(3, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(form(x), student(x), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_bugs_9_functions_of_torchscript_are_traced_as_they_were_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "doubled", torch.jit.script(doubled))
    same(type("Scripted", (Plain,), {"mid": lambda net, x: doubled(x)})().eval())
    assert isinstance(doubled, torch.jit.ScriptFunction)


@pytest.mark.parametrize(
    ("mid", "advice"),
    [
        (lambda net, x: x.view(int(x.shape[0]), -1, 8, 8), r"line \d+.*without int\(\), float\(\)"),
        (lambda net, x: torch.stack([x[i] for i in range(x.size(0))]), r"without int\(\), float\(\), range\(\)"),
        (lambda net, x: torch.stack([image * 1.0 for image in x]), r"cannot be iterated \(test_.*Write a loop over"),
        (lambda net, x: x * torch.from_numpy(x.detach().numpy()), r"torch instead of numpy"),
        (lambda net, x: x if x.mean() > 0 else -x, r"Remove control flow that depends on tensor values"),
    ],
)
def test_bugs_9_what_cannot_be_traced_is_named_with_its_line(mid: Callable[..., Tensor], advice: str) -> None:
    with pytest.raises(ValueError, match=advice) as caught:
        trace_classifier(type("Odd", (Plain,), {"mid": mid})().eval(), SIZE)
    assert "\n" not in str(caught.value)


class SizesReadEarly(Plain):
    """Numbers of the image and of an early feature are used after later layers."""

    def build(self, channels: int) -> None:
        self.a, self.b = block(channels, channels), block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        count, _, height, width = x.shape
        first = x.size(0)
        x = self.stem(x)
        sizes = x.shape
        y = self.b(self.a(x)).reshape(sizes[0], sizes[1], -1).view(count, self.channels, height // 2, -1)
        return self.fc(F.adaptive_avg_pool2d(y, 1).view(first, -1)) * (width / 32)


def test_bugs_3_a_size_read_early_joins_no_blocks() -> None:
    traced = same(SizesReadEarly())
    ends = block_ends(traced)
    assert [end.name for end in ends] == ["stem_2", "a_2", "b_2", "mul"]
    x = torch.randn(3, *SIZE)
    value, start = x, next(iter(traced.graph.nodes))
    with torch.no_grad():
        for end in ends:
            value, start = segment(traced, start, end)(value), end
        assert torch.equal(value, traced(x))


class ViewOfALayout(nn.Module):
    """A view that takes the memory layout of a linear layer over channels, and of no quantizer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn, self.fc = nn.Linear(3, 4), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.lin(x.transpose(1, 3)).transpose(1, 3))
        return self.fc(x.view(x.size(0), x.size(1), -1).mean(2))


@pytest.mark.parametrize("points", ["relu", "inputs"])
def test_a_view_does_not_depend_on_the_layout_that_quantizers_leave(points: Literal["relu", "inputs"]) -> None:
    traced = same(ViewOfALayout())
    student = quantize_model(traced, QuantConfig(act_points=points))
    observe_ranges(student.net, torch.randn(8, *SIZE), act_range="minmax")
    form = integer_form(student.net)
    images = torch.randn(3, *SIZE).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert student.net(images).shape == form(images).shape == (3, 5)
