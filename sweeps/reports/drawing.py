"""Figures as SVG and PNG by Matplotlib, without a display and without pyplot's global state."""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from synq.common.text_tables import plural

from .page import Figure, Gap

T = TypeVar("T")
PIXELS_PER_INCH = 100
WIDTH = 4.8
"""Width of a figure in inches: legible in half of a wide page and, scaled to three quarters, on a phone."""
MOST_POINTS = 400
"""Most dots, lines or bars of one kind in a plot; of more, some are drawn: a page of thousands must stay light."""
LEAST_TRIALS = 9
"""Fewest completed trials for a figure or a number that relates settings, objective and accuracy."""
COLORS = ("#0b6bcb", "#d1495b", "#2e8b57", "#b8860b", "#7a4fbf", "#4f5d73", "#008b8b", "#c06014")
STYLE: Any = {
    "text.parse_math": False,  # a name may contain two dollar signs
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e5e9ee",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLORS),
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "synq",  # makes files reproducible
    "figure.dpi": PIXELS_PER_INCH,
}


@contextmanager
def style() -> Iterator[None]:
    """Set the style of our figures inside the ``with`` block."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # names may contain any character
        warnings.filterwarnings("ignore", "constrained_layout not applied", UserWarning)  # very small axes
        yield


def draw(
    name: str,
    title: str,
    caption: str,
    plot: Callable[[Canvas], None],
    size: tuple[float, float] = (WIDTH, 3.3),
    *,
    pixels: bool = False,
) -> Figure | Gap:
    """Return a figure, or a gap with the error if it cannot be drawn, so that the rest of the page is still made.

    Args:
        name: Name of its files, without extension.
        title: Heading above the figure.
        caption: Description of the figure, with the sample size n.
        plot: Draws on an empty Matplotlib figure.
        size: Width and height in inches of 100 pixels.
        pixels: As for ``Figure``.
    """
    try:
        with style():
            canvas = Canvas(figsize=size, layout="constrained")
            FigureCanvasAgg(canvas)
            plot(canvas)
            return finish(canvas, name, title, caption, pixels=pixels)
    except Exception as error:  # raised by Matplotlib for values that no axis can show
        text = " ".join(str(error).split())
        return Gap(title=title, reason=f"it could not be drawn ({type(error).__name__}: {text})")


def thinned(items: Sequence[T], *keys: Sequence[float], most: int = MOST_POINTS) -> list[T]:
    """Return all items, or of many a part, drawn at random with a fixed seed, in the same order.

    Args:
        items: What would be drawn.
        keys: Numbers of the items; those with the lowest and the highest number are always kept.
        most: Most items that are all kept.
    """
    if len(items) <= most:
        return list(items)
    extremes = {int(find(np.asarray(key, dtype=float))) for key in keys for find in (np.argmin, np.argmax)}
    order = [i for i in np.random.default_rng(0).permutation(len(items)).tolist() if i not in extremes]
    return [items[i] for i in sorted([*extremes, *order[: most - len(extremes)]])]


def thinned_note(drawn: int, number: int) -> str:
    """Return a note for a caption that only some of the items are drawn, "" if all are."""
    return "" if drawn == number else f", of which {drawn} are drawn, at random"


def too_few(number: int) -> str:
    """Return the reason for a gap in place of a figure of fewer than LEAST_TRIALS trials."""
    return f"too few to judge: {plural(number, 'completed trial')}, and {LEAST_TRIALS} are needed"


def finish(canvas: Canvas, name: str, title: str, caption: str, *, pixels: bool = False) -> Figure:
    """Save a Matplotlib figure as a figure of a page.

    Args:
        canvas: The Matplotlib figure.
        name, title, caption, pixels: As for ``draw``.
    """
    for axes in canvas.axes:
        _plain_numbers(axes)
    # Laid out once and drawn once for each file: `savefig` draws twice, the first time for the layout only.
    layout = canvas.get_layout_engine()
    if layout is not None:
        layout.execute(canvas)
        canvas.set_layout_engine("none")
    svg, png = io.BytesIO(), io.BytesIO()
    FigureCanvasSVG(canvas).print_svg(svg, metadata={"Date": None, "Creator": None})
    canvas.set_dpi(2 * PIXELS_PER_INCH)
    raster = FigureCanvasAgg(canvas)
    raster.print_png(png)
    vars(raster).pop("renderer", None)  # several MB of pixels, which a cycle of references would keep for a while
    width = int(canvas.get_figwidth() * PIXELS_PER_INCH)
    return Figure(
        name=name, title=title, caption=caption, svg=svg.getvalue(), png=png.getvalue(), width=width, pixels=pixels
    )


def _plain_numbers(axes: Axes) -> None:
    """Label logarithmic axes with plain numbers such as 0.001, since formulas are not parsed."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = sorted(axis.get_view_interval())
            narrow = 0 < high < 10 * low  # with powers of ten only, the axis would have almost no tick labels
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
            if narrow:
                axis.set_major_locator(MaxNLocator(3))
                axis.set_minor_locator(NullLocator())


def cap_percent(axes: Axes, axis: Literal["x", "y"]) -> None:
    """End an axis of percent a little after 100, where Matplotlib would go on to values that do not exist."""
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    if low < 100 < high:
        cap = min(high, 100 + 0.04 * (100 - low))
        axes.set(**{f"{axis}lim": (low, cap)})


def panels(canvas: Canvas, number: int, columns: int = 2, **options: Any) -> list[Axes]:
    """Return ``number`` axes in a grid of at most ``columns`` columns; unused cells of the grid are removed."""
    columns = min(columns, number)
    rows = -(-number // columns)
    grid = canvas.subplots(rows, columns, squeeze=False, **options)
    flat: Sequence[Axes] = list(grid.flatten())
    for axes in flat[number:]:
        axes.remove()
    return list(flat[:number])
