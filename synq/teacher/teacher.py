"""The teacher: a frozen, pre-trained classifier with everything the other stages need to know about it."""

import copy
import hashlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.config.run import TeacherConfig
from synq.network.cam_site import CamSite, locate_cam
from synq.network.tracing import accepting, check_plain_weights, node_module, output_getters, trace_classifier
from synq.teacher.sources import RANDOM, SourceModel, build_source

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_ATTENTION = re.compile(r"multihead|self_?attention|windowattention|transformer", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A pre-trained classifier, ready to be imitated.

    Attributes:
        spec: what the user asked for.
        name: short name of letters, digits and underscores.
        module: the classifier in eval mode, float32, on the CPU; no parameter requires a gradient.
        num_classes: number of logits.
        input_size: (C, H, W).
        mean, std: per channel; an image in [0, 1] enters the network as (image - mean) / std.
        digest: see `weight_digest`; two teachers with the same digest share synthetic sets.
        default_dataset: labelled set to report on where the user names none, or None.
        graph: `module` traced. A copy: tracing replaces in-place operations, which would change what `module` computes.
        cam: where the class activation map is taken.
    """

    spec: str
    name: str
    module: nn.Module
    num_classes: int
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    default_dataset: str | None
    graph: fx.GraphModule
    cam: CamSite

    def pixel_range(self) -> tuple[Tensor, Tensor]:
        """Return what a black and a white pixel are after normalisation, each (1, C, 1, 1)."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return -mean / std, (1 - mean) / std


def load_teacher(config: TeacherConfig) -> Teacher:
    """Build, fill and check the teacher that a configuration names.

    What the user gives (`num_classes`, `input_size`, `mean`, `std`) goes before what the source knows. The
    normalisation is never guessed; the number of classes may be read off a forward pass. With weights "random" the
    model is untrained, its input size and normalisation those of the source's default weights.

    Raises:
        ValueError: if the spec is unknown, the model has no BatchNorm, is a transformer, cannot be traced, holds NaN,
            was never trained, or a fact about it is neither known nor given.
        FileNotFoundError: if a file does not exist.
        ConnectionError: if pre-trained weights cannot be fetched.
    """
    source = build_source(config)
    module = source.module.float().cpu().eval().requires_grad_(False)
    check_architecture(module, source.name)
    check_finite(module, source.name)
    if config.weights != RANDOM:
        _check_trained(module, source.name, config.weights)
    input_size, mean, std = _input_facts(config, source)
    if config.output is not None:
        select_output(module, config.output, input_size)
    graph = trace_classifier(copy.deepcopy(module), input_size).requires_grad_(False)
    num_classes = _check_logits(module, graph, input_size, config.num_classes or source.num_classes)
    return Teacher(
        spec=config.spec,
        name=source.name,
        module=module,
        num_classes=num_classes,
        input_size=input_size,
        mean=mean,
        std=std,
        digest=weight_digest(module, input_size, graph),
        default_dataset=source.default_dataset,
        graph=graph,
        cam=locate_cam(graph, config.cam_layer),
    )


def select_output(module: nn.Module, place: str, input_size: tuple[int, int, int]) -> None:
    """Let a classifier that returns several values return one of them, in place.

    Its class becomes a subclass of its own, so that its layers keep their names, which a module around it would change.

    Args:
        module: The classifier.
        place: Key of a mapping, position in a sequence, or attribute.
        input_size: (C, H, W).

    Raises:
        ValueError: If nothing is there.
    """
    kind = type(module)
    with accepting(kind.__name__, input_size):
        returned = module(torch.zeros(2, *input_size))
    getters = output_getters(returned)
    if place not in getters:
        choices = f"be one of {', '.join(getters)}" if getters else "be left out: the model returns one value"
        raise ValueError(f"`teacher.output` must {choices}, but got {place!r}")
    get = getters[place]

    def forward(self: nn.Module, x: Tensor) -> Any:
        return get(kind.forward(self, x))

    forward.__annotations__ = {}  # torch.fx would write them into the code, and the digest is of the code
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def weight_digest(module: nn.Module, input_size: tuple[int, int, int], graph: fx.GraphModule | None = None) -> str:
    """SHA-256 over the input size, every tensor of the state dict (name, dtype, shape, bytes) by name, and the forward pass.

    The input size counts because synthetic images made at one size are no images for the same weights at another.
    The forward pass counts, as the graph's code with the settings of its layers: one file of weights fits a network
    with ReLU and one with Hardswish. BatchNorm's batch counters do not count: many files leave them out, and inference
    never reads them.

    Args:
        module: The classifier.
        input_size: (C, H, W).
        graph: `module` traced; None leaves the forward pass out.

    Returns:
        64 hexadecimal digits; equal on every machine of the same byte order (and, with `graph`, release of PyTorch).
    """
    digest = hashlib.sha256(f"input {tuple(input_size)}\n".encode())
    state = dict(module.state_dict())
    if graph is not None:
        called = (node_module(graph, node) for node in graph.graph.nodes)
        settings = [repr(part) for part in called if part is not None]
        digest.update(_ADDRESS.sub("", "\n".join([graph.code, *settings])).encode())
        # Constants of the forward pass and buffers that no file keeps stand in no state dict.
        state = {**dict(graph.named_buffers()), **state}
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):
            continue
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_architecture(module: nn.Module, name: str) -> None:
    """Refuse what the method cannot be run on: transformers, networks without BatchNorm statistics, computed weights.

    Raises:
        ValueError: naming what was found and what to bring instead.
    """
    check_plain_weights(module)
    modules = list(module.modules())
    for part in modules:
        if isinstance(part, nn.MultiheadAttention) or _ATTENTION.search(type(part).__name__) or hasattr(part, "qkv"):
            raise ValueError(
                f"teacher must be a convolutional network, but {name} is a transformer (it contains "
                f"{type(part).__name__}), which is not supported yet; use one such as torchvision:resnet18"
            )
    norms = [part for part in modules if isinstance(part, _BatchNorm)]
    if any(part.running_mean is not None for part in norms):
        return
    found = "whose BatchNorm layers keep none (track_running_stats=False)" if norms else "without BatchNorm layers"
    raise ValueError(
        f"teacher must have BatchNorm layers with running statistics, but got {name}, {found}: the images are made from "
        "these statistics. If BatchNorm was folded into the convolutions, load the model as it was before"
    )


def check_finite(module: nn.Module, name: str) -> None:
    """Refuse weights and statistics that no forward pass can use.

    Raises:
        ValueError: if a tensor holds NaN or infinity, or a running variance is negative.
    """
    state: dict[str, Tensor] = module.state_dict()
    bad = [key for key, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(
            f"teacher weights must be finite, but {name} holds NaN or infinity in {len(bad)} tensors "
            f"({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}); load another checkpoint"
        )
    negative = [key for key, tensor in state.items() if key.endswith("running_var") and bool((tensor < 0).any())]
    if negative:
        raise ValueError(f"teacher variances must be >= 0, but {name} holds negative ones in {negative[0]}")


def _check_trained(module: nn.Module, name: str, weights: str | None) -> None:
    """A BatchNorm that has seen data has moved; means of 0 and variances of 1 everywhere mean no weights were loaded."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    for part in norms:
        if bool((part.running_mean != 0).any()) or bool((part.running_var != 1).any()):  # type: ignore[union-attr]
            return
    cure = f"{weights} holds none that were trained, or" if weights else "give its weight file as `teacher.weights`, or"
    raise ValueError(
        f"teacher must be trained, but the BatchNorm statistics of {name} are untouched; "
        f"{cure} `--teacher.weights {RANDOM}` works on untrained weights on purpose"
    )


def _input_facts(
    config: TeacherConfig, source: SourceModel
) -> tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]]:
    input_size = config.input_size or source.input_size
    mean, std = config.mean or source.mean, config.std or source.std
    if input_size is None:
        raise ValueError(f"`teacher.input_size` must be given as C,H,W: {config.spec} cannot tell it")
    if mean is None or std is None:
        missing = "`teacher.mean` and `teacher.std`" if mean is None and std is None else "both of them"
        raise ValueError(
            f"{missing} must be given as the teacher's training used them (per channel, for images in [0, 1]): "
            f"{config.spec} cannot tell them, and a guess would cost accuracy without a sign"
        )
    for field, values in (("mean", mean), ("std", std)):
        if len(values) != input_size[0]:
            raise ValueError(f"`teacher.{field}` must have {input_size[0]} values, one per channel, but got {values}")
    if min(std) <= 0:
        raise ValueError(f"`teacher.std` must be > 0, but got {std}")
    return input_size, mean, std


def _check_logits(
    module: nn.Module, graph: fx.GraphModule, input_size: tuple[int, int, int], declared: int | None
) -> int:
    """Run module and graph on the same noise: one finite row of logits per image, equal on both. Returns the classes."""
    # Three, where the tracing saw two: a number of images that got into the graph as a constant shows.
    noise = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    with accepting(type(module).__name__, input_size):
        # Clones, because a module may normalise its input in place.
        logits, again = module(noise.clone()), module(noise.clone())
    try:
        with torch.no_grad():
            traced = graph(noise.clone())
    except RuntimeError as error:
        raise ValueError(
            "teacher must compute any number of images alike, but its forward pass, traced for 2, fails on 3: "
            "write shapes with x.size(0) or -1 for the number of images"
        ) from error
    margin = 1e-4 * float(logits.abs().max())
    num_classes = int(logits.shape[1])
    if declared is not None and declared != num_classes:
        raise ValueError(f"`teacher.num_classes` must be the number of logits, {num_classes}, but got {declared}")
    if num_classes < 2:
        raise ValueError(f"teacher must have at least 2 classes, but got {num_classes}")
    if not torch.isfinite(logits).all():
        raise ValueError("teacher must give finite logits, but gave NaN or infinity on normalised noise")
    if not torch.allclose(logits, again, rtol=1e-4, atol=margin):
        raise ValueError(
            "teacher must be deterministic in evaluation mode, but gave two different answers to the same images; "
            "pass training=self.training to functional dropout"
        )
    if not torch.allclose(logits, traced, rtol=1e-4, atol=margin):
        gap = float((logits - traced).abs().max())
        raise ValueError(
            f"teacher must compute the same when traced by torch.fx, but its logits differ by {gap:.3g}; "
            "write in-place operations of its forward pass as x = f(x)"
        )
    return num_classes
