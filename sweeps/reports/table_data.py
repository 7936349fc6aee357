"""Rows of a large table as JSON, by column: what repeats is written once."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

PLAIN = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d{0,9}[1-9])?")
"""Texts of numbers that a browser prints as they are; others, such as 90.50 or 1e-05, stay texts."""


def table_data(rows: Iterable[tuple[bool, str, Sequence[tuple[str, str]]]], num_columns: int) -> str:
    """Return the rows of a table as JSON.

    The keys are "columns", each with "numeric" (whether texts that read as numbers are numbers) and its values;
    "search", the values of the extra search texts; "best", the numbers of the highlighted rows; "rows", the number of
    rows. Values are a list, or a list of different ones, "of", and the place of each row's, "at". A number has the
    digits that are shown.

    Args:
        rows: (highlighted, extra search text, cells) of each row; a cell is its text and its number as text, "" for
            none.
        num_columns: Number of cells of a row.
    """
    kept = list(rows)
    columns = []
    for column in range(num_columns):
        cells = [cells[column] for _, _, cells in kept]
        values = [_number(text) if number else text for text, number in cells]
        columns.append({"numeric": any(number for _, number in cells), **_values(values)})
    best = [place for place, (bold, _, _) in enumerate(kept) if bold]
    content = {"columns": columns, "search": _values([text for _, text, _ in kept]), "best": best, "rows": len(kept)}
    return json.dumps(content, separators=(",", ":"))


def _number(text: str) -> Any:
    if not PLAIN.fullmatch(text) or text == "-0":
        return text
    return float(text) if "." in text else int(text)


def _values(values: list[Any]) -> dict[str, Any]:
    different = list(dict.fromkeys(values))
    if 2 * len(different) > len(values):
        return {"values": values}
    place = {value: i for i, value in enumerate(different)}
    return {"of": different, "at": [place[value] for value in values] if len(different) > 1 else []}
