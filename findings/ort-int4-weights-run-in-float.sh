#!/usr/bin/env bash
# Package:  onnxruntime 1.32.0 (models built with onnx 1.23.2)
# Expected: a convolution with INT4 weights behind DequantizeLinear and UINT8 activations runs in integers, as
#           it does with INT8 weights of the same values.
# Happens:  with INT4 the convolution is a float Conv, and its weights are dequantized again at every run. A Cast
#           from INT4 to INT8 between the weights and DequantizeLinear is folded when the file is loaded, and
#           makes it a QLinearConv; outputs and the size of the file stay as they are.
# Matters:  the obvious way to write a 4-bit model halves the file and makes it slower than the float one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6 ml_dtypes==0.6.0

cat > check.py <<'PY'
import collections

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper, parser

MODEL = """<ir_version: 10, opset_import: ["" : 21]>
g (float[1,64,8,8] x) => (float[1,64,8,8] y)
<float s = {0.02}, uint8 z = {0}, float t = {0.125}>
{ q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)  %s
  c = Conv <pads = [1, 1, 1, 1]> (d, v)  r = QuantizeLinear (c, t, z)  y = DequantizeLinear (r, t, z) }"""
CASES = {
    "INT8": (np.int8, "v = DequantizeLinear <axis = 0> (w, k)"),
    "INT4": (ml_dtypes.int4, "v = DequantizeLinear <axis = 0> (w, k)"),
    "INT4, Cast": (ml_dtypes.int4, "e = Cast <to = 3> (w)  v = DequantizeLinear <axis = 0> (e, k)"),
}
rng = np.random.default_rng(0)
weight = rng.integers(-8, 8, (64, 64, 3, 3))
images = rng.uniform(0, 5, (1, 64, 8, 8)).astype(np.float32)
convolution, dequantized, size, output = {}, {}, {}, {}
for name, (kind, node) in CASES.items():
    model = parser.parse_model(MODEL % node)
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(kind), "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.full(64, 0.01, np.float32), "k"))
    options = ort.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output[name], size[name] = session.run(None, {"x": images})[0], model.ByteSize()
    nodes = onnx.load("optimized.onnx").graph.node
    convolution[name] = [node.op_type for node in nodes if "Conv" in node.op_type]
    kinds = collections.Counter(node.op_type for node in nodes)
    dequantized[name] = kinds["DequantizeLinear"]

print("version: onnxruntime", ort.__version__)
print("expected: QLinearConv in all three")
for name in CASES:
    print(f"seen: {name:11s} {convolution[name]}, {dequantized[name]} DequantizeLinear left, {size[name]:6d} bytes")
if convolution != {"INT8": ["QLinearConv"], "INT4": ["Conv"], "INT4, Cast": ["QLinearConv"]}:
    raise SystemExit(f"changed: {convolution}")
if not (np.array_equal(output["INT8"], output["INT4, Cast"]) and size["INT4, Cast"] < 0.6 * size["INT8"]):
    raise SystemExit("changed: the form with Cast must give the outputs of INT8 in about half the bytes")
PY
venv/bin/python check.py
