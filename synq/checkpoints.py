"""The state of a fine-tuning after an epoch, as one file that is whole or absent."""

import io
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from synq.averaging import WeightAverage
from synq.results import write_bytes_atomic


def check_same_epoch(epoch: int, path: Path | None, accelerator: Accelerator) -> None:
    """Refuse to resume where only some processes see the checkpoint: they would wait for one another for ever."""
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
    """Write the state after an epoch to ``path``, by rename."""
    buffer = io.BytesIO()
    state = {
        "identity": identity,
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average.state_dict(),
        "history": history,
    }
    torch.save(state, buffer)
    write_bytes_atomic(path, buffer.getvalue())


def load_checkpoint(
    path: Path | None, identity: str, net: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage
) -> list[dict[str, float]]:
    """Put the state in ``path`` into network, optimizer and average; returns the epochs done, none where there is no file.

    Raises:
        ValueError: If the file is damaged, or its identity is not ``identity``.
    """
    if path is None or not path.exists():
        return []
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["identity"]
    except Exception as error:  # unpickling raises many types; a damaged file must name itself
        raise _unreadable(path, error) from error
    if found != identity:
        raise ValueError(
            f"runtime.output_dir must not mix runs: {path} belongs to other teacher weights or images of the same name. "
            "Choose another output_dir, or remove it"
        )
    try:
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        history: list[dict[str, float]] = state["history"]
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    return history


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"checkpoint must be readable, but {path} is not: {error}. Remove it to start over")
