"""Train small networks of well-known kinds on Fashion-MNIST, to quantize without their images.

    python launch/train_fashion_networks.py NETWORK FOLDER [--seed 0] [--epochs 4] [--images 20000] [--output FILE]

NETWORK is one of `NETWORKS`: torchvision's blocks in few channels, for images of 28 pixels. FOLDER holds the
IDX files of Fashion-MNIST, as for `launch/train_fashion_cnn.py`. Each takes a few minutes of one thread, is saved with
its top-1 on the test images, and the command that quantizes it is printed.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import click
import torchvision
from torch import nn
from torchvision.models.densenet import DenseNet
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.shufflenetv2 import ShuffleNetV2
from train_fashion_cnn import train_and_save

from synq.common.exit_codes import leave
from synq.config.command_line import Command
from synq.config.command_options import INT, OneOf, argument, option


def _first_convolution(network: nn.Module) -> nn.Module:
    """Let the first convolution read one channel at full resolution: 28 pixels bear two or three halvings."""
    name, old = next((name, part) for name, part in network.named_modules() if isinstance(part, nn.Conv2d))
    new = nn.Conv2d(1, old.out_channels, 3, 1, 1, bias=old.bias is not None)
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, new)
    return network


def mobilenet_v2() -> nn.Module:
    """Return inverted residuals of depthwise convolutions with ReLU6: (N, 1, 28, 28) -> logits (N, 10)."""
    plan = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 32, 2, 2], [4, 64, 1, 2]]
    network = MobileNetV2(num_classes=10, inverted_residual_setting=plan, width_mult=0.5, dropout=0.0)
    network.features[-1] = torchvision.ops.Conv2dNormActivation(32, 128, 1, activation_layer=nn.ReLU6)
    network.classifier = nn.Linear(128, 10)
    return _first_convolution(network)


def mobilenet_v3() -> nn.Module:
    """Return inverted residuals with squeeze-and-excitation and hard swish: (N, 1, 28, 28) -> logits (N, 10)."""
    block = partial(InvertedResidualConfig, width_mult=1.0)
    plan = [
        block(16, 3, 16, 16, True, "RE", 1, 1),
        block(16, 3, 48, 16, False, "RE", 2, 1),
        block(16, 5, 64, 24, True, "HS", 2, 1),
        block(24, 5, 72, 24, True, "HS", 1, 1),
    ]
    return _first_convolution(MobileNetV3(plan, last_channel=96, num_classes=10, dropout=0.0))


def shufflenet() -> nn.Module:
    """Return channel-shuffled depthwise blocks: (N, 1, 28, 28) -> logits (N, 10)."""
    network = ShuffleNetV2([2, 2, 2], [16, 32, 64, 96, 128], num_classes=10)
    network.maxpool = nn.Identity()
    return _first_convolution(network)


def densenet() -> nn.Module:
    """Return three dense blocks, whose layers read the concatenation of all before: (N, 1, 28, 28) -> (N, 10)."""
    network = DenseNet(growth_rate=12, block_config=(3, 3, 3), num_init_features=16, bn_size=2, num_classes=10)
    network.features.pool0 = nn.Identity()
    return _first_convolution(network)


def regnet() -> nn.Module:
    """Return grouped convolutions with squeeze-and-excitation: (N, 1, 28, 28) -> logits (N, 10)."""
    params = BlockParams.from_init_params(depth=6, w_0=16, w_a=12.0, w_m=2.2, group_width=8, se_ratio=0.25)
    return _first_convolution(RegNet(params, num_classes=10, stem_width=16))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    factory.__name__: factory for factory in (mobilenet_v2, mobilenet_v3, shufflenet, densenet, regnet)
}
"""Factories by name."""


@click.command("train_fashion_networks", cls=Command)
@argument("network", type=OneOf(*NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
@argument("folder", metavar="FOLDER", help="folder of Fashion-MNIST's IDX files")
@option("--seed", type=INT, default=0, help="seed of weights and order (default: 0)")
@option("--epochs", type=INT, default=4, help="passes over the images (default: 4)")
@option("--images", type=INT, default=20000, help="training images, the first of the set (default: 20000)")
@option("--output", metavar="FILE", help="file of the weights (default: fashion_NETWORK.safetensors)")
def command(network: str, folder: str, seed: int, epochs: int, images: int, output: str | None) -> None:
    """Train a small network of a well-known kind on Fashion-MNIST."""
    file = output or f"fashion_{network}.safetensors"
    spec = f"launch/train_fashion_networks.py:{network}"
    train_and_save(NETWORKS[network], spec, folder, seed, epochs, file, images)


if __name__ == "__main__":
    leave(command.run(program="python launch/train_fashion_networks.py"))
