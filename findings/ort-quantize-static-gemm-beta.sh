#!/usr/bin/env bash
# Package:  onnxruntime 1.32.0 (quantization tool; models built with onnx 1.23.2)
# Expected: quantize_static keeps what a Gemm with beta computes, alpha A B + beta C, up to rounding.
# Happens:  the bias is divided by beta when it is quantized and beta is then dropped or set to 1. With beta 0.5 the
#           default QDQ file, unoptimized, adds C instead of C / 2; the default session, and the QOperator
#           format, add 2 C (clipped to the calibrated range); with beta 2 they add C / 2. Nothing warns.
# Matters:  the quantized model is another network, and its two optimization levels disagree with each other;
#           accuracy falls for a reason that no calibration setting can cure.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cat > check.py <<'PY'
import logging

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper, parser
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

logging.disable(logging.WARNING)
MODEL = """<ir_version: 10, opset_import: ["" : 17]>
g (float[1,4] x) => (float[1,4] y) { y = Gemm <beta = %s> (x, w, c) }"""
BIAS = np.array([1, -2, 3, -1], np.float32)
ZERO = np.zeros((1, 4), np.float32)


class Reader(CalibrationDataReader):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.rest = iter([{"x": rng.uniform(-12, 12, (1, 4)).astype(np.float32)} for _ in range(64)])

    def get_next(self):
        return next(self.rest, None)


def bias_factor(path, level):
    """Return by what the model multiplies the bias: its answer to zeros, over the bias."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    answer = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": ZERO})[0][0]
    return round(float(answer @ BIAS / (BIAS @ BIAS)), 1)


OFF, ALL = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL
seen = {}
for beta in (1.0, 0.5, 2.0):
    model = parser.parse_model(MODEL % beta)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    model.graph.initializer.append(numpy_helper.from_array(BIAS, "c"))
    onnx.save(model, "float.onnx")
    row = [bias_factor("float.onnx", ALL)]
    for form in (QuantFormat.QDQ, QuantFormat.QOperator):
        # reduced weight range: sums of 16 bits cannot overflow, so no processor adds an error of its own
        kinds = {"quant_format": form, "activation_type": QuantType.QUInt8}
        quantize_static("float.onnx", "q.onnx", Reader(), reduce_range=True, **kinds)
        row += [bias_factor("q.onnx", OFF), bias_factor("q.onnx", ALL)]
    seen[beta] = row

print("version: onnxruntime", ort.__version__)
print("expected: the bias is multiplied by beta in every column")
print("seen: beta   float | QDQ unoptimized, default | QOperator unoptimized, default")
for beta, row in seen.items():
    print(f"seen: {beta:4}   {row[0]:5} | {row[1]:15}, {row[2]:7} | {row[3]:21}, {row[4]:7}")
if seen != {1.0: [1.0] * 5, 0.5: [0.5, 1.0, 2.0, 2.0, 2.0], 2.0: [2.0, 1.0, 0.5, 0.5, 0.5]}:
    raise SystemExit(f"changed: {seen}")
PY
venv/bin/python check.py
