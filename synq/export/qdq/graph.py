"""A growing ONNX graph of quantized values.

A value with a grid exists in two forms: its codes, UINT8, and the floats that DequantizeLinear makes of them. A float
operation reads the floats and is followed by QuantizeLinear; engines replace such a group by one integer kernel.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from synq.common.names import unique_name
from synq.engines.program import Grid, Step

CODE_MAX = 255
"""Largest code of UINT8, the type of all activations."""
BASE_OPSET = 13
"""The first operator set with one scale per channel."""


class QuantizedGraph:
    """Nodes and constants of a graph; see the module.

    Args:
        names: Names of values in the graph, where they are not those of the program.
        grids: Of each value that holds codes.
    """

    def __init__(self, names: Mapping[str, str], grids: Mapping[str, Grid]) -> None:
        self.grids = grids
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
        return scale, self.constant(f"{name}.zero_point", np.uint8(grid.zero_point))

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
        output = name if limits == (0, CODE_MAX) else self.unique(f"{name}.saturated")
        self.node("QuantizeLinear", (floats, *self.scale_and_zero_point(value)), output, f"{name}.quantize")
        if output != name:
            self.limit(output, name, limits)

    def limit(self, codes: str, name: str, limits: tuple[int, int]) -> None:
        """Make codes from others, limited to a smallest and a largest one."""
        ends = [
            self.constant(f"{name}.{end}", np.uint8(limit)) for end, limit in zip(("low", "high"), limits, strict=True)
        ]
        self.node("Clip", (codes, *ends), name, f"{name}.clip")

    def finish(
        self, kind: str, inputs: Sequence[str], step: Step, limits: tuple[int, int] | None, **attributes: Any
    ) -> None:
        """Append the float operation of a step and quantize its output, if that has a grid."""
        if step.output not in self.grids:
            self.node(kind, inputs, self.name(step.output), step.layer or step.output, **attributes)
            return
        output = self.unique(f"{self.name(step.output)}.float")
        self.node(kind, inputs, output, step.layer or step.output, **attributes)
        self.quantize(output, step.output, limits)

    def model(self, graph_name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> onnx.ModelProto:
        """Return the model of all nodes, with the lowest operator set that suffices."""
        graph = helper.make_graph(self.nodes, graph_name, inputs, outputs, initializer=list(self.constants.values()))
        opsets = [helper.make_opsetid("", self.opset)]
        ir_version = helper.find_min_ir_version_for(opsets)
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, producer_name="synq")
