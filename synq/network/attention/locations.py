"""Location of attention in a traced network: product of queries and keys, softmax, product with the values."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx, nn

from synq.network.attention.image_axis import ImageAxis, image_axes
from synq.network.attention.token_map import grid_of, layer_grids
from synq.network.op_traits import BATCH, OpKind, node_module, traits_of, value_inputs
from synq.network.ops import products

MOST_STEPS = 12
"""Operations between two steps of an attention that are followed: scale, bias, mask, reshapes for windows."""


@dataclass(frozen=True, kw_only=True)
class AttentionNodes:
    """One attention of a traced network, whose tensors are (..., T, S) or (..., T, D).

    Images, heads and windows are the leading axes, in an order of each network's own: see `by_image`.

    Attributes:
        scores: Name of the node of the product of queries and keys, (..., T, S), not yet biased or masked.
        factors: Names of the nodes of queries (..., T, D) and transposed keys (..., D, S) whose matrix product it is;
            empty for another form of product.
        probabilities: Name of the node of the softmax of the scores, of the same shape.
        gathered: Name of the node of the product of probabilities and values, (..., T, D).
        heads, tokens: Numbers of both; `tokens` is T.
        windows: Number of parts of an image whose tokens see each other only; 1 for attention over all of it.
        extra: Number of tokens, the first ones, that are no positions of the image.
        images: Where the images and heads are among the leading axes.
    """

    scores: str
    factors: tuple[str, ...]
    probabilities: str
    gathered: str
    heads: int
    tokens: int
    windows: int
    extra: int
    images: ImageAxis

    def by_image(self, values: Tensor) -> Tensor:
        """Return a tensor of this attention, (..., T, D), as (N, windows, heads, T, D): one row for each image.

        Args:
            values: Scores, probabilities, gathered values, queries or keys of any number of images.
        """
        return self.images.by_image(values, math.prod(values.shape[:-2]) // (self.windows * self.heads))


@dataclass(frozen=True)
class _Steps:
    scores: fx.Node
    softmax: fx.Node
    gathered: fx.Node

    @property
    def names(self) -> tuple[str, ...]:
        return self.scores.name, self.softmax.name, self.gathered.name

    @property
    def is_aligned(self) -> bool:
        """Whether images and heads are on the same axes in all steps, by their sizes."""
        leading = self.scores.meta["shape"][:-2]
        return leading == self.softmax.meta["shape"][:-2] == self.gathered.meta["shape"][:-2]


def softmaxes(traced: fx.GraphModule) -> list[str]:
    """Return the names of the softmax nodes of all attention, also of that which `locate_attention` leaves out.

    Args:
        traced: A graph from ``trace_classifier``, its layers quantized or not.
    """
    return [steps.softmax.name for steps in _steps(traced)]


def locate_attention(traced: fx.GraphModule) -> list[AttentionNodes]:
    """Return the attention of a network with several tokens on both sides, in order of execution.

    Left out is attention in which no axis keeps the images apart from its scores to its output, as if tokens of several
    images saw each other: nothing in it is of one image.

    Args:
        traced: A graph from ``trace_classifier``.
    """
    steps = [one for one in _steps(traced) if one.is_aligned]
    grids, axes = layer_grids(traced), image_axes(traced, [one.names for one in steps])
    return [_nodes(traced, one, found, grids) for one, found in zip(steps, axes, strict=True) if found is not None]


def _nodes(
    traced: fx.GraphModule, steps: _Steps, place: tuple[int, int], grids: list[tuple[int, int]]
) -> AttentionNodes:
    axis, inner = place
    *leading, tokens, keys = steps.scores.meta["shape"]
    wanted = _heads_joined(traced, steps.gathered)
    others = [number for number in range(len(leading)) if number != axis]
    fitting = [number for number in others if leading[number] == wanted] or others
    heads_axis = fitting[-1] if fitting else None
    per_image = leading[axis] // BATCH
    shares = len(leading) == 1 and per_image > 1 and wanted == per_image
    heads = per_image if shares else 1 if heads_axis is None else leading[heads_axis]
    windows = math.prod(leading) // BATCH // heads
    grid = grid_of(tokens, grids)
    return AttentionNodes(
        scores=steps.scores.name,
        factors=_factors(steps.scores),
        probabilities=steps.softmax.name,
        gathered=steps.gathered.name,
        heads=heads,
        tokens=tokens,
        windows=windows,
        extra=keys - grid[0] * grid[1] if grid is not None and windows == 1 else 0,
        images=ImageAxis(axis=axis, inner=inner, heads_axis=heads_axis, shares_heads=shares),
    )


def _heads_joined(traced: fx.GraphModule, gathered: fx.Node) -> int | None:
    """Return how many heads the layer reads that joins them, None where something else is between."""
    pending, shape = [gathered], gathered.meta["shape"]
    while pending:
        for user in pending.pop().users:
            layer = node_module(traced, user)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                joined = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
                heads, rest = divmod(joined, shape[-1])
                return heads if heads and not rest else None
            if traits_of(user).keeps_values and math.prod(user.meta.get("shape") or ()) == math.prod(shape):
                pending.append(user)
    return None


def _steps(traced: fx.GraphModule) -> list[_Steps]:
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
            found.append(_Steps(scores, softmax, gathered))
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
    found, grids = locate_attention(traced), layer_grids(traced)
    chosen = []
    for number, nodes in enumerate(found, 1):
        grid = grid_of(nodes.tokens, grids)
        if grid is not None and nodes.windows == 1:
            chosen.append(ImageAttention(nodes=nodes, grid=grid, depth=number / len(found)))
    return chosen


def attention_received(probabilities: Tensor, nodes: AttentionNodes) -> Tensor:
    """Return what each position gets: of the first extra token, the class token, or else the mean over all queries.

    Args:
        probabilities: Softmax (..., T, T) of an attention over all positions of the image.
        nodes: The attention.

    Returns:
        (N, heads, T - extra).
    """
    heads = nodes.by_image(probabilities)[:, 0]
    return heads[..., 0, nodes.extra :] if nodes.extra else heads.mean(-2)


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
