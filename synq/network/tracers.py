"""Tracers that turn a forward pass into a graph: symbolically, or with real tensors where the code reads sizes."""

import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from synq.network.op_traits import node_value
from synq.network.recorded_calls import calls_recorded, compiled_functions_as_written

NAMED_CASTS = ("float", "double", "half", "bfloat16")
"""Methods of tensors that cast to the dtype of their name."""


def image_parameter(forward: Callable[..., Any]) -> inspect.Parameter:
    """Return the parameter of a forward pass that a call ``net(images)`` fills.

    Args:
        forward: The function of the class, whose first parameter is the module.

    Raises:
        ValueError: If the call leaves out an argument that is required, or takes none at all.
    """
    given = list(inspect.signature(forward).parameters.values())
    unbound = given if given and given[0].kind is inspect.Parameter.VAR_POSITIONAL else given[1:]
    by_position = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in unbound if p.default is inspect.Parameter.empty and p.kind not in several]
    if len(required) > 1:
        names = ", ".join(required)
        raise ValueError(
            f"teacher must classify one image tensor, but its forward pass has {len(required)} inputs: {names}"
        )
    first = next((p for p in unbound if p.kind in by_position), None)
    if first is None or (required and required != [first.name]):
        names = f"only by keyword: {', '.join(required)}" if required else "none"
        raise ValueError(
            f"teacher must take the images as the first argument of its forward pass, but it takes {names}"
        )
    return first


class LayerTracer(fx.Tracer):
    """Trace with convolutions, linear layers and batch norms as leaves, including subclasses that compute the same.

    The graph has one input, the images: what a call ``net(images)`` leaves out has its default, as a constant. Hooks of
    the network itself and a forward pass that was set on the instance are part of the graph.

    Args:
        inlined: Functions that their library wraps for torch.fx (``torch.fx.wrap``), but whose operations are wanted.
    """

    def __init__(self, inlined: frozenset[Callable[..., Any]] = frozenset()) -> None:
        super().__init__()
        self.inlined = inlined

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        """Return a proxy of a new node, or for one of the inlined functions what it returns."""
        if kind == "call_function" and target in self.inlined:
            return target(*args, **kwargs)
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Return the graph of ``root``; calls that torch.fx alone does not see are recorded too.

        Raises:
            ValueError: If the code overwrites a constant after it was read: the graph would read the last value twice.
        """
        self._read: list[tuple[Tensor, int]] = []
        with calls_recorded(root), compiled_functions_as_written():
            graph = super().trace(root, concrete_args)
        if any(tensor._version != version for tensor, version in self._read):
            raise ValueError("it reads, and then overwrites, a tensor that is a constant")
        return graph

    def create_arg(self, a: Any) -> Any:
        """Return what represents an argument in the graph, a plain tensor as an attribute of the network."""
        if isinstance(a, Tensor) and not a.is_inference():
            self._read.append((a, a._version))
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: dict[str, Any] | tuple[Any, ...] | None = None
    ) -> tuple[Any, list[Any]]:
        """Return a function of the module and its images, and the arguments with which torch.fx calls it."""
        forward = inspect.unwrap(root_fn)
        name = image_parameter(forward).name
        images = self.create_proxy("placeholder", name, (), {}, type_expr=forward.__annotations__.get(name))

        def call(root: nn.Module, images: fx.Proxy) -> Any:
            return root._call_impl(images)

        # torch.fx copies the annotation into the graph's code, which enters the digest of a teacher.
        call.__annotations__ = {key: kind for key, kind in inspect.get_annotations(forward).items() if key == "return"}
        return call, [self.root, images]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _LayerProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Conv2d) and type(m)._conv_forward is not nn.Conv2d._conv_forward:
            return False  # it transforms its weight: the graph must contain that
        for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d):
            if isinstance(m, kind) and type(m).forward is kind.forward:
                return True
        if isinstance(m, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            return False  # made of layers, which are to be quantized
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
        inlined: As for `LayerTracer`.
    """

    def __init__(self, sample: Tensor, inlined: frozenset[Callable[..., Any]] = frozenset()) -> None:
        super().__init__(inlined)
        self.sample = sample
        self.values: dict[fx.Node, Any] = {}
        self._plain = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _SizedProxy(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over the parts of a tensor, as of ``x.chunk(2, 1)``: their number is known, that of images is not."""
        parts = self.values[obj.node]
        if isinstance(parts, tuple | list):
            return iter([operator.getitem(obj, index) for index in range(len(parts))])  # type: ignore[call-overload]
        return super().iter(obj)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **options)
        if kind == "placeholder":
            self.values[node] = self.sample
        elif kind != "output":
            with torch.no_grad(), self._untraced():
                self.values[node] = node_value(self.root, node, self.values)
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


class _LayerProxy(fx.Proxy):
    """Proxy that records what overwrites its tensor: an assignment to a part, ``x += y`` and the like."""

    is_nested = False  # PyTorch's transformer layers ask

    def __getattr__(self, k: str) -> Any:
        """Return an attribute of the tensor; one that is a tensor itself can be assigned to, too."""
        if k in ("T", "mT", "data"):
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)

    def _in_place(self, target: Callable[..., Any], other: Any) -> fx.Proxy:
        name = target.__name__.removeprefix("i")  # of the operation that it becomes in the normal form
        return self.tracer.create_proxy("call_function", target, (self, other), {}, name)

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class _SizedProxy(_LayerProxy):
    """Proxy of a tensor whose sizes are known, except for the number of images.

    The graph reads the dtype where it runs, because the network may run in another; two dtypes that are equal here are
    equal there, unless the code names one of them.
    """

    tracer: SizedTracer
    __hash__ = fx.Proxy.__hash__

    @property
    def dtype(self) -> Any:
        return self.tracer.create_proxy("call_function", getattr, (self, "dtype"), {})

    @property
    def device(self) -> Any:
        return self.tracer.create_proxy("call_function", getattr, (self, "device"), {})

    def __getattr__(self, k: str) -> Any:
        """Return an attribute as it is for a plain tensor; the type of a device is that of this machine, as a text."""
        value = self.tracer.values.get(self.node)
        if isinstance(value, torch.device) and k == "type":
            return value.type
        return super().__getattr__(k)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensor itself for its own dtype, read from another tensor: such a cast changes nothing.

        It stays where the code names the dtype of one of the two, as in ``softmax(x, -1, dtype=torch.float32)``.
        """
        given = [*args, *kwargs.values()]
        is_same = (
            len(given) == 1 and isinstance(given[0], fx.Proxy) and set(kwargs) <= {"dtype"} and self.dtype == given[0]
        )
        if is_same and all(_has_network_dtype(self.tracer.root, node) for node in (self.node, given[0].node)):
            return self
        return self.tracer.create_proxy("call_method", "to", (self, *args), kwargs)

    def __eq__(self, other: object) -> Any:
        if isinstance(own := self.tracer.values[self.node], torch.dtype):
            return own == (self.tracer.values[other.node] if isinstance(other, fx.Proxy) else other)
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})

    def __ne__(self, other: object) -> Any:
        if isinstance(self.tracer.values[self.node], torch.dtype):
            return not self == other
        return self.tracer.create_proxy("call_function", operator.ne, (self, other), {})

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

    def __len__(self) -> int:
        value = self.tracer.values[self.node]
        return len(value) if isinstance(value, tuple | list) else super().__len__()

    @property
    def ndim(self) -> int:
        return int(self.tracer.values[self.node].dim())

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]


def _has_network_dtype(root: nn.Module, node: fx.Node) -> bool:
    """Return whether the dtype of a tensor follows that of the network, because no code above it names one."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op == "call_module" and any(True for _ in root.get_submodule(str(current.target)).parameters()):
            continue  # a layer computes in the dtype of its weights
        given = [*current.args, *current.kwargs.values()]
        if any(isinstance(value, torch.dtype) for value in given) or current.target in NAMED_CASTS:
            return False
        casts = current.op == "call_method" and current.target in ("to", "type", "type_as") and len(given) > 1
        sources = [given[1]] if casts and isinstance(given[1], fx.Node) else current.all_input_nodes
        pending += [source for source in sources if source not in seen]
        seen.update(sources)
    return True
