"""Reference evaluation of integer programs in float64: dequantize, compute, round to the nearest code."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from synq.engines import program as p
from synq.quant.layers import ACT_QUANTIZERS, ActQuantizer

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "identity": lambda x: x,
    "affine": lambda x, factor, offset: x * factor + offset,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "erf": torch.erf,
    "log_sigmoid": F.logsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x, alpha, scale, input_scale: scale * torch.where(x > 0, x, alpha * torch.expm1(x * input_scale)),
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "pow": lambda x, exponent: x**exponent,
}


def evaluate(program: p.Program, images: Tensor, known: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return every value of a program in float64: codes of a value with a grid, else floats.

    Args:
        program: The program.
        images: (N, C, H, W).
        known: Values that later steps read instead of the computed ones, by name.
    """
    values, computed = {program.image: images.double()}, {}
    sums = [step for step in program.steps if isinstance(step, p.Sum) and step.unrounded is not None]
    unrounded = {step.inputs[step.unrounded] for step in sums if step.unrounded is not None}
    for step in program.steps:
        grids = [program.grids.get(name) for name in step.inputs]
        reals = [
            values[name] if grid is None else (values[name] - grid.zero_point) * grid.scale
            for name, grid in zip(step.inputs, grids, strict=True)
        ]
        grid = program.grids.get(step.output)
        result = _real(step, reals, grids)
        if grid is not None:
            result = result / grid.scale + grid.zero_point
            result = result if step.output in unrounded else result.round()
            low, high = (step.low, step.high) if isinstance(step, p.Limited) else (0, grid.quant_max)
            result = result.clamp(low, high)
        assert tuple(result.shape[1:]) == program.shapes[step.output], step
        assert len(result) == len(images)
        computed[step.output] = result
        values[step.output] = known[step.output].reshape(result.shape) if known and step.output in known else result
    return computed


def _real(step: p.Step, reals: list[Tensor], grids: list[p.Grid | None]) -> Tensor:
    x = reals[0]
    if isinstance(step, p.Quantize | p.Dequantize):
        return x
    if isinstance(step, p.Layer):
        return _layer(step, x, grids[0])
    if isinstance(step, p.Sum):
        return reals[0] + reals[1]
    if isinstance(step, p.Product):
        return reals[0] * reals[1]
    if isinstance(step, p.Concatenation):
        return torch.cat(reals, step.axis)
    if isinstance(step, p.GlobalAveragePool):
        return x.mean((2, 3), keepdim=True)
    if isinstance(step, p.AveragePool):
        return _average(step, x)
    if isinstance(step, p.Elementwise):
        return FUNCTIONS[step.function](x, **step.arguments)
    return _moved(step, x)


def _layer(step: p.Layer, x: Tensor, grid: p.Grid | None) -> Tensor:
    assert grid is not None
    product = (torch.tensor(grid.scale, dtype=torch.float32) * step.weight_scale).double()
    sums = x / grid.scale
    weight = step.weight.double()
    if isinstance(step, p.Dense):
        return (F.linear(sums, weight) + step.bias) * product
    assert isinstance(step, p.Convolution)
    top, left, bottom, right = step.padding
    sums = F.conv2d(F.pad(sums, (left, right, top, bottom)), weight, None, step.stride, 0, step.dilation, step.groups)
    return (sums + step.bias[:, None, None]) * product[:, None, None]


def _average(step: p.AveragePool, x: Tensor) -> Tensor:
    top, left, bottom, right = step.padding
    edges = (left, right, top, bottom)
    sums = F.avg_pool2d(F.pad(x, edges), step.kernel, step.stride, divisor_override=1)
    ones = torch.ones_like(x) if not step.count_padding else None
    counted = F.pad(ones, edges) if ones is not None else torch.ones_like(F.pad(x, edges))
    return sums / F.avg_pool2d(counted, step.kernel, step.stride, divisor_override=1)


def _moved(step: p.Step, x: Tensor) -> Tensor:
    if isinstance(step, p.MaxPool):
        top, left, bottom, right = step.padding
        inside = F.pad(x, (left, right, top, bottom), value=float("-inf"))
        return F.max_pool2d(inside, step.kernel, step.stride, 0, step.dilation)
    if isinstance(step, p.Reshape):
        return x.reshape(-1, *step.shape)
    if isinstance(step, p.Transpose):
        return x.permute(step.axes)
    if isinstance(step, p.Slice):
        return x[(slice(None),) * step.axis + (slice(step.start, step.stop, step.step),)]
    if isinstance(step, p.Pad):
        pairs = [n for b, a in zip(reversed(step.before), reversed(step.after), strict=True) for n in (b, a)]
        return F.pad(x, pairs)
    assert isinstance(step, p.NearestResize), step
    return x.repeat_interleave(step.factors[0], 2).repeat_interleave(step.factors[1], 3)


def student_codes(net: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """Return the codes of every activation quantizer of a student, in float64, by the name of its node."""
    codes: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            quantizer = net.get_submodule(str(n.target)) if n.op == "call_module" else None
            if isinstance(quantizer, ActQuantizer):
                scaled = value.double() / quantizer.scale.double() + int(quantizer.zero_point)
                codes[str(n.target).removeprefix(ACT_QUANTIZERS)] = scaled.round() if quantizer.rounded else scaled
            return value

    Recorder(net).run(images)
    return codes


def disagreements(net: fx.GraphModule, program: p.Program, images: Tensor) -> dict[str, tuple[float, float]]:
    """Return, for each value that a quantizer rounds, how a program that is given the student's codes differs.

    Each step reads the codes of the student, so that no difference is passed on.

    Returns:
        By name the share (0..1) of codes that differ, and the largest difference; of the logits, the largest difference
        relative to the largest logit, twice.
    """
    known = student_codes(net, images)
    values = evaluate(program, images, known)
    found: dict[str, tuple[float, float]] = {}
    for name, expected in known.items():
        if name in program.shapes:
            difference = (values[name].reshape(expected.shape) - expected).abs()
            found[name] = (float((difference > 1e-3).double().mean()), float(difference.max()))
    logits = net(images).double()
    error = float((values[program.logits] - logits).abs().max() / logits.abs().max())
    return {**found, program.logits: (error, error)}
