"""Rows as text: CSV, Markdown and aligned columns. The same rows give the same bytes everywhere, and every cell is safe to open."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
MARKDOWN = str.maketrans(
    {"\\": "\\\\", "|": "\\|", "`": "\\`", "*": "\\*", "[": "\\[", "]": "\\]", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
)


def cell(value: Any) -> str:
    """Return a CSV cell: numbers with up to 8 significant digits, None and NaN empty, texts safe to open in a spreadsheet.

    A text that starts with = + - @ (or a tab or a line end before it) would be run as a formula there; it gets a leading apostrophe.
    """
    text = plain(value)
    return text if isinstance(value, int | float) or not text.startswith(("=", "+", "-", "@")) else f"'{text}"


def plain(value: Any) -> str:
    """Return a value as one line for a reader that runs no formulas, otherwise as `cell`.

    A character that cannot be seen, such as one that steers a terminal, becomes a question mark.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = " ".join(str(value).split())
        return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.8g}"


def csv_line(values: Iterable[Any]) -> str:
    """Return values as one line of CSV, without its line end."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow([cell(value) for value in values])
    return buffer.getvalue()


def to_csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """Return rows as CSV text with a header; the same rows give the same bytes."""
    lines = [csv_line(columns), *(csv_line(row.get(column) for column in columns) for row in rows)]
    return "\n".join(lines) + "\n"


def markdown_cell(value: Any) -> str:
    """Return a cell of a Markdown table: one line, with every character that Markdown or HTML would act on as a plain one."""
    return plain(value).translate(MARKDOWN)


def to_markdown(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """Return rows as a Markdown table."""
    lines = [[markdown_cell(column) for column in columns], ["---"] * len(columns)]
    lines += [[markdown_cell(row.get(column)) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_text(rows: Iterable[Row], columns: Sequence[str], headings: Mapping[str, str] | None = None) -> str:
    """Return rows as aligned columns for a person; fractions have 4 significant digits.

    Args:
        rows: The rows.
        columns: Keys of the rows, in order.
        headings: Shorter words for some columns.
    """
    lines = [[(headings or {}).get(column, column) for column in columns]]
    lines += [[_short(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    padded = ("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(f"{line.rstrip()}\n" for line in padded)


def _short(value: Any) -> str:
    fraction = isinstance(value, float) and math.isfinite(value) and not value.is_integer()
    return f"{value:.4g}" if fraction else plain(value)
