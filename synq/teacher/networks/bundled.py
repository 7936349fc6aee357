"""The architecture of a bundled teacher, from the metadata of its file."""

from collections.abc import Mapping

from torch import nn

from synq.teacher.cifar_resnet import cifar_resnet
from synq.teacher.networks.small_vit import vision_transformer


def bundled_network(metadata: Mapping[str, str]) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return the untrained network, and the (C, H, W) of its images, of a file of `launch/train_bundled_teacher.py`.

    Args:
        metadata: Of the file: input_size as "C,H,W", num_classes, depth, width, and for a transformer heads and patch.
    """
    depth, width, classes = (int(metadata[key]) for key in ("depth", "width", "num_classes"))
    channels, height, side = (int(size) for size in metadata["input_size"].split(","))
    size = (channels, height, side)
    if "heads" not in metadata:
        return cifar_resnet(depth, classes, channels, width), size
    heads, patch = int(metadata["heads"]), int(metadata["patch"])
    return vision_transformer(width, depth, heads, classes=classes, input_size=size, patch=patch), size
