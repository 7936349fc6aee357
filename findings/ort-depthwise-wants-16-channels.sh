#!/usr/bin/env bash
# Package:  onnxruntime 1.32.0 (models built with onnx 1.23.2)
# Expected: an integer depthwise convolution of 120 channels takes no longer than one of 128.
# Happens:  with 120 channels QLinearConv takes about three times as long as with 128: its fast kernel takes 16
#           channels at a time, and a number that is no multiple of 16 sends all of them to a slow one. Float Conv
#           has no such step. Seen on x86-64 with AVX-512 VNNI.
# Matters:  MobileNetV3 and EfficientNet have such layers (72, 120, 200, 184 channels); as many channels of zeros as
#           complete a block make the quantized file faster, with the same results.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cat > check.py <<'PY'
import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper, parser

MODEL = """<ir_version: 10, opset_import: ["" : 21]>
g (uint8[1,{0},28,28] x) => (uint8[1,{0},28,28] y)
<float s = {{0.02}}, uint8 z = {{0}}, float t = {{0.125}}>
{{ y = QLinearConv <pads = [2, 2, 2, 2], group = {0}> (x, s, z, w, k, v, t, z) }}"""
FLOAT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[1,{0},28,28] x) => (float[1,{0},28,28] y)
{{ y = Conv <pads = [2, 2, 2, 2], group = {0}> (x, w) }}"""
ROUNDS = 60


def runner(channels, quantized):
    rng = np.random.default_rng(0)
    codes = rng.integers(-64, 65, (channels, 1, 5, 5)).astype(np.int8)
    model = parser.parse_model((MODEL if quantized else FLOAT).format(channels))
    arrays = {"w": codes, "k": np.full(channels, 0.01, np.float32), "v": np.zeros(channels, np.int8)}
    if not quantized:
        arrays = {"w": codes.astype(np.float32)}
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = rng.integers(0, 256, (1, channels, 28, 28)).astype(np.uint8 if quantized else np.float32)
    return lambda: session.run(None, {"x": images})


ratios = {}
for kind, quantized in (("integer", True), ("float", False)):
    runs = {channels: runner(channels, quantized) for channels in (120, 128)}
    best = dict.fromkeys(runs, np.inf)
    for _ in range(ROUNDS):  # in turns, the fastest of each: other work on the machine hardly counts
        for channels, run in runs.items():
            start = time.perf_counter()
            for _ in range(5):
                run()
            best[channels] = min(best[channels], (time.perf_counter() - start) / 5)
    ratios[kind] = best[120] / best[128]
    print(f"seen: {kind:7s} depthwise, 120 channels {1e6 * best[120]:6.0f} us, 128 channels {1e6 * best[128]:6.0f} us, "
          f"ratio {ratios[kind]:.2f}")
print("version: onnxruntime", ort.__version__)
print("expected: both ratios at most about 1")
if not (ratios["integer"] > 1.6 and ratios["float"] < 1.4):
    raise SystemExit(f"changed: {ratios}")
PY
venv/bin/python check.py
