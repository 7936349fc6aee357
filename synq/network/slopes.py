"""Gradients of functions that have no finite slope at some value: a root at zero, a logarithm at zero.

A float network keeps its values away from there, x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3), or meets them for
single values. A quantizer rounds all small values to zero exactly, where autograd's chain rule multiplies infinity by
zero: one such value makes the gradients of all layers before it NaN. The gradient there is defined as zero, as PyTorch
defines it for its own norms and standard deviations: zero is a subgradient of a norm at zero, and a logarithm of zero,
which the quantizer after it clamps to its range, has no influence on what follows. Values are not changed.
"""

from typing import Any

import torch
from torch import Tensor, fx

from synq.network.op_traits import TRAITS, OpKind, OpTraits, traits_of, value_inputs

_INFINITE_SLOPE = frozenset(
    {
        *("sqrt", "rsqrt", "pow", "reciprocal", "div", "log", "log2", "log10", "log1p", "xlogy", "special_xlog1py"),
        *("special_entr", "logit", "erfinv", "special_ndtri", "acos", "asin", "acosh", "atanh", "atan2", "hypot"),
    }
)
"""PyTorch's operators with such a value; as non-linear operations, so that a division is one by an activation."""


class _FiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.where(gradient.isfinite(), 0.0)


def finite_gradient(x: Tensor) -> Tensor:
    """Return ``x`` (any shape), whose gradient is zero where that of its reader is infinite or NaN."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    same: Tensor = _FiniteGradient.apply(x)
    return same


def limit_slopes(traced: fx.GraphModule) -> None:
    """Let gradients through functions without a finite slope somewhere be zero there, in place.

    Args:
        traced: A graph with recorded traits and shapes. `finite_gradient` comes before each input of such a function.
    """
    unchanged = OpTraits(
        kind=OpKind.PASSIVE, reads=(0,), keeps_values=True, elementwise=True, positively_homogeneous=True
    )
    for node in list(traced.graph.nodes):
        if not _may_be_infinite(node):
            continue
        for source in dict.fromkeys(value_inputs(node)):
            if source.meta.get("shape") is None:  # one of several results, which another node takes out
                continue
            with traced.graph.inserting_before(node):
                gated = traced.graph.call_function(finite_gradient, (source,))
            gated.meta.update({"shape": source.meta["shape"], TRAITS: unchanged})
            node.replace_input_with(source, gated)
    traced.recompile()


def _may_be_infinite(node: fx.Node) -> bool:
    traits = traits_of(node)
    if traits.kind is not OpKind.NONLINEAR or _INFINITE_SLOPE.isdisjoint(traits.operators):
        return False
    if traits.operators == ("pow",) and len(node.args) > 1 and isinstance(node.args[1], int | float):
        return node.args[1] < 1  # a square has a slope everywhere
    return True
