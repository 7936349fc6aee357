"""The quantized student: built from the teacher's graph, calibrated on images, with the cost of every tensor."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from synq.config.quant import RESEARCH, QuantConfig
from synq.network.attention.token_map import TOKEN_MAP
from synq.network.functional_layers import replace_layer
from synq.network.op_traits import node_module
from synq.network.ops import classify
from synq.quant.bit_patterns import BitPatterns
from synq.quant.cost import TensorRow, account, packed_bytes
from synq.quant.float_trunk import has_float_trunk
from synq.quant.layers import (
    ACT_QUANTIZERS,
    ActQuantizer,
    QuantConv2d,
    QuantLinear,
    WeightSteps,
    quantizers_bypassed,
    weight_limit,
)
from synq.quant.observers import HistogramObserver, RangeObserver, mse_range, mse_weight_ratio
from synq.quant.points import QuantizedTensor, bits_and_notes, layer_bits, quantized_activations, reads_inputs
from synq.quant.power_of_two import mse_power_of_two_range
from synq.quant.transformer.log_quantizer import LogQuantizer
from synq.teacher.pixel_range import PixelRange
from synq.teacher.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class Student:
    """A quantized network and its cost.

    Attributes:
        net: (N, C, H, W) -> logits (N, K); in evaluation mode.
        cam_node: Node of ``net`` whose output is A, the tensor that enters the pool, after its fake quantization.
        taps: Node of the teacher's graph -> node of ``net`` with its fake-quantized output; a missing node has the same
            name in both.
        rows: Every weight and activation with its bit-width.
        size_bytes: Packed size: weights at their bit-width; zero point, gain and shift per channel.
        bitops: Sum over layers of MACs x weight bits x input bits, per image; a float operand counts 32.
        at_ends: Quantized nodes whose bit-width is that of the first or last layer by their place: under act_points
            "relu" those that the last layer reads; for an engine see ``target_points``.
    """

    net: fx.GraphModule
    cam_node: str
    taps: dict[str, str]
    rows: tuple[TensorRow, ...]
    size_bytes: int
    bitops: int
    at_ends: frozenset[str] = frozenset()


def build_student(teacher: Teacher, quant: QuantConfig) -> Student:
    """Quantize a teacher's graph; see `quantize_model`."""
    return quantize_model(teacher.graph, quant, cam_node=teacher.cam.node)


def quantize_model(traced: fx.GraphModule, quant: QuantConfig, *, cam_node: str = "") -> Student:
    """Return a fake-quantized copy of a traced network, its weights rounded to nearest; the network is not changed.

    Activation ranges are unset afterwards: call :func:`observe_ranges` before the first forward pass.

    Args:
        traced: A graph from ``trace_classifier``.
        quant: Bit-widths, quantization points, and which scales are stored or learned. Under act_points "relu",
            ``last_bits`` is also the bit-width of the non-linearity that the last layer reads, pooled or not
            (``value_sources``), unless ``last_bits_for_input`` is False; if the layer reads a sum, that stays float.
            For the points of an engine (``target``) see ``placement.py``.
        cam_node: Node of ``traced`` whose output is the CAM's feature map; "" for none.

    Returns:
        The student, in evaluation mode.

    Raises:
        ValueError: If an operation is unknown, so that a tensor to quantize would stay float; if the student with its
            quantizers bypassed differs from the teacher; or if a name or pattern of `quant` matches nothing.
    """
    net = copy.deepcopy(traced).eval()
    layers, _ = classify(net)
    by_name = BitPatterns(quant.layer_weight_bits, "quant.layer_weight_bits")
    weight_bits = layer_bits(layers, quant.weight_bits, *quant.end_bits, by_name)
    act_names = BitPatterns(quant.layer_act_bits, "quant.layer_act_bits")
    _quantize_weights(net, weight_bits, quant)
    points = quantized_activations(net, quant, act_names)
    by_name.check_all_fit()
    act_names.check_all_fit()
    bits, notes = bits_and_notes(net, quant, points)
    taps = {}
    # by all readers of an activation
    taken_whole = quant.points != "inputs" and not reads_inputs(traced) and not has_float_trunk(traced)
    for node, point in points.items():
        quantizer = _insert_quantizer(net, node, point.readers, _act_quantizer(point, quant))
        if taken_whole:
            taps[node.name] = quantizer.name
    net.graph.lint()
    net.recompile()
    _check_same(net, traced)
    rows = account(net, bits, notes)
    return Student(
        net=net,
        cam_node=taps.get(cam_node, cam_node),
        taps=taps,
        rows=rows,
        size_bytes=packed_bytes(net),
        bitops=sum(row.bitops for row in rows),
        at_ends=frozenset(node.name for node, point in points.items() if point.at_end),
    )


def _act_quantizer(point: QuantizedTensor, quant: QuantConfig) -> ActQuantizer:
    learned = quant.learned_steps != "none"
    if point.logarithmic:
        return LogQuantizer(point.bits, learned=learned)
    return ActQuantizer(
        point.bits,
        learned=learned,
        rounded=point.rounded,
        headroom=point.headroom,
        symmetric=point.symmetric,
        power_of_two=quant.power_of_two_scales,
    )


def _quantize_weights(net: fx.GraphModule, bits_of: dict[fx.Node, int], quant: QuantConfig) -> None:
    """Replace the layers of a network by quantized ones, in place."""
    learned, stored = quant.learned_steps == "all", quant.rounding == "adaround"
    steps: WeightSteps = "learned" if learned else "stored" if stored else "live"
    for node, bits in bits_of.items():
        module = node_module(net, node)
        if isinstance(module, QuantConv2d | QuantLinear) or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        # The kernels of depthwise layers add in 32 bits.
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1
        limit = None if quant.target == RESEARCH else weight_limit(bits, portable=quant.portable and not depthwise)
        layer: nn.Module
        if isinstance(module, nn.Conv2d):
            layer = QuantConv2d.from_float(module, bits, steps, limit)
        else:
            layer = QuantLinear.from_float(module, bits, steps, limit)
        replace_layer(net, str(node.target), layer.eval())


def observe_ranges(
    net: fx.GraphModule,
    images: Tensor,
    *,
    act_range: Literal["minmax", "mse"],
    weight_range: Literal["minmax", "mse"] = "minmax",
    norm: float = 2.4,
    image_range: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 256,
) -> None:
    """Calibrate a student: set its activation ranges from ``images``, and the stored scales of its weights.

    Later, only learned scales change. Activations are observed in float, with the weights already quantized. "minmax"
    takes the extremes; "mse" the range that minimizes the mean |x - quantized x|^norm over a histogram.

    Args:
        net: Network of a :class:`Student`.
        images: (N, C, H, W) synthetic images, low-pass filtered as for fine-tuning, on the device of ``net``.
        act_range: How activation ranges are chosen.
        weight_range: "mse" also chooses a clipping ratio per output channel, relative to the range of the weights.
        norm: Exponent p of the quantization error.
        image_range: Minimum and maximum of normalized pixels, each (1, C, 1, 1), to which ``images`` are clamped first.
            No quantizer then observes what no image can hold, wherever the network moves, pads, casts or copies pixels.
        batch_size: Images per forward pass.

    Raises:
        ValueError: If there are no images, a rule is unknown, or an activation is not finite.
    """
    if len(images) == 0:
        raise ValueError("calib_images must be >= 1, but got no image")
    for name, rule in (("act_range", act_range), ("weight_range", weight_range)):
        if rule not in ("minmax", "mse"):
            raise ValueError(f"`{name}` must be minmax or mse, but got {rule!r}")
    for module in net.modules():
        if isinstance(module, (QuantConv2d, QuantLinear)):
            weights = module.weight_quantizer
            if weight_range == "mse":
                weights.clip_ratio.copy_(
                    mse_weight_ratio(module.weight.detach().float(), weights.bits, norm, weights.limit)
                )
            weights.freeze(module.weight)
    if image_range is not None:
        images = PixelRange(*image_range).clamp(images)
    batches = images.split(batch_size)
    extremes: dict[str, RangeObserver] = {}
    _observe(net, batches, lambda name, x: extremes.setdefault(name, RangeObserver()).update(x))
    try:
        ranges = {name: observer.range() for name, observer in extremes.items()}
    except ValueError as error:
        raise ValueError(f"{error}: the teacher overflows on the synthetic images") from error
    if act_range == "mse":
        # A quantizer that does not round has no error within its range; one with headroom must not clip at all.
        histograms = {
            name: HistogramObserver(low, high)
            for name, (low, high) in ranges.items()
            if low < high and net.get_submodule(name).rounded and net.get_submodule(name).headroom == 1
        }
        _observe(net, batches, lambda name, x: histograms[name].update(x) if name in histograms else None)
        for name, histogram in histograms.items():
            quantizer = net.get_submodule(name)
            assert isinstance(quantizer, ActQuantizer)
            if isinstance(quantizer, LogQuantizer) and quantizer.is_logarithmic:
                quantizer.fit_step(histogram, norm)
                continue
            if quantizer.power_of_two:
                ranges[name] = mse_power_of_two_range(histogram.counts, *ranges[name], quantizer.quant_max, norm)
                continue
            bounds = (quantizer.quant_min, quantizer.quant_max)
            ranges[name] = mse_range(histogram.counts, *ranges[name], *bounds, norm=norm, symmetric=quantizer.symmetric)
    for name, (low, high) in ranges.items():
        quantizer = net.get_submodule(name)
        assert isinstance(quantizer, ActQuantizer)
        quantizer.set_range(quantizer.headroom * low, quantizer.headroom * high)


@torch.no_grad()
def weight_codes(net: fx.GraphModule) -> dict[str, Tensor]:
    """Return the integer weights of every quantized layer by name, int8, on the CPU."""
    codes = {}
    for name, layer in net.named_modules():
        if isinstance(layer, (QuantConv2d, QuantLinear)):
            codes[name] = layer.weight_quantizer.codes(layer.weight).to("cpu", torch.int8)
    return codes


def share_changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Return the share (0..1) of integer weights that differ between two results of ``weight_codes``."""
    changed = sum(int((codes != after[name]).sum()) for name, codes in before.items())
    return changed / sum(codes.numel() for codes in before.values())


class _ActivationRecorder(fx.Interpreter):
    """Run a student with its activation quantizers bypassed, and pass their inputs to a function."""

    def __init__(self, net: fx.GraphModule, record: Callable[[str, Tensor], None]) -> None:
        super().__init__(net)
        self.record = record

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.fetch_attr(target), ActQuantizer):
            self.record(target, args[0].detach())
            return args[0]
        return super().call_module(target, args, kwargs)


@torch.no_grad()
def _observe(net: fx.GraphModule, batches: Iterable[Tensor], record: Callable[[str, Tensor], None]) -> None:
    interpreter = _ActivationRecorder(net, record)
    for batch in batches:
        interpreter.run(batch)


@torch.no_grad()
def _check_same(net: fx.GraphModule, traced: fx.GraphModule) -> None:
    """Raise ValueError unless a student with its quantizers bypassed computes the same as the teacher's graph."""
    like = next(traced.parameters())
    size = next(node for node in traced.graph.nodes if node.op == "placeholder").meta["shape"]
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(like)
    with quantizers_bypassed(net):
        found, expected = net(noise), traced(noise)
    # The same kernels on the same inputs: bit-identical on a CPU; a GPU may choose other kernels each time.
    same = torch.equal(found, expected) if like.device.type == "cpu" else torch.allclose(found, expected, 1e-3, 1e-3)
    if not same:
        raise ValueError(
            "teacher must be built of layers with the standard forward pass of their type, but with all quantizers "
            f"bypassed the student's logits differ from the teacher's by {float((found - expected).abs().max()):.3g}: "
            "a custom forward pass was lost. Write it with plain Conv2d, Linear and standard activations"
        )


def _insert_quantizer(net: fx.GraphModule, node: fx.Node, users: list[fx.Node], quantizer: ActQuantizer) -> fx.Node:
    target = f"{ACT_QUANTIZERS}{node.name}"
    net.add_submodule(target, quantizer.eval())
    with net.graph.inserting_after(node):
        quantized = net.graph.call_module(target, (node,))
    for key in {"shape", TOKEN_MAP} & node.meta.keys():  # not the traits: a quantizer is another operation
        quantized.meta[key] = node.meta[key]
    for user in users:
        user.replace_input_with(node, quantized)
    return quantized
