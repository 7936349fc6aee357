"""A progress bar for work that is long for some networks and done at once for others."""

from tqdm import tqdm

APPEARS_AFTER = 1.0
"""Seconds; what takes less shows nothing."""


def passing_bar(total: int, title: str, unit: str, *, is_shown: bool) -> tqdm:
    """Return a bar of `total` units on standard error that comes late and goes at its end.

    Args:
        total: Units of the whole work.
        title: What is being done.
        unit: What is counted.
        is_shown: Whether a terminal shows it; anything else than a terminal never does.
    """
    return tqdm(
        total=total, desc=title, unit=unit, disable=None if is_shown else True, delay=APPEARS_AFTER, leave=False
    )
