"""Attention that is one operation of PyTorch, rewritten as the products and the softmax that it computes.

F.scaled_dot_product_attention(q, k, v)  ->  (q * scale) @ k.transpose(-2, -1), + mask, softmax, @ v
nn.MultiheadAttention(x, x, x)           ->  one linear layer of query, key and value, the same, the output's layer

Quantizers belong between these steps, and a fused kernel shows none of them. Its sums have another order, so the logits
differ in the last digits.
"""

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.network.op_traits import node_module

_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_SDPA_DEFAULTS: dict[str, Any] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}
_MHA_ARGUMENTS = (
    *("query", "key", "value", "key_padding_mask", "need_weights"),
    *("attn_mask", "average_attn_weights", "is_causal"),
)
_MHA_DEFAULTS: dict[str, Any] = {
    "key_padding_mask": None,
    "need_weights": True,
    "attn_mask": None,
    "average_attn_weights": True,
    "is_causal": False,
}


def decompose_attention(traced: fx.GraphModule) -> bool:
    """Rewrite attention of one operation into its steps, in place.

    Args:
        traced: A graph in evaluation mode whose nodes have ``meta["shape"]`` and ``meta["dtype"]``.

    Returns:
        Whether a node was rewritten; new nodes have no shapes.

    Raises:
        ValueError: If an attention has a form that is not supported; the message names it.
    """
    found = False
    shared: dict[str, nn.MultiheadAttention] = {}
    for node in list(traced.graph.nodes):
        module = node_module(traced, node) if str(node.target) not in shared else shared[str(node.target)]
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            _decompose_product(traced, node)
        elif isinstance(module, nn.MultiheadAttention):
            shared[str(node.target)] = module
            _decompose_module(traced, node, module)
        else:
            continue
        found = True
    if found:
        # By hand: eliminate_dead_code checks the graph first, and unread tensors of the modules are gone.
        for node in reversed(traced.graph.nodes):
            if node.op not in ("placeholder", "output") and not node.users:
                traced.graph.erase_node(node)
        traced.graph.lint()
        traced.recompile()
    return found


class _Writer:
    """Appends operations before a node of a graph."""

    def __init__(self, traced: fx.GraphModule, node: fx.Node) -> None:
        self.traced, self.node, self.graph = traced, node, traced.graph

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call of a function, or of a method by its name."""
        with self.graph.inserting_before(self.node):
            if isinstance(function, str):
                return self.graph.call_method(function, args, kwargs)
            return self.graph.call_function(function, args, kwargs)

    def layer(self, name: str, x: fx.Node) -> fx.Node:
        """Add a call of a submodule."""
        with self.graph.inserting_before(self.node):
            return self.graph.call_module(name, (x,))

    def constant(self, value: Tensor) -> fx.Node:
        """Add a constant tensor as a buffer."""
        name = f"{self.node.name}_mask"
        self.traced.register_buffer(name, value, persistent=False)
        with self.graph.inserting_before(self.node):
            return self.graph.get_attr(name)

    def attention(
        self,
        query: fx.Node,
        key: fx.Node,
        value: fx.Node,
        *,
        masks: list[tuple[fx.Node, bool]],
        scale: float,
    ) -> tuple[fx.Node, fx.Node]:
        """Add softmax(scale * query key^T + masks) value; return probabilities and output.

        Args:
            query, key, value: (..., T, D).
            masks: Tensors that are added to the scores or, if True comes with one, choose them.
            scale: Factor of the query.
        """
        scores = self.call(torch.matmul, self.call(operator.mul, query, scale), self.call("transpose", key, -2, -1))
        for mask, chooses in masks:
            if chooses:
                hidden = self.call("logical_not", mask)
                scores = self.call("masked_fill", scores, hidden, -math.inf)
            else:
                scores = self.call(operator.add, scores, mask)
        probabilities = self.call("softmax", scores, -1)
        return probabilities, self.call(torch.matmul, probabilities, value)


def _decompose_product(traced: fx.GraphModule, node: fx.Node) -> None:
    call = {**_SDPA_DEFAULTS, **dict(zip(_SDPA_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    query, key, value = call["query"], call["key"], call["value"]
    length, width = query.meta["shape"][-2:]
    writer = _Writer(traced, node)
    if call["enable_gqa"] and query.meta["shape"][-3] != key.meta["shape"][-3]:
        repeats = query.meta["shape"][-3] // key.meta["shape"][-3]
        key, value = (writer.call("repeat_interleave", part, repeats, -3) for part in (key, value))
    masks = []
    if call["is_causal"]:
        below = torch.ones(length, call["key"].meta["shape"][-2], dtype=torch.bool).tril()
        masks.append((writer.constant(below), True))
    if call["attn_mask"] is not None:
        masks.append((call["attn_mask"], call["attn_mask"].meta.get("dtype") is torch.bool))
    scale = 1 / math.sqrt(width) if call["scale"] is None else call["scale"]
    _, result = writer.attention(query, key, value, masks=masks, scale=scale)
    node.replace_all_uses_with(result)
    traced.graph.erase_node(node)


def _decompose_module(traced: fx.GraphModule, node: fx.Node, module: nn.MultiheadAttention) -> None:
    call = {**_MHA_DEFAULTS, **dict(zip(_MHA_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    name = str(node.target)
    readers = [user for user in node.users if user.op != "output"]
    picked = [user.args[1] if user.target is operator.getitem else None for user in readers]
    by_batch = len(call["query"].meta["shape"]) == 3
    for faulty, form in (
        (module.bias_k is not None or module.add_zero_attn, "adds a key and a value (add_bias_kv, add_zero_attn)"),
        (call["key_padding_mask"] is not None, "has a key_padding_mask"),
        (not by_batch, "reads one sequence without a batch axis"),
        (None in picked or len(readers) < len(node.users), "returns its pair of outputs whole"),
    ):
        if faulty:
            raise ValueError(
                f"teacher must be built of operations whose quantization is known, but attention {name!r} {form}; "
                "write it with torch.nn.functional.scaled_dot_product_attention"
            )
    _replace_by_layers(traced, name, module, one=call["query"] is call["key"] is call["value"])
    writer, batch_first = _Writer(traced, node), module.batch_first
    heads, width = module.num_heads, module.head_dim

    def split(x: fx.Node) -> fx.Node:
        return writer.call("transpose", writer.call("unflatten", x, -1, (heads, width)), 1, 2)

    def in_batches(x: fx.Node) -> fx.Node:
        return x if batch_first else writer.call("transpose", x, 0, 1)

    if call["query"] is call["key"] is call["value"]:
        joined = writer.layer(f"{name}.in_proj", in_batches(call["query"]))
        thirds = writer.call("chunk", joined, 3, -1)
        parts = [split(writer.call(operator.getitem, thirds, place)) for place in range(3)]
    else:
        parts = [
            split(writer.layer(f"{name}.{kind}_proj", in_batches(call[field])))
            for kind, field in (("q", "query"), ("k", "key"), ("v", "value"))
        ]
    masks = [] if call["attn_mask"] is None else [_mask(writer, call["attn_mask"], heads)]
    weights, mixed = writer.attention(*parts, masks=masks, scale=1 / math.sqrt(width))
    result = writer.call("flatten", writer.call("transpose", mixed, 1, 2), 2)
    result = in_batches(writer.layer(f"{name}.out_proj", result))
    for reader, place in zip(readers, picked, strict=True):
        if place == 0:
            reader.replace_all_uses_with(result)
        elif reader.users:
            shown = writer.call("mean", weights, 1) if call["average_attn_weights"] else weights
            reader.replace_all_uses_with(shown)
        traced.graph.erase_node(reader)
    traced.graph.erase_node(node)


def _mask(writer: _Writer, mask: fx.Node, heads: int) -> tuple[fx.Node, bool]:
    """Return a mask (T, S) or (N heads, T, S) in a shape that fits (N, heads, T, S); True hides in this class."""
    if len(mask.meta["shape"]) == 3:
        mask_of_heads = writer.call("unflatten", mask, 0, (-1, heads))
        mask_of_heads.meta["dtype"] = mask.meta.get("dtype")
        mask = mask_of_heads
    if mask.meta.get("dtype") is torch.bool:
        return writer.call("logical_not", mask), True
    return mask, False


def _replace_by_layers(traced: fx.GraphModule, name: str, module: nn.MultiheadAttention, *, one: bool) -> None:
    """Put linear layers with the tensors of an attention module in its place; one called twice keeps both forms."""
    holder = traced.get_submodule(name)
    if holder is module:
        holder = nn.Module()
        holder.add_module("out_proj", module.out_proj)
        traced.set_submodule(name, holder)
    bias = module.in_proj_bias
    weights: dict[str, tuple[Tensor, Tensor | None]]
    if one:  # one tensor is query, key and value
        weights = {"in_proj": (module.in_proj_weight, bias)}
    else:
        biases: tuple[Tensor | None, ...] = (None, None, None) if bias is None else bias.chunk(3)
        kept = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        parts = module.in_proj_weight.chunk(3) if module._qkv_same_embed_dim else kept
        weights = {f"{kind}_proj": (parts[place], biases[place]) for place, kind in enumerate("qkv")}
    for field, (weight, offset) in weights.items():
        if field not in dict(holder.named_children()):
            holder.add_module(field, _linear(weight, offset))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(bias)
    return layer.eval()


def _parameter(values: Tensor) -> nn.Parameter:
    if isinstance(values, nn.Parameter):
        return values
    return nn.Parameter(values.detach().clone(), requires_grad=values.requires_grad)
