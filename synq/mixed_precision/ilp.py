"""Mixed-precision search: one bit-width per tensor, found by integer linear programming. Needs no data, no network.

    minimize    sum over tensors of KL(teacher || student with only that tensor quantized, to b bits)   `sensitivity.py`
    subject to  packed bytes of the weights, and bit operations: MACs x weight bits x activation bits of each layer

Source: ZeroQ (arXiv 2001.00281), section 3.2, approximates the loss of the network by the sum of the losses of single
layers and finds the Pareto front by dynamic programming; HAWQ-V3 (arXiv 2011.10680), section 3.4, uses an integer
linear program with one bit-width for a layer's weights and input. Here they are chosen separately, and an activation
that several layers read counts once.
"""

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from scipy import optimize, sparse

from synq.quant.bit_patterns import Role

Key: TypeAlias = tuple[Role, str]
"""A tensor of a student: its role, and the name of its layer or activation."""
SCALES = (1e4, 1e6)
"""Values that the largest loss and every limit are scaled to: the tolerances of the solver, 1e-6, are absolute. Both
scales are solved and the better solution is taken: once in hundreds of badly scaled problems HiGHS reports a solution
far from the optimum as optimal, but never at both scales."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """A term of a limit: factor x bit-width of `tensor` x largest bit-width of `others`.

    Attributes:
        factor: For bit operations, the MACs of one image.
        tensor: The layer's weight.
        others: The activations that form the layer's input, at least one; several if they are concatenated.
    """

    factor: float
    tensor: Key
    others: tuple[Key, ...]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A constraint: costs of single tensors at their bit-widths plus products must not exceed `most`.

    Attributes:
        name: Option that sets the limit, for messages.
        most: Upper bound of the sum.
        unit: Unit of a cost that is no whole number, for messages.
        single: Cost by tensor and bit-width; missing tensors cost nothing.
        products: Terms that depend on several bit-widths.
    """

    name: str
    most: float
    unit: str = ""
    single: Mapping[Key, Mapping[int, float]] = field(default_factory=dict)
    products: Sequence[Product] = ()

    def spent(self, chosen: Mapping[Key, int]) -> float:
        """Return the cost of the bit-widths ``chosen``."""
        products = (p.factor * chosen[p.tensor] * max(chosen[other] for other in p.others) for p in self.products)
        return sum(costs[chosen[key]] for key, costs in self.single.items()) + sum(products)

    def least(self, options: Mapping[Key, Iterable[int]]) -> float:
        """Return the lowest possible cost, with any of the possible bit-widths of each tensor."""
        lowest = {key: min(bits) for key, bits in options.items()}
        products = replace(self, single={}).spent(lowest)
        return products + sum(min(costs[bits] for bits in options[key]) for key, costs in self.single.items())

    def amount(self, cost: float) -> str:
        """Return a cost as text, rounded up so that a limit of it can be met."""
        return f"{math.ceil(cost * 1e4) / 1e4:g} {self.unit}" if self.unit else f"{math.ceil(cost)}"


def check_limits(options: Mapping[Key, Iterable[int]], limits: Sequence[Limit]) -> None:
    """Check that each limit can be met.

    Raises:
        ValueError: A limit cannot be met; the message has the lowest possible cost.
    """
    for limit in limits:
        lowest = limit.least(options)
        if lowest > limit.most:
            kind = "cheapest" if limit.unit else "lowest"
            raise ValueError(
                f"`{limit.name}` must be at least {limit.amount(lowest)}, the cost of the {kind} bit-widths to "
                f"choose from, but got {limit.most:g}{f' {limit.unit}' if limit.unit else ''}"
            )


def choose_bits(
    losses: Mapping[Key, Mapping[int, float]], limits: Sequence[Limit], tied: Sequence[Sequence[Key]] = ()
) -> dict[Key, int]:
    """Return the bit-width of every tensor that minimizes the sum of the losses within all limits.

    The sum is minimal up to 1e-10 of the largest loss.

    Args:
        losses: Finite loss by tensor and bit-width; a tensor with a fixed bit-width has one entry.
        limits: Constraints over the tensors and bit-widths of ``losses``; costs of single tensors may rise or fall
            with more bits.
        tied: Groups of tensors that must share a bit-width, with the same candidates.

    Raises:
        ValueError: A limit cannot be met, or not all of them at once.
    """
    check_limits(losses, limits)
    found = [_Program(losses, limits, tied, scale).best() for scale in SCALES]
    return min(found, key=lambda chosen: sum(losses[key][bits] for key, bits in chosen.items()))


class _Program:
    """The integer linear program: a binary variable per tensor and bit-width, and one per pair of a product.

    The variables of pairs may be continuous: their sums over either bit-width equal the variables of the other, so
    they are 0 or 1 if those are. The largest bit-width of several inputs has separate variables, bounded below by the
    bit-width of each input.
    """

    def __init__(
        self,
        losses: Mapping[Key, Mapping[int, float]],
        limits: Sequence[Limit],
        tied: Sequence[Sequence[Key]],
        scale: float,
    ) -> None:
        self.losses, self.limits, self.scale = losses, limits, scale
        self.choices: dict[Key | tuple[Key, ...], dict[int, int]] = {}
        self.size = 0
        self.rows: list[tuple[dict[int, float], float, float]] = []
        for key, by_bits in losses.items():
            self._choice(key, by_bits)
        self.whole = self.size
        for keys in tied:
            first = self.choices[keys[0]]
            for key in keys[1:]:
                for bits, column in self.choices[key].items():
                    self.rows.append(({column: 1, first[bits]: -1}, 0, 0))
        for limit in limits:
            costs = self._costs(limit)
            self.rows.append(({c: scale * cost / (limit.most or 1.0) for c, cost in costs.items()}, -np.inf, scale))

    def best(self) -> dict[Key, int]:
        """Return the optimal bit-widths within the limits."""
        while True:
            chosen = self.solve()
            if all(limit.spent(chosen) <= limit.most for limit in self.limits):
                return chosen
            self.forbid(chosen)  # exceeds a limit by less than the solver's tolerance

    def forbid(self, chosen: Mapping[Key, int]) -> None:
        """Exclude this one solution by a constraint."""
        columns = [self.choices[key][bits] for key, bits in chosen.items()]
        self.rows.append((dict.fromkeys(columns, 1.0), -np.inf, len(columns) - 1))

    def solve(self) -> dict[Key, int]:
        """Return the optimal bit-widths among those that are not excluded."""
        loss = np.zeros(self.size)
        for key, by_bits in self.losses.items():
            for bits, value in by_bits.items():
                loss[self.choices[key][bits]] = value
        entries = [
            (value, row, column) for row, (terms, _, _) in enumerate(self.rows) for column, value in terms.items()
        ]
        values, at, columns = zip(*entries, strict=True)
        indices = np.array(
            [at, columns], np.int32
        )  # SciPy 1.11 to 1.13 hand them on as they are to HiGHS, which has int
        matrix = sparse.csr_array((values, tuple(indices)), shape=(len(self.rows), self.size))
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
            names = " and ".join(f"`{limit.name}` {limit.most:g}" for limit in self.limits if limit.most < np.inf)
            raise ValueError(
                f"the limits must be met by one choice of bit-widths, but none meets {names} at once: raise one of them"
            )
        return {key: next(b for b, c in self.choices[key].items() if found.x[c] > 0.5) for key in self.losses}

    def _choice(self, key: Key | tuple[Key, ...], options: Mapping[int, float] | Sequence[int]) -> dict[int, int]:
        columns = {bits: self.size + index for index, bits in enumerate(options)}
        self.size += len(columns)
        self.choices[key] = columns
        self.rows.append((dict.fromkeys(columns.values(), 1.0), 1, 1))
        return columns

    def _most_of(self, keys: tuple[Key, ...]) -> dict[int, int]:
        """Return the variables of the largest bit-width of several tensors."""
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
        """Return the coefficient of each variable in the sum of a limit."""
        costs = {
            self.choices[key][bits]: cost
            for key, by_bits in limit.single.items()
            for bits, cost in by_bits.items()
            if bits in self.choices[key]
        }
        for product in limit.products:
            weight, inputs = self.choices[product.tensor], self._most_of(product.others)
            pairs = {(a, b): self.size + index for index, (a, b) in enumerate((a, b) for a in weight for b in inputs)}
            self.size += len(pairs)
            for bits, column in weight.items():
                self.rows.append(({pairs[bits, b]: 1.0 for b in inputs} | {column: -1.0}, 0, 0))
            for bits, column in inputs.items():
                self.rows.append(({pairs[a, bits]: 1.0 for a in weight} | {column: -1.0}, 0, 0))
            costs |= {column: product.factor * a * b for (a, b), column in pairs.items()}
        return costs


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the standard output of the solver's C++ code, which its options do not disable."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
