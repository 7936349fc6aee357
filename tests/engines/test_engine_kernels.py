"""Networks that an engine has no integer kernel for are rejected before anything is trained, by the layer's name."""

from collections.abc import Callable

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from support.student_tools import trained
from synq.config.quant import QuantConfig
from synq.engines.deployed import check_deployable
from synq.engines.kernels import EXECUTORCH_FUNCTIONS
from synq.export.mobile.quantized_module import FUNCTIONS
from synq.network.tracing import trace_classifier
from synq.quant.student import quantize_model

SIZE = (3, 12, 11)


class Net(nn.Module):
    """A convolution, an operation, and a linear layer on the mean."""

    def __init__(self, middle: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.mix, self.fc, self.middle = nn.Linear(8, 8), nn.Linear(8, 4), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.middle(self, F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def linear_on_map(net: Net, x: Tensor) -> Tensor:
    return net.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def dilated(net: Net, x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, 1, 0, 2)


def uncounted(net: Net, x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, 2, 1, count_include_pad=False)


def mish(net: Net, x: Tensor) -> Tensor:
    return F.mish(x)


@pytest.mark.parametrize(
    ("middle", "target", "message"),
    [
        (linear_on_map, "litert", "`mix` is a linear layer on 4 axes: reshape"),
        (dilated, "litert", "is a maximum pool with dilation"),
        (uncounted, "litert", r"is an average pool that leaves out the padding \(1, 1, .*: set count_include_pad=True"),
        (uncounted, "executorch", "is an average pool that leaves out its padding: set count_include_pad=True"),
        (mish, "executorch", "is the function mish: use one of affine, "),
    ],
)
def test_what_an_engine_has_no_kernel_for_is_named_early(
    middle: Callable[[Net, Tensor], Tensor], target: str, message: str
) -> None:
    traced = trace_classifier(trained(Net(middle)), SIZE)
    message = rf"`quant\.target` {target} must have an integer kernel for every operation, but .*{message}.*onnxruntime"
    quant = QuantConfig(target=target)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        check_deployable(quantize_model(traced, quant).net, quant, SIZE)
    other = QuantConfig(target="onnxruntime")
    check_deployable(quantize_model(traced, other).net, other, SIZE)


def test_the_rule_knows_the_functions_of_the_writer() -> None:
    assert set(FUNCTIONS) == EXECUTORCH_FUNCTIONS
