"""Check of a random network as a student for an engine."""

import random

import torch
from torch import Tensor

from support.engine_nets import float_reads
from support.standard_models import has_vnni
from synq.config.quant import BY_RULES, PORTABLE_TARGETS, TARGETS
from synq.config.run import QuantConfig
from synq.engines.deployed import program_of
from synq.engines.simulation import Simulation
from synq.export.targets.formats import FORMATS
from synq.quant.integer_form import codes_of
from synq.quant.layers import QuantConv2d, QuantLinear, quantizers_bypassed
from synq.quant.student import Student, build_student, observe_ranges
from synq.teacher.teacher import Teacher


def engine_student(teacher: Teacher, rng: random.Random, observed: Tensor) -> tuple[Student, str]:
    """Return a student for a random engine with observed ranges, and its settings in one line."""
    target = rng.choice([name for name in TARGETS if name != "research"])
    weight_bits, act_bits, steps = rng.choice((3, 4, 8)), rng.choice((4, 8)), rng.choice(("none", "all"))
    act_bits = 8 if target in BY_RULES else act_bits
    portable = target in PORTABLE_TARGETS and rng.random() < 0.5
    quant = QuantConfig(
        target=target,  # type: ignore[arg-type]
        weight_bits=weight_bits,
        act_bits=act_bits,
        learned_steps=steps,  # type: ignore[arg-type]
        portable=portable,
    )
    student = build_student(teacher, quant)
    observe_ranges(student.net, observed, act_range="minmax", image_range=teacher.pixel_range())
    return student, f"{quant.label} {quant.points}"


def faults_of(student: Student, target: str, images: Tensor, expected: Tensor) -> list[str]:
    """Return what is wrong with a student for an engine.

    Args:
        student: From `engine_student`.
        target: Its engine.
        images: (N, C, H, W).
        expected: The teacher's logits for them.
    """
    faults = [f"{read} is in float" for read in float_reads(student.net, target)]
    with quantizers_bypassed(student.net), torch.no_grad():
        if not torch.equal(student.net(images.clone()), expected):
            faults.append("with its quantizers bypassed it differs from the teacher")
    for name, layer in student.net.named_modules():
        if isinstance(layer, QuantConv2d | QuantLinear) and codes_of(layer).zero_point.any():
            faults.append(f"the weight of {name} is not symmetric")
    return faults


@torch.no_grad()
def file_fault(teacher: Teacher, rng: random.Random, observed: Tensor) -> tuple[str, int]:
    """Export a student for a random engine of those that compute every bit, and compare its file with the simulation.

    Args:
        teacher: The classifier.
        rng: Chooses the engine and the bit-widths.
        observed: (N, C, H, W) the images on which its ranges are observed, and the two are compared.

    Returns:
        What is wrong, "" if nothing is; and the number of files, 0 if the engine has no form for an operation.
    """
    target = rng.choice([name for name in ("onnxruntime", "litert") if not FORMATS[name].missing()])
    # Without VNNI the kernels of full 8-bit weights saturate in 16 bits; the portable form is for such a processor.
    portable = target in PORTABLE_TARGETS and not has_vnni()
    bits = {"weight_bits": rng.choice((4, 8)), "act_bits": rng.choice((4, 8))}
    quant = QuantConfig(target=target, portable=portable, **bits)  # type: ignore[arg-type]
    student = build_student(teacher, quant)
    observe_ranges(student.net, observed, act_range="minmax", image_range=teacher.pixel_range())
    try:
        program = program_of(student.net, quant, teacher.input_size)
    except ValueError as error:  # one line with the layer's name, and the cure
        return ("" if "target" in str(error) else str(error)), 0
    engine = FORMATS[target].open(FORMATS[target].write(program), 1)
    expected, found = Simulation(program)(observed.clone()), engine(observed.clone())
    if torch.equal(found, expected):
        return "", 1
    differ = int((found != expected).sum())
    return f"{quant.label}: {differ} of {expected.numel()} logits of the file differ from the simulation", 1
