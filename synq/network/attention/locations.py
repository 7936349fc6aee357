"""Location of attention in a traced network: product of queries and keys, softmax, product with the values."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx

from synq.network.attention.token_map import grid_of, layer_grids
from synq.network.op_traits import BATCH, OpKind, traits_of, value_inputs
from synq.network.ops import products

MOST_STEPS = 12
"""Operations between two steps of an attention that are followed: scale, bias, mask, reshapes for windows."""


@dataclass(frozen=True, kw_only=True)
class AttentionNodes:
    """One attention of a traced network, whose tensors are (..., heads, T, S) or (..., heads, T, D).

    Attributes:
        scores: Name of the node of the product of queries and keys, (..., heads, T, S), not yet biased or masked.
        factors: Names of the nodes of queries (..., heads, T, D) and transposed keys (..., heads, D, S) whose matrix
            product it is; empty for another form of product.
        probabilities: Name of the node of the softmax of the scores, of the same shape.
        gathered: Name of the node of the product of probabilities and values, (..., heads, T, D).
        heads, tokens: Sizes of the axes; `tokens` is T.
        extra: Number of tokens, the first ones, that are no positions of the image.
    """

    scores: str
    factors: tuple[str, ...]
    probabilities: str
    gathered: str
    heads: int
    tokens: int
    extra: int


def locate_attention(traced: fx.GraphModule) -> list[AttentionNodes]:
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
                AttentionNodes(
                    scores=scores.name,
                    factors=_factors(scores),
                    probabilities=softmax.name,
                    gathered=gathered.name,
                    heads=shape[-3] if len(shape) > 3 else 1,
                    tokens=shape[-2],
                    extra=shape[-1] - grid[0] * grid[1] if grid is not None and shape[0] == BATCH else 0,
                )
            )
            break
    return found


@dataclass(frozen=True, kw_only=True)
class ImageAttention:
    """Attention over all positions of an image.

    Attributes:
        nodes: The attention.
        grid: Height and width of the map that its tokens are, without the extra ones.
        depth: Its place among all attention of the network, in (0, 1].
    """

    nodes: AttentionNodes
    grid: tuple[int, int]
    depth: float


def attention_of_images(traced: fx.GraphModule) -> list[ImageAttention]:
    """Return the attention that is over all positions of an image, not over windows, in order of execution.

    Args:
        traced: A graph from ``trace_classifier``.
    """
    found = locate_attention(traced)
    by_name = {node.name: node for node in traced.graph.nodes}
    grids = layer_grids(traced)
    chosen = []
    for number, nodes in enumerate(found, 1):
        shape, grid = by_name[nodes.scores].meta["shape"], grid_of(nodes.tokens, grids)
        # Scores over windows have the windows of all images on the first axis, or on a further one.
        if grid is not None and len(shape) <= 4 and shape[0] == BATCH:
            chosen.append(ImageAttention(nodes=nodes, grid=grid, depth=number / len(found)))
    return chosen


def attention_received(probabilities: Tensor, extra: int) -> Tensor:
    """Return what each position gets: of the first extra token, the class token, or else the mean over all queries.

    Args:
        probabilities: (N, heads, T, T) or (N, T, T).
        extra: Number of tokens, the first ones, that are no positions.

    Returns:
        (N, heads, T - extra).
    """
    heads = probabilities if probabilities.dim() == 4 else probabilities.unsqueeze(-3)
    return heads[..., 0, extra:] if extra else heads.mean(-2)


def _factors(scores: fx.Node) -> tuple[str, ...]:
    sources = value_inputs(scores)
    if len(sources) != 2:
        return ()
    left, right, made = (node.meta["shape"] for node in (*sources, scores))
    is_product = (*left[:-1], right[-1]) == tuple(made) and (*left[:-2], left[-1]) == tuple(right[:-1])
    return tuple(source.name for source in sources) if is_product and scores.args[:2] == tuple(sources) else ()


def _upstream(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> fx.Node | None:
    """Return the nearest node above one that is wanted, through operations that are neither layers nor products.

    Layers that mix the heads of each pair of tokens (talking heads, as in CaiT) are passed through.
    """
    pending, seen = [(node, 0)], {node}
    while pending:
        current, steps = pending.pop(0)
        if current is not node and wanted(current):
            return current
        if current is node and wanted(current) and traits_of(node).kind is not OpKind.PRODUCT:
            return current
        kind = traits_of(current).kind
        stops = current is not node and (kind is OpKind.PRODUCT or (kind is OpKind.LAYER and not _mixes_heads(current)))
        if stops or steps == MOST_STEPS:
            continue
        for source in value_inputs(current):
            if source not in seen:
                seen.add(source)
                pending.append((source, steps + 1))
    return None


def _mixes_heads(layer: fx.Node) -> bool:
    """Return whether a layer computes scores (N, T, T, heads) from such, each from the heads of one pair of tokens."""
    sources = value_inputs(layer)
    shape = layer.meta["shape"]
    same = len(sources) == 1 and tuple(sources[0].meta["shape"]) == tuple(shape)
    return same and len(shape) == 4 and shape[1] == shape[2]
