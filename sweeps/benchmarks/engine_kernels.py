"""How many convolutions and linear layers of a file its engine computes with integers, counted in the engine's graph.

ONNX Runtime writes its optimized graph, OpenVINO its execution graph. LiteRT and ExecuTorch hand operators to XNNPACK,
which picks its kernel by the type of the tensors: an operator with an int8 input that was handed over is an integer
one. LiteRT hands them over in several parts where XNNPACK does not take what is between them.
"""

import json
import re
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino

Layers = tuple[int, int]
"""Layers that run with integers, and all layers."""
DELEGATE = "DELEGATE"
"""Name of the operator of LiteRT that runs those handed to XNNPACK."""


def layers_in(target: str, content: bytes) -> Layers:
    """Return the counts of a file in the engine of a target."""
    return _COUNTERS[target](content)


def _in_onnxruntime(content: bytes) -> Layers:
    from synq.export.kernels import count_kernels

    integers, floats = count_kernels(content)
    return integers, integers + floats


def _in_openvino(content: bytes) -> Layers:
    import openvino

    return layers_in_openvino(openvino.Core().read_model(content, b""))


def layers_in_openvino(model: "openvino.Model") -> Layers:
    """Return the counts of a model in OpenVINO's CPU plugin."""
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    facts = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ordered_ops()]
    kinds = [
        str(fact["runtimePrecision"].astype(str))
        for fact in facts
        if fact["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")
    ]
    return sum(kind in ("u8", "i8") for kind in kinds), len(kinds)


def _in_litert(content: bytes) -> Layers:
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    kinds = (
        schema.BuiltinOperator.CONV_2D,
        schema.BuiltinOperator.DEPTHWISE_CONV_2D,
        schema.BuiltinOperator.FULLY_CONNECTED,
    )
    graph = model.subgraphs[0]
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    layers = [op for op in graph.operators if codes[op.opcodeIndex] in kinds]
    delegated = delegated_tensors(interpreter._get_ops_details())
    integers = [
        graph.tensors[op.inputs[0]].type == schema.TensorType.INT8 and set(op.outputs) <= delegated for op in layers
    ]
    return sum(integers), len(layers)


def delegated_tensors(operators: list[dict[str, Any]]) -> set[int]:
    """Return the tensors that delegates compute: what leads from the inputs of each to its outputs.

    Args:
        operators: Of an interpreter of LiteRT; it lists the operators of the file, those handed over among them, then
            the delegates. What XNNPACK does not take, such as a slice with a stride, separates one from the next.
    """
    sources = {int(out): op["inputs"] for op in operators if op["op_name"] != DELEGATE for out in op["outputs"]}
    found: set[int] = set()
    for delegate in (op for op in operators if op["op_name"] == DELEGATE):
        given = {int(tensor) for tensor in delegate["inputs"]}
        left = [int(tensor) for tensor in delegate["outputs"]]
        while left:
            tensor = left.pop()
            if tensor not in found and tensor not in given and tensor in sources:
                found.add(tensor)
                left += map(int, sources[tensor])
    return found


def _in_executorch(content: bytes) -> Layers:
    from executorch.backends.xnnpack import serialization
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(content).program
    integers = total = 0
    for blob in program.backend_delegate_data:
        data = bytes(blob.data)
        header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
        start, stop = header.flatbuffer_offset, header.flatbuffer_offset + header.flatbuffer_size
        with tempfile.TemporaryDirectory() as folder:
            schema, graph = Path(folder) / "schema.fbs", Path(folder) / "graph.bin"
            schema.write_bytes(files(serialization).joinpath("schema.fbs").read_bytes())
            graph.write_bytes(data[start:stop])
            _flatc_decompile(folder, str(schema), str(graph), ["--raw-binary"])
            text = (Path(folder) / "graph.json").read_text(encoding="utf-8")
            found = json.loads(re.sub(r"(:\s*)-?(inf|nan)\b", r"\1null", text))  # limits, which JSON cannot have
        values = [value["xvalue_union"] for value in found["xvalues"]]
        quantized = {value["tensor_value"]["id_out"] for value in values if "tensor_value" in value}
        for node in found["xnodes"]:
            if node["xnode_union_type"] in ("XNNConv2d", "XNNDepthwiseConv2d", "XNNFullyConnected"):
                total += 1
                integers += node["xnode_union"]["input1_id"] in quantized
    return integers, total


_COUNTERS: dict[str, Callable[[bytes], Layers]] = {
    "onnxruntime": _in_onnxruntime,
    "openvino": _in_openvino,
    "litert": _in_litert,
    "executorch": _in_executorch,
}
