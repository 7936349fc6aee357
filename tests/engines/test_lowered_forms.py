"""Forms of single operations in programs, and the reasons of networks without an integer form."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.placed_students import placed
from support.program_math import disagreements
from support.student_tools import trained
from synq.engines.lowering import lower
from synq.engines.program import AveragePool, Convolution, MaxPool, Pad, Program, Sum

SIZE = (3, 15, 18)
Forward = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    """A convolution, the operations of ``middle``, and a linear layer on the mean."""

    def __init__(self, middle: Forward, channels: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.norm, self.fc, self.middle = nn.BatchNorm2d(8), nn.Linear(channels, 4), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self, self.first(x)).mean((2, 3)))


def images() -> Tensor:
    return torch.randn(4, *SIZE, generator=torch.Generator().manual_seed(1))


def lowered(middle: Forward, channels: int = 8, target: str = "onnxruntime", **options: int) -> Program:
    """Return the program of a `Net`, which agrees with its student."""
    torch.manual_seed(0)
    net = placed(trained(Net(middle, channels)), SIZE, images(), target)
    program = lower(net, target, SIZE, **options)
    found = disagreements(net, program, images())
    assert found.pop(program.logits) < 1e-4
    assert max(found.values()) < 2e-3, found
    return program


def test_a_batch_norm_without_a_layer_is_a_depthwise_convolution() -> None:
    program = lowered(lambda net, x: F.relu(net.norm(F.max_pool2d(x, 2))), largest_code=64)
    step = next(step for step in program.layers() if step.layer == "norm")
    assert isinstance(step, Convolution) and step.groups == 8 and step.weight.shape == (8, 1, 1, 1)
    assert set(step.weight.flatten().tolist()) == {64}
    assert step.low == program.grids[step.output].zero_point


def test_clamps_are_limits_of_codes() -> None:
    program = lowered(lambda net, x: F.hardtanh(net.norm(net.second(x)), 0.0, 0.5) + F.relu6(3 * x[..., 1:-1, 1:-1]))
    step = next(step for step in program.layers() if step.layer == "second")
    grid = program.grids[step.output]
    assert (step.low, step.high) == (grid.zero_point, grid.zero_point + round(0.5 / grid.scale))


@pytest.mark.parametrize("swapped", [False, True])
def test_sums_keep_the_order_of_their_inputs(swapped: bool) -> None:
    def middle(net: nn.Module, x: Tensor) -> Tensor:
        y, x = net.second(x), F.relu(x[..., 1:-1, 1:-1])  # type: ignore[operator]
        return x + y if swapped else y + x

    for target, unrounded in (("onnxruntime", None), ("openvino", int(swapped))):
        program = lowered(middle, target=target)
        step = next(step for step in program.steps if isinstance(step, Sum))
        assert step.inputs[int(swapped)] == "second"
        assert step.unrounded == unrounded


def test_pools_have_the_padding_of_their_last_windows() -> None:
    def middle(net: nn.Module, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        return F.avg_pool2d(x, (3, 2), 2, ceil_mode=True)

    program = lowered(middle)
    pools = [step for step in program.steps if isinstance(step, MaxPool | AveragePool)]
    assert [step.padding for step in pools] == [(0, 0, 0, 1), (0, 0, 0, 1)]
    assert isinstance(pools[1], AveragePool) and not pools[1].count_padding


def test_padding_before_a_convolution_is_its_padding() -> None:
    program = lowered(lambda net, x: net.second(F.pad(x, (1, 0, 2, 1))))
    step = next(step for step in program.layers() if step.layer == "second")
    assert isinstance(step, Convolution) and step.padding == (2, 1, 1, 0)
    assert not [step for step in program.steps if isinstance(step, Pad)]


def test_an_index_of_all_images_of_the_batch_moves_nothing() -> None:
    chosen = lowered(lambda net, x: net.second(x[torch.arange(x.size(0))]))
    assert [type(step) for step in chosen.steps] == [type(step) for step in lowered(lambda net, x: net.second(x)).steps]


@pytest.mark.parametrize(
    ("after", "floats"),
    [
        (lambda x: x[:, 1:], True),
        (lambda x: x.view(-1, 4), True),
        (lambda x: x.flip(1), False),
        (lambda x: x.roll(1, 1), False),
    ],
)
def test_logits_are_moved_as_codes_where_the_move_joins_parts(after: Callable[[Tensor], Tensor], floats: bool) -> None:
    class Moved(Net):
        def forward(self, x: Tensor) -> Tensor:
            return after(super().forward(x))

    torch.manual_seed(0)
    net = placed(trained(Moved(lambda net, x: x)), SIZE, images())
    program = lower(net, "onnxruntime", SIZE)
    assert disagreements(net, program, images())[program.logits] < 1e-4
    assert ([*program.layers()][-1].output not in program.grids) is floats


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (lambda net, x: x.softmax(1), "none for _softmax in layer .*: the operator is unknown"),
        (lambda net, x: F.pad(x, (1, 1), value=1.0), "pad.*only zero is on every grid"),
        (lambda net, x: F.adaptive_avg_pool2d(x, 4), "windows differ in size: 15 x 18"),
        (lambda net, x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), "upsample_bilinear2d"),
        (lambda net, x: x.view(-1, 8, 30, 9) + x.flatten(1).sum(1)[:, None, None, None], "adds up positions"),
        (lambda net, x: x[torch.arange(x.size(0)).flip(0)], "index in layer .*: it moves the axis of the images"),
        (lambda net, x: x / (1 + x.abs()), "div in layer .*: it divides by an activation"),
    ],
)
def test_what_has_no_integer_form_is_rejected_in_one_line(middle: Forward, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        lowered(middle)
    text = str(error.value)
    assert "\n" not in text and "`quant.target` onnxruntime" in text and "research" in text


def test_an_unobserved_range_is_rejected() -> None:
    net = placed(trained(Net(lambda net, x: x)), SIZE, images())
    net.act_quantizers.get_submodule("x").has_range = False
    with pytest.raises(ValueError, match="act_quantizers\\.x has none: call observe_ranges first"):
        lower(net, "onnxruntime", SIZE)
