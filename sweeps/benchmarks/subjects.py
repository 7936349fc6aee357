"""The networks that are timed: built, placed and fused by the functions that a run uses."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from synq.config.run import QuantConfig, RuntimeConfig
from synq.finetune.responses import TappedNetwork
from synq.network.cam_site import locate_cam
from synq.network.tracing import trace_classifier, with_features
from synq.quant.fusion import fuse_rectified
from synq.quant.student import observe_ranges, quantize_model
from synq.runtime import place
from synq.teacher.cifar_resnet import cifar_resnet

BITS = 4


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A teacher, its student, the same network in float, and a batch of images.

    Attributes:
        name: Name in the table.
        module: The original classifier, frozen, in evaluation mode.
        teacher, student: The networks as fine-tuning receives them.
        plain: The float network, trainable.
        images, labels: (N, C, H, W) and (N,), on the device.
    """

    name: str
    module: nn.Module
    teacher: TappedNetwork
    student: TappedNetwork
    plain: fx.GraphModule
    images: Tensor
    labels: Tensor


def resnet18() -> nn.Module:
    """Build torchvision's ResNet-18 with random weights."""
    from torchvision.models import resnet18 as build

    return build(weights=None)


@dataclass(frozen=True)
class Kind:
    """A network with its input size (C, H, W), number of classes, and batch size per device type."""

    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, int, int]
    classes: int
    batch: dict[str, int]


TINY = Kind(
    "ResNet-8 of width 4, 32 px", lambda: cifar_resnet(8, 10, width=4), (3, 32, 32), 10, {"cpu": 64, "cuda": 256}
)
"""So small that the memory of a set of images is visible next to the network; its speed is not measured."""
KINDS = {
    "resnet20": Kind("ResNet-20, 32 px", lambda: cifar_resnet(20, 10), (3, 32, 32), 10, {"cpu": 64, "cuda": 256}),
    "resnet18": Kind("ResNet-18, 224 px", resnet18, (3, 224, 224), 1000, {"cpu": 8, "cuda": 64}),
}


def classifier(kind: Kind, seed: int) -> nn.Module:
    """Build an untrained classifier with batch-norm statistics of noise, so that activations have a typical scale."""
    torch.manual_seed(seed)
    module = kind.build().train()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(8, *kind.size))
    return module.eval().requires_grad_(False)


def build_subject(
    key: str | Kind,
    device: torch.device,
    seed: int,
    batch: int | None = None,
    *,
    runtime: RuntimeConfig | None = None,
) -> Subject:
    """Build teacher, W4A4 student and float network on a device, placed as a run would place them.

    Args:
        key: A kind, or its key in `KINDS`.
        device: Device of networks and images.
        seed: Seed of weights and images.
        batch: Batch size; None is that of the kind.
        runtime: Settings of the placement; None is the defaults.
    """
    kind, runtime = KINDS[key] if isinstance(key, str) else key, runtime or RuntimeConfig()
    module = classifier(kind, seed)
    images = torch.randn(batch or kind.batch[device.type], *kind.size)
    labels = torch.arange(len(images)) % kind.classes
    traced = trace_classifier(copy.deepcopy(module), kind.size)
    cam_site = locate_cam(traced)
    student = quantize_model(traced, QuantConfig(weight_bits=BITS, act_bits=BITS), cam_node=cam_site.node)
    plain = copy.deepcopy(traced)
    for net in (traced, student.net, plain):
        place(net, runtime, device, kind.size)
    images, labels = images.to(device), labels.to(device)
    observe_ranges(student.net, images[:16], act_range="mse")
    trained = with_features(student.net, student.cam_node)
    fuse_rectified(trained)
    for net in (trained, plain):
        net.requires_grad_(True)
    return Subject(
        name=f"{kind.name}, batch {len(images)}",
        module=module.to(device, memory_format=torch.channels_last),  # type: ignore[call-overload]
        teacher=TappedNetwork(net=with_features(traced.requires_grad_(False), cam_site.node), cam_site=cam_site),
        student=TappedNetwork(net=trained, cam_site=cam_site),
        plain=plain,
        images=images,
        labels=labels,
    )
