"""The mixed-precision problem of a student: tensors with free bit-widths, their costs, the resulting configuration."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from synq.config.quant import RESEARCH
from synq.config.run import QuantConfig
from synq.engines.kernels import stored_weight_bits
from synq.mixed_precision.ilp import Key, Limit, Product
from synq.network.op_traits import node_module
from synq.quant.bit_patterns import BitPatterns, layer_names
from synq.quant.cost import FLOAT_BITS, layer_calls
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer
from synq.quant.student import Student


class MixedPrecisionProblem:
    """The tensors of a student whose bit-widths are to be chosen.

    Args:
        student: Student built with ``quant``.
        quant: Its bit-widths; those set by name, or for the first or last layer, are fixed, and for an engine those of
            activations that no layer reads.
        activations: Whether the bit-widths of activations are free, too.

    Attributes:
        as_given: Bit-width of every weight and quantized activation, in order of execution.
        free: Tensors whose bit-width is to be chosen.
        tied: Groups of activations that must share a bit-width, because one entry of `quant.layer_act_bits`, the name
            of a layer that reads them all, sets it.
    """

    def __init__(self, student: Student, quant: QuantConfig, *, activations: bool) -> None:
        self.quant = quant
        self._rows = {row.name: row for row in student.rows if row.role == "weight"}
        self._calls = layer_calls(student.net)
        # The names in the configuration that set the bit-width of a tensor.
        self._names: dict[Key, tuple[str, ...]] = {("weight", name): (name,) for name in self._rows}
        self.as_given: dict[Key, int] = {("weight", name): row.bits for name, row in self._rows.items()}
        reads: dict[str, list[Key]] = {}
        for node in student.net.graph.nodes:
            module = node_module(student.net, node)
            if not isinstance(module, ActQuantizer):
                continue
            name = str(node.target).removeprefix(ACT_QUANTIZERS)
            readers = tuple(str(user.target) for user in node.users)
            key: Key = ("activation", name)
            self.as_given[key] = module.bits
            self._names[key] = readers if quant.points == "inputs" else (name,)
            if quant.points == "inputs":
                for reader in dict.fromkeys(readers):
                    reads.setdefault(reader, []).append(key)
        self.tied = [keys for keys in reads.values() if len(keys) > 1]
        fixed = {key for key in self.as_given if self._is_named(key)}
        fixed |= {("activation", name) for name in student.at_ends}
        if quant.target != RESEARCH:  # an engine multiplies nothing by the others: they keep the bits of a byte
            read = {name for call in self._calls for name in call.inputs}
            fixed |= {key for key in self.as_given if key[0] == "activation" and key[1] not in read}
        if not activations:
            fixed |= {key for key in self.as_given if key[0] == "activation"}
        while more := {key for keys in self.tied if fixed & {*keys} for key in keys} - fixed:
            fixed |= more
        self.free = [key for key in self.as_given if key not in fixed]
        # Fixed bit-widths may differ within a group: a tensor has the largest one of those set for its readers.
        self.tied = [keys for keys in self.tied if not fixed & {*keys}]

    def bits_options(self, candidates: Sequence[int]) -> dict[Key, Sequence[int]]:
        """Return the possible bit-widths of every tensor: `candidates` if it is free, else the fixed one."""
        return {key: candidates if key in self.free else [bits] for key, bits in self.as_given.items()}

    def options(
        self, losses: Mapping[Key, Mapping[int, float]], candidates: Sequence[int]
    ) -> dict[Key, dict[int, float]]:
        """Return the losses of the possible bit-widths, with 0 for a fixed one that was not measured."""
        return {
            key: {b: losses[key][b] if key in self.free else losses.get(key, {}).get(b, 0.0) for b in options}
            for key, options in self.bits_options(candidates).items()
        }

    def bytes_limit(self, most: float | None) -> Limit:
        """Return the limit on the size of all weights in bytes; None takes that of the given bit-widths.

        They are packed, or, for an engine, as its file stores them.
        """
        target = self.quant.target
        stored = {b: b if target == RESEARCH else stored_weight_bits(target, b) for b in range(2, 9)}
        single: dict[Key, dict[int, float]] = {
            ("weight", name): {bits: math.ceil(row.numel * size / 8) for bits, size in stored.items()}
            for name, row in self._rows.items()
        }
        return self._limit("max-bytes", most, single, ())

    def bitops_limit(self, most: float | None) -> Limit:
        """Return the limit on the bit operations per image; None takes those of the given bit-widths."""
        single: dict[Key, dict[int, float]] = {}
        products = []
        for call in self._calls:
            key: Key = ("weight", call.layer)
            if call.inputs:
                others: tuple[Key, ...] = tuple(("activation", name) for name in call.inputs)
                products.append(Product(factor=call.macs, tensor=key, others=others))
            else:
                costs = single.setdefault(key, dict.fromkeys(range(2, 9), 0))
                for bits in costs:
                    costs[bits] += call.macs * bits * FLOAT_BITS
        return self._limit("max-bitops", most, single, products)

    def with_bits(self, chosen: Mapping[Key, int]) -> QuantConfig:
        """Return the configuration of a student with the chosen bit-widths."""
        weights, activations = dict(self.quant.layer_weight_bits), dict(self.quant.layer_act_bits)
        for key in self.free:
            names = weights if key[0] == "weight" else activations
            names |= dict.fromkeys(self._names[key], chosen[key])
        return replace(self.quant, layer_weight_bits=weights, layer_act_bits=activations)

    def _limit(
        self, name: str, most: float | None, single: Mapping[Key, Mapping[int, float]], products: Sequence[Product]
    ) -> Limit:
        limit = Limit(name=name, most=math.inf, single=single, products=products)
        return replace(limit, most=limit.spent(self.as_given) if most is None else most)

    def _is_named(self, key: Key) -> bool:
        role, _ = key
        # In order of calls: the last call may be of a layer that was called before.
        first_last = zip(self.quant.end_bits, (self._calls[0].layer, self._calls[-1].layer), strict=True)
        named_by_layer = role == "weight" or self.quant.points == "inputs"
        if named_by_layer and any(bits is not None and layer in self._names[key] for bits, layer in first_last):
            return True
        setting = f"layer_{'weight' if role == 'weight' else 'act'}_bits"
        patterns = BitPatterns(getattr(self.quant, setting), f"quant.{setting}")
        return any(patterns.width(*layer_names(name)) is not None for name in self._names[key])
