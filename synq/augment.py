"""Random views of images that keep their class: flips and shifts, drawn image by image in one batched operation."""

import torch
from torch import Tensor


def flip_shift(
    images: Tensor, generator: torch.Generator, *, max_shift: float = 0.125, offset: int = 0, total: int | None = None
) -> Tensor:
    """Flip each image left-right with probability 1/2 and shift it by up to ``max_shift`` of its size, edges mirrored.

    The draws are made for a whole global batch and sliced, so that processes that hold parts of it see the views that
    one process would see.

    Args:
        images: (N, C, H, W), any float dtype and device.
        generator: CPU generator.
        max_shift: Largest shift as a share of the height and width, in [0, 0.5].
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
