"""The form of standard ONNX files: integer kernels everywhere, small weights, valid for any batch."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from support.program_builder import ProgramBuilder  # noqa: E402
from support.random_programs import PIECES, random_program  # noqa: E402
from support.standard_models import differing, resnet_program  # noqa: E402
from synq.engines.program import Convolution, Layer, Program  # noqa: E402
from synq.export.kernels import FLOAT_KERNELS, float_layers, kernel_counts  # noqa: E402
from synq.export.qdq.graph import QuantizedGraph  # noqa: E402
from synq.export.standard_onnx import standard_onnx  # noqa: E402

IMAGES = torch.randn(2, 3, 12, 11, generator=torch.Generator().manual_seed(3))


def _constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_resnet18_runs_in_integer_kernels_only(weight_bits: int) -> None:
    """The kernels of ResNet-18; 8 bits of activations need no Clip but for folded ReLUs."""
    program = resnet_program(weight_bits, 8)
    model = standard_onnx(program).SerializeToString()
    counts = kernel_counts(model)
    expected = {"QuantizeLinear": 1, "QLinearConv": 20, "NhwcMaxPool": 1, "QLinearAdd": 8, "QGemm": 1, "Flatten": 1}
    assert {kind: counts.get(kind) for kind in expected} == expected
    assert counts["QLinearGlobalAveragePool"] == 1
    assert set(counts) <= {*expected, "QLinearGlobalAveragePool", "Transpose", "Clip"}, counts
    assert float_layers(model) == []


@pytest.mark.parametrize("piece", [piece for piece in PIECES if piece != "resize"])
@pytest.mark.parametrize("act_bits", [8, 4])
def test_no_step_runs_in_float(piece: str, act_bits: int) -> None:
    program = random_program(11, pieces=(piece,), length=3, weight_bits=4, act_bits=act_bits)
    counts = kernel_counts(standard_onnx(program).SerializeToString())
    assert not set(counts) & (FLOAT_KERNELS | {"DequantizeLinear", "Add", "Mul", "Concat", "AveragePool"}), counts
    assert counts["QuantizeLinear"] == 1


def test_a_layer_that_stays_float_is_named() -> None:
    """A Clip in front of QuantizeLinear does it."""
    program = random_program(1, pieces=("convolution",), length=2)
    model = standard_onnx(program)
    quantize = next(node for node in model.graph.node if node.input[0] == "v2.float")
    quantize.input[0] = "clipped"
    for name, value in (("low", 0.0), ("high", 0.1)):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    place = list(model.graph.node).index(quantize)
    model.graph.node.insert(place, helper.make_node("Clip", ["v2.float", "low", "high"], ["clipped"]))
    assert float_layers(standard_onnx(program).SerializeToString()) == []
    assert float_layers(model.SerializeToString()) == ["layer.v2"]


@pytest.mark.parametrize(
    ("weight_bits", "opset", "kind"), [(8, 13, "INT8"), (5, 13, "INT8"), (4, 21, "INT4"), (2, 21, "INT4")]
)
def test_weights_have_the_smallest_standard_type_and_the_lowest_operator_set(
    weight_bits: int, opset: int, kind: str
) -> None:
    program = random_program(1, pieces=("convolution", "sum"), weight_bits=weight_bits)
    model = standard_onnx(program)
    assert [entry.version for entry in model.opset_import] == [opset]
    assert model.ir_version == helper.find_min_ir_version_for(model.opset_import)
    constants = _constants(model)
    for layer in program.layers():
        tensor = constants[f"{layer.layer}.weight"]
        assert TensorProto.DataType.Name(tensor.data_type) == kind
        assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), layer.weight.numpy())
        zero_points = numpy_helper.to_array(constants[f"{layer.layer}.weight.zero_point"])
        assert zero_points.dtype == np.int8 and not zero_points.any()
    assert {tensor.data_type for tensor in constants.values()} <= {
        *(TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT4, TensorProto.INT32),
        TensorProto.INT64,
    }


def test_four_bits_take_half_and_two_bits_a_quarter_of_the_bytes() -> None:
    builder = ProgramBuilder((3, 8, 8), 0, weight_bits=2, act_bits=8)
    value = builder.convolution(builder.quantize(), 64)
    value = builder.convolution(builder.convolution(value, 128), 128)
    program = builder.build(builder.dense(builder.flatten(builder.global_average_pool(value)), 10, floats=True))
    weights = sum(layer.weight.numel() for layer in program.layers())
    sizes = [len(standard_onnx(_with_bits(program, bits)).SerializeToString()) for bits in (8, 4)]
    sizes.append(len(standard_onnx(program, pack_two_bits=True).SerializeToString()))
    assert sizes[0] - sizes[1] == pytest.approx(weights / 2, rel=0.02)
    assert sizes[0] - sizes[2] == pytest.approx(weights * 3 / 4, rel=0.03)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not differing(program, images, pack_two_bits=True) and not differing(program, images)
    packed = standard_onnx(program, pack_two_bits=True).SerializeToString()
    assert float_layers(packed) == [] and kernel_counts(packed)["QLinearConv"] == 3


def _with_bits(program: Program, bits: int) -> Program:
    steps = (replace(step, weight_bits=bits) if isinstance(step, Layer) else step for step in program.steps)
    return replace(program, steps=tuple(steps))


def test_two_bits_that_do_not_fill_bytes_are_int4() -> None:
    builder = ProgramBuilder((1, 4, 4), 0, weight_bits=2, act_bits=8)
    value = builder.convolution(builder.quantize(), 3)
    program = builder.build(builder.dense(builder.flatten(value), 2, floats=True))
    constants = _constants(standard_onnx(program, pack_two_bits=True))
    assert constants["layer.v1.weight"].data_type == TensorProto.INT4 and "layer.v3.weight.packed" in constants
    assert not differing(program, torch.randn(2, 1, 4, 4), pack_two_bits=True)


def test_input_and_output_have_their_names_and_a_dynamic_batch() -> None:
    """Also where a value of the network has the name of the input or the output."""
    program = random_program(4)
    first, last = program.steps[0].output, program.steps[-1].inputs[0]
    names = {first: "logits", last: "images"}
    renamed = replace(
        program,
        steps=tuple(
            replace(
                step,
                inputs=tuple(names.get(name, name) for name in step.inputs),
                output=names.get(step.output, step.output),
            )
            for step in program.steps
        ),
        grids={names.get(name, name): grid for name, grid in program.grids.items()},
        shapes={names.get(name, name): shape for name, shape in program.shapes.items()},
    )
    model = standard_onnx(renamed)
    ends = [model.graph.input[0], model.graph.output[0]]
    assert [end.name for end in ends] == ["images", "logits"]
    for end, shape in zip(ends, ((3, 12, 11), (5,)), strict=True):
        axes = end.type.tensor_type.shape.dim
        assert axes[0].dim_param == "N" and tuple(axis.dim_value for axis in axes[1:]) == shape
    names_of_nodes = Counter(node.name for node in model.graph.node)
    assert max(names_of_nodes.values()) == 1
    assert not differing(renamed, IMAGES, intermediate=False)


def test_layers_of_one_name_have_nodes_of_different_names() -> None:
    program = random_program(4)
    shared = replace(program, steps=tuple(replace(step, layer="block.conv") for step in program.steps))
    names = Counter(node.name for node in standard_onnx(shared).graph.node)
    assert max(names.values()) == 1 and {"block.conv", "block.conv.1"} <= set(names)


def test_clips_are_on_codes_and_only_where_saturation_is_not_enough() -> None:
    builder = ProgramBuilder((3, 8, 8), 0, weight_bits=8, act_bits=8)
    value = builder.quantize()
    limits = [(0, 255), (3, 255), (0, 200), (0, 255)]
    for low, high in limits:
        value = builder.convolution(value, 4, low=low, high=high)
    program = builder.build(builder.dense(builder.flatten(value), 2, floats=True))
    model = standard_onnx(program)
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    assert [node.output[0] for node in clips] == ["v2", "v3"]
    assert [made[node.input[0]] for node in clips] == ["QuantizeLinear", "QuantizeLinear"]
    assert "Relu" not in set(made.values())


def test_functions_that_only_limit_or_rescale_codes_need_no_table() -> None:
    builder = ProgramBuilder((3, 8, 8), 0, weight_bits=8, act_bits=8)
    value = builder.convolution(builder.quantize(), 4, low=0, high=255)
    grid = builder.grids[value]
    limited = builder.elementwise(value, "identity")
    builder.grids[limited] = grid
    scaled = builder.elementwise(limited, "affine", factor=2.0, offset=0.0)
    builder.grids[scaled] = replace(grid, scale=2 * grid.scale)
    builder.steps[2] = replace(builder.steps[2], low=grid.zero_point, high=255)  # type: ignore[call-arg]
    builder.steps[3] = replace(builder.steps[3], low=0, high=255)  # type: ignore[call-arg]
    summed = builder.sum(value, builder.convolution(scaled, 4))
    program = builder.build(builder.dense(builder.flatten(summed), 2, floats=True))
    kinds = Counter(node.op_type for node in standard_onnx(program).graph.node)
    assert not kinds["Gather"] and not kinds["Mul"] and not kinds["Relu"]
    assert not differing(program, torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert kernel_counts(standard_onnx(program).SerializeToString())["QuantizeLinear"] == 1


def test_int4_constants_keep_every_code() -> None:
    codes = np.arange(-8, 7, dtype=np.int8).reshape(3, 5)
    graph = QuantizedGraph({}, {})
    graph.packed_constant("w", codes)
    assert np.array_equal(numpy_helper.to_array(graph.constants["w"]).astype(np.int8), codes)


def test_biases_are_int32_on_the_grid_of_the_sums() -> None:
    program = random_program(5, pieces=("convolution",))
    constants = _constants(standard_onnx(program))
    for layer in program.layers():
        bias = numpy_helper.to_array(constants[f"{layer.layer}.bias"])
        scale = numpy_helper.to_array(constants[f"{layer.layer}.bias.scale"])
        expected = torch.tensor(program.grids[layer.inputs[0]].scale) * layer.weight_scale
        assert bias.dtype == np.int32 and np.array_equal(bias, layer.bias.numpy())
        assert np.array_equal(scale, expected.numpy())


def test_padding_of_a_convolution_is_the_zero_point() -> None:
    """A convolution of padding 1 and one of a padded image are the same."""
    builder = ProgramBuilder((3, 8, 8), 0, weight_bits=8, act_bits=8)
    value = builder.quantize()
    output = builder.convolution(value, 4)
    step = builder.steps[-1]
    assert isinstance(step, Convolution) and builder.grids[value].zero_point > 0
    padded = builder.pad(value, (0, 0, 1, 1), (0, 0, 1, 1))
    twin = replace(step, inputs=(padded,), output="twin", padding=(0, 0, 0, 0))
    builder.steps.append(twin)
    builder.grids["twin"], builder.samples["twin"] = builder.grids[output], builder.samples[output]
    program = builder.build(builder.dense(builder.flatten(builder.sum(output, "twin")), 2, floats=True))
    from synq.engines.simulation import Simulation

    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values = Simulation(program).values(images, [output, "twin"])
    assert torch.equal(values[output], values["twin"])
    assert not differing(program, images)
