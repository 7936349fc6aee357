"""Content of a page as dataclasses, and its rendering as one self-contained HTML file.

A page needs no network and no other file, and can be read and printed without scripts. The template escapes every
text, so that HTML in a name is shown as text.
"""

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from synq.common.files import write_bytes_atomic, write_text_atomic
from synq.common.text_tables import Row, plain

from .table_data import table_data

MOST_SVG_BYTES = 300_000
"""A figure whose SVG is larger is embedded as PNG; the separate SVG file is written anyway."""

MOST_ROWS, PAGE_ROWS = 500, 100
"""A table of more rows is shown in parts of PAGE_ROWS, whose rows the page's script makes from data."""
MOST_PLOT_BYTES = 700_000
"""A page with such a table embeds plots of at most about this size; what is above becomes PNG of few colors."""
NUM_COLORS = 64
"""Colors of such a plot."""

MOST_NARROW_COLUMNS = 3
"""Most columns of a table that stays a table on a narrow screen."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Figure of a page.

    Attributes:
        name: Name of its files without extension: letters, digits and dashes.
        title: Heading.
        caption: Description, with the sample size n and how to read the figure.
        svg: The figure as SVG.
        png: The figure as PNG.
        width: Width on the page in pixels.
        pixels: Whether it shows images, whose colors are not adapted to a dark page.
    """

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes
    width: int
    pixels: bool = False

    def with_prefix(self, prefix: str) -> "Figure":
        """Return the figure with a prefix in its name, for a page that has several of its kind."""
        return replace(self, name=slug(f"{prefix}-{self.name}"))

    def embedded(self) -> tuple[str, bytes]:
        """Return the kind and the content of the image that a page embeds."""
        return ("svg+xml", self.svg) if len(self.svg) <= MOST_SVG_BYTES else ("png", self.png)

    def reduced(self) -> tuple[str, bytes]:
        """Return the plot as a PNG of few colors, several times smaller."""
        buffer = io.BytesIO()
        image = Image.open(io.BytesIO(self.png)).convert("RGB")
        image.quantize(NUM_COLORS, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
        return "png", buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Note in place of a figure or table that could not be made."""

    title: str
    reason: str

    def with_prefix(self, prefix: str) -> "Gap":
        """Return the block unchanged, since it has no name."""
        return self


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table that readers can sort and filter.

    Attributes:
        name: Letters, digits and dashes.
        title: Heading.
        caption: Description of its rows and columns.
        columns: Keys of the rows, in order.
        rows: The rows.
        headings: Column headings by key; the default is the key.
        meanings: Tooltips of the columns by key.
        decimals: Decimal places by key; other columns have four significant digits.
        bold: Whether each row is highlighted; empty for none.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    headings: Mapping[str, str] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    decimals: Mapping[str, int] = field(default_factory=dict)
    bold: Sequence[bool] = ()

    def with_prefix(self, prefix: str) -> "Table":
        """Return the table with a prefix in its name."""
        return replace(self, name=slug(f"{prefix}-{self.name}"))

    @property
    def stacked(self) -> bool:
        """Whether its rows become cards on a narrow screen, since its columns would not fit."""
        return len(self.columns) > MOST_NARROW_COLUMNS

    @property
    def paged(self) -> bool:
        """Whether it has so many rows that they are shown in parts."""
        return len(self.rows) > MOST_ROWS

    def data(self) -> Markup:
        """Return all rows as JSON for the page's script, without a character that could end the element."""
        return Markup(table_data(self.cells(), len(self.columns)).replace("<", "\\u003c").replace("&", "\\u0026"))

    def shown(self) -> Iterator[tuple[bool, str, list[tuple[str, str]]]]:
        """Yield the rows that the page has as markup, as `cells`: all, or of a table in parts the first part."""
        return islice(self.cells(), PAGE_ROWS if self.paged else None)

    def cells(self) -> Iterator[tuple[bool, str, list[tuple[str, str]]]]:
        """Yield (highlighted, extra search text, cells) of each row.

        A cell is its text and the number that it is sorted by, "" for none.
        """
        for i, row in enumerate(self.rows):
            bits = f"w{row['weight_bits']}a{row['act_bits']}" if {"weight_bits", "act_bits"} <= row.keys() else ""
            cells = [_cell(row.get(column), self.decimals.get(column)) for column in self.columns]
            yield bool(self.bold and self.bold[i]), bits, cells


@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs, or a bulleted list."""

    title: str = ""
    lines: Sequence[str] = ()
    listed: bool = False

    def with_prefix(self, prefix: str) -> "Text":
        """Return the block unchanged, since it has no name."""
        return self


Block = Figure | Gap | Table | Text


@dataclass(frozen=True, kw_only=True)
class Tab:
    """Part of a page, shown one at a time; in print and without scripts all are shown, one after another."""

    title: str
    blocks: Sequence[Block]
    name: str = ""
    """Fragment of the page's URL; `Page` makes it unique."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Whole page.

    Attributes:
        title: Heading.
        verdict: Sentences about the result; the first is the verdict, the others are notes.
        facts: Pairs of name and value for the head of the page.
        tabs: The parts.
        foot: Provenance: records, commit, versions, date.
        chart: Figure next to the verdict; None if there is nothing to draw.
    """

    title: str
    verdict: Sequence[str]
    facts: Sequence[tuple[str, str]]
    tabs: Sequence[Tab]
    foot: str
    chart: Figure | None = None

    def __post_init__(self) -> None:
        """Make the names of tabs, figures and tables unique, since they are URL fragments and file names."""
        taken: dict[str, int] = {} if self.chart is None else {self.chart.name: 1}
        tabs = []
        for tab in self.tabs:
            blocks = [
                replace(block, name=_unique(block.name, taken)) if isinstance(block, Figure | Table) else block
                for block in tab.blocks
            ]
            tabs.append(replace(tab, name=_unique(f"tab-{slug(tab.title)}", taken), blocks=blocks))
        object.__setattr__(self, "tabs", tabs)

    def figures(self) -> Iterator[Figure]:
        """Yield every figure."""
        if self.chart is not None:
            yield self.chart
        yield from (block for tab in self.tabs for block in tab.blocks if isinstance(block, Figure))

    def tables(self) -> Iterator[Table]:
        """Yield every table."""
        yield from (block for tab in self.tabs for block in tab.blocks if isinstance(block, Table))


def slug(text: str) -> str:
    """Return a text reduced to letters, digits and dashes, for a file name or URL; never empty."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "part"


def _unique(name: str, taken: dict[str, int]) -> str:
    """Return the name, with a number appended if it is already taken."""
    found = name
    while found in taken:
        taken[name] += 1
        found = f"{name}-{taken[name]}"
    taken[found] = 1
    return found


def render(page: Page) -> str:
    """Return a page as HTML."""
    environment = Environment(
        loader=PackageLoader("synq.sweeps.reports", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.tests["kind"] = lambda block, name: type(block).__name__ == name
    environment.filters["css_text"] = _css_text
    assets = resources.files("synq.sweeps.reports") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(page=page, style=style, script=script, sources=_sources(page))


def _sources(page: Page) -> dict[str, str]:
    """Return each figure, by name, as a data URL for an `img` element, in which scripts do not run."""
    found = {figure.name: figure.embedded() for figure in page.figures()}
    plots = [figure for figure in page.figures() if not figure.pixels]
    if any(table.paged for table in page.tables()):
        total = sum(len(found[figure.name][1]) for figure in plots)
        for figure in sorted(plots, key=lambda figure: len(found[figure.name][1]), reverse=True):
            before, after = found[figure.name], figure.reduced() if total > MOST_PLOT_BYTES else found[figure.name]
            if len(after[1]) < len(before[1]):
                found[figure.name] = after
                total -= len(before[1]) - len(after[1])
    return {
        name: f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        for name, (kind, content) in found.items()
    }


def _css_text(text: str) -> str:
    """Return a text for a CSS string; every character that may end the string or the style element is escaped."""
    return "".join(c if c.isascii() and (c.isalnum() or c == " ") else f"\\{ord(c):x} " for c in text)


def write_page(page: Page, path: str | Path) -> list[Path]:
    """Write a page, and its figures as SVG and PNG in a folder next to it, each file atomically.

    Returns:
        The path of the page, then those of the figures.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}_figures")
    written = [path]
    for figure in page.figures():
        for ending, content in (("svg", figure.svg), ("png", figure.png)):
            written.append(folder / f"{figure.name}.{ending}")
            write_bytes_atomic(written[-1], content)
    write_text_atomic(path, render(page))
    return written


def _cell(value: Any, decimals: int | None) -> tuple[str, str]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = plain(value)
    if number and text and decimals is not None:
        text = f"{value:.{decimals}f}"
    elif number and text and isinstance(value, float):
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return text, (repr(value) if number and text else "")
