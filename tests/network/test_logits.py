"""Logits of many images, whatever the network's parameters are."""

import pytest
import torch
from torch import nn

from synq.network.logits import logits_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_logits_have_the_dtype_of_the_network(dtype: torch.dtype, batch_size: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).to(dtype)
    images = torch.randn(7, 3, 2, 2)
    found = logits_of(net, images, batch_size)
    assert found.dtype == dtype and found.shape == (7, 4) and not found.requires_grad
    assert torch.allclose(found, net(images.to(dtype)), atol=1e-2)


def test_a_network_without_parameters_takes_the_images_as_they_are() -> None:
    images = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    assert torch.equal(logits_of(nn.Flatten(), images, 2), images.flatten(1))
