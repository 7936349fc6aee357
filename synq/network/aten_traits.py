"""Traits of PyTorch's operators (ATen), to which every function, method and module comes down when it is executed.

The tables are complete by construction: views are known by their schema, element-wise functions by PyTorch's tag, and
what a table names is one operator whatever calls it. An operator that is in none of them is unknown, and a network that
applies it to an activation is rejected by name.

Adding an operator is one word in the group of its kind; `tests/network/test_aten_traits.py` compares the traits of all
functions of PyTorch that map a tensor to a tensor with what they do to numbers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from synq.network.op_traits import OpKind, OpTraits


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONSTANTS = _words(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided fill zero "
    "_new_zeros_with_same_feature_meta"
)
"""Read the shape, type and device of a tensor, and none of its values."""
EMPTY = _words("empty empty_strided empty_permuted empty_like new_empty new_empty_strided")
"""Return memory that is not written yet."""
PASSIVE = _words(
    "alias clone detach lift lift_fresh squeeze unsqueeze view _unsafe_view _reshape_alias _reshape_copy _to_copy "
    "_lazy_clone dequantize nan_to_num"  # activations are finite, which the observers check
)
"""Keep all values and their order."""
PASSIVE_IF_ALL = _words("expand slice select repeat unfold as_strided narrow split split_with_sizes unbind")
"""Keep the order of the values; passive where they keep their number, too."""
RESAMPLING_MOVES = _words(
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d"
)
PADS = _words(
    "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d"
)
MOVES = (
    PASSIVE_IF_ALL
    | RESAMPLING_MOVES
    | PADS
    | _words(
        "cat stack _stack block_diag repeat_interleave roll flip rot90 index _unsafe_index index_select gather take "
        "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle tril triu diag_embed im2col copy "
        "max_unpool2d max_unpool3d scatter slice_scatter select_scatter diagonal_scatter as_strided_scatter index_copy "
        "index_fill index_put _index_put_impl _unsafe_index_put put masked_scatter masked_fill where unsafe_split "
        "unsafe_split_with_sizes "
        "_unsafe_masked_index"
    )
)
"""Move, repeat or leave out values of their inputs, and fill in constants. Views are moves too, by their schema."""
ACCUMULATING = _words("index_put _index_put_impl _unsafe_index_put put")
"""Moves that add values up if their argument ``accumulate`` is set."""
MAX_POOLS = _words(
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d "
    "fractional_max_pool3d mkldnn_max_pool2d mkldnn_max_pool3d"
)
ORDER_REDUCTIONS = _words("amax amin aminmax max min median nanmedian kthvalue mode")
ORDER_STATISTICS = MAX_POOLS | ORDER_REDUCTIONS | _words("sort topk cummax cummin")
"""Choose values of one tensor by their order."""
CHOICES = _words("maximum minimum fmax fmin")
"""Choose between two tensors, element by element."""
AVERAGE_POOLS = _words("avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d mkldnn_adaptive_avg_pool2d")
INTERPOLATIONS = _words(
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa _upsample_lanczos2d_aa"
)
LINEAR_REDUCTIONS = _words("mean sum nansum")
LINEAR = (
    AVERAGE_POOLS
    | INTERPOLATIONS
    | LINEAR_REDUCTIONS
    | _words(
        "add sub rsub neg cumsum trace col2im index_add scatter_add deg2rad rad2deg mul div lerp addcmul addcdiv "
        "ldexp xlogy special_xlog1py grid_sampler_2d grid_sampler_3d _grid_sampler_2d_cpu_fallback "
        "affine_grid_generator"
    )
)
"""Sums of their inputs with constant weights, as long as no activation meets one of `FACTORS`."""
FACTORS = {
    "div": ("other",),
    "ldexp": ("other",),
    "xlogy": ("other",),
    "special_xlog1py": ("other",),
    "lerp": ("weight",),
    "addcdiv": ("tensor2",),
    "grid_sampler_2d": ("grid",),
    "grid_sampler_3d": ("grid",),
    "_grid_sampler_2d_cpu_fallback": ("grid",),
}
"""Arguments of linear operators in which they are not linear."""
MULTIPLIED = {"mul": ("self", "other"), "addcmul": ("tensor1", "tensor2")}
"""Arguments of linear operators of which at most one may be an activation: a product of two is not linear."""
BATCH_NORMS = _words(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_no_update "
    "_batch_norm_with_update cudnn_batch_norm miopen_batch_norm"
)
NONLINEAR = _words(
    "hardswish glu log_sigmoid_forward _softmax _log_softmax _safe_softmax _prelu_kernel prod var std var_mean "
    "std_mean norm linalg_vector_norm linalg__powsum logsumexp logcumsumexp _logcumsumexp cumprod native_group_norm "
    "native_layer_norm _fused_rms_norm renorm dist floor_divide _add_relu rrelu_with_noise argmax argmin any all "
    "count_nonzero bucketize searchsorted isin argsort scatter_reduce index_reduce"
)
"""Non-linear functions that PyTorch does not tag as element-wise; those that it tags are non-linear unless listed."""
ELEMENTWISE = _words("hardswish _prelu_kernel log_sigmoid_forward floor_divide rrelu_with_noise _add_relu")
"""Element-wise functions without PyTorch's tag."""
HOMOGENEOUS = _words("relu leaky_relu rrelu_with_noise _prelu_kernel abs neg mul div")
"""f(s x) = s f(x) for s > 0, element by element."""


@dataclass(frozen=True, kw_only=True)
class OperatorCall:
    """One operator that was executed, and which of its arguments are activations.

    Attributes:
        operator: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        outputs: What it returned.
        activations: Identities of the tensors among its arguments that depend on the image.
    """

    operator: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    activations: frozenset[int]

    @property
    def name(self) -> str:
        """Name without overload, and without the endings of variants that work in place or copy a view."""
        name = self.operator._schema.name.split("::")[1]
        if self.operator._schema.is_mutable and name.endswith("_"):
            name = name[:-1]
        return name.removesuffix("_copy") if torch.Tag.view_copy in self.operator.tags else name

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers; a dropout in evaluation mode does not."""
        at_rest = any(self.argument(flag) is False for flag in ("training", "train")) or self.argument("dropout_p") == 0
        return torch.Tag.nondeterministic_seeded in self.operator.tags and not at_rest

    @property
    def is_pointwise(self) -> bool:
        """Whether PyTorch tags it, or another of its overloads, as element-wise (those that work in place are not)."""
        return torch.Tag.pointwise in self.operator.tags or _has_pointwise_overload(self.name)

    def argument(self, name: str) -> Any:
        """Return the value of an argument by the name in the operator's schema, or None if it has none."""
        for position, declared in enumerate(self.operator._schema.arguments):
            if declared.name == name:
                if name in self.kwargs:
                    return self.kwargs[name]
                return self.args[position] if position < len(self.args) else declared.default_value
        return None

    def is_activation(self, value: object) -> bool:
        """Return whether ``value`` is, or holds, a tensor that depends on the image."""
        return any(id(part) in self.activations for part in tree_leaves(value))

    def written(self) -> list[Tensor]:
        """Return the tensors among the arguments that the operator overwrites."""
        declared = [a.name for a in self.operator._schema.arguments if a.alias_info and a.alias_info.is_write]
        return [part for name in declared for part in tree_leaves(self.argument(name)) if isinstance(part, Tensor)]

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, in order."""
        return [part for part in tree_leaves((self.args, self.kwargs)) if isinstance(part, Tensor)]


@cache
def _has_pointwise_overload(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return any(torch.Tag.pointwise in overload.tags for overload in overloads)


def operator_traits(call: OperatorCall, position: int = 0) -> OpTraits:
    """Return the traits of one operator, at least one of whose arguments is an activation.

    Args:
        call: The operator with its arguments.
        position: Which of its outputs is meant.

    Returns:
        Traits without ``reads``.
    """
    is_mean = position == 1 and call.name in ("var_mean", "std_mean")
    traits = _sum(call, "mean") if is_mean else _meaning(call)
    traits = replace(traits, elementwise=_is_elementwise(call, traits.kind))
    values = [t for t in call.tensors() if id(t) in call.activations and t.dtype.is_floating_point]
    output = next((part for part in tree_leaves(call.outputs) if isinstance(part, Tensor)), None)
    if traits.kind in (OpKind.UNKNOWN, OpKind.CONSTANT) or output is None:
        return replace(traits, operators=(call.name,))
    if output.dtype.is_complex:
        return _unknown(call)
    if not values and output.dtype.is_floating_point:  # a mask turned into numbers is a step function
        traits = OpTraits(kind=OpKind.NONLINEAR, elementwise=traits.elementwise)
    return replace(traits, operators=(call.name,))


def _meaning(call: OperatorCall) -> OpTraits:
    name, tags = call.name, call.operator.tags
    if call.operator.namespace != "aten":
        return _unknown(call)
    if call.is_random:
        return OpTraits(kind=OpKind.UNKNOWN, reason="it draws random numbers")
    masks = [t for t in call.tensors() if id(t) in call.activations and t.dtype is torch.bool]
    # The tag of `index` holds for masks only.
    if torch.Tag.data_dependent_output in tags or (
        torch.Tag.dynamic_output_shape in tags and (masks or name not in MOVES)
    ):
        return OpTraits(
            kind=OpKind.UNKNOWN, reason="a number or a shape that it returns depends on the values of the image"
        )
    if name in CONSTANTS and not call.is_activation(call.argument("value")):
        return OpTraits(kind=OpKind.CONSTANT)
    if name in BATCH_NORMS:
        # Statistics of the images are an instance norm's.
        kind = OpKind.NONLINEAR if call.argument("training") else OpKind.NORM
        return OpTraits(kind=kind)
    if name == "_to_copy" or (name in PASSIVE and call.argument("dtype") is None):
        if name == "_to_copy" and call.outputs.itemsize < call.argument("self").itemsize:  # float16 rounds
            return OpTraits(kind=OpKind.STRUCTURAL)
        return OpTraits(kind=OpKind.PASSIVE, keeps_values=True, positively_homogeneous=_keeps_channels(call))
    if name == "view" and call.argument("dtype") is not None:  # the bits, read as another type
        return _unknown(call)
    if name in MOVES or call.operator.is_view or torch.Tag.view_copy in tags:
        return _move(call)
    if name in ORDER_STATISTICS:
        within = _within_channels(call)
        return OpTraits(
            kind=OpKind.STRUCTURAL,
            keeps_values=True,
            positively_homogeneous=within,
            resamples=within and name in MAX_POOLS | ORDER_REDUCTIONS,
        )
    if name in CHOICES:
        both = call.is_activation(call.argument("self")) and call.is_activation(call.argument("other"))
        return _choice(keeps_values=both)
    if name in LINEAR:
        return _sum(call, name)
    if name in NONLINEAR or call.is_pointwise:
        low, high = call.argument("min"), call.argument("max")
        zero_clamp = name in ("clamp", "clamp_min") and isinstance(low, int | float) and low == 0 and high is None
        return OpTraits(kind=OpKind.NONLINEAR, positively_homogeneous=name in HOMOGENEOUS or zero_clamp)
    return _unknown(call)


def _is_elementwise(call: OperatorCall, kind: OpKind) -> bool:
    before = call.tensors()[0]
    after = call.outputs if isinstance(call.outputs, Tensor) else call.outputs[0] if call.outputs else None
    same = isinstance(after, Tensor) and before.shape == after.shape
    return same and (kind is OpKind.PASSIVE or call.name in ELEMENTWISE or call.is_pointwise)


def _unknown(call: OperatorCall) -> OpTraits:
    operator = f"{call.operator.namespace}.{call.name}"
    return OpTraits(kind=OpKind.UNKNOWN, reason=f"its tensors would stay float (operator {operator})")


def _choice(*, keeps_values: bool) -> OpTraits:
    """Return the traits of a choice between tensors; one between an activation and a constant is a clamp."""
    if keeps_values:
        return OpTraits(kind=OpKind.STRUCTURAL, keeps_values=True, chooses=True)
    return OpTraits(kind=OpKind.NONLINEAR)


def _move(call: OperatorCall) -> OpTraits:
    constants = [part for part in call.tensors() if id(part) not in call.activations and part.dtype.is_floating_point]
    if call.name == "copy":  # nothing remains of what it overwrites
        constants = []
    fills = [call.argument(name) for name in ("value", "other", "self")]
    numbers = [fill for fill in fills if isinstance(fill, int | float)]
    fills_zeros = not any(numbers) and not any(bool(part.any()) for part in constants)
    if call.argument("reduce") is not None:
        return OpTraits(kind=OpKind.NONLINEAR)
    if call.name in ACCUMULATING and call.argument("accumulate"):
        return OpTraits(kind=OpKind.STRUCTURAL)
    if call.is_activation(call.argument("condition")) or call.is_activation(call.argument("mask")):
        return _choice(keeps_values=fills_zeros)
    if call.name in PASSIVE_IF_ALL and isinstance(call.outputs, Tensor):
        before = call.argument("self")
        if before.numel() == call.outputs.numel():
            return OpTraits(kind=OpKind.PASSIVE, keeps_values=True, positively_homogeneous=_keeps_channels(call))
    spatial = call.name in PADS | RESAMPLING_MOVES or (
        call.name in ("slice", "flip", "roll", "expand") and _within_channels(call)
    )
    return OpTraits(
        kind=OpKind.STRUCTURAL,
        keeps_values=fills_zeros,
        positively_homogeneous=spatial and fills_zeros and _keeps_channels(call),
        resamples=call.name in RESAMPLING_MOVES,
    )


def _sum(call: OperatorCall, name: str) -> OpTraits:
    multiplied = sum(call.is_activation(call.argument(part)) for part in MULTIPLIED.get(name, ()))
    nonlinear = any(call.is_activation(call.argument(part)) for part in FACTORS.get(name, ()))
    if multiplied > 1 or nonlinear or call.argument("rounding_mode") is not None:
        return OpTraits(kind=OpKind.NONLINEAR)
    if name.lstrip("_").startswith("grid_sampler") and call.argument("interpolation_mode") == 1:  # nearest
        return OpTraits(kind=OpKind.STRUCTURAL, keeps_values=call.argument("padding_mode") in (0, 1, 2))
    pools = name in AVERAGE_POOLS | INTERPOLATIONS | LINEAR_REDUCTIONS and _within_channels(call)
    counted = not call.argument("divisor_override")
    return OpTraits(
        kind=OpKind.STRUCTURAL,
        positively_homogeneous=pools or name in HOMOGENEOUS,
        averages=pools and counted and name in AVERAGE_POOLS | {"mean"},
        resamples=pools,
    )


def _keeps_channels(call: OperatorCall) -> bool:
    """Return whether input and output have the same images and channels."""
    before, after = call.argument("self"), call.outputs
    after = after if isinstance(after, Tensor) else after[0]
    same = isinstance(before, Tensor) and isinstance(after, Tensor) and before.dim() > 1 and after.dim() > 1
    return same and before.shape[:2] == after.shape[:2]


def _within_channels(call: OperatorCall) -> bool:
    """Return whether a pool, reduction or move works within each channel of each image, whose axes are the first two.

    A reduction over all axes, which mixes images, does not.
    """
    before = call.argument("self")
    if not isinstance(before, Tensor) or before.dim() < 3:
        return False
    if call.name in MAX_POOLS | AVERAGE_POOLS | INTERPOLATIONS | RESAMPLING_MOVES | PADS | {"expand"}:
        return _keeps_channels(call)
    axes = call.argument("dims") if call.argument("dim") is None else call.argument("dim")
    axes = [axes] if isinstance(axes, int) else axes
    return isinstance(axes, Sequence) and bool(axes) and all(axis % before.dim() >= 2 for axis in axes)


def in_sequence(before: Iterable[OpTraits], operator: OpTraits) -> OpTraits:
    """Return the traits of an operator together with those of the operators before it that computed its inputs.

    Args:
        before: Traits of each input that is an activation, relative to the inputs of the node.
        operator: Traits of the operator that reads them.
    """
    inputs = list(before)
    if operator.kind is OpKind.CONSTANT:
        return operator
    values = [part for part in inputs if part.kind is not OpKind.SELECTOR] or inputs
    parts = [*values, operator]
    passive = operator.kind is OpKind.PASSIVE

    def pools(operator_does: bool, inputs_do: list[bool]) -> bool:
        """Return whether the sequence pools: one part does, and the others are passive."""
        after = [does or part.kind is OpKind.PASSIVE for does, part in zip(inputs_do, values, strict=True)]
        return (operator_does and all(after)) or (passive and bool(inputs_do) and all(inputs_do))

    unknown = next((part for part in parts if part.kind is OpKind.UNKNOWN), None)
    kind = max(part.kind for part in parts)
    if kind is OpKind.PASSIVE and len(values) > 1:
        kind = OpKind.STRUCTURAL
    names = [name for part in values for name in part.operators]
    return OpTraits(
        kind=kind,
        operators=(*dict.fromkeys(names), *operator.operators) if len(values) > 1 else (*names, *operator.operators),
        keeps_values=all(part.keeps_values for part in parts),
        chooses=any(part.chooses for part in parts),
        elementwise=len({part.reads for part in values}) == 1 and all(part.elementwise for part in parts),
        positively_homogeneous=len(values) == 1 and all(part.positively_homogeneous for part in parts),
        averages=pools(operator.averages, [part.averages for part in values]),
        resamples=pools(operator.resamples, [part.resamples for part in values]),
        reason=unknown.reason if unknown else "",
    )
