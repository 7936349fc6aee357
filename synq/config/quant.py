"""The configuration of quantization: bit-widths, ranges, rounding. Standard library only."""

from dataclasses import dataclass, field
from typing import Literal

from synq.config.parsing import between, one_of, require

WEIGHTS_ONLY = "last_bits=weights_only"
"""Part of `QuantConfig.layer_label` that names no single layer: the activation before the last layer has act_bits."""


def first_last_label(first_bits: int | None, last_bits: int | None) -> str:
    """Return the first/last layer bits as text: "8/8", "-/8", or "" if both are as the rest."""
    return f"{first_bits or '-'}/{last_bits or '-'}" if first_bits or last_bits else ""


def protocol_label(protocol: str, first_bits: int | None, last_bits: int | None, layer_label: str = "") -> str:
    """Return a protocol with the settings that make it B: "A", "B (8/8)", "B (-/8, mixed)".

    Args:
        protocol: A or B.
        first_bits, last_bits: As in `QuantConfig`.
        layer_label: As `QuantConfig.layer_label`.
    """
    named = layer_label.split()
    words = [ends] if (ends := first_last_label(first_bits, last_bits)) else []
    words += ["mixed"] if {*named} - {WEIGHTS_ONLY} else []
    words += [WEIGHTS_ONLY] if WEIGHTS_ONLY in named else []
    return protocol + (f" ({', '.join(words)})" if words else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """Bit-widths, quantization points, and how ranges and rounding are chosen."""

    weight_bits: int = 4
    """Bits of the weights, 2 to 8."""
    act_bits: int = 4
    """Bits of the activations, 2 to 8."""
    first_bits: int | None = None
    """Bits of the first layer's weights and input (under act_points relu the image is float); None is the same as the
    rest (protocol A)."""
    last_bits: int | None = None
    """Bits of the last layer's weights and input; None is the same as the rest (protocol A)."""
    last_bits_for_input: bool = True
    """Under act_points relu, whether last_bits is also the width of the non-linearity that the last layer reads
    (QDrop); else act_bits."""
    layer_weight_bits: dict[str, int] = field(default_factory=dict)
    """Bits of the weights of single layers, by name or pattern, whatever weight_bits, first_bits and last_bits say; as
    words: conv1=8 'stage1*=6'."""
    layer_act_bits: dict[str, int] = field(default_factory=dict)
    """Bits of single activations: under act_points inputs by the layer that reads it, under relu by the node of the
    non-linearity (`synq inspect`)."""
    act_points: Literal["relu", "inputs"] = "relu"
    """Which activations are low-bit: relu (after every non-linearity) or inputs (the input of every convolution and
    linear layer)."""
    weight_range: Literal["minmax", "mse"] = "minmax"
    """Range of the weights per output channel: smallest and largest value, or clipped to the least quantization
    error."""
    act_range: Literal["minmax", "mse"] = "mse"
    """Range of each activation: smallest and largest value seen, or clipped to the least quantization error."""
    mse_norm: float = 2.4
    """Exponent p of the quantization error |x - x_q|^p that a clipped range minimizes."""
    calib_images: int = 256
    """Synthetic images on which activation ranges are observed, at most; afterwards they are frozen."""
    equalization: bool = False
    """Whether channels between two convolutions are scaled to like ranges before rounding, with the same function
    (cross-layer)."""
    bn_correction: bool = False
    """Whether the rounded student's batch-norm scale and shift are set so that it sees the teacher's statistics; kept
    where KL falls."""
    learned_steps: Literal["none", "activations", "all"] = "none"
    """Quantization steps that are trained with the weights (LSQ): none (protocol A), activations, or all (weights
    too)."""
    rounding: Literal["nearest", "adaround"] = "nearest"
    """How weights become integers before fine-tuning: nearest (protocol A), or learned block by block (adaround)."""

    def __post_init__(self) -> None:
        widths: dict[str, object] = {name: getattr(self, name) for name in ("weight_bits", "act_bits")}
        widths |= {name: bits for name in ("first_bits", "last_bits") if (bits := getattr(self, name)) is not None}
        for name in ("layer_weight_bits", "layer_act_bits"):
            widths |= {f"{name}.{pattern}": bits for pattern, bits in getattr(self, name).items()}
        for name, bits in widths.items():
            good = isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8
            require(f"quant.{name}", "be a whole number in [2, 8]", bits, good)
        one_of("quant.act_points", self.act_points, ("relu", "inputs"))
        one_of("quant.learned_steps", self.learned_steps, ("none", "activations", "all"))
        one_of("quant.rounding", self.rounding, ("nearest", "adaround"))
        one_of("quant.weight_range", self.weight_range, ("minmax", "mse"))
        one_of("quant.act_range", self.act_range, ("minmax", "mse"))
        between("quant.mse_norm", self.mse_norm, 1, 8)
        between("quant.calib_images", self.calib_images, 1)

    @property
    def label(self) -> str:
        """Return the bit-widths in short, for example W4A4."""
        return f"W{self.weight_bits}A{self.act_bits}"

    @property
    def protocol(self) -> str:
        """Return A if all bit-widths are the same, ranges static and rounding to nearest; else B."""
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
        words = [f"{pattern}={role}{widths[pattern]}" for widths, role in named for pattern in sorted(widths)]
        narrow = self.act_points == "relu" and not self.last_bits_for_input
        return " ".join([*words, WEIGHTS_ONLY] if narrow and self.last_bits not in (None, self.act_bits) else words)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructionConfig:
    """How rounding is learned, block by block, where `quant.rounding` is adaround."""

    iterations: int = 500
    """Optimizer steps per block."""
    batch_size: int = 32
    """Images per step."""
    images: int = 1024
    """Synthetic images used, at most."""
    rounding_lr: float = 1e-2
    """Learning rate of Adam on the rounding of the weights."""
    step_lr: float = 4e-5
    """Learning rate of Adam on the activations' steps; 0 leaves them as observed."""
    drop_prob: float = 0.5
    """Probability with which an activation stays float during reconstruction (QDrop); 0 quantizes all."""
    rounding_weight: float = 0.01
    """Weight of the term that drives each rounding to 0 or 1."""
    warmup: float = 0.2
    """Share of the steps before that term is switched on."""
    beta_start: float = 20.0
    """Its exponent at first; it falls to `beta_end`."""
    beta_end: float = 2.0
    """Its exponent at last."""

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
