"""The ONNX exporter of PyTorch, with translations of the quantization operations of an integer form."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnxscript
import torch
from torch import Tensor, nn

OPSET = 21
"""First ONNX opset in which DequantizeLinear supports INT4."""
BITS_KEY = "synq.bits"
"""Metadata key of a DequantizeLinear node for the bit-width of its weight; removed before the file is written."""
UINT8_MAX = 255
"""Largest code of UINT8."""


def export_by_torch(
    net: nn.Module,
    samples: tuple[Tensor, ...],
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> onnx.ModelProto:
    """Return the ONNX model that ``torch.onnx`` makes of a network, without a message on the terminal.

    Args:
        net: A network, in evaluation mode.
        samples: Its inputs.
        dynamic_shapes: As for ``torch.export``; None: the shapes of the samples.
        input_names, output_names: Names of the inputs and outputs; None: chosen by the exporter.

    Raises:
        Exception: ``torch.onnx`` raises many types; see `operation_check.reason`.
    """
    with _quiet():
        program = torch.onnx.export(
            net,
            samples,
            dynamo=True,
            opset_version=OPSET,
            optimize=True,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
            custom_translation_table=_translations(),
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the ONNX translations of the three quantization ops of an integer form, and of two joins.

    The exporter's own translations of ``hstack`` and ``dstack`` branch on the number of axes and map over sequences; in
    some networks their branches read values by names that the exporter has changed since, and the file is invalid.
    """
    op: Any = onnxscript.opset21
    ops = torch.ops.quantized_decomposed

    def constants(scale: float, zero_point: int) -> tuple[Any, Any]:
        return op.Constant(value_float=scale), op.Constant(value=onnxscript.ir.tensor(np.array(zero_point, np.uint8)))

    def quantize(x: Any, scale: float, zero_point: int, quant_max: int) -> Any:
        if quant_max < UINT8_MAX:
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
        values.producer().metadata_props[BITS_KEY] = str((quant_max - quant_min + 1).bit_length() - 1)
        return values

    def hstack(tensors: Any) -> Any:
        return op.Concat(*tensors, axis=1)  # an activation has two axes or more

    def dstack(tensors: Any) -> Any:
        if len(tensors[0].shape) == 2:
            tensors = [op.Unsqueeze(tensor, op.Constant(value_ints=[2])) for tensor in tensors]
        return op.Concat(*tensors, axis=2)

    return {
        torch.ops.aten.hstack.default: hstack,
        torch.ops.aten.dstack.default: dstack,
        torch.ops.synq.quantize_per_tensor.default: quantize,
        ops.dequantize_per_tensor.default: dequantize,
        ops.dequantize_per_channel.default: weight,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log messages and warnings of the exporter inside the ``with`` block."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
