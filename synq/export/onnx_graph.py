"""Write the integer form of a student as ONNX with QuantizeLinear and DequantizeLinear (Q/DQ).

``torch.onnx`` exports the graph; this module selects the integer type of each initializer, the container.

    container   weights of at most 4 bits   ONNX Runtime on a CPU
    int4        INT4                        float kernels; the smallest file
    int8        INT8                        float kernels
    matmul      INT8                        integer kernels: convolutions become matrix products (`integer_matmul.py`)

In all containers, weights of 5 to 7 bits are INT8, and those of 8 bits are UINT8, with 128 added to their codes: on x86
CPUs without VNNI, ONNX Runtime adds two products of UINT8 and INT8 in 16 bits, which overflows with full-range codes.
Activations, which are not stored in the file, are always UINT8: ONNX Runtime 1.32 fuses a pooling operation with a
preceding UINT4 activation, and then has no kernel for it. If quant_max of an activation is below the maximum of its
type, a ``Min`` before QuantizeLinear clamps it, because QuantizeLinear saturates only at the bounds of the type; the
lower bound, code 0, is the same.

Both DequantizeLinear nodes of a layer's inputs have scale 1: the layer adds integer values, which is exact in float as
in integer arithmetic, and a following Mul and Add apply gain and shift, see `integer_form.py`. So all engines, all
containers and PyTorch give the same codes. With the scales in DequantizeLinear and bias and batch norm in the layer,
sums would differ in their last digit between engines, and ONNX Runtime would round the bias to int32 with scale s_x s_w
if it quantizes the output: below 8 bits this scale is as coarse as the products, and predictions change.
"""

from collections.abc import Sequence
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx

from synq.export.ceil_pools import ceil_mode_to_pads
from synq.export.integer_matmul import convs_to_integer_matmul
from synq.export.onnx_exporter import BITS_KEY, export_by_torch
from synq.export.operation_check import reason, unexportable_operations
from synq.export.verify import IMAGES

Container = Literal["int4", "int8", "matmul"]
LOGITS = "logits"
"""Name of the output of the model, (N, K)."""
INT4_BITS = 4
"""Largest bit-width that INT4 can store."""
INT8_BITS = 8
"""Bit-width that uses the full range of an 8-bit type."""


def write_onnx(form: fx.GraphModule, input_size: tuple[int, int, int], container: Container = "int8") -> bytes:
    """Return the serialized ONNX model of an integer form, validated by ``onnx.checker``.

    Args:
        form: A network from ``integer_form`` with the operations "onnx".
        input_size: (C, H, W) of one image.
        container: Integer types of the weights, see above.

    Returns:
        A model ``images`` float32 (N, C, H, W) -> ``logits`` float32 (N, K), with a dynamic N.

    Raises:
        ValueError: If ``torch.onnx`` cannot export the network; the message names the operations and their layers.
    """
    return write_container(onnx_graph(form, input_size), container)


def onnx_graph(form: fx.GraphModule, input_size: tuple[int, int, int]) -> onnx.ModelProto:
    """Return the ONNX graph of an integer form, exported by ``torch.onnx``: the slow part, shared by all containers.

    Args:
        form: A network from ``integer_form`` with the operations "onnx".
        input_size: (C, H, W) of one image.

    Returns:
        The input of `write_container`.

    Raises:
        ValueError: As `write_onnx`.
    """
    sample = torch.zeros(2, *input_size)
    shapes = ({0: torch.export.Dim("N", min=1)},)
    try:
        model = export_by_torch(form, (sample,), shapes, [IMAGES], [LOGITS])
    except Exception as error:  # torch.onnx raises many types, all with the same meaning for the user
        raise ValueError(_rejection(unexportable_operations(form) or [reason(error)])) from error
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        # PyTorch 2.15 does so without a word where an operator's decomposition compares sizes (fmin, take_along_dim).
        raise ValueError(
            _rejection([f"an operation fixes the number of images at {len(sample)} in PyTorch's exporter"])
        )
    ceil_mode_to_pads(model)
    return model


def check_operations(form: fx.GraphModule) -> None:
    """Raise if an operation of an integer form cannot be exported to ONNX, or is exported as another operation.

    Args:
        form: A network from ``integer_form``, with recorded shapes.

    Raises:
        ValueError: The message names each such operation and its layer.
    """
    if lines := unexportable_operations(form):
        raise ValueError(_rejection(lines))


def _rejection(lines: Sequence[str]) -> str:
    return f"the student cannot be exported to ONNX: {'; '.join(lines)}"


def write_container(graph: onnx.ModelProto, container: Container) -> bytes:
    """Return the serialized ONNX model with the integer types of a container.

    Args:
        graph: From `onnx_graph`; not modified.
        container: Integer types of the weights.

    Returns:
        As `write_onnx`.

    Raises:
        ValueError: As `write_onnx`.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    _set_containers(model, container)
    if container == "matmul":
        convs_to_integer_matmul(model)
    _drop_unused(model.graph)
    _strip(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(_rejection([reason(error)])) from error
    return bytes(model.SerializeToString())


def _strip(model: onnx.ModelProto) -> None:
    """Remove the metadata that engines do not read: stack traces, and shapes, which they infer."""
    for proto in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.input,
        *model.graph.output,
    ):
        del proto.metadata_props[:]
        proto.doc_string = ""
    del model.graph.value_info[:]


def _set_containers(model: onnx.ModelProto, container: Container) -> None:
    """Convert the codes and zero points of the weights to the integer types of ``container``.

    ``torch.onnx`` merges equal initializers, also those of layers of different bit-widths, so each type gets a separate
    initializer.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    converted: dict[tuple[str, type], str] = {}
    for node in model.graph.node:
        bits = next((int(entry.value) for entry in node.metadata_props if entry.key == BITS_KEY), None)
        if bits is None:
            continue
        fits_int4 = container == "int4" and bits <= INT4_BITS
        dtype = np.uint8 if bits == INT8_BITS else ml_dtypes.int4 if fits_int4 else np.int8
        for index in (0, 2):  # inputs of DequantizeLinear: codes, scale, zero_point
            name = node.input[index]
            if (name, dtype) not in converted:
                values = numpy_helper.to_array(initializers[name]).astype(np.int16) + (128 if bits == INT8_BITS else 0)
                converted[name, dtype] = f"{name}.{np.dtype(dtype).name}"
                model.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), converted[name, dtype]))
            node.input[index] = converted[name, dtype]


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove initializers without a reader."""
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
