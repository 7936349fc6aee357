"""ONNX files have the student's logits in ONNX Runtime, and integers of the declared types."""

import numpy as np
import pytest
import torch
from torch import nn

from support.integer_students import images
from support.small_nets import SIZE, Residual, plain

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, numpy_helper  # noqa: E402

from support.onnx_graphs import graph_of  # noqa: E402
from synq.config.run import QuantConfig  # noqa: E402
from synq.export.kernels import count_kernels  # noqa: E402
from synq.export.onnx_graph import Container, onnx_graph, write_container, write_onnx  # noqa: E402
from synq.export.verify import compare, engine_of, open_session  # noqa: E402
from synq.network.tracing import trace_classifier  # noqa: E402
from synq.quant.integer_form import integer_form  # noqa: E402
from synq.quant.integer_layers import IntegerConv2d, IntegerLinear  # noqa: E402
from synq.quant.student import observe_ranges, quantize_model  # noqa: E402


def types(model: bytes) -> tuple[set[int], set[int]]:
    """Integer types of the weights' codes and of the activations' zero points."""
    graph = onnx.load_from_string(model).graph
    known = {tensor.name: tensor.data_type for tensor in graph.initializer}
    weights = {known[n.input[0]] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in known}
    return weights, {known[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"}


@pytest.mark.parametrize(
    ("bits", "container", "act_points", "make"),
    [
        (4, "int4", "inputs", Residual),
        pytest.param(3, "int4", "relu", plain, marks=pytest.mark.slow),
        (3, "int8", "inputs", plain),
        (8, "int8", "inputs", Residual),
    ],
)  # fmt: skip
def test_onnx_runtime_gives_the_logits_of_the_student(
    bits: int, container: Container, act_points: str, make: type[nn.Module]
) -> None:
    form, graph = graph_of(make, bits, act_points)  # type: ignore[arg-type]
    before = graph.SerializeToString(deterministic=True)
    model = write_container(graph, container)
    assert graph.SerializeToString(deterministic=True) == before, "other containers are made of it, too"
    sample = images(60)
    with torch.no_grad():
        wanted = form(sample)
    # A free number of images, and the default session.
    found = compare(
        engine_of(open_session(model)), [(wanted[:59], sample[:59], None), (wanted[59:], sample[59:], None)], source="x"
    )
    assert found.max_difference == 0 if act_points == "inputs" else found.mean_difference < 0.02
    kind = TensorProto.INT4 if container == "int4" else TensorProto.UINT8 if bits == 8 else TensorProto.INT8
    assert types(model) == ({kind}, {TensorProto.UINT8})
    # The codes in the file are those of the integer form.
    stored = {t.name: numpy_helper.to_array(t).astype(int) for t in onnx.load_from_string(model).graph.initializer}
    layers = {n: m for n, m in form.named_modules() if isinstance(m, IntegerConv2d | IntegerLinear)}
    for name, layer in layers.items():
        (found,) = (values for key, values in stored.items() if key.startswith(f"{name}.integer_weight.codes."))
        codes = found - (128 if bits == 8 else 0)
        assert np.array_equal(codes, layer.integer_weight.codes.numpy()), name
    integers, floats = count_kernels(model)
    assert integers + floats == len(layers)


class Narrow(nn.Module):
    """Layers of different bit-widths with equal zero points, which ``torch.onnx`` merges into one initializer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, 1), nn.Linear(1, 5)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([1.0, -1.0, 0.5]).reshape(1, 3, 1, 1))
            self.second.weight.fill_(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


def test_tensors_that_are_alike_at_different_widths_keep_their_types() -> None:
    traced = trace_classifier(Narrow().eval().requires_grad_(False), SIZE)
    made = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4, first_bits=8))
    observe_ranges(made.net, images(), act_range="minmax")
    graph = onnx_graph(integer_form(made.net, operations="onnx"), SIZE)
    for container in ("int4", "int8"):
        session = open_session(write_container(graph, container))
        assert torch.allclose(engine_of(session)(images(4)), made.net(images(4)), atol=1e-4)


def test_a_narrow_code_stays_in_its_range() -> None:
    """Activations far beyond the range: a container is wider than three bits, and must not be used beyond them."""
    form, graph = graph_of(plain, 3, "inputs")
    model = write_container(graph, "int8")
    sample = 50 * images(16)
    with torch.no_grad():
        wanted = form(sample)
    found = compare(engine_of(open_session(model)), [(wanted, sample, None)], source="x")
    assert found.max_difference == 0


def test_what_an_engine_does_not_need_is_not_in_the_file() -> None:
    model = onnx.load_from_string(write_container(graph_of(Residual, 4, "inputs")[1], "int4"))
    assert not model.graph.value_info and not any(node.metadata_props for node in model.graph.node)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    sizes = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer if "codes" in tensor.name}
    assert sizes["conv2.integer_weight.codes.int4"] == 8 * 2 * 9 // 2, "two codes a byte"


class Erfinv(nn.Module):
    """An operation that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv(x)).sort(dim=1)[0].unfold(2, 2, 2).erfinv().mean((2, 3, 4)))


def test_operations_without_onnx_export_are_rejected() -> None:
    with pytest.raises(ValueError, match="the student cannot be exported to ONNX"):
        write_onnx(torch.fx.symbolic_trace(Erfinv().eval()), SIZE)
