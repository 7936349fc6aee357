"""Tensors too large to hold in memory: backed by a file without a name, which disappears with the last process that uses it."""

import errno
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def scratch_tensor(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> Tensor:
    """Return an uninitialised tensor whose bytes lie in a file on the disk of ``folder``.

    The system keeps in memory what fits and writes the rest out; the file has no name, so that nothing is left behind by any end
    of the process. Where the system can, all of its space is reserved at once: a disk that fills up later would end the process by a
    signal.

    Args:
        shape: Of the tensor, at least one element.
        dtype: Of the tensor.
        folder: An existing folder.

    Raises:
        OSError: The folder cannot be written, or its disk has not that much space; names the folder.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    try:
        descriptor, path = _nameless(folder)
        try:
            if hasattr(os, "posix_fallocate"):  # not on macOS, where a full disk is met later
                os.posix_fallocate(descriptor, 0, size)
            else:
                os.ftruncate(descriptor, size)
            tensor = torch.from_file(path, shared=True, size=count, dtype=dtype)
        finally:
            os.close(descriptor)
            if not path.startswith("/proc/"):
                os.unlink(path)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError where the file cannot be mapped
        number, text = (error.errno, error.strerror) if isinstance(error, OSError) else (errno.ENOMEM, str(error))
        reason = f"{text}, while {size / 2**20:.0f} MiB were to be reserved for the filtered images"
        raise OSError(number, reason, str(folder)) from error
    return tensor.view(shape)


def _nameless(folder: Path) -> tuple[int, str]:
    """Return an open file in ``folder`` and a path by which it can be mapped; nameless from the start where the system can do that."""
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
    """Refuse a disk that cannot take ``copies`` files of ``size`` bytes in ``folder``.

    Raises:
        OSError: Naming the folder, what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if free < copies * size:
        raise OSError(
            f"runtime.output_dir must have {copies * size / 2**20:.0f} MiB free for the filtered images of {copies} processes, "
            f"but {folder} has {free / 2**20:.0f}; set finetune.lowpass_cutoff to none, or choose another disk"
        )
