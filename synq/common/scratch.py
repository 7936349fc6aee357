"""Tensors too large for memory, backed by an unnamed file that the system removes when the last process closes it."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from synq.common.files import nearest_existing

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def scratch_tensor(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """Return an uninitialized tensor that is memory-mapped to an unnamed file on the disk of ``folder``.

    The system keeps in memory what fits and writes the rest to disk. The file has no name, so nothing remains after
    the process ends, however it ends. The disk space is reserved at once where the system supports it: a disk that
    fills up later would kill the process with SIGBUS.

    Args:
        shape: Shape of the tensor, with at least one element.
        dtype: Data type of the tensor.
        folder: An existing folder.

    Returns:
        A contiguous CPU tensor.

    Raises:
        OSError: If the folder cannot be written or its disk is too full; the message names the folder.
    """
    import torch  # a slow import: this package loads without it

    count = math.prod(shape)
    size = count * dtype.itemsize
    try:
        descriptor, path = _open_unnamed(folder)
        try:
            if hasattr(os, "posix_fallocate"):  # absent on macOS, where a full disk fails at the first write
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.ftruncate(descriptor, size)
            tensor = torch.from_file(path, shared=True, size=count, dtype=dtype)
        finally:
            os.close(descriptor)
            if not path.startswith("/proc/"):
                os.unlink(path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the file cannot be mapped
        number, text = (error.errno, error.strerror) if isinstance(error, OSError) else (errno.ENOMEM, str(error))
        reason = f"{text}, while reserving {size / 2**20:.0f} MiB for the filtered images"
        raise OSError(number, reason, str(folder)) from error
    return tensor.view(shape)


def _open_unnamed(folder: Path) -> tuple[int, str]:
    """Open a temporary file in ``folder``, unnamed where the system supports O_TMPFILE.

    Returns:
        The file descriptor, and a path under which the file can be mapped.
    """
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        try:
            descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        else:
            return descriptor, f"/proc/self/fd/{descriptor}"
    return tempfile.mkstemp(prefix=".scratch-", dir=folder)


def check_space(folder: Path, size: int, copies: int) -> None:
    """Check that the disk of ``folder`` has space for ``copies`` files of ``size`` bytes each.

    Raises:
        OSError: If it has not; the message names the folder, the required and the free space.
    """
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < copies * size:
        raise OSError(
            f"runtime.output_dir must have {copies * size / 2**20:.0f} MiB free for the filtered images of {copies} "
            f"processes, but {folder} has {free / 2**20:.0f}; "
            "set finetune.lowpass_cutoff to none, or choose another disk"
        )
