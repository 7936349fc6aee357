"""Images in memory: known by a spec, memory:labels-DIGEST or memory:images-DIGEST, while a program uses them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from synq.common.error_text import one_line
from synq.config.plugins import DATASET_SOURCE, is_added, parsed, unversioned
from synq.evaluation.image_objects import ImageObjects
from synq.evaluation.labeled_sources import FORMS, ImageSource
from synq.teacher.preprocessing import Preprocessing
from synq.teacher.user_code import added_function, called

MEMORY = "memory:"
DIGITS = 12
"""Hexadecimal digits of the digest in a spec."""
_SETS: dict[str, ImageObjects] = {}


def in_memory(data: Any) -> Any:
    """Return labeled images in memory, read and checked once; a spec, a path or None unchanged.

    Args:
        data: As for `labeled_in_memory`.

    Raises:
        ValueError: As `ImageObjects`.
    """
    is_read = data is None or isinstance(data, str | Path | ImageObjects)
    return data if is_read else ImageObjects(data, "dataset", labeled=True)


@contextmanager
def labeled_in_memory(data: Any) -> Iterator[str | None]:
    """Yield the spec of labeled images, which can be opened by it inside the ``with`` block.

    Args:
        data: A spec; a folder of class folders or an npz file as a path, also as text; None; or images and labels in
            memory, as `ImageObjects` reads them.

    Raises:
        ValueError: As `ImageObjects`.
    """
    if isinstance(data, str) and _is_path(data):
        data = Path(data)
    if data is None or isinstance(data, str):
        yield data
        return
    if isinstance(data, Path):
        yield f"npz:{data}" if data.suffix == ".npz" else f"imagefolder:{data}"
        return
    with _registered(in_memory(data), "labels") as spec:
        yield spec


def _is_path(text: str) -> bool:
    """Return whether a text is a path and no spec, nor one with an error in it."""
    kind, colon, _ = text.partition(":")
    if is_own(text):
        return False
    if not text or kind == MEMORY[:-1] or kind in {form.partition(":")[0] for form in FORMS}:
        return False
    has_form = not colon and (os.sep in text or text.endswith(".npz"))
    return has_form or text.startswith(("/", "~", ".")) or os.path.exists(text)


@contextmanager
def unlabeled_in_memory(data: Any) -> Iterator[str | None]:
    """Yield the spec of unlabeled images, which can be read by it inside the ``with`` block.

    Args:
        data: A spec (folder:PATH, npz:FILE); a folder of image files or an npz file as a path; None; or images in
            memory, as `ImageObjects` reads them.

    Raises:
        ValueError: As `ImageObjects`, or a text is no spec.
    """
    if isinstance(data, str) and not data.startswith(("folder:", "npz:")):
        data = Path(data)
    if data is None or isinstance(data, str):
        yield data
    elif isinstance(data, Path):
        if not data.expanduser().exists():
            raise FileNotFoundError(f"`images` must name an existing folder or .npz file, but got {str(data)!r}")
        yield f"npz:{data}" if data.suffix == ".npz" else f"folder:{data}"
    else:
        images = data if isinstance(data, ImageObjects) else ImageObjects(data, "images", labeled=False)
        with _registered(images, "images") as spec:
            yield spec


@contextmanager
def _registered(images: ImageObjects, kind: str) -> Iterator[str]:
    spec = f"{MEMORY}{kind}-{images.digest[:DIGITS]}"
    before = _SETS.get(spec)
    _SETS[spec] = images
    try:
        yield spec
    finally:
        if before is None:
            del _SETS[spec]


def images_of(spec: str) -> ImageObjects | None:
    """Return the images of a spec that are in memory now, or None."""
    return _SETS.get(spec)


def is_in_memory(spec: str | None) -> bool:
    """Return whether a spec is of images in memory."""
    return spec is not None and spec.startswith(MEMORY)


def open_memory(spec: str, input_size: tuple[int, int, int], rule: Preprocessing) -> ImageSource:
    """Open the images of a spec that are in memory now.

    Args:
        spec: As from `labeled_in_memory`.
        input_size: (C, H, W) of the teacher.
        rule: How Pillow images of another size are resized and cropped.

    Raises:
        ValueError: They are not in memory, or their channels do not match the teacher.
    """
    images = _SETS.get(spec)
    if images is None or images.labels is None:
        raise ValueError(
            f"`evaluation.dataset` must name images that can be read, but {spec} were in the memory of a program: "
            "give them again, as `dataset`"
        )
    return _source(images, "dataset", input_size, rule)


def open_own(spec: str, input_size: tuple[int, int, int], rule: Preprocessing) -> ImageSource:
    """Open the labeled images that a function of the user returns.

    Args:
        spec: The function, as `evaluation.dataset` names it.
        input_size: (C, H, W) of the teacher.
        rule: How Pillow images of another size are resized and cropped.

    Raises:
        ValueError: There is no such function, it fails, or it returns no images with labels.
        FileNotFoundError: Its file does not exist.
    """
    name = unversioned(DATASET_SOURCE, spec)
    rule_of = "`evaluation.dataset` must return images and labels"
    data = called(added_function(DATASET_SOURCE, spec), parsed(DATASET_SOURCE, spec).text or "", rule_of, name)
    if data is None or isinstance(data, str | bytes):
        raise ValueError(f"{rule_of}, but {name} returned {type(data).__name__}")
    try:
        images = ImageObjects(data, f"evaluation.dataset {name}", labeled=True)
    except ValueError:
        raise
    except Exception as error:  # a data set of the user may raise anything while it is read
        raise ValueError(f"{rule_of}, but {name} raised {one_line(error)}") from error
    return _source(images, f"evaluation.dataset {name}", input_size, rule)


def is_own(spec: str) -> bool:
    """Return whether a spec names a function of the user."""
    return is_added(DATASET_SOURCE, spec)


def _source(images: ImageObjects, name: str, input_size: tuple[int, int, int], rule: Preprocessing) -> ImageSource:
    read_as = (next(iter(images.sizes)),) if len(images.sizes) == 1 else ()
    is_resized = images.has_pictures and read_as != (input_size[1:],)

    def read(indices: Tensor, size: tuple[int, int, int]) -> Tensor:
        return images.read(indices.tolist(), size, rule)

    def contents(indices: Tensor) -> Iterator[bytes]:
        return images.contents(indices.tolist())

    if not read_as and not images.has_pictures:
        raise ValueError(f"`{name}` must hold arrays of one size, but got {sorted(images.sizes)[:3]}")
    assert images.labels is not None
    return ImageSource(images.labels, read, contents, None if is_resized or not read_as else read_as[0])
