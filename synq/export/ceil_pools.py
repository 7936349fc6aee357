"""Rewrite ``ceil_mode`` of the pools of an ONNX model as padding at the end of each axis.

PyTorch, and ONNX since opset 19, drop a last window that would start beyond the image and its first padding. OpenVINO
2026.4 keeps it: its output is one row or column larger. With the padding that the last window needs, and without
``ceil_mode``, the size does not depend on that rule. A maximum pads with -infinity, and an average that does not count
its padding is not changed by more of it; other averages have no ``ceil_mode`` in an integer form
(`average_pools.py`).
"""

from typing import Any

import onnx
from onnx import NodeProto, helper


def ceil_mode_to_pads(model: onnx.ModelProto) -> None:
    """Replace, in place, ``ceil_mode`` of each pool whose input size is known and whose padding engines accept.

    Args:
        model: A model with the shapes of its values.
    """
    graph = model.graph
    sizes = {
        value.name: tuple(part.dim_value for part in value.type.tensor_type.shape.dim)[2:]
        for value in (*graph.input, *graph.value_info)
    }
    for node in graph.node:
        if node.op_type not in ("MaxPool", "AveragePool"):
            continue
        settings = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        size = sizes.get(node.input[0], ())
        counts_padding = node.op_type == "AveragePool" and settings.get("count_include_pad", 0) == 1
        if settings.get("ceil_mode", 0) == 1 and not counts_padding and size and all(size):
            _set_pads(node, settings, size)


def _set_pads(node: NodeProto, settings: dict[str, Any], size: tuple[int, ...]) -> None:
    kernel, axes = settings["kernel_shape"], len(size)
    strides = settings.get("strides", [1] * axes)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, settings.get("dilations", [1] * axes), strict=True)]
    pads = list(settings.get("pads", [0] * 2 * axes))
    for axis in range(axes):
        begin, end = pads[axis], pads[axes + axis]
        steps = -(-(size[axis] + begin + end - extents[axis]) // strides[axis])
        if steps * strides[axis] >= size[axis] + begin:  # the last window would start beyond the image
            steps -= 1
        pads[axes + axis] = max(end, steps * strides[axis] + extents[axis] - size[axis] - begin)
    if any(pad >= k for pad, k in zip(pads, [*kernel, *kernel], strict=True)):  # no engine accepts such a padding
        return
    kept = [entry for entry in node.attribute if entry.name not in ("ceil_mode", "pads")]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("pads", pads)])
