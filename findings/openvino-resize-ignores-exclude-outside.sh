#!/usr/bin/env bash
# Package:  openvino 2026.4.1 (models built with onnx 1.23.2; onnxruntime 1.32.0 for comparison)
# Expected: an ONNX Resize of mode cubic with exclude_outside 1 gives samples outside of the image no weight, and scales
#           the others up, as ONNX Runtime and the ONNX reference evaluator do, or the file is refused.
# Happens:  OpenVINO computes what it computes with exclude_outside 0, to the last bit, when an image grows and when it
#           shrinks: the pixels near the border are others, those inside are right.
# Matters:  a bicubic resize that was written so (TensorFlow's, for one) has other borders in this engine, without a
#           word. Write exclude_outside 0, or pad before the resize and crop after it.
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

MODEL = """<ir_version: 10, opset_import: ["" : 18]>
g (float[1,1,{0},{0}] x) => (float[1,1,{1},{1}] y)
<int64[4] sizes = {{1, 1, {1}, {1}}}>
{{ y = Resize <mode = "cubic", cubic_coeff_a = -0.5, exclude_outside = {2}> (x, , , sizes) }}"""
core, result = ov.Core(), {}


def far(first, second):
    """Return the largest difference."""
    return float(np.abs(first - second).max())


for before, after in ((6, 15), (16, 8)):
    images = np.random.default_rng(0).uniform(-1, 1, (1, 1, before, before)).astype(np.float32)
    here, there = [], []
    for outside in (0, 1):
        model = parser.parse_model(MODEL.format(before, after, outside))
        onnx.checker.check_model(model, full_check=True)
        content = model.SerializeToString()
        session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
        here.append(session.run(None, {"x": images})[0])
        assert far(here[-1], ReferenceEvaluator(model).run(None, {"x": images})[0]) < 1e-5
        compiled = core.compile_model(core.read_model(content, b""), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        there.append(compiled(images)[0])
    inside = (..., slice(after // 3, -(after // 3)), slice(after // 3, -(after // 3)))
    result[before, after] = [
        *(far(a, b) for a, b in zip(here, there, strict=True)),
        far(here[1][inside], there[1][inside]),
        far(*there),
    ]

print("version: openvino", ov.__version__)
print("expected: OpenVINO gives what ONNX Runtime and the reference evaluator give")
for (before, after), (plain, excluded, middle, same) in result.items():
    print(f"seen: {before} to {after} pixels: from ONNX Runtime, exclude_outside 0 and 1: {plain:.6f}, {excluded:.6f};", end=" ")
    print(f"inside {middle:.6f}; OpenVINO's 0 from its 1: {same:.6f}")
if not all(plain < 1e-5 and 0.01 < excluded and middle < 1e-5 and same == 0 for plain, excluded, middle, same in result.values()):
    raise SystemExit(f"changed: {result}")
PY
venv/bin/python check.py
