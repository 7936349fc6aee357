"""Synthesis-aware fine-tuning of a quantized student, on 1..n processes.

One pass: a step costs one student forward and one backward. The images are filtered before; the teacher's logits and
maps are computed once where the images stay as they are; the class-activation maps come from the features of those very
forwards (SynQ, section 4; the closed form of the CAM weights is ours).
"""

import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, fx, nn
from tqdm import tqdm

from synq.augment import flip_shift
from synq.cam_site import CamSite
from synq.configs import FinetuneConfig
from synq.gradcam import autograd_weights, cam_map, closed_form_weights
from synq.losses import synq_loss
from synq.quant_layers import effective_weight
from synq.results import write_bytes_atomic
from synq.seeding import make_generator

Epoch = dict[str, float]


class NonFiniteLossError(RuntimeError):
    """A loss term or the gradient stopped being a finite number; the message names it."""


@dataclass(frozen=True, kw_only=True)
class CamNetwork:
    """A network that gives (logits, features) in one pass, and what its class-activation map needs.

    Attributes:
        net: From ``with_features``; the features are A of ``site``.
        site: Where and how the map is taken.
    """

    net: fx.GraphModule
    site: CamSite

    def map(self, logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """Return the class-activation maps (N, H, W) of ``labels``; the channel weights are detached."""
        site = self.site
        if site.kind == "autograd":
            alpha = autograd_weights(logits, features, labels, retain_graph=True)
        else:
            weight = effective_weight(self.net.get_submodule(site.linear or "")).flatten(1)
            alpha = closed_form_weights(weight, labels, site.channels, site.cells, site.height * site.width)
        return cam_map(features, alpha.to(features.dtype))


def teacher_view(teacher: CamNetwork, images: Tensor, labels: Tensor, with_cam: bool) -> tuple[Tensor, Tensor | None]:
    """Return the frozen teacher's (logits (N, K), maps (N, H, W) or None), detached."""
    with torch.set_grad_enabled(with_cam and teacher.site.kind == "autograd"):
        logits, features = teacher.net(images)
        cam = teacher.map(logits, features, labels) if with_cam else None
    return logits.detach(), None if cam is None else cam.detach()


def training_loss(
    model: nn.Module,
    student: CamNetwork,
    view: tuple[Tensor, Tensor | None],
    images: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One forward pass of the student and the loss of SynQ on it.

    Args:
        model: ``student.net`` as prepared for this process group: its forward is the one that is reduced.
        student: Gives the maps.
        view: The teacher's logits and maps of these very images.
        images: (N, C, H, W), filtered; N is the share of this process.
        labels: (N,) assigned labels.
        config: Weights, temperature and threshold.

    Returns:
        (mean over the N images, terms by name). All shares being equal, the mean over processes is the global one.
    """
    logits, features = model(images)
    teacher_logits, teacher_map = view
    student_map = None if teacher_map is None else student.map(logits, features, labels)
    return synq_loss(
        logits,
        student_map,
        teacher_logits,
        teacher_map,
        labels,
        temperature=config.kd_temperature,
        kd_weight=config.kd_weight,
        ce_weight=config.ce_weight,
        cam_weight=config.cam_weight,
        difficulty_threshold=config.difficulty_threshold,
    )


def finetune(
    student: CamNetwork,
    teacher: CamNetwork,
    images: Tensor,
    labels: Tensor,
    config: FinetuneConfig,
    *,
    accelerator: Accelerator,
    seed: int,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    progress: bool = False,
) -> list[Epoch]:
    """Train the student's float weights behind its fake quantizers, in place; the last epoch is the result.

    BatchNorm statistics and activation ranges stay as they are; networks stay in evaluation mode. Killed and called
    again with the same ``checkpoint``, it goes on after the last finished epoch and ends bit-equal.

    Args:
        student: The quantized network with observed ranges, on the device of ``accelerator``.
        teacher: The frozen teacher, on the same device.
        images: (N, C, H, W) filtered synthetic images, the same on every process.
        labels: (N,) int64 assigned labels.
        config: Epochs, *global* batch size, optimiser, loss.
        accelerator: Process group and precision.
        seed: Seed of the order of the images and of their augmentation.
        checkpoint: File of the last finished epoch; None keeps none.
        on_epoch: Called on every process after every epoch with the epoch's mean terms.
        progress: Whether to show a progress bar (on the main process).

    Returns:
        Mean loss terms of each epoch, in order.

    Raises:
        ValueError: If the batch size is not divisible by the number of processes or exceeds the images.
        NonFiniteLossError: If a term or the gradient norm is not finite.
    """
    share = local_batch_size(config.batch_size, accelerator.num_processes)
    steps_per_epoch = len(images) // config.batch_size
    if steps_per_epoch == 0 and config.epochs > 0:
        raise ValueError(f"finetune.batch_size must be <= the {len(images)} images, but got {config.batch_size}")
    parameters = _trainable(student.net, config.train_bn)
    optimizer: torch.optim.Optimizer = _optimizer(parameters, config)
    model, optimizer = accelerator.prepare(student.net, optimizer)
    history = _load_checkpoint(checkpoint, student.net, optimizer)
    _check_same_epoch(len(history), checkpoint, accelerator)
    with_cam = config.cam_weight > 0 and student.site.kind != "none"
    live = config.augment != "none"
    cached = None if live else _teacher_cache(teacher, images, labels, with_cam, share, accelerator)

    bar = tqdm(
        total=config.epochs * steps_per_epoch,
        initial=len(history) * steps_per_epoch,
        desc="fine-tune",
        unit="step",
        disable=None if progress and accelerator.is_main_process else True,
    )
    for epoch in range(len(history), config.epochs):
        meter, started = _Meter(epoch), time.perf_counter()
        generator = make_generator("augment", seed, epoch)
        for step, batch in enumerate(epoch_batches(len(images), config.batch_size, seed, epoch)):
            rows = batch[accelerator.process_index * share :][:share]
            x, y = _take(images, rows, accelerator.device), _take(labels, rows, accelerator.device)
            if live:
                x = flip_shift(x, generator, offset=accelerator.process_index * share, total=config.batch_size)
            with accelerator.autocast():
                view = cached(rows) if cached is not None else teacher_view(teacher, x, y, with_cam)
                loss, terms = training_loss(model, student, view, x, y, config)
            set_lr(optimizer, lr_at(epoch * steps_per_epoch + step, steps_per_epoch, config))
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(parameters, config.grad_clip or math.inf)
            meter.add({"loss": loss.detach(), **terms, "gradient norm": torch.as_tensor(norm)})
            # One host synchronisation in log_every steps; the last step of an epoch is read before its weights are saved.
            if (step + 1) % config.log_every == 0 or step + 1 == steps_per_epoch:
                bar.set_postfix_str(meter.check())
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
        history.append(meter.means(accelerator) | {"epoch": epoch + 1.0, "seconds": time.perf_counter() - started})
        if checkpoint is not None and accelerator.is_main_process:
            _save_checkpoint(checkpoint, student.net, optimizer, history)
        if on_epoch is not None:
            on_epoch(history[-1])
    bar.close()
    return history


def epoch_batches(num_images: int, batch_size: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Yield the row numbers of each global batch of an epoch; the incomplete last batch is dropped.

    Every process draws the same order and takes its slice, so 1 and n processes see the same samples.
    """
    order = torch.randperm(num_images, generator=make_generator("order", seed, epoch))
    for start in range(0, num_images - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def local_batch_size(batch_size: int, num_processes: int) -> int:
    """Return the images per process and step.

    Raises:
        ValueError: If the global batch does not divide evenly: unequal shares would train another loss.
    """
    share, rest = divmod(batch_size, num_processes)
    if rest:
        raise ValueError(
            f"finetune.batch_size must be divisible by the number of processes ({num_processes}), but got {batch_size}"
        )
    return share


def lr_at(step: int, steps_per_epoch: int, config: FinetuneConfig) -> float:
    """Return the learning rate of a step (counted over all epochs): a pure function, so a resumed run needs no state."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        total = config.epochs * steps_per_epoch - warmup
        return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / total))
    if config.schedule == "step":
        return config.lr * config.step_factor ** (step // (config.step_epochs * steps_per_epoch))
    return config.lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class _Meter:
    """Sums of the terms of an epoch, kept on the device; reading them is the only host synchronisation."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.steps = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in terms.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def check(self) -> str:
        """Return "name value" of the running means; raise if a sum is not finite (a NaN once added never leaves)."""
        means = {name: float(value) / self.steps for name, value in self.sums.items()}
        for name, value in sorted(means.items(), key=lambda item: item[0] == "loss"):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"{name} became {value} in epoch {self.epoch + 1}, step <= {self.steps}. "
                    "Lower finetune.lr, or the weight of this term"
                )
        return " ".join(f"{name} {means[name]:.4g}" for name in ("loss", "kd", "ce", "cam", "kept") if name in means)

    def means(self, accelerator: Accelerator) -> Epoch:
        """Return the means over steps and processes."""
        names = list(self.sums)
        values = torch.stack([self.sums[name].to(accelerator.device) for name in names]) / self.steps
        values = accelerator.reduce(values, reduction="mean")
        return dict(zip(names, values.tolist(), strict=True))


def _teacher_cache(
    teacher: CamNetwork, images: Tensor, labels: Tensor, with_cam: bool, batch_size: int, accelerator: Accelerator
) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """Compute the teacher's view of all images once; returns the rows of it that a batch needs."""
    logits, maps = [], []
    for rows in torch.arange(len(images)).split(batch_size):
        x, y = _take(images, rows, accelerator.device), _take(labels, rows, accelerator.device)
        with accelerator.autocast():
            batch_logits, batch_maps = teacher_view(teacher, x, y, with_cam)
        logits.append(batch_logits)
        if batch_maps is not None:
            maps.append(batch_maps)
    all_logits, all_maps = torch.cat(logits), torch.cat(maps) if maps else None

    def view(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = rows.to(all_logits.device, non_blocking=True)
        return all_logits[rows], None if all_maps is None else all_maps[rows]

    return view


def _take(tensor: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    return tensor[rows.to(tensor.device)].to(device, non_blocking=True)


def _trainable(net: nn.Module, train_bn: bool) -> list[nn.Parameter]:
    for module in net.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(train_bn or not isinstance(module, nn.modules.batchnorm._BatchNorm))
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def _optimizer(parameters: list[nn.Parameter], config: FinetuneConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        betas = (config.momentum, 0.999)
        return torch.optim.Adam(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )


def _check_same_epoch(epoch: int, path: Path | None, accelerator: Accelerator) -> None:
    """Refuse to resume where only some processes see the checkpoint: they would wait for one another for ever."""
    epochs = accelerator.gather(torch.tensor([epoch], device=accelerator.device)).tolist()
    if len(set(epochs)) > 1:
        raise ValueError(
            f"runtime.output_dir must be seen by all processes, but they find {path} at epochs {sorted(set(epochs))}: "
            "use a shared file system"
        )


def _save_checkpoint(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, history: list[Epoch]) -> None:
    buffer = io.BytesIO()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
    torch.save(state, buffer)
    write_bytes_atomic(path, buffer.getvalue())


def _load_checkpoint(path: Path | None, net: nn.Module, optimizer: torch.optim.Optimizer) -> list[Epoch]:
    if path is None or not path.exists():
        return []
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history: list[Epoch] = state["history"]
    except Exception as error:  # unpickling raises many types; a damaged file must name itself
        raise ValueError(f"checkpoint must be readable, but {path} is not: {error}. Remove it to start over") from error
    return history
