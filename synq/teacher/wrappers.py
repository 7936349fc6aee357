"""Wrappers around a network that compute the same, and modules that hold no usable layers or weights."""

import sys

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from synq.common.error_text import some_of

_HOLDERS = frozenset(
    {"DataParallel", "DistributedDataParallel", "AveragedModel", "ModelEma", "ModelEmaV2", "ModelEmaV3"}
)
"""Classes, also of libraries, that run or average the network in their attribute ``module``."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside wrappers such as ``nn.DataParallel``, ``AveragedModel`` and ``torch.compile``.

    Args:
        module: A network, possibly in several wrappers; those around its parts stay (`unwrap_parts`).
    """
    module = inside(module)
    module._compiled_call_impl = None  # ``net.compile()``
    return module


def inside(module: nn.Module) -> nn.Module:
    """Return the network inside wrappers, as `unwrapped`, but unchanged: after ``net.compile()`` it stays compiled."""
    while (inner := _inner(module)) is not None:
        module = inner
    return module


def unwrap_parts(module: nn.Module) -> None:
    """Replace wrapped parts of a network by what is inside, in place."""
    for name, child in list(module._modules.items()):
        if child is not None:
            plain = unwrapped(child)
            module._modules[name] = plain
            unwrap_parts(plain)


def check_layers(module: nn.Module, spec: str, *, verb: str = "return") -> None:
    """Reject modules without layers or weights: TorchScript, the meta device, lazy modules.

    Args:
        module: The network.
        spec: Where it comes from, for messages.
        verb: What that must do, for messages: return a network, or be one.

    Raises:
        ValueError: If it is one of them, or has one inside.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            where = f"its part {name!r}" if name else "it"
            raise ValueError(
                f"{spec} must {verb} a network of layers, but {where} is TorchScript ({part.original_name}), a "
                "compiled program: give the Python class that it was made from, with its weights"
                + (" as `teacher.weights`" if verb == "return" else "")
            )
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    lazy = [name for name, tensor in tensors.items() if is_lazy(tensor)]
    if lazy:
        raise ValueError(
            f"{spec} must {verb} a network whose sizes are known, but it has lazy layers ({some_of(lazy)}): call it "
            f"once on a batch of images{' before it is returned' if verb == 'return' else ''}"
        )
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(
            f"{spec} must {verb} a network with weights, but {len(empty)} of its tensors are on the meta device, which "
            f"holds no values ({some_of(empty)}): build it without torch.device('meta')"
        )


def _inner(module: nn.Module) -> nn.Module | None:
    inside = None
    if any(kind.__name__ in _HOLDERS for kind in type(module).__mro__):
        inside = getattr(module, "module", None)
    elif "torch._dynamo" in sys.modules and type(module).__name__ == "OptimizedModule":  # torch.compile
        inside = getattr(module, "_orig_mod", None)
    return inside if isinstance(inside, nn.Module) else None
