#!/usr/bin/env bash
# Package:  openvino 2026.4.1 (models built with onnx 1.23.2; onnxruntime 1.32.0 for comparison)
# Expected: QuantizeLinear, DequantizeLinear, AveragePool, Gemm: no quantization stands behind the pool, so its means
#           enter the linear layer as they are, as in ONNX Runtime with and without its optimizations.
# Happens:  OpenVINO moves the DequantizeLinear behind the pool, which then works on UINT8 codes and rounds each mean
#           to a code again, with the scale of its input; also in front of float weights. A GlobalAveragePool in
#           place of the same AveragePool keeps the means.
# Matters:  the head of most classifiers: the last features lose up to half a step, and two spellings of one pool give
#           different logits. Simulate the rounding for this engine, or write the pool as GlobalAveragePool.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    openvino==2026.4.1 onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6

cat > check.py <<'PY'
import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
from onnx import numpy_helper, parser

MODEL = """<ir_version: 10, opset_import: ["" : 17]>
g (float[1,8,4,4] x) => (float[1,16] y)
<float s = {0.0625}, uint8 z = {0}>
{ q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)
  p = %s (d)  f = Flatten (p)
  %s  y = Gemm <transB = 1> (f, v) }"""
rng = np.random.default_rng(0)
codes = rng.integers(0, 256, (1, 8, 4, 4))
codes[0, :, 0, 0] += (codes.sum((0, 2, 3)) % 16 == 8) * np.where(codes[0, :, 0, 0] < 255, 1, -1)  # no mean is a tie
images = (codes / 16).astype(np.float32)
weights = rng.integers(-32, 33, (16, 8)).astype(np.int8)  # small: no kernel without VNNI saturates
means = codes.mean((2, 3))
exact, rounded = means / 16 @ weights.T / 128, np.rint(means) / 16 @ weights.T / 128


def name_of(values):
    """Return which of the two results these are."""
    far = [float(np.abs(values - other).max()) for other in (exact, rounded)]
    return "the means" if far[0] < 1e-5 else "means rounded to codes" if far[1] < 1e-5 else f"neither, {far}"


seen = {}
for pool, kind in (("AveragePool", "INT8"), ("AveragePool", "float"), ("GlobalAveragePool", "INT8")):
    settings = " <kernel_shape = [4, 4]>" if pool == "AveragePool" else ""
    read = "v = DequantizeLinear (w, k)" if kind == "INT8" else ""
    model = parser.parse_model(MODEL % (pool + settings, read))
    values = {"w": weights, "k": np.float32(2.0**-7)} if read else {"v": (weights / 128).astype(np.float32)}
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, "head.onnx")
    case = f"{pool}, {kind} weights"
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = ort.SessionOptions()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = ort.InferenceSession("head.onnx", options, providers=["CPUExecutionProvider"])
        seen[case, level] = name_of(session.run(None, {"x": images})[0])
    there = ov.Core().compile_model("head.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    seen[case, "OpenVINO"] = name_of(there(images)[0])

print("version: openvino", ov.__version__)
print("expected: the linear layer reads the means")
print(f"seen: rounded means change its outputs by up to {np.abs(exact - rounded).max():.3f}")
for (case, engine), value in seen.items():
    print(f"seen: {case:31s} {engine:15s} {value}")
others = {case: value for case, value in seen.items() if value != "the means"}
if others != {(f"AveragePool, {kind} weights", "OpenVINO"): "means rounded to codes" for kind in ("INT8", "float")}:
    raise SystemExit(f"changed: {others}")
PY
venv/bin/python check.py
