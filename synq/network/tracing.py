"""Tracing of a classifier into a ``torch.fx`` graph.

Everything that reads or rewrites a network uses this graph: activations written as functions (``F.relu(x)``,
``x.relu_()``) are nodes like any module, so that no rule about operations can miss one.
"""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from synq.common.error_text import first_line
from synq.network.aliases import Aliases
from synq.network.attention.decomposed import decompose_attention
from synq.network.attention.token_map import TOKEN_MAP, write_as_map
from synq.network.functional_layers import functions_as_layers
from synq.network.normal_form import keep_image_axis, to_normal_form
from synq.network.op_recorder import record_traits
from synq.network.op_traits import OpKind, node_module, traits_of
from synq.network.outputs import drop_log_softmax
from synq.network.slopes import limit_slopes
from synq.network.trace_errors import trace_failure
from synq.network.tracers import LayerTracer, SizedTracer, image_parameter


class FeatureTap(nn.Module):
    """Identity whose output requires a gradient.

    In a frozen teacher nothing requires a gradient, but the autograd CAM needs d logit / d A. With gradients enabled, A
    becomes a leaf here, so that autograd records only the head; in a student A already has its graph.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return ``features`` (N, C, H, W) unchanged in value."""
        if torch.is_grad_enabled() and not features.requires_grad:
            return features.detach().requires_grad_()
        return features


class _ValueRecorder(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.aliases = Aliases()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        n.meta["dtype"] = value.dtype if isinstance(value, Tensor) else None
        self.aliases.record(n, value)
        return value


def trace_classifier(module: nn.Module, input_size: tuple[int, int, int]) -> fx.GraphModule:
    """Trace a classifier in evaluation mode; parameters and buffers are shared with ``module``.

    Its one input is the images: further arguments of the forward pass have their defaults. The graph is in normal form
    (`normal_form.py`): arguments by position, no in-place operation, and a batch of one image keeps its axis. A batch
    norm or convolution that is called as a function on the tensors of one module (timm's layers, which add an
    activation or a padding) becomes a layer. Where a function has no finite slope, as a root at zero, its gradient is
    zero (`slopes.py`). Nodes that the logits do not depend on are removed: they cost time, and
    parameters without a gradient stop a distributed run; so is a log-softmax at the end. Every node has the shape of
    its output for a batch of two in ``meta["shape"]`` and what it does to values in ``meta["traits"]``.

    Args:
        module: Classifier mapping (N, C, H, W) to logits (N, K). Put into evaluation mode.
        input_size: (C, H, W) of one image.

    Returns:
        A graph module that computes the same logits (the logits of a network that returns log-probabilities).

    Raises:
        ValueError: If the forward pass depends on tensor values, fails on ``input_size``, or does not return one
            (N, K) tensor; if a weight is computed from other tensors, or a layer has a hook.
    """
    module.eval()
    image_parameter(type(module).forward)
    check_plain_weights(module)
    sample = torch.zeros(2, *input_size, dtype=_first_dtype(module), device=_first_device(module))
    traced = _recorded_graph(module, sample, frozenset())
    inlined = _opaque_functions(traced)
    while inlined:
        try:
            traced = _recorded_graph(module, sample, inlined)
        except ValueError:  # such a function may be wrapped because it cannot be traced
            break
        found = inlined | _opaque_functions(traced)
        inlined = frozenset() if found == inlined else found
    limit_slopes(traced)
    drop_log_softmax(traced, sample)
    return traced


def _recorded_graph(module: nn.Module, sample: Tensor, inlined: frozenset[Callable[..., Any]]) -> fx.GraphModule:
    """Return the graph of a classifier in normal form, with the traits of its operations."""
    name, input_size = type(module).__name__, (sample.shape[1], sample.shape[2], sample.shape[3])
    graph = _trace(module, sample, inlined)
    traced = fx.GraphModule(module, graph, class_name=name).eval()
    recorder = _ValueRecorder(traced)
    with accepting(name, input_size):
        logits = recorder.run(sample)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 2:
        raise ValueError(
            f"teacher must return one (N, classes) tensor of logits, but {name} returned {_describe(logits)}"
        )
    _check_no_hooks(traced)
    to_normal_form(traced, recorder.aliases)
    if decompose_attention(traced):
        with accepting(name, input_size):
            _ValueRecorder(traced).run(sample)
    functions_as_layers(traced)
    traced.graph.eliminate_dead_code()
    if not _accepts_one_image(traced, sample, logits):
        keep_image_axis(traced)
    traced.delete_all_unused_submodules()
    _own_memory(traced)
    traced.recompile()
    record_traits(traced, sample)
    return traced


def _opaque_functions(traced: fx.GraphModule) -> frozenset[Callable[..., Any]]:
    """Return the functions outside PyTorch that torch.fx recorded as one operation, which cannot be quantized."""
    found = set()
    for node in traced.graph.nodes:
        opaque = node.op == "call_function" and isinstance(node.target, FunctionType)
        if opaque and traits_of(node).kind is OpKind.UNKNOWN and not node.target.__module__.startswith("torch."):
            found.add(node.target)
    return frozenset(found)


def _trace(module: nn.Module, sample: Tensor, inlined: frozenset[Callable[..., Any]]) -> fx.Graph:
    """Trace symbolically, or, if the code needs sizes, for images of the size of ``sample``."""
    try:
        return LayerTracer(inlined).trace(module)
    except Exception as error:  # torch.fx raises many types, all with the same meaning for the user
        channels, height, width = sample.shape[1:]
        with accepting(type(module).__name__, (channels, height, width)):
            module(sample.clone())
        try:
            return SizedTracer(sample, inlined).trace(module)
        except Exception as second:  # this tracer knows the sizes, so only what it cannot trace is a fault
            raise trace_failure(type(module).__name__, second) from error


def _own_memory(traced: fx.GraphModule) -> None:
    """Give tensors whose elements share memory, as those of `expand`, memory for each: no state could be loaded."""
    for tensor in (*traced.parameters(), *traced.buffers()):
        if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
            tensor.data = tensor.data.contiguous()


@torch.no_grad()
def _accepts_one_image(traced: fx.GraphModule, sample: Tensor, logits: Tensor) -> bool:
    """Return whether a graph has logits (1, K) for a single image, as it has logits (2, K) for two."""
    try:
        single = traced.forward(sample[:1].clone())  # a call would print where in the graph's code it fails
    except (RuntimeError, IndexError, ValueError, TypeError):  # an operation found an axis too few
        return False
    return isinstance(single, Tensor) and single.shape == (1, logits.shape[1])


def check_plain_weights(module: nn.Module) -> None:
    """Raise on layers whose weight or bias is computed from other tensors (weight norm, spectral norm, pruning).

    Raises:
        ValueError: If there is one; the message names it.
    """
    for name, part in module.named_modules():
        if not isinstance(part, (_ConvNd, nn.Linear, _BatchNorm)):
            continue
        for field in ("weight", "bias"):
            tensor = getattr(part, field, None)
            if isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter) and field not in part._buffers:
                raise ValueError(
                    f"teacher must have plain weights, but the {field} of layer {name!r} is computed from other "
                    "tensors (weight norm, spectral norm, pruning): remove the parametrization first, for example by "
                    "torch.nn.utils.parametrize.remove_parametrizations"
                )


def batchnorm_parameters(traced: fx.GraphModule) -> list[nn.Parameter]:
    """Return the affine parameters of all batch norms, both layers and ``F.batch_norm`` calls, each once."""
    found: dict[nn.Parameter, None] = {}
    for module in traced.modules():
        if isinstance(module, _BatchNorm):
            found.update(dict.fromkeys(module.parameters(recurse=False)))
    parameters = dict(traced.named_parameters(remove_duplicate=False))
    for node in traced.graph.nodes:
        if node.op == "call_function" and traits_of(node).kind is OpKind.NORM:
            sources = (parameters.get(str(n.target)) for n in node.all_input_nodes if n.op == "get_attr")
            found.update(dict.fromkeys(p for p in sources if p is not None))
    return list(found)


def with_features(traced: fx.GraphModule, node_name: str, others: Sequence[str] = ()) -> fx.GraphModule:
    """Return a network that also returns features: (logits (N, K), features (N, C, H, W), outputs of ``others``...).

    Parameters and submodules are shared with ``traced``; no hook is installed.

    Args:
        traced: A graph of a teacher or a student.
        node_name: Node whose output is the features.
        others: More nodes whose outputs are returned.

    Raises:
        ValueError: If there is no such node.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    logits = graph.graph_copy(traced.graph, copies)
    by_name = {node.name: copy for node, copy in copies.items()}
    missing = [name for name in (node_name, *others) if name not in by_name]
    if missing:
        raise ValueError(f"features must come from a node of the graph, but there is none called {missing[0]!r}")
    tapped = by_name[node_name]
    token_map = next(node for node in traced.graph.nodes if node.name == node_name).meta.get(TOKEN_MAP)
    if token_map is not None:
        tapped = write_as_map(graph, tapped, token_map)
    with graph.inserting_after(tapped):
        tap = graph.call_module("feature_tap", (tapped,))
    tapped.replace_all_uses_with(tap, delete_user_cb=lambda user: user is not tap)
    outputs = (logits, *(by_name[name] for name in others))
    graph.output(
        (outputs[0] if outputs[0] is not tapped else tap, tap, *(tap if o is tapped else o for o in outputs[1:]))
    )
    root = nn.Module()
    for name, child in traced.named_children():
        root.add_module(name, child)
    for name, parameter in traced.named_parameters(recurse=False):
        root.register_parameter(name, parameter)
    for name, buffer in traced.named_buffers(recurse=False):
        root.register_buffer(name, buffer)
    root.add_module("feature_tap", FeatureTap())
    return fx.GraphModule(root, graph, class_name=f"{type(traced).__name__}WithFeatures").eval()


def with_outputs(traced: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """Return a network that also returns the outputs of nodes: (logits (N, K), outputs...).

    Parameters and submodules are shared with ``traced``; no hook is installed.

    Args:
        traced: A graph of a teacher or a student.
        names: Names of nodes.

    Raises:
        ValueError: If there is no such node.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    logits = graph.graph_copy(traced.graph, copies)
    by_name = {node.name: copy for node, copy in copies.items()}
    missing = [name for name in names if name not in by_name]
    if missing:
        raise ValueError(f"features must come from a node of the graph, but there is none called {missing[0]!r}")
    graph.output((logits, *(by_name[name] for name in names)))
    return fx.GraphModule(traced, graph, class_name=f"{type(traced).__name__}WithOutputs").eval()


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the input nodes of ``node`` whose values are tensors, in order."""
    return [source for source in node.all_input_nodes if source.meta.get("shape") is not None]


def _check_no_hooks(traced: fx.GraphModule) -> None:
    for node in traced.graph.nodes:
        module = node_module(traced, node)
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            raise ValueError(
                f"teacher must compute in its forward passes, but layer {node.target!r} ({type(module).__name__}) "
                "carries a forward hook, which its quantized form would lose: remove the hook or write it into the "
                "forward pass"
            )


@contextmanager
def accepting(name: str, input_size: tuple[int, int, int]) -> Iterator[None]:
    """Raise a ValueError for the user if a forward pass on images of ``input_size`` in the ``with`` block fails."""
    try:
        with torch.no_grad():
            yield
    except Exception as error:  # a forward pass may raise anything
        raise ValueError(
            f"teacher must accept images of size {tuple(input_size)}, but {name} failed on them: {first_line(error)}"
        ) from error


def output_getters(returned: object) -> dict[str, Callable[[Any], Any]]:
    """Return a getter for each value that a forward pass returned, by key, field name or position.

    Empty if it returned a single value.
    """
    if isinstance(returned, Mapping):
        return {str(key): operator.itemgetter(key) for key in returned}
    if dataclasses.is_dataclass(returned):
        return {field.name: operator.attrgetter(field.name) for field in dataclasses.fields(returned)}
    if not isinstance(returned, Sequence):
        return {}
    positions = {str(index): operator.itemgetter(index) for index in range(len(returned))}
    names = {name: operator.itemgetter(index) for index, name in enumerate(getattr(returned, "_fields", ()))}
    return {**names, **positions}


def _describe(returned: object) -> str:
    if isinstance(returned, Tensor):
        return f"one of shape {tuple(returned.shape)}"
    kind, keys = type(returned).__name__.removeprefix("immutable_"), list(output_getters(returned))
    return f"a {kind}" + (f"; name the one in it by `teacher.output`: {', '.join(keys)}" if keys else "")


def _first_dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)


def _first_device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
