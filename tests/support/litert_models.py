"""Run .tflite files in LiteRT. Import it after `pytest.importorskip("ai_edge_litert")`."""

from collections import Counter

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor, from_numpy

from synq.engines.program import Program
from synq.engines.simulation import Simulation
from synq.export.tflite import write_tflite


def interpreter(data: bytes, batch: int = 1) -> Interpreter:
    """The file in LiteRT with its default delegate, XNNPACK, on one thread."""
    found = Interpreter(model_content=data, num_threads=1)
    [image] = found.get_input_details()
    if batch != 1:
        found.resize_tensor_input(image["index"], [batch, *image["shape"][1:]])
    found.allocate_tensors()
    return found


def logits_of(data: bytes, images: Tensor) -> Tensor:
    """Outputs of a file for images (N, C, H, W)."""
    engine = interpreter(data, len(images))
    engine.set_tensor(engine.get_input_details()[0]["index"], images.permute(0, 2, 3, 1).contiguous().numpy())
    engine.invoke()
    return from_numpy(np.array(engine.get_tensor(engine.get_output_details()[0]["index"])))


def differing_logits(program: Program, images: Tensor) -> int:
    """Number of logits that differ in any bit between the file in LiteRT and the simulation."""
    logits = logits_of(write_tflite(program), images)
    expected = Simulation(program)(images)
    assert logits.shape == expected.shape
    return int((logits != expected).sum())


def operators(data: bytes) -> Counter[str]:
    """How many operators of each kind run; those within a delegate are counted as what they are in the file, too."""
    return Counter(op["op_name"] for op in interpreter(data)._get_ops_details())
