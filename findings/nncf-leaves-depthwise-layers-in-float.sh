#!/usr/bin/env bash
# Package:  nncf 3.4.0, openvino 2026.4.1 (model built with onnx 1.23.2)
# Expected: nncf.quantize with its defaults gives the weight of a depthwise convolution one range for each channel, as
#           any other convolution, and OpenVINO computes it on a CPU with integers.
# Happens:  a 3 x 3 depthwise weight of an ONNX model gets a range for each channel and each column of its kernel, of
#           shape (C, 1, 1, 1, 3). No integer kernel has that, so every depthwise convolution runs in float. With the
#           widest of the three put in their place all of them run with integers.
# Matters:  a MobileNetV2 (17 of its 53 layers are depthwise) gets less than the speed that the engine has for it, and
#           a baseline "NNCF int8" is a mixture. Count the layers in the execution graph before comparing.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    nncf==3.4.0 openvino==2026.4.1 onnx==1.23.2 numpy==2.4.6

cat > check.py <<'PY'
import logging
from importlib.metadata import version

import nncf
import numpy as np
import onnx
import openvino as ov
from onnx import TensorProto, helper, numpy_helper

logging.disable(logging.WARNING)
CHANNELS, BLOCKS = 32, 3
random = np.random.default_rng(0)


def network():
    """Return a stem, blocks of a depthwise and a 1 x 1 convolution with ReLU, and a linear layer."""
    nodes, weights = [], []

    def convolution(x, name, shape, group):
        weight = random.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"{name}_w"))
        side = shape[2] // 2
        nodes.append(helper.make_node("Conv", [x, f"{name}_w"], [f"{name}_c"], name=name, pads=[side] * 4, group=group))
        nodes.append(helper.make_node("Relu", [f"{name}_c"], [f"{name}_r"]))
        return f"{name}_r"

    x = convolution("x", "stem", (CHANNELS, 3, 3, 3), 1)
    for number in range(BLOCKS):
        x = convolution(x, f"depthwise{number}", (CHANNELS, 1, 3, 3), CHANNELS)
        x = convolution(x, f"pointwise{number}", (CHANNELS, CHANNELS, 1, 1), 1)
    weights.append(numpy_helper.from_array(random.normal(0, 0.1, (10, CHANNELS)).astype(np.float32), "fc_w"))
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pool"]))
    nodes.append(helper.make_node("Flatten", ["pool"], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "fc_w"], ["y"], transB=1))
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name, shape in (("x", [1, 3, 32, 32]), ("y", [1, 10]))
    ]
    graph = helper.make_graph(nodes, "g", *ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


content = network()
images = [random.normal(0, 1, (1, 3, 32, 32)).astype(np.float32) for _ in range(32)]
core = ov.Core()


def precisions(model):
    """Return which precision each convolution runs in, by name."""
    graph = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).get_runtime_model()
    found = {}
    for node in graph.get_ordered_ops():
        facts = node.get_rt_info()
        if facts["layerType"].astype(str) == "Convolution":
            found[node.get_friendly_name().partition("/")[0]] = facts["runtimePrecision"].astype(str)
    return found


def widen(model):
    """Give the weight of every depthwise layer one range per channel, and return the shapes of those it had."""
    shapes = []
    for node in model.get_ops():
        if node.get_type_name() == "FakeQuantize" and len(node.input(1).get_shape()) == 5:
            shapes.append(tuple(node.input(1).get_shape()))
            for place in (1, 2, 3, 4):
                values = node.input(place).get_source_output().get_node().data
                widest = (values.min if place % 2 else values.max)(axis=(1, 2, 3, 4), keepdims=True)
                node.input(place).replace_source_output(ov.opset13.constant(widest).output(0))
    return shapes


quantized = nncf.quantize(core.read_model(content, b""), nncf.Dataset(images), subset_size=len(images))
default = precisions(quantized)
shapes = widen(quantized)
per_channel = precisions(quantized)
print("version: nncf", version("nncf"), "openvino", ov.__version__)
print(f"expected: ranges of shape {(CHANNELS, 1, 1, 1, 1)} for the weights of depthwise layers, u8 for every convolution")
print("seen: ranges of the weights of depthwise layers:", shapes)
print("seen: convolutions:", default)
print("seen: with one range for each channel instead:", per_channel)
floats = {name for name, precision in default.items() if precision == "f32"}
if floats != {f"depthwise{number}" for number in range(BLOCKS)} or set(per_channel.values()) != {"u8"} or set(shapes) != {(CHANNELS, 1, 1, 1, 3)}:
    raise SystemExit(f"changed: {default}, {per_channel}, {shapes}")
PY
venv/bin/python check.py
