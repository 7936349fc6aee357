"""Swing convolutions: the shift against padding and cropping, the output of a shifted convolution, removal of hooks."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synq.synthesis.swing import SwingConvolutions, draw_swings, reflect_shift, strided_convolutions


@pytest.mark.parametrize("down", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("right", [-2, 0, 1])
def test_shift_is_padding_and_cropping(down: int, right: int) -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    expected = padded[:, :, 2 + down : 7 + down, 2 + right : 6 + right]
    made = reflect_shift(x, (down, right))
    assert torch.equal(made, expected)
    weight = torch.randn(made.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,), (reference,) = (torch.autograd.grad((y * weight).sum(), x) for y in (made, expected))
    torch.testing.assert_close(gradient, reference)


def test_shift_of_a_row() -> None:
    row = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert reflect_shift(row, (0, 1)).tolist() == [[2, 3, 4, 3]]
    assert reflect_shift(row, (0, -1)).tolist() == [[2, 1, 2, 3]]
    assert reflect_shift(row, (1, 0)) is row, "one row has nothing to mirror"
    assert reflect_shift(row, (0, 9)).tolist() == [[4, 3, 2, 1]]


def test_shift_keeps_the_layout() -> None:
    x = torch.randn(2, 3, 6, 5).contiguous(memory_format=torch.channels_last)
    assert reflect_shift(x, (1, -1)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stride", [2, 3, (1, 2), (3, 2)])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 0), (3, 1), (5, 2)])
def test_a_swung_convolution_is_the_convolution_of_a_shifted_input(
    stride: int | tuple[int, int], kernel: int, padding: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, kernel, stride, padding)).requires_grad_(False)
    big = torch.randn(2, 2, 15, 15, generator=generator)
    x = big[:, :, 2:13, 2:13]  # of which the neighborhood is known
    plain = net(x)
    limits = [size - 1 for size in net[0].stride]
    with SwingConvolutions(net, [[(0, 0)], [(limits[0], limits[1])], [(-limits[0], 0)]]) as swing:
        assert torch.equal(net(x), plain), "before the first turn"
        swing.set_step(0)
        assert torch.equal(net(x), plain)
        swing.set_step(1)
        shifted = net(x)
        swing.set_step(2)
        back = net(x)
    assert shifted.shape == back.shape == plain.shape
    assert not torch.equal(shifted, plain)
    # Where neither the mirrored border nor the padding is read, it is the convolution of the moved window.
    window = net(big[:, :, 2 + limits[0] : 13 + limits[0], 2 + limits[1] : 13 + limits[1]])
    torch.testing.assert_close(shifted[..., 1, 1], window[..., 1, 1])
    torch.testing.assert_close(back, net(reflect_shift(x, (-limits[0], 0))))


def test_every_position_gets_gradient() -> None:
    """A kernel of one pixel and stride 2 reads one position in four; swung, all of them in turn."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1, 2)).requires_grad_(False)
    x = torch.zeros(1, 1, 6, 6, requires_grad=True)
    (still,) = torch.autograd.grad(net(x).sum(), x)
    assert (still != 0).sum() == 9
    swings = draw_swings(net, 40, torch.Generator().manual_seed(0))
    total = torch.zeros_like(x)
    with SwingConvolutions(net, swings) as swing:
        for step in range(40):
            swing.set_step(step)
            total += torch.autograd.grad(net(x).sum(), x)[0].abs()
    assert (total > 0).all()


def test_draws_cover_the_range_of_each_layer() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 3, (1, 2)), nn.Conv2d(1, 1, 3), nn.Sequential(nn.Conv2d(1, 1, 3, 3)))
    assert strided_convolutions(net) == [net[0], net[2][0]]
    state = torch.get_rng_state()
    steps = draw_swings(net, 300, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(steps) == 300 and {len(step) for step in steps} == {2}
    assert {first for first, _ in steps} == {(0, right) for right in (-1, 0, 1)}
    assert {second for _, second in steps} == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    assert steps == draw_swings(net, 300, torch.Generator().manual_seed(0))
    assert draw_swings(nn.Conv2d(1, 1, 3), 2, torch.Generator()) == [[], []]


def test_no_hook_remains(make_classifier: object) -> None:
    net = make_classifier()  # type: ignore[operator]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x: Tensor = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = net(x)
    with pytest.raises(RuntimeError, match="in the block"), SwingConvolutions(net, [[(1, 1)]]) as swing:
        assert [bool(layer._forward_pre_hooks) for layer in strided_convolutions(net)] == [True]
        swing.set_step(0)
        assert not torch.equal(net(x), plain)
        raise RuntimeError("in the block")
    assert torch.equal(net(x), plain)
    assert not any(layer._forward_pre_hooks or "forward" in vars(layer) for layer in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_without_shifts_no_hook() -> None:
    net = nn.Conv2d(1, 1, 3, 2)
    with SwingConvolutions(net, []) as swing:
        swing.set_step(0)
        assert not net._forward_pre_hooks
