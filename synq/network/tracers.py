"""Tracers that turn a forward pass into a graph: symbolically, or with real tensors where the code reads sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn


class LayerTracer(fx.Tracer):
    """Trace with convolutions, linear layers and batch norms as leaves, including subclasses that compute the same."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Conv2d) and type(m)._conv_forward is not nn.Conv2d._conv_forward:
            return False  # it transforms its weight: the graph must contain that
        for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d):
            if isinstance(m, kind) and type(m).forward is kind.forward:
                return True
        # timm's linear layer overrides forward for TorchScript only; it computes what nn.Linear computes.
        if isinstance(m, nn.Linear) and (type(m).__module__, type(m).__name__) == ("timm.layers.linear", "Linear"):
            return True
        return super().is_leaf_module(m, module_qualified_name)


class SizedTracer(LayerTracer):
    """Trace with real tensors, so that code may branch on the size of a feature, as TensorFlow's "same" padding does.

    Channels, height and width become plain numbers, valid for images of the size of ``sample`` only; the number of
    images stays symbolic. Slower than `LayerTracer`, because each operation is computed.

    Args:
        sample: (N, C, H, W) images.
    """

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        self.sample = sample
        self.values: dict[fx.Node, Any] = {}
        self._plain = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _SizedProxy(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **options)
        if kind == "placeholder":
            self.values[node] = self.sample
        elif kind != "output":
            with torch.no_grad(), self._untraced():
                self.values[node] = self._compute(node)
        return node

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """Restore the methods of ``nn.Module`` that torch.fx patches, so that modules compute in the ``with`` block."""
        traced = {name: getattr(nn.Module, name) for name in self._plain}
        for name, method in self._plain.items():
            setattr(nn.Module, name, method)
        try:
            yield
        finally:
            for name, method in traced.items():
                setattr(nn.Module, name, method)

    def _compute(self, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self.values.__getitem__)
        target: Any = node.target
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_function":
            return target(*args, **kwargs)
        value: Any = self.root
        for part in target.split("."):
            value = getattr(value, part)
        return value(*args, **kwargs) if node.op == "call_module" else value


class _SizedProxy(fx.Proxy):
    """Proxy of a tensor whose sizes are known, except for the number of images."""

    tracer: SizedTracer

    @property
    def shape(self) -> tuple[Any, ...]:
        value = self.tracer.values[self.node]
        if not isinstance(value, Tensor):
            raise AttributeError(f"{type(value).__name__} has no shape")
        if value.dim() == 0:
            return ()
        if self.node.op == "get_attr":  # a weight has no images
            return tuple(value.shape)
        count = self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return (count, *value.shape[1:])

    @property
    def ndim(self) -> int:
        return int(self.tracer.values[self.node].dim())

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]
