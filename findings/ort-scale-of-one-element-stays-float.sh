#!/usr/bin/env bash
# Package:  onnxruntime 1.32.0 with onnx 1.23.2 (x86, CPU provider)
# Expected: a per-tensor scale of shape (1,), which ONNX's QuantizeLinear allows next to a scalar, runs as a scalar does.
# Happens:  the results are equal, but the operations that read it are not fused: Add between such Q/DQ pairs stays a
#           float Add, where the same file with scales of shape () runs QLinearAdd. Nothing is printed.
# Matters:  NumPy makes such scales by accident (np.ascontiguousarray of a scalar has one axis). The file is valid, right
#           and slow: write scales and zero points without axes, and count kernels in the optimized graph.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cat > check.py <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def run(shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    """Return the sum of two quantized tensors and the kernels that computed it, with scales of a shape."""
    constants = [
        numpy_helper.from_array(np.full(shape, 0.05, np.float32), "scale"),
        numpy_helper.from_array(np.full(shape, 128, np.uint8), "zero_point"),
    ]
    nodes, count = [], 0
    for name, source in (("a", "x"), ("b", "y")):
        nodes.append(helper.make_node("QuantizeLinear", [source, "scale", "zero_point"], [f"{name}q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}q", "scale", "zero_point"], [name]))
    nodes.append(helper.make_node("Add", ["a", "b"], ["c"]))
    nodes.append(helper.make_node("QuantizeLinear", ["c", "scale", "zero_point"], ["cq"]))
    nodes.append(helper.make_node("DequantizeLinear", ["cq", "scale", "zero_point"], ["z"]))
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 4, 4]) for name in "xyz"]
    graph = helper.make_graph(nodes, "sum", info[:2], info[2:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, "optimized.onnx"
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kernels = sorted(node.op_type for node in onnx.load("optimized.onnx").graph.node if "Add" in node.op_type)
    return session.run(None, {"x": x, "y": y})[0], kernels


rng = np.random.default_rng(0)
x, y = (rng.normal(size=(1, 8, 4, 4)).astype(np.float32) for _ in range(2))
scalar, vector = run(()), run((1,))
print("version: onnxruntime", onnxruntime.__version__)
print("expected: QLinearAdd for both, because both files mean the same")
print(f"seen: scales of shape () {scalar[1]}, of shape (1,) {vector[1]}; largest difference "
      f"{float(abs(scalar[0] - vector[0]).max()):.3g}")
if scalar[1] != ["QLinearAdd"] or vector[1] != ["Add"]:
    raise SystemExit("changed")
PY
venv/bin/python check.py
