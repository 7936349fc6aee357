"""The store of synthetic sets: content-addressed folders, unfinished ones that can be resumed, writes that are whole or absent."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from safetensors.torch import save as to_safetensors
from torch import Tensor

from synq.config.identity import LATER_SETTINGS
from synq.config.run import SynthesisConfig, config_to_dict
from synq.config.synthesis import PIXEL_METHODS
from synq.runs.record import write_bytes_atomic, write_json_atomic
from synq.synthesis.dataset import (
    DATA_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    SyntheticSet,
    content_digest,
    damaged,
    load_set,
    read_tensors,
    set_digest,
    tensor_bytes,
)

Purpose = Literal["train", "heldout"]
CENTER_FIELDS = ("center_iterations", "center_weight", "center_depth")
GENERATOR_FIELDS = ("generator_lr", "latent_dim")
LABEL_FIELDS = ("inception_weight", "hard_sample_gamma")
NEW_FIELDS = {"method": "inversion", "swing_conv": False, **LATER_SETTINGS["synthesis"]}
"""Settings that came after the first sets were made, with the value that those sets have: so they keep their names."""


def set_identity(
    teacher_digest: str, input_size: tuple[int, int, int], config: SynthesisConfig, seed: int, purpose: Purpose
) -> dict[str, Any]:
    """Return what decides a set, as plain JSON values, and nothing else: above all nothing of quantization and fine-tuning.

    Device, number of processes and of threads are absent: they change a set by rounding at most. The input size is present: many
    classifiers take any. Settings of what a method does not have (calibration centers, a generator, pixels, assigned labels) do not
    count. Calibration centers are pixels with labels, whatever the method.
    """
    settings = config_to_dict(config) | {"swing_conv": config.swings}
    unused = {name for name, value in NEW_FIELDS.items() if settings[name] == value}
    unused |= set() if config.method in ("gdfq", "genie") else set(GENERATOR_FIELDS)
    if not config.calib_centers:
        unused |= set(CENTER_FIELDS)
        unused |= set() if config.assigns_labels else set(LABEL_FIELDS)
        unused |= {"lr"} if config.method == "gdfq" else set()
        unused |= set() if config.method in PIXEL_METHODS else {"start"}
    if config.method == "gaussian":
        unused = set(settings) - {"method", "num_images", "shard_size"}
    settings = {name: value for name, value in settings.items() if name not in unused}
    return {
        "format_version": FORMAT_VERSION,
        "teacher_digest": teacher_digest,
        "input_size": list(input_size),
        "synthesis": settings,
        "seed": seed,
        "purpose": purpose,
    }


class SetStore:
    """Folder of synthetic sets. Layout:

    KEY/                  a finished set: images.safetensors, manifest.json; never changed
    KEY.partial/          finished shards of an unfinished set
    KEY.assembling/       a set that was being put together; left behind only by a kill, then made anew
    locks/                one empty file per lock; the system frees the lock of a killed process
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    def key(
        self,
        teacher_digest: str,
        config: SynthesisConfig,
        seed: int,
        *,
        input_size: tuple[int, int, int],
        purpose: Purpose = "train",
    ) -> str:
        """Return the set's name: 32 hexadecimal digits of SHA-256 over `set_identity`."""
        identity = set_identity(teacher_digest, input_size, config, seed, purpose)
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def path(self, key: str) -> Path:
        """Return the folder of a finished set."""
        return self.root / key

    def partial(self, key: str) -> Path:
        """Return the folder of an unfinished set's shards."""
        return self.root / f"{key}.partial"

    def is_complete(self, key: str) -> bool:
        """Return whether the set is finished. A finished set appears as a whole, by rename."""
        return self.path(key).is_dir()

    def load(self, key: str) -> SyntheticSet | None:
        """Return a finished set, checked against its digests, or None.

        Raises:
            ValueError: The set is damaged, or belongs to another key.
        """
        if not self.is_complete(key):
            return None
        if not (self.path(key) / MANIFEST_FILE).exists():
            raise damaged(self.path(key), f"{MANIFEST_FILE} is missing")
        loaded = load_set(self.path(key))
        if loaded.manifest["key"] != key:
            raise damaged(self.path(key), f"it is the set {loaded.manifest['key']} under another name")
        return loaded

    def lock(self, key: str, part: str) -> FileLock:
        """Return the lock of one part of a set (a shard, or the putting together).

        Raises:
            OSError: The store cannot be written; the message names it.
        """
        folder = self.root / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        return FileLock(folder / f"{key}.{part}.lock")

    def write_part(self, path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Write one part of an unfinished set: whole or not at all, with a digest of its content.

        Raises:
            OSError: The store cannot be written or the disk is full; the message names the file.
        """
        content = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"digest": _digest(content), "info": json.dumps(dict(info))}
        write_bytes_atomic(path, to_safetensors(content, metadata))

    def read_part(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors (memory-mapped) and the info of one part.

        Raises:
            ValueError: The part is damaged; the message names it and the cure.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("digest") != _digest(tensors):
            raise damaged(path, "its content differs from its digest")
        return tensors, json.loads(metadata["info"])

    def assemble(
        self, key: str, shards: list[Path], describe: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    ) -> None:
        """Put a set together from its shards and let it appear as a whole. The caller holds the set's lock.

        Memory: one shard at a time, whatever the size of the set.

        Args:
            key: The set.
            shards: Its parts, in order.
            describe: Makes the rest of the manifest of the shards' entries (start, stop, digest, and the info of `write_part`).

        Raises:
            ValueError: A shard is damaged.
            OSError: The store cannot be written or the disk is full; the shards stay.
        """
        folder = self.root / f"{key}.assembling"
        entries: list[dict[str, Any]] = []
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            parts = [self.read_part(path) for path in shards]
            start = 0
            for tensors, info in parts:
                stop = start + tensors["labels"].numel()
                digest = content_digest(tensors["images"], tensors["labels"])
                entries.append({"start": start, "stop": stop, "digest": digest, **info})
                start = stop
            _write_stacked(folder / DATA_FILE, [tensors for tensors, _ in parts])
            digest = set_digest([entry["digest"] for entry in entries])
            full = {
                "format_version": FORMAT_VERSION,
                "key": key,
                "digest": digest,
                **describe(entries),
                "shards": entries,
            }
            write_json_atomic(folder / MANIFEST_FILE, full)
            os.replace(folder, self.path(key))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(error.errno, error.strerror, str(self.path(key))) from error
        self._remove_parts(key)

    def discard_leftovers(self, key: str) -> None:
        """Remove the shards of a finished set, which a kill right after its completion leaves behind.

        Whoever holds the set's lock removes them itself; a store that cannot be written keeps them.
        """
        if self.is_complete(key) and self.partial(key).exists():
            with suppress(OSError), self.lock(key, "set").acquire(blocking=False):  # Timeout is an OSError, too
                self._remove_parts(key)

    def _remove_parts(self, key: str) -> None:
        shutil.rmtree(self.partial(key), ignore_errors=True)
        for name in ("shard-*", "start"):
            for lock in (self.root / "locks").glob(f"{key}.{name}.lock"):
                lock.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps([name, str(tensors[name].dtype), list(tensors[name].shape)]).encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def _write_stacked(path: Path, parts: list[dict[str, Tensor]]) -> None:
    """Write images and labels of all parts, one behind the other, as one safetensors file, without joining them in memory.

    The format: length of the header (8 bytes, little endian), header in JSON, then the tensors' bytes.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, dtype in (("images", "F32"), ("labels", "I64")):
        size = sum(len(tensor_bytes(part[name])) for part in parts)
        shape = [sum(part[name].shape[0] for part in parts), *parts[0][name].shape[1:]]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the images start at a multiple of 8, as the format asks
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            for part in parts:
                file.write(tensor_bytes(part[name]))
        file.flush()
        os.fsync(file.fileno())
