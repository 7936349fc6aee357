"""How the synthetic images are made, as frozen values. Standard library only."""

from dataclasses import dataclass
from typing import Literal

from synq.config.parsing import between, one_of

PIXEL_METHODS = ("inversion", "zeroq")
"""Those that optimize pixels, which begin as noise."""
SYNTHESIS_METHODS = ("inversion", "zeroq", "gdfq", "genie", "gaussian")


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisConfig:
    """How the synthetic images are made. Everything here, the teacher and `data_seed` decide which set is used."""

    method: Literal["inversion", "zeroq", "gdfq", "genie", "gaussian"] = "inversion"
    """What makes the images: inversion (pixels optimized for statistics and labels, the paper's), zeroq (pixels,
    statistics alone), gdfq (a conditional generator), genie (latents and their generator), gaussian (plain noise, to
    compare with)."""
    num_images: int = 1024
    """Number of training images to make."""
    shard_size: int = 256
    """Images optimized together; batch-norm statistics are matched over one shard, so larger is better until memory
    ends."""
    iterations: int = 100
    """Optimizer steps per shard."""
    lr: float = 0.1
    """Learning rate of Adam on the pixels (normalized units) or the latents; of gdfq, which has neither, on its
    centers' pixels."""
    generator_lr: float = 0.01
    """Learning rate of Adam on the weights of a generator (gdfq, genie)."""
    latent_dim: int = 128
    """Numbers behind each image of a generator (gdfq, genie)."""
    swing_conv: bool | None = None
    """Whether strided convolutions of the teacher see randomly shifted inputs during synthesis; None: for genie
    alone."""
    start: Literal["fitted", "white"] = "fitted"
    """What optimized pixels begin as: noise whose falloff over frequency, colors, contrast and mean fit the teacher's
    statistics, or white noise N(0, 1), the paper's, which wants several times as many steps, at `lr` 0.2 to 0.5. Where
    generators or gaussian make the images it counts for centers and for the held-out images."""
    schedule: Literal["cosine", "plateau"] = "cosine"
    """How the learning rate falls: by a cosine to 0 over the iterations, or at each plateau of the loss (the paper's;
    wants 1,000)."""
    plateau_patience: int = 50
    """Steps without improvement after which the learning rate falls."""
    plateau_factor: float = 0.1
    """Factor by which the learning rate falls on a plateau."""
    bns_weight: float = 1.0
    """Weight of the batch-norm-statistics loss; it belongs to `bns_form`."""
    bns_form: Literal["std_sum", "var_mean"] = "std_sum"
    """std_sum: squared distances of means and standard deviations, summed over channels; var_mean: variances,
    averaged."""
    inception_weight: float = 0.05
    """Weight of the cross-entropy to the assigned label; 0 leaves only the batch-norm statistics. At 1 nearly every
    image is certain."""
    hard_sample_gamma: float = 0.0
    """Exponent of the hard-sample weight (1 - p)^gamma on the cross-entropy; 0 is the plain cross-entropy."""
    calib_centers: bool = False
    """Whether one optimized image per class supplies a second statistics target for the deep layers."""
    center_iterations: int = 200
    """Optimizer steps for the calibration centers."""
    center_weight: float = 1.0
    """Weight of the second statistics target."""
    center_depth: float = 0.5
    """Share of the batch-norm layers, deepest first, that get the second target."""
    augment: Literal["none", "flip_shift"] = "none"
    """Whether each step sees the images flipped and shifted at random; it then takes several times as many steps to the
    same statistics."""

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
        one_of("synthesis.method", self.method, SYNTHESIS_METHODS)
        one_of("synthesis.start", self.start, ("fitted", "white"))
        one_of("synthesis.schedule", self.schedule, ("cosine", "plateau"))
        one_of("synthesis.bns_form", self.bns_form, ("std_sum", "var_mean"))
        one_of("synthesis.augment", self.augment, ("none", "flip_shift"))

    @property
    def assigns_labels(self) -> bool:
        """Whether labels are assigned before and their loss counts; otherwise they are the teacher's predictions."""
        return self.method not in ("zeroq", "gaussian")

    @property
    def fits_start(self) -> bool:
        """Whether the noise that pixels begin as is fitted to the teacher first."""
        return self.start == "fitted" and self.method in PIXEL_METHODS

    @property
    def swings(self) -> bool:
        """Whether strided convolutions see shifted inputs, the default of the method put in."""
        return self.method == "genie" if self.swing_conv is None else self.swing_conv
