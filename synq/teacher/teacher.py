"""The teacher: a frozen, pre-trained classifier with the metadata that the other stages need."""

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
from synq.network.op_traits import node_module
from synq.network.tracing import accepting, check_plain_weights, output_getters, trace_classifier
from synq.teacher.pixel_range import PixelRange
from synq.teacher.preprocessing import Preprocessing
from synq.teacher.probabilities import are_log_probabilities, check_no_probabilities
from synq.teacher.sources import RANDOM, SourceModel, build_source

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_ATTENTION = re.compile(r"multihead|self_?attention|windowattention|transformer", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A pre-trained classifier that serves as the teacher.

    Attributes:
        spec: The configured `teacher.spec`.
        name: Short name of letters, digits and underscores.
        module: The classifier in eval mode, float32, on the CPU; no parameter requires a gradient.
        num_classes: Number of logits K.
        input_size: (C, H, W).
        mean, std: Normalization per channel; an image in [0, 1] enters the network as (image - mean) / std.
        digest: See `weight_digest`; teachers with the same digest share synthetic sets.
        default_dataset: Spec of the labeled images to evaluate on if the user gives none, or None.
        preprocessing: How the source of the weights resizes and crops image files, or None if unknown.
        graph: Traced copy of `module`. A copy, because tracing replaces in-place operations and so would modify
            `module`.
        cam: Layer and weights of the class activation map.
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
    preprocessing: Preprocessing | None = None

    def pixel_range(self) -> PixelRange:
        """Return the normalized values of a black and a white pixel."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return PixelRange(-mean / std, (1 - mean) / std)


def load_teacher(config: TeacherConfig) -> Teacher:
    """Load the teacher of a configuration: build the model, load its weights, validate and trace it.

    Configured values (`num_classes`, `input_size`, `mean`, `std`) override those of the source. The normalization is
    never guessed; the number of classes may be inferred from a forward pass. With weights "random" the model is
    untrained, with the input size and normalization of the source's default weights.

    Raises:
        ValueError: If the spec is unknown, the model has no BatchNorm, is a transformer, cannot be traced, contains
            NaN, is untrained, or its input size or normalization is neither known nor configured.
        FileNotFoundError: If a file does not exist.
        ConnectionError: If pre-trained weights cannot be downloaded.
    """
    source = build_source(config)
    module = source.module.float().cpu().eval().requires_grad_(False)
    check_architecture(module, source.name)
    check_finite(module, source.name)
    if config.weights != RANDOM:
        _check_trained(module, source.name, config.weights)
    input_size, mean, std = _input_format(config, source)
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
        preprocessing=source.preprocessing,
    )


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
    kind = type(module)
    with accepting(kind.__name__, input_size):
        returned = module(torch.zeros(2, *input_size))
    getters = output_getters(returned)
    if output not in getters:
        choices = f"be one of {', '.join(getters)}" if getters else "be left out: the model returns one value"
        raise ValueError(f"`teacher.output` must {choices}, but got {output!r}")
    get = getters[output]

    def forward(self: nn.Module, x: Tensor) -> Any:
        return get(kind.forward(self, x))

    forward.__annotations__ = {}  # torch.fx would copy them into the graph's code, which enters the digest
    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def weight_digest(module: nn.Module, input_size: tuple[int, int, int], graph: fx.GraphModule | None = None) -> str:
    """Return the SHA-256 of a classifier: its input size, the tensors of its state dict, and its forward pass.

    The input size is included because synthetic images of one size cannot be used at another. Each tensor enters with
    name, dtype, shape and bytes, in the order of the names. The forward pass is included as the graph's code with the
    settings of its layers, because the same weights may fit a network with ReLU and one with Hardswish. The batch
    counters of BatchNorm are excluded: many files omit them, and inference never reads them.

    Args:
        module: The classifier.
        input_size: (C, H, W).
        graph: Traced `module`; None leaves out the forward pass.

    Returns:
        64 hexadecimal digits, the same on all machines of one byte order (and, with `graph`, one release of PyTorch).
    """
    digest = hashlib.sha256(f"input {tuple(input_size)}\n".encode())
    state = dict(module.state_dict())
    if graph is not None:
        called = (node_module(graph, node) for node in graph.graph.nodes)
        settings = [repr(part) for part in called if part is not None]
        digest.update(_ADDRESS.sub("", "\n".join([graph.code, *settings])).encode())
        # The state dict lacks constants of the forward pass and non-persistent buffers.
        state = {**dict(graph.named_buffers()), **state}
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):
            continue
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_architecture(module: nn.Module, name: str) -> None:
    """Reject unsupported architectures: transformers, networks without BatchNorm statistics, parametrized weights.

    Args:
        module: The classifier.
        name: Name of the model, for messages.

    Raises:
        ValueError: If the architecture is unsupported; the message names the reason and an alternative.
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
        f"teacher must have BatchNorm layers with running statistics, but got {name}, {found}: the images are "
        "synthesized from these statistics. If BatchNorm was folded into the convolutions, load the unfolded model"
    )


def check_finite(module: nn.Module, name: str) -> None:
    """Reject weights and BatchNorm statistics that are not finite, and negative variances.

    Args:
        module: The classifier.
        name: Name of the model, for messages.

    Raises:
        ValueError: If a tensor contains NaN or infinity, or a running variance is negative.
    """
    state: dict[str, Tensor] = module.state_dict()
    bad = [key for key, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(
            f"teacher weights must be finite, but {name} has NaN or infinity in {len(bad)} tensors "
            f"({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}); load another checkpoint"
        )
    negative = [key for key, tensor in state.items() if key.endswith("running_var") and bool((tensor < 0).any())]
    if negative:
        raise ValueError(f"teacher variances must be >= 0, but {name} has negative ones in {negative[0]}")


def _check_trained(module: nn.Module, name: str, weights: str | None) -> None:
    """Reject untrained models: means of 0 and variances of 1 in every BatchNorm mean that no weights were loaded."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]
    for part in norms:
        if bool((part.running_mean != 0).any()) or bool((part.running_var != 1).any()):  # type: ignore[union-attr]
            return
    cure = f"{weights} must contain trained weights" if weights else "give its weight file as `teacher.weights`"
    raise ValueError(
        f"teacher must be trained, but the BatchNorm statistics of {name} have their initial values; "
        f"{cure}, or set `--teacher.weights {RANDOM}` to use untrained weights on purpose"
    )


def _input_format(
    config: TeacherConfig, source: SourceModel
) -> tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]]:
    """Return input size, mean and std: configured values first, then those of the source."""
    input_size = config.input_size or source.input_size
    mean, std = config.mean or source.mean, config.std or source.std
    if input_size is None:
        raise ValueError(f"`teacher.input_size` must be given as C,H,W: {config.spec} does not define it")
    if mean is None or std is None:
        missing = "`teacher.mean` and `teacher.std`" if mean is None and std is None else "both of them"
        raise ValueError(
            f"{missing} must be given as in the teacher's training (per channel, for images in [0, 1]): "
            f"{config.spec} does not define them, and wrong values would silently cost accuracy"
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
    """Check that module and graph return the same finite logits for the same noise.

    Returns:
        The number of classes.
    """
    # Three images, while the tracing used two: this reveals a batch size that became a constant of the graph.
    noise = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    with accepting(type(module).__name__, input_size):
        # Clones, because a module may normalize its input in place.
        logits, again = module(noise.clone()), module(noise.clone())
    try:
        with torch.no_grad():
            traced = graph(noise.clone())
    except RuntimeError as error:
        raise ValueError(
            "teacher must accept any batch size, but its forward pass, traced with 2 images, fails with 3: "
            "use x.size(0) or -1 for the batch size"
        ) from error
    if are_log_probabilities(logits):  # the graph returns the logits that they are computed from
        traced = traced.log_softmax(1)
    margin = 1e-4 * float(logits.abs().max())
    num_classes = int(logits.shape[1])
    if declared is not None and declared != num_classes:
        raise ValueError(f"`teacher.num_classes` must be the number of logits, {num_classes}, but got {declared}")
    if num_classes < 2:
        raise ValueError(f"teacher must have at least 2 classes, but got {num_classes}")
    if not torch.isfinite(logits).all():
        raise ValueError("teacher must return finite logits, but returned NaN or infinity for normalized noise")
    if not torch.allclose(logits, again, rtol=1e-4, atol=margin):
        raise ValueError(
            "teacher must be deterministic in eval mode, but returned different logits for the same images; "
            "pass training=self.training to functional dropout"
        )
    if not torch.allclose(logits, traced, rtol=1e-4, atol=margin):
        gap = float((logits - traced).abs().max())
        raise ValueError(
            f"teacher must return the same logits when traced by torch.fx, but they differ by {gap:.3g}; "
            "write in-place operations of its forward pass as x = f(x)"
        )
    check_no_probabilities(graph, noise)
    return num_classes
