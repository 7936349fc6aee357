#!/usr/bin/env bash
# Package:  ai-edge-litert 2.3.0 (models built with tflite 2.18.0 and flatbuffers 25.12.19)
# Expected: the INT8 code of a result is its value in steps, rounded, plus the zero point: moving the output's
#           zero point by one moves every code by one, as the quantization specification of the format says.
# Happens:  with the default delegate (XNNPACK), MUL and MEAN add the zero point before they round halves to even, so that
#           with an odd one every result half-way between two codes gets the other neighbor. A convolution rounds
#           first and does not depend on it; nor do MUL and MEAN of the same files without delegates.
# Matters:  a simulated student with one rounding rule for all operations is off by one code at ties, and each such
#           code moves all logits behind it.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    ai-edge-litert==2.3.0 tflite==2.18.0 flatbuffers==25.12.19 numpy==2.4.6

cat > check.py <<'PY'
from importlib.metadata import version

import flatbuffers
import numpy as np
import tflite
from ai_edge_litert.interpreter import Interpreter, OpResolverType

SIZE = (1, 2, 2, 64)  # images, height, width, channels
STEP = 0.5


def vector(b, items, start):
    start(b, len(items))
    for item in reversed(items):
        b.PrependUOffsetTRelative(item)
    return b.EndVector()


def ints(b, values):
    return b.CreateNumpyVector(np.array(values, np.int32))


def tensor(b, name, shape, step, zero_point, buffer=0, kind=tflite.TensorType.INT8):
    label, sizes = b.CreateString(name), ints(b, shape)
    scales = b.CreateNumpyVector(np.array([step], np.float32))
    zeros = b.CreateNumpyVector(np.array([zero_point], np.int64))
    tflite.QuantizationParametersStart(b)
    tflite.QuantizationParametersAddScale(b, scales)
    tflite.QuantizationParametersAddZeroPoint(b, zeros)
    grid = tflite.QuantizationParametersEnd(b)
    tflite.TensorStart(b)
    tflite.TensorAddShape(b, sizes)
    tflite.TensorAddType(b, kind)
    tflite.TensorAddBuffer(b, buffer)
    tflite.TensorAddName(b, label)
    if kind == tflite.TensorType.INT8 or name == "bias":
        tflite.TensorAddQuantization(b, grid)
    return tflite.TensorEnd(b)


def model(operation, zero_point):
    """One operation on INT8 codes; x and the result have steps of 0.5."""
    b = flatbuffers.Builder(0)
    data = [b""]
    tensors = [tensor(b, "x", SIZE, STEP, 0)]
    if operation == "MUL":
        code, kind, inputs = tflite.BuiltinOperator.MUL, tflite.BuiltinOptions.MulOptions, [0, 0]
        tensors.append(tensor(b, "y", SIZE, STEP, zero_point))
        tflite.MulOptionsStart(b)
        options = tflite.MulOptionsEnd(b)
    elif operation == "MEAN":
        code, kind, inputs = tflite.BuiltinOperator.MEAN, tflite.BuiltinOptions.ReducerOptions, [0, 1]
        data.append(np.array([1, 2], np.int32).tobytes())
        tensors.append(tensor(b, "axes", [2], 1.0, 0, 1, tflite.TensorType.INT32))
        tensors.append(tensor(b, "y", (1, 1, 1, 64), STEP, zero_point))
        tflite.ReducerOptionsStart(b)
        tflite.ReducerOptionsAddKeepDims(b, True)
        options = tflite.ReducerOptionsEnd(b)
    else:
        code, kind, inputs = tflite.BuiltinOperator.CONV_2D, tflite.BuiltinOptions.Conv2DOptions, [0, 1, 2]
        data += [np.eye(64, dtype=np.int8).tobytes(), np.zeros(64, np.int32).tobytes()]
        tensors.append(tensor(b, "weight", (64, 1, 1, 64), 0.5, 0, 1))
        tensors.append(tensor(b, "bias", [64], 0.25, 0, 2, tflite.TensorType.INT32))
        tensors.append(tensor(b, "y", SIZE, STEP, zero_point))
        tflite.Conv2DOptionsStart(b)
        tflite.Conv2DOptionsAddStrideH(b, 1)
        tflite.Conv2DOptionsAddStrideW(b, 1)
        options = tflite.Conv2DOptionsEnd(b)
    output = len(tensors) - 1
    read, made, ends = ints(b, inputs), ints(b, [output]), (ints(b, [0]), ints(b, [output]))
    tflite.OperatorStart(b)
    tflite.OperatorAddOpcodeIndex(b, 0)
    tflite.OperatorAddInputs(b, read)
    tflite.OperatorAddOutputs(b, made)
    tflite.OperatorAddBuiltinOptionsType(b, kind)
    tflite.OperatorAddBuiltinOptions(b, options)
    operators = vector(b, [tflite.OperatorEnd(b)], tflite.SubGraphStartOperatorsVector)
    listed = vector(b, tensors, tflite.SubGraphStartTensorsVector)
    tflite.SubGraphStart(b)
    tflite.SubGraphAddTensors(b, listed)
    tflite.SubGraphAddInputs(b, ends[0])
    tflite.SubGraphAddOutputs(b, ends[1])
    tflite.SubGraphAddOperators(b, operators)
    graphs = vector(b, [tflite.SubGraphEnd(b)], tflite.ModelStartSubgraphsVector)
    tflite.OperatorCodeStart(b)
    tflite.OperatorCodeAddDeprecatedBuiltinCode(b, code)
    tflite.OperatorCodeAddBuiltinCode(b, code)
    tflite.OperatorCodeAddVersion(b, {"CONV_2D": 3}.get(operation, 2))
    codes = vector(b, [tflite.OperatorCodeEnd(b)], tflite.ModelStartOperatorCodesVector)
    buffers = []
    for content in data:
        held = b.CreateByteVector(content) if content else None
        tflite.BufferStart(b)
        if held is not None:
            tflite.BufferAddData(b, held)
        buffers.append(tflite.BufferEnd(b))
    stored = vector(b, buffers, tflite.ModelStartBuffersVector)
    tflite.ModelStart(b)
    tflite.ModelAddVersion(b, 3)
    tflite.ModelAddOperatorCodes(b, codes)
    tflite.ModelAddSubgraphs(b, graphs)
    tflite.ModelAddBuffers(b, stored)
    b.Finish(tflite.ModelEnd(b), b"TFL3")
    return bytes(b.Output())


def result(operation, zero_point, resolver):
    engine = Interpreter(model_content=model(operation, zero_point), num_threads=1, experimental_op_resolver_type=resolver)
    engine.allocate_tensors()
    engine.set_tensor(engine.get_input_details()[0]["index"], x)
    engine.invoke()
    return engine.get_tensor(engine.get_output_details()[0]["index"]).astype(int) - zero_point


x = np.random.default_rng(0).integers(1, 12, SIZE).astype(np.int8)  # products (0.5 q)^2 = 0.25 q^2 in steps of 0.5
default, plain = OpResolverType.AUTO, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
share = {}
for operation in ("MUL", "MEAN", "CONV_2D"):
    for name, resolver in (("default", default), ("no delegate", plain)):
        even, odd = result(operation, 0, resolver), result(operation, 1, resolver)
        assert abs(even - odd).max() <= 1
        share[operation, name] = float((even != odd).mean())

print("version: ai-edge-litert", version("ai-edge-litert"))
print("expected: the same values whatever the zero point of the output")
for (operation, name), value in share.items():
    print(f"seen: {operation}, {name}: {100 * value:.0f} % of the values differ between zero point 0 and 1")
held = (
    min(share["MUL", "default"], share["MEAN", "default"]) > 0.1
    and share["CONV_2D", "default"] == 0
    and all(value == 0 for (_, name), value in share.items() if name == "no delegate")
)
if not held:
    raise SystemExit("changed: MUL and MEAN no longer round with the zero point, or others do")
PY
venv/bin/python check.py 2> >(grep -v -E "INFO|WARNING" >&2)
