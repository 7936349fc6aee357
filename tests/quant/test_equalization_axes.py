"""Equalization pairs layers whose channels are on the same axis."""

import torch
from torch import Tensor, nn

from support.small_nets import trained
from synq.quant.equalization import find_pairs


def test_a_linear_layer_on_a_map_scales_its_last_axis_not_the_channels() -> None:
    class AlongWidth(nn.Module):
        """The linear layer has as many outputs as the next convolution has inputs, on another axis."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix, self.conv = nn.Conv2d(3, 16, 1), nn.Linear(16, 16), nn.Conv2d(16, 4, 3)
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(torch.relu(self.mix(torch.relu(self.stem(x)))))).mean((2, 3)))

    assert [(pair.producer, pair.consumer) for pair in find_pairs(trained(AlongWidth()))] == [("conv", "fc")]
