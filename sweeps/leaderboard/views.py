"""Filters of a leaderboard and comparisons of sweeps. Rows that are not comparable are never ranked together."""

import hashlib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from synq.common.text_tables import Row, cell, plain
from synq.config.nearest import key_hint, nearest
from synq.config.quant import protocol_label

from .columns import COMPARE_COLUMNS, LEADERBOARD_COLUMNS, SETTINGS, TEXT_COLUMNS
from .ranking import Ranking, Standing
from .settings import KEYS, PREFIX, setting_cells_of, setting_column, varying

OPERATORS: dict[str, Callable[[int, int], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on a row, such as `weight_bits<=4`."""

    column: str
    """Column of leaderboard.csv, or any setting as `params.KEY`."""
    sign: str
    """One of = != < <= > >=."""
    text: str
    """Value that the cell is compared with."""
    number: float | None
    """The value as a number; None if texts are compared."""

    def holds(self, standing: Standing) -> bool:
        """Return whether a row satisfies it.

        Numbers are equal if their texts are; an empty cell is unequal to any number. Texts of settings are compared
        without regard to case: `true` is True.
        """
        value = standing.cell(self.column)
        if self.number is None:
            same = self.text in (cell(value), plain(value))
            if self.column.startswith(PREFIX):
                same = self.text.casefold() == plain(value).casefold()
            return OPERATORS[self.sign](0 if same else 1, 0)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return self.sign == "!="
        same = cell(value) == cell(self.number)
        return OPERATORS[self.sign](0 if same else 1 if value > self.number else -1, 0)


def parse_condition(text: str) -> Condition:
    """Parse a condition such as "weight_bits=4", "top1_mean>=90" or "finetune.momentum=0.9".

    Raises:
        ValueError: It has another form, an unknown column, or a value of another type than the column.
    """
    match = re.fullmatch(r"\s*([\w.-]+)\s*(<=|>=|!=|=|<|>)(.*)", text, flags=re.DOTALL)
    if match is None:
        raise ValueError(f"`where` must read COLUMN, one of = != < <= > >=, VALUE, but got {text!r}")
    column, sign, value = check_column("where", match[1].replace("-", "_")), match[2], " ".join(match[3].split())
    texts = SETTINGS[column].texts if column in SETTINGS else ()
    is_text = column in TEXT_COLUMNS
    if column.startswith(PREFIX):
        setting = setting_column(column.removeprefix(PREFIX))
        is_text, texts = setting.is_text, (*setting.texts, "none")
    if is_text or value in ("", *texts):
        if sign not in ("=", "!="):
            raise ValueError(f"`where` must compare the texts of {column} by = or !=, but got {text!r}")
        return Condition(column, sign, value, None)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`where` must compare {column} with a number (nothing: an empty cell), but got {text!r}")
    return Condition(column, sign, value, number)


def check_column(name: str, column: str) -> str:
    """Return the key of a column of leaderboard.csv, or of a setting: `params.KEY`, also if given as `KEY`.

    Args:
        name: Option by which the column was given, for the message.
        column: The column.

    Raises:
        ValueError: There is no such column; the message names the most similar one.
    """
    if column in LEADERBOARD_COLUMNS:
        return column
    key = column.removeprefix(PREFIX)
    if key not in KEYS:
        hint = key_hint(key, [*LEADERBOARD_COLUMNS, *KEYS])
        raise ValueError(f"`{name}` must name columns of leaderboard.csv or settings, but got {column!r}{hint}")
    return f"{PREFIX}{key}"


def ordered(rows: Sequence[Standing], column: str, *, descending: bool = False) -> list[Standing]:
    """Return rows in the order of a column: numbers, then texts, then empty cells; equal ones in their order.

    Args:
        rows: The rows.
        column: As `check_column` returns it.
        descending: Whether the largest number, or the last text, comes first.
    """
    cells = [(standing.cell(column), standing) for standing in rows]
    full = [pair for pair in cells if pair[0] not in (None, "")]
    full.sort(key=lambda pair: (isinstance(pair[0], str), pair[0]), reverse=descending)
    return [standing for _, standing in [*full, *(pair for pair in cells if pair[0] in (None, ""))]]


def choose(rows: Iterable[Standing], conditions: Sequence[Condition]) -> list[Standing]:
    """Return the rows that satisfy all conditions, in their order and with their ranks among all rows."""
    return [standing for standing in rows if all(condition.holds(standing) for condition in conditions)]


def check_chosen(chosen: Sequence[Standing], rows: Sequence[Standing], conditions: Sequence[Condition]) -> None:
    """Check that some row satisfies the conditions.

    Args:
        chosen: The rows that satisfy them.
        rows: All rows.
        conditions: The conditions.

    Raises:
        ValueError: There is none; for an unknown text the message names the most similar one of the rows.
    """
    if chosen or not conditions:
        return
    bad = next((condition for condition in conditions if not choose(rows, [condition])), None)
    if bad is None:
        raise ValueError(
            f"`where` must leave a row, but got conditions of which none of {len(rows)} rows satisfies all"
        )
    texts = {plain(standing.cell(bad.column)) for standing in rows} if bad.number is None else ()
    raise ValueError(
        f"`where` must leave a row, but got {bad.column}{bad.sign}{bad.text}, which holds for none of {len(rows)}"
        f"{nearest(bad.text, sorted(texts))}"
    )


def single_ranking(rows: Sequence[Standing]) -> list[Row]:
    """Return rows with new ranks from 1 on.

    Raises:
        ValueError: They belong to several rankings; the message names the differences.
    """
    rankings = dict.fromkeys(standing.ranking for standing in rows)
    if len(rankings) > 1:
        raise ValueError(
            f"`single_ranking` must be given rows that can be compared, but got {differences(rankings)}; "
            "narrow them by --where"
        )
    return [{**rows[i].row, "rank": i + 1, "best": int(i == 0 and not rows[i].is_violating)} for i in range(len(rows))]


def differences(rankings: Iterable[Ranking]) -> str:
    """Return the differences of rankings as text, for example "protocol A and B, weight_bits 3 and 4"."""
    parts = []
    for name, values in zip(Ranking._fields, zip(*rankings, strict=True), strict=True):
        texts = sorted({plain(value)[:16] or "none" for value in values})
        if len(set(values)) > 1:
            parts.append(
                f"{name} {' and '.join(texts[:4])}" + (f" and {len(texts) - 4} more" if len(texts) > 4 else "")
            )
    return ", ".join(parts)


def compare(tables: Mapping[str, Sequence[Standing]]) -> list[Row]:
    """Return the best row of each path in each ranking, grouped by ranking.

    Differences are to the first path; their standard error is sqrt(s1^2 / n1 + s2^2 / n2) with the sample standard
    deviations s over n runs, empty if an n is 1. The runs of two paths count as independent.

    Each line also has `params.KEY` for every setting that varies between the lines.

    Args:
        tables: Rows in the order of their ranks, by path.
    """
    best: dict[Ranking, dict[str, Standing]] = {}
    for path, rows in tables.items():
        for standing in rows:
            if not standing.is_violating:
                best.setdefault(standing.ranking, {}).setdefault(path, standing)
    first = next(iter(tables))
    keys = varying(standing.settings for found in best.values() for standing in found.values())
    lines = []
    for ranking in sorted(best, key=Ranking.order):
        digest = hashlib.sha256("\n".join(ranking.measure()).encode("utf-8", "replace")).hexdigest()[:8]
        reference = best[ranking].get(first)
        for path, standing in best[ranking].items():
            line = {column: standing.row.get(column) for column in COMPARE_COLUMNS} | {"path": path, "measure": digest}
            line |= setting_cells_of(standing.settings, keys)
            if reference is not None and path != first:
                line |= _difference("objective", "objective_value", standing, reference)
                line |= _difference("top1", "top1_mean", standing, reference)
            lines.append(line)
    return lines


def _difference(name: str, column: str, one: Standing, other: Standing) -> Row:
    values = (one.row[column], other.row[column])
    spreads = [standing.objective_std if name == "objective" else standing.row["top1_std"] for standing in (one, other)]
    sizes = (one.row["num_seeds"], other.row["num_seeds"])
    known = None not in values
    errors = [spread**2 / size for spread, size in zip(spreads, sizes, strict=True) if spread is not None]
    return {
        f"{name}_diff": values[0] - values[1] if known else None,
        f"{name}_stderr": math.sqrt(sum(errors)) if known and len(errors) == 2 else None,
    }


def shown(lines: Iterable[Row]) -> list[Row]:
    """Return the lines of a comparison as texts of COMPARE_SHOWN: means ± their standard deviation or error."""
    return [
        {
            **line,
            "protocol": protocol_of(line),
            "objective": " ".join(text for text in (line["objective"], line["fidelity_measure"]) if text),
            "objective_value": _spread(line["objective_value"], None, ".4g"),
            "objective_diff": _spread(line["objective_diff"], line["objective_stderr"], "+.4g"),
            "top1_mean": _spread(line["top1_mean"], line["top1_std"], ".2f"),
            "drop": _spread(line["drop"], None, ".2f"),
            "top1_diff": _spread(line["top1_diff"], line["top1_stderr"], "+.2f"),
        }
        for line in lines
    ]


def protocol_of(line: Row) -> str:
    """Return the protocol of a row of a leaderboard or comparison with its bit-widths, for example "B (8/8)"."""
    return protocol_label(line["protocol"], line["first_bits"], line["last_bits"], line["layer_bits"] or "")


def _spread(mean: float | None, spread: float | None, form: str) -> str:
    if mean is None:
        return ""
    return format(mean, form) + ("" if spread is None else f" ± {format(spread, form.lstrip('+'))}")
