"""The network of the bundled teachers."""

import pytest
import torch
from torch import nn

from synq.teacher.cifar_resnet import PadShortcut, cifar_resnet


@pytest.mark.parametrize(("depth", "layers"), [(8, 8), (20, 20)])
def test_cifar_resnet_has_depth_weighted_layers(depth: int, layers: int) -> None:
    model = cifar_resnet(depth, 7, in_channels=2, width=4).eval()
    assert sum(isinstance(part, nn.Conv2d | nn.Linear) for part in model.modules()) == layers
    assert model(torch.zeros(3, 2, 18, 18)).shape == (3, 7)
    assert model.stage3(model.stage2(torch.zeros(1, 4, 18, 18))).shape == (1, 16, 5, 5)


def test_resnet20_has_the_parameter_count_of_the_paper() -> None:
    # He et al., table 6: 0.27 M
    assert sum(p.numel() for p in cifar_resnet(20, 10).parameters()) == 269_722


def test_pad_shortcut_keeps_every_second_pixel_between_zero_channels() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    out = PadShortcut(3)(x)
    assert out.shape == (1, 5, 2, 2)
    assert torch.equal(out[0, 1], torch.tensor([[0.0, 2.0], [8.0, 10.0]]))
    assert not out[0, [0, 3, 4]].any()


@pytest.mark.parametrize("fields", [{"depth": 10}, {"depth": 2}, {"num_classes": 1}, {"width": 0}, {"in_channels": 0}])
def test_cifar_resnet_rejects_impossible_sizes(fields: dict[str, int]) -> None:
    name = next(iter(fields))
    with pytest.raises(ValueError, match=f"`{name}` must .* but got {fields[name]}"):
        cifar_resnet(**{"depth": 8, "num_classes": 10, **fields})
