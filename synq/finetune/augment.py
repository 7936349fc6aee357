"""Random augmentation of training images, drawn for a whole global batch: 1 and n processes get the same views.

Flips and shifts keep the class of an image; mixup and cutmix keep that of the image with the larger share.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


def random_views(
    images: Tensor,
    batch: Tensor,
    share: slice,
    take: Callable[[Tensor], tuple[Tensor, Tensor]],
    kind: Literal["none", "flip_shift", "mixup", "cutmix"],
    generator: torch.Generator,
) -> Tensor:
    """Return one random view of every image of this process.

    Args:
        images: (N, C, H, W), the images ``batch[share]``.
        batch: (B,) int64, row numbers of the global batch.
        share: Slice of the global batch that this process computes.
        take: Returns images and labels by row numbers: the second image of a pair may be any of the global batch.
        kind: The augmentation.
        generator: CPU generator, in the same state on every process.

    Returns:
        (N, C, H, W).
    """
    if kind == "none":
        return images
    if kind == "flip_shift":
        return flip_shift(images, generator, offset=share.start, total=len(batch))
    partners, _ = take(batch[torch.randperm(len(batch), generator=generator)][share])
    shares = 0.5 + 0.5 * torch.rand(len(batch), generator=generator)
    if kind == "mixup":
        return torch.lerp(partners, images, shares[share].to(images)[:, None, None, None])
    corners = torch.rand(len(batch), 2, generator=generator)
    return _cutmix(images, partners, shares[share], corners[share])


def _cutmix(images: Tensor, partners: Tensor, shares: Tensor, corners: Tensor) -> Tensor:
    """Paste a random rectangle of each partner into its image, of the same aspect ratio and 1 - share of the area."""
    height, width = images.shape[-2:]
    side = (1 - shares).sqrt()
    rows, columns = torch.arange(height)[None, :], torch.arange(width)[None, :]
    inside = []
    for index, size, corner in ((rows, height, corners[:, :1]), (columns, width, corners[:, 1:])):
        length = (side * size).round()[:, None]
        start = (corner * (size - length + 1)).floor()
        inside.append((index >= start) & (index < start + length))
    pasted = (inside[0][:, :, None] & inside[1][:, None, :])[:, None].to(images.device)
    return torch.where(pasted, partners, images)


def flip_shift(
    images: Tensor, generator: torch.Generator, *, max_shift: float = 0.125, offset: int = 0, total: int | None = None
) -> Tensor:
    """Flip each image left-right with probability 1/2 and shift it by up to ``max_shift`` of its size, edges mirrored.

    Random numbers are drawn for the whole global batch and sliced, so that the views do not depend on the number of
    processes.

    Args:
        images: (N, C, H, W), any float dtype and device.
        generator: CPU generator.
        max_shift: Maximum shift as a fraction of the height and width, in [0, 0.5].
        offset: Position of ``images[0]`` in the global batch.
        total: Size of the global batch; None for N.

    Returns:
        (N, C, H, W), a new tensor.
    """
    count, _, height, width = images.shape
    total = count + offset if total is None else total
    span = (int(height * max_shift), int(width * max_shift))
    down = torch.randint(-span[0], span[0] + 1, (total,), generator=generator)[offset : offset + count]
    right = torch.randint(-span[1], span[1] + 1, (total,), generator=generator)[offset : offset + count]
    flip = (torch.rand(total, generator=generator) < 0.5)[offset : offset + count]
    rows = _mirror(torch.arange(height)[None, :] + down[:, None], height)
    columns = _mirror(torch.arange(width)[None, :] + right[:, None], width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    index = torch.arange(count, device=images.device)
    # Advanced indices around the channel slice put the channel axis last; moving it back is a view.
    return images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _mirror(index: Tensor, size: int) -> Tensor:
    """Reflect positions outside 0..size-1 back inside, without repeating the edge; a single position stays 0."""
    if size == 1:
        return torch.zeros_like(index)
    period = 2 * (size - 1)
    index = index.abs() % period
    return torch.minimum(index, period - index)
