"""Train small networks without BatchNorm on Fashion-MNIST, to quantize them without its images.

    python launch/train_fashion_transformers.py NETWORK FOLDER [--seed 0] [--epochs 3] [--images 60000] [--output FILE]
        [--unlabeled FILE.npz]

NETWORK is vit (patches of 4 pixels, attention by F.scaled_dot_product_attention), swin (windows of 7), convnext, or cct
(convolutions for patches, attention by nn.MultiheadAttention, a pool of the sequence). FOLDER holds the four IDX files
of Fashion-MNIST, as for launch/train_fashion_cnn.py. It prints the command that quantizes the network. --unlabeled also
writes real images without labels, for synthesis.method own_images and real_images of a recipe. The same seed gives the
same weights on the same machine and versions.
"""

import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent))

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from train_fashion_cnn import MEAN, STD, load_part

from synq.common.exit_codes import leave
from synq.common.seeding import make_generator, seed_everything
from synq.config.command_line import Command
from synq.config.command_options import INT, OneOf, argument, option
from synq.teacher.networks.small_vit import vision_transformer

PEAK_LR = 1e-3
BATCH_SIZE = 64
CLASSES = 10
SIDE = 28
"""Of the images, in pixels."""
UNLABELED = 2048
"""Number of real images that are written without their labels."""


class CompactTransformer(nn.Module):
    """A compact convolutional transformer: (N, 1, 28, 28) -> logits (N, 10).

    Source: Escaping the big data paradigm with compact transformers (arXiv 2104.05704).
    """

    def __init__(self, channels: int = 96, depth: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            *(nn.Conv2d(1, channels // 2, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(channels // 2, channels, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.positions = nn.Parameter(torch.randn(1, (SIDE // 4) ** 2, channels) * 0.02)
        layer = nn.TransformerEncoderLayer(
            channels, heads, 2 * channels, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(channels), enable_nested_tensor=False)
        self.pool = nn.Linear(channels, 1)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of normalized images."""
        x = self.encoder(self.patches(x).flatten(2).transpose(1, 2) + self.positions)
        shares = self.pool(x).softmax(1)
        return self.head((shares.transpose(1, 2) @ x).squeeze(1))


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution of 7 x 7, LayerNorm and a perceptron over the channels: (N, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual sum."""
        y = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))) * self.scale
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """A ConvNeXt with a stem of 2 x 2 pixels: (N, 1, 28, 28) -> logits (N, 10).

    Source: A ConvNet for the 2020s (CVPR 2022).
    """

    def __init__(self, channels_of_stages: tuple[int, ...] = (32, 64, 128), depth: int = 2) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for before, channels in zip((1, *channels_of_stages), channels_of_stages, strict=False):
            parts += [] if before == 1 else [nn.GroupNorm(1, before)]
            parts += [nn.Conv2d(before, channels, 2, 2), *(ConvNeXtBlock(channels) for _ in range(depth))]
        self.features = nn.Sequential(*parts)
        self.norm = nn.LayerNorm(channels_of_stages[-1])
        self.head = nn.Linear(channels_of_stages[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of normalized images."""
        return self.head(self.norm(self.features(x).mean((2, 3))))


def vit() -> nn.Module:
    """Return the untrained vision transformer."""
    return vision_transformer(96, 6, 3, classes=CLASSES, input_size=(1, SIDE, SIDE), patch=4)


def cct() -> nn.Module:
    """Return the untrained compact transformer."""
    return CompactTransformer()


def swin() -> nn.Module:
    """Return an untrained Swin of timm with patches of 2 pixels and windows of 7 x 7 tokens."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=SIDE,
        patch_size=2,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=48,
        depths=(2, 2),
        num_heads=(3, 6),
        window_size=7,
    )


def convnext() -> nn.Module:
    """Return an untrained ConvNeXt of three stages."""
    return ConvNeXt()


NETWORKS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "swin": swin, "convnext": convnext, "cct": cct}


def train(model: nn.Module, images: Tensor, labels: Tensor, seed: int, epochs: int) -> nn.Module:
    """Return the network after the last epoch of AdamW with one cycle of the learning rate."""
    generator = make_generator(seed, "fashion transformers")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.05)
    steps = len(images) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        total, started = 0.0, time.process_time()
        for rows in torch.randperm(len(images), generator=generator)[: steps * BATCH_SIZE].split(BATCH_SIZE):
            batch = images[rows]
            if bool(torch.rand((), generator=generator) < 0.5):
                batch = batch.flip(-1)
            loss = F.cross_entropy(model(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        seconds = time.process_time() - started
        print(f"epoch {epoch + 1}/{epochs} loss {total / steps:.4f}, {seconds:.0f} s of one thread", flush=True)
    return model.eval()


@click.command("train_fashion_transformers", cls=Command)
@argument("network", metavar="NETWORK", type=OneOf(*NETWORKS), help="vit, swin, convnext or cct")
@argument("folder", metavar="FOLDER", help="folder of the four IDX files of Fashion-MNIST, packed or not")
@option("--seed", type=INT, default=0, help="seed of weights and order (default: 0)")
@option("--epochs", type=INT, default=3, help="passes over the images (default: 3)")
@option("--images", type=INT, default=60000, help="training images, the first of the set (default: 60000)")
@option("--output", metavar="FILE", default=None, help="file of the weights (default: fashion_NETWORK.safetensors)")
@option("--unlabeled", metavar="FILE", default=None, help=f"write the first {UNLABELED:,} training images, an NPZ file")
def command(
    network: str, folder: str, seed: int, epochs: int, images: int, output: str | None, unlabeled: str | None
) -> None:
    """Train a small network without BatchNorm on Fashion-MNIST."""
    torch.set_num_threads(1)  # the order of summation depends on the number of threads
    pixels, labels = load_part(Path(folder), "train")
    if unlabeled is not None:
        values = ((pixels[:UNLABELED, 0] * STD + MEAN) * 255).round().clamp(0, 255)
        np.savez_compressed(unlabeled, x=values.to(torch.uint8).numpy())
    seed_everything(seed)
    model = train(NETWORKS[network](), pixels[:images], labels[:images], seed, epochs)
    test, expected = load_part(Path(folder), "t10k")
    with torch.no_grad():
        correct = sum(
            int((model(part).argmax(1) == right).sum())
            for part, right in zip(test.split(500), expected.split(500), strict=True)
        )
    metadata = {"top1": f"{100 * correct / len(test):.2f}", "seed": str(seed), "epochs": str(epochs)}
    metadata |= {"images": str(images), "versions": f"torch {torch.__version__}, python {platform.python_version()}"}
    file = Path(output or f"fashion_{network}.safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file, metadata=metadata)
    print(f"top-1 {metadata['top1']} % ({correct} of {len(test)} test images): {file}")
    args = ["synq", "train", f"launch/train_fashion_transformers.py:{network}", "--teacher.weights", str(file)]
    args += ["--teacher.input_size", "1,28,28", "--teacher.mean", str(MEAN), "--teacher.std", str(STD)]
    print(shlex.join([*args, "--evaluation.dataset", "fashion-mnist", "--evaluation.data_dir", folder]))


if __name__ == "__main__":
    leave(command.run(program="python launch/train_fashion_transformers.py"))
