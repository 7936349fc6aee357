"""Drawings as SVG and PNG, by Matplotlib, without a display and without its global state."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from .page import Figure, Gap

PIXELS_PER_INCH = 100
COLORS = ("#0b6bcb", "#d1495b", "#2e8b57", "#b8860b", "#7a4fbf", "#4f5d73", "#008b8b", "#c06014")
STYLE: Any = {
    "text.parse_math": False,  # a name with two dollars in it is a name, not a formula
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e5e9ee",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLORS),
    "svg.hashsalt": "synq",  # the same drawing is the same file
    "figure.dpi": PIXELS_PER_INCH,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in our style inside the ``with`` block."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # names may hold any letter
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)  # very small axes
        yield


def draw(
    name: str, title: str, caption: str, plot: Callable[[Canvas], None], size: tuple[float, float] = (6.4, 3.6)
) -> Figure | Gap:
    """Make a drawing; one that fails becomes a gap that says so, because the rest of the page is worth having.

    Args:
        name: Of its files.
        title: What it is; stands above the drawing, not in it.
        caption: What it shows, with n.
        plot: Draws on an empty canvas; called in our style.
        size: Width and height in inches of 100 pixels.
    """
    try:
        with style():
            canvas = Canvas(figsize=size, layout="constrained")
            FigureCanvasAgg(canvas)
            plot(canvas)
            return finish(canvas, name, title, caption)
    except Exception as error:  # of Matplotlib, for figures that no axis can hold
        return failed(title, error)


def failed(title: str, error: Exception) -> Gap:
    """What stands in the place of a drawing that could not be made."""
    return Gap(title=title, reason=f"it could not be drawn ({type(error).__name__}: {' '.join(str(error).split())})")


def finish(canvas: Canvas, name: str, title: str, caption: str, *, tight: bool = False) -> Figure:
    """Turn a canvas that has been drawn on into a figure of a page; tight: cut to what is drawn, for a layout that is not ours."""
    for axes in canvas.axes:
        _plain_numbers(axes)
    files = {}
    for ending, options in (
        ("svg", {"metadata": {"Date": None, "Creator": None}}),
        ("png", {"dpi": 2 * PIXELS_PER_INCH}),
    ):
        buffer = io.BytesIO()
        canvas.savefig(buffer, format=ending, bbox_inches="tight" if tight else None, **options)  # type: ignore[arg-type]
        files[ending] = buffer.getvalue()
        canvas.set_layout_engine("none")  # what has been laid out once need not be a second time
    width = int(canvas.get_figwidth() * PIXELS_PER_INCH)
    return Figure(name=name, title=title, caption=caption, svg=files["svg"], png=files["png"], width=width)


def _plain_numbers(axes: Axes) -> None:
    """Write 0.001 where a logarithmic axis would write a power as a formula, which is not read here."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = sorted(axis.get_view_interval())
            narrow = 0 < high < 10 * low  # powers of ten alone would leave hardly a number on it
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
            if narrow:
                axis.set_major_locator(MaxNLocator(3))
                axis.set_minor_locator(NullLocator())


def panels(canvas: Canvas, number: int, columns: int = 2, **options: Any) -> list[Axes]:
    """Return ``number`` axes in a grid of at most ``columns`` columns; the others of the grid are left out."""
    columns = min(columns, number)
    rows = -(-number // columns)
    grid = canvas.subplots(rows, columns, squeeze=False, **options)
    flat: Sequence[Axes] = list(grid.flatten())
    for axes in flat[number:]:
        axes.remove()
    return list(flat[:number])
