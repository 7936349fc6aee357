"""Reading of weight files without executing code in them; the content decides how, not the suffix.

`read_content` returns what a file holds as plain values; `weight_files.py` finds the state dict in it.
"""

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from synq.common.error_text import first_line
from synq.config.identity import WEIGHT_INDEX_SUFFIX
from synq.config.parsing import shown

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of a pointer of Git LFS (Git LFS specification, version 1)."""
_SAVE = "save it with safetensors.torch.save_file(model.state_dict(), FILE) where the model can be loaded"
_FOREIGN = {
    b"\x89HDF\r\n\x1a\n": f"is an HDF5 file, as Keras and MATLAB write it: {_SAVE}",
    b"\x93NUMPY": f"is one NumPy array, not named tensors: {_SAVE}",
    b"GGUF": f"is a GGUF file, whose tensors are quantized: {_SAVE}",
    b"\x1f\x8b": "is compressed by gzip: unpack it first",
    b"BZh": "is compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "is compressed by xz: unpack it first",
    b"7z\xbc\xaf": "is a 7z archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by Zstandard: unpack it first",
}
"""First bytes of files of other kinds, and the reason to reject them."""
_ZIP = b"PK\x03\x04"
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
_HEAD_BYTES = 512
_MAX_NAME = 255
"""Bytes of a file name that file systems take."""


def read_content(path: Path) -> object:
    """Return the content of a weight file: plain values and tensors on the CPU.

    Args:
        path: A file in the safetensors format or of ``torch.save`` (read with ``weights_only=True``), or the index of
            a sharded set (``model.safetensors.index.json``, ``pytorch_model.bin.index.json``).

    Raises:
        FileNotFoundError: If the file, or one that the index names, does not exist.
        OSError: If it cannot be read.
        ValueError: If it is damaged, of another kind, or requires unsafe unpickling; one line that names the file.
    """
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if is_weight_name(p.name))
        inside = sorted(names, key=lambda name: not name.endswith(WEIGHT_INDEX_SUFFIX))[:3]
        hint = f": name one of its files, such as {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(
            f"`teacher.weights` must name an existing file, but got {path}, which is a folder{hint}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"`teacher.weights` must name an existing file, but got {path}")
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    reason = _foreign(head)
    if reason:
        raise ValueError(f"`teacher.weights` must be a readable weight file, but got {path}, which {reason}")
    suffix = path.name.lower()
    if suffix.endswith(WEIGHT_INDEX_SUFFIX):
        return _read_sharded(path)
    if head[8:9] == b"{" or (suffix.endswith(".safetensors") and not head.startswith(_ZIP)):
        return _read_safetensors(path)
    return _read_torch(path)


def is_weight_name(name: str) -> bool:
    """Return whether a file name has the usual form of a weight file of PyTorch, or of the index of a sharded set."""
    return name.lower().endswith((".safetensors", ".bin", ".pth", ".pt", ".ckpt", WEIGHT_INDEX_SUFFIX))


def _foreign(head: bytes) -> str:
    """Return why a file is no weight file of PyTorch, by its first bytes; "" if it may be one."""
    if not head:
        return "is empty"
    if head.startswith(LFS_POINTER):
        return "is a pointer of Git LFS, not the file: run `git lfs pull` in its checkout"
    if _WEB_PAGE.match(head):
        return "is a web page, not the file: the download needs its direct link, or a login"
    for magic, reason in _FOREIGN.items():
        if head.startswith(magic):
            return reason
    if head.startswith(_ZIP) and _first_name(head).endswith(b".npy"):
        return f"is an archive of NumPy arrays (.npz), whose layout PyTorch does not define: {_SAVE}"
    return ""


def _first_name(head: bytes) -> bytes:
    """Return the first name in a zip archive, from its local header (ZIP File Format Specification, 4.3.7)."""
    return head[30 : 30 + int.from_bytes(head[26:28], "little")]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"`teacher.weights` must be a readable safetensors file, but got {path}: {error}") from error
    except Exception as error:  # such as a KeyError for a type that this PyTorch does not have
        reason = _first_sentence(error)
        raise ValueError(f"`teacher.weights` must be a readable safetensors file, but got {path}: {reason}") from error


def _read_torch(path: Path) -> object:
    # Metrics stored with the weights are often NumPy scalars or an argparse namespace: plain data, safe to unpickle.
    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    safe: list[object] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        argparse.Namespace,
        *dtypes,
    ]
    try:
        # PyTorch warns about its own ways to store sparse and quantized tensors, which are rejected later by name.
        context = torch.serialization.safe_globals(safe)  # type: ignore[arg-type]
        with context, warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore")
            # A file object, because torch.load reads a path that ends in .safetensors as that format.
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"`teacher.weights` must contain plain tensors, but got {path}, which is damaged or contains Python "
            "objects that are not loaded for safety; "
            "where the model was trained, run torch.save(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # a damaged pickle can raise any kind, from struct.error to OverflowError
        if "TorchScript" in str(error):
            raise ValueError(
                f"`teacher.weights` must be a state dict, but got {path}, a TorchScript archive: save "
                "torch.jit.load(FILE).state_dict() with torch.save"
            ) from error
        raise ValueError(
            f"`teacher.weights` must be a readable file of torch.save, but got {path}: {_first_sentence(error)}"
        ) from error


def _first_sentence(error: Exception) -> str:
    """Return the first sentence of an error; PyTorch adds paragraphs of advice."""
    if isinstance(error, OSError) or not str(error).strip():
        return f"it is truncated or damaged ({type(error).__name__})"
    return first_line(error).partition(". ")[0]


def _is_outside(name: str) -> bool:
    """Return whether a name is more than that of a file: a path, or one that no file system takes."""
    return Path(name).name != name or "\\" in name or len(name.encode("utf-8", "replace")) > _MAX_NAME


def _read_sharded(path: Path) -> dict[str, Tensor]:
    """Read all files of a sharded set: its index has the name of the file of every tensor."""
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`teacher.weights` must be a readable index, but got {path}: {_first_sentence(error)}"
        ) from error
    files = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(files, Mapping) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(
            f"`teacher.weights` must be an index with a table weight_map (tensor to file), but got {path} without one"
        )
    shards: dict[str, dict[str, Tensor]] = {}
    for name in dict.fromkeys(files.values()):
        if _is_outside(name) or name.lower().endswith(WEIGHT_INDEX_SUFFIX):
            raise ValueError(
                f"`teacher.weights` must be an index of files in its own folder, but {path} names {shown(name)}"
            )
        if not (path.parent / name).is_file():
            raise FileNotFoundError(
                f"`teacher.weights` must be an index whose files all exist, but {path.parent / name}, which {path} "
                "names, does not"
            )
        content = read_content(path.parent / name)
        shards[name] = dict(content) if isinstance(content, Mapping) else {}
    listed: dict[str, set[str]] = {name: set() for name in shards}
    for tensor, name in files.items():
        listed[name].add(tensor)
        if not isinstance(shards[name].get(tensor), Tensor):
            raise ValueError(f"`teacher.weights` must be an index of its files, but {path}: {name} has no {tensor!r}")
    for name, shard in shards.items():
        unlisted = [tensor for tensor in shard if tensor not in listed[name]]
        if unlisted:
            raise ValueError(
                f"`teacher.weights` must be an index of its files, but {path} does not list {unlisted[0]!r} of {name}"
            )
    return {tensor: shards[name][tensor] for tensor, name in files.items()}
