"""Batch norms that are called as functions on the tensors of one module, turned into layers that every rule knows.

timm writes its batch norms so, with the activation inside the module:

    bn: weight, bias, running_mean, running_var, act       F.batch_norm(x, bn.running_mean, ...), then bn.act
 -> bn: nn.BatchNorm2d with the same tensors, and act      bn(x), then bn.act
"""

import inspect

import torch.nn.functional as F
from torch import fx, nn

STATISTICS, AFFINE = ("running_mean", "running_var"), ("weight", "bias")


def norms_as_layers(traced: fx.GraphModule) -> None:
    """Turn ``F.batch_norm`` on the tensors of one module into a BatchNorm2d of that name, in place.

    It holds the same tensors under the same names, so files of weights fit as before. Calls that leave one of them out, or take them
    from elsewhere, stay as they are.

    Args:
        traced: A graph in evaluation mode whose nodes carry shapes in ``meta["shape"]``.
    """
    signature = inspect.signature(F.batch_norm)
    for node in list(traced.graph.nodes):
        if node.op != "call_function" or node.target is not F.batch_norm or len(node.meta.get("shape") or ()) != 4:
            continue
        bound = signature.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        call = bound.arguments
        name = _owner({field: call[field] for field in (*STATISTICS, *AFFINE)})
        if call["training"] or name is None:
            continue
        holder = traced.get_submodule(name)
        used = {field for field in AFFINE if call[field] is not None}
        if not _is_norm(holder, used):
            continue
        if type(holder) is nn.Module:  # of torch.fx: a bare holder of tensors and of what is called below it
            traced.set_submodule(name, _batch_norm_of(holder, call["eps"]))
        elif not isinstance(holder, nn.BatchNorm2d) or holder.eps != call["eps"]:
            continue
        node.op, node.target, node.args, node.kwargs = "call_module", name, (call["input"],), {}


def bare_holder(module: nn.Module) -> nn.Module:
    """Return a module with the submodules of ``module`` and none of its tensors."""
    holder = nn.Module()
    for name, child in module.named_children():
        holder.add_module(name, child)
    return holder


def _owner(fields: dict[str, object]) -> str | None:
    """Return the name of the one module whose tensors these are, each under its own name."""
    owners = set()
    for field, source in fields.items():
        if source is None and field in AFFINE:
            continue
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return None
        owner, _, attribute = str(source.target).rpartition(".")
        if attribute != field:
            return None
        owners.add(owner)
    return owners.pop() if len(owners) == 1 and "" not in owners else None


def _is_norm(holder: nn.Module, used: set[str]) -> bool:
    """Tell whether a module holds statistics as buffers, and as parameters just the affine tensors that are used."""
    buffers, parameters = dict(holder.named_buffers(recurse=False)), dict(holder.named_parameters(recurse=False))
    held = {field for field in AFFINE if getattr(holder, field, None) is not None}
    return set(STATISTICS) <= buffers.keys() and held == used and used <= parameters.keys()


def _batch_norm_of(holder: nn.Module, eps: float) -> nn.BatchNorm2d:
    """Return a BatchNorm2d with the very tensors and submodules of ``holder``."""
    variance = holder.get_buffer("running_var")
    norm = nn.BatchNorm2d(len(variance), eps=eps, affine=False, device=variance.device, dtype=variance.dtype).eval()
    norm.affine = bool(holder._parameters)
    for name, parameter in holder.named_parameters(recurse=False):
        norm.register_parameter(name, parameter)
    for name, buffer in holder.named_buffers(recurse=False):
        norm.register_buffer(name, buffer)
    for name, child in holder.named_children():
        norm.add_module(name, child)
    return norm
