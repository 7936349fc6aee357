"""Files of arrays: npz archives and IDX files, whose headers are compared with their content before they are read."""

import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from synq.config.parsing import shown
from synq.teacher.weight_readers import LFS_POINTER

MAX_DIMENSIONS = 4
"""Of images (N, H, W, C)."""


def read_npz(path: Path, keys: Sequence[str] = ("x", "y")) -> tuple[np.ndarray, ...]:
    """Read arrays of an npz archive.

    Args:
        path: The file.
        keys: Names of the arrays: x (images) and y (labels), or x alone.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is damaged, lacks an array, or declares more values than it holds or fit the machine's
            memory; one line that names the file.
    """
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
        if not head or head == LFS_POINTER:
            reason = "it is a pointer of Git LFS: run `git lfs pull` in its checkout" if head else "it is empty"
            raise ValueError(f"npz file {path} cannot be used: {reason}")
        file.seek(0)
        try:
            with zipfile.ZipFile(file) as archive:
                _check_members(archive, keys)
            file.seek(0)
            with np.load(file, allow_pickle=False) as content:
                return tuple(content[key] for key in keys)
        except Exception as error:  # zipfile and NumPy raise any kind for damaged files, from KeyError to SyntaxError
            reason = shown(" ".join(str(error).split()) or type(error).__name__)[1:-1]
            raise ValueError(f"npz file {path} cannot be used: {reason}") from error


def _check_members(archive: zipfile.ZipFile, keys: Sequence[str]) -> None:
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if any(key not in names for key in keys):
        needed = " and ".join(f"`{key}`" for key in keys)
        kind = "arrays" if len(keys) > 1 else "an array"
        raise ValueError(f"it must contain {kind} {needed}, but has {', '.join(names) or 'none'}")
    for key in keys:
        info = archive.getinfo(f"{key}.npy")
        with archive.open(info) as member:
            version = npy.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"`{key}` must be a plain array, but has format {version}")
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(member)
            header = member.tell()
        if dtype.hasobject:
            raise ValueError(f"`{key}` must hold numbers, but holds Python objects, which need allow_pickle")
        declared, held = math.prod(shape) * dtype.itemsize, info.file_size - header
        if declared != held:
            raise ValueError(
                f"`{key}` must hold {shape} {dtype} ({declared} bytes), but {held} bytes follow its header"
            )
        _check_memory(key, declared)


def _check_memory(name: str, size: int) -> None:
    """Raise ValueError if `size` bytes are more than the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise ValueError(
            f"`{name}` must fit the memory of this machine, {memory / 1e9:.0f} GB, but needs {size / 1e9:.0f} GB"
        )


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, plain or gzipped.

    Format: the bytes 00 00 08 ndim, then ndim big-endian uint32 sizes, then the values.

    Returns:
        A uint8 array of the shape in the file.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If the file is damaged, contains another type or more than four dimensions.
    """
    if path.suffix != ".gz":
        with path.open("rb") as plain:
            return _idx(plain, path)
    with path.open("rb") as raw:
        try:
            with gzip.open(raw) as unpacked:
                return _idx(unpacked, path)  # type: ignore[arg-type]  # a GzipFile reads as a file of bytes does
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} must be a readable gzip file, but is damaged: {error}") from error


def _idx(file: BinaryIO, path: Path) -> np.ndarray:
    head = file.read(4)
    if len(head) < 4 or head[:3] != b"\0\0\x08":
        raise ValueError(f"{path} must be an IDX file of unsigned bytes, but starts with {head!r}")
    number = head[3]
    if not 1 <= number <= MAX_DIMENSIONS:
        raise ValueError(f"{path} must have 1 to {MAX_DIMENSIONS} dimensions, but has {number}")
    sizes = file.read(4 * number)
    if len(sizes) < 4 * number:
        raise ValueError(f"{path} must contain {number} sizes after its first bytes, but is damaged: it is truncated")
    shape = tuple(int(size) for size in np.frombuffer(sizes, dtype=">u4"))
    size = math.prod(shape)
    _check_memory(str(path), size)
    values = file.read(size + 1)  # one more than declared shows a file that is too long
    if len(values) != size:
        found = f"{len(values)} bytes" if len(values) < size else "more bytes"
        raise ValueError(f"{path} must contain {shape} bytes, but is damaged: {found} follow its header")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)
