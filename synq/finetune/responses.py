"""The response of a network to a batch in one forward pass: logits, class activation maps, block outputs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from synq.common.progress import passing_bar
from synq.network.attention.locations import AttentionNodes
from synq.network.cam_site import CamSite
from synq.network.gradcam import CamMethod, cam_map, cam_weights, closed_form_weights, logit_gradient
from synq.quant.layers import effective_weight

CACHE_BATCH = 128
"""Images per forward pass of the teacher when its responses are cached; independent of the training batch."""
CACHE_BYTES = 2**30
"""Maximum size of the cache of responses in bytes; beyond it the teacher runs in every step."""


class Response(NamedTuple):
    """Outputs of a network for N images that the loss compares."""

    logits: Tensor
    """Logits (N, K)."""
    cam: Tensor | None
    """Class activation maps (N, H, W) of the assigned labels; None if they are not computed."""
    blocks: tuple[Tensor, ...] = ()
    """Outputs of the network's blocks, (N, C, H, W) each, for feature alignment."""

    heads: tuple[Tensor, ...] = ()
    """What the heads of each attention gather at the positions of the image, (N, windows x heads, T, D) each."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor, in a fixed order."""
        yield self.logits
        if self.cam is not None:
            yield self.cam
        yield from self.blocks
        yield from self.heads

    def rebuilt(self, tensors: list[Tensor]) -> "Response":
        """Return a response of the same parts with other tensors, in the order of `tensors`."""
        rest = list(tensors)
        logits = rest.pop(0)
        cam = None if self.cam is None else rest.pop(0)
        return Response(logits, cam, tuple(rest[: len(self.blocks)]), tuple(rest[len(self.blocks) :]))


@dataclass(frozen=True, kw_only=True)
class TappedNetwork:
    """A network that returns (logits, features, block outputs...) in one pass, and the options of its maps.

    Attributes:
        net: Network from ``with_features``; the features are A of ``cam_site``.
        cam_site: Layer whose output the maps weight, and how the channel weights are computed.
        method: Method of the class activation maps.
        with_cam: Whether to compute the maps.
        attentions: What the last outputs of ``net`` are gathered by.
    """

    net: fx.GraphModule
    cam_site: CamSite
    method: CamMethod = "gradcam"
    with_cam: bool = True
    attentions: tuple[AttentionNodes, ...] = ()

    @property
    def differentiates(self) -> bool:
        """Whether the maps need a backward pass through the head."""
        return self.with_cam and self.cam_site.differentiates(self.method)

    def response(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Response:
        """Return the response for given outputs of ``net``, with maps (N, H, W) of the classes ``labels`` (N,).

        The outputs may be those of more images, the first N of which count.
        """
        cam = self._map(outputs[0], outputs[1], labels) if self.with_cam else None
        count = len(outputs) - len(self.attentions)
        logits, _, *blocks = (_first(output, len(labels)) for output in outputs[:count])
        heads = (
            _first(_heads_of(x, attention), len(labels))
            for x, attention in zip(outputs[count:], self.attentions, strict=True)
        )
        return Response(logits, cam, tuple(blocks), tuple(heads))

    def _map(self, logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        cam_site, count = self.cam_site, len(labels)
        if self.differentiates:
            # The gradient of all rows: no logit depends on a copy of the first ones.
            gradient = _first(logit_gradient(_first(logits, count), features, labels, retain_graph=True), count)
        else:
            weight = effective_weight(self.net.get_submodule(cam_site.linear or "")).flatten(1)
            area = cam_site.height * cam_site.width
            gradient = closed_form_weights(weight, labels, cam_site.channels, cam_site.cells, area)[:, :, None, None]
        features = _first(features, count)
        alpha = cam_weights(features, gradient, self.method)
        return cam_map(features, alpha, rectified=self.method != "cam")


def _first(tensor: Tensor, count: int) -> Tensor:
    return tensor if len(tensor) == count else tensor[:count]


def _heads_of(gathered: Tensor, attention: AttentionNodes) -> Tensor:
    """Return (N, windows x heads, T, D) at the positions of the image: one row for an image, for a cache to look up."""
    return attention.by_image(gathered).flatten(1, 2)[..., attention.extra :, :]


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
    """Compute the teacher's responses to all images once and return a lookup of them.

    Args:
        teacher: The frozen teacher.
        take: Returns images and labels by row numbers, on the teacher's device.
        num_images: Number of images.
        autocast: Returns the context of the forward passes.
        progress: Whether to show a progress bar, on a terminal.

    Returns:
        A function from row numbers (B,) to the responses to these images; None if the cache would be larger than
        `CACHE_BYTES`.
    """
    with autocast():
        one = teacher_response(teacher, *take(torch.arange(1)))
    if num_images * sum(t.numel() * t.element_size() for t in one.tensors()) > CACHE_BYTES:
        return None
    # Allocated in full size first: small tensors between large temporary ones would fragment the heap.
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
