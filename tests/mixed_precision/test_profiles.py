"""Profiles of whole files by their engines, and which engine has a latency at all."""

import pytest

from support.mobile_nets import lowered
from support.program_builder import ProgramBuilder
from synq.config.quant import QuantConfig
from synq.engines.program import Program
from synq.export.targets.formats import FORMATS
from synq.mixed_precision.latency import latency_format
from synq.mixed_precision.profiles import OTHER, Profile, layer_profile


def profiled(target: str) -> tuple[Profile, Program]:
    """Of a network whose convolutions take microseconds: what takes less is 0 in the clock of an engine."""
    builder = ProgramBuilder((3, 96, 96), 0, weight_bits=8, act_bits=8)
    value = builder.quantize(bits=8)
    for _ in range(3):
        value = builder.convolution(value, 16)
    floats = target == "openvino"
    logits = builder.dense(builder.flatten(builder.global_average_pool(value)), 5, floats=floats)
    program = builder.build(logits if floats else builder.dequantize(logits), target)
    return layer_profile(FORMATS[target].write(program), program, FORMATS[target], rounds=3), program


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the engine's own imports
@pytest.mark.parametrize(
    ("target", "package", "source"), [("openvino", "openvino", "PERF_COUNT"), ("executorch", "executorch", "ETDump")]
)
def test_every_layer_has_a_time(target: str, package: str, source: str) -> None:
    pytest.importorskip(package)
    found, program = profiled(target)
    layers = [step.layer for step in program.layers()]
    assert list(found.milliseconds) == [*layers, OTHER]
    assert all(time >= 0 for time in found.milliseconds.values()) and source in found.note
    assert sum(found.milliseconds[name] > 0 for name in layers) > len(layers) / 2, "the convolutions have times"
    [line] = found.lines()
    assert line.startswith(f"profile of {FORMATS[target].engine} ({source}): {len(layers)} layers take ")


def test_an_engine_without_a_profiler_says_so() -> None:
    pytest.importorskip("flatbuffers")
    program, _ = lowered("flattened", "litert")
    found = layer_profile(b"", program, FORMATS["litert"])
    assert found.milliseconds == {}
    assert found.lines() == [
        "LiteRT: the Python package has no profiler of operators; its steps are timed as separate files only"
    ]


@pytest.mark.parametrize("target", ["research", "tensorrt", "qnn"])
def test_an_engine_that_does_not_run_here_has_no_latency(target: str) -> None:
    quant = QuantConfig(target=target, weight_bits=8, act_bits=8)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=f"`latency-budget` must have an engine to be measured in, .* is {target}: set"
    ):
        latency_format(quant)
