"""The configuration of fine-tuning. Standard library only."""

from dataclasses import dataclass
from typing import Literal

from synq.config.parsing import between, one_of, require


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """How the quantized student is trained on the synthetic images."""

    epochs: int = 15
    """Passes over the synthetic images; 0 leaves round-to-nearest."""
    batch_size: int = 64
    """Images per step over all processes together; must divide by the number of processes."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of the student's parameters."""
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
    grad_clip_relative: float | None = 0.1
    """Largest norm of the gradient of each weight tensor, after grad_clip, as a share of the tensor's own norm; None
    does not clip."""
    kd_temperature: float = 4.0
    """Temperature T of the distillation loss T^2 KL(teacher / T || student / T)."""
    kd_weight: float = 1.0
    """Weight of the distillation loss."""
    ce_weight: float = 0.1
    """Weight of the cross-entropy to the assigned label on images the teacher finds easy."""
    hard_labels: Literal["drop", "top2"] = "drop"
    """What a difficult image gets instead of its hard label: nothing (drop, the paper's), or its teacher's two
    likeliest classes."""
    cam_weight: float = 20.0
    """Weight of the distance between the class activation maps of teacher and student; it belongs to `cam_method`."""
    cam_method: Literal["gradcam", "gradcam++", "cam"] = "gradcam"
    """How the maps are made: gradcam (the paper's), gradcam++, or cam (the classifier's own weights, no ReLU)."""
    feature_weight: float = 0.0
    """Weight of the relative squared distance between the outputs of each block of teacher and student."""
    perturb_weight: float = 0.0
    """Weight of the distillation on perturbed images, each made harder for the student by one signed gradient step
    (lambda_P)."""
    perturb_size: float = 0.02
    """Size of that step, in normalized units of the input."""
    difficulty_threshold: float = 0.5
    """Largest difficulty (1 - teacher's probability of the label) at which the cross-entropy counts; 1 keeps every
    image."""
    lowpass_cutoff: float | None = 1.0
    """Cutoff D0 of the Gaussian low-pass filter on the images, in `lowpass_unit`; None does not filter."""
    lowpass_unit: Literal["bins", "nyquist"] = "nyquist"
    """Unit of the cutoff: DFT bins (the paper's), or the share of the Nyquist frequency (1 at 32 pixels is 16 bins)."""
    train_bn: bool = True
    """Whether the batch-norm scale and shift are trained; their running statistics never are."""
    ema_decay: float | None = None
    """Decay of an average of the weights over the steps, which becomes the student at the end; None takes the last
    weights."""
    step_lr_factor: float = 1.0
    """Learning rate of learned quantization steps, as a multiple of that of the weights."""
    augment: Literal["none", "flip_shift", "mixup", "cutmix"] = "none"
    """Random views of each training batch: flip and shift, or a blend (mixup) or collage (cutmix) of two images; the
    teacher runs live."""
    log_every: int = 10
    """Steps between two updates of the progress line."""

    def __post_init__(self) -> None:
        for name, low in (("epochs", 0), ("batch_size", 1), ("step_epochs", 1), ("log_every", 1)):
            between(f"finetune.{name}", getattr(self, name), low)
        for name in ("lr", "kd_temperature"):
            between(f"finetune.{name}", getattr(self, name), 0, open_low=True)
        for name in (
            "weight_decay",
            "kd_weight",
            "ce_weight",
            "cam_weight",
            "feature_weight",
            "perturb_weight",
            "perturb_size",
        ):
            between(f"finetune.{name}", getattr(self, name), 0)
        between("finetune.step_lr_factor", self.step_lr_factor, 0)
        if self.ema_decay is not None:
            between("finetune.ema_decay", self.ema_decay, 0, 0.999999)
        between("finetune.momentum", self.momentum, 0, 0.9999)
        between("finetune.step_factor", self.step_factor, 0, 1, open_low=True)
        between("finetune.warmup_epochs", self.warmup_epochs, 0, max(self.epochs, 0))
        between("finetune.difficulty_threshold", self.difficulty_threshold, 0, 1)
        for name in ("grad_clip", "grad_clip_relative", "lowpass_cutoff"):
            if getattr(self, name) is not None:
                between(f"finetune.{name}", getattr(self, name), 0, open_low=True)
        weights = (self.kd_weight, self.ce_weight, self.cam_weight, self.feature_weight, self.perturb_weight)
        require("finetune.kd_weight", "be > 0 where all other weights of the loss are 0", self.kd_weight, any(weights))
        one_of("finetune.optimizer", self.optimizer, ("sgd", "adam"))
        one_of("finetune.schedule", self.schedule, ("cosine", "step", "constant"))
        one_of("finetune.lowpass_unit", self.lowpass_unit, ("bins", "nyquist"))
        one_of("finetune.augment", self.augment, ("none", "flip_shift", "mixup", "cutmix"))
        one_of("finetune.hard_labels", self.hard_labels, ("drop", "top2"))
        one_of("finetune.cam_method", self.cam_method, ("gradcam", "gradcam++", "cam"))


SWITCHED_OFF: dict[str, tuple[str, float | None]] = {
    "filter": ("lowpass_cutoff", None),
    "CAM": ("cam_weight", 0.0),
    "soft labels": ("difficulty_threshold", 1.0),
}
"""SynQ's three ideas: the setting of `FinetuneConfig` that each is, and the value that switches it off."""
