"""Entry point of the reports: the page of one run, of one sweep, or a comparison of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synq.common.files import check_paths
from synq.config.parsing import between

from ..reports import PAGE
from .comparison_page import comparison_page
from .page import Page, write_page
from .run_page import run_page
from .sweep_page import MOST_RUNS, sweep_page
from .sweep_view import is_run, read_sweep
from .tool_points import ToolPoint, read_tools

if TYPE_CHECKING:
    from synq.teacher.teacher import Teacher


def make_report(
    paths: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    runs: int = MOST_RUNS,
    path_overrides: Mapping[str, Any] | None = None,
    num_images: int | None = None,
    teacher: "Teacher | None" = None,
    tools: Sequence[str | Path] = (),
) -> list[Path]:
    """Write the report of a run or a sweep, or a comparison of several.

    Args:
        paths: One run or sweep, or several for a comparison.
        output: HTML file or folder of the page; None means report.html in the folder of the run or sweep, and
            comparison.html in the current folder for several paths.
        runs: As for ``sweep_page``.
        path_overrides, num_images: As for ``run_page``.
        teacher: As for ``run_page``, for the page of one run.
        tools: Results of other quantization tools, for the page of one sweep, see ``read_tools``.

    Returns:
        The path of the page, then those of its figures.

    Raises:
        FileNotFoundError, ValueError: A path does not exist, has no record, or is damaged.
        OSError: The folder cannot be written.
    """
    between("runs", runs, 0)
    if num_images is not None:
        between("images", num_images, 1)
    found = [Path(path) for path in paths]
    check_paths(found)
    if len({path.resolve() for path in found}) < len(found):
        raise ValueError(
            f"`PATH` must be different folders or files for a comparison, but got {' '.join(map(str, paths))}"
        )
    target = None if output is None else Path(output)
    if target is not None and target.is_dir():
        target = target / PAGE
    if target is not None and target.suffix not in (".html", ".htm"):
        raise ValueError(f"`output` must end in .html or be a folder, but got {output}")
    check_paths(tools, "tools")
    page, default = _page(found, runs, path_overrides, num_images, teacher, read_tools(tools))
    return write_page(page, target or default)


def _page(
    paths: Sequence[Path],
    runs: int,
    path_overrides: Mapping[str, Any] | None,
    num_images: int | None,
    teacher: "Teacher | None",
    tools: Sequence[ToolPoint],
) -> tuple[Page, Path]:
    """Return the page and its default path."""
    if tools and (len(paths) > 1 or is_run(paths[0]) or paths[0].is_file()):
        raise ValueError("`tools` must come with the folder of one sweep, whose page has the figure of latencies")
    if len(paths) > 1:
        return comparison_page([read_sweep(path) for path in paths]), Path("comparison.html")
    path = paths[0]
    if path.is_file() and path.name != "record.json":  # the record of a trial: its run is in another folder
        parent = path.resolve().parent
        folder = parent.parent if parent.name == "records" else parent
        return run_page(path, path_overrides, num_images, teacher), folder / f"{path.stem}.html"
    if is_run(path):
        folder = path.parent if path.is_file() else path
        return run_page(folder, path_overrides, num_images, teacher), folder / PAGE
    page = sweep_page(read_sweep(path), runs=runs, path_overrides=path_overrides, num_images=num_images, tools=tools)
    return page, path / PAGE
