"""Fidelity of students to a teacher whose logits are computed once, over all processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from synq.evaluation import fidelity as measures


@dataclass(frozen=True, kw_only=True)
class TeacherLogits:
    """Logits of a teacher for fixed images, computed once for all students; only the batches of this process.

    Attributes:
        images: (N, C, H, W), the images of all processes.
        rows: Indices of each batch of this process, (n,).
        logits: Logits of each batch, (n, K), on the device.
    """

    images: Tensor
    rows: Sequence[Tensor]
    logits: Sequence[Tensor]

    @classmethod
    @torch.no_grad()
    def compute(
        cls, teacher: nn.Module, images: Tensor, *, batch_size: int, accelerator: Accelerator
    ) -> "TeacherLogits":
        """Compute the logits of the teacher.

        Args:
            teacher: (N, C, H, W) -> logits (N, K), in eval mode, on the device of ``accelerator``.
            images: (N, C, H, W).
            batch_size: Images per forward pass over all processes.
            accelerator: Process group.
        """
        rows = local_batches(torch.arange(len(images)), batch_size, accelerator)
        logits = [teacher(batch_of(images, part, teacher, accelerator)) for part in rows]
        return cls(images=images, rows=rows, logits=logits)


@torch.no_grad()
def fidelity(
    reference: TeacherLogits, student: nn.Module, functions: Mapping[str, measures.Measure], *, accelerator: Accelerator
) -> dict[str, float]:
    """Return the mean of each fidelity measure between student and teacher over all images, without labels.

    Args:
        reference: Images and the teacher's logits.
        student: (N, C, H, W) -> logits (N, K), in eval mode, on the device of ``accelerator``.
        functions: Measures by name.
        accelerator: Process group.

    Returns:
        Mean over the images of all processes, by name of the measure.
    """
    sums = torch.zeros(len(functions) + 1, dtype=torch.float64, device=accelerator.device)
    for rows, teacher_logits in zip(reference.rows, reference.logits, strict=True):
        student_logits = student(batch_of(reference.images, rows, student, accelerator))
        values = [function(teacher_logits, student_logits).double().sum() for function in functions.values()]
        sums += torch.stack([*values, torch.full_like(values[0], len(rows))])
    *totals, seen = accelerator.reduce(sums, reduction="sum").tolist()
    # No measure is negative; rounding gives sums such as -1e-15. A sum that is not finite stays as it is.
    return {name: 0.0 if total < 0 else total / seen for name, total in zip(functions, totals, strict=True)}


def batch_of(images: Tensor, rows: Tensor, net: nn.Module, accelerator: Accelerator) -> Tensor:
    """Return images (n, C, H, W) by their indices, on the device and in the dtype of a network."""
    return images[rows.to(images.device)].to(accelerator.device, dtype_of_net(net))


def local_batches(indices: Tensor, batch_size: int, accelerator: Accelerator) -> list[Tensor]:
    """Return the indices of this process in batches; no index is repeated to pad a batch."""
    local = indices[accelerator.process_index :: accelerator.num_processes]
    return list(local.split(max(1, batch_size // accelerator.num_processes))) if len(local) else []


def dtype_of_net(net: nn.Module) -> torch.dtype:
    """Return the dtype of a network's parameters; float32 without any, as a simulation has it."""
    return next((p.dtype for p in net.parameters()), torch.float32)
