#!/usr/bin/env bash
# Package:  openvino 2026.4.1 (models built with onnx 1.23.2; onnxruntime 1.32.0 for comparison)
# Expected: an ONNX AveragePool with ceil_mode 1, pads and count_include_pad 1 gives what PyTorch, the ONNX reference
#           evaluator and ONNX Runtime give: a window that hangs over the edge is divided by the cells that lie
#           on the image and its padding.
# Happens:  OpenVINO divides those windows (last row and column of a 3x3 pool of stride 2 on 8 x 8) by another
#           number. Where the windows end with the padding (9 x 9), or padding is not counted, it agrees.
# Matters:  no quantization is needed for it: a float ONNX file of such a network has other features in OpenVINO,
#           and whoever compares engines blames the quantizer.
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

MODEL = """<ir_version: 10, opset_import: ["" : 19]>
g (float[1,1,%d,%d] x) => (float[1,1,5,5] y)
{ y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], ceil_mode = 1,
                   count_include_pad = %d> (x) }"""
core, seen = ov.Core(), {}
for size in (8, 9):
    for counted in (1, 0):
        ones = np.ones((1, 1, size, size), np.float32)
        model = parser.parse_model(MODEL % (size, size, counted))
        onnx.save(model, "pool.onnx")
        session = ort.InferenceSession("pool.onnx", providers=["CPUExecutionProvider"])
        right = session.run(None, {"x": ones})[0]
        assert np.allclose(right, ReferenceEvaluator(model).run(None, {"x": ones})[0], atol=1e-6)
        there = core.compile_model("pool.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(ones)[0]
        seen[size, counted] = right[0, 0], there[0, 0]

print("version: openvino", ov.__version__)
print("expected: OpenVINO gives what ONNX Runtime and the reference evaluator give")
for (size, counted), (right, there) in seen.items():
    columns = f"ONNX Runtime {right[:, -1].round(3)}, OpenVINO {there[:, -1].round(3)}"
    print(f"seen: {size} x {size} ones, padding counted {counted}: last column, {columns}")
equal = {case: bool(np.allclose(right, there, atol=1e-5)) for case, (right, there) in seen.items()}
if equal != {(8, 1): False, (8, 0): True, (9, 1): True, (9, 0): True}:
    raise SystemExit(f"changed: {equal}")
PY
venv/bin/python check.py
