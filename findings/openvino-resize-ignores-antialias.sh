#!/usr/bin/env bash
# Package:  openvino 2026.4.1 (models built with onnx 1.23.2; onnxruntime 1.32.0 for comparison)
# Expected: an ONNX Resize with antialias 1 that shrinks an image averages over all pixels under its filter, as ONNX
#           Runtime and the ONNX reference evaluator do, or the file is refused.
# Happens:  OpenVINO reads the attribute into its Interpolate operation, and computes what it computes with
#           antialias 0, to the last bit, in modes linear and cubic: most pixels are not read at all.
# Matters:  the resize of a network's preprocessing, or between its branches, is another one in this engine, without a
#           word. Resize before the model, or write the filter out as a convolution.
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
g (float[1,1,16,16] x) => (float[1,1,4,4] y)
<int64[4] sizes = {1, 1, 4, 4}>
{ y = Resize <mode = "%s", antialias = %d> (x, , , sizes) }"""
images = np.random.default_rng(0).uniform(-1, 1, (1, 1, 16, 16)).astype(np.float32)
core, here, there, kept = ov.Core(), {}, {}, []
for mode in ("linear", "cubic"):
    for antialias in (0, 1):
        model = parser.parse_model(MODEL % (mode, antialias))
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, "resize.onnx")
        session = ort.InferenceSession("resize.onnx", providers=["CPUExecutionProvider"])
        here[mode, antialias] = session.run(None, {"x": images})[0]
        assert np.allclose(here[mode, antialias], ReferenceEvaluator(model).run(None, {"x": images})[0], atol=1e-5)
        read = core.read_model("resize.onnx")
        kept += [op.get_attributes()["antialias"] for op in read.get_ops() if op.get_type_name() == "Interpolate"]
        there[mode, antialias] = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)[0]


def far(first, second):
    """Return the largest difference."""
    return float(np.abs(first - second).max())


print("version: openvino", ov.__version__)
print("expected: OpenVINO gives what ONNX Runtime and the reference evaluator give")
print("seen: antialias of OpenVINO's Interpolate for linear 0, 1 and cubic 0, 1:", [int(value) for value in kept])
result = {}
for mode in ("linear", "cubic"):
    result[mode] = [far(there[mode, 0], here[mode, 0]), far(there[mode, 1], here[mode, 1])]
    result[mode].append(far(there[mode, 0], there[mode, 1]))
    print(f"seen: {mode}: from ONNX Runtime, antialias 0 and 1: {result[mode][0]:.6f}, {result[mode][1]:.6f};", end=" ")
    print(f"OpenVINO's 0 from its 1: {result[mode][2]:.6f}")
if not all(plain < 1e-5 and other > 0.1 and same == 0 for plain, other, same in result.values()):
    raise SystemExit(f"changed: {result}")
PY
venv/bin/python check.py
