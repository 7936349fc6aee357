#!/usr/bin/env bash
# Package:  openvino 2026.4.1 (models built with onnx 1.23.2; onnxruntime 1.32.0 for comparison)
# Expected: with ceil_mode a last window that would start in the padding behind the image is ignored: ONNX says so of
#           MaxPool (opset 22), and PyTorch, ONNX Runtime and the ONNX reference evaluator do so.
# Happens:  OpenVINO keeps that window: kernel 3, stride 3, padding 1 on 11 x 11 gives 5 x 5 instead of 4 x 4, and the
#           row and the column too many are -3.4e38, since no pixel lies in them. AveragePool drops the window.
# Matters:  the numbers go on into the next layer, or its shape does not fit, without quantization, too. Write the
#           padding at the end out, without ceil_mode, before the export.
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
from onnx import parser
from onnx.reference import ReferenceEvaluator

MODEL = """<ir_version: 10, opset_import: ["" : 22]>
g (float[1,1,%d,%d] x) => (float[1,1,A,B] y)
{ y = %s <kernel_shape = [3, 3], strides = [3, 3], pads = [1, 1, 1, 1], ceil_mode = 1> (x) }"""
core, seen = ov.Core(), {}
for pool in ("MaxPool", "AveragePool"):
    for size in (10, 11):
        images = np.arange(size * size, dtype=np.float32).reshape(1, 1, size, size)
        model = parser.parse_model(MODEL % (size, size, pool))
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, "pool.onnx")
        right = ort.InferenceSession("pool.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": images})[0]
        assert np.allclose(right, ReferenceEvaluator(model).run(None, {"x": images})[0])
        there = core.compile_model("pool.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]
        seen[pool, size] = right[0, 0], there[0, 0]

print("version: openvino", ov.__version__)
print("expected: OpenVINO gives what ONNX Runtime and the reference evaluator give")
for (pool, size), (right, there) in seen.items():
    print(f"seen: {pool} of {size} x {size}: ONNX Runtime {right.shape}, OpenVINO {there.shape}, last {there[-1, -1]}")
equal = {case: right.shape == there.shape and np.allclose(right, there) for case, (right, there) in seen.items()}
right, there = seen["MaxPool", 11]
one_more = there.shape == (5, 5) and np.array_equal(there[:4, :4], right) and (there[4] < -3e38).all()
if not (one_more and equal.pop(("MaxPool", 11)) is False and all(equal.values())):
    raise SystemExit(f"changed: {equal}, {there.shape}, {there[-1].tolist()}")
PY
venv/bin/python check.py
