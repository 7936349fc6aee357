"""Widths by name: `{"features.0": 8, "classifier*": 8, "*": 4}` says which tensor gets how many bits. Standard library only.

A whole name goes before a pattern, and of several patterns the one with the most plain characters decides, so the order in which they are
written does not matter: TOML tables and JSON objects have none.
"""

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from synq.config.parsing import nearest

Role = Literal["weight", "activation"]
"""What a tensor with a width is."""


class WidthPatterns:
    """Widths by name or pattern (* any characters, ? one, [ab] one of them; case counts).

    Args:
        widths: Bits by name or pattern.
        key: Name of the setting, for messages.
    """

    def __init__(self, widths: Mapping[str, int], key: str) -> None:
        self._widths, self._key = widths, key
        self._seen: set[str] = set()

    def width(self, *names: str) -> int | None:
        """Return the bits of a tensor that goes by these names, or None where nothing is said of it.

        Raises:
            ValueError: If two patterns that are equally near say different widths.
        """
        self._seen.update(names)
        for name in names:
            if name in self._widths:
                return self._widths[name]
        fitting = {pattern: _plain(pattern) for pattern in self._widths if _fits(pattern, names)}
        closest = [pattern for pattern, length in fitting.items() if length == max(fitting.values())]
        if len({self._widths[pattern] for pattern in closest}) > 1:
            raise ValueError(
                f"`{self._key}` must say one width for {names[0]!r}, but the patterns {' and '.join(map(repr, sorted(closest)))} are "
                "equally near: name it in full"
            )
        return self._widths[closest[0]] if closest else None

    def check_all_fit(self) -> None:
        """Refuse a name or pattern that fitted none of the tensors that were asked for.

        Raises:
            ValueError: With the nearest name.
        """
        for pattern in self._widths:
            if not _fits(pattern, self._seen):
                known = sorted(self._seen)
                hint = (
                    nearest(pattern, known) or f"; there are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
                )
                raise ValueError(
                    f"`{self._key}` must name what is quantized, but got {pattern!r}, which fits nothing{hint}"
                )


def layer_names(target: str) -> tuple[str, str]:
    """Return the names that a layer goes by: its module's, and the same as the graph and `synq inspect` write it."""
    return target, target.replace(".", "_")


def _fits(pattern: str, names: Collection[str]) -> bool:
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def _plain(pattern: str) -> int:
    return len(re.sub(r"[*?]", "", re.sub(r"\[[^\]]*\]", "x", pattern)))
