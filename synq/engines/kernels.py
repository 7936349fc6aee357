"""Steps for which an engine has no integer kernel that computes what was measured, found before anything is trained.

ONNX Runtime and OpenVINO have a form for every step of a program. LiteRT (2.3) and ExecuTorch (1.5) do not, and files
for TensorRT and QNN have no tables of codes:

    LiteRT        linear layers on more than 3 axes; products of values with different numbers of axes; dilated maximum
                  pools; average pools that leave out a padding other than SAME
    ExecuTorch    average pools that leave out their padding; maximum pools with an uneven padding, or one above half
                  their window; functions that XNNPACK does not have
    TensorRT, QNN functions that are no operation of ONNX of which the engine documents a kernel
"""

from synq.engines.program import AveragePool, Dense, Elementwise, MaxPool, Product, Program, Step
from synq.engines.windows import same_padding

EXECUTORCH_FUNCTIONS = frozenset(
    {
        *("identity", "affine", "relu", "relu6", "leaky_relu", "sigmoid", "hardsigmoid", "hardswish", "silu", "gelu"),
        "tanh",
    }
)
"""Functions of single values that ExecuTorch's XNNPACK backend computes."""
STANDARD_FUNCTIONS = {
    "tensorrt": frozenset(
        ("identity", "affine", "leaky_relu", "sigmoid", "hardsigmoid", "hardswish", "silu", "gelu", "gelu_tanh", "tanh")
    ),
    "qnn": frozenset(
        ("identity", "affine", "leaky_relu", "sigmoid", "hardsigmoid", "hardswish", "silu", "gelu", "tanh")
    ),
}
"""Functions of single values that files for engines which are not run here may have: operations of ONNX that the
documents of the engine list."""


def stored_weight_bits(target: str, bits: int) -> int:
    """Return the bits that a weight takes in the file of an engine: half a byte in ONNX up to 4, else a byte.

    Args:
        target: Name of the engine.
        bits: Bit-width, 2 to 8.
    """
    return 4 if target in ("onnxruntime", "openvino", "qnn") and bits <= 4 else 8


def check_kernels(program: Program) -> None:
    """Check that the engine of a program has a kernel for each of its steps. No rule depends on a range.

    Raises:
        ValueError: If it has none; the message names all such layers.
    """
    found = steps_without_kernel(program)
    lines = list(
        dict.fromkeys(
            f"`{step.layer or step.output}` is {found[step.output]}" for step in program.steps if step.output in found
        )
    )
    if lines:
        raise ValueError(unsupported(program.target, "; ".join(lines)))


def steps_without_kernel(program: Program) -> dict[str, str]:
    """Return what each step is that the engine has no kernel for, and the cure, by the output of the step."""
    find = {
        "litert": _without_litert_kernel,
        "executorch": _without_executorch_kernel,
        "tensorrt": _without_standard_kernel,
        "qnn": _without_standard_kernel,
    }.get(program.target)
    found = {} if find is None else {step.output: find(program, step) for step in program.steps}
    return {output: reason for output, reason in found.items() if reason}


def unsupported(target: str, found: str) -> str:
    """Return the message of a rejection.

    Args:
        target: Name of the engine.
        found: Which layer is what, and what can be done.
    """
    return (
        f"`quant.target` {target} must have an integer kernel for every operation, but {found}; or use another target: "
        "onnxruntime has a form for each, research exports any network"
    )


def _without_litert_kernel(program: Program, step: Step) -> str:
    """Return what a step is that LiteRT has no kernel for, and the cure; "" for any other step."""
    if isinstance(step, Dense) and len(program.shapes[step.output]) > 2:
        axes = len(program.shapes[step.output]) + 1
        return f"a linear layer on {axes} axes: reshape its input to (N, positions, features)"
    if isinstance(step, Product) and len({len(program.shapes[value]) for value in step.inputs}) > 1:
        return "a product of values with different numbers of axes: give both as many"
    if isinstance(step, MaxPool) and step.dilation != (1, 1):
        return "a maximum pool with dilation: replace it"
    if isinstance(step, AveragePool) and any(step.padding) and not step.count_padding:
        _, height, width = program.shapes[step.inputs[0]]
        if same_padding((height, width), step.kernel, step.stride, (1, 1)) != step.padding:
            return f"an average pool that leaves out the padding {step.padding}: set count_include_pad=True"
    return ""


def _without_executorch_kernel(program: Program, step: Step) -> str:
    """Return what a step is that ExecuTorch has no kernel for, and the cure; "" for any other step."""
    if isinstance(step, Elementwise) and step.function not in EXECUTORCH_FUNCTIONS:
        return f"the function {step.function}: use one of {', '.join(sorted(EXECUTORCH_FUNCTIONS))}"
    if isinstance(step, MaxPool):
        top, left, bottom, right = step.padding
        if (top, left) != (bottom, right) or 2 * top > step.kernel[0] or 2 * left > step.kernel[1]:
            return f"a maximum pool with the padding {step.padding}: pad evenly, at most half of the window"
    if isinstance(step, AveragePool) and any(step.padding) and not step.count_padding:
        return "an average pool that leaves out its padding: set count_include_pad=True"
    return ""


def _without_standard_kernel(program: Program, step: Step) -> str:
    """Return what a step is that TensorRT or QNN documents no kernel for, and the cure; "" for any other step."""
    known = STANDARD_FUNCTIONS[program.target]
    if isinstance(step, Elementwise) and step.function not in known:
        return f"the function {step.function}: use one of {', '.join(sorted(known))}"
    if program.target == "qnn" and isinstance(step, Elementwise) and step.function == "affine":
        factor, offset = step.arguments.get("factor", 1.0), step.arguments.get("offset", 0.0)
        if factor != 1.0 and offset != 0.0:
            return "a product with a constant and a sum with another: quantize in between, or fold them into a layer"
    return ""
