"""The configuration of image synthesis. Standard library only."""

from dataclasses import dataclass
from typing import Literal

from synq.config.default_notes import noted, require_setting
from synq.config.parsing import between, one_of, require
from synq.config.plugins import SYNTHESIS_METHOD, check_known, is_added

PIXEL_METHODS = ("inversion", "zeroq")
"""Methods that optimize pixels, starting from noise."""
OWN_IMAGES = "own_images"
"""Method that makes no images but reads unlabeled ones of the user; its runs have a protocol of that name."""
SYNTHESIS_METHODS = tuple(name for name in SYNTHESIS_METHOD.built_in if name != OWN_IMAGES)
"""Methods of SynQ that make images."""

STRUCTURE_WEIGHTS = ("head_weight", "entropy_weight", "variation_weight")
"""Weights of the terms of `synq.synthesis.structure`; None lets the network's structure decide."""
ADDED_LATER = (*STRUCTURE_WEIGHTS, "prior_weight", "shift_color", "low_first")
"""Settings that are left out of digests where they have their default, so that the digests of before stay."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisConfig:
    """Synthesis of the images. All of these settings, the teacher and `data_seed` identify a synthetic set."""

    method: str = "inversion"
    """How images are made: inversion (pixels optimized for batch-norm statistics and labels, the paper's), zeroq
    (pixels, statistics alone), gdfq (a conditional generator), genie (latents and their generator), gaussian (Gaussian
    noise, a baseline), own_images (unlabeled images of yours, from source; not zero-shot), or a function of yours:
    FILE.py:FUNCTION, MODULE:FUNCTION, or a name that synq.synthesis_method or an entry point of synq.synthesis_methods
    registers; @VERSION is added. It is called with synq.SynthesisInputs and returns images."""
    source: str | None = None
    """Your unlabeled images under method own_images: folder:PATH (image files, at any depth) or npz:FILE (array x)."""
    num_images: int = 1024
    """Number of training images."""
    shard_size: int = 256
    """Images optimized together. Batch-norm statistics are matched over one shard: larger is better, up to the memory
    limit."""
    iterations: int = 100
    """Optimizer steps per shard."""
    lr: float = 0.1
    """Learning rate of Adam for the pixels (in normalized units) or the latents; under gdfq, for the pixels of the
    calibration centers."""
    generator_lr: float = 0.01
    """Learning rate of Adam for the weights of the generator (gdfq, genie)."""
    latent_dim: int = 128
    """Dimension of the latent vector of each image (gdfq, genie)."""
    swing_conv: bool | None = None
    """Whether strided convolutions of the teacher get randomly shifted inputs during synthesis; None: only under
    genie."""
    start: Literal["fitted", "white"] = "fitted"
    """Initial pixels: fitted (noise whose spectrum, colors, contrast and mean are fitted to the teacher's statistics)
    or white (N(0, 1), the paper's; needs several times the iterations, at lr 0.2 to 0.5). With generators and gaussian
    it applies to calibration centers and held-out images."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """How the learning rate decays: cosine to 0 over the iterations, or at each plateau of the loss (the paper's; needs
    about 1,000 iterations)."""
    plateau_patience: int = 50
    """Steps without improvement before the learning rate decays under schedule plateau."""
    plateau_factor: float = 0.1
    """Factor of each decay of the learning rate under schedule plateau."""
    bns_weight: float = 1.0
    """Weight of the batch-norm-statistics loss. Tune it per bns_form."""
    bns_form: Literal["std_sum", "var_mean"] = "std_sum"
    """Batch-norm-statistics loss: std_sum (squared distances of means and standard deviations, summed over channels) or
    var_mean (of means and variances, averaged)."""
    inception_weight: float = 0.05
    """Weight of the cross-entropy to the assigned label; 0 leaves only the batch-norm statistics. At 1 the teacher is
    certain of nearly every image."""
    hard_sample_gamma: float = 0.0
    """Exponent gamma of the hard-sample weight (1 - p)^gamma on the cross-entropy; 0 is the plain cross-entropy."""
    calib_centers: bool = False
    """Whether one optimized image per class (a calibration center) gives the deep layers a second statistics target."""
    center_iterations: int = 200
    """Optimizer steps for the calibration centers."""
    center_weight: float = 1.0
    """Weight of the second statistics target."""
    center_depth: float = 0.5
    """Fraction of the batch-norm layers, deepest first, that get the second target."""
    augment: Literal["none", "flip_shift"] = "none"
    """Augmentation of the images in each optimizer step: random flip and shift. It needs several times the
    iterations."""
    shift_color: bool = False
    """Whether images are shifted at random in each optimizer step and get random colors, which fade to none: for
    networks that were trained with such augmentations. It needs several times the iterations."""
    head_weight: float | None = None
    """Weight of the disagreement of attention heads (1 - SSIM^2 of their maps). None: 0.05 for a network without
    BatchNorm statistics, else 0."""
    entropy_weight: float | None = None
    """Weight of the negative entropy of the similarity of tokens, or of positions where there is no attention. None:
    0.05 for a network without BatchNorm statistics, else 0."""
    variation_weight: float | None = None
    """Weight of the total variation of the pixels. None: 0.002 for a network without BatchNorm statistics, else 0."""
    prior_weight: float | None = None
    """Weight of the distance of attention from random maps of one to five blobs, different for each image and head of
    the deeper half. None: 0. Without such attention it does nothing, with a notice."""
    low_first: bool = False
    """Whether images have low frequencies alone at first: up to 0.2 of the Nyquist frequency of each axis, then 0.3,
    0.4, 0.5 and 0.6, each for a fifth of the iterations. Only for optimized pixels."""

    def __post_init__(self) -> None:
        for name, low in (
            ("num_images", 1),
            ("shard_size", 2),
            ("iterations", 0),
            ("plateau_patience", 1),
            ("latent_dim", 1),
        ):
            between(f"synthesis.{name}", getattr(self, name), low)
        between("synthesis.generator_lr", self.generator_lr, 0, open_low=True)
        between("synthesis.center_iterations", self.center_iterations, 0)
        between("synthesis.lr", self.lr, 0, open_low=True)
        between("synthesis.plateau_factor", self.plateau_factor, 0, 1, open_low=True)
        for name in ("bns_weight", "inception_weight", "hard_sample_gamma", "center_weight"):
            between(f"synthesis.{name}", getattr(self, name), 0)
        between("synthesis.center_depth", self.center_depth, 0, 1)
        check_known(SYNTHESIS_METHOD, self.method)
        own = self.method == OWN_IMAGES
        method = noted(self, "method")
        rule = f"be given exactly for method {OWN_IMAGES} (it is {method})"
        require_setting(self, "synthesis.source", rule, (self.source is not None) == own)
        rule = f"be false for a method of yours ({method}), which gets no calibration centers"
        require("synthesis.calib_centers", rule, self.calib_centers, not (self.calib_centers and self.is_added))
        one_of("synthesis.start", self.start, ("fitted", "white"))
        one_of("synthesis.schedule", self.schedule, ("cosine", "plateau"))
        one_of("synthesis.bns_form", self.bns_form, ("std_sum", "var_mean"))
        one_of("synthesis.augment", self.augment, ("none", "flip_shift"))
        require(
            "synthesis.low_first",
            f"be false unless `synthesis.method` ({method}) is one of {', '.join(PIXEL_METHODS)}",
            self.low_first,
            not self.low_first or self.method in PIXEL_METHODS,
        )
        for name in (*STRUCTURE_WEIGHTS, "prior_weight"):
            if (weight := getattr(self, name)) is not None:
                between(f"synthesis.{name}", weight, 0)

    @property
    def is_added(self) -> bool:
        """Whether the method is a function of the user."""
        return is_added(SYNTHESIS_METHOD, self.method)

    @property
    def assigns_labels(self) -> bool:
        """Whether labels are assigned before synthesis and enter its loss; else they are the teacher's predictions."""
        return self.method not in ("zeroq", "gaussian", OWN_IMAGES)

    @property
    def fits_start(self) -> bool:
        """Whether the initial noise of the pixels is fitted to the teacher first."""
        return self.start == "fitted" and self.method in PIXEL_METHODS

    @property
    def swings(self) -> bool:
        """Whether strided convolutions get shifted inputs, with None replaced by the default of the method."""
        return self.method == "genie" if self.swing_conv is None else self.swing_conv
