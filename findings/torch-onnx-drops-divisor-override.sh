#!/usr/bin/env bash
# Package:  torch 2.13.0 (2.15.0 does the same; onnxruntime 1.32.0, onnxscript 0.7.2, onnx 1.23.2)
# Expected: torch.onnx.export of AvgPool2d(3, 2, 1, divisor_override=8) multiplies by 9/8, or refuses: AveragePool of
#           ONNX has no divisor.
# Happens:  the divisor is dropped without a word, by the default exporter and by the older one. What comes out
#           is the plain pool, divided by 9.
# Matters:  the file is another network, off by a constant factor that small-network tests with a tolerance let pass.
#           Write such a pool as pool times cells / divisor, or refuse it before the export.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 onnx==1.23.2 onnxruntime==1.32.0 onnxscript==0.7.2 numpy==2.4.6

cat > check.py <<'PY'
import logging
import warnings

import numpy as np
import onnxruntime as ort
import torch

logging.disable(logging.WARNING)
pool = torch.nn.AvgPool2d(3, 2, 1, divisor_override=8)
images = torch.ones(1, 1, 8, 8)
ratio, said = {}, []
for name, new in (("default exporter", True), ("dynamo=False", False)):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.onnx.export(pool, (images,), "pool.onnx", dynamo=new, verbose=False)
    said += [str(warning.message) for warning in warned if "divisor" in str(warning.message)]
    session = ort.InferenceSession("pool.onnx", providers=["CPUExecutionProvider"])
    answer = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    factor = answer / pool(images).numpy()
    assert np.allclose(factor, factor.mean())
    ratio[name] = round(float(factor.mean()), 4)

print("version: torch", torch.__version__)
print("expected: file / module = 1, or an error")
for name, value in ratio.items():
    print(f"seen: {name}: file / module = {value}")
print("seen: warnings that name the divisor:", len(said))
if set(ratio.values()) != {round(8 / 9, 4)} or said:
    raise SystemExit(f"changed: {ratio} {said}")
PY
venv/bin/python check.py
