"""The response of a network to a batch in one forward pass: logits, class-activation maps, outputs of its blocks."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from synq.common.progress import passing_bar
from synq.network.cam_site import CamSite
from synq.network.gradcam import CamMethod, cam_map, cam_weights, closed_form_weights, logit_gradient
from synq.quant.layers import effective_weight

CACHE_BATCH = 128
"""Images per forward pass of the teacher when its responses are cached; independent of the training batch."""
CACHE_BYTES = 2**30
"""Largest cache of responses; beyond it the teacher runs in every step."""


class Response(NamedTuple):
    """The response of a network to N images."""

    logits: Tensor
    """(N, K)."""
    cam: Tensor | None
    """(N, H, W) class-activation maps of the assigned labels; None if they are not computed."""
    blocks: tuple[Tensor, ...] = ()
    """Outputs of its blocks, (N, C, H, W) each, for feature alignment."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor, in a fixed order."""
        yield self.logits
        if self.cam is not None:
            yield self.cam
        yield from self.blocks

    def rebuilt(self, tensors: list[Tensor]) -> "Response":
        """Return a response of the same parts with other tensors, in the order of `tensors`."""
        rest = list(tensors)
        logits = rest.pop(0)
        return Response(logits, None if self.cam is None else rest.pop(0), tuple(rest))


@dataclass(frozen=True, kw_only=True)
class TappedNetwork:
    """A network with outputs (logits, features, block outputs...) in one pass, and what its class-activation map needs.

    Attributes:
        net: From ``with_features``; the features are A of ``site``.
        site: Where the map is taken, and how its channel weights are computed.
        method: How the map is made of features and gradients.
        with_cam: Whether maps are computed.
    """

    net: fx.GraphModule
    site: CamSite
    method: CamMethod = "gradcam"
    with_cam: bool = True

    @property
    def differentiates(self) -> bool:
        """Whether a map costs a backward pass through the head."""
        return self.with_cam and self.site.differentiates(self.method)

    def response(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Response:
        """Return the response in given outputs of ``net``, with the maps (N, H, W) of ``labels`` (N,)."""
        logits, features, *blocks = outputs
        return Response(logits, self._map(logits, features, labels) if self.with_cam else None, tuple(blocks))

    def _map(self, logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        site = self.site
        if self.differentiates:
            gradient = logit_gradient(logits, features, labels, retain_graph=True)
        else:
            weight = effective_weight(self.net.get_submodule(site.linear or "")).flatten(1)
            area = site.height * site.width
            gradient = closed_form_weights(weight, labels, site.channels, site.cells, area)[:, :, None, None]
        alpha = cam_weights(features, gradient, self.method)
        return cam_map(features, alpha, rectified=self.method != "cam")


def teacher_response(teacher: TappedNetwork, images: Tensor, labels: Tensor) -> Response:
    """Return the frozen teacher's response to ``images`` (N, C, H, W), detached, in float32 or wider."""
    with torch.set_grad_enabled(teacher.differentiates):
        response = teacher.response(teacher.net(images), labels)
    return response.rebuilt([t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in response.tensors()])


def cached_responses(
    teacher: TappedNetwork,
    take: Callable[[Tensor], tuple[Tensor, Tensor]],
    num_images: int,
    autocast: Callable[[], AbstractContextManager[None]],
    *,
    progress: bool = False,
) -> Callable[[Tensor], Response] | None:
    """Compute the teacher's responses to all images once; return None if the cache would take more than `CACHE_BYTES`.

    Args:
        teacher: The frozen teacher.
        take: Returns images and labels of some rows, on the teacher's device.
        num_images: Number of images.
        autocast: Makes the context of the forward passes.
        progress: Whether a terminal shows a progress bar.

    Returns:
        A function from row numbers to the responses to these images.
    """
    with autocast():
        one = teacher_response(teacher, *take(torch.arange(1)))
    if num_images * sum(t.numel() * t.element_size() for t in one.tensors()) > CACHE_BYTES:
        return None
    # At once in full size: small pieces between large passing ones would keep the heap from shrinking.
    kept = [t.new_empty(num_images, *t.shape[1:]) for t in one.tensors()]
    with passing_bar(num_images, "teacher's logits", "image", is_shown=progress) as bar:
        for rows in torch.arange(num_images).split(CACHE_BATCH):
            with autocast():
                found = teacher_response(teacher, *take(rows))
            for whole, part in zip(kept, found.tensors(), strict=True):
                whole[rows[0] : rows[-1] + 1] = part
            bar.update(len(rows))

    def lookup(rows: Tensor) -> Response:
        rows = rows.to(kept[0].device, non_blocking=True)
        return one.rebuilt([whole[rows] for whole in kept])

    return lookup
