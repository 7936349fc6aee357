"""Calls in a forward pass that torch.fx does not see by itself.

torch.zeros(x.size(0), 8)                    sizes only
coords.expand(x.size(0), -1, -1, -1)         a tensor that torch.fx does not follow, with a size; coords[: x.size(0)]
len(x)                                       Python wants a number
a function compiled by torch.jit.script      no Python to follow

torch.fx records what is called on a traced tensor. While a network is traced, the names under which its code finds
these functions refer to functions that record the call, and to the Python function that TorchScript was compiled from;
calls on a plain tensor (a buffer, a constant of the code) with a traced size or tensor are recorded too. Functions
under ``torch.compile`` are traced as if they were not compiled.
"""

import builtins
import functools
import inspect
import operator
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

MAKERS: tuple[Callable[..., Any], ...] = (
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.arange, torch.linspace),
    *(torch.tensor, torch.as_tensor, torch.rand, torch.randn),
)
"""Functions that make a tensor from numbers."""
_WRITES = re.compile(r"__setitem__|__i(and|or|xor|lshift|rshift|floordiv|mod|pow)__|\w*[a-z0-9]_")
"""Names of the functions of PyTorch that overwrite their first argument."""
SIZED_METHODS = ("expand", "new_empty", "new_ones", "new_zeros")
"""Methods of a tensor that reject a traced size as the first of several arguments before they ask torch.fx."""


@contextmanager
def compiled_functions_as_written() -> Iterator[None]:
    """Let functions under ``torch.compile`` run uncompiled while torch.fx traces, inside the ``with`` block."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and the import is slow
        yield
        return
    from torch._dynamo import config

    with config.patch(error_on_nested_fx_trace=False):  # type: ignore[attr-defined]
        yield


@contextmanager
def calls_recorded(module: nn.Module) -> Iterator[None]:
    """Record calls of `MAKERS` and ``len``, and look into TorchScript functions, inside the ``with`` block.

    Replaced are names of ``torch`` and of the files that define the network's classes; all are put back afterwards.

    Args:
        module: The network that is traced.
    """
    makers = {id(function): function for function in MAKERS}
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for namespace in (vars(torch), *_namespaces(module)):
            for name, value in list(namespace.items()):
                if id(value) in makers:
                    new: Any = _recorded(value)
                elif isinstance(value, torch.jit.ScriptFunction) and hasattr(value, "_torchdynamo_inline"):
                    new = value._torchdynamo_inline
                else:
                    continue
                replaced.append((namespace, name, value))
                namespace[name] = new
            if namespace is not vars(torch) and "len" not in namespace:
                replaced.append((namespace, "len", None))
                namespace["len"] = _length
        for name in SIZED_METHODS:  # which torch.Tensor inherits, so that they can be deleted again
            setattr(Tensor, name, _recorded_method(name))
        with _PlainTensors():
            yield
    finally:
        for name in SIZED_METHODS:
            if name in vars(Tensor):
                delattr(Tensor, name)
        for namespace, name, value in reversed(replaced):
            if value is None:
                del namespace[name]
            else:
                namespace[name] = value


def _namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """Return the global names of the code of a network, PyTorch's left out."""
    found: dict[int, dict[str, Any]] = {}
    parts = list(module.modules())
    kinds = dict.fromkeys(kind for part in parts for kind in type(part).__mro__)  # each once: all have many in common
    for fields in (*map(vars, parts), *map(vars, kinds)):
        for function in fields.values():
            if not isinstance(function, FunctionType):
                continue
            for code in (function, inspect.unwrap(function)):
                space = code.__globals__
                if str(space.get("__name__", "")).partition(".")[0] != "torch":
                    found[id(space)] = space
    return list(found.values())


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, except that a call with a traced number or tensor becomes a node of the graph."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = _first_proxy(args, kwargs)
        if proxy is None:
            return function(*args, **kwargs)
        return proxy.tracer.create_proxy("call_function", function, args, kwargs)

    return call


def _recorded_method(name: str) -> Callable[..., Any]:
    """Return a method of `Tensor`, except that a call with a traced number or tensor becomes a node of the graph."""
    method = getattr(Tensor, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxy = _first_proxy(args, kwargs)
        return (
            method(*args, **kwargs) if proxy is None else proxy.tracer.create_proxy("call_method", name, args, kwargs)
        )

    return call


def _first_proxy(args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy | None:
    proxies: list[fx.Proxy] = []

    def collect(value: Any) -> Any:
        if isinstance(value, fx.Proxy):
            proxies.append(value)
        return value

    fx.node.map_aggregate((args, kwargs), collect)  # type: ignore[arg-type]
    return proxies[0] if proxies else None


class _PlainTensors(TorchFunctionMode):
    """Record calls on plain tensors that have a traced number or tensor among their arguments."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch, or record the call as torch.fx does.

        Raises:
            ValueError: If it writes into a plain tensor, which the code would go on to read as it was.
        """
        proxy = _first_proxy(args, kwargs or {})
        if proxy is None:
            return func(*args, **(kwargs or {}))
        name = str(getattr(func, "__name__", func))
        written = (kwargs or {}).get("out", args[0] if args and _WRITES.fullmatch(name) else None)
        if isinstance(written, Tensor):
            raise ValueError(f"it writes into a tensor that is a constant ({name})")
        if func is Tensor.__getitem__:
            return proxy.tracer.create_proxy("call_function", operator.getitem, args, {})
        return fx.Proxy.__torch_function__(func, types, args, kwargs)


def _length(value: Any) -> Any:
    """Return ``len(value)``: a node of the graph for a traced tensor, a number for a tuple of a known length.

    Such a tuple has sizes, or the parts of a tensor where the tracer knows their number.
    """
    if not isinstance(value, fx.Proxy):
        return builtins.len(value)
    parts = getattr(value.tracer, "values", {}).get(value.node)
    if isinstance(parts, tuple | list):
        return builtins.len(parts)
    return value.tracer.create_proxy("call_function", builtins.len, (value,), {})
