"""What a network returns: its logits, taken from several values, or the reason why there are none."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from synq.network.tracers import image_parameter
from synq.network.tracing import accepting, output_getters

LOGITS = "logits"
_BOXES = {"boxes", "pred_boxes", "bbox_regression", "detection_boxes"}
"""Names of values that only detectors return."""


def choose_output(module: nn.Module, output: str | None, input_size: tuple[int, int, int]) -> None:
    """Make a classifier return its logits, in place, where it returns them among other values.

    Args:
        module: The classifier.
        output: As for `select_output`; None takes the only tensor, or the logits of a model of Hugging Face.
        input_size: (C, H, W).

    Raises:
        ValueError: If there is no such output, or none that can be logits.
    """
    if output is not None:
        select_output(module, output, input_size)
        return
    returned = _returned(module, input_size)
    _check_classifies(type(module).__name__, returned)
    if (found := _logits_name(returned)) is not None:
        _return_only(module, output_getters(returned)[found])


def select_output(module: nn.Module, output: str, input_size: tuple[int, int, int]) -> None:
    """Modify a classifier with several outputs in place, so that it returns only one of them.

    The class of the module is replaced by a new subclass. A wrapper module would change the names of its layers.

    Args:
        module: The classifier.
        output: Key of a mapping, index of a sequence, or attribute.
        input_size: (C, H, W).

    Raises:
        ValueError: If there is no such output.
    """
    getters = output_getters(_returned(module, input_size))
    if output not in getters:
        choices = f"be one of {', '.join(getters)}" if getters else "be left out: the model returns one value"
        raise ValueError(f"`teacher.output` must {choices}, but got {output!r}")
    _return_only(module, getters[output])


def _returned(module: nn.Module, input_size: tuple[int, int, int]) -> Any:
    image_parameter(type(module).forward)
    with accepting(type(module).__name__, input_size):
        return module(torch.zeros(2, *input_size))


def _return_only(module: nn.Module, get: Any) -> None:
    kind = type(module)

    def forward(self: nn.Module, x: Tensor) -> Any:
        return get(kind.forward(self, x))

    forward.__annotations__ = {}  # torch.fx would copy them into the graph's code, which enters the digest
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def _logits_name(returned: object) -> str | None:
    """Return the name of the one value that can only be the logits; None for a tensor, or where it must be chosen."""
    getters = output_getters(returned)
    tensors = [name for name, get in getters.items() if isinstance(get(returned), Tensor)]
    if any(kind.__name__ == "ModelOutput" for kind in type(returned).__mro__) and LOGITS in tensors:
        return LOGITS
    values = {id(get(returned)) for get in getters.values() if get(returned) is not None}
    return tensors[0] if tensors and len(values) == 1 else None


def _check_classifies(name: str, returned: object) -> None:
    """Raise ValueError if what a network returned for two images shows that it does something else than classify."""
    parts = [returned, *returned] if isinstance(returned, Sequence) else [returned]
    if any(isinstance(part, Mapping) and _BOXES & {str(key) for key in part} for part in parts):
        raise ValueError(
            f"teacher must classify one image into one of its classes, but {name} is a detector: it returns boxes"
        )
    values = [get(returned) for get in output_getters(returned).values()] or [returned]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if tensors and all(value.ndim == 4 and value.shape[2] * value.shape[3] > 1 for value in tensors):
        raise ValueError(
            f"teacher must return one (N, classes) tensor of logits, but {name} returned one of shape "
            f"{tuple(tensors[0].shape)}, a value per pixel: a segmentation network, or a network without its classifier"
        )
    if len(tensors) == 1 and tensors[0].ndim == 4:
        shape = tuple(tensors[0].shape)
        raise ValueError(
            f"teacher must return one (N, classes) tensor of logits, but {name} returned one of shape {shape}: "
            "return it as x.flatten(1)"
        )
    if len(tensors) == 1 and not tensors[0].is_floating_point():
        raise ValueError(
            f"teacher must return logits, but {name} returned values of type {str(tensors[0].dtype).split('.')[-1]}, "
            "such as class numbers: return what they are computed from"
        )
