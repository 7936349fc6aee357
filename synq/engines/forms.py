"""The kernel that an engine runs for each step of a program: on integers, in floats or none, and why.

Measured on x86 with AVX-512 VNNI. ONNX Runtime: its optimized graph (`tests/export/test_kernel_forms.py` compares it
with what is listed here). OpenVINO: the precision of each operation in its runtime model. LiteRT and ExecuTorch: the
time of a function, which is that of a table where XNNPACK has made one at load.
"""

from dataclasses import dataclass
from typing import Literal

from synq.engines.float_program import FloatFunction, FloatStep, MatrixProduct
from synq.engines.kernels import steps_without_kernel
from synq.engines.onnxruntime_functions import has_kernel
from synq.engines.program import (
    AveragePool,
    Concatenation,
    Convolution,
    Dense,
    Dequantize,
    Elementwise,
    GlobalAveragePool,
    Layer,
    Limited,
    Movement,
    Product,
    Program,
    Quantize,
    Rejected,
    Step,
    Sum,
)

Runs = Literal["integer", "float", "rejected", "edge"]
"""What a kernel computes with; edge: between the floats of images or logits and codes."""
MEASURED = {
    "onnxruntime": "ONNX Runtime 1.32",
    "openvino": "OpenVINO 2026.4",
    "litert": "LiteRT 2.3",
    "executorch": "ExecuTorch 1.5",
}
"""Engine and version at which the forms were measured, by target."""
INTEGER_FUNCTIONS = frozenset({"sigmoid", "leaky_relu"})
"""Functions that ONNX Runtime replaces by kernels on codes, QLinearSigmoid and QLinearLeakyRelu."""
LIMITS = frozenset({"identity", "relu", "relu6"})
"""Functions that only limit codes where input and output have one grid."""
LITERT_TABLES = frozenset(
    {
        *("identity", "relu", "relu6", "leaky_relu", "elu", "gelu", "gelu_tanh", "sigmoid", "tanh", "hardswish"),
        *("hardsigmoid", "affine"),
    }
)
"""Functions of which XNNPACK makes a table when LiteRT loads a file."""
EXECUTORCH_FLOATS = frozenset({"silu", "hardsigmoid", "affine"})
"""Functions of several operators, which ExecuTorch computes in floats; of a single one XNNPACK makes a table."""
TRUNK = "residual sums, LayerNorm, softmax and functions such as GELU stay in floats"
"""Why a step on floats is."""
_KERNELS: dict[type[Step], str] = {
    Dense: "integer matrix product",
    Sum: "integer sum",
    Product: "integer product",
    Concatenation: "integer concatenation",
    GlobalAveragePool: "integer pool",
    AveragePool: "integer pool",
}


@dataclass(frozen=True, kw_only=True)
class KernelForm:
    """The kernel of one step.

    Attributes:
        name: Its kind: integer convolution, integer sum, table, float island, codes moved and so on.
        runs: What it computes with.
        reason: Why it is in floats or rejected, or what costs time; one sentence, or "".
    """

    name: str
    runs: Runs
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class StepForm:
    """One step of a program with its kernel.

    Attributes:
        output: Name of the value that it makes.
        layer: Name of its layer or node.
        operation: Kind of the step, or the function's name.
        form: Its kernel.
        weight_bits: Bit-width of the weight; None without one.
        input_bits, output_bits: Bit-widths of codes that are read (the largest) and made; None for floats.
    """

    output: str
    layer: str
    operation: str
    form: KernelForm
    weight_bits: int | None
    input_bits: int | None
    output_bits: int | None


def step_forms(program: Program) -> list[StepForm]:
    """Return the kernel of each step of a program, in order of execution.

    Args:
        program: Of `lower` or `survey`; no form depends on a range.
    """
    missing, rows = steps_without_kernel(program), []
    for step in program.steps:
        grid, sources = program.grids.get(step.output), [program.grids.get(name) for name in step.inputs]
        form = _form(program, step)
        if step.output in missing:
            form = _rejected(f"{MEASURED[program.target]} has no kernel for {missing[step.output]}")
        rows.append(
            StepForm(
                output=step.output,
                layer=step.layer or step.output,
                operation=_operation(program, step),
                form=form,
                weight_bits=step.weight_bits if isinstance(step, Layer) else None,
                input_bits=max((found.bits for found in sources if found is not None), default=None),
                output_bits=None if grid is None else grid.bits,
            )
        )
    return rows


def _operation(program: Program, step: Step) -> str:
    match step:
        case Elementwise() | FloatFunction():
            return step.function
        case Rejected():
            return step.operator
        case Convolution() if _is_depthwise(program, step):
            return "DepthwiseConvolution"
    return type(step).__name__


def _is_depthwise(program: Program, step: Convolution) -> bool:
    return step.groups > 1 and step.groups == program.shapes[step.inputs[0]][0]


def _rejected(reason: str) -> KernelForm:
    return KernelForm(name="none", runs="rejected", reason=reason)


def _form(program: Program, step: Step) -> KernelForm:
    engine = MEASURED[program.target]
    match step:
        case Rejected():
            return _rejected(f"no integer form of {step.operator}: {step.reason}")
        case Quantize():
            return KernelForm(name="floats to codes", runs="edge")
        case Dequantize():
            return KernelForm(name="codes to floats", runs="edge")
        case Movement() if step.output not in program.grids and _is_on_trunk(program, step):
            return KernelForm(name="floats moved", runs="float", reason=TRUNK)
        case Movement():
            return KernelForm(name="codes moved", runs="integer")
        case MatrixProduct():
            return KernelForm(name="integer product of activations", runs="integer", reason=_clip(program, step))
        case FloatStep():
            return KernelForm(name="float trunk", runs="float", reason=TRUNK)
        case Elementwise():
            return _function(program, step)
        case Concatenation() if program.target == "openvino":
            reason = f"inputs on another grid than the output are moved onto it in floats ({engine})"
            return KernelForm(name="float island", runs="float", reason=reason)
        case AveragePool() if program.target in ("litert", "executorch") and step.count_padding:
            reason = f"a depthwise convolution, faster than the pool's own kernel ({engine})"
            return KernelForm(name="integer pool", runs="integer", reason=reason)
        case Convolution():
            name = "integer depthwise convolution" if _is_depthwise(program, step) else "integer convolution"
            return KernelForm(name=name, runs="integer", reason=_clip(program, step))
        case Sum() if step.unrounded is not None:
            reason = f"fused into the convolution before it, whose result is not rounded ({engine})"
            return KernelForm(name="integer sum", runs="integer", reason=reason)
        case Dense() if step.output not in program.grids:
            reader = "float logits" if step.output == program.logits else "floats of the trunk"
            return KernelForm(name=_KERNELS[Dense], runs="integer", reason=f"its sums become the {reader} at once")
        case Limited() if type(step) in _KERNELS:
            return KernelForm(name=_KERNELS[type(step)], runs="integer", reason=_clip(program, step))
    raise TypeError(f"no kernel is known for {type(step).__name__}")


def _is_on_trunk(program: Program, step: Step) -> bool:
    """Return whether a step is not among those that move logits."""
    return any(isinstance(reader, FloatStep | Quantize) for reader in program.readers(step.output))


def _clip(program: Program, step: Limited) -> str:
    """Return that a second kernel limits the codes of a step; "" if none has to."""
    if step.output not in program.grids:  # fused into a sum, in floats
        return ""
    grid = program.grids[step.output]
    if grid.bits == 8 or program.target == "executorch":
        return ""
    return f"a second kernel limits its codes, which are kept in a byte, to {grid.bits} bits"


def _function(program: Program, step: Elementwise) -> KernelForm:
    engine = MEASURED[program.target]
    island = KernelForm(
        name="float island",
        runs="float",
        reason=f"{engine} has no integer kernel for {step.function}: codes become floats and codes again around it",
    )
    if program.target == "openvino":
        return island
    if program.target == "executorch":
        return island if step.function in EXECUTORCH_FLOATS else KernelForm(name="table", runs="integer")
    slow = KernelForm(
        name="table",
        runs="integer",
        reason=f"looked up with Cast and Gather, several times slower than a float island ({engine})",
    )
    if program.target == "litert":
        if step.function == "silu":
            return island
        return KernelForm(name="table", runs="integer") if step.function in LITERT_TABLES else slow
    if step.function in LIMITS:
        reason = f"limits of codes if both grids are one, else a table with Cast and Gather, which is slow ({engine})"
        return KernelForm(name="table", runs="integer", reason=reason)
    if step.function in INTEGER_FUNCTIONS:
        return KernelForm(name="table", runs="integer")
    return island if has_kernel(step) else slow
