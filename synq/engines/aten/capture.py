"""Capture of a student as PyTorch operators (ATen), in which every spelling of an operation is the same operator.

The student is exported by ``torch.export`` and decomposed into few operators. Its quantizers stay opaque: an activation
quantizer is one operator with the name of its module, and so is the weight of a quantized layer.
"""

import copy
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from synq.engines.aten.capture_key import capture_key
from synq.network.trace_errors import first_line
from synq.quant.layers import ActQuantizer, QuantConv2d, QuantLinear

BATCH = 61
"""Number of images of the captured graph: a prime that no other axis is likely to have, so that N is recognized."""
KEPT = frozenset(
    {"conv2d", "linear", "batch_norm", "prelu", "celu", "hardswish", "hardsigmoid", "silu", "mish", "softplus"}
    | {"log_sigmoid", "square", "softshrink", "hardshrink"}
    | {"adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d", "upsample_nearest2d", "_upsample_nearest_exact2d"}
    | {"pad", "roll", "select_scatter", "layer_norm", "matmul"}
)
"""Operators that are not decomposed, because a step of a program has their form."""


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A student as a graph of PyTorch operators.

    Attributes:
        graph: Functional, for ``BATCH`` images; each node has its output in ``meta["val"]``, without values.
        constants: Parameters, buffers and constants by the name of their placeholder.
        image: Name of the placeholder of the images.
        quantizers: Activation quantizers by name.
        layers: Quantized layers by name.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    image: str
    quantizers: dict[str, ActQuantizer]
    layers: dict[str, QuantConv2d | QuantLinear]


@dataclass(frozen=True)
class _Form:
    """What a captured graph is without the tensors of one student.

    Attributes:
        graph: As in `Captured`.
        image: As in `Captured`.
        names: Names of the tensors of a student by placeholder.
        constants: Tensors by name that are no student's, but made by its forward pass from numbers.
    """

    graph: fx.Graph
    image: str
    names: dict[str, str]
    constants: dict[str, Tensor]


MOST_FORMS = 32
"""Number of captured graphs that are kept, of those used last; each is some hundred nodes without values."""
_FORMS: dict[Hashable, _Form] = {}


@dataclass(frozen=True)
class Markers:
    """The operators that represent quantizers: f(tensor, name of the module) -> tensor."""

    activation: OpOverload
    weight: OpOverload


class _Marked(nn.Module):
    """Represents a quantizer while a student is captured."""

    def __init__(self, operator: OpOverload, name: str) -> None:
        super().__init__()
        self.operator, self.name = operator, name

    def forward(self, x: Tensor) -> Tensor:
        marked = self.operator(x, self.name)
        assert isinstance(marked, Tensor)
        return marked


@cache
def markers() -> Markers:
    """Return the operators that represent quantizers; they are registered at the first call."""
    library = torch.library.Library("synq", "DEF")
    for name in ("quantized_activation", "quantized_weight"):
        library.define(f"{name}(Tensor x, str name) -> Tensor")
        library.impl(name, lambda x, name: x.clone(), "CompositeExplicitAutograd")
    _LIBRARIES.append(library)  # its operators are removed when it is
    return Markers(torch.ops.synq.quantized_activation.default, torch.ops.synq.quantized_weight.default)


_LIBRARIES: list[torch.library.Library] = []


@torch.no_grad()
def capture(net: fx.GraphModule, input_size: tuple[int, int, int]) -> Captured:
    """Return a student as a graph of PyTorch operators; the student is not modified.

    Args:
        net: Network of a ``Student``, with observed ranges.
        input_size: (C, H, W) of one image.

    Raises:
        ValueError: If the network cannot be exported for another number of images than it was traced with.
    """
    student = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    quantizers = {name: module for name, module in student.named_modules() if isinstance(module, ActQuantizer)}
    layers = {name: module for name, module in student.named_modules() if isinstance(module, QuantConv2d | QuantLinear)}
    # One memory format, whatever the run has: a graph depends on it.
    marked = copy.deepcopy(student).to(memory_format=torch.contiguous_format)
    for name in quantizers:
        marked.set_submodule(name, _Marked(markers().activation, name))
    for name in layers:
        layer = marked.get_submodule(name)
        layer.weight_quantizer = _Marked(markers().weight, name)
    key = capture_key(marked.eval(), input_size)
    form = _exported(marked, input_size) if key is None or key not in _FORMS else _FORMS.pop(key)
    if key is not None:
        _FORMS[key] = form  # the last one used is the last to go
        if len(_FORMS) > MOST_FORMS:
            del _FORMS[next(iter(_FORMS))]
    held = {**_tensors(marked), **form.constants}
    return Captured(
        graph=form.graph,
        constants={placeholder: held[name].detach() for placeholder, name in form.names.items()},
        image=form.image,
        quantizers=quantizers,
        layers=layers,
    )


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}


def _exported(marked: nn.Module, input_size: tuple[int, int, int]) -> _Form:
    try:
        exported = torch.export.export(marked, (torch.zeros(BATCH, *input_size),), strict=False)
        exported = exported.run_decompositions(_decompositions())
    except Exception as error:  # torch.export raises many types, all with the same meaning for the user
        raise ValueError(
            f"the network must accept any number of images, but torch.export failed for {BATCH} of them: "
            f"{first_line(error)}: read the number of images from the tensor (x.shape[0], -1), or set `quant.target` "
            "to research, which exports any network"
        ) from error
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names |= signature.inputs_to_lifted_tensor_constants
    (image,) = signature.user_inputs
    own = _tensors(marked)
    held: dict[str, Any] = {**exported.state_dict, **exported.constants}
    return _Form(
        graph=exported.graph,
        image=str(image),
        names=names,
        constants={name: held[name] for name in names.values() if name not in own},
    )


def layer_of(node: fx.Node) -> str:
    """Return the name of the layer, or of the node of the student's graph, that an operator comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [str(path) for path, _ in stack.values() if path]
    return names[-1] if names else node.name


@cache
def _decompositions() -> dict[Any, Any]:
    table = torch.export.default_decompositions()
    return {operator: rule for operator, rule in table.items() if not _is_kept(operator)}


def _is_kept(operator: Any) -> bool:
    name = str(operator).split(".")
    return name[0] == "aten" and name[1] in KEPT


def nodes_in_order(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the operators of a captured graph, without those that only check something."""
    for node in graph.nodes:
        if node.op == "call_function" and not str(node.target).startswith("aten._assert"):
            yield node
