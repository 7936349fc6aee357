"""Traits of PyTorch's operators (ATen), to which every function, method and module comes down when it is executed.

Adding an operator is one word in the group of its kind (`aten_groups.py`); `tests/network/test_aten_traits.py` compares
the traits of all functions of PyTorch that map a tensor to a tensor with what they do to numbers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from synq.network.aten_groups import (
    ACCUMULATING,
    AVERAGE_POOLS,
    BATCH_NORMS,
    CHOICES,
    CONSTANTS,
    ELEMENTWISE,
    FACTORS,
    HOMOGENEOUS,
    INTERPOLATIONS,
    LINEAR,
    LINEAR_REDUCTIONS,
    MAX_POOLS,
    MOVES,
    MULTIPLIED,
    NONLINEAR,
    ORDER_REDUCTIONS,
    ORDER_STATISTICS,
    PADS,
    PASSIVE,
    PASSIVE_IF_ALL,
    PRODUCTS,
    RESAMPLING_MOVES,
)
from synq.network.op_traits import OpKind, OpTraits


@dataclass(frozen=True, kw_only=True)
class OperatorCall:
    """One operator that was executed, and which of its arguments are activations.

    Attributes:
        operator: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: What it returned.
        activations: Identities of the tensors among its arguments that depend on the image.
    """

    operator: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    activations: frozenset[int]

    @property
    def name(self) -> str:
        """Name without overload, and without the endings of variants that work in place or copy a view."""
        name = self.operator._schema.name.split("::")[1]
        if self.operator._schema.is_mutable and name.endswith("_"):
            name = name[:-1]
        return name.removesuffix("_copy") if torch.Tag.view_copy in self.operator.tags else name

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers; a dropout in evaluation mode does not."""
        at_rest = any(self.argument(flag) is False for flag in ("training", "train")) or self.argument("dropout_p") == 0
        return torch.Tag.nondeterministic_seeded in self.operator.tags and not at_rest

    @property
    def is_pointwise(self) -> bool:
        """Whether PyTorch tags it, or another of its overloads, as element-wise (those that work in place are not)."""
        return torch.Tag.pointwise in self.operator.tags or _has_pointwise_overload(self.name)

    def argument(self, name: str) -> Any:
        """Return the value of an argument by the name in the operator's schema, or None if it has none."""
        for position, declared in enumerate(self.operator._schema.arguments):
            if declared.name == name:
                if name in self.kwargs:
                    return self.kwargs[name]
                return self.args[position] if position < len(self.args) else declared.default_value
        return None

    def is_activation(self, value: object) -> bool:
        """Return whether ``value`` is, or holds, a tensor that depends on the image."""
        return any(id(part) in self.activations for part in tree_leaves(value))

    def written(self) -> list[Tensor]:
        """Return the tensors among the arguments that the operator overwrites."""
        declared = [a.name for a in self.operator._schema.arguments if a.alias_info and a.alias_info.is_write]
        return [part for name in declared for part in tree_leaves(self.argument(name)) if isinstance(part, Tensor)]

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, in order."""
        return [part for part in tree_leaves((self.args, self.kwargs)) if isinstance(part, Tensor)]


@cache
def _has_pointwise_overload(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def operator_traits(call: OperatorCall, position: int = 0) -> OpTraits:
    """Return the traits of one operator, at least one of whose arguments is an activation.

    Args:
        call: The operator with its arguments.
        position: Which of its outputs is meant.

    Returns:
        Traits without ``reads``.
    """
    is_mean = position == 1 and call.name in ("var_mean", "std_mean")
    traits = _sum(call, "mean") if is_mean else _meaning(call)
    traits = replace(traits, elementwise=_is_elementwise(call, traits.kind))
    values = [t for t in call.tensors() if id(t) in call.activations and t.dtype.is_floating_point]
    output = next((part for part in tree_leaves(call.outputs) if isinstance(part, Tensor)), None)
    if traits.kind in (OpKind.UNKNOWN, OpKind.CONSTANT) or output is None:
        return replace(traits, operators=(call.name,))
    if output.dtype.is_complex:
        return _unknown(call)
    if not values and output.dtype.is_floating_point:  # a mask turned into numbers is a step function
        traits = OpTraits(kind=OpKind.NONLINEAR, elementwise=traits.elementwise)
    return replace(traits, operators=(call.name,))


def _meaning(call: OperatorCall) -> OpTraits:
    name, tags = call.name, call.operator.tags
    if call.operator.namespace != "aten":
        return _unknown(call)
    if call.is_random:
        return OpTraits(kind=OpKind.UNKNOWN, reason="it draws random numbers")
    masks = [t for t in call.tensors() if id(t) in call.activations and t.dtype is torch.bool]
    # The tag of `index` holds for masks only.
    if torch.Tag.data_dependent_output in tags or (
        torch.Tag.dynamic_output_shape in tags and (masks or name not in MOVES)
    ):
        return OpTraits(
            kind=OpKind.UNKNOWN, reason="a number or a shape that it returns depends on the values of the image"
        )
    if name in CONSTANTS and not call.is_activation(call.argument("value")):
        return OpTraits(kind=OpKind.CONSTANT)
    if name in BATCH_NORMS:
        # Statistics of the images are an instance norm's.
        kind = OpKind.NONLINEAR if call.argument("training") else OpKind.NORM
        return OpTraits(kind=kind)
    if name == "_to_copy" or (name in PASSIVE and call.argument("dtype") is None):
        if (
            isinstance(call.outputs, Tensor) and call.outputs.itemsize < call.argument("self").itemsize
        ):  # float16 rounds
            return OpTraits(kind=OpKind.STRUCTURAL)
        return OpTraits(kind=OpKind.PASSIVE, keeps_values=True, positively_homogeneous=_keeps_channels(call))
    if name == "view" and call.argument("dtype") is not None:  # the bits, read as another type
        return _unknown(call)
    if name in MOVES or call.operator.is_view or torch.Tag.view_copy in tags:
        return _move(call)
    if name in ORDER_STATISTICS:
        within = _within_channels(call)
        return OpTraits(
            kind=OpKind.STRUCTURAL,
            keeps_values=True,
            positively_homogeneous=within,
            resamples=within and name in MAX_POOLS | ORDER_REDUCTIONS,
        )
    if name in CHOICES:
        both = call.is_activation(call.argument("self")) and call.is_activation(call.argument("other"))
        return _choice(keeps_values=both)
    if name in LINEAR:
        return _sum(call, name)
    if name in PRODUCTS and all(call.is_activation(call.argument(part)) for part in PRODUCTS[name]):
        return OpTraits(kind=OpKind.PRODUCT)
    if name in NONLINEAR or call.is_pointwise:
        low, high = call.argument("min"), call.argument("max")
        zero_clamp = name in ("clamp", "clamp_min") and isinstance(low, int | float) and low == 0 and high is None
        return OpTraits(
            kind=OpKind.NONLINEAR,
            positively_homogeneous=name in HOMOGENEOUS or zero_clamp,
            limits=_limits(call),
        )
    return _unknown(call)


def _limits(call: OperatorCall) -> tuple[float, float] | None:
    """Return the smallest and largest output of a clamp by numbers; None for any other operator."""
    if call.name == "relu":
        return 0.0, math.inf
    if call.name not in ("clamp", "clamp_min", "clamp_max", "hardtanh"):
        return None
    low, high = ("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")
    bounds = [call.argument(low), call.argument(high)]
    if any(isinstance(bound, Tensor) for bound in bounds):
        return None
    return -math.inf if bounds[0] is None else float(bounds[0]), math.inf if bounds[1] is None else float(bounds[1])


def _is_elementwise(call: OperatorCall, kind: OpKind) -> bool:
    before = call.tensors()[0]
    after = next((part for part in tree_leaves(call.outputs) if isinstance(part, Tensor)), None)
    same = isinstance(after, Tensor) and before.shape == after.shape
    return same and (kind is OpKind.PASSIVE or call.name in ELEMENTWISE or call.is_pointwise)


def _unknown(call: OperatorCall) -> OpTraits:
    operator = f"{call.operator.namespace}.{call.name}"
    return OpTraits(kind=OpKind.UNKNOWN, reason=f"its tensors would stay float (operator {operator})")


def _choice(*, keeps_values: bool) -> OpTraits:
    """Return the traits of a choice between tensors; one between an activation and a constant is a clamp."""
    if keeps_values:
        return OpTraits(kind=OpKind.STRUCTURAL, keeps_values=True, chooses=True)
    return OpTraits(kind=OpKind.NONLINEAR)


def _move(call: OperatorCall) -> OpTraits:
    constants = [part for part in call.tensors() if id(part) not in call.activations and part.dtype.is_floating_point]
    if call.name == "copy":  # nothing remains of what it overwrites
        constants = []
    fills = [call.argument(name) for name in ("value", "other", "self")]
    numbers = [fill for fill in fills if isinstance(fill, int | float)]
    fills_zeros = not any(numbers) and not any(bool(part.any()) for part in constants)
    if call.argument("reduce") is not None:
        return OpTraits(kind=OpKind.NONLINEAR)
    if call.name in ACCUMULATING and call.argument("accumulate"):
        return OpTraits(kind=OpKind.STRUCTURAL)
    if call.is_activation(call.argument("condition")) or call.is_activation(call.argument("mask")):
        return _choice(keeps_values=fills_zeros)
    if call.name in PASSIVE_IF_ALL and isinstance(call.outputs, Tensor):
        before = call.argument("self")
        if before.numel() == call.outputs.numel():
            return OpTraits(kind=OpKind.PASSIVE, keeps_values=True, positively_homogeneous=_keeps_channels(call))
    spatial = call.name in PADS | RESAMPLING_MOVES or (
        call.name in ("slice", "flip", "roll", "expand") and _within_channels(call)
    )
    return OpTraits(
        kind=OpKind.STRUCTURAL,
        keeps_values=fills_zeros,
        positively_homogeneous=spatial and fills_zeros and _keeps_channels(call),
        resamples=call.name in RESAMPLING_MOVES,
    )


def _sum(call: OperatorCall, name: str) -> OpTraits:
    multiplied = sum(call.is_activation(call.argument(part)) for part in MULTIPLIED.get(name, ()))
    nonlinear = any(call.is_activation(call.argument(part)) for part in FACTORS.get(name, ()))
    if multiplied > 1 or nonlinear or call.argument("rounding_mode") is not None:
        return OpTraits(kind=OpKind.NONLINEAR)
    if name.lstrip("_").startswith("grid_sampler") and call.argument("interpolation_mode") == 1:  # nearest
        return OpTraits(kind=OpKind.STRUCTURAL, keeps_values=call.argument("padding_mode") in (0, 1, 2))
    pools = name in AVERAGE_POOLS | INTERPOLATIONS | LINEAR_REDUCTIONS and _within_channels(call)
    counted = not call.argument("divisor_override")
    return OpTraits(
        kind=OpKind.STRUCTURAL,
        positively_homogeneous=pools or name in HOMOGENEOUS,
        averages=pools and counted and name in AVERAGE_POOLS | {"mean"},
        resamples=pools,
    )


def _keeps_channels(call: OperatorCall) -> bool:
    """Return whether input and output have the same images and channels."""
    before, after = call.argument("self"), call.outputs
    after = after if isinstance(after, Tensor) else after[0]
    same = isinstance(before, Tensor) and isinstance(after, Tensor) and before.dim() > 1 and after.dim() > 1
    return same and before.shape[:2] == after.shape[:2]


def _within_channels(call: OperatorCall) -> bool:
    """Return whether a pool, reduction or move works within each channel of each image, whose axes are the first two.

    A reduction over all axes, which mixes images, does not.
    """
    before = call.argument("self")
    if not isinstance(before, Tensor) or before.dim() < 3:
        return False
    if call.name in MAX_POOLS | AVERAGE_POOLS | INTERPOLATIONS | RESAMPLING_MOVES | PADS | {"expand"}:
        return _keeps_channels(call)
    axes = call.argument("dims") if call.argument("dim") is None else call.argument("dim")
    axes = [axes] if isinstance(axes, int) else axes
    return isinstance(axes, Sequence) and bool(axes) and all(axis % before.dim() >= 2 for axis in axes)


def in_sequence(before: Iterable[OpTraits], operator: OpTraits) -> OpTraits:
    """Return the traits of an operator together with those of the operators before it that computed its inputs.

    Args:
        before: Traits of each input that is an activation, relative to the inputs of the node.
        operator: Traits of the operator that reads them.
    """
    inputs = list(before)
    if operator.kind is OpKind.CONSTANT:
        return operator
    values = [part for part in inputs if part.kind is not OpKind.SELECTOR] or inputs
    parts = [*values, operator]
    passive = operator.kind is OpKind.PASSIVE

    def pools(operator_does: bool, inputs_do: list[bool]) -> bool:
        """Return whether the sequence pools: one part does, and the others are passive."""
        after = [does or part.kind is OpKind.PASSIVE for does, part in zip(inputs_do, values, strict=True)]
        return (operator_does and all(after)) or (passive and bool(inputs_do) and all(inputs_do))

    unknown = next((part for part in parts if part.kind is OpKind.UNKNOWN), None)
    if operator.kind is OpKind.PRODUCT and any(part.kind > OpKind.STRUCTURAL for part in values):
        unknown = OpTraits(
            kind=OpKind.UNKNOWN, reason="it computes the inputs of a matrix product itself, which would stay float"
        )
    kind = max(part.kind for part in parts) if unknown is None else OpKind.UNKNOWN
    if kind is OpKind.PASSIVE and len(values) > 1:
        kind = OpKind.STRUCTURAL
    names = [name for part in values for name in part.operators]
    return OpTraits(
        kind=kind,
        operators=(*dict.fromkeys(names), *operator.operators) if len(values) > 1 else (*names, *operator.operators),
        keeps_values=all(part.keeps_values for part in parts),
        chooses=any(part.chooses for part in parts),
        elementwise=len({part.reads for part in values}) == 1 and all(part.elementwise for part in parts),
        positively_homogeneous=len(values) == 1 and all(part.positively_homogeneous for part in parts),
        averages=pools(operator.averages, [part.averages for part in values]),
        resamples=pools(operator.resamples, [part.resamples for part in values]),
        limits=operator.limits if len(values) == 1 and not values[0].operators else None,
        reason=unknown.reason if unknown else "",
    )
