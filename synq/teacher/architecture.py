"""What a network must be to serve as a teacher: a classifier of images with BatchNorm statistics."""

import re

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.network.tracing import check_plain_weights

_ATTENTION = re.compile(r"multihead|transformer|attention|attn", re.IGNORECASE)
"""Names that convolutional networks use too; in a network without BatchNorm they mean a transformer."""
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
    """Reject unsupported architectures: networks without BatchNorm statistics, parametrized weights.

    Args:
        module: The classifier.
        name: Name of the model, for messages.

    Raises:
        ValueError: If the architecture is unsupported; the message names the reason and an alternative.
    """
    check_plain_weights(module)
    modules = list(module.modules())
    norms = [part for part in modules if isinstance(part, _BatchNorm)]
    if any(part.running_mean is not None for part in norms):
        return
    for part in modules:
        if isinstance(part, nn.MultiheadAttention) or hasattr(part, "qkv") or _has_name(part, _ATTENTION):
            raise ValueError(
                f"teacher must have BatchNorm layers with running statistics, from which the images are synthesized, "
                f"but {name} is a transformer without them (it contains {type(part).__name__}), which is not supported "
                "yet; use one with BatchNorm, such as torchvision:resnet18 or timm:levit_128s"
            )
    found = "whose BatchNorm layers keep none (track_running_stats=False)" if norms else "without BatchNorm layers"
    others = sorted({type(part).__name__ for part in modules if _OTHER_NORM.search(type(part).__name__)})
    found += f" (it has {', '.join(others)})" if others and not norms else ""
    raise ValueError(
        f"teacher must have BatchNorm layers with running statistics, but got {name}, {found}: the images are "
        "synthesized from these statistics. If BatchNorm was folded into the convolutions, load the unfolded model"
    )


def _has_name(part: nn.Module, pattern: re.Pattern[str]) -> bool:
    return pattern.search(type(part).__name__) is not None
