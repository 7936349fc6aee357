"""The files that each engine's own quantization tool makes of a float network: what ours are compared with.

All of them are calibrated on the same images, with the tool's own defaults for a network that runs in integer kernels
on a CPU: 8 bits, weights per output channel, ranges by minimum and maximum.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synq.export.targets.formats import FORMATS, model_in_openvino
from synq.export.verify import IMAGES

from .engine_files import File, parts_of
from .engine_kernels import layers_in_openvino


def own_tool(target: str) -> str:
    """Return the name of the quantization tool of a target's engine; "" if it is not installed."""
    name, package, _ = TOOLS[target]
    return name if find_spec(package) is not None else ""


def own_file(target: str, module: nn.Module, float_file: bytes, images: Tensor, batch: int) -> File:
    """Return the file that the engine's own tool makes of a float network.

    Args:
        target: Name of the engine.
        module: The float network, in evaluation mode.
        float_file: Its file in the format of the engine.
        images: (N, C, H, W) for the calibration.
        batch: Images of one run, which a file of ExecuTorch fixes.
    """
    made: File = TOOLS[target][2](module, float_file, images, batch)
    return made


def quantize_statically(
    float_file: bytes, images: Tensor, *, reduce_range: bool = False, float_logits: bool = False
) -> bytes:
    """Return the ONNX file that ONNX Runtime's quantize_static makes.

    Args:
        float_file: The float network as ONNX.
        images: (N, C, H, W) for the calibration.
        reduce_range: Whether weights have 7 bits, as processors without VNNI need.
        float_logits: Whether outputs of linear layers stay floats, as in a student's file; else logits are limited to
            the range of those of the images.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {IMAGES: image[None].numpy()}

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, output = (Path(folder) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        source.write_bytes(float_file)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            output,
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]} if float_logits else None,
        )
        return output.read_bytes()


def _quantize_static(module: nn.Module, float_file: bytes, images: Tensor, batch: int) -> File:
    return _file("onnxruntime", quantize_statically(float_file, images))


def _nncf(module: nn.Module, float_file: bytes, images: Tensor, batch: int) -> File:
    import nncf
    import openvino

    model = openvino.Core().read_model(float_file, b"")
    calibration = nncf.Dataset([image[None].numpy() for image in images])
    quantized = nncf.quantize(model, calibration, subset_size=len(images), fast_bias_correction=True)
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(quantized, Path(folder) / "model.xml", compress_to_fp16=False)
        stored = sum(path.stat().st_size for path in Path(folder).iterdir())
    return File(
        size=stored,
        open=lambda threads: model_in_openvino(quantized, threads),
        layers=lambda: layers_in_openvino(quantized),
    )


def _ai_edge_quantizer(module: nn.Module, float_file: bytes, images: Tensor, batch: int) -> File:
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe

    tool = quantizer.Quantizer(float_file, recipe.static_wi8_ai8())
    for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):  # images and logits stay floats
        tool.update_quantization_recipe(".*", end, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE)
    calibration = [{IMAGES: image[None].permute(0, 2, 3, 1).contiguous().numpy()} for image in images]
    ranges = tool.calibrate({"serving_default": calibration})
    return _file("litert", bytes(tool.quantize(ranges).quantized_model))


def _pt2e(module: nn.Module, float_file: bytes, images: Tensor, batch: int) -> File:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from synq.export.executorch import lowered_to_xnnpack

    rows = parts_of(images, batch)
    exported = torch.export.export(module, (rows[0],), strict=True).module()
    tool = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    observed = prepare_pt2e(exported, tool)
    for row in rows:
        observed(row)
    size = tuple(images.shape[1:])
    return _file("executorch", lowered_to_xnnpack(convert_pt2e(observed), size, batch))


def _file(target: str, content: bytes) -> File:
    return File.of(target, content, partial(FORMATS[target].open, content))


TOOLS: dict[str, tuple[str, str, Callable[..., File]]] = {
    "onnxruntime": ("quantize_static", "onnxruntime", _quantize_static),
    "openvino": ("NNCF", "nncf", _nncf),
    "litert": ("ai-edge-quantizer", "ai_edge_quantizer", _ai_edge_quantizer),
    "executorch": ("XNNPACKQuantizer (pt2e)", "torchao", _pt2e),
}
"""Target -> name of the tool, its package, and the function that runs it."""
