"""Store of synthetic sets: content-addressed folders, resumable unfinished sets, atomic writes."""

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

from synq.common.digests import report_unsealed, write_sealed_json
from synq.common.files import DamagedFileError, write_bytes_atomic
from synq.common.notices import print_notice
from synq.config.identity import map_spec_path, not_given
from synq.config.run import SynthesisConfig, config_to_dict
from synq.config.synthesis import ADDED_LATER, OWN_IMAGES, PIXEL_METHODS
from synq.synthesis.dataset import (
    DATA_FILE,
    FORMAT_VERSION,
    MANIFEST_FILE,
    SyntheticSet,
    content_digest,
    damage_error,
    load_set,
    read_tensors,
    set_digest,
    tensor_bytes,
)
from synq.teacher.pixel_range import PixelRange

Purpose = Literal["train", "heldout"]
CENTER_FIELDS = ("center_iterations", "center_weight", "center_depth")
GENERATOR_FIELDS = ("generator_lr", "latent_dim")
LABEL_FIELDS = ("inception_weight", "hard_sample_gamma")


def set_identity(
    teacher_digest: str,
    input_size: tuple[int, int, int],
    config: SynthesisConfig,
    seed: int,
    purpose: Purpose,
    pixel_range: PixelRange | None = None,
) -> dict[str, Any]:
    """Return everything that determines a set, as plain JSON values.

    The identity includes the input size, since many classifiers accept any, and the range of normalized pixels, since
    the same weights may be given with another mean and standard deviation. It excludes quantization and fine-tuning,
    and also the device and the numbers of processes and threads, which change a set by rounding at most. Settings that
    the method does not use (those of calibration centers, generators, pixels or assigned labels) are left out.
    Calibration centers are pixels with labels for every method.

    Args:
        teacher_digest: Digest of the teacher, see `synq.teacher.teacher.weight_digest`.
        input_size: Channels, height, width in pixels.
        config: Settings of the synthesis.
        seed: Seed of the set.
        purpose: train, or heldout for the measurement set.
        pixel_range: Range of normalized pixels; None for images without bounds.
    """
    settings = config_to_dict(config) | {"swing_conv": config.swings}
    left_out = {name for name in ADDED_LATER if not_given(settings[name])}
    unused = set() if config.method in ("gdfq", "genie") else set(GENERATOR_FIELDS)
    if not config.calib_centers:
        unused |= set(CENTER_FIELDS)
        unused |= set() if config.assigns_labels else set(LABEL_FIELDS)
        unused |= {"lr"} if config.method == "gdfq" else set()
        unused |= set() if config.method in PIXEL_METHODS else {"start"}
    if config.is_added:  # its function may use any setting
        unused = set(CENTER_FIELDS)
        settings["method"] = map_spec_path(config.method, os.path.basename)
    if config.method == "gaussian":
        unused = set(settings) - {"method", "num_images", "shard_size"}
    if config.method == OWN_IMAGES:
        unused = set(settings) - {"method", "num_images", "source"}
        settings["source"] = map_spec_path(str(config.source), os.path.basename)
    else:
        unused.add("source")
    settings = {name: value for name, value in settings.items() if name not in unused | left_out}
    return {
        "format_version": FORMAT_VERSION,
        "teacher_digest": teacher_digest,
        "input_size": list(input_size),
        "synthesis": settings,
        "seed": seed,
        "purpose": purpose,
        **({} if pixel_range is None else {"pixel_range": pixel_range.tolist()}),
    }


class SetStore:
    """Folder of synthetic sets.

    KEY/                  a finished set: images.safetensors, manifest.json; never modified
    KEY.partial/          finished shards of an unfinished set
    KEY.damaged/          a set that differed from its digest, kept until the next one
    KEY.assembling/       a set that is being assembled; if the process is killed, the next one starts over
    locks/                one empty file per lock; the system releases the locks of a killed process
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
        pixel_range: PixelRange | None = None,
    ) -> str:
        """Return the key of a set: the first 32 hexadecimal digits of the SHA-256 of its `set_identity`."""
        identity = set_identity(teacher_digest, input_size, config, seed, purpose, pixel_range)
        text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def path(self, key: str) -> Path:
        """Return the folder of a finished set."""
        return self.root / key

    def partial(self, key: str) -> Path:
        """Return the folder of the shards of an unfinished set."""
        return self.root / f"{key}.partial"

    def is_complete(self, key: str) -> bool:
        """Return whether the set is finished; its folder appears by an atomic rename."""
        return self.path(key).is_dir()

    def load(self, key: str) -> SyntheticSet | None:
        """Load a finished set and verify its digests; return None if there is none.

        Raises:
            ValueError: If the set is damaged or belongs to another key.
        """
        if not self.is_complete(key):
            return None
        if not (self.path(key) / MANIFEST_FILE).exists():
            raise damage_error(self.path(key), f"{MANIFEST_FILE} is missing")
        loaded = load_set(self.path(key))
        if loaded.manifest["key"] != key:
            raise damage_error(self.path(key), f"it is the set {loaded.manifest['key']} under another name")
        return loaded

    def set_aside(self, key: str) -> None:
        """Rename a damaged set, so that it is made again; a notice names it. An intact one stays.

        Raises:
            DamagedFileError: It is damaged, and the store cannot be written.
        """
        with self.lock(key, "set"):
            try:
                self.load(key)  # another process may have made it again
            except DamagedFileError as error:
                aside = self.root / f"{key}.damaged"
                try:
                    shutil.rmtree(aside, ignore_errors=True)
                    os.replace(self.path(key), aside)
                except OSError:
                    raise error from None
                print_notice(f"warning: {error}; it is kept as {aside} and made again")

    def lock(self, key: str, part: str) -> FileLock:
        """Return the file lock of one part of a set.

        Args:
            key: Key of the set.
            part: Name of a shard, "start" for the fit of the initial noise, or "set" for assembling the set.

        Raises:
            OSError: If the store cannot be written; the message names it.
        """
        folder = self.root / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        return FileLock(folder / f"{key}.{part}.lock")

    def write_part(self, path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Write one part of an unfinished set atomically, with a digest of its contents.

        Args:
            path: File in the folder `partial`.
            tensors: Tensors to store, by name.
            info: JSON values to store with them.

        Raises:
            OSError: If the store cannot be written or the disk is full; the message names the file.
        """
        content = {name: tensor.contiguous() for name, tensor in tensors.items()}
        text = json.dumps(dict(info))
        metadata = {"digest": _digest(content), "info": text, "whole": _digest(content, text)}
        write_bytes_atomic(path, to_safetensors(content, metadata))

    def read_part(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors (memory-mapped) and the info of one part.

        Raises:
            ValueError: If the part is damaged; the message names the file and the cure.
        """
        tensors, metadata = read_tensors(path)
        text = metadata.get("info", "")
        if "whole" not in metadata:  # of an earlier version, whose digest leaves the info out
            report_unsealed(path)
        expected = metadata.get("whole", metadata.get("digest"))
        if expected != _digest(tensors, text if "whole" in metadata else ""):
            raise damage_error(path, "its content differs from its digest")
        return tensors, json.loads(text)

    def assemble(
        self, key: str, shards: list[Path], describe: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    ) -> None:
        """Assemble a set from its shards and publish it by an atomic rename. The caller must hold the lock of the set.

        The shards are memory-mapped and written one after the other, so memory does not grow with the size of the set.

        Args:
            key: Key of the set.
            shards: Files of its shards, in order.
            describe: Returns further entries of the manifest from the shards' entries (start, stop, digest, and the
                info of `write_part`).

        Raises:
            ValueError: If a shard is damaged.
            OSError: If the store cannot be written or the disk is full; the shards are kept.
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
            write_sealed_json(folder / MANIFEST_FILE, full)
            os.replace(folder, self.path(key))
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(error.errno, error.strerror, str(self.path(key))) from error
        self._remove_parts(key)

    def remove_stale_parts(self, key: str) -> None:
        """Remove the shards of a finished set that remain if a process was killed right after it completed the set.

        Does nothing if another process holds the lock of the set, which then removes them, or if the store is
        read-only.
        """
        if self.is_complete(key) and self.partial(key).exists():
            with suppress(OSError), self.lock(key, "set").acquire(blocking=False):  # Timeout is an OSError, too
                self._remove_parts(key)

    def _remove_parts(self, key: str) -> None:
        shutil.rmtree(self.partial(key), ignore_errors=True)
        for name in ("shard-*", "start"):
            for lock in (self.root / "locks").glob(f"{key}.{name}.lock"):
                lock.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(json.dumps([name, str(tensors[name].dtype), list(tensors[name].shape)]).encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def _write_stacked(path: Path, parts: list[dict[str, Tensor]]) -> None:
    """Write the concatenated images and labels of all parts as one safetensors file, without a copy in memory.

    Format: length of the header (8 bytes, little endian), header in JSON, bytes of the tensors.
    """
    header: dict[str, Any] = {}
    offset = 0
    for name, dtype in (("images", "F32"), ("labels", "I64")):
        size = sum(len(tensor_bytes(part[name])) for part in parts)
        shape = [sum(part[name].shape[0] for part in parts), *parts[0][name].shape[1:]]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the images to 8 bytes, as the format requires
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            for part in parts:
                file.write(tensor_bytes(part[name]))
        file.flush()
        os.fsync(file.fileno())
