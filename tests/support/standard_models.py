"""Compare a standard ONNX file in ONNX Runtime with the simulation of its program. Import it after
`pytest.importorskip("onnx")`.
"""

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from support.program_builder import ProgramBuilder
from synq.common.processor import VNNI_FLAGS, processor_flags
from synq.engines.program import Program
from synq.engines.simulation import Simulation
from synq.export.standard_onnx import LOGITS, standard_onnx

ALL = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
EXTENDED = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED


def differing(
    program: Program,
    images: Tensor,
    *,
    level: onnxruntime.GraphOptimizationLevel = ALL,
    intermediate: bool = True,
    pack_two_bits: bool = False,
) -> dict[str, int]:
    """Numbers of elements that differ in any bit between ONNX Runtime and the simulation, by value; none at all if all
    are equal.

    Args:
        program: A program for onnxruntime.
        images: (N, C, H, W).
        level: Optimization level.
        intermediate: Whether every value of codes is compared, as an output of the graph, or the logits only, in the
            graph as it is.
        pack_two_bits: See `standard_onnx`.
    """
    model = standard_onnx(program, pack_two_bits=pack_two_bits)
    made = {output for node in model.graph.node for output in node.output}
    names = [step.output for step in program.steps if step.output in program.grids and step.output in made]
    if not intermediate:
        names = []
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not has_vnni():  # sums of two products saturate in 16 bits there, unless the weights are made UINT8
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": images.numpy()})
    assert session.get_outputs()[0].name == LOGITS
    expected = Simulation(program).values(images, [program.logits, *names])
    found = {}
    for name, output in zip([program.logits, *names], outputs, strict=True):
        value = torch.from_numpy(np.asarray(output, np.float32))
        if name != program.logits and value.ndim == 4:  # without the channels that fill whole blocks
            value = value[:, : expected[name].shape[1]]
        assert value.shape == expected[name].shape, name
        if not torch.equal(value, expected[name]):
            found[name] = int((value != expected[name]).sum())
    return found


def has_vnni() -> bool:
    """Whether the processor adds four products of 8 bits in 32 bits, without saturation in between."""
    return bool(processor_flags() & VNNI_FLAGS)


def resnet_program(weight_bits: int, act_bits: int, seed: int = 0, width: int = 8, size: int = 32) -> Program:
    """A program in the shape of ResNet-18: a stem with a maximum pool, four stages of two blocks, a head."""
    builder = ProgramBuilder((3, size, size), seed, weight_bits=weight_bits, act_bits=act_bits)
    value = builder.quantize(bits=8)
    value = builder.max_pool(builder.convolution(value, width, (7, 7), stride=(2, 2)))
    for stage in range(4):
        channels = width * 2**stage
        for stride in (2 if stage else 1, 1):
            branch = builder.convolution(value, channels, stride=(stride, stride))
            branch = builder.convolution(branch, channels)
            if builder.shape(value) != builder.shape(branch):
                value = builder.convolution(value, channels, (1, 1), stride=(stride, stride))
            value = builder.sum(branch, value)
    return builder.build(builder.dense(builder.flatten(builder.global_average_pool(value)), 10, floats=True))
