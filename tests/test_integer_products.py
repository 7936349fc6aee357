"""Convolutions written as products of integer matrices answer as the student does, whatever their strides, paddings and zero points."""

import pytest
import torch
from small_nets import SIZE, Residual, depthwise, plain
from test_integer_form import images, student
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from synq.integer_form import integer_form  # noqa: E402
from synq.integer_products import MIN_CHANNELS  # noqa: E402
from synq.onnx_file import write_onnx  # noqa: E402
from synq.verification import count_kernels, engine_of, open_session  # noqa: E402


def written(net: nn.Module, bits: int, act_points: str) -> tuple[bytes, bytes, nn.Module]:
    """The student's network as products and as convolutions, and its integer form."""
    made = student(net, bits, act_points)  # type: ignore[arg-type]
    form = integer_form(made.net, operations="onnx")
    return write_onnx(form, SIZE, "matmul"), write_onnx(form, SIZE, "int8"), integer_form(made.net)


def kinds(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


def one(channels: int = MIN_CHANNELS, **settings: object) -> nn.Module:
    """One convolution, of negative and positive activations, between two others."""
    conv = nn.Conv2d(channels, 6, **settings)  # type: ignore[arg-type]
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)
    )


@pytest.mark.parametrize("bits", [3, 7, 8])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (3, 5), "padding": (2, 1), "stride": (1, 3), "bias": False},
        {"kernel_size": 3, "dilation": 2, "padding": 2},
    ],
    ids=str,
)
def test_every_shape_of_convolution_is_the_same_function(settings: dict[str, object], bits: int) -> None:
    products, plain_model, form = written(one(**settings), bits, "inputs")
    assert kinds(products).count("MatMulInteger") == 1 and kinds(products).count("Conv") == 1
    sample = 2 * images(9)
    found, wanted = (engine_of(open_session(model))(sample) for model in (products, plain_model))
    assert torch.equal(found, wanted) and torch.equal(found, form(sample))


@pytest.mark.parametrize(
    ("make", "act_points"),
    [(Residual, "relu"), (Residual, "inputs"), (plain, "inputs"), (depthwise, "relu"), (depthwise, "inputs")],
)
def test_what_is_not_rewritten_stays_and_the_rest_runs_in_integers(make: type[nn.Module], act_points: str) -> None:
    products, plain_model, _ = written(make(), 8, act_points)
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
    products, plain_model, _ = written(one(64, kernel_size=3, padding=1), 4, "inputs")
    graph = onnx.load_from_string(products).graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert {tensor.name for tensor in graph.initializer} <= read
    assert all(read.intersection(node.output) for node in graph.node), "nothing is computed for nobody"
    assert len(products) < len(plain_model) + 3000, "6 x 64 x 9 codes, once"
