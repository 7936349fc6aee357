"""Convolutions as integer matrix products have the student's logits, for all strides, paddings and zero points."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.integer_students import images
from support.small_nets import Residual, depthwise, plain

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from support.onnx_graphs import graph_of  # noqa: E402
from synq.export.integer_matmul import MIN_CHANNELS  # noqa: E402
from synq.export.kernels import count_kernels  # noqa: E402
from synq.export.onnx_graph import write_container  # noqa: E402
from synq.export.verify import engine_of, open_session  # noqa: E402


def written(make: Callable[[], nn.Module], bits: int, act_points: str) -> tuple[bytes, bytes, nn.Module]:
    """The student's network as products and as convolutions, and its integer form."""
    torch.manual_seed(1)  # not what earlier tests have left
    form, graph = graph_of(make, bits, act_points)  # type: ignore[arg-type]
    return write_container(graph, "matmul"), write_container(graph, "int8"), form


def kinds(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


class SideBySide(nn.Module):
    """Convolutions of the same negative and positive activations, each with separate logits; one graph is exported
    faster.
    """

    def __init__(self, *settings: dict[str, Any], channels: int = MIN_CHANNELS) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, 6, **setting) for setting in settings)
        self.heads = nn.ModuleList(nn.Linear(6, 5) for _ in settings)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        read = zip(self.convolutions, self.heads, strict=True)
        return torch.cat([head(torch.relu(conv(x)).mean((2, 3))) for conv, head in read], 1)


SHAPES: tuple[dict[str, Any], ...] = (
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": (3, 5), "padding": (2, 1), "stride": (1, 3), "bias": False},
    {"kernel_size": 3, "dilation": 2, "padding": 2},
)


@pytest.mark.parametrize("bits", [3, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (7, 8))])
def test_every_shape_of_convolution_is_the_same_function(bits: int) -> None:
    products, plain_model, form = written(partial(SideBySide, *SHAPES), bits, "inputs")
    assert kinds(products).count("MatMulInteger") == len(SHAPES) and kinds(products).count("Conv") == 1
    sample = 2 * images(9)
    found, wanted = (engine_of(open_session(model))(sample) for model in (products, plain_model))
    for setting, *logits in zip(SHAPES, *(x.split(5, 1) for x in (found, wanted, form(sample))), strict=True):
        assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2]), setting
        assert len(logits[0].unique(dim=0)) > 1, "its logits differ between images"


@pytest.mark.parametrize(
    ("make", "act_points"),
    [
        (Residual, "inputs"),
        pytest.param(depthwise, "relu", marks=pytest.mark.slow),
        pytest.param(Residual, "relu", marks=pytest.mark.slow),
        pytest.param(plain, "inputs", marks=pytest.mark.slow),
        pytest.param(depthwise, "inputs", marks=pytest.mark.slow),
    ],
)
def test_what_is_not_rewritten_stays_and_the_rest_runs_in_integers(make: type[nn.Module], act_points: str) -> None:
    products, plain_model, _ = written(make, 8, act_points)
    before, after = kinds(plain_model), kinds(products)
    assert after.count("Conv") + after.count("MatMulInteger") == before.count("Conv")
    convolutions = [node for node in onnx.load_from_string(products).graph.node if node.op_type == "Conv"]
    read = [node for node in onnx.load_from_string(products).graph.node if node.op_type == "DequantizeLinear"]
    weights = {node.output[0]: node.input[0] for node in read}
    shapes = {tensor.name: tensor.dims for tensor in onnx.load_from_string(products).graph.initializer}
    for node in convolutions:
        groups = next((entry.i for entry in node.attribute if entry.name == "group"), 1)
        assert groups > 1 or shapes[weights[node.input[1]]][1] < MIN_CHANNELS or node.input[0] not in weights
    assert count_kernels(products)[0] >= after.count("MatMulInteger") > 0
    sample = images(20)
    found, wanted = (engine_of(open_session(model))(sample) for model in (products, plain_model))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std()))


def test_a_file_of_products_holds_every_weight_once() -> None:
    products, plain_model, _ = written(partial(SideBySide, SHAPES[1], channels=64), 4, "inputs")
    graph = onnx.load_from_string(products).graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert {tensor.name for tensor in graph.initializer} <= read
    assert all(read.intersection(node.output) for node in graph.node), "nothing is computed for nobody"
    assert len(products) < len(plain_model) + 3000, "6 x 64 x 9 codes, once"
