"""What a student computes where it is deployed: its integer form, or the simulation of its engine."""

import copy

from torch import fx, nn

from synq.config.quant import RESEARCH, QuantConfig
from synq.engines.lowering import lower, survey
from synq.engines.program import Program
from synq.engines.simulation import Simulation
from synq.quant.integer_form import integer_form
from synq.quant.layers import PORTABLE_LIMIT, ActQuantizer

FULL_CODE = 127
"""Largest weight code of INT8."""


def program_of(net: fx.GraphModule, quant: QuantConfig, input_size: tuple[int, int, int]) -> Program:
    """Return the integer program of a student for an engine.

    Args:
        net: Network of a student that was built with ``quant``, with observed ranges.
        quant: With a target that is an engine.
        input_size: (C, H, W) of one image.

    Raises:
        ValueError: As `lower`.
    """
    return lower(net, quant.target, input_size, largest_code=_largest_code(quant))


def deployed_network(net: fx.GraphModule, quant: QuantConfig, input_size: tuple[int, int, int]) -> nn.Module:
    """Return the network that is measured and exported in place of a student, on the CPU: it needs no float sums.

    Args:
        net: Network of a student that was built with ``quant``, with observed ranges.
        quant: Its quantization.
        input_size: (C, H, W) of one image.

    Returns:
        (N, C, H, W) -> logits (N, K): under target research the integer form, else the engine's arithmetic.

    Raises:
        ValueError: As `lower`.
    """
    if quant.target == RESEARCH:
        return integer_form(net)
    return Simulation(program_of(net, quant, input_size))


def check_deployable(net: fx.GraphModule, quant: QuantConfig, input_size: tuple[int, int, int]) -> None:
    """Check that every operation of a student has a form in its engine, before images are made and weights trained.

    No form depends on a range, so that all are taken to be [-1, 1] here.

    Args:
        net: Network of a student that was built with ``quant``; it is not modified.
        quant: Its quantization; under target research there is nothing to check.
        input_size: (C, H, W) of one image.

    Raises:
        ValueError: As `lower`.
    """
    if quant.target != RESEARCH:
        program_of_any_range(net, quant, input_size)


def program_of_any_range(net: fx.GraphModule, quant: QuantConfig, input_size: tuple[int, int, int]) -> Program:
    """Return the integer program of a student without observed ranges: all are taken to be [-1, 1].

    Args:
        net: Network of a student that was built with ``quant``; it is not modified.
        quant: With a target that is an engine.
        input_size: (C, H, W) of one image.

    Raises:
        ValueError: As `lower`.
    """
    return program_of(_ranged(net), quant, input_size)


def surveyed_program(net: fx.GraphModule, quant: QuantConfig, input_size: tuple[int, int, int]) -> tuple[Program, str]:
    """Return the steps of a student in its engine, also those without a form, as `Rejected`.

    Ranges are all taken to be [-1, 1].

    Args:
        net: Network of a student that was built with ``quant``; it is not modified.
        quant: With a target that is an engine.
        input_size: (C, H, W) of one image.

    Returns:
        The program, and why it ends before the logits; "" if it does not.
    """
    return survey(_ranged(net), quant.target, input_size, largest_code=_largest_code(quant))


def _ranged(net: fx.GraphModule) -> fx.GraphModule:
    ranged = copy.deepcopy(net)
    for module in ranged.modules():
        if isinstance(module, ActQuantizer):
            module.set_range(-1.0, 1.0)
    return ranged


def _largest_code(quant: QuantConfig) -> int:
    return PORTABLE_LIMIT if quant.portable else FULL_CODE
