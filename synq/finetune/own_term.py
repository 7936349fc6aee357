"""The loss term that a user adds, `finetune.own_term`: found, checked on random logits, and computed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from synq.common.error_text import one_line
from synq.config.finetune import FinetuneConfig
from synq.config.plugins import LOSS_TERM, check_version
from synq.teacher.user_code import added_function

CHECKED = 3
"""Images of the call that checks a term."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """What a loss term of a user may compare, for the N images of a batch."""

    student_logits: Tensor
    """(N, K), with gradient."""
    teacher_logits: Tensor
    """(N, K), without gradient."""
    labels: Tensor
    """(N,) int64: the classes that the images were made for, or the teacher's predictions."""
    student_map: Tensor | None = None
    """(N, H, W), the class activation maps of the student; None where `finetune.cam_weight` is 0 or there are none."""
    teacher_map: Tensor | None = None
    """(N, H, W), those of the teacher."""


OwnTerm = Callable[[LossInputs], Tensor]


def own_term(config: FinetuneConfig) -> OwnTerm | None:
    """Return the loss term of a user, or None if the loss has none.

    Raises:
        ValueError: There is no such function.
    """
    if config.own_term is None or not config.own_weight:
        return None
    return added_function(LOSS_TERM, config.own_term)


def check_own_term(
    config: FinetuneConfig, num_classes: int, *, device: torch.device | str = "cpu", with_maps: bool = True
) -> None:
    """Call the loss term of a user on random logits, before anything is computed.

    Args:
        config: The settings.
        num_classes: Number of classes K.
        device: Device of the run, which a term with constants on another one would fail on.
        with_maps: Whether the teacher has class activation maps.

    Raises:
        ValueError: It is unknown or of another version, fails, or does not return one finite value with a gradient for
            each image.
        FileNotFoundError: Its file does not exist.
    """
    if config.own_term is None or not config.own_weight:
        return
    check_version(LOSS_TERM, config.own_term)
    term = own_term(config)
    assert term is not None
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, CHECKED, num_classes, generator=generator).to(device)
    has_maps = config.uses_cam and with_maps
    maps = torch.rand(2, CHECKED, 4, 4, generator=generator).to(device) if has_maps else (None, None)
    inputs = LossInputs(
        student_logits=student.requires_grad_(),
        teacher_logits=teacher,
        labels=(torch.arange(CHECKED) % num_classes).to(device),
        student_map=maps[0],
        teacher_map=maps[1],
    )
    rule = f"`finetune.own_term` must return one value with a gradient for each image, but {config.own_term}"
    try:
        with torch.enable_grad():
            values = term(inputs)
    except Exception as error:  # a user's code may raise anything
        raise ValueError(f"{rule} raised {one_line(error)}") from error
    if not isinstance(values, Tensor) or values.shape != (CHECKED,):
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{rule} returned {found} for {CHECKED} images")
    if not values.requires_grad or not bool(values.isfinite().all()):
        raise ValueError(f"{rule} returned {'no gradient' if not values.requires_grad else 'NaN or infinity'}")
