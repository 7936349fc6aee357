"""Synthesis-aware fine-tuning of a quantized student, on 1..n processes.

A step costs one forward and one backward pass of the student. The images are already low-pass filtered; the teacher's
logits and maps are computed once unless the images are augmented; class activation maps come from the features of the
same forward passes (SynQ, section 4; the closed form of the CAM weights is ours).
"""

import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn

from synq.common.progress import Bar, note, visible
from synq.common.seeding import make_generator
from synq.config.run import FinetuneConfig
from synq.finetune.augment import random_views
from synq.finetune.checkpoints import check_same_epoch, load_checkpoint, save_checkpoint
from synq.finetune.ema import WeightAverage
from synq.finetune.optimizers import clip_relative, make_optimizer
from synq.finetune.responses import Response, TappedNetwork, cached_responses, teacher_response
from synq.finetune.schedule import epoch_batches, local_batch_size, lr_at, num_steps
from synq.finetune.training_loss import harder_images, training_loss
from synq.network.tracing import batchnorm_parameters
from synq.runtime import synchronize_parameters
from synq.teacher.pixel_range import PixelRange

Epoch = dict[str, float]


class NonFiniteLossError(RuntimeError):
    """A loss term or the gradient norm is not finite; the message names it."""


class LossMeter:
    """Sums of the loss terms over the steps of an epoch, on the device; reading them is the only host sync."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.steps = 0
        self.sums: dict[str, Tensor] = {}
        self.summary = ""
        """Running means at the last ``check``, for a progress bar: "loss 0.1 kd 0.05"."""

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of one step."""
        self.steps += 1
        for name, value in terms.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def check(self) -> None:
        """Update ``summary`` and check that every sum is finite (a NaN once added stays).

        Raises:
            NonFiniteLossError: A sum is not finite; the message names the term, the epoch and the step.
        """
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        for name, value in sorted(means.items(), key=lambda item: item[0] == "loss"):
            if not math.isfinite(value):
                if self.epoch == 0 and self.steps == 1:  # no update yet: no learning rate helps
                    raise NonFiniteLossError(
                        f"{name} is {value} before the first update: with so few bits the student itself gives it, as "
                        "a division by a value that is rounded to zero does. Raise quant.act_bits, or bits of single "
                        "tensors by quant.layer_act_bits"
                    )
                raise NonFiniteLossError(
                    f"{name} became {value} in epoch {self.epoch + 1}, step <= {self.steps}. "
                    "Lower finetune.lr, or the weight of this term"
                )
        self.summary = " ".join(f"{name} {means[name]:.4g}" for name in ("loss", "kd") if name in means)

    def means(self, accelerator: Accelerator) -> Epoch:
        """Return the means over steps and processes."""
        names = list(self.sums)
        values = torch.stack([self.sums[name].to(accelerator.device) for name in names]) / self.steps
        values = accelerator.reduce(values, reduction="mean")
        return dict(zip(names, values.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Networks, optimizer and data of a fine-tuning, the same in every step.

    Attributes:
        student: The quantized network.
        teacher: The frozen teacher.
        model: ``student.net``, wrapped by DDP if there are several processes.
        parameters: The trained parameters of ``model``.
        optimizer: Optimizer of ``parameters``.
        average: Moving average of ``parameters``.
        take: Returns images and labels by row numbers, on the device.
        cached: Returns the teacher's responses by row numbers; None if they are computed in every step.
        share: Slice of the global batch that this process computes.
        autocast: Returns the context of the forward passes.
        pixel_range: Range of normalized pixels, which perturbed images do not leave; None for no bounds.
        config: Settings.
        accelerator: Process group.
    """

    student: TappedNetwork
    teacher: TappedNetwork
    model: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: WeightAverage
    take: Callable[[Tensor], tuple[Tensor, Tensor]]
    cached: Callable[[Tensor], Response] | None
    share: slice
    autocast: Callable[[], AbstractContextManager[None]]
    pixel_range: PixelRange | None
    config: FinetuneConfig
    accelerator: Accelerator


def training_step(
    training: Training, batch: Tensor, lr: float, generator: torch.Generator, meter: LossMeter, *, check: bool
) -> None:
    """Do one optimizer step: teacher forward, student forward, loss, backward, update.

    Args:
        training: Networks, optimizer, data.
        batch: (B,) int64, row numbers of the global batch.
        lr: Learning rate of this step.
        generator: Generator of the augmentation, in the same state on every process.
        meter: Accumulates the loss terms and the gradient norm.
        check: Whether to check the meter before the update, the only host synchronization.

    Raises:
        NonFiniteLossError: As ``LossMeter.check``; the weights are then still those of the previous step.
    """
    student, teacher, config = training.student, training.teacher, training.config
    rows = batch[training.share]
    images, labels = training.take(rows)
    images = random_views(images, batch, training.share, training.take, config.augment, generator)
    with training.autocast():
        target = teacher_response(teacher, images, labels) if training.cached is None else training.cached(rows)
        harder = None
        if config.perturb_weight > 0:
            harder = harder_images(student, teacher, images, labels, config.perturb_size, training.pixel_range)
        loss, terms = training_loss(training.model, student, target, images, labels, config, harder)
    training.accelerator.backward(loss)
    norm = training.accelerator.clip_grad_norm_(training.parameters, config.grad_clip or math.inf)
    clip_relative(training.parameters, config.grad_clip_relative)
    meter.add({"loss": loss.detach(), **terms, "gradient norm": torch.as_tensor(norm)})
    if check:
        meter.check()
    for group in training.optimizer.param_groups:
        group["lr"] = group["lr_factor"] * lr
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.average.update()


def finetune(
    student: TappedNetwork,
    teacher: TappedNetwork,
    images: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    *,
    accelerator: Accelerator,
    seed: int,
    pixel_range: PixelRange | None = None,
    bf16: bool = False,
    compiled: bool = False,
    checkpoint: Path | None = None,
    identity: str = "",
    on_epoch: Callable[[Epoch], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    progress: bool = False,
) -> list[Epoch]:
    """Train the student's float weights through its fake quantizers, in place; the last epoch is the result.

    BatchNorm statistics and activation ranges are frozen; networks stay in evaluation mode. Called again with the same
    ``checkpoint`` after an interruption, it resumes after the last finished epoch and gives a bit-identical result.

    Args:
        student: The quantized network with calibrated ranges, on the device of ``accelerator``.
        teacher: The frozen teacher, on the same device.
        images: (N, C, H, W) filtered synthetic images, the same on every process.
        labels: (N,) int64 assigned labels.
        config: Epochs, *global* batch size, optimizer, loss.
        accelerator: Process group.
        seed: Seed of the order of the images and of their augmentation.
        pixel_range: Range of normalized pixels, which perturbed images do not leave; None for no bounds.
        bf16: Whether both networks run under autocast to bfloat16; weights, losses and maps stay float32.
        compiled: Whether to compile the student with torch.compile; not possible if its map needs autograd.
        checkpoint: Checkpoint file of the last finished epoch; None writes none.
        identity: Digests of teacher and images; a checkpoint with another identity is rejected.
        on_epoch: Called on every process after every epoch, before its checkpoint, with the epoch's mean terms; it may
            add to them.
        on_checkpoint: Called on the main process with the path of each written checkpoint.
        progress: Whether to show a progress bar (on the main process).

    Returns:
        Mean loss terms of each epoch, in order.

    Raises:
        ValueError: If the batch size is not divisible by the number of processes or exceeds the number of images, or
            if the checkpoint is damaged or has another identity.
        NonFiniteLossError: If a loss term or the gradient norm is not finite.
    """
    share = local_batch_size(config.batch_size, accelerator.num_processes)
    steps_per_epoch = num_steps(len(images), config.batch_size)
    if len(images) < config.batch_size and config.epochs > 0:
        raise ValueError(f"finetune.batch_size must be <= the {len(images)} images, but got {config.batch_size}")
    shown = progress and accelerator.is_main_process
    with_cam = config.uses_cam and student.cam_site.kind != "none"
    student, teacher = (replace(part, method=config.cam_method, with_cam=with_cam) for part in (student, teacher))
    parameters = _trainable(student.net, config.train_bn)
    synchronize_parameters(student.net)
    optimizer: torch.optim.Optimizer = make_optimizer(student.net, config)
    with warnings.catch_warnings():  # of PyTorch 2.14 about an argument that Accelerate still passes by its old name
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        model, optimizer = accelerator.prepare(student.net, optimizer)
    if compiled:
        model.compile()
    average = WeightAverage(parameters, config.ema_decay)
    history = load_checkpoint(checkpoint, identity, student.net, optimizer, average)
    check_same_epoch(len(history), checkpoint, accelerator)
    autocast = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=bf16)
    images, labels = _on_device(images, accelerator.device), _on_device(labels, accelerator.device)

    def take(rows: Tensor) -> tuple[Tensor, Tensor]:
        return _take(images, rows, accelerator.device), _take(labels, rows, accelerator.device)

    cached = None
    if config.augment == "none" and len(history) < config.epochs:
        cached = cached_responses(teacher, take, len(images), autocast, progress=shown)
    training = Training(
        student=student,
        teacher=teacher,
        model=model,
        parameters=parameters,
        optimizer=optimizer,
        average=average,
        take=take,
        cached=cached,
        share=slice(accelerator.process_index * share, (accelerator.process_index + 1) * share),
        autocast=autocast,
        pixel_range=pixel_range,
        config=config,
        accelerator=accelerator,
    )
    bar = Bar(
        total=config.epochs * steps_per_epoch,
        initial=len(history) * steps_per_epoch,
        desc="fine-tune",
        unit="step",
        **visible(shown, leave=None),  # stays on screen if it is the only bar, but not below a bar over runs
    )
    for epoch in range(len(history), config.epochs):
        meter, started = LossMeter(epoch), time.perf_counter()
        generator = make_generator("augment", seed, epoch)
        for step, batch in enumerate(epoch_batches(len(images), config.batch_size, seed, epoch)):
            lr = lr_at(epoch * steps_per_epoch + step, steps_per_epoch, config)
            # One host synchronization in log_every steps; the last step is read before the weights are saved, and the
            # first of all before any update, where something else is at fault than the learning rate.
            check = (step + 1) % config.log_every == 0 or step + 1 == steps_per_epoch or epoch == step == 0
            training_step(training, batch, lr, generator, meter, check=check)
            if check:
                note(bar, meter.summary)
            bar.update()
        history.append(meter.means(accelerator) | {"epoch": epoch + 1.0, "seconds": time.perf_counter() - started})
        with training.average.in_place(for_good=epoch + 1 == config.epochs):
            if on_epoch is not None:
                on_epoch(history[-1])
        if checkpoint is not None and accelerator.is_main_process:
            save_checkpoint(checkpoint, identity, student.net, training.optimizer, training.average, history)
            if on_checkpoint is not None:
                on_checkpoint(checkpoint)
    bar.close()
    return history


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on the GPU if it takes at most a quarter of the free memory, else unchanged."""
    if device.type != "cuda" or tensor.numel() * tensor.element_size() > torch.cuda.mem_get_info(device)[0] // 4:
        return tensor
    return tensor.to(device)


def _take(tensor: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    taken = tensor[rows.to(tensor.device)]
    if device.type == "cuda" and taken.device.type == "cpu":
        taken = taken.pin_memory()  # only a copy from pinned memory overlaps with kernels
    return taken.to(device, non_blocking=True)


def _trainable(net: fx.GraphModule, train_bn: bool) -> list[nn.Parameter]:
    """Set `requires_grad` of all parameters and return those to train."""
    frozen = set() if train_bn else {id(parameter) for parameter in batchnorm_parameters(net)}
    for parameter in net.parameters():
        parameter.requires_grad_(id(parameter) not in frozen)
    return [parameter for parameter in net.parameters() if parameter.requires_grad]
