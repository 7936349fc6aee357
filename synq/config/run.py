"""The configuration of a run: frozen dataclasses, validated where they are defined. Standard library only.

A configuration is a `RunConfig` of seven parts. Mappings (TOML, JSON, dotted overrides) become one through
`config_from_dict`, which is strict: an unknown key or a value of another type is rejected, never dropped or guessed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from synq.common.digests import KEY, read_sealed_json
from synq.config.default_notes import noted, require_setting
from synq.config.file_kinds import read_as
from synq.config.finetune import FinetuneConfig
from synq.config.identity import DIGEST_FORMAT, config_digest, make_absolute
from synq.config.key_tables import merged_keys
from synq.config.parsing import between as _between
from synq.config.parsing import (
    check_format,
    config_from_dict,
    config_to_dict,
    load_config,
    parse_bits,
    with_overrides,
)
from synq.config.parsing import one_of as _one_of
from synq.config.parsing import require as _require
from synq.config.quant import QuantConfig, ReconstructionConfig
from synq.config.spec_hints import spec_hint
from synq.config.synthesis import OWN_IMAGES, SynthesisConfig

__all__ = [
    "EvaluationConfig",
    "FinetuneConfig",
    "QuantConfig",
    "ReconstructionConfig",
    "RunConfig",
    "RuntimeConfig",
    "SynthesisConfig",
    "TeacherConfig",
    "config_digest",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "load_run",
    "make_absolute",
    "parse_bits",
    "with_overrides",
]


MAX_INPUT = 2**24
"""Largest number of values of an image; the feature maps of larger ones fit no usual memory."""
MAX_NAME = 200
"""Characters of a name; folders are called by it with a digest, and file systems take 255."""
MAX_SIDE = 2**14
"""Largest side in pixels that an image file is resized to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The pre-trained classifier to quantize."""

    spec: str = "bundled:digits_resnet8"
    """FILE.py:FACTORY, torchvision:NAME, timm:NAME, hf:FOLDER or hf:NAME (Hugging Face transformers), pytorchcv:NAME,
    bundled:NAME, PACKAGE.MODULE:FACTORY, or SOURCE:MODEL of a source that synq.teacher_source or an entry point of
    synq.teacher_sources registers (@VERSION is added to SOURCE)."""
    weights: str | None = None
    """Weights file, a name of torchvision such as IMAGENET1K_V1, or random (untrained); None takes those of the source.
    A file is .safetensors, of torch.save, or the .index.json of a sharded set."""
    num_classes: int | None = None
    """Number of classes; None reads it from the model."""
    input_size: tuple[int, int, int] | None = None
    """Input size as channels, height and width in pixels; None reads it from the model."""
    mean: tuple[float, ...] | None = None
    """Mean per channel, or one for all, on the scale 0..1, of the normalization that the teacher was trained with; None
    reads it from the model. Never guessed."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel, or one for all, on the scale 0..1, of that normalization; None reads it from the
    model. Never guessed."""
    cam_layer: str | None = None
    """Module or graph node whose output class activation maps are computed from; None finds it from the structure of
    the model."""
    output: str | None = None
    """Location of the logits in the model's output: a key, index or attribute; None if the output is the logits
    tensor."""

    def __post_init__(self) -> None:
        if ":" not in self.spec:
            rule = "`teacher.spec` must read SOURCE:NAME, for example torchvision:resnet18"
            raise ValueError(f"{rule}, but got {self.spec!r}{spec_hint(self.spec)}")
        if self.num_classes is not None:
            _between("teacher.num_classes", self.num_classes, 2)
        size, mean, std = self.input_size, self.mean, self.std
        if size is not None:
            is_valid = len(size) == 3 and all(part >= 1 for part in size)
            _require("teacher.input_size", "be three numbers >= 1 (channels, height, width)", size, is_valid)
            rule = f"have at most {MAX_INPUT:,} values (an image of 2,048 x 2,048 in color has 12,582,912)"
            _require("teacher.input_size", rule, size, math.prod(size) <= MAX_INPUT)
        rule = f"be given exactly when `teacher.mean` ({noted(self, 'mean')}) is"
        require_setting(self, "teacher.std", rule, (mean is None) == (std is None), cure="give both, or neither")
        if mean is not None and std is not None:
            channels = size[0] if size is not None else max(len(mean), len(std))
            mean, std = (values * channels if len(values) == 1 else values for values in (mean, std))
            object.__setattr__(self, "mean", mean)  # one value is that of all channels
            object.__setattr__(self, "std", std)
            _require("teacher.mean", f"hold one finite number per channel ({channels})", mean, _finite(mean, channels))
            rule = "be on the scale of images in [0, 1] (divide values for pixels in 0..255 by 255)"
            _require("teacher.mean", rule, mean, all(abs(part) <= 1 for part in mean))
            positive = _finite(std, channels) and all(part > 0 for part in std)
            _require("teacher.std", f"hold one number > 0 per channel ({channels})", std, positive)


def _finite(values: tuple[float, ...], length: int) -> bool:
    return len(values) == length and all(math.isfinite(value) for value in values)


FIDELITY_MEASURES = ("kl", "kl_t4", "jensen_shannon", "disagreement", "logit_mse")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Measurement of the result. No setting here changes the student."""

    NONE_IS_TEXT = ("dataset",)

    dataset: str | None = None
    """Labeled set for top-1: digits, cifar10, cifar100, fashion-mnist, imagefolder:PATH or npz:FILE; or a function of
    yours that returns images and labels: FILE.py:FUNCTION, or NAME[:TEXT] of one that synq.dataset_source or an entry
    point of synq.dataset_sources registers (@VERSION is added); none skips it; None takes the set of the bundled
    teacher."""
    data_dir: str | None = None
    """Folder with the files of cifar10, cifar100 and fashion-mnist."""
    num_images: int | None = None
    """Number of images of the labeled set to use: a fixed subset, selected by a hash of each image's index from the
    whole set, so that a smaller one is contained in a larger; None uses all."""
    resize_size: int | None = None
    """Pixels that the shorter side of an image file (imagefolder) is resized to before its center is cut out; None
    takes it from the weights' own preprocessing (torchvision, timm), or 256/224 of the input size if unknown."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """Filter of that resizing; None takes it from the weights' own preprocessing, or bilinear."""
    batch_size: int = 256
    """Images per forward pass, over all processes together."""
    heldout_images: int = 256
    """Number of synthetic images, made with other seeds, on which the fidelity to the teacher is measured."""
    objective: Literal["synthetic", "selection"] = "synthetic"
    """Metric that a sweep optimizes: synthetic (fidelity to the teacher on held-out synthetic images) or selection
    (top-1 on a part of the labeled set)."""
    fidelity_measure: Literal["kl", "kl_t4", "jensen_shannon", "disagreement", "logit_mse"] = "kl"
    """Metric of objective synthetic, lower is better: KL at temperature 1 or 4 and Jensen-Shannon divergence (nats),
    disagreement (percent), or mean squared error of the logits."""
    selection_fraction: float = 0.2
    """Fraction of the labeled set used for objective selection; the reported top-1 is measured on the rest."""
    every_epoch: bool = False
    """Whether the objective is measured after every epoch; false measures it after the last only."""

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("heldout_images", 1)):
            _between(f"evaluation.{name}", getattr(self, name), low)
        if self.num_images is not None:
            _between("evaluation.num_images", self.num_images, 1)
        if self.resize_size is not None:
            _between("evaluation.resize_size", self.resize_size, 1, MAX_SIDE)
        if self.interpolation is not None:
            _one_of("evaluation.interpolation", self.interpolation, ("nearest", "bilinear", "bicubic", "lanczos"))
        _between("evaluation.selection_fraction", self.selection_fraction, 0.01, 0.99)
        _one_of("evaluation.objective", self.objective, ("synthetic", "selection"))
        _one_of("evaluation.fidelity_measure", self.fidelity_measure, FIDELITY_MEASURES)
        labeled = self.objective == "synthetic" or self.dataset != "none"
        _require("evaluation.objective", "be synthetic where `evaluation.dataset` is none", self.objective, labeled)


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """Folders, device and precision. Only `precision` may change results beyond the order of rounding."""

    output_dir: str = "runs"
    """Folder in which every run gets a folder (record, checkpoint, student)."""
    store_dir: str | None = None
    """Folder of the synthetic sets, shared by runs; None is store/ in output_dir."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes a GPU if there is one."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Arithmetic of fine-tuning: fp32, bf16 (autocast) or fp64 (for checks)."""
    memory_format: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Memory format of weights and activations; auto is channels_last on CPU and under bf16, where it is faster."""
    compile: bool = False
    """Whether to compile the student with torch.compile (takes minutes once; slower on CPU, see
    docs/results/BENCHMARKS.md)."""
    num_threads: int | None = None
    """CPU threads of each process; None keeps PyTorch's default."""
    progress: bool = True
    """Whether to show progress bars."""
    tracker: Literal["none", "tensorboard", "wandb", "mlflow"] = "none"
    """Experiment tracker for the loss terms of every epoch and the result; each one but none needs its package."""

    def __post_init__(self) -> None:
        _require("runtime.output_dir", "name a folder", self.output_dir, bool(self.output_dir.strip()))
        _one_of("runtime.device", self.device, ("auto", "cpu", "cuda"))
        _one_of("runtime.precision", self.precision, ("fp32", "bf16", "fp64"))
        _one_of("runtime.tracker", self.tracker, ("none", "tensorboard", "wandb", "mlflow"))
        _one_of("runtime.memory_format", self.memory_format, ("auto", "channels_last", "contiguous"))
        if self.num_threads is not None:
            _between("runtime.num_threads", self.num_threads, 1)


PATH_SETTINGS = ("teacher.spec", "teacher.weights", "evaluation.dataset", "evaluation.data_dir", "runtime.store_dir")
"""Settings of a run that are paths. The files may be moved afterwards: digests identify their content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run: from a pre-trained classifier to a measured low-bit student."""

    name: str = "run"
    """Name of the run, the first part of the name of its folder."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The pre-trained classifier."""
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    """The synthetic images."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """The quantized student."""
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """Learned rounding, under quant.rounding adaround."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Fine-tuning of the student."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measurement of the result."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Folders, device and precision."""
    seed: int = 0
    """Seed of fine-tuning."""
    data_seed: int = 0
    """Seed of the synthetic images."""

    @property
    def protocol(self) -> str:
        """Return the protocol: that of the quantization, with own_images unless the run is zero-shot."""
        own = self.synthesis.method == OWN_IMAGES
        return f"{self.quant.protocol} {OWN_IMAGES}" if own else self.quant.protocol

    def __post_init__(self) -> None:
        slug = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None
        _require("name", "be letters, digits, dots, dashes and underscores (it names a folder)", self.name, slug)
        _require("name", f"have at most {MAX_NAME} characters", self.name, len(self.name) <= MAX_NAME)
        _between("seed", self.seed, 0, 2**63 - 1)
        _between("data_seed", self.data_seed, 0, 2**63 - 1)
        size, images = self.finetune.batch_size, self.synthesis.num_images
        number = noted(self.synthesis, "num_images")
        rule = f"be <= `synthesis.num_images` ({number}), because a batch has no image twice"
        cure = f"set `finetune.batch_size` to {images} or less"
        if number.endswith("default"):
            cure += f", or `synthesis.num_images` to {size} or more"
        fits = self.finetune.epochs == 0 or size <= images
        require_setting(self.finetune, "finetune.batch_size", rule, fits, cure=cure)


def load_run(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read the settings of one run from a TOML or JSON file; missing keys have their defaults.

    A `config.json` written by a run has every key, the number of its format, and its digest.

    Args:
        path: The file.
        overrides: Settings by dotted key that go before those of the file.

    Raises:
        OSError: As `load_config`.
        ValueError: As `load_config` and `config_from_dict`, or the file has the format of another version of SynQ.
    """
    content = load_config(path)
    if Path(path).suffix == ".json" and ("format" in content or _is_incomplete(content)):
        if KEY in content:
            content, _ = read_sealed_json(path, f"take its last key, {KEY}, out if the change is meant")
        cure = "write the settings into a new file and run it again"
        check_format(path, "the settings of a run", content.pop("format", None), DIGEST_FORMAT, cure)
    with read_as("run", content, path):
        return config_from_dict(RunConfig, merged_keys(content, overrides or {}), source=str(path))


def _is_incomplete(content: dict[str, Any]) -> bool:
    """Return whether a mapping has every part of a run, like a written `config.json`, but lacks keys of a part."""
    whole = config_to_dict(RunConfig())
    parts = {key: keys for key, keys in whole.items() if isinstance(keys, dict)}
    named = whole.keys() <= content.keys() and all(isinstance(content[part], dict) for part in parts)
    return named and any(keys.keys() - content[part].keys() for part, keys in parts.items())
