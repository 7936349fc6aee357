"""Train a small CNN on Fashion-MNIST: a network of one's own, to quantize without its images.

    python launch/train_fashion_cnn.py FOLDER [--seed 0] [--epochs 3] [--images 12000] [--output FILE.safetensors]

FOLDER holds the four IDX files of Fashion-MNIST, packed or not (Debian's package dataset-fashion-mnist has them in
/usr/share/datasets/fashion-mnist). It takes about a minute of one thread and prints the command that quantizes the
network. The same seed gives the same weights on the same machine and versions.
"""

import platform
import shlex
import sys
from collections.abc import Callable
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
from synq.config.command_options import INT, argument, option
from synq.evaluation.labeled_arrays import read_idx

MEAN, STD = 0.286, 0.353
"""Of the 60,000 training images, scaled to [0, 1]."""
PEAK_LR = 0.05
BATCH_SIZE = 64


class FashionCNN(nn.Module):
    """Five convolutions of 16 to 64 channels, each with BatchNorm and ReLU: (N, 1, 28, 28) -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        plan = ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(c, k, 3, s, 1, bias=False), nn.BatchNorm2d(k), nn.ReLU(inplace=True))
                for c, k, s in plan
            )
        )
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of normalized images."""
        return self.classifier(self.features(x).mean((2, 3)))


def load_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return normalized images (N, 1, 28, 28) and labels (N,) of the part ``train`` or ``t10k``."""
    arrays = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if not found:
            raise FileNotFoundError(f"`FOLDER` must hold {name} or {name}.gz, but {folder} has neither")
        arrays.append(torch.from_numpy(read_idx(found[0]).copy()))
    images, labels = arrays
    return (images[:, None].float() / 255 - MEAN) / STD, labels.long()


def train(make: Callable[[], nn.Module], images: Tensor, labels: Tensor, seed: int, epochs: int) -> nn.Module:
    """Return a network after the last epoch of SGD with one cycle of the learning rate."""
    seed_everything(seed)
    generator = make_generator(seed, "fashion cnn")
    model = make().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * steps)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(images), generator=generator)[: steps * BATCH_SIZE].split(BATCH_SIZE):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1}/{epochs} loss {total / steps:.4f}", flush=True)
    return model.eval()


def train_and_save(
    make: Callable[[], nn.Module], spec: str, folder: str, seed: int, epochs: int, output: str, images: int
) -> None:
    """Train a network, save it, and print its top-1 on the test images and the command that quantizes it.

    Args:
        make: Factory of the network.
        spec: The factory as a run names it, FILE.py:FUNCTION.
        folder: Folder of Fashion-MNIST's IDX files.
        seed: Seed of weights and order.
        epochs: Passes over the images.
        output: File of the weights.
        images: Training images, the first of the set.
    """
    torch.set_num_threads(1)  # the order of summation depends on the number of threads
    pixels, labels = load_part(Path(folder), "train")
    model = train(make, pixels[:images], labels[:images], seed, epochs)
    test, expected = load_part(Path(folder), "t10k")
    with torch.no_grad():
        correct = sum(
            int((model(part).argmax(1) == right).sum())
            for part, right in zip(test.split(500), expected.split(500), strict=True)
        )
    metadata = {"top1": f"{100 * correct / len(test):.2f}", "seed": str(seed), "epochs": str(epochs)}
    metadata |= {"images": str(images), "versions": f"torch {torch.__version__}, python {platform.python_version()}"}
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file, metadata=metadata)
    print(f"top-1 {metadata['top1']} % ({correct} of {len(test)} test images): {file}")
    args = ["synq", "train", spec, "--teacher.weights", str(file)]
    args += ["--teacher.input_size", "1,28,28", "--teacher.mean", str(MEAN), "--teacher.std", str(STD)]
    print(shlex.join([*args, "--evaluation.dataset", "fashion-mnist", "--evaluation.data_dir", folder]))


@click.command("train_fashion_cnn", cls=Command)
@argument("folder", metavar="FOLDER", help="folder of Fashion-MNIST's IDX files")
@option("--seed", type=INT, default=0, help="seed of weights and order (default: 0)")
@option("--epochs", type=INT, default=3, help="passes over the images (default: 3)")
@option("--images", type=INT, default=12000, help="training images, the first of the set (default: 12000)")
@option("--output", metavar="FILE", default="fashion_cnn.safetensors", help="file of the weights")
def command(folder: str, seed: int, epochs: int, images: int, output: str) -> None:
    """Train a small CNN on Fashion-MNIST."""
    train_and_save(FashionCNN, "launch/train_fashion_cnn.py:FashionCNN", folder, seed, epochs, output, images)


if __name__ == "__main__":
    leave(command.run(program="python launch/train_fashion_cnn.py"))
