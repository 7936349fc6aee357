"""Channels of zeros for depthwise convolutions: where they are added, and that no bit of a logit changes."""

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from support.mobile_nets import NETS, lowered
from support.program_builder import ProgramBuilder
from support.standard_models import ALL, EXTENDED, differing
from synq.engines.program import Program
from synq.engines.simulation import Simulation
from synq.export.qdq.padded_channels import with_whole_blocks

IMAGES = torch.randn(3, 3, 12, 11, generator=torch.Generator().manual_seed(5))


def _inverted(channels: int, *, gate: bool, shared: bool = False) -> tuple[Program, dict[str, str]]:
    """Expansion, depthwise convolution, a gate of squeeze and excitation, projection; all values, by their roles."""
    builder = ProgramBuilder((3, 12, 11), channels, weight_bits=8, act_bits=8)
    image = builder.quantize(bits=8)
    wide = builder.convolution(image, channels, (1, 1))
    swished = builder.elementwise(wide, "hardswish")
    depthwise = builder.convolution(swished, channels, groups=channels)
    value = depthwise
    if gate:
        squeezed = builder.convolution(builder.global_average_pool(value), 4, (1, 1))
        value = builder.product(value, builder.elementwise(builder.convolution(squeezed, channels, (1, 1)), "sigmoid"))
    if shared:
        value = builder.concatenation([value, wide])
    projected = builder.convolution(value, 6, (1, 1))
    logits = builder.dense(builder.flatten(builder.global_average_pool(projected)), 5, floats=True)
    roles = {"wide": wide, "swished": swished, "depthwise": depthwise, "value": value, "projected": projected}
    return builder.build(logits), roles


@pytest.mark.parametrize(("channels", "padded"), [(14, 16), (30, 32), (16, 16), (12, 12), (20, 20), (26, 32)])
@pytest.mark.parametrize("gate", [False, True])
def test_blocks_are_filled_and_no_bit_changes(channels: int, padded: int, gate: bool) -> None:
    program, roles = _inverted(channels, gate=gate)
    whole = with_whole_blocks(program)
    assert {whole.shapes[roles[role]][0] for role in ("wide", "swished", "depthwise", "value")} == {padded}
    assert whole.shapes[roles["projected"]] == program.shapes[roles["projected"]]
    assert (whole is program) == (padded == channels)
    assert torch.equal(Simulation(whole)(IMAGES), Simulation(program)(IMAGES))
    for level in (ALL, EXTENDED):
        assert not differing(program, IMAGES, intermediate=False, level=level)


def test_values_that_are_concatenated_keep_their_channels() -> None:
    program, _ = _inverted(14, gate=True, shared=True)
    assert with_whole_blocks(program) is program


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bits", [8, 4])
def test_whole_networks_keep_every_bit(name: str, bits: int) -> None:
    program, images = lowered(name, "onnxruntime", weight_bits=bits, act_bits=bits)
    assert torch.equal(Simulation(with_whole_blocks(program))(images), Simulation(program)(images))
