"""A graph of LiteRT (.tflite) under construction: tensors, constants and operators, and the bytes of its file.

The file is written with the classes that LiteRT's package generates from its schema; no converter is involved.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synq.common.names import unique_name

FILE_IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3


class FlatGraph:
    """One subgraph. Tensors are numbered from 0 in the order in which they are added.

    The first axis of an activation is the batch: 1 in the file, and marked as free to change.
    """

    def __init__(self) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self._schema: Any = schema
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[tuple[int, int], int] = {}
        self._buffers: list[Any] = [schema.BufferT()]  # number 0 is the empty one of activations, by the format
        self._constants: dict[tuple[object, ...], int] = {}
        self._used: set[str] = set()

    def activation(
        self, name: str, shape: Sequence[int], quantization: tuple[float, int] | None = None, dtype: str = "float32"
    ) -> int:
        """Add a tensor that an operator computes, or an input.

        Args:
            name: Any; a number is added where another tensor has it.
            shape: Without the batch.
            quantization: Scale and zero point of int8 codes; None: not quantized.
            dtype: If it is not quantized.
        """
        tensor = self._tensor(name, np.dtype(dtype if quantization is None else np.int8), (1, *shape))
        tensor.shapeSignature = [-1, *shape]
        if quantization is not None:
            tensor.quantization = self._quantization([quantization[0]], [quantization[1]], 0)
        return self._add(tensor)

    def constant(
        self, name: str, array: NDArray[Any], scales: Sequence[float] = (), zero_point: int = 0, axis: int = 0
    ) -> int:
        """Add a constant, or return the number of an equal one.

        Args:
            name: As for `activation`.
            array: float32, int32 or int8.
            scales: None if it is not quantized, one, or one for each position of ``axis``.
            zero_point: Of all scales.
            axis: Of the scales.
        """
        key = (array.dtype.str, array.shape, array.tobytes(), tuple(scales), zero_point, axis)
        if key not in self._constants:
            tensor = self._tensor(name, array.dtype, array.shape)
            tensor.buffer = len(self._buffers)
            buffer = self._schema.BufferT()
            buffer.data = np.frombuffer(array.tobytes(), np.uint8)
            self._buffers.append(buffer)
            if scales:
                tensor.quantization = self._quantization(scales, [zero_point] * len(scales), axis)
            self._constants[key] = self._add(tensor)
        return self._constants[key]

    def operator(
        self, name: str, inputs: Sequence[int], output: int, version: int = 1, options: str = "", **values: object
    ) -> None:
        """Add an operator.

        Args:
            name: Of the schema's BuiltinOperator, such as ``CONV_2D``.
            inputs: Tensors that it reads.
            output: Tensor that it computes.
            version: Of the operator, as the engine's registration counts them.
            options: Name of its table of options without ``Options``, such as ``Conv2D``; empty: it has none.
            values: Attributes of that table, in the names of the object API.
        """
        schema = self._schema
        number = getattr(schema.BuiltinOperator, name)
        operator = schema.OperatorT()
        operator.opcodeIndex = self._codes.setdefault((number, version), len(self._codes))
        operator.inputs, operator.outputs = list(inputs), [output]
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, f"{options}Options")
            operator.builtinOptions = getattr(schema, f"{options}OptionsT")()
            for key, value in values.items():
                if not hasattr(operator.builtinOptions, key):
                    raise AttributeError(f"{options}Options has no {key}")
                setattr(operator.builtinOptions, key, value)
        self._operators.append(operator)

    def serialize(self, inputs: dict[str, int], outputs: dict[str, int], description: str) -> bytes:
        """Return the file.

        Args:
            inputs: Tensors by the names of the signature ``serving_default``.
            outputs: Likewise.
            description: A line on the origin of the file.
        """
        import flatbuffers

        schema = self._schema
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = "main", self._tensors, self._operators
        graph.inputs, graph.outputs = list(inputs.values()), list(outputs.values())
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = self._names(inputs), self._names(outputs)
        model = schema.ModelT()
        model.version, model.description = SCHEMA_VERSION, description
        model.operatorCodes = [self._code(number, version) for number, version in self._codes]
        model.subgraphs, model.buffers, model.signatureDefs = [graph], self._buffers, [signature]
        builder = flatbuffers.Builder(sum(len(buffer.data) for buffer in self._buffers[1:]) + 65_536)
        builder.Finish(model.Pack(builder), file_identifier=FILE_IDENTIFIER)
        return bytes(builder.Output())

    def _tensor(self, name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> Any:
        tensor = self._schema.TensorT()
        types = {"float32": "FLOAT32", "int32": "INT32", "int8": "INT8"}
        # Unique, because tools that quantize or edit files find tensors by their names.
        tensor.name, tensor.type = unique_name(name, self._used), getattr(self._schema.TensorType, types[dtype.name])
        tensor.shape, tensor.hasRank = [int(size) for size in shape], True
        return tensor

    def _add(self, tensor: Any) -> int:
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def _quantization(self, scales: Sequence[float], zero_points: Sequence[int], axis: int) -> Any:
        quantization = self._schema.QuantizationParametersT()
        quantization.scale, quantization.zeroPoint = list(scales), list(zero_points)
        quantization.quantizedDimension = axis
        return quantization

    def _code(self, number: int, version: int) -> Any:
        code = self._schema.OperatorCodeT()
        # Readers of before schema version 3a know the first, a byte, only.
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, 127), version
        return code

    def _names(self, tensors: dict[str, int]) -> list[Any]:
        found = []
        for name, index in tensors.items():
            entry = self._schema.TensorMapT()
            entry.name, entry.tensorIndex = name, index
            found.append(entry)
        return found
