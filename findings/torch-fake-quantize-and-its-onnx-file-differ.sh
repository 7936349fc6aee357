#!/usr/bin/env bash
# Package:  torch 2.13.0 (2.15.0 does the same; onnxruntime 1.32.0, onnxscript 0.7.2, onnx 1.23.2)
# Expected: fake_quantize_per_tensor_affine and the QuantizeLinear, DequantizeLinear pair that torch.onnx.export makes
#           of it give the same values: same scale, same zero point, both round half to even.
# Happens:  PyTorch multiplies by the float32 reciprocal of the scale, ONNX divides by the scale. Values halfway
#           between two codes fall on different sides: for scale 0.0235 all 0 .. 254 + 1/2 steps are tried, and
#           one in eight gets another code. For 0.1 and powers of two there is no difference.
# Matters:  halfway values are common where activations come from coarser grids (sums, pools, codes of the layer
#           before), and one flipped code is enough to move the logits. Simulate with a division, or choose steps
#           that are powers of two.
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
import onnx
import onnxruntime as ort
import torch

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")


class Quantize(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return torch.fake_quantize_per_tensor_affine(x, self.scale, 0, 0, 255)


differing = {}
for step in (0.0235, 0.3, 0.1, 0.0625):
    scale = float(np.float32(step))
    x = ((torch.arange(255).double() + 0.5) * scale).float()
    module = Quantize(scale)
    torch.onnx.export(module, (x,), "quantize.onnx", dynamo=True, verbose=False)
    assert [node.op_type for node in onnx.load("quantize.onnx").graph.node] == ["QuantizeLinear", "DequantizeLinear"]
    session = ort.InferenceSession("quantize.onnx", providers=["CPUExecutionProvider"])
    there = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    by_division = np.rint(x.numpy() / np.float32(scale))
    assert np.array_equal(np.rint(there / np.float32(scale)), by_division)  # the engine follows the specification
    differing[step] = int((np.rint(there / scale) != np.rint(module(x).numpy() / scale)).sum())

print("version: torch", torch.__version__)
print("expected: 0 of 255 halfway values differ for every scale")
for step, count in differing.items():
    print(f"seen: scale {step}: {count} of 255 codes differ")
if differing != {0.0235: 33, 0.3: 31, 0.1: 0, 0.0625: 0}:
    raise SystemExit(f"changed: {differing}")
PY
venv/bin/python check.py
