"""Cost of synthesis, measured on a few images and steps of a teacher."""

import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from synq.common.seeding import make_generator
from synq.config.run import SynthesisConfig
from synq.config.synthesis import OWN_IMAGES
from synq.network.bn_stats import bn_targets
from synq.runtime import placed_copy
from synq.synthesis.inversion import invert
from synq.synthesis.start_noise import USUAL_EVALUATIONS, enough_probes
from synq.synthesis.structure import StructureTerms, structure_weights
from synq.teacher.teacher import Teacher

FEW, MORE = 4, 32
"""Images of a probe: few at first, more if those were quick, because a small batch costs more per image."""
QUICK_SECONDS = 0.5
"""Seconds of the first probe below which the larger one follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Cost of one forward and backward pass."""

    seconds: float
    """Seconds of one image."""
    saved_bytes: float
    """Bytes of one image that the forward pass keeps for the backward pass."""


def probe_synthesis(teacher: Teacher, config: SynthesisConfig, device: torch.device) -> StepCost:
    """Return the cost of one step of synthesis, from a probe of some seconds; the teacher is not changed.

    Args:
        teacher: The teacher.
        config: Settings of the synthesis.
        device: Device to compute on.
    """
    module = placed_copy(teacher.module, device, teacher.input_size)
    targets = bn_targets(module)
    weights = structure_weights(config, bool(targets))
    graph = placed_copy(teacher.graph, device, teacher.input_size) if weights.any else None
    method = "inversion" if config.is_added else config.method  # of the user's method nothing is known
    plain = replace(config, start="white", calib_centers=False, method=method)

    def steps(images: int, iterations: int) -> float:
        labels = torch.arange(images) % teacher.num_classes
        generator = make_generator("synthesis", 0, "probe", images)
        started = time.perf_counter()
        invert(
            module,
            labels,
            teacher.input_size,
            targets,
            config=plain,
            generator=generator,
            iterations=iterations,
            pixel_range=teacher.pixel_range(),
            structure=None if graph is None else StructureTerms(graph, weights, generator),
            device=device,
        )
        return time.perf_counter() - started

    images = min(FEW, config.shard_size)
    with saved_bytes() as saved:
        steps(images, 1)  # also warms up
    per_image = saved[0] / images
    seconds = max(0.0, steps(images, 3) - steps(images, 1)) / 2
    if seconds < QUICK_SECONDS and config.shard_size > images:
        images = min(MORE, config.shard_size)
        steps(images, 1)
        seconds = max(0.0, steps(images, 3) - steps(images, 1)) / 2
    return StepCost(seconds=seconds / images, saved_bytes=per_image)


def num_passes(config: SynthesisConfig, num_images: int, input_size: tuple[int, int, int], num_classes: int) -> int:
    """Return the number of forward and backward passes of single images that making a set takes.

    For a method of the user, whose cost is unknown, it is 0.

    Args:
        config: Settings of the synthesis.
        num_images: Number of images of the set.
        input_size: Channels, height, width in pixels.
        num_classes: Number of classes.
    """
    if config.method in ("gaussian", OWN_IMAGES) or config.is_added:
        return 0
    passes = num_images * config.iterations
    if config.calib_centers:
        passes += num_classes * config.center_iterations
    if config.fits_start:
        passes += USUAL_EVALUATIONS * min(enough_probes(input_size), config.shard_size)
    return passes


class saved_bytes:  # noqa: N801  # a context manager
    """Count the bytes of distinct buffers that autograd saves within the block: `with saved_bytes() as count: ...`."""

    def __enter__(self) -> list[int]:
        self.count, self.known = [0], set[int]()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known and not isinstance(tensor, nn.Parameter):
                self.known.add(storage.data_ptr())
                self.count[0] += storage.nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self.count

    def __exit__(self, *args: object) -> None:
        self.hooks.__exit__(*args)
