"""Programs of one step whose results lie within a float32 rounding of a half, where the order of roundings decides.

Random programs meet such a half once in a million codes: a wrong rule passes thousands of random tests.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from synq.engines.program import (
    Convolution,
    Dequantize,
    Elementwise,
    GlobalAveragePool,
    Grid,
    Product,
    Program,
    Quantize,
    Step,
)

STEPS = ("global_pool", "convolution", "product", "moved")
SIZE = (2, 4, 3)
BITS_OF_FLOAT = 24


@dataclass(frozen=True, kw_only=True)
class NearTie:
    """A program and images (1, 2, 4, 3) whose first channel has one value everywhere, and the second another."""

    program: Program
    images: Tensor


def near_tie(step: str, seed: int, target: str) -> NearTie:
    """Return a program of one step, one of `STEPS`, whose result is near a half for its images.

    The scale of the output is that at which the result is a half, off by less than two units of the last place.
    """
    rng = random.Random(f"{step} {seed}")
    own_scale = _float32(rng.uniform(0.002, 0.01))
    own = Grid(scale=own_scale, zero_point=rng.randrange(60, 120), quant_max=255)
    first, second = rng.randrange(own.zero_point + 5, 240), rng.randrange(own.zero_point + 5, 240)
    weight, weight_scale = rng.randrange(20, 127), _float32(rng.uniform(0.002, 0.01))
    extra = rng.randrange(12) if step == "global_pool" else 0
    values = [first - own.zero_point, second - own.zero_point]
    real = {
        "global_pool": (12 * values[0] + extra) * own_scale / 12,
        "convolution": values[0] * weight * own_scale * weight_scale,
        "product": values[0] * values[0] * own_scale * own_scale,
        "moved": values[0] * own_scale,
    }[step]
    half = rng.randrange(5, 110) + 0.5
    scale = _float32(real / half * (1 + rng.uniform(-2, 2) * 2.0**-BITS_OF_FLOAT))
    grid = Grid(scale=scale, zero_point=rng.randrange(0, 140), quant_max=255)
    images = torch.tensor(values, dtype=torch.float32).reshape(1, 2, 1, 1).expand(1, *SIZE).clone()
    images[0, 0].view(-1)[:extra] += 1
    shape = {"global_pool": (2, 1, 1)}.get(step, SIZE)
    made = _step(step, weight, weight_scale)
    steps: tuple[Step, ...] = (
        Quantize(inputs=("images",), output="x", layer="x"),
        made,
        Dequantize(inputs=("y",), output="logits", layer="logits"),
    )
    program = Program(
        target=target,
        image="images",
        logits="logits",
        steps=steps,
        grids={"x": own, "y": grid},
        shapes={"images": SIZE, "x": SIZE, "y": shape, "logits": shape},
    )
    return NearTie(program=program, images=images * own_scale)


def _step(name: str, weight: int, weight_scale: float) -> Step:
    if name == "global_pool":
        return GlobalAveragePool(inputs=("x",), output="y", layer="y")
    if name == "product":
        return Product(inputs=("x", "x"), output="y", layer="y")
    if name == "moved":
        return Elementwise(inputs=("x",), output="y", layer="y", function="identity")
    return Convolution(
        inputs=("x",),
        output="y",
        layer="y",
        weight=torch.tensor([weight, 0, 0, weight], dtype=torch.int8).reshape(2, 2, 1, 1),
        weight_scale=torch.full((2,), weight_scale),
        bias=torch.zeros(2, dtype=torch.int32),
        weight_bits=8,
        stride=(1, 1),
        padding=(0, 0, 0, 0),
        dilation=(1, 1),
        groups=1,
    )


def _float32(value: float) -> float:
    return float(np.float32(value))
