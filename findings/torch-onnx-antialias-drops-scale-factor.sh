#!/usr/bin/env bash
# Package:  torch 2.13.0 (2.15.0 does the same; onnxruntime 1.32.0, onnxscript 0.7.2, onnx 1.23.2)
# Expected: torch.onnx.export of interpolate(x, scale_factor=0.4, antialias=True) gives the module's values: 16 pixels
#           become 6, and PyTorch samples them with the given 0.4, not with 6/16.
# Happens:  the Resize in the file has the size only, as if size=6 had been given: with scale factors whose sizes are
#           not whole numbers all pixels are others. Without antialias, or with 0.5, the file is right.
# Matters:  a network that shrinks by such a factor is exported as another one, without a word, and the shapes agree.
#           Give sizes (or recompute_scale_factor=True) in networks that are to be exported.
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
from torch.nn.functional import interpolate

logging.disable(logging.WARNING)


class Resize(torch.nn.Module):
    """Interpolate with given settings."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings

    def forward(self, images):
        return interpolate(images, align_corners=False, **self.settings)


torch.manual_seed(0)
images, seen, said = torch.rand(1, 1, 16, 16), {}, []
for mode in ("bilinear", "bicubic"):
    for factor, antialias in ((0.4, True), (1.7, True), (0.4, False), (0.5, True)):
        net = Resize(scale_factor=factor, mode=mode, antialias=antialias).eval()
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            torch.onnx.export(net, (images,), "resize.onnx", dynamo=True, verbose=False)
        said += [str(entry.message) for entry in warned if "scale" in str(entry.message)]
        session = ort.InferenceSession("resize.onnx", providers=["CPUExecutionProvider"])
        answer = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        right = net(images)
        by_size = Resize(size=right.shape[2:], mode=mode, antialias=antialias)(images)
        far = [float(np.abs(answer - other.numpy()).max()) for other in (right, by_size)]
        seen[mode, factor, antialias] = far

print("version: torch", torch.__version__)
print("expected: the values of the file are those of the module")
for (mode, factor, antialias), (module, by_size) in seen.items():
    print(f"seen: {mode:8s} scale_factor {factor}, antialias {antialias!s:5s}: file from module {module:.6f},", end=" ")
    print(f"from the module with size instead {by_size:.6f}")
print("seen: warnings that name a scale:", len(said))
for (mode, factor, antialias), (module, by_size) in seen.items():
    lost = antialias and factor != 0.5
    if said or (module > 0.05) != lost or (module > 1e-4) != lost or (antialias and by_size > 1e-4):
        raise SystemExit(f"changed: {mode}, {factor}, {antialias}: {module}, {by_size}, {said}")
PY
venv/bin/python check.py
