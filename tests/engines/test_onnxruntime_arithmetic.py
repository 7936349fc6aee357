"""The arithmetic of ONNX Runtime is that of ONNX Runtime, in every bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

from support.program_builder import ProgramBuilder
from support.random_programs import PIECES, random_program
from support.standard_models import ALL, EXTENDED, differing, resnet_program
from synq.engines.functions import FUNCTIONS
from synq.engines.onnxruntime_arithmetic import OnnxRuntimeArithmetic
from synq.engines.onnxruntime_functions import has_kernel, native_values
from synq.engines.program import Convolution, Elementwise, Grid, Program, Sum

BITS = [(8, 8), (4, 8), (4, 4), (3, 3), (2, 4)]
ARGUMENTS: dict[str, list[dict[str, float]]] = {
    "affine": [{"factor": -0.7, "offset": 0.3}, {"factor": 1.0, "offset": 0.1}, {"factor": 2.5, "offset": 0.0}],
    "leaky_relu": [{}, {"negative_slope": 0.2}],
    "elu": [{}, {"alpha": 1.3}, {"alpha": 1.0, "scale": 1.05, "input_scale": 1.2}],
    "softplus": [{}, {"beta": 2.0, "threshold": 20.0}],
    "pow": [{"exponent": 2.0}, {"exponent": 0.5}],
}
CASES = [(function, arguments) for function in FUNCTIONS for arguments in ARGUMENTS.get(function, [{}])]


def _images(count: int, size: tuple[int, int, int] = (3, 12, 11)) -> torch.Tensor:
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(count)) * 1.5


@pytest.mark.parametrize("piece", PIECES)
def test_every_kind_of_step_is_bit_equal(piece: str) -> None:
    for seed, (weight_bits, act_bits) in enumerate(BITS):
        program = random_program(seed, weight_bits=weight_bits, act_bits=act_bits, pieces=(piece,), length=3)
        assert not differing(program, _images(3)), (seed, weight_bits, act_bits)


@pytest.mark.parametrize("seed", range(10))
def test_random_programs_are_bit_equal(seed: int) -> None:
    """Batches of 1 and more, both levels that fuse, the graph as it is and with every value as an output."""
    weight_bits, act_bits = BITS[seed % len(BITS)]
    program = random_program(seed, weight_bits=weight_bits, act_bits=act_bits, length=8, float_logits=seed % 3 > 0)
    for count, level, intermediate in ((1, ALL, False), (5, ALL, True), (2, EXTENDED, False)):
        assert not differing(program, _images(count), level=level, intermediate=intermediate)


@pytest.mark.parametrize(("weight_bits", "act_bits"), BITS)
def test_a_network_in_the_shape_of_resnet18_is_bit_equal(weight_bits: int, act_bits: int) -> None:
    program = resnet_program(weight_bits, act_bits)
    for count, level, intermediate in ((1, ALL, False), (4, ALL, True), (2, EXTENDED, False)):
        assert not differing(program, _images(count, (3, 32, 32)), level=level, intermediate=intermediate)


def _function_program(seed: int, act_bits: int, function: str, arguments: dict[str, float]) -> Program:
    builder = ProgramBuilder((3, 12, 11), seed, weight_bits=8, act_bits=act_bits)
    value = builder.convolution(builder.quantize(bits=8), 16, low=0, high=2**act_bits - 1)
    value = builder.elementwise(value, function, **arguments)
    value = builder.convolution(value, 6) if seed % 2 else value
    return builder.build(builder.dense(builder.flatten(value), 5, floats=True))


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_functions_of_single_values_are_bit_equal(function: str, arguments: dict[str, float]) -> None:
    for seed, act_bits in enumerate((8, 8, 4)):
        program = _function_program(seed, act_bits, function, arguments)
        assert not differing(program, _images(9), intermediate=seed < 2), (seed, act_bits)


def test_all_codes_of_a_function_occur() -> None:
    """The test above compares nearly every row of the tables."""
    from synq.engines.simulation import Simulation

    program = _function_program(0, 8, "gelu", {})
    codes = Simulation(program).values(_images(9), [program.steps[1].output])[program.steps[1].output]
    assert len(codes.unique()) > 200


@pytest.mark.parametrize(
    ("kind", "attributes", "function", "arguments"),
    [
        ("Sigmoid", {}, "sigmoid", {}),
        ("Tanh", {}, "tanh", {}),
        ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, "hardsigmoid", {}),
        ("HardSwish", {}, "hardswish", {}),
        ("Elu", {"alpha": 1.3}, "elu", {"alpha": 1.3}),
        ("Gelu", {}, "gelu", {}),
        ("Gelu", {"approximate": "tanh"}, "gelu_tanh", {}),
        ("LeakyRelu", {"alpha": 0.2}, "leaky_relu", {"negative_slope": 0.2}),
    ],
)
def test_float_kernels_are_followed_to_the_last_bit(
    kind: str, attributes: dict[str, object], function: str, arguments: dict[str, float]
) -> None:
    import onnxruntime
    from onnx import TensorProto, helper

    generator = np.random.default_rng(0)
    parts = (generator.normal(size=50_003) * 4, generator.normal(size=20_000) * 0.3, np.linspace(-30, 30, 30_000))
    x = np.concatenate(parts).astype(np.float32)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(kind, ["x"], ["y"], **attributes)], "g", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    step = Elementwise(inputs=("x",), output="y", function=function, arguments=arguments)
    expected = native_values(step, torch.from_numpy(x)).numpy()
    assert has_kernel(step)
    for start, count in ((0, len(x)), (1, 1000), (3, 257), (5, 77), (13, 1), (2, 31)):
        part = np.ascontiguousarray(x[start : start + count])
        assert np.array_equal(session.run(None, {"x": part})[0], expected[start : start + count])


def test_ties_and_saturation_of_the_image_are_bit_equal() -> None:
    """Values exactly between two codes, beyond both ends, and next to ties."""
    for zero_point in (0, 127, 128, 255):
        builder = ProgramBuilder((1, 8, 64), 0, weight_bits=8, act_bits=8)
        value = builder.quantize(bits=8)
        grid = Grid(scale=0.375, zero_point=zero_point, quant_max=255)
        builder.grids[value] = grid
        program = builder.build(builder.dense(builder.flatten(value), 3, floats=True))
        halves = (torch.arange(-300.0, 212.0) + 0.5) * 0.375
        images = torch.stack([halves, halves.nextafter(torch.tensor(1e9)), halves.nextafter(torch.tensor(-1e9))])
        assert not differing(program, images.reshape(3, 1, 8, 64)), zero_point


def test_linear_layers_on_more_axes_are_bit_equal() -> None:
    for floats in (False, True):
        for act_bits in (8, 4):
            builder = ProgramBuilder((3, 6, 5), 1, weight_bits=8, act_bits=act_bits)
            value = builder.transpose(builder.reshape(builder.quantize(bits=8), 3, 30), 0, 2, 1)
            value = builder.dense(value, 7, floats=floats)
            program = builder.build(value if floats else builder.dense(builder.flatten(value), 4, floats=True))
            assert not differing(program, _images(3, (3, 6, 5)))


def test_what_onnxruntime_does_not_compute_is_rejected() -> None:
    program = random_program(2, pieces=("sum",))
    steps = tuple(replace(step, unrounded=0) if isinstance(step, Sum) else step for step in program.steps)
    with pytest.raises(ValueError, match=r"`unrounded` must be None for onnxruntime, but got 0 at `layer\.v"):
        OnnxRuntimeArithmetic(replace(program, steps=steps))
    first = next(step for step in program.steps if isinstance(step, Convolution))
    grids = {name: grid for name, grid in program.grids.items() if name != first.output}
    with pytest.raises(ValueError, match=rf"output of a convolution must have a grid, but that of `{first.layer}` has"):
        OnnxRuntimeArithmetic(replace(program, grids=grids))
    step = Elementwise(inputs=("x",), output="y", layer="net.act", function="lambert")
    with pytest.raises(ValueError, match=r"`function` must be one of identity, .*, but got lambert at `net\.act`"):
        native_values(step, torch.zeros(3))
