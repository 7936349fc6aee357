"""Average pools in a form that every engine and exporter computes in the same way.

    avg_pool(x; padding counted, ceil_mode, divisor)  ->  avg_pool(x; padding not counted) * factor

The factor of an output position is the number of its window's pixels on the image, divided by the divisor of the
window: it is 1 where windows are whole, and a constant of the input's size. Without it the meaning is lost on the way:

- ``torch.onnx`` drops ``divisor_override``: ONNX has no such attribute.
- OpenVINO moves a pool before DequantizeLinear, and then pads the codes with 0 instead of the zero point; a Pad node
  before the pool is merged into it again.
- OpenVINO divides windows of ``ceil_mode`` that extend beyond the counted padding by another number.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from synq.network.op_traits import node_module

POOLS = "average_pools."
"""Prefix of the module name of a rewritten pool, followed by the name of its node."""
_DEFAULTS = {
    "stride": None,
    "padding": 0,
    "ceil_mode": False,
    "count_include_pad": True,
    "divisor_override": None,
}
_ARGUMENTS = ("input", "kernel_size", *_DEFAULTS)


class ScaledAveragePool(nn.Module):
    """Average over the pixels of each window that are on the image, times a constant factor.

    Args:
        call: Arguments of ``F.avg_pool2d`` but the input.
        size: (H, W) of the input.
    """

    factor: Tensor

    def __init__(self, call: dict[str, Any], size: tuple[int, int]) -> None:
        super().__init__()
        self.call = {**call, "count_include_pad": False, "divisor_override": None}
        factor = F.avg_pool2d(torch.ones(1, 1, *size, dtype=torch.float64), **call)  # pixels on the image / divisor
        if bool((factor == factor.flatten()[0]).all()):
            factor = factor[..., :1, :1]
        self.register_buffer("factor", factor.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H', W')."""
        return F.avg_pool2d(x, **self.call) * self.factor

    @property
    def is_plain(self) -> bool:
        """Return whether the factor is 1 everywhere: the pool needs no other form."""
        return bool((self.factor == 1).all())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.call.items())


def scale_average_pools(net: fx.GraphModule) -> None:
    """Rewrite, in place, each average pool that counts its padding or has a divisor.

    The graph must be recompiled afterwards.

    Args:
        net: A graph with recorded shapes.
    """
    for node in list(net.graph.nodes):
        call = _arguments(net, node)
        if call is None:
            continue
        source = call.pop("input")
        height, width = source.meta["shape"][-2:]
        pool = ScaledAveragePool(call, (height, width))
        if pool.is_plain:
            continue
        target = f"{POOLS}{node.name}"
        net.add_submodule(target, pool.eval())
        node.op, node.target, node.args, node.kwargs = "call_module", target, (source,), {}


def _arguments(net: fx.GraphModule, node: fx.Node) -> dict[str, Any] | None:
    """Return the arguments of ``F.avg_pool2d`` by name if ``node`` calls it, or its module, with constant settings."""
    module = node_module(net, node)
    if type(module) is nn.AvgPool2d:
        source = node.args[0] if node.args else node.kwargs["input"]
        call = {"input": source, **{name: getattr(module, name) for name in _ARGUMENTS[1:]}}
    elif node.op == "call_function" and node.target is F.avg_pool2d:
        call = {**_DEFAULTS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    else:
        return None
    settings = (value for name, value in call.items() if name != "input")
    is_constant = not any(isinstance(part, fx.Node) for value in settings for part in _flat(value))
    return call if is_constant else None


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
