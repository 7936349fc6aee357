"""Unlabeled images of the user as the training set of a run, instead of synthetic ones (method own_images).

The one opt-in by which real images reach a student. They are stored like a synthetic set: normalized, fixed, with a
digest, and with the teacher's predictions as labels. Runs of them have the protocol own_images.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from synq.common.progress import Bar, visible
from synq.common.seeding import make_generator
from synq.config.run import RunConfig
from synq.config.synthesis import OWN_IMAGES
from synq.evaluation.image_objects import array_pixels
from synq.evaluation.labeled import fit_images, resizing_rule
from synq.evaluation.labeled_arrays import read_npz
from synq.evaluation.labeled_images import check_image, read_image
from synq.evaluation.labeled_memory import images_of
from synq.evaluation.labeled_sources import image_files
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.run_sets import set_names, set_store
from synq.synthesis.store import set_identity
from synq.teacher.preprocessing import Preprocessing, default_rule
from synq.teacher.teacher import Teacher

CHUNK = 256
"""Images that are read, classified and written together."""


@dataclass(frozen=True, slots=True)
class OwnSource:
    """Unlabeled images.

    Attributes:
        count: Number of images.
        read: Indices -> images (n, C, H, W) uint8; of different sizes, at that of the teacher.
        contents: Yields the content of every image as bytes, for a digest.
        size: Height and width of arrays, which are resized whole; None where images are read at the teacher's size.
    """

    count: int
    read: Callable[[list[int]], Tensor]
    contents: Callable[[], Iterator[bytes]]
    size: tuple[int, int] | None = None

    def digest(self) -> str:
        """Return the SHA-256 of all images, 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for content in self.contents():
            digest.update(len(content).to_bytes(8, "big") + content)
        return digest.hexdigest()


def ensure_own_images(config: RunConfig, teacher: Teacher, accelerator: Accelerator) -> None:
    """Store the images of a run of method own_images under the key of its training set, unless they are there.

    If there are more than `synthesis.num_images`, a fixed random choice by `data_seed`.

    Args:
        config: The run; another method does nothing.
        teacher: Its teacher, which labels the images.
        accelerator: Process group, whose main process does the work.

    Raises:
        ValueError: The images cannot be read, are fewer than `synthesis.num_images`, or have changed since they were
            stored.
        OSError: A file cannot be read, or the store not be written.
    """
    settings = config.synthesis
    if settings.method != OWN_IMAGES:
        return
    source, text = _source_and_rule(config, teacher)
    if source.count < settings.num_images:
        raise ValueError(
            f"`synthesis.num_images` must be at most {source.count}, the number of images of {settings.source}, but "
            f"got {settings.num_images}"
        )
    store, pixels, content = set_store(config), teacher.pixel_range(), _content(source, text)
    identity = set_identity(teacher.digest, teacher.input_size, settings, config.data_seed, "train", pixels)
    key = set_names(config, teacher)[0]
    with store.lock(key, "set"):
        if (found := store.load(key)) is not None:
            _check_content(found, content, str(settings.source))
            return
        started = time.perf_counter()
        order = torch.randperm(source.count, generator=make_generator("own_images", config.data_seed))
        chosen = order[: settings.num_images].sort().values.tolist()
        parts = [chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)]
        files = [store.partial(key) / f"shard-{number:05d}.safetensors" for number in range(len(parts))]
        is_shown = config.runtime.progress and accelerator.is_local_main_process
        with Bar(total=len(chosen), desc="own images", unit="image", **visible(is_shown, leave=None)) as bar:
            for file, part in zip(files, parts, strict=True):
                images = normalized(source.read(part), teacher)
                labels = torch.cat([predicted(teacher, piece) for piece in images.split(64)])
                store.write_part(file, {"images": images, "labels": labels}, {})
                bar.update(len(part))
        about = {
            **identity,
            "teacher_name": teacher.name,
            "num_images": len(chosen),
            "num_classes": teacher.num_classes,
            "agreement": 1.0,  # the labels are the teacher's own predictions
            "content": content,
            "seconds": round(time.perf_counter() - started, 3),
        }
        store.assemble(key, files, lambda _: about)


def check_own_images(config: RunConfig, teacher: Teacher) -> None:
    """Check that the images of a run of method own_images are those of its stored set, if there is one.

    The digest of a run has only the name of their folder or file, so that it may move.

    Args:
        config: The run; another method does nothing.
        teacher: Its teacher.

    Raises:
        ValueError: As `ensure_own_images`.
        OSError: A file cannot be read.
    """
    if config.synthesis.method != OWN_IMAGES:
        return
    found = set_store(config).load(set_names(config, teacher)[0])
    if found is not None:
        _check_content(found, _content(*_source_and_rule(config, teacher)), str(config.synthesis.source))


def _source_and_rule(config: RunConfig, teacher: Teacher) -> tuple[OwnSource, str]:
    """Return the images of a run, and as a text how they are brought to the size of its teacher."""
    spec = str(config.synthesis.source)
    rule = teacher.preprocessing or default_rule(teacher.input_size)
    source = open_own_images(spec, teacher.input_size, rule)
    return source, rule.describe() if source.size is None else resizing_rule(spec, source.size, teacher.input_size)


def _content(source: OwnSource, rule: str) -> str:
    """Return the digest of images and of how they are resized, 64 hexadecimal digits."""
    return hashlib.sha256(f"{rule}\n{source.digest()}".encode()).hexdigest()


def _check_content(found: SyntheticSet, content: str, spec: str) -> None:
    if found.manifest.get("content") != content:
        raise ValueError(
            f"`synthesis.source` must have the images of the set {found.path}, but {spec} has changed since, is "
            "another source of the same name, or is resized by another rule: rename it, or choose another output_dir"
        )


def open_own_images(spec: str, input_size: tuple[int, int, int], rule: Preprocessing) -> OwnSource:
    """Open unlabeled images.

    Args:
        spec: folder:PATH, npz:FILE, or that of images in memory.
        input_size: (C, H, W) of the teacher.
        rule: How image files of other sizes are resized and cropped.

    Raises:
        ValueError: The spec is unknown, or an image is damaged or of a kind that is not read.
        FileNotFoundError: There is no such file or folder.
    """
    kind, _, path = spec.partition(":")
    if (images := images_of(spec)) is not None:
        return OwnSource(
            len(images),
            lambda part: images.read(part, input_size, rule),
            lambda: images.contents(range(len(images))),
            next(iter(images.sizes)) if len(images.sizes) == 1 and not images.has_pictures else None,
        )
    if kind == "memory":
        raise ValueError(
            f"`synthesis.source` must name images that can be read, but {spec} were in the memory of a program: give "
            "them again, as `images`"
        )
    if kind not in ("folder", "npz") or not path:
        raise ValueError(f"`synthesis.source` must read folder:PATH or npz:FILE, but got {spec!r}")
    if not Path(path).exists():
        raise FileNotFoundError(f"`synthesis.source` must name an existing path, but got {spec!r}")
    return _folder(Path(path), input_size, rule) if kind == "folder" else _npz(Path(path))


def num_own_images(spec: str) -> int:
    """Return the number of unlabeled images of a spec.

    Args:
        spec: As for `open_own_images`.

    Raises:
        ValueError: As `open_own_images`.
        FileNotFoundError: As `open_own_images`.
    """
    return open_own_images(spec, (3, 1, 1), default_rule((3, 1, 1))).count


def normalized(pixels: Tensor, teacher: Teacher) -> Tensor:
    """Return images (N, C, H, W) uint8 as the teacher's input: float32, at its size, normalized."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (teacher.mean, teacher.std))
    return (fit_images(pixels, teacher.input_size) - mean) / std


@torch.no_grad()
def predicted(teacher: Teacher, images: Tensor) -> Tensor:
    """Return the classes (N,) int64 that a teacher on the CPU predicts for images (N, C, H, W)."""
    return teacher.graph(images).argmax(1)


def _folder(root: Path, input_size: tuple[int, int, int], rule: Preprocessing) -> OwnSource:
    if not root.is_dir():
        raise NotADirectoryError(f"`synthesis.source` must name a folder after folder:, but got the file {root}")
    files, channels = image_files(root, root), input_size[0]
    if not files:
        raise ValueError(f"`synthesis.source` must have images, but the folder {root} has none")
    if channels not in (1, 3):
        raise ValueError(f"`synthesis.source` must be arrays for a teacher of {channels} channels, but got a folder")

    def contents() -> Iterator[bytes]:
        for file in files:
            data = file.read_bytes()
            check_image(file, data, channels, whole=False)
            yield data

    return OwnSource(
        len(files), lambda part: torch.stack([read_image(files[i], input_size, rule) for i in part]), contents
    )


def _npz(path: Path) -> OwnSource:
    (values,) = read_npz(path, ("x",))
    if values.ndim not in (3, 4) or len(values) == 0:
        raise ValueError(
            f"array `x` of {path} must be (N, H, W) or (N, H, W, C) with at least one image, but is {values.shape}"
        )
    images = torch.stack([array_pixels(image, f"synthesis.source {path}") for image in values])
    size = (int(images.shape[2]), int(images.shape[3]))
    return OwnSource(len(images), lambda part: images[part], lambda: iter([images.numpy().tobytes()]), size)
