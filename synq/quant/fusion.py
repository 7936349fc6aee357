"""Join what lies side by side in a student's graph into fewer passes over memory. Numbers and gradients stay what they were."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.network.op_traits import RELU, node_module, traits_of
from synq.quant.fake_quant import fake_quantize_rectified
from synq.quant.layers import ActQuantizer


class RectifiedQuantizer(nn.Module):
    """ReLU and the quantizer behind it, whose zero point is 0, in one function.

    The quantizer stays registered under its own name; here it is only referred to, so that checkpoints hold what they held.

    Args:
        quantizer: With an observed range that starts at zero, on the CPU.
    """

    def __init__(self, quantizer: ActQuantizer) -> None:
        super().__init__()
        self._quantizer = (quantizer,)  # in a tuple, or it would be registered a second time

    def forward(self, x: Tensor) -> Tensor:
        """Return the fake-quantized ReLU of ``x``, same shape."""
        (inner,) = self._quantizer
        if not inner.enabled or torch.compiler.is_compiling() or x.dtype != torch.float32:
            return inner(F.relu(x))
        if inner.learned:
            return inner.learned_forward(x, rectified=True)
        return fake_quantize_rectified(x, inner.scale, inner.quant_max)


def fuse_rectified(net: fx.GraphModule) -> int:
    """Replace, in place, every ReLU that only a quantizer of zero point 0 reads, together with this quantizer.

    Call it on the network that is trained, with its ranges observed and on its device. Fake quantization is one kernel on a GPU,
    with nothing to gain; there the network stays as it is.

    Args:
        net: A network of ``with_features`` over a student.

    Returns:
        How many pairs were joined.
    """
    joined = 0
    for node in list(net.graph.nodes):
        quantizer = node_module(net, node)
        if not isinstance(quantizer, ActQuantizer) or quantizer.scale.device.type != "cpu":
            continue
        (source,) = node.all_input_nodes
        if (
            not quantizer.has_range
            or int(quantizer.zero_point) != 0
            or not _is_relu(net, source)
            or len(source.users) > 1
        ):
            continue
        target = f"{node.target}_rectified"
        net.add_submodule(target, RectifiedQuantizer(quantizer))
        node.target, node.args = target, (source.all_input_nodes[0],)
        net.graph.erase_node(source)
        joined += 1
    net.graph.lint()
    net.recompile()
    return joined


def _is_relu(net: fx.GraphModule, node: fx.Node) -> bool:
    module = node_module(net, node)
    exact = module is None or type(module) is nn.ReLU  # a subclass may compute something else
    return exact and traits_of(net, node) is RELU
