"""Tokens as a feature map (N, C, H, W): those of the last residual sum on whose positions the logits depend."""

import math
from dataclasses import dataclass

import torch
from torch import fx, nn

from synq.network.op_traits import BATCH, OpKind, node_module, traits_of, value_inputs

MOST_EXTRA_TOKENS = 16
"""Largest number of tokens that are no positions of the image: class and distillation token, registers."""
TOKEN_MAP = "token_map"
"""Key of the `TokenMap` in the ``meta`` of a node whose output is read as a feature map."""


@dataclass(frozen=True, kw_only=True)
class TokenMap:
    """How tokens, (N, T, C) or (N, H, W, C), are a feature map (N, C, H, W).

    Attributes:
        extra: Number of tokens, the first ones, that are no positions.
        height, width: Size of the map.
        flat: Whether the positions are one axis.
    """

    extra: int
    height: int
    width: int
    flat: bool


def locate_tokens(traced: fx.GraphModule) -> tuple[fx.Node, TokenMap] | None:
    """Return the last residual sum of tokens on whose positions the logits depend, or None if there is none.

    Where a class token is classified, the positions that leave the last block have no gradient, so that the tokens
    which enter it are taken.

    Args:
        traced: A graph from ``trace_classifier``.
    """
    grids = layer_grids(traced)
    found = []
    for node in traced.graph.nodes:
        if node.op.startswith("call_") and traits_of(node).operators == ("add",) and len(value_inputs(node)) == 2:
            shape = node.meta["shape"]
            if shape[:1] != (BATCH,):  # windows, or groups of tokens, of all images in a row
                continue
            if len(shape) == 3 and (grid := grid_of(shape[1], grids)) is not None:
                height, width = grid
                token_map = TokenMap(extra=shape[1] - height * width, height=height, width=width, flat=True)
                found.append((node, token_map))
            elif len(shape) == 4 and channels_are_last(traced, node):
                found.append((node, TokenMap(extra=0, height=shape[1], width=shape[2], flat=False)))
    slope_of = slopes(traced, [node for node, _ in found])
    if found and not any(bool(slope.any()) for slope in slope_of.values()):
        return found[-1]  # an untrained classifier of zeros, whose logits depend on nothing
    for node, token_map in reversed(found):
        slope = slope_of[node][:, token_map.extra :] if token_map.flat else slope_of[node]
        if bool(slope.any()) and token_map.height * token_map.width > 1:
            return node, token_map
    return None


def write_as_map(graph: fx.Graph, tokens: fx.Node, token_map: TokenMap) -> fx.Node:
    """Insert the way from tokens to a feature map and back after a node, whose readers then read what comes back.

    Args:
        graph: The graph, changed in place.
        tokens: Node of the tokens.
        token_map: Their layout.

    Returns:
        The node of the feature map (N, C, H, W), which is turned back into tokens.
    """
    readers = list(tokens.users)
    with graph.inserting_after(tokens):
        anchor = graph.call_method("contiguous", (tokens,))
    with graph.inserting_before(anchor):
        if token_map.flat:
            positions = graph.call_function(_after, (tokens, token_map.extra))
            moved = graph.call_method("transpose", (positions, 1, 2))
            features = graph.call_method("unflatten", (moved, 2, (token_map.height, token_map.width)))
        else:
            features = graph.call_method("permute", (tokens, 0, 3, 1, 2))
        whole = graph.call_method("contiguous", (features,))
        if token_map.flat:
            back = graph.call_method("transpose", (graph.call_method("flatten", (whole, 2)), 1, 2))
            result = graph.call_function(_joined, (tokens, back, token_map.extra))
        else:
            result = graph.call_method("permute", (whole, 0, 2, 3, 1))
    for reader in readers:
        reader.replace_input_with(tokens, result)
    graph.erase_node(anchor)
    return whole


def _after(tokens: torch.Tensor, extra: int) -> torch.Tensor:
    return tokens[:, extra:]


def _joined(tokens: torch.Tensor, positions: torch.Tensor, extra: int) -> torch.Tensor:
    return torch.cat([tokens[:, :extra], positions], 1) if extra else positions


def _is_layer_map(node: fx.Node) -> bool:
    shape: tuple[int, ...] = node.meta.get("shape") or ()
    return len(shape) == 4 and traits_of(node).kind is OpKind.LAYER and shape[2] * shape[3] > 1


def layer_grids(traced: fx.GraphModule) -> list[tuple[int, int]]:
    """Return the sizes (height, width) of the maps that the layers of a network compute, in order of execution."""
    return [node.meta["shape"][2:] for node in traced.graph.nodes if _is_layer_map(node)]


def grid_of(tokens: int, grids: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Return height and width of the map that a number of tokens are, with some extra ones; None if they are none.

    Args:
        tokens: Number of tokens, at most `MOST_EXTRA_TOKENS` of which are no positions.
        grids: Of `layer_grids`; a square is a map, too.
    """
    fitting = [g for g in grids if 0 <= tokens - g[0] * g[1] <= min(MOST_EXTRA_TOKENS, tokens // 4)]
    if fitting:
        return max(fitting, key=lambda grid: grid[0] * grid[1])
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens and side > 1 else None


def channels_are_last(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a tensor of four axes is made or read by a LayerNorm over its last axis.

    Args:
        traced: A graph from ``trace_classifier``.
        node: One of its nodes, of four axes.
    """
    for norm in (node, *node.users):
        if "native_layer_norm" not in traits_of(norm).operators:
            continue
        module = node_module(traced, norm)
        given = module.normalized_shape if isinstance(module, nn.LayerNorm) else norm.args[1:2]
        sizes = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
        if tuple(sizes) == (node.meta["shape"][-1],):
            return True
    return False


def slopes(traced: fx.GraphModule, nodes: list[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """Return the gradient of a random combination of the logits with respect to the outputs of nodes.

    Args:
        traced: A graph from ``trace_classifier``.
        nodes: Some of its nodes.

    Returns:
        For each node a tensor of the shape of its output for `BATCH` images; zero where the logits do not depend on it.
    """
    if not nodes:
        return {}
    image = next(node for node in traced.graph.nodes if node.op == "placeholder")
    kept: dict[str, torch.Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            if n in nodes:
                value = value if value.requires_grad else value.detach().requires_grad_()
                kept[n.name] = value
            return value

    generator = torch.Generator().manual_seed(0)
    like = next(traced.parameters())
    images = torch.randn(image.meta["shape"], generator=generator).to(like)
    with torch.enable_grad():
        logits = Recorder(traced).run(images.requires_grad_())
        weights = torch.randn(logits.shape, generator=generator).to(logits)
        values = [kept[node.name] for node in nodes]
        found = torch.autograd.grad((logits * weights).sum(), values, allow_unused=True)
    return {n: torch.zeros_like(v) if g is None else g for n, v, g in zip(nodes, values, found, strict=True)}
