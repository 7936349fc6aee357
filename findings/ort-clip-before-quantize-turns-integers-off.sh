#!/usr/bin/env bash
# Package:  onnxruntime 1.32.0 (models built with onnx 1.23.2)
# Expected: a Clip in front of QuantizeLinear that limits activations to 4 bits (codes 0..15) costs nothing: the
#           convolution around it stays an integer kernel, as it does with Relu.
# Happens:  with the float Clip the convolution runs in float (Conv or FusedConv between Q/DQ nodes), silently.
#           The same limit as a Clip of UINT8 codes behind QuantizeLinear keeps QLinearConv, and gives the same
#           codes. A Relu does the same harm as soon as the output's zero point is not 0.
# Matters:  this is how activations of fewer than 8 bits are usually written (clamp, then quantize): the file is
#           right, small, and slower than the float model.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cat > check.py <<'PY'
import collections

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper, parser

MODEL = """<ir_version: 10, opset_import: ["" : 21]>
g (float[1,16,8,8] x) => (float[1,8,8,8] y)
<float s = {0.02}, uint8 z = {0}, float t = {0.125}, uint8 u = {%d}, float lo = {0}, float hi = {1.875},
 uint8 code_lo = {0}, uint8 code_hi = {15}>
{ q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)  v = DequantizeLinear <axis = 0> (w, k)
  c = Conv <pads = [1, 1, 1, 1]> (d, v)  %s  y = DequantizeLinear (r, t, u) }"""
CASES = {
    "Clip before Q": (0, "m = Clip (c, lo, hi)  r = QuantizeLinear (m, t, u)"),
    "Clip on codes": (0, "m = QuantizeLinear (c, t, u)  r = Clip (m, code_lo, code_hi)"),
    "Relu, zero point 0": (0, "m = Relu (c)  r = QuantizeLinear (m, t, u)"),
    "Relu, zero point 10": (10, "m = Relu (c)  r = QuantizeLinear (m, t, u)"),
}
rng = np.random.default_rng(0)
weight = rng.integers(-8, 8, (8, 16, 3, 3)).astype(np.int8)
images = rng.uniform(0, 5, (1, 16, 8, 8)).astype(np.float32)
operations, outputs = {}, {}
for name, (zero_point, middle) in CASES.items():
    model = parser.parse_model(MODEL % (zero_point, middle))
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.full(8, 0.01, np.float32), "k"))
    options = ort.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs[name] = session.run(None, {"x": images})[0]
    kinds = collections.Counter(node.op_type for node in onnx.load("optimized.onnx").graph.node)
    operations[name] = [kind for kind in kinds if "Conv" in kind]

print("version: onnxruntime", ort.__version__)
print("expected: QLinearConv in all four")
for name, kinds in operations.items():
    print(f"seen: {name:20s} {' '.join(kinds)}")
same = np.array_equal(outputs["Clip before Q"], outputs["Clip on codes"])
print("seen: both forms of the limit give equal outputs:", same)
integer = {name: kinds == ["QLinearConv"] for name, kinds in operations.items()}
wanted = {name: name in ("Clip on codes", "Relu, zero point 0") for name in CASES}
if integer != wanted or not same:
    raise SystemExit(f"changed: {operations}")
PY
venv/bin/python check.py
