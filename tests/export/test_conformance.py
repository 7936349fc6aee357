"""The published rules of TensorRT and QNN: a file that keeps all has no violation, a broken rule is named."""

from collections.abc import Callable

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from support.program_builder import ProgramBuilder  # noqa: E402
from synq.engines.program import Grid  # noqa: E402
from synq.export.conformance import Engine, violations  # noqa: E402
from synq.export.standard_onnx import standard_onnx  # noqa: E402


def _standard(zero_point: int | None = None, act_bits: int = 8) -> onnx.ModelProto:
    """A residual network whose logits are quantized, too; all grids with one zero point, or any."""
    builder = ProgramBuilder((3, 8, 8), 0, weight_bits=8, act_bits=act_bits)
    full = {"low": 0, "high": 2**act_bits - 1}
    first = builder.convolution(builder.quantize(), 6, **full)
    value = builder.sum(builder.convolution(first, 6, **full), first, **full)
    logits = builder.dense(builder.flatten(builder.max_pool(value)), 4)
    if zero_point is not None:
        for name, grid in builder.grids.items():
            builder.grids[name] = Grid(scale=grid.scale, zero_point=zero_point, quant_max=grid.quant_max)
    steps = {step.output: step for step in builder.steps}
    object.__setattr__(steps[logits], "low", 0)
    object.__setattr__(steps[logits], "high", 2**act_bits - 1)
    return standard_onnx(builder.build(builder.dequantize(logits)))


def _replace(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    next(tensor for tensor in model.graph.initializer if tensor.name == name).CopyFrom(
        numpy_helper.from_array(value, name)
    )


def _qnn() -> onnx.ModelProto:
    model = _standard()
    for end in (model.graph.input[0], model.graph.output[0]):
        end.type.tensor_type.shape.dim[0].dim_value = 1
    return model


def _tensorrt() -> onnx.ModelProto:
    """The same codes minus 128, and float biases."""
    model = _standard(zero_point=128)
    for tensor in list(model.graph.initializer):
        if tensor.data_type == TensorProto.UINT8:
            _replace(model, tensor.name, np.int8(0))
    for node in list(model.graph.node):
        if node.name.endswith(".bias.dequantize"):
            codes, scale = (
                numpy_helper.to_array(tensor)
                for name in node.input[:2]
                for tensor in model.graph.initializer
                if tensor.name == name
            )
            model.graph.initializer.append(numpy_helper.from_array(codes * scale, node.output[0]))
            model.graph.node.remove(node)
    return model


def test_files_that_keep_every_rule_have_no_violation() -> None:
    assert violations(_qnn(), "qnn") == []
    assert violations(_tensorrt(), "tensorrt") == []


def test_what_a_standard_file_lacks() -> None:
    """UINT8, zero points and INT32 biases for TensorRT; a static batch for QNN."""
    model = _standard()
    assert violations(model, "qnn") == [
        "images: shapes must be static, but got the axis N: fix the batch",
        "logits: shapes must be static, but got the axis N: fix the batch",
    ]
    found = "\n".join(violations(model, "tensorrt"))
    for text in ("codes must be INT8, but they are UINT8", "zero points must be 0, but got", "but it reads INT32"):
        assert text in found
    clipped = "\n".join(violations(_standard(act_bits=4), "qnn"))
    assert "codes must be read by DequantizeLinear only, but Clip reads those of" in clipped


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _set_axis(model: onnx.ModelProto) -> None:
    node = _node(model, "layer.v1.weight.dequantize")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", 1))


def _unquantized(model: onnx.ModelProto) -> None:
    """The sum reads the float output of a convolution."""
    node = _node(model, "layer.v3")
    node.input[0] = _node(model, "layer.v2").output[0]


BREAKS: list[tuple[str, Callable[[onnx.ModelProto], None], str]] = [
    ("qnn", lambda m: _replace(m, "v0.scale", np.ones(3, np.float32)), "an activation must have one scale, but got 3"),
    ("qnn", lambda m: _replace(m, "v0.zero_point", np.int8(3)), "must be UINT8 or UINT16, but got INT8"),
    ("qnn", _set_axis, r"along the output channels (axis 0), but got axis 1"),
    (
        "qnn",
        lambda m: _replace(m, "layer.v1.weight.zero_point", np.array([1, 0, 0, 0, 0, 0], np.int8)),
        "weights per channel must have zero points 0",
    ),
    ("qnn", lambda m: _replace(m, "layer.v1.weight", np.ones((6, 3, 3, 3), np.uint8)), "INT8 or INT4, but got UINT8"),
    ("qnn", lambda m: _replace(m, "layer.v1.bias.scale", np.ones(6, np.float32)), "input scale * weight scale"),
    ("qnn", lambda m: _replace(m, "layer.v1.bias", np.ones(6, np.int16)), "the bias must be INT32"),
    ("qnn", _unquantized, "inputs must come from DequantizeLinear"),
    ("qnn", _unquantized, "the output must be read by QuantizeLinear only"),
    ("tensorrt", lambda m: _replace(m, "v0.zero_point", np.int8(3)), "zero points must be 0, but got 3"),
    ("tensorrt", lambda m: _replace(m, "v0.zero_point", np.uint8(0)), "codes must be INT8, but they are UINT8"),
    ("tensorrt", lambda m: _replace(m, "v0.scale", np.ones(3, np.float32)), "must have one scale, but got 3"),
    ("tensorrt", _set_axis, "along the output channels (axis 0), but got axis 1"),
]


@pytest.mark.parametrize(("target", "change", "message"), BREAKS)
def test_a_broken_rule_is_named(target: str, change: Callable[[onnx.ModelProto], None], message: str) -> None:
    model = _qnn() if target == "qnn" else _tensorrt()
    change(model)
    found = violations(model, target)  # type: ignore[arg-type]
    assert any(message in line for line in found), found
    assert all(line.count(": ") >= 2 for line in found)


def test_other_targets_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"`target` must be one of tensorrt, qnn, but got litert"):
        violations(_standard(), "litert")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["tensorrt", "qnn"])
def test_deep_graphs_whose_values_have_two_readers(engine: Engine) -> None:
    """A search from the last value back to the image must neither recurse nor visit a value twice."""
    nodes = [helper.make_node("Add", [f"v{i}", f"v{i}"], [f"v{i + 1}"], name=f"add{i}") for i in range(2000)]
    nodes.append(helper.make_node("QuantizeLinear", ["v2000", "scale"], ["codes"], name="q"))
    ends = [
        helper.make_tensor_value_info(name, kind, [1, 4])
        for name, kind in (("v0", TensorProto.FLOAT), ("codes", TensorProto.UINT8))
    ]
    scale = numpy_helper.from_array(np.float32(1), "scale")
    graph = helper.make_graph(nodes, "deep", ends[:1], ends[1:], initializer=[scale])
    found = violations(helper.make_model(graph), engine)
    assert any(line.startswith("q: ") for line in found) == (engine == "tensorrt")  # UINT8, which only it rejects
