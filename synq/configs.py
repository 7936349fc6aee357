"""What a run is: frozen values, checked where they are defined. Standard library only, so that every door may import it.

A configuration is a `RunConfig` of six parts. Mappings (TOML, JSON, dotted overrides) become one through `config_from_dict`, which
is strict: an unknown key or a value of another type is refused, never dropped or guessed.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from synq.config_identity import config_digest, make_absolute
from synq.config_io import between as _between
from synq.config_io import config_from_dict, config_to_dict, load_config, parse_bits, with_overrides
from synq.config_io import one_of as _one_of
from synq.config_io import require as _require

__all__ = [
    "EvaluationConfig",
    "FinetuneConfig",
    "QuantConfig",
    "RunConfig",
    "RuntimeConfig",
    "SynthesisConfig",
    "TeacherConfig",
    "config_digest",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "make_absolute",
    "parse_bits",
    "with_overrides",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The pre-trained classifier that is to be quantized."""

    spec: str = "bundled:digits_resnet8"
    """Which model: bundled:NAME, torchvision:NAME, timm:NAME, pytorchcv:NAME, FILE.py:FACTORY or PACKAGE.MODULE:FACTORY."""
    weights: str | None = None
    """Weights file (.safetensors, .pth, .th), a weights name of torchvision such as IMAGENET1K_V1, or random (untrained)."""
    num_classes: int | None = None
    """Number of classes, where the model cannot tell."""
    input_size: tuple[int, int, int] | None = None
    """Input as channels, height, width in pixels, where the model cannot tell."""
    mean: tuple[float, ...] | None = None
    """Mean per channel, on the scale 0..1, that was subtracted when the teacher was trained. Never guessed."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel, on the scale 0..1, by which the teacher's training images were divided. Never guessed."""
    cam_layer: str | None = None
    """Module or graph node whose output the class activation map is taken from; None finds it by the model's structure."""

    def __post_init__(self) -> None:
        _require("teacher.spec", "read SOURCE:NAME, for example torchvision:resnet18", self.spec, ":" in self.spec)
        if self.num_classes is not None:
            _between("teacher.num_classes", self.num_classes, 2)
        size, mean, std = self.input_size, self.mean, self.std
        if size is not None:
            good = len(size) == 3 and all(part >= 1 for part in size)
            _require("teacher.input_size", "be three numbers >= 1 (channels, height, width)", size, good)
        _require("teacher.std", "be given exactly when `teacher.mean` is", std, (mean is None) == (std is None))
        if mean is not None and std is not None:
            channels = size[0] if size is not None else len(mean)
            _require("teacher.mean", f"hold one finite number per channel ({channels})", mean, _finite(mean, channels))
            positive = _finite(std, channels) and all(part > 0 for part in std)
            _require("teacher.std", f"hold one number > 0 per channel ({channels})", std, positive)


def _finite(values: tuple[float, ...], length: int) -> bool:
    return len(values) == length and all(math.isfinite(value) for value in values)


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisConfig:
    """How the synthetic images are made. Everything here, the teacher and `data_seed` decide which set is used."""

    num_images: int = 1024
    """Number of training images to make."""
    shard_size: int = 256
    """Images optimised together; batch-norm statistics are matched over one shard, so larger is better until memory ends."""
    iterations: int = 200
    """Optimiser steps per shard."""
    lr: float = 0.5
    """Learning rate of Adam on the pixels (normalised units)."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """How the learning rate falls: by a cosine to 0 over the iterations, or at each plateau of the loss (the paper's; wants 1,000)."""
    plateau_patience: int = 50
    """Steps without improvement after which the learning rate falls."""
    plateau_factor: float = 0.1
    """Factor by which the learning rate falls on a plateau."""
    bns_weight: float = 1.0
    """Weight of the batch-norm-statistics loss; it belongs to `bns_form`."""
    bns_form: Literal["std_sum", "var_mean"] = "std_sum"
    """std_sum: squared distances of means and standard deviations, summed over channels; var_mean: variances, averaged."""
    inception_weight: float = 0.05
    """Weight of the cross-entropy to the assigned label; 0 leaves only the batch-norm statistics. At 1 nearly every image is certain."""
    hard_sample_gamma: float = 0.0
    """Exponent of the hard-sample weight (1 - p)^gamma on the cross-entropy; 0 is the plain cross-entropy."""
    calib_centers: bool = False
    """Whether one optimised image per class supplies a second statistics target for the deep layers."""
    center_iterations: int = 200
    """Optimiser steps for the calibration centers."""
    center_weight: float = 1.0
    """Weight of the second statistics target."""
    center_depth: float = 0.5
    """Share of the batch-norm layers, deepest first, that get the second target."""
    augment: Literal["none", "flip_shift"] = "flip_shift"
    """Random flip and shift of the images before each step of synthesis."""

    def __post_init__(self) -> None:
        for name, low in (("num_images", 1), ("shard_size", 2), ("iterations", 0), ("plateau_patience", 1)):
            _between(f"synthesis.{name}", getattr(self, name), low)
        _between("synthesis.center_iterations", self.center_iterations, 0)
        _between("synthesis.lr", self.lr, 0, open_low=True)
        _between("synthesis.plateau_factor", self.plateau_factor, 0, 1, open_low=True)
        for name in ("bns_weight", "inception_weight", "hard_sample_gamma", "center_weight"):
            _between(f"synthesis.{name}", getattr(self, name), 0)
        _between("synthesis.center_depth", self.center_depth, 0, 1)
        _one_of("synthesis.schedule", self.schedule, ("cosine", "plateau"))
        _one_of("synthesis.bns_form", self.bns_form, ("std_sum", "var_mean"))
        _one_of("synthesis.augment", self.augment, ("none", "flip_shift"))


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """Which numbers become low-bit, at which width, and how their ranges are found."""

    weight_bits: int = 4
    """Bits of the weights, 2 to 8."""
    act_bits: int = 4
    """Bits of the activations, 2 to 8."""
    first_bits: int | None = None
    """Bits of the first layer's weights and input; None is the same as the rest (protocol A)."""
    last_bits: int | None = None
    """Bits of the last layer's weights and input; None is the same as the rest (protocol A)."""
    act_points: Literal["relu", "inputs"] = "relu"
    """Which activations are low-bit: relu (after every non-linearity) or inputs (the input of every convolution and linear layer)."""
    weight_range: Literal["minmax", "mse"] = "minmax"
    """Range of the weights per output channel: smallest and largest value, or clipped to the least quantization error."""
    act_range: Literal["minmax", "mse"] = "mse"
    """Range of each activation: smallest and largest value seen, or clipped to the least quantization error."""
    mse_norm: float = 2.4
    """Exponent p of the quantization error |x - x_q|^p that a clipped range minimises."""
    calib_images: int = 256
    """Synthetic images on which activation ranges are observed, at most; afterwards they are frozen."""

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits", "first_bits", "last_bits"):
            bits = getattr(self, name)
            if bits is None and name in ("first_bits", "last_bits"):
                continue
            good = isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8
            _require(f"quant.{name}", "be a whole number in [2, 8]", bits, good)
        _one_of("quant.act_points", self.act_points, ("relu", "inputs"))
        _one_of("quant.weight_range", self.weight_range, ("minmax", "mse"))
        _one_of("quant.act_range", self.act_range, ("minmax", "mse"))
        _between("quant.mse_norm", self.mse_norm, 1, 8)
        _between("quant.calib_images", self.calib_images, 1)

    @property
    def label(self) -> str:
        """Short name of the widths, for example W4A4."""
        return f"W{self.weight_bits}A{self.act_bits}"

    @property
    def protocol(self) -> str:
        """A: every layer has the low width; B: the first or the last layer is kept wider (or narrower)."""
        first = self.first_bits in (None, self.weight_bits) and self.first_bits in (None, self.act_bits)
        last = self.last_bits in (None, self.weight_bits) and self.last_bits in (None, self.act_bits)
        return "A" if first and last else "B"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """How the quantized student is trained on the synthetic images."""

    epochs: int = 15
    """Passes over the synthetic images; 0 leaves round-to-nearest."""
    batch_size: int = 64
    """Images per step over all processes together; must divide by the number of processes."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser of the student's parameters."""
    lr: float = 0.01
    """Largest learning rate."""
    momentum: float = 0.9
    """Nesterov momentum of sgd (0: none); the first beta of adam."""
    weight_decay: float = 1e-4
    """Weight decay (L2)."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate falls: cosine to 0, by steps, or not at all."""
    step_epochs: int = 10
    """Epochs between two falls of the learning rate, for schedule step."""
    step_factor: float = 0.1
    """Factor of each fall of the learning rate, for schedule step."""
    warmup_epochs: float = 0.0
    """Epochs (parts allowed) over which the learning rate rises from 0."""
    grad_clip: float | None = 1.0
    """Largest norm of the whole gradient; None does not clip."""
    kd_temperature: float = 4.0
    """Temperature T of the distillation loss T^2 KL(teacher / T || student / T)."""
    kd_weight: float = 1.0
    """Weight of the distillation loss."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy to the assigned label on images the teacher finds easy."""
    cam_weight: float = 20.0
    """Weight of the distance between the class activation maps of teacher and student."""
    difficulty_threshold: float = 0.5
    """Largest difficulty (1 - teacher's probability of the label) at which the cross-entropy counts; 1 keeps every image."""
    lowpass_cutoff: float | None = 1.0
    """Cutoff D0 of the Gaussian low-pass filter on the images, in `lowpass_unit`; None does not filter."""
    lowpass_unit: Literal["bins", "nyquist"] = "nyquist"
    """Unit of the cutoff: DFT bins (the paper's), or the share of the Nyquist frequency (1 at 32 pixels is 16 bins)."""
    train_bn: bool = True
    """Whether the batch-norm scale and shift are trained; their running statistics never are."""
    augment: Literal["none", "flip_shift"] = "none"
    """Random flip and shift of each training batch."""
    log_every: int = 10
    """Steps between two updates of the progress line."""

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1), ("step_epochs", 1), ("log_every", 1)):
            _between(f"finetune.{name}", getattr(self, name), low)
        for name in ("lr", "kd_temperature"):
            _between(f"finetune.{name}", getattr(self, name), 0, open_low=True)
        for name in ("weight_decay", "kd_weight", "ce_weight", "cam_weight"):
            _between(f"finetune.{name}", getattr(self, name), 0)
        _between("finetune.momentum", self.momentum, 0, 0.9999)
        _between("finetune.step_factor", self.step_factor, 0, 1, open_low=True)
        _between("finetune.warmup_epochs", self.warmup_epochs, 0, max(self.epochs, 0))
        _between("finetune.difficulty_threshold", self.difficulty_threshold, 0, 1)
        for name in ("grad_clip", "lowpass_cutoff"):
            if getattr(self, name) is not None:
                _between(f"finetune.{name}", getattr(self, name), 0, open_low=True)
        weights = (self.kd_weight, self.ce_weight, self.cam_weight)
        _require("finetune.kd_weight", "be > 0 where ce_weight and cam_weight are 0 too", self.kd_weight, any(weights))
        _one_of("finetune.optimizer", self.optimizer, ("sgd", "adam"))
        _one_of("finetune.schedule", self.schedule, ("cosine", "step", "constant"))
        _one_of("finetune.lowpass_unit", self.lowpass_unit, ("bins", "nyquist"))
        _one_of("finetune.augment", self.augment, ("none", "flip_shift"))


FIDELITY_MEASURES = ("kl", "kl_t4", "jensen_shannon", "disagreement", "logit_mse")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """What the result is measured on. Nothing here changes the student."""

    dataset: str | None = None
    """Labelled set: digits, cifar10, cifar100, fashion-mnist, imagefolder:PATH, npz:FILE; none for no labels; None for the teacher's own."""
    data_dir: str | None = None
    """Folder that holds the files of cifar10, cifar100 and fashion-mnist."""
    num_images: int | None = None
    """Use only the first images of the labelled set; None is all of them."""
    batch_size: int = 256
    """Images per forward pass over all processes together."""
    heldout_images: int = 256
    """Synthetic images of other seeds on which the fidelity to the teacher is measured."""
    objective: Literal["synthetic", "selection"] = "synthetic"
    """What a sweep optimises: synthetic (fidelity to the teacher on held-out synthetic images) or selection (top-1 on a part of the labelled set)."""
    fidelity_measure: Literal["kl", "kl_t4", "jensen_shannon", "disagreement", "logit_mse"] = "kl"
    """Measure of objective synthetic, lower is better: KL at temperature 1 or 4, Jensen-Shannon (nats), disagreement (percent), logit_mse."""
    selection_fraction: float = 0.2
    """Part of the labelled set used for objective selection; the reported top-1 is measured on the rest."""
    every_epoch: bool = False
    """Whether the objective is measured after every epoch, not only after the last."""

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("heldout_images", 1)):
            _between(f"evaluation.{name}", getattr(self, name), low)
        if self.num_images is not None:
            _between("evaluation.num_images", self.num_images, 1)
        _between("evaluation.selection_fraction", self.selection_fraction, 0.01, 0.99)
        _one_of("evaluation.objective", self.objective, ("synthetic", "selection"))
        _one_of("evaluation.fidelity_measure", self.fidelity_measure, FIDELITY_MEASURES)
        labelled = self.objective == "synthetic" or self.dataset != "none"
        _require("evaluation.objective", "be synthetic where `evaluation.dataset` is none", self.objective, labelled)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Where and on what the run happens. Only `precision` may change its numbers beyond rounding order."""

    output_dir: str = "runs"
    """Folder for the run's own folder (record, checkpoint, student)."""
    store_dir: str | None = None
    """Folder of the synthetic sets; None is the folder store inside `output_dir`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU where there is one."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Arithmetic of fine-tuning: fp32, bf16 (autocast) or fp64 (for checks)."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Layout of weights and activations; auto is channels_last on CPU and under bf16, the faster one there."""
    compile: bool = False
    """Whether torch.compile builds the student's step (minutes once; slower on CPU, see launch/BENCHMARKS.md)."""
    num_threads: int | None = None
    """CPU threads of each process; None leaves the choice to the machine."""
    progress: bool = True
    """Whether progress is shown."""

    def __post_init__(self) -> None:
        _require("runtime.output_dir", "name a folder", self.output_dir, bool(self.output_dir.strip()))
        _one_of("runtime.device", self.device, ("auto", "cpu", "cuda"))
        _one_of("runtime.precision", self.precision, ("fp32", "bf16", "fp64"))
        _one_of("runtime.memory_format", self.memory_format, ("auto", "channels_last", "contiguous"))
        if self.num_threads is not None:
            _between("runtime.num_threads", self.num_threads, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run: from a pre-trained classifier to a measured low-bit student."""

    name: str = "run"
    """Name of the run; the first part of its folder's name."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The pre-trained classifier."""
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    """The synthetic images."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """The low-bit student."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """The training of the student."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """The measurement."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Folders, device and precision."""
    seed: int = 0
    """Seed of fine-tuning."""
    data_seed: int = 0
    """Seed of the synthetic images."""

    def __post_init__(self) -> None:
        slug = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None
        _require("name", "be letters, digits, dots, dashes and underscores (it names a folder)", self.name, slug)
        _between("seed", self.seed, 0, 2**63 - 1)
        _between("data_seed", self.data_seed, 0, 2**63 - 1)
        size, images = self.finetune.batch_size, self.synthesis.num_images
        rule = f"be <= `synthesis.num_images` ({images}), because an incomplete batch is dropped"
        _require("finetune.batch_size", rule, size, self.finetune.epochs == 0 or size <= images)
