#!/usr/bin/env bash
# Package:  onnxruntime 1.32.0 with onnx 1.23.2 (x86, CPU provider)
# Expected: an elementwise function gives a value the same result wherever it is in its tensor.
# Happens:  Softplus, Mish and (rarely) Elu do not: the same values at other positions differ in the last bit, as whole
#           vectors and the rest of an array are computed by different code. Sigmoid, Tanh, Gelu and HardSwish do.
# Matters:  the logits of an image then depend on its place in the batch, and a last bit can move the code of a quantized
#           activation: no simulation can equal such a file. Written as a table of codes (Gather), the function is exact.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cat > check.py <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper


def differing(kind: str) -> int:
    """Return how many of the same values differ between an array and a part of it."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(kind, ["x"], ["y"])], "one", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    whole = session.run(None, {"x": x})[0]
    parts = ((start, start + 77) for start in range(1, 2000, 5))
    return sum(int((session.run(None, {"x": x[a:b].copy()})[0] != whole[a:b]).sum()) for a, b in parts)


x = np.random.default_rng(0).normal(0, 3, 4096).astype(np.float32)
seen = {kind: differing(kind) for kind in ("Softplus", "Mish", "Sigmoid", "Tanh", "Elu", "Gelu", "HardSwish")}
print("version: onnxruntime", onnxruntime.__version__)
print("expected: 0 of 30,800 values differ for each function")
print("seen:", seen)
if min(seen["Softplus"], seen["Mish"]) == 0 or any(seen[k] for k in ("Sigmoid", "Tanh", "Gelu", "HardSwish")):
    raise SystemExit(f"changed: {seen}")
PY
venv/bin/python check.py
