"""Views of held-out synthetic images on which a teacher is less certain: blends of two images of different classes.

On the unperturbed images the teacher is certain, and nearly every student agrees with it. A blend of two images of the
pixel range is in that range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from synq.common.seeding import make_generator
from synq.evaluation import fidelity as measures
from synq.evaluation.teacher_logits import TeacherLogits, fidelity

MAX_IMAGES = 256
"""Held-out images that views are made of, so that their cost does not grow with a larger set."""


def partners(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw for each image a partner of another class, uniformly over all such images.

    Args:
        labels: (N,) int64.
        generator: CPU generator.

    Returns:
        (N,) int64 row numbers; the next row if all images are of one class.
    """
    labels = labels.cpu()
    allowed = labels[:, None] != labels[None, :]
    draw = torch.rand(allowed.shape, generator=generator, dtype=torch.float64)
    chosen = draw.masked_fill(~allowed, -1).argmax(1)
    return torch.where(allowed.any(1), chosen, (torch.arange(len(labels)) + 1) % len(labels))


def mixed(images: Tensor, partner: Tensor, share: Tensor | float) -> Tensor:
    """Blend each image with its partner: share x_i + (1 - share) x_partner(i).

    Args:
        images: (N, C, H, W).
        partner: (N,) int64 row numbers, from `partners`.
        share: Weight of the image itself, in [0, 1]: one for all, or (N,).

    Returns:
        (N, C, H, W).

    Source: mixup (Zhang et al. 2018), without labels.
    """
    part = torch.as_tensor(share, dtype=images.dtype).reshape(-1, 1, 1, 1).to(images.device)
    return part * images + (1 - part) * images[partner.to(images.device)]


def cut_mixed(images: Tensor, partner: Tensor, area: float, generator: torch.Generator) -> Tensor:
    """Replace a random rectangle of each image, ``area`` of its pixels, by the same region of its partner.

    Args:
        images: (N, C, H, W).
        partner: (N,) int64 row numbers, or (N,) of other images of the same batch.
        area: Share of the pixels that is replaced, in (0, 1).
        generator: CPU generator.

    Returns:
        (N, C, H, W).

    Source: CutMix (Yun et al. 2019), without labels.
    """
    inside = rectangles(images, area, generator)
    return torch.where(inside, images[partner.to(images.device)], images)


def rectangles(images: Tensor, area: float, generator: torch.Generator) -> Tensor:
    """Return a mask (N, 1, H, W) of a random rectangle per image; arguments as for `cut_mixed`."""
    count, _, height, width = images.shape
    side = (max(1, round(height * area**0.5)), max(1, round(width * area**0.5)))
    top = torch.randint(0, height - side[0] + 1, (count, 1), generator=generator)
    left = torch.randint(0, width - side[1] + 1, (count, 1), generator=generator)
    rows, columns = torch.arange(height)[None], torch.arange(width)[None]
    in_rows, in_columns = (rows >= top) & (rows < top + side[0]), (columns >= left) & (columns < left + side[1])
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None].to(images.device)


View = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(images (N, C, H, W), partners (N,), generator) -> (N, C, H, W)."""
VIEWS: dict[str, View] = {
    "mixup_0.5": lambda x, partner, g: mixed(x, partner, 0.5),
    "mixup_uniform": lambda x, partner, g: mixed(x, partner, torch.rand(len(x), generator=g)),
    "cutmix_0.5": lambda x, partner, g: cut_mixed(x, partner, 0.5, g),
}
"""Views whose agreement is averaged, by name; each has a separate generator, the same for every network."""


@dataclass
class HarderViews:
    """The views of a held-out set, made anew for each network; the teacher's logits on them are computed once.

    Attributes:
        images: (N, C, H, W), held-out images, of which the first `MAX_IMAGES` are used.
        labels: (N,) int64, their assigned classes.
    """

    images: Tensor
    labels: Tensor
    _teacher: dict[str, TeacherLogits] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.images, self.labels = self.images[:MAX_IMAGES], self.labels[:MAX_IMAGES]

    def view(self, name: str) -> Tensor:
        """Return one view (n, C, H, W) of the images."""
        generator = make_generator("fidelity study", name)  # the very views of the calibration
        return VIEWS[name](self.images, partners(self.labels, generator), generator)

    def fidelity(
        self, teacher: nn.Module, student: nn.Module, *, batch_size: int, accelerator: Accelerator
    ) -> dict[str, float]:
        """Return agreement in percent and KL in nats between student and teacher, averaged over the views.

        Args:
            teacher: (N, C, H, W) -> logits (N, K), the same one in every call.
            student: (N, C, H, W) -> logits (N, K).
            batch_size: Images per forward pass over all processes.
            accelerator: Process group; a collective call.
        """
        sums = {"kl": 0.0, "disagreement": 0.0}
        for name in VIEWS:
            images = self.view(name)
            if name not in self._teacher:
                logits = TeacherLogits.compute(teacher, images, batch_size=batch_size, accelerator=accelerator)
                self._teacher[name] = replace(logits, images=images[:0])  # the view is not kept
            functions = {"kl": measures.kl, "disagreement": measures.disagreement}
            found = fidelity(replace(self._teacher[name], images=images), student, functions, accelerator=accelerator)
            sums = {key: total + found[key] for key, total in sums.items()}
        return {"agreement": 100 - sums["disagreement"] / len(VIEWS), "kl": sums["kl"] / len(VIEWS)}
