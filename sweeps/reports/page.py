"""A page as plain values, and as one HTML file that needs nothing else: no network, no other file, no script to be read or printed.

Every text of a page goes through the template's escaping, so that a name that holds HTML is shown as it is written.
"""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from synq.common.files import write_bytes_atomic, write_text_atomic
from synq.common.text_tables import Row, plain

MOST_SVG_BYTES = 300_000
"""A drawing that takes more as SVG stands in the page as PNG; the file beside the page is SVG all the same."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing.

    Attributes:
        name: Of its files, letters, digits and dashes.
        title: What it is.
        caption: What it shows, of how many (n), and how to read it.
        svg: As SVG.
        png: As PNG.
        width: In pixels on the page.
    """

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes
    width: int

    def named(self, prefix: str) -> "Figure":
        """The same under a name of its own, for a page that has several of its kind."""
        return replace(self, name=slug(f"{prefix}-{self.name}"))

    @property
    def source(self) -> str:
        """The drawing as an address of its own, for an `img` element: what stands in it can run no script."""
        kind, content = ("svg+xml", self.svg) if len(self.svg) <= MOST_SVG_BYTES else ("png", self.png)
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True, kw_only=True)
class Gap:
    """What stands in the place of a drawing or a table that could not be made."""

    title: str
    reason: str

    def named(self, prefix: str) -> "Gap":
        """Itself: it has no name."""
        return self


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose rows a reader sorts and filters.

    Attributes:
        name: Letters, digits and dashes.
        title: What it is.
        caption: What its rows and columns are.
        columns: Keys of the rows, in order.
        rows: The rows.
        headings: Headings by key; a column without one is headed by its key.
        meanings: What columns mean, by key, for a tooltip.
        decimals: Decimal places by key; elsewhere four significant digits.
        bold: Whether a row stands out.
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

    def named(self, prefix: str) -> "Table":
        """The same under a name of its own."""
        return replace(self, name=slug(f"{prefix}-{self.name}"))

    def cells(self) -> Iterator[tuple[bool, str, list[tuple[str, str]]]]:
        """Give each row as (stands out, further words that find it, cells); a cell is its text and the number that it is sorted by, "" for none."""
        for i, row in enumerate(self.rows):
            bits = f"w{row['weight_bits']}a{row['act_bits']}" if {"weight_bits", "act_bits"} <= row.keys() else ""
            cells = [_cell(row.get(column), self.decimals.get(column)) for column in self.columns]
            yield bool(self.bold and self.bold[i]), bits, cells


@dataclass(frozen=True, kw_only=True)
class Words:
    """Paragraphs, or a list."""

    title: str = ""
    lines: Sequence[str] = ()
    listed: bool = False

    def named(self, prefix: str) -> "Words":
        """Itself: it has no name."""
        return self


Block = Figure | Gap | Table | Words


@dataclass(frozen=True, kw_only=True)
class Tab:
    """A part of a page that is shown alone; all of them are, one after another, in print and without scripts."""

    title: str
    blocks: Sequence[Block]
    name: str = ""
    """Its place in the page's address; the page gives it one of its own."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page.

    Attributes:
        title: What it is about.
        verdict: Sentences that answer: did it work, can it be trusted.
        facts: Short figures with their names.
        tabs: The parts.
        foot: Where it comes from.
    """

    title: str
    verdict: Sequence[str]
    facts: Sequence[tuple[str, str]]
    tabs: Sequence[Tab]
    foot: str

    def __post_init__(self) -> None:
        """Give every tab, drawing and table a name of its own: they are places in the page and names of files."""
        taken: dict[str, int] = {}
        tabs = []
        for tab in self.tabs:
            blocks = [
                replace(block, name=_free(block.name, taken)) if isinstance(block, Figure | Table) else block
                for block in tab.blocks
            ]
            tabs.append(replace(tab, name=_free(f"tab-{slug(tab.title)}", taken), blocks=blocks))
        object.__setattr__(self, "tabs", tabs)

    def figures(self) -> Iterator[Figure]:
        """Give every drawing."""
        yield from (block for tab in self.tabs for block in tab.blocks if isinstance(block, Figure))


def slug(text: str) -> str:
    """Return a text as letters, digits and dashes, for a file's name or an address; never empty."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "part"


def _free(name: str, taken: dict[str, int]) -> str:
    """Return the name, with a number behind it where it is taken already."""
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
    assets = resources.files("synq.sweeps.reports") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(page=page, style=style, script=script)


def write_page(page: Page, path: str | Path) -> list[Path]:
    """Write a page, and its drawings as SVG and PNG in a folder beside it, each by rename.

    Returns:
        The page's path, then those of the drawings.

    Raises:
        OSError: The folder or the disk refuses.
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
