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
"""Images that each view is made of, so that its cost does not grow with a larger set."""
MIN_IMAGES = 64
"""Held-out images from which on an image of a smaller set is blended with several partners, up to `MAX_IMAGES` blends:
on six students of CIFAR networks a quarter of their held-out images then gave agreements within 4 points of all."""
MAX_REPEATED_SIDE = 64
"""Longest side in pixels of images that are repeated; a view of larger ones would cost more than the run."""


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


View = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(images (N, C, H, W), partners (N,), generator) -> (N, C, H, W)."""
VIEWS: dict[str, View] = {
    "mixup_0.5": lambda x, partner, g: mixed(x, partner, 0.5),
    "mixup_uniform": lambda x, partner, g: mixed(x, partner, torch.rand(len(x), generator=g)),
}
"""Views whose agreement is averaged, by name; each has a separate generator, the same for every network."""


def confidence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Return the largest probability of the teacher for each image, in percent; the student does not matter."""
    return 100 * teacher_logits.double().softmax(1).amax(1)


@dataclass
class HarderViews:
    """The views of a held-out set, made anew for each network; the teacher's logits on them are computed once.

    Attributes:
        images: (N, C, H, W), held-out images, of which the first `MAX_IMAGES` are used, or all several times.
        labels: (N,) int64, their assigned classes.
    """

    images: Tensor
    labels: Tensor
    _teacher: dict[str, TeacherLogits] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        count = len(self.images)
        if MIN_IMAGES <= count < MAX_IMAGES and max(self.images.shape[2:]) <= MAX_REPEATED_SIDE:
            rows = torch.arange(MAX_IMAGES) % count
            self.images, self.labels = (
                self.images[rows.to(self.images.device)],
                self.labels[rows.to(self.labels.device)],
            )
        self.images, self.labels = self.images[:MAX_IMAGES], self.labels[:MAX_IMAGES]

    def view(self, name: str) -> Tensor:
        """Return one view (n, C, H, W) of the images."""
        generator = make_generator("fidelity study", name)  # the very views of the calibration
        return VIEWS[name](self.images, partners(self.labels, generator), generator)

    def fidelity(
        self, teacher: nn.Module, student: nn.Module, *, batch_size: int, accelerator: Accelerator
    ) -> dict[str, float]:
        """Return agreement, KL in nats and the teacher's confidence, averaged over the views.

        Agreement is the percentage of images with the same class; confidence is the mean of the teacher's largest
        probability, in percent: a teacher of high accuracy is more certain of blends.

        Args:
            teacher: (N, C, H, W) -> logits (N, K), the same one in every call.
            student: (N, C, H, W) -> logits (N, K).
            batch_size: Images per forward pass over all processes.
            accelerator: Process group; a collective call.
        """
        functions = {"kl": measures.kl, "disagreement": measures.disagreement, "confidence": confidence}
        sums = dict.fromkeys(functions, 0.0)
        for name in VIEWS:
            images = self.view(name)
            if name not in self._teacher:
                logits = TeacherLogits.compute(teacher, images, batch_size=batch_size, accelerator=accelerator)
                self._teacher[name] = replace(logits, images=images[:0])  # the view is not kept
            found = fidelity(replace(self._teacher[name], images=images), student, functions, accelerator=accelerator)
            sums = {key: total + found[key] for key, total in sums.items()}
        means = {key: total / len(VIEWS) for key, total in sums.items()}
        return {"agreement": 100 - means.pop("disagreement"), **means}
