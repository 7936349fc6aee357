"""Integer weights and biases with a batch norm folded in, and programs that are rejected as inconsistent."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from synq.engines.aten.folding import folded
from synq.engines.checks import validate
from synq.engines.program import Dense, Grid, Program, Quantize, Reshape

SOURCE, OUTPUT = Grid(scale=0.03, zero_point=3, quant_max=255), Grid(scale=0.05, zero_point=128, quant_max=255)


def dense(weight: Tensor, scale: Tensor) -> Dense:
    bias = torch.zeros(len(weight), dtype=torch.int32)
    made = {"weight": weight.to(torch.int8), "weight_scale": scale, "bias": bias, "weight_bits": 8}
    return Dense(inputs=("x",), output="y", layer="fc", **made)  # type: ignore[arg-type]


def test_factors_change_signs_and_scales() -> None:
    torch.manual_seed(0)
    codes, scale = torch.randint(-127, 128, (64, 9)).double(), torch.rand(64) * 0.01 + 0.001
    factor, offset = torch.randn(64, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    made = folded(dense(codes, scale), factor, offset, SOURCE, OUTPUT)
    assert torch.equal(made["weight"].double(), codes * factor.sign()[:, None])
    assert torch.equal(made["weight_scale"], (scale.double() * factor.abs()).float())
    step = (torch.tensor(SOURCE.scale, dtype=torch.float32) * made["weight_scale"]).double()
    assert bool(((made["bias"] * step - offset).abs() <= step / 2 * (1 + 1e-12)).all())


@pytest.mark.parametrize("factor", [0.0, 1e-12, -1e-9])
def test_channels_of_nearly_zero_weights_keep_their_bias(factor: float) -> None:
    codes = torch.full((2, 9), 100)
    factors, offset = torch.tensor([factor, 1.0]).double(), torch.tensor([-2.5, 0.0]).double()
    made = folded(dense(codes, torch.full((2,), 1e-8)), factors, offset, SOURCE, OUTPUT)
    step = (torch.tensor(SOURCE.scale, dtype=torch.float32) * made["weight_scale"]).double()
    assert float(made["bias"][0] * step[0]) == pytest.approx(-2.5, rel=1e-6)
    assert abs(int(made["bias"][0])) <= 2**30
    kept = made["weight"][0].double() * made["weight_scale"][0].double()
    exact = 100 * 1e-8 * factor
    assert float((kept - exact).abs().max()) * 255 * 9 * SOURCE.scale < 1e-3 * OUTPUT.scale
    assert bool((SOURCE.scale * made["weight_scale"] / OUTPUT.scale >= 2.0**-30).all()), (
        "XNNPACK takes none below 2^-32"
    )


def test_sums_beyond_32_bits_are_rejected() -> None:
    layer = dense(torch.full((1, 70_000), 127), torch.ones(1))
    with pytest.raises(ValueError, match="layer 'fc' must add up to less than 2\\^31"):
        folded(layer, torch.ones(1).double(), torch.zeros(1).double(), SOURCE, OUTPUT)


def program(**changes: Any) -> Program:
    """Return a consistent program: images, flattened, and a linear layer; with changed fields."""
    layer = replace(dense(torch.ones(2, 12), torch.ones(2)), inputs=("r",))
    steps = (Quantize(inputs=("i",), output="q"), Reshape(inputs=("q",), output="r", shape=(12,)), layer)
    made = Program(
        target="onnxruntime",
        image="i",
        logits="y",
        steps=steps,
        grids={"q": SOURCE, "r": SOURCE},
        shapes={"i": (3, 2, 2), "q": (3, 2, 2), "r": (12,), "y": (2,)},
    )
    return replace(made, **changes)


def test_consistent_programs_pass() -> None:
    validate(program())


def _with_layer(**changes: Any) -> dict[str, Any]:
    steps = program().steps
    return {"steps": (*steps[:-1], replace(steps[-1], **changes))}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"steps": program().steps[1:]}, "made before, but 'q' was not"),
        ({"steps": (*program().steps, program().steps[1])}, "no other step makes"),
        ({"grids": {"q": SOURCE, "r": OUTPUT}}, "keep the grid"),
        ({"grids": {"q": replace(SOURCE, zero_point=300), "r": SOURCE}}, "codes within 0..255"),
        ({"grids": {"q": SOURCE, "r": SOURCE, "y": OUTPUT}, **_with_layer(high=300)}, "limits within 0..255"),
        ({"grids": {"q": SOURCE, "r": SOURCE, "y": OUTPUT}}, "logits must be made in floats"),
        ({"shapes": {"i": (3, 2, 2), "q": (3, 2, 2), "y": (2,)}}, "shape of positive numbers"),
        ({"logits": "r"}, "logits must be made in floats"),
        (_with_layer(weight=torch.ones(2, 11, dtype=torch.int8)), "fits its input"),
        (_with_layer(weight_bits=2, weight=torch.full((2, 12), 2, dtype=torch.int8)), "codes within"),
        (_with_layer(weight_scale=torch.zeros(2)), "scale above 0"),
        (_with_layer(bias=torch.full((2,), 2**31 - 1, dtype=torch.int32)), "less than 2\\^31"),
    ],
)
def test_inconsistent_programs_are_rejected(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        validate(program(**changes))
