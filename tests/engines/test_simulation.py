"""The frame of all engines: exact sums, the order of the steps, movements, limits, errors."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from support.program_builder import ProgramBuilder
from support.random_programs import PIECES, random_program
from synq.engines.exact_sums import FLOAT32_WHOLE, ExactSums, largest_sum
from synq.engines.onnxruntime_arithmetic import OnnxRuntimeArithmetic
from synq.engines.program import Convolution, Dense, Grid, Layer, Limited, MaxPool, Pad, Slice
from synq.engines.simulation import Simulation, moved

FULL = Grid(scale=0.5, zero_point=100, quant_max=255)


def _convolution(weight: Tensor, **fields: object) -> Convolution:
    channels = len(weight)
    values: dict[str, object] = {
        "stride": (1, 1),
        "padding": (0, 0, 0, 0),
        "dilation": (1, 1),
        "groups": 1,
        "weight_bits": 8,
        "weight_scale": torch.ones(channels),
        "bias": torch.zeros(channels, dtype=torch.int32),
    }
    return Convolution(inputs=("x",), output="y", layer="conv", weight=weight, **{**values, **fields})  # type: ignore[arg-type]


def _whole_sums(step: Layer, codes: Tensor, zero_point: int) -> Tensor:
    """The sums in int64, product by product."""
    x, weight = codes.long() - zero_point, step.weight.long()
    if isinstance(step, Dense):
        return (x.unsqueeze(-2) * weight).sum(-1)
    assert isinstance(step, Convolution)
    top, left, bottom, right = step.padding
    padded = F.pad(x, (left, right, top, bottom)).double()
    size = [
        (length - (kernel - 1) * dilation - 1) // stride + 1
        for length, kernel, dilation, stride in zip(
            padded.shape[2:], weight.shape[2:], step.dilation, step.stride, strict=True
        )
    ]
    windows = F.unfold(padded, tuple(weight.shape[2:]), step.dilation, 0, step.stride).long()
    windows = windows.unflatten(1, (step.groups, 1, -1))
    products = windows * weight.flatten(1).unflatten(0, (step.groups, -1)).unsqueeze(-1)
    return products.sum(3).flatten(1, 2).unflatten(2, size)


def _extreme(*shape: int) -> Tensor:
    """Codes of which most are extreme."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 300).clamp(-127, 127).to(torch.int8)


def _images(seed: int) -> Tensor:
    return torch.randn(2, 3, 12, 11, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
def test_sums_of_random_layers_are_those_of_integers(seed: int) -> None:
    program = random_program(seed, pieces=("convolution", "depthwise"), length=8)
    values = Simulation(program).values(_images(seed), [step.inputs[0] for step in program.layers()])
    for step in program.layers():
        grid, codes = program.grids[step.inputs[0]], values[step.inputs[0]]
        assert torch.equal(ExactSums(step, grid)(codes), _whole_sums(step, codes, grid.zero_point).double())


@pytest.mark.parametrize(("channels", "groups", "parts"), [(40, 1, 1), (400, 1, 2), (1200, 3, 2)])
def test_sums_beyond_float32_are_split_into_parts(channels: int, groups: int, parts: int) -> None:
    step = _convolution(_extreme(3, channels // groups, 3, 3), groups=groups, padding=(1, 0, 2, 1))
    sums = ExactSums(step, FULL)
    codes = torch.where(torch.rand(2, channels, 5, 4) < 0.5, 0.0, 255.0)
    assert len(sums.parts) >= parts and (largest_sum(step, FULL) > FLOAT32_WHOLE) == (parts > 1)
    assert torch.equal(sums(codes), _whole_sums(step, codes, FULL.zero_point).double())


def test_one_float32_sum_of_a_split_layer_would_be_wrong() -> None:
    step = _convolution(torch.full((1, 900, 3, 3), 127, dtype=torch.int8))
    codes = torch.full((1, 900, 3, 3), 254.0)
    codes[0, 0, 0, 0] = 253.0
    exact = 900 * 9 * 127 * 154 - 127
    assert ExactSums(step, FULL)(codes).item() == exact
    assert F.conv2d(codes - FULL.zero_point, step.weight.float()).item() != exact


def test_sums_of_a_channel_beyond_float32_are_float64() -> None:
    step = _convolution(_extreme(2, 1, 40, 40))
    sums = ExactSums(step, FULL)
    codes = torch.where(torch.rand(2, 1, 41, 40) < 0.5, 0.0, 255.0)
    assert sums.parts == []
    assert torch.equal(sums(codes), _whole_sums(step, codes, FULL.zero_point).double())


def test_sums_of_dense_layers_on_any_axes() -> None:
    fields = {"weight_scale": torch.ones(7), "bias": torch.zeros(7, dtype=torch.int32), "weight_bits": 8}
    step = Dense(inputs=("x",), output="y", weight=_extreme(7, 2000), **fields)  # type: ignore[arg-type]
    codes = torch.randint(0, 256, (2, 3, 2000)).float()
    sums = ExactSums(step, FULL)
    assert len(sums.parts) > 1
    assert torch.equal(sums(codes), _whole_sums(step, codes, FULL.zero_point).double())


def test_a_sum_beyond_int32_is_rejected() -> None:
    step = _convolution(_extreme(2, 3, 3, 3), bias=torch.tensor([0, 2**31 - 5], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"must stay within int32, but `conv` can reach \d+: use larger scales"):
        ExactSums(step, FULL)


@pytest.mark.parametrize("piece", PIECES)
def test_every_value_has_its_shape_grid_and_limits(piece: str) -> None:
    program = random_program(3, pieces=(piece,), length=3, act_bits=5)
    outputs = [step.output for step in program.steps]
    images = _images(5)
    simulation = Simulation(program)
    values = simulation.values(images, [program.image, *outputs])
    assert torch.equal(values[program.image], images) and len(values) == len(outputs) + 1
    for step in program.steps:
        value = values[step.output]
        assert value.dtype == torch.float32 and tuple(value.shape[1:]) == program.shapes[step.output]
        if step.output in program.grids:
            grid = program.grids[step.output]
            low, high = (step.low, step.high) if isinstance(step, Limited) else (0, grid.quant_max)
            assert torch.equal(value, value.round()) and low <= int(value.min()) <= int(value.max()) <= high
    assert torch.equal(simulation(images), values[program.logits])
    assert torch.equal(simulation(images[:1]), values[program.logits][:1])


def test_movements_of_codes() -> None:
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    names = {"inputs": ("x",), "output": "y"}
    pool = MaxPool(**names, kernel=(2, 2), stride=(2, 2), padding=(1, 0, 0, 0), dilation=(1, 1))  # type: ignore[arg-type]
    assert moved(pool, x, FULL).flatten().tolist() == [1.0, 3.0, 9.0, 11.0]
    assert moved(pool, -1 - x, None).flatten().tolist() == [-1.0, -3.0, -5.0, -7.0]
    pad = Pad(**names, before=(0, 1, 0, 0), after=(0, 0, 0, 1))  # type: ignore[arg-type]
    padded = moved(pad, x, FULL)
    assert padded.shape == (1, 2, 3, 5) and padded[0, 0].eq(100).all() and padded[0, 1, :, 4].eq(100).all()
    assert torch.equal(padded[:, 1:, :, :4], x) and moved(pad, x, None)[0, 0].eq(0).all()
    assert moved(Slice(**names, axis=3, start=1, stop=4, step=2), x, FULL)[0, 0, 0].tolist() == [1.0, 3.0]  # type: ignore[arg-type]


def test_no_value_outlives_its_last_reader() -> None:
    """The values that the frame still holds when a step runs are those that this or a later step reads."""
    builder = ProgramBuilder((1, 4, 4), 0, weight_bits=8, act_bits=8)
    value = builder.quantize()
    for _ in range(6):
        value = builder.sum(value, builder.convolution(value, 1))
    program = builder.build(builder.dense(builder.flatten(value), 2, floats=True))
    held: list[int] = []

    class Watching(Simulation):
        def _run(self, number, step, inputs):  # type: ignore[no-untyped-def]
            import sys

            held.append(len(sys._getframe(1).f_locals["values"]))
            return super()._run(number, step, inputs)

    Watching(program)(torch.randn(1, 1, 4, 4))
    assert max(held) <= 2


def test_unknown_targets_and_functions_of_floats_are_rejected() -> None:
    program = random_program(0)
    with pytest.raises(ValueError, match=r"`target` must be one of .*onnxruntime.*, but got abacus"):
        Simulation(replace(program, target="abacus"))
    builder = ProgramBuilder((1, 4, 4), 0, weight_bits=8, act_bits=8)
    value = builder.elementwise(builder.dequantize(builder.quantize()), "relu")
    with pytest.raises(ValueError, match=r"the input of a function must hold codes, but `v1` of `layer.v2` holds"):
        Simulation(builder.build(value), OnnxRuntimeArithmetic(builder.build(value)))


def test_a_simulation_is_unchanged_by_autocast_and_needs_no_gradients() -> None:
    program = random_program(1)
    images = _images(2).requires_grad_()
    simulation = Simulation(program)
    plain = simulation(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(simulation(images), plain)
    assert not plain.requires_grad and not simulation.state_dict()
