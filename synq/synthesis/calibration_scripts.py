"""Scripts that calibrate other quantizers with synthetic images; `$NAME` and the like are replaced when one is written.

Versions at which they were run: onnxruntime 1.32, nncf 3.4 with openvino 2026.4, ai-edge-quantizer 0.10. Those for
modelopt, aimet and mct are by their documentation.
"""

_HEADER = '''"""$COUNT synthetic images of $NAME as calibration data$FOR.

images.npy: float32, $SHAPE, the network's input: (pixel / 255 - mean) / std with mean $MEAN and std $STD.
'''
_START = '''"""

import sys
from pathlib import Path

import numpy as np

IMAGES = np.load(Path(__file__).with_name("images.npy"), mmap_mode="r")
'''


def _script(tool: str, usage: str, code: str) -> str:
    return _HEADER.replace("$FOR", f" for {tool}") + f"\n{usage}\n" + _START + code


SCRIPTS = {
    "onnxruntime": _script(
        "onnxruntime.quantization",
        "    python calibrate.py float.onnx int8.onnx",
        '''

def reader(input_name):
    """Return a CalibrationDataReader of the images, one by one."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = ({input_name: IMAGES[i : i + 1]} for i in range(len(IMAGES)))

        def get_next(self):
            return next(self.batches, None)

    return Reader()


def main(source, output):
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = str(output) + ".prepared.onnx"
    quant_pre_process(source, prepared)  # folds BatchNorm into the convolutions
    quantize_static(
        prepared,
        output,
        reader(onnx.load(source, load_external_data=False).graph.input[0].name),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    Path(prepared).unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
''',
    ),
    "nncf": _script(
        "NNCF with OpenVINO",
        "    python calibrate.py float.onnx int8.xml",
        '''

def dataset():
    """Return an nncf.Dataset of the images, one by one."""
    import nncf

    return nncf.Dataset([np.array(IMAGES[i : i + 1]) for i in range(len(IMAGES))])


def main(source, output):
    import nncf
    import openvino

    network = openvino.Core().read_model(source)
    quantized = nncf.quantize(network, dataset(), subset_size=len(IMAGES))
    openvino.save_model(quantized, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
''',
    ),
    "litert": _script(
        "LiteRT's ai-edge-quantizer",
        "    python calibrate.py float.tflite int8.tflite",
        '''

def calibration_data(source):
    """Return the images by signature and input of a float .tflite, one by one."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(source))
    signature, tensors = next(iter(interpreter.get_signature_list().items()))
    return {signature: [{tensors["inputs"][0]: np.array(IMAGES[i : i + 1])} for i in range(len(IMAGES))]}


def main(source, output):
    from ai_edge_quantizer import calibrator, quantizer, recipe, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    # Quantizer.calibrate takes a moving average of each image's extremes, and cuts what most images exceed.
    settings, manager = recipe.static_wi8_ai8(), recipe_manager.RecipeManager()
    manager.load_quantization_recipe(settings)
    ranges = calibrator.Calibrator(source, qsv_update_func=qsv_utils.min_max_update)
    ranges.calibrate(calibration_data(source), manager)
    quantized = quantizer.Quantizer(source, settings)
    quantized.quantize(ranges.get_model_qsvs()).export_model(output, overwrite=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
''',
    ),
    "modelopt": _script(
        "NVIDIA ModelOpt (ONNX to TensorRT)",
        "Its command reads the array itself, for a network with a single input:\n\n"
        "    python -m modelopt.onnx.quantization --onnx_path=float.onnx --quantize_mode=int8 \\\\\n"
        "        --calibration_data_path=images.npy --output_path=int8.onnx\n\n"
        "The same from Python:    python calibrate.py float.onnx int8.onnx",
        """

def main(source, output):
    from modelopt.onnx.quantization import quantize

    quantize(source, quantize_mode="int8", calibration_data=np.array(IMAGES), output_path=output)


if __name__ == "__main__":
    main(*sys.argv[1:])
""",
    ),
    "aimet": _script(
        "AIMET",
        "    from calibrate import calibrate\n    sim = calibrate(model)        # model: torch.nn.Module in eval mode",
        '''

def batches(size=32):
    """Yield the images as tensors, (size, C, H, W) each."""
    import torch

    for i in range(0, len(IMAGES), size):
        yield torch.from_numpy(np.array(IMAGES[i : i + size]))


def calibrate(model):
    """Return a QuantizationSimModel whose ranges are those of the images."""
    import torch
    from aimet_torch.quantsim import QuantizationSimModel

    device = next(model.parameters()).device
    sim = QuantizationSimModel(model, dummy_input=next(batches(1)).to(device))

    def forward(simulated, *_):
        with torch.no_grad():
            for images in batches():
                simulated(images.to(device))

    sim.compute_encodings(forward)
    return sim


if __name__ == "__main__":
    sys.exit(__doc__)
''',
    ),
    "mct": _script(
        "Sony's Model Compression Toolkit",
        "    from calibrate import calibrate\n    quantized, information = calibrate(model)  # of torch.nn",
        '''

def representative_data_gen(size=1):
    """Yield the inputs of the network: a list of one array (size, C, H, W)."""
    for i in range(0, len(IMAGES), size):
        yield [np.array(IMAGES[i : i + size])]


def calibrate(model):
    """Return the quantized model and what MCT reports of it."""
    import model_compression_toolkit as mct

    return mct.ptq.pytorch_post_training_quantization(model, representative_data_gen)


if __name__ == "__main__":
    sys.exit(__doc__)
''',
    ),
}
"""Script of each quantizer."""
