"""Checkpoints of a student, before its fine-tuning and after each epoch, written atomically."""

import copy
import io
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from synq.common.digests import read_sealed, report_unsealed, write_sealed
from synq.common.error_text import first_line
from synq.common.files import DamagedFileError
from synq.common.notices import print_notice
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

    Of a damaged file nothing is used: a notice names it, and fine-tuning starts again.

    Raises:
        ValueError: As `read_state`, or the file is of another network.
    """
    if path is None or not path.exists():
        return []
    try:
        state = read_state(path, identity)
    except DamagedFileError as error:
        print_notice(f"warning: {error}; fine-tuning starts again from its first epoch")
        return []
    try:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        history: list[dict[str, float]] = state["history"]
    except Exception as error:  # loading raises many types; the message must name the file
        raise _of_another_network(path, error) from error
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
        DamagedFileError: As `read_state`; the networks are as they were then.
        ValueError: As `read_state`, or the file is of another network.
    """
    return restore_prepared(read_state(path, identity), path, net, teacher)


def restore_prepared(state: dict[str, Any], path: Path, net: nn.Module, teacher: M) -> tuple[M, dict[str, Any]]:
    """Load what `read_state` read from a file of ``save_prepared``, as `load_prepared`.

    Raises:
        ValueError: If the file is of another network.
    """
    try:
        net.load_state_dict(state["model"])
        reference = teacher
        if state["reference"] is not None:
            reference = copy.deepcopy(teacher)
            reference.load_state_dict(state["reference"])
        return reference, state["report"]
    except Exception as error:  # see load_checkpoint
        raise _of_another_network(path, error) from error


def write_state(path: Path, identity: str, state: dict[str, Any]) -> None:
    """Write plain values and tensors to ``path``, atomically, with the identity of the run."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "identity": identity, **state}, buffer)
    write_sealed(path, buffer.getvalue())


def read_state(path: Path, identity: str) -> dict[str, Any]:
    """Read a file of ``write_state``, on the CPU.

    Raises:
        DamagedFileError: If the file differs from its digest or cannot be read.
        ValueError: If its identity is not ``identity``, or it is of another version.
    """
    content, is_sealed = read_sealed(path)
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        found = state["identity"]
        number = state.get("format")
    except Exception as error:  # unpickling raises many types; the message must name the damaged file
        raise _unreadable(path, error) from error
    check_format(path, "the state of a run", number, FORMAT, "remove it and run it again")
    if found != identity:
        raise ValueError(
            f"runtime.output_dir must not mix runs: {path} belongs to other teacher weights or images of the same name."
            " Choose another output_dir, or remove it"
        )
    if not is_sealed:
        report_unsealed(path)
    return state


def _unreadable(path: Path, error: Exception) -> DamagedFileError:
    reason = f"{type(error).__name__}: {first_line(error).partition('. ')[0][:200]}"  # without PyTorch's advice
    return DamagedFileError(f"`{path}` must be readable, but is damaged ({reason})", path)


def _of_another_network(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"`{path}` must hold the state of this run's student, but does not ({first_line(error)[:200]}): remove it, and "
        "the run starts over"
    )
