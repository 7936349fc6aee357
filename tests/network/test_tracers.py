"""Networks whose code reads the size of a feature: traced with real tensors, and only if symbolic tracing fails."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.config.run import QuantConfig, TeacherConfig
from synq.network.attention.locations import locate_attention
from synq.network.tracers import LayerTracer, SizedTracer
from synq.network.tracing import trace_classifier
from synq.quant.student import observe_ranges, quantize_model
from synq.teacher.teacher import load_teacher

SIZE = (3, 15, 12)


class SamePadded(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, which depends on the input size."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for size, kernel, stride in zip(x.shape[-2:], self.kernel_size, self.stride, strict=True):
            pads.append(max((math.ceil(size / stride) - 1) * stride + kernel - size, 0))
        if any(pads):
            down, right = pads
            x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Net(nn.Module):
    def __init__(self, rest: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.stem, self.bn = SamePadded(3, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.fc, self.rest = nn.Linear(6, 5), rest

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rest(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


def shuffled(x: Tensor) -> Tensor:
    count, channels, *area = x.size()
    assert x.dim() == x.ndim == 4 and x.size(-1) == area[-1]
    return x.view(count, 2, channels // 2, *area).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("rest", [lambda x: x, shuffled])
def test_sizes_are_numbers_and_the_number_of_images_stays_symbolic(rest: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = Net(rest).eval()
    with pytest.raises(Exception, match=r"control flow|Proxy object"):
        LayerTracer().trace(net)
    traced = trace_classifier(net, SIZE)
    assert type(traced.get_submodule("stem")) is nn.Conv2d, "the function is a layer again"
    for count in (1, 2, 7):
        x = torch.randn(count, *SIZE)
        assert torch.equal(traced(x), net(x))
    student = quantize_model(traced, QuantConfig(weight_bits=8, act_bits=8)).net
    x = torch.randn(16, *SIZE)
    observe_ranges(student, x, act_range="minmax")
    with torch.no_grad():
        torch.testing.assert_close(student(x), net(x), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "rest",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x if x.size(0) > 1 else -x,
        lambda x: x * float(x.mean()),
    ],
)
def test_dependence_on_values_or_on_the_number_of_images_is_rejected(rest: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"traceable by torch.fx"):
        trace_classifier(Net(rest).eval(), SIZE)


def test_a_graph_with_a_fixed_number_of_images_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "moved.py"
    path.write_text(
        "import torch\nfrom torch import nn\n"
        "class Moved(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)\n"
        "    def forward(self, x):\n        y = torch.relu(self.bn(self.conv(x))).flatten(2).permute(2, 0, 1)\n"
        "        length, count, channels = y.shape\n        if channels > 1:\n"
        "            y = y.reshape(length, count, channels)\n        y = y.mean(0)\n        return self.fc(y)\n"
    )
    facts = {"weights": "random", "input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match="must accept any batch size"):
        load_teacher(TeacherConfig(spec=f"{path}:Moved", **facts))  # type: ignore[arg-type]


def test_a_wrong_size_is_said_before_what_cannot_be_traced() -> None:
    with pytest.raises(ValueError, match=r"must accept images of size \(5, 15, 12\)"):
        trace_classifier(Net().eval(), (5, 15, 12))


def test_sizes_of_weights_are_numbers() -> None:
    class Grouped(SamePadded):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, [1, 1, 1, 1]), self.weight, self.bias, groups=self.weight.shape[0])

    net = Net()
    net.rest = Grouped(6, 6, 3, groups=6)
    traced = trace_classifier(net.eval(), SIZE)
    x = torch.randn(3, *SIZE)
    assert torch.equal(traced(x), net(x)) and type(traced.get_submodule("rest")) is nn.Conv2d


def test_modules_compute_as_ever_afterwards() -> None:
    before = nn.Module.__call__, nn.Module.__getattr__
    with pytest.raises(Exception, match="control flow"):
        SizedTracer(torch.zeros(2, *SIZE)).trace(Net(lambda x: x if x.sum() > 0 else -x))
    assert (nn.Module.__call__, nn.Module.__getattr__) == before


class Casting(nn.Module):
    """Cast to the dtype of a layer and refuse others, as networks of transformers do; branch on a size before."""

    def __init__(self, to: torch.dtype | None = None) -> None:
        super().__init__()
        self.conv, self.fc, self.dtype_of_feature = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), to

    def forward(self, x: Tensor) -> Tensor:
        like = self.conv.weight.dtype
        if x.device.type == "meta" or x.shape[2] != 8 or x.dtype != like or not x.dtype == self.conv.bias.dtype:
            raise ValueError("another size or dtype was expected")
        x = self.conv(x.to(self.conv.weight.dtype)).mean((2, 3))
        return self.fc(
            x.to(dtype=self.fc.weight.dtype) if self.dtype_of_feature is None else x.to(self.dtype_of_feature)
        )


def test_code_may_compare_dtypes_and_a_cast_to_the_own_one_is_no_operation() -> None:
    net = Casting().eval()
    traced = trace_classifier(net, (3, 8, 8))
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(traced(images), net(images))
    assert not [node for node in traced.graph.nodes if node.target in ("to", getattr)]
    wide = copy.deepcopy(traced).double()
    assert wide(images.double()).dtype == torch.float64


def test_a_cast_to_a_given_dtype_stays() -> None:
    traced = trace_classifier(Casting(torch.float32).eval(), (3, 8, 8))
    assert [node.args[1] for node in traced.graph.nodes if node.target == "to"] == [torch.float32]


@pytest.mark.parametrize(
    "scores",
    [
        lambda x, like: x.softmax(-1, dtype=torch.float32).to(like.dtype),
        lambda x, like: x.float().softmax(-1).to(dtype=like.dtype),
        lambda x, like: x.to(torch.float32).softmax(-1).type_as(like).to(like.dtype),
    ],
)
def test_a_cast_back_from_a_named_dtype_stays(scores: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] != 8:
                raise ValueError("another size was expected")
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            mixed = scores(tokens @ tokens.transpose(1, 2), tokens) @ tokens
            return self.fc(mixed.to(tokens.dtype).mean(1))

    net = Attention().eval()
    traced, images = trace_classifier(net, (3, 8, 8)), torch.randn(2, 3, 8, 8)
    assert torch.equal(traced(images), net(images))
    wide = copy.deepcopy(traced).double()
    assert torch.equal(wide(images.double()), net.double()(images.double()))
    assert len(locate_attention(traced)) == 1
