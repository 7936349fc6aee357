"""The integer form of a student: integer convolutions, each followed by a per-channel gain and shift.

During fine-tuning the student has float weights, fake-quantizes them in every forward pass, and convolves dequantized
floats. Summed in another order, such a convolution differs in its last digit; sometimes this changes the code of an
activation, the error propagates through the following layers, and one image in a thousand gets another class. The
integer form is the same network without this error: with the codes x of an activation, its scale s_x and zero_point
z_x, and the codes q of a weight, their scales s_c and zero points z_c per output channel,

    quantize     x = clamp(round(a / s_x) + z_x, 0, quant_max)
    layer        y_c = g_c sum (x - z_x) (q_c - z_c) + b_c

The sum is a sum of integers. Floats represent it exactly below 2^24, in any order and on any engine that adds products
(a Winograd or Fourier convolution does not), so that all engines give the same codes. Larger sums, which full 8-bit
ranges can reach, have the usual float rounding errors. Gain and shift combine all linear operations after the sum:
g_c = s_x s_c f_c if a batch norm of factor f_c follows the layer; b_c is the contribution of the bias and the batch
norm. They are computed in float64, rounded once, and applied as a multiplication and an addition.

Average pools that count their padding, or have a divisor, are written in a form that all engines compute in the same
way (`average_pools.py`).

Two cases are not folded. A layer whose input does not come directly from a quantizer (a float image, for example) reads
floats, and s_x is not part of its gain. A batch norm that has another reader, or that does not follow a layer, keeps a
separate gain and shift.
"""

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from synq.network.average_pools import scale_average_pools
from synq.network.functional_layers import bare_holder, replace_layer
from synq.network.op_traits import node_module
from synq.quant.integer_layers import (
    ChannelAffine,
    Codes,
    DequantizedActivation,
    IntegerActivation,
    IntegerConv2d,
    IntegerLinear,
    Operations,
)
from synq.quant.layers import ActQuantizer, QuantConv2d, QuantLinear
from synq.quant.placement import norm_after
from synq.quant.transformer.log_quantizer import LogQuantizer


@torch.no_grad()
def codes_of(layer: QuantConv2d | QuantLinear) -> Codes:
    """Return the integer codes, scale and zero_point of the weight of a student's layer, on the CPU."""
    quantizer = layer.weight_quantizer
    scale, zero_point = quantizer.qparams(layer.weight)
    return Codes(
        codes=quantizer.codes(layer.weight).to("cpu", torch.int8),
        scale=scale.to("cpu", torch.float32).clone(),
        zero_point=zero_point.to("cpu", torch.int32).clone(),
        bits=quantizer.bits,
    )


@torch.no_grad()
def integer_form(net: fx.GraphModule, *, operations: Operations = "plain", empty: bool = False) -> fx.GraphModule:
    """Return the integer form of a student's network; the student is not modified.

    Args:
        net: The network of a ``Student``, with observed ranges.
        operations: Operations in which it is written, see ``Operations``.
        empty: Whether ranges may be missing, for a form whose tensors are loaded afterwards.

    Returns:
        (N, C, H, W) -> logits (N, K), float32, on the CPU, in evaluation mode, without gradients. Every node keeps its
        name; batch norms that are folded into a gain are removed.

    Raises:
        RuntimeError: If an activation range has not been observed.
    """
    form = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    tensors = {
        str(node.target): _tensor_of(form, str(node.target)) for node in form.graph.nodes if node.op == "get_attr"
    }
    calls = [str(node.target) for node in form.graph.nodes if node.op == "call_module"]
    for node in list(form.graph.nodes):
        module, name = node_module(form, node), str(node.target)
        if isinstance(module, ActQuantizer):
            if not module.has_range and not empty:
                raise RuntimeError("activation ranges must be observed before conversion to the integer form")
            if not module.rounded or isinstance(module, LogQuantizer):  # floats, as in the student
                continue
            activation = IntegerActivation(module, operations)
            form.set_submodule(name, activation)
            _add_dequantize(form, node, activation, calls)
        elif isinstance(module, QuantConv2d | QuantLinear):
            norm = foldable_batch_norm(form, node, calls)
            batch_norm = None if norm is None else node_module(form, norm)
            codes = codes_of(module)
            source = node_module(form, node.all_input_nodes[0])
            scale = source.scale if isinstance(source, IntegerActivation) else 1.0
            affine = _affine(codes, scale, module.bias, batch_norm)
            if isinstance(module, QuantConv2d):
                replace_layer(form, name, IntegerConv2d(module, codes, *affine, operations))
            else:
                replace_layer(form, name, IntegerLinear(codes, *affine, operations))
            if norm is not None and batch_norm is not None:
                form.set_submodule(str(norm.target), bare_holder(batch_norm))
                norm.replace_all_uses_with(node)
                form.graph.erase_node(norm)
        elif isinstance(module, _BatchNorm) and module.running_var is not None:
            factor, offset = _factor_and_offset(module)
            replace_layer(form, name, ChannelAffine(factor.float(), offset.float()))
    for name, tensor in tensors.items():  # also if the layer that owned it was replaced
        owner, _, attribute = name.rpartition(".")
        if not hasattr(form.get_submodule(owner), attribute):
            form.get_submodule(owner).register_buffer(attribute, tensor)
    scale_average_pools(form)
    form.delete_all_unused_submodules()
    form.graph.lint()
    form.recompile()
    return form.eval()


def _tensor_of(net: fx.GraphModule, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    tensor = getattr(net.get_submodule(owner), attribute)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def _add_dequantize(form: fx.GraphModule, node: fx.Node, activation: IntegerActivation, calls: list[str]) -> None:
    """Dequantize the activation for all users but layers that are called once, which apply its scale in their gain.

    A layer that is called twice has one gain, but two input scales.
    """
    others = [
        user
        for user in node.users
        if not isinstance(node_module(form, user), QuantConv2d | QuantLinear) or calls.count(str(user.target)) > 1
    ]
    if not others:
        return
    target = f"activation_values.{node.name}"
    form.add_submodule(target, DequantizedActivation(activation))
    with form.graph.inserting_after(node):
        values = form.graph.call_module(target, (node,))
    values.meta = dict(node.meta)
    for user in others:
        user.replace_input_with(node, values)


def foldable_batch_norm(net: fx.GraphModule, node: fx.Node, calls: list[str]) -> fx.Node | None:
    """Return the batch norm that can be folded into the layer ``node``, or None.

    Both are called once, and the batch norm is the only user of the layer's output.

    Args:
        net: Network of a student, with recorded shapes.
        node: Call of a convolution or linear layer.
        calls: Targets of all ``call_module`` nodes of ``net``, repeated for each call.
    """
    norm = norm_after(net, node) if len(node.users) == 1 else None
    if norm is None or calls.count(str(node.target)) > 1 or calls.count(str(norm.target)) > 1:
        return None
    return norm


def _affine(
    codes: Codes, input_scale: float, bias: Tensor | None, norm: nn.Module | None
) -> tuple[Tensor, Tensor | None]:
    """Return gain and shift (C_out,) applied to a layer's sum of integers, as float32; a shift of None adds nothing.

    They are computed in float64 and rounded once.
    """
    gain = codes.scale.double() * input_scale
    shift = None if bias is None else bias.detach().double()
    if isinstance(norm, _BatchNorm):
        factor, offset = _factor_and_offset(norm)
        gain, shift = gain * factor, offset if shift is None else shift * factor + offset
    return gain.float(), None if shift is None else shift.float()


def _factor_and_offset(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return factor f and offset b, (C,) float64, of a batch norm in evaluation mode: f x + b."""
    assert norm.running_var is not None and norm.running_mean is not None
    factor = 1.0 / (norm.running_var.double() + norm.eps).sqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    offset = -norm.running_mean.double() * factor
    return factor, offset if norm.bias is None else offset + norm.bias.detach().double()
