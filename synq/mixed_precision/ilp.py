"""Which widths cost least fidelity and stay within limits: one width a tensor, found by an integer program. No data, no network.

    losses: KL(teacher || that tensor alone at b bits)        from `sensitivity.py`
    limits: packed bytes of the weights; bit operations, where a layer's MACs count by its own bits and by those of its input

Source: ZeroQ (arXiv 2001.00281), section 3.2, takes the sum of the losses of single layers for the loss of the whole and finds the front
by dynamic programming; HAWQ-V3 (arXiv 2011.10680), section 3.4, by an integer program, one width for a layer's weights and input
together. Here the two are chosen apart, and activations that several layers read count once.
"""

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from scipy import optimize, sparse

from synq.quant.bit_patterns import Role

Key: TypeAlias = tuple[Role, str]
"""A tensor of a student: what it is, and the name of its layer or activation."""
SCALES = (1e4, 1e6)
"""What the largest loss and every limit are in the program: the solver's tolerances, 1e-6, are absolute. Two, of which the better counts: once in
hundreds of awkward problems HiGHS calls a choice the best that is far from it, and not at both."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """A term of a limit: factor x bits of `tensor` x the most bits among `others`.

    Attributes:
        factor: For bit operations, the multiply-accumulates of an image.
        tensor: The layer's weight.
        others: What the input of the layer comes from, at least one; several where parts were joined.
    """

    factor: float
    tensor: Key
    others: tuple[Key, ...]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A sum that must not exceed `most`: of what single tensors cost at a width, and of products.

    Attributes:
        name: Of the setting, for messages.
        most: Largest sum.
        single: By tensor and width; may leave tensors out.
        products: Terms that two widths decide.
    """

    name: str
    most: float
    single: Mapping[Key, Mapping[int, float]] = field(default_factory=dict)
    products: Sequence[Product] = ()

    def spent(self, chosen: Mapping[Key, int]) -> float:
        """Return the sum at the widths ``chosen``."""
        products = (p.factor * chosen[p.tensor] * max(chosen[other] for other in p.others) for p in self.products)
        return sum(costs[chosen[key]] for key, costs in self.single.items()) + sum(products)


def check_limits(widths: Mapping[Key, Iterable[int]], limits: Sequence[Limit]) -> None:
    """Refuse limits that even the least widths of every tensor exceed.

    Raises:
        ValueError: With what these cost.
    """
    for limit in limits:
        least = limit.spent({key: min(options) for key, options in widths.items()})
        if least > limit.most:
            raise ValueError(
                f"`{limit.name}` must be at least {math.ceil(least)}, what the least of the widths to choose from cost, but it is {limit.most:g}"
            )


def choose_widths(
    losses: Mapping[Key, Mapping[int, float]], limits: Sequence[Limit], alike: Sequence[Sequence[Key]] = ()
) -> dict[Key, int]:
    """Return the width of every tensor for which the sum of the losses is least within all limits.

    Least to 1e-10 of the largest loss.

    Args:
        losses: By tensor and width, finite; a tensor whose width is given has one.
        limits: All over tensors and widths of ``losses``, none falling with more bits.
        alike: Tensors that must have one width, with the same widths to choose from.

    Raises:
        ValueError: If the least widths already exceed a limit.
    """
    check_limits(losses, limits)
    found = [_Program(losses, limits, alike, scale).best() for scale in SCALES]
    return min(found, key=lambda chosen: sum(losses[key][bits] for key, bits in chosen.items()))


class _Program:
    """One column a tensor and width, 1 where that is chosen; for products one a pair of widths, 1 where both are.

    The latter need not be asked to be whole: their sums over either width are the columns of the other's choice, and where these
    are 0 and 1 only the product is left. The most bits of several inputs are a choice of their own, at least that of each.
    """

    def __init__(
        self,
        losses: Mapping[Key, Mapping[int, float]],
        limits: Sequence[Limit],
        alike: Sequence[Sequence[Key]],
        scale: float,
    ) -> None:
        self.losses, self.limits, self.scale = losses, limits, scale
        self.choices: dict[Key | tuple[Key, ...], dict[int, int]] = {}
        self.size = 0
        self.rows: list[tuple[dict[int, float], float, float]] = []
        for key, by_bits in losses.items():
            self._choice(key, by_bits)
        self.whole = self.size
        for keys in alike:
            first = self.choices[keys[0]]
            for key in keys[1:]:
                for bits, column in self.choices[key].items():
                    self.rows.append(({column: 1, first[bits]: -1}, 0, 0))
        for limit in limits:
            costs = self._costs(limit)
            self.rows.append(({c: scale * cost / (limit.most or 1.0) for c, cost in costs.items()}, -np.inf, scale))

    def best(self) -> dict[Key, int]:
        """Return the best widths within the limits."""
        while True:
            chosen = self.solve()
            if all(limit.spent(chosen) <= limit.most for limit in self.limits):
                return chosen
            self.forbid(chosen)  # above a limit by less than the solver can tell

    def forbid(self, chosen: Mapping[Key, int]) -> None:
        """Rule out exactly these widths."""
        columns = [self.choices[key][bits] for key, bits in chosen.items()]
        self.rows.append((dict.fromkeys(columns, 1.0), -np.inf, len(columns) - 1))

    def solve(self) -> dict[Key, int]:
        """Return the best widths of those that are not ruled out."""
        loss = np.zeros(self.size)
        for key, by_bits in self.losses.items():
            for bits, value in by_bits.items():
                loss[self.choices[key][bits]] = value
        entries = [
            (value, row, column) for row, (terms, _, _) in enumerate(self.rows) for column, value in terms.items()
        ]
        values, at, columns = zip(*entries, strict=True)
        matrix = sparse.csr_array((values, (at, columns)), shape=(len(self.rows), self.size))
        lows, highs = [low for _, low, _ in self.rows], [high for _, _, high in self.rows]
        with _quiet():
            found = optimize.milp(
                self.scale * loss / (loss.max() or 1.0),
                integrality=(np.arange(self.size) < self.whole).astype(int),
                bounds=optimize.Bounds(0, 1),
                constraints=optimize.LinearConstraint(matrix, lows, highs),
                options={"mip_rel_gap": 0},
            )
        if found.x is None:
            raise RuntimeError(f"no widths were found: {found.message}")
        return {key: next(b for b, c in self.choices[key].items() if found.x[c] > 0.5) for key in self.losses}

    def _choice(self, key: Key | tuple[Key, ...], widths: Mapping[int, float] | Sequence[int]) -> dict[int, int]:
        columns = {bits: self.size + index for index, bits in enumerate(widths)}
        self.size += len(columns)
        self.choices[key] = columns
        self.rows.append((dict.fromkeys(columns.values(), 1.0), 1, 1))
        return columns

    def _most_of(self, keys: tuple[Key, ...]) -> dict[int, int]:
        """Return the columns of the most bits of several tensors."""
        if len(keys) == 1:
            return self.choices[keys[0]]
        if keys not in self.choices:
            columns = self._choice(keys, sorted({bits for key in keys for bits in self.choices[key]}))
            for key in keys:
                row = {column: float(bits) for bits, column in columns.items()}
                row |= {column: -float(bits) for bits, column in self.choices[key].items()}
                self.rows.append((row, 0, np.inf))
        return self.choices[keys]

    def _costs(self, limit: Limit) -> dict[int, float]:
        """Return what each column adds to the sum of a limit."""
        costs = {
            self.choices[key][bits]: cost
            for key, by_bits in limit.single.items()
            for bits, cost in by_bits.items()
            if bits in self.choices[key]
        }
        for product in limit.products:
            mine, theirs = self.choices[product.tensor], self._most_of(product.others)
            pairs = {(a, b): self.size + index for index, (a, b) in enumerate((a, b) for a in mine for b in theirs)}
            self.size += len(pairs)
            for bits, column in mine.items():
                self.rows.append(({pairs[bits, b]: 1.0 for b in theirs} | {column: -1.0}, 0, 0))
            for bits, column in theirs.items():
                self.rows.append(({pairs[a, bits]: 1.0 for a in mine} | {column: -1.0}, 0, 0))
            costs |= {column: product.factor * a * b for (a, b), column in pairs.items()}
        return costs


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep standard output free of what the solver's C++ code prints there although it is told not to."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
