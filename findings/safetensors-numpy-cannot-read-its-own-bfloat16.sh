#!/usr/bin/env bash
# Package:  safetensors 0.8.0 (numpy 2.4.6, ml_dtypes 0.6.0)
# Expected: what safetensors.numpy.save accepts, safetensors.numpy.load reads.
# Happens:  bfloat16 and 8-bit floating-point arrays (ml_dtypes, what JAX and ONNX tools hold them in) are saved
#           without complaint; loading the very bytes raises KeyError: 'BF16' ('F8_E4M3'), for the whole file, also
#           where only one of its tensors has such a type. The file itself is in order: its header is right.
# Matters:  a checkpoint written through NumPy in a low-precision format is found out to be unreadable there when it
#           is needed. Save the bits as uint16 (uint8) with the type's name in the metadata, or read by other means.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0

cat > check.py <<'PY'
import json
import struct

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import load, save

seen = {}
for kind in (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
    weight = np.arange(4).astype(kind)
    data = save({"bias": np.zeros(2, np.float32), "weight": weight})
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["weight"]
    try:
        answer = "equal" if np.array_equal(load(data)["weight"], weight) else "other values"
    except KeyError as error:
        answer = f"KeyError {error}"
    seen[np.dtype(kind).name] = header["dtype"], weight.tobytes() in data, answer

print("version: safetensors", safetensors.__version__)
print("expected: all three types come back equal")
for name, (written, intact, answer) in seen.items():
    print(f"seen: {name}: saved as {written}, its bytes in the file: {intact}, load: {answer}")
wanted = {
    "float16": ("F16", True, "equal"),
    "bfloat16": ("BF16", True, "KeyError 'BF16'"),
    "float8_e4m3fn": ("F8_E4M3", True, "KeyError 'F8_E4M3'"),
}
if seen != wanted:
    raise SystemExit(f"changed: {seen}")
PY
venv/bin/python check.py
