"""What a `teacher.spec` without a source probably means, for its error message. Standard library only."""

import os
import re

from synq.config.identity import WEIGHT_SUFFIXES

_OTHER_WEIGHTS = (".ckpt", ".pkl", ".pickle", ".pt2", ".torchscript", ".h5", ".npz", ".index.json")
_ANOTHER_FRAMEWORK = (".onnx", ".tflite", ".pb", ".mlmodel", ".mlpackage", ".engine", ".xml")


def spec_hint(spec: str) -> str:
    """Return what to write instead of ``spec``, which has no colon, as the end of a message.

    Args:
        spec: A name, a path, or whatever was given as TEACHER.
    """
    lower = spec.lower()
    if lower.endswith(_ANOTHER_FRAMEWORK):
        return (
            "; the file of an inference engine has neither batch-norm statistics nor layers that can be trained: give "
            "the PyTorch network that it was made from, as FILE.py:FUNCTION"
        )
    if lower.endswith((*WEIGHT_SUFFIXES, *_OTHER_WEIGHTS)):
        return "; a weight file goes to `--teacher.weights`, and TEACHER names its network: SOURCE:NAME or FILE.py:NAME"
    if lower.endswith(".py"):
        return f"; name the function that returns the network: {spec}:FUNCTION"
    if os.path.isfile(os.path.join(spec, "config.json")):
        return f"; the folder looks like one of Hugging Face: did you mean hf:{spec}?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        return f"; {hub_hint(spec)}"
    if re.fullmatch(r"[\w.-]+", spec):
        return f"; did you mean torchvision:{spec} or timm:{spec}?"
    return ""


def hub_hint(name: str) -> str:
    """Return how a model of Hugging Face is loaded, as a part of a message.

    Args:
        name: Name of the model on the hub, such as microsoft/resnet-50.
    """
    return f"a model of Hugging Face is hf:{name}, or hf:FOLDER (pip install transformers)"
