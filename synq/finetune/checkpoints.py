"""Checkpoints of a student, before its fine-tuning and after each epoch, written atomically."""

import copy
import io
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from synq.common.files import write_bytes_atomic
from synq.config.parsing import check_format
from synq.finetune.ema import WeightAverage

M = TypeVar("M", bound=nn.Module)
FORMAT = 2
"""Format of `checkpoint.pt` and `prepared.pt`."""


def check_same_epoch(epoch: int, path: Path | None, accelerator: Accelerator) -> None:
    """Check that all processes see the same checkpoint: otherwise they would wait for one another forever.

    Raises:
        ValueError: They do not; the message names the epochs that the processes find.
    """
    epochs = accelerator.gather(torch.tensor([epoch], device=accelerator.device)).tolist()
    if len(set(epochs)) > 1:
        raise ValueError(
            f"runtime.output_dir must be seen by all processes, but they find {path} at epochs {sorted(set(epochs))}: "
            "use a shared file system"
        )


def save_checkpoint(
    path: Path,
    identity: str,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage,
    history: list[dict[str, float]],
) -> None:
    """Write the state after an epoch to ``path``, atomically."""
    state = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.state_dict(),
        "history": history,
    }
    write_state(path, identity, state)


def load_checkpoint(
    path: Path | None, identity: str, net: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage
) -> list[dict[str, float]]:
    """Load ``path`` into network, optimizer and average; return the history of its epochs, [] without a file.

    Raises:
        ValueError: If the file is damaged, or its identity is not ``identity``.
    """
    if path is None or not path.exists():
        return []
    state = read_state(path, identity)
    try:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        history: list[dict[str, float]] = state["history"]
    except Exception as error:  # unpickling and loading raise many types; the message must name the damaged file
        raise _unreadable(path, error) from error
    return history


def save_prepared(
    path: Path, identity: str, net: nn.Module, reference: nn.Module | None, report: dict[str, Any]
) -> None:
    """Write a calibrated student, atomically, so that a run resumed before its first checkpoint repeats no rounding.

    Args:
        path: The file.
        identity: Digests of teacher and images.
        net: The student's network.
        reference: The float network that the student approximates, if it is not the teacher itself.
        report: Report of ``prepare_student``, as plain values.
    """
    scaled = None if reference is None else reference.state_dict()
    write_state(path, identity, {"model": net.state_dict(), "reference": scaled, "report": report})


def load_prepared(path: Path, identity: str, net: nn.Module, teacher: M) -> tuple[M, dict[str, Any]]:
    """Load a file of ``save_prepared`` into ``net``; return the float network that it approximates, and the report.

    Raises:
        ValueError: If the file is damaged, or its identity is not ``identity``.
    """
    state = read_state(path, identity)
    try:
        net.load_state_dict(state["model"])
        reference = teacher
        if state["reference"] is not None:
            reference = copy.deepcopy(teacher)
            reference.load_state_dict(state["reference"])
        return reference, state["report"]
    except Exception as error:  # see load_checkpoint
        raise _unreadable(path, error) from error


def write_state(path: Path, identity: str, state: dict[str, Any]) -> None:
    """Write plain values and tensors to ``path``, atomically, with the identity of the run."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "identity": identity, **state}, buffer)
    write_bytes_atomic(path, buffer.getvalue())


def read_state(path: Path, identity: str) -> dict[str, Any]:
    """Read a file of ``write_state``, on the CPU.

    Raises:
        ValueError: If the file is damaged, or its identity is not ``identity``.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["identity"]
        number = state.get("format")
    except Exception as error:  # see load_checkpoint
        raise _unreadable(path, error) from error
    check_format(path, "the state of a run", number, FORMAT, "remove it and run it again")
    if found != identity:
        raise ValueError(
            f"runtime.output_dir must not mix runs: {path} belongs to other teacher weights or images of the same name."
            " Choose another output_dir, or remove it"
        )
    return state


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"checkpoint must be readable, but {path} is not: {error}. Remove it to start over")
