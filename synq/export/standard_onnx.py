"""Write an integer program as standard ONNX: a float graph between QuantizeLinear and DequantizeLinear (Q/DQ).

    images -> Q -> DQ -> Conv(weight INT8 -> DQ, bias INT32 -> DQ) -> Q -> DQ -> ... -> Gemm(...) -> logits, floats

Engines recognize this form and run integer kernels. What it has to look like (measured with ONNX Runtime 1.32.0 and
OpenVINO 2026.4.1):

- Activations are UINT8, weights INT8 with zero point 0 and one scale per output channel, biases INT32 on the grid
  ``input scale * weight scale``. Anything else runs in float or several times slower.
- Weights of at most 4 bits are INT4 in the file, half the bytes, with a Cast to INT8 that is computed when the file
  is loaded: DequantizeLinear of INT4 itself keeps the layer in float.
- Limits of codes, for activations below 8 bits or folded ReLUs whose zero point is not 0, are a Clip *after*
  QuantizeLinear, on codes; before it, the layer stays in float.
- Depthwise convolutions have a multiple of 16 channels: for ONNX Runtime, others get channels of zeros.
- A convolution of an image with a stride reads blocks of pixels as channels: for ONNX Runtime.
- MaxPool, Reshape and other movements are between DequantizeLinear and QuantizeLinear of one grid, Pad is on codes.

Files for TensorRT and QNN have the forms of their published rules (`synq.export.conformance`) instead: no operation on
codes, INT8 and float biases for the one, a batch of 1 for the other.

The graph computes the program in the order of its steps; `OnnxRuntimeArithmetic` is what ONNX Runtime makes of it.
"""

import onnx
from onnx import TensorProto, helper

from synq.engines.image_blocks import with_image_blocks
from synq.engines.program import Program
from synq.engines.simulation import ARITHMETICS
from synq.export.qdq.graph import FORMS, QdqForm, QuantizedGraph
from synq.export.qdq.padded_channels import with_whole_blocks
from synq.export.qdq.steps import write_step
from synq.export.verify import IMAGES

LOGITS = "logits"
"""Name of the output of the model, (N, K)."""


def standard_onnx(program: Program, *, pack_two_bits: bool = False) -> onnx.ModelProto:
    """Return a program as an ONNX model, validated by ``onnx.checker``.

    Args:
        program: The program.
        pack_two_bits: Store weights of 2 bits in a quarter of a byte; INT4, half a byte, is the standard type.

    Returns:
        A model ``images`` float32 (N, C, H, W) -> ``logits`` float32 (N, K), with a dynamic N (1 for QNN) and the
        lowest operator set that has its operations and types (21 with INT4).

    Raises:
        ValueError: If a function has no nodes.
    """
    return onnx_with_owners(program, pack_two_bits=pack_two_bits)[0]


def onnx_with_owners(program: Program, *, pack_two_bits: bool = False) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return a program as an ONNX model, and the step that each of its nodes was written for.

    Args:
        program: As for `standard_onnx`; so is the other argument.
        pack_two_bits: See there.

    Returns:
        The model, and the output of the step by the name of the node; a node of a step that was added here belongs to
        the next one of the program.

    Raises:
        ValueError: If a function has no nodes.
    """
    given = set(program.shapes)
    if program.target == "onnxruntime":
        program = with_image_blocks(with_whole_blocks(program))
    owners: dict[str, str] = {}
    arithmetic = ARITHMETICS[program.target](program)
    form = FORMS.get(program.target, QdqForm())
    graph = QuantizedGraph({program.image: IMAGES, program.logits: LOGITS}, program.grids, form)
    owned = 0
    for step in program.steps:
        rows = program.shapes[step.inputs[0]][:-1]
        write_step(graph, step, arithmetic, rows, pack_two_bits=pack_two_bits)
        if step.output in given:
            owners |= {node.name: step.output for node in graph.nodes[owned:]}
            owned = len(graph.nodes)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [form.batch or "N", *program.shapes[value]])
        for name, value in ((IMAGES, program.image), (LOGITS, program.logits))
    ]
    model = graph.model("student", ends[:1], ends[1:])
    onnx.checker.check_model(model, full_check=True)
    return model, owners
