"""Which grids the activations that only transformers have get: LayerNorms, the softmax of attention, GELU."""

from typing import Any

from torch import fx

from synq.config.quant import QuantConfig
from synq.network.op_traits import node_module, traits_of
from synq.quant.layers import ActQuantizer
from synq.quant.student import Student
from synq.quant.transformer.log_quantizer import LogQuantizer
from synq.quant.transformer.scale_shift import locate_norms


def transformer_grids(traced: fx.GraphModule, student: Student, quant: QuantConfig) -> dict[str, Any]:
    """Return the LayerNorms that can get one range, and the quantized outputs of softmax and GELU.

    Args:
        traced: The teacher's graph.
        student: Its student.
        quant: The settings that it was made with.

    Returns:
        ``layer_norms`` (names of those that only linear layers read), ``scale_shift`` (whether they are to get one
        range), ``logarithmic`` (nodes with a logarithmic grid, all of them softmax), ``softmax`` and ``gelu`` (names of
        nodes with a uniform grid) and ``symmetric`` (whether uniform grids are symmetric around 0).
    """
    operators = {node.name: {*traits_of(node).operators} for node in traced.graph.nodes}
    found: dict[str, list[str]] = {"logarithmic": [], "softmax": [], "gelu": []}
    symmetric = False
    for node in student.net.graph.nodes:
        quantizer = node_module(student.net, node)
        if not isinstance(quantizer, ActQuantizer):
            continue
        source = node.all_input_nodes[0].name
        if isinstance(quantizer, LogQuantizer):
            found["logarithmic"].append(source)
            continue
        symmetric = symmetric or quantizer.symmetric
        for kind, operator in (("softmax", "_softmax"), ("gelu", "gelu")):
            found[kind] += [source] if operator in operators.get(source, set()) else []
    norms = [location.norm for location in locate_norms(traced)]
    return {"layer_norms": norms, "scale_shift": quant.scale_shift, **found, "symmetric": symmetric}


def grids_line(grids: dict[str, Any]) -> str:
    """Return a line about the result of `transformer_grids`; "" for a network without any of them."""
    uniform = "symmetric" if grids["symmetric"] else "asymmetric"
    parts = []
    if count := len(grids["layer_norms"]):
        setting = "one range for all channels (quant.scale_shift)" if grids["scale_shift"] else "as they are"
        parts.append(f"{count} LayerNorms {setting}")
    if count := len(grids["logarithmic"]):
        parts.append(f"{count} softmax logarithmic")
    parts += [f"{len(grids[kind])} {kind} {uniform}" for kind in ("softmax", "gelu") if grids[kind]]
    return ", ".join(parts)
