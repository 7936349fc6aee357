"""Places of attention in a traced network: product of queries and keys, softmax, product with the values."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from synq.network.attention.token_map import grid_of, layer_grids
from synq.network.op_traits import BATCH, OpKind, traits_of, value_inputs
from synq.network.ops import products

MOST_STEPS = 12
"""Operations between two steps of an attention that are followed: scale, bias, mask, reshapes for windows."""


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention of a traced network, whose tensors are (..., heads, T, S) or (..., heads, T, D).

    Attributes:
        scores: Name of the node of the product of queries and keys, (..., heads, T, S), not yet biased or masked.
        probabilities: Name of the node of the softmax of the scores, of the same shape.
        gathered: Name of the node of the product of probabilities and values, (..., heads, T, D).
        heads, tokens: Sizes of the axes; `tokens` is T.
        extra: Number of tokens, the first ones, that are no positions of the image.
    """

    scores: str
    probabilities: str
    gathered: str
    heads: int
    tokens: int
    extra: int


def attention_sites(traced: fx.GraphModule) -> list[AttentionSite]:
    """Return the attention of a network with several tokens on both sides, in order of execution.

    Args:
        traced: A graph from ``trace_classifier``.
    """
    grids = layer_grids(traced)
    found = []
    for gathered in products(traced):
        for source in value_inputs(gathered):
            softmax = _upstream(source, lambda node: "_softmax" in traits_of(node).operators)
            scores = softmax and _upstream(softmax, lambda node: traits_of(node).kind is OpKind.PRODUCT)
            if softmax is None or scores is None:
                continue
            shape = scores.meta["shape"]
            if len(shape) < 3 or shape[-1] != shape[-2] or shape[-1] < 2 or len(gathered.meta["shape"]) != len(shape):
                continue  # one query for all, or keys of another map
            grid = grid_of(shape[-1], grids)
            found.append(
                AttentionSite(
                    scores=scores.name,
                    probabilities=softmax.name,
                    gathered=gathered.name,
                    heads=shape[-3] if len(shape) > 3 else 1,
                    tokens=shape[-2],
                    extra=shape[-1] - grid[0] * grid[1] if grid is not None and shape[0] == BATCH else 0,
                )
            )
            break
    return found


def _upstream(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> fx.Node | None:
    """Return the nearest node above one that is wanted, through operations that are neither layers nor products."""
    pending, seen = [(node, 0)], {node}
    while pending:
        current, steps = pending.pop(0)
        if current is not node and wanted(current):
            return current
        if current is node and wanted(current) and traits_of(node).kind is not OpKind.PRODUCT:
            return current
        stops = current is not node and traits_of(current).kind in (OpKind.LAYER, OpKind.PRODUCT)
        if stops or steps == MOST_STEPS:
            continue
        for source in value_inputs(current):
            if source not in seen:
                seen.add(source)
                pending.append((source, steps + 1))
    return None
