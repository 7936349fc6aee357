"""Bit-widths by tensor name or pattern, as `{"features.0": 8, "classifier*": 8, "*": 4}`. Standard library only.

An exact name takes precedence over a pattern, and among several matching patterns the one with the most literal
characters. The order of the entries does not matter, because TOML tables and JSON objects have none.
"""

import re
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from synq.config.nearest import nearest

Role = Literal["weight", "activation"]
"""Kind of a tensor with a bit-width."""


class BitPatterns:
    """Look up bit-widths by name or pattern (* any characters, ? one, [ab] one of them; case-sensitive).

    Args:
        bits: Bit-width by name or pattern.
        key: Name of the setting, for error messages.
    """

    def __init__(self, bits: Mapping[str, int], key: str) -> None:
        self._bits, self._key = bits, key
        self._queried: set[str] = set()

    def width(self, *names: str) -> int | None:
        """Return the bit-width of the tensor with these names, or None if no entry matches.

        Raises:
            ValueError: If two equally specific patterns have different bit-widths.
        """
        self._queried.update(names)
        for name in names:
            if name in self._bits:
                return self._bits[name]
        matching = {pattern: _literal_length(pattern) for pattern in self._bits if _matches(pattern, names)}
        best = [pattern for pattern, length in matching.items() if length == max(matching.values())]
        if len({self._bits[pattern] for pattern in best}) > 1:
            raise ValueError(
                f"`{self._key}` must give one bit-width for {names[0]!r}, but the patterns "
                f"{' and '.join(map(repr, sorted(best)))} are equally specific: use the full name"
            )
        return self._bits[best[0]] if best else None

    def check_all_fit(self) -> None:
        """Raise if a name or pattern matches none of the tensors queried so far.

        Raises:
            ValueError: Suggests the nearest name.
        """
        for pattern in self._bits:
            if not _matches(pattern, self._queried):
                known = sorted(self._queried)
                hint = (
                    nearest(pattern, known) or f"; there are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}"
                )
                raise ValueError(
                    f"`{self._key}` must name quantized tensors, but got {pattern!r}, which matches none{hint}"
                )


def layer_names(target: str) -> tuple[str, str]:
    """Return the two names of a layer: that of its module, and its form in graph nodes and in `synq inspect`."""
    return target, target.replace(".", "_")


def _matches(pattern: str, names: Collection[str]) -> bool:
    return pattern in names or any(fnmatchcase(name, pattern) for name in names)


def _literal_length(pattern: str) -> int:
    return len(re.sub(r"[*?]", "", re.sub(r"\[[^\]]*\]", "x", pattern)))
