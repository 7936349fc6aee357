#!/usr/bin/env bash
# Package:  openvino 2026.4.1 (models built with onnx 1.23.2; onnxruntime 1.32.0 for comparison)
# Expected: an average pool that counts its padding (count_include_pad 1) pads with the value 0, whatever stands
#           before it.
# Happens:  behind QuantizeLinear and DequantizeLinear the pool is moved onto the codes and padded with code 0, which
#           with a zero point of 128 is the most negative value. All border outputs are wrong, by up to 0.56 for
#           images in -1..1; the inner ones, zero point 0, and count_include_pad 0 are right. ONNX Runtime agrees
#           with the definition in all cases.
# Matters:  a quantized network with a signed activation (LeakyReLU, Hardswish, a linear bottleneck) in front of a
#           padded average pool is another network in OpenVINO. A Pad of its own behind DequantizeLinear does not
#           help (it is merged into the pool again); a Pad of the codes, with the zero point as value, does.
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

MODEL = """<ir_version: 10, opset_import: ["" : 17]>
g (float[1,3,8,8] x) => (float[1,3,8,8] y)
<float s = {0.0078125}, uint8 z = {%d}, int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>
{ %s }"""
QDQ = "q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z) "
POOL = "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = %d> (d)"
OWN_PAD = "p = Pad (d, pads)  y = AveragePool <kernel_shape = [3, 3]> (p)"
CODES_PAD = """q = QuantizeLinear (x, s, z)  c = Pad (q, pads, z)  d = DequantizeLinear (c, s, z)
  y = AveragePool <kernel_shape = [3, 3]> (d)"""
CASES = {
    "zero point 0, padding counted": (0, POOL % 1),
    "zero point 128, padding counted": (128, POOL % 1),
    "zero point 128, not counted": (128, POOL % 0),
    "zero point 128, Pad of its own": (128, OWN_PAD),
    "zero point 128, codes padded": (128, CODES_PAD),
}
images = np.random.default_rng(0).uniform(0, 0.99, (1, 3, 8, 8)).astype(np.float32)
core, seen = ov.Core(), {}
for name, (zero_point, pool) in CASES.items():
    model = parser.parse_model(MODEL % (zero_point, pool if pool == CODES_PAD else QDQ + pool))
    onnx.save(model, "pool.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    right = ort.InferenceSession("pool.onnx", options, providers=["CPUExecutionProvider"]).run(None, {"x": images})[0]
    there = core.compile_model("pool.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]
    error = np.abs(there - right)
    seen[name] = float(error.max()), float(error[..., 1:-1, 1:-1].max())

print("version: openvino", ov.__version__)
print("expected: differences of at most 1e-5 in all cases")
for name, (whole, inner) in seen.items():
    print(f"seen: {name:32s} largest difference {whole:.6f}, inside the border {inner:.6f}")
wrong = ("zero point 128, padding counted", "zero point 128, Pad of its own")
holds = all(inner < 1e-5 and (whole > 0.3 if name in wrong else whole < 1e-5) for name, (whole, inner) in seen.items())
if not holds:
    raise SystemExit(f"changed: {seen}")
PY
venv/bin/python check.py
