"""What the tests of fine-tuning share: a teacher and its student, images, labels, and a training of three epochs."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from synq.config.run import FinetuneConfig, QuantConfig
from synq.finetune.loop import finetune
from synq.finetune.responses import TappedNetwork
from synq.network.blocks import block_ends
from synq.network.cam_site import locate_cam
from synq.network.tracing import trace_classifier, with_features
from synq.quant.student import observe_ranges, quantize_model

SIZE = (3, 8, 8)
CONFIG = FinetuneConfig(epochs=3, batch_size=8, lr=1e-2, cam_weight=5.0, ce_weight=0.5, difficulty_threshold=0.7)


def networks(net: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[TappedNetwork, TappedNetwork]:
    """A teacher and its W4A4 student."""
    traced = trace_classifier(net, SIZE).to(dtype)
    site = locate_cam(traced)
    student = quantize_model(traced, QuantConfig(weight_bits=4, act_bits=4), cam_node=site.node)
    observe_ranges(student.net, images().to(dtype), act_range="minmax")
    return (
        TappedNetwork(net=with_features(student.net, student.cam_node), cam_site=site),
        TappedNetwork(net=with_features(traced, site.node), cam_site=site),
    )


def images(count: int = 20) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(3))


def labels(count: int = 20) -> Tensor:
    return torch.arange(count) % 5


def train(
    net: nn.Module, accelerator: Accelerator, config: FinetuneConfig = CONFIG, **options: object
) -> tuple[TappedNetwork, list[dict[str, float]]]:
    student, teacher = networks(net)
    history = finetune(student, teacher, images(), labels(), config, accelerator=accelerator, seed=1, **options)  # type: ignore[arg-type]
    return student, history


def taps(net: nn.Module, weight_bits: int = 4) -> tuple[TappedNetwork, TappedNetwork]:
    """Student and teacher with the outputs of their blocks."""
    traced = trace_classifier(net, SIZE)
    site = locate_cam(traced)
    student = quantize_model(traced, QuantConfig(weight_bits=weight_bits, act_bits=8), cam_node=site.node)
    observe_ranges(student.net, images(), act_range="minmax")
    names = [node.name for node in block_ends(traced)[:-1]]
    student_nodes = [student.taps.get(name, name) for name in names]
    assert student_nodes != names, "the student's blocks are taken after their quantizers"
    return (
        TappedNetwork(net=with_features(student.net, student.cam_node, student_nodes), cam_site=site),
        TappedNetwork(net=with_features(traced, site.node, names), cam_site=site),
    )
