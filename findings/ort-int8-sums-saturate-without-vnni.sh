#!/usr/bin/env bash
# Package:  onnxruntime 1.32.0 (models built with onnx 1.23.2)
# Expected: a quantized convolution or Gemm (UINT8 activations, INT8 weights, what quantize_static makes with QUInt8)
#           has exact integer sums on every processor.
# Happens:  on x86 processors without VNNI instructions pairs of products are added in 16 bits and saturate, in the
#           default session, silently: with weight codes up to 127 about half of these outputs are wrong, by up to
#           many codes. Weight codes within +-64, the unoptimized session and the session option
#           session.x64quantprecision = 1 are exact; with VNNI everything is. A file cannot carry that option.
# Matters:  the same file has another accuracy on an older server than on the machine that verified it. Limit the weight
#           codes to 7 bits (reduce_range), or set the option, wherever the processor is not known.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cat > check.py <<'PY'
import platform
import re
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import numpy_helper, parser

MODEL = """<ir_version: 10, opset_import: ["" : 17]>
g (float[1,16,8,8] x) => (float[1,8,8,8] y)
<float s = {0.02}, uint8 z = {0}, float t = {0.5}, uint8 u = {128}>
{ q = QuantizeLinear (x, s, z)  d = DequantizeLinear (q, s, z)  v = DequantizeLinear <axis = 0> (w, k)
  c = Conv <pads = [1, 1, 1, 1]> (d, v)  r = QuantizeLinear (c, t, u)  y = DequantizeLinear (r, t, u) }"""
rng = np.random.default_rng(0)
images = rng.uniform(0, 5.1, (1, 16, 8, 8)).astype(np.float32)
codes = rng.integers(-127, 128, (8, 16, 3, 3))


def outputs(limit, level, exact):
    model = parser.parse_model(MODEL)
    weight = np.round(codes * limit / 127).astype(np.int8)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.full(8, 0.01, np.float32), "k"))
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"x": images}
    )[0]


OFF, ALL = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL
if platform.machine() != "x86_64":
    raise SystemExit("changed: this is about x86 processors, and here is another")
vnni = bool(re.search(r"\b(avx512_vnni|avx_vnni)\b", Path("/proc/cpuinfo").read_text()))
wrong, largest = {}, {}
for name, limit, exact in (("+-127", 127, False), ("+-64", 64, False), ("+-127, x64quantprecision", 127, True)):
    error = np.abs(outputs(limit, ALL, exact) - outputs(limit, OFF, False)) / 0.5
    # a last bit of the float arithmetic may move a halfway value by one code; saturation moves by more
    wrong[name], largest[name] = float((error > 1.5).mean()), float(error.max())

print("version: onnxruntime", ort.__version__, "- this processor has VNNI:", vnni)
print("expected: the default session within one code of the unoptimized one, whatever the weights")
for name, share in wrong.items():
    print(f"seen: weight codes {name}: {100 * share:.1f} % off by more than one code, at most {largest[name]:.0f}")
exact = [share for name, share in wrong.items() if name != "+-127"]
if max(exact) > 0 or (wrong["+-127"] == 0) != vnni or (not vnni and wrong["+-127"] < 0.2):
    raise SystemExit(f"changed: {wrong}")
PY
venv/bin/python check.py
