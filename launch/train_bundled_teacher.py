"""Train a teacher that ships with the package on the training part of scikit-learn's digits.

    python launch/train_bundled_teacher.py [NETWORK] [--seed 0] [--epochs 60] [--output FILE.safetensors]

NETWORK is digits_resnet8 (the default) or digits_vit. Uses one thread and takes about a minute. The same seed gives the
same weights on the same machine and versions. The weights of the last epoch are saved, not those of the best. The
metadata of the file have the accuracy on the held-out third, the command and the seed.
"""

import math
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from synq.common.exit_codes import leave
from synq.common.seeding import make_generator, seed_everything
from synq.config.command_line import Command
from synq.config.command_options import INT, OneOf, argument, option
from synq.evaluation.labeled import LabeledSet, load_labeled
from synq.teacher.cifar_resnet import cifar_resnet
from synq.teacher.networks.small_vit import vision_transformer

INPUT_SIZE = (1, 16, 16)
NUM_CLASSES = 10
RESNET, VIT = "digits_resnet8", "digits_vit"
SHAPES = {RESNET: {"depth": 8, "width": 8}, VIT: {"depth": 4, "width": 48, "heads": 3, "patch": 4}}
"""Sizes of the networks, which the metadata of their files have, too."""
BATCH_SIZE = 64
PEAK_LR, VIT_PEAK_LR = 0.1, 2e-3
WEIGHT_DECAY, VIT_WEIGHT_DECAY = 5e-4, 0.05
MAX_SHIFT = 2


def shift_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image (N, C, H, W) by up to MAX_SHIFT pixels in both axes, with replicate padding."""
    height, width = images.shape[2:]
    padded = F.pad(images, (MAX_SHIFT,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * MAX_SHIFT + 1, (len(images), 2), generator=generator).tolist()
    crops = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, offsets, strict=True)]
    return torch.stack(crops)


def untrained(network: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a network and its optimizer: SGD for the residual network, AdamW for the transformer."""
    shape = SHAPES[network]
    if network == RESNET:
        model = cifar_resnet(shape["depth"], NUM_CLASSES, INPUT_SIZE[0], shape["width"])
        return model, torch.optim.SGD(
            model.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=WEIGHT_DECAY, nesterov=True
        )
    vit = vision_transformer(
        shape["width"],
        shape["depth"],
        shape["heads"],
        classes=NUM_CLASSES,
        input_size=INPUT_SIZE,
        patch=shape["patch"],
    )
    return vit, torch.optim.AdamW(vit.parameters(), lr=VIT_PEAK_LR, weight_decay=VIT_WEIGHT_DECAY)


def train(network: str, data: LabeledSet, seed: int, epochs: int) -> nn.Module:
    """Return a network trained with warmup and cosine learning rate, after the last epoch."""
    seed_everything(seed)
    generator = make_generator(seed, "bundled teacher")
    model, optimizer = untrained(network)
    model.train()
    steps_per_epoch = len(data) // BATCH_SIZE
    num_steps = epochs * steps_per_epoch
    warmup = max(num_steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / num_steps)))
    )
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=generator)[: steps_per_epoch * BATCH_SIZE]
        total = 0.0
        for indices in order.split(BATCH_SIZE):
            images, labels = data.batch(indices)
            loss = F.cross_entropy(model(shift_images(images, generator)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if (epoch + 1) % 10 == 0 or epoch + 1 == epochs:
            print(f"epoch {epoch + 1}/{epochs} loss {total / steps_per_epoch:.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def count_correct(model: nn.Module, data: LabeledSet) -> int:
    """Return the number of images of ``data`` that are classified correctly."""
    correct = 0
    for indices in torch.arange(len(data)).split(256):
        images, labels = data.batch(indices)
        correct += int((model(images).argmax(1) == labels).sum())
    return correct


@click.command("train_bundled_teacher", cls=Command)
@argument("network", metavar="[NETWORK]", type=OneOf(*SHAPES), required=False, help="digits_resnet8 or digits_vit")
@option("--seed", type=INT, default=0, help="seed of weights, order and shifts (default: 0)")
@option("--epochs", type=INT, default=60, help="passes over the training part (default: 60)")
@option("--output", metavar="FILE", help="file of the weights (default: the one that ships with the package)")
def command(network: str | None, seed: int, epochs: int, output: str | None) -> None:
    """Train a teacher that ships with the package on the training part of scikit-learn's digits."""
    network = network or RESNET
    bundled = Path(__file__).resolve().parent.parent / f"synq/teacher/assets/{network}.safetensors"
    file = Path(output) if output else bundled
    torch.set_num_threads(1)  # the order of summation depends on the number of threads
    torch.use_deterministic_algorithms(True)

    raw = load_labeled("digits:train", INPUT_SIZE, (0.0,), (1.0,), num_classes=NUM_CLASSES)
    pixels, _ = raw.batch(torch.arange(len(raw)))
    mean, std = round(float(pixels.mean()), 4), round(float(pixels.std()), 4)
    training = load_labeled("digits:train", INPUT_SIZE, (mean,), (std,), num_classes=NUM_CLASSES)
    heldout = load_labeled("digits", INPUT_SIZE, (mean,), (std,), num_classes=NUM_CLASSES)

    model = train(network, training, seed, epochs)
    correct = count_correct(model, heldout)
    accuracy = f"{100 * correct / len(heldout):.2f}"
    metadata = {
        **{name: str(size) for name, size in SHAPES[network].items()},
        "num_classes": str(NUM_CLASSES),
        "classes": ",".join(str(digit) for digit in range(NUM_CLASSES)),
        "input_size": ",".join(str(size) for size in INPUT_SIZE),
        "mean": str(mean),
        "std": str(std),
        "dataset": "digits",
        "accuracy": accuracy,
        "num_eval": str(len(heldout)),
        "num_train": str(len(training)),
        "seed": str(seed),
        "command": f"python launch/train_bundled_teacher.py {network} --seed {seed} --epochs {epochs}",
        "versions": f"torch {torch.__version__}, python {platform.python_version()}",
    }
    # Inference does not use num_batches_tracked.
    state = {k: v.contiguous() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    save_file(state, partial, metadata=metadata)
    partial.chmod(0o644)  # safetensors creates files that only the owner can read
    partial.replace(file)
    print(f"top-1 {accuracy} % ({correct} of {len(heldout)} held-out images), {file.stat().st_size} bytes: {file}")


if __name__ == "__main__":
    leave(command.run(program="python launch/train_bundled_teacher.py"))
