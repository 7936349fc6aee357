"""The folder of an export: its files are published as a whole or not at all, and nothing foreign is overwritten."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from synq.export.card import is_card

MANAGED = (
    *("model.onnx", "model_int4.onnx", "model_int8.onnx", "model_matmul.onnx", "model.safetensors", "model.pt2"),
    *("model.tflite", "model.pte"),
    *("README.md", "card.json"),
)
"""Names of the files that an export may write; files of an earlier export are removed."""
DRAFT = ".draft"
"""Subfolder of the export in which its files are written before they are published."""


def check_out_folder(target: Path) -> None:
    """Raise if an export to ``target`` would overwrite files that are not from an earlier export.

    Raises:
        ValueError: If it is a file, or a folder that has a file of a managed name but is not an export.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"`out` must be a folder, but {target} is a file")
    foreign = [name for name in MANAGED if (target / name).exists()]
    interrupted = (target / DRAFT).exists()  # killed while publishing its files
    if foreign and not interrupted and not is_card(target / "card.json"):
        raise ValueError(
            f"`out` must be a new folder or an earlier export, but {target} has {foreign[0]} and no card.json "
            "of an export"
        )


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """Yield a temporary folder in ``target`` to write to: an export is published as a whole or not at all."""
    draft = target / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):  # raised if the export succeeded: the folder is not empty
            target.rmdir()


def publish(draft: Path, target: Path) -> None:
    """Replace the files of an earlier export by those in ``draft``; other files of the folder stay."""
    for name in MANAGED:
        (target / name).unlink(missing_ok=True)
    for path in sorted(draft.iterdir()):
        path.replace(target / path.name)
