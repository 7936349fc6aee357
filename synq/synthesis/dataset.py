"""Synthetic set: images and labels in one memory-mapped file, with a manifest of how they were synthesized."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from synq.common.digests import read_sealed_json, report_unsealed
from synq.common.files import DamagedFileError
from synq.config.parsing import check_format

FORMAT_VERSION = 2
"""Version of the file format and of the synthesis; any change that invalidates existing sets must increase it."""
DATA_FILE = "images.safetensors"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class SyntheticSet:
    """Images synthesized from a teacher, with one label per image."""

    images: Tensor
    """Shape (N, C, H, W), float32, normalized as the teacher's input. Memory-mapped copy-on-write: processes share one
    copy, and writes change the memory of this process only, never the file."""
    labels: Tensor
    """Shape (N,), int64: the assigned classes."""
    digest: str
    """SHA-256 over the contents of images and labels, 64 hexadecimal digits; see `set_digest`."""
    manifest: dict[str, Any]
    """Provenance and results of the synthesis: teacher, settings, seed, purpose, shards with their digests, loss terms,
    duration in seconds."""
    path: Path
    """Folder of the set."""

    def __len__(self) -> int:
        return self.labels.numel()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor; a contiguous tensor is not copied."""
    flat: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def content_digest(images: Tensor, labels: Tensor) -> str:
    """Return the SHA-256 of the shapes and bytes of images and labels, as 64 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps([list(images.shape), list(labels.shape)]).encode())
    digest.update(tensor_bytes(images))
    digest.update(tensor_bytes(labels))
    return digest.hexdigest()


def set_digest(shard_digests: list[str]) -> str:
    """Return the digest of a set: the SHA-256 of the digests of its shards, in order, as 64 hexadecimal digits."""
    return hashlib.sha256("\n".join(shard_digests).encode()).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the memory-mapped tensors and the metadata of a safetensors file.

    Raises:
        ValueError: If the file is truncated or not a safetensors file; the message names the file and the cure.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise damage_error(path, str(error)) from None


def damage_error(path: Path, what: str) -> DamagedFileError:
    """Return the error for a damaged file or folder.

    Args:
        path: The file or folder.
        what: Description of the damage.
    """
    cure = "remove it and run the same command again"
    return DamagedFileError(f"`{path}` must be intact, but got damage ({what}); {cure}", path)


def load_set(path: Path) -> SyntheticSet:
    """Load a finished set and verify each shard against its digest.

    Args:
        path: Folder of the set.

    Raises:
        FileNotFoundError: If there is no set.
        ValueError: If the set is damaged or of another format version; the message names the folder, the shard and the
            cure.
    """
    try:
        manifest, is_sealed = read_sealed_json(path / MANIFEST_FILE)
    except ValueError as error:
        raise damage_error(path, str(error)) from None
    if not isinstance(manifest, dict):
        raise damage_error(path, f"{MANIFEST_FILE} does not describe the images")
    cure = "remove it and run the same command again"
    check_format(path, "a synthetic set", manifest.get("format_version"), FORMAT_VERSION, cure)
    file = path / DATA_FILE
    if not file.exists():
        raise damage_error(path, f"{DATA_FILE} is missing")
    tensors, _ = read_tensors(file)
    images, labels = tensors.get("images"), tensors.get("labels")
    if images is None or labels is None or images.shape[0] != labels.shape[0]:
        raise damage_error(path, f"{DATA_FILE} must contain as many labels as images")
    try:
        stops = tuple(int(shard["stop"]) for shard in manifest["shards"])
        expected = [str(shard["digest"]) for shard in manifest["shards"]]
        whole = str(manifest["digest"])
        if not stops or stops[-1] != labels.numel():
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise damage_error(path, f"{MANIFEST_FILE} does not describe the images") from None
    status = file.stat()
    found = _shard_digests(str(file), stops, (status.st_ino, status.st_mtime_ns, status.st_size))
    for index, (stop, recorded, digest) in enumerate(zip(stops, expected, found, strict=True)):
        if recorded != digest:
            start = stops[index - 1] if index else 0
            raise damage_error(path, f"shard {index}, images {start} to {stop - 1}, differs from its digest")
    digest = set_digest(list(found))
    if whole != digest:
        raise damage_error(path, f"{MANIFEST_FILE} does not match the digests of its shards")
    if not is_sealed:
        if lacking := _misfit(manifest):
            raise damage_error(path, f"{MANIFEST_FILE} has {lacking}")
        report_unsealed(path / MANIFEST_FILE)
    return SyntheticSet(images=images, labels=labels, digest=digest, manifest=manifest, path=path)


def _misfit(manifest: dict[str, Any]) -> str:
    """Return what a manifest lacks for its readers, "" if nothing."""
    for name, low, high in (("agreement", 0, 1), ("seconds", 0, 1e300), ("num_classes", 1, 2**31)):
        value: Any = manifest.get(name)
        if type(value) not in (int, float) or not low <= value <= high:
            return f"{name} = {value!r:.80}"
    return "" if isinstance(manifest.get("key"), str) else "no key"


@lru_cache(maxsize=16)
def _shard_digests(file: str, stops: tuple[int, ...], identity: tuple[int, int, int]) -> tuple[str, ...]:
    """Return the digest of each shard, cached by the state of the file: a worker of many trials reads gigabytes once.

    Args:
        file: Path of the safetensors file.
        stops: Index after the last image of each shard.
        identity: Inode, modification time in nanoseconds and size of the file, part of the cache's key.
    """
    tensors, _ = read_tensors(Path(file))
    starts = (0, *stops[:-1])
    return tuple(
        content_digest(tensors["images"][start:stop], tensors["labels"][start:stop])
        for start, stop in zip(starts, stops, strict=True)
    )
