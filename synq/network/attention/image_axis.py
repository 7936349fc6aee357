"""Which part of an attention's tensors belongs to which image, found by changing one image of two.

Networks spell attention with images before heads, (N, heads, T, D), with heads before images, (heads, N, T, D), with
both on one axis in either order, and with windows too. The sizes do not decide which it is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from synq.network.op_traits import BATCH


@dataclass(frozen=True, kw_only=True)
class ImageAxis:
    """Place of the images among the leading axes, all but the last two, of an attention's tensors.

    Attributes:
        axis: The leading axis that counts images, perhaps with something else.
        inner: Number of neighbors on that axis that belong to one image: 1 where images are counted innermost.
        heads_axis: The leading axis that counts heads alone; None if there is none.
        shares_heads: Whether what shares the axis of the images is their heads, not windows.
    """

    axis: int = 0
    inner: int = 1
    heads_axis: int | None = None
    shares_heads: bool = False

    def by_image(self, values: Tensor, count: int) -> Tensor:
        """Return a tensor (..., T, D) as (N, windows, heads, T, D): one row for each image.

        Args:
            values: Scores, probabilities or outputs of the attention for ``count`` images, or its queries or keys.
            count: Number N of images.
        """
        leading = values.dim() - 2
        split = values.unflatten(self.axis, (-1, count, self.inner))

        def moved(axis: int) -> int:
            return axis if axis < self.axis else axis + 2

        images, heads = self.axis + 1, () if self.heads_axis is None else (moved(self.heads_axis),)
        windows = [axis for axis in range(leading + 2) if axis not in (images, *heads)]
        # Images, windows, heads, and the last two axes.
        ordered = split.permute(images, *windows, *heads, leading + 2, leading + 3)
        size = math.prod(ordered.shape[1 : 1 + len(windows)])
        if self.shares_heads:
            return ordered.reshape(count, 1, size, *values.shape[-2:])
        return ordered.reshape(count, size, -1, *values.shape[-2:])


def image_axes(traced: fx.GraphModule, attentions: Sequence[Sequence[str]]) -> list[tuple[int, int] | None]:
    """Return axis and number of neighbors, as in `ImageAxis`, of the images in each attention's tensors.

    Two images are run, and again with one of them replaced: what changes belongs to that one. Where nothing changes,
    because all is constant, images are taken to be outermost.

    Args:
        traced: A graph from ``trace_classifier``.
        attentions: For each attention the names of its nodes, whose outputs have the same leading axes.

    Returns:
        None for an attention in which no axis separates the images: what it computes for one depends on others.
    """
    if not attentions:
        return []
    image = next(node for node in traced.graph.nodes if node.op == "placeholder")
    generator = torch.Generator().manual_seed(0)
    shape, like = image.meta["shape"], next(traced.parameters())
    pair, others = (torch.randn(shape, generator=generator).to(like) for _ in range(2))
    names = {name for nodes in attentions for name in nodes}
    plain = _outputs(traced, pair, names)
    changed: list[dict[str, Tensor]] = []
    for number in range(BATCH):
        replaced = pair.clone()
        replaced[number] = others[number]
        found = _outputs(traced, replaced, names)
        changed.append({name: (found[name] != plain[name]).flatten(-2).any(-1).cpu() for name in names})
    return [_axis_of([torch.stack([one[n] for n in nodes]).any(0) for one in changed]) for nodes in attentions]


def _axis_of(changed: list[Tensor]) -> tuple[int, int] | None:
    """Return axis and neighbors of the images, from what changes (leading axes) with each of the two."""
    shape = changed[0].shape
    for axis, size in enumerate(shape):
        for inner in range(size // BATCH, 0, -1):  # outermost first
            if size % (BATCH * inner):
                continue
            parts = [one.unflatten(axis, (-1, BATCH, inner)).movedim(axis + 1, 0) for one in changed]
            if not any(bool(part[1 - number].any()) for number, part in enumerate(parts)):
                return axis, inner
    return None


@torch.no_grad()
def _outputs(traced: fx.GraphModule, images: Tensor, names: set[str]) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n.name in names:
                kept[n.name] = value
            return value

    Recorder(traced).run(images)
    return kept
