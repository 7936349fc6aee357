"""The teacher: a frozen, pre-trained classifier with the metadata that the other stages need."""

import copy
import hashlib
import re
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from synq.common.error_text import first_line, one_line, some_of
from synq.config.run import TeacherConfig
from synq.network.cam_site import CamSite, locate_cam
from synq.network.op_traits import node_module
from synq.network.tracing import trace_classifier
from synq.teacher.architecture import check_architecture, check_task
from synq.teacher.gradients import check_gradient
from synq.teacher.missing import check_given
from synq.teacher.outputs import choose_output
from synq.teacher.pixel_range import PixelRange
from synq.teacher.preprocessing import Preprocessing
from synq.teacher.probabilities import are_log_probabilities, check_no_probabilities
from synq.teacher.sources import SourceModel, build_source

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


@dataclass(frozen=True, kw_only=True, eq=False)
class Teacher:
    """A pre-trained classifier that serves as the teacher.

    Attributes:
        spec: The configured `teacher.spec`.
        name: Short name of letters, digits and underscores.
        module: The classifier in eval mode, float32, on the CPU; no parameter requires a gradient. A copy of `graph` if
            the network as it was written has no logits for a single image, or no gradient for its pixels.
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


def load_teacher(config: TeacherConfig, source: SourceModel | None = None) -> Teacher:
    """Load the teacher of a configuration: build the model, load its weights, validate and trace it.

    Configured values (`num_classes`, `input_size`, `mean`, `std`) override those of the source. The normalization is
    never guessed; the number of classes may be inferred from a forward pass. With weights "random" the model is
    untrained, with the input size and normalization of the source's default weights.

    Args:
        config: The teacher.
        source: The model of `config.spec` if it is there already (`module_source`); it is changed in place. None
            builds it.

    Raises:
        ValueError: If the spec is unknown, the model has no BatchNorm, is a transformer, cannot be traced, has no
            gradient, contains NaN, is untrained, or its input size or normalization is neither known nor configured.
        FileNotFoundError: If a file does not exist.
        ConnectionError: If pre-trained weights cannot be downloaded.
    """
    source = source or build_source(config)
    module = source.module.float().cpu().eval().requires_grad_(False)
    check_task(module, source.name)
    check_architecture(module, source.name)
    check_finite(module, source.name)
    input_size, mean, std = check_given(config, source)
    choose_output(module, config.output, input_size)
    graph = trace_classifier(_copied(module, source.name), input_size).requires_grad_(False)
    num_classes = _check_logits(module, graph, input_size, config.num_classes or source.num_classes)
    check_gradient(graph, input_size)
    if not _accepts_one_image(module, input_size):
        module = copy.deepcopy(graph)
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
            f"({some_of(bad)}); load another checkpoint"
        )
    negative = [key for key, tensor in state.items() if key.endswith("running_var") and bool((tensor < 0).any())]
    if negative:
        raise ValueError(f"teacher variances must be >= 0, but {name} has negative ones in {negative[0]}")


def _copied(module: nn.Module, name: str) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # attributes of any type
        raise ValueError(
            f"teacher must be a network that copy.deepcopy can copy, but {name} raised {one_line(error)}"
        ) from error


def _accepts_one_image(module: nn.Module, input_size: tuple[int, int, int]) -> bool:
    """Return whether a classifier has logits for a single image, with a gradient for its pixels."""
    image = torch.zeros(1, *input_size).requires_grad_()
    with torch.enable_grad():
        try:
            logits = module(image * 1)  # a module may normalize its input in place, which autograd forbids for a leaf
        except Exception:  # for example an axis too few; the graph, which was checked, takes its place
            return False
    return bool(logits.ndim == 2 and logits.requires_grad)


def _check_logits(
    module: nn.Module, graph: fx.GraphModule, input_size: tuple[int, int, int], declared: int | None
) -> int:
    """Check that module and graph return the same finite logits for the same noise.

    Returns:
        The number of classes.
    """
    # Three images, while the tracing used two: this reveals a batch size that became a constant of the graph.
    noise = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    random_state = torch.get_rng_state()
    try:
        with torch.no_grad():  # clones, because a module may normalize its input in place
            logits, again = module(noise.clone()), module(noise.clone())
    except Exception as error:  # a forward pass may raise anything; with two images it did not
        raise _fixed_batch(f"fails ({first_line(error)})", 3) from error
    is_random = not torch.equal(torch.get_rng_state(), random_state)
    traced, single = (_logits_of(graph, noise[:count].clone(), int(logits.shape[1])) for count in (3, 1))
    if are_log_probabilities(logits):  # the graph returns the logits that they are computed from
        traced, single = traced.log_softmax(1), single.log_softmax(1)
    margin = 1e-4 * float(logits.abs().max())
    num_classes = int(logits.shape[1])
    if declared is not None and declared != num_classes:
        raise ValueError(f"`teacher.num_classes` must be the number of logits, {num_classes}, but got {declared}")
    if num_classes < 2:
        raise ValueError(f"teacher must have at least 2 classes, but got {num_classes}")
    if not torch.isfinite(logits).all():
        raise ValueError("teacher must return finite logits, but returned NaN or infinity for normalized noise")
    is_traced = torch.allclose(logits, traced, rtol=1e-4, atol=margin)
    # Random numbers that choose a pool's windows may choose the same values twice.
    differs = not torch.equal(logits, again) if is_random else not torch.allclose(logits, again, rtol=1e-4, atol=margin)
    if differs or (is_random and not is_traced):
        raise ValueError(
            "teacher must be deterministic in eval mode, but returned different logits for the same images; "
            "pass training=self.training to functional dropout"
        )
    if not is_traced:
        gap = float((logits - traced).abs().max())
        raise ValueError(
            f"teacher must return the same logits when traced by torch.fx, but they differ by {gap:.3g}; "
            "write in-place operations of its forward pass as x = f(x)"
        )
    if not torch.allclose(logits[:1], single, rtol=1e-2, atol=100 * margin):  # kernels depend on the batch size
        raise ValueError(
            "teacher must classify each image by itself, but the logits of an image differ by "
            f"{float((logits[:1] - single).abs().max()):.3g} if others are in its batch"
        )
    check_no_probabilities(graph, noise)
    return num_classes


@torch.no_grad()
def _logits_of(graph: fx.GraphModule, images: Tensor, num_classes: int) -> Tensor:
    """Return the logits of a graph, which was traced with two images, for another number of them.

    Raises:
        ValueError: If it fails, or returns another shape.
    """
    count = len(images)
    try:
        logits = graph.forward(images)  # a call would print where in the graph's code it fails
        found = f"returns {tuple(logits.shape)}" if isinstance(logits, Tensor) else "returns no tensor"
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        logits, found = None, f"fails ({first_line(error)})"
    if isinstance(logits, Tensor) and logits.shape == (count, num_classes):
        return logits
    raise _fixed_batch(found, count)


def _fixed_batch(found: str, count: int) -> ValueError:
    return ValueError(
        f"teacher must accept any batch size, but its forward pass, which runs with 2 images, {found} for {count}: "
        "use x.size(0) or -1 for the batch size"
    )
