"""Batch-norm statistics: values and gradients against slow reference functions, hooks, pooling."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from synq.network.bn_stats import (
    BatchNormInputs,
    ChannelStatistics,
    bn_targets,
    bns_loss,
    channel_moments,
    pool_layers,
    pool_statistics,
)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU()
    )
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return net.eval().requires_grad_(False)


def _num_hooks(module: nn.Module) -> int:
    """Hooks, and instance attributes that replace a layer's forward."""
    hooks = sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in module.modules())
    return hooks + sum("forward" in vars(part) for part in module.modules())


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 7), (4, 1, 5, 3), (2, 3, 2, 3, 2)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_are_those_of_numpy(shape: tuple[int, ...], offset: float) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + offset
    mean, variance = channel_moments(x)
    axes = (0, *range(2, len(shape)))
    np.testing.assert_allclose(mean.numpy(), x.double().numpy().mean(axes), rtol=1e-6, atol=1e-6)
    # The mean of the squares less the square of the mean would have no digit left at offset 1000.
    np.testing.assert_allclose(variance.numpy(), x.double().numpy().var(axes), rtol=1e-3)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_moments_of_many_values_in_either_layout(offset: float) -> None:
    x = torch.randn(64, 5, 32, 32, generator=torch.Generator().manual_seed(1)) + offset
    wanted = x.double().numpy()
    for layout in (torch.contiguous_format, torch.channels_last):
        mean, variance = channel_moments(x.contiguous(memory_format=layout))
        np.testing.assert_allclose(mean.numpy(), wanted.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(variance.numpy(), wanted.var((0, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("shape", [(16, 3, 112, 112), (3, 2, 224, 224)])
def test_sums_over_large_images_keep_their_digits(shape: tuple[int, ...]) -> None:
    """One of PyTorch's kernels sums sequentially: over a whole batch at once its variance is 1e-3 too small."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).relu() + 0.1
    wanted = x.double().numpy()
    mean, variance = channel_moments(x.contiguous(memory_format=torch.channels_last))
    np.testing.assert_allclose(mean.numpy(), wanted.mean((0, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(variance.numpy(), wanted.var((0, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("used", ["all", "output", "statistics", "mean", "variance"])
def test_fused_layer_has_the_gradient_of_layer_and_statistics_apart(
    layout: torch.memory_format, affine: bool, used: str
) -> None:
    generator = torch.Generator().manual_seed(4)
    layer = nn.BatchNorm2d(5, affine=affine, eps=1e-3).double().eval().requires_grad_(False)
    assert layer.running_mean is not None and layer.running_var is not None
    for part in (layer.running_mean, layer.running_var, *layer.parameters()):
        part.copy_(torch.rand(5, generator=generator) + 0.5)
    x = torch.randn(3, 5, 6, 4, dtype=torch.float64, generator=generator).contiguous(memory_format=layout)
    x.requires_grad_()
    pull = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    target = {"": ChannelStatistics(torch.ones(5).double(), torch.ones(5).double(), 1e-3, 0)}

    def loss(out: torch.Tensor, statistics: dict[str, ChannelStatistics]) -> torch.Tensor:
        if used in ("mean", "variance"):
            return getattr(statistics[""], used).square().sum()
        by_output = (out * pull).square().sum() if used != "statistics" else 0.0
        return by_output + (bns_loss(statistics, target, "std_sum") if used != "output" else 0.0)

    with BatchNormInputs(layer) as inputs:
        out = layer(input=x)
        (fused,) = torch.autograd.grad(loss(out, inputs.take()), x)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    apart = layer(x)
    (wanted,) = torch.autograd.grad(loss(apart, {"": ChannelStatistics(mean, variance, 1e-3, 0)}), x)
    torch.testing.assert_close(out, apart)
    torch.testing.assert_close(fused, wanted)


def test_fused_layer_whose_output_has_no_gradient_gives_none() -> None:
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> None:
            return None

    layer = nn.BatchNorm2d(2).eval().requires_grad_(False)
    x = torch.ones(1, 2, 3, 3, requires_grad=True)
    with BatchNormInputs(layer):
        Cut.apply(layer(x)).sum().backward()
    assert x.grad is None


def test_the_kernel_is_chosen_by_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give the same values; each is the faster one for its layout."""
    calls: list[int] = []
    kernel = torch.batch_norm_update_stats

    def counted(*args: Any) -> Any:
        calls.append(1)
        return kernel(*args)

    monkeypatch.setattr(torch, "batch_norm_update_stats", counted)
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(6))
    apart = channel_moments(x)
    assert not calls
    together = channel_moments(x.contiguous(memory_format=torch.channels_last))
    assert len(calls) == 1
    torch.testing.assert_close(together, apart)


def test_the_kernel_of_gpus_has_the_same_moments() -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(6))
    for found, wanted in zip(channel_moments(x.as_subclass(OnGpu)), channel_moments(x), strict=True):
        torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted)


def test_layers_that_learn_or_compute_their_own_way_keep_their_forward() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    net = nn.Sequential(Doubled(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2)).eval()
    net[0].requires_grad_(False)
    net[1].bias.requires_grad_(False)
    net[2].requires_grad_(False)
    x = torch.randn(3, 2, 4, 4)
    wanted = net(x)
    with BatchNormInputs(net) as inputs:
        assert ["forward" in vars(layer) for layer in net] == [False, False, True]
        out = net(x)
        assert len(inputs.take()) == 3
    torch.testing.assert_close(out, wanted)
    out.sum().backward()
    assert net[1].weight.grad is not None and net[0].weight.grad is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_have_the_gradient_of_var_mean(layout: torch.memory_format) -> None:
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = x.contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(channel_moments, (x,))
    weights = torch.randn(2, 4, dtype=torch.float64)
    mean, variance = channel_moments(x)
    (fast,) = torch.autograd.grad((weights[0] * mean + weights[1] * variance).sum(), x)
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    (slow,) = torch.autograd.grad((weights[0] * mean + weights[1] * variance).sum(), x)
    torch.testing.assert_close(fast, slow)


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.full((64, 1, 64, 64), 0.1, dtype=torch.bfloat16)
    mean, variance = channel_moments(x)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, x[0, :, 0, 0].float(), rtol=1e-6, atol=0)
    assert variance.item() < 1e-10


def test_collects_the_input_of_each_layer() -> None:
    net, x = _net(), torch.randn(3, 2, 8, 9, generator=torch.Generator().manual_seed(3))
    with BatchNormInputs(net) as inputs:
        net(x)
        found = inputs.take()
        assert inputs.take() == {}
    hidden = net[0](x)
    for name, value in (("1", hidden), ("4", net[3](net[2](net[1](hidden))))):
        assert found[name].num_values == 3 * value.shape[2] * value.shape[3]
        torch.testing.assert_close(found[name].mean, value.mean((0, 2, 3)))
        torch.testing.assert_close(found[name].variance, value.var((0, 2, 3), correction=0))
    assert list(found) == ["1", "4"] and found["4"].eps == 1e-3


def test_no_hook_remains() -> None:  # trap 5
    net, x = _net(), torch.randn(2, 2, 8, 8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with BatchNormInputs(net):
        net(x)
        assert _num_hooks(net) == 2
    assert _num_hooks(net) == 0
    with pytest.raises(RuntimeError), BatchNormInputs(net):
        net(torch.randn(2, 5, 8, 8))
    assert _num_hooks(net) == 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.requires_grad_()  # with hooks instead of another forward
    with BatchNormInputs(net):
        assert _num_hooks(net) == 2
    assert _num_hooks(net) == 0


def test_a_layer_used_twice_is_pooled() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.bn(x)[:1] + 3)

    net, x = Twice().eval(), torch.randn(4, 2, 3, 3)
    with BatchNormInputs(net) as inputs:
        net(x)
        (found,) = inputs.take().values()
    both = torch.cat([x, net.bn(x)[:1] + 3])
    torch.testing.assert_close(found.mean, both.mean((0, 2, 3)))
    torch.testing.assert_close(found.variance, both.var((0, 2, 3), correction=0))


def test_targets_are_the_running_statistics() -> None:
    net = _net()
    targets = bn_targets(net)
    assert list(targets) == ["1", "4"]
    assert torch.equal(targets["4"].mean, net[4].running_mean) and torch.equal(
        targets["4"].variance, net[4].running_var
    )
    for bare in (nn.Conv2d(1, 1, 1), nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3)):
        assert bn_targets(bare) == {}


def _statistics(mean: list[float], variance: list[float], eps: float = 0.0) -> ChannelStatistics:
    return ChannelStatistics(torch.tensor(mean), torch.tensor(variance), eps, 1)


def test_bns_loss_in_numbers() -> None:
    found, goal = {"a": _statistics([0, 0], [1, 4])}, {"a": _statistics([1, 0], [1, 1])}
    assert bns_loss(found, goal, "std_sum").item() == pytest.approx(2)
    assert bns_loss(found, goal, "var_mean").item() == pytest.approx(5)
    # The mean over layers, whatever their numbers of channels; layers that only one side has do not count.
    found |= {"b": _statistics([0], [1]), "only here": _statistics([9], [9])}
    goal |= {"b": _statistics([3], [1]), "only there": _statistics([9], [9])}
    assert bns_loss(found, goal, "std_sum").item() == pytest.approx((2 + 9) / 2)
    assert bns_loss(found, goal, "var_mean").item() == pytest.approx((5 + 9) / 2)
    with pytest.raises(ValueError, match="share at least one"):
        bns_loss({"c": found["a"]}, goal, "std_sum")
    with pytest.raises(ValueError, match="one of std_sum, var_mean, but got sum"):
        bns_loss(found, goal, "sum")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["std_sum", "var_mean"])
def test_bns_loss_against_a_slow_twin(form: str) -> None:
    net, x = _net(), torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    with BatchNormInputs(net) as inputs:
        net(x)
        loss = bns_loss(inputs.take(), bn_targets(net), form).item()
    layers = []
    value = x.double()
    for layer in net.double():
        if isinstance(layer, nn.BatchNorm2d):
            total = 0.0
            for channel in range(layer.num_features):
                values = value[:, channel].flatten().tolist()
                mean = sum(values) / len(values)
                variance = sum((one - mean) ** 2 for one in values) / len(values)
                want_mean, want = layer.running_mean[channel].item(), layer.running_var[channel].item()
                if form == "std_sum":
                    gap = (variance + layer.eps) ** 0.5 - (want + layer.eps) ** 0.5
                else:
                    gap = variance - want
                total += (mean - want_mean) ** 2 + gap**2
            layers.append(total if form == "std_sum" else total / layer.num_features)
        value = layer(value)
    assert loss == pytest.approx(sum(layers) / len(layers), rel=1e-5)


def test_a_dead_channel_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    net = nn.BatchNorm2d(3).eval().requires_grad_(False)
    with BatchNormInputs(net) as inputs:
        net(x)
        (gradient,) = torch.autograd.grad(bns_loss(inputs.take(), bn_targets(net), "std_sum"), x)
    assert gradient.isfinite().all()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_pooled_parts_are_the_whole(sizes: list[int], seed: int) -> None:  # trap 8
    x = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x += torch.arange(len(x))[:, None]  # so that the parts' means differ
    parts = x.split(sizes)
    mean, variance = pool_statistics(
        torch.stack([part.mean(0) for part in parts]),
        torch.stack([part.var(0, correction=0) for part in parts]),
        torch.tensor(sizes),
    )
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(variance, x.var(0, correction=0))


def test_pooling_in_numbers() -> None:  # trap 8: one value 0, three values 4
    mean, variance = pool_statistics(torch.tensor([[0.0], [4.0]]), torch.zeros(2, 1), torch.tensor([1, 3]))
    assert (mean.item(), variance.item()) == (3.0, 3.0)


def test_pooled_batches_are_one_forward_pass() -> None:  # trap 8, end to end
    net, x = _net(), torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(5))
    x[4:] += 2
    with BatchNormInputs(net) as inputs:
        parts = []
        for part in x.split([4, 1]):
            net(part)
            parts.append(inputs.take())
        net(x)
        whole = inputs.take()
    pooled = pool_layers(parts)
    for name, one in whole.items():
        torch.testing.assert_close(pooled[name].mean, one.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pooled[name].variance, one.variance, rtol=1e-5, atol=1e-6)
        assert pooled[name].num_values == one.num_values


def test_pooling_stays_on_the_device() -> None:
    one = ChannelStatistics(torch.ones(3, device="meta"), torch.ones(3, device="meta"), 0.0, 4)
    assert pool_layers([{"a": one}, {"a": one}])["a"].mean.device.type == "meta"
