"""What the tests of the Python API share: a trained network of one channel, and settings of a run of seconds."""

from typing import Any

import torch
from torch import Tensor, nn

SIZE = (1, 12, 12)
SMALL: dict[str, Any] = {
    "synthesis": {"start": "white", "shard_size": 16, "iterations": 2, "num_images": 32},
    "quant.calib_images": 32,
    "finetune": {"batch_size": 16, "epochs": 2},
    "evaluation.heldout_images": 16,
    "runtime.device": "cpu",
}
RESEARCH = {**SMALL, "quant.target": "research"}
"""Without an engine, whose compiler takes seconds to import."""
INPUT: dict[str, Any] = {"input_size": SIZE, "mean": 0.5, "std": 0.25}


class GrayNet(nn.Module):
    """A CNN for gray images, with BatchNorm statistics as after training."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, 5)
            self.train()
            self(torch.randn(64, *SIZE))
            self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


def labeled(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return random images in [0, 1], of 8 bits as from `ToTensor()`, and labels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, *SIZE), generator=generator)
    return pixels.float() / 255, torch.randint(0, 5, (count,), generator=generator)
