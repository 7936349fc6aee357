"""Networks with LayerNorm and attention: the file in ONNX Runtime is the simulation of the student, in every bit."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from support.program_builder import ProgramBuilder
from support.standard_models import EXTENDED, differing
from support.token_nets import SIZE, Joined, Module, Separate, TokenNet, spread
from synq.config.quant import QuantConfig
from synq.engines.checks import validate
from synq.engines.deployed import program_of
from synq.engines.float_program import FloatMatrixProduct, MatrixProduct
from synq.engines.lowering import lower
from synq.engines.narrowing import narrowed
from synq.engines.program import Dense, Program
from synq.engines.simulation import Simulation
from synq.export.kernels import kernel_counts
from synq.export.standard_onnx import standard_onnx
from synq.network.tracing import trace_classifier
from synq.quant.student import Student, observe_ranges, quantize_model

IMAGES = torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(0))
QUANT = QuantConfig(weight_bits=8, act_bits=8, target="onnxruntime")


def student_of(net: nn.Module, quant: QuantConfig) -> Student:
    student = quantize_model(trace_classifier(net, SIZE), quant)
    observe_ranges(student.net, IMAGES, act_range="minmax")
    return student


def program(net: nn.Module, quant: QuantConfig = QUANT) -> Program:
    return program_of(student_of(net, quant).net, quant, SIZE)


@pytest.mark.slow
@pytest.mark.parametrize("attention", [Joined, Separate, Module])
@pytest.mark.parametrize("token", [True, False])
def test_every_spelling_is_bit_equal(attention: type[nn.Module], token: bool) -> None:
    found = program(spread(TokenNet(attention, token=token)))
    assert sum(isinstance(step, MatrixProduct) for step in found.steps) == 2
    for count, intermediate in ((1, False), (6, True)):
        assert not differing(found, IMAGES[:count], intermediate=intermediate)
    assert not differing(found, IMAGES, level=EXTENDED, intermediate=False)


@pytest.mark.slow
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 8), (4, 4), (3, 3)])
@pytest.mark.parametrize("float_attention", [False, True])
def test_low_bits_are_bit_equal(weight_bits: int, act_bits: int, float_attention: bool) -> None:
    quant = replace(QUANT, weight_bits=weight_bits, act_bits=act_bits, float_attention=float_attention)
    found = program(spread(TokenNet(depth=2)), quant)
    kind = FloatMatrixProduct if float_attention else MatrixProduct
    assert sum(isinstance(step, kind) for step in found.steps) == 4
    assert not differing(found, IMAGES, intermediate=False)


@pytest.mark.slow
def test_the_engine_runs_integer_kernels_between_the_floats() -> None:
    student = student_of(spread(TokenNet()), QUANT)
    found = program_of(student.net, QUANT, SIZE)
    counts = Counter(kernel_counts(standard_onnx(found).SerializeToString()))
    assert {kind: counts[kind] for kind in ("QLinearConv", "MatMulIntegerToFloat", "QLinearMatMul")} == {
        "QLinearConv": 1,
        "MatMulIntegerToFloat": 1,
        "QLinearMatMul": 1,
    }
    assert counts["QGemm"] == 7  # q, k, v, proj, two of the MLP, the head
    assert not {"Conv", "MatMul", "Gemm", "FusedMatMul", "QLinearSoftmax"} & {*counts}
    widths = [len(step.weight) for step in found.steps if isinstance(step, Dense)]
    assert widths == [24, 24, 24, 24, 48, 24, 5]
    with torch.no_grad():
        simulated, trained = Simulation(found)(IMAGES), student.net(IMAGES)
    assert float((simulated - trained).abs().max()) < 0.25 * float(trained.std())


def attention_program(seed: int, act_bits: int, weight_bits: int = 8) -> Program:
    """Attention of one head between layers, with grids of any zero point."""
    builder = ProgramBuilder((9, 4, 4), seed, weight_bits=weight_bits, act_bits=act_bits)
    value = builder.transpose(builder.reshape(builder.quantize(bits=8), 9, 16), 0, 2, 1)
    tokens = builder.quantize(builder.layer_norm(builder.dense(value, 12, floats=True)))
    query, key, inner = (builder.dense(tokens, 10) for _ in range(3))
    scores = builder.matrix_product(query, builder.transpose(key, 0, 2, 1), floats=True)
    mixed = builder.matrix_product(builder.quantize(builder.softmax(scores)), inner)
    return builder.build(builder.dense(builder.flatten(mixed), 5, floats=True))


@pytest.mark.parametrize(("act_bits", "weight_bits"), [(8, 8), (4, 4)])
def test_products_of_codes_with_any_grid_are_bit_equal(act_bits: int, weight_bits: int) -> None:
    images = torch.randn(5, 9, 4, 4, generator=torch.Generator().manual_seed(0))
    for seed in range(4):
        assert not differing(attention_program(seed, act_bits, weight_bits), images, intermediate=seed % 2 == 0)


def test_layers_have_the_features_that_are_read() -> None:
    builder = ProgramBuilder((8, 1, 6), 0, weight_bits=8, act_bits=8)
    tokens = builder.transpose(builder.reshape(builder.quantize(), 8, 6), 0, 2, 1)
    whole = builder.reshape(builder.dense(tokens, 24), 6, 3, 2, 4)
    part = builder.reshape(builder.slice(whole, 2, 1, 2), 6, 2, 4)
    heads = builder.transpose(builder.transpose(part, 0, 2, 1, 3), 0, 1, 3, 2)
    before = builder.build(builder.dense(builder.flatten(heads), 3, floats=True))
    steps, shapes, grids = narrowed(list(before.steps), before.shapes, before.grids)
    after = replace(before, steps=tuple(steps), shapes=shapes, grids=grids)
    validate(after)
    assert [type(step).__name__ for step in steps][3:] == ["Dense", "Reshape", "Transpose", "Reshape", "Dense"]
    assert [len(step.weight) for step in after.layers()] == [8, 3]
    images = torch.randn(3, 8, 1, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Simulation(before)(images), Simulation(after)(images))


def test_layers_that_are_read_whole_or_twice_stay() -> None:
    builder = ProgramBuilder((8, 1, 6), 0, weight_bits=8, act_bits=8)
    tokens = builder.transpose(builder.reshape(builder.quantize(), 8, 6), 0, 2, 1)
    whole = builder.dense(tokens, 8)
    halves = [builder.slice(whole, 2, start, start + 4) for start in (0, 4)]
    program = builder.build(builder.dense(builder.flatten(builder.sum(*halves)), 3, floats=True))
    assert narrowed(list(program.steps), program.shapes, program.grids)[0] == list(program.steps)


@pytest.mark.parametrize("target", ["openvino", "litert", "executorch", "tensorrt", "qnn"])
def test_other_engines_reject_in_one_line(target: str) -> None:
    quant = QuantConfig(weight_bits=8, act_bits=8, target=target)  # type: ignore[arg-type]
    net = quantize_model(trace_classifier(spread(TokenNet()), SIZE), quant).net
    with pytest.raises(ValueError, match=f"must be onnxruntime for a network with attention and LayerNorm.*{target}"):
        lower(net, target, SIZE)
