#!/usr/bin/env bash
# Package:  safetensors 0.8.0 (numpy 2.4.6)
# Expected: safetensors.numpy.save of a transposed, column-major or strided array writes its values, or refuses as
#           safetensors.torch does for a tensor that is not contiguous.
# Happens:  it writes the shape of the view and the bytes of the memory underneath: what is read back has the right
#           name, shape and type, and the values of another order. Nothing is raised or printed (the docstring asks
#           for contiguous arrays; nothing checks it). Version 0.7.0 wrote all of these right.
# Matters:  weights are transposed all the time between frameworks (Linear against Gemm and MatMul, OIHW against
#           HWIO). The file loads everywhere and the model answers nonsense. Write np.ascontiguousarray(array).
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    safetensors==0.8.0 numpy==2.4.6

cat > check.py <<'PY'
import numpy as np
import safetensors
from safetensors.numpy import load, save

weight = np.arange(6, dtype=np.float32).reshape(2, 3)
CASES = {
    "contiguous": weight,
    "transposed": weight.T,
    "column-major": np.asfortranarray(weight),
    "every second column": weight[:, ::2],
    "ascontiguousarray of the transposed": np.ascontiguousarray(weight.T),
}
right = {}
print("version: safetensors", safetensors.__version__)
print("expected: every array is read back as it was, or refused")
for name, array in CASES.items():
    back = load(save({"weight": array}))["weight"]
    assert back.shape == array.shape and back.dtype == array.dtype
    right[name] = bool(np.array_equal(back, array))
    print(f"seen: {name}: wrote {array.tolist()}, read {back.tolist()}")
if right != {name: name in ("contiguous", "ascontiguousarray of the transposed") for name in CASES}:
    raise SystemExit(f"changed: read back right: {right}")
PY
venv/bin/python check.py
