"""Calls in a forward pass that torch.fx does not see by itself: ``torch.zeros(x.size(0), 8)``, ``len(x)``, TorchScript.

torch.fx records what is called on a tensor. A function that takes sizes only, ``len``, which must return a number, and
a function that was compiled by ``torch.jit.script`` fail instead. While a network is traced, the names under which its
code finds them refer to functions that record the call, and to the Python function that TorchScript was compiled from.
Functions under ``torch.compile`` are traced as if they were not compiled.
"""

import builtins
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

MAKERS: tuple[Callable[..., Any], ...] = (
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.arange, torch.linspace),
    *(torch.tensor, torch.as_tensor, torch.rand, torch.randn),
)
"""Functions that make a tensor from numbers."""


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
        yield
    finally:
        for namespace, name, value in reversed(replaced):
            if value is None:
                del namespace[name]
            else:
                namespace[name] = value


def _namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """Return the global names of the code of a network, PyTorch's left out."""
    found: dict[int, dict[str, Any]] = {}
    for part in module.modules():
        functions = [value for value in vars(part).values() if isinstance(value, FunctionType)]
        functions += [f for kind in type(part).__mro__ for f in vars(kind).values() if isinstance(f, FunctionType)]
        for function in functions:
            for code in (function, inspect.unwrap(function)):
                space = code.__globals__
                if str(space.get("__name__", "")).partition(".")[0] != "torch":
                    found[id(space)] = space
    return list(found.values())


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``, except that a call with a traced number or tensor becomes a node of the graph."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        proxies: list[fx.Proxy] = []

        def collect(value: Any) -> Any:
            if isinstance(value, fx.Proxy):
                proxies.append(value)
            return value

        fx.node.map_aggregate((args, kwargs), collect)  # type: ignore[arg-type]
        if not proxies:
            return function(*args, **kwargs)
        return proxies[0].tracer.create_proxy("call_function", function, args, kwargs)

    return call


def _length(value: Any) -> Any:
    """Return ``len(value)``: a node of the graph if ``value`` itself is traced, not if it is a tuple of sizes."""
    if not isinstance(value, fx.Proxy):
        return builtins.len(value)
    return value.tracer.create_proxy("call_function", builtins.len, (value,), {})
