"""Fuse adjacent operations of a student's graph, to save passes over memory. Values and gradients do not change."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.network.op_traits import node_module, traits_of
from synq.quant.fake_quant import fake_quantize_rectified
from synq.quant.layers import ActQuantizer


class RectifiedQuantizer(nn.Module):
    """Apply a ReLU and the activation quantizer after it, whose zero_point is 0, in one function.

    The quantizer stays registered under its name; this module only references it, so that the keys of checkpoints do
    not change.

    Args:
        quantizer: With an observed range that starts at zero, on the CPU.
    """

    def __init__(self, quantizer: ActQuantizer) -> None:
        super().__init__()
        self._quantizer = (quantizer,)  # a tuple, because an attribute would be registered a second time

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized ReLU of ``x``, same shape."""
        (inner,) = self._quantizer
        if not inner.enabled or torch.compiler.is_compiling() or x.dtype != torch.float32:
            return inner(F.relu(x))
        if inner.learned:
            return inner.learned_forward(x, rectified=True)
        return fake_quantize_rectified(x, inner.scale, inner.quant_max)


def fuse_rectified(net: fx.GraphModule) -> int:
    """Fuse, in place, every ReLU with a following quantizer that is its only user and has zero_point 0.

    Call it on the network to be trained, on its device and with observed ranges. On a GPU nothing is fused: fake
    quantization is a single kernel there.

    Args:
        net: A network of ``with_features`` over a student.

    Returns:
        Number of fused pairs.
    """
    num_fused = 0
    for node in list(net.graph.nodes):
        quantizer = node_module(net, node)
        if not isinstance(quantizer, ActQuantizer) or quantizer.scale.device.type != "cpu":
            continue
        (source,) = node.all_input_nodes
        if (
            not quantizer.rounded
            or not quantizer.has_range
            or int(quantizer.zero_point) != 0
            or not _is_relu(source)
            or len(source.users) > 1
        ):
            continue
        target = f"{node.target}_rectified"
        net.add_submodule(target, RectifiedQuantizer(quantizer))
        node.target, node.args = target, (source.all_input_nodes[0],)
        net.graph.erase_node(source)
        num_fused += 1
    net.graph.lint()
    net.recompile()
    return num_fused


def _is_relu(node: fx.Node) -> bool:
    return traits_of(node).operators == ("relu",)
