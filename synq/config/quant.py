"""The configuration of quantization: bit-widths, ranges, rounding. Standard library only."""

from dataclasses import dataclass, field
from typing import Literal

from synq.config.parsing import between, one_of, require

RESEARCH = "research"
"""Target of a student for no engine: `act_points` decides which tensors are quantized."""
TARGETS = (RESEARCH, "onnxruntime", "openvino", "litert", "executorch", "tensorrt", "qnn")
"""Values of `QuantConfig.target`."""
OPENVINO = "openvino"
"""Target whose order of float operations in fused sums is not known."""
BY_RULES = ("tensorrt", "qnn")
"""Engines that do not run here: their files keep the published rules, which are checked, and activations of 8 bits."""
ACT_POINTS = ("relu", "inputs")
"""Values of `QuantConfig.act_points`."""
WEIGHT_RANGES = ("minmax", "mse")
"""Values of `QuantConfig.weight_range`."""
PORTABLE_TARGETS = ("onnxruntime", "openvino")
"""Engines whose kernels for x86 add in 16 bits where a CPU has no VNNI."""
FLOAT_TRUNKS = ("onnxruntime",)
"""Engines whose float kernels between integer ones are known, for networks with LayerNorm or attention."""
BYTE_BITS = 8
"""Bit-width of the activations between layers that no layer reads: an engine stores each code in a byte."""
END_BITS = 8
"""Bit-width of the first and last layer of a student for an engine, where none is given."""
WEIGHTS_ONLY = "last_bits=weights_only"
"""Part of `QuantConfig.layer_label`, though no single layer: the last layer has last_bits, its input act_bits."""


def end_bits(target: str, first_bits: int | None, last_bits: int | None) -> tuple[int | None, int | None]:
    """Return the bit-widths of the first and last layer; None means those of the other layers.

    Args:
        target: As in `QuantConfig`; for an engine, None means `END_BITS`.
        first_bits: As in `QuantConfig`.
        last_bits: As in `QuantConfig`.
    """
    if target == RESEARCH:
        return first_bits, last_bits
    return END_BITS if first_bits is None else first_bits, END_BITS if last_bits is None else last_bits


def first_last_label(first_bits: int | None, last_bits: int | None) -> str:
    """Return the first/last layer bits as text: "8/8", "-/8", or "" if both equal those of the other layers."""
    return f"{first_bits or '-'}/{last_bits or '-'}" if first_bits or last_bits else ""


def protocol_label(protocol: str, first_bits: int | None, last_bits: int | None, layer_label: str = "") -> str:
    """Return a protocol with the bit-widths that make it B: "A", "B (8/8)", "B (-/8, mixed)".

    Args:
        protocol: A or B.
        first_bits: As in `QuantConfig`.
        last_bits: As in `QuantConfig`.
        layer_label: As `QuantConfig.layer_label`.
    """
    named = layer_label.split()
    parts = [label] if (label := first_last_label(first_bits, last_bits)) else []
    parts += ["mixed"] if {*named} - {WEIGHTS_ONLY} else []
    parts += [WEIGHTS_ONLY] if WEIGHTS_ONLY in named else []
    return protocol + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """Quantization of the student: bit-widths, quantization points, ranges and rounding."""

    weight_bits: int = 4
    """Bit-width of the weights, 2 to 8."""
    act_bits: int = 4
    """Bit-width of the activations, 2 to 8; for an engine of those that a layer reads, others between layers have 8."""
    target: Literal["research", "onnxruntime", "openvino", "litert", "executorch", "tensorrt", "qnn"] = "research"
    """Engine that runs the student. It decides which activations are quantized (every tensor that depends on the
    image) and makes weights symmetric. research: act_points decides, weights are asymmetric. Files for tensorrt and qnn
    are checked against the published rules of these engines, not run in them."""
    portable: bool = False
    """Whether weight codes stay within +-64 except in depthwise layers, so that x86 CPUs without VNNI, whose kernels
    add in 16 bits, compute the same (target onnxruntime or openvino)."""
    power_of_two_scales: bool = False
    """Whether the scales of activations are powers of two (target openvino), so that the order of float operations in
    the sums of that engine changes fewer codes; coarser grids cost accuracy."""
    float_attention: bool = False
    """Whether the two matrix products of attention stay in floats, so that only layers with a weight are quantized
    (target onnxruntime)."""
    first_bits: int | None = None
    """Bit-width of the first layer's weights and input (under act_points relu the input image stays float); None uses
    weight_bits and act_bits (protocol A), or 8 for an engine."""
    last_bits: int | None = None
    """Bit-width of the last layer's weights and input; None uses weight_bits and act_bits (protocol A), or 8 for an
    engine."""
    last_bits_for_input: bool = True
    """Under act_points relu, whether last_bits also applies to the activation that the last layer reads (as in QDrop);
    false keeps act_bits there."""
    layer_weight_bits: dict[str, int] = field(default_factory=dict)
    """Bit-width of the weights of single layers, by name or pattern, such as conv1=8 'stage1*=6'; overrides
    weight_bits, first_bits and last_bits."""
    layer_act_bits: dict[str, int] = field(default_factory=dict)
    """Bit-width of single activations, named by the layer that reads it (act_points inputs) or by the node of the
    non-linearity (relu) or of the quantized tensor (an engine); `synq inspect` lists them."""
    act_points: Literal["relu", "inputs"] = "relu"
    """Which activations are quantized under target research: relu (the output of every non-linearity) or inputs (the
    input of every convolution and linear layer)."""
    weight_range: Literal["minmax", "mse"] = "minmax"
    """Range of the weights per output channel: minmax, or mse (clipped to minimize the quantization error)."""
    act_range: Literal["minmax", "mse"] = "mse"
    """Range of each activation tensor: minmax, or mse (clipped to minimize the quantization error)."""
    softmax: Literal["uniform", "log"] = "uniform"
    """Grid of the softmax of attention: uniform, or log (powers of 2 or, under act_range mse, of a root of it; target
    research only), kept if the KL to the teacher falls, which it does at 4 bits and hardly at 8."""
    mse_norm: float = 2.4
    """Exponent p of the quantization error |x - x_q|^p that range mse minimizes."""
    calib_images: int = 256
    """Maximum number of synthetic images on which activation ranges are calibrated; the ranges are fixed afterwards."""
    equalization: bool = False
    """Whether cross-layer equalization rescales the channels between two convolutions before rounding; the function
    stays the same."""
    scale_shift: bool = False
    """Whether the channels of each LayerNorm that only linear layers read get one range before rounding, by its affine
    and their weights; the function stays the same. Kept if the KL to the teacher falls."""
    bn_correction: bool = False
    """Whether batch-norm scale and shift are re-estimated after rounding, so that activations have the teacher's
    statistics; kept if the KL to the teacher falls."""
    learned_steps: Literal["none", "activations", "all"] = "none"
    """Quantization step sizes trained with the weights (LSQ): none (protocol A), activations, or all (weights too)."""
    rounding: Literal["nearest", "adaround"] = "nearest"
    """Rounding of weights before fine-tuning: nearest (protocol A), or learned block by block (adaround)."""

    def __post_init__(self) -> None:
        bit_widths: dict[str, object] = {name: getattr(self, name) for name in ("weight_bits", "act_bits")}
        bit_widths |= {name: bits for name in ("first_bits", "last_bits") if (bits := getattr(self, name)) is not None}
        for name in ("layer_weight_bits", "layer_act_bits"):
            bit_widths |= {f"{name}.{pattern}": bits for pattern, bits in getattr(self, name).items()}
        for name, bits in bit_widths.items():
            is_valid = isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8
            require(f"quant.{name}", "be a whole number in [2, 8]", bits, is_valid)
        one_of("quant.target", self.target, TARGETS)
        one_of("quant.act_points", self.act_points, ACT_POINTS)
        one_of("quant.learned_steps", self.learned_steps, ("none", "activations", "all"))
        one_of("quant.rounding", self.rounding, ("nearest", "adaround"))
        one_of("quant.weight_range", self.weight_range, WEIGHT_RANGES)
        one_of("quant.act_range", self.act_range, ("minmax", "mse"))
        one_of("quant.softmax", self.softmax, ("uniform", "log"))
        if self.target != RESEARCH:
            rule = f"be uniform for target {self.target}, which has no kernel for logarithms"
            require("quant.softmax", rule, self.softmax, self.softmax == "uniform")
        between("quant.mse_norm", self.mse_norm, 1, 8)
        between("quant.calib_images", self.calib_images, 1)
        if self.target != RESEARCH:
            place = f"be left out for target {self.target}, which quantizes every tensor that depends on the image"
            require("quant.act_points", place, self.act_points, self.act_points == "relu")
            require("quant.last_bits_for_input", place, self.last_bits_for_input, self.last_bits_for_input)
        if self.target in BY_RULES:
            rule = f"be 8 for target {self.target}, which has integer kernels for no fewer bits"
            acts = {name: bits for name, bits in bit_widths.items() if "weight" not in name}
            for name, bits in acts.items():
                require(f"quant.{name}", rule, bits, bits == BYTE_BITS)
        if self.float_attention and self.target not in FLOAT_TRUNKS:
            raise ValueError(
                f"`quant.float_attention` must be false unless target is {' or '.join(FLOAT_TRUNKS)}, but got true "
                f"with target {self.target}"
            )
        if self.portable and self.target not in PORTABLE_TARGETS:
            engines = " or ".join(PORTABLE_TARGETS)
            raise ValueError(
                f"`quant.portable` must be false unless target is {engines}, whose kernels it is for, but got true "
                f"with target {self.target}"
            )
        if self.power_of_two_scales and (self.target, self.learned_steps) != (OPENVINO, "none"):
            raise ValueError(
                f"`quant.power_of_two_scales` must be false unless target is {OPENVINO}, whose sums it is for, and "
                f"learned_steps is none, but got true with target {self.target} and learned_steps "
                f"{self.learned_steps}"
            )

    @property
    def label(self) -> str:
        """Return the bit-widths as a short label, for example W4A4."""
        return f"W{self.weight_bits}A{self.act_bits}"

    @property
    def group(self) -> str:
        """Return bit-widths and engine as part of a name: "W4A4", "W4A4-openvino", "W4A4-openvino_portable"."""
        return self.label if self.target == RESEARCH else f"{self.label}-{self.points.replace(' ', '_')}"

    @property
    def points(self) -> str:
        """Return what decides which tensors are quantized, and how: act_points, or the target, for a record.

        "relu", "inputs", "onnxruntime", "onnxruntime portable", "onnxruntime float_attention".
        """
        if self.target == RESEARCH:
            return self.act_points
        return " ".join(
            [
                self.target,
                *(["portable"] if self.portable else []),
                *(["float_attention"] if self.float_attention else []),
            ]
        )

    @property
    def end_bits(self) -> tuple[int | None, int | None]:
        """Return the bit-widths of the first and last layer; None means those of the other layers."""
        return end_bits(self.target, self.first_bits, self.last_bits)

    def at_uniform_bits(self, bits: int) -> "QuantConfig":
        """Return a configuration with the same quantization points and kind of scales, `bits` everywhere.

        Args:
            bits: Bit-width, 2 to 8, of the first and last layer too.
        """
        ends = None if self.target == RESEARCH else bits
        return QuantConfig(
            weight_bits=bits,
            act_bits=bits,
            first_bits=ends,
            last_bits=ends,
            act_points=self.act_points,
            target=self.target,
            portable=self.portable,
            power_of_two_scales=self.power_of_two_scales,
            float_attention=self.float_attention,
            softmax=self.softmax,
        )

    @property
    def protocol(self) -> str:
        """Return A if bit-widths are uniform, step sizes not learned and weights rounded to nearest; else B."""
        first, last = (bits in (None, self.weight_bits) and bits in (None, self.act_bits) for bits in self.end_bits)
        static = self.learned_steps == "none" and self.rounding == "nearest"
        single = {*self.layer_weight_bits.values()} <= {self.weight_bits} and {*self.layer_act_bits.values()} <= {
            self.act_bits
        }
        return "A" if first and last and single and static else "B"

    @property
    def layer_label(self) -> str:
        """Return the bit-widths of single layers as text, for example "conv1=W8 head*=W8 relu=A8"; "" in protocol A."""
        if self.protocol == "A":
            return ""
        named = [(self.layer_weight_bits, "W"), (self.layer_act_bits, "A")]
        parts = [f"{pattern}={role}{bits_of[pattern]}" for bits_of, role in named for pattern in sorted(bits_of)]
        weights_only = self.act_points == "relu" and not self.last_bits_for_input
        return " ".join(
            [*parts, WEIGHTS_ONLY] if weights_only and self.last_bits not in (None, self.act_bits) else parts
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionConfig:
    """Learned rounding of the weights, block by block (AdaRound, BRECQ), under `quant.rounding` adaround."""

    iterations: int = 500
    """Optimizer steps per block."""
    batch_size: int = 32
    """Images per optimizer step."""
    images: int = 1024
    """Maximum number of synthetic images used."""
    rounding_lr: float = 1e-2
    """Learning rate of Adam for the rounding variables of the weights."""
    step_lr: float = 4e-5
    """Learning rate of Adam for the step sizes of the activations; 0 keeps the calibrated ones."""
    drop_prob: float = 0.5
    """Probability that an activation stays float during reconstruction (QDrop); 0 quantizes all of them."""
    rounding_weight: float = 0.01
    """Weight of the regularizer that drives each rounding variable to 0 or 1."""
    warmup: float = 0.2
    """Fraction of the steps before the regularizer is switched on."""
    beta_start: float = 20.0
    """Initial exponent beta of the regularizer; it decays to beta_end."""
    beta_end: float = 2.0
    """Final exponent beta of the regularizer."""

    def __post_init__(self) -> None:
        for name, low in (("iterations", 1), ("batch_size", 1), ("images", 1)):
            between(f"reconstruction.{name}", getattr(self, name), low)
        between("reconstruction.rounding_lr", self.rounding_lr, 0, open_low=True)
        for name in ("step_lr", "rounding_weight"):
            between(f"reconstruction.{name}", getattr(self, name), 0)
        for name in ("drop_prob", "warmup"):
            between(f"reconstruction.{name}", getattr(self, name), 0, 1)
        for name in ("beta_start", "beta_end"):
            between(f"reconstruction.{name}", getattr(self, name), 1)
