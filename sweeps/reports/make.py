"""From paths to the page that suits them: of one run, of one sweep, or of several side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from synq.common.files import check_paths
from synq.config.parsing import between

from ..reports import PAGE
from .comparison_page import comparison_page
from .page import Page, write_page
from .run_page import run_page
from .sweep_page import MOST_RUNS, sweep_page
from .sweep_view import is_run, read_sweep


def make_report(
    paths: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    runs: int = MOST_RUNS,
    path_overrides: Mapping[str, Any] | None = None,
    num_images: int | None = None,
) -> list[Path]:
    """Write the page of some paths.

    Args:
        paths: One run or sweep; or several, for a comparison.
        output: The page's file; None: report.html in the path's own folder, comparison.html here for several.
        runs: As for ``sweep_page``.
        places, num_images: As for ``run_page``.

    Returns:
        The page's path, then those of its drawings.

    Raises:
        FileNotFoundError, ValueError: A path is absent, holds no record, or is damaged.
        OSError: The folder or the disk refuses.
    """
    between("runs", runs, 0)
    if num_images is not None:
        between("images", num_images, 1)
    found = [Path(path) for path in paths]
    check_paths(found)
    if len({path.resolve() for path in found}) < len(found):
        raise ValueError(f"`PATH` must be different ones for a comparison, but got {' '.join(map(str, paths))}")
    target = None if output is None else Path(output)
    if target is not None and target.is_dir():
        target = target / PAGE
    if target is not None and target.suffix not in (".html", ".htm"):
        raise ValueError(f"`output` must end in .html or be a folder, but got {output}")
    page, default = _page(found, runs, path_overrides, num_images)
    return write_page(page, target or default)


def _page(
    paths: Sequence[Path], runs: int, path_overrides: Mapping[str, Any] | None, num_images: int | None
) -> tuple[Page, Path]:
    """Return the page, and where it goes by default."""
    if len(paths) > 1:
        return comparison_page([read_sweep(path) for path in paths]), Path("comparison.html")
    path = paths[0]
    if path.is_file() and path.name != "record.json":  # a sweep's record: its run lies elsewhere, or at another address
        own = path.resolve().parent
        folder = own.parent if own.name == "records" else own
        return run_page(path, path_overrides, num_images), folder / f"{path.stem}.html"
    if is_run(path):
        folder = path.parent if path.is_file() else path
        return run_page(folder, path_overrides, num_images), folder / PAGE
    return sweep_page(read_sweep(path), runs=runs, path_overrides=path_overrides, num_images=num_images), path / PAGE
