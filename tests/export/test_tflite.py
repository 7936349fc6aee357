"""Files of LiteRT: every bit of every logit is the simulation's, in the engine with its default delegate."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("ai_edge_litert", reason="LiteRT's package is not installed (the extra `litert`)")
pytest.importorskip("flatbuffers", reason="flatbuffers is not installed (the extra `litert`)")

from support.litert_models import differing_logits, interpreter, logits_of, operators
from support.mobile_nets import NETS, lowered
from support.program_builder import ProgramBuilder
from support.random_programs import PIECES, random_program
from synq.engines.functions import FUNCTIONS
from synq.engines.program import AveragePool, Program
from synq.engines.simulation import Simulation
from synq.export.tflite import write_tflite

IMAGES = torch.randn(3, 3, 12, 11, generator=torch.Generator().manual_seed(5))
ARGUMENTS = {
    "affine": {"factor": -0.7, "offset": 0.3},
    "leaky_relu": {"negative_slope": 0.1},
    "elu": {"alpha": 0.5},
    "pow": {"exponent": 2.0},
}


def _programs(count: int, first: int = 0, **options: object) -> Iterator[Program]:
    """Random programs whose logits vary, and whose average pools have a form in the format: their padding counts."""
    for seed in range(first, first + 10 * count):
        program = random_program(seed, target="litert", float_logits=False, length=4, **options)  # type: ignore[arg-type]
        steps = (replace(step, count_padding=True) if isinstance(step, AveragePool) else step for step in program.steps)
        program = replace(program, steps=tuple(steps))
        if Simulation(program)(IMAGES).unique().numel() > 4:
            yield program
            count -= 1
        if not count:
            return
    raise AssertionError("all logits of random programs are constant")


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(8, 8), (4, 4)])
def test_random_programs_of_each_step(piece: str, weight_bits: int, act_bits: int) -> None:
    for program in _programs(3, pieces=(piece,), weight_bits=weight_bits, act_bits=act_bits):
        assert not differing_logits(program, IMAGES)


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(8, 8), (4, 8), (4, 4), (2, 3)])
def test_random_programs_of_all_steps(weight_bits: int, act_bits: int) -> None:
    for program in _programs(6, 100, weight_bits=weight_bits, act_bits=act_bits):
        assert not differing_logits(program, IMAGES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_code_of_every_function(name: str) -> None:
    for seed in range(3):
        builder = ProgramBuilder((4, 16, 16), seed, weight_bits=8, act_bits=8)
        image = builder.quantize()
        output = builder.elementwise(image, name, **ARGUMENTS.get(name, {}))
        program = builder.build(builder.dequantize(builder.flatten(output)), "litert")
        grid = builder.grids[image]
        codes = torch.arange(1024).remainder(256).reshape(1, 4, 16, 16)
        assert not differing_logits(program, (codes - grid.zero_point) * grid.scale)


def test_average_pool_that_leaves_out_its_padding() -> None:
    """Where the format's SAME is the padding; codes of 4 bits are moved onto those of 8 bits for it."""
    for act_bits in (8, 4):
        builder = ProgramBuilder((3, 12, 11), act_bits, weight_bits=8, act_bits=act_bits)
        value = builder.convolution(builder.quantize(), 6)
        value = builder.average_pool(value, (3, 3), (1, 1), (1, 1, 1, 1), count_padding=False)
        program = builder.build(builder.dequantize(builder.flatten(value)), "litert")
        assert not differing_logits(program, IMAGES)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(8, 8), (4, 8), (4, 4)])
def test_whole_networks(net: str, weight_bits: int, act_bits: int) -> None:
    program, images = lowered(net, "litert", weight_bits=weight_bits, act_bits=act_bits)
    assert Simulation(program)(images).unique().numel() > 4
    assert not differing_logits(program, images)


def test_limits_cost_no_operator_after_a_relu() -> None:
    """Codes 0..15 of a rectified convolution are 112..127 as int8: both limits are the engine's."""
    program, _ = lowered("resnet", "litert", weight_bits=4, act_bits=4)
    found = operators(write_tflite(program))
    assert found["CONV_2D"] == 8 and found["ADD"] == 3
    assert found["MINIMUM"] + found["MAXIMUM"] <= len([step for step in program.steps if _is_signed(program, step)])
    assert found["DELEGATE"]


def _is_signed(program: Program, step: object) -> bool:
    low, output = getattr(step, "low", None), getattr(step, "output", "")
    grid = program.grids.get(output)
    return grid is not None and (low is None or low != grid.zero_point)


def test_any_batch_and_a_signature_with_names() -> None:
    [program] = _programs(1)
    data = write_tflite(program)
    single = torch.cat([logits_of(data, image[None]) for image in IMAGES])
    assert torch.equal(single, logits_of(data, IMAGES))
    runner = interpreter(data).get_signature_runner("serving_default")
    image = IMAGES[:1].permute(0, 2, 3, 1).contiguous().numpy()
    [(name, logits)] = runner(**{program.image: image}).items()
    assert name == program.logits and np.array_equal(logits, single[:1].numpy())


def test_the_float_network_is_the_program_without_rounding() -> None:
    builder = ProgramBuilder((3, 12, 11), 0, weight_bits=8, act_bits=8)
    value = builder.convolution(builder.quantize(), 8, low=0, high=255)
    value = builder.max_pool(builder.convolution(value, 8, groups=8, low=0, high=255))
    logits = builder.dense(builder.flatten(value), 5)
    builder.steps[-1] = replace(builder.steps[-1], low=0, high=255)  # type: ignore[call-arg]
    assert min(builder.grids[step.output].zero_point for step in builder.steps[1:]) > 0, "a ReLU would be folded"
    program = builder.build(builder.dequantize(logits), "litert")
    layers = list(program.layers())
    modules = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)]
    modules.append(nn.Linear(layers[-1].weight.shape[1], 5))
    net = nn.Sequential(*modules[:2], nn.MaxPool2d(3, 2, 1), nn.Flatten(), modules[2])
    for module, layer in zip(modules, layers, strict=True):
        axes = (-1, *[1] * (layer.weight.ndim - 1))
        module.weight.data = layer.weight * layer.weight_scale.reshape(axes)
        module.bias.data = layer.bias * layer.weight_scale * program.grids[layer.inputs[0]].scale
    found = logits_of(write_tflite(program, floats=True), IMAGES)
    assert torch.allclose(found, net(IMAGES), atol=1e-4)
    assert not torch.equal(found, Simulation(program)(IMAGES))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b, v: b.average_pool(v, (2, 2), (1, 1), (1, 0, 0, 0)), r"leaves out the padding \(1, 0, 0, 0\)"),
        (lambda b, v: b.max_pool(v, (2, 2), (1, 1), (0, 0, 0, 0), (2, 2)), "a maximum pool with dilation"),
    ],
)
def test_what_the_engine_cannot_compute_exactly_is_rejected(make: object, message: str) -> None:
    builder = ProgramBuilder((3, 12, 11), 0, weight_bits=8, act_bits=8)
    value = make(builder, builder.quantize())  # type: ignore[operator]
    program = builder.build(builder.dequantize(builder.flatten(value)), "litert")
    with pytest.raises(ValueError, match=f"`quant.target` litert must .* but `layer.{value}` is .*{message}"):
        write_tflite(program)


def test_dead_channels_and_scales_at_the_limits_of_the_kernels() -> None:
    """A channel that was 0 on all images has a scale next to 0: the factor of its sums has no kernel in XNNPACK."""
    for scale in (1e-8, 1e-6, 3e5, 1e9):
        builder = ProgramBuilder((3, 12, 11), 1, weight_bits=8, act_bits=8)
        value = builder.convolution(builder.quantize(), 6, low=0, high=255)
        builder.grids[value] = replace(builder.grids[value], scale=float(torch.tensor(scale)))
        program = builder.build(builder.dequantize(builder.flatten(value)), "litert")
        assert not differing_logits(program, IMAGES)


@pytest.mark.parametrize("operation", ["sum", "product"])
def test_scales_without_a_kernel_are_rejected(operation: str) -> None:
    builder = ProgramBuilder((3, 12, 11), 1, weight_bits=8, act_bits=8)
    image = builder.quantize()
    value = getattr(builder, operation)(image, image)
    builder.grids[value] = replace(builder.grids[value], scale=1e-7)
    program = builder.build(builder.dequantize(builder.flatten(value)), "litert")
    with pytest.raises(ValueError, match=f"`layer.{value}` is a {operation} with .* times its output's scale: check"):
        write_tflite(program)


def test_logits_in_floats_are_rejected() -> None:
    builder = ProgramBuilder((3, 12, 11), 0, weight_bits=8, act_bits=8)
    value = builder.dense(builder.flatten(builder.quantize()), 5, floats=True)
    with pytest.raises(ValueError, match="a linear layer with an output in floats: give its output a grid"):
        write_tflite(builder.build(value, "litert"))
