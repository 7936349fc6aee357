"""The generator network: sizes, initialization, independence of global state."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from synq.synthesis.generators import ConditionalBatchNorm, ImageGenerator, map_sizes


@given(st.integers(1, 300), st.integers(1, 300))
def test_maps_double_up_to_the_image(height: int, width: int) -> None:
    sizes = map_sizes(height, width)
    assert sizes[-1] == (height, width) and len(sizes) >= 2
    for small, large in itertools.pairwise(sizes):
        assert all(least == -(-most // 2) for least, most in zip(small, large, strict=True))
    assert min(sizes[0]) <= 8 and (len(sizes) == 2 or min(sizes[1]) > 8)


def test_maps_of_common_sizes() -> None:
    assert map_sizes(32, 32) == [(8, 8), (16, 16), (32, 32)]
    assert map_sizes(9, 30) == [(5, 15), (9, 30)]
    assert [side for side, _ in map_sizes(224, 224)] == [7, 14, 28, 56, 112, 224]
    assert map_sizes(8, 8) == [(4, 4), (8, 8)]


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 9, 30), (2, 17, 11), (4, 32, 32), (3, 50, 21), (3, 224, 224)])
def test_images_of_any_size_begin_normalized(size: tuple[int, int, int], torch_rng_untouched: None) -> None:
    generator = torch.Generator().manual_seed(0)
    net = ImageGenerator(16, size, generator)
    images = net(torch.randn(4, 16, generator=generator))
    assert images.shape == (4, *size) and images.dtype == torch.float32
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(size[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(size[0]), atol=1e-3, rtol=0)
    assert images.std(0).mean() > 0.3, "images of different latents differ"
    assert sum(parameter.numel() for parameter in net.parameters()) < 1e6


def test_the_layout_is_channels_last() -> None:
    net = ImageGenerator(8, (3, 12, 10), torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert net(torch.randn(2, 8)).is_contiguous(memory_format=torch.channels_last)


def test_the_generator_decides_the_weights(torch_rng_untouched: None) -> None:
    nets = [ImageGenerator(8, (3, 16, 16), torch.Generator().manual_seed(seed), 3) for seed in (0, 0, 1)]
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["linear.weight"], states[2]["linear.weight"])
    for name, weight in states[0].items():
        if name.endswith("weight"):
            expected = weight[0].numel() ** -0.5
            assert weight.std().item() == pytest.approx(expected, rel=0.15), name


def test_every_parameter_gets_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    net = ImageGenerator(8, (2, 20, 9), generator, 2)
    images = net(torch.randn(6, 8, generator=generator), torch.tensor([0, 1] * 3))
    target = torch.randn(images.shape, generator=generator)
    (images * target).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.parameters())


def test_one_class_is_plain_batch_norm_and_classes_have_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 2, generator=generator)
    scale, shift = torch.randn(2, 3, generator=generator), torch.randn(2, 3, generator=generator)
    norm = ConditionalBatchNorm(2, 3)
    with torch.no_grad():
        norm.scale.copy_(scale)
        norm.shift.copy_(shift)
    made = norm(x, torch.tensor([0, 1, 1, 0]))
    for row, label in enumerate([0, 1, 1, 0]):
        expected = F.batch_norm(x, None, None, scale[label], shift[label], training=True)[row]
        torch.testing.assert_close(made[row], expected)
