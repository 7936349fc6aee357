"""What a network must be to serve as a teacher: a classifier of single images, with plain weights."""

import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.network.tracing import check_plain_weights

_OTHER_NORM = re.compile(r"(Layer|Group|Instance|RMS|Frozen\w*)\w*Norm")
"""Normalizations without running statistics of the data."""
_TASKS = {
    "torchvision.models.detection": "a detector",
    "torchvision.models.segmentation": "a segmentation network",
    "torchvision.models.video": "a classifier of videos",
    "torchvision.models.optical_flow": "a network for optical flow",
}
"""Libraries of networks for other tasks, which may take long to run and whose outputs differ."""


def check_task(module: nn.Module, name: str) -> None:
    """Reject networks that a library made for another task than to classify an image.

    Args:
        module: The network.
        name: Name of the model, for messages.

    Raises:
        ValueError: If it is one; the message names the task.
    """
    for kind in type(module).__mro__:
        task = next((task for package, task in _TASKS.items() if kind.__module__.startswith(package)), None)
        if task is not None:
            raise ValueError(
                f"teacher must classify one image into one of its classes, but {name} "
                f"({type(module).__name__}) is {task}"
            )


def check_architecture(module: nn.Module, name: str) -> None:
    """Reject unsupported architectures: BatchNorm without running statistics, parametrized weights.

    Args:
        module: The classifier.
        name: Name of the model, for messages.

    Raises:
        ValueError: If the architecture is unsupported; the message names the reason and an alternative.
    """
    check_plain_weights(module)
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    if norms and not any(part.running_mean is not None for part in norms):
        raise ValueError(
            f"teacher must have BatchNorm layers with running statistics, or none, but those of {name} keep none "
            "(track_running_stats=False), so that the logits of an image depend on the others of its batch"
        )


def statistics_note(module: nn.Module) -> str:
    """Return one sentence on what guides the synthesis of a classifier without BatchNorm statistics, "" for others.

    Args:
        module: The classifier.
    """
    parts = list(module.modules())
    if any(isinstance(part, _BatchNorm) for part in parts):
        return ""
    others = sorted({type(part).__name__ for part in parts if _OTHER_NORM.search(type(part).__name__)})
    norms = f"{', '.join(others)} and " if others else ""
    return (
        f"no BatchNorm statistics ({norms}no running means): images are synthesized from labels, attention and tokens; "
        "if BatchNorm was folded into the convolutions, load the unfolded model"
    )
