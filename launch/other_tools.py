"""Quantization tools that make no file for one engine only, or a second one for it: rows of `compare_tools.py`.

Each gets the float network, its ONNX file and the images, and is used with its own defaults for 8 bits where its name
has nothing else. A tool without a file that an engine here runs is measured in its own simulation in PyTorch.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from synq.export.targets.formats import FORMATS
from synq.export.verify import IMAGES
from synq.sweeps.benchmarks.engine_files import File
from synq.sweeps.benchmarks.engine_tools import quantize_statically

SIMULATION = "simulation"
"""Engine of a tool whose result is not a file."""


@dataclass(frozen=True, kw_only=True)
class OtherTool:
    """A tool.

    Attributes:
        package: Python package that it needs.
        make: (float network, float ONNX file, images (N, C, H, W)) -> result.
    """

    package: str
    make: Callable[[nn.Module, bytes, Tensor], File]

    @property
    def is_installed(self) -> bool:
        """Whether its package is installed."""
        return find_spec(self.package) is not None


def _onnx_file(content: bytes) -> File:
    return File.of("onnxruntime", content, partial(FORMATS["onnxruntime"].open, content))


def _simulation(network: nn.Module) -> File:
    return File(size=0, open=lambda threads: network, layers=lambda: (0, 0))


def _quantize_static(module: nn.Module, float_file: bytes, images: Tensor, **options: bool) -> File:
    return _onnx_file(quantize_statically(float_file, images, **options))


def _quantize_dynamic(module: nn.Module, float_file: bytes, images: Tensor) -> File:
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, output = (Path(folder) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        source.write_bytes(float_file)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, output, per_channel=True)
        return _onnx_file(output.read_bytes())


def _nncf_onnx(module: nn.Module, float_file: bytes, images: Tensor) -> File:
    import nncf
    import onnx

    calibration = nncf.Dataset([{IMAGES: image[None].numpy()} for image in images])
    quantized = nncf.quantize(onnx.load_from_string(float_file), calibration, subset_size=len(images))
    return _onnx_file(quantized.SerializeToString())


def _aimet(module: nn.Module, float_file: bytes, images: Tensor, *, kind: str) -> File:
    import onnx
    from aimet_onnx.quantsim import QuantizationSimModel

    model = QuantizationSimModel(onnx.load_from_string(float_file), param_type=kind, activation_type=kind)
    model.compute_encodings([{IMAGES: image[None].numpy()} for image in images])
    return _onnx_file(model.to_onnx_qdq().SerializeToString())


def _mct(module: nn.Module, float_file: bytes, images: Tensor) -> File:
    import model_compression_toolkit

    quantized, _ = model_compression_toolkit.ptq.pytorch_post_training_quantization(
        module, lambda: ([part] for part in images.split(32))
    )
    return _simulation(quantized.cpu().eval())


def _neural_compressor(module: nn.Module, float_file: bytes, images: Tensor) -> File:
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import StaticQuantConfig, convert, prepare

    sizes: Any = ({0: torch.export.Dim("n", min=2)},)
    prepared = prepare(export(module, (images[:32],), dynamic_shapes=sizes), StaticQuantConfig())
    for part in images.split(32):
        prepared(part)
    quantized = convert(prepared)
    return _simulation(quantized)


OTHER_TOOLS: dict[str, dict[str, OtherTool]] = {
    "onnxruntime": {
        "quantize_static, reduce_range": OtherTool(
            package="onnxruntime", make=partial(_quantize_static, reduce_range=True)
        ),
        "quantize_static, float logits": OtherTool(
            package="onnxruntime", make=partial(_quantize_static, float_logits=True)
        ),
        "quantize_dynamic": OtherTool(package="onnxruntime", make=_quantize_dynamic),
        "NNCF (ONNX)": OtherTool(package="nncf", make=_nncf_onnx),
        "AIMET int8": OtherTool(package="aimet_onnx", make=partial(_aimet, kind="int8")),
        "AIMET int4": OtherTool(package="aimet_onnx", make=partial(_aimet, kind="int4")),
    },
    SIMULATION: {
        "Sony MCT": OtherTool(package="model_compression_toolkit", make=_mct),
        "Intel Neural Compressor": OtherTool(package="neural_compressor", make=_neural_compressor),
    },
}
"""By engine, then by the name of the row."""
