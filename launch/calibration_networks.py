"""Train the small networks that the expected agreement is calibrated on, next to the bundled and the CIFAR ones.

    python launch/calibration_networks.py NAME OUTPUT --fashion FOLDER --cifar FILE.npz

NAME is a key of `RECIPES`; the weights go to OUTPUT/NAME.safetensors, labeled images that training did not see to
OUTPUT/NAME.npz where the product knows no test part. Each takes a minute or two of one thread; the same seed gives the
same weights on the same machine and versions. `launch/train_fashion_cnn.py` trains one more network.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from synq.common.exit_codes import leave
from synq.common.seeding import make_generator, seed_everything
from synq.config.command_line import Command
from synq.config.command_options import OneOf, argument, option
from synq.evaluation.labeled import load_labeled
from synq.evaluation.labeled_arrays import read_idx
from synq.evaluation.labeled_sources import digits_heldout_mask

PEAK_LR, BATCH_SIZE = 0.05, 64


def _conv(c_in: int, c_out: int, size: int, stride: int = 1, act: nn.Module | None = None) -> nn.Module:
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([] if act is None else [act]))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, a 1x1 shortcut where the shape changes, a ReLU after the sum."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(c_in, c_out, 3, stride, act=nn.ReLU()), _conv(c_out, c_out, 3))
        self.shortcut = nn.Identity() if stride == 1 and c_in == c_out else _conv(c_in, c_out, 1, stride)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, c_out, H / stride, W / stride)."""
        return self.act(self.body(x) + self.shortcut(x))


def _headed(c_out: int, *layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_out, 10))


def _vgg(channels: int, plan: tuple[int, ...], side: int) -> nn.Module:
    layers: list[nn.Module] = []
    for c_out in plan:
        layers += [_conv(channels, c_out, 3, act=nn.ReLU()), _conv(c_out, c_out, 3, act=nn.ReLU()), nn.MaxPool2d(2)]
        channels, side = c_out, side // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 64), nn.ReLU(), nn.Linear(64, 10))


def fashion_vgg() -> nn.Module:
    """Return a VGG-like network with max pools and two linear layers for (N, 1, 28, 28)."""
    return _vgg(1, (16, 32), 28)


def digits_vgg() -> nn.Module:
    """Return the same kind of network for the digits of scikit-learn, (N, 1, 8, 8)."""
    return _vgg(1, (16, 32), 8)


def fashion_resnet() -> nn.Module:
    """Return a residual network of four blocks for (N, 1, 28, 28)."""
    plan = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2))
    return _headed(64, _conv(1, 16, 3, act=nn.ReLU()), *(BasicBlock(*row) for row in plan))


def cifar_resnet() -> nn.Module:
    """Return a residual network of three blocks for (N, 3, 32, 32)."""
    plan = ((16, 32, 2), (32, 64, 2), (64, 64, 1))
    return _headed(64, _conv(3, 16, 3, act=nn.ReLU()), *(BasicBlock(*row) for row in plan))


@dataclass(frozen=True)
class Recipe:
    """How a network is made: its factory, its images, their number and the passes over them."""

    factory: Callable[[], nn.Module]
    source: str
    """fashion, digits or cifar."""
    images: int
    epochs: int


RECIPES = {
    "fashion_vgg": Recipe(fashion_vgg, "fashion", 6000, 4),
    "fashion_resnet": Recipe(fashion_resnet, "fashion", 2000, 10),  # few images: a teacher of lower accuracy
    "digits_vgg": Recipe(digits_vgg, "digits", 900, 20),
    "cifar_resnet": Recipe(cifar_resnet, "cifar", 2995, 25),  # the half of a test set: a teacher that is often unsure
}
NORMALIZATION = {
    "fashion": ((0.286,), (0.353,)),
    "digits": ((0.305,), (0.376,)),
    "cifar": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of the pixels in [0, 1], by source."""


def _pixels(source: str, fashion: str | None, cifar: str | None) -> tuple[Tensor, Tensor]:
    """Return uint8 images (N, C, H, W) and labels (N,) of a source."""
    if source == "fashion":
        names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
        files = [file for name in names for file in sorted(Path(fashion or ".").glob(f"{name}*"))[:1]]
        if len(files) != 2:
            raise FileNotFoundError(f"`--fashion` must hold {' and '.join(names)}, but {fashion} does not")
        images, labels = (torch.from_numpy(read_idx(file).copy()) for file in files)
        return images[:, None], labels.long()
    if source == "digits":
        parts = [load_labeled(spec, (1, 8, 8), (0.0,), (1.0,), num_classes=10) for spec in ("digits:train", "digits")]
        is_heldout = torch.from_numpy(digits_heldout_mask(sum(map(len, parts))))
        pixels, labels = torch.empty((len(is_heldout), 1, 8, 8)), torch.empty(len(is_heldout), dtype=torch.int64)
        for part, rows in zip(parts, (~is_heldout, is_heldout), strict=True):  # back to the order of the whole set
            pixels[rows], labels[rows] = part.batch(torch.arange(len(part)))
        return (pixels * 255).round().to(torch.uint8), labels
    with np.load(cifar or "") as content:
        return torch.from_numpy(content["x"]).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(content["y"]).long()


def train(recipe: Recipe, pixels: Tensor, labels: Tensor, seed: int = 0) -> nn.Module:
    """Return the network after the last epoch of SGD with one cycle of the learning rate."""
    seed_everything(seed)
    generator = make_generator(seed, "calibration network")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in NORMALIZATION[recipe.source])
    images = (pixels.float() / 255 - mean) / std
    model = recipe.factory().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=recipe.epochs * steps)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(images), generator=generator)[: steps * BATCH_SIZE].split(BATCH_SIZE):
            batch = images[rows]
            if recipe.source != "fashion":
                flips = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
                batch = torch.where(flips, batch.flip(3), batch)
            optimizer.zero_grad()
            F.cross_entropy(model(batch), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@click.command("calibration_networks", cls=Command)
@argument("name", metavar="NAME", type=OneOf(*RECIPES), help="name of the network, of RECIPES")
@argument("output", metavar="OUTPUT", help="folder of the weights")
@option("--fashion", metavar="FOLDER", help="folder of Fashion-MNIST's IDX files")
@option("--cifar", metavar="FILE", help="images x (N, 32, 32, 3) uint8 and labels y, in an .npz file")
def command(name: str, output: str, fashion: str | None, cifar: str | None) -> None:
    """Train one of the small networks."""
    torch.set_num_threads(1)  # the order of summation depends on the number of threads
    recipe = RECIPES[name]
    pixels, labels = _pixels(recipe.source, fashion, cifar)
    model = train(recipe, pixels[: recipe.images], labels[: recipe.images])
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state, folder / f"{name}.safetensors")
    if recipe.source != "fashion":
        rest = slice(recipe.images, None)
        images = pixels[rest].permute(0, 2, 3, 1).numpy()
        np.savez_compressed(folder / f"{name}.npz", x=images, y=labels[rest].numpy())
    print(folder / f"{name}.safetensors")


if __name__ == "__main__":
    leave(command.run(program="python launch/calibration_networks.py"))
