"""A growing ONNX graph of quantized values.

A value with a grid exists in two forms: its codes, and the floats that DequantizeLinear makes of them. A float
operation reads the floats and is followed by QuantizeLinear; engines replace such a group by one integer kernel. What
else a file may have is in `QdqForm`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from synq.common.names import unique_name
from synq.engines.program import Grid, Step

CODE_MAX = 255
"""Largest code of a byte, the type of all activations."""
SIGNED_ZERO = 128
"""Code of a program that is 0 in INT8."""
BASE_OPSET = 13
"""The first operator set with one scale per channel."""


@dataclass(frozen=True, kw_only=True)
class QdqForm:
    """The form of Q/DQ that an engine asks for.

    Attributes:
        signed: Whether the codes of activations are INT8, those of the program minus 128; else UINT8.
        computes_codes: Whether operations between QuantizeLinear and DequantizeLinear, such as a Clip, run on integers.
        fuses_limits: Without these, whether the engine folds a float Relu or Clip into the operation before it.
        float_bias: Whether biases are floats and not INT32.
        int4: Whether weights of at most 4 bits are INT4.
        casts_int4: Whether a Cast to INT8 follows them, for engines without kernels for them.
        batch: N of the images; 0 for any.
    """

    signed: bool = False
    computes_codes: bool = True
    fuses_limits: bool = False
    float_bias: bool = False
    int4: bool = True
    casts_int4: bool = True
    batch: int = 0


FORMS = {
    "tensorrt": QdqForm(signed=True, computes_codes=False, fuses_limits=True, float_bias=True, int4=False),
    "qnn": QdqForm(computes_codes=False, casts_int4=False, batch=1),
}
"""Of the targets that need another form than ONNX Runtime and OpenVINO."""


class QuantizedGraph:
    """Nodes and constants of a graph; see the module.

    Args:
        names: Names of values in the graph, where they are not those of the program.
        grids: Of each value that holds codes.
        form: What the engine asks for.
    """

    def __init__(self, names: Mapping[str, str], grids: Mapping[str, Grid], form: QdqForm | None = None) -> None:
        self.grids, self.form = grids, form or QdqForm()
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.opset = BASE_OPSET
        self._names = dict(names)
        self._used = set(names.values())
        self._floats: dict[str, str] = {}
        self._labels: set[str] = set()

    def name(self, value: str) -> str:
        """Return the name of a value of the program: of its codes, or of its floats if it has no grid."""
        if value not in self._names:
            self._names[value] = self.unique(value)
        return self._names[value]

    def rename(self, value: str, codes_of: str) -> None:
        """Let a value of the program have the codes of another value, without a node."""
        self._names[value] = self.name(codes_of)

    def unique(self, name: str) -> str:
        """Return a name that no other value or constant has."""
        return unique_name(name, self._used)

    def node(self, kind: str, inputs: Sequence[str], output: str, label: str, **attributes: Any) -> str:
        """Append a node, named by the label; return its output."""
        name = unique_name(label, self._labels)
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: npt.NDArray[Any] | np.generic) -> str:
        """Add a constant; return its name."""
        name = self.unique(name)
        self.constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name

    def packed_constant(self, name: str, codes: npt.NDArray[np.int8]) -> str:
        """Add an INT4 constant, two codes to a byte, the first in the low bits; return its name."""
        name = self.unique(name)
        flat = codes.flatten()
        flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.int8)])
        content = (flat[0::2] & 15).astype(np.uint8) | ((flat[1::2] & 15).astype(np.uint8) << 4)
        self.constants[name] = helper.make_tensor(name, TensorProto.INT4, codes.shape, content.tobytes(), raw=True)
        self.need_opset(21)
        return name

    def need_opset(self, version: int) -> None:
        """Raise the operator set to the first that has an operation or type."""
        self.opset = max(self.opset, version)

    def scale_and_zero_point(self, value: str) -> tuple[str, str]:
        """Return the names of new constants with the grid of a value."""
        grid, name = self.grids[value], self.name(value)
        scale = self.constant(f"{name}.scale", np.float32(grid.scale))
        return scale, self.constant(f"{name}.zero_point", self.code(grid.zero_point))

    def code(self, code: int) -> np.generic:
        """Return a code of the program in the type of the file."""
        return np.int8(code - SIGNED_ZERO) if self.form.signed else np.uint8(code)

    def floats(self, value: str) -> str:
        """Return the name of the floats of a value, made by DequantizeLinear at their first use."""
        if value not in self.grids:
            return self.name(value)
        if value not in self._floats:
            inputs = (self.name(value), *self.scale_and_zero_point(value))
            output = self.unique(f"{self.name(value)}.dequantized")
            self._floats[value] = self.node("DequantizeLinear", inputs, output, f"{self.name(value)}.dequantize")
        return self._floats[value]

    def quantize(self, floats: str, value: str, limits: tuple[int, int] | None = None, name: str = "") -> None:
        """Make the codes of a value from floats, limited after QuantizeLinear where its own saturation is not enough.

        Args:
            floats: Name of the floats.
            value: Value of the program, with a grid.
            limits: Smallest and largest code; None: 0 and quant_max of the grid.
            name: Name of the codes; by default that of the value.
        """
        limits, name = limits or (0, self.grids[value].quant_max), name or self.name(value)
        if limits != (0, CODE_MAX) and not self.form.computes_codes:
            self._quantize_limited(floats, value, limits, name)
            return
        output = name if limits == (0, CODE_MAX) else self.unique(f"{name}.saturated")
        self.node("QuantizeLinear", (floats, *self.scale_and_zero_point(value)), output, f"{name}.quantize")
        if output != name:
            self.limit(output, name, limits)

    def _quantize_limited(self, floats: str, value: str, limits: tuple[int, int], name: str) -> None:
        """Limit floats, which have been rounded before unless the engine folds the limits into the operation."""
        grid = self.grids[value]
        pair = self.scale_and_zero_point(value)
        if not self.form.fuses_limits:
            codes = self.node("QuantizeLinear", (floats, *pair), self.unique(f"{name}.saturated"), f"{name}.saturate")
            floats = self.node("DequantizeLinear", (codes, *pair), self.unique(f"{codes}.float"), f"{name}.widen")
        limited = self.unique(f"{name}.limited")
        if limits == (grid.zero_point, CODE_MAX):
            self.node("Relu", (floats,), limited, f"{name}.relu")
        else:
            ends = [
                self.constant(f"{name}.{end}", np.float32((limit - grid.zero_point) * np.float32(grid.scale)))
                for end, limit in zip(("low", "high"), limits, strict=True)
            ]
            self.node("Clip", (floats, *ends), limited, f"{name}.clip")
        self.node("QuantizeLinear", (limited, *pair), name, f"{name}.quantize")

    def limit(self, codes: str, name: str, limits: tuple[int, int]) -> None:
        """Make codes from others, limited to a smallest and a largest one."""
        ends = [
            self.constant(f"{name}.{end}", np.uint8(limit)) for end, limit in zip(("low", "high"), limits, strict=True)
        ]
        self.node("Clip", (codes, *ends), name, f"{name}.clip")

    def finish(
        self, kind: str, inputs: Sequence[str], step: Step, limits: tuple[int, int] | None, **attributes: Any
    ) -> None:
        """Append the float operation of a step and quantize its output, if that has a grid.

        Args:
            kind: The operation.
            inputs: Names of the values that it reads.
            step: The step.
            limits: Smallest and largest code; None for a movement, whose codes are within those of its input.
            attributes: Of the node.
        """
        if step.output not in self.grids:
            self.node(kind, inputs, self.name(step.output), step.layer or step.output, **attributes)
            return
        output = self.unique(f"{self.name(step.output)}.float")
        self.node(kind, inputs, output, step.layer or step.output, **attributes)
        self.quantize(output, step.output, (0, CODE_MAX) if limits is None else limits)

    def model(self, graph_name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> onnx.ModelProto:
        """Return the model of all nodes, with the lowest operator set that suffices."""
        graph = helper.make_graph(self.nodes, graph_name, inputs, outputs, initializer=list(self.constants.values()))
        opsets = [helper.make_opsetid("", self.opset)]
        ir_version = helper.find_min_ir_version_for(opsets)
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="synq")
