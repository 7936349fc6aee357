#!/usr/bin/env bash
# Package:  onnxruntime 1.32.0 (quantization tool; models built with onnx 1.23.2)
# Expected: quantize_static with CalibrationMethod.Entropy clips outliers: that is why one chooses it over MinMax.
# Happens:  with the tool's defaults it returns exactly the range of MinMax, also for 4,095 values of a normal
#           distribution and one at 100. The histogram has 128 bins by default and is to be cut to 128
#           quantized bins, so the only threshold that is tried is the whole range. Nothing is printed that says
#           so. With 2,048 bins, which only the calibrator underneath takes, it does clip.
# Matters:  a comparison of calibration methods through quantize_static compares MinMax with itself.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6

cat > check.py <<'PY'
import contextlib
import io
import logging

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper, parser
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import create_calibrator

logging.disable(logging.WARNING)
rng = np.random.default_rng(0)
batches = [np.append(rng.normal(size=4095), 100).astype(np.float32)[None] for _ in range(8)]


class Reader(CalibrationDataReader):
    def __init__(self):
        self.rest = iter(batches)

    def get_next(self):
        batch = next(self.rest, None)
        return None if batch is None else {"x": batch}


model = parser.parse_model("""<ir_version: 10, opset_import: ["" : 17]>
g (float[1,4096] x) => (float[1,1] y) { y = MatMul (x, w) }""")
model.graph.initializer.append(numpy_helper.from_array(np.ones((4096, 1), np.float32), "w"))
onnx.save(model, "float.onnx")
width = {}
for method in (CalibrationMethod.MinMax, CalibrationMethod.Entropy):
    with contextlib.redirect_stdout(io.StringIO()):
        quantize_static("float.onnx", "q.onnx", Reader(), calibrate_method=method, activation_type=QuantType.QUInt8)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load("q.onnx").graph.initializer}
    width[method.name] = 255 * float(values["x_scale"])
with contextlib.redirect_stdout(io.StringIO()):
    calibrator = create_calibrator(
        "float.onnx", calibrate_method=CalibrationMethod.Entropy, extra_options={"num_bins": 2048}
    )
    calibrator.collect_data(Reader())
    low, high = calibrator.compute_data()["x"].range_value
width["Entropy, 2,048 bins"] = float(np.squeeze(high) - np.squeeze(low))

print("version: onnxruntime", ort.__version__)
print("expected: Entropy much narrower than MinMax on a normal distribution with one outlier at 100")
for name, value in width.items():
    print(f"seen: {name:20s} range {value:.4f} wide")
if not (width["Entropy"] == width["MinMax"] > 100 and width["Entropy, 2,048 bins"] < 50):
    raise SystemExit(f"changed: {width}")
PY
venv/bin/python check.py
