"""Write the integer form of a student as ONNX with QuantizeLinear and DequantizeLinear.

The graph comes from ``torch.onnx``; ours is what it cannot know: which integer type holds which code.

    container   weights of at most 4 bits    what ONNX Runtime does with them on a CPU
    int4        INT4                         float kernels; the smallest file
    int8        INT8                         float kernels
    matmul      INT8                         integer kernels: convolutions are written as products of integer matrices (`integer_products.py`)

Weights of 5 to 7 bits are INT8 in all, those of 8 bits UINT8, their codes raised by 128: on x86 processors without VNNI ONNX Runtime adds
two products of UINT8 and INT8 in 16 bits, which full-range codes overflow. Activations, which no file stores, are UINT8 in all: behind a
UINT4 activation ONNX Runtime 1.32 moves a pooling into the integers and then has no kernel for it. A code narrower than its container is
kept in its range by a ``Min`` before QuantizeLinear, which saturates at the container's end alone; the lower end, code 0, is the container's.

Both DequantizeLinear in front of a layer have scale 1: the layer adds whole numbers, exactly in float as in integers, and a Mul and an Add
behind it do the rest, as `integer_form.py` says. So every engine, every container and PyTorch get the same codes. With the scales in
DequantizeLinear and bias and batch norm in the layer, sums differ in their last digit between engines, and ONNX Runtime rounds the bias to
int32 at scale s_x s_w where it quantizes the result: below 8 bits that step is as coarse as the products, and answers change.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnxscript
import torch
from onnx import numpy_helper
from torch import fx

from synq.export.integer_matmul import use_integer_products
from synq.export.verify import IMAGES

Container = Literal["int4", "int8", "matmul"]
OPSET = 21
"""The first operator set in which DequantizeLinear reads 4-bit integers."""
LOGITS = "logits"
"""Name of the model's output (N, K)."""
NARROW = 4
"""Largest width that a 4-bit container holds."""
WIDTH = "synq.bits"
"""Key under which a node says the width of the weight that it reads; removed before the file is written."""
FULL = 8
"""Width that fills its container."""
CONTAINER_MAX = 255
"""Largest code of UINT8."""


def write_onnx(form: fx.GraphModule, input_size: tuple[int, int, int], container: Container = "int8") -> bytes:
    """Return the ONNX model of an integer form, checked by ``onnx.checker``.

    Args:
        form: A network of ``integer_form`` of the operations "onnx".
        input_size: (C, H, W) of one image.
        container: How integers are held, see above.

    Returns:
        A model ``images`` float32 (N, C, H, W) -> ``logits`` float32 (N, K), N free.

    Raises:
        ValueError: If PyTorch cannot express the network in ONNX; the message says which part.
    """
    return write_container(onnx_graph(form, input_size), container)


def onnx_graph(form: fx.GraphModule, input_size: tuple[int, int, int]) -> onnx.ModelProto:
    """Return the network as ``torch.onnx`` writes it, the slow part, which all containers have in common.

    Args:
        form: A network of ``integer_form`` of the operations "onnx".
        input_size: (C, H, W) of one image.

    Returns:
        What `write_container` makes files of.

    Raises:
        ValueError: As `write_onnx`.
    """
    sample = torch.zeros(2, *input_size)
    with _quiet():
        try:
            program = torch.onnx.export(
                form,
                (sample,),
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
                input_names=[IMAGES],
                output_names=[LOGITS],
                custom_translation_table=_translations(),
                verbose=False,
            )
        except Exception as error:  # torch.onnx raises many types; all of them mean the same to the user
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"the student cannot be written as ONNX: {lines[0]}") from error
    assert program is not None
    return program.model_proto


def write_container(graph: onnx.ModelProto, container: Container) -> bytes:
    """Return the model of one container, as `write_onnx`.

    Args:
        graph: Of `onnx_graph`; it stays as it is.
        container: How integers are held.

    Raises:
        ValueError: As `write_onnx`.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    _set_containers(model, container)
    if container == "matmul":
        use_integer_products(model)
    _drop_unused(model.graph)
    _strip(model)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"the student cannot be written as ONNX: {str(error).strip().splitlines()[0]}") from error
    return bytes(model.SerializeToString())


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How ``torch.onnx`` writes the three operations of an integer form."""
    op: Any = onnxscript.opset21
    ops = torch.ops.quantized_decomposed

    def constants(scale: float, zero_point: int) -> tuple[Any, Any]:
        return op.Constant(value_float=scale), op.Constant(value=onnxscript.ir.tensor(np.array(zero_point, np.uint8)))

    def quantize(x: Any, scale: float, zero_point: int, quant_max: int) -> Any:
        if quant_max < CONTAINER_MAX:
            x = op.Min(x, op.Constant(value_float=float(np.float32(scale) * np.float32(quant_max - zero_point))))
        return op.QuantizeLinear(x, *constants(scale, zero_point))

    def dequantize(
        codes: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int, out_dtype: Any = None
    ) -> Any:
        return op.DequantizeLinear(codes, *constants(scale, zero_point))

    def weight(
        codes: Any,
        scale: Any,
        zero_point: Any,
        axis: int,
        quant_min: int,
        quant_max: int,
        dtype: int,
        out_dtype: Any = None,
    ) -> Any:
        values = op.DequantizeLinear(codes, scale, zero_point, axis=axis)
        values.producer().metadata_props[WIDTH] = str((quant_max - quant_min + 1).bit_length() - 1)
        return values

    return {
        torch.ops.synq.quantize_per_tensor.default: quantize,
        ops.dequantize_per_tensor.default: dequantize,
        ops.dequantize_per_channel.default: weight,
    }


def _strip(model: onnx.ModelProto) -> None:
    """Remove what an engine never reads: stack traces, and shapes that it infers itself."""
    for holder in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.initializer,
        *model.graph.input,
        *model.graph.output,
    ):
        del holder.metadata_props[:]
        holder.doc_string = ""
    del model.graph.value_info[:]


def _set_containers(model: onnx.ModelProto, container: Container) -> None:
    """Give codes and zero points of the weights the integer type that holds them.

    ``torch.onnx`` merges equal tensors, also those of layers of different widths: each type gets a tensor of its own.
    """
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    made: dict[tuple[str, type], str] = {}
    for node in model.graph.node:
        width = next((int(entry.value) for entry in node.metadata_props if entry.key == WIDTH), None)
        if width is None:
            continue
        kind = np.uint8 if width == FULL else ml_dtypes.int4 if container == "int4" and width <= NARROW else np.int8
        for place in (0, 2):
            name = node.input[place]
            if (name, kind) not in made:
                values = numpy_helper.to_array(known[name]).astype(np.int16) + (128 if width == FULL else 0)
                made[name, kind] = f"{name}.{np.dtype(kind).name}"
                model.graph.initializer.append(numpy_helper.from_array(values.astype(kind), made[name, kind]))
            node.input[place] = made[name, kind]


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the constants that nothing reads any more."""
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of the exporter about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
