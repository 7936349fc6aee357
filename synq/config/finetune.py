"""The configuration of fine-tuning. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from synq.config.default_notes import noted, require_setting
from synq.config.parsing import between, one_of, require


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """Fine-tuning of the quantized student on the synthetic images."""

    epochs: int = 15
    """Number of passes over the synthetic images; 0 skips fine-tuning and keeps the student as calibrated."""
    batch_size: int = 64
    """Images per optimizer step, over all processes together; must be divisible by the number of processes."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of the student's parameters."""
    lr: float = 0.01
    """Peak learning rate."""
    momentum: float = 0.9
    """Nesterov momentum of sgd (0: none); beta_1 of adam."""
    weight_decay: float = 1e-4
    """L2 penalty added to the gradient."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """How the learning rate decays: cosine to 0, step by step_factor every step_epochs, or constant."""
    step_epochs: int = 10
    """Epochs between two decays of the learning rate under schedule step."""
    step_factor: float = 0.1
    """Factor of each decay of the learning rate under schedule step."""
    warmup_epochs: float = 0.0
    """Epochs (fractions allowed) of linear warmup of the learning rate from 0."""
    grad_clip: float | None = 1.0
    """Maximum L2 norm of the gradient over all parameters; None disables clipping."""
    grad_clip_relative: float | None = 0.1
    """Maximum norm of the gradient of each weight tensor, as a fraction of the norm of the tensor, after grad_clip;
    None disables it."""
    kd_temperature: float = 4.0
    """Temperature T of the distillation loss T^2 KL(teacher / T || student / T)."""
    kd_weight: float = 1.0
    """Weight of the distillation loss."""
    ce_weight: float = 0.1
    """Weight lambda_CE of the cross-entropy to the assigned label, on images with a difficulty up to
    difficulty_threshold."""
    hard_labels: Literal["drop", "top2"] = "drop"
    """Target of the cross-entropy on difficult images: none (drop, as in the paper), or the teacher's two most likely
    classes (top2)."""
    cam_weight: float = 20.0
    """Weight lambda_CAM of the squared distance between the class activation maps of teacher and student; 0 disables
    the term. Tune it per cam_method."""
    cam_method: Literal["gradcam", "gradcam++", "cam"] = "gradcam"
    """How class activation maps are computed: gradcam (the paper's), gradcam++, or cam (weights of the classifier, no
    ReLU)."""
    feature_weight: float = 0.0
    """Weight of the relative squared distance between the block outputs of teacher and student; 0 disables the term."""
    attention_weight: float = 0.0
    """Weight of 1 - the structural similarity of what each attention head of teacher and student gathers; 0 disables
    the term, as does a network without attention, with a notice."""
    perturb_weight: float = 0.0
    """Weight lambda_P of the distillation loss on perturbed images, made harder for the student by one signed gradient
    step; 0 disables the term."""
    perturb_size: float = 0.02
    """Size of that step, in units of the normalized input."""
    own_term: str | None = None
    """Loss term of yours: FILE.py:FUNCTION, MODULE:FUNCTION, or a name that synq.loss_term or an entry point of
    synq.loss_terms registers; @VERSION is added. It is called with synq.LossInputs and returns one value per image."""
    own_weight: float = 0.0
    """Weight of own_term, which must be given with it; 0 disables it."""
    difficulty_threshold: float = 0.5
    """Largest difficulty tau (1 - teacher's probability of the label) at which the cross-entropy counts; 1 keeps every
    image."""
    lowpass_cutoff: float | None = 1.0
    """Cutoff D0 of the Gaussian low-pass filter on the images, in lowpass_unit; None disables the filter."""
    lowpass_unit: Literal["bins", "nyquist"] = "nyquist"
    """Unit of lowpass_cutoff: bins of the DFT (the paper's), or fraction of the Nyquist frequency (1.0 at 32 pixels is
    16 bins)."""
    train_bn: bool = True
    """Whether batch-norm scale and shift are trained; running statistics never change."""
    ema_decay: float | None = None
    """Decay per step of an exponential moving average of the weights, which becomes the final student; None keeps the
    last weights."""
    step_lr_factor: float = 1.0
    """Learning rate of learned quantization step sizes, as a multiple of the learning rate of the weights."""
    augment: Literal["none", "flip_shift", "mixup", "cutmix"] = "none"
    """Augmentation of each training batch: flip and shift, mixup or cutmix. The teacher's logits are then computed in
    every step."""
    log_every: int = 10
    """Optimizer steps between two updates of the progress bar."""

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
            "attention_weight",
            "perturb_weight",
            "perturb_size",
            "own_weight",
        ):
            between(f"finetune.{name}", getattr(self, name), 0)
        between("finetune.step_lr_factor", self.step_lr_factor, 0)
        if self.ema_decay is not None:
            between("finetune.ema_decay", self.ema_decay, 0, 0.999999)
        between("finetune.momentum", self.momentum, 0, 0.9999)
        between("finetune.step_factor", self.step_factor, 0, 1, open_low=True)
        between("finetune.warmup_epochs", self.warmup_epochs, 0)
        rule = f"be at most `finetune.epochs` ({noted(self, 'epochs')})"
        require_setting(self, "finetune.warmup_epochs", rule, self.warmup_epochs <= self.epochs)
        between("finetune.difficulty_threshold", self.difficulty_threshold, 0, 1)
        for name in ("grad_clip", "grad_clip_relative", "lowpass_cutoff"):
            if getattr(self, name) is not None:
                between(f"finetune.{name}", getattr(self, name), 0, open_low=True)
        rule = "be 0 unless `finetune.own_term` names the term"
        require("finetune.own_weight", rule, self.own_weight, self.own_term is not None or self.own_weight == 0)
        weights = (
            self.kd_weight,
            self.ce_weight,
            self.cam_weight,
            self.feature_weight,
            self.attention_weight,
            self.perturb_weight,
            self.own_weight,
        )
        require("finetune.kd_weight", "be > 0 where all other weights of the loss are 0", self.kd_weight, any(weights))
        one_of("finetune.optimizer", self.optimizer, ("sgd", "adam"))
        one_of("finetune.schedule", self.schedule, ("cosine", "step", "constant"))
        one_of("finetune.lowpass_unit", self.lowpass_unit, ("bins", "nyquist"))
        one_of("finetune.augment", self.augment, ("none", "flip_shift", "mixup", "cutmix"))
        one_of("finetune.hard_labels", self.hard_labels, ("drop", "top2"))
        one_of("finetune.cam_method", self.cam_method, ("gradcam", "gradcam++", "cam"))

    @property
    def uses_cam(self) -> bool:
        """Whether the loss has a CAM term; a teacher without a location for the maps disables it all the same."""
        return self.cam_weight > 0


OWN_WEIGHT = "finetune.own_weight"


def has_own_weight(*given: Mapping[str, Any]) -> bool:
    """Return whether settings that were given, as tables or by dotted key, have the weight of the user's loss term."""
    return any(OWN_WEIGHT in keys or "own_weight" in (keys.get("finetune") or {}) for keys in given)


def check_own_weight(finetune: FinetuneConfig, *, is_given: bool = False) -> None:
    """Raise ValueError if there is a loss term of the user without a weight, which would have no effect.

    Args:
        finetune: The settings as the user gave them. Trials of a sweep, whose weights may be 0, are not checked.
        is_given: Whether the weight was given, perhaps as 0, or a sweep searches it.
    """
    if finetune.own_term is not None and not finetune.own_weight and not is_given:
        raise ValueError(
            f"`{OWN_WEIGHT}` must be given with `finetune.own_term`, which has no effect at weight 0, but got only "
            f"{finetune.own_term}: give a weight, such as 1"
        )


def inactive_keys(finetune: Mapping[str, Any], learned_steps: str) -> set[str]:
    """Return the keys of `finetune` that have no effect because the term they belong to is disabled.

    Args:
        finetune: A `FinetuneConfig` as a mapping.
        learned_steps: `quant.learned_steps` of the same run.
    """
    has_own = finetune["own_weight"] != 0 and finetune["own_term"] is not None
    active = {
        "own_term": has_own,
        "own_weight": has_own,
        "perturb_size": finetune["perturb_weight"] != 0,
        "attention_weight": finetune["attention_weight"] != 0,
        "cam_method": finetune["cam_weight"] != 0,
        "hard_labels": finetune["ce_weight"] != 0,
        "step_lr_factor": learned_steps != "none",
    }
    return {key for key, is_active in active.items() if not is_active}


SWITCHED_OFF: dict[str, tuple[str, float | None]] = {
    "filter": ("lowpass_cutoff", None),
    "CAM": ("cam_weight", 0.0),
    "soft labels": ("difficulty_threshold", 1.0),
}
"""SynQ's three ideas: the field of `FinetuneConfig` that controls each, and the value that disables it."""
