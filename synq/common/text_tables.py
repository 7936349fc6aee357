"""Tables as text: CSV, Markdown and aligned columns. The output is deterministic, and untrusted cells are escaped."""

import csv
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
MARKDOWN = str.maketrans(
    {"\\": "\\\\", "|": "\\|", "`": "\\`", "*": "\\*", "[": "\\[", "]": "\\]", "&": "&amp;", "<": "&lt;", ">": "&gt;"}
)


def cell(value: Any) -> str:
    """Format a value as a CSV cell that is safe to open in a spreadsheet.

    Numbers have up to 8 significant digits; None, NaN and infinity are empty. A spreadsheet would run a text that
    starts with = + - @ (after optional whitespace) as a formula, so such a text gets a leading apostrophe.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return _text_cell(value)
    text = plain(value)
    return text if isinstance(value, int | float) or not text.startswith(("=", "+", "-", "@")) else f"'{text}"


@functools.lru_cache(maxsize=4096)  # many rows have the same texts
def _text_cell(value: str) -> str:
    text = plain(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def plain(value: Any) -> str:
    """Format a value as one line of text, as `cell` does but without escaping formulas.

    Non-printable characters, such as terminal control codes, become question marks.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = " ".join(str(value).split())
        return text if text.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in text)
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.8g}"


def plural(number: float, noun: str) -> str:
    """Return a number with its noun: "1 trial", "2 trials"."""
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration as readable text: 45 s, 12 min, 3.2 h; a negative one, which only rounding gives, is 0 s."""
    if seconds < 100:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def enumeration(parts: Sequence[str]) -> str:
    """Join texts as in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def csv_line(values: Iterable[Any]) -> str:
    """Format values as one line of CSV, without the newline."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="").writerow([cell(value) for value in values])
    return buffer.getvalue()


def to_csv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """Format rows as CSV text with a header line of `columns`; a missing key gives an empty cell."""
    lines = [csv_line(columns), *(csv_line(row.get(column) for column in columns) for row in rows)]
    return "\n".join(lines) + "\n"


def markdown_cell(value: Any) -> str:
    """Format a value as a cell of a Markdown table: one line, special characters of Markdown and HTML escaped."""
    return plain(value).translate(MARKDOWN)


def to_markdown(rows: Iterable[Row], columns: Sequence[str], headings: Mapping[str, str] | None = None) -> str:
    """Format rows as a Markdown table; a missing key gives an empty cell.

    Args:
        rows: The rows.
        columns: Keys of the rows, in order.
        headings: Headings by key; a column without one is headed by its key.
    """
    lines = [[markdown_cell((headings or {}).get(column, column)) for column in columns], ["---"] * len(columns)]
    lines += [[markdown_cell(row.get(column)) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def to_text(rows: Iterable[Row], columns: Sequence[str], headings: Mapping[str, str] | None = None) -> str:
    """Format rows as right-aligned columns for a terminal; fractions have 4 significant digits.

    Args:
        rows: Mappings from column to value.
        columns: Columns to print, in order.
        headings: Shorter headings for some columns.
    """
    lines = [[(headings or {}).get(column, column) for column in columns]]
    lines += [[_short(row.get(column)) for column in columns] for row in rows]
    lengths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    padded = ("  ".join(text.rjust(length) for text, length in zip(line, lengths, strict=True)) for line in lines)
    return "".join(f"{line.rstrip()}\n" for line in padded)


def _short(value: Any) -> str:
    fraction = isinstance(value, float) and math.isfinite(value) and not value.is_integer()
    return f"{value:.4g}" if fraction else plain(value)
