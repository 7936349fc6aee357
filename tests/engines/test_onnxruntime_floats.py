"""LayerNorm, softmax, matrix products and means are those of ONNX Runtime, in every bit."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from synq.engines import onnxruntime_floats as floats
from synq.engines.onnxruntime_arithmetic import exact_product
from synq.engines.program import Grid


def in_engine(kind: str, *inputs: Tensor, **attributes: Any) -> Tensor:
    """Run one operation in ONNX Runtime; the inputs after the first are constants."""
    names = ["a", "b", "c"][: len(inputs)]
    infos = [helper.make_tensor_value_info("a", TensorProto.FLOAT, inputs[0].shape)]
    constants = [numpy_helper.from_array(x.numpy(), name) for name, x in zip(names[1:], inputs[1:], strict=True)]
    node = helper.make_node(kind, names, ["y"], **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", infos, [output], initializer=constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"a": inputs[0].numpy()})[0])


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


@pytest.mark.parametrize("count", [8, 9, 12, 15, 24, 33, 44, 50, 96, 100, 192, 384, 768, 1023])
def test_layer_norm_is_that_of_the_engine(count: int) -> None:
    x, weight, bias = normal(3, 70, count, scale=2.0) + 0.5, normal(count), normal(count, scale=0.3)
    for eps in (1e-5, 1e-6):
        expected = in_engine("LayerNormalization", x, weight, bias, axis=-1, epsilon=eps)
        assert torch.equal(floats.layer_norm(x, weight, bias, eps), expected)
        assert count < 50 or not torch.equal(F.layer_norm(x, (count,), weight, bias, eps), expected)


@pytest.mark.parametrize("count", [1, 7, 16, 17, 49, 64, 65, 197, 257])
@pytest.mark.parametrize("scale", [0.3, 3.0, 60.0])
def test_softmax_is_that_of_the_engine(count: int, scale: float) -> None:
    x = normal(2, 3, 70, count, scale=scale)
    expected = in_engine("Softmax", x, axis=-1)
    assert torch.equal(floats.softmax(x, avx512=floats.has_avx512()), expected)
    assert count < 50 or not torch.equal(x.softmax(-1), expected)


def test_the_instruction_set_decides_how_a_softmax_is_summed() -> None:
    x = normal(2, 3, 70, 197, scale=3.0)
    first, second = (floats.softmax(x, avx512=wide) for wide in (True, False))
    assert not torch.equal(first, second)
    assert torch.allclose(first, second, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [(197, 64, 197), (17, 197, 64), (50, 300, 32), (50, 300, 300), (65, 257, 32), (50, 700, 129), (2, 600, 8)],
)
def test_matrix_products_of_floats_are_those_of_the_engine(rows: int, depth: int, columns: int) -> None:
    a, b = normal(3, rows, depth), normal(3, depth, columns)
    assert torch.equal(floats.matrix_product(a, b), in_engine("MatMul", a, b))


@pytest.mark.parametrize(("tokens", "channels"), [(197, 192), (49, 768), (10, 33), (1, 8), (3136, 2)])
def test_means_are_those_of_the_engine(tokens: int, channels: int) -> None:
    x = normal(4, tokens, channels)
    weights = floats.mean_weights(tokens).expand(4, -1, -1).contiguous()
    assert torch.equal(floats.mean(x), in_engine("MatMul", weights, x)[:, 0])
    assert torch.allclose(floats.mean(x), x.mean(1), rtol=1e-4, atol=1e-6)


def test_products_of_codes_are_exact() -> None:
    for depth in (64, 700):  # within and beyond what float32 holds
        codes = torch.full((2, depth), 255.0)
        codes[1] = torch.arange(float(depth)) % 251
        grid = Grid(scale=1.0, zero_point=0, quant_max=255)
        expected = codes.long() @ codes.long().T
        assert torch.equal(exact_product(codes, codes.T, (grid, grid)).long(), expected)
        assert np.all(expected.numpy() > 0)
