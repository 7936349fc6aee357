"""A synthetic set: images and labels in one memory-mapped file, with a manifest that says how they were made."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from synq.runs.record import read_json

FORMAT_VERSION = 1
"""Version of the files, and of the way sets are made: whoever changes either so that old sets no longer hold raises it."""
DATA_FILE = "images.safetensors"
MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class SyntheticSet:
    """Images made from a teacher, with the class each was made for."""

    images: Tensor
    """Shape (N, C, H, W), float32, in the teacher's normalised space. Memory-mapped: processes share one copy; writing into it changes
    this process's copy only, never the file."""
    labels: Tensor
    """Shape (N,), int64, the assigned classes."""
    digest: str
    """64 hexadecimal digits over the content of images and labels."""
    manifest: dict[str, Any]
    """What made the set and how well it went: teacher, config, seed, purpose, shards with their digests, loss terms, seconds."""
    path: Path
    """Folder of the set."""

    def __len__(self) -> int:
        return self.labels.numel()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    flat: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def content_digest(images: Tensor, labels: Tensor) -> str:
    """Return SHA-256 over shape and bytes of images and labels, as 64 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps([list(images.shape), list(labels.shape)]).encode())
    digest.update(tensor_bytes(images))
    digest.update(tensor_bytes(labels))
    return digest.hexdigest()


def set_digest(shard_digests: list[str]) -> str:
    """Return the digest of a whole set: SHA-256 over the digests of its shards, in order."""
    return hashlib.sha256("\n".join(shard_digests).encode()).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the memory-mapped tensors of a safetensors file and its metadata.

    Raises:
        ValueError: The file is cut short or not safetensors; the message names it and the cure.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise damaged(path, str(error)) from None


def damaged(path: Path, what: str) -> ValueError:
    """Return the error for a damaged file or folder."""
    return ValueError(f"`{path}` must be intact, but got damage ({what}); remove it and run the same command again")


def load_set(path: Path) -> SyntheticSet:
    """Load a finished set and check every shard of it against its digest.

    Raises:
        FileNotFoundError: There is no set.
        ValueError: The set is damaged or of another version; the message names the folder, the shard and the cure.
    """
    try:
        manifest = read_json(path / MANIFEST_FILE)
    except ValueError as error:
        raise damaged(path, str(error)) from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"`{path}` must have format version {FORMAT_VERSION}, but got {version}; remove it to remake it"
        )
    file = path / DATA_FILE
    if not file.exists():
        raise damaged(path, f"{DATA_FILE} is missing")
    tensors, _ = read_tensors(file)
    images, labels = tensors.get("images"), tensors.get("labels")
    if images is None or labels is None or images.shape[0] != labels.shape[0]:
        raise damaged(path, f"{DATA_FILE} does not hold images and labels of one length")
    try:
        stops = tuple(int(shard["stop"]) for shard in manifest["shards"])
        expected = [str(shard["digest"]) for shard in manifest["shards"]]
        whole = str(manifest["digest"])
        if not stops or stops[-1] != labels.numel():
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise damaged(path, f"{MANIFEST_FILE} does not describe the images") from None
    status = file.stat()
    found = _shard_digests(str(file), stops, (status.st_ino, status.st_mtime_ns, status.st_size))
    for index, (stop, was, digest) in enumerate(zip(stops, expected, found, strict=True)):
        if was != digest:
            start = stops[index - 1] if index else 0
            raise damaged(path, f"shard {index}, images {start} to {stop - 1}, differs from its digest")
    digest = set_digest(list(found))
    if whole != digest:
        raise damaged(path, f"{MANIFEST_FILE} does not fit its own shards")
    return SyntheticSet(images=images, labels=labels, digest=digest, manifest=manifest, path=path)


@lru_cache(maxsize=16)
def _shard_digests(file: str, stops: tuple[int, ...], identity: tuple[int, int, int]) -> tuple[str, ...]:
    """Digest each shard's rows. Remembered per state of the file: a worker that runs many trials reads gigabytes once."""
    tensors, _ = read_tensors(Path(file))
    starts = (0, *stops[:-1])
    return tuple(
        content_digest(tensors["images"][start:stop], tensors["labels"][start:stop])
        for start, stop in zip(starts, stops, strict=True)
    )
