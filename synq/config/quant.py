"""The configuration of quantization: bit-widths, ranges, rounding. Standard library only."""

from dataclasses import dataclass, field
from typing import Literal

from synq.config.parsing import between, one_of, require

WEIGHTS_ONLY = "last_bits=weights_only"
"""Part of `QuantConfig.layer_label`, though no single layer: the last layer has last_bits, its input act_bits."""


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
    """Bit-width of the activations, 2 to 8."""
    first_bits: int | None = None
    """Bit-width of the first layer's weights and input (under act_points relu the input image stays float); None uses
    weight_bits and act_bits (protocol A)."""
    last_bits: int | None = None
    """Bit-width of the last layer's weights and input; None uses weight_bits and act_bits (protocol A)."""
    last_bits_for_input: bool = True
    """Under act_points relu, whether last_bits also applies to the activation that the last layer reads (as in QDrop);
    false keeps act_bits there."""
    layer_weight_bits: dict[str, int] = field(default_factory=dict)
    """Bit-width of the weights of single layers, by name or pattern, such as conv1=8 'stage1*=6'; overrides
    weight_bits, first_bits and last_bits."""
    layer_act_bits: dict[str, int] = field(default_factory=dict)
    """Bit-width of single activations, named by the layer that reads it (act_points inputs) or by the node of the
    non-linearity (relu); `synq inspect` lists them."""
    act_points: Literal["relu", "inputs"] = "relu"
    """Which activations are quantized: relu (the output of every non-linearity) or inputs (the input of every
    convolution and linear layer)."""
    weight_range: Literal["minmax", "mse"] = "minmax"
    """Range of the weights per output channel: minmax, or mse (clipped to minimize the quantization error)."""
    act_range: Literal["minmax", "mse"] = "mse"
    """Range of each activation tensor: minmax, or mse (clipped to minimize the quantization error)."""
    mse_norm: float = 2.4
    """Exponent p of the quantization error |x - x_q|^p that range mse minimizes."""
    calib_images: int = 256
    """Maximum number of synthetic images on which activation ranges are calibrated; the ranges are fixed afterwards."""
    equalization: bool = False
    """Whether cross-layer equalization rescales the channels between two convolutions before rounding; the function
    stays the same."""
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
        one_of("quant.act_points", self.act_points, ("relu", "inputs"))
        one_of("quant.learned_steps", self.learned_steps, ("none", "activations", "all"))
        one_of("quant.rounding", self.rounding, ("nearest", "adaround"))
        one_of("quant.weight_range", self.weight_range, ("minmax", "mse"))
        one_of("quant.act_range", self.act_range, ("minmax", "mse"))
        between("quant.mse_norm", self.mse_norm, 1, 8)
        between("quant.calib_images", self.calib_images, 1)

    @property
    def label(self) -> str:
        """Return the bit-widths as a short label, for example W4A4."""
        return f"W{self.weight_bits}A{self.act_bits}"

    @property
    def protocol(self) -> str:
        """Return A if bit-widths are uniform, step sizes not learned and weights rounded to nearest; else B."""
        first = self.first_bits in (None, self.weight_bits) and self.first_bits in (None, self.act_bits)
        last = self.last_bits in (None, self.weight_bits) and self.last_bits in (None, self.act_bits)
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
