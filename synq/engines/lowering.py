"""Lowering of a student to the integer program of an engine.

The student's quantizers decide where values are rounded (`quant.target`); lowering only writes down what is computed
between them. It reads PyTorch's operators, not the network's code (`aten/capture.py`), so that no spelling is unknown.
"""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from synq.config.quant import FLOAT_TRUNKS
from synq.engines.aten.arithmetic import ARITHMETIC
from synq.engines.aten.builder import Builder
from synq.engines.aten.capture import BATCH, Captured, capture, layer_of, markers, nodes_in_order
from synq.engines.aten.floats import FLOATS
from synq.engines.aten.layers import LayerWeight, batch_norm, convolution, dense
from synq.engines.aten.moves import MOVES
from synq.engines.aten.pointwise import POINTWISE
from synq.engines.aten.pools import POOLS
from synq.engines.aten.symbols import (
    UNIT,
    Call,
    Codes,
    OperatorRejectedError,
    Pending,
    Symbol,
    Turned,
    made,
    quantized_image,
)
from synq.engines.aten.turned import TURNED, permute
from synq.engines.checks import validate
from synq.engines.kernels import check_kernels
from synq.engines.narrowing import narrowed
from synq.engines.program import Convolution, Elementwise, Grid, Pad, Program, Rejected, Step, Sum
from synq.network.aten_groups import CONSTANTS
from synq.quant.fake_quant import SCALE_EPS
from synq.quant.float_trunk import has_float_trunk, without_trunk
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer

IMAGE, LOGITS = "images", "logits"
"""Names of the input and output of programs."""
MERGED = {
    *("view", "_unsafe_view", "reshape", "flatten", "unflatten", "unsqueeze", "permute", "clone", "alias", "detach"),
    *("contiguous", "dropout", "linear", "layer_norm", "_softmax", "matmul", "add", "sub", "mul", "div", *POINTWISE),
}
"""Operators that work on the last axes only, and so may read windows or tokens of all images along the first axis."""
_LOWERINGS: dict[str, Callable[[Builder, Call], Any]] = {
    **MOVES,
    **ARITHMETIC,
    **POINTWISE,
    **POOLS,
    **FLOATS,
    "permute": permute,
    "conv2d": convolution,
    "linear": dense,
    "_native_batch_norm_legit_no_training": batch_norm,
    "batch_norm": batch_norm,
}


@torch.no_grad()
def lower(net: fx.GraphModule, target: str, input_size: tuple[int, int, int], *, largest_code: int = 127) -> Program:
    """Return the integer program of a student; the student is not modified.

    Values have the names of the nodes whose quantizer rounds them. Scales are the float32 values of the quantizers. A
    batch norm after a layer is folded into it, any other is a depthwise 1 x 1 convolution.

    Args:
        net: Network of a ``Student`` whose quantizers were placed for ``target``, with observed ranges.
        target: Name of the engine, one of `synq.config.quant.TARGETS`.
        input_size: (C, H, W) of one image.
        largest_code: Weight code of batch norms that become layers, 1..127: 64 where sums of two products must fit into
            16 bits.

    Raises:
        ValueError: If an operation has no integer form, or the engine no kernel, or a range has not been observed.
    """
    program, _ = _lowered(net, target, input_size, largest_code, survey=False)
    validate(program)
    check_kernels(program)
    return program


@torch.no_grad()
def survey(
    net: fx.GraphModule, target: str, input_size: tuple[int, int, int], *, largest_code: int = 127
) -> tuple[Program, str]:
    """Return the steps of a student for an engine with those that have no form among them, as `Rejected`.

    Args:
        net: As for `lower`; so are the other arguments.
        target: See there.
        input_size: See there.
        largest_code: See there.

    Returns:
        The program, which cannot be run or written if a step is rejected, and why it ends before the logits; "" if it
        does not.

    Raises:
        ValueError: If a range has not been observed.
    """
    return _lowered(net, target, input_size, largest_code, survey=True)


def _lowered(
    net: fx.GraphModule, target: str, input_size: tuple[int, int, int], largest_code: int, *, survey: bool
) -> tuple[Program, str]:
    if has_float_trunk(net) and target not in FLOAT_TRUNKS:
        raise ValueError(without_trunk(net, target))
    captured = capture(net, input_size)
    unobserved = [name for name, quantizer in captured.quantizers.items() if not quantizer.has_range]
    if unobserved:
        raise ValueError(f"activation ranges must be observed, but {unobserved[0]} has none: call observe_ranges first")
    trunk = target in FLOAT_TRUNKS and has_float_trunk(net)
    builder = Builder(target=target, largest_code=largest_code, float_trunk=trunk)
    lowering, end = _Lowering(captured, builder, survey=survey), ""
    try:
        logits = lowering.run(input_size)
    except OperatorRejectedError as error:
        if not survey:
            raise
        logits, end = "", str(error)
    steps = _without_padding_steps(builder.steps, builder.shapes)
    steps = _needed(steps, logits) if logits else steps
    shapes, grids = builder.shapes, builder.grids
    if trunk:
        steps, shapes, grids = narrowed(steps, shapes, grids)
    floats = {step.output for step in steps if isinstance(step, Convolution) and step.output not in builder.grids}
    steps = _with_unrounded(steps, lowering.unrounded | floats)
    names = {IMAGE, *(step.output for step in steps)}
    program = Program(
        target=target,
        image=IMAGE,
        logits=logits,
        steps=tuple(steps),
        grids={name: grid for name, grid in grids.items() if name in names},
        shapes={name: shape for name, shape in shapes.items() if name in names},
    )
    return program, end


class _Lowering:
    """Walks over the operators of a student, with a symbol or constant for each tensor."""

    def __init__(self, captured: Captured, builder: Builder, *, survey: bool) -> None:
        self.captured, self.builder, self.survey = captured, builder, survey
        self.values: dict[fx.Node, Any] = {}
        self.unrounded: set[str] = set()  # values that their quantizers only clamp

    def run(self, input_size: tuple[int, int, int]) -> str:
        """Lower all operators; return the name of the logits."""
        self.builder.shapes[IMAGE] = input_size
        for node in self.captured.graph.nodes:
            if node.op == "placeholder":
                is_image = node.name == self.captured.image
                self.values[node] = (
                    quantized_image(IMAGE, input_size) if is_image else self.captured.constants[node.name]
                )
        for node in nodes_in_order(self.captured.graph):
            self.values[node] = self._value(node)
        output = self.captured.graph.output_node()
        logits = self.values[output.args[0][0]]  # type: ignore[index]
        if isinstance(logits, Tensor) or logits.shape != tuple(output.args[0][0].meta["val"].shape[1:]):  # type: ignore
            raise ValueError("the logits must depend on the image, but they are a constant")
        return self.builder.finished(logits, LOGITS).name

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = tree_map(lambda a: self.values[a] if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
        if node.target is operator.getitem:
            return args[0][args[1]]
        if node.target is markers().weight:
            return LayerWeight(args[1], self.captured.layers[args[1]])
        if node.target is markers().activation:
            return self._quantized(args[0], args[1])
        symbols = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Pending | Codes | Turned)]
        function: Any = node.target
        name = function._schema.name.split("::")[1]
        if not symbols and not any(isinstance(leaf, LayerWeight) for leaf in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        if name in CONSTANTS:  # reads the shape only
            first = node.args[0]
            assert isinstance(first, fx.Node)
            return function(torch.zeros(first.meta["val"].shape), *args[1:], **kwargs)
        outputs = [value for value in tree_leaves(node.meta["val"]) if isinstance(value, Tensor)]
        sources = [source for source in node.all_input_nodes if isinstance(self.values[source], Pending | Codes)]
        call = Call(
            merged=any(source.meta["val"].shape[0] != BATCH for source in sources),
            operator=function,
            args=args,
            kwargs=kwargs,
            outputs=None,
            activations=frozenset(),
            layer=layer_of(node),
            shapes=tuple(tuple(value.shape) for value in outputs),
        )
        try:
            if call.name not in _LOWERINGS or (call.name in FLOATS and not self.builder.float_trunk):
                self.builder.reject(call, "the operator is unknown to it")
            if any(isinstance(symbol, Turned) for symbol in symbols):
                if call.name not in TURNED:
                    self.builder.reject(call, "its input has the axis of the images in another place than the first")
                return TURNED[call.name](self.builder, call)
            if call.merged and call.name not in MERGED:
                self.builder.reject(call, "its input has windows or tokens of all images along one axis")
            return _LOWERINGS[call.name](self.builder, call)
        except OperatorRejectedError as error:
            if not self.survey:
                raise
            plain = [symbol.symbol if isinstance(symbol, Turned) else symbol for symbol in symbols]
            results = self._rejected(call, plain, error)
            return results if isinstance(node.meta["val"], list | tuple) else results[0]

    def _rejected(self, call: Call, symbols: list[Symbol], error: OperatorRejectedError) -> list[Pending]:
        """Return results in place of those of an operator without a form, so that a survey can go on after it.

        Raises:
            OperatorRejectedError: If the results are not one for each image: nothing is known of what reads them.
        """
        inputs = tuple(
            symbol.name if isinstance(symbol, Codes) else self.builder.round(symbol, UNIT, symbol.template.layer).name
            for symbol in symbols
        )
        step = Rejected(inputs=inputs, output="", layer=call.layer, operator=call.name, reason=error.reason)
        if any(shape[:1] != (BATCH,) for shape in call.shapes):
            self.builder.round(made(step, call.shapes[0]), None, call.layer)
            raise error
        return [made(step, shape[1:]) for shape in call.shapes]

    def _quantized(self, value: Any, module: str) -> Symbol:
        """Return the codes that a quantizer makes of its input."""
        name = module.removeprefix(ACT_QUANTIZERS)
        if isinstance(value, Tensor | Turned):
            raise ValueError(f"a quantizer must read an activation, but {name} reads a constant")
        quantizer = self.captured.quantizers[module]
        grid = grid_of(quantizer)
        if isinstance(value, Codes):
            if value.grid == grid:
                return value
            step = Elementwise(inputs=(value.name,), output="", layer=name, function="identity")
            value = made(step, value.shape)
        assert isinstance(value, Pending)
        codes = self.builder.round(value, grid, name)
        if not quantizer.rounded:
            self.unrounded.add(codes.name)
        return codes


def grid_of(quantizer: ActQuantizer) -> Grid:
    """Return the grid of an activation quantizer with an observed range."""
    scale = quantizer.scale.detach().float().clamp(min=SCALE_EPS)
    return Grid(scale=float(scale), zero_point=int(quantizer.zero_point), quant_max=quantizer.quant_max)


def _without_padding_steps(steps: list[Step], shapes: dict[str, tuple[int, ...]]) -> list[Step]:
    """Let convolutions read what a `Pad` of height and width reads, and pad themselves."""
    pads = {step.output: step for step in steps if isinstance(step, Pad) and len(step.before) == 4}
    result: list[Step] = []
    for step in steps:
        while isinstance(step, Convolution) and step.inputs[0] in pads:
            pad = pads[step.inputs[0]]
            if pad.before[1] or pad.after[1]:
                break
            added = (*pad.before[2:], *pad.after[2:])
            top, left, bottom, right = (p + a for p, a in zip(step.padding, added, strict=True))
            step = replace(step, inputs=pad.inputs, padding=(top, left, bottom, right))
        result.append(step)
    return result


def _needed(steps: list[Step], logits: str) -> list[Step]:
    """Return the steps that the logits depend on."""
    needed, kept = {logits}, []
    for step in reversed(steps):
        if step.output in needed:
            needed.update(step.inputs)
            kept.append(step)
    return kept[::-1]


def _with_unrounded(steps: list[Step], clamped: set[str]) -> list[Step]:
    """Mark the input of each sum that is fused into it, and therefore limited but not rounded, or in floats.

    Raises:
        ValueError: If another step than one sum reads such a value.
    """
    result: list[Step] = []
    for step in steps:
        fused = [place for place, name in enumerate(step.inputs) if name in clamped]
        if fused and (not isinstance(step, Sum) or len(fused) > 1):
            raise ValueError(
                f"activation {step.inputs[fused[0]]!r} must be rounded, because {type(step).__name__} of "
                f"{step.layer!r} reads it, but its quantizer only clamps: build the student for its target again"
            )
        result.append(replace(step, unrounded=fused[0]) if fused and isinstance(step, Sum) else step)
    return result
